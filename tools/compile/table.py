"""The table of docs/pods.md: every preset on its machines, as the compilers see it.

A cell is a run of check.py in a process of its own, kept as JSON; the table is
made of those that lie in the folder, and says which do not.  Where there is no preset a
cell says what the check answers without one.
"""

import json
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

from tqdm import tqdm

from pixel_jax.configs import common, pods
from pixel_jax.tools.compile import cost

BEGIN, END = "<!-- made by pixel-jax compile-check -->\n", "<!-- made until here -->\n"
# Of a cell: where most is alive, and what the figures are of.
PROGRAMS = {"sft": "update", "rl": "gradient,turn,decode"}
ORDER = [("sft", "7b"), ("rl", "7b"), ("sft", "3b"), ("rl", "3b")]
ORDER += [(kind, size) for size in ("32b", "72b") for kind in ("sft", "rl")]


class Cell(NamedTuple):
  kind: str
  size: str
  topology: str

  @property
  def file(self) -> str:
    return f"{self.kind}-{self.size}-{self.topology.replace(':', '-')}.json"

  @property
  def has_preset(self) -> bool:
    presets = {"sft": pods.SFT, "rl": pods.RL}[self.kind]
    return (self.size, self.topology) in presets

  @property
  def arguments(self) -> list[str]:
    """Of check.py: the preset, or the least that a run could ask for."""
    config = f"--config=configs/{self.kind}.py:{self.size}"
    if self.has_preset:
      return [f"{config},{self.topology}"]
    pod = pods.PODS[self.topology]
    more = [f"--topology={self.topology}", f"--config.model.attention={pod.attention}"]
    if self.kind == "sft":
      more.append(f"--config.data.rows={pod.devices}")
    else:
      more += [
        f"--config.fleet.tensor={min(4, pod.host)}", "--config.engine.slots=8",
        f"--config.rl.rows={pod.host}",
      ]  # fmt: skip
    return [config, *more]


def cells() -> Iterator[Cell]:
  """All of them, the most wanted first."""
  assert {size for _, size in ORDER} == set(common.SIZES) - {"tiny"}
  for kind, size in ORDER:
    for topology in pods.PODS:
      yield Cell(kind, size, topology)


def make(folder: pathlib.Path, count: int, effort: float) -> None:
  """Compiles at most `count` of the cells that `folder` lacks; writes the table."""
  folder.mkdir(parents=True, exist_ok=True)
  missing = [c for c in cells() if not (folder / c.file).exists()][:count]
  with tqdm(missing, disable=None) as bar:
    for cell in bar:
      bar.set_description(cell.file)
      command = [sys.executable, "-m", "pixel_jax", "compile-check", *cell.arguments]
      command += ["--largest", f"--programs={PROGRAMS[cell.kind]}"]
      command += [f"--effort={effort}", f"--json={folder / cell.file}"]
      done = subprocess.run(command, capture_output=True, text=True)
      if done.returncode not in (0, 1):  # 1: it does not fit, and the JSON says so
        print(f"{cell.file}: exit {done.returncode}: {done.stderr[-300:]}")
  page = write(folder)
  print(
    f"in {page}: the table of {len(list(folder.glob('*.json')))} checks in {folder}"
  )


def write(folder: pathlib.Path) -> pathlib.Path:
  """Puts the table into pods.md beside the folder, where the last one stood."""
  page = folder.parent / "pods.md"
  before, _, rest = (page.read_text() if page.exists() else "").partition(BEGIN)
  after = rest.partition(END)[2]
  page.write_text(before + BEGIN + table(folder) + END + after)
  return page


def table(folder: pathlib.Path) -> str:
  found = {}
  for cell in cells():
    file = folder / cell.file
    if file.exists():
      found[cell] = json.loads(file.read_text())
  lines = [_head(list(found.values()))]
  for kind, title in (("sft", "SFT"), ("rl", "RL")):
    lines.append(f"\n### {title}")
    for size in [s for k, s in ORDER if k == kind]:
      lines += _rows(kind, size, found)
  lines += _slices(folder)
  return "\n".join(lines) + "\n"


