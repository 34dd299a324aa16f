"""Adapters as PEFT writes them: names, layout, and what a torch model makes of them.

`peft` itself is not needed: its formula, y = W x + alpha / r * B (A x), is built here
by hand in torch, on modules found as PEFT finds them (re.fullmatch of target_modules).
"""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_model import CONFIGS, PIECES, alone, close, example, inputs, noisy, oracle

from pixel_jax.model import hf, lora, peft, table
from pixel_jax.model import qwen2_5_vl as model

EVERYTHING = ("^text/", "^vision/")
forward = jax.jit(model.forward, static_argnums=0)


def adapted(config, targets=(lora.TEXT,), rank=4, alpha=6.0):
  return dataclasses.replace(config, lora=lora.Config(rank, alpha, targets))


def leaves(params):
  flat = table.unnest(params)
  return {p: np.asarray(x) for p, x in flat.items() if lora.is_adapter(p)}


def check_equal(got, want):
  assert got.keys() == want.keys()
  for path in want:
    np.testing.assert_array_equal(got[path], want[path], err_msg=path)


def rewrite(folder, rename=str, dtype=np.float32, **fields):
  """The adapter in `folder` under other names, dtype or config fields."""
  file = folder / "adapter_model.safetensors"
  save_file({rename(k): x.astype(dtype) for k, x in load_file(file).items()}, file)
  path = folder / "adapter_config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture
def written(tmp_path):
  """A tiny model with adapters on all text layers, and its folder in PEFT's layout."""
  config = adapted(CONFIGS["tiny"])
  params = noisy(config)
  peft.write(config, params, tmp_path / "adapter", base="Qwen/Qwen2.5-VL-7B-Instruct")
  return config, params, tmp_path / "adapter"


# ---- Out -----------------------------------------------------------------------------


def test_names_and_layout(written):
  config, params, folder = written
  assert {p.name for p in folder.iterdir()} == {
    "adapter_config.json", "adapter_model.safetensors",
  }  # fmt: skip
  tensors = load_file(folder / "adapter_model.safetensors")
  layer = "base_model.model.model.language_model.layers"
  parts = [f"self_attn.{x}_proj" for x in "qkvo"]
  parts += [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
  assert tensors.keys() == {
    f"{layer}.{i}.{part}.lora_{x}.weight"
    for i in (0, 1)
    for part in parts
    for x in "AB"
  }
  blocks, H = params["text"]["blocks"], config.text.head_dim
  a = tensors[f"{layer}.1.self_attn.q_proj.lora_A.weight"]
  b = tensors[f"{layer}.1.self_attn.q_proj.lora_B.weight"]
  assert a.shape == (4, 128) and b.shape == (128, 4)
  assert a[3, 5] == blocks["q"]["lora_a"][1, 5, 3]
  assert b[2 * H + 7, 3] == blocks["q"]["lora_b"][1, 3, 2, 7]
  a = tensors[f"{layer}.0.self_attn.o_proj.lora_A.weight"]
  assert a[3, 2 * H + 7] == blocks["o"]["lora_a"][0, 2, 7, 3]
  assert tensors[f"{layer}.0.mlp.down_proj.lora_A.weight"].shape == (4, 320)
  assert all(x.dtype == np.float32 for x in tensors.values())


def test_config_json(written):
  _, _, folder = written
  described = json.loads((folder / "adapter_config.json").read_text())
  assert described["peft_type"] == "LORA" and described["task_type"] == "CAUSAL_LM"
  assert (described["r"], described["lora_alpha"]) == (4, 6)
  assert described["base_model_name_or_path"] == "Qwen/Qwen2.5-VL-7B-Instruct"
  assert described["bias"] == "none" and described["lora_dropout"] == 0.0
  pattern = described["target_modules"]
  for name in (
    "model.language_model.layers.0.self_attn.q_proj",
    "model.language_model.layers.27.mlp.down_proj",
    "model.layers.3.mlp.gate_proj",  # transformers 4.49 to 4.51
  ):
    assert re.fullmatch(pattern, name), name
  for name in (
    "model.visual.blocks.0.mlp.gate_proj",
    "visual.blocks.0.mlp.down_proj",
    "model.language_model.layers.0.self_attn.q_proj.lora_A",
    "lm_head",
  ):
    assert not re.fullmatch(pattern, name), name


def test_a_model_without_adapters_is_told(tmp_path):
  config = CONFIGS["tiny"]
  with pytest.raises(ValueError, match=r"has no adapters.*config\.lora\.rank"):
    peft.write(config, noisy(config), tmp_path / "out")


# ---- In ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
  "targets", [(lora.TEXT,), EVERYTHING, ("^text/blocks/[qv]$",)], ids=str
)
def test_there_and_back(name, targets, tmp_path):
  config = adapted(CONFIGS[name], targets, rank=3)
  params = noisy(config)
  peft.write(config, params, tmp_path)
  found, back = peft.read(tmp_path, config.merged)
  assert (found.rank, found.alpha) == (3, 6.0)
  again = dataclasses.replace(config, lora=found)
  assert table.adapted(again) == table.adapted(config)
  check_equal(leaves(back), leaves(params))
  assert table.unnest(back).keys() == leaves(params).keys()


def flat(name):
  """As transformers 4.49 to 4.51 had it."""
  name = name.replace("model.language_model.", "model.")
  return name.replace("base_model.model.model.visual.", "base_model.model.visual.")


def test_older_names(tmp_path):
  config = adapted(CONFIGS["tiny"], EVERYTHING)
  params = noisy(config)
  peft.write(config, params, tmp_path)
  rewrite(tmp_path, flat)
  names = load_file(tmp_path / "adapter_model.safetensors")
  assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names
  assert "base_model.model.visual.blocks.0.attn.qkv.lora_B.weight" in names
  check_equal(leaves(peft.read(tmp_path, config)[1]), leaves(params))


