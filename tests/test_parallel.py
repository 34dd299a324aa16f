"""Meshes, the rule table, rows to devices: on eight devices, then in two processes."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from pixel_jax import parallel
from pixel_jax.rollout import placement

P = PartitionSpec


def rows(B=8, T=6):
  rng = np.random.default_rng(0)
  ints = dict(tokens=(B, T), segment=(B, T), position=(B, T, 3), vision_index=(B, T))
  ints |= dict(patch_pos=(B, 4, 2), patch_image=(B, 4), patch_window=(B, 4))
  batch = {k: rng.integers(0, 99, s).astype(np.int32) for k, s in ints.items()}
  batch["weight"] = rng.random((B, T)).astype(np.float32)
  batch["patches"] = rng.integers(0, 256, (B, 4, 1176)).astype(np.uint8)
  return batch


def abstract(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


# ---- Meshes --------------------------------------------------------------------------


def test_importing_and_initializing_touch_no_device():
  code = (
    "from pixel_jax import parallel; parallel.initialize(); import jax;"
    "from jax._src import xla_bridge; assert not xla_bridge._backends"
  )
  subprocess.run([sys.executable, "-c", code], check=True, env=alone())


def alone(**more):
  """An environment in which no launcher seems to have started us."""
  drop = ("JAX_", "SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "PIXEL_JAX_")
  kept = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
  return kept | {"JAX_PLATFORMS": "cpu"} | more


@pytest.mark.parametrize(
  "env, expected",
  [
    ({}, False),
    ({"SLURM_NTASKS": "2"}, False),  # salloc without srun
    ({"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "n[1-2]"}, True),
    ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "n1"}, False),
    ({"OMPI_COMM_WORLD_SIZE": "4"}, True),
    ({"TPU_WORKER_HOSTNAMES": "a"}, False),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ({"PIXEL_JAX_DISTRIBUTED": "auto"}, True),
  ],
)
def test_launchers_are_recognised(env, expected):
  assert parallel._is_many(env) == expected


def test_half_an_address_is_an_error(monkeypatch):
  monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
  with pytest.raises(ValueError, match="JAX_NUM_PROCESSES and JAX_PROCESS_ID"):
    parallel.initialize()


def test_mesh_takes_what_is_left_in_the_order_of_the_one_list():
  mesh = parallel.make_mesh(data=-1, fsdp=2, tensor=2)
  assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
  assert list(mesh.devices.flat) == parallel.devices()
  assert set(mesh.axis_types) == {AxisType.Auto}
  assert parallel.make_mesh(1, 1, 1).devices.size == 1  # the tiny model


@pytest.mark.parametrize(
  "sizes, text",
  [
    (dict(data=-1, fsdp=-1), "at most one is -1"),
    (dict(data=-1, tensor=3), "3 does not divide the 8 devices"),
    (dict(data=16), "takes 16 devices, there are 8"),
    (dict(data=0), "positive"),
  ],
)
def test_impossible_meshes_are_explained(sizes, text):
  with pytest.raises(ValueError, match=text):
    parallel.make_mesh(**sizes)


# ---- Layouts -------------------------------------------------------------------------


def test_shardings_follow_the_table():
  mesh = parallel.make_mesh(2, 2, 2)
  axes = {
    "q": {"w": ("layer", "embed", "heads", "head_dim")},
    "embed": {"w": ("vocab", "embed")},
    "patch": {"w": (None, "vision_embed")},
  }
  tree = {
    "q": {"w": abstract(2, 8, 4, 3)},
    "embed": {"w": abstract(10, 8)},
    "patch": {"w": abstract(6, 4)},
  }
  layout = parallel.shardings(mesh, axes, tree)
  assert layout["q"]["w"].spec == P(None, "fsdp", "tensor", None)
  assert layout["embed"]["w"].spec == P("tensor", "fsdp")
  assert layout["patch"]["w"].spec == P(None, "fsdp")
  placed = jax.device_put(jnp.ones((2, 8, 4, 3)), layout["q"]["w"])
  assert placed.addressable_shards[0].data.shape == (2, 4, 2, 3)


def test_what_does_not_divide_is_replicated_and_told_once(caplog):
  mesh = parallel.make_mesh(1, 1, 8)
  parallel._once.cache_clear()
  for _ in range(2):
    spec = parallel.spec(mesh, ("embed", "kv_heads"), (16, 4), "text/k/w")
    assert spec == P("fsdp", None)
  told = [r.message for r in caplog.records if "text/k/w" in r.message]
  assert told == [
    "text/k/w: kv_heads = 4 does not divide by tensor = 8, so it is replicated"
  ]


@pytest.mark.parametrize(
  "names, shape, text",
  [
    (("heads", "mlp"), (8, 8), "'heads' and 'mlp' both lie on mesh axis 'tensor'"),
    (("embed",), (8, 8), "1 axis names"),
    (("hed",), (8,), "'hed' is not in parallel.RULES"),
  ],
)
def test_wrong_axis_names_are_errors(names, shape, text):
  with pytest.raises(ValueError, match=text):
    parallel.spec(parallel.make_mesh(1, 1, 1), names, shape, "p")


def test_a_table_that_lacks_a_parameter_is_an_error():
  with pytest.raises(ValueError, match="axis names at 'text' are"):
    parallel.shardings(
      parallel.make_mesh(1, 1, 1),
      {"text": {"q": ("embed",)}},
      {"text": {"k": abstract(8)}},
    )


# ---- Rows ----------------------------------------------------------------------------


def test_rows_lie_over_data_and_fsdp_and_keep_their_bits():
  mesh = parallel.make_mesh(2, 2, 2)
  given = rows() | {"advantage": None}
  batch = parallel.to_devices(mesh, given)
  assert batch.tokens.sharding.spec == parallel.ROWS and batch.advantage is None
  assert batch.patches.addressable_shards[0].data.shape == (2, 4, 1176)
  for name in rows():
    value = getattr(batch, name)
    np.testing.assert_array_equal(value, given[name])
    assert value.dtype == given[name].dtype


def test_rows_that_do_not_divide_and_unknown_fields_are_errors():
  mesh = parallel.make_mesh(4, 2, 1)
  with pytest.raises(ValueError, match="a multiple of 8"):
    parallel.to_devices(mesh, rows(B=6))
  with pytest.raises(TypeError, match="tokenz"):
    parallel.to_devices(mesh, rows() | {"tokenz": np.zeros((8, 1))})


def test_agree_alone():
  assert parallel.agree({"a": [1]}) == {"a": [1]}
  assert parallel.agree(7, "max") == 7 and parallel.agree(True, "any") is True
  np.testing.assert_array_equal(parallel.agree(np.arange(3), "sum"), np.arange(3))
  assert parallel.total({"a": 2}) == {"a": 2.0}
  rows = np.arange(6).reshape(3, 2)
  np.testing.assert_array_equal(parallel.own_rows(rows), rows)
  np.testing.assert_array_equal(parallel.gather_rows({"x": rows})["x"], rows)
  with pytest.raises(ValueError, match="all_equal, max, any or sum"):
    parallel.agree(1, "min")
  parallel.barrier("alone")


# ---- Engines -------------------------------------------------------------------------


def test_engines_get_local_weights_with_the_same_values():
  mesh = parallel.make_mesh(2, 2, 2)
  axes = {"q": ("embed", "heads"), "norm": ("embed",)}
  tree = {"q": jnp.arange(64.0).reshape(8, 8), "norm": jnp.arange(8.0)}
  params = jax.device_put(tree, parallel.shardings(mesh, axes, tree))
  engines = placement.to_engines(params, axes, tensor=2)
  assert len(engines) == 4
  for i, engine in enumerate(engines):
    assert set(engine["q"].devices()) == set(parallel.devices()[2 * i : 2 * i + 2])
    assert engine["q"].sharding.spec == P(None, "tensor")
    jax.tree.map(np.testing.assert_array_equal, engine, tree)
  low = placement.to_engines(params, prepare=narrow)
  assert len(low) == 8 and low[3]["q"].dtype == jnp.bfloat16
  one = placement.to_engines(params)[0]
  assert one["q"].devices() == {parallel.devices()[0]}
  with pytest.raises(ValueError, match="do not fill a host"):
    placement.to_engines(params, axes, tensor=3)


def narrow(params):
  return jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)


def test_one_device_is_not_copied():
  params = {"w": jnp.ones(3)}
  assert placement.to_engines(params)[0] is params


# ---- Two processes -------------------------------------------------------------------

CHILD = """
import sys, pathlib
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 4)
from pixel_jax import parallel
from pixel_jax.run import checkpoint, optim
from pixel_jax.rollout import placement
parallel.initialize()
rank, work = jax.process_index(), pathlib.Path(sys.argv[1])
mesh = parallel.make_mesh(data=2, fsdp=2, tensor=2)
assert [d.process_index for d in mesh.devices.flat] == [0] * 4 + [1] * 4

