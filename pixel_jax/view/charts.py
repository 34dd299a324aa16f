"""Line charts as inline SVG: curves over training steps, for the report and the README.

Not a plotting library: one kind of chart.  A `Line` is a named series of (step, value)
with a colour slot; the raw points are drawn faint, their centred mean strong.  Colours
are Okabe and Ito's (2008), told apart by the colour-blind; dashes repeat what they say.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence

from pixel_jax.view.text import escape

# Slot -> (light, dark): Okabe-Ito, lightened where black paper asks for it.
COLORS = (
  ("#0072b2", "#56b4e9"),
  ("#c04d00", "#f0883e"),
  ("#00795a", "#2fc59a"),
  ("#a5487f", "#e39ac6"),
  ("#8a6d00", "#e0c341"),
)
DASHES = ("", "7 4", "2 3", "9 3 2 3", "1 5")
MOST_POINTS = 400  # of one line; more are averaged in bins, a chart is 300 px wide


@dataclasses.dataclass(frozen=True)
class Line:
  """One arm in one chart; with `low` and `high` a mean over seeds and its band."""

  name: str
  x: Sequence[float]
  y: Sequence[float]
  slot: int = 0
  low: Sequence[float] = ()
  high: Sequence[float] = ()


def line_of(name: str, metrics: list[dict], key: str, slot: int = 0) -> Line:
  """The series of `key` in the objects of a metrics.jsonl, without gaps and NaN."""
  points = {}
  for row in metrics:
    y, x = row.get(key), row.get("step")
    if _finite(x) and _finite(y):
      points[float(x)] = float(y)  # a resumed run may repeat a step: the last holds
  xs = sorted(points)
  return Line(name, xs, [points[x] for x in xs], slot)


def over_seeds(name: str, lines: Sequence[Line], slot: int = 0) -> Line:
  """The mean of several runs at the steps that all of them have, smallest to largest."""
  lines = [line for line in lines if len(line.x)]
  if len(lines) < 2:
    return (
      dataclasses.replace(*lines, name=name, slot=slot) if lines else Line(name, [], [])
    )
  shared = sorted(set.intersection(*(set(line.x) for line in lines)))
  at = [dict(zip(line.x, line.y)) for line in lines]
  values = [[points[x] for points in at] for x in shared]
  mean = [sum(v) / len(v) for v in values]
  return Line(name, shared, mean, slot, [*map(min, values)], [*map(max, values)])


def _finite(x) -> bool:
  # 1e300: beyond it, sums and spans of float64 overflow.
  return (
    isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 1e300
  )  # NaN compares false


def thin(line: Line, most: int = MOST_POINTS) -> Line:
  """At most `most` points: the means of equal bins."""
  n = len(line.x)
  if n <= most:
    return line
  bins = list(itertools.pairwise(i * n // most for i in range(most + 1)))

  def means(values):
    return [sum(values[a:b]) / (b - a) for a, b in bins] if len(values) else values

  names = ("x", "y", "low", "high")
  return dataclasses.replace(line, **{k: means(getattr(line, k)) for k in names})


def smooth(y: Sequence[float]) -> list[float]:
  """Smooths a curve by a centred Gaussian mean, a 40th of the curve wide, without lag."""
  n = len(y)
  sigma = n / 40
  if sigma < 0.5:
    return list(y)
  reach = math.ceil(3 * sigma)
  weights = [math.exp(-0.5 * (d / sigma) ** 2) for d in range(reach + 1)]
  out = []
  for i in range(n):
    span = range(max(0, i - reach), min(n, i + reach + 1))
    w = [weights[abs(j - i)] for j in span]
    out.append(sum(a * y[j] for a, j in zip(w, span)) / sum(w))
  return out


def ticks(low: float, high: float, about: int = 5) -> list[float]:
  """Round numbers that cover [low, high]: steps of 1, 2 or 5 times a power of ten."""
  span = high - low
  if not span > 0:
    return [low]
  raw = span / about
  power = 10.0 ** math.floor(math.log10(raw))
  unit = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
  first, last = math.floor(low / unit + 1e-9), math.ceil(high / unit - 1e-9)
  return [i * unit for i in range(first, last + 1)]


def number(x: float) -> str:
  """A short label: 0.25, 150, 12k, 3e-06."""
  if x == 0:
    return "0"
  if abs(x) >= 10_000:
    for power, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
      if abs(x) >= power:
        return f"{x / power:.3g}{name}" if abs(x) < 1e15 else f"{x:.0e}"
  if abs(x) < 1e-3:
    return f"{x:.2g}"
  return f"{x:.4g}"


@dataclasses.dataclass(frozen=True)
class Frame:
  """The rectangle of a plot and its two axes, which place data on the paper."""

  left: float
  top: float
  width: float
  height: float
  x: tuple[float, float]  # log10 of the values when `log_x`
  y: tuple[float, float]  # log10 of the values when `log`
  log: bool = False
  log_x: bool = False

  def at(self, x: float, y: float) -> tuple[float, float]:
    x = math.log10(x) if self.log_x else x
    y = math.log10(max(y, 1e-300)) if self.log else y
    across = (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1)
    up = (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1)
    up = min(max(up, -0.02), 1.02)  # a forced range may cut a spike
    return self.left + across * self.width, self.top + (1 - up) * self.height


def panel(
  lines: list[Line],
  *,
  left: float = 44,
  top: float = 10,
  width: float = 300,
  height: float = 150,
  y_range: tuple[float, float] | None = None,
  log: bool = False,
  log_x: bool = False,
  key: str = "",
  name: str = "step",
) -> tuple[str, Frame]:
  """Axes, grid and curves as SVG elements, and the frame they were drawn in.

  Args:
    log_x: of few and positive values, each of which is told below its point.
    name: of the horizontal axis.
  """
  lines = [thin(line) for line in lines if len(line.x)]
  if log:
    positive = [v for line in lines for v in line.y if v > 0]
    log = bool(positive)
  xs = [x for line in lines for x in line.x] or [0.0, 1.0]
  ys = [y for line in lines for y in (*line.y, *line.low, *line.high)] or [0.0, 1.0]
  x_ticks = [t for t in ticks(min(xs), max(xs)) if min(xs) <= t <= max(xs)]
  span = (min(xs), max(xs))
  if log_x:
    x_ticks, span = sorted(set(xs)), tuple(math.log10(x) for x in span)
  if log:
    low = math.floor(math.log10(min(positive)))
    high = max(math.ceil(math.log10(max(positive))), low + 1)
    stride = max(1, -(-(high - low) // 4))
    y_ticks = [10.0**e for e in range(low, high + 1, stride)]
    bounds = (float(low), float(high))
  else:
    low, high = y_range or (min(ys), max(ys))
    if not high > low:
      pad = abs(low) * 0.1 or 1.0
      low, high = low - pad, high + pad
    y_ticks = ticks(low, high)
    bounds = y_range or (y_ticks[0], y_ticks[-1])
    y_ticks = [t for t in y_ticks if bounds[0] - 1e-12 <= t <= bounds[1] + 1e-12]
  frame = Frame(left, top, width, height, span, bounds, log, log_x)

  out = []
  for t in y_ticks:
    y = frame.at(min(xs), t)[1]
    zero = " zero" if t == 0 and bounds[0] < 0 else ""
    out.append(f'<path class="grid{zero}" d="M{left:g} {y:.1f}h{width:g}"/>')
    out.append(
      f'<text class="tick" x="{left - 6:g}" y="{y + 3.5:.1f}" text-anchor="end">'
      f"{number(t)}</text>"
    )
  base = top + height
  out.append(f'<path class="axis" d="M{left:g} {base:g}h{width:g}"/>')
  for t in x_ticks:
    x = frame.at(t, 1)[0]
    out.append(f'<path class="axis" d="M{x:.1f} {base:g}v4"/>')
    out.append(
      f'<text class="tick" x="{x:.1f}" y="{base + 16:g}" text-anchor="middle">'
      f"{number(t)}</text>"
    )
  out.append(
    f'<text class="tick name" x="{left + width:g}" y="{base + 30:g}" '
    f'text-anchor="end">{escape(name)}</text>'
  )
  out.append(
    f'<text class="tick key" x="{left:g}" y="{base + 30:g}">{escape(key)}</text>'
  )
  for line in lines:
    color = f"c{line.slot % len(COLORS)}"
    calm = smooth(line.y)
    if len(line.low):
      there = _path(frame, line.x, smooth(line.low))
      back = _path(frame, [*line.x][::-1], smooth(line.high)[::-1])
      out.append(f'<path class="band {color}" d="{there}L{back[1:]}Z"/>')
    elif calm != list(line.y):
      out.append(f'<path class="raw {color}" d="{_path(frame, line.x, line.y)}"/>')
    dash = DASHES[line.slot % len(DASHES)]
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    out.append(
      f'<path class="curve {color}"{dashed} d="{_path(frame, line.x, calm)}"/>'
    )
    if len(line.x) < 12:  # few points, e.g. evaluations: show where they are
      out.extend(
        '<circle class="dot c{}" cx="{:.1f}" cy="{:.1f}" r="2.4"/>'.format(
          line.slot % len(COLORS), *frame.at(x, y)
        )
        for x, y in zip(line.x, calm)
      )
  return "\n".join(out), frame


def _path(frame: Frame, xs, ys) -> str:
  points = ("{:.1f} {:.1f}".format(*frame.at(x, y)) for x, y in zip(xs, ys))
  return "M" + "L".join(points)


def swatch(slot: int) -> str:
  """The piece of line that stands before a name in a legend."""
  dash = DASHES[slot % len(DASHES)]
  dashed = f' stroke-dasharray="{dash}"' if dash else ""
  return (
    '<svg class="swatch" width="26" height="8" viewBox="0 0 26 8" aria-hidden="true">'
    f'<path class="curve c{slot % len(COLORS)}"{dashed} d="M1 4h24"/></svg>'
  )


def chart(
  title: str,
  key: str,
  lines: list[Line],
  *,
  note: str = "",
  y_range: tuple[float, float] | None = None,
  log: bool = False,
) -> str:
  """One figure of the report: title, legend and curves; the script adds the hover."""
  lines = [line for line in lines if len(line.x)]
  if not lines:
    return ""
  drawn, frame = panel(lines, y_range=y_range, log=log, key=key)
  thinned = [thin(line) for line in lines]
  data = {
    "frame": dataclasses.asdict(frame),
    "lines": [
      {
        "name": line.name,
        "slot": line.slot % len(COLORS),
        "x": [round(x, 2) for x in line.x],
        "y": [float(f"{y:.4g}") for y in line.y],
      }
      for line in thinned
    ],
  }
  legend = "".join(
    f"<span>{swatch(line.slot)}{escape(line.name)}</span>" for line in lines
  )
  last = ", ".join(f"{line.name} ends at {number(line.y[-1])}" for line in lines)
  return f"""<figure class="chart" data-chart="{escape(json.dumps(data))}">
