"""Eight virtual CPU devices for every test; shapes of model/ and rl/ are checked.

All processes of a session (workers of xdist, whole runs) share their compiled programs.
"""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # not in a worker: it inherits
  compiled = tempfile.TemporaryDirectory(prefix="pixel_jax-compiled-")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name

import jax
import jaxtyping

jax.config.update("jax_num_cpu_devices", 8)
jaxtyping.install_import_hook(["pixel_jax.model", "pixel_jax.rl"], "beartype.beartype")


# Whole runs, minutes each: first, so that no worker is left alone with them at the end.
LONG = ("test_train.py", "test_launch.py", "test_bench.py")


def pytest_collection_modifyitems(items):
  items.sort(key=lambda item: item.path.name not in LONG)
