"""Reinforcement learning: rewards and GRPO on the device, replay on the host.

`Q` queries, `G` rollouts of each; `B T` as in `pixel_jax/model/__init__.py`.
"""
