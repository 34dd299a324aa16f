"""The device noun: `Batch`, the one struct that every jitted step takes; and the cache.

Rows hold packed examples.  Vision is row-local: the patches of an image lie in the row
of the tokens that show it, and a row holds each distinct image once, however many
segments point to it.  The axis letters are those of `pixel_jax/model/__init__.py`.
Nothing here computes.
"""

import flax.struct
import jax


@flax.struct.dataclass
class Batch:
  """Packed rows for one jitted step; see `data/pack.py` for how they are filled."""

  tokens: jax.Array  # i32[B T]    ids, image and video placeholders included
  segment: jax.Array  # i32[B T]    which example of the row; 0 = padding
  position: jax.Array  # i32[B T 3]  M-RoPE (time, height, width)
  weight: jax.Array  # f32[B T]    loss weight of this token as a *target*
  vision_index: jax.Array  # i32[B T]    row-local merged patch; -1 = text
  patches: jax.Array  # u8[B P 1176]  raw pixels in window order (normalised on device)
  patch_pos: jax.Array  # i32[B P 2]  (row, column) of the patch, for 2-D rotary
  patch_image: jax.Array  # i32[B P]    segment of full attention; 0 = padding
  patch_window: jax.Array  # i32[B P]    window of window attention; 0 = padding
  features: jax.Array | None = None  # f[B M D]  stands in for patches (frozen tower)
  logp_old: jax.Array | None = None  # f32[B T]  RL: trainer log-prob before the update
  logp_sampler: jax.Array | None = None  # f32[B T]  RL: log-prob when it was sampled
  advantage: jax.Array | None = None  # f32[B T]  RL: advantage, spread over the tokens


@flax.struct.dataclass
class Cache:
  """Keys and values of B sequences; slot s of row b is valid when s < length[b]."""

  k: jax.Array  # f[L B K S H], rotary already applied
  v: jax.Array  # f[L B K S H]
  length: jax.Array  # i32[B]


@flax.struct.dataclass
class Prompts:
  """Prompts in the cache: each is stored once and read once for all of its samples.

  Row b of a `Cache` goes on where prompt row[b] ends: its slot 0 follows the prompt's
  last.  `lane` says the same the other way round, up to M sequences a prompt.
  """

  k: jax.Array  # f[L P K S H], S the prompt's own; rotary already applied
  v: jax.Array  # f[L P K S H]
  length: jax.Array  # i32[P]
  row: jax.Array  # i32[B]
  lane: jax.Array  # i32[P M]   rows of the cache; >= B = nobody
