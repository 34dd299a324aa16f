"""The before/after table of evaluation.json as HTML, every rate with its interval.

Tolerant: a missing row, mode or number is an empty cell, never an error.  Rates without
an interval of their own get Wilson's from `n`, where n is what they are a rate of.
"""

import dataclasses
import math

from pixel_jax.statistics import wilson
from pixel_jax.view.text import escape

MODES = ("free", "forbidden", "forced", "swapped", "blank", "masked")


@dataclasses.dataclass(frozen=True)
class Rate:
  value: float
  low: float | None = None
  high: float | None = None


def rate(mode: dict, key: str, interval: str, n: str | None = None) -> Rate | None:
  """The rate at `key`, its interval at `interval` or Wilson's from the count at `n`."""
  value = _number(mode.get(key))
  if value is None:
    return None
  ci = mode.get(interval)
  if isinstance(ci, list | tuple) and len(ci) == 2:
    low, high = map(_number, ci)
    if low is not None and high is not None:
      return Rate(value, low, high)
  count = _number(mode.get(n)) if n else None
  return Rate(value, *wilson(value, count)) if count else Rate(value)


def difference(a: Rate | None, b: Rate | None) -> Rate | None:
  """a - b with Newcombe's interval (1998, method 10), as of independent samples.

  The modes share their tasks, so the true interval is a little narrower.
  """
  if a is None or b is None:
    return None
  d = a.value - b.value
  if None in (a.low, a.high, b.low, b.high):
    return Rate(d)
  low = d - math.hypot(a.value - a.low, b.high - b.value)
  high = d + math.hypot(a.high - a.value, b.value - b.low)
  return Rate(d, low, high)


def _number(x) -> float | None:
  if isinstance(x, bool) or not isinstance(x, int | float) or not math.isfinite(x):
    return None
  return float(x)


def modes_of(row: dict) -> dict[str, dict]:
  """The row's modes that are objects; all names always answer."""
  modes = row.get("modes")
  modes = modes if isinstance(modes, dict) else {}
  names = dict.fromkeys([*MODES, *modes])
  return {m: modes[m] if isinstance(modes.get(m), dict) else {} for m in names}


def rows_of(evaluation: dict | None) -> list[dict]:
  rows = (evaluation or {}).get("rows")
  return [r for r in rows if isinstance(r, dict)] if isinstance(rows, list) else []


def accuracy(row: dict, mode: str) -> Rate | None:
  return rate(modes_of(row)[mode], "accuracy", "ci", "n")


def cell(r: Rate | None, *, css: str = "", signed: bool = False) -> str:
  """A number, its interval, and the interval drawn on the scale of the column."""
  if r is None:
    return '<td class="none">–</td>'
  sign = "+" if signed else ""
  ci = whisker = ""
  if r.low is not None:
    low, high = f"{100 * r.low:{sign}.1f}", f"{100 * r.high:{sign}.1f}"
    ci = f"<small>{low} … {high}</small>"
    start, span = (-1.0, 2.0) if signed else (0.0, 1.0)
    x, x0, x1 = ((v - start) / span * 92 + 4 for v in (r.value, r.low, r.high))
    zero = '<path class="base" d="M50 1v8"/>' if signed else ""
    whisker = (
      '<svg class="whisker" viewBox="0 0 100 10" aria-hidden="true">'
      f'<path class="base" d="M4 5h92"/>{zero}'
      f'<path class="ci" d="M{x0:.1f} 5H{x1:.1f}"/>'
      f'<circle cx="{x:.1f}" cy="5" r="3"/></svg>'
    )
  return f'<td class="{css}"><b>{100 * r.value:{sign}.1f}</b>{ci}{whisker}</td>'


