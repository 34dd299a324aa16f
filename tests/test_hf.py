"""The table against the model; checkpoints in and out, bit for bit and by the slice."""

import dataclasses
import gc
import json
import math
import pathlib
import shutil
import tracemalloc

import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st
from marks import rest_slow
from safetensors.numpy import load_file, save_file

from pixel_jax import parallel
from pixel_jax.batch import Batch
from pixel_jax.model import config as model_config
from pixel_jax.model import hf, qwen2_5_vl, table
from pixel_jax.model.config import ModelConfig, TextConfig, VisionConfig
from pixel_jax.tools import golden_model, parity

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
VISION = VisionConfig(width=32, depth=4, heads=4, mlp=44, out_width=48, fullatt=(1, 3))
TEXT = TextConfig(
  vocab=96, width=48, depth=3, heads=4, kv_heads=2, mlp=72, mrope_section=(1, 2, 3)
)
CONFIG = ModelConfig(VISION, TEXT)
TIED = ModelConfig(VISION, dataclasses.replace(TEXT, tied=True))


def _state(config, seed=0, dtype=np.float32):
  """Hugging Face name -> random array."""
  rng = np.random.default_rng(seed)
  return {
    name: rng.standard_normal(shape).astype(dtype)
    for name, shape in table.names(config).items()
  }


def _write(folder, state, shards=1):
  """A checkpoint folder without config.json, with an index where there are shards."""
  folder.mkdir(parents=True, exist_ok=True)
  if shards == 1:
    save_file(state, folder / "model.safetensors")
    return folder
  weight_map = {}
  for i in range(shards):
    file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
    part = dict(list(state.items())[i::shards])  # blocks are spread over the files
    save_file(part, folder / file)
    weight_map |= dict.fromkeys(part, file)
  index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  return folder


def _read(folder):
  state = {}
  for file in folder.glob("*.safetensors"):
    state |= load_file(file)
  return state


def _check_equal(got, want):
  assert got.keys() == want.keys()
  for name in want:
    assert got[name].dtype == want[name].dtype, name
    np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def _in_memory(name):
  """The name that transformers 5 has for it in memory."""
  for hub, theirs in (
    ("model.", "model.language_model."),
    ("visual.", "model.visual."),
  ):
    if name.startswith(hub):
      return theirs + name[len(hub) :]
  return name


