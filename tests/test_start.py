"""start: codecs; adapters kept, added or merged; the dtype of a base that stays frozen."""

import dataclasses
import hashlib
import json
import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from marks import rest_slow

from pixel_jax import parallel
from pixel_jax.chat import encode, tokenizer
from pixel_jax.configs import common
from pixel_jax.model import config as model_config
from pixel_jax.model import lora, qwen2_5_vl, table
from pixel_jax.run import checkpoint, lock, policies, settings, start
from pixel_jax.tools import convert

ROOT = pathlib.Path(__file__).resolve().parent.parent

BARE = model_config.tiny(64)
CONFIG = dataclasses.replace(BARE, lora=lora.Config(2, 3.0))


@pytest.fixture(scope="module")
def mesh():
  return parallel.make_mesh(data=1, fsdp=2, tensor=1)


def test_the_codec_of_a_workdir_and_of_a_checkpoint(tmp_path):
  tokenizer.make_tiny(tmp_path / "tokenizer", [])
  assert policies.open_codec(tmp_path).budgets == encode.RELEASED_BUDGETS
  section = common.codec("tiny")
  (tmp_path / "config.json").write_text(json.dumps({"codec": section}))
  codec = policies.open_codec(str(tmp_path))  # as json has it, tuples as lists
  assert (codec.budgets, codec.video_frames) == (section["budgets"], 8)
  assert codec.tokens_per_second == model_config.VisionConfig().tokens_per_second
  vision = dataclasses.replace(BARE.vision, tokens_per_second=4.0, window=56)
  other = dataclasses.replace(BARE, vision=vision)
  checkpoint.save_params(
    tmp_path, {"x": np.zeros(1)}, {"model": model_config.to_hf(other)}
  )
  codec = policies.open_codec(tmp_path, common.codec("7b"))
  assert codec.budgets == common.codec("7b")["budgets"]
  assert (codec.tokens_per_second, codec.window) == (4.0, 56)
  with pytest.raises(settings.ConfigError, match="config.codec: .*profile"):
    policies.open_codec(tmp_path, section | {"profile": "cleen"})
  with pytest.raises(tokenizer.TokenizerError, match="no tokenizer"):
    policies.open_codec(tmp_path / "none")


@pytest.mark.parametrize("half", rest_slow([True, False]))
def test_a_hugging_face_folder_is_what_import_makes_of_it(half, tmp_path, mesh):
  """The shipped base, for training in f32, to look at in bf16, which it is stored in."""
  dtype = "bfloat16" if half else "float32"
  adapters = None if half else common.lora()
  convert.import_hf(policies.TINY_BASE, tmp_path / "imported", dtype)

  def opened(init):
    model = common.model("tiny") | {"dtype": dtype}
    sections = dict(model=model, codec=common.codec("tiny"), adapters=adapters)
    workdir = tmp_path / init.rpartition("/")[2] / "run"
    return policies.open_policy(init, mesh=mesh, seed=0, workdir=workdir, **sections)

  one, other = opened("tiny_base"), opened(str(tmp_path / "imported"))
  want = table.unnest(other.params)
  check_equal(table.unnest(one.params), want, want)
  assert {x.dtype.name for x in jax.tree.leaves(one.params)} == {dtype}
  assert one.config == other.config and one.extra["model"] == other.extra["model"]
  text = "Which letter?\\boxed{"
  assert one.codec.tokenizer.encode(text) == other.codec.tokenizer.encode(text)
  assert policies.open_codec("tiny_base").window == one.codec.window


def test_the_readme_names_the_shipped_base():
  weights = (policies.TINY_BASE / "model.safetensors").read_bytes()
  assert hashlib.sha256(weights).hexdigest() in (ROOT / "README.md").read_text()


def saved(folder, config, dtype="float32"):
  """Parameters at `folder`, weights as `dtype`, adapters not zero."""
  params = qwen2_5_vl.init(config, jax.random.key(5))
  flat = {
    p: x + 0.1 if lora.is_adapter(p) else x.astype(dtype)
    for p, x in table.unnest(params).items()
  }
  checkpoint.save_params(folder, table.nest(flat), {})
  return flat


def load(folder, config, found, mesh, whole=False):
  params = policies.load(folder, config, found, mesh=mesh, seed=1, whole=whole)
  for path, x in table.unnest(policies.layout(config, mesh)).items():
    assert table.unnest(params)[path].sharding == x, path
  return table.unnest(params)


