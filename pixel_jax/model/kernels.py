"""Attention by the kernels of a machine: splash on TPUs, cuDNN on NVIDIA GPUs.

Both mean what `attention.attention` means where slots are indices: heads-first, G query
heads a key-value head and no repeated keys, softmax in f32, segments of packed rows.
Splash is told which blocks segments leave empty; to cuDNN a packed row costs what one
sequence of its length costs.  Not here: when to use which (`ModelConfig.attention`), the
cache.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as lib
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from pixel_jax.model import flash

LANES = 128  # tokens of the smallest block of splash
BLOCK = 1024  # and of the largest: 2048 leaves the vector memory of a v5e
# Of one row, 256 MiB of bf16; cuDNN reads its mask as a bias.
LARGEST_MASK = 2**27
ROWS = ("data", "fsdp")


def splash(
  q: Float[Array, "B N T H"],
  k: Float[Array, "B K S H"],
  v: Float[Array, "B K S H"],
  segment_q: Int[Array, "B T"] | None,
  segment_k: Int[Array, "B S"] | None,
  causal: bool,
  interpret: bool = False,
) -> Float[Array, "B N T H"]:
  """The Pallas kernel of jax for TPUs; `interpret` runs it elsewhere, slowly.

  XLA cannot cut a kernel, so under a mesh (`parallel.on`) each device runs it on its
  own rows, and on its own heads where "tensor" divides those of the keys.  Rows go one
  after the other, because each has its own blocks to skip.
  """
  B, _, T, H = q.shape
  K, S = k.shape[1:3]
  if causal and T != S:
    raise ValueError(f"causal splash needs as many queries as keys, not {T} and {S}.")
  if segment_q is None:
    segment_q, segment_k = jnp.ones((B, T), jnp.int32), jnp.ones((B, S), jnp.int32)
  # Whole blocks; what is added is a segment that nobody else sees.
  size_q, size_k = _block(T), _block(S)
  q = flash.pad(q * H**-0.5, 2, size_q)
  k, v = flash.pad(k, 2, size_k), flash.pad(v, 2, size_k)
  segment_q = flash.pad(segment_q, 1, size_q, fill=-1)
  segment_k = flash.pad(segment_k, 1, size_k, fill=-1)

  def local(q, k, v, segment_q, segment_k):
    N, T, S = *q.shape[1:3], k.shape[2]
    mask = lib.CausalMask((T, S)) if causal else lib.FullMask((T, S))
    kernel = lib.make_splash_mha(
      lib.MultiHeadMask([mask] * N),
      block_sizes=_block_sizes(size_q, size_k),
      head_shards=1,
      q_seq_shards=1,
      residual_checkpoint_name="heads",  # what remat="qkvo" keeps
      interpret=interpret,
    )

    def row(x):
      q, k, v, segment_q, segment_k = x
      run = _skipping(kernel, segment_q, segment_k, size_q, size_k, causal)
      return run(q, k, v, lib.SegmentIds(segment_q, segment_k))

    return jax.lax.map(row, (q, k, v, segment_q, segment_k))

  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty:
    rows = tuple(a for a in ROWS if a in mesh.shape)
    heads = "tensor" if K % mesh.shape.get("tensor", K + 1) == 0 else None
    x, ids = PartitionSpec(rows, heads), PartitionSpec(rows)
    local = jax.shard_map(
      local, in_specs=(x, x, x, ids, ids), out_specs=x, check_vma=False
    )
  return local(q, k, v, segment_q, segment_k)[:, :, :T]


def _skipping(kernel, segment_q, segment_k, size_q: int, size_k: int, causal: bool):
  """The kernel for one row, which skips what `flash` skips.

  It takes a mask that is known when it is compiled.  What it makes of one are tables:
  does this block of queries go over that block of keys, and which is loaded meanwhile.
  They may as well be computed where it runs; within a block segments are compared anyway.
  """
  T, S = len(segment_q), len(segment_k)
  slots = (jnp.arange(T)[None], jnp.arange(S)[None]) if causal else (None, None)
  queries, keys = (segment_q[None], slots[0]), (segment_k[None], slots[1])
  reach = flash.reach(size_q, size_k, queries, keys)

  def tables(info, reach, order):
    low, high = (x[:, None] for x in flash.hull(reach))
    block = jnp.arange(reach.shape[1])
    used = (block >= low) & (block < high)
    load = jnp.clip(block, low, high - 1)  # where nothing is done nothing new is loaded
    return info._replace(
      block_mask=order(2 * used.astype(jnp.int32))[None],  # 2: no mask of its own
      data_next=order(load.astype(jnp.int32))[None],
    )

  return type(kernel)(
    tables(kernel.fwd_mask_info, reach, lambda x: x),
    tables(kernel.dq_mask_info, reach, lambda x: x),
    tables(kernel.dkv_mask_info, reach.T, lambda x: x.T),
    **kernel.kwargs,
  )


def _block_sizes(q: int, k: int) -> lib.BlockSizes:
  """dq has a kernel of its own: the fused one keeps S / block partial sums of it."""
  inner = min(k, 512)
  return lib.BlockSizes(
    block_q=q, block_kv=k, block_kv_compute=inner, block_q_dkv=q, block_kv_dkv=k,
    block_kv_dkv_compute=inner, block_q_dq=q, block_kv_dq=k,
  )  # fmt: skip


def _block(length: int) -> int:
  """The largest block that adds less than an eighth of padding."""
  size = LANES
  while size < BLOCK and -length % (2 * size) <= length // 8:
    size *= 2
  return size


def cudnn(
  q: Float[Array, "B N T H"],
  k: Float[Array, "B K S H"],
  v: Float[Array, "B K S H"],
  segment_q: Int[Array, "B T"] | None,
  segment_k: Int[Array, "B S"] | None,
  causal: bool,
  implementation: str = "cudnn",
) -> Float[Array, "B N T H"]:
  """cuDNN's flash attention through jax.nn; bfloat16 or float16, Ampere or newer.

  It knows no segments, so packed rows come with a mask [T S] of one head, at most
  `LARGEST_MASK`; `attention` takes larger ones to "xla".
  """
  mask = None
  if segment_q is not None:
    mask = (segment_q[:, :, None] == segment_k[:, None])[:, None]  # B 1 T S
  out = jax.nn.dot_product_attention(
    *(jnp.swapaxes(x, 1, 2) for x in (q, k, v)),
    mask=mask,
    is_causal=causal,
    implementation=implementation,
  )
  return jnp.swapaxes(out, 1, 2)
