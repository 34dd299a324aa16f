"""Processes, meshes and the one table that says how arrays are laid out.

What it is not: it holds no parameters and knows no model; `model/hf.py` names the axes
of every parameter, the table here says which mesh axis each name is cut along.

  ("layer", "embed", "heads", "head_dim")  ->  P(None, "fsdp", "tensor", None)

There is ONE device list, host-major: every mesh is a reshape of it, because jit refuses
to move arrays between meshes that list the same devices in another order.  Importing
this file touches no device.
"""

import functools
import hashlib
import itertools
import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pixel_jax.batch import Batch

log = logging.getLogger(__name__)

AXES = ("data", "fsdp", "tensor")
ROWS = PartitionSpec(("data", "fsdp"))  # axis 0 of everything in a Batch
LOST = 30  # seconds without a heartbeat after which a process counts as dead
_barriers = itertools.count()

# Logical axis -> mesh axis.  A mesh axis that a mesh lacks counts as absent, so one
# table serves the train mesh and the engines' (engine, tensor) mesh.
RULES: dict[str, str | None] = {
  "vocab": "tensor",
  "embed": "fsdp",
  "heads": "tensor",
  "kv_heads": "tensor",  # 4 in the 7B: replicated beyond tensor=4
  "head_dim": None,
  "mlp": "tensor",
  "layer": None,  # the scan runs over it
  # The tower: 1280 divides by up to 256, 3420 only by 4 (limits.md 4.3), so fsdp
  # goes on the width.
  "vision_embed": "fsdp",
  "vision_heads": "tensor",
  "vision_mlp": "tensor",
}


# ---- Processes -----------------------------------------------------------------------


def initialize() -> None:
  """Joins the other processes of this run where the environment names them.

  That is the case under JAX_COORDINATOR_ADDRESS (with JAX_NUM_PROCESSES and
  JAX_PROCESS_ID), in a SLURM step or an Open MPI job of several tasks, on a TPU slice
  of several hosts, or with PIXEL_JAX_DISTRIBUTED=auto (jax then finds out by itself;
  for TPU VMs, whose hosts are listed only by the metadata server).  Otherwise, and when
  called again, nothing happens.  A process that dies stops the others: see `LOST`.
  """
  if jax.distributed.is_initialized():
    return
  env, limits = os.environ, dict(heartbeat_timeout_seconds=LOST)
  if env.get("JAX_COORDINATOR_ADDRESS"):
    missing = [k for k in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID") if k not in env]
    if missing:
      raise ValueError(
        f"JAX_COORDINATOR_ADDRESS={env['JAX_COORDINATOR_ADDRESS']} is set but "
        f"{' and '.join(missing)} not. Set all three, or none for a single process."
      )
    jax.distributed.initialize(
      env["JAX_COORDINATOR_ADDRESS"],
      num_processes=int(env["JAX_NUM_PROCESSES"]),
      process_id=int(env["JAX_PROCESS_ID"]),
      **limits,
    )
  elif _is_many(env):
    jax.distributed.initialize(**limits)


def _is_many(env: Mapping[str, str]) -> bool:
  """Whether a launcher that jax knows has started several processes."""
  slurm = "SLURM_STEP_NODELIST" in env and int(env.get("SLURM_NTASKS", "1")) > 1
  mpi = int(env.get("OMPI_COMM_WORLD_SIZE", "1")) > 1
  tpu = "," in env.get("TPU_WORKER_HOSTNAMES", "")
  slices = int(env.get("MEGASCALE_NUM_SLICES", "1")) > 1
  return slurm or mpi or tpu or slices or env.get("PIXEL_JAX_DISTRIBUTED") == "auto"


def devices(among: Sequence[jax.Device] | None = None) -> list[jax.Device]:
  """The device list of the run, or of `among`: slice by slice, host by host.

  TPUs come as they lie on their torus instead, though a host's (a block of 2 x 2) are
  then apart: of three dimensions the compiler gathers in that order only.  In any other
  it adds up whole weights, twice the bytes (docs/pods.md).
  """

  def place(d):
    host = d.process_index, d.id
    near = (*reversed(d.coords), d.core_on_chip) if d.platform == "tpu" else host
    return getattr(d, "slice_index", None) or 0, *near

  return sorted(jax.devices() if among is None else among, key=place)


def barrier(name: str, timeout: int = 3600) -> None:
  """Waits for the other processes, which may take `timeout` seconds more.

  It asks the coordinator: a barrier that the devices compute, as jax's own and orbax's
  usual one, gives up after 30 seconds on CPUs.
  """
  if jax.process_count() > 1:
    from orbax.checkpoint import multihost  # here: importing orbax costs a second

    key = f"{name} {next(_barriers)}"  # a name serves once
    multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout * 1000)


