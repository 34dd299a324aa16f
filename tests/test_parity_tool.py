"""tools/parity.py: passes where both agree and says which stage is off first."""

import json
import pathlib

import jax
import numpy as np
import pytest

from pixel_jax.model import config as model_config
from pixel_jax.model import hf
from pixel_jax.tools import parity

ROOT = pathlib.Path(__file__).parents[1]
MODEL = ROOT / "tests" / "golden" / "model"


@pytest.fixture(autouse=True)
def jax_config():
  """Compiles in half the time; undoes what main() sets for the whole process."""
  before = jax.config.jax_default_matmul_precision
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)
  jax.config.update("jax_default_matmul_precision", before)


def test_sample_has_two_pictures_and_a_clip():
  config = model_config.from_hf(hf.read_config(MODEL))
  sample = parity.make_sample(config)
  batch = parity.to_batch(sample)
  image, clip = (sample.ids == i for i in (config.image_token, config.video_token))
  counts = [p.num_merged for p in sample.pixels]
  assert image.sum() == counts[0] + counts[1] and clip.sum() == counts[2]
  assert sorted(sample.vision_index[image | clip]) == list(range(sum(counts)))
  # Pictures share neither windows nor segments.
  start = 0
  seen_images, seen_windows = set(), set()
  for p in sample.pixels:
    part = slice(start, start + p.num_patches)
    images = set(np.asarray(batch.patch_image[0, part]).tolist())
    windows = set(np.asarray(batch.patch_window[0, part]).tolist())
    assert not images & seen_images and not windows & seen_windows
    assert len(images) == p.grid[0] and 0 not in images | windows
    seen_images |= images
    seen_windows |= windows
    start += p.num_patches
  assert len(set(np.asarray(batch.patch_window[0, : 4 * counts[0]]).tolist())) > 1


def test_compare():
  good = {"pixels": np.ones(3), "logits": np.array([1.0, -2.0])}
  rows = parity.compare({**good, "logits": good["logits"] * (1 + 1e-6)}, good)
  assert [r["ok"] for r in rows] == [True, True]
  assert rows[1]["max_abs"] == pytest.approx(2e-6)
  assert rows[1]["relative"] == pytest.approx(1e-6)

  def off(**changed):
    return [
      r["stage"] for r in parity.compare({**good, **changed}, good) if not r["ok"]
    ]

  assert off(logits=good["logits"] * 1.001) == ["logits"]
  assert off(logits=np.array([np.nan, -2.0])) == ["logits"]
  assert off(logits=np.ones(3)) == ["logits"]
  assert off(pixels=np.ones(3) + 1e-7) == ["pixels"]  # pixels must be equal
  assert off(extra=np.ones(1)) == ["extra"]
  assert [r["ok"] for r in parity.compare({}, good)] == [False, False]


def test_tokens_may_differ_only_in_a_tie():
  theirs = {
    "decode/logits": np.array([[0.0, 1.0, 1.0 - 1e-7], [0.0, 1.0, 0.5]]),
    "decode/tokens": np.array([1, 1]),
  }

  def ok(tokens):
    return parity.compare({**theirs, "decode/tokens": np.array(tokens)}, theirs)[1][
      "ok"
    ]

  assert ok([1, 1]) and ok([2, 1])
  assert not ok([1, 2])


def test_table_shows_the_worst_gradient():
  one = {"gradient visual.a": np.ones(2), "gradient model.b": np.ones(2)}
  two = {**one, "gradient model.c": np.full(2, 2.0)}
  text = parity.table(parity.compare({**two, "gradient model.c": np.ones(2)}, two))
  assert "gradients of vision (1; worst visual.a)" in text
  worst = next(line for line in text.splitlines() if "worst model.c" in line)
  assert worst.split()[-1] == "OFF" and "gradients of text (2" in worst


@pytest.mark.torch
def test_parity_of_a_checkpoint(tmp_path, capsys):
  pytest.importorskip("torch")
  out = tmp_path / "parity.json"
  code = parity.main([f"--hf={MODEL}", f"--json={out}", "--tokens=3"])
  said = capsys.readouterr().out
  assert code == 0, said
  assert said.splitlines()[-1] == "parity" and "OFF" not in said
  result = json.loads(out.read_text())
  assert result["ok"]
  worst = {r["stage"]: r["relative"] for r in result["stages"]}
  for stage in (
    "pixels", "vision/patches", "vision/block 3", "vision/features", "text/embeddings",
    "text/block 1", "text/hidden", "logits", "log-probs", "decode/tokens",
    "gradient visual.patch_embed.proj.weight", "gradient model.embed_tokens.weight",
  ):  # fmt: skip
    assert worst[stage] < 5e-5, stage


@pytest.mark.torch
def test_first_stage_off_is_named(monkeypatch, capsys):
  """A wrong weight of the second text block shows there and not before."""
  pytest.importorskip("torch")
  whole = hf.import_checkpoint

  def broken(directory, config):
    params = whole(directory, config)
    down = params["text"]["blocks"]["down"]
    down["w"] = down["w"].at[1, 0, 0].add(0.5)
    return params

  monkeypatch.setattr(hf, "import_checkpoint", broken)
  code = parity.main([f"--hf={MODEL}", "--tokens=2", "--no-gradients"])
  said = capsys.readouterr().out
  assert code == 1
  assert said.splitlines()[-1].endswith("first text/block 1")


def test_a_folder_that_is_none(capsys):
  assert parity.main(["--hf=/nowhere"]) == 2
  assert "config.json does not exist" in capsys.readouterr().err
