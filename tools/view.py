"""Workdirs -> one HTML page of tables, curves and trajectories.

  pixel-jax view DIR [DIR2 ...] --out=report.html

A DIR is the workdir of one run, or the folder that launch/local.sh fills (base, sft,
rl, rl_alpha0, eval): every folder directly below it that holds a run is read too.  What
is not there is left out.  The page needs no server and no network.
"""

import argparse
import json
import pathlib
import sys

from pixel_jax import trajectory
from pixel_jax.chat import encode
from pixel_jax.data import media
from pixel_jax.evals import protocol
from pixel_jax.run import policies
from pixel_jax.view import charts
from pixel_jax.view import report as view

PARTS = ("config.json", "metrics.jsonl", "evaluation.json", "trajectories")
ORDER = ("base", "sft", "rl", "rl_alpha0", "eval")


def workdirs(roots: list[pathlib.Path]) -> list[pathlib.Path]:
  """The folders that hold a run: each root, and what lies directly below it."""
  found = []
  for root in roots:
    below = [d for d in root.iterdir() if d.is_dir() and d.name not in PARTS]
    below.sort(key=lambda d: (ORDER.index(d.name) if d.name in ORDER else 9, d.name))
    found += [d for d in (root, *below) if any((d / part).exists() for part in PARTS)]
  return list(dict.fromkeys(found))


def read_json(path: pathlib.Path) -> dict:
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    return {}
  except ValueError as error:
    print(f"warning: {path} is left out: {error}", file=sys.stderr)
    return {}
  return value if isinstance(value, dict) else {}


def read_lines(path: pathlib.Path, parse) -> list:
  """The lines of a JSONL file; one that does not parse (a killed run's) is skipped."""
  out = []
  if path.exists():
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
      try:
        out.append(parse(line))
      except (ValueError, TypeError, KeyError) as error:
        print(f"warning: {path}:{number} is left out: {error}", file=sys.stderr)
  return out


def read_runs(workdir: pathlib.Path) -> list[view.Run]:
  """The run of a workdir; of an evaluation, a run for each policy and mode."""
  config = read_json(workdir / "config.json")
  metrics = [
    m for m in read_lines(workdir / "metrics.jsonl", json.loads) if isinstance(m, dict)
  ]
  files = sorted((workdir / "trajectories").glob("*.jsonl"))
  name = workdir.name
  if any("ops/rapr" in m for m in metrics) and "alpha" in config.get("reward", {}):
    name = f"{name} (alpha = {config['reward']['alpha']:g})"
  run = view.Run(name, metrics, config)
  runs = [run] if metrics or config else []
  for file in files:
    read = read_lines(file, trajectory.from_json)
    if file.stem.startswith("step_"):
      run.trajectories += read
    else:  # an evaluation keeps no judgement; judge as it does
      for t in read:
        t.reward.setdefault("correct", protocol.judge(t))
      runs.append(view.Run(file.stem.replace("_", ", "), trajectories=read))
  return runs if run.metrics or run.config else [run, *runs]


def open_codec(folders: list[pathlib.Path]) -> encode.Codec | None:
  """The codec of the first run that kept its config and tokenizer."""
  for folder in folders:
    if "codec" in read_json(folder / "config.json") and (folder / "tokenizer").exists():
      return policies.open_codec(folder)
  return None


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("dirs", nargs="+", metavar="DIR", type=pathlib.Path)
  parser.add_argument("--out", default="report.html", type=pathlib.Path)
  parser.add_argument("--root", default="", help="where the media files lie")
  parser.add_argument("--title", default="")
  parser.add_argument(
    "--figure", type=pathlib.Path, help="also write the curves as SVG"
  )
  args = parser.parse_args()
  for folder in args.dirs:
    if not folder.is_dir():
      parser.error(f"{folder} is no folder; give the workdir of a run")
  folders = workdirs(args.dirs)
  if not folders:
    parser.error(
      f"nothing to show in {', '.join(map(str, args.dirs))}: no {' or '.join(PARTS)}"
    )

  runs = [run for folder in folders for run in read_runs(folder)]
  evaluations = [read_json(f / "evaluation.json") for f in folders]
  evaluation = next((e for e in evaluations if e), None)
  roots = [r.config.get("data", {}).get("root", "") for r in runs]
  look = media.Library(args.root or next(filter(None, roots), "")).load
  html = view.report(
    runs, evaluation, look, codec=open_codec(folders), title=args.title
  )
  args.out.parent.mkdir(parents=True, exist_ok=True)
  args.out.write_text(html, encoding="utf-8")
  print(f"report: {args.out.resolve()} ({args.out.stat().st_size / 1e6:.1f} MB)")
  if args.figure:
    arms = {r.name: [r.metrics] for r in runs if r.is_rl}
    args.figure.write_text(charts.trap_figure(arms), encoding="utf-8")
    print(f"figure: {args.figure.resolve()}")


if __name__ == "__main__":
  main()
