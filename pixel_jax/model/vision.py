"""The vision tower: raw patches in window order -> one feature per 2x2 of them.

Not here: grids, resizing, window order, where features go among tokens.  All of that is
made on the host (`pixels/geometry.py`) and arrives as index arrays, so a row of P
patches may hold any number of images of any shape.  Main value: x f[B P D].
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name as name
from jaxtyping import Array, Float, Int, UInt8

from pixel_jax import parallel
from pixel_jax.model import layers, rope
from pixel_jax.model.attention import attention, window_attention
from pixel_jax.model.config import ModelConfig, VisionConfig
from pixel_jax.model.layers import Linear, RMSNorm

# CLIP's, as in every Qwen2.5-VL preprocessor_config.json.
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def normalize(
  patches: UInt8[Array, "B P C"], config: VisionConfig
) -> Float[Array, "B P C"]:
  """(x / 255 - mean) / std in f32; on a CPU bit for bit HF's pixel_values.

  XLA turns division by a broadcast into a product with its rounded inverse, which costs
  5e-7 (oracles.md 1.1); `always` hides from it that the divisors are constant.
  """
  x = patches.astype(jnp.float32)
  pixels = config.patch_dim // 3  # a channel is a contiguous third
  mean, std = np.repeat(MEAN, pixels), np.repeat(STD, pixels)
  always = x <= 255
  return (x / jnp.where(always, 255.0, 1.0) - mean) / jnp.where(always, std, 1.0)


class Block(nnx.Module):
  """L blocks, stacked; attention within the window or the whole image."""

  def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
    c = config
    D, N, H, F = c.width, c.heads, c.head_dim, c.mlp
    kwargs = dict(bias=True, layers=c.depth, rngs=rngs)
    self.attn_norm = RMSNorm(D, c.norm_eps, layers=c.depth)
    self.qkv = Linear("BPD,DXNH->XBNPH", (D, 3, N, H), **kwargs)
    self.o = Linear("BNPH,NHD->BPD", (N, H, D), **kwargs)
    self.mlp_norm = RMSNorm(D, c.norm_eps, layers=c.depth)
    self.gate = Linear("BPD,DF->BPF", (D, F), **kwargs)
    self.up = Linear("BPD,DF->BPF", (D, F), **kwargs)
    self.down = Linear("BPF,FD->BPD", (F, D), **kwargs)

  def __call__(self, x: Float[Array, "B P D"], table, attend) -> Float[Array, "B P D"]:
    x = parallel.by_rows(x)
    # Cut at once, so that the gradients of the three are joined and not added.
    q, k, v = (y[0] for y in jax.lax.split(self.qkv(self.attn_norm(x)), [1] * 3))
    q, k = rope.rotate(q, table), rope.rotate(k, table)
    x = x + self.o(attend(name(q, "q"), name(k, "k"), name(v, "v")))
    return x + layers.gated_mlp(self, self.mlp_norm(x))


class Merger(nnx.Module):
  """2x2 patches -> one feature of the text model's width."""

  def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
    wide = config.merge**2 * config.width
    self.norm = RMSNorm(config.width, config.norm_eps)
    self.up = Linear("BMD,DF->BMF", (wide, wide), bias=True, rngs=rngs)
    self.down = Linear("BMF,FD->BMD", (wide, config.out_width), bias=True, rngs=rngs)

  def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B M out"]:
    # The patches of a merged one are adjacent, also in window order.
    x = self.norm(x).reshape(x.shape[0], -1, self.up.w.shape[0])
    return self.down(jax.nn.gelu(self.up(x), approximate=False))


class Vision(nnx.Module):
  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    c = config.vision
    self.config = config
    self.patch = Linear("BPC,CD->BPD", (c.patch_dim, c.width), rngs=rngs)
    self.blocks = Block(c, rngs)
    self.merger = Merger(c, rngs)

  def __call__(
    self,
    patches: UInt8[Array, "B P C"],
    patch_pos: Int[Array, "B P 2"],
    patch_image: Int[Array, "B P"],
    patch_window: Int[Array, "B P"],
  ) -> Float[Array, "B M D"]:
    c = self.config.vision
    x = self.patch(normalize(patches, c).astype(self.config.dtype))
    table = rope.axial(patch_pos, c.head_dim, c.rope_theta)

    def in_window(q, k, v):
      return window_attention(q, k, v, window=patch_window, size=c.window_patches)

    def in_image(q, k, v):
      return attention(
        q, k, v, segment_q=patch_image, segment_k=patch_image, causal=False,
        impl=self.config.attention,
      )  # fmt: skip

    x = self._run(x, table, in_window, in_image)
    return self.merger(parallel.by_rows(x))

  def _run(self, x, table, in_window, in_image):
    """Periods of n window blocks and a full one where `fullatt` is periodic."""
    c, remat = self.config.vision, self.config.remat
    period = c.fullatt[0] + 1 if c.fullatt else c.depth + 1
    periodic = c.fullatt == tuple(range(period - 1, c.depth, period))
    if not (self.config.scan_layers and periodic and c.depth % period == 0):

      def body(block, x, i):
        return block(x, table, in_image if i in c.fullatt else in_window)

      return layers.run(self.blocks, body, x, scan=False, remat=remat)

    def window_body(block, x, i):
      return block(x, table, in_window)

    def period_body(blocks, x, i):
      graphdef, state = nnx.split(blocks)
      head = nnx.merge(graphdef, jax.tree.map(lambda w: w[:-1], state))
      last = nnx.merge(graphdef, jax.tree.map(lambda w: w[-1], state))
      if period > 1:
        x = layers.run(head, window_body, x, scan=True, remat=remat)
      full = functools.partial(last, table=table, attend=in_image)
      return layers.checkpoint(full, remat, scan=True)(x)

    graphdef, state = nnx.split(self.blocks)
    periods = jax.tree.map(lambda w: w.reshape(-1, period, *w.shape[1:]), state)
    blocks = nnx.merge(graphdef, periods)
    return layers.run(blocks, period_body, x, scan=True, remat="none")
