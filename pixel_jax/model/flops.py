"""FLOPs of the model by formula: what MFU is measured against.

Pure functions of a `ModelConfig` and of sizes, which `work` counts in a batch; nothing
is compiled to be counted: XLA misses kernels and counts the body of a loop once.
Counted are matmuls (2 a weight) and attention, which is 4 a query, key and channel; not
counted are norms, rotary, softmax and the embedding, a gather.  The 7B by these
formulas, N patches an image: 14.14 GF + 0.2007 MF * T a causal token with its head,
1.294 GF + 20.5 kF * N a patch (limits.md 2.1).
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pixel_jax.batch import Batch
from pixel_jax.model.config import ModelConfig

Number = int | float


class Step(NamedTuple):
  """FLOPs of one train step.

  text, vision: of the model, a backward pass twice the forward; for MFU.
  executed: both, and what remat recomputes; what the machine has to do.
  """

  text: Number
  vision: Number
  executed: Number

  @property
  def total(self) -> Number:
    return self.text + self.vision

  def parts(self) -> dict[str, Number]:
    return {"text": self.text, "vision": self.vision}


def text_per_token(config: ModelConfig, context: Number) -> Number:
  """Forward pass of one token through the text blocks, without the head.

  Args:
    context: keys that a token sees, on average; T / 2 in one causal sequence of T.
  """
  return config.text.depth * sum(_text_block(config, context).values())


def head_per_token(config: ModelConfig) -> Number:
  """Logits of one token; in training only scored tokens need them."""
  return 2.0 * config.text.width * config.text.vocab


def vision_per_patch(config: ModelConfig, patches_per_image: Number) -> Number:
  """Forward pass of one patch through tower and merger.

  Args:
    patches_per_image: what a patch sees in the full-attention blocks, on average; in
      the others it is a window.
  """
  v = config.vision
  blocks = v.depth * sum(_vision_block(config, patches_per_image).values())
  merged = v.width * v.merge**2
  merger = 2 * merged * (merged + v.out_width) / v.merge**2  # one for merge^2 patches
  return blocks + 2 * v.width * v.patch_dim + merger


def train_step(
  config: ModelConfig,
  *,
  text_tokens: Number,
  context: Number,
  patches: Number,
  patches_per_image: Number,
  scored: Number,
  frozen_vision: bool = False,
  frozen_text: bool = False,
) -> Step:
  """Forward and backward of one step over all its rows.

  Args:
    text_tokens: that go through the text blocks, image tokens included; padding counts
      if it is computed and is to be called work.
    context: as in `text_per_token`.
    patches: that are encoded; 0 where features come from a cache.
    patches_per_image: as in `vision_per_patch`.
    scored: tokens whose logits are wanted.
    frozen_vision: the tower runs forward only.
    frozen_text: its weights have no gradient, but activations have (LoRA; what the
      adapters add is not counted).
  """
  blocks = text_tokens * text_per_token(config, context)
  head = scored * head_per_token(config)
  vision = patches * vision_per_patch(config, patches_per_image)
  again = head  # logits are never kept (logp.py)
  lost = RECOMPUTED[config.remat]
  part = _text_block(config, context)
  again += text_tokens * config.text.depth * sum(part[k] for k in lost)
  if not frozen_vision:
    part = _vision_block(config, patches_per_image)
    again += patches * config.vision.depth * sum(part[k] for k in lost)
  text = (blocks + head) * (2 if frozen_text else 3)
  if not frozen_vision:  # pixels have no gradient
    pixels = patches * 2 * config.vision.width * config.vision.patch_dim
    vision = 3 * vision - pixels
  return Step(text, vision, text + vision + again)


def work(batch: Batch) -> dict[str, jax.Array]:
  """The amounts of work in a batch, f32.  They are sums over rows, so parts add up.

  tokens, image_tokens, scored: tokens without padding, those that show a picture, those
    with a weight.
  keys: seen by all tokens together; patches, patch_keys: likewise of full attention.
  """
  patches = patch_keys = jnp.float32(0)
  if batch.features is None:
    patches = _count(batch.patch_image > 0)
    rank = jnp.where(batch.patch_image > 0, _ranks(batch.patch_image), 0)
    patch_keys = 2 * rank.sum(dtype=jnp.float32) - patches  # n^2 = 2 (1 + .. + n) - n
  rank = jnp.where(batch.segment > 0, _ranks(batch.segment), 0)
  return {
    "tokens": _count(batch.segment > 0),
    "image_tokens": _count(batch.vision_index >= 0),
    "scored": _count(batch.weight > 0),
    "keys": rank.sum(dtype=jnp.float32),
    "patches": patches,
    "patch_keys": patch_keys,
  }


def of_work(
  config: ModelConfig, work: Mapping[str, Number], trained: Collection[str]
) -> Step:
  """`train_step` of what `work` counted, where the paths `trained` have a gradient."""
  return train_step(
    config,
    text_tokens=work["tokens"],
    context=work["keys"] / max(work["tokens"], 1),
    patches=work["patches"],
    patches_per_image=work["patch_keys"] / max(work["patches"], 1),
    scored=work["scored"],
    frozen_vision=not any(p.startswith("vision/") for p in trained),
    frozen_text=not any(p.startswith("text/") and p.endswith("/w") for p in trained),
  )


def _ranks(ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
  """1, 2, .. n within each run of n equal ids."""
  at = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
  starts = jnp.pad(ids[:, 1:] != ids[:, :-1], [(0, 0), (1, 0)], constant_values=True)
  return at + 1 - jax.lax.cummax(jnp.where(starts, at, 0), axis=1)


def _count(mask: jax.Array) -> jax.Array:
  return mask.sum(dtype=jnp.float32)


# Parts of a block that the backward pass computes again; never "down", whose result
# only the next block reads.
RECOMPUTED = {
  "none": (),
  "dots": ("scores", "values"),
  "qkvo": ("scores", "o", "gate_up"),
  "full": ("qkv", "scores", "values", "o", "gate_up"),
}


def _text_block(config: ModelConfig, context: Number) -> dict[str, float]:
  t = config.text
  return _block(t.width, t.heads * t.head_dim, t.kv_heads * t.head_dim, t.mlp, context)


def _vision_block(config: ModelConfig, patches_per_image: Number) -> dict[str, float]:
  v = config.vision
  full = len(v.fullatt) / v.depth
  keys = (1 - full) * v.window_patches + full * patches_per_image
  return _block(v.width, v.width, v.width, v.mlp, keys)


def _block(width: int, q: int, kv: int, mlp: int, keys: Number) -> dict[str, float]:
  """Forward pass of one token or patch through one block, part by part."""
  return {
    "qkv": 2.0 * width * (q + 2 * kv),
    "scores": 2.0 * q * keys,
    "values": 2.0 * q * keys,
    "o": 2.0 * q * width,
    "gate_up": 4.0 * width * mlp,
    "down": 2.0 * width * mlp,
  }
