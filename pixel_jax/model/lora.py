"""Low-rank adapters: y = x W + alpha / rank * (x A) B, where only A and B are trained.

`lora_a` and `lora_b` lie in the tree beside their `w`, with the axes that w contracts
and those that it keeps: q/w [L D N H], q/lora_a [L D r], q/lora_b [L r N H].  Here are
their sizes and their sum with w.  Not here: which matrices there are (`table.py`), the
forward pass (`layers.Linear`), PEFT's files (`peft.py`).
"""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pixel_jax import fields
from pixel_jax.fields import PositiveFloat, PositiveInt

LEAVES = ("/lora_a", "/lora_b")  # how the path of an adapter ends
TEXT = "^text/blocks/"  # q, k, v, o, gate, up and down of the text model


@dataclasses.dataclass(frozen=True)
class Config:
  """Adapters of a model.

  rank: the inner size of A B.
  alpha: A B counts alpha / rank times.
  targets: regular expressions, searched in the path of a linear layer without its "/w":
    "text/blocks/q", "vision/blocks/qkv".
  """

  rank: PositiveInt
  alpha: PositiveFloat
  targets: Sequence[str] = (TEXT,)  # a tuple once it is made

  def __post_init__(self):
    fields.check(Config, vars(self))
    if isinstance(self.targets, str) or not self.targets:
      raise ValueError(
        f"targets={self.targets!r}; give a tuple of regular expressions, ({TEXT!r},)."
      )
    object.__setattr__(self, "targets", tuple(self.targets))
    for pattern in self.targets:
      try:
        re.compile(pattern)
      except re.error as error:
        raise ValueError(
          f"target {pattern!r} is no regular expression: {error}."
        ) from error

  @property
  def scale(self) -> float:
    return self.alpha / self.rank


def is_adapter(path: str) -> bool:
  return path.endswith(LEAVES)


def merge(w: Any, a: Any, b: Any, *, scale: float, stacked: bool, dtype: Any) -> Any:
  """w + scale * A B, computed in f32, where `w` lies; inside jit where XLA puts it.

  Args:
    stacked: all three have the axis L, and one layer is computed after the other.
    dtype: of the result.
  """
  where = None if isinstance(w, jax.core.Tracer) else w.sharding
  return _merger(scale, stacked, jnp.dtype(dtype), where)(w, a, b)


@functools.lru_cache(maxsize=64)  # one program per matrix, not one trace per call
def _merger(scale, stacked, dtype, sharding):
  def layer(xs):
    w, a, b = (x.astype(jnp.float32) for x in xs)
    # The contracted axes of our w come before those it keeps.
    return (w + scale * jnp.tensordot(a, b, 1, precision="highest")).astype(dtype)

  def merged(*xs):
    return jax.lax.map(layer, xs) if stacked else layer(xs)

  return jax.jit(merged, out_shardings=sharding)
