"""Eight virtual CPU devices for every test; shapes of model/ and rl/ are checked.

All processes of a session (workers of xdist, whole runs) share their compiled programs.
"""

import contextlib
import ctypes
import gc
import importlib.util
import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # not in a worker: it inherits
  compiled = tempfile.TemporaryDirectory(prefix="pixel_jax-compiled-")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name

import jax
import jaxtyping
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jaxtyping.install_import_hook(["pixel_jax.model", "pixel_jax.rl"], "beartype.beartype")


# Whole runs, minutes each: first, so that no worker is left alone with them at the end.
LONG = ("test_train.py", "test_launch.py", "test_engine.py", "test_model.py")


def pytest_addoption(parser):
  parser.addoption(
    "--share",
    metavar="K/N",
    help="only the K-th of N shares (K from 0) of the tests marked slow",
  )


def pytest_collection_modifyitems(config, items):
  items.sort(key=lambda item: item.path.name not in LONG)
  if importlib.util.find_spec("torch") is None:
    for item in items:
      if item.get_closest_marker("torch"):
        item.add_marker(pytest.mark.skip(reason="needs torch: ./launch/test.sh --all"))
  if share := config.getoption("share"):
    k, n = (int(part) for part in share.split("/"))
    if not 0 <= k < n:
      raise pytest.UsageError(f"--share={share}; expected K/N with 0 <= K < N")
    slow = [item for item in items if item.get_closest_marker("slow")]
    # Neighbours stay together: they share the fixtures of their file.
    kept = slow[len(slow) * k // n : len(slow) * (k + 1) // n]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


@pytest.fixture(autouse=True, scope="module")
def release_programs():
  """A file's compiled programs go with it; a worker grew to 5.8 GB otherwise."""
  yield
  jax.clear_caches()
  gc.collect()
  with contextlib.suppress(OSError, AttributeError):  # only glibc has it
    ctypes.CDLL("libc.so.6").malloc_trim(0)
