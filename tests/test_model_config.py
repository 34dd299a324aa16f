"""model/config.py: config.json in and out, and what it refuses."""

import copy
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixel_jax import fields
from pixel_jax.model import config as config_lib

# The published config.json of Qwen2.5-VL-7B-Instruct (2025, flat).
FLAT_7B = {
  "architectures": ["Qwen2_5_VLForConditionalGeneration"],
  "attention_dropout": 0.0,
  "bos_token_id": 151643,
  "eos_token_id": 151645,
  "vision_start_token_id": 151652,
  "vision_end_token_id": 151653,
  "vision_token_id": 151654,
  "image_token_id": 151655,
  "video_token_id": 151656,
  "hidden_act": "silu",
  "hidden_size": 3584,
  "initializer_range": 0.02,
  "intermediate_size": 18944,
  "max_position_embeddings": 128000,
  "max_window_layers": 28,
  "model_type": "qwen2_5_vl",
  "num_attention_heads": 28,
  "num_hidden_layers": 28,
  "num_key_value_heads": 4,
  "rms_norm_eps": 1e-06,
  "rope_theta": 1000000.0,
  "sliding_window": 32768,
  "tie_word_embeddings": False,
  "torch_dtype": "bfloat16",
  "transformers_version": "4.41.2",
  "use_cache": True,
  "use_sliding_window": False,
  "vision_config": {
    "depth": 32,
    "hidden_act": "silu",
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_chans": 3,
    "out_hidden_size": 3584,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "spatial_patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 2,
    "temporal_patch_size": 2,
  },
  "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
  "vocab_size": 152064,
}


@st.composite
def configs(draw):
  head, kv, group = draw(st.sampled_from([8, 16, 32])), draw(st.integers(1, 3)), 2
  width = head * kv * group
  t = draw(st.integers(1, head // 2 - 2))
  h = draw(st.integers(1, head // 2 - t - 1))
  depth = draw(st.integers(1, 4))
  return config_lib.ModelConfig(
    config_lib.VisionConfig(
      width=16 * draw(st.integers(1, 4)),
      depth=depth,
      heads=draw(st.sampled_from([1, 2, 4])),
      mlp=draw(st.integers(1, 99)),
      out_width=width,
      window=28 * draw(st.integers(1, 4)),
      fullatt=tuple(sorted(draw(st.sets(st.integers(0, depth - 1))))),
      rope_theta=draw(st.sampled_from([10_000.0, 2.0])),
      tokens_per_second=draw(st.sampled_from([1.0, 2.0, 25.0])),
    ),
    config_lib.TextConfig(
      vocab=draw(st.integers(1, 999)),
      width=width,
      depth=draw(st.integers(1, 4)),
      heads=kv * group,
      kv_heads=kv,
      mlp=draw(st.integers(1, 99)),
      mrope_section=(t, h, head // 2 - t - h),
      rope_theta=draw(st.sampled_from([2.0, 1e6])),
      norm_eps=draw(st.sampled_from([1e-6, 1e-5])),
      tied=draw(st.booleans()),
    ),
    image_token=draw(st.integers(0, 99)),
  )


@given(configs())
def test_round_trip(config):
  assert config_lib.from_hf(config_lib.to_hf(config)) == config


@pytest.mark.parametrize("name", config_lib.PRESETS)
def test_round_trip_of_presets(name):
  config = config_lib.PRESETS[name]
  fields = dict(scan_layers=config.scan_layers, logp_chunk=config.logp_chunk)
  assert config_lib.from_hf(config_lib.to_hf(config), **fields) == config
  assert hash(config) == hash(copy.deepcopy(config))


def test_published_7b():
  assert config_lib.from_hf(FLAT_7B) == config_lib.PRESETS["7b"]
  assert config_lib.from_hf(FLAT_7B, dtype="bfloat16").dtype == "bfloat16"


@settings(deadline=None, max_examples=20)
@given(configs())
def test_nested_form_of_today(config):
  """What transformers 5 writes from our file reads as the same model."""
  transformers = pytest.importorskip("transformers")
  today = transformers.Qwen2_5_VLConfig(**config_lib.to_hf(config)).to_dict()
  assert "text_config" in today
  assert "hidden_size" not in today
  assert config_lib.from_hf(today) == config


def test_tied_flag_within_text_config():
  nested = {
    "model_type": "qwen2_5_vl",
    "text_config": {**FLAT_7B, "tie_word_embeddings": True},
    "vision_config": FLAT_7B["vision_config"],
  }
  assert config_lib.from_hf(nested).text.tied


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"model_type": "qwen2_vl"}, "qwen2_vl"),
    ({"use_sliding_window": True}, "use_sliding_window"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
    ({"hidden_act": "gelu"}, "gelu"),
    ({"attention_dropout": 0.1}, "attention_dropout"),
    ({"head_dim": 64}, "head_dim"),
    ({"num_key_value_heads": 5}, "kv heads"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
    ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 25]}}, "sum"),
    ({"rope_scaling": None}, "mrope_section"),
    (
      {"rope_scaling": {"mrope_section": [16, 24, 24], "mrope_interleaved": True}},
      "mrope_interleaved",
    ),
    ({"vision_config": {**FLAT_7B["vision_config"], "in_chans": 1}}, "in_chans"),
    ({"vision_config": {**FLAT_7B["vision_config"], "hidden_act": "x"}}, "hidden_act"),
    ({"vision_config": {**FLAT_7B["vision_config"], "window_size": 100}}, "100 px"),
    ({"vision_config": {**FLAT_7B["vision_config"], "out_hidden_size": 8}}, "width 8"),
    (
      {"vision_config": {**FLAT_7B["vision_config"], "fullatt_block_indexes": [32]}},
      "fullatt",
    ),
  ],
)
def test_refuses_what_is_not_implemented(changes, named):
  with pytest.raises(ValueError, match=named):
    config_lib.from_hf({**FLAT_7B, **changes})


def test_yarn_there_and_back():
  scaling = {
    "type": "yarn", "mrope_section": [16, 24, 24], "factor": 4,
    "original_max_position_embeddings": 32768,
  }  # fmt: skip
  read = config_lib.from_hf({**FLAT_7B, "rope_scaling": scaling})
  assert read.text.yarn == config_lib.Yarn(4.0, 32768, attention=0.1 * math.log(4) + 1)
  assert config_lib.from_hf(config_lib.to_hf(read)) == read
  del scaling["factor"]
  with pytest.raises(ValueError, match="yarn and lacks factor"):
    config_lib.from_hf({**FLAT_7B, "rope_scaling": scaling})


@pytest.mark.parametrize(
  "wrong", [{"dtype": "float16"}, {"remat": "some"}, {"logp_chunk": 0}]
)
def test_refuses_unknown_runtime_fields(wrong):
  with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.*expected"):
    fields.check(config_lib.ModelConfig, wrong)
