"""Attention by blocks, in plain XLA: what no query of a block may see is not computed.

Flash attention (Dao 2022): a running softmax over blocks of keys, so scores of [T S]
never exist, and a backward pass that computes them anew from the sum each query kept.
Of all blocks of keys, a block of queries goes over those from the first to the last that
its segments and slots can reach.  A packed row then costs little more than its sequences
one by one, where a mask pays for all pairs: of two rows of ten pictures, 7,104 patches,
a fifth of the blocks.  The bounds hold for all rows, so rows may lie on many devices.

Not here: when it is used (`attention.attention`), the kernels of TPUs and GPUs.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name as name
from jaxtyping import Array, Bool, Float, Int

NEVER = -1e30  # not -inf: a row that sees nothing stays finite
# Queries of a block, and keys where slots order them, else twice as many: on a CPU ten
# pictures take 59 ms with 256 keys and 49 with 512, packed text 17 and 26.
BLOCK = 256
BLOCKS = 32  # longer rows are cut into larger blocks
FAR = 2**30

Ids = tuple[Int[Array, "B _"] | None, Int[Array, "B _"] | None]  # segment, slot


def flash(
  q: Float[Array, "B N T H"],
  k: Float[Array, "B K S H"],
  v: Float[Array, "B K S H"],
  queries: Ids,
  keys: Ids,
) -> Float[Array, "B N T H"]:
  """Means `attention.attention`.

  Args:
    queries, keys: (segment, slot), None = all may see all, in any order.
  """
  B, N, T, H = q.shape
  K, S = k.shape[1:3]
  if all(x is None for x in queries):
    queries, keys = ((jnp.ones((B, n), jnp.int32), None) for n in (T, S))
  size_q = _size(T, BLOCK)
  size_k = _size(S, 2 * BLOCK if queries[1] is None else BLOCK)
  q = pad(q.reshape(B, K, N // K, T, H), 3, size_q)
  k, v = pad(k, 2, size_k), pad(v, 2, size_k)
  # Keys that are added belong to nobody and come after all.
  queries = jax.tree.map(lambda x: pad(x, 1, size_q), queries)
  keys = tuple(
    None if x is None else pad(x, 1, size_k, fill) for x, fill in zip(keys, (-1, FAR))
  )
  out = _flash(size_q, size_k, q, k, v, queries, keys)
  return out[..., :T, :].reshape(B, N, T, H)


def _size(length: int, most: int) -> int:
  """Of as few blocks as can be, all as long, a multiple of 16."""
  count = min(-(-length // most), BLOCKS)
  return -(-length // (16 * count)) * 16


def pad(x: jax.Array, axis: int, size: int, fill: int = 0) -> jax.Array:
  """`x` with whole blocks of `size` along the axis."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, -x.shape[axis] % size)
  return jnp.pad(x, widths, constant_values=fill)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _flash(size_q, size_k, q, k, v, queries, keys):
  return _forward(size_q, size_k, q, k, v, queries, keys)[0]


def _forward(size_q, size_k, q, k, v, queries, keys):
  B, K, G, _, H = q.shape
  lows, highs = hull(reach(size_q, size_k, queries, keys))

  def chunk(_, xs):
    q, queries, low, high = xs
    q = q * H**-0.5

    def block(j, seen):
      kj, vj, keys_j = _at(j, size_k, k, v, keys)
      mask = sees(queries, keys_j)[:, None, None]
      scores = jnp.where(mask, _product("BKGTH,BKSH->BKGTS", q, kj), NEVER)
      return gather(seen, scores, vj, "BKGTS,BKSH->BKGTH")

    # What a query gathers before it sees a key is wiped out by the first it sees.
    one = jnp.zeros((B, K, G, size_q, 1), jnp.float32)
    none = one + NEVER, one, jnp.zeros((B, K, G, size_q, H), jnp.float32)
    top, total, out = jax.lax.fori_loop(low, high, block, none)
    return None, ((out / total).astype(v.dtype), top + jnp.log(total))

  xs = _split(q, 3, size_q), _cut(queries, size_q), lows, highs
  _, (out, logsum) = jax.lax.scan(chunk, None, xs)
  # What remat="qkvo" keeps.
  out, logsum = name(_join(out, 3), "heads"), name(_join(logsum, 3), "heads")
  return out, (q, k, v, queries, keys, out, logsum)