def agree(value: Any, op: str = "all_equal") -> Any:
  """Makes every process decide alike on something that was read from data.

  Args:
    value: all_equal: anything JSON can say. max, any, sum: a number, a bool or an array
      of one shape on all processes.
    op: "all_equal" returns the value and refuses when a process differs; "max", "any"
      and "sum" combine.
  """
  if op not in ("all_equal", "max", "any", "sum"):
    raise ValueError(f"agree: {op=} is unknown; use all_equal, max, any or sum")
  if op == "all_equal":
    text = json.dumps(value, sort_keys=True, default=str)
    digests = _gather(hashlib.blake2b(text.encode(), digest_size=16).digest())
    if len(set(digests)) > 1:
      odd = [i for i, d in enumerate(digests) if d != digests[0]]
      raise RuntimeError(
        f"processes disagree: process {jax.process_index()} has {text[:200]}, and "
        f"{odd} differ from process 0. They read other data, configs or code: check "
        "that all hosts start from the same workdir, config and commit."
      )
    return value
  array = np.asarray(value)
  # Through bytes: jax would turn float64 and int64 into 32 bits.
  kind = array.dtype.str.encode().ljust(8)
  parts = _gather(kind + array.tobytes())
  if any(b[:8] != kind for b in parts):  # a sum of nothing is an int
    dtypes = [b[:8].decode().strip() for b in parts]
    raise TypeError(f"agree: processes give {dtypes}; give the same type on all")
  parts = [np.frombuffer(b[8:], array.dtype) for b in parts]
  stacked = np.stack(parts).reshape(-1, *array.shape)
  result = {"max": np.max, "any": np.any, "sum": np.sum}[op](stacked, axis=0)
  return result if array.shape else result.item()


def total(values: Mapping[str, float]) -> dict[str, float]:
  """Numbers under the same names on every process, added up."""
  added = agree(np.array(list(values.values()), np.float64), "sum")
  return dict(zip(values, added.tolist()))


def gather_json(value: Any) -> list[Any]:
  """The value of every process, in process order."""
  data = json.dumps(value).encode()
  length = agree(len(data), "max")
  # Few lengths: each is a program of its own.
  length = 1 << max(length - 1, 63).bit_length()
  return [json.loads(b.rstrip(b" ")) for b in _gather(data.ljust(length, b" "))]


