"""Boxes and frames around a cue: itself, beside it, around it, inside a crop.

A box is (x1, y1, x2, y2), fractions of the picture, on a grid of few decimals: what is
written is exactly what is cut.  Pure functions of a cue and a random generator; nothing
here knows a picture, a call or a text.

  the cue .12-.24   cover   .12-.24    the cue, rounded outwards
                    wrong   .48-.58    overlaps it nowhere
                    larger  .04-.40    contains it, two to three times as wide and high
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

TRIES = 100

Box = tuple[float, float, float, float]


class SynthesisError(ValueError):
  """Kinds that do not exist, or a question that a kind cannot be made of."""


@dataclasses.dataclass(frozen=True)
class Grid:
  """Coordinates are multiples of 1 / bins; a side has `least` of them or more."""

  bins: int
  least: tuple[int, int]  # of the width, of the height
  decimals: int  # that a coordinate is written with
  last: int  # the largest coordinate: `released` prompts read 1.0 as a pixel

  def text(self, box: Sequence[float]) -> str:
    return "[" + ", ".join(f"{v:.{self.decimals}f}" for v in box) + "]"


# Of the tiny world: numbers are single tokens; .06 is 15 pixels of it, one patch.
WORLD = Grid(bins=50, least=(3, 3), decimals=2, last=50)


def fine(width: int, height: int, min_side: int, profile: str = "clean") -> Grid:
  """The grid of a picture of so many pixels, no side of a box under `min_side`."""
  least = tuple(min(math.ceil(min_side / n * 1000), 1000) for n in (width, height))
  return Grid(1000, least, 3, 999 if profile == "released" else 1000)


def on_grid(
  steps: Sequence[float], grid: Grid = WORLD, least: Sequence[int] | None = None
) -> Box:
  """Edges in steps of the grid -> a box within the picture, no side under `least`."""
  least = least or grid.least
  edges = [round(float(v)) for v in steps]
  box = [0.0] * 4
  for i in (0, 1):
    side = min(least[i], grid.last)
    low = min(max(edges[i], 0), grid.last - side)
    high = min(max(edges[i + 2], low + side), grid.last)
    box[i], box[i + 2] = (round(v / grid.bins, grid.decimals) for v in (low, high))
  return tuple(box)


def outwards(steps: Sequence[float]) -> list[float]:
  """Edges rounded to whole steps so that nothing inside is lost."""
  low = [math.floor(v + 1e-6) for v in steps[:2]]
  return [*low, *(math.ceil(v - 1e-6) for v in steps[2:])]


def cover(cue: Box, grid: Grid = WORLD) -> Box:
  """The smallest box of the grid around the cue."""
  return on_grid(outwards([v * grid.bins for v in cue]), grid)


def noisy(
  box: Box, rng: np.random.Generator, noise: tuple[float, float], grid: Grid = WORLD
) -> Box:
  """The box as somebody imprecise would give it; exactly around it without noise.

  Args:
    noise: sd of the shift of the box, and of each edge on top, in steps.
  """
  jitter, edge_jitter = noise
  dx, dy, *edges = rng.normal(0, 1, 6).tolist()
  if not jitter and not edge_jitter:
    return cover(box, grid)
  shift = (dx * jitter, dy * jitter) * 2
  return on_grid(
    [v * grid.bins + s + e * edge_jitter for v, s, e in zip(box, shift, edges)], grid
  )


def wrong(
  cue: Box, rng: np.random.Generator, grid: Grid = WORLD, padding: float = 0.0
) -> Box:
  """A box of about the cue's size that does not overlap it, nor does its padding."""
  bins = grid.bins
  for _ in range(TRIES):
    # A cue that fills the picture leaves room only for smaller boxes.
    w, h = ((cue[i + 2] - cue[i]) * bins for i in (0, 1))
    shrink = rng.uniform(0.4, 1.0)
    w, h = max(w * shrink, grid.least[0]), max(h * shrink, grid.least[1])
    x, y = rng.uniform(0, max(bins - w, 0)), rng.uniform(0, max(bins - h, 0))
    box = on_grid((x, y, x + w, y + h), grid)
    if not overlap(pad(box, padding), cue):
      return box
  # Little room is seldom hit by chance: one of the four strips beside the cue.
  left, top = (math.floor((cue[i] - padding) * bins + 1e-6) for i in (0, 1))
  right, below = (math.ceil((cue[i + 2] + padding) * bins - 1e-6) for i in (0, 1))
  end, (w, h) = grid.last, grid.least
  strips = [(0, 0, left, end), (right, 0, end, end), (0, 0, end, top)]
  strips = [
    s for s in (*strips, (0, below, end, end)) if s[2] - s[0] >= w and s[3] - s[1] >= h
  ]
  if strips:
    x1, y1, x2, y2 = strips[rng.integers(len(strips))]
    w, h = rng.integers(w, x2 - x1 + 1), rng.integers(h, y2 - y1 + 1)
    x, y = rng.integers(x1, x2 - w + 1), rng.integers(y1, y2 - h + 1)
    return on_grid((x, y, x + w, y + h), grid)
  raise SynthesisError(
    f"no box beside the reference {cue}: it fills the picture. Leave image/recrop1 and "
    "image/recrop2 out of the kinds for such tasks."
  )


