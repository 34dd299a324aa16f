"""The tiny world as a benchmark: every cue is known, and every scene has others."""

from pixel_jax.data import world
from pixel_jax.evals.benchmark import Benchmark
from pixel_jax.trajectory import Task


def _category(task: Task) -> str:
  return f"{task.reference['kind']}/{task.reference['difficulty']}"


def _boxes(task: Task) -> list[list[float]]:
  return [task.reference["glyph_2d"]]


TINY_WORLD = Benchmark(
  name="world",
  category=_category,
  boxes=_boxes,
  covers=world.covers,
  other_scene=world.other_scene,
)
