"""The shaped reward: correctness, curiosity about operations, a price for too many.

  r' = r + alpha * max(H - RaPR(x), 0) * 1[y uses an operation]
         + beta * min(N - n_ops(y), 0)

(Pixel Reasoner, equation 3; alpha .5, beta .05, H .3, N 1.)  RaPR(x), the rate of
pixel-space reasoning, is the share over ALL rollouts of the query, masked or not, that
use an operation.  What it is not: it judges no answers (`answers.py`) and drops no
rollouts (`advantages.py`).  Shapes are [Q G]: queries, rollouts of each.

Deviations: `variant="released"` follows the published code where it differs from the
paper (pixel_reasoner.md 3.4), but reads each rollout's own error flag; the
published code reads those of the first group on the rank.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pixel_jax import fields
from pixel_jax.fields import NonNegativeFloat


@fields.checked
@functools.partial(jax.jit, static_argnames=("variant", "count"))
def shaped(
  correct: Float[Array, "Q G"],
  ops_succeeded: Int[Array, "Q G"],
  ops_attempted: Int[Array, "Q G"],
  error_unrepaired: Bool[Array, "Q G"] | None = None,
  is_video: Bool[Array, " Q"] | None = None,
  unparsed: Bool[Array, "Q G"] | None = None,
  *,
  alpha: NonNegativeFloat | Array = 0.5,
  beta: NonNegativeFloat | Array = 0.05,
  H: NonNegativeFloat | Array = 0.3,
  N: NonNegativeFloat | Array = 1,
  variant: Literal["paper", "released"] = "paper",
  count: Literal["success", "attempts"] = "success",
) -> dict[str, Array]:
  """Reward parts and their sum.

  Args:
    correct: 1 or 0 for the answer.
    ops_attempted: every operation, failed ones included; this is n_ops of the penalty.
    error_unrepaired: the answer came right after an operation that failed (released).
    unparsed: the answer could not be read and counts -1 (released; omit it for 0).
    count: what "uses an operation" means: "success" at least one that succeeded,
      "attempts" at least one call (as released).

  Returns:
    correct, curiosity, penalty, total [Q G] and rapr [Q].
  """
  uses = (ops_succeeded if count == "success" else ops_attempted) > 0
  rapr = uses.mean(axis=1, dtype=jnp.float32)
  bonus = alpha * jnp.maximum(H - rapr, 0.0)
  if variant == "released":
    # EM:2414-2468: .25 max(.3 - RaPR, 0) / (2 RaPR), for videos 1.5 in place of 2.
    share = jnp.where(rapr > 0, rapr, 1.0)  # nobody to reward where it is 0
    factor = 1.0 if is_video is None else jnp.where(is_video, 4.0 / 3.0, 1.0)
    bonus = bonus * factor * 0.25 / share
    if error_unrepaired is not None:
      correct = jnp.where(error_unrepaired & (correct > 0), 0.0, correct)
    if unparsed is not None:
      correct = jnp.where(unparsed, -1.0, correct)
  curiosity = bonus[:, None] * uses
  penalty = beta * jnp.minimum(N - ops_attempted, 0).astype(jnp.float32)
  return {
    "correct": correct,
    "curiosity": curiosity,
    "penalty": penalty,
    "total": correct + curiosity + penalty,
    "rapr": rapr,
  }
