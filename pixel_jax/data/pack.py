"""Packing: examples of many lengths into rows of T tokens and P patches.  numpy only.

Not the choice of examples and not the order of the batch (`pipeline.py`).  One packer
serves SFT and RL.  A row holds each distinct picture once: the segments that show it
point to the same merged patches, so a group's rollouts share their image.

  tokens   a a a a a a b b b b . .      segment       1 1 1 1 1 1 2 2 2 2 0 0
  patches  [picture 1][crop of b] . .   vision_index  - 0 2 1 3 - - 0 2 1 3 -

The main value is the dict of `collate`: the fields of `Batch`, rows first.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

# The tower attends in banded blocks of 64 patches (limits.md 3.3).
PATCH_BLOCK = 64
PATCH_BYTES = 1176

# The distinct pictures of a row: (first merged patch in the row, `geometry.Pixels`).
Pictures = list[tuple[int, Any]]


class PackError(ValueError):
  """An example that no row can hold, or rows that do not fit the batch."""


def distinct(example: Any) -> dict[str, int]:
  """Key -> patches of every distinct picture of an example."""
  return {pixels.key: pixels.num_patches for _, pixels in example.vision}


def fits(example: Any, T: int, P: int) -> bool:
  """Whether a row can hold `example`."""
  return len(example.tokens) <= T and sum(distinct(example).values()) <= P


def check_fits(example: Any, T: int, P: int, name: str = "the example") -> None:
  """Raises PackError when `example` is longer than a row."""
  if not fits(example, T, P):
    tokens, patches = len(example.tokens), sum(distinct(example).values())
    raise PackError(
      f"{name} has {tokens} tokens and {patches} patches; a row holds T={T} and P={P}. "
      "Raise data.tokens or data.patches, lower the pixel budgets, or drop the example."
    )


def first_fit(examples: Sequence[Any], T: int, P: int) -> list[list[int]]:
  """Rows of example indices, in order of opening; every example is in exactly one row.

  An example goes to the first row that has room, but before that to the first one that
  already holds one of its pictures: so rollouts of one question stay together.
  """
  check_limits(T, P)
  rows: list[list[int]] = []
  held: list[set[str]] = []  # keys of a row
  where: dict[str, list[int]] = {}  # key -> rows that hold it
  free = np.zeros((2, max(len(examples), 1)), np.int64)  # tokens, patches left
  for i, example in enumerate(examples):
    check_fits(example, T, P, f"example {i}")
    tokens, pictures = len(example.tokens), distinct(example)
    patches = sum(pictures.values())

    def extra(row, pictures=pictures):
      return sum(n for key, n in pictures.items() if key not in held[row])

    sharing = sorted({row for key in pictures for row in where.get(key, ())})
    row = next(
      (r for r in sharing if free[0, r] >= tokens and free[1, r] >= extra(r)), None
    )
    if row is None:
      # A row that shares nothing needs all patches; the sharing ones were looked at.
      fits = (free[0, : len(rows)] >= tokens) & (free[1, : len(rows)] >= patches)
      row = int(fits.argmax()) if fits.any() else len(rows)
    if row == len(rows):
      rows.append([])
      held.append(set())
      free[:, row] = T, P
    free[:, row] -= tokens, extra(row)
    rows[row].append(i)
    for key in pictures.keys() - held[row]:
      where.setdefault(key, []).append(row)
    held[row] |= pictures.keys()
  return rows


def check_limits(T: int, P: int) -> None:
  if T < 1 or P < PATCH_BLOCK or P % PATCH_BLOCK:
    raise PackError(
      f"a row of T={T} tokens and P={P} patches; T must be positive and P a positive "
      f"multiple of {PATCH_BLOCK}. Change data.tokens or data.patches."
    )


def collate(
  rows: Sequence[Sequence[Any]], T: int, P: int, num_rows: int, *, apart: bool = False
) -> dict[str, Any]:
  """The fields of `Batch` for `num_rows` rows; missing rows are padding.

  Args:
    rows: the examples of each row, as `first_fit` grouped them.
    apart: leave the patches out, and return the `Pictures` of each row in "pictures".
  """
  check_limits(T, P)
  if len(rows) > num_rows:
    raise PackError(
      f"{len(rows)} packed rows for a batch of {num_rows}. Pass them in several."
    )
  B = num_rows
  out = {
    "tokens": np.zeros((B, T), np.int32),
    "segment": np.zeros((B, T), np.int32),
    "position": np.zeros((B, T, 3), np.int32),
    "weight": np.zeros((B, T), np.float32),
    "vision_index": np.full((B, T), -1, np.int32),
    "logp_sampler": np.zeros((B, T), np.float32),
    "advantage": np.zeros((B, T), np.float32),
  }
  pictures: list[Pictures] = [[] for _ in range(B)]
  for b, examples in enumerate(rows):
    pictures[b] = _fill({k: x[b] for k, x in out.items()}, examples, T, P, b)
  if apart:
    return out | _patches([[]] * B, 0) | {"pictures": pictures}
  return out | _patches(pictures, P)


def _fill(out: dict[str, np.ndarray], examples, T: int, P: int, row: int) -> Pictures:
  """Writes the examples into one row's views of the arrays; returns its pictures."""
  at, patch = 0, 0  # next free token, patch
  starts: dict[str, int] = {}  # key -> its first merged patch in the row
  pictures: Pictures = []
  for segment, example in enumerate(examples, 1):
    n = len(example.tokens)
    new = sum(k for key, k in distinct(example).items() if key not in starts)
    if at + n > T or patch + new > P:
      raise PackError(
        f"row {row} does not hold its examples: {at + n} tokens, {patch + new} patches "
        f"with example {segment}; T={T}, P={P}. Group them with first_fit(T, P)."
      )
    here = slice(at, at + n)
    out["tokens"][here] = example.tokens
    out["segment"][here] = segment
    out["position"][here] = example.position
    out["weight"][here] = example.weight
    out["logp_sampler"][here] = example.logp
    out["advantage"][here] = example.advantage
    for start, pixels in example.vision:
      if pixels.key not in starts:
        starts[pixels.key] = patch * pixels.num_merged // pixels.num_patches
        pictures.append((starts[pixels.key], pixels))
        patch += pixels.num_patches
      m = pixels.num_merged
      span = slice(at + start, at + start + m)
      out["vision_index"][span] = starts[pixels.key] + pixels.merged_row
    at += n
  return pictures


def _patches(rows: Sequence[Pictures], P: int) -> dict[str, np.ndarray]:
  """The fields of `Batch` that the tower reads: the pictures of each row in turn."""
  B = len(rows)
  out = {
    "patches": np.zeros((B, P, PATCH_BYTES), np.uint8),
    "patch_pos": np.zeros((B, P, 2), np.int32),
    "patch_image": np.zeros((B, P), np.int32),
    "patch_window": np.zeros((B, P), np.int32),
  }
  for b, pictures in enumerate(rows):
    at, image, window = 0, 0, 0  # next free patch; ids given so far
    for _, pixels in pictures:
      here = slice(at, at + pixels.num_patches)
      out["patches"][b, here] = pixels.patches
      out["patch_pos"][b, here] = pixels.patch_pos
      out["patch_image"][b, here] = pixels.patch_image + (image + 1)
      out["patch_window"][b, here] = pixels.patch_window + (window + 1)
      at += pixels.num_patches
      image += int(pixels.patch_image.max()) + 1
      window += int(pixels.patch_window.max()) + 1
  return out
