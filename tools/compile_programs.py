"""The programs of a run with abstract arguments: what training jits, at its shapes.

Nothing is defined here: the programs are those that train_sft, train_rl and the engine
build for their loops, lowered for devices that need not exist.  Main value: `Program`.
"""

import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import compile_cost
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from pixel_jax import optim, parallel, start, train_sft
from pixel_jax.batch import Batch
from pixel_jax.data import pack
from pixel_jax.model import config as model_config
from pixel_jax.model import lora, qwen2_5_vl, table


@dataclasses.dataclass(frozen=True)
class Program:
  """One compiled program of a run.

  name: such as "update" or "decode 128 x 4096"; phase: "train", "sync" or "rollout".
  lower: traces it for the devices of the topology.
  cost: what it has to do on one device, by formula.
  resident: bytes that a device holds meanwhile beside the arguments.
  """

  name: str
  phase: str
  lower: Callable[[], jax.stages.Lowered]
  cost: compile_cost.Cost
  resident: int = 0


@dataclasses.dataclass(frozen=True)
class Run:
  """What main() of a trainer holds when its loop begins, without the numbers."""

  config: Any
  mesh: jax.sharding.Mesh
  model: model_config.ModelConfig
  tx: Any
  schedule: Callable
  state: dict  # of ShapeDtypeStructs that know where they lie

  @property
  def layout(self) -> dict:
    return jax.tree.map(lambda x: x.sharding, self.state)

  @property
  def trained(self) -> dict:
    return optim.split(self.state["params"], start.frozen(self.config))[0]


def open_run(config: Any, devices: list[jax.Device]) -> Run:
  """The mesh, the model and the state of a config, on these devices."""
  mesh = start.call("mesh", parallel.make_mesh, **config.mesh, among=devices)
  fields = dict(config.model)
  preset = model_config.PRESETS[fields.pop("name")]
  asked = None
  if config.lora.rank:
    asked = start.call("lora", lora.Config, **config.lora)
  model = start.call("model", dataclasses.replace, preset, **fields, lora=asked)
  params = {
    # Beside adapters the weights stay as released, in bfloat16 (`start.load`).
    path: x.update(dtype=jnp.bfloat16) if asked and not lora.is_adapter(path) else x
    for path, x in table.unnest(qwen2_5_vl.abstract(model)).items()
  }
  params = place(table.nest(params), start.layout(model, mesh))
  freeze = start.frozen(config)
  steps = config.total_steps * (config.rl.minibatches if "rl" in config else 1)
  settings = {**config.optim, "freeze": freeze, "total_steps": steps}
  tx, schedule = start.call("optim", optim.make, params, **settings)
  trained = optim.split(params, freeze)[0]
  opt = place(jax.eval_shape(tx.init, trained), optim.state_shardings(tx, trained))
  step = jax.ShapeDtypeStruct((), jnp.int32, sharding=parallel.replicated(mesh))
  state = {"params": params, "opt": opt, "step": step}
  return Run(config, mesh, model, tx, schedule, state)


def place(abstract: Any, shardings: Any) -> Any:
  return jax.tree.map(lambda x, s: x.update(sharding=s), abstract, shardings)


def rows(mesh: jax.sharding.Mesh, num_rows: int, tokens: int, patches: int) -> Batch:
  """The abstract batch that `parallel.to_devices` makes of what `pack` collates."""
  one = pack.collate([], tokens, patches, 1)
  where = NamedSharding(mesh, parallel.ROWS)
  return Batch(
    **{
      k: jax.ShapeDtypeStruct((num_rows, *x.shape[1:]), x.dtype, sharding=where)
      for k, x in one.items()
    }
  )


def device_bytes(tree: Any) -> int:
  """Bytes of one device's part of a tree of arrays that know where they lie."""
  return sum(
    int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def of(config: Any, devices: list[jax.Device]) -> Iterator[Program]:
  """All programs of the run that `config` describes."""
  run = open_run(config, devices)
  return sft(run)


def sft(run: Run) -> Iterator[Program]:
  c, data = run.config, run.config.data
  limits = data.tokens, data.patches
  start.call("data", pack.check_limits, *limits)
  start.call("micro_batches", parallel.check_rows, run.mesh, data.rows // c.micro_batches)
  update, heldout = train_sft.programs(c, run.model, run.tx, run.schedule, run.layout)
  batch = rows(run.mesh, data.rows, *limits)
  yield Program(
    "update",
    "train",
    lambda: update.lower(run.state, batch),
    compile_cost.train(run, data.rows, *limits, parts=c.micro_batches),
  )
