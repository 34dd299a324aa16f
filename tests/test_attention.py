"""model/attention.py against loops over queries and keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import rest_slow

from pixel_jax import parallel
from pixel_jax.model import attention as lib
from pixel_jax.model import flash, kernels


def by_loops(q, k, v, sees):
  """Softmax attention, one query at a time; sees(b, t) -> indices of keys."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  out = np.zeros_like(q)
  group = q.shape[1] // k.shape[1]
  for b, n, t in np.ndindex(*q.shape[:3]):
    keys = sees(b, t)
    s = k[b, n // group, keys] @ q[b, n, t] / np.sqrt(q.shape[-1])
    w = np.exp(s - s.max())
    out[b, n, t] = (w / w.sum()) @ v[b, n // group, keys]
  return out


def random(seed, *shapes):
  rng = np.random.default_rng(seed)
  return [jnp.array(rng.normal(size=s), jnp.float32) for s in shapes]


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_packed_rows(seed, kv_heads, group, causal):
  B, T, H = 2, 13, 4
  q, k, v = random(
    seed, (B, kv_heads * group, T, H), (B, kv_heads, T, H), (B, kv_heads, T, H)
  )
  rng = np.random.default_rng(seed)
  segment = np.sort(rng.integers(0, 4, (B, T)), axis=1).astype(np.int32)

  def sees(b, t):
    same = np.flatnonzero(segment[b] == segment[b, t])
    return same[same <= t] if causal else same

  ids = jnp.array(segment)
  got = lib.attention(q, k, v, segment_q=ids, segment_k=ids, causal=causal)
  np.testing.assert_allclose(got, by_loops(q, k, v, sees), atol=1e-5)


def test_slots_order_queries_and_keys():
  """Queries appended to a cache: row b stands at slot 3 + 2 b."""
  B, T, S = 2, 3, 9
  q, k, v = random(0, (B, 4, T, 8), (B, 2, S, 8), (B, 2, S, 8))
  slot = jnp.array([[3, 4, 5], [5, 6, 7]], jnp.int32)
  got = lib.attention(q, k, v, slot_q=slot, causal=True)
  want = by_loops(q, k, v, lambda b, t: np.arange(int(slot[b, t]) + 1))
  np.testing.assert_allclose(got, want, atol=1e-5)


def packed(rng, B, T, most):
  """i32[B T]: sequences one after the other, then padding."""
  out = np.zeros((B, T), np.int32)
  for row in out:
    ids = np.repeat(np.arange(1, T + 1), rng.integers(1, most + 1, T))
    end = rng.integers(T // 2, T + 1)
    row[:end] = ids[:end]
  return jnp.array(out)


def value_and_grads(f, q, k, v, weight):
  """What f gives, and the gradients of its weighted sum of squares."""
  value = jax.jit(lambda *x: f(*x) * weight)
  grads = jax.jit(jax.grad(lambda *x: (value(*x) ** 2).sum(), (0, 1, 2)))
  return value(q, k, v), grads(q, k, v)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
  ("T", "most"), rest_slow([(300, 90), (1000, 400), (1700, 700), (900, 9)])
)
def test_blocks_equal_dense(T, most, causal):
  """Spans of few queries, blocks of many, ragged last ones: output and gradients."""
  B, N, K, H = 2, 2, 1, 8
  q, k, v = random(1, (B, N, T, H), (B, K, T, H), (B, K, T, H))
  segment = packed(np.random.default_rng(T), B, T, most)
  ids = jnp.broadcast_to(jnp.arange(T), (B, T)) if causal else None
  mask = flash.sees((segment, ids), (segment, ids))
  real = (segment > 0)[:, None, :, None]  # nobody reads what padding sees

  def blocks(q, k, v):
    return lib.attention(q, k, v, segment_q=segment, segment_k=segment, causal=causal)

  assert np.isfinite(blocks(q, k, v)).all()
  got = value_and_grads(blocks, q, k, v, real)
  want = value_and_grads(lambda *x: lib._attend(*x, mask), q, k, v, real)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, want)


def test_blocks_without_segments():
  q, k, v = random(1, (1, 2, 700, 8), (1, 1, 900, 8), (1, 1, 900, 8))
  got = lib.attention(q, k, v, causal=False)
  np.testing.assert_allclose(got, lib._attend(q, k, v, None), atol=1e-5)


def test_blocks_over_slots():
  """A long prompt appended to a cache; one row starts later, one sees nothing at all."""
  B, T, S = 3, 600, 1000
  q, k, v = random(2, (B, 2, T, 8), (B, 1, S, 8), (B, 1, S, 8))
  slot = jnp.arange(T) + jnp.array([[0], [350], [-T]])
  got = lib.attention(q, k, v, slot_q=slot, causal=True)
  keys = jnp.broadcast_to(jnp.arange(S), (B, S))
  want = lib._attend(q, k, v, flash.sees((None, slot), (None, keys)))
  assert np.isfinite(got).all()
  np.testing.assert_allclose(got[:2], want[:2], atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 40), st.booleans())