def gather_rows(rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Arrays of as many rows on every process -> those of all, in process order."""
  if jax.process_count() == 1:
    return dict(rows)

  def join(x):
    parts = [np.frombuffer(b, x.dtype).reshape(x.shape) for b in _gather(x.tobytes())]
    return np.concatenate(parts)

  return {k: join(x) for k, x in rows.items()}


def own_rows(x: np.ndarray) -> np.ndarray:
  """The rows of this process: `gather_rows` undone."""
  return np.split(np.asarray(x), jax.process_count())[jax.process_index()]


def _gather(data: bytes) -> list[bytes]:
  if jax.process_count() == 1:
    return [data]
  barrier("gather")  # however long the others take
  mine = np.frombuffer(data, np.uint8)
  return [bytes(row) for row in np.asarray(multihost_utils.process_allgather(mine))]


def settle(x: Any) -> Any:
  """On CPUs waits for x, the result of a program of all devices, and returns it.

  Their threads are shared: of many programs in flight each may have some devices wait
  at a collective, and none has all of them.
  """
  if jax.device_count() > 1 and jax.default_backend() == "cpu":
    jax.block_until_ready(x)
  return x


# ---- Meshes --------------------------------------------------------------------------


def make_mesh(
  data: int = -1,
  fsdp: int = 1,
  tensor: int = 1,
  *,
  among: Sequence[jax.Device] | None = None,
) -> Mesh:
  """The train mesh over ("data", "fsdp", "tensor"); one size may be -1 (what is left).

  Fewer devices than there are is allowed in a single process (the tiny model).

  Args:
    among: devices to compile for, which need not exist; None = those of this run.
  """
  sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
  everything = devices(among)
  free = [k for k, v in sizes.items() if v == -1]
  if len(free) > 1 or any(v < 1 and v != -1 for v in sizes.values()):
    raise ValueError(f"mesh {sizes}: sizes are positive, and at most one is -1")
  fixed = math.prod(v for v in sizes.values() if v != -1)
  if free:
    if len(everything) % fixed:
      raise ValueError(
        f"mesh {sizes}: {fixed} does not divide the {len(everything)} devices, so "
        f"{free[0]}=-1 has no value. Choose divisors of {len(everything)}."
      )
    sizes[free[0]] = len(everything) // fixed
  used = math.prod(sizes.values())
  if used > len(everything) or (used < len(everything) and jax.process_count() > 1):
    raise ValueError(
      f"mesh {sizes} takes {used} devices, there are {len(everything)} on "
      f"{jax.process_count()} processes. Set one size to -1 to use them all."
    )
  if used < len(everything):
    _once(f"mesh {sizes} uses {used} of {len(everything)} devices")
  mesh = arrange(everything[:used], tuple(sizes.values()), AXES)
  if not within_hosts(mesh.devices.reshape(-1, sizes["tensor"])):
    raise ValueError(
      f"mesh {sizes}: a tensor group must lie within a host, so that each host fills "
      "whole rows. Lower tensor and raise fsdp."
    )
  return mesh


def within_hosts(groups: np.ndarray) -> bool:
  """Whether each row of devices lies on one host."""
  return all(len({d.process_index for d in group}) == 1 for group in groups)


def arrange(
  flat: list[jax.Device], shape: tuple[int, ...], names: tuple[str, ...]
) -> Mesh:
  """A mesh over devices as they come."""
  # Auto spelled out: jax.make_mesh defaults to Explicit, which would demand sharding
  # annotations all over the model (oracles.md 4).
  grid = np.array(flat, dtype=object).reshape(shape)
  return Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))


def on(mesh: Mesh):
  """A context inside jit: what follows it may be told where rows lie (`by_rows`)."""
  return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def by_rows(x: jax.Array) -> jax.Array:
  """Keeps x [B ..] with the devices of its rows, where `on` names a mesh.

  Left alone XLA may follow the weights instead: it cut the width of the vision tower
  and gave every device all rows (55 GiB for the 7B on v5p:4x4x4).
  """
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, ROWS)


def map_rows(function: Callable, *rows: jax.Array, whole: jax.Array, axis: int) -> Any:
  """function(*rows, whole), each device on its own rows and all of `whole`.

  `whole` is gathered once and its gradient added up once, however often a loop of
  `function` reads it.  The mesh is that of `on`; without one nothing is mapped.  Axes
  other than those of the rows stay XLA's.

  Args:
    axis: of `whole`, over which "fsdp" has cut it where it divides.  Told, it is
      gathered as it comes; left to XLA it was gathered in f32 and narrowed afterwards.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return function(*rows, whole)
  cut = whole.shape[axis] % mesh.shape["fsdp"] == 0

  def gathered(*args):
    *rows, x = args
    return function(
      *rows, jax.lax.all_gather(x, "fsdp", axis=axis, tiled=True) if cut else x
    )

  # An axis of one device comes along: XLA on CPUs dies of a sum in bf16 otherwise.
  mapped = {a for a, size in mesh.shape.items() if a in ROWS[0] or size == 1}
  lies = PartitionSpec(*[None] * axis, "fsdp") if cut else PartitionSpec()
  return jax.shard_map(
    gathered,
    in_specs=(*[ROWS] * len(rows), lies),
    out_specs=ROWS,
    axis_names=mapped,
    check_vma=False,
  )(*rows, whole)


def row_groups() -> int:
  """How many groups of devices hold rows of their own, on the mesh of `on`."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else math.prod(mesh.shape[a] for a in ROWS[0])


# ---- Layouts -------------------------------------------------------------------------


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def place(abstract: Any, shardings: Any) -> Any:
  """Abstract arrays that know where they lie."""
  return jax.tree.map(lambda x, s: x.update(sharding=s), abstract, shardings)


def shardings(mesh: Mesh, logical_axes: dict, abstract: dict) -> dict:
  """NamedShardings of a parameter tree.

  Args:
    logical_axes: nested dict whose leaves are tuples of logical names or None, one per
      dimension.
    abstract: the same tree with anything that has a shape.

  A dimension that its mesh axis does not divide is replicated and logged once; two
  dimensions of one array on the same mesh axis are an error.
  """
  return _shardings(mesh, logical_axes, abstract, "")


def _shardings(mesh, names, abstract, path):
  if isinstance(abstract, Mapping):
    if not isinstance(names, Mapping) or names.keys() != abstract.keys():
      has = sorted(names) if isinstance(names, Mapping) else names
      raise ValueError(
        f"axis names at {path or 'the root'!r} are {has}, the parameters have "
        f"{sorted(abstract)}. Complete the table in model/hf.py."
      )
    join = f"{path}/" if path else ""
    return {k: _shardings(mesh, names[k], v, join + k) for k, v in abstract.items()}
  return NamedSharding(mesh, spec(mesh, names, abstract.shape, path))


def spec(
  mesh: Mesh, names: tuple, shape: tuple[int, ...], path: str = ""
) -> PartitionSpec:
  """The PartitionSpec of one array, by RULES."""
  if len(names) != len(shape):
    raise ValueError(f"{path}: {len(names)} axis names {names} for shape {shape}")
  unknown = [n for n in names if n is not None and n not in RULES]
  if unknown:
    raise ValueError(
      f"{path}: axis name {unknown[0]!r} is not in parallel.RULES; known: {list(RULES)}"
    )
  taken: dict[str, str] = {}
  entries = []
  for name, size in zip(names, shape):
    axis = None if name is None else RULES[name]
    if axis is None or axis not in mesh.shape:
      entries.append(None)
      continue
    if axis in taken:
      raise ValueError(
        f"{path}: {taken[axis]!r} and {name!r} both lie on mesh axis {axis!r}; an "
        "array can be cut along it once. Name one of them None in the parameter table."
      )
    taken[axis] = name
    if size % mesh.shape[axis]:
      _once(
        f"{path}: {name} = {size} does not divide by {axis} = {mesh.shape[axis]}, "
        "so it is replicated"
      )
      axis = None
    entries.append(axis)
  return PartitionSpec(*entries)


@functools.cache
def _once(message: str) -> None:
  log.warning(message)


# ---- Rows ----------------------------------------------------------------------------


def check_rows(mesh: Mesh, num_rows: int) -> None:
  groups = mesh.shape["data"] * mesh.shape["fsdp"]
  if num_rows % groups:
    raise ValueError(
      f"a batch of {num_rows} rows does not divide over data x fsdp = "
      f"{mesh.shape['data']} x {mesh.shape['fsdp']}. Make the number of rows a "
      f"multiple of {groups}."
    )


def to_devices(mesh: Mesh, rows: Mapping[str, np.ndarray | None]) -> Batch:
  """The rows of this process -> the global Batch, axis 0 over (data, fsdp).

  Args:
    rows: the fields of Batch; axis 0 holds those of this process's devices, in the
      order of the mesh.
  """
  return Batch(**{k: None if x is None else put_rows(mesh, x) for k, x in rows.items()})


def put_rows(mesh: Mesh, x: np.ndarray) -> jax.Array:
  """One array of rows, as in `to_devices`."""
  x = np.asarray(x)
  check_rows(mesh, x.shape[0] * jax.process_count())
  return jax.make_array_from_process_local_data(NamedSharding(mesh, ROWS), x)
