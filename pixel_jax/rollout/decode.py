"""Rollout on the device: prefill, fork and sampling as pure functions of arrays.

A slot is a row of the cache.  Between calls the cache holds all ids of a sequence but
the last: that one is fed first when the sequence goes on, so new turns and sampled
tokens continue alike and no hidden state outlives a call.  The host says how long every
slot is (`Slots.length`, `Turns.length`); `cache.length` is never trusted between calls.

The log-prob of a sampled token is that of softmax(logits / temperature) BEFORE top-k
and top-p cut it: the number that `qwen2_5_vl.token_logp` gives at that temperature.
Greedy decoding and forced tokens report the same number.  Under a ban it is that of the
distribution under the ban; such rollouts are for evaluation only.

Not here: what an end of turn means, conversations, pictures (features arrive encoded).
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from pixel_jax.batch import Cache
from pixel_jax.model import qwen2_5_vl
from pixel_jax.model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How a token is drawn; static, so each distinct value compiles once."""

  temperature: float = 1.0
  top_p: float = 1.0  # keep the likeliest tokens that reach this mass; 1 = all
  top_k: int = 0  # keep the k likeliest; 0 = all
  greedy: bool = False

  def __post_init__(self):
    if not (self.temperature > 0 and 0 < self.top_p <= 1 and self.top_k >= 0):
      raise ValueError(
        f"{self}: temperature > 0, 0 < top_p <= 1, top_k >= 0; for temperature 0 use "
        "greedy=True."
      )


@flax.struct.dataclass
class Pictures:
  """One picture a row, patches in window order; what `encode_vision` reads."""

  patches: jax.Array  # u8[B P 1176]
  patch_pos: jax.Array  # i32[B P 2]
  patch_image: jax.Array  # i32[B P]    1-based, 0 = padding
  patch_window: jax.Array  # i32[B P]    1-based, 0 = padding


@flax.struct.dataclass
class Turns:
  """New tokens of R slots; T of them at most, the rest is padding."""

  slot: jax.Array  # i32[R]      row of the cache; >= B = padding
  length: jax.Array  # i32[R]      tokens that lie there already
  count: jax.Array  # i32[R]      valid tokens
  tokens: jax.Array  # i32[R T]
  position: jax.Array  # i32[R T 3]
  feature: jax.Array  # i32[R T]    row of the bank; -1 = text


@flax.struct.dataclass
class Slots:
  """Where all B slots stand when a chunk begins."""

  length: jax.Array  # i32[B]    tokens in the cache
  last: jax.Array  # i32[B]    the id after them, not in the cache yet
  position: jax.Array  # i32[B]    its position (text: the three are equal)
  budget: jax.Array  # i32[B]    tokens the turn may still have; 0 = idle
  key: jax.Array  # u32[B 2]  of the sequence
  forced: jax.Array  # i32[B chunk]  tokens to be said, step by step; -1 = free


def encode(
  config: ModelConfig, params: Any, bank: jax.Array, pictures: Pictures, at: jax.Array
) -> jax.Array:
  """Writes the features of pictures, row after row, into bank[at:]."""
  features = qwen2_5_vl.encode_vision(config, params, pictures)  # B M D
  features = features.reshape(-1, bank.shape[-1]).astype(bank.dtype)
  return jax.lax.dynamic_update_slice(bank, features, (at, 0))


def extend(
  config: ModelConfig, params: Any, cache: Cache, turns: Turns, bank: jax.Array
) -> Cache:
  """Appends new tokens to their slots: a prompt, or what an operation returned.

  Args:
    bank: f[C D] features of pictures; `turns.feature` points into it.
  """
  cache = cache.replace(
    length=cache.length.at[turns.slot].set(turns.length, mode="drop")
  )
  # One gather per token, so that a slot may show pictures from anywhere in the bank.
  features = bank[jnp.maximum(turns.feature, 0)]  # R T D
  own = jnp.where(turns.feature < 0, -1, jnp.arange(turns.tokens.shape[1]))
  return qwen2_5_vl.extend(
    config, params, cache, turns.tokens, turns.position, turns.count, own, features,
    turns.slot,
  )[1]  # fmt: skip


def fork(
  cache: Cache, source: jax.Array, target: jax.Array, count: jax.Array, *, size: int
) -> Cache:
  """Copies the first `size` tokens of slot source[i] to target[i], for i < count.

  One slot at a time and in place: a gather would need a second cache.
  """

  def copy(i, kv):
    def move(x):
      L, _, K, _, H = x.shape
      part = jax.lax.dynamic_slice(x, (0, source[i], 0, 0, 0), (L, 1, K, size, H))
      return jax.lax.dynamic_update_slice(x, part, (0, target[i], 0, 0, 0))

    return jax.tree.map(move, kv)

  k, v = jax.lax.fori_loop(0, count, copy, (cache.k, cache.v))
  return cache.replace(k=k, v=v)