whole = np.arange(8 * 3).reshape(8, 3)
mine = slice(4 * rank, 4 * rank + 4)
x = parallel.put_rows(mesh, whole[mine])
assert x.shape == (8, 3)
weighted = jax.jit(lambda x: (x * jnp.arange(8)[:, None]).sum())(x)
assert int(weighted) == (whole * np.arange(8)[:, None]).sum()

assert parallel.agree(rank, "max") == 1 and parallel.agree(rank == 1, "any") is True
assert parallel.agree(np.float64(1 / 3), "sum") == 2 / 3
assert parallel.agree({"lr": 1e-6}) == {"lr": 1e-6}
assert parallel.gather_json(["x" * rank]) == [[""], ["x"]]
assert parallel.total({"a": rank + 0.5, "b": 1}) == {"a": 2.0, "b": 2.0}
all_of = parallel.gather_rows({"x": np.full((2, 3), rank, np.int32), "y": np.ones(1, bool)})
assert all_of["x"].tolist() == [[0] * 3] * 2 + [[1] * 3] * 2 and all_of["y"].shape == (2,)
assert parallel.own_rows(all_of["x"]).tolist() == [[rank] * 3] * 2
try:
  parallel.agree(f"config {rank}")
  raise SystemExit("disagreement was not noticed")
