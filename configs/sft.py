"""Supervised fine-tuning: the warm start that teaches the protocol of operations.

  python -m pixel_jax.train_sft --config=configs/sft.py:tiny,base --workdir=BASE
  python -m pixel_jax.train_sft --config=configs/sft.py:tiny --workdir=DIR
  python -m pixel_jax.train_sft --config=configs/sft.py:7b --workdir=DIR
  python -m pixel_jax.train_sft --config=configs/sft.py:7b,v5p:4x4x4 --workdir=DIR

All but the first want --config.init=DIR.  `tiny,base` stands in for what Qwen2.5-VL
brings along (it can point and read); `tiny` is the paper's SFT on few, imprecise
traces, which is what sets the learning trap.  `tiny,base,full` and `tiny,full` add deep
clips, zooms in two steps and self-correction (launch/local.sh --full).
"""

from ml_collections import ConfigDict

from pixel_jax.configs import common, pods

# Half of the clips are deep: these become video/zoom or video/direct only.
FULL_BASE = {
  "image/single": 0.20,
  "image/direct": 0.17,
  "image/crop": 0.08,
  "image/recrop1": 0.04,
  "image/recrop2": 0.02,
  "image/zoom": 0.07,
  "video/single": 0.10,
  "video/direct": 0.08,
  "video/frame": 0.04,
  "video/reselect": 0.05,
  "video/zoom": 0.15,
}
FULL_SFT = {
  "image/single": 0.30,
  "image/recrop1": 0.10,
  "image/recrop2": 0.05,
  "image/zoom": 0.10,
  "video/single": 0.15,
  "video/reselect": 0.05,
  "video/zoom": 0.25,
}

OPTIONS = {
  "base": "of tiny: pointing and reading, what a pretrained model brings along",
  "full": "of tiny: deep clips, zooms in two steps, self-correction",
  "topology": "KIND:AxB, the accelerators that the run is laid out for",
}


def get_config(arg="tiny"):
  arg = common.parse_arg(arg, OPTIONS)
  tiny = arg.size == "tiny"
  c = ConfigDict()
  c.seed = 0
  c.total_steps = 246  # the published warm start (pixel_reasoner.md 2.6)
  c.save_every = 50
  c.eval_every = 50
  c.init = ""  # a workdir, a converted checkpoint, a Hugging Face folder, or "random"
  c.model = common.model(arg.size)
  c.codec = common.codec(arg.size)
  c.lora = common.lora()  # rank > 0: only adapters are trained, optim.freeze is moot
  c.mesh = common.mesh(arg.size)
  c.data = dict(  # sources.open_source, pipeline.batches
    uri="jsonl:train.jsonl",  # or several with , between: docs/data.md
    root="",
    layout="",  # MODULE.FUNCTION of yours: docs/extending.md
    weights=(),  # of several; () = every record once
    filter=common.filter(),
    rows=128,  # of the global batch
    tokens=8192,  # of a row
    patches=32768,  # of a row: a clip and eight of its frames
    pack_window=256,  # examples of a shard packed together
    shards=8,
    max_bad_share=0.01,
    changed="refuse",  # "accept": go on with data that was changed
    threads=1 if tiny else 8,  # that decode and resize; they change no batch
  )
  c.optim = dict(  # optim.make
    lr=1e-6,
    schedule="cosine",
    warmup_steps=25,
    final_lr_ratio=0.0,
    b1=0.9,
    b2=0.999,
    weight_decay=0.0,
    clip_norm=1.0,
    max_nonfinite=5,  # updates in a row that are not finite and left out; then it ends
    moment_dtype="float32",  # of Adam's first moment
    freeze=("^vision/",),  # tower and merger, as in the paper
  )
  c.micro_batches = 1  # of a step, one after the other; more take less memory
  # Of a frozen tower, kept in the memory of each host: 7 KB a visual token of the 7B.
  c.features = dict(gib=32.0)  # features.open_bank; 0 = the tower runs in every step
  c.eval = dict(batches=2, uri="jsonl:val.jsonl")  # 0 or "": nothing is held out
  c.synthesis = {}  # synthesis.templates.Templates; {} = the data has traces
  c.checkpoint = dict(keep=3, keep_best="eval/loss")  # checkpoint.Checkpoints
  c.wandb = common.wandb()
  c.mlflow = common.mlflow()
  if tiny:
    c.data.update(
      uri="world:train", rows=16, tokens=128, patches=192, pack_window=32, shards=4
    )
    c.eval.update(uri="world:val")
    c.optim.update(b2=0.98, weight_decay=0.01, freeze=(), final_lr_ratio=0.2)
    c.synthesis = dict(  # synthesis.templates.Templates
      kinds={"image/single": 0.75, "video/single": 0.25},
      operation_share=0.15,  # few ...
      jitter=3.0,  # ... and imprecise: this is the trap (at 2.5 one seed of four fell out)
      edge_jitter=1.2,
      answer_weight=3.0,
    )
    c.total_steps = 70
    c.optim.update(lr=1e-3, warmup_steps=10)
  if tiny and arg.base:
    c.init = "random"
    c.total_steps = 600
    c.data.rows = 24
    c.optim.update(lr=3e-3, warmup_steps=30)
    c.synthesis.update(
      # Pointing and reading as calls: as separate skills (image/box, image/crop alone)
      # they were learned, but did not become calls within the 70 steps of SFT.
      kinds={
        "image/single": 0.32,
        "image/direct": 0.28,
        "image/crop": 0.12,
        "video/single": 0.13,
        "video/direct": 0.10,
        "video/frame": 0.05,
      },
      operation_share=1.0,
      jitter=0.5,
      edge_jitter=0.3,
    )
  if tiny and arg.full:
    c.data.update(  # as many tokens as above, in fewer and longer rows
      uri="world:full_train",
      rows=12 if arg.base else 8,
      pack_window=64,
      **common.FULL_ROW,
    )
    c.eval.update(uri="world:full_val")
    c.total_steps = 900 if arg.base else 120
    c.synthesis.kinds = FULL_BASE if arg.base else FULL_SFT
  return pods.fit(c, "sft", arg.size, arg.topology)