def check_equal(got, want, paths):
  for path in paths:
    assert got[path].dtype == want[path].dtype, path
    np.testing.assert_array_equal(got[path], want[path], err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_new_adapters_on_a_checkpoint_without(tmp_path, mesh, dtype):
  want = saved(tmp_path, BARE, dtype)
  got = load(tmp_path, CONFIG, None, mesh)
  check_equal(got, want, want)
  new = got.keys() - want.keys()
  assert new == {p for p in table.shapes(CONFIG) if lora.is_adapter(p)}
  for path in new:
    assert got[path].dtype == jnp.float32
    assert got[path].any() == path.endswith("/lora_a"), path


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_stored_adapters_are_kept(tmp_path, mesh, dtype):
  want = saved(tmp_path, CONFIG, dtype)
  got = load(tmp_path, CONFIG, CONFIG.lora, mesh)
  assert got.keys() == want.keys()
  check_equal(got, want, want)
  # The same matrices under another pattern.
  named = tuple(f"^{p}$" for p in table.adapted(CONFIG))
  other = dataclasses.replace(CONFIG, lora=lora.Config(2, 3.0, named))
  check_equal(load(tmp_path, other, CONFIG.lora, mesh), want, want)


@pytest.mark.parametrize("whole", [False, True])
def test_without_a_wish_for_adapters_they_are_merged(tmp_path, mesh, whole):
  want = saved(tmp_path, CONFIG)
  got = load(tmp_path, BARE, CONFIG.lora, mesh, whole)
  merged = table.unnest(qwen2_5_vl.merge(CONFIG, table.nest(want)))
  assert got.keys() == merged.keys() == table.shapes(BARE).keys()
  for path in merged:
    np.testing.assert_allclose(got[path], merged[path], rtol=0, atol=1e-6, err_msg=path)
  assert np.abs(got["text/blocks/q/w"] - want["text/blocks/q/w"]).max() > 1e-3


@pytest.mark.parametrize(
  "change", [dict(rank=4), dict(alpha=1.0), dict(targets=("/q",))]
)
def test_other_adapters_than_the_stored_ones_are_told(tmp_path, mesh, change):
  saved(tmp_path, CONFIG)
  other = dataclasses.replace(CONFIG, lora=dataclasses.replace(CONFIG.lora, **change))
  with pytest.raises(settings.ConfigError, match="rank=2, alpha=3.0, .*merge"):
    load(tmp_path, other, CONFIG.lora, mesh)


def test_a_half_precision_base_can_be_looked_at_but_not_trained(tmp_path, mesh):
  want = saved(tmp_path, BARE, "bfloat16")
  check_equal(load(tmp_path, BARE, None, mesh), want, want)
  with pytest.raises(settings.ConfigError, match=r"bfloat16 .*--config.lora.rank=32"):
    load(tmp_path, BARE, None, mesh, whole=True)


def test_another_config_is_told_field_by_field(tmp_path):
  """Nothing blocks a workdir in which nothing was trained."""

  def begin(**fields):
    section = ml_collections.ConfigDict({"lr": 0.1, "b1": 0.9} | fields)
    start.open_workdir(tmp_path, ml_collections.ConfigDict({"optim": section, "n": 1}))

  begin()
  (tmp_path / "checkpoints" / "1.partial").mkdir(parents=True)
  begin(lr=0.2)  # a start that failed before its first step
  (tmp_path / "checkpoints" / "1" / checkpoint.PARAMS).mkdir(parents=True)
  begin(lr=0.2)
  with pytest.raises(settings.ConfigError) as told:
    begin(lr=0.3, b2=0.5)
  assert "config.optim.lr was 0.2 and is 0.3" in str(told.value)
  assert "config.optim.b2 was None and is 0.5" in str(told.value)
  assert "b1" not in str(told.value)
  (tmp_path / "config.json").write_text('{"optim": ')
  with pytest.raises(settings.ConfigError, match=r"config.json is damaged .*Delete it"):
    begin(lr=0.2)
  (tmp_path / "config.json").unlink()
  begin(lr=0.2)
  lock.release()


def test_a_step_of_a_run_has_the_codec_of_the_run(tmp_path):
  """RUN/checkpoints/50 was opened with the released budgets, and saw other pictures."""
  budgets = {"crop": [784, 784], "frame": [784, 784], "image": [784, 1568],
             "video": [784, 784]}  # fmt: skip
  config = {"codec": {"profile": "released", "budgets": budgets}}
  (tmp_path / "config.json").write_text(json.dumps(config))
  (tmp_path / "checkpoints" / "50").mkdir(parents=True)
  section = policies.read_codec(tmp_path / "checkpoints" / "50")
  assert section == policies.read_codec(tmp_path)
  assert section["budgets"]["image"] == (784, 1568)
