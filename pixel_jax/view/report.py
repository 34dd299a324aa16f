"""A run as ONE HTML file: table, curves, trajectories.  No server, no network.

  page = report(runs, evaluation, load_media, codec=codec)

A `Run` is a workdir that was read (`pixel-jax view` reads it): its metrics, its
config and its trajectories.  What is missing is left out and said.
"""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from pixel_jax.trajectory import Trajectory
from pixel_jax.view import charts, page, table
from pixel_jax.view import trajectory as view
from pixel_jax.view.pictures import LoadMedia
from pixel_jax.view.text import escape

MOST_BYTES = 5_000_000
MOST_TRAJECTORIES = 400


@dataclasses.dataclass
class Run:
  """One workdir, or one file of evaluation rollouts, by the name it has on the page."""

  name: str
  metrics: list[dict] = dataclasses.field(default_factory=list)  # of metrics.jsonl
  config: dict[str, Any] = dataclasses.field(default_factory=dict)
  trajectories: list[Trajectory] = dataclasses.field(default_factory=list)

  @property
  def is_rl(self) -> bool:
    return any("ops/rapr" in row for row in self.metrics)


# (section, what it tells, charts: (title, key, note, range, log))
SHARE = (0.0, 1.0)
RL_CHARTS = (
  (
    "The learning trap",
    "Looking closer is a skill that at first costs accuracy, so a policy may give it up"
    " before it pays. The curiosity bonus is there to keep it looking.",
    (
      ("Rollouts that operate", "ops/rapr", "", SHARE, False),
      ("Correct", "reward/correct", "", SHARE, False),
      ("Correct, of those that operate", "reward/accuracy_with_ops", "", SHARE, False),
      (
        "Correct, of those that do not",
        "reward/accuracy_without_ops",
        "",
        SHARE,
        False,
      ),
      ("Held-out accuracy", "eval/accuracy", "", SHARE, False),
      ("Held-out rollouts that operate", "eval/rapr", "", SHARE, False),
    ),
  ),
  (
    "Reward, operations and health",
    "",
    (
      ("Curiosity bonus, mean", "reward/curiosity", "", None, False),
      ("Penalty, mean", "reward/penalty", "", None, False),
      ("Operations a rollout", "ops/per_rollout", "", None, False),
      ("Operations that fail", "ops/error_rate", "", None, False),
      ("Entropy of a token", "policy/entropy", "", None, False),
      ("Sampler and trainer, largest gap", "agreement/logp_diff_max", "", None, True),
      ("Gradient norm", "optim/grad_norm", "", None, True),
      ("Loss", "loss", "", None, False),
      ("Tokens a second", "perf/tokens_per_s", "", None, False),
    ),
  ),
)
SFT_CHARTS = (
  ("Loss", "loss", "nats a learned token", None, False),
  ("Held-out loss", "eval/loss", "", None, False),
  ("Entropy of a token", "policy/entropy", "", None, False),
  ("Gradient norm", "optim/grad_norm", "", None, True),
)


def report(
  runs: list[Run],
  evaluation: dict | None,
  load_media: LoadMedia,
  *,
  codec=None,
  title: str = "",
  most_bytes: int = MOST_BYTES,
) -> str:
  """The page.  Trajectories come evenly from all runs and steps until it is full."""
  total = sum(len(r.trajectories) for r in runs)
  head = f"""<main>
<h1>{escape(title or "A model that learns to look closer")}</h1>
{_lede(runs, evaluation)}
<nav class="top"><a href="#table">before and after</a><a href="#curves">curves</a>
<a href="#trajectories">trajectories</a><a href="#configs">configs</a></nav>
<h2 id="table">Before and after</h2>
{table.render(evaluation)}
<div id="curves">{_curves(runs)}</div>
"""
  foot = f"""{_configs(runs)}
<footer>pixel_jax: Pixel Reasoner in JAX. This file needs no network: every picture,
curve and script is in it.</footer>
</main>
"""
  around = head + foot + page.SCRIPT + page.STYLE
  room = most_bytes - len(around.encode("utf-8", "replace")) - 4096
  shown, store = _trajectories(runs, total, load_media, codec, room)
  return page.document(
    title or "Pixel Reasoner: a run", head + shown + foot, pictures=store
  )


# ---- Title ---------------------------------------------------------------------------


