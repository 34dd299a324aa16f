"""Workdirs in a bucket: gcsfs, orbax and tensorstore's own driver against buckets.py.

Nothing here has met Google's servers; the clients are the real ones.
"""

import importlib.util
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import buckets
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import lru_cache
from jax.sharding import SingleDeviceSharding
from ml_collections import ConfigDict

from pixel_jax import parallel
from pixel_jax.configs import sft
from pixel_jax.run import bucket, checkpoint, lock, metrics, policies, start

if not importlib.util.find_spec("gcsfs"):  # its import reads the environment below
  pytest.skip("gcsfs is not installed: extra [gcs]", allow_module_level=True)
ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def storage():
  storage = buckets.Storage()
  told = {
    "STORAGE_EMULATOR_HOST": storage.url,
    "TENSORSTORE_GCS_HTTP_URL": storage.url,
    "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
    "GOOGLE_CLOUD_PROJECT": "p",
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
  }
  with pytest.MonkeyPatch.context() as patch:
    for k, v in told.items():
      patch.setenv(k, v)
    yield storage
    lock.release()  # those of runs in this process; later nobody answers
  storage.shutdown()


def test_small_files_come_and_go(storage):
  storage.put("runs", "a/metrics.jsonl", b'{"step": 1}\n')
  storage.put("runs", "a/tokenizer/vocab.json", b"{}")
  for left in ("checkpoints/1/x", "trajectories/step_000001.jsonl", "logs/w"):
    storage.put("runs", f"a/{left}", b"large")
  workdir = bucket.mount("gs://runs/a/")
  found = {str(f.relative_to(workdir)) for f in bucket.files(workdir)}
  assert found == {"metrics.jsonl", "tokenizer/vocab.json"}
  before = storage.writes
  bucket.sync(workdir)
  assert storage.writes == before  # nothing had changed

  with (workdir / "metrics.jsonl").open("a") as f:
    f.write('{"step": 2}\n')
  (workdir / "trajectories").mkdir()
  (workdir / "trajectories" / "step_000002.jsonl").write_text("t\n")
  (workdir / "trajectories" / "step_000003.jsonl.partial").write_text("half")
  (workdir / "tokenizer" / "vocab.json").unlink()
  bucket.sync(workdir)
  assert storage.read("gs://runs/a/metrics.jsonl").count(b"step") == 2
  assert storage.read("gs://runs/a/trajectories/step_000002.jsonl") == b"t\n"
  names = storage.names("gs://runs/a/")
  assert not any("partial" in n or "tokenizer" in n for n in names)
  assert not (workdir / "trajectories" / "step_000002.jsonl").exists()
  assert storage.writes == before + 2
  bucket.sync(workdir)
  assert storage.writes == before + 2


def test_a_process_writes_what_is_its_own(storage, monkeypatch):
  workdir = bucket.mount("gs://runs/b")
  assert not bucket.is_shared(workdir)
  shared = ["metrics.jsonl", "step_000003.jsonl"]
  others = ["quarantine_13.jsonl", "step_000001.013.jsonl"]
  for name in (*shared, *others, "quarantine_3.jsonl", "step_000001.003.jsonl"):
    (workdir / name).write_text("x")
  monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
  monkeypatch.setattr(jax, "process_index", lambda: 3)
  bucket.sync(workdir)
  own = ["b/quarantine_3.jsonl", "b/step_000001.003.jsonl"]
  assert storage.names("gs://runs/b/") == own


@pytest.mark.parametrize("place", ["gs://runs", "gs://", "s3://a/b", "gs://a/../b"])
def test_what_is_no_bucket_is_told(place):
  with pytest.raises(bucket.BucketError, match="gs://BUCKET/RUN"):
    bucket.mount(place)


