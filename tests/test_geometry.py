"""Window order, rotary ids and M-RoPE ids equal HF's; clips follow Qwen's 2025 rule."""

import itertools
import json
import pathlib

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from pixel_jax.pixels import geometry

ROOT = pathlib.Path(__file__).parent
GOLDEN = dict(np.load(ROOT / "golden/pixels.npz"))


def _names(prefix):
  return sorted({n.split("/")[0] for n in GOLDEN if n.startswith(prefix)})


def _laid_out(grid, seed=0):
  """`Pixels` of random patches, and the patches."""
  random = np.random.default_rng(seed)
  patches = random.integers(0, 256, (int(np.prod(grid)), 1176), np.uint8)
  return geometry.lay_out(patches, grid), patches


def _check_against_hf(grid, order, bounds, rotary):
  pixels, patches = _laid_out(grid)
  np.testing.assert_array_equal(geometry.window_order(grid), order)
  by_hf = patches.reshape(-1, 4, 1176)[order].reshape(-1, 1176)
  np.testing.assert_array_equal(pixels.patches, by_hf)
  by_hf = rotary.reshape(-1, 4, 2)[order].reshape(-1, 2)
  np.testing.assert_array_equal(pixels.patch_pos, by_hf)
  # Window ids change exactly at HF's bounds, and never come back.
  changes = np.flatnonzero(np.diff(pixels.patch_window)) + 1
  np.testing.assert_array_equal([0, *changes, len(patches)], bounds)
  np.testing.assert_array_equal(
    np.unique(pixels.patch_window), np.arange(len(bounds) - 1)
  )
  # Undoing the order of the tower gives the order of the placeholders.
  np.testing.assert_array_equal(
    np.asarray(order)[pixels.merged_row], np.arange(len(order))
  )


@pytest.mark.parametrize("name", _names("grid"))
def test_golden_window_order_and_rotary_ids(name):
  _check_against_hf(
    tuple(GOLDEN[f"{name}/thw"].tolist()),
    GOLDEN[f"{name}/order"],
    GOLDEN[f"{name}/bounds"],
    GOLDEN[f"{name}/rotary"],
  )


GRIDS = st.tuples(
  st.integers(1, 5), st.integers(1, 14).map(lambda n: 2 * n),
  st.integers(1, 14).map(lambda n: 2 * n),
)  # fmt: skip


