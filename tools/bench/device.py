"""The cases of `pixel-jax bench accelerator`, one a process; accelerator.py runs them.

Nothing is modelled after training: the programs are those that the trainers and the
engine build (as in tools/compile), with random weights of the real shapes, random pixels
and random ids, never zeros, which are multiplied faster.  A row of figures is a dict:

  what        the case in words
  seconds     of one call, the median
  rate, unit  such as tokens/s
  share, of   of the limit: the card's bf16 peak (MFU), or its bandwidth; goal: wanted
  peak_bytes  of the device since the process began; forecast_bytes: what the compiler
              said of the program, and what else was alive
  compile_s   of the program
  equal       of a comparison: `gap` is at most `allowed`
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pixel_jax import parallel, train_rl, train_sft
from pixel_jax.batch import Prompts
from pixel_jax.chat import encode
from pixel_jax.configs import rl as rl_configs
from pixel_jax.configs import sft as sft_configs
from pixel_jax.data import pack
from pixel_jax.model import attention, flops, kernels, qwen2_5_vl
from pixel_jax.pixels import image, resample
from pixel_jax.rl import advantages, replay
from pixel_jax.rollout import decode, engine, features, fleet, session
from pixel_jax.run import metrics, optim, policies, settings
from pixel_jax.tools.bench import accelerator, compare, data, ours
from pixel_jax.tools.compile import cost as compile_cost
from pixel_jax.tools.compile import engine as compile_engine
from pixel_jax.tools.compile import programs as compile_programs

KERNEL = {"gpu": "cudnn", "tpu": "splash", "cpu": "xla"}
PICTURES = 0.3  # of the tokens of a row
LEARNED = 0.4
GROUP = 8


@dataclasses.dataclass(frozen=True)
class Size:
  """How much of everything.  Where several are listed, the first that fits is taken."""

  large: str
  small: str
  exact: str  # of data.SIZES
  sft_large: tuple[tuple[int, str], ...]  # rows of a device, remat
  sft_small: tuple[tuple[int, str], ...]
  tokens: int  # of a row
  mean: int  # of an example
  slots: tuple[int, ...]
  contexts: tuple[int, ...]
  chunk: int
  prefill: tuple[tuple[int, int], ...]  # rows, tokens of each
  vision: tuple[int, int]  # pictures, patches of each
  script: data.Size
  at_a_time: int  # rollouts of a batch of `generate`


# Shorter than that of bench.py: `generate` waits for the longest of every turn.
SCRIPT = dataclasses.replace(data.SIZES["3b"], turn=96, longest=512)
SIZES = {
  "full": Size(
    "7b", "3b", "30m", sft_large=((2, "dots"), (2, "full"), (1, "full")),
    sft_small=((4, "dots"), (4, "qkvo"), (2, "full")), tokens=8192, mean=1400,
    slots=(64, 128), contexts=(1024, 4096, 8192), chunk=32,
    prefill=((4, 4096), (1, 4096)), vision=(8, 4096), script=SCRIPT, at_a_time=64,
  ),
  "tiny": Size(
    "tiny", "tiny", "tiny", sft_large=((2, "full"), (1, "full")), sft_small=((2, "full"),),
    tokens=512, mean=96, slots=(8, 16), contexts=(32, 64, 128), chunk=4,
    prefill=((2, 64),), vision=(2, 64), script=data.SIZES["tiny"], at_a_time=6,
  ),
}  # fmt: skip


class NoRoom(Exception):
  """The compiler's forecast is above the memory of the device."""


class Smallest(Exception):
  """A smaller size was asked for than the case has."""


