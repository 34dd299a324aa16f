"""What a Qwen2.5-VL is made of: frozen, hashable dataclasses; `config.json` in and out.

A `ModelConfig` is the static first argument of every function of `qwen2_5_vl.py`.  It
is not a training configuration: it knows no optimiser, no batch and no mesh.  Fields
that this model does not implement are refused by name, never ignored: a checkpoint that
loads is a checkpoint that is computed right.
"""

import dataclasses
import math
from typing import Any, Literal

from pixel_jax import fields
from pixel_jax.fields import PositiveInt
from pixel_jax.model.lora import Config as Adapters


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  width: int = 1280
  depth: int = 32
  heads: int = 16
  mlp: int = 3420
  out_width: int = 3584
  patch: int = 14
  temporal: int = 2
  merge: int = 2
  window: int = 112  # pixels
  fullatt: tuple[int, ...] = (7, 15, 23, 31)  # blocks that attend to the whole image
  rope_theta: float = 10_000.0
  norm_eps: float = 1e-6
  tokens_per_second: float = 2.0  # of the temporal axis of M-RoPE; read by `chat/`

  def __post_init__(self):
    if self.width % self.heads or self.head_dim % 4:
      raise ValueError(
        f"vision width {self.width} over {self.heads} heads gives a head of "
        f"{self.width / self.heads:g}; 2-D rotary needs a multiple of 4."
      )
    if self.window % (self.patch * self.merge):
      raise ValueError(
        f"vision window of {self.window} px; it must be a multiple of patch * merge = "
        f"{self.patch * self.merge} px."
      )
    if not all(0 <= i < self.depth for i in self.fullatt):
      raise ValueError(f"{self.fullatt=} names blocks outside 0..{self.depth - 1}.")

  @property
  def head_dim(self) -> int:
    return self.width // self.heads

  @property
  def patch_dim(self) -> int:
    return 3 * self.temporal * self.patch**2

  @property
  def window_patches(self) -> int:
    return (self.window // self.patch) ** 2


@dataclasses.dataclass(frozen=True)
class Yarn:
  """YaRN (Peng et al. 2023), which stretches the positions a model was trained for.

  factor: how far; original: the positions it was trained for.
  fast, slow: turns within these of the frequencies that stay, and that are stretched.
  attention: cos and sin are scaled by it.
  """

  factor: float
  original: int
  fast: float = 32.0
  slow: float = 1.0
  attention: float = 1.0
  truncate: bool = True


@dataclasses.dataclass(frozen=True)
class TextConfig:
  vocab: int = 152_064
  width: int = 3584
  depth: int = 28
  heads: int = 28
  kv_heads: int = 4
  mlp: int = 18_944
  mrope_section: tuple[int, int, int] = (16, 24, 24)  # frequencies of t, h, w
  rope_theta: float = 1_000_000.0
  norm_eps: float = 1e-6
  tied: bool = False
  max_positions: int = 128_000  # written to config.json; nothing here depends on it
  yarn: Yarn | None = None

  def __post_init__(self):
    if self.width % self.heads:
      raise ValueError(
        f"text width {self.width} does not divide by {self.heads} heads."
      )
    if self.heads % self.kv_heads:
      raise ValueError(f"{self.heads} heads do not divide by {self.kv_heads} kv heads.")
    if len(self.mrope_section) != 3 or sum(self.mrope_section) * 2 != self.head_dim:
      raise ValueError(
        f"mrope_section {self.mrope_section} must be three numbers with sum "
        f"head_dim / 2 = {self.head_dim / 2:g}."
      )

  @property
  def head_dim(self) -> int:
    return self.width // self.heads


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  vision: VisionConfig = VisionConfig()
  text: TextConfig = TextConfig()
  # Ids that config.json must name; the model itself reads none of them.
  image_token: int = 151_655
  video_token: int = 151_656
  vision_start: int = 151_652
  vision_end: int = 151_653
  bos_token: int = 151_643
  eos_token: int = 151_645
  # How it runs; no checkpoint depends on what follows.
  # Of the activations; parameters are cast to it, norms are not.
  dtype: Literal["float32", "bfloat16"] = "float32"
  # What the backward pass computes again; `layers.run`.
  remat: Literal["none", "dots", "qkvo", "full"] = "none"
  scan_layers: bool = True  # False: unrolled, faster for 2-3 layers on a CPU
  # "impl" of attention.py: "splash" on TPUs, "cudnn" on GPUs.
  attention: Literal["xla", "splash", "cudnn"] = "xla"
  # Tokens of the whole batch whose logits exist at one time.
  logp_chunk: PositiveInt = 1024
  lora: Adapters | None = None  # adapters in the tree, stored with its weights

  @property
  def merged(self) -> "ModelConfig":
    """The same model without adapters."""
    return dataclasses.replace(self, lora=None)

  def __post_init__(self):
    fields.check(ModelConfig, vars(self))
    if self.vision.out_width != self.text.width:
      raise ValueError(
        f"vision gives features of width {self.vision.out_width}, the text model reads "
        f"{self.text.width}."
      )


def tiny(vocab_size: int, **fields: Any) -> ModelConfig:
  """The model of the tiny world: 0.7 M parameters that learn on two CPU cores.

  rope_theta is 2 because nothing but M-RoPE tells it where a patch lies, and on grids
  three patches wide larger bases leave the w axis blind (measured: with 10 learning did
  not start in 250 steps, with 2 it did).
  """
  vision = VisionConfig(
    width=64, depth=2, heads=4, mlp=160, out_width=128, fullatt=(1,)
  )
  text = TextConfig(
    vocab=vocab_size, width=128, depth=2, heads=4, kv_heads=2, mlp=320,
    mrope_section=(4, 6, 6), rope_theta=2.0, max_positions=4096,
  )  # fmt: skip
  return ModelConfig(
    vision, text, **{"scan_layers": False, "logp_chunk": 16_384, **fields}
  )


# Published config.json files.  The two large ones have a wider vision MLP (3456, as in
# the technical report; 3b and 7b were released with 3420).
PRESETS: dict[str, ModelConfig] = {
  "tiny": tiny(512),
  "3b": ModelConfig(
    VisionConfig(out_width=2048),
    TextConfig(151_936, 2048, 36, 16, 2, 11_008, tied=True),
  ),
  "7b": ModelConfig(),
  "32b": ModelConfig(
    VisionConfig(mlp=3456, out_width=5120),
    TextConfig(152_064, 5120, 64, 40, 8, 27_648),
  ),
  "72b": ModelConfig(
    VisionConfig(mlp=3456, out_width=8192),
    TextConfig(152_064, 8192, 80, 64, 8, 29_568),
  ),
}


# ---- config.json ---------------------------------------------------------------------


def from_hf(hf: dict[str, Any], **fields: Any) -> ModelConfig:
  """From the parsed config.json: the flat one of 2025 or today's nested one.

  Args:
    hf: the dict; not changed.
    **fields: runtime fields of `ModelConfig`, such as dtype.
  """
  _require(hf, "model_type", ("qwen2_5_vl",), default=None)
  if "quantization_config" in hf:
    raise ValueError(
      "config.json has a quantization_config; quantised weights are not implemented. "
      "Import the unquantised checkpoint."
    )
  text = {**hf, **hf.get("text_config", {})}
  vision = hf.get("vision_config", {})

  _require(text, "hidden_act", ("silu",))
  _require(text, "use_sliding_window", (False, None))
  _require(text, "attention_dropout", (0, None))
  kinds = set(text.get("layer_types") or ["full_attention"])
  if kinds != {"full_attention"}:
    raise ValueError(
      f"text layer_types are {sorted(kinds)}; only full_attention is implemented."
    )
  kinds, known = ("default", "mrope", "yarn"), {"mrope_section", *YARN}
  rope = _rope(text, kinds, known, theta=1_000_000.0)
  if "mrope_section" not in rope:
    raise ValueError(
      f"config.json has no mrope_section in rope_scaling or rope_parameters ({rope}); "
      "a Qwen2.5-VL names one, such as [16, 24, 24]."
    )
  _require(vision, "hidden_act", ("silu",))
  _require(vision, "in_channels", (3,))
  _require(vision, "in_chans", (3,))
  vision_rope = _rope(vision, ("axial", "default"), set(), theta=10_000.0)

  def get(section: dict[str, Any], key: str, default: Any = None) -> Any:
    value = section.get(key, default)
    if value is None:
      raise ValueError(f"config.json lacks {key!r}.")
    return value

  v, t = VisionConfig(), TextConfig()
  heads = get(text, "num_attention_heads")
  head_dim = text.get("head_dim")
  if head_dim not in (None, get(text, "hidden_size") // heads):
    raise ValueError(
      f"head_dim is {head_dim}; only hidden_size / num_attention_heads is implemented."
    )
  eos = get(text, "eos_token_id", 151_645)
  return ModelConfig(
    vision=VisionConfig(
      width=get(vision, "hidden_size", v.width),
      depth=get(vision, "depth", v.depth),
      heads=get(vision, "num_heads", v.heads),
      mlp=get(vision, "intermediate_size", v.mlp),
      out_width=get(vision, "out_hidden_size", v.out_width),
      patch=get(vision, "patch_size", v.patch),
      temporal=get(vision, "temporal_patch_size", v.temporal),
      merge=get(vision, "spatial_merge_size", v.merge),
      window=get(vision, "window_size", v.window),
      fullatt=tuple(get(vision, "fullatt_block_indexes", v.fullatt)),
      rope_theta=float(vision_rope["rope_theta"]),
      # The config class of transformers says 4; the published files say 2.
      tokens_per_second=float(get(vision, "tokens_per_second", 4)),
    ),
    text=TextConfig(
      vocab=get(text, "vocab_size"),
      width=get(text, "hidden_size"),
      depth=get(text, "num_hidden_layers"),
      heads=heads,
      kv_heads=text.get("num_key_value_heads") or heads,
      mlp=get(text, "intermediate_size"),
      mrope_section=tuple(rope["mrope_section"]),
      rope_theta=float(rope["rope_theta"]),
      yarn=_yarn(rope),
      # transformers' class default is 1e-5; the published files all say 1e-6.
      norm_eps=float(get(text, "rms_norm_eps", 1e-5)),
      # Older v5 files keep the flag in text_config.
      tied=bool(
        hf.get("tie_word_embeddings") or text.get("tie_word_embeddings") or False
      ),
      max_positions=get(text, "max_position_embeddings", t.max_positions),
    ),
    image_token=get(hf, "image_token_id", 151_655),
    video_token=get(hf, "video_token_id", 151_656),
    vision_start=get(hf, "vision_start_token_id", 151_652),
    vision_end=get(hf, "vision_end_token_id", 151_653),
    bos_token=get(text, "bos_token_id", 151_643),
    eos_token=eos[0] if isinstance(eos, list) else eos,
    **fields,
  )


def to_hf(config: ModelConfig) -> dict[str, Any]:
  """config.json in the flat form of 2025, which transformers 4.49 to 5.23 reads.

  `from_hf(to_hf(c))` gives c back, but for the runtime fields.
  """
  v, t = config.vision, config.text
  vision = {
    "model_type": "qwen2_5_vl",
    "depth": v.depth,
    "hidden_act": "silu",
    "hidden_size": v.width,
    "intermediate_size": v.mlp,
    "num_heads": v.heads,
    "in_channels": 3,
    "in_chans": 3,
    "out_hidden_size": v.out_width,
    "patch_size": v.patch,
    "spatial_patch_size": v.patch,
    "spatial_merge_size": v.merge,
    "temporal_patch_size": v.temporal,
    "window_size": v.window,
    "fullatt_block_indexes": list(v.fullatt),
    "tokens_per_second": _whole(v.tokens_per_second),
  }
  if v.rope_theta != VisionConfig.rope_theta:  # only transformers 5 can say it
    vision["rope_parameters"] = {"rope_type": "axial", "rope_theta": v.rope_theta}
  return {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "vocab_size": t.vocab,
    "hidden_size": t.width,
    "intermediate_size": t.mlp,
    "num_hidden_layers": t.depth,
    "num_attention_heads": t.heads,
    "num_key_value_heads": t.kv_heads,
    "hidden_act": "silu",
    "max_position_embeddings": t.max_positions,
    "rms_norm_eps": t.norm_eps,
    "rope_theta": t.rope_theta,
    "rope_scaling": _rope_scaling(t),
    "use_sliding_window": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": t.tied,
    "torch_dtype": "bfloat16" if config.dtype == "bfloat16" else "float32",
    "use_cache": True,
    "bos_token_id": config.bos_token,
    "eos_token_id": config.eos_token,
    "image_token_id": config.image_token,
    "video_token_id": config.video_token,
    "vision_start_token_id": config.vision_start,
    "vision_end_token_id": config.vision_end,
    "vision_config": vision,
  }


# Fields of rope_scaling and ours.
YARN = {
  "factor": "factor",
  "original_max_position_embeddings": "original",
  "beta_fast": "fast",
  "beta_slow": "slow",
  "attention_factor": "attention",
  "truncate": "truncate",
}


def _yarn(rope: dict[str, Any]) -> Yarn | None:
  """That of rotary parameters; transformers' `_compute_yarn_parameters` reads the same."""
  if "yarn" not in (rope.get("type"), rope.get("rope_type")):
    return None
  found = {ours: rope[k] for k, ours in YARN.items() if rope.get(k) is not None}
  if missing := [
    k for k in ("factor", "original_max_position_embeddings") if k not in rope
  ]:
    raise ValueError(f"config.json asks for yarn and lacks {', '.join(missing)}.")
  if "attention" not in found:
    found["attention"] = 0.1 * math.log(max(found["factor"], 1.0)) + 1.0
  kinds = {"original": int, "truncate": bool}
  return Yarn(**{k: kinds.get(k, float)(v) for k, v in found.items()})


def _rope_scaling(t: TextConfig) -> dict[str, Any]:
  section = {"mrope_section": list(t.mrope_section)}
  if t.yarn is None:
    return {"type": "mrope"} | section
  return {"type": "yarn", **section, **{k: getattr(t.yarn, v) for k, v in YARN.items()}}


def _require(
  section: dict[str, Any], key: str, allowed: tuple[Any, ...], default: Any = ...
) -> None:
  """Refuses a value we do not implement; a missing key passes if it has no default."""
  value = section.get(key, default)
  if value is not ... and value not in allowed:
    raise ValueError(
      f"config.json says {key}={value!r}; implemented: "
      f"{', '.join(repr(a) for a in allowed)}."
    )


def _rope(
  section: dict[str, Any], types: tuple[str, ...], extra: set[str], theta: float
) -> dict[str, Any]:
  """The rotary parameters, wherever the file keeps them; unknown ones are refused."""
  rope: dict[str, Any] = {"rope_theta": section.get("rope_theta") or theta}
  for key in ("rope_scaling", "rope_parameters"):
    rope |= section.get(key) or {}
  for key in ("type", "rope_type"):
    _require(rope, key, types)
  unknown = set(rope) - {"type", "rope_type", "rope_theta"} - extra
  if unknown:
    raise ValueError(
      f"config.json has rotary parameters {sorted(unknown)}; implemented: "
      f"{sorted({'type', 'rope_type', 'rope_theta'} | extra)}."
    )
  return rope


def _whole(x: float) -> int | float:
  """2.0 as 2: transformers declares tokens_per_second an int."""
  return int(x) if x == int(x) else x
