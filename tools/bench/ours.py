"""Our side of `bench.py`: the programs of the trainer and the engine, run and waited for.

A side is a function without arguments that does the whole work once and returns numpy:
log-probs, logits, ids.  `bench.py` calls it again and again, and compares what it gives
with what the other side gives.  The learning rate is 1e-12, so every repeat meets the
same weights.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pixel_jax.batch import Batch, Prompts
from pixel_jax.chat import encode
from pixel_jax.data import pack
from pixel_jax.model import qwen2_5_vl
from pixel_jax.model.config import ModelConfig
from pixel_jax.rl import objectives
from pixel_jax.rollout import decode, engine, features
from pixel_jax.run import optim
from pixel_jax.tools.bench import data

Params = Any
OPTIMIZER = dict(lr=1e-12, total_steps=1000, schedule="constant", b2=0.95)
FROZEN = ("^vision/",)


# ---- Model ---------------------------------------------------------------------------


def vision(config: ModelConfig, params: Params, pictures: Sequence) -> Callable:
  """Features f32[pictures M D] of pictures of one grid, in raster order."""
  T = pictures[0].num_merged
  empty = np.zeros(T, np.int32), np.zeros((T, 3), np.int32), np.zeros(T), np.zeros(T)
  batch = full([encode.Example(*empty, [(0, p)]) for p in pictures])
  program = jax.jit(functools.partial(qwen2_5_vl.encode_vision, config))
  order = pictures[0].merged_row
  return lambda: np.asarray(program(params, batch), np.float32)[:, order]


def prefill(config: ModelConfig, params: Params, rows: Sequence) -> Callable:
  """Logits f32[B V] after the last token of each row, its cache filled."""
  batch = full(rows)
  B, T = batch.tokens.shape
  count = jnp.full((B,), T, jnp.int32)

  @jax.jit
  def program(params, batch):
    features = qwen2_5_vl.encode_vision(config, params, batch)
    cache = qwen2_5_vl.init_cache(config, B, T)
    hidden, cache = qwen2_5_vl.extend(
      config, params, cache, batch.tokens, batch.position, count, batch.vision_index,
      features,
    )  # fmt: skip
    return qwen2_5_vl.logits(config, params, hidden[:, -1]), cache

  return lambda: np.asarray(jax.block_until_ready(program(params, batch))[0])


def generate(
  config: ModelConfig, params: Params, context: np.ndarray, tokens: int
) -> Callable:
  """Ids i32[B tokens] after prompts i32[B S], of which S - 1 are filled beforehand."""
  B, S = context.shape
  program = jax.jit(
    functools.partial(decode.decode, config, stops=()),
    static_argnames="lanes",
    donate_argnums=1,
  )
  position = jnp.broadcast_to(jnp.arange(S - 1)[:, None], (B, S - 1, 3))

  @jax.jit
  def fill(params):
    cache = qwen2_5_vl.init_cache(config, B, S - 1)
    count = jnp.full((B,), S - 1, jnp.int32)
    index = jnp.full((B, S - 1), -1)
    given = jnp.asarray(context[:, :-1])
    return qwen2_5_vl.extend(config, params, cache, given, position, count, index)[1]

  filled = jax.block_until_ready(fill(params))
  full = functools.partial(np.full, (B,), dtype=np.int32)
  rows = np.arange(B, dtype=np.int32)  # every sequence has a prompt of its own
  prompts = Prompts(filled.k, filled.v, full(S - 1), rows, rows[:, None])
  held = {"cache": qwen2_5_vl.init_cache(config, B, tokens)}
  slots = decode.Slots(
    length=full(0), last=context[:, -1].astype(np.int32), position=full(S - 1),
    budget=full(tokens), key=np.zeros((B, 2), np.uint32),
    sampling=decode.Wish(temperature=0.0).rows(B),
  )  # fmt: skip
  free = np.full((B, tokens), -1, np.int32)

  def run():
    # What an earlier run wrote lies beyond the lengths in `slots` and is not seen.
    held["cache"], _, out, *_ = program(
      params, held["cache"], prompts, slots, free, None, lanes=B
    )
    return np.asarray(out)

  return run


# ---- Training ------------------------------------------------------------------------


def train(
  config: ModelConfig,
  params: Params,
  batches: Sequence[Batch],
  *,
  freeze: Sequence[str] = (),
  policy: bool = False,
) -> Callable:
  """One pass over `batches`, an update each -> the sum of their losses.

  Args:
    policy: GRPO's clipped loss; else cross-entropy.  All batches make one update then.
  """
  # Copied, because an update donates; committed, or the second one compiles again.
  params = jax.tree.map(jnp.copy, params)
  trained = optim.split(params, freeze)[0]
  tx, _ = optim.make(params, freeze=freeze, **OPTIMIZER)
  state = {"params": params, "opt": optim.init(tx, trained)}
  layout = jax.tree.map(lambda x: x.sharding, state)
  lie = optim.split(layout["params"], freeze)[0]
  all_tokens = float(sum(float(b.weight.sum()) for b in batches))

  def loss_fn(trained, frozen, batch, tokens):
    params, mine = optim.merge(trained, frozen), batch.weight > 0
    logp, entropy = qwen2_5_vl.token_logp(config, params, batch, where=mine)
    if policy:
      old = jax.lax.stop_gradient(logp)
      loss = objectives.loss(
        logp, old, batch.advantage, batch.weight, normalizer=tokens
      )[0]
      return loss, entropy.sum() / tokens
    total = -(logp * batch.weight).sum()
    return total / tokens, total

  def gradient(params, batch, tokens):
    return jax.grad(loss_fn, has_aux=True)(*optim.split(params, freeze), batch, tokens)

  def apply_(state, grads):
    trained, frozen = optim.split(state["params"], freeze)
    trained, opt, told = optim.apply(tx, grads, trained, state["opt"])
    return {"params": optim.merge(trained, frozen), "opt": opt}, told["optim/grad_norm"]

  # As in train_sft.py: the whole step is one program.
  @functools.partial(jax.jit, donate_argnums=0, out_shardings=(layout, None, None))
  def update(state, batch):
    tokens = jnp.maximum(batch.weight.sum(), 1.0)
    grads, total = gradient(state["params"], batch, tokens)
    state, norm = apply_(state, grads)
    return state, total, norm

  # As in train_rl.py: as many micro-batches as the rollouts fill, then one step.
  @functools.partial(jax.jit, donate_argnums=0, out_shardings=(lie, None))
  def accumulate(total, params, batch):
    grads, told = gradient(params, batch, all_tokens)
    return jax.tree.map(jnp.add, total, grads), told

  apply = jax.jit(apply_, donate_argnums=0, out_shardings=(layout, None))
  shapes = jax.eval_shape(lambda x: x, trained)
  zeros = jax.jit(
    lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
    out_shardings=lie,
  )
  held = {"state": state}

  def step_each():
    totals = []
    for batch in batches:
      held["state"], total, norm = update(held["state"], batch)
      totals.append(total)
    return np.array([float(sum(jax.device_get(totals))), float(norm)])

  def step_once():
    grads, totals = zeros(), []
    for batch in batches:
      grads, total = accumulate(grads, held["state"]["params"], batch)
      totals.append(total)
    held["state"], norm = apply(held["state"], grads)
    return np.array([float(sum(jax.device_get(totals))), float(norm)])

  return step_once if policy else step_each


def packed(
  examples: Sequence, row: tuple[int, int, int], bank: features.Bank | None = None
) -> list[Batch]:
  """The micro-batches that `examples` fill, packed as the trainer packs them."""
  B, T, P = row
  bins = [[examples[i] for i in b] for b in pack.first_fit(examples, T, P)]
  groups = [bins[i : i + B] for i in range(0, len(bins), B)]
  rows = [pack.collate(g, T, P, num_rows=B, apart=bank is not None) for g in groups]
  return [_on_device(bank.fill(r) if bank else r) for r in rows]


def with_features(
  config: ModelConfig, params: Params, examples: Sequence, row: tuple[int, int, int]
) -> list[Batch]:
  """`packed`, with the frozen tower's features: what every epoch but the first meets."""
  text = optim.list_paths({"text": params["text"]})
  bank = features.open_bank(config, params, text, patches=row[2], gib=8)
  return packed(examples, row, bank)


