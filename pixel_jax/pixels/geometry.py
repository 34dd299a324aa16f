"""Where patches and tokens stand: window order, rotary ids, M-RoPE ids.  numpy only.

The device never sees a grid.  What it needs of a picture is `Pixels`, index arrays made
here once a grid (cached) and the bytes permuted accordingly.

Two orders of the same patches, four (a 2x2 block) to a merged patch:
  raster  the order of the processor and of the placeholders in the text
  window  blocks of 112 px (4 x 4 merged patches) one after the other, raster inside; a
          window at the right or lower edge is smaller.  The tower runs in this order.

M-RoPE ids follow Qwen's release (transformers 4.49, vLLM): the temporal id is
int(t * second_per_grid * tokens_per_second), and what follows a picture or a clip
starts at max(previous ids) + 1.  transformers 5.23 starts what follows a clip at start
+ max(h, w) / merge, ignoring time; tests/test_geometry.py pins the difference.
"""

import dataclasses
import functools
import hashlib
import math

import numpy as np

from pixel_jax.pixels.image import MERGE, PATCH

WINDOW = 112  # pixels a side; Qwen2.5-VL's window_size

Grid = tuple[int, int, int]  # patches: time, height, width


@dataclasses.dataclass(frozen=True, eq=False)  # arrays have no ==; compare `key`
class Pixels:
  """One picture, or one whole clip, as the device takes it; M = P / merge^2."""

  patches: np.ndarray  # u8[P 1176]  in window order
  patch_pos: np.ndarray  # i32[P 2]    (row, column) of the patch, HF's rotary ids
  patch_image: (
    np.ndarray
  )  # i32[P]      full attention: one segment a temporal step, 0..
  patch_window: np.ndarray  # i32[P]      window attention: contiguous runs, 0..
  merged_row: np.ndarray  # i32[M]      window-order merged row of the m-th placeholder
  grid: Grid
  key: str  # hash of patches and grid: equal keys, equal pictures

  @property
  def num_patches(self) -> int:
    return len(self.patches)

  @property
  def num_merged(self) -> int:
    return len(self.merged_row)


# ---- Patches -------------------------------------------------------------------------


def lay_out(
  patches: np.ndarray,
  grid: Grid,
  *,
  window: int = WINDOW,
  patch: int = PATCH,
  merge: int = MERGE,
) -> Pixels:
  """Raster patches u8[P C] of `image.patchify` -> `Pixels` in window order.

  The index arrays are shared between pictures of one grid and therefore read-only.
  """
  grid = tuple(int(n) for n in grid)
  if len(patches) != math.prod(grid):
    raise ValueError(
      f"{len(patches)} patches for the grid {grid}; expected {math.prod(grid)}."
      f" Pass patches and grid of one image.patchify call."
    )
  plan = _plan(grid, window, patch, merge)
  # Merged patches move as a whole: gather rows of 4 x 1176 bytes.
  blocks = patches.reshape(len(plan.order), -1)
  ordered = blocks[plan.order].reshape(patches.shape)
  digest = hashlib.blake2b(ordered, digest_size=16, salt=b"pixels")
  digest.update(repr(grid).encode())
  return Pixels(
    patches=ordered,
    patch_pos=plan.patch_pos,
    patch_image=plan.patch_image,
    patch_window=plan.patch_window,
    merged_row=plan.merged_row,
    grid=grid,
    key=digest.hexdigest(),
  )


def window_order(
  grid: Grid, *, window: int = WINDOW, patch: int = PATCH, merge: int = MERGE
) -> np.ndarray:
  """i32[M]: the raster index of the merged patch at each place of the window order."""
  return _plan(tuple(int(n) for n in grid), window, patch, merge).order


def patch_positions(
  grid: Grid, *, window: int = WINDOW, patch: int = PATCH, merge: int = MERGE
) -> np.ndarray:
  """i32[P 2]: (row, column) of the patch at each place of the window order."""
  return _plan(tuple(int(n) for n in grid), window, patch, merge).patch_pos


