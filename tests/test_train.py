"""The entry points as a user runs them: whole, killed and started again, on 8 devices."""

import importlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from pixel_jax import parallel, trajectory
from pixel_jax.data import quarantine
from pixel_jax.evals import protocol
from pixel_jax.run import checkpoint, lock

ROOT = pathlib.Path(__file__).resolve().parent.parent
SFT = ("train_sft", "configs/sft.py:tiny,base")
RL = ("train_rl", "configs/rl.py:tiny")
SMALL_SFT = dict(total_steps=5, save_every=2, eval_every=3, **{"optim.warmup_steps": 1})
LORA = {"lora.rank": 4, "lora.alpha": 8.0}
SMALL_RL = SMALL_SFT | {
  "total_steps": 4,
  "keep_trajectories_every": 1,
  "rl.prompts_per_step": 4,
  "rl.rows": 8,
  "eval.tasks": 4,
  "engine.slots": 32,
}


def command(entry, workdir, **overrides):
  module, config = entry
  flags = [f"--config.{k}={v}" for k, v in overrides.items()]
  return [
    sys.executable, "-m", f"pixel_jax.{module}", f"--config={config}",
    f"--workdir={workdir}", *flags,
  ]  # fmt: skip


def start(entry, workdir, devices=1, **overrides):
  env = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
  }
  return subprocess.Popen(
    command(entry, workdir, **overrides),
    cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
  )  # fmt: skip


def run(entry, workdir, devices=1, **overrides):
  process = start(entry, workdir, devices, **overrides)
  out, _ = process.communicate(timeout=600)
  assert process.returncode == 0, out
  return out


def kill_at(entry, workdir, step, number=signal.SIGKILL, **overrides):
  """A signal as soon as metrics.jsonl shows `step`; SIGTERM saves and exits with 0."""
  process = start(entry, workdir, **overrides)
  metrics = pathlib.Path(workdir) / "metrics.jsonl"
  until = time.monotonic() + 600
  while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= step):
    assert process.poll() is None, process.communicate()[0]
    assert time.monotonic() < until
    time.sleep(0.02)
  process.send_signal(number)
  out, _ = process.communicate(timeout=600)
  if number == signal.SIGTERM:
    assert process.returncode == 0 and "stopped by a signal: step " in out, out
    saved = checkpoint.complete_steps(pathlib.Path(workdir) / "checkpoints")[-1]
    assert saved == len(read_metrics(workdir)) < overrides["total_steps"]
  else:
    assert process.returncode == -number


def read_metrics(workdir):
  """The lines without what depends on the clock."""
  lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  return [{k: v for k, v in r.items() if not k.startswith("perf/")} for r in rows]


def params_of(workdir):
  params, _ = checkpoint.load_params(workdir)
  return {k: np.asarray(v) for k, v in checkpoint._by_path(params).items()}


def assert_same_run(one, other):
  assert read_metrics(one) == read_metrics(other)
  a, b = params_of(one), params_of(other)
  assert a.keys() == b.keys()
  for path in a:
    assert np.array_equal(a[path], b[path]), path


# ---- In this process -----------------------------------------------------------------


def play(entry, workdir, **overrides):
  """An entry point's `main` on its config, as `start.run` calls it."""
  module, config = entry
  name, arg = re.fullmatch(r"configs/(\w+)\.py:(.*)", config).groups()
  config = importlib.import_module(f"pixel_jax.configs.{name}").get_config(arg)
  config.update_from_flattened_dict(overrides)
  try:
    importlib.import_module(f"pixel_jax.{module}").main(config, workdir)
  finally:
    lock.release()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  """A base run of a few steps that was not disturbed."""
  workdir = tmp_path_factory.mktemp("runs") / "base"
  play(SFT, workdir, **SMALL_SFT)
  return workdir