def _backward(size_q, size_k, kept, d_out):
  q, k, v, queries, keys, out, logsum = kept
  H = q.shape[-1]
  lows, highs = hull(reach(size_q, size_k, queries, keys))
  own = (d_out.astype(jnp.float32) * out).sum(axis=-1, keepdims=True)
  logsum, own = (x[..., 0][:, :, None] for x in (logsum, own))  # B K 1 G T

  def chunk(carry, xs):
    q, d_out, logsum, own, queries, low, high = xs
    q = q * H**-0.5

    def block(j, carry):
      d_q, d_k, d_v = carry
      kj, vj, keys_j = _at(j, size_k, k, v, keys)
      mask = jnp.swapaxes(sees(queries, keys_j), 1, 2)[:, None, :, None]
      # Keys by queries: so d_k and d_v need no transposed copy of them, nor does d_q, whose
      # queries come last: the keys, a few of each, are transposed instead.
      scores = _product("BKSH,BKGTH->BKSGT", kj, q)
      weights = jnp.where(mask, jnp.exp(scores - logsum), 0)
      d_weights = _product("BKSH,BKGTH->BKSGT", vj, d_out)
      d_scores = weights * (d_weights - own)
      d_q += _product("BKSH,BKSGT->BKHGT", kj, d_scores)
      d_k = _add(d_k, j * size_k, _product("BKSGT,BKGTH->BKSH", d_scores, q))
      d_v = _add(d_v, j * size_k, _product("BKSGT,BKGTH->BKSH", weights, d_out))
      return d_q, d_k, d_v

    d_q = jnp.zeros((*q.shape[:2], H, *q.shape[2:4]), jnp.float32)
    d_q, *carry = jax.lax.fori_loop(low, high, block, (d_q, *carry))
    return tuple(carry), (jnp.moveaxis(d_q, 2, -1) * H**-0.5).astype(q.dtype)

  xs = _split(q, 3, size_q), _split(d_out, 3, size_q)
  xs += _split(logsum, 4, size_q), _split(own, 4, size_q)
  zeros = jnp.zeros(k.shape, jnp.float32)
  (d_k, d_v), d_q = jax.lax.scan(
    chunk, (zeros, zeros), (*xs, _cut(queries, size_q), lows, highs)
  )
  return _join(d_q, 3), d_k.astype(k.dtype), d_v.astype(v.dtype), None, None


_flash.defvjp(_forward, _backward)


def gather(seen, scores, v, equation: str):
  """Goes on with a running softmax, (maximum, sum, weighted values), over more keys."""
  top, total, out = seen
  now = jnp.maximum(top, scores.max(axis=-1, keepdims=True))
  weights, shrink = jnp.exp(scores - now), jnp.exp(top - now)
  total = total * shrink + weights.sum(axis=-1, keepdims=True)
  return now, total, out * shrink + _product(equation, weights, v)


def sees(queries: Ids, keys: Ids) -> Bool[Array, "B T S"] | None:
  """Same segment, and the key's slot not after the query's; None = always."""
  (segment_q, slot_q), (segment_k, slot_k) = queries, keys
  mask = None
  if segment_q is not None:
    mask = segment_q[:, :, None] == segment_k[:, None]
  if slot_q is not None:
    before = slot_q[:, :, None] >= slot_k[:, None]
    mask = before if mask is None else mask & before
  return mask


# ---- Blocks --------------------------------------------------------------------------


def reach(
  size_q: int, size_k: int, queries: Ids, keys: Ids
) -> Bool[Array, "chunks blocks"]:
  """May any query of a chunk see any key of a block, in any row?  Rather yes than no."""
  segment_q, slot_q = _cut(queries, size_q)  # chunks B size
  segment_k, slot_k = _cut(keys, size_k)  # blocks B size
  out = True  # chunks blocks B
  if segment_q is not None:
    (first_q, last_q), (first_k, last_k) = (_range(x) for x in (segment_q, segment_k))
    out = (last_k >= first_q[:, None]) & (first_k <= last_q[:, None])
  if slot_q is not None:
    out &= slot_k.min(axis=2) <= slot_q.max(axis=2)[:, None]
  return out.any(axis=2)


def hull(
  reach: Bool[Array, "chunks blocks"],
) -> tuple[Int[Array, " chunks"], Int[Array, " chunks"]]:
  """From which to before which block each chunk goes: at least one, to stay finite."""
  low = reach.argmax(axis=1)
  high = reach.shape[1] - reach[:, ::-1].argmax(axis=1)
  return low, jnp.where(reach.any(axis=1), high, low + 1)


def _range(segment):
  """Smallest and largest; padding is left out, nobody reads what it sees."""
  real = segment > 0
  return jnp.where(real, segment, FAR).min(axis=2), segment.max(axis=2)


def _at(j, size, k, v, keys):
  """Block j of keys, of values, and of (segment, slot)."""

  def cut(x, axis):
    return jax.lax.dynamic_slice_in_dim(x, j * size, size, axis)

  return cut(k, 2), cut(v, 2), jax.tree.map(lambda x: cut(x, 1), keys)


def _product(equation, a, b):
  """einsum in the width of the values, summed in f32."""
  return jnp.einsum(equation, a.astype(b.dtype), b, preferred_element_type=jnp.float32)


def _add(total, start, x):
  """total[:, :, start : start + size] += x, in place within a loop."""
  old = jax.lax.dynamic_slice_in_dim(total, start, x.shape[2], 2)
  return jax.lax.dynamic_update_slice_in_dim(total, old + x, start, 2)


def _split(x, axis, size):
  """.. T .. -> chunks .. size .."""
  x = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
  return jnp.moveaxis(x, axis, 0)


def _cut(ids, size):
  return jax.tree.map(lambda x: _split(x, 1, size), ids)


def _join(x, axis):
  x = jnp.moveaxis(x, 0, axis)
  return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
