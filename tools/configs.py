"""The configs: what each is for, its sizes, options and presets.

  pixel-jax configs

A config is named as --config=NAME:SIZE,OPTION,... or --config=FILE.py:..., a file of your
own, which may import configs.common.  --config.KEY=VALUE changes a field of it.
"""

import importlib

from pixel_jax import configs
from pixel_jax.configs import common, pods


def main() -> None:
  print(f"--config=NAME:SIZE,OPTION,...    SIZE: {', '.join(common.SIZES)}")
  for name in configs.NAMES:
    module = importlib.import_module(f"pixel_jax.configs.{name}")
    print(f"\n{name:14}{module.__doc__.splitlines()[0]}")
    for option, line in module.OPTIONS.items():
      print(f"  {option:12}{line}")
      presets = {"sft": pods.SFT, "rl": pods.RL}.get(name, ())
      for size in common.SIZES if option == "topology" else ():
        if made := [topology for s, topology in presets if s == size]:
          print(f"  {'':12}  {size}: {', '.join(made)}")


if __name__ == "__main__":
  main()
