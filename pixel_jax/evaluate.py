"""Policies side by side on one split, with and without operations.

  pixel-jax evaluate --config=evaluate:tiny --workdir=DIR \\
      --config.policies=SFT=runs/sft,RL=runs/rl [--config.KEY=VALUE ...]
  python -m pixel_jax.evaluate --config=configs/evaluate.py:tiny ...    the same program

--config: a config of ours (pixel-jax configs lists them) or FILE.py:ARGUMENT of yours.
--config.policies: NAME=DIR of workdirs or of what `pixel-jax convert` wrote.
Writes evaluation.json and the trajectories into the workdir.
"""

import dataclasses
import functools
import json

import jax
from tqdm import tqdm

from pixel_jax import bucket, checkpoint, metrics, parallel, start, trajectory
from pixel_jax.data import pipeline, sources, world
from pixel_jax.evals import common
from pixel_jax.rollout import engine, fleet


def main(config, workdir):
  start.open_workdir(workdir, config)
  mesh = parallel.make_mesh()
  parts = [p.rpartition("=") for p in config.policies.split(",")]
  named = {name: init for name, _, init in parts if name}
  if not named:
    raise start.ConfigError(
      f"config.policies={config.policies!r}: give NAME=DIR[,NAME=DIR...], e.g. SFT=runs/sft"
    )
  is_world = sources.is_world(config.data.uri)
  for mode in config.modes:
    if mode not in common.FORCE or (mode == "swapped" and not is_world):
      raise start.ConfigError(
        f"config.modes: {mode!r}; allowed are {', '.join(common.FORCE)}, and swapped "
        "only where data.uri is a world:"
      )
  file = workdir / "evaluation.json"
  result = {
    "split": config.data.uri,
    "temperature": config.rollout.temperature,
    "settings": json.loads(config.copy_and_resolve_references().to_json()),
    "rows": [],
  }
  result["settings"].pop("policies")
  covers = world.covers if is_world else None
  known = reusable(file, result["settings"])
  for name, init in named.items():
    weights = checkpoint.fingerprint(start.find(init))
    row = known.get((name, weights))
    if row is None:
      modes = evaluate(config, workdir, name, init, mesh, covers)
      row = {"name": name, "policy": init, "weights": weights, "modes": modes}
    result["rows"].append(row)
    if jax.process_index() == 0:
      file.write_text(json.dumps(result, indent=1))
    bucket.sync(workdir)
    metrics.say(table([row]))
  metrics.say(f"done: {metrics.compiled()}")
  metrics.say(f"in {bucket.behind(workdir)}: evaluation.json, trajectories/")


def reusable(file, settings) -> dict[tuple, dict]:
  """Rows of an earlier evaluation with the same settings, by name and weights."""
  if not file.exists():
    return {}
  earlier = json.loads(file.read_text())
  if earlier.get("settings") != settings:
    return {}
  return {(r["name"], r["weights"]): r for r in earlier["rows"]}


def evaluate(config, workdir, name: str, init: str, mesh, covers) -> dict[str, dict]:
  """What one policy does in every mode; its trajectories are written.

  Every device has an engine, and every engine its share of the tasks.
  """
  policy = start.open_policy(
    init, model=config.model, codec=config.codec, mesh=mesh, seed=0, workdir=workdir
  )
  data = dict(config.data)
  count = data.pop("tasks")
  source = start.call("data", sources.open_source, **data, codec=policy.codec)
  mine = dict(host=jax.process_index(), hosts=jax.process_count())
  tasks = start.call(
    "data",
    pipeline.fixed_tasks,
    source,
    count,
    workdir=workdir,
    shards=mesh.size,
    **mine,
  )
  make = functools.partial(
    start.call, "engine", engine.Engine, policy.config, policy.codec, **config.engine
  )
  rollouts = fleet.Fleet(make, policy.config, mesh, shards=mesh.size)
  params = rollouts.sync(policy.params)
  modes = {}
  folder = workdir / "trajectories"
  for mode in tqdm(config.modes, desc=name, leave=False, disable=None):
    if mine["host"] == 0:  # of another number of hosts, maybe
      for earlier in folder.glob(f"{name}_{mode}.*jsonl"):
        earlier.unlink()
    played = common.play(
      rollouts,
      params,
      tasks,
      mode=mode,
      seed=config.seed,
      load_media=source.load_media,
      other_scene=world.other_scene,
      **config.rollout,
    )
    modes[mode] = common.summarize(of_hosts(played), covers)
    if mode != "swapped":  # its pictures could not be redrawn
      file = trajectory.host_file(f"{name}_{mode}", **mine)
      trajectory.write_jsonl(folder / file, played)
  return modes


def of_hosts(played: list[trajectory.Trajectory]) -> list[trajectory.Trajectory]:
  """The rollouts of all hosts, as far as an evaluation looks at them: without ids."""
  if jax.process_count() == 1:
    return played
  bare = dict(ids=[], sampled=[], weight=[], logp=[], position=[], slots=[])
  told = [dataclasses.asdict(dataclasses.replace(t, **bare)) for t in played]
  return [trajectory.from_dict(d) for part in parallel.gather_json(told) for d in part]


def table(rows: list[dict]) -> str:
  """The rows as aligned text: accuracy [95 % interval], RaPR, coverage for each mode."""
  lines = []
  for row in rows:
    for mode, m in row["modes"].items():
      low, high = m["ci"]
      lines.append(
        f"{row['name']:<10} {mode:<10} accuracy {m['accuracy']:.3f} [{low:.3f}, {high:.3f}]"
        f"  RaPR {m['rapr']:.3f}  covered {m.get('covered', float('nan')):.3f}"
        f"  errors {m['error_rate']:.3f}  "
        + " ".join(f"{k} {v['accuracy']:.2f}" for k, v in m["by"].items())
      )
  return "\n".join(lines)


if __name__ == "__main__":
  start.run(main)
