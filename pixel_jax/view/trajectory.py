"""One trajectory as a piece of HTML: what it saw, what it wrote, what came back.

Not a page (`report.py` makes one) and not a judge: correctness comes from the
trajectory's reward parts.

Everything that a model, a user or a data set wrote passes through `escape`; nothing of
it reaches the page as markup.  Pictures are data URIs, in place or, when the caller
hands over a `store`, once per distinct picture.
"""

import dataclasses
import json
import math
import re

from pixel_jax.chat import tools
from pixel_jax.trajectory import OpCall, Task, Trajectory
from pixel_jax.view.pictures import (
  WIDEST,
  Image,
  LoadMedia,
  Replay,
  Shown,
  figure,
  mark_calls,
  replay,
)
from pixel_jax.view.text import escape

MOST_TOKENS = 600  # of one turn with a probability each
VISION = re.compile(r"<\|vision_start\|>(?:<\|(?:image|video)_pad\|>)*<\|vision_end\|>")


# ---- Words ---------------------------------------------------------------------------


def plain(text: str) -> str:
  """A turn without the template's scaffolds: role header, end mark, placeholders."""
  text = VISION.sub("", text)
  text = re.sub(r"^<\|im_start\|>(?:system|user|assistant)\n", "", text)
  return re.sub(r"<\|im_end\|>\s*$", "", text).strip("\n")


def words(text: str) -> str:
  """A policy's prose, its boxed answer set off."""
  out, last = [], 0
  for m in re.finditer(r"\\boxed\{([^{}]*)\}", text):
    out += [
      escape(text[last : m.start()]),
      f'<b class="boxed">{escape(m.group(1))}</b>',
    ]
    last = m.end()
  return "".join(out) + escape(text[last:])


def policy_html(
  text: str, profile: str, number: int, ran: OpCall | None
) -> tuple[str, bool]:
  """A turn of the policy, and whether it is a call.  `ran`: the call as it was run.

  What counts as a call is the protocol's decision: one a turn, the last, at its end.
  """
  call = tools.parse_call(text, profile)
  text = plain(text)
  if call is None:
    return f'<div class="words">{words(text)}</div>', False
  before, _, raw = text.rpartition(tools.OPEN)
  raw = raw.split(tools.CLOSE)[0].strip()
  css, note = "", "not run"
  if ran is not None:
    css, note = ("error", escape(ran.error)) if ran.error else ("", "")
    if ran.planted:
      note = f"planted, not learned: {note}" if note else "planted, not learned"
  if call.name and isinstance(call.arguments, dict):
    rows = "".join(
      f"<dt>{escape(k)}</dt><dd>{escape(json.dumps(v, ensure_ascii=False))}</dd>"
      for k, v in call.arguments.items()
    )
    inner = f"<b>{escape(call.name)}</b><dl>{rows}</dl>"
  else:
    inner = f"<pre>{escape(raw)}</pre>"
  said = f'<div class="words">{words(before.strip())}</div>' if before.strip() else ""
  return (
    f'{said}<div class="call" title="{escape(raw)}">'
    f'<span class="tag {css or "call"}">{number}</span>{inner}<em>{note}</em></div>'
  ), True


def tokens_html(trajectory: Trajectory, codec) -> list[str]:
  """Each policy turn's sampled tokens, tinted by how unlikely they were."""
  if codec is None or not any(trajectory.logp):
    return []
  turns, current = [], []
  for i, sampled in enumerate(trajectory.sampled):
    if sampled:
      current.append(i)
    elif current:
      turns.append(current)
      current = []
  turns += [current] if current else []
  out = []
  for turn in turns:
    spans = []
    for i in turn[:MOST_TOKENS]:
      p = math.exp(min(trajectory.logp[i], 0.0))
      text = codec.tokenizer.decode([trajectory.ids[i]])
      learned = "" if trajectory.weight[i] else ' class="unlearned"'
      spans.append(
        f'<i{learned} style="--doubt:{1 - p:.2f}" title="{p:.1%}">{escape(text)}</i>'
      )
    more = len(turn) - MOST_TOKENS
    spans += [f"<em>… {more} more</em>"] if more > 0 else []
    out.append(f'<div class="tokens">{"".join(spans)}</div>')
  return out


@dataclasses.dataclass(frozen=True)
class Scored:
  """What the trainer's graph says of a trajectory's ids."""

  by: str  # which weights
  logp: list[float]
  entropy: list[float]


