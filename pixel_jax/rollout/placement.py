"""The weights of the trainer as engines take them: an engine is a few devices of a host.

One program reshards the parameters of the train mesh, on all hosts together; each engine
keeps its part of the result.  Called by the fleet, and by what needs whole weights on
every device (features.py).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pixel_jax import parallel

AXES = ("engine", "tensor_major", "engine_minor", "tensor")  # of _engine_grid


def engine_mesh(mesh: Mesh, tensor: int = 1) -> Mesh:
  """The rollout mesh ("engine", "tensor") over the devices of `mesh`."""
  groups = _engines(_engine_grid(mesh, tensor))
  return parallel.arrange(list(groups.flat), groups.shape, ("engine", "tensor"))


@functools.lru_cache(maxsize=8)  # asked for thrice a sync
def _engine_grid(mesh: Mesh, tensor: int) -> np.ndarray:
  """The devices of `mesh`, in its order, as [a b c d]: an engine is [i : j :] on a host.

  Where a host's devices follow one another b = c = 1.  On a v5p, whose hosts are blocks
  of 2 x 2, two are followed by two of the next host, and two more by theirs.
  """
  flat = mesh.devices.reshape(-1)
  cuts = [(1, 1)] + [
    (apart, gap)
    for apart in range(2, tensor + 1)
    for gap in range(2, flat.size // tensor + 1)
    if tensor % apart == 0 and flat.size % (tensor * gap) == 0
  ]
  for apart, gap in cuts if flat.size % tensor == 0 else []:
    grid = flat.reshape(-1, apart, gap, tensor // apart)
    if parallel.within_hosts(_engines(grid)):
      return grid
  local = sum(d.process_index == flat[0].process_index for d in flat)
  raise ValueError(
    f"engines of {tensor} devices do not fill a host of {local}; use a divisor of it"
  )


def _engines(grid: np.ndarray) -> np.ndarray:
  """The devices of each engine of a grid, [a c, b d]."""
  return grid.transpose(0, 2, 1, 3).reshape(-1, grid.shape[1] * grid.shape[3])


def to_engines(
  params: dict,
  logical_axes: dict | None = None,
  *,
  tensor: int = 1,
  prepare: Callable[[dict], dict] | None = None,
) -> list[dict]:
  """The weights as each engine of this host takes them: one tree per local engine.

  One SPMD reshard (called by all processes together), whose shards become the engines'
  local arrays without a copy.

  Args:
    logical_axes: of what engines take; None = whole weights.
    prepare: done before anything is gathered: narrows dtypes, merges adapters.  The
      same object at every call, or each call compiles anew.
  """
  leaf = jax.tree.leaves(params)[0]
  if len(leaf.sharding.device_set) == 1 and tensor == 1:  # they lie there already
    return [params if prepare is None else _jit(prepare)(params)]
  mesh = leaf.sharding.mesh
  params = parallel.settle(
    resharder(mesh, tensor, params, logical_axes, prepare)(params)
  )
  rows = engine_mesh(mesh, tensor).devices
  mine = [row for row in rows if row[0].process_index == jax.process_index()]
  return [_local(params, list(row)) for row in mine]


def resharder(
  mesh: Mesh,
  tensor: int,
  params: dict,
  logical_axes: dict | None = None,
  prepare: Callable[[dict], dict] | None = None,
):
  """The jitted program of `to_engines`: params, real or abstract, as engines take them.

  Without logical_axes every engine gets whole weights.

  Args:
    mesh: where params lie.
  """
  prepare = prepare or _as_they_are
  made = jax.eval_shape(prepare, params)
  if logical_axes is None:
    logical_axes = jax.tree.map(lambda x: (None,) * x.ndim, made)
  flat, tree = jax.tree.flatten(
    parallel.shardings(engine_mesh(mesh, tensor), logical_axes, made)
  )
  # A program has one order of devices, and the parameters come in that of `mesh`.
  grid = _engine_grid(mesh, tensor)
  ordered = parallel.arrange(list(grid.flat), grid.shape, AXES)
  flat = [
    NamedSharding(ordered, PartitionSpec(*(e and AXES[1::2] for e in x.spec)))
    for x in flat
  ]
  return _resharder(prepare, tuple(flat), tree)


def _as_they_are(params: dict) -> dict:
  return params


_jit = functools.lru_cache(maxsize=8)(jax.jit)


@functools.lru_cache(maxsize=8)  # one program per layout, not one trace per sync
def _resharder(prepare, flat, tree):
  return jax.jit(prepare, out_shardings=jax.tree.unflatten(tree, flat))


def local_sharding(x: Any, group: list[jax.Device]) -> NamedSharding:
  """Where one engine, a tensor group, has its part of x, laid out by `resharder`."""
  mesh = parallel.arrange(group, (len(group),), ("tensor",))
  entries = (e and "tensor" for e in x.sharding.spec)
  return NamedSharding(mesh, PartitionSpec(*entries))


def _local(params: dict, group: list[jax.Device]) -> dict:
  def take(x):
    shards = {s.device: s.data for s in x.addressable_shards}
    sharding = local_sharding(x, group)
    parts = [shards[d] for d in group]
    return jax.make_array_from_single_device_arrays(x.shape, sharding, parts)

  return jax.tree.map(take, params)
