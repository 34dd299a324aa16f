"""model/rope.py against formulas in float64, one frequency at a time."""

import jax
import jax.numpy as jnp
import numpy as np

from pixel_jax.model import rope


def test_mrope_turns_each_section_by_its_axis():
  section, theta = (4, 6, 6), 1e6
  position = np.random.default_rng(0).integers(0, 5000, (2, 7, 3)).astype(np.int32)
  cos, sin = rope.mrope(jnp.array(position), section, theta)
  axis = [0] * 4 + [1] * 6 + [2] * 6
  angle = np.stack(
    [
      position[..., a].astype(np.float64) * theta ** (-j / 16)
      for j, a in enumerate(axis)
    ],
    axis=-1,
  )
  # The angle itself is rounded to f32: at 5000 that is 2e-4.
  np.testing.assert_allclose(cos, np.cos(angle), atol=5e-4)
  np.testing.assert_allclose(sin, np.sin(angle), atol=5e-4)


def test_axial_is_rows_then_columns():
  theta, head = 10_000.0, 80
  position = np.random.default_rng(0).integers(0, 60, (1, 9, 2)).astype(np.int32)
  cos, sin = rope.axial(jnp.array(position), head, theta)
  assert cos.shape == (1, 9, 40)
  for j in range(20):
    for a, column in ((0, j), (1, 20 + j)):
      angle = position[..., a] * theta ** (-2 * j / 40)
      np.testing.assert_allclose(cos[..., column], np.cos(angle), atol=1e-5)
      np.testing.assert_allclose(sin[..., column], np.sin(angle), atol=1e-5)


def test_rotate_is_a_complex_product():
  key = jax.random.key(0)
  x = jax.random.normal(key, (2, 3, 5, 8))
  angle = jax.random.uniform(key, (2, 5, 4)) * 6
  y = rope.rotate(x, (jnp.cos(angle), jnp.sin(angle)))
  turned = (np.array(x[..., :4]) + 1j * np.array(x[..., 4:])) * np.exp(
    1j * np.array(angle)[:, None]
  )
  np.testing.assert_allclose(y[..., :4], turned.real, atol=1e-5)
  np.testing.assert_allclose(y[..., 4:], turned.imag, atol=1e-5)


def test_bf16_keeps_f32_angles():
  """At position 1001 a bf16 angle would be 1000 or 1008."""
  position = jnp.full((1, 1, 3), 1001, jnp.int32)
  table = rope.mrope(position, (1, 1, 2), 2.0)
  assert table[0].dtype == jnp.float32
  x = jnp.ones((1, 1, 1, 8), jnp.bfloat16)
  y = rope.rotate(x, table)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(y[0, 0, 0, 0], np.cos(1001) - np.sin(1001), atol=0.01)
