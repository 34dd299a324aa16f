"""Policies side by side on one split: free, forbidden to operate, forced to operate.

  python -m pixel_jax.evaluate --config=configs/evaluate.py:tiny --workdir=DIR \\
      --config.policies=BASE=runs/base,SFT=runs/sft,RL=runs/rl
"""

from ml_collections import ConfigDict

from pixel_jax.configs import common

OPTIONS = {"full": "of tiny: the test split with deep clips"}


def get_config(arg="tiny"):
  arg = common.parse_arg(arg, OPTIONS)
  c = ConfigDict()
  c.seed = 1
  c.policies = (
    ""  # NAME=DIR,NAME=DIR: workdirs or converted checkpoints, in table order
  )
  c.modes = ("free", "forbidden", "forced")
  c.judge = ""  # MODULE.FUNCTION of yours: Trajectory -> float; docs/extending.md
  c.model = common.model(arg.size)
  c.codec = common.codec(arg.size)
  c.data = dict(  # sources.open_source
    uri="jsonl:test.jsonl",
    root="",
    layout="",
    weights=(),
    filter=common.filter(),
    tasks=1000,
  )
  c.engine = common.engine(arg.size)
  c.rollout = dict(
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    max_turns=5,
    max_new_tokens=2048,
    fixed_batch=False,  # True: one bucket, so that no rollout depends on how many play
  )
  if arg.size == "tiny":
    c.modes = ("free", "forbidden", "forced", "swapped")
    c.data.update(uri="world:test", tasks=1024)
    # One bucket of lanes: compiling the others takes longer than they save.
    c.rollout.update(max_turns=3, max_new_tokens=16, fixed_batch=True)
  if arg.size == "tiny" and arg.full:
    c.data.update(uri="world:full_test")
    c.rollout.update(max_turns=4)
  return c
