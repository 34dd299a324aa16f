"""The bank gives every picture's own features back, full or not."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixel_jax.pixels import geometry
from pixel_jax.rollout import pictures

GRIDS = [(1, 2, 2), (1, 4, 4), (1, 6, 6), (1, 4, 6), (2, 4, 4), (1, 8, 8)]


def picture(index):
  grid = GRIDS[index % len(GRIDS)]
  n = int(np.prod(grid))
  patches = np.random.default_rng(index).integers(0, 256, (n, 1176), np.uint8)
  return geometry.lay_out(patches, grid)


def encode(features, rows, at):
  """A tower whose feature is the sum of the four patches; wrong where ids are 0."""
  x = rows.patches.astype(np.int64) * (rows.patch_image > 0)[..., None]
  x = x.reshape(-1, 4, 1176).sum(1)
  assert at + len(x) <= len(features)
  features = features.copy()
  features[at : at + len(x)] = x
  return features


@settings(max_examples=60, deadline=None)
@given(
  st.lists(st.lists(st.integers(0, 11), max_size=5), max_size=8), st.integers(5, 9)
)
def test_rows_are_the_pictures_own(calls, pages):
  bank = pictures.Bank(np.zeros((pages * 16, 1176), np.int64), encode, 64)
  for call in calls:
    wanted = [picture(i) for i in call]
    bank.hold(wanted)
    for p in wanted:
      merged = p.patches.astype(np.int64).reshape(-1, 4, 1176).sum(1)
      got = bank.features[bank.rows(p)]
      np.testing.assert_array_equal(got, merged[p.merged_row])


def test_a_picture_is_encoded_once_while_there_is_room():
  bank = pictures.Bank(np.zeros((4 * 16, 1176), np.int64), encode, 64)
  for _ in range(3):
    bank.hold([picture(1), picture(1), picture(7)])  # two of 16 patches: one call
  assert (bank.encoded, bank.calls) == (2, 1)


def test_sizes_and_limits():
  assert pictures.row_sizes(1024) == [1024, 768, 512, 256, 128, 64, 32, 16]
  assert all(size % 4 == 0 for size in pictures.row_sizes(1000))
  bank = pictures.Bank(np.zeros((16, 1176), np.int64), encode, 64)
  with pytest.raises(ValueError, match="Raise the engine's `pages`"):
    bank.hold([picture(2), picture(5)])
  bank = pictures.Bank(np.zeros((8, 1176), np.int64), encode, 32)
  with pytest.raises(ValueError, match="64 patches; the largest may have 32"):
    bank.hold([picture(5)])
