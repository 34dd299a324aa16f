"""The tables of README.md, written from results that lie in docs/results.

  python -m pixel_jax.tools.readme                    from what lies there
  python -m pixel_jax.tools.readme --trap=runs/trap   from a new `pixel-jax trap`
  python -m pixel_jax.tools.readme --local runs/one ...      from ./launch/local.sh

A table stands between <!-- NAME --> and <!-- end -->.  In the repository only: the
installed package has no README.
"""

import argparse
import ast
import json
import pathlib
import re
import shutil
import tomllib

from pixel_jax.view.table import MODES

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
HARD = ("image/hard", "video/hard")


def policies(evaluation: dict) -> str:
  """What every policy of one seed does in every mode, in percent."""
  rows = [f"policy | {' | '.join(MODES)} | RaPR | covers the cue"]
  for row in evaluation["rows"]:
    m = row["modes"]
    low, high = (100 * x for x in m["free"]["ci"])
    cells = [f"{100 * m['free']['accuracy']:.1f} [{low:.1f}, {high:.1f}]"]
    cells += [f"{100 * m[mode]['accuracy']:.1f}" for mode in MODES[1:4]]
    cells += [
      f"{100 * m[k]['accuracy']:.1f} / {100 * hard(m[k]):.1f}" for k in MODES[4:]
    ]
    cells += [f"{100 * m['free']['rapr']:.1f}", f"{100 * m['forced']['covered']:.1f}"]
    name = f"**{row['name']}**" if row["name"] == "RL curiosity" else row["name"]
    rows.append(" | ".join([name, *cells]))
  return table(rows)


def shown(mode: dict) -> dict:
  """What of a mode's figures the tables show."""
  by = {k: {"accuracy": v["accuracy"], "n": v["n"]} for k, v in mode["by"].items()}
  names = ("hash", "n", "accuracy", "ci", "rapr", "covered", "covered_ci")
  return {k: mode[k] for k in names if k in mode} | {"by": by}


def hard(mode: dict) -> float:
  """Accuracy on scenes whose letter the first view does not show."""
  parts = [mode["by"][kind] for kind in HARD]
  return sum(p["accuracy"] * p["n"] for p in parts) / sum(p["n"] for p in parts)


def seeds(evaluations: dict[int, dict]) -> str:
  """One line a seed: the trap that SFT leaves, and where both arms of RL end."""
  rows = [
    "seed | SFT: accuracy, what a look costs | with curiosity: accuracy, RaPR | "
    "forbidden | swapped | alpha = 0: accuracy, RaPR"
  ]
  for seed, evaluation in evaluations.items():
    modes = {row["name"]: row["modes"] for row in evaluation["rows"]}
    sft, rl, without = modes["SFT"], modes["RL curiosity"], modes["RL alpha = 0"]
    cost = sft["forbidden"]["accuracy"] - sft["forced"]["accuracy"]
    cells = [
      f"{100 * sft['free']['accuracy']:.1f}, {100 * cost:+.1f}",
      f"{100 * rl['free']['accuracy']:.1f}, {100 * rl['free']['rapr']:.1f}",
      f"{100 * rl['forbidden']['accuracy']:.1f}",
      f"{100 * rl['swapped']['accuracy']:.1f}",
      f"{100 * without['free']['accuracy']:.1f}, {100 * without['free']['rapr']:.1f}",
    ]
    rows.append(" | ".join([str(seed), *cells]))
  return table(rows)


def times(runs: list[dict[str, int]]) -> str:
  """Seconds of every stage of ./launch/local.sh, run by run."""
  names = list(dict.fromkeys(name for run in runs for name in run))
  rows = [" | ".join(["seconds", *(f"run {i + 1}" for i in range(len(runs)))])]
  rows += [" | ".join([n, *(str(run.get(n, "")) for run in runs)]) for n in names]
  rows.append(" | ".join(["**all of it**", *(str(sum(r.values())) for r in runs)]))
  return table(rows)


def rooms() -> str:
  """The floors of the import contract in pyproject.toml, with what each file says it is."""
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())
  layers = project["tool"]["importlinter"]["contracts"][0]["layers"]
  rows = ["floor | room | what it is"]
  for floor, layer in zip(range(len(layers), 0, -1), layers):
    for name in layer.split(" | "):
      path = ROOT / name.replace(".", "/")
      file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
      told = ast.get_docstring(ast.parse(file.read_text())).splitlines()[0]
      rows.append(f"{floor} | `{name.removeprefix('pixel_jax.')}` | {told}")
  return table(rows)


def table(rows: list[str]) -> str:
  head, *body = (f"| {row} |" for row in rows)
  return "\n".join([head, "|---" * (rows[0].count(" | ") + 1) + "|", *body])


def written() -> str:
  """README.md with its tables as the results have them."""
  results = {
    int(file.stem.removeprefix("seed_")): json.loads(file.read_text())
    for file in sorted(RESULTS.glob("seed_*.json"))
  }
  made = {
    "policies": policies(results[0]),
    "seeds": seeds(results),
    "times": times(json.loads((RESULTS / "local.json").read_text())),
    "rooms": rooms(),
  }
  text = (ROOT / "README.md").read_text()
  for name, new in made.items():
    old = re.compile(rf"<!-- {name}[^\n]*-->\n.*?<!-- end -->", re.S)
    if not old.search(text):
      raise SystemExit(f"README.md has no <!-- {name} --> ... <!-- end -->")
    first = old.search(text)[0].splitlines()[0]
    text = old.sub(lambda _, s=f"{first}\n{new}\n<!-- end -->": s, text, count=1)
  return text


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--trap", type=pathlib.Path, help="the --out of pixel-jax trap")
  parser.add_argument("--local", type=pathlib.Path, nargs="+", help="its WORKDIRs")
  args = parser.parse_args()
  if args.trap:
    for folder in sorted(args.trap.glob("seed_*")):
      found = json.loads((folder / "eval" / "evaluation.json").read_text())
      rows = [
        {"name": row["name"], "modes": {k: shown(m) for k, m in row["modes"].items()}}
        for row in found["rows"]
      ]  # the policies' folders are those of one machine
      kept = {**found, "rows": rows, "pairs": []}
      (RESULTS / f"{folder.name}.json").write_text(json.dumps(kept, indent=1) + "\n")
    shutil.copy(args.trap / "trap.svg", ROOT / "docs" / "trap.svg")
  if args.local:
    runs = []
    for workdir in args.local:
      lines = (workdir / "times.tsv").read_text().splitlines()
      runs.append({name: int(s) for s, name in (line.split("\t") for line in lines)})
    (RESULTS / "local.json").write_text(json.dumps(runs, indent=1) + "\n")
  (ROOT / "README.md").write_text(written())


if __name__ == "__main__":
  main()
