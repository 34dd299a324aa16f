"""The zoom on the device: cut boxes from a picture, resize each as Pillow 13.0 does.

Equal to `picture.crop(box).resize(size, BICUBIC)` byte for byte, for any box and size.
Pillow's rule (Resample.c of 13.0.0): an output row is a weighted sum of a run of input
rows, with integer weights of 22 fraction bits that were computed in float64; one pass
an axis, each rounded to 8 bits; an axis that keeps its length is not touched.  Columns
go first, or rows where the height shrinks by more than twice what the width does.

  host    plan: start, taps (the runs and their weights) and the order, in numpy
  device  zoom: u8[S 3*S], Plan -> u8[B O 3*O]        two int32 passes along rows
          patch_rows: u8[O 3*O], i32[P 2] -> u8[P 1176]  in window order

Shapes are static: a picture lies at the top left of a square of side S, a box in a
window of side C, a result at the top left of a square of side O, zeros around it.
Squares, so that one program serves both orders: what goes second is transposed.  Pixels
are [rows, 3 * columns]: a last axis of 3 would be padded to 128 lanes on a TPU.

No sum leaves int32: 255 * sum |taps| + 2**21 stays below 1.4 * 2**30, as Pillow's own
C ints need it (bicubic lobes: sum |weight| <= 1.25; tests/test_resample.py measures it).

Not here: where to cut (`ops.py`), which size (`image.smart_resize`).  A device file: it
is imported by name only (the engine does), never by its neighbours in this room.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32, UInt8
from PIL import Image

from pixel_jax.pixels import image as image_lib

BITS = 32 - 8 - 2  # of the fraction of a weight; Pillow's PRECISION_BITS
HALF = 1 << (BITS - 1)
FEW = (4, 8, 16)  # taps: no shrinking, up to 1.75 times, up to 3.75 times
SUPPORT = 2.0  # bicubic: pixels to either side, of the coarser grid

# Sides of the squares of `Resize`.  A result's side is a multiple of 28, and the crop's
# budget of 1000 * 784 pixels is a square of 885.
WINDOWS = (128, 256, 512, 1024, 2048, 4096)
OUTPUTS = (112, 224, 448, 896, 1792)


class Plan(NamedTuple):
  """Arrays for B boxes; index 0 is the pass that goes first, 1 the second."""

  corner: Int32[Array, "B 2"]  # (row, column) of the window in the picture
  start: Int32[Array, "B 2 O"]  # first input row of each output row, in the window
  taps: Int32[Array, "B 2 O K"]  # its weights; 0 past its run
  columns_first: Bool[Array, " B"]
  num_taps: Int32[Array, ""]  # the longest run: the device stops there, not at K


# ---- Host: Pillow's weights ----------------------------------------------------------


def table(length: int, out: int) -> tuple[np.ndarray, np.ndarray]:
  """(start i32[out], taps i32[out k]) of `length` pixels resized to `out`.

  precompute_coeffs and normalize_coeffs_8bpc, operation by operation: float64 rounds
  each of them, so their order matters.  (A compiler that fuses multiply and add, as for
  arm64, could round otherwise; this is what Pillow's x86-64 wheels do.)
  """
  if min(length, out) < 1:
    raise ValueError(f"{length=}, {out=}: a side has 1 pixel or more.")
  return _table(length, out)


@functools.lru_cache(maxsize=4096)
def _table(length: int, out: int) -> tuple[np.ndarray, np.ndarray]:
  if length == out:  # Pillow skips the pass; a weight of 1 copies exactly
    return np.arange(out, dtype=np.int32), np.full((out, 1), 1 << BITS, np.int32)
  scale = length / out
  stretch = max(scale, 1.0)
  center = (np.arange(out) + 0.5) * scale
  # C truncates; what is negative becomes 0 anyway.
  first = np.maximum((center - SUPPORT * stretch + 0.5).astype(np.int64), 0)
  last = np.minimum((center + SUPPORT * stretch + 0.5).astype(np.int64), length)
  k = np.arange((last - first).max())
  inside = k < (last - first)[:, None]
  x = np.abs((k + first[:, None] - center[:, None] + 0.5) * (1.0 / stretch))
  near = (1.5 * x - 2.5) * x * x + 1
  far = (((x - 5) * x + 8) * x - 4) * -0.5
  weight = np.where(inside, np.where(x < 1, near, np.where(x < 2, far, 0.0)), 0.0)
  # One after the other, as C adds; np.sum adds in pairs.
  total = np.add.accumulate(weight, axis=1)[:, -1:]
  weight = weight / np.where(total == 0, 1.0, total)
  taps = (weight * (1 << BITS) + np.where(weight < 0, -0.5, 0.5)).astype(np.int32)
  return first.astype(np.int32), taps


def columns_first(size: tuple[int, int], new: tuple[int, int]) -> bool:
  """Pillow 13.0's order of the passes for (width, height) -> new (width, height)."""
  narrower, lower = size[0] - new[0], size[1] - new[1]
  return not (lower > 0 and lower > 2 * narrower)


def plan(
  boxes: Sequence[tuple[int, int, int, int]],
  sizes: Sequence[tuple[int, int]],
  *,
  source: int,
  window: int,
  out: int,
) -> Plan:
  """The arrays of `zoom` for boxes (left, top, right, bottom) -> (width, height).

  Args:
    source: S, side of the square that holds the picture.
    window: C <= S, side of a square that holds each box.
    out: O, side of a square that holds each result.
  """
  num = len(boxes)
  corner = np.zeros((num, 2), np.int32)
  start = np.zeros((num, 2, out), np.int32)
  first = np.zeros(num, bool)
  tables = []
  for i, (box, new) in enumerate(zip(boxes, sizes, strict=True)):
    left, top, right, bottom = box
    if not (0 <= left < right <= source and 0 <= top < bottom <= source):
      raise ValueError(f"{box=} does not lie within the picture's square, {source=}.")
    size = (right - left, bottom - top)
    if max(size) > window or max(new) > out or window > source:
      raise ValueError(
        f"a box of {size} -> {new} in {source=}, {window=}, {out=}; expected box <="
        f" window <= source and size <= out. Take larger squares."
      )
    # A window may not stick out of the square: it moves back, and the box in it on.
    corner[i] = min(top, source - window), min(left, source - window)
    first[i] = columns_first(size, new)
    axes = [
      (size[1], new[1], top - corner[i, 0]),
      (size[0], new[0], left - corner[i, 1]),
    ]
    for j, (length, side, offset) in enumerate(axes[::-1] if first[i] else axes):
      begin, taps = table(length, side)
      start[i, j, :side] = begin + offset
      tables.append((i, j, taps))
  longest = max(taps.shape[1] for _, _, taps in tables)
  k = _round_up(max(longest, 16 * window // out, FEW[-1]))
  taps = np.zeros((num, 2, out, k), np.int32)
  for i, j, rows in tables:
    taps[i, j, : len(rows), : rows.shape[1]] = rows
  return Plan(corner, start, taps, first, np.int32(longest))


def _round_up(n: int) -> int:
  """The next power of two.

  Of 16 C / O taps or more: in a square of its own size a side shrinks to O / 2 at least
  and `smart_resize` may halve the shorter one again; 4 taps a unit of scale.  So K
  follows from C and O and makes no further programs.
  """
  return 1 << (n - 1).bit_length()


def square(picture: Image.Image, side: int) -> np.ndarray:
  """u8[S 3*S]: an RGB picture at the top left of a square, zeros around it."""
  if picture.mode != "RGB":
    raise ValueError(
      f"a picture of mode {picture.mode}; expected RGB: image.load_image"
    )
  width, height = picture.size
  if max(width, height) > side:
    raise ValueError(f"a picture of {width}x{height} in a square of {side}.")
  result = np.zeros((side, 3 * side), np.uint8)
  result[:height, : 3 * width] = np.asarray(picture).reshape(height, -1)
  return result


# ---- Device --------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="window")
def zoom(
  picture: UInt8[Array, "S 3*S"], boxes: Plan, *, window: int
) -> UInt8[Array, "B O 3*O"]:
  """Every box of one picture, resized; compiled once for (S, C = window, B, O, K)."""

  def one(corner, start, taps, columns_first):
    x = jax.lax.dynamic_slice(picture, (corner[0], 3 * corner[1]), (window, 3 * window))
    x = jax.lax.cond(columns_first, _transpose, lambda x: x, x)
    x = _transpose(_resample(x, start[0], taps[0], boxes.num_taps))
    x = _resample(x, start[1], taps[1], boxes.num_taps)
    return jax.lax.cond(columns_first, lambda x: x, _transpose, x)

  return jax.vmap(one)(boxes.corner, boxes.start, boxes.taps, boxes.columns_first)


def _resample(x, start, taps, num_taps):
  """One pass along rows: u8[N D] -> u8[O D], rounded and clipped as Pillow's clip8."""

  def add(first, num, total):
    for k in range(num):
      weight = jax.lax.dynamic_index_in_dim(taps, first + k, axis=1)  # O 1
      # Past a run the weight is 0, so it does not matter which row is read there.
      rows = x.at[start + first + k].get(mode="clip")
      total = total + weight * rows.astype(jnp.int32)
    return total

  def finish(total):
    return jnp.clip(total >> BITS, 0, 255).astype(jnp.uint8)

  def few(num):
    # One fused loop: the sum never goes through memory (4 times as fast on a CPU).
    return lambda: finish(add(0, num, jnp.int32(HALF)))

  def many():
    total = jnp.full((len(start), x.shape[1]), HALF, jnp.int32)
    most = FEW[-1]

    def step(i, total):
      return add(i * most, most, total)

    return finish(jax.lax.fori_loop(0, -(-num_taps // most), step, total))

  which = sum((num_taps > n).astype(jnp.int32) for n in FEW)
  return jax.lax.switch(which, [*map(few, FEW), many])


def _transpose(x):
  """[N 3*D] -> [D 3*N]: rows and columns of pixels change places."""
  pixels = x.reshape(x.shape[0], -1, 3)
  return pixels.swapaxes(0, 1).reshape(pixels.shape[1], -1)


@functools.partial(jax.jit, static_argnames=("patch", "temporal"))
def patch_rows(
  picture: UInt8[Array, "O 3*O"],
  patch_pos: Int32[Array, "P 2"],
  *,
  patch: int = image_lib.PATCH,
  temporal: int = image_lib.TEMPORAL,
) -> UInt8[Array, "P C"]:
  """A result of `zoom` as the vision tower takes it: `Pixels.patches` of `lay_out`.

  Args:
    patch_pos: (row, column) of each patch, `geometry.patch_positions` of the result's
      grid: the host decides the order.  Padding is -1 and gives zeros.
  """
  side = picture.shape[0] // patch
  blocks = picture[: side * patch].reshape(side, patch, -1)[:, :, : side * patch * 3]
  blocks = blocks.reshape(side, patch, side, patch, 3).transpose(0, 2, 4, 1, 3)
  rows = blocks[patch_pos[:, 0], patch_pos[:, 1]]  # P 3 y x
  rows = jnp.repeat(rows[:, :, None], temporal, axis=2)  # a still picture: twice
  rows = rows.reshape(len(patch_pos), -1)
  return jnp.where(patch_pos[:, :1] < 0, np.uint8(0), rows)


# ---- For the rollout -----------------------------------------------------------------


class Resize:
  """`image.bicubic` on the device, for `Codec.resize`: the same bytes, by any thread.

  A picture too large for the squares, such as a very long one, is resized by PIL.
  `programs` are the shapes used so far: at most len(WINDOWS) * len(OUTPUTS).
  """

  def __init__(self):
    self.programs: set[tuple[int, int]] = set()

  def __call__(self, picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    if picture.size == tuple(size):
      return picture.copy()
    if max(picture.size) > WINDOWS[-1] or max(size) > OUTPUTS[-1]:
      return image_lib.bicubic(picture, size)
    side = next(s for s in WINDOWS if s >= max(picture.size))
    out = next(s for s in OUTPUTS if s >= max(size))
    boxes = plan([(0, 0, *picture.size)], [size], source=side, window=side, out=out)
    self.programs.add((side, out))
    result = zoom(square(picture, side), boxes, window=side)
    width, height = size
    rows = np.asarray(result)[0, :height, : 3 * width]
    return Image.fromarray(rows.reshape(height, width, 3))
