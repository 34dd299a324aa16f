"""Curiosity-driven GRPO with visual operations; `main` is the whole story.

  pixel-jax rl --config=rl:tiny --workdir=DIR --config.init=SFT [--config.KEY=VALUE ...]
  python -m pixel_jax.train_rl --config=configs/rl.py:7b ...        the same program

--config: a config of ours (pixel-jax configs lists them) or FILE.py:ARGUMENT of yours.
--workdir: where the run lives, a folder or gs://BUCKET/PATH.
--config.init: the policy to begin with, a workdir or what `pixel-jax convert` wrote.

A step: the policy answers `prompts_per_step` questions `group_size` times each, looking
closer where it likes; the answers are judged; the curiosity reward is added; groups
become advantages; one or several clipped updates follow.  Running the same command on
the same workdir continues where it stopped, bit for bit.  SIGTERM gives up the step, saves
the state before it and leaves.
"""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pixel_jax import (
  answers,
  checkpoint,
  metrics,
  optim,
  parallel,
  preemption,
  start,
  trajectory,
)
from pixel_jax.chat import encode
from pixel_jax.data import pack, pipeline, sources
from pixel_jax.evals import common
from pixel_jax.model import flops, qwen2_5_vl
from pixel_jax.rl import grpo, replay, rewards
from pixel_jax.rollout import engine, fleet


