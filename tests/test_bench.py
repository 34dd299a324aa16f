"""tools/bench at its smallest: both sides do the same work, and the figures add up."""

import hashlib
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from pixel_jax.tools.bench import cases, data
from pixel_jax.tools.bench import compare as bench

NAMES = ("preprocess", "vision", "prefill", "decode", "rollout", "sft", "rl")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  """Compiles in half the time; what is timed here means nothing."""
  # One thread for torch: on a busy machine several wait for each other, for minutes.
  monkeypatch.setattr(bench.os, "sched_getaffinity", lambda _: {0})
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
  """(size, config, codec) of the size that the documents report."""
  size = data.SIZES["30m"]
  codec = data.codec(size, tmp_path_factory.mktemp("words"))
  return size, data.model(size, codec.tokenizer), codec


# ---- Data ----------------------------------------------------------------------------


def test_model_has_about_thirty_million_parameters(drawn):
  _, config, _ = drawn
  shapes = bench.qwen2_5_vl.abstract(config)
  total = sum(x.size for x in jax.tree.leaves(shapes))
  assert 28e6 < total < 32e6
  assert config.text.head_dim == config.vision.head_dim == 64
  assert config.text.heads % config.text.kv_heads == 0 and config.text.kv_heads > 1


def test_examples_are_log_normal_and_mostly_unsupervised(drawn):
  size, config, _ = drawn
  examples = data.examples(size, config)
  lengths = np.array([len(e.tokens) for e in examples])
  share = 1 - data.learned(examples) / lengths.sum()
  assert 0.58 <= share <= 0.62
  assert 0.6 < np.log(lengths).std() < 1.0 and lengths.max() <= size.row[1]
  shown = [e for e in examples if e.vision]
  assert 0.5 < len(shown) / len(examples) < 0.9
  for e in shown:
    start, pixels = e.vision[0]
    pads = e.tokens[start : start + pixels.num_merged]
    assert (pads == config.image_token).all() and not e.weight[
      : start + len(pads)
    ].any()
    assert (e.tokens == config.image_token).sum() == len(pads)


def test_drawn_data_depend_on_the_seed_alone(drawn):
  size, config, codec = drawn

  def digest(seed):
    h = hashlib.blake2b(digest_size=8)
    for e in data.examples(size, config, seed):
      for x in (e.tokens, e.position, e.weight, *(p.patches for _, p in e.vision)):
        h.update(np.ascontiguousarray(x).tobytes())
    script = data.script(size, codec.tokenizer, seed=seed)
    h.update(json.dumps(sorted((*k, v) for k, v in script.items())).encode())
    return h.hexdigest()

  assert digest(0) == digest(0) != digest(1)


def test_script_keeps_its_law(drawn):
  size, _, codec = drawn
  script = data.script(size, codec.tokenizer)
  assert len(script) == 64
  counts = [len(turns) for turns in script.values()]
  assert set(counts) == {1, 2, 3, 4, 5, 6} and 2.9 < np.mean(counts) < 3.5
  lengths = np.array([len(ids) for turns in script.values() for ids in turns])
  assert 40 < lengths.mean() < 48 and lengths.max() <= size.longest
  equal = data.script(size, codec.tokenizer, equal=True)
  assert {len(ids) for turns in equal.values() for ids in turns} == {size.turn}
  assert {len(turns) for turns in equal.values()} == {1}


def test_every_call_of_the_script_brings_a_picture(drawn):
  size, _, codec = drawn
  script = data.script(size, codec.tokenizer)
  few = {k: v for k, v in script.items() if k[1] < 2}
  small = data.dataclasses.replace(size, groups=(size.groups[0], 2))
  for key, conversation in data.replay(small, codec, few).items():
    t = conversation.trajectory
    assert [c.error for c in t.calls] == [None] * (len(few[key]) - 1)
    assert len(t.slots) == len(few[key]) and conversation.last_call() is None
    said = np.array(t.ids)[t.sampled].tolist()
    assert said == [i for ids in few[key] for i in ids]