def sample(
  logits: jax.Array,
  key: jax.Array,
  sampling: Sampling,
  forced: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Draws one token per row of f32[B V]: (token i32[B], log-prob f32[B]).

  Args:
    key: u32[B 2], one per row and token, so that no row depends on another.
    forced: i32[B], taken instead of a drawn token; -1 = free.
  """
  full = jax.nn.log_softmax(logits / sampling.temperature)
  if sampling.greedy:
    token = full.argmax(axis=-1)
  else:
    scores = _truncate(full, sampling)
    noise = jax.vmap(
      lambda k: jax.random.gumbel(
        jax.random.wrap_key_data(k, impl="threefry2x32"), scores.shape[-1:]
      )
    )(key)
    token = (scores + noise).argmax(axis=-1)
  token = token.astype(jnp.int32)
  if forced is not None:
    token = jnp.where(forced < 0, token, forced)
  return token, jnp.take_along_axis(full, token[:, None], axis=-1)[:, 0]


def _truncate(scores: jax.Array, sampling: Sampling) -> jax.Array:
  """-inf below the top_k likeliest and below the least mass of top_p; ties stay."""
  if sampling.top_k == 0 and sampling.top_p == 1.0:
    return scores
  ordered = jnp.sort(scores, axis=-1, descending=True)
  if 0 < sampling.top_k < scores.shape[-1]:
    kept = jnp.arange(scores.shape[-1]) < sampling.top_k
    ordered = jnp.where(kept, ordered, -jnp.inf)
  # As vLLM and HF: top_p of what top_k left, and the token that reaches it is kept.
  p = jax.nn.softmax(ordered, axis=-1)
  kept = jnp.cumsum(p, axis=-1) - p < sampling.top_p
  least = jnp.where(kept & (p > 0), ordered, jnp.inf).min(axis=-1, keepdims=True)
  return jnp.where(scores >= least, scores, -jnp.inf)


def decode(
  config: ModelConfig,
  params: Any,
  cache: Cache,
  slots: Slots,
  banned: jax.Array,
  *,
  sampling: Sampling,
  chunk: int,
  stops: tuple[int, ...],
  view: int,
) -> tuple[Cache, jax.Array, jax.Array, jax.Array]:
  """Samples at most `chunk` tokens in every slot that has a budget; no host in between.

  A slot stops after an id of `stops` or when its budget is spent; the loop ends when
  all have stopped.

  Args:
    banned: bool[V], ids that are never drawn.
    view: slots of the cache that attention looks at; all lengths stay within it.

  Returns:
    (cache, tokens i32[B chunk], log-probs f32[B chunk], count i32[B])
  """
  B = slots.last.shape[0]
  rows = jnp.arange(B)

  def is_on(state):
    step, _, _, on, *_ = state
    return (step < chunk) & on.any()

  def step_(state):
    step, cache, last, on, tokens, logp, count = state
    hidden, cache = qwen2_5_vl.extend(
      config, params, cache, last[:, None],
      jnp.broadcast_to((slots.position + step)[:, None, None], (B, 1, 3)),
      on.astype(jnp.int32), jnp.full((B, 1), -1), view=view,
    )  # fmt: skip
    logits = qwen2_5_vl.logits(config, params, hidden[:, 0])
    logits = jnp.where(banned, -jnp.inf, logits)
    # The token's index in its sequence, whichever slot and chunk it falls into.
    key = jax.vmap(_fold_in)(slots.key, slots.length + step + 1)
    token, lp = sample(logits, key, sampling, slots.forced[:, step])
    tokens = tokens.at[:, step].set(jnp.where(on, token, 0))
    logp = logp.at[:, step].set(jnp.where(on, lp, 0))
    count = count + on
    ended = jnp.isin(token, jnp.array(stops)) | (count >= slots.budget)
    return step + 1, cache, token, on & ~ended, tokens, logp, count

  state = (
    0,
    cache.replace(length=slots.length),
    slots.last,
    slots.budget > 0,
    jnp.zeros((B, chunk), jnp.int32),
    jnp.zeros((B, chunk), jnp.float32),
    jnp.zeros_like(rows),
  )
  _, cache, _, _, tokens, logp, count = jax.lax.while_loop(is_on, step_, state)
  return cache, tokens, logp, count


def _fold_in(key: jax.Array, index: jax.Array) -> jax.Array:
  key = jax.random.wrap_key_data(key, impl="threefry2x32")
  return jax.random.key_data(jax.random.fold_in(key, index))