def _lede(runs: list[Run], evaluation: dict | None) -> str:
  """What the run was and the result in a sentence, both from what is really there."""
  facts = []
  for run in runs:
    if not run.metrics:
      continue
    steps = max(
      (s for row in run.metrics if isinstance(s := row.get("step"), int)), default=0
    )
    model = run.config.get("model")
    words = [f"{'RL' if run.is_rl else 'SFT'}, {steps} steps"]
    if isinstance(model, dict) and "name" in model:
      words.append(f"{model['name']} model")
    if "seed" in run.config:
      words.append(f"seed {run.config['seed']}")
    if (
      run.is_rl
      and "alpha" not in run.name
      and isinstance(run.config.get("reward"), dict)
    ):
      words.append(f"alpha = {run.config['reward'].get('alpha', '?')}")
    facts.append(f"<b>{escape(run.name)}</b> ({escape(', '.join(words))})")
  said = []
  rows = table.rows_of(evaluation)
  scored = [(r, free) for r in rows if (free := table.accuracy(r, "free"))]
  if scored:
    row, free = max(scored, key=lambda s: s[1].value)
    name = escape(row.get("name", "?"))
    sentence = f"{name} answers {free.value:.0%} when it is free to operate"
    if forbidden := table.accuracy(row, "forbidden"):
      sentence += f" and {forbidden.value:.0%} when it is not"
    said.append(sentence + ".")
    others = [
      f"{escape(r.get('name', '?'))} {f.value:.0%}" for r, f in scored if r is not row
    ]
    said += [f"The others, free: {'; '.join(others)}."] if others else []
  out = f'<p class="lede">{" ".join(said)}</p>' if said else ""
  return out + (f'<p class="aside">Runs: {"; ".join(facts)}.</p>' if facts else "")


def _configs(runs: list[Run]) -> str:
  parts = "".join(
    f'<details class="more"><summary>{escape(run.name)}</summary>'
    f"<pre>{escape(json.dumps(run.config, indent=1))}</pre></details>"
    for run in runs
    if run.config
  )
  return (
    f'<h2 id="configs">Configs</h2>{parts}' if parts else '<div id="configs"></div>'
  )


# ---- Curves --------------------------------------------------------------------------


def _curves(runs: list[Run]) -> str:
  out = []
  rl = [r for r in runs if r.is_rl]
  for heading, told, wanted in RL_CHARTS:
    if drawn := _charts(rl, wanted):
      about = f'<p class="aside">{told}</p>' if told else ""
      out.append(f'<h2>{heading}</h2>{about}<div class="charts">{drawn}</div>')
  if drawn := _charts([r for r in runs if r.metrics and not r.is_rl], SFT_CHARTS):
    out.append(f'<h2>Supervised fine-tuning</h2><div class="charts">{drawn}</div>')
  if not out:
    return '<h2>Curves</h2><p class="aside">No metrics.jsonl here yet.</p>'
  return "".join(out) + (
    '<p class="note">Strong lines are centred means over a fortieth of the curve; faint'
    " ones are every step. Hover, or focus a chart and use the arrow keys, to read"
    " values.</p>"
  )


def _charts(runs: list[Run], wanted) -> str:
  return "".join(
    charts.chart(
      title,
      key,
      [charts.line_of(r.name, r.metrics, key, slot) for slot, r in enumerate(runs)],
      note=note,
      y_range=y_range,
      log=log,
    )
    for title, key, note, y_range, log in wanted
  )


# ---- Trajectories --------------------------------------------------------------------


def spread(runs: list[Run]) -> Iterator[tuple[Run, list[Trajectory]]]:
  """Whole groups (one question, one policy), evenly over runs and steps."""
  queues = []
  for run in runs:
    steps: dict[int, dict[str, list[Trajectory]]] = {}
    for t in run.trajectories:
      steps.setdefault(t.policy_step, {}).setdefault(t.task.id, []).append(t)
    queues += [(run, iter(groups.values())) for _, groups in sorted(steps.items())]
  while queues:
    for queue in list(queues):
      group = next(queue[1], None)
      if group is None:
        queues.remove(queue)
      else:
        yield queue[0], group


def _trajectories(runs, total, load_media, codec, room) -> tuple[str, dict[str, str]]:
  """The browser and the pictures it needs, within `room` bytes."""
  opening = '<h2 id="trajectories">Trajectories</h2>'
  if not total:
    return f'{opening}<p class="aside">No trajectories here yet.</p>', {}
  kept, store = _fill(runs, load_media, codec, room)
  groups = [(id(run), t.policy_step, t.task.id) for run, t, _ in kept]
  links = "".join(
    _link(i, run, t, first=i == 0 or groups[i] != groups[i - 1])
    for i, (run, t, _) in enumerate(kept)
  )
  panes = "".join(
    f'<div id="t{i}">{fragment}<p class="group"></p></div>'
    for i, (*_, fragment) in enumerate(kept)
  )
  few = f"{len(kept)} of {total}, taken evenly from all runs and steps"
  shown = few if len(kept) < total else f"All {total}"
  return (
    f"""{opening}
<p class="aside">{shown}. Blue is the policy's own text, grey is what came back; boxes
carry the number of their call, the dotted green box or the star is the reference.
<kbd>j</kbd> <kbd>k</kbd> or <kbd>→</kbd> <kbd>←</kbd> next and previous, <kbd>c</kbd>
correct, <kbd>w</kbd> wrong, <kbd>o</kbd> used an operation, <kbd>e</kbd> error,
<kbd>t</kbd> token probabilities, <kbd>/</kbd> search.</p>
{_filters(kept)}
<div class="browser" data-start="{_start(kept)}"><ol class="list">{links}</ol>
<div class="pane"><p class="empty" hidden>Nothing fits these filters.</p>{panes}</div>
</div>""",
    store,
  )


