"""Policies side by side on benchmarks or on your questions, with controls.

  python -m pixel_jax.evaluate --config=configs/evaluate.py:tiny --workdir=DIR \\
      --config.policies=BASE=runs/base,SFT=runs/sft,RL=runs/rl
  python -m pixel_jax.evaluate --config=configs/evaluate.py:7b,vstar,hrbench4k \\
      --workdir=DIR --config.data.root=DATA --config.policies=BASE=HF_DIR
"""

from ml_collections import ConfigDict

from pixel_jax.configs import common

BENCHMARKS = {
  "vstar": "V* Bench",
  "hrbench4k": "HR-Bench 4K",
  "hrbench8k": "HR-Bench 8K",
  "tallyqa_simple": "TallyQA, simple questions of its test split",
  "tallyqa_complex": "TallyQA, complex ones",
  "tallyqa_evaldata": "TallyQA, the part that Pixel Reasoner released",
  "infographicvqa": "InfographicVQA, validation split",
  "mvbench": "MVBench, 20 tasks",
  "visualprobe": "VisualProbe, easy, medium and hard",
  "treebench": "TreeBench",
  "mme_realworld_lite": "MME-RealWorld-Lite",
}
OPTIONS = {"full": "of tiny: the test split with deep clips", **BENCHMARKS}


def get_config(arg="tiny"):
  arg = common.parse_arg(arg, OPTIONS)
  c = ConfigDict()
  c.seed = 1
  c.policies = (
    ""  # NAME=DIR,NAME=DIR: workdirs or converted checkpoints, in table order
  )
  # Benchmarks lie below data.root; without any, the questions are those of data.uri.
  c.benchmarks = tuple(name for name in BENCHMARKS if arg[name])
  c.protocols = ("official", "pixel", "text") if c.benchmarks else ("pixel",)
  c.modes = ("free", "forbidden") if c.benchmarks else ("free", "forbidden", "forced")
  c.samples = 1  # answers to every question: avg@k and pass@k
  c.exports = ()  # "vlmevalkit", "lmms_eval"
  c.judge = ""  # MODULE.FUNCTION of yours: Trajectory -> float; docs/extending.md
  c.model = common.model(arg.size)
  c.codec = common.codec(arg.size)
  c.data = dict(  # sources.open_source
    uri="" if c.benchmarks else "jsonl:test.jsonl",
    root="",
    layout="",
    weights=(),
    filter=common.filter(),
    tasks=0 if c.benchmarks else 1000,  # 0 = all of them
  )
  c.engine = common.engine(arg.size)
  c.rollout = dict(
    temperature=0.0 if c.benchmarks else 1.0,  # 0 takes the likeliest token
    top_p=1.0,
    top_k=0,
    max_turns=5,
    max_new_tokens=2048,
    # One bucket, so that no answer depends on how many play: a killed evaluation that goes
    # on, and one of other hosts, give the same predictions.
    fixed_batch=True,
  )
  if arg.size == "tiny":
    c.rollout.update(max_turns=3, max_new_tokens=16)
  if arg.size == "tiny" and c.benchmarks:  # whose words are not single tokens to it
    c.engine.update(slots=16, max_prompt=1024, max_len=1536, prompt_len=256)
    c.engine.update(extend_rows=4, views=(), patches=1024)
    c.codec.budgets.update(image=(28 * 28, 168 * 168))
    c.rollout.update(max_new_tokens=32)
  if arg.size == "tiny" and not c.benchmarks:
    c.modes = ("free", "forbidden", "forced", "swapped", "blank", "masked")
    c.data.update(uri="world:test", tasks=1024)
  if arg.size == "tiny" and arg.full:
    c.data.update(uri="world:full_test")
    c.rollout.update(max_turns=4)
  return c
