"""The learning trap over several seeds: both arms, one table, one picture.

  pixel-jax trap --out=runs/trap [--seeds 0 1 2 3] [--steps N]

From the base that ships with the package, for each seed: SFT, then the same RL run twice
from the same SFT checkpoint, side by side, with curiosity (alpha = 0.5) and without
(alpha = 0).  Seeds that do not show the trap are listed like the others.  What stands
already is reused, so a killed call continues.  Writes OUT/trap.md (the README's table)
and OUT/trap.svg (its picture).
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time

from pixel_jax.view import charts
from pixel_jax.view.table import MODES

BASE = "tiny_base"  # start.find
ARMS = {"curiosity": 0.5, "alpha = 0": 0.0}


def begin(module: str, config: str, workdir: pathlib.Path, *overrides: str):
  command = [sys.executable, "-m", f"pixel_jax.{module}", f"--config={config}"]
  command += [f"--workdir={workdir}", *(f"--config.{o}" for o in overrides)]
  print("$", " ".join(command), flush=True)
  return subprocess.Popen(command)


def finish(*processes: subprocess.Popen) -> None:
  """Waits for all of them; when one fails the others are told to save and to leave."""
  left = set(processes)
  while left:
    ended = {p for p in left if p.poll() is not None}
    left -= ended
    if any(p.returncode for p in ended):
      for process in left:
        process.terminate()
      for process in left:
        process.wait()
      failed = next(p for p in ended if p.returncode)
      raise subprocess.CalledProcessError(failed.returncode, failed.args)
    if not ended:
      time.sleep(0.5)


def run_seed(out: pathlib.Path, seed: int, steps: int | None) -> dict:
  """Both arms of a seed; returns its evaluation."""
  sft, of_seed = out / "sft", f"seed={seed}"
  finish(begin("train_sft", "sft:tiny", sft, of_seed, f"init={BASE}"))
  policies, arms = [f"BASE={BASE}", f"SFT={sft}"], []
  for name, alpha in ARMS.items():
    workdir = out / f"rl_{alpha:g}"
    more = [f"total_steps={steps}"] if steps else []
    alone = [of_seed, f"init={sft}", f"reward.alpha={alpha}", *more]
    # The second takes from the cache what the first has compiled by its first step.
    first = out / f"rl_{next(iter(ARMS.values())):g}" / "metrics.jsonl"
    while (
      arms and arms[0].poll() is None and not (first.exists() and first.stat().st_size)
    ):
      time.sleep(0.5)
    arms.append(begin("train_rl", "rl:tiny", workdir, *alone))
    policies.append(f"RL {name}={workdir}")
  finish(*arms)
  told = f"policies={','.join(policies)}"
  finish(begin("evaluate", "evaluate:tiny", out / "eval", told))
  return json.loads((out / "eval" / "evaluation.json").read_text())


def table(evaluations: dict[int, dict]) -> str:
  """Markdown: a row a seed and policy."""
  lines = [
    f"| seed | policy | {' | '.join(MODES)} | RaPR | covers the cue (forced) |",
    "|---" * (len(MODES) + 4) + "|",
  ]
  for seed, evaluation in evaluations.items():
    for row in evaluation["rows"]:
      free, forced = row["modes"]["free"], row["modes"]["forced"]
      cells = [interval(row["modes"][m], "accuracy", "ci") for m in MODES]
      cells += [f"{free['rapr']:.3f}", interval(forced, "covered", "covered_ci")]
      lines.append(f"| {seed} | {row['name']} | " + " | ".join(cells) + " |")
  return "\n".join(lines) + "\n"


def interval(mode: dict, key: str, around: str) -> str:
  if key not in mode:
    return "-"
  low, high = mode[around]
  return f"{mode[key]:.3f} [{low:.3f}, {high:.3f}]"


def metrics(workdir: pathlib.Path) -> list[dict]:
  lines = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
  return [json.loads(line) for line in lines]


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/trap"))
  parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
  parser.add_argument("--steps", type=int, help="RL steps; default: the config's")
  args = parser.parse_args()
  out = args.out.resolve()
  evaluations, arms = {}, {}
  for seed in args.seeds:
    evaluations[seed] = run_seed(out / f"seed_{seed}", seed, args.steps)
    for name, alpha in ARMS.items():
      rows = metrics(out / f"seed_{seed}" / f"rl_{alpha:g}")
      arms.setdefault(name, []).append(rows)
    (out / "trap.md").write_text(table(evaluations), encoding="utf-8")
    (out / "trap.svg").write_text(charts.trap_figure(arms), encoding="utf-8")
  print(table(evaluations))
  print(f"done: {out}/trap.md, {out}/trap.svg")


if __name__ == "__main__":
  main()
