"""Curiosity-driven GRPO with visual operations; `main` is the whole story.

  pixel-jax rl --config=rl:tiny --workdir=DIR --config.init=SFT [--config.KEY=VALUE ...]
  python -m pixel_jax.train_rl --config=configs/rl.py:7b ...        the same program

--config: a config of ours (pixel-jax configs lists them) or FILE.py:ARGUMENT of yours.
--workdir: where the run lives, a folder or gs://BUCKET/PATH.
--config.init: the policy to begin with, a workdir or what `pixel-jax convert` wrote.

A step: the policy answers `prompts_per_step` questions `group_size` times each, looking
closer where it likes; the answers are judged; the curiosity reward is added; groups
become advantages; one or several clipped updates follow.  Running the same command on
the same workdir continues where it stopped, bit for bit.  SIGTERM or Ctrl-C saves the last
whole step and leaves: a step is given up before its first update and finished after it.
"""

import collections
import functools
from collections.abc import Sequence
from typing import Annotated, Literal, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge

from pixel_jax import answers, parallel, trajectory
from pixel_jax.chat import encode
from pixel_jax.data import pack, pipeline, sources
from pixel_jax.evals import protocol
from pixel_jax.fields import PositiveInt
from pixel_jax.model import flops, qwen2_5_vl
from pixel_jax.pixels import image, ops
from pixel_jax.rl import advantages, objectives, replay, rewards
from pixel_jax.rollout import engine, fleet
from pixel_jax.run import checkpoint, metrics, optim, preemption, settings, start
from pixel_jax.view import panel


def main(config, workdir):
  # ---- Set up ------------------------------------------------------------------------
  mesh, policy = start.open_run(config, workdir, SECTIONS)
  notice = preemption.Notice()
  check(config, mesh)
  right = settings.imported("judge", config.judge) or protocol.judge
  data = settings.of_data(config)
  shards = config.data.shards
  host = dict(host=jax.process_index(), hosts=jax.process_count())
  make = functools.partial(
    settings.call, "engine", engine.Engine, policy.config.merged, policy.codec,
    group_size=config.rl.group_size, **config.engine,
  )  # fmt: skip
  rollouts = settings.call(
    "fleet", fleet.Fleet, make, policy.config, mesh, shards=shards, **config.fleet
  )
  row = config.rl.tokens, config.rl.patches  # a rollout ends before a row is too small
  questions = settings.call(
    "data", pipeline.open_tasks, codec=policy.codec, seed=config.seed,
    batch=config.rl.prompts_per_step, workdir=workdir,
    refuses=functools.partial(rollouts.refuses, row=row), **host, **data,
  )  # fmt: skip
  held = None
  if config.eval.uri and config.eval_every:
    held = settings.call(
      "eval", pipeline.open_fixed, codec=policy.codec, workdir=workdir,
      refuses=rollouts.refuses, uri=config.eval.uri, tasks=config.eval.tasks, **host,
      **{k: data[k] for k in ("root", "filter", "layout", "shards")},
    )  # fmt: skip
  memory = {
    s: settings.call("replay", replay.Replay, **config.replay)
    for s in parallel.own_rows(np.arange(shards)).tolist()
  }
  updates = config.total_steps * config.rl.minibatches
  tuned, most = settings.of_optim(config, updates)
  tx, schedule = settings.call("optim", optim.make, policy.abstract, **tuned)
  guard = optim.Guard(most)
  learned = optim.list_paths(optim.split(policy.abstract, tuned["freeze"])[0])
  start.describe(config, policy, tx)
  state = optim.begin(tx, policy.params, tuned["freeze"], mesh)

  # ---- Resume ------------------------------------------------------------------------
  steps = programs(config, policy.config, tx, schedule, state)
  saver = settings.call(
    "checkpoint", checkpoint.Checkpoints, workdir, **config.checkpoint, **policy.extra
  )
  first, state, of_host = saver.restore(state)
  if of_host:
    questions.set_state(of_host["data"])
    for s, buffer in memory.items():
      buffer.set_state(of_host["replay"][str(s)])
  writer = metrics.Writer(
    workdir, first_step=first, total_steps=config.total_steps, wandb=config.wandb,
    mlflow=config.mlflow, config=config.to_dict(),
  )  # fmt: skip

  def progress():
    replayed = {str(s): buffer.get_state() for s, buffer in memory.items()}
    return {"data": questions.get_state(), "replay": replayed}

  # ---- Loop --------------------------------------------------------------------------
  step, reached, m = first, progress(), {}
  while step < config.total_steps and not notice.agreed():
    with writer.timer("data"):
      asked = next(questions)
    with writer.timer("rollout"):
      groups = rollouts.run(
        rollouts.sync(state["params"]), asked.tasks, seed=config.seed, step=step,
        group_size=config.rl.group_size, load_media=asked.load_media,
        row=row, stop=notice.given, **config.rollout,
      )  # fmt: skip
    if notice.agreed():
      break  # the next start begins this step anew
    with writer.timer("reward"):
      parts, mask, m = judge(groups, right, config.rl.masked_stops, **config.reward)
      advantage, grouped = advantages.group_relative(
        parts["total"], mask, std=config.rl.std
      )
      m |= jax.tree.map(float, jax.device_get(grouped))
      score(groups, parts, advantage, step)
      examples, n = to_examples(groups, mask)
      chosen, replayed = choose(memory, examples, (config.seed, step))
      m |= rollouts.stats() | parallel.total(questions.counts())
    with writer.timer("update"):
      done = update(
        config, policy.config, steps, state, chosen, learned=learned,
        tokens=n["tokens"], replayed=replayed, stop=notice.agreed,
        noticed=functools.partial(guard.check, step + 1),
      )  # fmt: skip
    if done is None:
      break
    state, told, cost = done
    step, reached, m = step + 1, progress(), m | told
    if held and settings.due(step, config.eval_every, config.total_steps):
      with writer.timer("eval"):
        m |= held_out(
          rollouts, state["params"], held, right, config.seed, **config.eval.rollout
        )
    writer.write(step, m, tokens=n["sampled"], flops=cost)
    if settings.due(step, config.keep_trajectories_every, config.total_steps):
      name = trajectory.host_file(f"step_{step:06d}", **host)
      played = [f.trajectory for group in groups for f in group]
      trajectory.write_jsonl(workdir / "trajectories" / name, played)
      look = asked.load_media
      writer.show(step, panel.draw_some, played, look, policy.codec)
    if settings.due(step, config.save_every):
      saver.save(step, state, reached, m)

  # ---- End ---------------------------------------------------------------------------
  if not saver.has(step):
    saver.save(step, state, reached, m)
  start.end(
    config, step, saver, writer, notice, "metrics.jsonl, trajectories/, checkpoints/"
  )


