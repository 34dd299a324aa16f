"""Whole runs as 1, 2 and 4 processes of four devices in all: the same losses.

A host reads its own shards only, may take long over its rollouts, is told to leave and
is killed; the run goes on with as many hosts as there are then.
"""

import collections
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from pixel_jax import parallel, train_rl, trajectory
from pixel_jax.data import pipeline, sources
from pixel_jax.rl import replay

ROOT = pathlib.Path(__file__).resolve().parent.parent
DEVICES = 4
SHARDS = 4
SFT = ("train_sft", "configs/sft.py:tiny,base")
RL = ("train_rl", "configs/rl.py:tiny")
SMALL = {"mesh.data": -1, "data.shards": SHARDS, "optim.warmup_steps": 1}
SMALL_SFT = SMALL | {
  "total_steps": 6,
  "save_every": 1,
  "eval_every": 3,
  "eval.batches": 1,
  "data.rows": 8,
}
SMALL_RL = SMALL | {
  "total_steps": 3,
  "save_every": 1,
  "eval_every": 2,
  "eval.tasks": 6,  # so that shards have one or two
  "keep_trajectories_every": 1,
  "rl.prompts_per_step": 4,
  "rl.group_size": 4,
  "rl.rows": 4,
  "rl.minibatches": 2,
  "engine.slots": 4,
  "engine.extend_rows": 4,
  "engine.views": "()",
  "rollout.fixed_batch": True,
  "rollout.max_turns": 2,
  "eval.rollout.fixed_batch": True,
  "eval.rollout.max_turns": 2,
}

# A program of the run that notes what its process reads, may sleep over its first
# rollouts, and judges by a hash: a policy of a few steps is never right.
CHILD = """
import functools, importlib, os, pathlib, sys, time, zlib
rank = os.environ.get("JAX_PROCESS_ID", "0")
sys.modules["torch"] = None  # which TensorBoard's writer would import, two seconds
notes = pathlib.Path(os.environ["NOTES"]) / rank
notes.mkdir(parents=True, exist_ok=True)
(notes / "pid").write_text(str(os.getpid()))
from pixel_jax.run import start
from pixel_jax.data import sources
from pixel_jax.evals import protocol
from pixel_jax.rollout import engine

def note(name, what):
  with (notes / name).open("a") as file:
    file.write(what + "\\n")

item, load, play = sources.World.__getitem__, sources.World.load_media, engine.Engine.run

def noted_item(self, i):
  note("records", f"{self.split} {i}")
  return item(self, i)

def noted_load(self, media):
  note("media", media.path)
  return load(self, media)

@functools.wraps(play)  # settings are checked by its hints
def late(self, *args, **kwargs):
  if rank == "1" and not (notes / "slept").exists():
    note("slept", "")
    time.sleep(float(os.environ.get("SLEEP", "0")))
  if "force" not in kwargs:  # in training: so that there are operations, if bad ones
    kwargs["force"] = "operate"
  return play(self, *args, **kwargs)

sources.World.__getitem__, sources.World.load_media = noted_item, noted_load
engine.Engine.run = late
protocol.judge = lambda t: float(zlib.crc32(t.turns[-1]["text"].encode()) % 2)
start.run(importlib.import_module("pixel_jax." + sys.argv.pop(1)).main)
"""


def launch(count, entry, workdir, config, flags="", **env):
  """`count` processes by the launcher, of as many devices as are left to each."""
  module, file = entry
  command = [
    sys.executable, "launch/processes.py", str(count), f"{workdir}/logs",
    sys.executable, "-c", CHILD, module, f"--config={file}", f"--workdir={workdir}",
    *(f"--config.{k}={v}" for k, v in config.items()),
  ]  # fmt: skip
  # Unoptimized code: what is compared is as exact, and compiles in half the time.
  flags += (
    f" --xla_force_host_platform_device_count={DEVICES // count}"
    " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
  )
  env = {"JAX_PLATFORMS": "cpu", "NOTES": f"{workdir}/notes{count}"} | env
  return subprocess.Popen(
    command, cwd=ROOT, env=os.environ | env | {"XLA_FLAGS": flags}, text=True,
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
  )  # fmt: skip


