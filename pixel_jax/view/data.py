"""Data as it will be trained on, as a page: what there is, how it packs, what was set
aside, and examples with their boxes and the loss on each token."""

import dataclasses
from collections.abc import Sequence

from pixel_jax.trajectory import Trajectory
from pixel_jax.view import page
from pixel_jax.view import trajectory as view
from pixel_jax.view.pictures import LoadMedia, Shown, figure, mark_calls, replay
from pixel_jax.view.text import escape

STYLE = page.asset("data.css")
MOST_TOKENS = 4000  # of an example, letter by letter; a page holds sixty


@dataclasses.dataclass(frozen=True)
class Table:
  """Counts under one heading, each with a bar; `share` scales the bar to 1 instead of to
  the largest."""

  title: str
  rows: Sequence[tuple[str, float]]
  note: str = ""
  share: bool = False


@dataclasses.dataclass(frozen=True)
class Fault:
  """What was set aside for one reason: how often, and the first record that has it."""

  reason: str
  count: int
  index: int
  record: str  # as it stands in the file, cut
  pictures: Sequence[Shown] = ()


def document(
  title: str,
  lede: str,
  tables: Sequence[Table],
  faults: Sequence[Fault],
  examples: Sequence[tuple[Trajectory, LoadMedia, str]],
  codec,
) -> str:
  """The page; of each example its trajectory, where its media come from, and a note."""
  nav = '<a href="#examples">examples</a>'
  if faults:
    total = sum(fault.count for fault in faults)
    nav = f'<a href="#aside">set aside: {total:,}</a>{nav}'
  drawn = "".join(map(_table, tables))
  aside = "".join(map(_fault, faults))
  cards = "".join(_example(*example, codec) for example in examples)
  return page.document(
    title,
    f"""<main>
<h1>{escape(title)}</h1>
<p class="lede">{escape(lede)}</p>
<nav class="top">{nav}</nav>
<h2>What it holds</h2>
<div class="tables">{drawn}</div>
{f'<h2 id="aside">Set aside</h2><ul class="faults">{aside}</ul>' if aside else ""}
<h2 id="examples">Examples</h2>
<p class="aside">Boxes carry the number of their call; the dotted one is the reference.
Below each picture stands what the model is given, token by token:
<span class="masks"><i class="learned">blue is learned</i>, <i class="own">struck out is the
policy's own, but not learned</i>, <i>the rest is read</i></span>.</p>
{cards}
<footer>pixel_jax: Pixel Reasoner in JAX. This file needs no network.</footer>
</main>
""",
    style=STYLE,
    script="",
  )


def _table(table: Table) -> str:
  top = 1.0 if table.share else max((n for _, n in table.rows), default=1) or 1
  rows = "".join(
    f'<tr><th scope="row">{escape(name)}</th><td class="bar"><i style="width:'
    f'{100 * min(n / top, 1):.1f}%"></i></td>'
    f'<td class="n">{_number(n, table.share)}</td></tr>'
    for name, n in table.rows
  )
  note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
  return (
    f'<section><h3>{escape(table.title)}</h3><table class="bars"><tbody>{rows}</tbody>'
    f"</table>{note}</section>"
  )


def _number(n: float, share: bool) -> str:
  return f"{n:.1%}" if share else f"{n:,.0f}"


def _fault(fault: Fault) -> str:
  pictures = "".join(
    figure(s, None, css="returned", caption=f"{s.image.width}×{s.image.height}")
    for s in fault.pictures
  )
  strip = f'<div class="strip">{pictures}</div>' if pictures else ""
  return (
    f"<li><p><b>{fault.count:,}</b> {escape(fault.reason)}</p>{strip}"
    f'<details class="more"><summary>record {fault.index:,}, the first of them</summary>'
    f"<pre>{escape(fault.record)}</pre></details></li>"
  )


def _example(trajectory: Trajectory, load_media: LoadMedia, note: str, codec) -> str:
  task = trajectory.task
  try:
    shown = replay(trajectory, codec, load_media)
    mark_calls(trajectory, shown)
    pictures = "".join(
      figure(s, None, css="source", caption=s.name)
      for group in shown.question
      for s in group
    )
  except Exception as error:  # a lost file must not cost the page
    pictures = f'<p class="missing">pictures cannot be drawn: {escape(error)}</p>'
  film = " film" if any(m.kind == "video" for m in task.media) else ""
  whole = view.render(trajectory, load_media, codec=codec)
  return (
    f'<section class="trajectory"><h3>{escape(task.id)}</h3>'
    f'<div class="strip{film}">{pictures}</div>'
    f'<p class="words">{escape(task.question[:400])}</p>'
    f"<p><b>{escape(view.truth_of(task)[:200])}</b> · {escape(note)}</p>"
    f"{masks(trajectory, codec)}"
    f'<details class="more"><summary>the conversation</summary>{whole}</details></section>'
  )


def masks(trajectory: Trajectory, codec) -> str:
  """What the model is given, coloured by what is learned of it; placeholders folded."""
  words, t = codec.tokenizer, trajectory
  pads = {words.image_pad, words.video_pad}
  out, i, left = [], 0, MOST_TOKENS
  while i < len(t.ids) and left > 0:
    kind, end = _kind(t, i), i + 1
    is_pad = t.ids[i] in pads
    while end < len(t.ids) and _kind(t, end) == kind and (t.ids[end] in pads) == is_pad:
      end += 1
    text = words.decode(t.ids[i:end])
    if is_pad:
      text = f"[picture: {end - i:,} tokens]"
    css = f' class="{kind}"' if kind else ""
    out.append(f"<i{css}>{escape(text[:left])}</i>")
    left -= len(text)
    i = end
  more = f" … {len(t.ids) - i:,} more tokens" if i < len(t.ids) else ""
  return f'<div class="masks" tabindex="0">{"".join(out)}{more}</div>'


def _kind(t: Trajectory, i: int) -> str:
  if t.weight[i]:
    return "learned"
  return "own" if t.sampled[i] else ""
