"""tools/convert.py as a user calls it: there and back bit for bit, clear refusals."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from pixel_jax.model import config as model_config
from pixel_jax.model import hf, lora, peft, qwen2_5_vl
from pixel_jax.run import checkpoint, policies
from pixel_jax.tools import convert

ROOT = pathlib.Path(__file__).parents[1]
MODEL = ROOT / "tests" / "golden" / "model"
COMPANIONS = {
  "tokenizer.json": "{}",
  "tokenizer_config.json": '{"model_max_length": 131072}',
  "preprocessor_config.json": '{"patch_size": 14}',
  "generation_config.json": '{"temperature": 0.1}',
}


def _convert(*argv):
  return convert.main([str(a) for a in argv])


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


@pytest.fixture
def source(tmp_path):
  """The golden checkpoint and what lies beside one, read-only as in a hub cache."""
  folder = tmp_path / "theirs"
  shutil.copytree(MODEL, folder)
  for name, text in COMPANIONS.items():
    (folder / name).write_text(text)
    (folder / name).chmod(0o444)
  return folder


def test_there_and_back(source, tmp_path, capsys):
  ours, back = tmp_path / "ours", tmp_path / "back"
  assert _convert("import", f"--hf={source}", f"--out={ours}") == 0
  said = capsys.readouterr()
  assert "params/, extra.json, tokenizer/ (4 files)" in said.out
  assert f"in {ours}" in said.out
  assert "float32" in said.out and "import: 100%" in said.err and "B/s" in said.err
  assert {p.name for p in (ours / "tokenizer").iterdir()} == COMPANIONS.keys()

  assert _convert("export", f"--checkpoint={ours}", f"--out={back}") == 0
  said = capsys.readouterr()
  assert "config.json" in said.out and f"in {back}" in said.out
  assert "export: 100%" in said.err
  _check_equal(_read(back), _read(source))
  for name, text in COMPANIONS.items():
    assert (back / name).read_text() == text
  theirs = model_config.from_hf(hf.read_config(source))
  assert model_config.from_hf(hf.read_config(back)) == theirs


def test_a_run_can_start_from_an_import(source, tmp_path):
  """What `start.open_policy` reads: extra["model"], parameters in the model's tree."""
  ours = tmp_path / "ours"
  assert _convert("import", f"--hf={source}", f"--out={ours}") == 0
  described = checkpoint.load_extra(ours)["model"]
  assert described == hf.read_config(source)
  config = model_config.from_hf(described)
  params, _ = checkpoint.load_params(ours, qwen2_5_vl.abstract(config))
  _check_equal(
    {k: v.astype("bfloat16") for k, v in hf.export_state(config, params).items()},
    _read(source),
  )


@pytest.mark.slow
def test_half_size(source, tmp_path):
  ours = tmp_path / "ours"
  assert _convert("import", f"--hf={source}", f"--out={ours}", "--dtype=bfloat16") == 0
  params, _ = checkpoint.load_params(ours)
  assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"bfloat16"}


def test_export_of_a_workdir(source, tmp_path):
  """The newest step of a run, parameters only."""
  config = model_config.from_hf(hf.read_config(source))
  params = hf.import_checkpoint(source, config)
  saver = checkpoint.Checkpoints(tmp_path / "run", model=model_config.to_hf(config))
  saver.save(1, {"params": jax.tree.map(lambda x: 0 * x, params), "step": jnp.int32(1)})
  saver.save(2, {"params": params, "step": jnp.int32(2)})
  saver.close()
  # ---- what the card tells of ----
  run, sft, out = tmp_path / "run", tmp_path / "sft", tmp_path / "out"
  sft.mkdir()
  began = {
    "total_steps": 7,
    "init": "/home/me/Qwen2.5-VL",
    "data": {"uri": "json:a.json"},
  }
  (sft / "config.json").write_text(json.dumps(began))
  reward = {"variant": "paper", "alpha": 0.5, "beta": 0.05, "H": 0.3, "N": 1}
  rl = {"prompts_per_step": 512, "group_size": 8}
  trained = {"total_steps": 2, "init": str(sft), "reward": reward, "rl": rl, "seed": 3}
  (run / "config.json").write_text(json.dumps(trained))
  (run / "tokenizer").mkdir()
  for file in policies.TINY_BASE.glob("tokenizer*.json"):
    shutil.copy(file, run / "tokenizer")
  scored = {"accuracy": 0.5, "ci": [0.4, 0.6], "n": 100, "hash": "abc"}
  row = {"name": "RL", "policy": str(run), "benchmark": "vstar", "protocol": "pixel"}
  row |= {"weights": checkpoint.fingerprint(run), "modes": {"free": scored}}
  other = row | {"name": "SFT", "weights": "of others", "benchmark": "hrbench4k"}
  (tmp_path / "evaluation.json").write_text(json.dumps({"rows": [other, row]}))
  words = f"--checkpoint={run}", f"--scores={tmp_path}", f"--out={out}"
  assert _convert("export", *words) == 0
  _check_equal(_read(out), _read(source))
  card = (out / "README.md").read_text()
  assert 'base_model: "Qwen2.5-VL"' in card and "/home/me" not in card
  first, second = (x for x in card.splitlines() if x.startswith("- ") and "steps" in x)
  assert first.startswith("- Supervised fine-tuning (`sft`): 7 steps")
  assert (
    "512 questions a step with 8 answers each" in second and "alpha = 0.5" in second
  )
  assert "| vstar | pixel | free | 100 | 50.0 [40.0, 60.0] | `abc` |" in card
  assert "hrbench4k" not in card
  # ---- an earlier step: the run's tokenizer, and no score of other weights ----
  words = f"--checkpoint={run / 'checkpoints' / '1'}", f"--out={tmp_path / 'one'}"
  assert _convert("export", *words, f"--scores={tmp_path}") == 2
  assert _convert("export", *words) == 0
  assert (tmp_path / "one" / "tokenizer.json").is_file()