def test_no_block_is_left_out(seed, most, causal):
  """Whoever sees a key is in a chunk that goes over the key's block; few go further."""
  B, T, size = 2, 128, 16
  segment = packed(np.random.default_rng(seed), B, T, most)
  ids = segment, jnp.broadcast_to(jnp.arange(T), (B, T)) if causal else None
  low, high = flash.hull(flash.reach(size, size, ids, ids))
  real = (segment > 0)[:, :, None]
  seen = np.asarray(flash.sees(ids, ids) & real).any(axis=0)
  seen = seen.reshape(T // size, size, T // size, size).any(axis=(1, 3))
  block = np.arange(T // size)
  reached = (block >= low[:, None]) & (block < high[:, None])
  assert (reached >= seen).all()
  # Segments lie in order, so what lies between the first and the last is all it adds.
  first, last = seen.argmax(axis=1), T // size - seen[:, ::-1].argmax(axis=1)
  used = seen.any(axis=1)
  assert (np.asarray(low)[used] == first[used]).all()
  assert (np.asarray(high)[used] == last[used]).all()


@pytest.mark.parametrize("causal", rest_slow([False, True]))
@pytest.mark.parametrize("impl", ["xla", "splash"])
def test_what_nobody_sees_is_not_read(impl, causal, monkeypatch):
  """Masked values count with weight 0, but 0 x NaN is NaN: so nothing was computed."""
  interpreted = functools.partial(kernels.splash, interpret=True)
  monkeypatch.setattr(kernels, "splash", interpreted)
  T, other = 2560, slice(1024, 2048)  # whole blocks
  q, k, v = random(5, *[(1, 1, T, 16)] * 3)
  segment = jnp.zeros((1, T), jnp.int32).at[:, :1024].set(1).at[:, other].set(2)
  real = (segment == 1)[:, None, :, None]

  def loss(q, k, v):
    out = lib.attention(
      q, k, v, segment_q=segment, segment_k=segment, causal=causal, impl=impl
    )
    return jnp.where(real, out, 0).sum()

  got = jax.grad(loss, (0, 1, 2))(q, k, v.at[:, :, other].set(jnp.nan))
  want = jax.grad(loss, (0, 1, 2))(q, k, v)
  for a, b in zip(got, want):
    np.testing.assert_array_equal(a[:, :, :1024], b[:, :, :1024])


@pytest.mark.slow
def test_no_square_of_scores():
  """Scores of [T T] never exist whole, neither forward nor backward."""
  T = 4096
  x = jax.ShapeDtypeStruct((1, 1, T, 8), jnp.float32)

  def loss(q, k, v):
    return lib.attention(q, k, v, causal=True).sum()

  compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 4 * T * T


@settings(deadline=None, max_examples=5)
@given(st.integers(0, 10**6), st.integers(1, 90))
def test_window_attention_on_ragged_windows(seed, P):
  rng = np.random.default_rng(seed)
  size, B = 16, 2
  window = np.zeros((B, P), np.int32)
  for b in range(B):
    ids = np.repeat(np.arange(1, P + 1), rng.integers(1, size + 1, P))[:P]
    window[b] = np.where(np.arange(P) < rng.integers(P // 2, P + 1), ids, 0)
  # Padding is one run of zeros, longer than a window: it need only be finite.
  q, k, v = random(seed, *[(B, 2, P, 4)] * 3)
  got = lib.window_attention(q, k, v, window=jnp.array(window), size=size)
  want = by_loops(q, k, v, lambda b, t: np.flatnonzero(window[b] == window[b, t]))
  real = (window > 0)[:, None, :, None]
  assert np.isfinite(got).all()
  np.testing.assert_allclose(np.where(real, got, 0), np.where(real, want, 0), atol=1e-5)


# (impl, causal, shape of q, key-value heads); the first pads to blocks of 128, the second
# has many blocks and skips most.
HEAD = (1, 2, 130, 80)  # of the vision tower
KERNELS = [
  *rest_slow(
    [("splash", True, (2, 4, 200, 16), 2), ("splash", True, (2, 2, 1150, 16), 1)]
  ),
  *rest_slow([("splash", False, HEAD, 2), ("splash", False, (2, 1, 1150, 16), 1)]),
  *rest_slow([("cudnn", True, (2, 4, 200, 16), 2), ("cudnn", False, HEAD, 2)]),
]


@pytest.mark.parametrize(("impl", "causal", "shape", "kv_heads"), KERNELS)
def test_kernels_mean_the_same(impl, causal, shape, kv_heads, monkeypatch):
  """Values and gradients; splash interpreted, cuDNN's call by jax's own fallback."""
  elsewhere = {"splash": dict(interpret=True), "cudnn": dict(implementation="xla")}
  kernel = functools.partial(getattr(kernels, impl), **elsewhere[impl])
  monkeypatch.setattr(kernels, impl, kernel)
  B, _, T, H = shape
  q, k, v, g = random(3, shape, (B, kv_heads, T, H), (B, kv_heads, T, H), shape)
  segment = packed(np.random.default_rng(T), B, T, T // 3)
  real = (segment > 0)[:, None, :, None]  # nobody reads what padding sees

  def value_and_grad(impl):
    def loss(q, k, v):
      out = lib.attention(
        q, k, v, segment_q=segment, segment_k=segment, causal=causal, impl=impl
      )
      out *= real
      return (out * g).sum(), out

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

  got, want = value_and_grad(impl), value_and_grad("xla")
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, want)


def test_splash_is_cut_along_the_mesh(monkeypatch):
  """Rows and heads over eight devices give what one gives."""
  interpreted = functools.partial(kernels.splash, interpret=True)
  monkeypatch.setattr(kernels, "splash", interpreted)
  mesh = parallel.make_mesh(data=2, fsdp=2, tensor=2)
  q, k, v = random(4, (4, 4, 128, 8), (4, 2, 128, 8), (4, 2, 128, 8))

  @jax.jit
  def spread(q, k, v):
    with parallel.on(mesh):
      return lib.attention(q, k, v, causal=True, impl="splash")

  rows = jax.NamedSharding(mesh, parallel.ROWS)
  got = spread(*(jax.device_put(x, rows) for x in (q, k, v)))
  assert got.sharding.shard_shape(got.shape) == (1, 2, 128, 8)
  np.testing.assert_allclose(got, lib.attention(q, k, v, causal=True), atol=1e-5)


def test_kernels_order_by_index_only():
  (x,) = random(0, (1, 1, 2, 4))
  slot = jnp.zeros((1, 2), jnp.int32)
  with pytest.raises(ValueError, match="xla"):
    lib.attention(x, x, x, slot_q=slot, causal=True, impl="splash")


def test_unknown_impl_is_refused():
  (x,) = random(0, (1, 1, 2, 4))
  with pytest.raises(ValueError, match="xla"):
    lib.attention(x, x, x, causal=True, impl="flash")
