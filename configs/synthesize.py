"""Synthesis: seeds with a cue (or none) and a teacher -> SFT trajectories.

  export OPENAI_API_KEY=... OPENAI_BASE_URL=...       the second for servers of your own
  pixel-jax synthesize --config=configs/synthesize.py --workdir=DIR \\
      --config.data.uri=jsonl:seeds.jsonl --config.data.root=DATA --config.init=MODEL
  pixel-jax synthesize --config=configs/synthesize.py:tiny --workdir=DIR

What it does, what it costs and what it writes: docs/synthesis.md.
"""

from ml_collections import ConfigDict

from pixel_jax.configs import common

# Table 2 of the paper: shares within images and within videos.
PAPER = {
  "image/single": 0.30,
  "image/recrop1": 0.20,
  "image/recrop2": 0.20,
  "image/zoom": 0.30,
  "video/single": 0.90,
  "video/reselect": 0.10,
}

OPTIONS = {}


def get_config(arg="7b"):
  arg = common.parse_arg(arg, OPTIONS)
  tiny = arg.size == "tiny"
  c = ConfigDict()
  c.seed = 0  # of kinds, boxes and the order of options
  c.seeds = 0  # how many of the source; 0 = all
  c.init = ""  # a converted checkpoint or a workdir: its tokenizer writes the ids
  c.codec = common.codec(arg.size)
  c.data = dict(uri="jsonl:seeds.jsonl", root="")
  c.recipe = dict(  # distill.Recipe
    kinds=PAPER,
    min_side=28,  # pixels of a cue, one visual token
    takes=3,  # times that a malformed reply is asked for anew
    max_tokens=600,
    temperature=0.7,
  )
  c.teacher = dict(  # teacher.Teacher
    model="gpt-4o",
    concurrency=16,
    requests_per_minute=0.0,  # 0 = no limit but the server's
    budget=10_000_000,  # tokens, prompts and replies; all runs on this workdir together
    attempts=8,
    first_wait=1.0,
    longest_wait=60.0,
    image_tokens=2500,  # set aside for a picture until its cost is known
  )
  c.endpoint = dict(timeout=120.0, json_mode=True)  # teacher.endpoint
  # In place of an endpoint, a checkpoint of ours on this machine; "" = the endpoint.
  c.local = ""
  c.model = common.model(arg.size)  # of the local teacher
  c.engine = common.engine(arg.size)
  if tiny:
    c.seeds = 64
    c.data.uri = "world:train"
    c.teacher.update(budget=1_000_000, image_tokens=500)
    # Words are bytes to the tiny tokenizer: a question to a teacher has about 1,000.
    c.engine.update(
      slots=8, max_prompt=1024, max_len=2048, prompt_len=1024, views=(), patches=512
    )
  return c
