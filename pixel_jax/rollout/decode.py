"""Rollout on the device: prefill and sampling as pure functions of arrays.

A slot is a row of the cache, which holds what follows the slot's prompt; the prompt of
a group lies once in a cache of prompts.  Between calls they hold all ids of a sequence
but the last: that one is fed first when the sequence goes on, so new turns and sampled
tokens continue alike and no hidden state outlives a call.  The host says where a turn
begins (`place`, `Turns.length`); `cache.length` is never trusted between calls.

The log-prob of a sampled token is that of softmax(logits / temperature) BEFORE top-k
and top-p cut it: the number that `qwen2_5_vl.token_logp` gives at that temperature.
Greedy decoding and forced tokens report the same number.  Under a ban it is that of the
distribution under the ban; such rollouts are for evaluation only.

Not here: what an end of turn means, conversations, pictures (features arrive encoded).
"""

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from pixel_jax.batch import Cache, Prompts
from pixel_jax.model import qwen2_5_vl
from pixel_jax.model.config import ModelConfig

BLOCK = 128  # tokens of the vocabulary that are drawn from at a time


@flax.struct.dataclass
class Sampling:
  """How each row draws its tokens."""

  temperature: jax.Array  # f32[B]    0 = takes the likeliest
  top_p: jax.Array  # f32[B]    keeps the likeliest that reach this mass; 1 = all
  top_k: jax.Array  # i32[B]    keeps the k likeliest; 0 = all
  is_banned: jax.Array  # bool[B]   never draws what `decode` bans


