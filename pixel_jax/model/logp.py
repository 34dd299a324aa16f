"""Log-probs and entropies of chosen tokens: the head, run only where it is wanted.

Not here: which token is predicted from where (`qwen2_5_vl.token_logp`).  Each row moves
its wanted positions to the front, so what nobody wants is a tail of whole chunks, and
the loop over chunks ends before it: forward and backward cost what the fullest row
needs.  Rows never mix, so they may be sharded.  The backward pass is written by hand:
it keeps two numbers a token, computes the logits of a chunk again, and adds up the
gradient of the head in f32.  Main value: logp, entropy f32[B T].
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

CHUNKS = 16  # at least, where rows are long enough: less cannot be skipped
FEW = 16  # tokens of a row that are not worth cutting up


def chosen(
  hidden: Float[Array, "B T D"],
  head: Float[Array, "..."],
  labels: Int[Array, "B T"],
  where: Bool[Array, "B T"],
  *,
  equation: str,
  temperature: float | int | Float[Array, ""],
  limit: int,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
  """Log-prob of each label and the entropy of its distribution; 0 outside `where`.

  Args:
    equation: of hidden and head, "BTD,DV->BTV" or "BTD,VD->BTV".
    limit: tokens of all rows whose logits may exist at one time.
  """
  B, T = labels.shape
  size = max(1, min(limit // B, max(FEW, -(-T // CHUNKS))))
  pad = -T % size
  count = where.sum(axis=1, keepdims=True)
  # Where each position goes: the wanted ones first, in order, then the others.
  rank = jnp.where(
    where, jnp.cumsum(where, 1) - 1, count + jnp.cumsum(~where, 1) - 1
  )  # fmt: skip
  order = jnp.argsort(rank, axis=1)  # the inverse: rank is a permutation
  packed = (
    jnp.pad(order, [(0, 0), (0, pad)]),
    jnp.pad(jnp.take_along_axis(labels, order, 1), [(0, 0), (0, pad)]),
  )
  used = (count.max() + size - 1) // size
  heat = jnp.asarray(temperature, jnp.float32)
  out = _score(hidden, head, heat, *packed, rank, used, (equation, size))
  return tuple(jnp.where(where, jnp.take_along_axis(x, rank, 1), 0) for x in out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _score(hidden, head, heat, order, labels, rank, used, static):
  """logp, entropy f32[B T + padding] of the positions in `order`, chunks < used."""
  return _forward(hidden, head, heat, order, labels, rank, used, static)[0]


def _forward(hidden, head, heat, order, labels, rank, used, static):
  equation, size = static

  def chunk(i, out):
    x, label = _take(hidden, order, labels, i, size)
    logits = _logits(equation, x, head, heat)
    top = logits.max(axis=-1, keepdims=True)
    shifted = logits - top
    weights = jnp.exp(shifted)
    total = weights.sum(axis=-1)
    # A masked sum, not a gather: it stays local where the vocabulary is sharded.
    said = jnp.where(_is_label(logits, label), shifted, 0).sum(axis=-1)
    mean = (weights * shifted).sum(axis=-1) / total
    log_total = jnp.log(total)
    new = said - log_total, log_total - mean, top[..., 0] + log_total
    return tuple(
      jax.lax.dynamic_update_slice_in_dim(x, y, i * size, axis=1)
      for x, y in zip(out, new)
    )

  zero = jnp.zeros(order.shape, jnp.float32)
  logp, entropy, norm = jax.lax.fori_loop(0, used, chunk, (zero, zero, zero))
  kept = hidden, head, heat, order, labels, rank, used, entropy, norm
  return (logp, entropy), kept


def _backward(static, kept, grads):
  equation, size = static
  hidden, head, heat, order, labels, rank, used, entropy, norm = kept
  inputs, out = equation.split("->")
  left, right = inputs.split(",")

  def chunk(i, sums):
    d_hidden, d_head = sums
    x, label = _take(hidden, order, labels, i, size)
    H, z, g, g_entropy = (
      jax.lax.dynamic_slice_in_dim(y, i * size, size, axis=1)[..., None]
      for y in (entropy, norm, *grads)
    )
    logits = _logits(equation, x, head, heat)
    logp = logits - z
    d = jnp.where(_is_label(logits, label), g, 0)
    d = d - jnp.exp(logp) * (g + g_entropy * (logp + H))
    d = (d / heat).astype(x.dtype)
    d_x = jnp.einsum(f"{out},{right}->{left}", d, head).astype(x.dtype)
    d_hidden = jax.lax.dynamic_update_slice_in_dim(d_hidden, d_x, i * size, axis=1)
    d_head += jnp.einsum(
      f"{left},{out}->{right}", x, d, preferred_element_type=jnp.float32
    )
    return d_hidden, d_head

  start = (
    jnp.zeros((*order.shape, hidden.shape[-1]), hidden.dtype),
    jnp.zeros(head.shape, jnp.float32),
  )
  d_hidden, d_head = jax.lax.fori_loop(0, used, chunk, start)
  # A gather by the inverse permutation, which a scatter would be without it.
  d_hidden = jnp.take_along_axis(d_hidden, rank[..., None], axis=1)
  return d_hidden, d_head.astype(head.dtype), None, None, None, None, None


_score.defvjp(_forward, _backward)


def _take(hidden, order, labels, i, size):
  """Chunk i of the packed positions: hidden states [B size D], labels [B size]."""
  at, label = (
    jax.lax.dynamic_slice_in_dim(x, i * size, size, axis=1) for x in (order, labels)
  )
  return jnp.take_along_axis(hidden, at[..., None], axis=1), label


def _logits(equation, x, head, heat):
  return jnp.einsum(equation, x, head, preferred_element_type=jnp.float32) / heat


def _is_label(logits, label):
  return jnp.arange(logits.shape[-1]) == label[..., None]