def main(config, workdir):
  # ---- Set up ------------------------------------------------------------------------
  mesh, policy = start.open_run(config, workdir)
  notice = preemption.Notice()
  freeze = start.frozen(config)
  updates = config.total_steps * config.rl.minibatches
  settings = {**config.optim, "freeze": freeze, "total_steps": updates}
  tx, schedule = start.call("optim", optim.make, policy.params, **settings)
  trained = optim.split(policy.params, freeze)[0]
  data = dict(config.data)
  uri, weights = data.pop("uri"), data.pop("weights")
  opened = {k: data.pop(k) for k in ("root", "filter")}
  look = functools.partial(sources.open_source, codec=policy.codec, **opened)
  source = start.call("data", look, uri, weights=weights)
  shards = data.pop("shards")
  mine = dict(
    workdir=workdir, host=jax.process_index(), hosts=jax.process_count(), shards=shards
  )
  questions = start.call(
    "data", pipeline.tasks, source, seed=config.seed, batch=config.rl.prompts_per_step,
    **mine, **data,
  )  # fmt: skip
  validation = start.call("eval", look, config.eval.uri)
  held = start.call("eval", pipeline.fixed_tasks, validation, config.eval.tasks, **mine)
  make = functools.partial(
    start.call, "engine", engine.Engine, policy.config.merged, policy.codec,
    group_size=config.rl.group_size, **config.engine,
  )  # fmt: skip
  rollouts = start.call(
    "fleet", fleet.Fleet, make, policy.config, mesh, shards=shards, **config.fleet
  )
  start.call("rl", pack.check_limits, config.rl.tokens, config.rl.patches)
  start.call("rl", parallel.check_rows, mesh, config.rl.rows * jax.process_count())
  none = np.zeros((1, 2), np.int32)
  start.call("reward", rewards.shaped, none * 1.0, none, none, **config.reward)
  start.describe(config, policy, mesh)

  # ---- State ---------------------------------------------------------------------------
  state = {
    "params": policy.params,
    "opt": optim.init(tx, trained),
    "step": jax.device_put(jnp.int32(0), parallel.replicated(mesh)),
  }

  # ---- Update ------------------------------------------------------------------------
  zeros, accumulate, apply, old_logp = programs(
    config, policy.config, tx, schedule, state
  )
  limits = dict(T=config.rl.tokens, P=config.rl.patches)
  fill = functools.partial(to_batches, mesh, config.rl.rows, **limits)

  learned = optim.list_paths(trained)

  def update(state, batches, own, tokens):
    """One optimizer step over micro-batches of `own` tokens; `tokens` normalises.

    None where SIGTERM came before the state was changed.
    """
    total, told = zeros(), []
    for batch in batches:
      total, t = accumulate(total, state["params"], batch, np.float32(tokens))
      told.append(parallel.settle(t))
      jax.block_until_ready(told[-2:][0])  # else all are sent before the first is done
      if notice.agreed():
        return None
    state, m = apply(state, total)
    (sums, work), m = zip(*jax.device_get(told)), jax.device_get(m)
    work = {k: float(sum(w[k] for w in work)) for k in work[0]}
    cost = flops.of_work(policy.config, work, learned).parts()
    m = combine(sums, own, tokens) | {k: float(v) for k, v in m.items()}
    return state, m, cost

  def before(state, batch):
    """The batch with log-probs of the policy that sampled, by the trainer's graph."""
    logp = parallel.settle(old_logp(state["params"], batch))
    return batch.replace(logp_old=logp)

  # ---- Resume ------------------------------------------------------------------------
  memory = {
    s: start.call("replay", replay.Replay, **config.replay)
    for s in parallel.own_rows(np.arange(shards)).tolist()
  }
  if config.replay.keep_steps:
    raise start.ConfigError(
      "config.replay.keep_steps: samples of earlier steps cannot be saved yet, so a "
      "resumed run would differ; use 0"
    )
  saver = checkpoint.Checkpoints(workdir, **policy.extra)
  first, state, host = saver.restore(state)
  if host:
    questions.set_state(host["data"])
    for s, buffer in memory.items():
      buffer.set_state(host["replay"][str(s)])
  writer = metrics.Writer(workdir, first_step=first, total_steps=config.total_steps)

  def of_hosts():
    replayed = {str(s): buffer.get_state() for s, buffer in memory.items()}
    return {"data": questions.get_state(), "replay": replayed}

  # ---- Loop --------------------------------------------------------------------------
  step = first
  while step < config.total_steps and not notice.agreed():
    unread = questions.get_state()
    with writer.timer("data"):
      asked = next(questions)
    with writer.timer("rollout"):
      groups = rollouts.run(
        rollouts.sync(state["params"]), asked.tasks, seed=config.seed, step=step,
        group_size=config.rl.group_size, load_media=asked.load_media,
        stop=notice.given, **config.rollout,
      )  # fmt: skip
      if notice.agreed():  # the step is given up: the next start begins it anew
        questions.set_state(unread)
        break
      stats = rollouts.stats() | parallel.total(questions.counts())
    with writer.timer("reward"):
      parts, mask, m = judge(groups, config.rl.masked_stops, **config.reward)
      advantage, grouped = grpo.advantages(parts["total"], mask, std=config.rl.std)
      m |= {k: float(v) for k, v in jax.device_get(grouped).items()}
      scored = score(groups, parts, advantage, grpo.kept(mask), step)
      examples = within(scored, **limits)
      chosen, replayed = choose(memory, examples, (config.seed, step))
      work = parallel.total({
        "kept": count(scored), "fit": count(examples), "replayed": replayed,
        "sampled": sum(sum(f.trajectory.sampled) for g in groups for f in g),
        "tokens": sum(e.weight.sum() for x in examples.values() for e in x),
      })  # fmt: skip
      m["rollout/too_long"] = work["kept"] - work["fit"]
    with writer.timer("update"):
      parts = split(chosen, config.rl.minibatches)
      plan = [(fill(part), count_tokens(part)) for part in parts]
      alone = config.rl.minibatches == 1 and not work["replayed"]
      if not alone:
        plan = [([before(state, b) for b in batches], own) for batches, own in plan]
      updated, cost = [], collections.Counter()
      begun = parallel.to_host(state) if len(plan) > 1 else None
      for batches, own in plan:
        # Rollouts without an advantage have no gradient, but they count as tokens.
        tokens = max(work["tokens"], 1.0) if alone else own
        if (done := update(state, batches, own, tokens)) is None:
          break
        state, um, spent = done
        updated.append(um)
        cost.update(spent)
      if len(updated) < len(plan):  # given up, as above
        state = parallel.from_host(begun, state) if updated else state
        questions.set_state(unread)
        break
      m |= average(updated)
      m["optim/skipped"] = float(not plan)
    step += 1
    if step % config.eval_every == 0 or step == config.total_steps:
      with writer.timer("eval"):
        m |= held_out(
          rollouts, state["params"], held, validation.load_media, config.seed,
          **config.rollout,
        )  # fmt: skip
    writer.write(step, m | stats, tokens=work["sampled"], flops=cost)
    if step % config.keep_trajectories_every == 0 or step == config.total_steps:
      name = trajectory.host_file(f"step_{step:06d}", mine["host"], mine["hosts"])
      played = (f.trajectory for g in groups for f in g)
      trajectory.write_jsonl(workdir / "trajectories" / name, played)
    if step % config.save_every == 0:
      saver.save(step, state, of_hosts())
  if not saver.has(step):
    saver.save(step, state, of_hosts())
  saver.close()
  writer.close()
  notice.close()
  metrics.say(metrics.ended(step, config.total_steps))
  lasting = saver.directory.parent
  metrics.say(f"in {lasting}: metrics.jsonl, trajectories/, checkpoints/")


