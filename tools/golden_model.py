"""The model's part of `golden.py`: a tiny checkpoint and what transformers makes of it.

  tests/golden/model/config.json, model-*.safetensors     a random Qwen2.5-VL, bf16
  tests/golden/model.npz                                  pictures, ids -> stages, f32

Written with `python -m pixel_jax.tools.golden model`; both together stay under 700 kB.
The stages are those of `parity.py`, gradients cut down to what fits: of each parameter
the first 24 numbers and the norm.
"""

import json
import pathlib
import shutil

import numpy as np

# Windows that split a picture, GQA, two periods of a window block and a full one.
VISION = dict(
  depth=4, hidden_size=32, num_heads=2, intermediate_size=44, out_hidden_size=48,
  patch_size=14, temporal_patch_size=2, spatial_merge_size=2, window_size=112,
  fullatt_block_indexes=[1, 3], tokens_per_second=2, in_channels=3,
)  # fmt: skip
TEXT = dict(
  vocab_size=299, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
  num_key_value_heads=2, intermediate_size=72, rms_norm_eps=1e-6,
  rope_parameters={
    "rope_type": "default", "rope_theta": 1000.0, "mrope_section": [1, 2, 3],
  },
)  # fmt: skip
IDS = dict(
  image_token_id=290, video_token_id=291, vision_start_token_id=292,
  vision_end_token_id=293, bos_token_id=0, eos_token_id=1,
)  # fmt: skip
GRADIENT = 24  # numbers kept of each parameter's gradient


def torch_model(tied: bool = False, seed: int = 0):
  """A random float32 model of transformers with nothing left at zero or one."""
  import torch
  from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

  torch.manual_seed(seed)
  config = Qwen2_5_VLConfig(
    text_config=dict(TEXT, bos_token_id=0, eos_token_id=1),
    vision_config=VISION,
    tie_word_embeddings=tied,
    **IDS,
  )
  model = Qwen2_5_VLForConditionalGeneration(config).float().eval()
  with torch.no_grad():
    for name, p in model.named_parameters():
      noise = torch.randn(p.shape)
      if "norm" in name or "ln_q" in name:
        p.copy_(1 + 0.2 * noise)
      else:
        p.copy_(noise * (0.1 if name.endswith("bias") else p[0].numel() ** -0.5))
      p.copy_(p.bfloat16())  # files hold bf16; what both sides compute with is equal
  return model


def write(out: pathlib.Path, parity, versions: np.ndarray) -> None:
  """Writes both; `parity` is the module tools/parity.py."""
  import torch

  folder = out / "model"
  shutil.rmtree(folder, ignore_errors=True)
  model = torch_model()
  model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="150KB")
  for extra in folder.glob("generation_config.json"):
    extra.unlink()

  from pixel_jax.model import config as model_config

  described = json.loads((folder / "config.json").read_text())
  config = model_config.from_hf(described)
  sample = parity.make_sample(config, sizes=((150, 95), (56, 56)), text=5)
  golden = {"versions": versions}
  for name, x in parity.run_torch(folder, sample, num_tokens=4).items():
    if name.startswith("gradient "):
      golden[name] = np.append(x.reshape(-1)[:GRADIENT], np.linalg.norm(x))
    elif name != "pixels":  # pixels.npz has them
      golden[name] = x
  batch = vars(parity.to_batch(sample))
  golden |= {f"batch/{k}": np.asarray(x) for k, x in batch.items() if x is not None}
  np.savez_compressed(out / "model.npz", **golden)
