"""Steps come back bit for bit; a save that fails or is killed leaves the last one."""

import contextlib
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import rest_slow

from pixel_jax import parallel
from pixel_jax.run import checkpoint, optim
from pixel_jax.run.checkpoint import CheckpointError, Checkpoints

AXES = {"text": {"q": {"w": ("embed", "heads"), "b": ("heads",)}}}


def make_state(seed=0, mesh=(1, 1, 1), width=8):
  rng = np.random.default_rng(seed)
  q = {"w": rng.normal(size=(width, 4)), "b": rng.normal(size=4)}
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), {"text": {"q": q}})
  layout = parallel.shardings(parallel.make_mesh(*mesh), AXES, params)
  params = jax.device_put(params, layout)
  tx, _ = optim.make(params, lr=1e-2, total_steps=9, schedule="constant")
  opt = optim.init(tx, params)
  params, opt, _ = optim.apply(tx, jax.tree.map(jnp.sin, params), params, opt)
  return {"params": params, "opt": opt, "step": jnp.asarray(seed, jnp.int32)}


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)


# ---- Steps ---------------------------------------------------------------------------


def test_a_new_workdir_has_nothing(tmp_path):
  saver, state = Checkpoints(tmp_path), make_state()
  assert saver.latest() is None
  step, same, host = saver.restore(state)
  assert step == 0 and same is state and host is None


def test_everything_comes_back_bit_for_bit(tmp_path):
  rng = np.random.default_rng(3)
  logp = rng.random(4).astype(np.float32)
  host = {
    "data": {"shards": {"0": {"next": 5}, "1": b"\x00\xffbytes"}},
    "rng": rng.bit_generator.state,
    "replay": [{"advantage": 0.1, "logp": logp}],
    "counters": {"tokens": 10**12, "share": 1 / 3},
  }
  state = make_state(1)
  saver = Checkpoints(tmp_path)
  saver.save(1, state, host)
  saver.close()

  step, found, back = Checkpoints(tmp_path).restore(make_state(2))
  assert step == 1
  assert_same(found, state)
  again = np.random.default_rng()
  again.bit_generator.state = back["rng"]
  assert again.random() == rng.random()
  found = back["replay"][0].pop("logp")
  np.testing.assert_array_equal(found, host["replay"][0].pop("logp"))
  assert found.dtype == np.float32
  assert {k: v for k, v in back.items() if k != "rng"} == {
    k: v for k, v in host.items() if k != "rng"
  }


def test_another_mesh_and_a_donated_state(tmp_path):
  state = make_state(1, mesh=(2, 2, 2), width=4096)
  copy = jax.tree.map(np.asarray, state)
  saver = Checkpoints(tmp_path)
  saver.save(1, state)
  jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)(state)
  target = make_state(2, mesh=(1, 4, 2), width=4096)
  _, found, _ = saver.restore(target)
  assert_same(found, copy)
  w = found["params"]["text"]["q"]["w"]
  assert w.sharding == target["params"]["text"]["q"]["w"].sharding


def test_the_newest_stay_and_any_of_them_can_be_restored(tmp_path):
  saver = Checkpoints(tmp_path, keep=2)
  for step in (1, 2, 3):
    saver.save(step, make_state(step), {"n": step})
  assert saver.latest() == 3
  assert checkpoint.complete_steps(saver.directory) == [2, 3]
  step, found, host = saver.restore(make_state(), step=2)
  assert step == 2 and host == {"n": 2} and found["step"] == 2
  with pytest.raises(CheckpointError, match="3 exists already"):
    saver.save(3, make_state(3))