# ---- Measuring -----------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize("name", NAMES)
def test_report(name, tmp_path):
  pytest.importorskip("torch")
  file = tmp_path / "bench.json"
  report = bench.main([name, "--size=tiny", "--repeats=2", f"--json={file}"])
  assert json.loads(file.read_text()) == json.loads(json.dumps(report))
  assert report["bench"] == name and report["versions"]["jax"] == jax.__version__
  assert report["limits"]["flops"] >= report["limits"]["matmul_torch"] > 0
  assert report["machine"]["cores"] >= 1 and report["date"].startswith("20")
  for row in report["rows"]:
    for side in (row["ours"], row["peer"]):
      once = name == "rollout" and side is row["peer"]
      assert len(side["seconds"]) == (1 if once else 2)
      assert side["min"] <= side["median"] <= side["max"]
      assert side["per_s"] == row["work"] / side["median"]
    assert row["ratio"] == row["peer"]["median"] / row["ours"]["median"]
    assert row["check"], "the two sides were not compared"
  if name == "rollout":
    assert [r["target"] for r in report["rows"]] == [5.0, 1.5, 1.5]
    assert all(r["check"]["trajectories_equal"] == 6 for r in report["rows"])
  if name == "sft":
    names = [r["peer_name"] for r in report["rows"]]
    assert names == ["torch SDPA", "torch padded", "torch packed", "torch padded"]


@pytest.mark.slow
def test_without_a_peer_torch_is_not_needed(tmp_path):
  code = (
    "import sys; sys.modules['torch'] = None; "
    "from pixel_jax.tools.bench import compare as bench; "
    "bench.main(['preprocess', '--size=tiny', '--repeats=1', '--no-peer'])"
  )
  run = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, timeout=600,
  )  # fmt: skip
  assert run.returncode == 0, run.stderr[-2000:]
  assert "preprocess" in run.stdout


def test_sides_take_turns_and_the_ratio_is_theirs_over_ours(monkeypatch):
  clock, calls = [0.0], []

  def side(name, seconds):
    def run():
      calls.append(name)
      clock[0] += seconds
      return [1.0]

    return run

  monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
  case = cases.Case(
    "x", "tokens", 12, side("ours", 2.0), {"peer": side("peer", 6.0)}, flops=40.0,
    target={"peer": 1.5}, check=cases.close("x", 1e-3),
  )  # fmt: skip
  limits = {"flops": 40.0, "bandwidth": 1.0, "matmul_jax": 40.0, "matmul_torch": 20.0}
  (row,) = bench.measure(case, 3, limits)
  assert row["ratio_equal_matmul"] == 1.5
  turns = ["ours", "peer", "peer", "ours", "ours", "peer"]
  assert calls == ["ours", "peer", *(name for name in turns for _ in range(2))]
  assert row["ratio"] == 3.0 and row["target"] == 1.5
  assert row["ours"]["per_s"] == 6.0 and row["ours"]["share"] == 0.5
  assert row["ours"]["seconds"] == [2.0] * 3 and row["check"] == {"x_difference": 0.0}


def test_unequal_work_is_an_error():
  check = cases.close("loss", 1e-4)
  assert check([1.0, 2.0], [1.0, 2.0001])["loss_difference"] < 1e-4
  for theirs in ([1.0, 2.01], [1.0], [1.0, float("nan")]):
    with pytest.raises(cases.Unequal, match="loss"):
      check([1.0, 2.0], theirs)


@pytest.mark.slow
def test_a_rollout_that_strays_from_the_script_is_an_error(tmp_path):
  size = data.SIZES["tiny"]
  b = bench.open_bench(size, tmp_path, with_peer=False)
  case = cases.CASES["rollout"](b)[1]
  played = case.ours()
  key = next(iter(played))
  strayed = dict(played)
  strayed[key] = data.dataclasses.replace(played[key], ids=[*played[key].ids[:-1], 0])
  with pytest.raises(cases.Unequal, match="theirs did not say"):
    case.check(played, strayed)


def test_a_slow_peer_is_called_once():
  calls = []

  def side(name):
    return lambda: calls.append(name) or [1.0]

  case = cases.Case("x", "tokens", 1, side("ours"), {"peer": side("peer")}, slow=True)
  (row,) = bench.measure(case, 2, {"flops": 1.0, "bandwidth": 1.0, "matmul_jax": 1.0})
  assert calls == ["ours", "peer", "ours", "ours", "ours"]
  assert len(row["peer"]["seconds"]) == 1 and len(row["ours"]["seconds"]) == 2
