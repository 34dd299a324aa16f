"""Supervised fine-tuning on packed rows; `main` is the whole story.

  pixel-jax sft --config=sft:tiny,base --workdir=DIR [--config.KEY=VALUE ...]
  pixel-jax sft --config=sft:7b --workdir=DIR --config.init=DIR
  python -m pixel_jax.train_sft --config=configs/sft.py:7b ...      the same program

--config: a config of ours (pixel-jax configs lists them) or FILE.py:ARGUMENT of yours.
--workdir: where the run lives, a folder or gs://BUCKET/PATH.
--config.init: the policy to begin with, a workdir or what `pixel-jax convert` wrote.

Running the same command on the same workdir continues where it stopped, bit for bit.
SIGTERM saves after the step and leaves.
"""

import functools

import jax
import jax.numpy as jnp

from pixel_jax import checkpoint, features, metrics, optim, parallel, preemption, start
from pixel_jax.data import pipeline, sources
from pixel_jax.model import flops, qwen2_5_vl


def main(config, workdir):
  # ---- Set up ------------------------------------------------------------------------
  mesh, policy = start.open_run(config, workdir)
  notice = preemption.Notice()
  freeze = start.frozen(config)
  settings = {**config.optim, "freeze": freeze, "total_steps": config.total_steps}
  tx, schedule = start.call("optim", optim.make, policy.params, **settings)
  trained = optim.split(policy.params, freeze)[0]
  learned = optim.list_paths(trained)
  bank = start.call(
    "features", features.open_bank, policy.config, policy.params, learned,
    patches=config.data.patches, **config.features,
  )  # fmt: skip
  data = dict(config.data)
  uri, weights = data.pop("uri"), data.pop("weights")
  opened = {k: data.pop(k) for k in ("root", "filter")}

  def on_devices(rows):
    return parallel.to_devices(mesh, bank.fill(rows) if bank else rows)

  def batches(uri, seed, weights=()):
    source = start.call(
      "data", sources.open_source, uri, codec=policy.codec, weights=weights,
      **opened, **config.get("synthesis", {}),
    )  # fmt: skip
    return start.call(
      "data",
      pipeline.batches,
      source,
      policy.codec,
      seed=seed,
      workdir=workdir,
      host=jax.process_index(),
      hosts=jax.process_count(),
      apart=bank is not None,
      place=on_devices,
      **data,
    )

  train = batches(uri, config.seed, weights)
  batches(config.eval.uri, config.seed + 1).close()  # a mistake in it is told now
  if config.micro_batches < 1 or config.data.rows % config.micro_batches:
    raise start.ConfigError(
      f"config.micro_batches: {config.micro_batches} do not divide data.rows = "
      f"{config.data.rows}"
    )
  start.call(
    "micro_batches", parallel.check_rows, mesh, data["rows"] // config.micro_batches
  )
  start.describe(config, policy, mesh)

  # ---- State ---------------------------------------------------------------------------
  state = {
    "params": policy.params,
    "opt": optim.init(tx, trained),
    "step": jax.device_put(jnp.int32(0), parallel.replicated(mesh)),
  }
  update, heldout = programs(config, policy.config, tx, schedule, state)

  # ---- Resume ------------------------------------------------------------------------
  saver = checkpoint.Checkpoints(workdir, **policy.extra)
  first, state, host = saver.restore(state)
  if host:
    train.set_state(host["data"])
  writer = metrics.Writer(workdir, first_step=first, total_steps=config.total_steps)

  # ---- Loop --------------------------------------------------------------------------
  done = first
  while done < config.total_steps and not notice.agreed():
    with writer.timer("data"):
      batch = next(train)
      parallel.barrier("rows")
    done += 1
    with writer.timer("update"):
      state, *told = update(state, batch)
    if done < config.total_steps:
      with writer.timer("data"):  # while the devices work
        train.prepare()
    with writer.timer("update"):
      m, work = jax.tree.map(float, jax.device_get(told))
    if bank:
      m["perf/pictures_encoded"] = float(bank.encoded)
    if done % config.eval_every == 0 or done == config.total_steps:
      held = batches(config.eval.uri, config.seed + 1)
      losses = []
      for _ in range(config.eval.batches):
        rows = next(held)
        parallel.barrier("held rows")
        losses.append(parallel.settle(heldout(state["params"], rows)))
      held.close()  # its thread reads ahead until then
      m["eval/loss"] = float(sum(losses) / len(losses))
    cost = flops.of_work(policy.config, work, learned)
    writer.write(
      done, m | parallel.total(train.counts()), tokens=work["tokens"],
      image_tokens=work["image_tokens"], flops=cost.parts(),
    )  # fmt: skip
    if done % config.save_every == 0:
      saver.save(done, state, {"data": train.get_state()})
  if not saver.has(done):
    saver.save(done, state, {"data": train.get_state()})
  saver.close()
  writer.close()
  notice.close()
  metrics.say(metrics.ended(done, config.total_steps))
  metrics.say(f"in {saver.directory.parent}: metrics.jsonl, checkpoints/, tokenizer/")


def programs(config, model, tx, schedule, state):
  """(update, heldout), jitted: what the loop runs and tools/compile_check.py compiles.

  Args:
    model: the ModelConfig.
    state: real, or abstract with shardings.
  """
  freeze = start.frozen(config)
  mesh = state["step"].sharding.mesh
  # What goes in comes out in the same place, so that each program compiles once.
  layout = jax.tree.map(lambda x: x.sharding, state)

  def loss_fn(trained, frozen, batch, tokens):
    params = optim.merge(trained, frozen)
    mine = batch.weight > 0
    with parallel.on(mesh):
      logp, entropy = qwen2_5_vl.token_logp(model, params, batch, where=mine)
    loss = -(logp * batch.weight).sum() / tokens
    m = {"loss": loss, "policy/entropy": (entropy * mine).sum() / tokens}
    return loss, (m, flops.work(batch))

  @functools.partial(
    jax.jit, donate_argnums=0, out_shardings=(layout, None, None),
    compiler_options=dict(config.compiler),
  )  # fmt: skip
  def update(state, batch):
    trained, frozen = optim.split(state["params"], freeze)
    tokens = jnp.maximum(batch.weight.sum(), 1.0)

    def gradient(rows):
      return jax.grad(loss_fn, has_aux=True)(trained, frozen, rows, tokens)

    grads, (m, work) = optim.accumulate(gradient, batch, config.micro_batches)
    trained, opt, norm = optim.apply(tx, grads, trained, state["opt"])
    m |= {"optim/grad_norm": norm, "optim/lr": schedule(state["step"])}
    m["data/utilisation"] = (batch.segment > 0).mean()
    if batch.features is None:
      m["data/patch_utilisation"] = (batch.patch_image > 0).mean()
    params = optim.merge(trained, frozen)
    return {"params": params, "opt": opt, "step": state["step"] + 1}, m, work

  @jax.jit
  def heldout(params, batch):
    return loss_fn(params, {}, batch, jnp.maximum(batch.weight.sum(), 1.0))[0]

  return update, heldout


if __name__ == "__main__":
  start.run(main)
