"""Group-relative policy optimisation: group rewards -> advantages -> clipped loss.

Pure functions of arrays.  What it is not: it runs no model; log-probs come in.

  reward f32[Q G]  --advantages-->  f32[Q G]  --spread over tokens-->  loss f32[B T]

The loss and its gradient are TRL's (`loss_type="dapo"`, epsilon .2, epsilon_high .28)
to 1e-5 when the normalizer is the number of trained tokens: tests/golden/trl_grpo.npz.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num


@jax.jit
def kept(mask: Bool[Array, "Q G"]) -> Bool[Array, "Q G"]:
  """Rollouts that may enter the loss: not masked, and not the only one left."""
  return mask & (mask.sum(axis=1, keepdims=True) >= 2)


@functools.partial(jax.jit, static_argnames="std")
def advantages(
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


def loss(
  logp: Float[Array, "B T"],
  logp_old: Float[Array, "B T"],
  advantage: Float[Array, "B T"],
  weight: Float[Array, "B T"],
  *,
  clip: tuple[float, float] = (0.2, 0.28),
  normalizer: Num[Array, ""] | float | int | None = None,
  kl: float | int = 0.0,
  logp_reference: Float[Array, "B T"] | None = None,
  logp_sampler: Float[Array, "B T"] | None = None,
  sampler_cap: float | int = 0.0,
) -> tuple[Float[Array, ""], dict[str, Array]]:
  """The clipped policy loss, summed over tokens and divided by `normalizer`.

  Args:
    logp: of the policy being trained; the only argument with a gradient.
    logp_old: of the policy that sampled, by the trainer's own graph.
    weight: of each token as a target; 0 where nothing was sampled.
    clip: the ratio stays within [1 - clip[0], 1 + clip[1]].
    normalizer: tokens of the whole update; None = those given here.  With
      micro-batches pass the total, then losses, gradients and metrics add up.
    kl: weight of the k3 estimate of KL(policy || reference); needs `logp_reference`.
    sampler_cap: 0 = off; else each token is weighted by min(exp(logp_old -
      logp_sampler), sampler_cap): truncated importance sampling.

  Returns:
    The loss, and metrics that are sums over tokens / normalizer, or end in _max.
  """
  if kl and logp_reference is None:
    raise ValueError("loss.kl is on, but logp_reference is missing; pass the reference")
  if sampler_cap and logp_sampler is None:
    raise ValueError("loss.sampler_cap is on, but logp_sampler is missing; pass it")
  low, high = clip
  mine = weight > 0
  tokens = jnp.maximum(weight.sum() if normalizer is None else normalizer, 1e-9)

  def mean(x):
    return jnp.where(mine, x * weight, 0.0).sum() / tokens

  # Padding is cut off before exp: its log-probs mean nothing and may overflow.
  gap = jnp.where(mine, logp - jax.lax.stop_gradient(logp_old), 0.0)
  ratio = jnp.exp(gap)
  clipped = jnp.clip(ratio, 1.0 - low, 1.0 + high)
  per_token = -jnp.minimum(ratio * advantage, clipped * advantage)
  metrics = {}
  if sampler_cap:
    drift = jnp.where(mine, logp_old - logp_sampler, 0.0)
    trust = jax.lax.stop_gradient(jnp.minimum(jnp.exp(drift), sampler_cap))
    per_token = per_token * trust
    metrics["policy/sampler_weight"] = mean(trust)
  if kl:
    away = jnp.where(mine, logp_reference - logp, 0.0)
    divergence = jnp.exp(away) - away - 1.0
    per_token = per_token + kl * divergence
    metrics["policy/kl_reference"] = mean(divergence)
  bound = ((ratio < 1.0 - low) & (advantage < 0)) | (
    (ratio > 1.0 + high) & (advantage > 0)
  )
  metrics |= {
    "policy/clip_fraction": mean(bound.astype(jnp.float32)),
    "policy/ratio": mean(ratio),
    "policy/ratio_max": jnp.where(mine, ratio, 0.0).max(),
    "policy/approx_kl": mean(ratio - 1.0 - gap),  # k3 of KL(old || new)
  }
  return mean(per_token), jax.tree.map(jax.lax.stop_gradient, metrics)


def agreement(
  logp: Float[Array, "B T"],
  logp_sampler: Float[Array, "B T"],
  weight: Float[Array, "B T"],
  *,
  normalizer: Num[Array, ""] | float | int | None = None,
) -> dict[str, Array]:
  """How far the trainer's log-probs lie from the sampler's, on the sampled tokens."""
  mine = weight > 0
  tokens = jnp.maximum(weight.sum() if normalizer is None else normalizer, 1e-9)
  gap = jnp.where(mine, logp - logp_sampler, 0.0)
  k3 = jnp.exp(gap) - 1.0 - gap  # of KL(sampler || trainer)
  return {
    "agreement/logp_diff_mean": (jnp.abs(gap) * weight).sum() / tokens,
    "agreement/logp_diff_max": jnp.abs(gap).max(),
    "agreement/kl": (k3 * weight).sum() / tokens,
  }
