"""Cost as the work grows: what is worse than linear shows as a slope above 1.

  python -m pixel_jax.tools.bench.growth --out=DIR [--only=NAME,...]

Measures each of these at a few sizes, with the tiny model where one is needed: a train
step over rows, context and pictures a row; a decoding step over slots and context; a
rollout over the size of a group; a train step over processes; the viewer's index over
trajectories; opening a source over its records, its time and its memory.  Writes
DIR/growth.json, DIR/growth.md and DIR/growth.svg.  The slope is that of the logarithms
over the larger half of the sizes: 1 = linear, 0 = it costs the same.
"""

import argparse
import dataclasses
import functools
import json
import math
import pathlib
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import numpy as np

from pixel_jax.configs import sft as sft_configs
from pixel_jax.data import sources
from pixel_jax.tools.bench import compare, data, device, ours, viewer
from pixel_jax.view import charts
from pixel_jax.view.index import Index

TOKENS = 256  # of a row, where rows grow
EACH = 96  # tokens of an example that shows a picture
SIDE = 8  # of that picture, in visual tokens


@dataclasses.dataclass(frozen=True)
class Case:
  """What grows, what is measured, and of which unit."""

  title: str
  over: str
  sizes: Sequence[int]
  measure: Callable[[int], float]
  unit: str = "s"
  why: str = ""  # it may be above linear


# ---- Training ------------------------------------------------------------------------


def train(rows: int, tokens: int, fill: Callable) -> float:
  """Seconds of the trainer's step on rows of `fill(rng, model)`."""
  changes = {"data.rows": rows, "data.tokens": tokens, "optim.freeze": ("^vision/",)}
  run = device.open_run(sft_configs, "tiny", **changes)
  rng = np.random.default_rng(0)
  examples = [fill(rng, run.model) for _ in range(rows)]
  _, told = device.train_step(run, device.state_of(run), examples, kept=False)
  return told["seconds"]