@dataclasses.dataclass(frozen=True, eq=False)
class _Plan:
  order: np.ndarray  # i32[M]
  patch_pos: np.ndarray
  patch_image: np.ndarray
  patch_window: np.ndarray
  merged_row: np.ndarray


@functools.lru_cache(maxsize=1024)
def _plan(grid: Grid, window: int, patch: int, merge: int) -> _Plan:
  t, h, w = grid
  side = window // merge // patch  # merged patches along a window
  if min(grid) < 1 or h % merge or w % merge:
    raise ValueError(
      f"grid {grid}: expected (time, height, width) of 1 or more, height and width"
      f" multiples of {merge}. Take the grid from image.patchify."
    )
  if side < 1 or window % (merge * patch):
    raise ValueError(
      f"{window=}: expected a multiple of {merge * patch} pixels (merge * patch)."
    )
  time, row, column = (
    a.reshape(-1)
    for a in np.meshgrid(
      np.arange(t), np.arange(h // merge), np.arange(w // merge), indexing="ij"
    )
  )
  across = -(-(w // merge) // side)  # windows along the width
  down = -(-(h // merge) // side)
  id_of_merged = (time * down + row // side) * across + column // side
  order = np.argsort(id_of_merged, kind="stable")  # raster inside a window
  merged_row = np.empty_like(order)
  merged_row[order] = np.arange(len(order))
  # Each merged patch spreads into its merge x merge patches, raster inside.
  inner = np.arange(merge * merge)
  pos = np.stack(
    [
      row[order, None] * merge + inner // merge,
      column[order, None] * merge + inner % merge,
    ],
    axis=-1,
  )
  spread = np.repeat(order, merge * merge)
  return _Plan(
    order=_constant(order),
    patch_pos=_constant(pos.reshape(-1, 2)),
    patch_image=_constant(time[spread]),
    patch_window=_constant(id_of_merged[spread]),
    merged_row=_constant(merged_row),
  )


def _constant(values: np.ndarray) -> np.ndarray:
  values = np.ascontiguousarray(values, np.int32)
  values.flags.writeable = False
  return values


# ---- Tokens --------------------------------------------------------------------------


def text_positions(n: int, start: int) -> np.ndarray:
  """i32[n 3]: the three ids run together through text."""
  return np.repeat(np.arange(start, start + n, dtype=np.int32)[:, None], 3, axis=1)


def image_positions(grid: Grid, start: int, merge: int = MERGE) -> np.ndarray:
  """i32[M 3] (time, height, width) of a still picture's placeholders."""
  return video_positions(grid, start, 0.0, 0.0, merge)


def video_positions(
  grid: Grid,
  start: int,
  second_per_grid: float,
  tokens_per_second: float,
  merge: int = MERGE,
) -> np.ndarray:
  """i32[M 3] of a clip's placeholders; a grid step lasts `second_per_grid` seconds."""
  if not (0 <= second_per_grid < math.inf and 0 <= tokens_per_second < math.inf):
    raise ValueError(
      f"{second_per_grid=}, {tokens_per_second=}: expected finite numbers of 0 or more."
      f" Check the frame rate of the clip and the model's config."
    )
  t, h, w = grid
  # float32, each product rounded: torch's arange(int64) * float is float32, so this is
  # where Qwen's release truncates.  In float64 some ids would be one lower or higher.
  seconds = np.arange(t, dtype=np.float32) * np.float32(second_per_grid)
  time = (seconds * np.float32(tokens_per_second)).astype(np.int64)
  ids = np.stack(
    np.meshgrid(time, np.arange(h // merge), np.arange(w // merge), indexing="ij"),
    axis=-1,
  )
  return (ids.reshape(-1, 3) + start).astype(np.int32)


def next_position(positions: np.ndarray) -> int:
  """Where what follows starts: max over all three ids so far, plus 1."""
  return int(positions.max()) + 1 if len(positions) else 0
