"""Curiosity-driven GRPO from the SFT checkpoint (--config.init=DIR).

  python -m pixel_jax.train_rl --config=configs/rl.py:tiny --workdir=DIR
  python -m pixel_jax.train_rl --config=configs/rl.py:7b --workdir=DIR
  python -m pixel_jax.train_rl --config=configs/rl.py:7b,v5p:4x4x4 --workdir=DIR

With --config.reward.alpha=0.0 the learning trap closes.
"""

from ml_collections import ConfigDict

from pixel_jax.configs import common, pods

OPTIONS = {
  "full": "of tiny: deep clips, which want two operations",
  "topology": "KIND:AxB, the accelerators that the run is laid out for",
}


def get_config(arg="tiny"):
  arg = common.parse_arg(arg, OPTIONS)
  tiny = arg.size == "tiny"
  c = ConfigDict()
  c.seed = 0
  c.total_steps = 33  # syncs of the published run (pixel_reasoner.md 3.1)
  c.save_every = 5
  c.eval_every = 5
  c.init = ""  # a workdir or a converted checkpoint
  c.keep_trajectories_every = 1  # steps
  c.judge = ""  # MODULE.FUNCTION of yours: Trajectory -> float; docs/extending.md
  c.model = common.model(arg.size)
  c.codec = common.codec(arg.size)
  c.lora = common.lora()  # rank > 0: only adapters are trained, optim.freeze is moot
  c.mesh = common.mesh(arg.size)
  c.data = dict(  # sources.open_source, pipeline.tasks
    uri="jsonl:train.jsonl",  # or several with , between: docs/data.md
    root="",
    layout="",  # MODULE.FUNCTION of yours: docs/extending.md
    weights=(),  # of several; () = every record once
    filter=common.filter(),
    shards=8,
    max_bad_share=0.01,
    changed="refuse",  # "accept": go on with data that was changed
  )
  # uri = "": nothing is held out.  eval.rollout, below, is like rollout, and its own:
  # --config.eval.rollout.temperature=0 takes the likeliest token.
  c.eval = dict(uri="jsonl:val.jsonl", tasks=256)
  c.engine = common.engine(arg.size)
  c.fleet = dict(tensor=1)  # rollout.fleet.Fleet: devices of an engine
  c.rollout = dict(  # Engine.run; sampling as in the paper, lengths as released
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    max_turns=5,
    max_new_tokens=2048,
    fixed_batch=False,  # True: one bucket, so that no rollout depends on how many play
  )
  c.reward = dict(alpha=0.5, beta=0.05, H=0.3, N=1, variant="paper", count="success")
  c.rl = dict(
    prompts_per_step=512,
    group_size=8,
    minibatches=16,
    std=False,  # as released
    masked_stops=("turns", "length", "row"),  # leave mean, std and loss
    rows=64,  # of one micro-batch, on each host
    tokens=16384,
    patches=32768,
  )
  c.loss = dict(  # rl.objectives.loss
    clip=(0.2, 0.28),
    dual_clip=0.0,  # 3.0: bounds what a token of a negative advantage can cost
    sampler_cap=0.0,  # 2.0: truncated importance weight of the sampler's log-probs
  )
  c.replay = dict(alpha=1.0, keep_steps=0, refill=True)
  c.optim = dict(
    lr=1e-6,
    schedule="cosine",
    warmup_steps=16,
    final_lr_ratio=0.5,
    b1=0.9,
    b2=0.95,
    weight_decay=0.0,
    clip_norm=1.0,
    max_nonfinite=5,  # updates in a row that are not finite and left out; then it ends
    moment_dtype="float32",  # of Adam's first moment
    freeze=(),
  )
  c.checkpoint = dict(keep=3, keep_best="eval/accuracy")  # checkpoint.Checkpoints
  c.wandb = common.wandb()
  c.mlflow = common.mlflow()
  if tiny:
    c.total_steps = 150
    c.save_every = 50
    c.eval_every = 50
    c.keep_trajectories_every = 25
    c.data.update(uri="world:train", shards=4)
    c.eval.update(uri="world:val", tasks=256)
    c.rollout.update(max_turns=3, max_new_tokens=16)
    c.rl.update(
      prompts_per_step=24,
      minibatches=1,
      std=True,  # what was measured: tiny_world.md
      # Nothing is masked.  A turn of 16 tokens that does not end is babble, not thought
      # cut short, and three calls without an answer are no search: masked, nothing held
      # either back.  Of the full world's rollouts 78 % never answered after 300 steps
      # (accuracy .23; .93 without the mask).
      masked_stops=(),
      rows=16,
      tokens=128,
      patches=192,
    )
    c.replay.update(refill=False)  # uniform groups are dropped, nothing is drawn twice
    # 120 steps at 1e-3 end at .66 on the validation split, these at .82 (seed 0).
    c.optim.update(lr=8e-4, warmup_steps=10, b2=0.98, final_lr_ratio=0.1)
  if tiny and arg.full:  # deep clips: select, crop, answer, and room for one mistake
    c.total_steps = 450
    c.optim.update(lr=4e-4, schedule="constant", final_lr_ratio=1.0)
    c.data.update(uri="world:full_train")
    c.eval.update(uri="world:full_val")
    c.rollout.update(max_turns=4)
    c.rl.update(rows=8, **common.FULL_ROW)
  c.eval.rollout = c.rollout.to_dict()
  return pods.fit(c, "rl", arg.size, arg.topology)
