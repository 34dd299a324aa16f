"""Pixel Reasoner in JAX: a vision-language model that reasons in the pixels.

Importing this package imports none of its rooms and touches no device.  Where to begin
reading: `trajectory.py`, `batch.py`, `model/qwen2_5_vl.py`, `train_sft.py`,
`rollout/episode.py`, `rollout/engine.py`, `rl/grpo.py`, `train_rl.py`.
"""

__version__ = "0.1.0"
