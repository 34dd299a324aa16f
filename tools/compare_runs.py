"""Two runs side by side, curve by curve and answer by answer.

  pixel-jax compare A B [--out=compare.html]
  pixel-jax compare A --torch=LOG [--out=compare.html]

A and B are workdirs of ours: of a training (metrics.jsonl), of an evaluation
(predictions/), or both.  LOG is the record of a PyTorch run: TRL's trainer_state.json or
JSONL, verl's JSONL, OpenRLHF's TensorBoard folder, or answers as JSONL, those of lmms-eval
included.  Metrics are matched by what they mean; `NAMES` below says which.  With
--items=A_STEM,B_STEM two files of predictions are compared that differ in their names.
"""

import argparse
import dataclasses
import html
import json
import math
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from pixel_jax.evals import report
from pixel_jax.view import charts, page

# Ours -> what others call the same.
NAMES = {
  "loss": ("actor/pg_loss", "train/policy_loss", "policy_loss", "train/loss"),
  "reward/mean": (
    "reward", "train/reward", "critic/rewards/mean", "critic/score/mean", "rewards/mean",
  ),
  "policy/entropy": ("entropy", "actor/entropy", "actor/entropy_loss", "train/entropy"),
  "policy/kl": ("kl", "actor/ppo_kl", "actor/kl_loss", "train/kl"),
  "policy/clip_fraction": (
    "clip_ratio", "actor/pg_clipfrac", "clip_ratio/region_mean", "train/clip_ratio",
  ),
  "optim/grad_norm": ("grad_norm", "actor/grad_norm", "train/grad_norm"),
  "optim/lr": ("learning_rate", "actor/lr", "train/actor_lr", "lr"),
  "eval/accuracy": ("eval_accuracy", "eval/acc", "eval/default_pass1"),
  "eval/loss": ("eval_loss",),
}  # fmt: skip
THEIRS = {other: ours for ours, others in NAMES.items() for other in others}
ACCURACY = re.compile(r"val-core/.*acc/mean@1$")  # of verl
STEPS = ("step", "global_step", "training/global_step", "train/global_step")
IDS = ("id", "qid", "question_id", "doc_id", "index", "uid")
SCORES = (
  "score",
  "correct",
  "acc",
  "accuracy",
  "hit",
  "match",
  "reward",
  "exact_match",
)


@dataclasses.dataclass
class Run:
  """What was found: curves as rows of a metrics.jsonl, answers by file."""

  name: str
  metrics: list[dict] = dataclasses.field(default_factory=list)
  answers: dict[str, list[dict]] = dataclasses.field(default_factory=dict)
  hashes: dict[str, str] = dataclasses.field(default_factory=dict)  # of the answers


# ---- Read ----------------------------------------------------------------------------


def read(path: pathlib.Path) -> Run:
  """A workdir of ours, or a PyTorch log of any kind named above; ValueError else."""
  if not path.exists():
    raise ValueError(f"{path} does not exist; give a workdir or a log")
  run = Run(path.name)
  if path.is_dir():
    if (path / "metrics.jsonl").is_file():
      run.metrics = [*_objects(path / "metrics.jsonl")]
    for file in sorted((path / "predictions").glob("*.jsonl")):
      run.answers[file.stem] = [*_objects(file)]
    run.hashes = _hashes(path / "evaluation.json")
    events = sorted(path.rglob("events.out.tfevents*"))
    if not (run.metrics or run.answers) and events:
      run.metrics = renamed(_merged(row for file in events for row in _events(file)))
    if (path / "trainer_state.json").is_file() and not run.metrics:
      run = read(path / "trainer_state.json")
  elif "tfevents" in path.name:
    run.metrics = renamed(_merged(_events(path)))
  elif path.suffix == ".json":
    told = json.loads(path.read_text(encoding="utf-8"))
    rows = told.get("log_history", told) if isinstance(told, dict) else told
    run.metrics = renamed(_merged(r for r in rows if isinstance(r, dict)))
  else:
    rows = [*_objects(path)]
    if rows and _id(rows[0]) is not None and _score(rows[0]) is not None:
      run.answers[path.stem] = [_answer(r) for r in rows]
    else:
      run.metrics = renamed(_merged(_flat(r) for r in rows))
  if not (run.metrics or run.answers):
    raise ValueError(
      f"{path}: neither curves nor answers were found; expected a workdir of ours, a JSON "
      "or JSONL log with a step in every row, a TensorBoard folder, or answers with an id "
      "and a score"
    )
  return run


def _objects(file: pathlib.Path) -> Iterator[dict]:
  """The objects of a JSONL file; a line that a kill has cut is skipped."""
  for line in file.read_text(encoding="utf-8").splitlines():
    try:
      row = json.loads(line)
    except ValueError:
      continue
    if isinstance(row, dict):
      yield row


