"""The demo's page: a form beside the answers that it gets.  Its events are `demo.py`'s."""

import dataclasses
import json
from collections.abc import Sequence

from PIL import Image

from pixel_jax.trajectory import Trajectory
from pixel_jax.view import page as pages
from pixel_jax.view import trajectory as view
from pixel_jax.view.pictures import LoadMedia, data_uri
from pixel_jax.view.text import escape

SCRIPT = pages.script("common.js", "demo.js")
STYLE = pages.asset("demo.css")


@dataclasses.dataclass(frozen=True)
class Example:
  """A question that is asked by one click."""

  name: str
  question: str
  answer: str
  frames: Sequence[Image.Image]  # one of a picture, several of a clip


def page(policies: Sequence[str], examples: Sequence[Example]) -> str:
  """The page.

  Args:
    policies: names of those that answer every question, side by side.
  """
  cards = "".join(map(_example, examples))
  known = json.dumps({"policies": list(policies)}).replace("<", "\\u003c")
  names = " and ".join(f"<b>{escape(name)}</b>" for name in policies)
  verb = "answers" if len(policies) == 1 else "answer"
  return pages.document(
    "Pixel Reasoner: ask",
    f"""<main class="demo">
<h1>Ask what needs a closer look</h1>
<p class="lede">{names} {verb}. The model sees your picture small, as all of its kind do;
then it may cut a region out of the original, or pick frames of a clip, and look again.</p>
<div class="desk">
<form id="ask">
<div class="drop" id="drop">
<label class="choose" for="files">Choose pictures or a clip</label>
<input type="file" id="files" multiple accept="image/*,video/*">
<span>or drop them here, or paste</span></div>
<ul class="shown" id="shown" aria-label="what is asked about"></ul>
<label for="question">Question</label>
<textarea id="question" rows="3" placeholder="What does the small sign say?"></textarea>
<p class="row"><button type="submit" id="go">Ask</button>
<button type="button" id="stop" disabled>Stop</button>
<label class="switch"><input type="checkbox" id="blind"> without looking closer</label></p>
<p id="told" role="status"></p>
<details class="more"><summary>Sampling</summary><div class="fields">
<label>temperature <input id="temperature" type="number" min="0" max="2" step="0.1"
 value="0"></label>
<label>top-p <input id="top_p" type="number" min="0.01" max="1" step="0.01"
 value="1"></label>
<label>seed <input id="seed" type="number" min="0" step="1" placeholder="another"></label>
</div><p class="note">At temperature 0 the likeliest token is taken every time, and the same
question has the same answer.</p></details>
<h2 id="try">Try one of these</h2>
<ul class="examples" aria-labelledby="try">{cards}</ul>
<p class="note">Scenes of the tiny world, held out from training. Which letter is on the red
panel? The hard ones are three pixels wide at first sight.</p>
</form>
<section id="answers" aria-label="answers" tabindex="-1"><p class="empty" id="empty">Answers
will stand here, with every look on the way.</p></section>
</div>
<footer>Pictures stay in this server's memory for as long as an answer's link opens; nothing
is written to disk. pixel_jax: Pixel Reasoner in JAX.</footer>
</main>
<script type="application/json" id="known">{known}</script>
<script src="/demo.js"></script>
""",
    style=STYLE,
    script="",
  )


def _example(example: Example) -> str:
  frames = example.frames[:: max(1, len(example.frames) // 4)][:4]
  pictures = "".join(f'<img src="{data_uri(f)}" alt="">' for f in frames)
  kind = "a clip" if len(example.frames) > 1 else "a picture"
  return (
    f'<li><button type="button" class="example" data-name="{escape(example.name)}" '
    f'data-answer="{escape(example.answer)}" data-question="{escape(example.question)}">'
    f'<span class="thumbs n{len(frames)}">{pictures}</span>'
    f"<span>{kind}</span></button></li>"
  )


def whole(trajectory: Trajectory, load_media: LoadMedia, codec) -> str:
  """The page of one answer: it needs no server, so that it can be saved."""
  turns = view.render_turns(trajectory, load_media, codec=codec, store=None)
  stop = escape(view.STOPS.get(trajectory.stop, trajectory.stop))
  said = escape(view.answer_of(trajectory)) or "—"
  return pages.document(
    "Pixel Reasoner: a trajectory",
    f"""<main>
<h1>{escape(trajectory.task.question[:200])}</h1>
<article class="trajectory"><p class="facts"><span>said <b>{said}</b></span>
<span>{stop}</span><span>{trajectory.ops_attempted} operations</span>
<span>{sum(trajectory.sampled)} tokens sampled</span></p>{turns}</article>
<footer>pixel_jax: Pixel Reasoner in JAX. This page needs no network: save it to keep
it.</footer>
</main>
""",
    script="",
  )


def gone(told: str) -> str:
  return pages.document(
    "Pixel Reasoner", f"<main><h1>Gone</h1><p>{escape(told)}</p></main>", script=""
  )
