"""The text model: Qwen2.5 decoder blocks over embedded tokens; with or without a cache.

`__call__` runs packed rows (training), `extend` appends to a cache (rollout).  Both use
the same block; they differ in where its keys and values come from.  Not here: images
(they arrive as embeddings), log-probs, sampling.  Main value: x f[B T D].
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name as name
from jaxtyping import Array, Float, Int

from pixel_jax import parallel
from pixel_jax.batch import Cache, Prompts
from pixel_jax.model import layers, rope
from pixel_jax.model.attention import attention, cached_attention
from pixel_jax.model.config import ModelConfig, TextConfig
from pixel_jax.model.layers import Linear, RMSNorm

NOWHERE = 2**30  # a slot after all others


class Embed(nnx.Module):
  def __init__(self, vocab: int, width: int, rngs: nnx.Rngs):
    self.w = nnx.Param(jax.random.normal(rngs.params(), (vocab, width)) * 0.02)


class Block(nnx.Module):
  """L blocks, stacked: norm, grouped-query attention, norm, SwiGLU."""

  def __init__(self, config: TextConfig, rngs: nnx.Rngs):
    c = config
    D, N, K, H, F = c.width, c.heads, c.kv_heads, c.head_dim, c.mlp
    kwargs = dict(layers=c.depth, rngs=rngs)
    self.attn_norm = RMSNorm(D, c.norm_eps, layers=c.depth)
    self.q = Linear("BTD,DNH->BNTH", (D, N, H), bias=True, **kwargs)
    self.k = Linear("BTD,DKH->BKTH", (D, K, H), bias=True, **kwargs)
    self.v = Linear("BTD,DKH->BKTH", (D, K, H), bias=True, **kwargs)
    self.o = Linear("BNTH,NHD->BTD", (N, H, D), **kwargs)
    self.mlp_norm = RMSNorm(D, c.norm_eps, layers=c.depth)
    self.gate = Linear("BTD,DF->BTF", (D, F), **kwargs)
    self.up = Linear("BTD,DF->BTF", (D, F), **kwargs)
    self.down = Linear("BTF,FD->BTD", (F, D), **kwargs)

  def qkv(self, x: Float[Array, "B T D"], table):
    """q [B N T H], k and v [B K T H], rotary applied."""
    x = self.attn_norm(x)
    q, k = rope.rotate(self.q(x), table), rope.rotate(self.k(x), table)
    return name(q, "q"), name(k, "k"), name(self.v(x), "v")

  def close(
    self, x: Float[Array, "B T D"], heads: Float[Array, "B N T H"]
  ) -> Float[Array, "B T D"]:
    """What follows the attention."""
    x = x + self.o(heads)
    return x + layers.gated_mlp(self, self.mlp_norm(x))


class Text(nnx.Module):
  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    c = config.text
    self.config = config
    self.embed = Embed(c.vocab, c.width, rngs)
    self.blocks = Block(c, rngs)
    self.norm = RMSNorm(c.width, c.norm_eps)
    self.head = None if c.tied else Linear("BTD,DV->BTV", (c.width, c.vocab), rngs=rngs)

  def table(self, position: Int[Array, "B T 3"]) -> rope.Table:
    t = self.config.text
    return rope.mrope(position, t.mrope_section, t.rope_theta, t.yarn)

  def __call__(
    self,
    x: Float[Array, "B T D"],
    position: Int[Array, "B T 3"],
    segment: Int[Array, "B T"],
  ) -> Float[Array, "B T D"]:
    """Packed rows; slots are indices.  The result is normed, ready for the head."""
    table = self.table(position)

    def body(block, x, i):
      q, k, v = block.qkv(parallel.by_rows(x), table)
      heads = attention(
        q, k, v, segment_q=segment, segment_k=segment, causal=True,
        impl=self.config.attention,
      )  # fmt: skip
      return block.close(x, heads)

    c = self.config
    x = layers.run(self.blocks, body, x, scan=c.scan_layers, remat=c.remat)
    return self.norm(parallel.by_rows(x))

  def extend(
    self,
    x: Float[Array, "R T D"],
    position: Int[Array, "R T 3"],
    count: Int[Array, " R"],
    cache: Cache,
    rows: Int[Array, " R"] | None,
    prompts: Prompts | None,
    view: int,
  ) -> tuple[Float[Array, "R T D"], Cache]:
    """Appends `count` tokens to each row; the rest of the T are padding.

    Slots count from the end of a row's prompt, where it has one.

    The cache rides in the carry and is written before it is read, so XLA updates it in
    place; as scan input and output it would exist twice (limits.md 6.2).
    """
    R, T = x.shape[:2]
    S = cache.k.shape[3]
    table = self.table(position)
    at = jnp.arange(R) if rows is None else rows
    length = cache.length[at]
    slot = length[:, None] + jnp.arange(T)
    # A padded token goes to slot S, which does not exist: the scatter drops it.
    target = jnp.where(jnp.arange(T) < count[:, None], slot, S)
    if prompts is not None:
      row = prompts.row[at]
      before = prompts.length[row]  # R

    def body(block, carry, i):
      x, k_cache, v_cache = carry
      q, k, v = block.qkv(x, table)
      k_cache = _write(k_cache, k, i, at, target)
      v_cache = _write(v_cache, v, i, at, target)
      if T == 1 and rows is None:  # a decoding step; a row that rests looks nowhere
        heads = cached_attention(q, k_cache, v_cache, i, slot[:, 0] * count, prompts)
      elif prompts is None:
        k, v = (c[i, at, :, :view] for c in (k_cache, v_cache))
        heads = attention(q, k, v, slot_q=slot, causal=True)
      else:
        first = jnp.arange(min(view, prompts.k.shape[3]))
        first = jnp.where(first < before[:, None], first, NOWHERE)
        own = before[:, None] + jnp.arange(min(view, S))
        k, v = (
          jnp.concatenate([p[i, row, :, :view], c[i, at, :, :view]], axis=2)
          for p, c in ((prompts.k, k_cache), (prompts.v, v_cache))
        )
        heads = attention(
          q, k, v, slot_q=before[:, None] + slot,
          slot_k=jnp.concatenate([first, own], axis=1), causal=True,
        )  # fmt: skip
      return block.close(x, heads), k_cache, v_cache

    x, k, v = layers.run(
      self.blocks, body, (x, cache.k, cache.v), scan=self.config.scan_layers,
      remat="none",
    )  # fmt: skip
    return self.norm(x), Cache(k=k, v=v, length=cache.length.at[at].add(count))

  def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """f32 logits of normed hidden states."""
    w, equation = self.output()
    return jnp.einsum(equation, x, w, preferred_element_type=jnp.float32)

  def output(self) -> tuple[Float[Array, "..."], str]:
    """The weight that gives logits and its equation; a tied model's is its embedding."""
    if self.head is None:
      return self.embed.w[...], "BTD,VD->BTV"
    return self.head.w[...], self.head.equation


def _write(
  cache: Float[Array, "L B K S H"],
  new: Float[Array, "R K T H"],
  layer,
  rows: Int[Array, " R"],
  slot: Int[Array, "R T"],
) -> Float[Array, "L B K S H"]:
  """cache[layer, rows[r], :, slot[r, t]] = new[r, :, t], in place under jit.

  Heads have an index of their own: scattered together, a TPU would lay out the whole
  cache anew so that they are adjacent, twice a call.
  """
  at = layer, rows[:, None, None], jnp.arange(new.shape[1])[:, None], slot[:, None]
  return cache.at[at].set(new.astype(cache.dtype), mode="drop")
