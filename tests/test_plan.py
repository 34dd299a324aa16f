"""tools/compile/plan.py: an RL step of the 7B on v5p against formulas worked out here.

Those are limits.md 2.1 and 2.2 written out again: 14.14 GF + 0.2007 MF x T a causal
token, 14.14 GB of weights and 57,344 B of cache a step of decoding.
"""

import json
import pathlib
import subprocess
import sys

import pytest

from pixel_jax import trajectory
from pixel_jax.configs import rl, sft
from pixel_jax.run import settings
from pixel_jax.tools.compile import plan as compile_plan
from pixel_jax.tools.compile.plan import Machine, Turn

ROOT = pathlib.Path(__file__).resolve().parent.parent
FLOPS, HBM, ICI, DCN = 459e12, 2.765e12, 300e9, 6.2e9  # of a v5p chip
NUMBERS = 8_292_166_656


@pytest.fixture(scope="module")
def config():
  config = rl.get_config("7b")
  config.model.remat = "none"
  config.rl.rows = 4  # of a host: one a device
  return config


@pytest.fixture(scope="module")
def model(config):
  model = compile_plan.Model.of(config)
  assert model.numbers == NUMBERS
  return model


def plan(config, model, text, chips=64, slices=1, compiled=None):
  machine = Machine("v5p", chips, slices)
  rollouts = compile_plan.parse(text)
  return compile_plan.plan(config, model, machine, rollouts, compiled or {})


def test_of_adapters_alone_gradients_are_few():
  """Rank 32 on seven linear layers of 28 blocks: 80.7M numbers (README)."""
  config = rl.get_config("7b")
  config.lora.rank = 32
  model = compile_plan.Model.of(config)
  assert sum(model.trained.values()) == 80_740_352
  assert model.numbers == NUMBERS + 80_740_352


def test_a_histogram_that_is_given():
  got = compile_plan.parse("30:1400.1200/350,10:100.0/20+50.40/5")
  one, two = (Turn(1400, 4800, 350),), (Turn(100, 0, 20), Turn(50, 160, 5))
  assert got.kinds == ((0.75, one), (0.25, two))
  assert got.largest == 4800 and got.label == "given"
  assert got.mean(compile_plan.length) == 0.75 * 1750 + 0.25 * 175


@pytest.mark.parametrize(
  "text", ["", "1:5/3", "1:5.6/3", "0:5.5/3", "1:5.5/3,x", "-1:5.5/3"]
)
def test_a_histogram_that_makes_no_sense_is_told(text):
  with pytest.raises(compile_plan.PlanError, match="--rollouts"):
    compile_plan.parse(text)


def rollout(fed, sampled, grids):
  ids, mask, slots = [], [], []
  for f, s, grid in zip(fed, sampled, grids):
    if grid:
      slots.append(trajectory.Slot(len(ids) + 1, 1, grid, "image"))
    ids += [1] * (f + s)
    mask += [False] * f + [True] * s
  task = trajectory.Task("a", "q", "b", [])
  return trajectory.Trajectory(task, ids=ids, sampled=mask, slots=slots)


def test_a_histogram_is_read_from_the_newest_step_of_all_hosts(tmp_path):
  two = rollout((5, 3), (2, 4), ((1, 4, 6), (2, 2, 2)))
  one = rollout((7,), (1,), (None,))
  trajectory.write_jsonl(tmp_path / "step_000001.jsonl", [one] * 9)
  trajectory.write_jsonl(tmp_path / "step_000002.000.jsonl", [one, two])
  trajectory.write_jsonl(tmp_path / "step_000002.001.jsonl", [two, two])
  got = compile_plan.read(str(tmp_path))
  shares = {turns: share for share, turns in got.kinds}
  assert shares == {(Turn(7, 0, 1),): 0.25, (Turn(5, 24, 2), Turn(3, 8, 4)): 0.75}
  assert got.label == "read" and got.largest == 24
  with pytest.raises(compile_plan.PlanError, match="no rollout"):
    compile_plan.read(str(tmp_path / ".."))


def test_weights_go_to_engines_over_the_links(config, model):
  got = plan(config, model, "1:1000.0/200")["reshard"]
  assert got.ici == pytest.approx(2 * NUMBERS * 63 / 64 / ICI) and not got.dcn
  # Each slice holds all of them: nothing passes between slices.
  got = plan(config, model, "1:1000.0/200", slices=4)["reshard"]
  assert got.ici == pytest.approx(2 * NUMBERS * 15 / 16 / ICI) and not got.dcn


def test_decoding_reads_weights_and_cache(config, model):
  """512 groups of 8 on 64 engines: 64 rollouts each, which is less than 128 slots."""
  got = plan(config, model, "1:1000.0/200")["decode"]
  steps = 200 / compile_plan.ASSUMED["occupancy"]
  live = 64 * compile_plan.ASSUMED["occupancy"]
  each = (14.14e9 + (live * 100 + 8 * 1000) * 57_344) / HBM  # a prompt once a group
  assert got.compute == pytest.approx(steps * each, rel=2e-3)
  # Where few rollouts are left to an engine the longest decides.
  got = plan(config, model, "99:1000.0/200,1:1000.0/5000", chips=4096)["decode"]
  assert 5000 * 14.14e9 / HBM < got.compute < 1.2 * 5000 * 14.14e9 / HBM


