"""model/rope.py against formulas in float64, one frequency at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixel_jax.model import config, rope


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


@pytest.mark.torch
@pytest.mark.parametrize(
  "more", [{}, {"beta_fast": 16, "truncate": False}, {"attention_factor": 0.5}]
)
def test_yarn_is_that_of_transformers(more):
  """As Qwen advises for long inputs: factor 4 over 32,768 positions."""
  import torch
  from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as theirs
  from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import (
    Qwen2_5_VLTextConfig,
  )

  scaling = {
    "rope_type": "yarn", "mrope_section": [16, 24, 24], "factor": 4.0, "rope_theta": 1e6,
    "original_max_position_embeddings": 32768, **more,
  }  # fmt: skip
  described = Qwen2_5_VLTextConfig(
    hidden_size=256,
    num_attention_heads=2,
    num_key_value_heads=2,
    rope_parameters=scaling,
  )
  module = theirs.Qwen2_5_VLRotaryEmbedding(described)
  yarn = config._yarn(scaling)
  ours = rope.stretched(rope._frequencies(64, 1e6), 1e6, yarn)
  np.testing.assert_allclose(ours, module.inv_freq.numpy(), rtol=2e-7)
  position = np.random.default_rng(0).integers(0, 100_000, (2, 7, 3)).astype(np.int32)
  x = torch.zeros(2, 7, 256)
  cos, sin = module(x, torch.from_numpy(position.transpose(2, 0, 1)).long())
  got = rope.mrope(jnp.array(position), (16, 24, 24), 1e6, yarn)
  # theirs: [3 B T H], the axis of each frequency is taken later
  axis = np.repeat(np.arange(3), (16, 24, 24))
  for mine, other in zip(got, (cos, sin)):
    other = other.numpy()[..., :64]
    if other.ndim == 4:
      other = np.stack([other[a, ..., j] for j, a in enumerate(axis)], -1)
    # an angle of 1e5 is rounded to 4e-3 in f32; the frequencies differ by one bit
    np.testing.assert_allclose(mine, other, atol=2e-2)


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