def rows(n: int) -> float:
  return train(
    n, TOKENS, lambda rng, m: [data.example(rng, m, TOKENS, None, TOKENS // 2)]
  )


def context(n: int) -> float:
  return train(1, n, lambda rng, m: [data.example(rng, m, n, None, n // 2)])


def pictures(n: int) -> float:
  """Rows of one length with ever more pictures in them."""

  def fill(rng, model):
    return [data.example(rng, model, EACH, (SIDE, SIDE), 16) for _ in range(n)]

  return train(1, EACH * 32, fill)


def hosts(n: int) -> float:
  """Seconds of a step of the same batch over so many processes on this machine."""
  with tempfile.TemporaryDirectory() as folder:
    command = [
      sys.executable, launcher(), str(n), f"{folder}/logs", sys.executable, "-m",
      "pixel_jax", "sft", "--config=sft:tiny,base", f"--workdir={folder}/run",
      "--config.total_steps=12", "--config.save_every=0", "--config.eval.batches=0",
      "--config.mesh.fsdp=-1", "--config.data.rows=8", "--config.optim.warmup_steps=0",
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = (pathlib.Path(folder) / "run/metrics.jsonl").read_text().splitlines()
  steps = [json.loads(line)["perf/step_s"] for line in lines[2:]]
  return statistics.median(steps)


def launcher() -> str:
  """launch/processes.py, which is not part of the package."""
  here = pathlib.Path(__file__).resolve().parents[2] / "launch/processes.py"
  if not here.exists():
    sys.exit("error: `hosts` is measured from a checkout, whose launch/ it needs")
  return str(here)


# ---- Rollout -------------------------------------------------------------------------


def decode(slots: int, context: int) -> float:
  size = dataclasses.replace(device.SIZES["tiny"], contexts=(context,), chunk=16)
  return next(device.decode_in(size, slots, 1.0))["seconds"]


def groups(n: int) -> float:
  """Seconds of a rollout of four questions, each so many times."""
  size = dataclasses.replace(
    data.SIZES["tiny"], groups=(4, n), engine=dict(slots=32, extend_len=16, chunk=8)
  )
  with tempfile.TemporaryDirectory() as folder:
    b = compare.open_bench(size, folder, with_peer=False)
  turns = data.script(size, b.codec.tokenizer)
  conversations = data.replay(size, b.codec, turns)
  play = ours.rollout(b.config, b.params, b.codec, size, turns, conversations)
  return device.timed(play, repeats=3)


# ---- Host ----------------------------------------------------------------------------


def trajectories(n: int) -> float:
  with tempfile.TemporaryDirectory() as folder:
    root = pathlib.Path(folder)
    files = viewer.write(root, n, 200)
    index, begin = Index(root / "index.sqlite"), time.perf_counter()
    index.update(files)
    return time.perf_counter() - begin


def write_records(path: pathlib.Path, n: int) -> None:
  asked = "Which symbol is on the red panel?"
  row = {"question": asked, "answer": "O", "image": "0.png"}
  with path.open("w") as f:
    for i in range(n):
      f.write(json.dumps(row | {"id": f"q{i}"}) + "\n")


@functools.cache  # both of its figures are of one process
def opened(n: int) -> dict[str, float]:
  """Of a process of its own that opens a file of n records and reads ten of them."""
  with tempfile.TemporaryDirectory() as folder:
    write_records(pathlib.Path(folder) / "all.jsonl", n)
    command = [sys.executable, "-m", "pixel_jax.tools.bench.growth", f"--open={folder}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
  return json.loads(done.stdout.splitlines()[-1])


def open_here(folder: str) -> None:
  before = resident()
  begin = time.perf_counter()
  source = sources.open_source("jsonl:all.jsonl", root=folder)
  for i in range(0, len(source), max(1, len(source) // 10)):
    source[i]
  took = time.perf_counter() - begin
  print(json.dumps({"seconds": took, "mib": max(resident() - before, 0.1)}))


def resident() -> float:
  """MiB of memory that this process has; where that is not told, had at most."""
  status = pathlib.Path("/proc/self/status")
  if status.exists():
    return int(re.search(r"VmRSS:\s+(\d+)", status.read_text())[1]) / 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


CASES = {
  "rows": Case("Train step", "rows", (2, 4, 8, 16, 32), rows),
  "context": Case(
    "Train step, one sequence", "tokens", (256, 512, 1024, 2048, 4096), context,
    why="attention between all pairs of tokens",
  ),
  "pictures": Case("Train step, tower in it", "pictures", (1, 4, 8, 16, 32), pictures),
  "slots": Case("Decoding step", "slots", (8, 16, 32, 64), lambda n: decode(n, 64)),
  "cache": Case(
    "Decoding step, 16 slots", "tokens before", (64, 256, 1024, 4096),
    lambda n: decode(16, n),
  ),
  "groups": Case("Rollout, 4 questions", "samples of each", (1, 2, 4, 8, 16), groups),
  "hosts": Case(
    "Train step, one batch", "processes", (1, 2, 4), hosts,
    why="more processes than the machine has cores",
  ),
  "trajectories": Case(
    "Index of the viewer", "trajectories", (100, 1000, 10_000, 50_000), trajectories
  ),
  "records": Case(
    "Opening a source", "records", (1000, 10_000, 100_000, 1_000_000),
    lambda n: opened(n)["seconds"],
  ),
  "memory": Case(
    "Memory of a source", "records", (1000, 10_000, 100_000, 1_000_000),
    lambda n: opened(n)["mib"], unit="MiB",
  ),
}  # fmt: skip


# ---- Telling -------------------------------------------------------------------------


def slope(points: Sequence[Sequence[float]]) -> float:
  """Of the logarithms, by least squares over the larger half of the sizes."""
  logs = [(math.log(x), math.log(max(y, 1e-9))) for x, y in points]
  half = logs[len(logs) // 2 - 1 :]
  mean = [statistics.mean(axis) for axis in zip(*half)]
  up = sum((x - mean[0]) * (y - mean[1]) for x, y in half)
  return up / sum((x - mean[0]) ** 2 for x, _ in half)


def table(report: dict) -> str:
  lines = [
    "| what | over | smallest | largest | slope | |",
    "|---|---|---|---|---|---|",
  ]
  for name, points in report["cases"].items():
    case = CASES[name]
    ends = [f"{told(y, case.unit)} at {x:,}" for x, y in (points[0], points[-1])]
    lines.append(
      f"| {case.title} | {case.over} | {ends[0]} | {ends[1]} | {slope(points):.2f} | "
      f"{case.why} |"
    )
  return "\n".join(lines)


def told(value: float, unit: str) -> str:
  if unit == "s" and value < 1:
    return f"{value * 1e3:.2g} ms" if value < 0.01 else f"{value * 1e3:.0f} ms"
  return f"{value:.3g} {unit}"


def figure(report: dict) -> str:
  """All cases, both axes by powers of ten, with a dashed line that is linear."""
  body, columns, wide, high = [], 3, 280, 230
  for i, (name, points) in enumerate(report["cases"].items()):
    case = CASES[name]
    left, top = 52 + wide * (i % columns), 46 + high * (i // columns)
    xs, ys = zip(*points)
    linear = [ys[0] * x / xs[0] for x in xs]
    lines = [charts.Line(case.title, xs, ys, 0), charts.Line("linear", xs, linear, 1)]
    drawn, _ = charts.panel(
      lines, left=left, top=top, width=wide - 70, height=high - 90, log=True,
      log_x=True, key=case.unit, name=case.over,
    )  # fmt: skip
    body.append(
      f'<text class="title" x="{left}" y="{top - 14}">{case.title}</text>{drawn}'
    )
  height = 30 + high * -(-len(report["cases"]) // columns)
  label = "Cost over size on logarithmic axes; dashed: linear growth"
  return charts.picture("".join(body), 20 + wide * columns, height, label)


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--out", type=pathlib.Path, help="folder of the report")
  parser.add_argument("--only", type=lambda text: text.split(","), default=list(CASES))
  parser.add_argument("--open", help=argparse.SUPPRESS)
  args = parser.parse_args(argv)
  if args.open:
    open_here(args.open)
    return 0
  if args.out is None:
    parser.error("--out is required: a folder")
  if unknown := set(args.only) - set(CASES):
    parser.error(f"--only: {sorted(unknown)} are unknown; cases: {', '.join(CASES)}")
  args.out.mkdir(parents=True, exist_ok=True)
  file = args.out / "growth.json"
  report = json.loads(file.read_text()) if file.exists() else {"cases": {}}
  report["machine"] = compare.machine()
  for name in args.only:
    case, points = CASES[name], []
    for x in case.sizes:
      points.append((x, case.measure(x)))
      print(
        f"{case.title}: {x:,} {case.over}, {told(points[-1][1], case.unit)}", flush=True
      )
    report["cases"][name] = points
    file.write_text(json.dumps(report, indent=1) + "\n")
  report["cases"] = {k: report["cases"][k] for k in CASES if k in report["cases"]}
  (args.out / "growth.md").write_text(table(report) + "\n")
  (args.out / "growth.svg").write_text(figure(report), encoding="utf-8")
  print(table(report))
  print(f"in {args.out}: growth.json, growth.md, growth.svg")
  return 0


if __name__ == "__main__":
  sys.exit(main())
