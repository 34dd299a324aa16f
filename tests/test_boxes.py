"""Boxes and frames around a cue, for all cues and grids: properties, not examples."""

import json

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from pixel_jax.synthesis import boxes

quick = hypothesis.settings(max_examples=150, deadline=None)
seeds = st.integers(0, 2**32 - 1)


@st.composite
def grids(draw):
  if draw(st.booleans()):
    return boxes.WORLD
  sides = draw(st.tuples(st.integers(200, 6000), st.integers(200, 6000)))
  profile = draw(st.sampled_from(["clean", "released"]))
  return boxes.fine(*sides, 28, profile)


@st.composite
def cues(draw, most=1.0):
  """Any box, of any precision, with sides up to `most`."""
  box = [0.0] * 4
  for i in (0, 1):
    side = draw(st.floats(0.005, most))
    box[i] = draw(st.floats(0, 1 - side))
    box[i + 2] = min(box[i] + side, 1.0)
  return tuple(box)


def check_box(box, grid):
  assert all(0 <= v <= grid.last / grid.bins for v in box)
  assert box == tuple(json.loads(grid.text(box)))  # what is written is what is cut
  steps = [v * grid.bins for v in box]
  assert all(abs(s - round(s)) < 1e-6 for s in steps)
  for i in (0, 1):
    assert steps[i + 2] - steps[i] >= min(grid.least[i], grid.last) - 1e-6


@quick
@hypothesis.given(cues(), grids(), seeds, st.sampled_from([0.0, 0.1]))
def test_wrong_boxes_show_nothing_of_the_cue(cue, grid, seed, padding):
  try:
    box = boxes.wrong(cue, np.random.default_rng(seed), grid, padding)
  except boxes.SynthesisError:
    # It says so only where there is no room: no side has place for the least box.
    for i in (0, 1):
      free = max(cue[i], 1 - cue[i + 2]) - padding
      assert free < (grid.least[i] + 2) / grid.bins
    return
  check_box(box, grid)
  padded = boxes.pad(box, padding)
  # An oracle of its own: one of four sides separates them.
  assert (
    padded[2] <= cue[0]
    or padded[0] >= cue[2]
    or padded[3] <= cue[1]
    or padded[1] >= cue[3]
  )


@quick
@hypothesis.given(cues(), grids())
def test_the_box_of_a_cue_contains_it(cue, grid):
  box = boxes.cover(cue, grid)
  check_box(box, grid)
  if grid.last == grid.bins:  # "released" cannot write the last thousandth
    assert all(box[i] <= cue[i] + 1e-6 for i in (0, 1))
    assert all(box[i] >= cue[i] - 1e-6 for i in (2, 3))
  for i in (0, 1):  # and no more than it must
    side = max(cue[i + 2] - cue[i] + 2 / grid.bins, grid.least[i] / grid.bins)
    assert box[i + 2] - box[i] <= side + 1e-6


@quick
@hypothesis.given(cues(most=0.3), grids(), seeds)
def test_larger_boxes_contain_the_cue_and_are_much_larger(cue, grid, seed):
  box = boxes.larger(cue, np.random.default_rng(seed), grid)
  check_box(box, grid)
  if grid.last == grid.bins:
    assert all(box[i] <= cue[i] + 1e-6 for i in (0, 1))
    assert all(box[i] >= cue[i] - 1e-6 for i in (2, 3))
  for i in (0, 1):
    assert box[i + 2] - box[i] >= 2 * (cue[i + 2] - cue[i]) - 2 / grid.bins


@quick
@hypothesis.given(cues(most=0.3), seeds, st.sampled_from([0.0, 0.1]))
def test_a_crop_of_the_crop_is_the_cue(cue, seed, padding):
  grid = boxes.fine(1000, 800, 28)
  box = boxes.cover(cue, grid)
  large = boxes.pad(boxes.larger(cue, np.random.default_rng(seed), grid), padding)
  part = boxes.inside(box, large, grid)
  for i in range(4):  # back into the whole picture
    low, side = large[i % 2], large[i % 2 + 2] - large[i % 2]
    at = low + part[i] * side
    if grid.least[i % 2] / grid.bins < box[i % 2 + 2] - box[i % 2] - 2e-3:
      assert abs(at - box[i]) <= 0.51 * side / grid.bins + 1e-6
  middle = [(cue[i] + cue[i + 2]) / 2 for i in (0, 1)]
  for i in (0, 1):
    low, side = large[i], large[i + 2] - large[i]
    assert low + part[i] * side - 1e-3 <= middle[i] <= low + part[i + 2] * side + 1e-3


@quick
@hypothesis.given(st.data(), st.integers(2, 32), seeds)
def test_wrong_frames_are_none_of_the_cue(data, count, seed):
  rng = np.random.default_rng(seed)
  cue = sorted(data.draw(st.sets(st.integers(1, count), min_size=1)))
  if len(cue) == count:
    with pytest.raises(boxes.SynthesisError, match="no frames beside"):
      boxes.wrong_frames(cue, count, rng)
    return
  frames = boxes.wrong_frames(cue, count, rng)
  assert not set(frames) & set(cue) and frames == sorted(set(frames))
  assert all(1 <= f <= count for f in frames)
  assert len(frames) == min(len(cue), count - len(cue), 8)
  moved = boxes.noisy_frames(cue, count, rng, 3.0)
  assert all(1 <= f <= count for f in moved) and len(moved) == min(len(cue), 8)


@quick
@hypothesis.given(st.sets(st.integers(1, 400), min_size=1, max_size=60))
def test_of_a_long_window_frames_are_spread(window):
  window = sorted(window)
  chosen = boxes.at_most(window)
  assert set(chosen) <= set(window) and chosen == sorted(set(chosen))
  assert len(chosen) == min(len(window), 8)
  assert (chosen[0], chosen[-1]) == (window[0], window[-1])
