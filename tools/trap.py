"""The learning trap over several seeds: both arms, one table, one picture.

  pixel-jax trap --out=runs/trap [--seeds 0 1 2 3] [--steps N]

For each seed: base skills, SFT, then the same RL run twice from the same SFT checkpoint,
with curiosity (alpha = 0.5) and without (alpha = 0).  Seeds that do not show the trap
are listed like the others.  What stands already is reused, so a killed call continues.
Writes OUT/trap.md (the README's table) and OUT/trap.svg (its picture).
"""

import argparse
import json
import pathlib
import subprocess
import sys

from pixel_jax.view import charts

ARMS = {"curiosity": 0.5, "alpha = 0": 0.0}
MODES = ("free", "forbidden", "forced", "swapped")


def call(module: str, config: str, workdir: pathlib.Path, *overrides: str) -> None:
  command = [sys.executable, "-m", f"pixel_jax.{module}", f"--config={config}"]
  command += [f"--workdir={workdir}", *(f"--config.{o}" for o in overrides)]
  print("$", " ".join(command), flush=True)
  subprocess.run(command, check=True)


def run_seed(out: pathlib.Path, seed: int, steps: int | None) -> dict:
  """Both arms of a seed; returns its evaluation."""
  base, sft = out / "base", out / "sft"
  of_seed = f"seed={seed}"
  call("train_sft", "sft:tiny,base", base, of_seed)
  call("train_sft", "sft:tiny", sft, of_seed, f"init={base}")
  policies = [f"BASE={base}", f"SFT={sft}"]
  for name, alpha in ARMS.items():
    workdir = out / f"rl_{alpha:g}"
    more = [f"total_steps={steps}"] if steps else []
    alone = [of_seed, f"init={sft}", f"reward.alpha={alpha}", *more]
    call("train_rl", "rl:tiny", workdir, *alone)
    policies.append(f"RL {name}={workdir}")
  call("evaluate", "evaluate:tiny", out / "eval", f"policies={','.join(policies)}")
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