def smaller(sizes: Sequence, attempt: int) -> Any:
  """The size of this attempt."""
  if attempt >= len(sizes):
    raise Smallest
  return sizes[attempt]


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("name", choices=[*accelerator.CASES, "compile-once"])
  parser.add_argument("--size", choices=list(SIZES), required=True)
  parser.add_argument("--attempt", type=int, default=0)
  parser.add_argument("--json", required=True)
  args = parser.parse_args(argv)
  case = {
    "exact": exact,
    "sft-7b-lora": functools.partial(sft, lora=True),
    "sft-3b": functools.partial(sft, lora=False),
    "decode-7b": decode_,
    "prefill-7b": prefill,
    "vision-7b": vision,
    "rollout-3b": functools.partial(rollout, theirs=False),
    "rollout-3b-hf": functools.partial(rollout, theirs=True),
    "rl-3b-lora": rl,
    "compile": compile_,
    "compile-once": compile_once,
  }[args.name]
  rows = []
  try:
    for row in case(SIZES[args.size], args.attempt):
      print(row, flush=True)
      rows.append(row)
      accelerator.write(pathlib.Path(args.json), json.dumps(rows))
  except Smallest:
    return accelerator.NO_SMALLER
  except Exception as error:
    if not is_room(error):
      raise
    print(f"no room: {error}")
    return accelerator.NO_MEMORY
  return 0


def is_room(error: Exception) -> bool:
  """Whether it is the memory: the forecast's, jax's or torch's way to say so."""
  names = {kind.__name__ for kind in type(error).__mro__}
  return bool(names & {"NoRoom", "OutOfMemoryError"}) or (
    isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
  )


# ---- What all cases share ------------------------------------------------------------


def timed(call: Callable[[], Any], repeats: int = 5) -> float:
  """The median seconds of a call that waits for its result; the first is not counted."""
  seconds = []
  for _ in range(repeats + 1):
    begin = time.perf_counter()
    call()
    seconds.append(time.perf_counter() - begin)
  return statistics.median(seconds[1:])


def mfu(work: float, seconds: float, devices: int | None = None) -> dict:
  """The share of the peak of all devices, or of some; nothing where it is not known."""
  most = metrics.peak_flops()
  if not most:
    return {}
  return {"share": work / seconds / most / (devices or jax.device_count()), "of": "MFU"}


def peak() -> dict:
  """What the device held at its worst; a CPU does not say."""
  stats = jax.devices()[0].memory_stats()
  return {"peak_bytes": stats["peak_bytes_in_use"]} if stats else {}


def check_room(forecast: float) -> None:
  limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", float("inf"))
  if forecast > limit:
    raise NoRoom(f"{forecast / 2**30:.1f} GiB of {limit / 2**30:.1f}")


def compiled(lowered: Callable[[], jax.stages.Lowered]):
  """(program, figures), compiled for these very arguments; NoRoom by its forecast."""
  begin = time.perf_counter()
  program = lowered().compile()
  took = time.perf_counter() - begin
  told = program.memory_analysis()
  forecast = compile_programs.peak_bytes(told) if told else 0
  check_room(forecast)
  return program, {"compile_s": took, "forecast_bytes": int(forecast)}


def open_run(module, name: str, devices=None, **changes) -> compile_programs.Run:
  """A config of ours on the devices that are here."""
  config = module.get_config(name)
  platform = jax.devices()[0].platform
  config.model.attention = KERNEL[platform]
  if platform == "cpu":
    config.model.dtype = "float32"
  config.model.scan_layers = True
  config.update_from_flattened_dict(changes)
  return compile_programs.open_run(config, devices or jax.devices())


def state_of(run: compile_programs.Run) -> dict:
  """Random weights of the real shapes, and an optimizer that has seen nothing."""
  place = policies.layout(run.model, run.mesh)
  params = qwen2_5_vl.init(run.model, jax.random.key(0), place)
  return optim.begin(run.tx, params, settings.frozen(run.config), run.mesh)


def weights(model) -> dict:
  """Random weights as an engine of one device holds them: in the compute dtype."""
  with jax.default_device(jax.devices()[0]):
    return jax.block_until_ready(_weights(model, jax.random.key(0)))


@functools.partial(jax.jit, static_argnums=0)
def _weights(model, key):
  return fleet.prepare(model, qwen2_5_vl.init(model, key))


