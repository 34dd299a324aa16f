"""What a run takes over from the machines it is made for: `sft.py:7b,v5p:4x4x4`.

docs/pods.md says what `pixel-jax compile-check` found when it compiled them.  A preset
changes how a run is laid out: batch, memory, engines.  How it learns stays that of the
size, but for the rows of a batch, of which every device wants some.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Pod:
  """accelerator: as the cloud names it; a tpu7x chip is two devices to jax."""

  accelerator: str
  chips: int
  devices: int
  host: int  # devices of one
  attention: str  # kernel: ModelConfig.attention
  compiler: dict  # flags of train steps


# For train steps: collectives beside the matmuls that do not wait for them.  MaxText's
# choice; the compilers accept it, how much it gains was not measured here.
TPU = {
  "xla_tpu_enable_async_collective_fusion": True,
  "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
  "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
  "xla_tpu_overlap_compute_collective_tc": True,
  "xla_enable_async_all_gather": True,
}
# libtpu 0.0.42.1 dies of an all-reduce on the sparse cores, where tpu7x puts it by itself
# (`offload_collective_strategies.cc: abs(inc) < core_count()`).
TPU7X = TPU | {"xla_tpu_enable_sparse_core_collective_offload_all_reduce": False}
GPU = {
  "xla_gpu_enable_latency_hiding_scheduler": True,
  "xla_gpu_enable_pipelined_all_gather": True,
  "xla_gpu_enable_pipelined_reduce_scatter": True,
  "xla_gpu_enable_while_loop_double_buffering": True,
  "xla_gpu_all_gather_combine_threshold_bytes": 134217728,
  "xla_gpu_reduce_scatter_combine_threshold_bytes": 134217728,
}

# v5p and tpu7x are named after their cores, two a chip: v5p-128 has 64 chips.
PODS = {
  "v5e:8x8": Pod("v5litepod-64", 64, 64, 4, "splash", TPU),
  "v5e:16x16": Pod("v5litepod-256", 256, 256, 4, "splash", TPU),
  "v5p:4x4x4": Pod("v5p-128", 64, 64, 4, "splash", TPU),
  "v6e:8x8": Pod("v6e-64", 64, 64, 4, "splash", TPU),
  "v6e:16x16": Pod("v6e-256", 256, 256, 4, "splash", TPU),
  "tpu7x:4x4x4": Pod("tpu7x-128", 64, 128, 8, "splash", TPU7X),
  "h200:1": Pod("one H200", 1, 1, 1, "cudnn", {}),
  "h200:8": Pod("8 x H200", 8, 8, 8, "cudnn", GPU),
}

# (size, topology) -> rows of 8192 tokens a device, or mesh.tensor of them together, takes
# at a time, remat, the rest by path.  "dots" recomputes attention only, "qkvo" also o, gate
# and up: what fits.
SFT = {
  ("3b", "v5e:8x8"): (1, "full", {}),
  ("3b", "v5e:16x16"): (1, "full", {}),
  ("3b", "v5p:4x4x4"): (2, "dots", {}),
  ("3b", "v6e:8x8"): (2, "qkvo", {}),
  ("3b", "v6e:16x16"): (2, "qkvo", {}),
  ("3b", "tpu7x:4x4x4"): (2, "dots", {}),
  ("3b", "h200:1"): (4, "qkvo", {}),
  ("3b", "h200:8"): (4, "dots", {}),
  ("7b", "v5e:8x8"): (1, "full", {}),
  ("7b", "v5e:16x16"): (1, "full", {}),
  ("7b", "v5p:4x4x4"): (2, "dots", {}),
  ("7b", "v6e:8x8"): (2, "qkvo", {}),
  ("7b", "v6e:16x16"): (2, "qkvo", {}),
  ("7b", "tpu7x:4x4x4"): (2, "dots", {}),
  # In f32 the first moment leaves room for two rows.
  ("7b", "h200:1"): (4, "full", {"optim.moment_dtype": "bfloat16"}),
  ("7b", "h200:8"): (3, "dots", {}),
  ("32b", "v5p:4x4x4"): (2, "qkvo", {}),
  ("32b", "v6e:8x8"): (1, "full", {}),
  ("32b", "v6e:16x16"): (1, "full", {}),
  ("32b", "tpu7x:4x4x4"): (2, "qkvo", {}),
  ("32b", "h200:1"): (1, "full", {"lora.rank": 32}),
  ("32b", "h200:8"): (1, "qkvo", {}),
  ("72b", "v5p:4x4x4"): (1, "full", {}),
  # Alone a device takes 96 % of its memory for a row.
  ("72b", "v6e:16x16"): (1, "full", {"mesh.tensor": 2}),
  ("72b", "tpu7x:4x4x4"): (1, "full", {}),
  ("72b", "h200:8"): (1, "full", {"lora.rank": 32}),
}

# (size, topology) -> devices of an engine, its slots of 16384 tokens, remat of the
# update (a row of 16384 tokens a device at a time), the rest by path.  In large slices a
# v5e compiles no collective among a few of the devices, a v6e among two but not four.
RL = {
  ("3b", "v5p:4x4x4"): (1, 64, "qkvo", {}),
  ("3b", "v6e:8x8"): (2, 48, "full", {}),
  ("3b", "v6e:16x16"): (2, 32, "full", {}),
  ("3b", "tpu7x:4x4x4"): (1, 32, "qkvo", {}),
  ("3b", "h200:1"): (1, 64, "full", {}),
  ("3b", "h200:8"): (1, 96, "qkvo", {}),
  ("7b", "v5p:4x4x4"): (1, 64, "qkvo", {}),
  ("7b", "v6e:8x8"): (2, 32, "full", {}),
  ("7b", "v6e:16x16"): (2, 32, "full", {}),
  ("7b", "tpu7x:4x4x4"): (1, 32, "qkvo", {}),
  ("7b", "h200:1"): (1, 64, "full", {"lora.rank": 32}),
  ("7b", "h200:8"): (1, 64, "full", {}),
  ("32b", "v5p:4x4x4"): (4, 48, "full", {}),
  ("32b", "tpu7x:4x4x4"): (4, 48, "full", {}),
  ("32b", "h200:8"): (4, 32, "full", {}),
  ("72b", "v5p:4x4x4"): (4, 16, "full", {}),
  ("72b", "tpu7x:4x4x4"): (4, 8, "full", {}),
  ("72b", "h200:8"): (4, 16, "full", {"lora.rank": 32}),
}


def fit(c, kind, size, topology):
  """Changes the config `c` of this size to the preset for a topology; "" leaves it."""
  c.topology, c.accelerator, c.chips, c.compiler = "", "", 0, {}
  if not topology:
    return c
  presets = {"sft": SFT, "rl": RL}[kind]
  if topology not in PODS:
    raise ValueError(f"topology {topology!r} is unknown; known: {', '.join(PODS)}")
  if (size, topology) not in presets:
    known = ", ".join(t for s, t in presets if s == size) or "none"
    raise ValueError(
      f"there is no {kind} preset of {size} for {topology}; presets of {size}: {known}. "
      "`pixel-jax compile-check` with --topology says what does not fit"
    )
  pod = PODS[topology]
  c.topology, c.accelerator, c.chips = topology, pod.accelerator, pod.chips
  c.compiler = dict(pod.compiler)
  if kind == "sft":
    each, remat, more = presets[size, topology]
    c.data.rows = each * pod.devices // more.get("mesh.tensor", 1)
    c.data.shards = min(c.data.rows, 64)  # a multiple of the hosts
  else:
    tensor, slots, remat, more = presets[size, topology]
    c.fleet.tensor, c.engine.slots, c.rl.rows = tensor, slots, pod.host
    c.data.shards = pod.devices // tensor  # an engine plays whole shards
  c.model.update(attention=pod.attention, remat=remat)
  for path, value in more.items():
    c.update_from_flattened_dict({path: value})
  return c