def full(rows: Sequence) -> Batch:
  """One example a row, all of one length: no padding."""
  patches = max(sum(pack.distinct(e).values()) for e in rows)
  T, P = len(rows[0].tokens), max(_up(patches, pack.PATCH_BLOCK), pack.PATCH_BLOCK)
  return _on_device(pack.collate([[e] for e in rows], T, P, num_rows=len(rows)))


def _on_device(fields: dict[str, np.ndarray]) -> Batch:
  return jax.block_until_ready(Batch(**jax.tree.map(jnp.asarray, fields)))


# ---- Host and rollout ----------------------------------------------------------------


def preprocess(codec: encode.Codec, photos: Sequence) -> Callable:
  """The bytes that the device is given, one picture after the other."""
  return lambda: [encode.pixels_of(photo, "image", codec) for photo in photos]


def rollout(
  config: ModelConfig,
  params: Params,
  codec: encode.Codec,
  size: data.Size,
  turns: dict,
  conversations: dict,
) -> Callable:
  """Plays the script with the engine -> (task, sample) -> trajectory.

  Args:
    conversations: of `data.replay`; the engine's shapes follow from them.
  """
  tasks = data.tasks(size)
  playing = engine.Engine(
    config, codec, group_size=size.groups[1], **engine_shapes(conversations),
    **size.engine,
  )  # fmt: skip

  def run():
    groups = playing.run(params, tasks, step=0, **played_by(size, turns))
    run.stats = playing.stats
    played = [f.trajectory for group in groups for f in group]
    return {(t.task.id, t.sample): t for t in played}

  return run


def engine_shapes(conversations: dict) -> dict[str, int]:
  """What an engine must hold of `data.replay`."""
  trajectories = [c.trajectory for c in conversations.values()]
  prompt = _up(max(t.sampled.index(True) for t in trajectories), 8)
  rest = max(len(t.ids) - t.sampled.index(True) for t in trajectories) + 1
  patches = max(p.num_patches for c in conversations.values() for p in c.pixels)
  return dict(
    max_prompt=prompt, max_len=prompt + _up(rest, 64), prompt_len=prompt,
    patches=_up(patches, pack.PATCH_BLOCK),
  )  # fmt: skip


def played_by(size: data.Size, turns: dict) -> dict[str, Any]:
  """Settings of `Engine.run` that make it say the script."""
  return dict(
    seed=0, group_size=size.groups[1], load_media=data.loader(size),
    max_turns=max(map(len, turns.values())),
    max_new_tokens=max(len(ids) for t in turns.values() for ids in t),
    script=lambda task, sample: turns[task.id, sample],
  )  # fmt: skip


def _up(n: int, step: int) -> int:
  return math.ceil(n / step) * step