def filled_rows(size: Size, model, rows: int, share: float) -> list[list]:
  """Rows full of examples with lengths as in data.examples.

  Args:
    share: of the tokens of each that show a picture.
  """
  rng = np.random.default_rng(0)
  out = []
  for _ in range(rows):
    row, left = [], size.tokens
    while left:
      n = min(max(data.length(rng, size.mean), 24), left)
      n = left if left - n < 24 else n
      picture = data.sides(int(n * share)) if share else None
      row.append(data.example(rng, model, n, picture, int(n * LEARNED)))
      left -= n
    out.append(row)
  return out


# ---- Training ------------------------------------------------------------------------


def sft(size: Size, attempt: int, *, lora: bool) -> Iterator[dict]:
  """Train steps of packed rows: text alone, as epochs with kept features are; then with
  pictures, the frozen tower in every step."""
  name = size.large if lora else size.small
  rows, remat = smaller(size.sft_large if lora else size.sft_small, attempt)
  rows *= jax.device_count()
  changes = {
    "model.remat": remat, "data.rows": rows, "data.tokens": size.tokens,
    "optim.moment_dtype": "bfloat16", "optim.freeze": ("^vision/",),
    "lora.rank": 32 if lora else 0,
  }  # fmt: skip
  run = open_run(sft_configs, name, **changes)
  state = state_of(run)
  for share in (0.0, PICTURES):
    examples = filled_rows(size, run.model, rows, share)
    state, row = train_step(run, state, examples, kept=not share)
    shown = f"{PICTURES:.0%} pictures, tower in the step" if share else "text"
    adapters = " LoRA 32" if lora else ""
    row["what"] = (
      f"sft {name}{adapters}, {rows} x {size.tokens}, remat {remat}, {shown}"
    )
    if lora and "share" in row:
      row["goal"] = 0.42 if share else 0.5
    yield row