def _adapted(source):
  """Config and parameters of the golden model with random adapters."""
  config = model_config.from_hf(hf.read_config(source), lora=lora.Config(3, 5.0))
  params = hf.import_checkpoint(source, config)
  params = qwen2_5_vl.adapt(config, params, jax.random.key(0))
  return config, jax.tree.map(lambda x: x + 0.01, params)


@pytest.mark.slow
def test_adapters_there_and_back(source, tmp_path):
  """A PEFT folder onto an HF folder and onto a checkpoint of ours; out as it was."""
  config, params = _adapted(source)
  peft.write(config, params, tmp_path / "peft")
  theirs, ours = f"--hf={source}", tmp_path / "ours"
  assert _convert("import", theirs, f"--out={ours}") == 0
  for i, base in enumerate((theirs, f"--checkpoint={ours}")):
    out, back = tmp_path / f"with{i}", tmp_path / f"back{i}"
    adapter = f"--adapter={tmp_path / 'peft'}"
    assert _convert("import", base, adapter, f"--out={out}") == 0
    extra = checkpoint.load_extra(out)
    assert lora.Config(**extra["lora"]) == config.lora
    assert {p.name for p in (out / "tokenizer").iterdir()} == COMPANIONS.keys()
    assert _convert("export", f"--checkpoint={out}", "--adapter", f"--out={back}") == 0
    _check_equal(_read(back), _read(tmp_path / "peft"))
    described = json.loads((back / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(source)
    merged = tmp_path / f"merged{i}"
    assert (
      _convert("export", f"--checkpoint={out}", f"--out={merged}", "--dtype=float32")
      == 0
    )
    want = dict(_read(source))
    scale = described["lora_alpha"] / described["r"]
    for name, a in _read(back).items():
      if ".lora_A." in name:
        b = _read(back)[name.replace("lora_A", "lora_B")]
        hub = hf.hub_name(name.removeprefix(peft.PREFIX)).replace("lora_A.", "")
        want[hub] = want[hub].astype(np.float64) + scale * (b.astype(np.float64) @ a)
    got = _read(merged)
    assert got.keys() == want.keys()
    for name in want:
      np.testing.assert_allclose(got[name], want[name], rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_adapters_that_cannot_be_put_on(source, tmp_path, capsys):
  config, params = _adapted(source)
  peft.write(config, params, tmp_path / "peft")
  ours, new = tmp_path / "ours", tmp_path / "new"
  adapter = f"--adapter={tmp_path / 'peft'}"
  assert _convert("import", f"--hf={source}", adapter, f"--out={ours}") == 0
  _refused(
    capsys, "has adapters already", "import", f"--checkpoint={ours}", adapter,
    f"--out={new}",
  )  # fmt: skip
  bare = tmp_path / "bare"
  assert _convert("import", f"--hf={source}", f"--out={bare}") == 0
  _refused(
    capsys, "has no adapters", "export", f"--checkpoint={bare}", "--adapter",
    f"--out={new}",
  )  # fmt: skip
  with pytest.raises(SystemExit):
    _convert("import", f"--checkpoint={bare}", f"--out={new}")
  assert "takes --adapter=DIR" in capsys.readouterr().err


def _refused(capsys, match, *argv):
  assert _convert(*argv) == 2
  error = capsys.readouterr().err.splitlines()[-1]
  assert error.startswith("error: ") and match in error, error


def test_refusals_are_one_line(source, tmp_path, capsys):
  full = tmp_path / "full"
  full.mkdir()
  (full / "notes.txt").write_text("mine")
  new = tmp_path / "new"
  _refused(capsys, "is not empty", "import", f"--hf={source}", f"--out={full}")
  _refused(capsys, "is not a folder", "import", "--hf=/nowhere", f"--out={new}")
  _refused(
    capsys, "config.json does not exist", "import", f"--hf={full}", f"--out={new}"
  )
  _refused(capsys, "holds neither", "export", f"--checkpoint={full}", f"--out={new}")
  described = json.loads((source / "config.json").read_text())
  described["text_config"]["use_sliding_window"] = True
  (source / "config.json").write_text(json.dumps(described))
  _refused(capsys, "use_sliding_window", "import", f"--hf={source}", f"--out={new}")
  assert not new.exists()


def test_what_failed_leaves_no_folder(source, tmp_path, monkeypatch, capsys):
  def full(*_):
    raise OSError(28, "No space left on device")

  new = tmp_path / "new"
  with monkeypatch.context() as m:
    m.setattr(hf, "copy_companions", full)
    _refused(capsys, "No space left", "import", f"--hf={source}", f"--out={new}")
  assert not new.exists() and not list(tmp_path.glob("new*"))
  assert _convert("import", f"--hf={source}", f"--out={new}") == 0
  with monkeypatch.context() as m:
    m.setattr(hf, "copy_companions", full)
    back = tmp_path / "back"
    _refused(capsys, "No space left", "export", f"--checkpoint={new}", f"--out={back}")
  assert not list(tmp_path.glob("back*"))
  _refused(capsys, "/dev/null", "import", f"--hf={source}", "--out=/dev/null/x")


def test_as_a_command():
  run = subprocess.run(
    [sys.executable, "-m", "pixel_jax", "convert", "import", "--hf=/no", "--out=/x"],
    capture_output=True, text=True, timeout=600, cwd="/",
  )  # fmt: skip
  assert run.returncode == 2
  assert run.stderr.startswith("error: /no is not a folder"), run.stderr
