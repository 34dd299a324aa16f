"""Importing costs little, starts no device and needs no torch."""

import json
import subprocess
import sys
import time

import pytest

EVERYTHING = """
import importlib, json, pkgutil, sys
sys.modules["torch"] = None  # as if it were not installed: importing it raises
import pixel_jax
names = [m.name for m in pkgutil.walk_packages(pixel_jax.__path__, "pixel_jax.")]
optional = ("pixel_jax.demo",)  # needs gradio
for name in names:
  if name not in optional:
    importlib.import_module(name)
from jax._src import xla_bridge
print(json.dumps([len(names), sorted(xla_bridge._backends)]))
"""


def _python(code):
  run = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
  )
  assert run.returncode == 0, run.stderr[-2000:]
  return run.stdout


def test_the_package_imports_in_a_second():
  """Less what an empty Python takes; the best of three, as others may work beside."""

  def seconds(code):
    best = float("inf")
    for _ in range(3):
      start = time.perf_counter()
      _python(code)
      best = min(best, time.perf_counter() - start)
    return best

  assert seconds("import pixel_jax") - seconds("pass") < 1


def test_the_package_imports_none_of_its_rooms():
  loaded = _python(
    "import sys, pixel_jax; print([m for m in sys.modules if m.startswith('pixel_jax.')"
    " or m in ('jax', 'numpy', 'torch')])"
  )
  assert loaded.strip() == "[]"


@pytest.mark.parametrize("room", ["model.hf", "model.qwen2_5_vl", "parallel"])
def test_no_device_is_touched(room):
  backends = _python(
    f"import pixel_jax.{room}; from jax._src import xla_bridge;"
    "print(sorted(xla_bridge._backends))"
  )
  assert backends.strip() == "[]"


def test_every_module_without_torch_or_device():
  count, backends = json.loads(_python(EVERYTHING).splitlines()[-1])
  assert count > 20
  assert backends == []