def train_step(run, state: dict, examples: list[list], *, kept: bool):
  """(state, figures) of the trainer's own step.

  Args:
    examples: of each row.
    kept: features of the frozen tower come from a bank, as in all epochs but the first.
  """
  learned, T = optim.list_paths(run.trained), run.config.data.tokens
  most = max(sum(sum(pack.distinct(e).values()) for e in row) for row in examples)
  P = pack.PATCH_BLOCK * max(1, -(-most // pack.PATCH_BLOCK))
  bank = None
  if kept:
    bank = features.open_bank(run.model, state["params"], learned, patches=P, gib=1)
  fields = pack.collate(examples, T, P, len(examples), apart=kept)
  batch = parallel.to_devices(run.mesh, bank.fill(fields) if bank else fields)
  update = train_sft.programs(run.config, run.model, run.tx, run.schedule, state)[0]
  update, told = compiled(functools.partial(update.lower, state, batch))
  held = {"state": state}
  del state

  def call():
    held["state"], m, held["work"] = update(held["state"], batch)
    held["loss"] = float(m["loss"])

  seconds = timed(call)
  if not np.isfinite(held["loss"]):
    raise ArithmeticError(f"the loss is {held['loss']}")
  work = jax.tree.map(float, jax.device_get(held["work"]))
  done = flops.of_work(run.model, work, learned).total
  row = {"seconds": seconds, "rate": work["tokens"] / seconds, "unit": "tokens/s"}
  return held["state"], row | mfu(done, seconds) | told | peak()


def rl(size: Size, attempt: int) -> list[dict]:
  """One step with the script's rollouts, as train_rl.main has it, part by part."""
  rows = smaller((2, 1), attempt)
  with tempfile.TemporaryDirectory() as folder:
    codec = data.codec(size.script, folder)
  turns = data.script(size.script, codec.tokenizer)
  conversations = data.replay(size.script, codec, turns)
  examples = [encode.example(c.trajectory, c.pixels) for c in conversations.values()]
  longest = 64 * -(-max(len(e.tokens) for e in examples) // 64)
  most = max(sum(pack.distinct(e).values()) for e in examples)
  changes = {
    "lora.rank": 32, "rl.rows": rows, "rl.tokens": 2 * longest,
    "rl.patches": 2 * pack.PATCH_BLOCK * -(-most // pack.PATCH_BLOCK),
    "rl.group_size": size.script.groups[1],
  }  # fmt: skip
  run = open_run(rl_configs, size.small, jax.devices()[:1], **changes)
  # The script's ids are those of its own small vocabulary.
  model = dataclasses.replace(run.model, **data.ids(codec.tokenizer))
  run = dataclasses.replace(run, model=model)
  c, state = run.config, state_of(run)
  learned = optim.list_paths(run.trained)
  shapes = ours.engine_shapes(conversations)
  rollouts = fleet.Fleet(
    lambda: engine.Engine(
      model.merged, codec, group_size=size.script.groups[1], **shapes,
      **size.script.engine,
    ),
    model, run.mesh, shards=1,
  )  # fmt: skip
  steps = train_rl.programs(c, model, run.tx, run.schedule, state)
  memory = {0: replay.Replay(**c.replay)}

  def one_step(state, step):
    watch = session.Stopwatch()
    with watch("sync"):
      params = jax.block_until_ready(rollouts.sync(state["params"]))
    with watch("rollout"):
      groups = rollouts.run(
        params, data.tasks(size.script), step=step, **ours.played_by(size.script, turns)
      )
    del params
    with watch("reward"):
      # Random weights are never right; what the script says must be worth something.
      parts, mask, _ = train_rl.judge(
        groups, lambda t: float(t.sample % 2), c.rl.masked_stops, **c.reward
      )
      advantage, _ = advantages.group_relative(parts["total"], mask, std=c.rl.std)
      train_rl.score(groups, parts, advantage, step)
      examples, n = train_rl.to_examples(groups, mask)
      chosen, replayed = train_rl.choose(memory, examples, (0, step))
    with watch("update"):
      state, m, cost = train_rl.update(
        c, model, steps, state, chosen, learned=learned, tokens=n["tokens"],
        replayed=replayed, stop=lambda: False, noticed=lambda *_: None,
      )  # fmt: skip
      jax.block_until_ready(state)
    trained = sum(len(e.tokens) for x in chosen.values() for e in x)
    tokens = {"rollout": n["sampled"], "update": trained}
    return state, m["loss"], sum(cost.values()), tokens, watch.seconds

  state, *_ = one_step(state, 0)  # compiles
  begin = time.perf_counter()
  _, loss, work, tokens, told = one_step(state, 1)
  whole = time.perf_counter() - begin
  if not np.isfinite(loss):
    raise ArithmeticError(f"the loss is {loss}")
  name = f"rl {size.small} LoRA 32, {len(turns)} rollouts"
  out = [
    {"what": f"{name}, {part}", "seconds": seconds}
    | ({"rate": tokens[part] / seconds, "unit": "tokens/s"} if part in tokens else {})
    for part, seconds in told.items()
  ]
  out[-1] |= mfu(work, told["update"])
  whole_row = {"what": f"{name}, whole step", "seconds": whole}
  return [*out, whole_row | peak()]


# ---- Rollout -------------------------------------------------------------------------


def open_engine(size: Size, slots: int, **shapes):
  """(engine, its programs, weights) of the large model on one device."""
  changes = {
    "engine.slots": slots, "engine.chunk": size.chunk, "rl.group_size": GROUP,
    **{f"engine.{k}": v for k, v in shapes.items()},
  }  # fmt: skip
  run = open_run(rl_configs, size.large, jax.devices()[:1], **changes)
  e, params = compile_engine.open_engine(run), weights(run.model)
  return e, e.programs(jax.tree.leaves(params)[0].sharding), params


@jax.jit
def waves(x: jax.Array) -> jax.Array:
  """Numbers of size 1 in every place: zeros would be read and multiplied faster."""
  at = [jax.lax.broadcasted_iota(jnp.float32, x.shape, d) for d in range(x.ndim)]
  return jnp.sin(sum((d + 1.3) * a for d, a in enumerate(at))).astype(x.dtype)


def decode_(size: Size, attempt: int) -> Iterator[dict]:
  """A chunk of tokens in every slot; half of each context is the prompt of its group."""
  chosen = smaller([size.slots[:n] for n in range(len(size.slots), 0, -1)], attempt)
  bandwidth = compare.measure_limits(False)["bandwidth"]
  for slots in chosen:
    yield from decode_in(size, slots, bandwidth)


def decode_in(size: Size, B: int, bandwidth: float) -> Iterator[dict]:
  """Figures of B slots, a row a context."""
  most, groups, chunk = max(size.contexts), B // GROUP, size.chunk
  e, p, params = open_engine(
    size, B, max_prompt=most // 2, max_len=most + 8 * chunk,
    prompt_len=min(most // 2, 2048), extend_len=min(most // 2, 2048), views=(),
  )  # fmt: skip
  cache, prompts, *_ = p.open()
  held = {"cache": cache.replace(k=waves(cache.k), v=waves(cache.v))}
  prompts = prompts.replace(k=waves(prompts.k), v=waves(prompts.v))
  del cache
  lane = np.full((e.prompts, GROUP), B, np.int32)
  lane[:groups] = np.arange(B, dtype=np.int32).reshape(groups, GROUP)
  rng, vocab = np.random.default_rng(0), e.config.text.vocab
  ids = rng.integers(data.SPECIAL, vocab, (B, chunk), np.int32)  # that are said
  full = functools.partial(np.full, B, dtype=np.int32)

  def arguments(context):
    shared = Prompts(
      k=prompts.k, v=prompts.v, length=np.full(e.prompts, context // 2, np.int32),
      row=(np.arange(B) // GROUP).astype(np.int32), lane=lane,
    )  # fmt: skip
    slots = decode.Slots(
      length=full(context - context // 2), last=ids[:, 0], position=full(context),
      budget=full(chunk), key=np.zeros((B, 2), np.uint32),
      sampling=decode.Wish().rows(B),
    )  # fmt: skip
    return shared, jax.device_put(slots, jax.devices()[0]), ids, None

  program, told = compiled(
    lambda: p.decode.lower(params, held["cache"], *arguments(most), lanes=B)
  )
  text = sum(x.size for x in jax.tree.leaves(params["text"]["blocks"]))

  def call(context):
    held["cache"], _, _, logp, count = program(
      params, held["cache"], *arguments(context)
    )
    held["told"] = np.asarray(logp), int(np.asarray(count).min())

  for context in size.contexts:
    seconds = timed(functools.partial(call, context)) / chunk
    logp, count = held["told"]
    if count != chunk or not np.isfinite(logp).all():
      raise ArithmeticError(f"{count} tokens of {chunk} were sampled")
    half = context // 2
    cost = compile_cost.decode(
      e.config, tensor=1, weights=text, lanes=B, view=context,
      read=B * (context - half) + groups * half, steps=1,
    )  # fmt: skip
    row = {
      "what": f"decode {size.large}, {B} slots after {context} tokens",
      "seconds": seconds, "rate": B / seconds, "unit": "tokens/s",
      "share": cost.bytes / bandwidth / seconds, "of": "bandwidth",
    }  # fmt: skip
    yield row | told | peak() | ({"goal": 0.6} if B == 64 else {})


def prefill(size: Size, attempt: int) -> Iterator[dict]:
  """Prompts of one length into the cache of prompts."""
  smaller(size.prefill, attempt)
  for shape in size.prefill[attempt:]:
    yield prefill_of(size, *shape)


def prefill_of(size: Size, R: int, T: int) -> dict:
  """Figures of R prompts of T tokens."""
  e, p, params = open_engine(
    size, 8, max_prompt=T, max_len=2 * T, prompt_len=T, prompt_rows=R, extend_len=T,
    views=(), prompts=max(R, 2),
  )  # fmt: skip
  _, prompts, _, bank = p.open()
  rng, full = np.random.default_rng(0), functools.partial(np.full, R, dtype=np.int32)
  turns = decode.Turns(
    slot=np.arange(R, dtype=np.int32), length=full(0), count=full(T),
    tokens=rng.integers(data.SPECIAL, e.config.text.vocab, (R, T), np.int32),
    position=np.broadcast_to(np.arange(T, dtype=np.int32)[:, None], (R, T, 3)),
    feature=np.full((R, T), -1, np.int32),
  )  # fmt: skip
  held = {"prompts": prompts}
  del prompts
  program, told = compiled(
    lambda: p.extend.lower(params, held["prompts"], turns, bank, view=T)
  )

  def call():
    held["prompts"] = jax.block_until_ready(
      program(params, held["prompts"], turns, bank)
    )

  seconds = timed(call)
  if not np.isfinite(np.asarray(held["prompts"].k[-1, 0, 0, -1], np.float32)).all():
    raise ArithmeticError("the cache is not finite")
  work = R * T * flops.text_per_token(e.config, T / 2)
  row = {
    "what": f"prefill {size.large}, {R} x {T}", "seconds": seconds,
    "rate": R * T / seconds, "unit": "tokens/s",
  }  # fmt: skip
  return row | mfu(work, seconds, devices=1) | told | peak()


def vision(size: Size, attempt: int) -> list[dict]:
  """Pictures of one size through the tower."""
  count, patches = size.vision
  count = smaller([count >> n for n in range(count.bit_length())], attempt)
  run = open_run(rl_configs, size.large, jax.devices()[:1])
  params = {"vision": weights(run.model)["vision"]}
  side = round((patches / 4) ** 0.5)
  rng = np.random.default_rng(0)
  shown = [data.noise(rng, side, side) for _ in range(count)]
  T = shown[0].num_merged
  empty = np.zeros(T, np.int32), np.zeros((T, 3), np.int32), np.zeros(T), np.zeros(T)
  batch = ours.full([encode.Example(*empty, [(0, p)]) for p in shown])
  encode_vision = jax.jit(functools.partial(qwen2_5_vl.encode_vision, run.model))
  program, told = compiled(functools.partial(encode_vision.lower, params, batch))
  seconds = timed(lambda: jax.block_until_ready(program(params, batch)))
  P = shown[0].num_patches
  work = count * P * flops.vision_per_patch(run.model, P)
  return [
    {
      "what": f"tower of the {size.large}, {count} x {P} patches", "seconds": seconds,
      "rate": count * P / seconds, "unit": "patches/s",
    } | mfu(work, seconds, devices=1) | told | peak()
  ]  # fmt: skip


def rollout(size: Size, attempt: int, *, theirs: bool) -> list[dict]:
  """The script by the engine, or by `generate`; each must say it to the letter."""
  shown = dataclasses.replace(size.script, model=size.small)
  with tempfile.TemporaryDirectory() as folder:
    codec = data.codec(shown, folder)
  platform = jax.devices()[0].platform
  model = data.model(
    shown, codec.tokenizer, attention=KERNEL[platform],
    dtype="float32" if platform == "cpu" else "bfloat16",
  )  # fmt: skip
  if theirs:
    # One batch of the first questions: all of them would take minutes.
    questions = [size.at_a_time // shown.groups[1] >> n for n in range(3)]
    questions = smaller([n for n in questions if n], attempt)
    shown = dataclasses.replace(shown, groups=(questions, shown.groups[1]))
  else:
    smaller((shown,), attempt)
  turns = data.script(shown, codec.tokenizer)
  conversations = data.replay(shown, codec, turns)
  if theirs:
    from pixel_jax.tools.bench import peers

    # What it says is forced, so its weights need not be ours.
    run = peers.rollout(peers.load(model, None), codec, shown, turns, len(turns))
    what = f"generate, {len(turns)} at a time"
  else:
    run = ours.rollout(model, weights(model), codec, shown, turns, conversations)
    run()  # compiles
    what = "engine"
  begin = time.perf_counter()
  played = run()
  seconds = time.perf_counter() - begin
  said = {k: c.trajectory.ids for k, c in conversations.items()}
  wrong = [k for k, ids in said.items() if played[k].ids != ids]
  sampled = sum(len(ids) for t in turns.values() for ids in t)
  count = math.prod(size.script.groups)
  row = {
    "what": f"rollout {size.small}, {len(turns)} of {count}, {what}",
    "seconds": seconds, "rate": sampled / seconds, "unit": "tokens/s",
    "equal": not wrong,
  }  # fmt: skip
  if not theirs:
    row |= {
      k: run.stats[f"rollout/{k}"]
      for k in ("occupancy", "host_syncs_per_chunk", "chunks", "prefills_per_group")
    } | {k: v for k, v in run.stats.items() if k.startswith("perf/")}
    row["what"] += (
      f" (occupancy {row['occupancy']:.0%}, {row['host_syncs_per_chunk']:.2f} host syncs "
      "a chunk)"
    )
  return [row]


# ---- Exactness -----------------------------------------------------------------------


def compared(what: str, mine, theirs, allowed: float) -> dict:
  """The largest difference, relative to the largest number."""
  mine, theirs = np.asarray(mine, np.float64), np.asarray(theirs, np.float64)
  gap = float(np.abs(mine - theirs).max() / max(np.abs(theirs).max(), 1e-9))
  return {"what": what, "gap": gap, "allowed": allowed, "equal": bool(gap <= allowed)}


def exact(size: Size, attempt: int) -> Iterator[dict]:
  """Numbers of the device against torch on the CPU, and its matmul and bandwidth."""
  smaller((size,), attempt)
  from pixel_jax.tools.bench import peers

  shape = data.SIZES[size.exact]
  with tempfile.TemporaryDirectory() as folder:
    codec = data.codec(shape, folder)
  config = data.model(shape, codec.tokenizer, dtype="float32", remat="none")
  params = jax.device_put(qwen2_5_vl.init(config, jax.random.key(0)), jax.devices()[0])
  other = peers.load(config, jax.device_get(params), gpu=False)
  rows = data.rows(shape, config)
  count, patches = shape.images
  side = round((patches / 4) ** 0.5)
  shown = [data.noise(np.random.default_rng(0), side, side) for _ in range(count)]
  seen, said = peers.vision(other, shown)(), peers.prefill(other, rows)()
  platform = jax.devices()[0].platform
  narrow = dataclasses.replace(config, dtype="bfloat16", attention=KERNEL[platform])
  # bf16 keeps 8 bits: 24 blocks of them against float32, as torch's bf16 differs, too.
  # The tiny model's numbers are small sums of few.
  rough = 0.1 if platform == "cpu" else 0.05
  for name, c, allowed in (("float32", config, 1e-4), ("bfloat16", narrow, rough)):
    with jax.default_matmul_precision("highest" if name == "float32" else "default"):
      weights_ = params if name == "float32" else qwen2_5_vl.cast(c, params)
      pictures = ours.vision(c, weights_, shown)()
      logits = ours.prefill(c, weights_, rows)()
    yield compared(f"features, {name}", pictures, seen, allowed)
    yield compared(f"logits, {name}", logits, said, allowed)
  with jax.default_matmul_precision("highest"):
    found = sampler(shape, codec, config, params, other)
  yield from (*found, kernel(platform), zoom(shape))
  limits = compare.measure_limits(False)
  yield (
    {
      "what": "matmul", "rate": limits["matmul_jax"] / 1e9, "unit": "GFLOP/s",
      **mfu(limits["matmul_jax"], 1.0, devices=1),
    }
  )  # fmt: skip


def sampler(shape, codec, config, params, other) -> list[dict]:
  """Log-probs at sampling against the trainer's and torch's, of one call and its answer."""
  from pixel_jax.tools.bench import peers

  turns = data.script(shape, codec.tokenizer)
  conversations = data.replay(shape, codec, turns)
  played = ours.rollout(config, params, codec, shape, turns, conversations)()
  key = max(turns, key=lambda k: len(turns[k]))
  example = encode.example(conversations[key].trajectory, conversations[key].pixels)
  batch = ours.full([example])
  logp = jax.jit(functools.partial(qwen2_5_vl.token_logp, config))
  own = np.array(played[key].sampled)
  at = np.array(played[key].logp)[own]
  trained = np.asarray(logp(params, batch)[0])[0][own]
  theirs = peers.logp(other, example)[own]
  return [
    compared("log-probs, sampler and trainer", at, trained, 1e-4),
    compared("log-probs, sampler and torch", at, theirs, 1e-3),
  ]


def kernel(platform: str) -> dict:
  """The attention kernel of this device on packed rows, against the reference in f32."""
  rng = np.random.default_rng(0)
  B, N, K, T, H = 2, 8, 2, 512, 128
  q, k, v = (
    jnp.asarray(rng.normal(size=(B, n, T, H)), jnp.bfloat16) for n in (N, K, K)
  )
  segment = jnp.asarray(np.sort(rng.integers(1, 4, (B, T)), axis=1), jnp.int32)
  wide = [x.astype(jnp.float32) for x in (q, k, v)]
  with jax.default_matmul_precision("highest"):
    want = attention.attention(*wide, segment_q=segment, segment_k=segment, causal=True)
  if platform == "cpu":  # the same call, without the library that only GPUs have
    got = kernels.cudnn(q, k, v, segment, segment, True, "xla")
  else:
    got = attention.attention(
      q, k, v, segment_q=segment, segment_k=segment, causal=True, impl=KERNEL[platform]
    )
  return compared(f"attention, {KERNEL[platform]}", got, want, 0.02)


def zoom(shape) -> dict:
  """Crops resized on the device, byte for byte those of Pillow."""
  resize, equal = resample.Resize(), True
  for photo in data.photos(shape):
    crop = photo.crop(
      (photo.width // 5, photo.height // 7, *(n // 2 for n in photo.size))
    )
    new = (28 * 9, 28 * 7)
    equal &= resize(crop, new).tobytes() == image.bicubic(crop, new).tobytes()
  return {"what": "zoom, byte for byte", "gap": 0.0 if equal else 1.0, "allowed": 0.0,
          "equal": equal}  # fmt: skip


# ---- Compiling -----------------------------------------------------------------------


def compile_(size: Size, attempt: int) -> Iterator[dict]:
  """Two processes in turn: the first meets an empty cache, the second a full one."""
  smaller((size,), attempt)
  name = next(k for k, v in SIZES.items() if v is size)
  with tempfile.TemporaryDirectory() as folder:
    for how in ("no cache", "cached"):
      file = pathlib.Path(folder) / "rows.json"
      command = [
        sys.executable, "-m", "pixel_jax.tools.bench.device", "compile-once",
        f"--size={name}", f"--json={file}",
      ]  # fmt: skip
      cached = {
        "JAX_COMPILATION_CACHE_DIR": f"{folder}/programs",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      }
      begin = time.perf_counter()
      subprocess.run(command, env=os.environ | cached, check=True)
      whole = time.perf_counter() - begin
      for row in json.loads(file.read_text()):
        yield row | {"what": f"{row['what']}, {how}"}
      yield {"what": f"the whole process, {how}", "seconds": whole}


def compile_once(size: Size, attempt: int) -> list[dict]:
  """Compiles from shapes alone: nothing is run and no weights are made."""
  rows, remat = size.sft_large[-1]
  rows *= jax.device_count()
  P = pack.PATCH_BLOCK * -(-int(4 * PICTURES * size.tokens) // pack.PATCH_BLOCK)
  train = open_run(
    sft_configs, size.large,
    **{
      "model.remat": remat, "data.rows": rows, "data.tokens": size.tokens,
      "data.patches": P, "lora.rank": 32, "features.gib": 0.0,
    },
  )  # fmt: skip
  (update,) = compile_programs.programs(train)
  most = max(size.contexts)
  play = open_run(
    rl_configs, size.large, jax.devices()[:1],
    **{
      "engine.slots": size.slots[0], "engine.max_prompt": most // 2,
      "engine.max_len": most + 8 * size.chunk, "engine.chunk": size.chunk,
    },
  )  # fmt: skip
  chunk = next(
    p for p in compile_engine.programs(play) if p.name == f"decode {size.slots[0]}"
  )
  out = []
  for program in (update, chunk):
    begin = time.perf_counter()
    lowered = program.lower()
    traced = time.perf_counter() - begin
    begin = time.perf_counter()
    lowered.compile()
    out.append(
      {
        "what": f"compile {program.name}", "seconds": traced,
        "compile_s": time.perf_counter() - begin,
      }
    )  # fmt: skip
  return out


if __name__ == "__main__":
  sys.exit(main())
