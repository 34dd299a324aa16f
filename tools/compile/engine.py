"""The programs of a rollout with abstract arguments: the weights' way, and the engine's.

As in `compile_programs`, nothing is defined here: `placement` moves the weights, the
engine builds its own programs, and what is alive beside the arguments of each is added
up as train_rl holds it.
"""

import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pixel_jax import parallel
from pixel_jax.batch import Prompts
from pixel_jax.chat import encode, tokenizer
from pixel_jax.data import world
from pixel_jax.model import hf, qwen2_5_vl
from pixel_jax.rollout import decode, engine, fleet, pictures, placement
from pixel_jax.run import settings
from pixel_jax.tools.compile import cost as compile_cost
from pixel_jax.tools.compile.programs import (
  Program,
  Run,
  device_bytes,
  pictures_of,
  sizes,
)


def programs(run: Run) -> Iterator[Program]:
  """Of one engine as train_rl uses it: a group of `fleet.tensor` devices of a host."""
  tensor, train = run.config.fleet.tensor, run.state["params"]
  held = device_bytes(run.state)  # stays where it is through the rollouts
  mesh = settings.call("fleet", placement.engine_mesh, run.mesh, tensor)
  prepare = functools.partial(fleet.prepare, run.model)
  axes = hf.logical_axes(run.model.merged)
  reshard = placement.resharder(run.mesh, tensor, train, axes, prepare)
  group = list(mesh.devices[0])
  params = jax.tree.map(
    lambda x: x.update(sharding=placement.local_sharding(x, group)),
    reshard.eval_shape(train),
  )
  cost = compile_cost.Cost(bytes=device_bytes((train, params)))
  rest = held - device_bytes(train)
  yield Program("reshard", "sync", lambda: reshard.lower(train), cost, rest)
  held += device_bytes(params)  # the fleet keeps them through the rollouts
  e = open_engine(run)
  yield from _engine(run, e, params, held)


def refusal(run: Run, limit: float) -> str | None:
  """Why no engine finds room, before anything is compiled; None where one may.

  The least that a device holds while the engine runs: its part of the train state, of
  the weights in the compute dtype, and of the keys and values of eight slots.
  """
  tensor = run.config.fleet.tensor
  numbers = sum(sizes(qwen2_5_vl.abstract(run.model.merged)).values())
  held = {
    "train state": device_bytes(run.state),
    "weights": numbers * jnp.dtype(run.model.dtype).itemsize / tensor,
    "8 slots": 8 * slot_bytes(run),
  }
  if sum(held.values()) <= limit:
    if tensor == 1 or _reach_each_other(
      placement.engine_mesh(run.mesh, tensor).devices[0]
    ):
      return None
    return (
      f"the compiler has no route among {tensor} devices within a slice of "
      f"{run.mesh.size}: use a smaller config.fleet.tensor"
    )
  parts = " + ".join(f"{k} {v / compile_cost.GIB:.1f}" for k, v in held.items())
  return (
    f"an engine of {tensor} devices needs at least {parts} GiB on each, of "
    f"{limit / compile_cost.GIB:.1f}: {wider(run)}"
  )


def _reach_each_other(group) -> bool:
  """Asks the compiler for one sum: v5e and v6e have "limited ICI routing"."""
  mesh = jax.sharding.Mesh(np.array(group), ("tensor",))
  cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("tensor"))
  x = jax.ShapeDtypeStruct((len(group), 128), jnp.float32, sharding=cut)
  total = jax.jit(lambda x: x.sum(0), out_shardings=parallel.replicated(mesh))
  try:
    total.lower(x).compile()
  except jax.errors.JaxRuntimeError:
    return False
  return True


def wider(run: Run) -> str:
  """What gives an engine more room."""
  e, tensor = run.config.engine, run.config.fleet.tensor
  knobs = [f"config.fleet.tensor={2 * tensor}"] * (
    tensor < 4 and run.mesh.size > tensor
  )
  knobs += [
    f"config.engine.max_len={e.max_len // 2} and .max_prompt={e.max_prompt // 2}"
  ]
  knobs += ["config.lora.rank=32"] * (not run.config.lora.rank)
  return f"use {', '.join(knobs)} or devices with more memory"


def slot_bytes(run: Run) -> float:
  """Keys and values of one slot, and its share of the prompts, on one device."""
  e, t = open_engine(run), run.model.text
  cut = run.config.fleet.tensor if t.kv_heads % run.config.fleet.tensor == 0 else 1
  tokens = e.max_own + e.prompts * e.max_prompt / e.slots
  return tokens * compile_cost.cache_bytes(run.model) / cut


