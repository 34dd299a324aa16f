"""What the configs share: sizes, pixel budgets, meshes.  Data only, no pixel_jax import."""

from ml_collections import ConfigDict

SIZES = ("tiny", "3b", "7b", "32b", "72b")
TOKEN = 28 * 28  # pixels of one visual token
# Tiny runs on the full world.  The 112 tokens that a conversation may have can show a
# clip and four of its frames at most, 272 patches; every row must hold such a one.
FULL_ROW = dict(tokens=256, patches=320)


def parse_arg(arg, options):
  """ "7b,base" -> {"size": "7b", "base": True, ...}: the size, then any of `options`.

  Args:
    options: {name: a line of help}.  Each is a flag that is off by default; an unknown
      word is an error that lists the known ones.  Where "topology" is one, a word with a
      colon is its value.
  """
  words = [w for w in (arg or "tiny").split(",") if w]
  size, flags = words[0], words[1:]
  if size not in SIZES:
    raise ValueError(
      f"there is no config of the size {size!r}; the sizes are {', '.join(SIZES)}"
    )
  topology = next((w for w in flags if ":" in w and "topology" in options), "")
  flags = [w for w in flags if w != topology]
  unknown = [w for w in flags if w not in options]
  if unknown:
    known = ", ".join(options) or "none"
    raise ValueError(f"the option {unknown[0]!r} does not exist; there are {known}")
  chosen = {k: k in flags for k in options}
  return ConfigDict(dict(size=size, **chosen | {"topology": topology}))


def model(size):
  """Keyword arguments of `model.config`: the size and how it is computed."""
  if size == "tiny":  # two layers run faster unrolled on a CPU; nothing to save memory
    return dict(
      name="tiny", dtype="float32", remat="none", scan_layers=False, logp_chunk=65536,
      attention="xla",
    )  # fmt: skip
  # Logits of 65536 tokens of the whole batch at a time: 512 of each of 128 rows.
  return dict(
    name=size, dtype="bfloat16", remat="full", scan_layers=True, logp_chunk=65536,
    attention="xla",  # "splash" on TPUs, "cudnn" on GPUs
  )  # fmt: skip


def codec(size):
  """Keyword arguments of `run.policies.make_codec`: the prompt and the pixels of each role.

  A budget is (fewest, most) pixels.  Published sizes: pixel_reasoner.md 1.9, the RL
  column; the crop's upper bound is what zooming buys, so it is not lowered below it.
  """
  if size == "tiny":  # one size per role, so that every prompt has the same length
    budgets = dict(
      image=(84 * 84, 84 * 84),
      video=(28 * 28, 28 * 28),
      crop=(28 * 56, 56 * 56),  # 56 x 56 for a box that is about square
      frame=(112 * 112, 112 * 112),
    )
    return dict(
      profile="clean", budgets=budgets, video_frames=8, crop_source="original",
      operations=(),
    )  # fmt: skip
  budgets = dict(
    image=(4 * TOKEN, 2000 * TOKEN),
    video=(4 * TOKEN, 512 * TOKEN),
    crop=(4 * TOKEN, 1000 * TOKEN),
    frame=(4 * TOKEN, 400 * TOKEN),
  )
  return dict(
    profile="clean", budgets=budgets, video_frames=16, crop_source="original",
    operations=(),  # of yours, by dotted path: docs/extending.md
  )  # fmt: skip


def engine(size):
  """Keyword arguments of `rollout.engine.Engine`."""
  if size == "tiny":  # half the rollouts of a step at a time; operations take no time
    return dict(
      slots=96,
      max_prompt=16,
      max_len=112,
      prompt_len=16,
      extend_len=16,
      extend_rows=64,
      patches=512,
      chunk=16,
      lag=0,
      views=(64,),
      zoom="host",
    )
  return dict(
    slots=128,
    max_prompt=8192,
    max_len=16384,
    prompt_len=4096,
    extend_len=2048,
    patches=16384,
    # Host and operations work beside the device and hear of an end one chunk late.  On
    # log-normal turns that is 14 % more steps, 3 % with chunks half as long; tiny, whose
    # host and device are the same cores, gains nothing by it.
    chunk=16,
    lag=1,
    views=(2048, 4096, 8192),
    zoom="host",  # "device": crops are resized there, byte for byte the same
  )


def filter():
  """Fields of `data.sources.Filter`; 0 = no limit."""
  return dict(min_tokens=0, max_tokens=0, min_pixels=0, max_pixels=0)


def lora():
  """Adapters: rank 0 = none, every weight is trained."""
  # targets: regular expressions of linear layers; "^vision/" adapts tower and merger.
  return dict(rank=0, alpha=64.0, targets=("^text/blocks/",))


def wandb():
  """Keyword arguments of `run.trackers.Wandb`; without a project there is none."""
  return dict(project="", entity="", name="", mode="online")


def mlflow():
  """Keyword arguments of `run.trackers.Mlflow`; without a uri there is none."""
  return dict(uri="", experiment="", name="")


def mesh(size):
  """Keyword arguments of `parallel.make_mesh`; -1 takes the devices that are left."""
  if size == "tiny":
    return dict(data=1, fsdp=1, tensor=1)
  return dict(data=1, fsdp=-1, tensor=1)