def test_a_local_workdir_stands_behind_itself(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert bucket.mount("runs/a") == tmp_path / "runs/a" == bucket.behind("runs/a")
  assert bucket.is_shared(tmp_path / "runs/a")
  assert not (tmp_path / "runs").exists()
  bucket.sync(tmp_path)


def state(scale):
  where = SingleDeviceSharding(jax.devices()[0])
  params = {"w": jax.device_put(jnp.arange(6.0).reshape(2, 3) * scale, where)}
  return {"params": params, "step": jax.device_put(jnp.int32(scale), where)}


def test_checkpoints_lie_in_the_bucket(storage):
  workdir = bucket.mount("gs://runs/c")
  saver = checkpoint.Checkpoints(workdir, keep=2, model={"depth": 2})
  (workdir / "metrics.jsonl").write_text("{}\n")
  for step in (1, 2, 3):
    saver.save(step, state(step), {"data": [step]})
  saver.close()
  assert storage.read("gs://runs/c/metrics.jsonl") == b"{}\n"
  assert checkpoint.complete_steps(bucket.behind(workdir) / "checkpoints") == [2, 3]

  again = bucket.mount("gs://runs/c")
  assert not (again / "checkpoints").exists()
  saver = checkpoint.Checkpoints(again)
  step, restored, host = saver.restore(state(0))
  saver.close()
  assert step == 3 and host == {"data": [3]}
  assert np.array_equal(restored["params"]["w"], state(3)["params"]["w"])

  first = checkpoint.fingerprint("gs://runs/c")
  params, extra = checkpoint.load_params("gs://runs/c")
  assert np.array_equal(params["w"], state(3)["params"]["w"])
  assert extra == {"model": {"depth": 2}}
  # A save that was killed lacks the last file.
  steps = bucket.behind(again) / "checkpoints"
  (steps / "3" / "commit_success.txt").unlink()
  assert checkpoint.complete_steps(steps) == [2]
  assert checkpoint.fingerprint("gs://runs/c") != first


def test_metrics_are_saved_before_the_step_that_needs_them(storage, monkeypatch):
  workdir = bucket.mount("gs://runs/d")
  saver = checkpoint.Checkpoints(workdir)
  (workdir / "metrics.jsonl").write_text("{}\n")
  monkeypatch.setattr(saver._manager, "save", lambda *_, **__: 1 / 0)  # killed there
  with pytest.raises(checkpoint.CheckpointError):
    saver.save(1, state(1))
  assert storage.names("gs://runs/d/") == ["d/metrics.jsonl"]


def test_trajectories_are_cut_back_where_they_lie(storage):
  for name in ("step_000001.jsonl", "step_000002.jsonl", "step_000003.jsonl"):
    storage.put("runs", f"e/trajectories/{name}", b"x")
  metrics.cut_back(bucket.mount("gs://runs/e"), 2)
  left = storage.names("gs://runs/e/trajectories/")
  assert [n[-7] for n in left] == ["1", "2"]


def test_programs_are_kept_beside_the_runs(storage, monkeypatch):
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
  before = jax.config.jax_compilation_cache_dir
  try:
    start.open_workdir(bucket.mount("gs://runs/f"), ConfigDict({"seed": 0}))
    assert jax.config.jax_compilation_cache_dir == "gs://runs/compiled"
    cache = lru_cache.LRUCache(
      "gs://runs/compiled", max_size=-1
    )  # what jax makes of it
    cache.put("program", b"bytes")
    assert cache.get("program") == storage.read("gs://runs/compiled/program-cache")
  finally:
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.slow
def test_a_killed_run_goes_on_in_the_bucket(storage, tmp_path):
  """Bit for bit as a local one that was not killed; the next stage starts from it."""
  fields = dict(total_steps=4, save_every=2, eval_every=4, **{"optim.warmup_steps": 1})
  flags = [f"--config.{k}={v}" for k, v in fields.items()]

  def begin(workdir):
    return subprocess.Popen(
      [sys.executable, "-m", "pixel_jax.train_sft", "--config=configs/sft.py:tiny,base",
       f"--workdir={workdir}", *flags],
      cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
      env=os.environ | {"TMPDIR": str(tmp_path), "XLA_FLAGS": ""},
    )  # fmt: skip

  killed = begin("gs://runs/sft")
  until = time.monotonic() + 600
  while not any(
    f.read_bytes().count(b"\n") >= 3 for f in tmp_path.glob("*/metrics.jsonl")
  ):
    assert killed.poll() is None, killed.communicate()[0]
    assert time.monotonic() < until
    time.sleep(0.02)
  killed.send_signal(signal.SIGKILL)
  killed.communicate()
  assert not storage.read("gs://runs/sft/metrics.jsonl").count(b"\n") > 3
  for workdir in ("gs://runs/sft", tmp_path / "local"):
    process = begin(workdir)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    assert f"in {workdir}: " in said

  def rows(text):
    lines = map(json.loads, text.splitlines())
    return [{k: v for k, v in r.items() if not k.startswith("perf/")} for r in lines]

  written = storage.read("gs://runs/sft/metrics.jsonl").decode()
  assert rows(written) == rows((tmp_path / "local/metrics.jsonl").read_text())
  there, here = (
    checkpoint._by_path(checkpoint.load_params(d)[0])
    for d in ("gs://runs/sft", tmp_path / "local")
  )
  assert there.keys() == here.keys()
  assert all(np.array_equal(there[k], here[k]) for k in here)

  config = sft.get_config("tiny")
  policy = policies.open_policy(
    "gs://runs/sft", model=config.model, codec=config.codec, mesh=parallel.make_mesh(1),
    seed=0, workdir=tmp_path / "next",
  )  # fmt: skip
  assert (tmp_path / "next/tokenizer/tokenizer.json").exists()
  assert policy.source == "gs://runs/sft"


@pytest.mark.slow
def test_two_processes_write_one_bucket(storage, tmp_path):
  """RL: each its own trajectories, process 0 the rest; one process goes on."""
  flags = {
    "init": "random", "total_steps": 1, "save_every": 1, "eval_every": 2, "eval.tasks": 4,
    "keep_trajectories_every": 1, "rl.prompts_per_step": 4, "rl.group_size": 2,
    "rl.rows": 4, "mesh.data": -1, "engine.slots": 8, "optim.warmup_steps": 1,
  }  # fmt: skip

  def begin(hosts, host, steps):
    env = os.environ | {
      "TMPDIR": str(tmp_path),
      "XLA_FLAGS": f"--xla_force_host_platform_device_count={4 // hosts}",
    }
    if hosts > 1:
      where = f"localhost:{port}"
      env |= {"JAX_COORDINATOR_ADDRESS": where, "JAX_NUM_PROCESSES": str(hosts),
              "JAX_PROCESS_ID": str(host)}  # fmt: skip
    told = [f"--config.{k}={v}" for k, v in (flags | {"total_steps": steps}).items()]
    return subprocess.Popen(
      [sys.executable, "-m", "pixel_jax.train_rl", "--config=configs/rl.py:tiny",
       "--workdir=gs://runs/rl", *told],
      cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env,
    )  # fmt: skip

  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  processes = [begin(2, host, 1) for host in range(2)]
  said = [p.communicate(timeout=900)[0] for p in processes]
  assert [p.returncode for p in processes] == [0, 0], "\n".join(said)
  names = {n.removeprefix("rl/") for n in storage.names("gs://runs/rl/")}
  played = {n for n in names if n.startswith("trajectories/")}
  assert played == {f"trajectories/step_000001.00{host}.jsonl" for host in range(2)}
  assert {"config.json", "metrics.jsonl", "tokenizer/tokenizer.json"} <= names
  process = begin(1, 0, 2)
  said, _ = process.communicate(timeout=900)
  assert process.returncode == 0, said
  lines = storage.read("gs://runs/rl/metrics.jsonl").decode().splitlines()
  assert [json.loads(line)["step"] for line in lines] == [1, 2]