@pytest.fixture
def quick_compile():
  """Programs that run once: half the time to compile."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


# ---- The table -----------------------------------------------------------------------


@pytest.mark.parametrize("name", model_config.PRESETS)
def test_table_is_the_tree_of_the_model(name):
  config = model_config.PRESETS[name]
  model = table.unnest(qwen2_5_vl.abstract(config))
  assert {path: x.shape for path, x in model.items()} == table.shapes(config)
  assert hf.paths(config) == list(table.shapes(config))


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
def test_every_axis_has_a_name_with_a_rule(config):
  shapes = table.shapes(config)
  for path, axes in table.unnest(hf.logical_axes(config)).items():
    assert len(axes) == len(shapes[path]), path
    assert {a for a in axes if a} <= set(parallel.RULES), path
    if "/blocks/" in path:
      assert axes[0] == "layer", path


def test_num_parameters_of_the_hub():
  count = {
    name: sum(map(math.prod, table.names(config).values()))
    for name, config in model_config.PRESETS.items()
  }
  # Qwen2.5-VL-3B, -7B, -32B and -72B-Instruct, the total of their safetensors.
  assert count["3b"] == 3_754_622_976
  assert count["7b"] == 8_292_166_656
  assert count["32b"] == 33_452_718_336
  assert count["72b"] == 73_410_777_344


def test_transforms_by_formula():
  state = _state(CONFIG)
  params = jax.tree.map(np.asarray, hf.import_state(CONFIG, state))
  text, tower = params["text"]["blocks"], params["vision"]["blocks"]
  H, n, h, d = TEXT.head_dim, 2, 5, 7
  q = state["model.layers.1.self_attn.q_proj.weight"]
  assert text["q"]["w"][1, d, n, h] == q[n * H + h, d]
  o = state["model.layers.2.self_attn.o_proj.weight"]
  assert text["o"]["w"][2, n, h, d] == o[d, n * H + h]
  down = state["model.layers.0.mlp.down_proj.weight"]
  assert text["down"]["w"][0, 9, d] == down[d, 9]
  assert params["text"]["head"]["w"][d, 11] == state["lm_head.weight"][11, d]
  qkv = state["visual.blocks.3.attn.qkv.weight"]
  H = VISION.head_dim
  for part in range(3):
    got = tower["qkv"]["w"][3, d, part, n, h]
    assert got == qkv[part * VISION.width + n * H + h, d]
  patch = state["visual.patch_embed.proj.weight"]
  np.testing.assert_array_equal(params["vision"]["patch"]["w"][:, 4], patch[4].ravel())


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
def test_state_round_trip(config):
  state = _state(config)
  _check_equal(hf.export_state(config, hf.import_state(config, state)), state)


@hypothesis.given(st.data())
def test_any_slice_of_any_transform(data):
  """What a device asks for equals the slice of the whole, however axes are cut."""
  row = data.draw(st.sampled_from(table.rows(CONFIG)))
  tensor = np.arange(math.prod(table.hf_shape(CONFIG, row)), dtype=np.float32)
  tensor = tensor.reshape(table.hf_shape(CONFIG, row))
  shape = table.shape_of(CONFIG, row)[row.stacked :]
  cuts = st.integers(1, 4).flatmap(
    lambda n: st.tuples(st.just(n), st.integers(0, n - 1))
  )
  index = []
  for size in shape:
    n, i = data.draw(cuts)
    step = -(-size // n)
    low = min(i * step, size - 1)
    whole = data.draw(st.booleans())
    index.append(slice(None) if whole else slice(low, min(low + step, size)))
  everything = hf._read(CONFIG, row, "x", tensor, (slice(None),) * len(shape))
  part = hf._read(CONFIG, row, "x", tensor, tuple(index))
  np.testing.assert_array_equal(part, everything[tuple(index)])


# ---- Import --------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("rename", [str, _in_memory], ids=["hub", "in-memory"])
def test_layouts_of_files(tmp_path, shards, rename):
  state = _state(CONFIG)
  _write(tmp_path, {rename(k): v for k, v in state.items()}, shards)
  params = hf.import_checkpoint(tmp_path, CONFIG)
  assert jax.tree.structure(params) == jax.tree.structure(qwen2_5_vl.abstract(CONFIG))
  _check_equal(hf.export_state(CONFIG, params), state)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_is_held_exactly(tmp_path, dtype):
  state = _state(CONFIG, dtype=dtype)
  params = hf.import_checkpoint(_write(tmp_path, state), CONFIG)
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
  back = {k: v.astype(dtype) for k, v in hf.export_state(CONFIG, params).items()}
  _check_equal(back, state)


def test_import_in_bfloat16(tmp_path):
  state = _state(CONFIG, dtype=ml_dtypes.bfloat16)
  params = hf.import_checkpoint(_write(tmp_path, state), CONFIG, dtype="bfloat16")
  _check_equal(hf.export_state(CONFIG, params), state)


def test_tied_head(tmp_path):
  state = _state(TIED)
  state["lm_head.weight"] = state["model.embed_tokens.weight"].copy()
  params = hf.import_checkpoint(_write(tmp_path / "repeated", state), TIED)
  assert "head" not in params["text"]
  state["lm_head.weight"][0, 0] += 1
  with pytest.raises(ValueError, match=r"1 unexpected: lm_head\.weight"):
    hf.import_checkpoint(_write(tmp_path / "other", state), TIED)
  del state["lm_head.weight"]
  with pytest.raises(ValueError, match=r"1 missing: lm_head\.weight"):
    hf.import_checkpoint(_write(tmp_path / "none", state), CONFIG)


MESHES = rest_slow([((2, 2, 2),), ((1, 2, 1),), ((1, 8, 1),), ((1, 1, 4),)])


@pytest.mark.parametrize(("mesh",), MESHES)
def test_sharded_equals_unsharded(tmp_path, mesh):
  state = _state(CONFIG)
  mesh = parallel.make_mesh(*mesh)
  shardings = parallel.shardings(
    mesh, hf.logical_axes(CONFIG), qwen2_5_vl.abstract(CONFIG)
  )
  params = hf.import_checkpoint(_write(tmp_path, state), CONFIG, shardings)
  jax.tree.map(lambda x, s: _check_placed(x, s), params, shardings)
  _check_equal(hf.export_state(CONFIG, params), state)
  cut = params["text"]["blocks"]["gate"]["w"]
  whole = mesh.shape["fsdp"] * mesh.shape["tensor"]
  assert cut.addressable_shards[0].data.size * whole == cut.size


def _check_placed(x, sharding):
  assert x.sharding.is_equivalent_to(sharding, x.ndim), (x.sharding, sharding)


class _Counted:
  """An array that notes how many numbers were read of it."""

  def __init__(self, array, reads):
    self.array, self.shape, self.reads = array, array.shape, reads

  def __getitem__(self, index):
    part = self.array[index]
    self.reads.append(part.size)
    return part


@pytest.mark.slow
def test_devices_read_only_their_slices():
  reads = []
  state = {k: _Counted(v, reads) for k, v in _state(CONFIG).items()}
  mesh = parallel.make_mesh(1, 4, 1)
  shardings = parallel.shardings(
    mesh, hf.logical_axes(CONFIG), qwen2_5_vl.abstract(CONFIG)
  )
  hf.import_state(CONFIG, state, shardings)
  total = sum(math.prod(s) for s in table.names(CONFIG).values())
  assert sum(reads) == total  # each number once, although four devices ask
  largest = max(math.prod(s) for s in table.names(CONFIG).values())
  assert max(reads) <= largest / 4


@pytest.mark.slow
def test_host_holds_two_tensors_at_most(tmp_path):
  """A stack of 24 layers passes through the host one layer at a time."""
  deep = dataclasses.replace(
    TEXT, depth=24, width=192, mlp=1024, mrope_section=(8, 8, 8)
  )
  config = ModelConfig(dataclasses.replace(VISION, out_width=192), deep)
  _write(tmp_path, _state(config), shards=4)
  layer = 4 * 192 * 1024
  largest = max(4 * math.prod(s) for s in table.names(config).values())
  assert largest == layer
  hf.import_checkpoint(tmp_path, config)  # compiles
  gc.collect()
  tracemalloc.start()
  params = hf.import_checkpoint(tmp_path, config)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  stack = params["text"]["blocks"]["gate"]["w"].nbytes
  assert stack == 24 * layer
  # The bytes read, their transpose, and one on its way to the device.
  assert peak < 4 * layer, f"{peak / layer:.1f} tensors"


def test_progress_ends_at_the_total(tmp_path):
  seen = []
  _write(tmp_path, _state(CONFIG))
  hf.import_checkpoint(tmp_path, CONFIG, progress=lambda *x: seen.append(x))
  done = [d for d, _ in seen]
  total = 4 * sum(math.prod(s) for s in table.names(CONFIG).values())
  assert done == sorted(done) and seen[-1] == (total, total)


# ---- What is refused -----------------------------------------------------------------


def _refused(tmp_path, state, match, config=CONFIG):
  with pytest.raises(ValueError, match=match) as error:
    hf.import_checkpoint(_write(tmp_path, state), config)
  return str(error.value)


def test_wrong_prefix_names_what_is_wrong(tmp_path):
  # transformers only logs this one and leaves the weights random (oracles.md 1.6).
  state = {
    f"language_model.{k}" if k.startswith("model.") else k: v
    for k, v in _state(CONFIG).items()
  }
  count = sum(k.startswith("language_model.") for k in state)
  text = _refused(tmp_path, state, f"{count} missing: model.embed_tokens.weight")
  assert f"{count} unexpected: language_model.model.embed_tokens.weight" in text
  assert f"... ({count - 10} more)" in text
  assert text.count("language_model.model.") == 10
  assert "save_pretrained" in text


def test_shapes_of_another_model(tmp_path):
  config = ModelConfig(VISION, dataclasses.replace(TEXT, mlp=80))
  text = _refused(tmp_path, _state(config), "9 of another shape")
  assert "model.layers.0.mlp.gate_proj.weight [80, 48], not [72, 48]" in text


def test_a_layer_too_many(tmp_path):
  config = ModelConfig(VISION, dataclasses.replace(TEXT, depth=4))
  _refused(tmp_path, _state(config), r"12 unexpected: model\.layers\.3\.")


def test_a_tensor_under_two_names(tmp_path):
  state = _state(CONFIG)
  state["model.language_model.norm.weight"] = state["model.norm.weight"] + 1
  _refused(tmp_path, state, r"there under two names: model\.(language_model\.)?norm")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_named(tmp_path, dtype, bad):
  state = _state(CONFIG, dtype=dtype)
  state["model.layers.1.mlp.up_proj.weight"][5, 7] = bad
  _refused(
    tmp_path, state, r"model\.layers\.1\.mlp\.up_proj\.weight holds .*not finite"
  )


def test_buffers_that_were_stored_are_passed_over(tmp_path):
  state = _state(CONFIG)
  want = table.unnest(hf.import_checkpoint(_write(tmp_path / "bare", state), CONFIG))
  state["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(6, np.float32)
  state["visual.rotary_pos_emb.inv_freq"] = np.ones(6, np.float32)
  got = table.unnest(hf.import_checkpoint(_write(tmp_path / "more", state), CONFIG))
  _check_equal(got, want)


def test_quantized_weights(tmp_path):
  state = _state(CONFIG)
  state["model.norm.weight"] = np.ones(48, np.int8)
  _refused(tmp_path, state, "has dtype I8; allowed: F32, BF16, F16")


def test_missing_file_of_an_index(tmp_path):
  _write(tmp_path, _state(CONFIG), shards=3)
  (tmp_path / "model-00002-of-00003.safetensors").unlink()
  with pytest.raises(FileNotFoundError, match=r"lacks model-00002-of-00003"):
    hf.import_checkpoint(tmp_path, CONFIG)


def test_git_lfs_pointer(tmp_path):
  pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
  (tmp_path / "model.safetensors").write_text(pointer)
  with pytest.raises(ValueError, match="git-lfs"):
    hf.import_checkpoint(tmp_path, CONFIG)


def test_folder_without_weights_or_config(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"has no \*\.safetensors"):
    hf.import_checkpoint(tmp_path, CONFIG)
  with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
    hf.read_config(tmp_path)


# ---- Export --------------------------------------------------------------------------


def test_export_in_shards(tmp_path):
  state = _state(CONFIG, dtype=ml_dtypes.bfloat16)
  params = hf.import_checkpoint(_write(tmp_path / "in", state), CONFIG)
  seen = []
  hf.export_checkpoint(
    CONFIG, params, tmp_path / "out", shard_bytes=100_000,
    progress=lambda *x: seen.append(x),
  )  # fmt: skip
  files = sorted((tmp_path / "out").glob("*.safetensors"))
  assert (
    len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
  )
  for file in files:
    tensors = load_file(file)
    assert sum(x.nbytes for x in tensors.values()) <= 100_000 or len(tensors) == 1
    assert file.stat().st_mode & 0o044  # safetensors alone would make it private
  index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
  assert index["weight_map"] == {
    name: file.name for file in files for name in load_file(file)
  }
  size = sum(x.nbytes for x in state.values())
  assert index["metadata"]["total_size"] == size and seen[-1] == (size, size)
  _check_equal(_read(tmp_path / "out"), state)
  described = hf.read_config(tmp_path / "out")
  assert model_config.from_hf(described) == CONFIG
  assert described["torch_dtype"] == "bfloat16"


def test_one_file_has_the_usual_name(tmp_path):
  params = hf.import_state(TIED, _state(TIED))
  hf.export_checkpoint(TIED, params, tmp_path, dtype="float32")
  names = sorted(p.name for p in tmp_path.iterdir())
  assert names == ["config.json", "model.safetensors"]
  _check_equal(_read(tmp_path), _state(TIED))


def test_export_refuses(tmp_path):
  params = hf.import_state(CONFIG, _state(CONFIG))
  with pytest.raises(ValueError, match="allowed: 'bfloat16', 'float32'"):
    hf.export_checkpoint(CONFIG, params, tmp_path, dtype="int8")
  with pytest.raises(ValueError, match=r"differ in text/head/w"):
    hf.export_checkpoint(TIED, params, tmp_path / "other")
  adapted = jax.tree.map(lambda x: x, params)
  adapted["text"]["blocks"]["q"]["lora_a"] = jnp.zeros(3)
  with pytest.raises(ValueError, match=r"text/blocks/q/lora_a.*Merge adapters"):
    hf.export_state(CONFIG, adapted)
  _write(tmp_path / "full", _state(CONFIG))
  with pytest.raises(FileExistsError, match="already holds safetensors"):
    hf.export_checkpoint(CONFIG, params, tmp_path / "full")


# ---- Against transformers ------------------------------------------------------------


def test_golden_stages(quick_compile):
  """Every block, logits, log-probs, gradients and decoding, without torch."""
  golden = dict(np.load(GOLDEN / "model.npz"))
  config = model_config.from_hf(hf.read_config(GOLDEN / "model"))
  params = hf.import_checkpoint(GOLDEN / "model", config)
  batch = Batch(
    **{
      k.removeprefix("batch/"): jnp.asarray(golden.pop(k))
      for k in list(golden)
      if k.startswith("batch/")
    }
  )
  versions = json.loads(golden.pop("versions").tobytes())
  assert versions["transformers"].startswith("5.")
  ours = parity.run_jax(config, params, batch, golden["decode/tokens"])
  del ours["pixels"]
  keep = golden_model.GRADIENT
  for name in [k for k in ours if k.startswith("gradient ")]:
    x = ours[name]
    ours[name] = np.append(x.reshape(-1)[:keep], np.linalg.norm(x))
  rows = parity.compare(ours, golden, tolerance=5e-5)
  assert len(rows) == len(golden)
  assert all(r["ok"] for r in rows), parity.table(rows)


@pytest.mark.torch
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("hub", [True, False], ids=["hub", "in-memory"])
def test_bytes_of_transformers_round_trip(tmp_path, tied, hub):
  pytest.importorskip("torch")
  model = golden_model.torch_model(tied)
  saved, out = tmp_path / "theirs", tmp_path / "ours"
  model.save_pretrained(saved, save_original_format=hub, max_shard_size="200KB")
  config = model_config.from_hf(hf.read_config(saved))
  assert config.text.tied == tied
  params = hf.import_checkpoint(saved, config)
  hf.export_checkpoint(config, params, out, dtype="float32")
  theirs = {hf.hub_name(k): v for k, v in _read(saved).items()}
  _check_equal(_read(out), theirs)


@pytest.mark.torch
def test_transformers_loads_an_export(tmp_path):
  torch = pytest.importorskip("torch")
  model = golden_model.torch_model()
  config = model_config.from_hf(model.config.to_dict())
  state = {k: v.numpy() for k, v in model.state_dict().items()}
  hf.export_checkpoint(config, hf.import_state(config, state), tmp_path, "float32")
  again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
  assert not any(info.values()), info
  ids = torch.arange(2, 40)[None]
  with torch.no_grad():
    np.testing.assert_array_equal(again(ids).logits, model(ids).logits)


# The config.json of Qwen/Qwen2.5-VL-7B-Instruct as published in 2025, with the numbers
# of the golden model.
FLAT = {
  "architectures": ["Qwen2_5_VLForConditionalGeneration"],
  "attention_dropout": 0.0,
  "bos_token_id": 0,
  "eos_token_id": 1,
  "vision_start_token_id": 292,
  "vision_end_token_id": 293,
  "vision_token_id": 294,
  "image_token_id": 290,
  "video_token_id": 291,
  "hidden_act": "silu",
  "hidden_size": 48,
  "initializer_range": 0.02,
  "intermediate_size": 72,
  "max_position_embeddings": 128000,
  "max_window_layers": 28,
  "model_type": "qwen2_5_vl",
  "num_attention_heads": 4,
  "num_hidden_layers": 2,
  "num_key_value_heads": 2,
  "rms_norm_eps": 1e-06,
  "rope_theta": 1000.0,
  "sliding_window": 32768,
  "tie_word_embeddings": False,
  "torch_dtype": "bfloat16",
  "transformers_version": "4.41.2",
  "use_cache": True,
  "use_sliding_window": False,
  "vision_config": {
    "depth": 4,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_heads": 2,
    "in_chans": 3,
    "out_hidden_size": 48,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "spatial_patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [1, 3],
    "tokens_per_second": 2,
    "temporal_patch_size": 2,
  },
  "rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 3]},
  "vocab_size": 299,
}


def test_flat_and_nested_config_are_one():
  nested = model_config.from_hf(hf.read_config(GOLDEN / "model"))
  flat = model_config.from_hf(FLAT)
  limit = dict(max_positions=0)
  assert dataclasses.replace(
    flat, text=dataclasses.replace(flat.text, **limit)
  ) == dataclasses.replace(nested, text=dataclasses.replace(nested.text, **limit))


@pytest.mark.torch
def test_transformers_reads_the_flat_config_alike(tmp_path):
  """The golden weights under the 2025 config give the golden logits in transformers."""
  pytest.importorskip("torch")
  for file in (GOLDEN / "model").glob("*.safetensors*"):
    shutil.copy(file, tmp_path)
  (tmp_path / "config.json").write_text(json.dumps(FLAT))
  config = model_config.from_hf(FLAT)
  sample = parity.make_sample(config, sizes=((150, 95), (56, 56)), text=5)
  theirs = parity.run_torch(tmp_path, sample, num_tokens=2, gradients=False)
  golden = np.load(GOLDEN / "model.npz")
  np.testing.assert_allclose(theirs["logits"], golden["logits"], rtol=0, atol=1e-5)
