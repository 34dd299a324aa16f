"""The programs of a run with abstract arguments: what training jits, at its shapes.

Nothing is defined here: the programs are those that train_sft, train_rl and the engine
build for their loops, lowered for devices that need not exist.  Main value: `Program`.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from pixel_jax import parallel, train_rl, train_sft
from pixel_jax.batch import Batch
from pixel_jax.data import pack
from pixel_jax.model import config as model_config
from pixel_jax.model import lora, qwen2_5_vl, table
from pixel_jax.rollout import decode, features, pictures
from pixel_jax.run import optim, policies, settings
from pixel_jax.tools.compile import cost as compile_cost


@dataclasses.dataclass(frozen=True)
class Program:
  """One compiled program of a run.

  name: such as "update" or "decode 128 to 4096"; phase: "train", "sync" or "rollout".
  lower: traces it for the devices of the topology.
  cost: what it has to do on one device, by formula.
  resident: bytes that a device holds meanwhile beside the arguments.
  contexts: tokens in the cache -> what it costs then, for a program of decoding steps.
  tokens: that it decodes at most.
  """

  name: str
  phase: str
  lower: Callable[[], jax.stages.Lowered]
  cost: compile_cost.Cost
  resident: int = 0
  contexts: Mapping[int, compile_cost.Cost] = dataclasses.field(default_factory=dict)
  tokens: int = 0


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
  def trained(self) -> dict:
    return optim.split(self.state["params"], settings.frozen(self.config))[0]

  def cost(self, num_rows: int, tokens: int, patches: int, **more) -> compile_cost.Cost:
    """Of rows of this shape through the model, forward and backward."""
    cut = self.model.vision.patch**2
    return compile_cost.train(
      self.model,
      devices=self.mesh.size,
      tensor=self.mesh.shape["tensor"],
      sizes=sizes(self.state["params"]),
      trained=sizes(self.trained),
      rows=num_rows,
      tokens=tokens,
      patches=patches,
      largest=max(most for _, most in self.config.codec.budgets.values()) // cut,
      **more,
    )


def open_run(config: Any, devices: list[jax.Device]) -> Run:
  """The mesh, the model and the state of a config, on these devices."""
  mesh = settings.call("mesh", parallel.make_mesh, **config.mesh, among=devices)
  fields = dict(config.model)
  preset = model_config.PRESETS[fields.pop("name")]
  asked = None
  if config.lora.rank:
    asked = settings.call("lora", lora.Config, **config.lora)
  model = settings.call("model", dataclasses.replace, preset, **fields, lora=asked)
  params = policies.abstract(model, mesh)
  freeze = settings.frozen(config)
  steps = config.total_steps * (config.rl.minibatches if "rl" in config else 1)
  tuned, _ = settings.of_optim(config, steps)
  tx, schedule = settings.call("optim", optim.make, params, **tuned)
  opt = optim.abstract(tx, optim.split(params, freeze)[0])
  step = jax.ShapeDtypeStruct((), jnp.int32, sharding=parallel.replicated(mesh))
  state = {"params": params, "opt": opt, "step": step}
  return Run(config, mesh, model, tx, schedule, state)


def rows(
  run: Run, num_rows: int, tokens: int, patches: int, *, apart: bool = False
) -> Batch:
  """The abstract batch that `parallel.to_devices` makes of what `pack` collates.

  Args:
    apart: as in `pack.collate`; features of a frozen tower stand in for the patches.
  """
  one = pack.collate([], tokens, patches, 1, apart=apart)
  if one.pop("pictures", None) is not None:
    width = run.model.text.width
    one["features"] = np.zeros((1, patches // 4, width), jnp.dtype(run.model.dtype))
  where = NamedSharding(run.mesh, parallel.ROWS)
  return Batch(
    **{
      k: jax.ShapeDtypeStruct((num_rows, *x.shape[1:]), x.dtype, sharding=where)
      for k, x in one.items()
    }
  )


def pictures_of(model, num_rows: int, size: int, where: Any) -> decode.Pictures:
  """Abstract rows of one picture each, as `pictures.as_rows` lays them out."""

  def array(dtype, *more):
    return jax.ShapeDtypeStruct((num_rows, size, *more), dtype, sharding=where)

  return decode.Pictures(
    patches=array(jnp.uint8, model.vision.patch_dim),
    patch_pos=array(jnp.int32, 2),
    patch_image=array(jnp.int32),
    patch_window=array(jnp.int32),
  )


def sizes(params: dict) -> dict[str, int]:
  """Numbers by path."""
  return {path: int(np.prod(x.shape)) for path, x in table.unnest(params).items()}


def device_bytes(tree: Any) -> int:
  """Bytes of one device's part of a tree of arrays that know where they lie."""
  return sum(
    int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def peak_bytes(memory: Any) -> int:
  """Of all that one program holds at its worst, what is donated counted once.

  Args:
    memory: `memory_analysis()` of what was compiled.
  """
  whole = memory.argument_size_in_bytes + memory.output_size_in_bytes
  whole += memory.temp_size_in_bytes - memory.alias_size_in_bytes
  return whole + memory.generated_code_size_in_bytes


def programs(run: Run) -> Iterator[Program]:
  """Of the train step; those of a rollout are in `compile_engine`."""
  config = run.config
  if "rl" not in config:
    return sft(run)
  hosts = len({d.process_index for d in run.mesh.devices.flat})
  return rl(run, config.rl.rows * hosts)


def sft(run: Run) -> Iterator[Program]:
  """The step, and where the tower is frozen what makes its features."""
  c, data = run.config, run.config.data
  limits = data.tokens, data.patches
  settings.call("data", pack.check_limits, *limits)
  parts = c.micro_batches
  settings.call("micro_batches", parallel.check_rows, run.mesh, data.rows // parts)
  update, _ = train_sft.programs(c, run.model, run.tx, run.schedule, run.state)
  kept = features.is_wanted(optim.list_paths(run.trained), c.features.gib)
  batch = rows(run, data.rows, *limits, apart=kept)
  cost = run.cost(data.rows, data.tokens, 0 if kept else data.patches, parts=parts)
  if not kept:
    yield Program("update", "train", lambda: update.lower(run.state, batch), cost)
    return
  # Each host has a tower of its own, whole on all of its devices.
  first = run.mesh.devices.flat[0].process_index
  local = [d for d in run.mesh.devices.flat if d.process_index == first]
  mesh = parallel.make_mesh(among=local)
  tower = jax.eval_shape(
    functools.partial(qwen2_5_vl.cast, run.model), run.state["params"]["vision"]
  )
  tower = jax.tree.map(lambda x: x.update(sharding=parallel.replicated(mesh)), tower)
  yield Program(
    "update", "train", lambda: update.lower(run.state, batch), cost, device_bytes(tower)
  )
  encode = features.encoder(run.model, mesh)
  numbers = sum(sizes({"vision": tower}).values())
  for n in pictures.row_sizes(data.patches):
    count = pictures.row_count(n, data.patches)
    shown = pictures_of(
      run.model, mesh.size * count, n, NamedSharding(mesh, parallel.ROWS)
    )
    cost = compile_cost.encode(
      run.model, tensor=1, weights=numbers, patches=n * count, largest=n
    )
    yield Program(
      f"vision {mesh.size * count} x {n}",
      "features",
      lambda shown=shown: encode.lower(tower, shown),
      cost,
      device_bytes(run.state),
    )


def rl(run: Run, num_rows: int) -> Iterator[Program]:
  """The optimizer step and the log-probs; `num_rows` of one micro-batch on all hosts."""
  c = run.config
  limits = c.rl.tokens, c.rl.patches
  settings.call("rl", pack.check_limits, *limits)
  settings.call("rl", parallel.check_rows, run.mesh, num_rows)
  _, accumulate, apply, old_logp = train_rl.programs(
    c, run.model, run.tx, run.schedule, run.state
  )
  batch = rows(run, num_rows, *limits)
  params, opt = run.state["params"], device_bytes(run.state["opt"])
  forward = run.cost(num_rows, *limits, backward=False)
  yield Program("logp", "train", lambda: old_logp.lower(params, batch), forward, opt)
  batch = batch.replace(logp_old=batch.logp_sampler)
  step = run.cost(num_rows, *limits)
  tokens = np.float32(1)
  yield Program(
    "gradient",
    "train",
    lambda: accumulate.lower(run.trained, params, batch, tokens),
    step,
    opt,
  )
  cost = compile_cost.apply(run.mesh.size, sizes(run.trained))
  yield Program(
    "apply", "train", lambda: apply.lower(run.state, run.trained, tokens), cost
  )
