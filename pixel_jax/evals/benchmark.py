"""A benchmark: what an evaluation knows of its questions beyond their answers."""

import dataclasses
from collections.abc import Callable

from pixel_jax.trajectory import OpCall, Task


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """One file of this room makes one of these for its benchmark.

  Attributes:
    covers: (task, call, earlier calls) -> whether the call shows what is asked for.
    other_scene: a task of the same kind with other pictures, for the mode "swapped".
  """

  covers: Callable[[Task, OpCall, list[OpCall]], bool] | None = None
  other_scene: Callable[[Task], Task] | None = None
