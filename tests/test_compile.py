"""tools/compile_check.py: its programs are training's, and what it reads is right."""

import contextlib
import pathlib
import sys

import jax
import pytest

from configs import sft
from pixel_jax import parallel

ROOT = pathlib.Path(__file__).parents[1]
FLOATS = ("bf16", "f32")
sys.path.insert(0, str(ROOT / "tools"))
import compile_hlo  # noqa: E402
import compile_programs  # noqa: E402


def open_tiny(module, devices, **mesh):
  config = module.get_config("tiny")
  config.mesh.update(mesh)
  config.model.update(scan_layers=True, dtype="bfloat16")
  return compile_programs.open_run(config, devices)


def compile_update(run):
  (update,) = compile_programs.programs(run)
  return compile_hlo.collectives(update.lower().compile().as_text())


@pytest.mark.parametrize("told", [True, False])
def test_rows_stay_where_they_are(told, monkeypatch):
  """Left alone XLA cut the tower along its weights and gave all rows to all devices."""
  if not told:  # as it was: the test can fail
    monkeypatch.setattr(parallel, "on", lambda mesh: contextlib.nullcontext())
  run = open_tiny(sft, jax.devices(), fsdp=8)
  found = compile_update(run)
  data, vocab = run.config.data, run.model.text.vocab
  rows = [c for c in found if c.dtype in FLOATS and c.shape[:1] == (data.rows,)]
  head = [c for c in found if vocab in c.shape]
  assert bool(rows) != told
  # The head is gathered once and its gradient added up once, not chunk by chunk.
  assert head and any(c.loop for c in head) != told