@pytest.fixture(scope="module")
def judged():
  """A policy of a few steps is never right: it is rewarded for something."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(protocol, "judge", lambda t: float(sum(t.ids) % 2))
    yield


@pytest.fixture(scope="module")
def rl(base, judged):
  workdir = base.parent / "rl"
  play(RL, workdir, init=str(base), **SMALL_RL)
  return workdir


def cut_back(run, step, to):
  """A copy of a run as a kill leaves it: later lines are told, but nothing is saved."""
  shutil.copytree(run, to)
  for saved in (to / "checkpoints").iterdir():
    if saved.name.isdigit() and int(saved.name) > step:
      shutil.rmtree(saved)
  lines = (to / "metrics.jsonl").read_text().splitlines(keepends=True)
  (to / "metrics.jsonl").write_text("".join(lines[: step + 1]) + '{"step": 4, "lo')
  return to


def test_sft_leaves_what_the_next_stage_needs(base):
  rows = read_metrics(base)
  assert [r["step"] for r in rows] == [1, 2, 3, 4, 5]
  assert all(np.isfinite(r["loss"]) for r in rows)
  assert "eval/loss" in rows[2] and "eval/loss" in rows[4]
  assert (base / "config.json").exists() and (base / "tokenizer").is_dir()
  assert checkpoint.complete_steps(base / "checkpoints") == [2, 4, 5]


def test_sft_goes_on_bit_for_bit(base, tmp_path):
  again = cut_back(base, 2, tmp_path / "run")
  play(SFT, again, **SMALL_SFT)
  assert_same_run(base, again)


def test_rl_logs_agreement_and_rewards(rl):
  rows = read_metrics(rl)
  assert [r["step"] for r in rows] == [1, 2, 3, 4]
  for r in rows:
    assert 0 <= r["ops/rapr"] <= 1 and 0 <= r["reward/correct"] <= 1
    assert not r["optim/skipped"] and r["agreement/logp_diff_max"] < 1e-4
    assert r["rollout/host_syncs_per_chunk"] == r["rollout/prefills_per_group"] == 1
    assert 0 < r["rollout/occupancy"] <= 1 and r["rollout/too_long_prompts"] == 0
  for i in range(1, 5):
    kept = list(trajectory.read_jsonl(rl / f"trajectories/step_{i:06d}.jsonl"))
    assert len(kept) == 4 * 8
    assert all(t.stop and "total" in t.reward for t in kept)


def test_rl_goes_on_bit_for_bit(base, rl, tmp_path):
  again = cut_back(rl, 2, tmp_path / "run")
  play(RL, again, init=str(base), **SMALL_RL)
  assert_same_run(rl, again)
  for file in sorted((rl / "trajectories").iterdir()):
    assert (again / "trajectories" / file.name).read_text() == file.read_text(), (
      file.name
    )


@pytest.mark.slow
def test_rl_goes_on_past_prompts_that_have_no_room(base, judged, tmp_path):
  """Images take 14 tokens, clips 9: no image is asked about, and all groups are played."""
  short = {"engine.max_prompt": 8, "engine.prompt_len": 8, "total_steps": 2}
  few = {"data.max_bad_share": 0.9, "data.shards": 1}  # one of four has all the clips
  play(RL, tmp_path / "run", init=str(base), **SMALL_RL | short | few)
  rows = read_metrics(tmp_path / "run")
  assert [r["rollout/too_long_prompts"] for r in rows] == [0.0, 0.0]
  assert rows[-1]["data/bad_records"] > 0
  told = (tmp_path / "run" / "quarantine.jsonl").read_text()
  assert "the prompt has 14 tokens" in told and "max_prompt=8" in told
  for i in (1, 2):
    kept = list(
      trajectory.read_jsonl(tmp_path / f"run/trajectories/step_{i:06d}.jsonl")
    )
    assert len(kept) == 4 * 8 and all(any(t.sampled) for t in kept)
    assert {t.task.media[0].kind for t in kept} == {"video"}
  with pytest.raises(quarantine.DataError, match="max_prompt=8"):
    play(RL, tmp_path / "most", init=str(base), **SMALL_RL | short)


def test_evaluate_makes_the_table(base, rl, tmp_path, monkeypatch):
  entry = ("evaluate", "configs/evaluate.py:tiny")
  few = {"data.tasks": 8, "engine.slots": 32}
  one = parallel.make_mesh(1, 1, 1)  # else it plays on engines of all eight devices
  monkeypatch.setattr(parallel, "make_mesh", lambda: one)
  play(entry, tmp_path / "eval", policies=f"BASE={base},RL={rl}", **few)
  result = json.loads((tmp_path / "eval" / "evaluation.json").read_text())
  assert [r["name"] for r in result["rows"]] == ["BASE", "RL"]
  for row in result["rows"]:
    for mode in ("free", "forbidden", "forced"):
      low, high = row["modes"][mode]["ci"]
      assert low <= row["modes"][mode]["accuracy"] <= high
    assert row["modes"]["forbidden"]["rapr"] == 0


# ---- Processes of their own, killed and told to leave --------------------------------


@pytest.fixture(scope="module")
def whole(base):
  """The base run as a process of one device."""
  workdir = base.parent / "whole"
  assert "done: 5 steps" in run(SFT, workdir, **SMALL_SFT)
  return workdir


@pytest.fixture(scope="module")
def able(tmp_path_factory):
  """A policy that gives answers, right ones by chance: its groups are not uniform."""
  workdir = tmp_path_factory.mktemp("able") / "able"
  few = {"total_steps": 60, "save_every": 60, "eval_every": 60}
  run(SFT, workdir, **SMALL_SFT | few)
  return workdir


@pytest.fixture(scope="module")
def whole_rl(able):
  workdir = able.parent / "rl"
  run(RL, workdir, init=able, **SMALL_RL)
  return workdir


@pytest.fixture(scope="module")
def adapted(able):
  """SFT under LoRA from a policy without adapters."""
  workdir = able.parent / "adapted"
  run(("train_sft", "configs/sft.py:tiny"), workdir, init=able, **LORA, **SMALL_SFT)
  return workdir


@pytest.mark.slow
@pytest.mark.parametrize(
  "step, number", [(1, signal.SIGKILL), (3, signal.SIGKILL), (1, signal.SIGTERM)]
)
def test_killed_sft_goes_on_bit_for_bit(whole, step, number, tmp_path):
  kill_at(SFT, tmp_path / "run", step, number, **SMALL_SFT)
  run(SFT, tmp_path / "run", **SMALL_SFT)
  assert_same_run(whole, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("step, number", [(3, signal.SIGKILL), (1, signal.SIGTERM)])
def test_killed_rl_goes_on_bit_for_bit(able, whole_rl, step, number, tmp_path):
  kill_at(RL, tmp_path / "run", step, number, init=able, **SMALL_RL)
  run(RL, tmp_path / "run", init=able, **SMALL_RL)
  assert_same_run(whole_rl, tmp_path / "run")
  for file in sorted((whole_rl / "trajectories").iterdir()):
    assert (tmp_path / "run" / "trajectories" / file.name).read_text() == (
      file.read_text()
    ), file.name


@pytest.mark.slow
@pytest.mark.parametrize("entry", [SFT, RL])
def test_eight_devices_give_the_losses_of_one(entry, able, whole, whole_rl, tmp_path):
  mesh = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
  small, one = (SMALL_SFT, whole) if entry is SFT else (SMALL_RL, whole_rl)
  if entry is RL:
    mesh["fleet.tensor"] = 2  # four engines for four shards
  init = {} if entry is SFT else {"init": able}
  run(entry, tmp_path / "run", devices=8, **init, **small, **mesh)
  # Later steps start from parameters that other roundings have moved apart.
  ours, theirs = read_metrics(tmp_path / "run")[0], read_metrics(one)[0]
  for key in ("loss", "optim/grad_norm", "policy/entropy"):
    assert ours[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-6), key


def assert_only_adapters_differ(one, other):
  a, b = params_of(one), params_of(other)
  for path in a.keys() | b.keys():
    if path.endswith(("/lora_a", "/lora_b")):
      assert path not in a or not np.array_equal(a[path], b[path]), path
    else:
      assert np.array_equal(a[path], b[path]), path
  assert sum(p.endswith(("/lora_a", "/lora_b")) for p in b) == 14


@pytest.mark.slow
def test_lora_moves_only_adapters(able, adapted):
  assert_only_adapters_differ(able, adapted)
  assert all(params_of(adapted)[f"text/blocks/{x}/lora_b"].any() for x in "qkvo")
  extra = checkpoint.load_extra(adapted)
  assert extra["lora"] == {"rank": 4, "alpha": 8.0, "targets": ["^text/blocks/"]}
  losses = [r["loss"] for r in read_metrics(adapted)]
  assert np.isfinite(losses).all() and losses[-1] < losses[0]


@pytest.mark.slow
def test_killed_lora_goes_on_bit_for_bit(able, adapted, tmp_path):
  entry = ("train_sft", "configs/sft.py:tiny")
  kill_at(entry, tmp_path / "run", 3, init=able, **LORA, **SMALL_SFT)
  run(entry, tmp_path / "run", init=able, **LORA, **SMALL_SFT)
  assert_same_run(adapted, tmp_path / "run")


@pytest.mark.slow
def test_rl_and_evaluation_of_adapters(adapted, tmp_path):
  """The sampler has merged weights, the trainer has not: log-probs agree."""
  workdir = tmp_path / "rl"
  run(RL, workdir, init=adapted, **LORA, **SMALL_RL | {"total_steps": 2})
  for r in read_metrics(workdir):
    assert not r["optim/skipped"] and 0 < r["agreement/logp_diff_max"] < 1e-4
  assert_only_adapters_differ(adapted, workdir)
  entry = ("evaluate", "configs/evaluate.py:tiny")
  few = {"data.tasks": 8, "modes": "('free',)"}
  run(entry, tmp_path / "eval", policies=f"RL={workdir}", **few)
  result = json.loads((tmp_path / "eval" / "evaluation.json").read_text())
  assert [r["name"] for r in result["rows"]] == ["RL"]


@pytest.mark.slow
def test_the_readme_on_one_gpu(base, tmp_path):
  """Its commands as they stand, with tiny for 7b: a bf16 base, few steps, PEFT out."""
  readme = (ROOT / "README.md").read_text(encoding="utf-8")
  block = readme.partition("### Train on your GPU")[2].split("```")[1].strip()
  program = [sys.executable, "-m", "pixel_jax"]
  theirs = tmp_path / "DIR"
  first = [*program, "convert", "export", f"--checkpoint={base}", f"--out={theirs}"]
  imported = [*program, "convert", "import", f"--hf={theirs}"]
  imported += [f"--out={tmp_path}/CKPT", "--dtype=bfloat16"]
  steps = {"sft": SMALL_SFT, "rl": SMALL_RL}
  for words in (first, imported, *(line.split() for line in block.splitlines())):
    if words[0] == "pixel-jax":
      words = program + [
        re.sub("=(DIR|ADAPTER|MERGED|runs/lora|runs/lora-rl)$", rf"={tmp_path}/\1", w)
        for w in words[1:]
      ]
    for name in steps.keys() & set(words):
      words = [w.replace(":7b", ":tiny") for w in words]
      words += [f"--config.{k}={v}" for k, v in steps[name].items()]
    ran = subprocess.run(
      words, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"},
      capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
  saved = params_of(tmp_path / "runs" / "lora")
  for path, x in params_of(tmp_path / "CKPT").items():
    assert x.dtype.name == "bfloat16" and np.array_equal(x, saved[path]), path
  adapters = [x for path, x in saved.items() if "/lora_" in path]
  assert len(adapters) == 14 and all(x.dtype == np.float32 for x in adapters)
  tensors = load_file(tmp_path / "ADAPTER" / "adapter_model.safetensors")
  assert len(tensors) == 2 * 14 and all(x.any() for x in tensors.values())
  names = load_file(theirs / "model.safetensors").keys()
  assert load_file(tmp_path / "MERGED" / "model.safetensors").keys() == names


# ---- Mistakes ------------------------------------------------------------------------

MISTAKES = {
  "--config.total_stepz=3": "total_steps",
  "--config.optim.lrr=3": "did you mean config.optim.lr?",
  "--config.mesh.zzz=3": "the fields of config.mesh are data, fsdp, tensor",
  "--config.lr=3": "did you mean config.optim.lr?",
  "--config.total_steps=many": "config.total_steps=many: expected a value of the type int",
  "--config.mesh.data=3": "mesh",
  "--config.data.uri=world:tarin": "train",
  "--config.init=/nowhere": "/nowhere",
  "--config.init=": "config.init is empty",
  "--config.optim.lr=-1": "expected a number above 0; the config file has 0.003",
  "--config.model.attention=splsh": "did you mean splash?",
  "--config.model.attention=splash": "needs a TPU",
  "--config.data.changed=acept": "did you mean accept?",
  "--config.optim.warmup_steps=700": "warmup_steps = 700 is not within 0 .. 600",
  "--config=configs/rl.py:tiny": "no section 'features'",
  "--config.synthesis.jitter=abc": "jitter",
  "--config.lora.rank=4 --config.lora.targets=('q_proj',)": "text/blocks/q",
  "--config=configs/sfft.py:tiny": "did you mean sft",
  "--config=configs/sft.py:tinny": "tinny",
}

# A process for each would import jax each time; so they are forks of one, which has not
# touched a device yet.
FORKS = """
import json, os, sys
from pixel_jax import train_sft
from pixel_jax.run import start
for argv in json.load(sys.stdin):
  read, write = os.pipe()
  if not (pid := os.fork()):
    os.dup2(write, 2)
    sys.argv = argv
    try:
      start.run(train_sft.main)
    except SystemExit as end:
      os._exit(end.code or 0)
    finally:
      sys.stderr.flush()
    os._exit(9)
  os.close(write)
  said = os.fdopen(read).read()
  print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said]), flush=True)
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
  """What a wrong command says, and its exit code."""
  right = command(SFT, tmp_path_factory.mktemp("wrong") / "run")[2:]
  asked = [[*right, *flags.split()] for flags in MISTAKES]
  done = subprocess.run(
    [sys.executable, "-c", FORKS], cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"},
    input=json.dumps(asked), capture_output=True, text=True, timeout=600,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  return dict(zip(MISTAKES, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("flags", MISTAKES)
def test_a_mistake_in_the_command_is_told_in_one_line(flags, told):
  code, said = told[flags]
  assert code == 2, said
  last = said.strip().splitlines()[-1]
  assert last.startswith("error: ") and MISTAKES[flags] in last
  assert "Traceback" not in said
