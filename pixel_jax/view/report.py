"""A run as ONE HTML file: table, curves, trajectories.  No server, no network.

  page = report(runs, evaluation, load_media, codec=codec)

A `Run` is a workdir that was read (`pixel-jax view` reads it): its metrics, its
config and its trajectories.  What is missing is left out and said.
"""

from collections.abc import Iterator

from pixel_jax.trajectory import Trajectory
from pixel_jax.view import curves, page, table
from pixel_jax.view import trajectory as view
from pixel_jax.view.pictures import LoadMedia
from pixel_jax.view.runs import Run
from pixel_jax.view.text import escape

MOST_BYTES = 5_000_000
MOST_TRAJECTORIES = 400
GOLDEN = (5**0.5 - 1) / 2  # its multiples lie evenly between whole numbers


def report(
  runs: list[Run],
  evaluation: dict | None,
  load_media: LoadMedia,
  *,
  codec=None,
  title: str = "",
  most_bytes: int = MOST_BYTES,
  most: int = MOST_TRAJECTORIES,
) -> str:
  """The page.  Trajectories come evenly from all runs and steps until it is full: it has
  `most` of them, or `most_bytes`."""
  total = sum(len(r.trajectories) for r in runs)
  head = f"""<main>
<h1>{escape(title or "A model that learns to look closer")}</h1>
{_lede(runs, evaluation)}
<nav class="top"><a href="#table">before and after</a><a href="#curves">curves</a>
<a href="#trajectories">trajectories</a><a href="#configs">configs</a></nav>
<h2 id="table">Before and after</h2>
{table.render(evaluation)}
<div id="curves">{curves.draw(runs)}</div>
"""
  foot = f"""{curves.configs(runs)}
<footer>pixel_jax: Pixel Reasoner in JAX. This file needs no network: every picture,
curve and script is in it.</footer>
</main>
"""
  around = head + foot + page.SCRIPT + page.STYLE
  room = most_bytes - len(around.encode("utf-8", "replace")) - 4096
  shown, store = _trajectories(runs, total, load_media, codec, room, most)
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


# ---- Trajectories --------------------------------------------------------------------


def spread(runs: list[Run]) -> Iterator[tuple[Run, list[Trajectory]]]:
  """Whole groups (one question, one policy), evenly over runs and steps.

  Of a step not the first ones, but those that lie far apart: the kinds of questions
  often follow a short period, and the first three of the tiny world are always pictures.
  """
  queues = []
  for run in runs:
    steps: dict[int, dict[str, list[int]]] = {}
    for i, (step, task) in enumerate(run.heads):
      steps.setdefault(step, {}).setdefault(task, []).append(i)
    for _, groups in sorted(steps.items()):
      listed = list(groups.values())
      apart = sorted(range(len(listed)), key=lambda i: i * GOLDEN % 1)
      queues.append((run, iter([listed[i] for i in apart])))
  while queues:
    for queue in list(queues):
      group = next(queue[1], None)
      if group is None:
        queues.remove(queue)
      else:
        yield queue[0], [queue[0].trajectories[i] for i in group]


def _trajectories(
  runs, total, load_media, codec, room, most
) -> tuple[str, dict[str, str]]:
  """The browser and the pictures it needs, within `room` bytes."""
  opening = '<h2 id="trajectories">Trajectories</h2>'
  if not total:
    return f'{opening}<p class="aside">No trajectories here yet.</p>', {}
  kept, store = _fill(runs, load_media, codec, room, most)
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


def _fill(runs, load_media, codec, room, most):
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
    if misses == 8 or len(kept) == most:
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
