"""Supervised fine-tuning on packed rows; `main` is the whole story.

  pixel-jax sft --config=sft:tiny,base --workdir=DIR [--config.KEY=VALUE ...]
  pixel-jax sft --config=sft:7b --workdir=DIR --config.init=DIR
  python -m pixel_jax.train_sft --config=configs/sft.py:7b ...      the same program

--config: a config of ours (pixel-jax configs lists them) or FILE.py:ARGUMENT of yours.
--workdir: where the run lives, a folder or gs://BUCKET/PATH.
--config.init: the policy to begin with, a workdir or what `pixel-jax convert` wrote.

Running the same command on the same workdir continues where it stopped, bit for bit.
SIGTERM or Ctrl-C saves after the step and leaves.
"""

import functools
from typing import TypedDict

import jax
import jax.numpy as jnp

from pixel_jax import parallel
from pixel_jax.data import pipeline, sources
from pixel_jax.fields import NonNegativeInt
from pixel_jax.model import flops, qwen2_5_vl
from pixel_jax.rollout import features
from pixel_jax.run import checkpoint, metrics, optim, preemption, settings, start
from pixel_jax.synthesis import templates


class Held(TypedDict):
  batches: NonNegativeInt


def main(config, workdir):
  # ---- Set up ------------------------------------------------------------------------
  mesh, policy = start.open_run(config, workdir, SECTIONS)
  notice = preemption.Notice()
  check(config, mesh)
  freeze = settings.frozen(config)
  learned = optim.list_paths(optim.split(policy.abstract, freeze)[0])
  synthesis = None
  if config.synthesis:
    synthesis = settings.call("synthesis", templates.Templates, **config.synthesis)

  data = settings.of_data(config)

  def on_devices(rows):
    names = rows.pop("names")
    return parallel.to_devices(mesh, bank.fill(rows) if bank else rows), names

  def open_batches(seed, **changed):
    return settings.call(
      "data", pipeline.open_batches, codec=policy.codec, synthesis=synthesis,
      seed=seed, workdir=workdir, host=jax.process_index(), hosts=jax.process_count(),
      apart=features.is_wanted(learned, config.features.gib), place=on_devices,
      **{**data, **changed},
    )  # fmt: skip

  train = open_batches(config.seed)
  held = functools.partial(
    open_batches, config.seed + 1, uri=config.eval.uri, weights=()
  )
  if is_held(config):
    held().close()  # a mistake in it is told now
  tuned, most = settings.of_optim(config, config.total_steps)
  tx, schedule = settings.call("optim", optim.make, policy.abstract, **tuned)
  guard = optim.Guard(most)
  start.describe(config, policy, tx)
  state = optim.begin(tx, policy.params, freeze, mesh)
  bank = features.open_bank(
    policy.config,
    policy.params,
    learned,
    patches=config.data.patches,
    **config.features,
  )

  # ---- Resume ------------------------------------------------------------------------
  update, heldout = programs(config, policy.config, tx, schedule, state)
  saver = settings.call(
    "checkpoint", checkpoint.Checkpoints, workdir, **config.checkpoint, **policy.extra
  )
  first, state, of_host = saver.restore(state)
  if of_host:
    train.set_state(of_host["data"])
  writer = metrics.Writer(
    workdir, first_step=first, total_steps=config.total_steps, wandb=config.wandb,
    mlflow=config.mlflow, config=config.to_dict(),
  )  # fmt: skip

  # ---- Loop --------------------------------------------------------------------------
  step, m = first, {}
  while step < config.total_steps and not notice.agreed():
    with writer.timer("data"):
      batch, names = next(train)
      parallel.barrier("rows")
    step += 1
    with writer.timer("update"):
      state, *told = update(state, batch)
    if step < config.total_steps:
      with writer.timer("data"):  # while the devices work
        train.prepare()
    with writer.timer("update"):
      m, work = jax.tree.map(float, jax.device_get(told))
    guard.check(step, m["optim/nonfinite"], names)
    m |= parallel.total(train.counts())
    if bank:
      m["perf/pictures_encoded"] = float(bank.encoded)
    if is_held(config) and settings.due(step, config.eval_every, config.total_steps):
      with writer.timer("eval"):
        m["eval/loss"] = held_out(heldout, state["params"], held(), config.eval.batches)
    cost = flops.of_work(policy.config, work, learned)
    writer.write(
      step, m, tokens=work["tokens"], image_tokens=work["image_tokens"],
      flops=cost.parts(),
    )  # fmt: skip
    if settings.due(step, config.save_every):
      saver.save(step, state, {"data": train.get_state()}, m)

  # ---- End ---------------------------------------------------------------------------
  if not saver.has(step):
    saver.save(step, state, {"data": train.get_state()}, m)
  start.end(
    config, step, saver, writer, notice, "metrics.jsonl, checkpoints/, tokenizer/"
  )