def render(evaluation: dict | None) -> str:
  """The table, a breakdown by kind below it, and a note on what the columns mean."""
  rows = rows_of(evaluation)
  if not rows:
    return '<p class="aside">No evaluation.json here yet.</p>'
  header = (
    ("policy", ""),
    ("free", "accuracy, its own choice"),
    ("forbidden", "accuracy without operations"),
    ("pay-off", "free − forbidden"),
    ("forced", "accuracy, must operate"),
    ("RaPR", "rollouts that operate, free"),
    ("swapped", "forced, shown another scene"),
    ("blank", "operations return grey"),
    ("masked", "the target is grey"),
    ("covers", "operations on the target, forced"),
  )
  found = [accuracy(r, "free") for r in rows]
  best = max((r.value for r in found if r), default=None)
  body = []
  for row, free in zip(rows, found):
    modes = modes_of(row)
    forbidden = accuracy(row, "forbidden")
    is_best = free is not None and free.value == best and len(rows) > 1
    body.append(
      f'<tr><td class="name">{_named(row)}</td>'
      + cell(free, css="best" if is_best else "")
      + cell(forbidden)
      + cell(difference(free, forbidden), signed=True)
      + cell(accuracy(row, "forced"))
      + cell(rate(modes["free"], "rapr", "rapr_ci", "n"))
      + cell(accuracy(row, "swapped"))
      + cell(accuracy(row, "blank"))
      + cell(accuracy(row, "masked"))
      + cell(rate(modes["forced"], "covered", "covered_ci", "covered_n"))
      + "</tr>"
    )
  heads = "".join(f"<th>{h}<small>{s}</small></th>" for h, s in header)
  ns = sorted(
    {int(n) for r in rows for m in modes_of(r).values() if (n := _number(m.get("n")))}
  )
  facts = [f"split {escape(evaluation['split'])}"] if "split" in evaluation else []
  if "temperature" in evaluation:
    facts.append(f"temperature {escape(evaluation['temperature'])}")
  if ns:
    facts.append(f"n = {' / '.join(map(str, ns))} a cell")
  note = f"{', '.join(facts)}. " if facts else ""
  return f"""<div class="wide" tabindex="0"><table><thead><tr>{heads}</tr></thead>
<tbody>{"".join(body)}</tbody></table></div>
<p class="note">{note}Per cent, with 95 % intervals. RaPR: the share of rollouts with at
least one successful operation. Covers: of the rollouts that operated, the share whose
box or frames show what the question asks for. Swapped: operations return pictures of
another scene, blank: grey ones, masked: the target is grey everywhere; a policy that really
looks falls to guessing. The pay-off's interval treats the two samples as independent.
{_incomparable(rows)}</p>{breakdown(rows)}"""


def _named(row: dict) -> str:
  """The policy, and what it was asked where that is not the tiny world."""
  of, name = row.get("benchmark", "world"), escape(row.get("name", "?"))
  if of == "world":
    return name
  return f"{name} <small>{escape(of)}, {escape(row.get('protocol'))}</small>"


def _incomparable(rows: list[dict]) -> str:
  """A warning where the same benchmark was not asked in the same way."""
  seen: dict[tuple, set] = {}
  for row in rows:
    for mode, m in modes_of(row).items():
      if m.get("hash"):
        key = (row.get("benchmark"), row.get("protocol"), mode)
        seen.setdefault(key, set()).add(str(m["hash"]))
  differ = sorted({str(key[0]) for key, hashes in seen.items() if len(hashes) > 1})
  if not differ:
    return ""
  return (
    f"<b>Not comparable:</b> the policies were not asked {escape(', '.join(differ))} in "
    "the same way (prompt, options, decoding, pixel budgets, parser or split differ)."
  )


def breakdown(rows: list[dict]) -> str:
  """Accuracy by kind of question, and how operations went, folded away."""
  kinds = sorted(
    {
      k
      for r in rows
      for m in modes_of(r).values()
      if isinstance(m.get("by"), dict)
      for k in m["by"]
    }
  )
  lines = []
  for row in rows:
    for name, mode in modes_of(row).items():
      if not mode:
        continue
      by = mode["by"] if isinstance(mode.get("by"), dict) else {}
      values = [by.get(k) for k in kinds]
      values = [v.get("accuracy") if isinstance(v, dict) else v for v in values]
      stats = [_number(mode.get("ops_per_rollout")), _number(mode.get("error_rate"))]
      lines.append(
        f'<tr><td class="name">{_named(row)}</td><td>{escape(name)}</td>'
        + "".join(
          f"<td>{100 * v:.1f}</td>"
          if (v := _number(x)) is not None
          else '<td class="none">–</td>'
          for x in values
        )
        + (
          f"<td>{stats[0]:.2f}</td>"
          if stats[0] is not None
          else '<td class="none">–</td>'
        )
        + (
          f"<td>{100 * stats[1]:.1f}</td>"
          if stats[1] is not None
          else '<td class="none">–</td>'
        )
        + f"<td><small>{escape(mode.get('hash', '–'))}</small></td></tr>"
      )
  if not lines:
    return ""
  heads = "".join(
    f"<th>{escape(h)}</th>"
    for h in (
      "policy",
      "mode",
      *kinds,
      "operations a rollout",
      "errors, % of operations",
      "asked as",
    )
  )
  return f"""<details class="more"><summary>By kind of question</summary>
<div class="wide" tabindex="0"><table><thead><tr>{heads}</tr></thead>
<tbody>{"".join(lines)}</tbody></table></div></details>"""
