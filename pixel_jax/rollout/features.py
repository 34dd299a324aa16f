"""The frozen tower: what it makes of a picture is made once and kept in host memory.

While `freeze` covers the tower, its features are a function of the picture alone, so a
training step takes `Batch.features` in place of patches and runs text blocks only.  A
picture is encoded in a row of its own (rollout/pictures.py): its features do not depend
on its neighbours nor on what was kept before, bit for bit, so a killed run needs no
memory of them, and any number of hosts makes the same.  Every host encodes the pictures
of its own rows on its own devices, without collectives.

Not here: what is frozen (optim.py), which pictures a row holds (data/pack.py).
"""

import collections
import functools
from collections.abc import Callable, Collection
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pixel_jax import fields, parallel
from pixel_jax.fields import NonNegativeFloat
from pixel_jax.model import qwen2_5_vl
from pixel_jax.model.config import ModelConfig
from pixel_jax.rollout import pictures, placement

GIB = 1 << 30


@fields.checked
def open_bank(
  config: ModelConfig,
  params: dict,
  trained: Collection[str],
  *,
  patches: int,
  gib: NonNegativeFloat,
) -> "Bank | None":
  """The bank of a run; None where the tower is trained, or `gib` is 0.

  Args:
    params: of the model, laid out on the train mesh.
    trained: paths of the parameters that have a gradient.
    patches: of a packed row, the largest picture.
    gib: host memory of one process that features may take; 0 encodes in every step.
  """
  if not is_wanted(trained, gib):
    return None
  return Bank(config, params["vision"], patches, int(gib * GIB))


def is_wanted(trained: Collection[str], gib: float) -> bool:
  """Whether a run has a bank, so that its rows come with features."""
  return bool(gib) and not any(path.startswith("vision/") for path in trained)


def encoder(config: ModelConfig, mesh: Mesh) -> Callable:
  """The jitted program of a bank: (tower, rows) -> features f[B M D].

  Args:
    mesh: whose devices hold the tower whole and the rows in parts.
  """

  def encode(tower, rows):
    with parallel.on(mesh):  # a kernel can be cut along rows only where it knows them
      return qwen2_5_vl.encode_vision(config, {"vision": tower}, rows)

  return jax.jit(encode)


class Bank:
  """Features by content; the pictures used longest ago make room.

  Args:
    tower: parameters of the tower, on the train mesh; copied whole to every local
      device, in the compute dtype (1.3 GB for the 7B).
    patches: of the largest picture.
    capacity: bytes that are kept.
  """

  def __init__(self, config: ModelConfig, tower: dict, patches: int, capacity: int):
    narrow = jax.jit(functools.partial(qwen2_5_vl.cast, config))(tower)
    copies = placement.to_engines(narrow)
    devices = [next(iter(jax.tree.leaves(copy)[0].devices())) for copy in copies]
    self._mesh = parallel.make_mesh(among=devices)
    self._tower = jax.tree.map(self._together, *copies)
    self._patches, self._capacity = patches, capacity
    self._shape = config.text.width, np.dtype(config.dtype)
    self._encode = encoder(config, self._mesh)
    self._kept: collections.OrderedDict[str, np.ndarray] = collections.OrderedDict()
    self._bytes = 0
    self.encoded = 0  # pictures so far

  def fill(self, rows: dict[str, Any]) -> dict[str, np.ndarray]:
    """Rows of `pack.collate(apart=True)`: features f[B M D] for their "pictures"."""
    rows = dict(rows)
    shown = rows.pop("pictures")
    wanted = {p.key: p for row in shown for _, p in row}
    found = {key: self._kept.get(key) for key in wanted}
    found |= self._make([wanted[key] for key, x in found.items() if x is None])
    out = np.zeros((len(shown), self._patches // 4, self._shape[0]), self._shape[1])
    for b, row in enumerate(shown):
      for start, p in row:
        out[b, start : start + p.num_merged] = found[p.key]
    self._keep(found)
    return rows | {"features": out}

  def _make(self, missing: list) -> dict[str, np.ndarray]:
    """Encodes pictures; key -> f[M D] in window order."""
    sharding = NamedSharding(self._mesh, parallel.ROWS)
    made, told, times = {}, [], self._mesh.size
    for size, count, group in pictures.calls(missing, self._patches, times):
      rows = pictures.as_rows(group, count, size)
      told.append((group, self._encode(self._tower, jax.device_put(rows, sharding))))
    for group, features in told:  # after all of them were sent off
      for p, x in zip(group, np.asarray(features)):
        made[p.key] = x[: p.num_merged].copy()  # not a view of the padding
    self.encoded += len(made)
    return made

  def _keep(self, found: dict[str, np.ndarray]) -> None:
    for key, x in found.items():
      if key not in self._kept:
        self._bytes += x.nbytes
      self._kept[key] = x
      self._kept.move_to_end(key)
    while self._bytes > self._capacity:
      self._bytes -= self._kept.popitem(last=False)[1].nbytes

  def _together(self, *copies: jax.Array) -> jax.Array:
    """One replicated array from a copy on every local device."""
    sharding = NamedSharding(self._mesh, PartitionSpec())
    parts = [x.addressable_data(0) for x in copies]
    return jax.make_array_from_single_device_arrays(copies[0].shape, sharding, parts)
