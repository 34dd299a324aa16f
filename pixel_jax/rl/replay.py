"""Selective Sample Replay (VL-Rethinker, Algorithm 1): fill up with what teaches.

Groups whose rewards are all equal have no advantage and no gradient.  Their places are
filled with samples that have one, drawn with P(j) = |A_j|^alpha / sum_k |A_k|^alpha.
Host only, no jax.  A sample is anything with an `advantage` (key or attribute; a number
or an array, whose largest magnitude counts).

The buffer is cleared every step, as the paper says (the released code never does, and
so replays old samples with old log-probs).  With `keep_steps` it holds the samples of
that many earlier steps too; their `logp_old` must then travel in the sample.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pixel_jax import fields
from pixel_jax.fields import NonNegativeFloat, NonNegativeInt


class Replay:
  """The buffer of one logical shard.

  Args:
    alpha: how strongly large advantages are preferred; 0 draws evenly.
    keep_steps: earlier steps whose samples may be drawn.
    refill: False only drops the samples without an advantage.
  """

  @fields.checked
  def __init__(
    self,
    alpha: NonNegativeFloat = 1.0,
    keep_steps: NonNegativeInt = 0,
    refill: bool = True,
  ):
    self.alpha, self.keep_steps, self.refill = alpha, keep_steps, refill
    self._steps: list[list[Any]] = []  # samples with an advantage, oldest step first

  def select(
    self, samples: Sequence[Any], rng: np.random.Generator, size: int | None = None
  ) -> tuple[list[Any], int]:
    """The samples to train on, and how many of them were drawn.

    First the step's own samples that have an advantage, in order, then draws (with
    replacement) up to `size`, by default len(samples).  Nothing to draw from: ([], 0).
    """
    size = len(samples) if size is None else size
    fresh = [s for s in samples if magnitude(s) > 0]
    buffer = [s for step in self._steps for s in step] + fresh
    shortage = max(size - len(fresh), 0) if self.refill and buffer else 0
    drawn = []
    if shortage:
      # Over the largest first: |A|^alpha of small or many numbers must not vanish.
      a = np.array([magnitude(s) for s in buffer], np.float64)
      p = (a / a.max()) ** self.alpha
      drawn = [buffer[i] for i in rng.choice(len(buffer), shortage, p=p / p.sum())]
    if self.keep_steps:
      self._steps = [*self._steps, fresh][-self.keep_steps :]
    return fresh + drawn, len(drawn)

  def get_state(self, to_json: Callable[[Any], Any] = lambda s: s) -> dict:
    """What `set_state` needs; `to_json` encodes one sample of the buffer."""
    return {"steps": [[to_json(s) for s in step] for step in self._steps]}

  def set_state(
    self, state: dict, from_json: Callable[[Any], Any] = lambda s: s
  ) -> None:
    self._steps = [[from_json(s) for s in step] for step in state["steps"]]


def magnitude(sample: Any) -> float:
  """|A| of a sample."""
  is_mapping = isinstance(sample, Mapping)
  advantage = sample["advantage"] if is_mapping else sample.advantage
  largest = float(np.max(np.abs(advantage), initial=0.0))
  if not np.isfinite(largest):
    raise ValueError(
      f"advantage {largest} of a sample is not finite; check the rewards"
    )
  return largest
