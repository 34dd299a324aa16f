"""The curves of runs, and what their configs say, as pieces of a page."""

import json
from typing import Any

from pixel_jax.view import charts, runs
from pixel_jax.view.runs import Run
from pixel_jax.view.text import escape

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


def draw(all_runs: list[Run]) -> str:
  """Every chart that the runs have numbers for; seeds of one arm as a mean and a band."""
  out = []
  rl = [r for r in all_runs if r.is_rl]
  for heading, told, wanted in RL_CHARTS:
    if drawn := _charts(rl, wanted):
      about = f'<p class="aside">{told}</p>' if told else ""
      out.append(f'<h2>{heading}</h2>{about}<div class="charts">{drawn}</div>')
  if drawn := _charts([r for r in all_runs if r.metrics and not r.is_rl], SFT_CHARTS):
    out.append(f'<h2>Supervised fine-tuning</h2><div class="charts">{drawn}</div>')
  if not out:
    return '<h2>Curves</h2><p class="aside">No metrics.jsonl here yet.</p>'
  return "".join(out) + (
    '<p class="note">Strong lines are centred means over a fortieth of the curve; faint'
    " ones are every step, bands reach from the lowest seed to the"
    " highest. Hover, or focus a chart and use the arrow keys, to read values.</p>"
  )


def _charts(some: list[Run], wanted) -> str:
  arms, out = runs.arms(some), []
  for title, key, note, y_range, log in wanted:
    lines = [
      charts.over_seeds(
        name, [charts.line_of(run.name, run.metrics, key) for run in alike], slot
      )
      for slot, (name, alike) in enumerate(arms)
    ]
    out.append(charts.chart(title, key, lines, note=note, y_range=y_range, log=log))
  return "".join(out)


# ---- Configs -------------------------------------------------------------------------


def configs(all_runs: list[Run]) -> str:
  """In what they differ, and each as it is."""
  parts = "".join(
    f'<details class="more"><summary>{escape(run.name)}</summary>'
    f"<pre>{escape(json.dumps(run.config, indent=1))}</pre></details>"
    for run in all_runs
    if run.config
  )
  parts = _differences([run for run in all_runs if run.config]) + parts
  return (
    f'<h2 id="configs">Configs</h2>{parts}' if parts else '<div id="configs"></div>'
  )


def _differences(some: list[Run]) -> str:
  """A table of the arms of one kind: those of SFT and of RL have other fields."""
  out = []
  trained = [run for run in some if run.metrics]
  for kind in ([r for r in trained if r.is_rl], [r for r in trained if not r.is_rl]):
    arms = runs.arms(kind)
    rows = runs.differences([alike[0] for _, alike in arms]) if len(arms) > 1 else []
    body = "".join(
      f'<tr><td class="name">{escape(key)}</td>'
      + "".join(f"<td>{escape(_told(value))}</td>" for value in values)
      + "</tr>"
      for key, values in rows
      if key not in runs.OF_A_SEED
    )
    if body:
      heads = "".join(f"<th>{escape(name)}</th>" for name, _ in arms)
      out.append(
        '<div class="wide" tabindex="0"><table class="differences"><thead><tr>'
        f"<th>differs</th>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
      )
  return "".join(out)


def _told(value: Any) -> str:
  return "–" if value is None else json.dumps(value, ensure_ascii=False)[:200]
