"""Rotary embedding: positions -> cos and sin (always f32), and their application.

Both towers rotate halves, (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), so the tables
have H/2 columns and serve both halves.  They differ in which position turns which
frequency: the text model gives sections of its H/2 frequencies to time, height and
width (M-RoPE); the vision tower repeats H/4 frequencies for row and column.  Positions
themselves are made on the host (`pixels/geometry.py`).
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pixel_jax.model.config import Yarn

Table = tuple[Float[Array, "B T half"], Float[Array, "B T half"]]


def mrope(
  position: Int[Array, "B T 3"],
  section: tuple[int, ...],
  theta: float,
  yarn: Yarn | None = None,
) -> Table:
  """cos, sin [B T H/2] of the text model; `section` deals out the frequencies."""
  half = sum(section)
  axis = np.repeat(np.arange(3), section)
  frequencies, scale = _frequencies(half, theta), np.float32(1)
  if yarn is not None:
    frequencies = stretched(frequencies, theta, yarn)
    scale = np.float32(yarn.attention)
  angle = position.astype(jnp.float32)[..., axis] * frequencies
  return jnp.cos(angle) * scale, jnp.sin(angle) * scale


def stretched(frequencies: np.ndarray, theta: float, yarn: Yarn) -> np.ndarray:
  """YaRN: slow frequencies are divided by the factor, fast ones stay, between them a
  ramp; as transformers' `_compute_yarn_parameters`."""
  count = len(frequencies)

  def where(turns: float) -> float:
    """The place of the frequency that turns so often over the original positions."""
    return count * math.log(yarn.original / (turns * 2 * math.pi)) / math.log(theta)

  low, high = where(yarn.fast), where(yarn.slow)
  if yarn.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, 2 * count - 1)
  if low == high:
    high += 0.001
  ramp = (np.arange(count, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
  stays = np.float32(1) - np.clip(ramp, 0, 1)
  slow = np.float32(1) / (np.float32(yarn.factor) * (np.float32(1) / frequencies))
  return (slow * (1 - stays) + frequencies * stays).astype(np.float32)


def axial(position: Int[Array, "B T 2"], head_dim: int, theta: float) -> Table:
  """cos, sin [B P H/2] of the vision tower: by row, then by column."""
  frequencies = _frequencies(head_dim // 4, theta)
  angle = position.astype(jnp.float32)[..., None] * frequencies  # B P 2 H/4
  angle = angle.reshape(*angle.shape[:2], -1)
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Float[Array, "B N T H"], table: Table) -> Float[Array, "B N T H"]:
  """Turns queries or keys, in f32 (bf16 angles are wrong beyond position 256)."""
  cos, sin = (t[:, None] for t in table)
  x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  y = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
  return y.astype(x.dtype)


def _frequencies(count: int, theta: float) -> np.ndarray:
  """theta^(-j / count), in f32 throughout as torch computes it."""
  exponent = np.arange(count, dtype=np.float32) / np.float32(count)
  return (np.float32(1) / np.float32(theta) ** exponent).astype(np.float32)
