"""The tiny world as a benchmark: every cue is known, and every scene has others."""

from pixel_jax.data import world
from pixel_jax.evals.benchmark import Benchmark

TINY_WORLD = Benchmark(covers=world.covers, other_scene=world.other_scene)
