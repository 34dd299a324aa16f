"""The bank: features of pictures, encoded once and kept on the device by content.

A picture gets a row of its own, of the smallest size that holds it: sizes halve from
`patches` downwards, with one between the two largest, where padding costs most; each
compiles once.  A call takes one picture of these three, and as many smaller ones as cost
the same: crops come a few at a time, and rows that stand empty cost as much as full ones.
One picture a row also means that what a picture becomes does not depend on its
neighbours, bit for bit.  Features are only true for one set of weights: a bank lives for
one run.

Not here: the tower (model/vision.py), where features go among tokens (engine.py).
"""

from collections.abc import Callable, Iterable

import jax
import numpy as np

from pixel_jax.pixels.geometry import Pixels
from pixel_jax.rollout import decode

SMALLEST = 16  # patches of a row: the tiny world's crop
Call = tuple[int, int, list[Pixels]]  # row size, rows, pictures: one a row


def row_sizes(patches: int) -> list[int]:
  """Row sizes of the vision calls, in patches: 1024, 768, 512, 256, ..., 16."""
  sizes = [patches]
  while sizes[-1] % 8 == 0 and sizes[-1] // 2 >= SMALLEST:
    sizes.append(sizes[-1] // 2)
  if patches % 16 == 0 and len(sizes) > 1:
    sizes.insert(1, patches * 3 // 4)
  return sizes


def row_count(size: int, patches: int) -> int:
  """Rows of a call, of this size."""
  return max(1, patches // (2 * size))


class Bank:
  """Where the features of each picture lie.

  Args:
    features: f[N, D] on the device, to be overwritten.
    encode: (features, decode.Pictures, at) -> features, jitted.
    patches: of the largest picture.
  """

  def __init__(self, features: jax.Array, encode: Callable, patches: int):
    self.features = features
    self.calls = 0
    self.encoded = 0  # pictures
    self._encode = encode
    self._patches = patches
    self._next = 0  # first feature that is free
    self._at: dict[str, int] = {}  # key -> first feature

  def hold(self, pictures: Iterable[Pixels]) -> None:
    """Makes sure that all of these lie in the bank together; encodes what is missing."""
    wanted = {p.key: p for p in pictures}
    plan = calls([p for p in wanted.values() if p.key not in self._at], self._patches)
    if self._next + _room(plan) > len(self.features):
      # Full: start over with what is wanted now.  The rest is encoded again on demand.
      self._at, self._next = {}, 0
      plan = calls(wanted.values(), self._patches)
      if _room(plan) > len(self.features):
        raise ValueError(
          f"{len(wanted)} pictures of one call need room for {_room(plan)} "
          f"features, the bank has {len(self.features)}. Raise the engine's `pages`."
        )
    for size, count, batch in plan:
      rows = as_rows(batch, count, size)
      self.features = self._encode(self.features, rows, np.int32(self._next))
      for i, p in enumerate(batch):
        self._at[p.key] = self._next + i * (size // 4)
      self._next += count * size // 4
      self.calls += 1
      self.encoded += len(batch)

  def rows(self, picture: Pixels) -> np.ndarray:
    """i32[M] row of the bank of each placeholder of a picture that `hold` has placed."""
    return self._at[picture.key] + picture.merged_row


def calls(pictures: Iterable[Pixels], patches: int, times: int = 1) -> list[Call]:
  """(row size, rows, pictures) of each call, the smallest sizes first, each in its order.

  Args:
    patches: of the largest picture.
    times: as many rows a call as one device takes.
  """
  by_size: dict[int, list[Pixels]] = {size: [] for size in row_sizes(patches)[::-1]}
  for p in pictures:
    size = next((s for s in by_size if s >= p.num_patches), None)
    if size is None:
      raise ValueError(
        f"a picture of grid {p.grid} has {p.num_patches} patches; the largest may have "
        f"{patches}. Raise `patches` (engine or data) or lower the pixel budgets."
      )
    by_size[size].append(p)
  plan = []
  for size, group in by_size.items():
    n = times * row_count(size, patches)
    plan += [(size, n, group[i : i + n]) for i in range(0, len(group), n)]
  return plan


def _room(plan: list[Call]) -> int:
  """Features that the calls of a plan write."""
  return sum(count * size // 4 for size, count, _ in plan)


def as_rows(pictures: list[Pixels], num_rows: int, size: int) -> decode.Pictures:
  """Pictures laid out one a row of `size` patches; the rest is padding."""
  patches = np.zeros((num_rows, size, pictures[0].patches.shape[1]), np.uint8)
  pos = np.zeros((num_rows, size, 2), np.int32)
  image = np.zeros((num_rows, size), np.int32)
  window = np.zeros((num_rows, size), np.int32)
  for i, p in enumerate(pictures):
    n = p.num_patches
    patches[i, :n], pos[i, :n] = p.patches, p.patch_pos
    image[i, :n], window[i, :n] = p.patch_image + 1, p.patch_window + 1
  return decode.Pictures(patches, pos, image, window)