def test_a_relative_workdir_is_fine(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  saver = Checkpoints("run")
  saver.save(1, make_state())
  saver.close()
  assert checkpoint.complete_steps(tmp_path / "run" / "checkpoints") == [1]


@pytest.mark.parametrize(
  "change, text",
  [
    (lambda x: x.astype(jnp.bfloat16), r"w is float32\(8, 4\), expected bfloat16"),
    (lambda x: jnp.zeros((8, 5)), r"w is float32\(8, 4\), expected float32\(8, 5\)"),
  ],
)
def test_another_dtype_or_shape_is_refused(tmp_path, change, text):
  saver, state = Checkpoints(tmp_path), make_state()
  saver.save(1, state)
  state["params"]["text"]["q"]["w"] = change(state["params"]["text"]["q"]["w"])
  with pytest.raises(CheckpointError, match=text):
    saver.restore(state)


def test_missing_and_surplus_parameters_are_named(tmp_path):
  saver, state = Checkpoints(tmp_path), make_state()
  saver.save(1, state)
  state["params"]["text"]["k"] = state["params"]["text"].pop("q")
  with pytest.raises(CheckpointError, match=r"k/b is missing.*q/w is not expected"):
    saver.restore(state)


# ---- Failures ------------------------------------------------------------------------


def test_a_disk_that_is_too_small_is_noticed_before_writing(tmp_path, monkeypatch):
  saver = Checkpoints(tmp_path)
  saver.save(1, make_state(1))
  with monkeypatch.context() as m:
    m.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(CheckpointError, match=r"0.00 GB are free.*step 1 is intact"):
      saver.save(2, make_state(2))
  assert_same(saver.restore(make_state())[1], make_state(1))
  saver.save(2, make_state(2))  # after making room
  assert saver.latest() == 2


def test_a_write_that_fails_leaves_the_previous_step(tmp_path):
  big = 1 << 16
  saver = Checkpoints(tmp_path)
  saver.save(1, make_state(1, width=big))
  saver.wait()
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  try:  # no file may pass 100 kB, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    with pytest.raises(CheckpointError, match=r"not written: .*step 1 is intact"):
      saver.save(2, make_state(2, width=big))
      saver.wait()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)
  with contextlib.suppress(CheckpointError):
    saver.close()
  for _ in range(600):  # its threads may write on for a while
    try:
      again = Checkpoints(tmp_path)
      break
    except OSError:
      time.sleep(0.5)
  assert again.latest() == 1
  assert_same(again.restore(make_state(width=big))[1], make_state(1, width=big))
  again.save(2, make_state(2, width=big))
  assert again.latest() == 2


KILLED = """
import os, pathlib, signal, sys, threading
import jax.numpy as jnp
from pixel_jax.run import checkpoint
work = pathlib.Path(sys.argv[1])
saver = checkpoint.Checkpoints(work)
saver.save(1, {"params": {"w": jnp.ones(4)}}, {"n": 1})
saver.wait()

def watch():
  while not any("tmp" in p.name for p in work.rglob("*")):
    pass
  os.kill(os.getpid(), signal.SIGKILL)

threading.Thread(target=watch, daemon=True).start()
saver.save(2, {"params": {"w": jnp.ones(1 << 24)}}, {"n": 2})
saver.wait()
"""


def test_a_killed_save_does_not_count(tmp_path):
  child = subprocess.run(
    [sys.executable, "-c", KILLED, str(tmp_path)],
    cwd=pathlib.Path(__file__).parents[1],
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    timeout=600,
  )
  assert child.returncode == -signal.SIGKILL
  left = [p.name for p in (tmp_path / "checkpoints").iterdir() if p.name != "1"]
  assert any("tmp" in name for name in left), left
  assert checkpoint.load_params(tmp_path)[0]["w"].shape == (4,)
  saver = Checkpoints(tmp_path)
  step, found, host = saver.restore({"params": {"w": jnp.zeros(4)}})
  assert step == 1 and host == {"n": 1} and (found["params"]["w"] == 1).all()
  saver.save(2, {"params": {"w": jnp.zeros(4)}})
  assert saver.latest() == 2


@pytest.mark.parametrize("part", rest_slow([0, 1, 2]))
def test_a_damaged_newest_step_is_set_aside(tmp_path, part):
  """Each of its files cut in half, one at a time: the one before it, or no harm done."""
  saver = Checkpoints(tmp_path / "whole")
  saver.save(1, make_state(1), {"n": 1}), saver.save(2, make_state(2), {"n": 2})
  saver.close()
  newest = tmp_path / "whole" / "checkpoints" / "2"
  files = sorted(p.relative_to(newest) for p in newest.rglob("*") if p.is_file())
  files, fell_back = files[part::3], 0
  for i, file in enumerate(files):
    work = tmp_path / str(i)
    shutil.copytree(tmp_path / "whole", work)
    damaged = work / "checkpoints" / "2" / file
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    again = Checkpoints(work)
    step, found, host = again.restore(make_state())
    assert_same(found, make_state(step))
    assert host == {"n": step}, file
    if step == 1:
      fell_back += 1
      assert (work / "damaged" / "2").is_dir()
      again.save(2, make_state(2), {"n": 2})  # the run comes by again
      assert again.latest() == 2
    again.close()
  assert fell_back >= len(files) // 3  # of the others orbax reads none


