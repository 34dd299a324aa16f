"""What a policy update minimises: the clipped loss, and how far two log-probs lie apart.

Pure functions of arrays; they run no model: log-probs come in as f32[B T].

The loss and its gradient are TRL's (`loss_type="dapo"`, epsilon .2, epsilon_high .28)
to 1e-5 when the normalizer is the number of trained tokens: tests/golden/trl_grpo.npz.
"""

from collections.abc import Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
from annotated_types import Len
from jaxtyping import Array, Float, Num

from pixel_jax import fields
from pixel_jax.fields import NonNegativeFloat

Clip = Annotated[Sequence[NonNegativeFloat], Len(2, 2)]  # below 1, above 1
DualClip = Annotated[float | int, fields.ZeroOrAbove(1)]  # it bounds a ratio


def bounded(log_ratio: Float[Array, "B T"]) -> Float[Array, "B T"]:
  """Log-ratios within 20, as verl bounds them: exp of more than 88 is infinite in f32,
  and its gradient a NaN even where the token is clipped."""
  return jnp.clip(log_ratio, -20.0, 20.0)


@fields.checked
def loss(
  logp: Float[Array, "B T"],
  logp_old: Float[Array, "B T"],
  advantage: Float[Array, "B T"],
  weight: Float[Array, "B T"],
  *,
  clip: Clip = (0.2, 0.28),
  normalizer: Num[Array, ""] | float | int | None = None,
  dual_clip: DualClip = 0.0,
  kl: NonNegativeFloat = 0.0,
  logp_reference: Float[Array, "B T"] | None = None,
  logp_sampler: Float[Array, "B T"] | None = None,
  sampler_cap: NonNegativeFloat = 0.0,
) -> tuple[Float[Array, ""], dict[str, Array]]:
  """The clipped policy loss, summed over tokens and divided by `normalizer`.

  Args:
    logp: of the policy being trained; the only argument with a gradient.
    logp_old: of the policy that sampled, by the trainer's own graph.
    weight: of each token as a target; 0 where nothing was sampled.
    clip: the ratio stays within [1 - clip[0], 1 + clip[1]].
    normalizer: tokens of the whole update; None = those given here.  With
      micro-batches pass the total, then losses, gradients and metrics add up.
    dual_clip: 0 = off; else tokens of a negative advantage lose at most dual_clip times
      that advantage, however large their ratio (Ye et al. 2020; 3 is usual).
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
  gap = bounded(jnp.where(mine, logp - jax.lax.stop_gradient(logp_old), 0.0))
  ratio = jnp.exp(gap)
  clipped = jnp.clip(ratio, 1.0 - low, 1.0 + high)
  per_token = -jnp.minimum(ratio * advantage, clipped * advantage)
  if dual_clip:
    most = -dual_clip * advantage
    per_token = jnp.where(advantage < 0, jnp.minimum(per_token, most), per_token)
  metrics = {}
  if sampler_cap:
    drift = bounded(jnp.where(mine, logp_old - logp_sampler, 0.0))
    trust = jax.lax.stop_gradient(jnp.minimum(jnp.exp(drift), sampler_cap))
    per_token = per_token * trust
    metrics["policy/sampler_weight"] = mean(trust)
  if kl:
    away = bounded(jnp.where(mine, logp_reference - logp, 0.0))
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
  gap = bounded(jnp.where(mine, logp - logp_sampler, 0.0))
  k3 = jnp.exp(gap) - 1.0 - gap  # of KL(sampler || trainer)
  return {
    "agreement/logp_diff_mean": (jnp.abs(gap) * weight).sum() / tokens,
    "agreement/logp_diff_max": jnp.abs(gap).max(),
    "agreement/kl": (k3 * weight).sum() / tokens,
  }
