"""What an evaluation says of its answers: rates with their 95 % intervals, and pairs.

A question that was answered k times counts with the mean of its scores (avg@k).
"""

import collections
from collections.abc import Sequence
from typing import Any

from pixel_jax import statistics
from pixel_jax.evals.benchmark import Benchmark, Row


def summarize(rows: Sequence[Row], benchmark: Benchmark) -> dict[str, Any]:
  """Figures of one policy in one mode; `accuracy` is by the benchmark's first rule.

  Args:
    rows: all samples of all questions.
  """
  rules = [*rows[0].scores]
  questions = by_question(rows)
  values = means(questions, rules[0])
  clusters = [cluster(group[0]) for group in questions]
  samples = max(map(len, questions))
  played = [row.trajectory for row in rows]
  used = [row for row in rows if row.trajectory.ops_attempted]
  calls = [c for t in played for c in t.calls]
  failed = [c.error for c in calls if c.error is not None]
  out = {
    "n": len(questions),
    "samples": samples,
    "accuracy": _mean(values),
    "ci": statistics.interval(values, clusters),
    "rules": {rule: _mean(means(questions, rule)) for rule in rules},
    "by": _parts(questions, rules[0], lambda g: benchmark.category(g[0].task)),
    "by_use": _parts([[r] for r in rows], rules[0], _use),
    "rapr": sum(t.ops_succeeded > 0 for t in played) / len(played),
    "ops_per_rollout": len(calls) / len(played),
    "error_rate": len(failed) / max(len(calls), 1),
    "errors": dict(sorted(collections.Counter(failed).items())),
    "stops": dict(sorted(collections.Counter(t.stop for t in played).items())),
    "empty": sum(not row.answer.strip() for row in rows),
    "tokens": sum(sum(t.sampled) for t in played) / len(played),
  }
  if samples > 1:
    right = [sum(r.scores[rules[0]] > 0.5 for r in group) for group in questions]
    out["pass"] = {
      str(k): _mean(
        [statistics.pass_at_k(c, len(g), k) for c, g in zip(right, questions)]
      )
      for k in (2**i for i in range(samples.bit_length()))
    }
  if benchmark.covers is not None and used:
    hits = [shows(row, benchmark) for row in used]
    out |= {
      "covered": _mean(hits),
      "covered_ci": statistics.wilson(_mean(hits), len(hits)),
    }
    right = [hit for row, hit in zip(used, hits) if row.scores[rules[0]] > 0.5]
    if right:  # of the right answers, those that could have been seen
      out |= {"covered_if_right": _mean(right), "covered_if_right_n": len(right)}
  return out | benchmark.figures([group[0] for group in questions])


def shows(row: Row, benchmark: Benchmark) -> bool:
  """Whether a call of the answer shows what is asked for."""
  calls = row.trajectory.calls
  return any(benchmark.covers(row.task, c, calls[:i]) for i, c in enumerate(calls))


def pair(a: Sequence[dict], b: Sequence[dict]) -> dict[str, Any]:
  """Two runs on the same questions: the difference a - b, and who alone is right.

  Questions that only one of them has are left out.

  Args:
    a, b: lines of predictions (`exports.prediction`); the first score of each counts.
  """
  left, right = map(_by_id, (a, b))
  ids = [i for i in left if i in right]
  if not ids:
    return {"n": 0}
  x, y = ([_mean(side[i][0]) for i in ids] for side in (left, right))
  clusters = [left[i][1] for i in ids]
  difference, low, high = statistics.paired_difference(x, y, clusters)
  return {
    "n": len(ids),
    "difference": difference,
    "ci": (low, high),
    "only_first": sum(p > q for p, q in zip(x, y)) / len(ids),
    "only_second": sum(p < q for p, q in zip(x, y)) / len(ids),
    "mcnemar_p": statistics.mcnemar(x, y),
  }


def by_question(rows: Sequence[Row]) -> list[list[Row]]:
  """The samples of each question, in the order of the questions' first ones."""
  groups: dict[str, list[Row]] = {}
  for row in rows:
    groups.setdefault(row.task.id, []).append(row)
  return list(groups.values())


def means(questions: Sequence[Sequence[Row]], rule: str) -> list[float]:
  """The mean score of each question."""
  return [sum(r.scores[rule] for r in group) / len(group) for group in questions]


def cluster(row: Row) -> str:
  """What a question shares with others."""
  return row.task.reference.get("cluster", row.task.id)


def _by_id(lines: Sequence[dict]) -> dict[str, tuple[list[float], str]]:
  """The scores of each question's samples, and its cluster."""
  found: dict[str, tuple[list[float], str]] = {}
  for line in lines:
    score = next(iter(line["scores"].values()))
    found.setdefault(line["id"], ([], line["cluster"]))[0].append(score)
  return found


def _mean(values: Sequence[float]) -> float:
  return sum(values) / len(values)


def _use(group: Sequence[Row]) -> str:
  return "operated" if group[0].trajectory.ops_attempted else "did not"


def _parts(questions, rule: str, key) -> dict[str, dict]:
  parts = collections.defaultdict(list)
  for group in questions:
    parts[key(group)].append(group)
  out = {}
  for name, groups in sorted(parts.items()):
    values = means(groups, rule)
    ci = statistics.interval(values, [cluster(g[0]) for g in groups])
    out[name] = {"accuracy": _mean(values), "n": len(groups), "ci": ci}
  return {name: part for name, part in out.items() if name}


def table(rows: Sequence[dict]) -> str:
  """The rows as aligned text: score [95 % interval], RaPR, coverage for each mode."""
  lines = []
  for row in rows:
    for mode, m in row["modes"].items():
      low, high = m["ci"]
      words = [
        f"{row['name']:<10} {row['benchmark']:<12} {row['protocol']:<8} {mode:<10}",
        f"score {m['accuracy']:.3f} [{low:.3f}, {high:.3f}] of {m['n']}",
        f"RaPR {m['rapr']:.3f}",
        f"covered {m['covered']:.3f}" if "covered" in m else "",
        f"errors {m['error_rate']:.3f}",
        *(f"{k} {v['accuracy']:.2f}" for k, v in m["by"].items()),
        f"#{m['hash']}",
      ]
      lines.append("  ".join(w for w in words if w))
  return "\n".join(lines)
