"""The head runs where it is wanted: same numbers, no more chunks, no array of B T V."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixel_jax.model import logp

B, T, D, V = 3, 70, 8, 31


def given(seed=0, tied=False, dtype=jnp.float32):
  rng = np.random.default_rng(seed)
  hidden = jnp.asarray(rng.normal(size=(B, T, D)), dtype)
  head = jnp.asarray(rng.normal(size=(V, D) if tied else (D, V)), dtype)
  labels = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
  return hidden, head, labels, "BTD,VD->BTV" if tied else "BTD,DV->BTV"


def slow(hidden, head, labels, where, equation, temperature):
  logits = jnp.einsum(equation, hidden, head) / temperature
  full = jax.nn.log_softmax(logits)
  said = jnp.take_along_axis(full, labels[..., None], 2)[..., 0]
  entropy = -(jnp.exp(full) * full).sum(-1)
  return jnp.where(where, said, 0), jnp.where(where, entropy, 0)


WHERE = {
  "all": lambda rng: np.ones((B, T), bool),
  "none": lambda rng: np.zeros((B, T), bool),
  "some": lambda rng: rng.random((B, T)) < 0.4,
  "one row": lambda rng: np.arange(B)[:, None] == (rng.random((B, T)) < 2),
  "the end": lambda rng: np.arange(T) >= np.array([[T - 1], [T], [T - 33]]),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("limit", [1, 40, 10_000])
@pytest.mark.parametrize("kind", WHERE)
def test_values_and_gradients_are_those_of_log_softmax(kind, limit, tied):
  hidden, head, labels, equation = given(tied=tied)
  rng = np.random.default_rng(1)
  where = jnp.asarray(WHERE[kind](rng))
  a, b = (jnp.asarray(rng.normal(size=(B, T)), jnp.float32) for _ in range(2))

  def total(function):
    def f(hidden, head):
      said, entropy = function(hidden, head)
      return (a * said + b * entropy).sum(), (said, entropy)

    return jax.jit(jax.grad(f, argnums=(0, 1), has_aux=True))(hidden, head)

  def ours(hidden, head):
    return logp.chosen(
      hidden, head, labels, where, equation=equation, temperature=1.3, limit=limit
    )

  got = total(ours)
  want = total(lambda x, w: slow(x, w, labels, where, equation, 1.3))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), got, want)


def test_chunks_that_nobody_wants_are_not_computed():
  """Poison where no live chunk reads: were it read, the head's gradient would be NaN."""
  hidden, head, labels, equation = given()
  where = jnp.broadcast_to((jnp.arange(T) % 2 == 0) & (jnp.arange(T) < 60), (B, T))

  def gradient(poison):
    def f(head):
      x = jnp.where(jnp.arange(T)[:, None] >= poison, jnp.nan, hidden)
      return logp.chosen(
        x, head, labels, where, equation=equation, temperature=1.0, limit=15 * B
      )[0].sum()

    return jax.grad(f)(head)

  # 30 wanted positions are two chunks of 15; the others follow in their order.
  assert np.isfinite(gradient(59)).all()
  assert np.isnan(gradient(58)).any()  # the last wanted one


def test_no_array_of_all_logits_is_compiled():
  B, T, D, V, limit = 2, 512, 16, 3000, 64
  shapes = (B, T, D), (D, V), (B, T), (B, T)
  dtypes = jnp.float32, jnp.float32, jnp.int32, bool

  def loss(hidden, head, labels, where):
    said, entropy = logp.chosen(
      hidden, head, labels, where, equation="BTD,DV->BTV", temperature=1.0, limit=limit
    )
    return said.sum() + entropy.sum()

  args = [jax.ShapeDtypeStruct(*x) for x in zip(shapes, dtypes)]
  text = jax.jit(jax.grad(loss, (0, 1))).lower(*args).compile().as_text()
  sizes = [
    math.prod(map(int, dims.split(",")))
    for dims in re.findall(r"(?:f32|bf16|pred|s32)\[([\d,]+)\]", text)
  ]
  assert max(sizes) == limit * V  # one chunk; B T V is 16 of them


@pytest.mark.slow
def test_the_gradient_of_a_bf16_head_is_summed_in_f32():
  """Each chunk adds 2^-9 of what is there: in bf16 nothing would arrive."""
  hidden, head, labels, equation = given(dtype=jnp.bfloat16)
  where = jnp.ones((B, T), bool)

  def f(head, limit):
    return logp.chosen(
      hidden, head, labels, where, equation=equation, temperature=1.0, limit=limit
    )[0].sum()

  exact = jax.grad(
    lambda w: slow(hidden.astype(jnp.float32), w, labels, where, equation, 1.0)[0].sum()
  )(head.astype(jnp.float32))
  got = jax.grad(f)(head, 1)  # 70 chunks
  assert got.dtype == jnp.bfloat16
  np.testing.assert_allclose(got.astype(np.float32), exact, rtol=0.01, atol=0.15)
