"""Adapters as PEFT stores them: adapter_model.safetensors and adapter_config.json.

Names are PEFT's of a Qwen2_5_VLForConditionalGeneration of transformers 4.52 and later,
`base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight`; those of
4.49 to 4.51, `base_model.model.model.layers.0...` and `base_model.model.visual...`, are
read as well.  PEFT's lora_A.weight is [r in], lora_B.weight [out r].  Not here: what an
adapter is (`lora.py`), the base model's files (`hf.py`).
"""

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax

from pixel_jax.model import hf, lora, table
from pixel_jax.model.config import ModelConfig

PyTree = Any

PREFIX = "base_model.model."
# What PEFT can do beside and we do not: refused unless it is off.
ABSENT = (
  "alpha_pattern", "fan_in_fan_out", "lora_bias", "modules_to_save", "rank_pattern",
  "trainable_token_indices", "use_dora",
)  # fmt: skip


def read(
  directory: str | pathlib.Path,
  config: ModelConfig,
  layout: Callable[[ModelConfig], PyTree] = lambda config: None,
) -> tuple[lora.Config, PyTree]:
  """What the adapter is, and the tree of its leaves alone, f32.

  Args:
    config: of the base model; its `lora` is not looked at.
    layout: gives a tree of shardings for the config with these adapters; None = all on
      the first device.
  """
  directory = pathlib.Path(directory)
  path = directory / "adapter_config.json"
  if not path.is_file():
    raise FileNotFoundError(
      f"{path} does not exist; give a folder that PEFT's save_pretrained wrote."
    )
  described = json.loads(path.read_text())
  _refuse(described, path)
  rank = described["r"]
  alpha = float(described["lora_alpha"]) * (
    math.sqrt(rank) if described.get("use_rslora") else 1.0
  )
  tensors = {
    name.removeprefix(PREFIX): x for name, x in hf.open_tensors(directory).items()
  }
  config = dataclasses.replace(
    config, lora=lora.Config(rank, alpha, _targets(config, tensors, directory))
  )
  rows = table.adapters(config)
  tensors = hf.check(
    {name: table.hf_shape(config, r) for name, r, _ in table.tensors(config, rows)},
    tensors,
    f"{directory} is not an adapter of this model",
    f"Names must begin with {PREFIX}, and every layer must be adapted alike, with rank "
    f"{rank} of adapter_config.json.",
  )
  return config.lora, hf.load(config, rows, tensors, layout(config))


def write(
  config: ModelConfig,
  params: PyTree,
  directory: str | pathlib.Path,
  *,
  base: str | None = None,
  dtype: str = "float32",
) -> None:
  """Writes the adapters of `params` for PEFT's `from_pretrained`, transformers and vLLM.

  Args:
    base: the base model's name or folder, for adapter_config.json.
  """
  from safetensors.numpy import save_file

  if config.lora is None:
    raise ValueError(
      "this checkpoint has no adapters; export it without --adapter, or give the workdir "
      "of a run with config.lora.rank > 0."
    )
  flat = hf.match(config, params)
  rows = table.adapters(config)
  tensors = {
    PREFIX + _in_memory(name): hf.to_hf(
      config, row, flat[row.path][layer] if row.stacked else flat[row.path], dtype
    )
    for name, row, layer in table.tensors(config, rows)
  }
  if jax.process_index() == 0:
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(describe(config, base), indent=2, sort_keys=True) + "\n")
    file = directory / "adapter_model.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(path.stat().st_mode)  # safetensors alone would make it private


def describe(config: ModelConfig, base: str | None = None) -> dict[str, Any]:
  """adapter_config.json, the fields that PEFT has had since 0.8."""
  alpha = config.lora.alpha
  return {
    "alpha_pattern": {},
    "auto_mapping": None,
    "base_model_name_or_path": base,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
    "lora_dropout": 0.0,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": config.lora.rank,
    "rank_pattern": {},
    "revision": None,
    "target_modules": _pattern(config),
    "task_type": "CAUSAL_LM",
    "use_rslora": False,
  }


def _pattern(config: ModelConfig) -> str:
  """A regular expression that PEFT matches against whole module names.

  Not a list of suffixes: "gate_proj" would also be found in the vision tower.
  """
  modules = []
  for row in table.rows(config):
    if row.path.removesuffix("/w") in table.adapted(config):
      name = re.escape(row.name.removesuffix(".weight").format(layer="LAYER"))
      name = name.replace("LAYER", r"\d+")
      if name.startswith("visual"):
        modules.append(r"(model\.)?" + name)
      else:
        modules.append(name.replace(r"model\.", r"model\.(language_model\.)?", 1))
  return "|".join(modules)


def _in_memory(name: str) -> str:
  """A name of the hub as transformers has it since 4.52."""
  if name.startswith("model."):
    return name.replace("model.", "model.language_model.", 1)
  return f"model.{name}"


def _targets(
  config: ModelConfig, tensors: dict[str, hf.Tensor], directory: pathlib.Path
) -> tuple[str, ...]:
  """Which linear layers the tensors are for; `hf.check` says what is wrong with them."""
  full = dataclasses.replace(config, lora=lora.Config(1, 1.0, ("",)))
  names = {hf.hub_name(n) for n in tensors}
  found = [
    row.path.removesuffix("/lora_a")
    for row in table.adapters(full)
    if row.path.endswith("/lora_a")
    and any(row.name.format(layer=i) in names for i in range(table.depth(config, row)))
  ]
  if not found:
    raise ValueError(
      f"{directory} adapts no linear layer of this model; its first names are "
      f"{', '.join(sorted(tensors)[:3])}."
    )
  text = table.adapted(dataclasses.replace(config, lora=lora.Config(1, 1.0)))
  return (lora.TEXT,) if tuple(found) == text else tuple(f"^{p}$" for p in found)


def _refuse(described: dict[str, Any], path: pathlib.Path) -> None:
  odd = [f"{k}={described[k]!r}" for k in ABSENT if described.get(k)]
  if described.get("peft_type") != "LORA":
    odd.append(f"peft_type={described.get('peft_type')!r}")
  if described.get("bias", "none") != "none":
    odd.append(f"bias={described['bias']!r}")
  if odd:
    raise ValueError(
      f"{path} says {', '.join(odd)}, which is not implemented; allowed: plain LoRA "
      "(or use_rslora) of one rank without biases. Merge it with PEFT's "
      "merge_and_unload, and import the whole model."
    )
