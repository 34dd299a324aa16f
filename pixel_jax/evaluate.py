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
from collections.abc import Sequence
from typing import Literal, TypedDict

import jax
from tqdm import tqdm

from pixel_jax import parallel, trajectory
from pixel_jax.chat import encode
from pixel_jax.data import pipeline, sources
from pixel_jax.evals import protocol, report
from pixel_jax.evals.benchmark import Benchmark
from pixel_jax.evals.tiny_world import TINY_WORLD
from pixel_jax.fields import Seed
from pixel_jax.model.config import ModelConfig
from pixel_jax.rollout import engine, fleet
from pixel_jax.run import bucket, checkpoint, metrics, policies, settings, start


def main(config, workdir):
  settings.check(config, SECTIONS)
  start.open_workdir(workdir, config)
  mesh = parallel.make_mesh()
  parts = [p.rpartition("=") for p in config.policies.split(",")]
  named = {name: init for name, _, init in parts if name}
  if not named:
    raise settings.ConfigError(
      f"config.policies={config.policies!r}: give NAME=DIR[,NAME=DIR...], e.g. SFT=runs/sft"
    )
  benchmark = TINY_WORLD if sources.is_world(config.data.uri) else Benchmark()
  if "swapped" in config.modes and benchmark.other_scene is None:
    raise settings.ConfigError(
      "config.modes has 'swapped', which is allowed only where data.uri names the tiny "
      "world (world:SPLIT)"
    )
  file = workdir / "evaluation.json"
  result = {
    "split": config.data.uri,
    "temperature": config.rollout.temperature,
    "settings": json.loads(config.copy_and_resolve_references().to_json()),
    "rows": [],
  }
  result["settings"].pop("policies")
  known = reusable(file, result["settings"])
  parallel.barrier("known")  # all have read what the first will write again
  fleets = {}  # policies of one shape share the engines, and what was compiled for them
  for name, init in named.items():
    weights = checkpoint.fingerprint(policies.find(init))
    row = known.get((name, weights))
    if row is None:
      modes = evaluate(config, workdir, name, init, mesh, benchmark, fleets)
      row = {"name": name, "policy": init, "weights": weights, "modes": modes}
    result["rows"].append(row)
    if jax.process_index() == 0:
      partial = file.with_suffix(".partial")  # a kill leaves the rows before
      partial.write_text(json.dumps(result, indent=1))
      partial.replace(file)
    bucket.sync(workdir)
    metrics.say(report.table([row]))
  metrics.say(f"done: {metrics.compiled()}")
  metrics.say(f"in {bucket.behind(workdir)}: evaluation.json, trajectories/")


class Fields(TypedDict):
  """The fields outside of sections."""

  seed: Seed
  policies: str
  modes: Sequence[Literal[tuple(protocol.FORCE)]]
  judge: str


SECTIONS = {  # what takes the fields of each section of the config
  "": (Fields,),
  "model": (ModelConfig, settings.Model),
  "codec": (encode.Codec, settings.Named),
  "data": (sources.open_source, pipeline.open_fixed, settings.Named),
  "engine": (engine.Engine,),
  "rollout": (engine.Engine.run,),
}


def reusable(file, settings) -> dict[tuple, dict]:
  """Rows of an earlier evaluation with the same settings, by name and weights."""
  if not file.exists():
    return {}
  earlier = json.loads(file.read_text())
  if earlier.get("settings") != settings:
    return {}
  return {(r["name"], r["weights"]): r for r in earlier["rows"]}


def evaluate(
  config, workdir, name: str, init: str, mesh, benchmark, fleets: dict
) -> dict[str, dict]:
  """What one policy does in every mode; its trajectories are written.

  Every device has an engine, and every engine its share of the tasks.

  Args:
    fleets: those of earlier policies, by model and tokenizer; a new one is added.
  """
  right = settings.imported("judge", config.judge) or protocol.judge
  policy = policies.open_policy(
    init, model=config.model, codec=config.codec, mesh=mesh, seed=0, workdir=workdir
  )
  host = dict(host=jax.process_index(), hosts=jax.process_count())
  make = functools.partial(
    settings.call, "engine", engine.Engine, policy.config, policy.codec, **config.engine
  )
  shape = policy.config, policy.codec.tokenizer.digest
  if shape not in fleets:
    fleets[shape] = fleet.Fleet(make, policy.config, mesh, shards=mesh.size)
  rollouts = fleets[shape]
  questions = settings.call(
    "data", pipeline.open_fixed, codec=policy.codec, workdir=workdir, shards=mesh.size,
    refuses=rollouts.refuses, **host, **settings.of_data(config),
  )  # fmt: skip
  params = rollouts.sync(policy.params)
  modes = {}
  folder = workdir / "trajectories"
  count = len(config.modes) * len(questions.tasks)
  bar = tqdm(desc=name, total=count, unit="answer", leave=False, disable=None)
  for mode in config.modes:
    if host["host"] == 0:  # of another number of hosts, maybe
      for earlier in folder.glob(f"{name}_{mode}.*jsonl"):
        earlier.unlink()
    played = protocol.play(
      rollouts,
      params,
      questions.tasks,
      mode=mode,
      seed=config.seed,
      load_media=questions.load_media,
      other_scene=benchmark.other_scene,
      progress=bar.update,
      **config.rollout,
    )
    modes[mode] = report.summarize(of_hosts(played), benchmark.covers, right)
    if mode != "swapped":  # its pictures could not be redrawn
      file = trajectory.host_file(f"{name}_{mode}", **host)
      trajectory.write_jsonl(folder / file, played)
  bar.close()
  return modes


def of_hosts(played: list[trajectory.Trajectory]) -> list[trajectory.Trajectory]:
  """The rollouts of all hosts, without the ids, which an evaluation does not read."""
  if jax.process_count() == 1:
    return played
  bare = dict(ids=[], sampled=[], weight=[], logp=[], position=[], slots=[])
  told = [dataclasses.asdict(dataclasses.replace(t, **bare)) for t in played]
  return [trajectory.from_dict(d) for part in parallel.gather_json(told) for d in part]


if __name__ == "__main__":
  start.run(main)