def open_engine(run: Run) -> engine.Engine:
  with tempfile.TemporaryDirectory() as folder:
    # Which ids end a turn has no bearing on a program's size: any tokenizer will do.
    words = tokenizer.make_tiny(pathlib.Path(folder), world.scaffolds())
  codec = settings.call("codec", encode.Codec, words, **run.config.codec)
  return settings.call(
    "engine", engine.Engine, run.model.merged, codec,
    group_size=run.config.rl.group_size, **run.config.engine,
  )  # fmt: skip


def _engine(run: Run, e: engine.Engine, params: Any, held: int) -> Iterator[Program]:
  model = e.config
  p = e.programs(jax.tree.leaves(params)[0].sharding)
  where = parallel.replicated(p.where)
  i32 = jnp.int32

  def array(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

  tensor = run.config.fleet.tensor
  cache, prompts, slots, bank = alive = p.open.eval_shape()
  cost = compile_cost.Cost(bytes=device_bytes(alive))
  yield Program("open", "rollout", p.open.lower, cost, held)
  held += device_bytes(alive)

  def program(name, cost, f, *args, also=(), **static):
    """`also`: arguments that are not alive between calls."""
    rest = held - device_bytes(args)
    return Program(name, "rollout", lambda: f.lower(*args, *also, **static), cost, rest)

  numbers = sizes(params)
  text = sum(n for k, n in numbers.items() if k.startswith("text/blocks/"))
  tower = sum(n for k, n in numbers.items() if k.startswith("vision/"))
  for n in pictures.row_sizes(e.patches):
    shape = (pictures.row_count(n, e.patches), n)
    shown = pictures_of(model, *shape, where)
    cost = compile_cost.encode(
      model, tensor=tensor, weights=tower, patches=n * shape[0], largest=n
    )
    name, also = f"vision {shape[0]} x {n}", (shown, np.int32(0))
    # bank is donated by its place among the arguments: params, bank, pictures, at.
    yield program(name, cost, p.encode, params, bank, also=also)

  B, P = e.slots, e.prompts
  shared = Prompts(
    k=prompts.k, v=prompts.v, length=array(i32, P), row=array(i32, B),
    lane=array(i32, P, e.group_size),
  )  # fmt: skip
  for name, (R, T), views, kept, before in (
    ("prompt", e.prompt, e.views[0], (prompts,), 0),
    ("turn", e.turn, e.views[1], (cache, shared), e.max_prompt),
  ):
    turns = decode.Turns(
      slot=array(i32, R), length=array(i32, R), count=array(i32, R),
      tokens=array(i32, R, T), position=array(i32, R, T, 3), feature=array(i32, R, T),
    )  # fmt: skip
    for view in views:
      cost = compile_cost.extend(
        model, tensor=tensor, weights=text, rows=R, tokens=min(T, view),
        view=min(view, before) + view,
      )  # fmt: skip
      yield Program(
        f"{name} {R} x {T} to {view}",
        "rollout",
        lambda turns=turns, view=view, kept=kept: p.extend.lower(
          params, kept[0], turns, bank, *kept[1:], view=view
        ),
        cost,
        held - device_bytes((params, *kept, bank)),
      )

  pairs = [array(i32, B)] * 3
  once = compile_cost.Cost(bytes=2 * device_bytes(cache) / B)
  yield program("move", once, p.move, cache, also=(*pairs, np.int32(1)))
  yield program(
    "place", compile_cost.Cost(), p.place, slots,
    also=(array(i32, B), array(jnp.bool, B), slots),
  )  # fmt: skip

  for lanes in e.lanes:

    def cost(context, lanes=lanes):
      half = context // 2  # is prompt
      return compile_cost.decode(
        model, tensor=tensor, weights=text, lanes=lanes, view=context,
        read=lanes * (context - half) + P * half, steps=e.chunk,
      )  # fmt: skip

    # One program serves all contexts: it reads as far as the longest row reaches.
    yield dataclasses.replace(
      program(
        f"decode {lanes}", cost(e.max_prompt + e.max_own), p.decode, params, cache,
        shared, slots,
        also=(array(i32, B, e.chunk), None), lanes=lanes,
      ),
      contexts={n: cost(n) for n in (2048, 4096, 8192)},
      tokens=lanes * e.chunk,
    )  # fmt: skip