def _head(reports: list[dict]) -> str:
  if not reports:
    return "\nNothing was compiled yet."
  dates = sorted(r["date"][:10] for r in reports)
  versions = sorted({f"{k} {v}" for r in reports for k, v in r["versions"].items()})
  refused = sum("refused" in r for r in reports)
  fast = sum(r["effort"] < 0 for r in reports if "refused" not in r)
  return (
    f"\nOf {len(list(cells()))} cells {len(reports) - refused} were compiled and "
    f"{refused} refused before, by formula, {dates[0]} to {dates[-1]}, with "
    f"{', '.join(versions)}; {fast} were compiled with --effort=-1 (*)."
  )


def _rows(kind: str, size: str, found: dict) -> Iterator[str]:
  yield from _title(kind, f"**{size}**")
  for topology, pod in pods.PODS.items():
    cell = Cell(kind, size, topology)
    begin = [topology, pod.accelerator, str(pod.chips)]
    report = found.get(cell)
    if report is None:
      body = ["not compiled" + "; no preset" * (not cell.has_preset)]
    elif told := told_off(report):
      body = [told]
    else:
      body = _figures(kind, report)
      body[0] += "; no preset" * (not cell.has_preset)
    body += [""] * (len(_columns(kind)) - len(begin) - len(body))
    yield "| " + " | ".join(begin + body) + " |"


def _slices(folder: pathlib.Path) -> Iterator[str]:
  reports = [json.loads(f.read_text()) for f in sorted(folder.glob("*.json"))]
  for kind in ("sft", "rl"):
    title = "Several slices, data parallel between them"
    for report in reports:
      if report["slices"] > 1 and (kind == "rl") == ("rl" in report["config"]):
        yield from _title(kind, f"### {title}") if title else ()
        title = ""
        where = f"{report['topology']} x {report['slices']}"
        size = report["config"]["model"]["name"]
        begin = [f"{where}, {size}", report["accelerator"], str(report["chips"])]
        yield "| " + " | ".join(begin + _figures(kind, report)) + " |"


def _title(kind: str, title: str) -> Iterator[str]:
  head = _columns(kind)
  yield f"\n{title}\n"
  yield "| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|"


def _columns(kind: str) -> list[str]:
  head = ["topology", "accelerator", "chips", "a device at a time", "remat"]
  engine = ["engine"] * (kind == "rl")
  head += [*engine, "peak GiB", "of HBM", "by", "at least", "MFU at most"]
  return head + ["decode at 4096, at most"] * (kind == "rl")


def told_off(report: dict) -> str:
  """Why a run does not fit; "" where it does."""
  if "refused" in report:
    return "no: " + report["refused"]
  bad = [r for r in report["programs"] if not r["fits"]]
  return f"no: {bad[0]['name']}, {bad[0]['remedy']}" if bad else ""


def _figures(kind: str, report: dict) -> list[str]:
  rows, config = report["programs"], report["config"]
  worst = max(rows, key=lambda r: r["peak_bytes"])
  step = next(r for r in rows if r["name"] == {"sft": "update", "rl": "gradient"}[kind])
  groups = report["devices"] // report["mesh"]["tensor"]
  if kind == "sft":
    each = config["data"]["rows"] // config["micro_batches"] // groups
    shape = f"{each} x {config['data']['tokens']}"
  else:
    shape = f"1 x {config['rl']['tokens']}"
  remat = config["model"]["remat"]
  if config["lora"]["rank"]:
    remat += f", LoRA {config['lora']['rank']}"
  out = [shape, remat]
  if kind == "rl":
    tensor = config["fleet"]["tensor"]
    name = "device" + "s" * (tensor > 1)
    out.append(f"{tensor} {name}, {config['engine']['slots']} slots")
  out += [
    f"{worst['peak_bytes'] / cost.GIB:.1f}" + "*" * (report["effort"] < 0),
    f"{worst['share']:.0%}",
    worst["name"].partition(" ")[0],
    f"{step['roofline_s'] * 1e3:.0f} ms",
    f"{step['mfu_ceiling']:.0%}",
  ]
  if kind == "rl":
    decode = max(
      (r for r in rows if r["name"].startswith("decode")), key=lambda r: r["tokens"]
    )
    at = decode["contexts"]["4096"]
    out.append(f"{decode['tokens'] / at['seconds']:,.0f} tokens/s")
  return out
