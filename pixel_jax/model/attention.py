"""Attention: one function of one meaning, and two forms of it that read less.

`window_attention` is for the windows of the tower, `cached_attention` for a decoding
step.

A query sees the keys of its segment and, where `causal`, those whose slot is not after
its own.  Never by M-RoPE position: the tokens of an image share theirs.  Heads-first,
q[B N T H], k and v [B K S H] (the layout of the cache).  The N query heads are K groups
of G; k and v are never repeated in memory.  Softmax in f32.

Padding is segment 0: its queries give finite values nobody reads.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name as name
from jaxtyping import Array, Float, Int

from pixel_jax.batch import Prompts
from pixel_jax.model import kernels
from pixel_jax.model.flash import NEVER, flash, gather, sees

IMPLS = ("xla", "splash", "cudnn")
SPAN = 64  # queries that share a prefix of keys, at least
DENSE = 512  # queries whose scores are made at once, at most
BLOCK = 128  # keys of a cache that are read at a time, at least


def attention(
  q: Float[Array, "B N T H"],
  k: Float[Array, "B K S H"],
  v: Float[Array, "B K S H"],
  *,
  segment_q: Int[Array, "B T"] | None = None,
  segment_k: Int[Array, "B S"] | None = None,
  slot_q: Int[Array, "B T"] | None = None,
  slot_k: Int[Array, "B S"] | None = None,
  causal: bool,
  impl: str = "xla",
) -> Float[Array, "B N T H"]:
  """Grouped-query attention.

  Args:
    segment_q, segment_k: who may see whom; both None = one segment.
    slot_q, slot_k: order of queries and keys; None = their index.
    impl: "xla", the reference that runs everywhere; "splash" on TPUs, "cudnn" on GPUs
      (kernels.py), where slots are indices.

  More than `DENSE` queries go block by block (flash.py).  Fewer, where slots are
  indices, go in at most four spans, and a span reads only the keys up to its last query.
  """
  if impl not in IMPLS:
    raise ValueError(f"attention impl is {impl!r}; implemented: {', '.join(IMPLS)}.")
  B, _, T, _ = q.shape
  S = k.shape[2]
  if impl != "xla" and not (slot_q is None and slot_k is None):
    raise ValueError(f"{impl} orders tokens by index; use 'xla' where slots are given.")
  if impl == "splash":
    return kernels.splash(q, k, v, segment_q, segment_k, causal)
  if impl == "cudnn" and (segment_q is None or T * S <= kernels.LARGEST_MASK):
    return kernels.cudnn(q, k, v, segment_q, segment_k, causal)
  prefix = causal and slot_q is None and slot_k is None and T == S

  def slots(x, length):
    x = jnp.arange(length) if x is None else x
    return jnp.broadcast_to(x, (B, length)) if causal else None

  queries, keys = (segment_q, slots(slot_q, T)), (segment_k, slots(slot_k, S))
  if T > DENSE:
    return flash(q, k, v, queries, keys)
  mask = sees(queries, keys)
  if not prefix:
    return _attend(q, k, v, mask)
  size = max(SPAN, -(-T // 4))
  out = []
  for start in range(0, T, size):
    span = slice(start, start + size)
    seen = slice(min(start + size, T))
    heads = _attend(q[:, :, span], k[:, :, seen], v[:, :, seen], mask[:, span, seen])
    out.append(heads)
  return jnp.concatenate(out, axis=2)


@jax.named_scope("window_attention")  # by which a compiled program can be searched
def window_attention(
  q: Float[Array, "B N P H"],
  k: Float[Array, "B N P H"],
  v: Float[Array, "B N P H"],
  *,
  window: Int[Array, "B P"],
  size: int,
) -> Float[Array, "B N P H"]:
  """Each patch sees its window, exactly, at the cost of three blocks of keys.

  Patches lie in window order, so a window of at most `size` patches spans at most two
  adjacent blocks of `size`: block i looks at blocks i-1, i and i+1 under a mask of
  equal window ids.  No gather, no padding per image, several images a row.
  """
  B, N, P, H = q.shape
  if 3 * size >= P:  # the band would be the whole row
    return attention(q, k, v, segment_q=window, segment_k=window, causal=False)
  blocks = -(-P // size)
  pad = blocks * size - P

  def block(x, fill=0):  # B N P .. -> B N blocks size ..
    x = jnp.pad(x, [(0, 0), (0, 0), (0, pad), (0, 0)], constant_values=fill)
    return x.reshape(*x.shape[:2], blocks, size, x.shape[-1])

  def band(x, fill=0):  # the block before, itself, the block after
    edge = jnp.full_like(x[:, :, :1], fill)
    before = jnp.concatenate([edge, x[:, :, :-1]], axis=2)
    after = jnp.concatenate([x[:, :, 1:], edge], axis=2)
    return jnp.concatenate([before, x, after], axis=3)

  ids = block(window[:, None, :, None], fill=-1)  # B 1 blocks size 1
  mask = ids == jnp.swapaxes(band(ids, fill=-2), 3, 4)
  scores = jnp.einsum(
    "BNXQH,BNXSH->BNXQS", block(q), band(block(k)), preferred_element_type=jnp.float32
  )
  scores = jnp.where(mask, scores * H**-0.5, NEVER)
  out = _weigh(scores, band(block(v)), "BNXQS,BNXSH->BNXQH")
  return out.reshape(B, N, -1, H)[:, :, :P]


def cached_attention(
  q: Float[Array, "R N 1 H"],
  k_cache: Float[Array, "L B K S H"],
  v_cache: Float[Array, "L B K S H"],
  layer: Int[Array, ""] | int,
  last: Int[Array, " R"],
  prompts: Prompts | None = None,
) -> Float[Array, "R N 1 H"]:
  """One query a row, against the slots 0 .. last of the first R rows of a cache.

  The keys are read block by block, as far as the longest row reaches, with a running
  softmax.  So one program serves all lengths, a row's bits do not depend on how long the
  others are, and no layer of the cache is copied: on a CPU, 16 rows of 12 layers take
  9.8 ms at 768 slots where a slice of the layer takes 19.5.

  Args:
    prompts: what the rows go on from; each is read once for all of its rows, and the
      same softmax runs on over a row's own slots.
  """
  R, N, _, H = q.shape
  K = k_cache.shape[2]
  G = N // K
  q = (q * H**-0.5).reshape(R, K, G, H)
  seen = _nothing(R, K, G, H)
  if prompts is not None:
    P, M = prompts.lane.shape
    theirs = jnp.take(q, prompts.lane, axis=0, mode="fill", fill_value=0)  # P M K G H
    theirs = jnp.swapaxes(theirs, 1, 2).reshape(P, K, M * G, H)
    found = _read(
      theirs, prompts.k, prompts.v, layer, prompts.length - 1, _nothing(P, K, M * G, H)
    )

    def give(mine, x):  # P K MG .. -> R K G ..
      x = jnp.swapaxes(x.reshape(P, K, M, G, -1), 1, 2)
      return mine.at[prompts.lane].set(x, mode="drop")

    seen = jax.tree.map(give, seen, found)
  _, total, out = _read(q, k_cache, v_cache, layer, last, seen)
  return (out / total).astype(v_cache.dtype).reshape(R, N, 1, H)


def _nothing(R: int, K: int, Q: int, H: int):
  """The running softmax of R x K x Q queries that have seen no key."""
  one = jnp.zeros((R, K, Q, 1), jnp.float32)
  return one + NEVER, one, jnp.zeros((R, K, Q, H), jnp.float32)


def _read(q, k_cache, v_cache, layer, last, seen):
  """Goes on with `seen`, (maximum, sum, weighted values), over the slots 0 .. last.

  Args:
    q: f[R K Q H], scaled, of the first R rows of the cache.
  """
  R, K, _, H = q.shape
  S = k_cache.shape[3]
  size = min(S, max(BLOCK, -(-S // 8)))  # at most eight blocks

  def block(j, seen):
    start = jnp.minimum(j * size, S - size)  # the last block may overlap the one before
    at, shape = (layer, 0, 0, start, 0), (1, R, K, size, H)
    k, v = (jax.lax.dynamic_slice(c, at, shape)[0] for c in (k_cache, v_cache))
    slot = start + jnp.arange(size)
    mask = (slot >= j * size) & (slot <= last[:, None])  # R size
    scores = jnp.einsum("RKQH,RKSH->RKQS", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores, NEVER)
    return gather(seen, scores, v, "RKQS,RKSH->RKQH")

  # What a query with no key to see gathers meanwhile is wiped out by the first it sees.
  return jax.lax.fori_loop(0, last.max() // size + 1, block, seen)


def _attend(q, k, v, mask):
  """Dense attention; mask bool[B T S] or None."""
  B, N, T, H = q.shape
  K = k.shape[1]
  q = (q * H**-0.5).reshape(B, K, N // K, T, H)
  scores = jnp.einsum("BKGTH,BKSH->BKGTS", q, k, preferred_element_type=jnp.float32)
  if mask is not None:
    scores = jnp.where(mask[:, None, None], scores, NEVER)
  return _weigh(scores, v, "BKGTS,BKSH->BKGTH").reshape(B, N, T, H)


def _weigh(scores, v, equation):
  """einsum(equation, softmax(scores), v), divided after the product.

  The scores are by far the largest array; so normalised, forward and backward go over
  them less often than through jax.nn.softmax (1.1 times faster on a CPU).
  """
  top = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
  weights = jnp.exp(scores - top)
  total = weights.sum(axis=-1, keepdims=True)
  # Named before the division, whose backward pass reads it.
  out = name(jnp.einsum(equation, weights.astype(v.dtype), v), "heads")
  return (out / total).astype(v.dtype)