def overlap(a: Box, b: Box) -> bool:
  return all(a[i] < b[i + 2] and b[i] < a[i + 2] for i in (0, 1))


def pad(box: Box, padding: float) -> Box:
  """What is cut where an operation adds `padding` of the picture on every side."""
  low = (max(0.0, box[i] - padding) for i in (0, 1))
  return (*low, *(min(1.0, box[i] + padding) for i in (2, 3)))


def larger(cue: Box, rng: np.random.Generator, grid: Grid = WORLD) -> Box:
  """A box that contains the cue, two to three times as wide and high, somewhere."""
  bins, steps = grid.bins, [0.0] * 4
  for i in (0, 1):
    side = (cue[i + 2] - cue[i]) * bins
    large = min(side * rng.uniform(2.0, 3.0), bins)
    low = max(0.0, cue[i + 2] * bins - large)
    high = min(cue[i] * bins, bins - large)
    steps[i] = rng.uniform(low, max(low, high))
    steps[i + 2] = steps[i] + large
  return on_grid(outwards(steps), grid)


def inside(box: Box, large: Box, grid: Grid = WORLD) -> Box:
  """A box of the whole picture in coordinates of the crop `large`."""
  sides = [large[i + 2] - large[i] for i in (0, 1)]
  steps = [(box[i] - large[i % 2]) / sides[i % 2] * grid.bins for i in range(4)]
  # A box that sticks out is cut, but keeps as many pixels as one of the picture has.
  least = [min(math.ceil(n / side), grid.last) for n, side in zip(grid.least, sides)]
  return on_grid(steps, grid, least)


# ---- Frames --------------------------------------------------------------------------


def at_most(frames: Sequence[int], most: int = 8) -> list[int]:
  """The frames of a cue; `most` of them, evenly spaced, where there are more."""
  if len(frames) <= most:
    return list(frames)
  chosen = np.linspace(0, len(frames) - 1, most).round().astype(int)
  return [frames[i] for i in chosen]


def noisy_frames(cue, count: int, rng: np.random.Generator, jitter: float) -> list[int]:
  """The cue's frames, all moved by the same number of frames."""
  shift = round(float(rng.normal(0, 1)) * jitter / 2)
  shift = min(max(shift, 1 - min(cue)), count - max(cue))
  return [frame + shift for frame in at_most(cue)]


def wrong_frames(cue, count: int, rng: np.random.Generator) -> list[int]:
  """As many frames as the cue has, none of them in it."""
  others = [f for f in range(1, count + 1) if f not in cue]
  if not others:
    raise SynthesisError(
      f"no frames beside the reference {list(cue)} of {count}. Leave video/reselect "
      "out of the kinds for such tasks."
    )
  size = min(len(cue), len(others), 8)
  return sorted(rng.choice(others, size, replace=False).tolist())