def token_table(trajectory: Trajectory, codec, scored: Scored | None) -> str:
  """Every token of the policy: how likely it was to the sampler, and to the trainer."""
  t, rows, turn = trajectory, [], 0
  for i, sampled in enumerate(t.sampled):
    if not sampled:
      continue
    turn += not (i and t.sampled[i - 1])
    ours = math.exp(min(t.logp[i], 0.0))
    cells = [str(turn), codec.tokenizer.decode([t.ids[i]]), f"{ours:.2%}"]
    if scored:
      theirs = math.exp(min(scored.logp[i], 0.0))
      gap = scored.logp[i] - t.logp[i]
      cells += [f"{theirs:.2%}", f"{gap:+.2g}", f"{scored.entropy[i]:.3f}"]
    cells.append("learned" if t.weight[i] else "masked")
    css = "" if t.weight[i] else ' class="unlearned"'
    drawn = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    rows.append(f"<tr{css}>{drawn}</tr>")
    if len(rows) == MOST_TOKENS:
      break
  heads = ["turn", "token", "sampler"]
  heads += ["trainer", "log-prob, trainer − sampler", "entropy"] if scored else []
  heads = "".join(f"<th>{h}</th>" for h in (*heads, "loss"))
  by = f"The trainer is {escape(scored.by)}. " if scored else ""
  advantage = f"Every learned token has the advantage {t.advantage:+.2f}. "
  return (
    f'<p class="note">{by}{advantage if t.advantage else ""}</p>'
    '<div class="wide" tabindex="0"><table class="one-by-one">'
    f"<thead><tr>{heads}</tr></thead>"
    f"<tbody>{''.join(rows)}</tbody></table></div>"
  )


# ---- The fragment --------------------------------------------------------------------


def verdict(trajectory: Trajectory) -> str:
  """ "correct", "wrong" or "unjudged"."""
  correct = trajectory.reward.get("correct")
  if correct is None:
    return "unjudged"
  return "correct" if correct >= 0.5 else "wrong"


def answer_of(trajectory: Trajectory) -> str:
  """What the policy gave as its answer, short; "" when it gave none."""
  said = [t["text"] for t in trajectory.turns if t.get("role") == "assistant"]
  found = re.findall(r"\\boxed\{([^{}]*)\}", said[-1]) if said else []
  return found[-1].strip() if found else ""


def truth_of(task: Task) -> str:
  """The right answer; all that count as right."""
  answer = task.answer
  return answer if isinstance(answer, str) else " | ".join(map(str, answer))


def reward_html(trajectory: Trajectory) -> str:
  """correct 1.00 + curiosity .05 - penalty .00 = 1.05, and what else was kept."""
  parts = dict(trajectory.reward)
  total = parts.pop("total", None)
  sum_of = [k for k in ("correct", "curiosity", "penalty") if k in parts]
  chips = [f"<span>{k} <b>{parts.pop(k):+.2f}</b></span>" for k in sum_of]
  if total is not None:
    chips.append(f'<span class="total">= reward <b>{total:.2f}</b></span>')
  if "rapr" in parts:
    chips.append(f"<span>RaPR of the query <b>{_short(parts.pop('rapr'))}</b></span>")
  chips += [f"<span>{escape(k)} <b>{_short(v)}</b></span>" for k, v in parts.items()]
  if trajectory.advantage:
    chips.append(f"<span>advantage <b>{trajectory.advantage:+.2f}</b></span>")
  return f'<p class="reward">{"".join(chips)}</p>' if chips else ""


def _short(value) -> str:
  return f"{value:.2f}" if isinstance(value, int | float) else escape(value)


STOPS = {
  "answer": "answered",
  "turns": "stopped: too many turns",
  "length": "stopped: too long",
  "row": "stopped: no training row holds more",
  "": "open",
}


def render(
  trajectory: Trajectory,
  load_media: LoadMedia,
  *,
  codec=None,
  store: dict[str, str] | None = None,
  heading: str = "",
) -> str:
  """The trajectory as an <article>; self-contained unless a `store` takes the pictures.

  Without a codec the question's pictures are shown, but not what the calls returned.
  """
  task, judged = trajectory.task, verdict(trajectory)
  mark = {"correct": "✓ correct", "wrong": "✗ wrong", "unjudged": "not judged"}[judged]
  gave = answer_of(trajectory)
  facts = [
    f'<span class="verdict {judged}">{mark}</span>',
    f"<span>said <b>{escape(gave) or '—'}</b>, truth "
    f"<b>{escape(truth_of(task))}</b></span>",
    f"<span>{escape(STOPS.get(trajectory.stop, trajectory.stop))}</span>",
  ]
  if trajectory.policy_step > 0:
    facts.append(f"<span>policy of step {trajectory.policy_step}</span>")
  facts.append(f"<span>sample {trajectory.sample + 1}</span>")
  out = [
    f'<article class="trajectory {judged}">',
    f"<header><h3>{escape(heading or task.id)}</h3>",
    f'<p class="facts">{"".join(facts)}</p>',
    reward_html(trajectory),
    "</header>",
    render_turns(trajectory, load_media, codec=codec, store=store),
    "</article>",
  ]
  return "\n".join(out)