def run(*args, **env):
  process = launch(*args, **env)
  out, _ = process.communicate(timeout=600)
  assert process.returncode == 0, out
  assert f"done: {args[3]['total_steps']} steps" in out  # of process 0, once
  assert out.count("done: ") == 1
  return out


def wait_for(workdir, step, process):
  file = workdir / "metrics.jsonl"
  until = time.monotonic() + 600
  while not (file.exists() and file.read_bytes().count(b"\n") >= step):
    assert process.poll() is None, process.communicate()[0]
    assert time.monotonic() < until
    time.sleep(0.02)


def read_metrics(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  return [{k: v for k, v in r.items() if not k.startswith("perf/")} for r in rows]


def answered(workdir, name):
  """(task, sample) -> ids and reward; of all hosts."""
  rows = {}
  for file in sorted((workdir / "trajectories").glob(f"{name}*.jsonl")):
    for t in trajectory.read_jsonl(file):
      assert (t.task.id, t.sample) not in rows
      rows[t.task.id, t.sample] = t.ids, t.reward
  return rows


def assert_same(ours, theirs):
  """Every metric to a relative 1e-5; what was sampled to the token."""
  ours_logged, theirs_logged = read_metrics(ours), read_metrics(theirs)
  assert [r["step"] for r in ours_logged] == [r["step"] for r in theirs_logged]
  for a, b in zip(ours_logged, theirs_logged):
    assert a.keys() == b.keys()
    for k in a:
      # A difference between log-probs of sampler and trainer is nothing but rounding.
      noise = 1e-5 if k.startswith("agreement/") else 1e-8
      assert a[k] == pytest.approx(b[k], rel=1e-5, abs=noise), k
    name = f"step_{a['step']:06d}"
    assert answered(ours, name) == answered(theirs, name)


def read_notes(workdir, count, name):
  """What each process of a run read."""
  files = [workdir / f"notes{count}" / str(rank) / name for rank in range(count)]
  return [collections.Counter(file.read_text().splitlines()) for file in files]


def assert_own_shards_only(workdir, count):
  for rank, read in enumerate(read_notes(workdir, count, "records")):
    first, each = rank * SHARDS // count, SHARDS // count
    shards = {int(line.split()[1]) % SHARDS for line in read}
    assert shards == set(range(first, first + each)), rank
  media = [set(read) for read in read_notes(workdir, count, "media")]
  assert all(media) and sum(map(len, media)) == len(set().union(*media))


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
  """One process of four devices."""
  workdir = tmp_path_factory.mktemp("hosts") / "sft"
  run(1, SFT, workdir, SMALL_SFT)
  return workdir


@pytest.fixture(scope="module")
def sft_two(sft):
  """Two processes of two devices."""
  workdir = sft.parent / "sft_two"
  run(2, SFT, workdir, SMALL_SFT)
  return workdir


@pytest.mark.slow
def test_sft_of_two_processes(sft, sft_two):
  assert_same(sft_two, sft)
  assert_own_shards_only(sft_two, 2)
  # What is read ahead of the last step may differ.
  alone = read_notes(sft, 1, "media")[0]
  assert set().union(*read_notes(sft_two, 2, "media")) & alone.keys()
  assert (sft_two / "logs" / "process_1.log").exists()


@pytest.fixture(scope="module")
def rl(sft):
  """One process with four engines."""
  workdir = sft.parent / "rl"
  run(1, RL, workdir, SMALL_RL | {"init": sft})
  return workdir


@pytest.fixture(scope="module")
def rl_two(sft):
  """Host 1 sleeps over its first rollouts for longer than a collective may take."""
  workdir = sft.parent / "rl_two"
  impatient = "--xla_cpu_collective_timeout_seconds=20"
  run(2, RL, workdir, SMALL_RL | {"init": sft}, impatient, SLEEP="25")
  return workdir


@pytest.mark.slow
def test_rl_of_two_uneven_processes(rl, rl_two):
  assert (rl_two / "notes2" / "1" / "slept").exists()
  assert_same(rl_two, rl)
  rows = read_metrics(rl)
  assert not any(r["optim/skipped"] for r in rows)
  assert all(np.isfinite(r["loss"]) and r["optim/grad_norm"] > 0 for r in rows)
  # A policy of a few steps seldom ends the call that it is made to begin.
  assert any(r["ops/per_rollout"] > 0 and r["ops/error_rate"] > 0 for r in rows)
  assert all(len(answered(rl, f"step_{r['step']:06d}")) == 4 * 4 for r in rows)
  assert_own_shards_only(rl_two, 2)
  names = [p.name for p in sorted((rl_two / "trajectories").glob("step_000001*"))]
  assert names == ["step_000001.000.jsonl", "step_000001.001.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "rl"])
def test_told_to_leave_then_killed_goes_on_with_four_processes(kind, request, tmp_path):
  alone, two = (request.getfixturevalue(name) for name in (kind, f"{kind}_two"))
  entry, config = {
    "sft": (SFT, SMALL_SFT),
    "rl": (RL, SMALL_RL | {"init": alone.parent / "sft"}),
  }[kind]
  workdir = tmp_path / "run"
  process = launch(2, entry, workdir, config)
  wait_for(workdir, 1, process)
  process.send_signal(signal.SIGTERM)
  out, _ = process.communicate(timeout=600)
  assert process.returncode == 0 and "stopped by a signal: step " in out, out
  saved = len(read_metrics(workdir))
  assert (workdir / "checkpoints" / str(saved)).is_dir()
  assert saved < config["total_steps"] - 1

  process = launch(2, entry, workdir, config)
  wait_for(workdir, saved + 1, process)
  killed = time.monotonic()
  os.kill(int((workdir / "notes2" / "1" / "pid").read_text()), signal.SIGKILL)
  out, _ = process.communicate(timeout=600)
  assert time.monotonic() - killed < 300 and process.returncode == 128 + 9, out
  assert "process 1 of 2 was killed by SIGKILL" in out
  assert "process_1.log" in out and "goes on from the last checkpoint" in out
  left = int((workdir / "notes2" / "0" / "pid").read_text())
  with pytest.raises(ProcessLookupError):
    os.kill(left, 0)
  kept = read_metrics(workdir)  # in two processes throughout: bit for bit
  assert len(kept) > saved and kept == read_metrics(two)[: len(kept)]

  run(4, entry, workdir, config)
  assert_same(workdir, alone)
  assert_own_shards_only(workdir, 4)


@pytest.mark.slow
def test_evaluation_of_two_processes(sft, tmp_path):
  entry = ("evaluate", "configs/evaluate.py:tiny")
  config = {
    "policies": f"SFT={sft}",
    "modes": "('free', 'forced')",
    "data.tasks": 10,  # so that shards have two or three
    "engine.slots": 4,
    "engine.extend_rows": 4,
    "engine.views": "()",
    "rollout.fixed_batch": True,
  }
  rows, said = [], []
  for count in (1, 2):
    workdir = tmp_path / str(count)
    process = launch(count, entry, workdir, config)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0 and out.count("done: ") == 1, out
    rows.append(json.loads((workdir / "evaluation.json").read_text())["rows"])
    said.append(
      [answered(workdir, f"SFT_world_pixel_{mode}") for mode in ("free", "forced")]
    )
    assert [len(played) for played in said[-1]] == [10, 10]
  assert rows[0] == rows[1] and said[0] == said[1]
  lines = [
    sorted((p.name, p.read_text()) for p in (tmp_path / n / "predictions").iterdir())
    for n in "12"
  ]
  assert lines[0] == lines[1] and len(lines[0]) == 2
  assert {p.name for p in (tmp_path / "2" / "trajectories").iterdir()} == {
    f"SFT_world_pixel_{mode}.{host:03}.jsonl"
    for mode in ("free", "forced")
    for host in (0, 1)
  }


# ---- Parts ---------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 6, 8])
def test_held_out_questions_are_the_first_whoever_asks(count):
  source = sources.open_source("world:val")

  def ask(shards, hosts):
    return [
      pipeline.fixed_tasks(source, count, shards=shards, host=h, hosts=hosts)
      for h in range(hosts)
    ]

  (alone,) = ask(SHARDS, 1)
  assert {t.id for t in alone} == {source[i].id for i in range(count)}
  for hosts in (2, 4):
    parts = ask(SHARDS, hosts)
    assert [t for part in parts for t in part] == alone
    for h, part in enumerate(parts):
      assert {t.shard * hosts // SHARDS for t in part} <= {h}
  assert [t.id for t in ask(1, 1)[0]] == [source[i].id for i in range(count)]


def test_minibatches_and_replay_do_not_depend_on_the_hosts():
  """A shard's part of a minibatch, and what is drawn for it, are its own."""
  examples = {s: [dict(advantage=float(i % 3), id=(s, i)) for i in range(5 + s)]
              for s in range(SHARDS)}  # fmt: skip

  def parts(shards):
    memory = {s: replay.Replay() for s in shards}
    chosen, drawn = train_rl.choose(memory, {s: examples[s] for s in shards}, (0, 7))
    assert drawn == sum(-(-len(examples[s]) // 3) for s in shards)
    ids = [[e["id"] for e in part] for part in train_rl.split(chosen, 3)]
    return [[[i for i in part if i[0] == s] for part in ids] for s in shards]

  whole = parts(range(4))
  assert [*parts([0, 1]), *parts([2, 3])] == whole
  assert [x for s in range(4) for x in parts([s])] == whole
  sizes = [[len(part) for part in shard] for shard in whole]
  assert all(sum(n) == 5 + s and max(n) - min(n) <= 1 for s, n in enumerate(sizes))


# ---- Small programs ------------------------------------------------------------------

WAITER = """
import os, sys
from pixel_jax import parallel
parallel.LOST = int(sys.argv[1])
parallel.initialize()
import jax
jax.devices()
parallel.barrier("begun")
print("waits", flush=True)
if jax.process_index() == 0:
  parallel.barrier("forever")
import time
time.sleep(600)
"""


@pytest.mark.slow
def test_a_process_that_dies_stops_those_that_wait_for_it(tmp_path):
  """Without a launcher, as on a pod; only the heartbeat is made shorter."""
  assert parallel.LOST <= 30
  port = free_port()
  env = os.environ | {
    "JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
    "JAX_NUM_PROCESSES": "2",
  }  # fmt: skip
  children = [
    subprocess.Popen(
      [sys.executable, "-c", WAITER, "4"], cwd=ROOT, env=env | {"JAX_PROCESS_ID": str(r)},
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )
    for r in range(2)
  ]  # fmt: skip
  try:
    for child in children:
      lines = iter(child.stdout.readline, "")
      assert any("waits" in line for line in lines)
    children[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    children[0].communicate(timeout=600)
    assert children[0].returncode != 0 and time.monotonic() - killed < 300
  finally:
    for child in children:
      child.kill()


def free_port():
  import socket

  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


def launcher(tmp_path, count, code):
  return subprocess.run(
    [
      sys.executable, "launch/processes.py", str(count), f"{tmp_path}/logs",
      sys.executable, "-c", code, f"{tmp_path}/logs",
    ],
    cwd=ROOT, capture_output=True, text=True, timeout=600,
  )  # fmt: skip


def test_the_launcher_tells_which_failed_and_stops_the_others(tmp_path):
  # The third fails once the others are known to have begun.
  code = (
    "import os, pathlib, sys, time; r = os.environ['JAX_PROCESS_ID']\n"
    "print('I am', r, 'of', os.environ['JAX_NUM_PROCESSES'], flush=True)\n"
    "log = lambda i: pathlib.Path(sys.argv[1], f'process_{i}.log').read_text()\n"
    "while r == '2' and not all(f'I am {i}' in log(i) for i in (0, 1)): time.sleep(.1)\n"
    "if r == '2': raise SystemExit('the disk is full')\n"
    "time.sleep(60)"
  )
  ran = launcher(tmp_path, 3, code)
  assert ran.returncode == 1
  assert "process 2 of 3 ended with 1 after" in ran.stderr
  assert "the disk is full" in ran.stderr and "I am 0 of 3" in ran.stdout
  assert "I am 1 of 3" in (tmp_path / "logs" / "process_1.log").read_text()


def test_the_launcher_of_one_process_and_of_none(tmp_path):
  ran = launcher(tmp_path, 1, "import os; assert 'JAX_PROCESS_ID' not in os.environ")
  assert ran.returncode == 0, ran.stderr
  assert "1 or more" in launcher(tmp_path, 0, "").stderr