def programs(config, model, tx, schedule, state):
  """(zeros, accumulate, apply, old_logp), jitted: an optimizer step over micro-batches.

  What the loop runs and tools/compile_check.py compiles.

  Args:
    model: the ModelConfig.
    state: real, or abstract with shardings.
  """
  freeze = start.frozen(config)
  mesh = state["step"].sharding.mesh
  trained = optim.split(state["params"], freeze)[0]
  # What goes in comes out in the same place, so that each program compiles once.
  layout = jax.tree.map(lambda x: x.sharding, state)

  def token_logp(params, batch):
    with parallel.on(mesh):
      return qwen2_5_vl.token_logp(
        model, params, batch, config.rollout.temperature, batch.weight > 0
      )

  def loss_fn(trained, frozen, batch, tokens):
    logp, entropy = token_logp(optim.merge(trained, frozen), batch)
    old = jax.lax.stop_gradient(logp if batch.logp_old is None else batch.logp_old)
    loss, m = grpo.loss(
      logp, old, batch.advantage, batch.weight, normalizer=tokens,
      logp_sampler=batch.logp_sampler, **config.loss,
    )  # fmt: skip
    # Of the policy that sampled: a later minibatch has moved away from it.
    m |= grpo.agreement(old, batch.logp_sampler, batch.weight, normalizer=tokens)
    m["policy/entropy"] = entropy.sum() / tokens
    return loss, (m | {"loss": loss}, flops.work(batch))

  lie = optim.split(layout["params"], freeze)[0]

  @functools.partial(jax.jit, out_shardings=lie)
  def zeros():
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), trained)

  options = dict(config.compiler)

  @functools.partial(
    jax.jit, donate_argnums=0, out_shardings=(lie, None), compiler_options=options
  )
  def accumulate(total, params, batch, tokens):
    parts = optim.split(params, freeze)
    grads, told = jax.grad(loss_fn, has_aux=True)(*parts, batch, tokens)
    return jax.tree.map(jnp.add, total, grads), told

  @functools.partial(
    jax.jit, donate_argnums=0, out_shardings=(layout, None), compiler_options=options
  )
  def apply(state, grads):
    trained, frozen = optim.split(state["params"], freeze)
    trained, opt, norm = optim.apply(tx, grads, trained, state["opt"])
    m = {"optim/grad_norm": norm, "optim/lr": schedule(state["step"])}
    params = optim.merge(trained, frozen)
    return {"params": params, "opt": opt, "step": state["step"] + 1}, m

  @functools.partial(jax.jit, compiler_options=options)
  def old_logp(params, batch):
    return token_logp(params, batch)[0]

  return zeros, accumulate, apply, old_logp


def judge(groups, masked_stops, **reward):
  """Rewards of the groups of all hosts, which call it together with their own.

  Returns parts f32[Q G], mask bool[Q G], and the step's metrics.  Rollouts that stopped
  by one of `masked_stops` leave mean, std and loss.
  """

  def grid(f, dtype=np.float32):
    return np.array([[f(x.trajectory) for x in group] for group in groups], dtype)

  seen = parallel.gather_rows(
    {
      "correct": grid(common.judge),
      "ops_succeeded": grid(lambda t: t.ops_succeeded, np.int32),
      "ops_attempted": grid(lambda t: t.ops_attempted, np.int32),
      "error_unrepaired": grid(
        lambda t: bool(t.calls) and t.calls[-1].error is not None, bool
      ),
      "is_video": grid(lambda t: any(m.kind == "video" for m in t.task.media), bool)[
        :, 0
      ],
      "unparsed": grid(lambda t: not answers.extract(t.turns[-1]["text"]), bool),
      "mask": grid(lambda t: t.stop not in masked_stops, bool),
    }
  )
  mask = seen.pop("mask")
  parts = rewards.shaped(**seen, **reward)
  parts = {k: np.asarray(v) for k, v in jax.device_get(parts).items()}
  correct, attempted = seen["correct"], seen["ops_attempted"]
  used = seen["ops_succeeded"] > 0
  errors = [c.error for g in groups for x in g for c in x.trajectory.calls if c.error]
  failed = collections.Counter(e for part in parallel.gather_json(errors) for e in part)
  m = {
    "reward/mean": parts["total"].mean(),
    "reward/correct": correct.mean(),
    "reward/curiosity": parts["curiosity"].mean(),
    "reward/penalty": parts["penalty"].mean(),
    "ops/rapr": used.mean(),
    "ops/per_rollout": attempted.mean(),
    "ops/error_rate": sum(failed.values()) / max(attempted.sum(), 1),
    "rollout/masked": 1.0 - mask.mean(),
  }
  if used.any():
    m["reward/accuracy_with_ops"] = correct[used].mean()
  if not used.all():
    m["reward/accuracy_without_ops"] = correct[~used].mean()
  m |= {f"ops/error/{k}": float(v) for k, v in failed.items()}
  return parts, mask, {k: float(v) for k, v in m.items()}


