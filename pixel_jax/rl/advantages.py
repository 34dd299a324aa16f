"""Group rewards -> advantages, as in GRPO: each rollout against the others of its question.

reward f32[Q G]  -->  advantage f32[Q G], which every token of the rollout gets
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


@jax.jit
def kept(mask: Bool[Array, "Q G"]) -> Bool[Array, "Q G"]:
  """Whether a rollout enters the loss: it is not masked, nor the last of its group."""
  return mask & (mask.sum(axis=1, keepdims=True) >= 2)


@functools.partial(jax.jit, static_argnames="std")
def group_relative(
  reward: Float[Array, "Q G"],
  mask: Bool[Array, "Q G"],
  *,
  std: bool,
  eps: float | Array = 1e-4,
) -> tuple[Float[Array, "Q G"], dict[str, Array]]:
  """Reward minus the mean of its group, over the group's deviation if `std`.

  Args:
    mask: True where the rollout counts.  False (too many turns, truncated) leaves mean,
      deviation and loss.
    std: divide by the sample deviation (n - 1) + eps, as TRL does.

  Returns:
    The advantages, 0 outside `kept` and exactly 0 in uniform groups; and counts of
    groups: uniform (all kept rewards equal) and dropped (fewer than 2 left).
  """
  keep = kept(mask)
  n = keep.sum(axis=1, keepdims=True)
  mean = jnp.where(keep, reward, 0.0).sum(axis=1, keepdims=True) / jnp.maximum(n, 1)
  centred = jnp.where(keep, reward - mean, 0.0)
  alive = n[:, 0] > 0
  high = jnp.where(keep, reward, -jnp.inf).max(axis=1)
  low = jnp.where(keep, reward, jnp.inf).min(axis=1)
  # From the rewards themselves: r - mean of equal floats need not be 0.
  uniform = alive & (high - low < 1e-6)
  advantage = centred
  if std:
    variance = (centred**2).sum(axis=1, keepdims=True) / jnp.maximum(n - 1, 1)
    advantage = centred / (jnp.sqrt(variance) + eps)
  advantage = jnp.where(uniform[:, None], 0.0, advantage)
  counts = {
    "groups/uniform": uniform.sum().astype(jnp.float32),
    "groups/dropped": (~alive).sum().astype(jnp.float32),
    "groups/uniform_share": uniform.mean(dtype=jnp.float32),
  }
  return advantage, counts
