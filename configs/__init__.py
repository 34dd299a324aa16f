"""What runs are configured by: each file's `get_config` gives an ml_collections config.

`pixel-jax configs` lists them.  Installed as pixel_jax.configs; data only: they import
ml_collections and each other.
"""

NAMES = ("sft", "rl", "evaluate", "synthesize")  # common and pods are theirs