except RuntimeError as error:
  assert "[1] differ from process 0" in str(error), error
parallel.barrier("half", timeout=30)

axes = {"w": ("embed", "heads")}
value = np.arange(64.0, dtype=np.float32).reshape(8, 8)
layout = parallel.shardings(mesh, axes, {"w": value})
params = {"w": jax.make_array_from_callback((8, 8), layout["w"], lambda i: value[i])}
engines = placement.to_engines(params, axes, tensor=2)
assert len(engines) == 2
for engine in engines:  # a program of this host alone
  assert float(jax.jit(jnp.sum)(engine["w"])) == value.sum()
  assert all(d.process_index == rank for d in engine["w"].devices())

# As on a torus: of this host's four devices two, then two of the other, then two again.
near = parallel.devices()
parallel.devices = lambda among: [near[i] for i in (0, 1, 4, 5, 2, 3, 6, 7)]
torus = parallel.make_mesh(data=1, fsdp=4, tensor=2)
rows = np.array([0, 1, 4, 5]) + 2 * rank
x = parallel.put_rows(torus, whole[rows])
weighted = jax.jit(lambda x: (x * jnp.arange(8)[:, None]).sum())(x)
assert int(weighted) == (whole * np.arange(8)[:, None]).sum()
lie = parallel.shardings(torus, axes, {"w": value})["w"]
spread = {"w": jax.make_array_from_callback((8, 8), lie, lambda i: value[i])}
for tensor in (1, 2, 4):
  engines = placement.to_engines(spread, axes, tensor=tensor)
  assert len(engines) == 4 // tensor
  for engine in engines:
    assert len(engine["w"].devices()) == tensor
    assert all(d.process_index == rank for d in engine["w"].devices())
    np.testing.assert_array_equal(engine["w"], value)
for size in (4, 8):
  try:
    parallel.make_mesh(data=-1, tensor=size)
    raise SystemExit("a tensor group of two hosts was not noticed")
  except ValueError as error:
    assert "must lie within a host" in str(error), error

tx, _ = optim.make(params, lr=1e-3, total_steps=2)
state = {"params": params, "opt": optim.init(tx, params)}
saver = checkpoint.Checkpoints(work, model={"size": 1})
saver.save(5, state, {"rng": 1, "shards": {str(rank): b"s%d" % rank}})
step, state, host = saver.restore(state)
assert step == 5 and host == {"rng": 1, "shards": {"0": b"s0", "1": b"s1"}}, host
saver.close()
print("fine", rank)
"""


def test_two_processes(tmp_path):
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  root = pathlib.Path(__file__).parents[1]
  children = [
    subprocess.Popen(
      [sys.executable, "-c", CHILD, str(tmp_path / "run")],
      cwd=root,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      env=alone(
        JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}",
        JAX_NUM_PROCESSES="2",
        JAX_PROCESS_ID=str(rank),
      ),
    )
    for rank in range(2)
  ]
  try:
    outputs = [c.communicate(timeout=600)[0] for c in children]
  finally:
    for c in children:
      c.kill()
  for rank, (child, output) in enumerate(zip(children, outputs)):
    assert child.returncode == 0 and f"fine {rank}" in output, output[-4000:]

  # One process goes on from what two have saved.
  from pixel_jax.run import checkpoint

  params, extra = checkpoint.load_params(tmp_path / "run")
  np.testing.assert_array_equal(params["w"], np.arange(64.0).reshape(8, 8))
  assert extra == {"model": {"size": 1}}