def score(groups, parts, advantage, kept, step):
  """Writes reward and advantage into the trajectories of this host.

  Those kept come as examples: logical shard -> list.
  """
  parts = {k: parallel.own_rows(v) for k, v in parts.items() if v.ndim == 2}
  advantage, kept = parallel.own_rows(advantage), parallel.own_rows(kept)
  examples = collections.defaultdict(list)
  for q, group in enumerate(groups):
    for g, finished in enumerate(group):
      t = finished.trajectory
      t.policy_step = step
      t.advantage = float(advantage[q, g])
      t.reward = {k: float(v[q, g]) for k, v in parts.items()}
      if kept[q, g]:
        examples[t.task.shard].append(encode.example(t, finished.pixels))
  return examples


def within(examples, **limits):
  """Those that a row can hold."""
  return {s: [e for e in x if pack.fits(e, **limits)] for s, x in examples.items()}


def choose(memory, examples, seed):
  """The examples to train on, shard by shard, and how many of them were drawn again."""
  chosen, replayed = {}, 0
  for shard, buffer in memory.items():
    rng = np.random.default_rng((*seed, shard))
    chosen[shard], drawn = buffer.select(examples.get(shard, []), rng)
    replayed += drawn
  return chosen, replayed


def count(examples):
  return sum(map(len, examples.values()))


def split(chosen, minibatches):
  """Minibatches, each a contiguous part of every shard; as many on every host."""
  cuts = [np.arange(minibatches + 1) * len(x) // minibatches for x in chosen.values()]
  parts = [
    [e for x, cut in zip(chosen.values(), cuts) for e in x[cut[i] : cut[i + 1]]]
    for i in range(minibatches)
  ]
  some = parallel.agree(np.array([len(part) for part in parts]), "max")
  return [part for part, n in zip(parts, some) if n]


def to_batches(mesh, rows, examples, **limits):
  """The micro-batches of `rows` rows that `examples` fill; as many on every host."""
  bins = [[examples[i] for i in b] for b in pack.first_fit(examples, **limits)]
  count = parallel.agree(-(-len(bins) // rows), "max")
  parts = [bins[i * rows : (i + 1) * rows] for i in range(count)]
  return [
    parallel.to_devices(mesh, pack.collate(part, num_rows=rows, **limits))
    for part in parts
  ]


def combine(sums, own, tokens):
  """Metrics of an update from those of its micro-batches, which are sums / `tokens`.

  Rollouts without an advantage count in `tokens` but were not looked at, so all but the
  loss are taken over the `own` tokens that were.
  """
  m = {
    k: max(map(float, (s[k] for s in sums)))
    if k.endswith("_max")
    else sum(float(s[k]) for s in sums) * tokens / own
    for k in sums[0]
  }
  return m | {"loss": m["loss"] * own / tokens}


def average(updates):
  """The mean over the updates of a step; of maxima the largest."""
  return {
    k: float((np.max if k.endswith("_max") else np.mean)([u[k] for u in updates]))
    for k in dict(*updates[:1])
  }


def held_out(rollouts, params, tasks, load_media, seed, **rollout):
  """Accuracy and habits on the held-out questions of all hosts, one answer each."""
  played = common.play(
    rollouts,
    rollouts.sync(params),
    tasks,
    mode="free",
    seed=seed,
    load_media=load_media,
    **rollout,
  )
  calls = [c for t in played for c in t.calls]
  n = parallel.total({
    "rollouts": len(played), "calls": len(calls),
    "right": sum(map(common.judge, played)),
    "used": sum(t.ops_succeeded > 0 for t in played),
    "failed": sum(c.error is not None for c in calls),
  })  # fmt: skip
  return {
    "eval/accuracy": n["right"] / n["rollouts"],
    "eval/rapr": n["used"] / n["rollouts"],
    "eval/error_rate": n["failed"] / max(n["calls"], 1),
  }


def count_tokens(examples):
  """Loss tokens of all hosts, at least one."""
  own = sum((float(e.weight.sum()) for e in examples), 0.0)  # a float of none, too
  return max(parallel.agree(own, "sum"), 1.0)


if __name__ == "__main__":
  start.run(main)