def _fill(runs, load_media, codec, room):
  """[(run, trajectory, fragment)] and their pictures, as many as fit `room` bytes."""
  kept, store, misses = [], {}, 0
  for run, t in ((run, t) for run, group in spread(runs) for t in group):
    new: dict[str, str] = {}
    heading = f"{t.task.id} · {run.name}"
    fragment = view.render(t, load_media, codec=codec, store=new, heading=heading)
    fresh = {k: v for k, v in new.items() if k not in store}
    link = _link(len(kept), run, t, first=True)
    cost = len((fragment + link).encode()) + sum(len(v) + 24 for v in fresh.values())
    if cost + 64 > room:
      misses += 1  # one long trajectory must not shut out the short ones behind it
    else:
      room -= cost + 64
      store |= fresh
      kept.append((run, t, fragment))
    if misses == 8 or len(kept) == MOST_TRAJECTORIES:
      break
  order = {id(run): i for i, run in enumerate(runs)}
  # The sort is stable, so groups stay whole.
  kept.sort(key=lambda k: (order[id(k[0])], k[1].policy_step))
  return kept, store


def _start(kept) -> int:
  """What the page opens with: the first RL run's latest rollout that looked and was
  right, else the first of all."""
  first = next((run for run, *_ in kept if run.is_rl), kept[0][0] if kept else None)
  good = [
    (t.policy_step, -i)
    for i, (run, t, _) in enumerate(kept)
    if run is first and t.calls and t.ops_succeeded and view.verdict(t) == "correct"
  ]
  return -max(good)[1] if good else 0


def _filters(kept) -> str:
  def select(key, label, values):
    if len(values) < 2:
      return ""
    options = "".join(
      f'<option value="{escape(v)}">{escape(n)}</option>' for v, n in values
    )
    return (
      f'<select data-key="{key}" aria-label="{label}"><option value="">{label}</option>'
      f"{options}</select>"
    )

  names = list(dict.fromkeys(run.name for run, *_ in kept))
  steps = sorted({t.policy_step for _, t, _ in kept})
  buttons = (
    ("verdict", "correct", "c", "correct"),
    ("verdict", "wrong", "w", "wrong"),
    ("ops", "", "o", "used an operation"),
    ("error", "", "e", "error"),
    ("tokens", "", "t", "token probabilities"),
  )
  pressed = "".join(
    f'<button type="button" data-key="{k}" data-value="{v}" data-press="{p}"'
    f' aria-pressed="false">{label}</button>'
    for k, v, p, label in buttons
  )
  return (
    f'<div class="filters">{pressed}'
    + select("run", "every run", [(n, n) for n in names])
    + select(
      "step",
      "every step",
      [(str(s), f"step {s}" if s >= 0 else "synthesized") for s in steps],
    )
    + '<input type="search" placeholder="search" aria-label="search">'
    '<output id="count"></output></div>'
  )


def _link(i: int, run: Run, t: Trajectory, *, first: bool) -> str:
  judged = view.verdict(t)
  mark, css = {"correct": ("✓", "ok"), "wrong": ("✗", "ko"), "unjudged": ("·", "")}[
    judged
  ]
  looks = "".join("!" if c.error else "▣" for c in t.calls)
  when = f"step {t.policy_step}" if run.metrics and t.policy_step >= 0 else run.name
  keys = {
    "verdict": judged,
    "ops": t.ops_attempted,
    "errors": t.ops_attempted - t.ops_succeeded,
    "run": run.name,
    "step": t.policy_step,
    "group": f"{run.name} {t.policy_step} {t.task.id}",
    "text": f"{t.task.id} {t.task.question} {run.name} {view.answer_of(t)}".lower()[
      :300
    ],
  }
  data = " ".join(f'data-{k}="{escape(v)}"' for k, v in keys.items())
  return (
    f'<li class="{"first" if first else "sibling"}">'
    f'<a href="#t{i}" title="{escape(t.task.question[:200])}" {data}>'
    f'<span class="mark {css}">{mark}</span><span class="what">{escape(t.task.id)} '
    f'<span class="n">{t.sample + 1}</span><span class="looks">{looks}</span></span>'
    f'<span class="when">{escape(when)}</span></a></li>'
  )