def render_turns(
  trajectory: Trajectory, load_media: LoadMedia, *, codec, store: dict[str, str] | None
) -> str:
  """The turns alone, for who says the rest around them: `render` and the demo."""
  try:
    shown, missing = replay(trajectory, codec, load_media), ""
  except Exception as error:  # a lost file must not cost the page
    shown = Replay([], [], [[] for _ in trajectory.calls])
    missing = f'<p class="missing">pictures cannot be drawn: {escape(error)}</p>'
  mark_calls(trajectory, shown)
  return missing + _turns(trajectory, shown, codec, store)


def _turns(trajectory: Trajectory, shown: Replay, codec, store) -> str:
  out, calls, asked = [], 0, False
  tinted = tokens_html(trajectory, codec)
  policy_turns = 0
  for turn in trajectory.turns:
    role, text = turn.get("role", ""), turn.get("text", "")
    if role == "system":
      out.append(
        '<li class="turn system"><details><summary>system prompt</summary>'
        f"<pre>{escape(plain(text))}</pre></details></li>"
      )
    elif role == "assistant":
      ran = trajectory.calls[calls] if calls < len(trajectory.calls) else None
      body, is_call = policy_html(text, trajectory.profile, calls + 1, ran)
      tokens = tinted[policy_turns] if policy_turns < len(tinted) else ""
      policy_turns += 1
      out.append(
        f'<li class="turn policy"><p class="who">policy</p>{body}{tokens}</li>'
      )
      calls += is_call
    elif not asked:
      asked = True
      out.append(
        f'<li class="turn question"><p class="who">question</p>{_question(shown, store)}'
        f"{_question_text(plain(text), trajectory.task.question)}</li>"
      )
    else:
      out.append(_observation(trajectory, shown, calls - 1, plain(text), store))
  return f'<ol class="turns">{"".join(out)}</ol>'


def _question_text(text: str, question: str) -> str:
  """The question; the guidelines that follow it in every prompt are folded away."""
  if not text.startswith(question) or text == question:
    return f'<div class="words">{escape(text)}</div>'
  rest = escape(text[len(question) :].strip())
  return (
    f'<div class="words">{escape(question)}</div><details class="guidelines">'
    f"<summary>guidelines</summary>{rest}</details>"
  )


def _question(shown: Replay, store) -> str:
  out, number = [], 0
  for group, views in zip(shown.question, shown.views):
    film = len(group) > 1
    strip = []
    for picture in group:
      number += 1
      caption = picture.name if film else f"{picture.name} · {_size(picture.image)}"
      strip.append(figure(picture, store, css="source", caption=caption))
    # The coarse view is the point of the whole exercise: show it beside the source.
    coarse = [
      figure(
        Shown(view, f"{picture.name} as first seen"),
        store,
        css="view",
        caption="" if film else f"as the model first sees it · {_size(view)}",
      )
      for picture, view in zip(group, views)
      if view.width * view.height * 2 <= picture.image.width * picture.image.height
      and view.width < WIDEST / 2
    ]
    css = "strip film" if film else "strip"
    if film and coarse:
      note = f"as the model first sees it · {_size(views[0])} a frame"
      coarse_strip = (
        f'<p class="small">{note}</p><div class="{css} coarse">{"".join(coarse)}</div>'
      )
      out.append(f'<div class="{css}">{"".join(strip)}</div>{coarse_strip}')
    else:
      out.append(f'<div class="{css}">{"".join(strip + coarse)}</div>')
  return "".join(out)


def _observation(trajectory, shown: Replay, index: int, text: str, store) -> str:
  call = trajectory.calls[index] if 0 <= index < len(trajectory.calls) else None
  failed = call is not None and call.error is not None
  pictures = shown.returned[index] if 0 <= index < len(shown.returned) else []
  figures = "".join(
    figure(p, store, css="returned", caption=f"{p.name} · {_size(p.image)}")
    for p in pictures
  )
  strip = f'<div class="strip">{figures}</div>' if figures else ""
  css = "turn tool failed" if failed else "turn tool"
  label = (
    f'operation <span class="kind">{escape(call.error)}</span>'
    if failed
    else "operation"
  )
  return (
    f'<li class="{css}"><p class="who">{label}</p>'
    f'<div class="words">{escape(text.strip())}</div>{strip}</li>'
  )


def _size(image: Image) -> str:
  return f"{image.width}×{image.height}"