def test_the_only_step_is_damaged(tmp_path):
  saver = Checkpoints(tmp_path)
  saver.save(7, make_state(1))
  saver.close()
  for file in (tmp_path / "checkpoints" / "7" / "params").rglob("*"):
    if file.is_file():
      file.write_bytes(b"")
  with pytest.raises(CheckpointError, match="step 7 .* is damaged .*no other is there"):
    Checkpoints(tmp_path).restore(make_state())
  with pytest.raises(CheckpointError, match="checkpoints/7 is damaged"):
    checkpoint.load_params(tmp_path, make_state()["params"])


@pytest.mark.parametrize("metric, best", [("accuracy", 2), ("val/loss", 1), ("", None)])
def test_the_best_step_stays(tmp_path, metric, best):
  for step, value in enumerate((0.1, 0.9, 0.5, 0.3), 1):  # the last without a score
    saver = Checkpoints(tmp_path, keep=1, keep_best=metric)  # a run that goes on
    told = {"accuracy": value, "val/loss": value} if step < 4 else {}
    saver.save(step, make_state(step), {"n": step}, told)
    saver.close()
  kept = {best, 4} - {None}
  assert checkpoint.complete_steps(tmp_path / "checkpoints") == sorted(kept)


# ---- Bare parameters -----------------------------------------------------------------


def test_parameters_of_an_export_and_of_a_workdir(tmp_path):
  state = make_state(1)
  checkpoint.save_params(tmp_path / "export", state["params"], {"model": {"a": [1]}})
  saver = Checkpoints(tmp_path / "run", model={"a": [1]})
  saver.save(1, make_state(2)), saver.save(2, state)
  saver.close()
  mesh = parallel.make_mesh(1, 2, 1)
  layout = parallel.shardings(mesh, AXES, state["params"])
  abstract = jax.eval_shape(lambda: state["params"])
  for where in ("export", "run"):
    params, extra = checkpoint.load_params(tmp_path / where)
    assert_same(params, state["params"])
    assert extra == checkpoint.load_extra(tmp_path / where) == {"model": {"a": [1]}}
    params, _ = checkpoint.load_params(tmp_path / where, abstract, layout)
    assert_same(params, state["params"])
    assert params["text"]["q"]["w"].sharding == layout["text"]["q"]["w"]
  low = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), abstract)
  with pytest.raises(CheckpointError, match="dtypes are never cast"):
    checkpoint.load_params(tmp_path / "run", low)
  with pytest.raises(CheckpointError, match="exists already"):
    checkpoint.save_params(tmp_path / "export", state["params"], {})


@pytest.mark.parametrize("name", ["", "checkpoints", "nowhere"])
def test_a_directory_without_parameters_is_an_error(tmp_path, name):
  (tmp_path / "checkpoints").mkdir()
  with pytest.raises(CheckpointError, match="holds neither"):
    checkpoint.load_params(tmp_path / name)


# ---- Host state ----------------------------------------------------------------------

json_like = st.recursive(
  st.none()
  | st.booleans()
  | st.integers()
  | st.floats(allow_nan=False)
  | st.text()
  | st.binary(),
  lambda s: st.lists(s) | st.dictionaries(st.text(), s),
  max_leaves=10,
)


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(json_like)
def test_host_state_survives(value):
  import json

  assert checkpoint.decode(json.loads(json.dumps(checkpoint.encode(value)))) == value


def test_what_json_cannot_say_is_refused():
  with pytest.raises(TypeError, match="object cannot be saved"):
    checkpoint.encode({"a": [object()]})
  with pytest.raises(TypeError, match="key 3"):
    checkpoint.encode({3: 1})


def test_processes_give_their_shards_and_agree_on_the_rest():
  parts = [{"rng": 1, "shards": {"0": "a"}}, {"rng": 1, "shards": {"1": "b"}}]
  assert checkpoint.merge(parts) == {"rng": 1, "shards": {"0": "a", "1": "b"}}
  with pytest.raises(ValueError, match="host/rng differs between processes"):
    checkpoint.merge([{"rng": 1}, {"rng": 2}])