@pytest.mark.torch
@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(GRIDS)
def test_window_order_and_rotary_ids_equal_hf(grid):
  torch = pytest.importorskip("torch")
  from transformers import vision_utils

  thw = torch.tensor([grid])
  order, bounds = vision_utils.get_vision_window_index(thw, 2, 112, 14)
  rotary = vision_utils.get_vision_position_ids(thw, 2)
  _check_against_hf(grid, order.numpy(), bounds.numpy(), rotary.numpy())


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(GRIDS)
def test_segments(grid):
  """Windows hold 64 patches at most, inside one temporal step; steps run in order."""
  pixels, _ = _laid_out(grid)
  _, sizes = np.unique(pixels.patch_window, return_counts=True)
  assert sizes.max() <= 64
  np.testing.assert_array_equal(
    pixels.patch_image, np.repeat(np.arange(grid[0]), grid[1] * grid[2])
  )
  for name in ("patch_pos", "patch_image", "patch_window", "merged_row"):
    assert getattr(pixels, name).dtype == np.int32
  assert pixels.patches.dtype == np.uint8 and pixels.patches.flags.c_contiguous
  assert (pixels.num_patches, pixels.num_merged) == (np.prod(grid), np.prod(grid) // 4)


def test_picture_of_a_window_order():
  """Merged patches of a 1 x 12 x 12 grid: windows of 4 x 4, narrower at the edges."""
  place = np.empty(36, int)
  place[geometry.window_order((1, 12, 12))] = np.arange(36)
  assert place.reshape(6, 6).tolist() == [
    [ 0,  1,  2,  3, 16, 17],
    [ 4,  5,  6,  7, 18, 19],
    [ 8,  9, 10, 11, 20, 21],
    [12, 13, 14, 15, 22, 23],
    [24, 25, 26, 27, 32, 33],
    [28, 29, 30, 31, 34, 35],
  ]  # fmt: skip


def test_key_is_of_content_and_grid():
  one, patches = _laid_out((1, 4, 6))
  again = geometry.lay_out(patches.copy(), (1, 4, 6))
  assert one.key == again.key
  other = patches.copy()
  other[5, 7] ^= 1
  keys = {one.key, geometry.lay_out(other, (1, 4, 6)).key}
  blank = np.zeros((24, 1176), np.uint8)
  keys |= {geometry.lay_out(blank, g).key for g in [(1, 4, 6), (1, 6, 4), (1, 2, 12)]}
  assert len(keys) == 5


def test_shared_index_arrays_cannot_be_written():
  pixels, _ = _laid_out((1, 4, 4))
  with pytest.raises(ValueError, match="read-only"):
    pixels.patch_window[0] = 7


@pytest.mark.parametrize(
  ("num", "grid", "words"),
  [
    (7, (1, 2, 4), "7 patches"),
    (6, (1, 2, 3), "multiples of 2"),
    (0, (0, 2, 2), "1 or"),
  ],
)
def test_lay_out_refuses(num, grid, words):
  with pytest.raises(ValueError, match=words):
    geometry.lay_out(np.zeros((num, 1176), np.uint8), grid)


# ---- M-RoPE --------------------------------------------------------------------------


def _compose(sequence, second_per_grid=None):
  """Positions i32[T 3] of text lengths and grids by our functions, piece by piece."""
  out, start = [], 0
  for part in sequence:
    if isinstance(part, int):
      out.append(geometry.text_positions(part, start))
    elif second_per_grid is None:
      out.append(geometry.image_positions(tuple(part), start))
    else:
      out.append(geometry.video_positions(tuple(part), start, second_per_grid, 2.0))
    start = geometry.next_position(out[-1])
  return np.concatenate(out)


@pytest.mark.parametrize("name", _names("images"))
def test_golden_mrope_of_images(name):
  sequence = json.loads(GOLDEN[f"{name}/sequence"].tobytes())
  np.testing.assert_array_equal(_compose(sequence), GOLDEN[f"{name}/position"])


def _rope_index(*args):
  from pixel_jax.tools import golden

  return golden.rope_index(*args)


@pytest.mark.torch
@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
  st.lists(st.tuples(st.integers(1, 20), GRIDS.map(lambda g: (1, *g[1:]))), max_size=4),
  st.integers(1, 9),
)
def test_mrope_of_images_equals_hf(parts, tail):
  pytest.importorskip("torch")
  sequence = [*itertools.chain(*parts), tail]
  if len(sequence) == 1:  # HF refuses plain text here
    np.testing.assert_array_equal(_compose(sequence)[:, 0], np.arange(tail))
  else:
    np.testing.assert_array_equal(_compose(sequence), _rope_index(sequence))


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(
  GRIDS,
  st.integers(0, 10_000),
  st.floats(0, 60, width=32),
  st.sampled_from([2, 2.0, 25]),
)
def test_mrope_of_videos_by_the_slow_formula(grid, start, second_per_grid, rate):
  """transformers 4.49, modeling_qwen2_5_vl.py get_rope_index, token by token."""
  expected = []
  for t in range(grid[0]):
    # torch: arange(int64) * float is float32, so both products round there.
    seconds = np.float32(t) * np.float32(second_per_grid)
    time = int(seconds * np.float32(rate))
    for h in range(grid[1] // 2):
      expected += [(start + time, start + h, start + w) for w in range(grid[2] // 2)]
  got = geometry.video_positions(grid, start, second_per_grid, rate)
  assert got.dtype == np.int32
  np.testing.assert_array_equal(got, expected)
  assert geometry.next_position(got) == max(map(max, expected)) + 1


@pytest.mark.parametrize("second_per_grid", [0.5, 1.0, 2.25, 1 / 3, 0.1, 0.7])
def test_mrope_time_is_the_plain_truncation(second_per_grid):
  """Where float32 does not matter, the id is int(t * seconds * rate), as is written."""
  got = geometry.video_positions((12, 2, 2), 0, second_per_grid, 2.0)[:, 0]
  exact = [int(t * second_per_grid * 2.0 + 1e-6) for t in range(12)]
  np.testing.assert_array_equal(got, exact)


def test_mrope_time_is_rounded_where_torch_rounds_it():
  """2 * 0.49999999 is 1.0 in float32, where Qwen's release computes it."""
  assert int(2 * 0.49999999) == 0
  got = geometry.video_positions((2, 2, 2), 0, 0.49999999, 2.0)
  assert got[:, 0].tolist() == [0, 1]


@pytest.mark.torch
@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(st.integers(1, 60), st.floats(0, 30), st.sampled_from([2, 4]))
@hypothesis.example(2, 0.49999999, 2)
def test_mrope_time_equals_the_release_in_torch(t, second_per_grid, rate):
  torch = pytest.importorskip("torch")
  time = (torch.arange(t).view(-1, 1) * second_per_grid * rate).long()
  got = geometry.video_positions((t, 2, 2), 0, second_per_grid, rate)[:, 0]
  np.testing.assert_array_equal(got, time[:, 0].numpy())


@pytest.mark.parametrize("name", _names("video"))
def test_where_transformers_5_23_differs_for_videos(name):
  """5.23: the clip itself alike; the text after it at start + max(h, w) / 2."""
  grid = tuple(GOLDEN[f"{name}/grid"].tolist())
  second_per_grid = float(GOLDEN[f"{name}/second_per_grid"])
  theirs = GOLDEN[f"{name}/position_5_23"]
  ours = _compose([3, grid, 4], second_per_grid)
  np.testing.assert_array_equal(ours[:-4], theirs[:-4])
  assert theirs[-4, 0] == 3 + max(grid[1:]) // 2
  longest = max(int((grid[0] - 1) * second_per_grid * 2) + 1, max(grid[1:]) // 2)
  assert ours[-4, 0] == 3 + longest
  assert (ours[-4, 0] == theirs[-4, 0]) == (longest == max(grid[1:]) // 2)


def test_the_known_numbers_of_the_difference():
  """Grid [8,4,6], 1 s a step: what follows is at 18 here, at 6 in 5.23."""
  ours = _compose([3, (8, 4, 6), 1], 1.0)
  assert ours[-1].tolist() == [18, 18, 18]
  video = next(n for n in _names("video") if GOLDEN[f"{n}/grid"].tolist() == [8, 4, 6])
  assert GOLDEN[f"{video}/position_5_23"][-4].tolist() == [6, 6, 6]


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(
  st.lists(st.one_of(st.integers(1, 9), GRIDS), min_size=2, max_size=7), st.data()
)
def test_positions_only_ever_grow(sequence, data):
  """A later turn never moves what stands: a prefix has the prefix of the positions."""
  cut = data.draw(st.integers(1, len(sequence) - 1))
  whole, part = _compose(sequence, 0.75), _compose(sequence[:cut], 0.75)
  np.testing.assert_array_equal(whole[: len(part)], part)
  assert (whole[len(part) :] > part.max()).all()


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0])
def test_video_positions_refuse_broken_times(seconds):
  with pytest.raises(ValueError, match="Check the frame rate"):
    geometry.video_positions((2, 2, 2), 0, seconds, 2.0)
