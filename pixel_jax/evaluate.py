"""Policies side by side on benchmarks or on your questions, with controls.

  pixel-jax evaluate --config=evaluate:7b,vstar,hrbench4k --workdir=DIR \\
      --config.data.root=DATA --config.policies=BASE=HF_DIR,RL=runs/rl
  pixel-jax evaluate --config=evaluate:tiny --workdir=DIR \\
      --config.policies=SFT=runs/sft,RL=runs/rl [--config.KEY=VALUE ...]
  python -m pixel_jax.evaluate --config=configs/evaluate.py:tiny ...    the same program

--config: a config of ours (pixel-jax configs lists them) or FILE.py:ARGUMENT of yours.
--config.policies: NAME=DIR of workdirs, of Hugging Face folders, or of what
`pixel-jax convert` wrote.
Writes evaluation.json, predictions/, exports/ and all trajectories into the workdir; the
same command goes on where a killed one stopped, answer by answer.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Literal, TypedDict

import jax
from absl import logging
from tqdm import tqdm

from pixel_jax import parallel, trajectory
from pixel_jax.chat import encode
from pixel_jax.data import pipeline, sources
from pixel_jax.evals import benchmark as benchmark_lib
from pixel_jax.evals import exports, protocol, report
from pixel_jax.evals.benchmark import Benchmark, Row
from pixel_jax.evals.hrbench import HRBENCH_4K, HRBENCH_8K
from pixel_jax.evals.infographicvqa import INFOGRAPHICVQA
from pixel_jax.evals.mme_realworld import MME_REALWORLD_LITE
from pixel_jax.evals.mvbench import MVBENCH
from pixel_jax.evals.notes import Notes, bare
from pixel_jax.evals.protocol import Protocol
from pixel_jax.evals.tallyqa import TALLYQA_COMPLEX, TALLYQA_EVALDATA, TALLYQA_SIMPLE
from pixel_jax.evals.tiny_world import TINY_WORLD
from pixel_jax.evals.treebench import TREEBENCH
from pixel_jax.evals.visualprobe import VISUALPROBE
from pixel_jax.evals.vstar import VSTAR
from pixel_jax.fields import PositiveInt, Seed
from pixel_jax.model.config import ModelConfig
from pixel_jax.rollout import engine, fleet
from pixel_jax.run import bucket, checkpoint, metrics, policies, settings, start
from pixel_jax.run.settings import ConfigError
from pixel_jax.trajectory import Task, Trajectory

BENCHMARKS = {
  b.name: b
  for b in (
    VSTAR, HRBENCH_4K, HRBENCH_8K, TALLYQA_SIMPLE, TALLYQA_COMPLEX, TALLYQA_EVALDATA,
    INFOGRAPHICVQA, MVBENCH, VISUALPROBE, TREEBENCH, MME_REALWORLD_LITE,
  )
}  # fmt: skip
OPTIONS = 8  # of a choice at most, where they are scored by their likelihood


def main(config, workdir):
  settings.check(config, SECTIONS)
  named, plan = policies_of(config), plan_of(config)
  start.open_workdir(workdir, config)
  mesh = parallel.make_mesh()
  file = workdir / "evaluation.json"
  result = {
    "split": config.data.uri or ", ".join(config.benchmarks),
    "temperature": config.rollout.temperature,
    "settings": json.loads(config.copy_and_resolve_references().to_json()),
    "rows": [],
    "pairs": [],
  }
  result["settings"].pop("policies")
  known = earlier_rows(file)
  parallel.barrier("known")  # all have read what the first will write again
  fleets = {}  # policies of one shape share the engines, and what was compiled for them
  for name, init in named.items():
    player = Player(config, workdir, name, init, mesh, fleets)
    for benchmark, how, modes in plan:
      row = {
        "name": name, "policy": init, "weights": player.weights,
        "benchmark": benchmark.name, "protocol": how.name, "modes": {},
      }  # fmt: skip
      result["rows"].append(row)
      for mode in modes:
        row["modes"][mode] = player.play(benchmark, how, mode, known)
        write(file, result)  # a kill leaves what was played
        bucket.sync(workdir)
      if jax.process_index() == 0:
        result["pairs"] += pairs(workdir, row, result["rows"][:-1])
      write(file, result)
      metrics.say(report.table([row]))
      for mode, other in incomparable(result["rows"], row):
        logging.warning(
          "%s and %s were not asked %s in the same way (mode %s): prompt, options, "
          "decoding, pixel budgets, parser or split differ, so do not compare them",
          other, name, benchmark.name, mode,
        )  # fmt: skip
  metrics.say(f"done: {metrics.compiled()}")
  metrics.say(
    f"in {bucket.behind(workdir)}: evaluation.json, predictions/, trajectories/"
  )


def write(file, result: dict) -> None:
  if jax.process_index() == 0:
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1))
    partial.replace(file)


class Fields(TypedDict):
  """The fields outside of sections."""

  seed: Seed
  policies: str
  benchmarks: Sequence[Literal[tuple(BENCHMARKS)]]
  protocols: Sequence[Literal[tuple(protocol.PROTOCOLS)]]
  modes: Sequence[Literal[protocol.MODES]]
  samples: PositiveInt
  exports: Sequence[Literal[tuple(exports.FORMATS)]]
  judge: str


SECTIONS = {  # what takes the fields of each section of the config
  "": (Fields,),
  "model": (ModelConfig, settings.Model),
  "codec": (encode.Codec, settings.Named),
  "data": (sources.open_source, pipeline.open_fixed, settings.Named),
  "engine": (engine.Engine,),
  "rollout": (engine.Engine.run,),
}


def policies_of(config) -> dict[str, str]:
  """NAME -> DIR of `config.policies`."""
  parts = [p.rpartition("=") for p in config.policies.split(",")]
  named = {name: init for name, _, init in parts if name}
  wrong = [n for n in named if "/" in n or n.startswith(".")]  # they name files
  if not named or len(named) < len(parts) or wrong:
    raise ConfigError(
      f"config.policies={config.policies!r}: give NAME=DIR[,NAME=DIR...], e.g. "
      "SFT=runs/sft, every NAME once and without /"
    )
  return named


def plan_of(config) -> list[tuple[Benchmark, Protocol, list[str]]]:
  """What is played: every benchmark under every protocol, in the modes that fit."""
  if config.benchmarks and config.data.uri:
    raise ConfigError(
      f"config.benchmarks={config.benchmarks} and config.data.uri={config.data.uri!r} both "
      "name questions; give one of them, and data.root for benchmarks"
    )
  if config.benchmarks:
    chosen = [BENCHMARKS[name] for name in config.benchmarks]
  else:
    chosen = [TINY_WORLD if sources.is_world(config.data.uri) else Benchmark()]
  if right := settings.imported("judge", config.judge):
    chosen = [dataclasses.replace(b, judge=right) for b in chosen]
  plan, left_out = [], set()
  for benchmark, name in itertools.product(chosen, config.protocols):
    how = protocol.PROTOCOLS[name]
    fit = [m for m in config.modes if protocol.allows(benchmark, how, m)]
    if "free" in fit and protocol.allows(benchmark, how, "likelihood"):
      fit = [*fit, *({"likelihood"} - set(fit))]
    left_out |= set(config.modes) - set(fit)
    if fit:
      plan.append((benchmark, how, fit))
  for mode in sorted(left_out - {m for _, _, fit in plan for m in fit}):
    raise ConfigError(
      f"config.modes has {mode!r}, which fits none of what is asked; masked wants the "
      "boxes of a target (the tiny world, vstar, treebench), swapped the tiny world "
      "(data.uri=world:SPLIT), likelihood vstar's official protocol, and all but free and "
      "masked the pixel protocol"
    )
  return plan


def earlier_rows(file) -> dict[tuple, dict]:
  """The figures of an earlier evaluation by policy, weights, benchmark, protocol, mode."""
  if not file.exists():
    return {}
  keys = ("name", "weights", "benchmark", "protocol")
  return {
    (*(r[k] for k in keys), mode): figures
    for r in json.loads(file.read_text()).get("rows", ())
    if all(k in r for k in keys)  # older versions had fewer
    for mode, figures in r["modes"].items()
  }


class Player:
  """One policy, and what it is asked.  Every device has an engine, and every engine its
  share of the questions.

  Args:
    fleets: those of earlier policies, by model and tokenizer; a new one is added.
  """

  def __init__(self, config, workdir, name: str, init: str, mesh, fleets: dict):
    self.config, self.workdir, self.name, self.mesh = config, workdir, name, mesh
    self.weights = checkpoint.fingerprint(policies.find(init))
    self.policy = policies.open_policy(
      init, model=config.model, codec=config.codec, mesh=mesh, seed=0, workdir=workdir
    )
    self.host = dict(host=jax.process_index(), hosts=jax.process_count())
    largest = max(config.samples, OPTIONS if "official" in config.protocols else 1)
    prompts = engine.prompt_rows_of(config.engine.slots, config.samples)
    make = functools.partial(
      settings.call, "engine", engine.Engine, self.policy.config, self.policy.codec,
      group_size=largest, prompts=prompts, **config.engine,
    )  # fmt: skip
    shape = self.policy.config, self.policy.codec.tokenizer.digest
    if shape not in fleets:
      fleets[shape] = fleet.Fleet(make, self.policy.config, mesh, shards=mesh.size)
    self.fleet = fleets[shape]
    self._asked: dict[str, tuple] = {}
    self._told: dict[tuple[str, str], tuple] = {}  # prompts and parser, for all modes

  @functools.cached_property
  def params(self):
    """The weights where the engines have them; read when something is to be played, and
    not kept elsewhere."""
    return self.fleet.sync(self.policy.read())

  def questions(self, benchmark: Benchmark) -> tuple[pipeline.Questions, dict]:
    """This host's questions, and those that were set aside, counted."""
    if benchmark.name not in self._asked:
      config, codec = self.config, self.policy.codec
      plan = settings.of_data(config)
      count = plan.pop("tasks")
      common = dict(
        workdir=self.workdir, shards=self.mesh.size, refuses=self.fleet.refuses
      )
      if benchmark.read is None:
        source = settings.call(
          "data", sources.open_source, plan.pop("uri"), codec=codec, **plan
        )
      else:
        source = benchmark_lib.open_benchmark(benchmark, config.data.root, codec)
        source.filter = sources.Filter(**config.data.filter)
      count = min(count or len(source), len(source))
      watched = _Watched(source, f"{self.name}: reading {benchmark.name}")
      tasks = pipeline.fixed_tasks(watched, count, **common, **self.host)
      watched.close()
      asked = pipeline.Questions(benchmark_lib.distinct(tasks), source.load_media)
      here = parallel.total({"usable": len(tasks)})["usable"]
      self._asked[benchmark.name] = asked, {"set_aside": int(count - here)}
    return self._asked[benchmark.name]

  def play(
    self, benchmark: Benchmark, how: Protocol, mode: str, known: dict
  ) -> dict[str, dict]:
    """What the policy does in a mode; answers that a killed run left are taken over."""
    config, (questions, counted) = self.config, self.questions(benchmark)
    tasks = questions.tasks
    key = self._fingerprint(benchmark, how, mode, tasks)
    stem = "_".join((self.name, benchmark.name, how.name, mode))
    lines = self.workdir / "predictions" / f"{stem}.jsonl"
    place = (self.name, self.weights, benchmark.name, how.name, mode)
    if known.get(place, {}).get("hash") == key and lines.exists():
      return known[place]
    samples = config.samples
    if mode == "likelihood":  # one says each of the options
      own = max((len(t.reference["options"]) for t in tasks), default=1)
      samples = int(parallel.agree(own, "max"))
    order = [(t.id, s) for t in tasks for s in range(samples)]
    notes = Notes(
      self.workdir / "trajectories", stem,
      hashlib.blake2b((key + self.weights).encode()).hexdigest()[:16], **self.host,
    )  # fmt: skip
    left = notes.left()
    played = {each: left[each] for each in order if each in left}
    parallel.barrier("left")  # all have read what others may write to
    todo = [t for t in tasks if any((t.id, s) not in played for s in range(samples))]
    scores = []
    with notes, tqdm(
      desc=f"{self.name} {benchmark.name} {how.name} {mode}", unit="answer",
      total=len(order), initial=len(played), leave=False, disable=None,
    ) as bar:  # fmt: skip

      def ended(i: int, t: Trajectory) -> None:
        if mode != "likelihood":
          row = protocol.score(benchmark, how, todo[i], t)
          scores.append(next(iter(row.scores.values())))
          t.reward["correct"] = scores[-1]
          bar.set_postfix(score=f"{sum(scores) / len(scores):.3f}", refresh=False)
        notes.add(t)
        played[t.task.id, t.sample] = bare(t)
        bar.update()

      if parallel.total({"n": len(todo)})["n"]:
        protocol.play(
          self.fleet, self.params, todo, benchmark=benchmark, protocol=how, mode=mode,
          codec=self.policy.codec, samples=samples, settings=dict(config.rollout),
          seed=config.seed, load_media=questions.load_media, ended=ended,
        )  # fmt: skip
    rows = self._rows(benchmark, how, mode, tasks, [played[each] for each in order])
    notes.keep(order, parallel.barrier)
    if self.host["host"] == 0:
      told = [exports.prediction(row, benchmark) for row in rows]
      exports.write_jsonl(lines, told)
      firsts = [row for row in rows if row.trajectory.sample == 0]
      for form in config.exports:
        export, ending = exports.FORMATS[form]
        export(self.workdir / "exports" / form / f"{stem}.{ending}", firsts)
    parallel.barrier("kept")
    return {"hash": key} | report.summarize(rows, benchmark) | counted

  def _fingerprint(self, benchmark, how, mode, tasks: list[Task]) -> str:
    asked = (benchmark.name, how.name)
    if asked not in self._told:
      self._told[asked] = self._tell(benchmark, how, tasks)
    told, parsed = self._told[asked]
    return protocol.fingerprint(
      benchmark, how, mode, self.policy.codec, prompts=told, parsed=parsed,
      samples=self.config.samples, seed=self.config.seed,
      settings=self.config.rollout.to_dict(),
    )  # fmt: skip

  def _tell(self, benchmark, how, tasks: list[Task]) -> tuple[dict, list]:
    """The digests of the questions of all hosts, and the parser at the first of them."""
    codec = self.policy.codec
    first = min(tasks, key=lambda t: t.id, default=None)
    own = {
      "told": protocol.digests(benchmark, how, tasks, codec),
      "first": first and [first.id, protocol.parser(benchmark, first)],
    }
    hosts = parallel.gather_json(own)
    told = {i: digest for each in hosts for i, digest in each["told"].items()}
    _, parsed = min(each["first"] for each in hosts if each["first"])
    return told, parsed

  def _rows(self, benchmark, how, mode, tasks, played) -> list[Row]:
    """The answers of all hosts, by the questions' ids."""
    asked = {t.id: t for t in tasks}
    both = [(asked[t.task.id], t) for t in played]
    if self.host["hosts"] > 1:
      told = [[dataclasses.asdict(x) for x in pair] for pair in both]
      hosts = parallel.gather_json(told)
      both = [(_task(t), trajectory.from_dict(x)) for part in hosts for t, x in part]
    both.sort(key=lambda pair: (pair[0].id, pair[1].sample))
    if mode != "likelihood":
      return [protocol.score(benchmark, how, t, x) for t, x in both]
    groups = itertools.groupby(both, key=lambda pair: pair[0].id)
    said = [[*group] for _, group in groups]
    return [protocol.likeliest(g[0][0], [x for _, x in g]) for g in said]