SECTIONS = start.SECTIONS | {
  "data": (sources.open_source, pipeline.batches, settings.Named),
  "features": (features.open_bank,),
  "eval": (sources.open_source, Held),
  "synthesis": (templates.Templates,),
}


def is_held(config):
  """Whether there are examples that are held out; 0 batches and no URI say no."""
  return bool(config.eval.uri and config.eval.batches)


def check(config, mesh):
  """What the first step would refuse is told before anything compiles."""
  if config.micro_batches < 1 or config.data.rows % config.micro_batches:
    raise settings.ConfigError(
      f"config.micro_batches: {config.micro_batches} do not divide data.rows = "
      f"{config.data.rows}"
    )
  rows = config.data.rows // config.micro_batches
  settings.call("micro_batches", parallel.check_rows, mesh, rows)


def held_out(loss, params, stream, count):
  """The mean loss of the first `count` batches of a stream, which is closed."""
  losses = []
  for _ in range(count):
    rows, _ = next(stream)
    parallel.barrier("held rows")
    losses.append(parallel.settle(loss(params, rows)))
  stream.close()  # its thread reads ahead until then
  return float(sum(losses) / len(losses))


def totals(batch):
  """What the targets of a batch weigh, and how many they are; each at least 1."""
  return jnp.maximum(batch.weight.sum(), 1.0), jnp.maximum((batch.weight > 0).sum(), 1)


def programs(config, model, tx, schedule, state):
  """(update, heldout), jitted: what the loop runs and tools/compile/check.py compiles.

  Args:
    model: the ModelConfig.
    state: real, or abstract with shardings.
  """
  freeze = settings.frozen(config)
  mesh = state["step"].sharding.mesh
  # What goes in comes out in the same place, so that each program compiles once.
  layout = jax.tree.map(lambda x: x.sharding, state)

  def loss_fn(trained, frozen, batch, weight, tokens):
    """Sums of a part of the batch, over what all of it weighs and over its targets."""
    params = optim.merge(trained, frozen)
    mine = batch.weight > 0
    with parallel.on(mesh):
      logp, entropy = qwen2_5_vl.token_logp(model, params, batch, where=mine)
    loss = -(logp * batch.weight).sum() / weight
    m = {"loss": loss, "policy/entropy": (entropy * mine).sum() / tokens}
    return loss, (m, flops.work(batch))

  @functools.partial(
    jax.jit, donate_argnums=0, out_shardings=(layout, None, None),
    compiler_options=dict(config.compiler),
  )  # fmt: skip
  def update(state, batch):
    trained, frozen = optim.split(state["params"], freeze)
    whole = totals(batch)

    def gradient(rows):
      return jax.grad(loss_fn, has_aux=True)(trained, frozen, rows, *whole)

    grads, (m, work) = optim.accumulate(gradient, batch, config.micro_batches)
    trained, opt, told = optim.apply(tx, grads, trained, state["opt"], m["loss"])
    m |= told | {"optim/lr": schedule(state["step"])}
    m["data/utilisation"] = (batch.segment > 0).mean()
    if batch.features is None:
      m["data/patch_utilisation"] = (batch.patch_image > 0).mean()
    params = optim.merge(trained, frozen)
    step = state["step"] + (m["optim/nonfinite"] == 0)
    return {"params": params, "opt": opt, "step": step}, m, work

  @jax.jit
  def heldout(params, batch):
    return loss_fn(params, {}, batch, *totals(batch))[0]

  return update, heldout


if __name__ == "__main__":
  start.run(main)