def _hashes(file: pathlib.Path) -> dict[str, str]:
  rows = json.loads(file.read_text()).get("rows", []) if file.is_file() else []
  return {
    "_".join((r["name"], r["benchmark"], r["protocol"], mode)): m["hash"]
    for r in rows
    if "benchmark" in r
    for mode, m in r["modes"].items()
  }


def _flat(row: dict) -> dict:
  """verl's {"step": 1, "data": {...}} as one level."""
  inner = row.get("data")
  return {**row, **inner} if isinstance(inner, dict) else row


def _events(file: pathlib.Path) -> Iterator[dict]:
  """The scalars of a TensorBoard file."""
  from pixel_jax.run import (
    metrics,  # here: it imports jax, which other logs do not need
  )

  for _, event in metrics.read_events(file.read_bytes()):
    for value in event.summary.value:
      number = value.simple_value
      if value.HasField("tensor") and value.tensor.float_val:
        number = value.tensor.float_val[0]
      yield {"step": event.step, value.tag: number}


def _merged(rows) -> list[dict]:
  """One row a step, in their order; later values of a step hold."""
  merged: dict[float, dict] = {}
  for row in rows:
    step = next((row[k] for k in STEPS if isinstance(row.get(k), int | float)), None)
    if step is not None:
      merged.setdefault(step, {}).update(row, step=step)
  return [merged[step] for step in sorted(merged)]


def renamed(rows: Sequence[dict]) -> list[dict]:
  """Rows with our names beside theirs; ours stay where both are there."""
  out = []
  for row in rows:
    new = {k: v for k, v in row.items() if isinstance(v, int | float)}
    for name, value in [*new.items()]:
      ours = THEIRS.get(name) or ("eval/accuracy" if ACCURACY.match(name) else None)
      if ours:
        new.setdefault(ours, value)
    out.append(new)
  return out


def _id(row: dict) -> Any:
  return next((row[k] for k in IDS if row.get(k) is not None), None)


def _score(row: dict) -> float | None:
  found = row.get("scores")
  if isinstance(found, dict) and found:
    return float(next(iter(found.values())))
  for key in SCORES:
    if isinstance(row.get(key), bool | int | float):
      return float(row[key])
  return None


def _answer(row: dict) -> dict:
  """A line as ours: with id, scores, cluster, answer and gold."""
  said = row.get("answer") if "gold" in row else None
  for key in ("prediction", "filtered_resps", "response", "pred", "output"):
    said = row.get(key) if said is None else said
  gold = row.get("gold", row.get("target", row.get("answer")))
  return {
    "id": str(_id(row)),
    "scores": {"score": _score(row)},
    "cluster": str(row.get("cluster", _id(row))),
    "question": str(row.get("question", "")),
    "answer": said if isinstance(said, str) else json.dumps(said, ensure_ascii=False),
    "gold": gold,
  }


# ---- Compare -------------------------------------------------------------------------


def curves(a: Run, b: Run) -> list[dict]:
  """Of every metric that both have: where they end, and how far apart they ever are."""
  both = [k for k in _numbers(a) if k in _numbers(b) and k != "step"]
  rows = []
  for key in sorted(both, key=lambda k: (k not in NAMES, k)):
    x, y = (charts.line_of(r.name, r.metrics, key) for r in (a, b))
    at = dict(zip(y.x, y.y))
    gaps = [abs(v - at[s]) for s, v in zip(x.x, x.y) if s in at]
    rows.append({
      "metric": key, "steps": len(gaps), "last": (x.y[-1], y.y[-1]),
      "tail": (_tail(x.y), _tail(y.y)), "largest_gap": max(gaps, default=math.nan),
    })  # fmt: skip
  return rows


def _numbers(run: Run) -> list[str]:
  found: dict[str, None] = {}
  for row in run.metrics:
    found |= dict.fromkeys(
      k for k, v in row.items() if isinstance(v, int | float) and math.isfinite(v)
    )
  return [*found]