class Update(TypedDict):
  """The section `rl`: a step and its updates."""

  prompts_per_step: PositiveInt
  group_size: Annotated[int, Ge(2)]  # one rollout has no group to be better than
  minibatches: PositiveInt
  std: bool
  masked_stops: Sequence[Literal[encode.STOPS]]
  rows: PositiveInt
  tokens: PositiveInt
  patches: PositiveInt


SECTIONS = start.SECTIONS | {
  "data": (sources.open_source, pipeline.tasks, settings.Named),
  "eval": (sources.open_source, pipeline.open_fixed),
  "eval.rollout": (engine.Engine.run,),
  "engine": (engine.Engine,),
  "fleet": (fleet.Fleet,),
  "rollout": (engine.Engine.run,),
  "reward": (rewards.shaped,),
  "rl": (Update,),
  "loss": (objectives.loss,),
  "replay": (replay.Replay,),
}


def check(config, mesh):
  """What the first step would refuse is told before anything compiles."""
  settings.call("rl", pack.check_limits, config.rl.tokens, config.rl.patches)
  settings.call("rl", parallel.check_rows, mesh, config.rl.rows * jax.process_count())
  if not config.rollout.temperature > 0:
    raise settings.ConfigError(
      f"config.rollout.temperature={config.rollout.temperature}: RL learns from samples, "
      "so it must be above 0; evaluate takes 0, too"
    )
  most = largest(
    config.codec.budgets, config.codec.video_frames, config.rollout.max_turns
  )
  if most > config.rl.patches or config.engine.max_len > config.rl.tokens:
    metrics.say(
      f"rows     a rollout may reach {most} patches and {config.engine.max_len} tokens, a "
      f"row of training holds rl.patches={config.rl.patches} and "
      f"rl.tokens={config.rl.tokens}: one that would have more ends (stop row)"
    )
  if config.replay.keep_steps:
    raise settings.ConfigError(
      "config.replay.keep_steps: samples of earlier steps cannot be saved yet, so a "
      "resumed run would differ; use 0"
    )