<figcaption><b>{escape(title)}</b>
<div class="legend">{legend}</div></figcaption>
<svg viewBox="0 0 356 194" role="img" aria-label="{escape(f"{title}: {last}")}">
{drawn}
<g class="cursor"></g>
</svg>
{f'<p class="note">{escape(note)}</p>' if note else ""}
</figure>"""


STYLE = """
.grid { stroke: var(--rule, #e4e1da); stroke-width: 1; fill: none }
.grid.zero { stroke: var(--faint, #8c877c) }
.axis { stroke: var(--faint, #8c877c); stroke-width: 1; fill: none }
.tick { fill: var(--faint, #77726a); font: 10.5px system-ui, sans-serif }
.tick.name { font-style: italic }
.tick.key { font: 10px ui-monospace, monospace; opacity: .8 }
.raw { fill: none; stroke-width: 1; opacity: .28; stroke: var(--c) }
.curve { fill: none; stroke-width: 2; stroke: var(--c); stroke-linejoin: round;
  stroke-linecap: butt }
.band { fill: var(--c); opacity: .16; stroke: none }
.dot { fill: var(--c) }
.end { fill: var(--c); font: 600 12px system-ui, sans-serif }
""" + "".join(f".c{i} {{ --c: {light} }}\n" for i, (light, _) in enumerate(COLORS))
STYLE += "@media (prefers-color-scheme: dark) {\n"
STYLE += "".join(f".c{i} {{ --c: {dark} }}\n" for i, (_, dark) in enumerate(COLORS))
STYLE += "}\n"


def trap_figure(arms: dict[str, list[list[dict]]]) -> str:
  """The learning trap as one SVG file: RaPR and correctness over steps, a line a run.

  `arms` maps a name ("curiosity, alpha = 0.5") to its runs, one per seed, each the
  objects of a metrics.jsonl; the runs of an arm look alike.
  """
  panels = (
    ("ops/rapr", "How often it looks closer", "share of rollouts with an operation"),
    ("reward/correct", "How often it is right", "share of correct rollouts"),
  )
  body = []
  for i, (key, title, subtitle) in enumerate(panels):
    lines = [
      line_of(name, rows, key, slot)
      for slot, (name, runs) in enumerate(arms.items())
      for rows in runs
    ]
    drawn, _ = panel(
      lines,
      left=46 + 410 * i,
      top=62,
      width=352,
      height=190,
      y_range=(0.0, 1.0),
      key=key,
    )
    body.append(
      f'<text class="title" x="{46 + 410 * i}" y="26">{title}</text>'
      f'<text class="tick" x="{46 + 410 * i}" y="44">{subtitle}</text>{drawn}'
    )
  legend, x = [], 46.0
  for slot, name in enumerate(arms):
    dash = DASHES[slot % len(DASHES)]
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    legend.append(
      f'<path class="curve c{slot % len(COLORS)}"{dashed} d="M{x:g} 302h28"/>'
      f'<text class="end c{slot % len(COLORS)}" x="{x + 35:g}" y="306">'
      f"{escape(name)}</text>"
    )
    x += 35 + 7.2 * len(name) + 26
  return picture(
    "".join([*body, *legend]), 830, 322,
    "The learning trap: RaPR and correctness over RL steps",
  )  # fmt: skip


def picture(body: str, width: int, height: int, label: str) -> str:
  """Drawn panels as an SVG file of their own.

  Args:
    label: what it shows, for those who do not see it.
  """
  return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"
  role="img" aria-label="{escape(label)}">
<style>
svg {{ --rule: #e4e1da; --faint: #77726a; --paper: #fffdf9; --ink: #24211c }}
@media (prefers-color-scheme: dark) {{
  svg {{ --rule: #35332f; --faint: #a09a8e; --paper: #191816; --ink: #ece8df }}
}}
.paper {{ fill: var(--paper) }}
.title {{ fill: var(--ink); font: 600 15px system-ui, sans-serif }}
{STYLE}</style>
<rect class="paper" width="{width}" height="{height}" rx="6"/>
{body}
</svg>
"""
