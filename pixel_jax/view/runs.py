"""Workdirs -> runs: what was measured, configured and played, and how far each has come.

A workdir that is still being written is read again by `Run.update`: metrics from where the
last look ended, a half line of a run that is writing left for the next.
"""

import dataclasses
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from pixel_jax import fields
from pixel_jax.trajectory import Trajectory
from pixel_jax.view.index import File

PARTS = ("config.json", "metrics.jsonl", "evaluation.json", "trajectories")
ORDER = ("base", "sft", "rl", "rl_alpha0", "eval")
RECENT = 20  # steps whose time tells how long the others will take
QUIET = 300  # seconds without a step, at least, after which a run does not seem to run


def warn(text: str) -> None:
  print(f"warning: {text}", file=sys.stderr)


@dataclasses.dataclass
class Run:
  """One workdir, or one file of evaluation rollouts, by the name it has on the page."""

  name: str
  metrics: list[dict] = dataclasses.field(default_factory=list)  # of metrics.jsonl
  config: dict[str, Any] = dataclasses.field(default_factory=dict)
  trajectories: Sequence[Trajectory] = ()
  folder: pathlib.Path | None = None
  read: int = 0  # bytes of metrics.jsonl
  lines: int = 0

  @property
  def is_rl(self) -> bool:
    return any("ops/rapr" in row for row in self.metrics)

  @property
  def heads(self) -> list[tuple[int, str]]:
    """(step, id of the task) of every trajectory."""
    known = getattr(self.trajectories, "heads", None)  # of those that lie in files
    if known is not None:
      return known
    return [(t.policy_step, t.task.id) for t in self.trajectories]

  def update(self) -> bool:
    """Reads what metrics.jsonl has got since; whether there was anything."""
    path = self.folder / "metrics.jsonl"
    try:
      size = path.stat().st_size
    except OSError:
      return False
    if size < self.read:  # the run was cut back to a checkpoint
      self.metrics, self.read, self.lines = [], 0, 0
    if size == self.read:
      return False
    with path.open("rb") as f:
      f.seek(self.read)
      data = f.read()
    whole = data[: data.rfind(b"\n") + 1]
    for line in whole.splitlines():
      self.lines += 1
      try:
        row = json.loads(line)
      except ValueError as error:
        warn(f"{path}:{self.lines} is left out: {error}")
        continue
      if isinstance(row, dict):
        self.metrics.append(row)
    self.read += len(whole)
    return bool(whole)


# ---- Finding -------------------------------------------------------------------------


def find(roots: Iterable[pathlib.Path]) -> list[pathlib.Path]:
  """The folders that hold a run: each root, and what lies directly below it."""
  found = []
  for root in roots:
    below = [d for d in root.iterdir() if d.is_dir() and d.name not in PARTS]
    below.sort(key=lambda d: (ORDER.index(d.name) if d.name in ORDER else 9, d.name))
    found += [d for d in (root, *below) if any((d / part).exists() for part in PARTS)]
  return list(dict.fromkeys(found))


def open_runs(folders: Sequence[pathlib.Path]) -> list[Run]:
  """A run for each workdir, their names told apart."""
  paths = [folder.resolve() for folder in folders]
  names = [path.name for path in paths]
  runs = []
  for path, name in zip(paths, names):
    if names.count(name) > 1:
      name = f"{path.parent.name}/{name}"
    run = Run(name, config=read_json(path / "config.json"), folder=path)
    run.update()
    alpha = run.config.get("reward", {})
    if run.is_rl and isinstance(alpha, dict) and "alpha" in alpha:
      run.name = f"{name} (alpha = {alpha['alpha']:g})"
    runs.append(run)
  return runs


def files(found: Sequence[Run]) -> list[File]:
  """Their files of trajectories; those of an evaluation by policy, benchmark and mode."""
  named, owners = [], {}
  for run in found:
    for path in sorted((run.folder / "trajectories").glob("*.jsonl")):
      stem = path.name.split(".")[0]  # of several hosts each has its own
      name = run.name if stem.startswith("step_") else stem.replace("_", ", ")
      owners.setdefault(name, set()).add(run.name)
      named.append((run, name, path))
  return [
    File(f"{run.name}: {name}" if len(owners[name]) > 1 else name, path)
    for run, name, path in named
  ]


def read_json(path: pathlib.Path) -> dict:
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    return {}
  except ValueError as error:
    warn(f"{path} is left out: {error}")
    return {}
  return value if isinstance(value, dict) else {}


# ---- Comparing -----------------------------------------------------------------------

OF_A_SEED = ("seed", "init")  # in these the runs of one arm may differ


def arms(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
  """Runs with the same config but for the seed are one arm, by the name they share."""
  found: dict[str, list[Run]] = {}
  for run in runs:
    own = {k: v for k, v in fields.flat(run.config).items() if k not in OF_A_SEED}
    key = json.dumps(own, sort_keys=True, default=str) if own else run.name
    found.setdefault(key, []).append(run)
  out = []
  for alike in found.values():
    name = alike[0].name
    if len(alike) > 1:
      ends = {run.name.rpartition("/")[2] for run in alike}
      name = f"{ends.pop() if len(ends) == 1 else name}, {len(alike)} seeds"
    out.append((name, alike))
  return out


def differences(runs: Sequence[Run]) -> list[tuple[str, list[Any]]]:
  """Fields in which the configs differ, with the value of each run."""
  configs = [fields.flat(run.config) for run in runs]
  keys = dict.fromkeys(key for config in configs for key in config)
  rows = [(key, [config.get(key) for config in configs]) for key in keys]
  return [(key, values) for key, values in rows if any(v != values[0] for v in values)]


# ---- How far -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Progress:
  """How far a run is.

  Attributes:
    total: steps; 0 where the config does not say.
    seconds: of a step, the median of the last ones.
    left: seconds to go.
    goodput: share of all steps' time that was spent on rollouts and updates, and not on
      compiling, saving, evaluating or waiting for data.
    state: "running", "done" or "quiet".
  """

  step: int
  total: int
  seconds: float
  left: float
  goodput: float
  state: str


def progress(run: Run, now: float | None = None) -> Progress | None:
  """None where nothing was measured yet."""
  rows = [row for row in run.metrics if isinstance(row.get("step"), int)]
  if not rows:
    return None
  step, total = rows[-1]["step"], run.config.get("total_steps", 0)
  total = total if isinstance(total, int) else 0
  spent = [_seconds(row, "perf/step_s") for row in rows]
  each = statistics.median(spent[-RECENT:])
  useful = sum(
    _seconds(row, "perf/update_s") + _seconds(row, "perf/rollout_s") for row in rows
  )
  goodput = min(useful / sum(spent), 1.0) if sum(spent) else 0.0
  state = "done" if total and step >= total else "running"
  if state == "running" and run.folder is not None:
    written = (run.folder / "metrics.jsonl").stat().st_mtime
    if (now or time.time()) - written > max(QUIET, 10 * each):
      state = "quiet"
  return Progress(step, total, each, max(total - step, 0) * each, goodput, state)


def _seconds(row: dict, key: str) -> float:
  value = row.get(key)
  return float(value) if isinstance(value, int | float) else 0.0
