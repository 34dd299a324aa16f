"""tools/bench/pipeline.py at its smallest, and what it counts."""

import json

import numpy as np
import pytest

from pixel_jax.pixels import image

pytest.importorskip("torch")
from pixel_jax.tools.bench import pipeline


def test_the_sizes_are_log_normal():
  sizes = pipeline.sizes(np.random.default_rng(0), 4000)
  area = np.log([w * h for w, h in sizes])
  assert area.mean() == pytest.approx(np.log(pipeline.AREA), abs=0.05)
  assert area.std() == pytest.approx(pipeline.SIGMA, abs=0.05)


def test_windows_of_this_mix_fill_their_rows():
  """The row of performance figures: at least .9 of the patches are used."""
  tokens, patches = pipeline.utilisation(1024, **pipeline.ROW)
  assert 0.9 <= patches <= 1 and 0 < tokens <= 1


@pytest.mark.slow
@pytest.mark.torch
def test_both_sides_read_the_same_pictures(tmp_path, capsys):
  file = tmp_path / "x.json"
  result = pipeline.main(
    ["--pictures=5", "--workers=1", "--repeats=1", f"--json={file}"]
  )
  assert json.loads(file.read_text()) == result
  assert result["ratio"] > 0 and 0 < result["utilisation"]["run"] <= 1
  assert "ratio" in capsys.readouterr().out
  pipeline.write_pictures(tmp_path, 2)
  small = image.load_image(tmp_path / "1.jpg")
  assert small.size == pipeline.sizes(np.random.default_rng(0), 2)[1]