def _tail(values: Sequence[float]) -> float:
  last = values[-max(1, len(values) // 10) :]
  return sum(last) / len(last)


def items(a: Run, b: Run, named: str = "") -> list[dict]:
  """Of every file of answers that both have: the paired difference, who alone is right.

  Args:
    named: "A_STEM,B_STEM" of files whose names differ.
  """
  if named:
    pairs = [tuple(named.split(",", 1))]
  elif len(a.answers) == len(b.answers) == 1:
    pairs = [(*a.answers, *b.answers)]
  else:
    pairs = [(stem, stem) for stem in a.answers if stem in b.answers]
  out = []
  for one, other in pairs:
    if one not in a.answers or other not in b.answers:
      known = ", ".join([*a.answers, *b.answers])
      raise ValueError(f"--items={named}: the files of answers are {known}")
    told = report.pair(a.answers[one], b.answers[other])
    hashes = {run.hashes.get(stem) for run, stem in ((a, one), (b, other))} - {None}
    out.append({"first": one, "second": other, "comparable": len(hashes) < 2, **told})
  return out


def disagreements(a: Run, b: Run, pair: dict) -> list[tuple[dict, dict]]:
  """The answers to questions that only one of them has right."""
  left, right = (
    {r["id"]: r for r in run.answers[pair[side]]}
    for run, side in ((a, "first"), (b, "second"))
  )
  return [
    (left[i], right[i])
    for i in left
    if i in right and (_score(left[i]) > 0.5) != (_score(right[i]) > 0.5)
  ]


# ---- Tell ----------------------------------------------------------------------------


def table(a: Run, b: Run, rows: Sequence[dict], pairs: Sequence[dict]) -> str:
  """`curves` and `items` as aligned text."""
  lines = [f"{'metric':<32} {a.name:>14} {b.name:>14} {'largest gap':>12}  steps"]
  for row in rows:
    x, y = row["tail"]
    gap = row["largest_gap"]
    lines.append(
      f"{row['metric']:<32} {x:>14.6g} {y:>14.6g} {gap:>12.3g}  {row['steps']}"
    )
  if len(lines) == 1:
    lines = ["no metric is in both"] if a.metrics and b.metrics else []
  for row in pairs:
    if not row["n"]:
      lines.append(f"{row['first']} / {row['second']}: no question is in both")
      continue
    low, high = row["ci"]
    lines.append(
      f"{row['first']} / {row['second']}: {row['n']} questions, difference "
      f"{row['difference']:+.3f} [{low:+.3f}, {high:+.3f}], right alone "
      f"{row['only_first']:.3f} / {row['only_second']:.3f}, McNemar p "
      f"{row['mcnemar_p']:.3g}"
      + ("" if row["comparable"] else "  (NOT COMPARABLE: they were asked differently)")
    )
  return "\n".join(lines)


MOST_SHOWN = 200  # disagreements on the page


def html_page(a: Run, b: Run, rows: Sequence[dict], pairs: Sequence[dict]) -> str:
  """One page without a network: curves over each other, answers that differ."""
  drawn = "".join(
    charts.chart(
      row["metric"], row["metric"],
      [charts.line_of(r.name, r.metrics, row["metric"], i) for i, r in enumerate((a, b))],
    )
    for row in rows
  )  # fmt: skip
  parts = [f'<h2>Curves</h2><div class="charts">{drawn}</div>'] if drawn else []
  parts += [_items_html(a, b, row) for row in pairs]
  title = html.escape(f"{a.name} and {b.name}")
  return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><link rel="icon" href="data:,"><style>{page.STYLE}</style></head>
<body><main><h1>{title}</h1>
<pre class="wide">{html.escape(table(a, b, rows, pairs))}</pre>
{"".join(parts)}
<footer>pixel_jax: Pixel Reasoner in JAX. This file needs no network.</footer></main>
<script type="application/json" id="pictures">{{}}</script>
<script>{page.SCRIPT}</script></body></html>
"""


def _items_html(a: Run, b: Run, row: dict) -> str:
  if not row["n"]:
    return ""
  differ = disagreements(a, b, row)
  body = "".join(
    "<tr>"
    + "".join(
      f"<td>{html.escape(str(x))[:400]}</td>"
      for x in (one["id"], one.get("question", ""), one.get("gold", ""), one["answer"],
                other["answer"], a.name if _score(one) > 0.5 else b.name)
    )
    + "</tr>"
    for one, other in differ[:MOST_SHOWN]
  )  # fmt: skip
  heads = ("question", "", "gold", a.name, b.name, "right")
  head = "".join(f"<th>{html.escape(h)}</th>" for h in heads)
  warn = (
    "" if row["comparable"] else "<b>Not comparable: they were asked differently.</b> "
  )
  return f"""<h2>{html.escape(row["first"])} / {html.escape(row["second"])}</h2>
<p class="note">{warn}{row["n"]} questions, {len(differ)} of them right in one alone.</p>
<div class="wide"><table><thead><tr>{head}</tr></thead>
<tbody>{body}</tbody></table></div>"""


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    "pixel-jax compare", description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )  # fmt: skip
  parser.add_argument("runs", nargs="+", metavar="RUN", type=pathlib.Path)
  parser.add_argument("--torch", type=pathlib.Path, metavar="LOG")
  parser.add_argument("--items", default="", metavar="A_STEM,B_STEM")
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("compare.html"))
  args = parser.parse_args(argv)
  paths = [*args.runs, *([args.torch] if args.torch else [])]
  if len(paths) != 2:
    parser.error(f"{len(paths)} runs; give two, or one and --torch=LOG")
  try:
    a, b = map(read, paths)
    if a.name == b.name:
      a.name, b.name = (f"{p.parent.name}/{p.name}" for p in paths)
    rows, pairs = curves(a, b), items(a, b, args.items)
    args.out.write_text(html_page(a, b, rows, pairs), encoding="utf-8")
  except (ValueError, OSError) as error:
    parser.error(str(error))
  print(table(a, b, rows, pairs))
  print(f"page: {args.out.resolve()}")


if __name__ == "__main__":
  main()
