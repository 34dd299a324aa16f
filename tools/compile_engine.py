"""The programs of a rollout with abstract arguments: the weights' way, and the engine's.

As in `compile_programs`, nothing is defined here: `parallel` moves the weights, the
engine builds its own programs, and what is alive beside the arguments of each is added
up as train_rl holds it.
"""

import functools
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import compile_cost
import jax
import jax.numpy as jnp
import numpy as np
from compile_programs import Program, Run, device_bytes, place, sizes

from pixel_jax import parallel, start
from pixel_jax.chat import encode, tokenizer
from pixel_jax.data import world
from pixel_jax.model import qwen2_5_vl, table
from pixel_jax.rollout import decode, engine, pictures


def programs(run: Run) -> Iterator[Program]:
  """Of the engine that train_rl uses: whole weights on the first device of a host."""
  model = run.model.merged
  merge = functools.partial(qwen2_5_vl.merge, run.model)
  train = place(
    jax.eval_shape(merge, run.state["params"]), start.layout(model, run.mesh)
  )
  held = device_bytes(run.state)  # stays where it is through the rollouts
  flat = table.unnest(train)
  held += device_bytes([flat[f"{path}/w"] for path in table.adapted(run.model)])
  params = train
  if run.mesh.size > 1:
    reshard = parallel.resharder(parallel.engine_mesh(run.mesh), train)
    params = reshard.eval_shape(train)
    group = list(run.mesh.devices.flat)[:1]
    params = jax.tree.map(
      lambda x: x.update(sharding=parallel.local_sharding(x, group)), params
    )
    cost = compile_cost.Cost(bytes=device_bytes((train, params)))
    rest = held - device_bytes(train)
    yield Program("reshard", "sync", lambda: reshard.lower(train), cost, rest)
    held += device_bytes(params)  # the caller of the engine keeps them
  with tempfile.TemporaryDirectory() as folder:
    # Which ids end a turn has no bearing on a program's size: any tokenizer will do.
    words = tokenizer.make_tiny(pathlib.Path(folder), world.scaffolds())
  codec = start.call("codec", encode.Codec, words, **run.config.codec)
  e = start.call("engine", engine.Engine, model, codec, **run.config.engine)
  yield from _engine(run, e, params, held)


def _engine(run: Run, e: engine.Engine, params: Any, held: int) -> Iterator[Program]:
  model = e.config
  p = e.programs(jax.tree.leaves(params)[0].sharding)
  where = parallel.replicated(p.where)
  i32 = jnp.int32

  def array(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

  def here(abstract):
    return jax.tree.map(lambda x: array(x.dtype, *x.shape), abstract)

  if model.dtype != "float32":
    full, params = params, here(jax.eval_shape(p.cast, params))
    cost = compile_cost.Cost(bytes=device_bytes((full, params)))
    rest = held - device_bytes(full)
    yield Program("cast", "sync", lambda: p.cast.lower(full), cost, rest)
    held += device_bytes(params)
  cache, slots, bank = alive = here(jax.eval_shape(p.open))
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
    shown = decode.Pictures(
      patches=array(jnp.uint8, *shape, model.vision.patch_dim),
      patch_pos=array(i32, *shape, 2),
      patch_image=array(i32, *shape),
      patch_window=array(i32, *shape),
    )
    cost = compile_cost.encode(model, weights=tower, patches=n * shape[0], largest=n)
    name, also = f"vision {shape[0]} x {n}", (shown, np.int32(0))
    # bank is donated by its place among the arguments: params, bank, pictures, at.
    yield program(name, cost, p.encode, params, bank, also=also)

  for name, (R, T) in (("prompt", e.prompt), ("turn", e.turn)):
    turns = decode.Turns(
      slot=array(i32, R), length=array(i32, R), count=array(i32, R),
      tokens=array(i32, R, T), position=array(i32, R, T, 3), feature=array(i32, R, T),
    )  # fmt: skip
    for view in e.views:
      cost = compile_cost.extend(
        model, tensor=1, weights=text, rows=R, tokens=min(T, view), view=view
      )
      yield Program(
        f"{name} {R} x {T} to {view}",
        "rollout",
        lambda turns=turns, view=view: p.extend.lower(
          params, cache, turns, bank, view=view
        ),
        cost,
        held - device_bytes((params, cache, bank)),
      )

  B = e.slots
  pairs = [array(i32, B)] * 3
  once = compile_cost.Cost(bytes=2 * device_bytes(cache) / B)
  yield program("fork", once, p.fork, cache, also=(*pairs, np.int32(1)))
  yield program(
    "place", compile_cost.Cost(), p.place, slots,
    also=(array(i32, B), array(jnp.bool, B), slots),
  )  # fmt: skip

  rollout = run.config.rollout
  sampling = decode.Sampling(
    rollout.temperature, rollout.top_p, rollout.top_k, rollout.get("greedy", False)
  )
  for lanes in e.lanes:  # the roofline is that of full slots; how far is read, they say
    cost = compile_cost.decode(
      model, tensor=1, weights=text, lanes=lanes, view=e.max_len, steps=e.chunk
    )
    yield program(
      f"decode {lanes}", cost, p.decode, params, cache, slots,
      also=(array(i32, B, e.chunk), None), sampling=sampling, lanes=lanes,
    )  # fmt: skip
