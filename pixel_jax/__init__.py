"""Pixel Reasoner in JAX: a vision-language model that reasons in the pixels.

Importing this package imports none of its rooms and touches no device.  Where to begin
reading: `trajectory.py`, `batch.py`, `model/qwen2_5_vl.py`, `train_sft.py`,
`rollout/episode.py`, `rollout/engine.py`, `rl/objectives.py`, `train_rl.py`.

  model = pixel_jax.load("CKPT")
  print(model.ask("Which symbol is on the red panel?", "photo.jpg").text)
"""

__version__ = "0.2.0"


def load(folder, **settings):
  """A model to ask: `api.load`, which says what it takes."""
  from pixel_jax import api

  return api.load(folder, **settings)
