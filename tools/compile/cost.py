"""What a program has to do on one device, by formula, and how long a chip needs for it.

FLOPs are those of `pixel_jax.model.flops`; bytes are the least that HBM has to move:
each weight once a pass in the compute dtype, what matmuls read and write, the state of
the optimizer.  Published figures of the chips (limits.md 2.1); nothing is measured
and nothing overlaps badly: a roofline says what no run can beat.  jax's device is half
a chip on tpu7x, and its figures here are those of the half.
"""

import dataclasses
import math
from collections.abc import Sequence

from pixel_jax.model import flops
from pixel_jax.model.config import ModelConfig

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One jax device.  ici: bytes/s that all its links bring in."""

  hbm: float  # bytes that the compiler may use
  flops: float  # bf16
  bandwidth: float
  ici: float


CHIPS = {
  "v5e": Chip(15.75 * GIB, 197e12, 0.819e12, 100e9),
  "v5p": Chip(95.73 * GIB, 459e12, 2.765e12, 300e9),
  "v6e": Chip(31.24 * GIB, 918e12, 1.64e12, 224e9),
  "tpu7x": Chip(94.74 * GIB, 1153.5e12, 3.69e12, 300e9),
  # 139.8 GiB, of which a process gets 95 % (XLA_PYTHON_CLIENT_MEM_FRACTION=0.95).
  "h200": Chip(132.8 * GIB, 989e12, 4.8e12, 450e9),
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """accelerator: as the cloud names it; chips: of one slice."""

  accelerator: str
  chips: int


def wraps(shape: Sequence[int]) -> list[bool]:
  """Which of the three dimensions of a slice close to a ring, as MaxText's table says.

  Of v5e and v6e those of 16 chips; of v5p and tpu7x all, in slices of whole cubes of 4.
  """
  if len(shape) == 2:
    return [n == 16 for n in shape] + [False]
  return [all(n % 4 == 0 for n in shape)] * 3


def _tpus() -> dict[str, Topology]:
  flat = ["2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"]
  cubes = ["2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"]
  # v5p and tpu7x are named after cores, two a chip.
  kinds = [("v5e", flat, "v5litepod-", 1), ("v5p", cubes, "v5p-", 2)]
  kinds += [("v6e", flat, "v6e-", 1), ("tpu7x", cubes, "tpu7x-", 2)]
  return {
    f"{kind}:{shape}": Topology(f"{name}{chips * cores}", chips)
    for kind, shapes, name, cores in kinds
    for shape in shapes
    for chips in [math.prod(map(int, shape.split("x")))]
  }


TOPOLOGIES = _tpus() | {
  "h200:1": Topology("one H200", 1),
  "h200:8": Topology("8 x H200", 8),
}


@dataclasses.dataclass(frozen=True)
class Cost:
  """Of one device: FLOPs of the model (for MFU), FLOPs and bytes of the machine."""

  model: float = 0.0
  executed: float = 0.0
  bytes: float = 0.0

  def seconds(self, chip: Chip, moved: float) -> dict[str, float]:
    """What each part of the machine needs; `moved` bytes come over the links."""
    return {
      "matmul": self.executed / chip.flops,
      "hbm": self.bytes / chip.bandwidth,
      "links": moved / chip.ici,
    }


def train(
  model: ModelConfig,
  *,
  devices: int,
  tensor: int,
  sizes: dict[str, int],
  trained: dict[str, int],
  rows: int,
  tokens: int,
  patches: int,
  largest: int,
  parts: int = 1,
  backward: bool = True,
) -> Cost:
  """Full rows of one segment each, every token scored, pictures of the largest size.

  Args:
    sizes, trained: numbers by parameter path, of all and of those with a gradient.
    rows: of all `parts` micro-batches.
    largest: patches of the largest picture.
    backward: False = log-probs only.
  """
  frozen_vision = not any(p.startswith("vision/") for p in trained)
  step = flops.train_step(
    model,
    text_tokens=rows * tokens,
    context=tokens / 2,
    patches=rows * patches,
    patches_per_image=min(largest, patches),
    scored=rows * tokens,
    frozen_vision=frozen_vision,
    frozen_text=not any(p.startswith("text/") and p.endswith("/w") for p in trained),
  )
  again = model.remat != "none"
  passes = 1 + backward * (1 + again)
  t, v = model.text, model.vision
  text_bytes = (
    rows
    * tokens
    * t.depth
    * _block_bytes(t.width, t.heads * t.head_dim, t.kv_heads * t.head_dim, t.mlp)
  )
  vision_bytes = (
    rows * patches * v.depth * _block_bytes(v.width, v.width, v.width, v.mlp)
  )
  # A backward pass reads and writes twice what a forward pass does.
  moved = text_bytes * (passes + backward)
  moved += vision_bytes * (1 if frozen_vision else passes + backward)
  weights = sum(2 * n for p, n in sizes.items() if p.startswith("text/")) * passes
  weights += sum(2 * n for p, n in sizes.items() if p.startswith("vision/")) * (
    1 if frozen_vision else passes
  )
  state = (28 if parts == 1 else 28 + 8 * parts) * sum(trained.values()) * backward
  if not backward:
    forward = rows * tokens * flops.text_per_token(model, tokens / 2)
    forward += rows * tokens * flops.head_per_token(model)
    forward += rows * patches * flops.vision_per_patch(model, min(largest, patches))
    return Cost(
      forward / devices,
      forward / devices,
      moved / devices + weights * parts / tensor,
    )
  return Cost(
    step.total / devices,
    step.executed / devices,
    (moved + state) / devices + weights * parts / tensor,
  )


def apply(devices: int, trained: dict[str, int]) -> Cost:
  """One optimizer step: gradient, parameter and two moments, f32."""
  return Cost(bytes=28 * sum(trained.values()) / devices)


def extend(
  model: ModelConfig, *, tensor: int, weights: int, rows: int, tokens: int, view: int
) -> Cost:
  """Appends full rows of `tokens` to a cache of which they see `view` at the end.

  weights: numbers of the text blocks.
  """
  context = view - tokens / 2
  work = rows * tokens * flops.text_per_token(model, context)
  t = model.text
  moved = (
    rows
    * tokens
    * t.depth
    * _block_bytes(t.width, t.heads * t.head_dim, t.kv_heads * t.head_dim, t.mlp)
  )
  total = 2 * weights + moved + rows * view * cache_bytes(model)
  return Cost(work / tensor, work / tensor, total / tensor)


def decode(
  model: ModelConfig,
  *,
  tensor: int,
  weights: int,
  lanes: int,
  view: int,
  read: int,
  steps: int,
) -> Cost:
  """A chunk of `steps` in which every lane sees `view` slots.

  Args:
    read: slots of all lanes; a prompt that lanes share is read once.
  """
  per_token = flops.text_per_token(model, view) + flops.head_per_token(model)
  work = steps * lanes * per_token / tensor
  head = model.text.width * model.text.vocab
  moved = 2 * (weights + head) + read * cache_bytes(model)
  return Cost(work, work, steps * moved / tensor)


def encode(
  model: ModelConfig, *, tensor: int, weights: int, patches: int, largest: int
) -> Cost:
  """The tower over `patches`."""
  v = model.vision
  work = patches * flops.vision_per_patch(model, largest)
  moved = patches * v.depth * _block_bytes(v.width, v.width, v.width, v.mlp)
  return Cost(work / tensor, work / tensor, (moved + 2 * weights) / tensor)


def cache_bytes(model: ModelConfig) -> int:
  """Keys and values of one token, in the compute dtype."""
  t = model.text
  size = 4 if model.dtype == "float32" else 2
  return size * 2 * t.depth * t.kv_heads * t.head_dim


def _block_bytes(width: int, q: int, kv: int, mlp: int) -> float:
  """What the matmuls and the attention of one block read and write for one token."""
  attention = width + q + 2 * kv + (2 * q + 2 * kv) + q + width
  return 2.0 * (attention + width + 2 * mlp + mlp + width)
