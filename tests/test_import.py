"""Importing costs little, starts no device and needs no torch."""

import ast
import json
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

EVERYTHING = """
import importlib, json, pkgutil, sys
sys.modules["torch"] = None  # as if it were not installed: importing it raises
import pixel_jax
names = [m.name for m in pkgutil.walk_packages(pixel_jax.__path__, "pixel_jax.")]
for name in names:
  importlib.import_module(name)
from jax._src import xla_bridge
print(json.dumps([len(names), sorted(xla_bridge._backends)]))
"""

ROOT = pathlib.Path(__file__).resolve().parent.parent


def _python(code):
  run = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, timeout=600
  )
  assert run.returncode == 0, run.stderr[-2000:]
  return run.stdout


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


def test_everything_imported_is_a_declared_dependency():
  """A machine without the test extra has only these (jaxtyping was once missing)."""
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  declared = {re.split(r"[\[<>=;]", d)[0].lower() for d in project["dependencies"]}
  optional = {
    "wandb",
    "mlflow",
    "torch",
    "openai",
    "starlette",
    "uvicorn",
  }  # imported where they are used, with a clear error
  names = {"pil": "pillow", "absl": "absl-py", "orbax": "orbax-checkpoint"}
  for file in (ROOT / "pixel_jax").rglob("*.py"):
    for node in ast.walk(ast.parse(file.read_text())):
      found = []
      if isinstance(node, ast.Import):
        found = [a.name for a in node.names]
      elif isinstance(node, ast.ImportFrom) and not node.level:
        found = [node.module]
      for name in found:
        top = name.split(".")[0].lower()
        if top in sys.stdlib_module_names or top in {"pixel_jax", *optional}:
          continue
        assert names.get(top, top.replace("_", "-")) in declared, (file, name)