def largest(budgets, video_frames, max_turns):
  """Patches of the pictures of a rollout that looks at as many as it can."""
  most = {role: pixels // image.PATCH**2 for role, (_, pixels) in budgets.items()}
  asked = max(most["image"], most["video"] * -(-video_frames // image.TEMPORAL))
  return asked + (max_turns - 1) * max(most["crop"], ops.MAX_FRAMES * most["frame"])


def programs(config, model, tx, schedule, state):
  """(zeros, accumulate, apply, old_logp), jitted: an optimizer step over micro-batches.

  What the loop runs and tools/compile/check.py compiles.

  Args:
    model: the ModelConfig.
    state: real, or abstract with shardings.
  """
  freeze = settings.frozen(config)
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
    loss, m = objectives.loss(
      logp, old, batch.advantage, batch.weight, normalizer=tokens,
      logp_sampler=batch.logp_sampler, **config.loss,
    )  # fmt: skip
    # Of the policy that sampled: a later minibatch has moved away from it.
    m |= objectives.agreement(old, batch.logp_sampler, batch.weight, normalizer=tokens)
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
  def apply(state, grads, loss):
    trained, frozen = optim.split(state["params"], freeze)
    trained, opt, m = optim.apply(tx, grads, trained, state["opt"], loss)
    m |= {"optim/lr": schedule(state["step"])}
    params = optim.merge(trained, frozen)
    step = state["step"] + (m["optim/nonfinite"] == 0)
    return {"params": params, "opt": opt, "step": step}, m

  @functools.partial(jax.jit, compiler_options=options)
  def old_logp(params, batch):
    return token_logp(params, batch)[0]

  return zeros, accumulate, apply, old_logp


def update(
  config, model, steps, state, chosen, *, learned, tokens, replayed, stop, noticed
):
  """The updates of a step, `config.rl.minibatches` at most.

  Args:
    model: the ModelConfig.
    steps: of `programs`.
    chosen: examples of each logical shard of this host; they may be drawn again.
    learned: paths of the parameters that are trained.
    tokens: sampled tokens of all rollouts that were kept, of all hosts.
    replayed: how many examples were drawn again, on all hosts.
    noticed: is told whether an update was finite, and of which examples (`optim.Guard`).
    stop: whether the run is to end, the same on all hosts.  It is asked until the first
      update is applied; from then on the step is finished, so that nothing is undone.

  Returns:
    The state, metrics and cost in operations; None where it was stopped.
  """
  zeros, accumulate, apply, old_logp = steps
  alone = config.rl.minibatches == 1 and not replayed
  # The loss of an update is a sum over the tokens of an even share of the step: of all
  # rollouts that were kept, since those without an advantage count, too; or, where some
  # were drawn again, of those that are trained on.
  whole = count_tokens([e for x in chosen.values() for e in x]) if replayed else tokens
  normalizer = max(whole / config.rl.minibatches, 1.0)
  updates, cost = [], collections.Counter()
  mesh = state["step"].sharding.mesh
  parts = split(chosen, config.rl.minibatches)
  plan = [(to_batches(config, mesh, part), count_tokens(part)) for part in parts]
  names = [[e.name for e in part] for part in parts]
  if not alone:  # log-probs of the policy that sampled, before it moves
    sampler = state["params"]
    plan = [
      ([b.replace(logp_old=parallel.settle(old_logp(sampler, b))) for b in batches], n)
      for batches, n in plan
    ]
  for (batches, own), of in zip(plan, names):
    total, told = zeros(), []
    for batch in batches:
      total, t = accumulate(total, state["params"], batch, np.float32(normalizer))
      told.append(parallel.settle(t))
      jax.block_until_ready(told[-2:][0])  # else all are sent before the first is done
      if not updates and stop():
        return None
    sums, work = zip(*jax.device_get(told))
    state, m = apply(state, total, np.float32(sum(s["loss"] for s in sums)))
    m = jax.device_get(m)
    noticed(m["optim/nonfinite"], of)
    work = {k: float(sum(w[k] for w in work)) for k in work[0]}
    cost.update(flops.of_work(model, work, learned).parts())
    updates.append(combine(sums, own, normalizer) | {k: float(v) for k, v in m.items()})
  # Minibatches that nobody had examples for pass in the schedule, too.
  state = optim.pass_over(state, config.rl.minibatches - len(plan))
  return state, average(updates) | {"optim/skipped": float(not plan)}, cost


def judge(groups, right, masked_stops, **reward):
  """Rewards of the groups of all hosts, which call it together with their own.

  Args:
    right: what an answer is worth, Trajectory -> float.
    masked_stops: rollouts that stopped by one of these leave mean, std and loss.
    reward: settings of `rewards.shaped`.

  Returns parts f32[Q G], mask bool[Q G], and the step's metrics.
  """

  def grid(f, dtype=np.float32):
    return np.array([[f(x.trajectory) for x in group] for group in groups], dtype)

  seen = parallel.gather_rows(
    {
      "correct": grid(right),
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
      "row": grid(lambda t: t.stop == "row", bool),
    }
  )
  mask, by_row = seen.pop("mask"), seen.pop("row")
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
    "rollout/stopped_by_row": by_row.mean(),
  }
  if used.any():
    m["reward/accuracy_with_ops"] = correct[used].mean()
  if not used.all():
    m["reward/accuracy_without_ops"] = correct[~used].mean()
  m |= {f"ops/error/{k}": float(v) for k, v in failed.items()}
  return parts, mask, {k: float(v) for k, v in m.items()}


def score(groups, parts, advantage, step):
  """Writes reward and advantage into the trajectories of this host."""
  parts = {k: parallel.own_rows(v) for k, v in parts.items() if v.ndim == 2}
  advantage = parallel.own_rows(advantage)
  for q, group in enumerate(groups):
    for g, finished in enumerate(group):
      t = finished.trajectory
      t.policy_step, t.advantage = step, float(advantage[q, g])
      t.reward = {k: float(v[q, g]) for k, v in parts.items()}


def to_examples(groups, mask):
  """The rollouts of this host that count: shard -> examples.

  A row holds each: a rollout ends before it does not.  Questions without room have said
  nothing, so there is nothing to learn from.  Also, over all hosts: the tokens that were
  sampled, and those of the examples.
  """
  kept = parallel.own_rows(advantages.kept(mask))
  examples = collections.defaultdict(list)
  for q, group in enumerate(groups):
    for g, finished in enumerate(group):
      if kept[q, g] and any(finished.trajectory.sampled):
        example = encode.example(finished.trajectory, finished.pixels)
        examples[finished.trajectory.task.shard].append(example)
  return examples, parallel.total({
    "sampled": sum(sum(f.trajectory.sampled) for group in groups for f in group),
    "tokens": sum(e.weight.sum() for x in examples.values() for e in x),
  })  # fmt: skip


def choose(memory, examples, seed):
  """The examples to train on, shard by shard, and how many of all hosts are drawn again."""
  chosen, drawn = {}, 0
  for shard, buffer in memory.items():
    rng = np.random.default_rng((*seed, shard))
    chosen[shard], again = buffer.select(examples.get(shard, []), rng)
    drawn += again
  return chosen, parallel.agree(drawn, "sum")


def split(chosen, minibatches):
  """Minibatches, each a contiguous part of every shard; as many on every host."""
  cuts = [np.arange(minibatches + 1) * len(x) // minibatches for x in chosen.values()]
  parts = [
    [e for x, cut in zip(chosen.values(), cuts) for e in x[cut[i] : cut[i + 1]]]
    for i in range(minibatches)
  ]
  some = parallel.agree(np.array([len(part) for part in parts]), "max")
  return [part for part, n in zip(parts, some) if n]


def to_batches(config, mesh, examples):
  """The micro-batches that `examples` fill; as many on every host."""
  limits, rows = dict(T=config.rl.tokens, P=config.rl.patches), config.rl.rows
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


def held_out(rollouts, params, questions, right, seed, **rollout):
  """Accuracy and habits on the held-out questions of all hosts, one answer each."""
  groups = rollouts.run(
    rollouts.sync(params), questions.tasks, seed=seed, step=0, group_size=1,
    load_media=questions.load_media, **rollout,
  )  # fmt: skip
  played = [group[0].trajectory for group in groups]
  calls = [c for t in played for c in t.calls]
  n = parallel.total({
    "rollouts": len(played), "calls": len(calls),
    "right": sum(map(right, played)),
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
