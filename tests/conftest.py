"""Eight virtual CPU devices for every test; shapes of model/ and rl/ are checked."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jaxtyping

jax.config.update("jax_num_cpu_devices", 8)
jaxtyping.install_import_hook(["pixel_jax.model", "pixel_jax.rl"], "beartype.beartype")