def test_half_precision(written):
  config, params, folder = written
  rewrite(folder, dtype=ml_dtypes.bfloat16)
  _, back = peft.read(folder, config)
  want = {p: x.astype(ml_dtypes.bfloat16) for p, x in leaves(params).items()}
  check_equal(leaves(back), {p: x.astype(np.float32) for p, x in want.items()})


def test_rslora_divides_by_the_root_of_the_rank(written):
  config, _, folder = written
  rewrite(folder, use_rslora=True)
  assert peft.read(folder, config)[0].scale == pytest.approx(6.0 / 4**0.5)


@pytest.mark.parametrize(
  "fields, told",
  [
    (dict(use_dora=True), "use_dora=True"),
    (dict(bias="all"), "bias='all'"),
    (dict(rank_pattern={"q_proj": 8}), "rank_pattern"),
    (dict(modules_to_save=["lm_head"]), "modules_to_save"),
    (dict(peft_type="LOHA"), "peft_type='LOHA'"),
    (dict(r=8), "of another shape"),
  ],
)
def test_what_is_not_implemented_is_refused(written, fields, told):
  config, _, folder = written
  rewrite(folder, **fields)
  with pytest.raises(ValueError, match=re.escape(told)):
    peft.read(folder, config)


def test_names_that_do_not_fit_are_refused(written):
  config, _, folder = written
  whole = load_file(folder / "adapter_model.safetensors")
  save = lambda x: save_file(x, folder / "adapter_model.safetensors")  # noqa: E731
  save({k: x for k, x in whole.items() if "layers.1.mlp.up" not in k})
  with pytest.raises(ValueError, match=r"2 missing: model\.layers\.1\.mlp\.up_proj"):
    peft.read(folder, config)
  save({f"model.{k}": x for k, x in whole.items()})
  with pytest.raises(ValueError, match="adapts no linear layer"):
    peft.read(folder, config)
  odd = {"base_model.model.lm_head.lora_A.weight": np.zeros((4, 128), np.float32)}
  save(whole | odd)
  with pytest.raises(ValueError, match=r"1 unexpected: lm_head\.lora_A\.weight"):
    peft.read(folder, config)
  (folder / "adapter_config.json").unlink()
  with pytest.raises(FileNotFoundError, match="save_pretrained"):
    peft.read(folder, config)


# ---- Merged export -------------------------------------------------------------------


def test_export_merges(written):
  """W + alpha / r * B A of the files, in HF's layout; rounded to bf16 once."""
  config, params, folder = written
  bare = table.nest(
    {p: x for p, x in table.unnest(params).items() if not lora.is_adapter(p)}
  )
  want = hf.export_state(config.merged, bare)
  for name, a in load_file(folder / "adapter_model.safetensors").items():
    if ".lora_A." in name:
      b = load_file(folder / "adapter_model.safetensors")[name.replace("_A.", "_B.")]
      hub = hf.hub_name(name.removeprefix(peft.PREFIX)).replace("lora_A.", "")
      want[hub] = want[hub] + 6.0 / 4 * (b.astype(np.float64) @ a)
  got = hf.export_state(config, params)
  assert got.keys() == want.keys()
  for name in want:
    close(got[name], want[name], 1e-6)
  hf.export_checkpoint(config, params, folder / "merged")
  stored = load_file(folder / "merged" / "model.safetensors")
  check_equal(stored, {k: x.astype(ml_dtypes.bfloat16) for k, x in got.items()})


# ---- Against torch -------------------------------------------------------------------


def wrap(theirs, folder, merge):
  """PEFT by hand: adapters put on the modules that match, or merged into them."""
  import torch

  described = json.loads((folder / "adapter_config.json").read_text())
  tensors = load_file(folder / "adapter_model.safetensors")
  scale = described["lora_alpha"] / described["r"]
  seen = set()
  for name, module in list(theirs.named_modules()):
    if not re.fullmatch(described["target_modules"], name):
      continue
    a, b = (f"{peft.PREFIX}{name}.lora_{x}.weight" for x in "AB")
    seen |= {a, b}
    a, b = torch.tensor(tensors[a]), torch.tensor(tensors[b])
    if merge:
      module.weight.data += scale * (b @ a)
    else:
      module.register_forward_hook(
        lambda _, args, y, a=a, b=b: y + scale * (args[0] @ a.T @ b.T)
      )
  assert seen == tensors.keys()


@pytest.mark.torch
@pytest.mark.parametrize("merge", [False, True], ids=["beside", "merged"])
@pytest.mark.parametrize(
  "name, targets", [("tiny", (lora.TEXT,)), ("tied", EVERYTHING), ("odd", EVERYTHING)]
)
def test_logits_equal_those_of_torch(name, targets, merge, tmp_path):
  import torch

  config = adapted(CONFIGS[name], targets)
  theirs, base = oracle(config)
  ours = table.unnest(base) | {
    p: jnp.array(x) for p, x in leaves(noisy(config)).items()
  }
  params = table.nest(ours)
  peft.write(config, params, tmp_path)
  e = example(config, 0, PIECES)
  hidden = forward(config, params, alone(e))
  got = model.logits(config, params, hidden)[0]
  with torch.no_grad():
    plain = theirs(**inputs(e)).logits[0].numpy()
    wrap(theirs, tmp_path, merge)
    want = theirs(**inputs(e)).logits[0].numpy()
  close(got, want, 1e-4)
  assert np.abs(want - plain).max() > 0.1 * np.abs(want).max()
