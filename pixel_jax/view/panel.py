"""A trajectory as one picture, for dashboards that show no HTML: what was asked about with
the boxes of its calls, what came back, and a line of words below."""

from collections.abc import Sequence

from absl import logging
from PIL import Image, ImageDraw, ImageFont

from pixel_jax.trajectory import Trajectory
from pixel_jax.view import trajectory as view
from pixel_jax.view.pictures import LoadMedia, Shown, mark_calls, replay

HEIGHT, GAP, MOST = 224, 8, 6  # pixels of a picture, between two; pictures of a panel
PAPER, INK, SOFT = "#fbf9f4", "#24211c", "#69645b"
COLOURS = {"call": "#ff9d00", "error": "#ad3300", "reference": "#00a67a"}
VERDICT = {"correct": "#00694f", "wrong": "#ad3300", "unjudged": SOFT}


def draw(trajectory: Trajectory, load_media: LoadMedia, codec) -> Image.Image:
  """The panel.  Of a clip the frames that were chosen, or are the reference, are shown."""
  shown = replay(trajectory, codec, load_media)
  mark_calls(trajectory, shown)
  asked = [s for group in shown.question for s in group]
  marked = [s for s in asked if s.marks or s.chosen or s.wanted]
  pictures = (marked or asked)[:MOST]
  pictures += [s for call in shown.returned for s in call][: MOST - len(pictures)]
  drawn = [_picture(s) for s in pictures]
  font, small = ImageFont.load_default(17), ImageFont.load_default(14)
  judged, task = view.verdict(trajectory), trajectory.task
  said = f"{judged}: said {view.answer_of(trajectory) or 'nothing'}, "
  said += f"truth {view.truth_of(task)}"
  told = [f"{k} {v:.2f}" for k, v in trajectory.reward.items() if k != "correct"]
  told += [f"advantage {trajectory.advantage:+.2f}"] if trajectory.advantage else []
  lines = [
    (task.question, font, INK), (said, font, VERDICT[judged]),
    (f"{task.id}  {', '.join(told)}", small, SOFT),
  ]  # fmt: skip
  width = max(520, sum(p.width + GAP for p in drawn) + GAP)
  panel = Image.new("RGB", (width, HEIGHT + 2 * GAP + 24 * len(lines) + GAP), PAPER)
  x = GAP
  for picture in drawn:
    panel.paste(picture, (x, GAP))
    x += picture.width + GAP
  pen = ImageDraw.Draw(panel)
  for i, (text, written, colour) in enumerate(lines):
    text = _fitting(text.replace("\n", " "), written, width - 2 * GAP)
    pen.text((GAP, HEIGHT + 2 * GAP + 24 * i), text, fill=colour, font=written)
  return panel


def draw_some(
  played: Sequence[Trajectory], load_media: LoadMedia, codec
) -> dict[str, Image.Image]:
  """A panel of each kind that there is, by name; one that cannot be drawn is left out."""
  out = {}
  for name, t in choose(played).items():
    try:
      out[name] = draw(t, load_media, codec)
    except Exception as error:  # a picture that cannot be had must not end a run
      logging.warning("no panel of %s: %s", t.task.id, error)
  return out


def choose(played: Sequence[Trajectory]) -> dict[str, Trajectory]:
  """One of each kind that there is, by name: looked or not, right or wrong, failed."""
  kinds = {
    "looked_right": lambda t: t.ops_succeeded and view.verdict(t) == "correct",
    "looked_wrong": lambda t: t.ops_succeeded and view.verdict(t) == "wrong",
    "at_once_right": lambda t: not t.calls and view.verdict(t) == "correct",
    "at_once_wrong": lambda t: not t.calls and view.verdict(t) == "wrong",
    "failed": lambda t: t.ops_attempted > t.ops_succeeded,
  }
  found = {name: next(filter(fits, played), None) for name, fits in kinds.items()}
  return {name: t for name, t in found.items() if t is not None}


def _picture(shown: Shown) -> Image.Image:
  """With its boxes; a frame that was chosen has a border."""
  image = shown.image.convert("RGB")
  scale = HEIGHT / image.height
  width = max(1, min(round(image.width * scale), 4 * HEIGHT))
  # Small pictures keep their pixels visible.
  kind = Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BICUBIC
  image = image.resize((width, HEIGHT), kind)
  pen, font = ImageDraw.Draw(image), ImageFont.load_default(13)
  across, down = width / shown.image.width, HEIGHT / shown.image.height
  for mark in shown.marks:
    x0, y0, x1, y1 = (v * s for v, s in zip(mark.box, (across, down) * 2))
    pen.rectangle(
      (x0, y0, max(x0, x1), max(y0, y1)), outline=COLOURS[mark.kind], width=3
    )
    if mark.label:
      top = y0 - 16 if y0 > 18 else y0
      pen.rectangle((x0, top, x0 + 15, top + 16), fill=COLOURS[mark.kind])
      pen.text((x0 + 4, top), mark.label, fill=INK, font=font)
  if shown.chosen or shown.wanted:
    colour = COLOURS["call" if shown.chosen else "reference"]
    pen.rectangle((0, 0, width - 1, HEIGHT - 1), outline=colour, width=5)
  return image


def _fitting(text: str, font, width: float) -> str:
  """The text, cut where it is too long; signs that the font lacks are drawn as boxes."""
  text = text.encode("utf-8", "replace").decode()[:400]
  while text and font.getlength(text) > width:
    text = text[: int(len(text) * 0.95) - 1] + "…" if len(text) > 3 else ""
  return text