class Wish(NamedTuple):
  """How one sequence is sampled; the fields are those of `Sampling`."""

  temperature: float = 1.0
  top_p: float = 1.0
  top_k: int = 0
  is_banned: bool = False  # from beginning a call, where the session knows bans

  def check(self) -> "Wish":
    if not (self.temperature >= 0 and 0 < self.top_p <= 1 and self.top_k >= 0):
      raise ValueError(
        f"{self}: temperature >= 0 (0 takes the likeliest token), 0 < top_p <= 1, "
        "top_k >= 0."
      )
    return self

  def rows(self, B: int) -> Sampling:
    """The same for B rows, in numpy."""
    return Sampling(
      np.full(B, self.temperature, np.float32),
      np.full(B, self.top_p, np.float32),
      np.full(B, self.top_k, np.int32),
      np.full(B, self.is_banned, bool),
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

  slot: jax.Array  # i32[R]      row of the cache, slot or prompt; >= B = padding
  length: jax.Array  # i32[R]      tokens that lie there already
  count: jax.Array  # i32[R]      valid tokens
  tokens: jax.Array  # i32[R T]
  position: jax.Array  # i32[R T 3]
  feature: jax.Array  # i32[R T]    row of the bank; -1 = text


@flax.struct.dataclass
class Slots:
  """Where all B slots stand between two chunks."""

  length: jax.Array  # i32[B]    tokens in the cache, after the prompt
  last: jax.Array  # i32[B]    the id after them, not in the cache yet
  position: jax.Array  # i32[B]    its position (text: the three are equal)
  budget: jax.Array  # i32[B]    tokens the turn may still have; 0 = idle
  key: jax.Array  # u32[B 2]  of the sequence
  sampling: Sampling


def encode(
  config: ModelConfig, params: Any, bank: jax.Array, pictures: Pictures, at: jax.Array
) -> jax.Array:
  """Writes the features of pictures, row after row, into bank[at:]."""
  features = qwen2_5_vl.encode_vision(config, params, pictures)  # B M D
  features = features.reshape(-1, bank.shape[-1]).astype(bank.dtype)
  return jax.lax.dynamic_update_slice(bank, features, (at, 0))


def extend(
  config: ModelConfig,
  params: Any,
  cache: Cache,
  turns: Turns,
  bank: jax.Array,
  prompts: Prompts | None = None,
  *,
  view: int,
) -> Cache:
  """Appends new tokens to their slots: a prompt, or what an operation returned.

  Args:
    cache, prompts: of prompts themselves, None; of slots, which go on from `prompts`.
    bank: f[C D] features of pictures; `turns.feature` points into it.
    view: slots of the cache that attention looks at; all of `turns` fits in it.
  """
  cache = cache.replace(
    length=cache.length.at[turns.slot].set(turns.length, mode="drop")
  )
  # One gather per token, so that a slot may show pictures from anywhere in the bank.
  features = bank[jnp.maximum(turns.feature, 0)]  # R T D
  own = jnp.where(turns.feature < 0, -1, jnp.arange(turns.tokens.shape[1]))
  return qwen2_5_vl.extend(
    config, params, cache, turns.tokens, turns.position, turns.count, own, features,
    turns.slot, prompts=prompts, view=view,
  )[1]  # fmt: skip


def move(
  cache: Cache,
  source: jax.Array,
  target: jax.Array,
  length: jax.Array,
  count: jax.Array,
  *,
  size: int,
) -> Cache:
  """Copies the first length[i] tokens of slot source[i] to target[i], for i < count.

  One piece of `size` tokens at a time and in place: a gather would need a second cache.
  """
  L, _, K, S, H = cache.k.shape

  def piece(i, j, x):
    start = jnp.minimum(j * size, S - size)
    part = jax.lax.dynamic_slice(x, (0, source[i], 0, start, 0), (L, 1, K, size, H))
    return jax.lax.dynamic_update_slice(x, part, (0, target[i], 0, start, 0))

  def copy(i, kv):
    def next_piece(j, kv):
      return jax.tree.map(lambda x: piece(i, j, x), kv)

    return jax.lax.fori_loop(0, -(-length[i] // size), next_piece, kv)

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
  likeliest = sampling.temperature == 0
  scores = logits / jnp.where(likeliest, 1, sampling.temperature)[:, None]
  top = scores.max(axis=-1, keepdims=True)
  weights = jnp.exp(scores - top)  # B V, the one pass over all of them
  total = weights.sum(axis=-1)
  # What no row asks for costs nothing: a sort of the vocabulary, noise, a maximum.
  cut = (sampling.top_p < 1) | (sampling.top_k > 0)
  weights = jax.lax.cond(
    (cut & ~likeliest).any(),
    lambda: _truncate(weights, scores, sampling),
    lambda: weights,
  )
  best = jax.lax.cond(
    likeliest.any(),
    lambda: scores.argmax(axis=-1).astype(jnp.int32),
    lambda: jnp.zeros(len(scores), jnp.int32),
  )
  token = jax.lax.cond(likeliest.all(), lambda: best, lambda: _draw(weights, key))
  token = jnp.where(likeliest, best, token)
  if forced is not None:
    token = jnp.where(forced < 0, token, forced)
  score = jnp.take_along_axis(scores, token[:, None], axis=-1)
  return token, (score - top)[:, 0] - jnp.log(total)


def _draw(weights: jax.Array, key: jax.Array) -> jax.Array:
  """i32[B], index j of a row of f32[B V] with probability weights[j] / their sum.

  First a block of 128, then one of its members, each by its own uniform number on the
  cumulated sums.  Two numbers a row; Gumbel noise wants V of them, which cost a CPU as
  much as the head (8192 words).  Two, because one of 23 bits cannot tell the rarest of
  150,000 apart.
  """
  uniform = jax.vmap(
    lambda k: jax.random.uniform(jax.random.wrap_key_data(k, impl="threefry2x32"), (2,))
  )(key)
  B, V = weights.shape
  blocks = jnp.pad(weights, [(0, 0), (0, -V % BLOCK)]).reshape(B, -1, BLOCK)

  def pick(weights, uniform):
    sums = jnp.cumsum(weights, axis=-1)
    beyond = sums > uniform[:, None] * sums[:, -1:]
    # Rounding may step over an impossible one, or leave nothing beyond the mark.
    chosen = beyond & (weights > 0)
    return jnp.where(chosen.any(axis=-1), chosen.argmax(-1), weights.argmax(-1))

  block = pick(blocks.sum(axis=-1), uniform[:, 0])
  members = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
  return (block * BLOCK + pick(members, uniform[:, 1])).astype(jnp.int32)


def _truncate(weights: jax.Array, scores: jax.Array, sampling: Sampling) -> jax.Array:
  """The weights f32[B V], 0 but for the top_k likeliest that reach top_p; ties stay."""
  top_p, top_k = sampling.top_p[:, None], sampling.top_k[:, None]
  ordered = jnp.sort(scores, axis=-1, descending=True)
  kept = (jnp.arange(scores.shape[-1]) < top_k) | (top_k == 0)
  ordered = jnp.where(kept, ordered, -jnp.inf)
  # As vLLM and HF: top_p of what top_k left, and the token that reaches it is kept.
  p = jax.nn.softmax(ordered, axis=-1)
  kept = (jnp.cumsum(p, axis=-1) - p < top_p) | (top_p == 1)
  least = jnp.where(kept & (p > 0), ordered, jnp.inf).min(axis=-1, keepdims=True)
  return jnp.where(scores >= least, weights, 0)


def place(slots: Slots, source: jax.Array, new: jax.Array, given: Slots) -> Slots:
  """What the host changes between two chunks.

  Args:
    source: i32[B], the slot that each goes on from: its own, or one that moved here.
    new: bool[B], slots that begin a turn; their standing is that of `given`.
  """

  def choose(old, fresh):
    return jnp.where(new.reshape(-1, *[1] * (old.ndim - 1)), fresh, old[source])

  return jax.tree.map(choose, slots, given)


def decode(
  config: ModelConfig,
  params: Any,
  cache: Cache,
  prompts: Prompts,
  slots: Slots,
  forced: jax.Array,
  banned: jax.Array | None,
  *,
  stops: tuple[int, ...],
  lanes: int,
) -> tuple[Cache, Slots, jax.Array, jax.Array, jax.Array]:
  """Samples a chunk of tokens in every slot that has a budget; no host in between.

  A slot stops after an id of `stops` or when its budget is spent; the loop ends when
  all have stopped.  Afterwards `slots` say where each stands, so a chunk may follow
  before the host has looked at this one.

  Args:
    forced: i32[B chunk], tokens to be said, step by step; -1 = free.
    banned: bool[V], ids that rows with `is_banned` never draw; None = any row may.
    lanes: B' <= B: only the first so many slots decode; the others rest.

  Returns:
    (cache, slots, tokens i32[B' chunk], log-probs f32[B' chunk], count i32[B'])
  """
  B, chunk = lanes, forced.shape[1]
  key = slots.key[:B]
  sampling = jax.tree.map(lambda x: x[:B], slots.sampling)
  before = prompts.length[prompts.row[:B]]  # B

  def is_on(state):
    step, _, (_, _, _, budget), *_ = state
    return (step < chunk) & (budget > 0).any()

  def step_(state):
    step, cache, (length, last, position, budget), tokens, logp, count = state
    on = budget > 0
    cache = cache.replace(length=cache.length.at[:B].set(length))
    hidden, cache = qwen2_5_vl.extend(
      config, params, cache, last[:, None],
      jnp.broadcast_to(position[:, None, None], (B, 1, 3)),
      on.astype(jnp.int32), jnp.full((B, 1), -1), prompts=prompts,
    )  # fmt: skip
    logits = qwen2_5_vl.logits(config, params, hidden[:, 0])
    if banned is not None:
      logits = jnp.where(sampling.is_banned[:, None] & banned, -jnp.inf, logits)
    # The token's index in its sequence, whichever slot and chunk it falls into.
    keys = jax.vmap(_fold_in)(key, before + length + 1)
    token, lp = sample(logits, keys, sampling, forced[:B, step])
    tokens = tokens.at[:, step].set(jnp.where(on, token, 0))
    logp = logp.at[:, step].set(jnp.where(on, lp, 0))
    ended = jnp.isin(token, jnp.array(stops))
    standing = (
      length + on,
      jnp.where(on, token, last),
      position + on,
      jnp.where(on & ~ended, budget - 1, 0),
    )
    return step + 1, cache, standing, tokens, logp, count + on

  fields = ("length", "last", "position", "budget")
  state = (
    0,
    cache,
    tuple(getattr(slots, name)[:B] for name in fields),
    jnp.zeros((B, chunk), jnp.int32),
    jnp.zeros((B, chunk), jnp.float32),
    jnp.zeros(B, jnp.int32),
  )
  _, cache, standing, *out = jax.lax.while_loop(is_on, step_, state)
  moved = {
    name: getattr(slots, name).at[:B].set(x) for name, x in zip(fields, standing)
  }
  return cache, slots.replace(**moved), *out


def _fold_in(key: jax.Array, index: jax.Array) -> jax.Array:
  key = jax.random.wrap_key_data(key, impl="threefry2x32")
  return jax.random.key_data(jax.random.fold_in(key, index))