def test_a_prompt_is_computed_once_a_group(config, model):
  """8 groups an engine; 4 rows of 4,096 tokens at a time, the view is 4,096."""
  got = plan(config, model, "1:4096.0/200")["prefill"]
  token = 2 * 6.525e9 + 28 * 4 * 3584 * (4096 / 2)  # no head
  assert got.compute == pytest.approx(8 * 4096 * token / FLOPS, rel=2e-3)


def test_later_turns_are_padded_to_rows_of_the_engine(config, model):
  two = plan(config, model, "1:1000.0/100+500.0/100")["extend"]
  token = 2 * 6.525e9 + 28 * 4 * 3584 * (2 * 2048 - 2048 / 2)  # of both segments
  used = compile_plan.ASSUMED["calls"]
  assert two.compute == pytest.approx(64 * 2048 * token / FLOPS / used, rel=2e-3)
  assert plan(config, model, "1:1000.0/200")["extend"].compute == 0


def test_pictures_are_encoded_once_a_group_or_a_call(config, model):
  """8 groups of 4,096 patches, and 64 crops of 1,024."""
  got = plan(config, model, "1:1100.1024/100+300.256/100")["vision"]
  patch = 1.294e9 + 20.5e3 * 4096
  assert got.compute == pytest.approx((8 * 4096 + 64 * 1024) * patch / FLOPS, rel=5e-3)


def test_updates_take_three_passes_and_the_logits_again(config, model):
  """257 rows a minibatch: the last takes a fifth micro-batch of 64, which is computed."""
  got = plan(config, model, "1:13746.0/1000")
  T = 16384
  token = 3 * (14.14e9 + 0.2007e6 * T) + 2 * 0.545e9
  rows = 16 * 5 * 64
  once = rows * T / 64 / FLOPS
  apply = 16 * 28 * NUMBERS / 64 / HBM
  assert got["update"].compute == pytest.approx(once * token + apply, rel=3e-3)
  forward = 14.14e9 + 0.2007e6 * T
  assert got["logp"].compute == pytest.approx(once * forward, rel=3e-3)
  weights = 2 * NUMBERS * 63 / 64
  assert got["update"].ici == pytest.approx(80 * 3 * weights / ICI)
  assert got["logp"].ici == pytest.approx(80 * weights / ICI)


def test_gradients_cross_slices_in_every_micro_batch(config, model):
  one = plan(config, model, "1:7000.0/372")
  four = plan(config, model, "1:7000.0/372", slices=4)
  assert one["update"].dcn == 0
  batches = 16 * compile_plan.micro(
    config, Machine("v5p", 64, 4), compile_plan.parse("1:7000.0/372")
  )[0]  # fmt: skip
  crossing = 2 * 3 / 4 * 4 * NUMBERS / 16
  assert four["update"].dcn == pytest.approx(batches * crossing / DCN)
  assert four["logp"].dcn == 0


def test_compiled_bytes_take_the_place_of_the_formula(config, model, tmp_path):
  programs = [
    {"name": "reshard", "links_bytes": 3e9},
    {"name": "logp", "links_bytes": 6e9},
  ]
  file = tmp_path / "check.json"
  file.write_text(json.dumps({"topology": "v5p:4x4x4", "programs": programs}))
  compiled = compile_plan.read_compiled(str(file), "v5p")
  got = plan(config, model, "1:1000.0/200", compiled=compiled)
  assert got["reshard"].ici == 3e9 / ICI and got["reshard"].label == "compiled"
  assert got["logp"].label == "compiled" and got["update"].label == "formula"
  with pytest.raises(compile_plan.PlanError, match="v5p:4x4x4"):
    compile_plan.read_compiled(str(file), "v5e")


def test_engines_without_a_group_are_counted(config):
  assert compile_plan.busy(config, Machine("v5p", 64, 1)) == (64, 8)
  assert compile_plan.busy(config, Machine("v5p", 1024, 1)) == (512, 1)
  assert compile_plan.busy(config, Machine("tpu7x", 64, 1)) == (128, 4)


def test_slices_are_those_that_exist():
  assert [(m.chips, m.slices) for m in compile_plan.machines("v5e")] == [
    (16, 1), (16, 4), (64, 1), (64, 4), (256, 1), (256, 4), (1024, 4), (4096, 16),
  ]  # fmt: skip
  assert all(m.slices == m.chips // 8 for m in compile_plan.machines("h200"))


def test_the_report_labels_every_figure(tmp_path):
  """Within seconds, because nothing is compiled; docs/launch.md shows this very table."""
  file = tmp_path / "plan.json"
  done = subprocess.run(
    [sys.executable, "-m", "pixel_jax", "compile-check", "--config=rl:7b", "--plan",
     "--topology=v5p:4x4x4", f"--json={file}"],
    capture_output=True, text=True, timeout=600,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith("An ESTIMATE")
  report = json.loads(file.read_text())
  labels = set()

  def check(x, known=False):
    if isinstance(x, dict) and "from" in x:
      labels.add(x["from"])
    elif isinstance(x, dict):
      for k, v in x.items():
        if isinstance(v, float) and not known:
          raise AssertionError(f"{k} has no label")
        check(v, known)

  for row in report["rows"]:
    check(row)
  assert labels == {"formula", "assumption", "estimate"}
  assert {r["chips"] for r in report["rows"]} == {16, 64, 256, 1024, 4096}
  shown = done.stdout.partition(f"in {file}")[0]
  assert shown in (ROOT / "docs" / "launch.md").read_text()


def test_a_step_of_sft_is_not_planned():
  with pytest.raises(settings.ConfigError, match="configs/rl.py"):
    compile_plan.main(sft.get_config("7b"), "v5p:4x4x4", None)