class _Watched:
  """A source whose reading shows itself."""

  def __init__(self, source, what: str):
    self._source = source
    self._bar = tqdm(desc=what, total=len(source), leave=False, disable=None, delay=2)
    self.codec, self.filter = source.codec, source.filter
    self.load_media, self.close = source.load_media, self._bar.close

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, i: int):
    self._bar.update()
    return self._source[i]


def _task(fields: dict) -> Task:
  return Task(**fields | {"media": [trajectory.Media(**m) for m in fields["media"]]})


# ---- Pairs ---------------------------------------------------------------------------


def incomparable(rows: Sequence[dict], row: dict) -> Iterator[tuple[str, str]]:
  """(mode, policy) of earlier rows whose hash differs from this one's."""
  for other in rows:
    if other is not row and _asked_alike(other, row):
      for mode, figures in row["modes"].items():
        if other["modes"].get(mode, figures)["hash"] != figures["hash"]:
          yield mode, other["name"]


def pairs(workdir, row: dict, earlier: Sequence[dict]) -> list[dict]:
  """What looking is worth to a policy, and the policy beside the first one.

  Of "free" over "forbidden" or over "text" `only_first` is the gain of the tools,
  `only_second` their harm.
  """
  same = [r for r in earlier if r["benchmark"] == row["benchmark"]]
  own = [r for r in same if r["name"] == row["name"]]
  asked = []
  if row["protocol"] == "pixel":
    asked += [((row, "free"), (row, mode)) for mode in row["modes"] if mode != "free"]
    asked += [((row, "free"), (r, "free")) for r in own if r["protocol"] == "text"]
  if row["protocol"] == "text":
    asked += [((r, "free"), (row, "free")) for r in own if r["protocol"] == "pixel"]
  first = next((r for r in same if _asked_alike(r, row)), None)
  if first is not None:
    asked.append(((row, "free"), (first, "free")))
  return [pair for a, b in asked if (pair := _pair(workdir, a, b))]


def _asked_alike(a: dict, b: dict) -> bool:
  return (a["benchmark"], a["protocol"]) == (b["benchmark"], b["protocol"])


def _pair(workdir, a: tuple[dict, str], b: tuple[dict, str]) -> dict | None:
  if not all(mode in row["modes"] for row, mode in (a, b)):
    return None
  sides, names = [], []
  for row, mode in (a, b):
    stem = "_".join((row["name"], row["benchmark"], row["protocol"], mode))
    names.append(stem)
    file = workdir / "predictions" / f"{stem}.jsonl"
    sides.append([json.loads(line) for line in file.read_text().splitlines()])
  return {"first": names[0], "second": names[1]} | report.pair(*sides)


if __name__ == "__main__":
  start.run(main)
