"""The pictures of a trajectory as data URIs, with the boxes of its calls drawn on them.

Not the prose around them (`trajectory.py`).  The crops are redrawn by replaying the
calls on the media; a box is kept in pixels of the picture it was asked of.
"""

import base64
import dataclasses
import hashlib
import io
import math
from collections.abc import Callable
from typing import Any

import PIL.Image

from pixel_jax.chat import encode, tools
from pixel_jax.pixels import ops
from pixel_jax.trajectory import Media, Trajectory
from pixel_jax.view.text import escape

Image = PIL.Image.Image
LoadMedia = Callable[[Media], Any]  # -> PIL image, or what has .frames and .timestamps

WIDEST = 640  # px of a picture on the page; boxes keep the source's coordinates


@dataclasses.dataclass
class Mark:
  """A box on a picture, in pixels of its source."""

  box: tuple[float, float, float, float]
  label: str
  kind: str = "call"  # "call", "error" or "reference"


@dataclasses.dataclass
class Shown:
  """A picture on the page with what was marked on it."""

  image: Image
  name: str
  view: tuple[int, int] = (0, 0)  # size at which the policy saw it
  marks: list[Mark] = dataclasses.field(default_factory=list)
  chosen: list[str] = dataclasses.field(default_factory=list)  # frames: by which calls
  wanted: bool = False  # frames: the reference


def data_uri(image: Image) -> str:
  """A JPEG, shrunk to what the page shows; small pictures keep every pixel (PNG)."""
  image = image.convert("RGB")
  if max(image.size) > WIDEST:
    image = image.copy()
    image.thumbnail((WIDEST, WIDEST))
  buffer = io.BytesIO()
  if image.width * image.height <= 40 * 40:
    image.save(buffer, "PNG", optimize=True)
    kind = "png"
  else:
    # No optimize=True: Pillow's buffer for it is too small for noise.
    image.save(buffer, "JPEG", quality=85, subsampling=0)
    kind = "jpeg"
  return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def img(image: Image, alt: str, store: dict[str, str] | None) -> str:
  """An <img>; with a `store` it names the picture, and the page fills it in."""
  uri = data_uri(image)
  size = f'width="{image.width}" height="{image.height}"'
  if store is None:
    return f'<img {size} alt="{escape(alt)}" src="{uri}">'
  key = hashlib.blake2b(uri.encode(), digest_size=8).hexdigest()
  store[key] = uri
  return f'<img {size} alt="{escape(alt)}" data-picture="{key}">'


def figure(shown: Shown, store, *, css: str = "", caption: str | None = None) -> str:
  """A picture with its boxes: rectangles in source pixels, numbered at their corner."""
  w, h = shown.image.size
  rects, tags = [], []
  for mark in shown.marks:
    x0, y0, x1, y1 = mark.box
    rects.append(
      f'<rect class="{mark.kind}" x="{x0:.2f}" y="{y0:.2f}" '
      f'width="{x1 - x0:.2f}" height="{y1 - y0:.2f}"/>'
    )
    if mark.label:
      left, top = (100 * min(max(v / n, 0), 0.97) for v, n in ((x0, w), (y0, h)))
      # On the box, so that it hides nothing in it; inside where there is no room.
      place = " above" if top > 10 else ""
      tags.append(
        f'<span class="tag {mark.kind}{place}" style="left:{left:.2f}%;top:{top:.2f}%">'
        f"{escape(mark.label)}</span>"
      )
  overlay = (
    f'<svg viewBox="0 0 {w} {h}" preserveAspectRatio="none" aria-hidden="true">'
    f"{''.join(rects)}</svg>"
    if rects
    else ""
  )
  chosen = "".join(f'<span class="tag call">{escape(c)}</span>' for c in shown.chosen)
  if chosen:
    css += " chosen"
  if shown.wanted:
    css += " wanted"
  return (
    f'<figure class="picture {css}"><div class="canvas">'
    f"{img(shown.image, shown.name, store)}{overlay}{''.join(tags)}{chosen}</div>"
    f"<figcaption>{escape(shown.name if caption is None else caption)}</figcaption>"
    "</figure>"
  )


# ---- Replay --------------------------------------------------------------------------


@dataclasses.dataclass
class Replay:
  """The pictures of a trajectory: the question's, and those that each call returned."""

  question: list[list[Shown]]  # one list per media: [image] or the frames
  views: list[list[Image]]  # the same as the policy first saw them
  returned: list[list[Shown]]  # one list per call; [] where it failed


def replay(trajectory: Trajectory, codec, load_media: LoadMedia) -> Replay:
  """Runs the calls again; without a codec only the question's pictures are there.

  As `chat.encode.redraw`, but with pictures to look at instead of patches.
  """
  out = Replay([], [], [[] for _ in trajectory.calls])
  seen, number = ops.Seen(), 0
  task = trajectory.task
  if codec is None:
    loaded = [(m.kind, load_media(m)) for m in task.media]
    pictures = [ops.Picture(k, x.frames if k == "video" else x, []) for k, x in loaded]
  else:
    pictures = [s.picture for s in encode.question_pictures(codec, task, load_media)]
  for picture in pictures:
    film = picture.kind == "video"
    sources = picture.source if film else [picture.source]
    views = (picture.view if film else [picture.view]) if codec else sources
    seen.pictures.append(picture)
    out.views.append(list(views))
    group = []
    for source, view in zip(sources, views):
      number += 1
      group.append(
        Shown(source, f"frame {number}" if film else f"image {number}", view.size)
      )
    out.question.append(group)
  answered = {slot.call for slot in trajectory.slots}
  for i, call in enumerate(trajectory.calls):
    if codec is None or i not in answered:  # it failed, or the conversation ended
      continue
    observation = encode.run(tools.Call(call.name, call.arguments), seen, codec)
    for source, view in zip(observation.images, observation.views):
      number += 1
      out.returned[i].append(Shown(view, f"image {number}", view.size))
      seen.pictures.append(ops.Picture("image", source, view))
  return out


def mark_calls(trajectory: Trajectory, shown: Replay) -> None:
  """Draws every call's box, and the reference, where they belong."""
  images = [s for group in shown.question for s in group]
  video = any(m.kind == "video" for m in trajectory.task.media)
  released = trajectory.profile == "released"
  appended: list[Shown] = []
  for number, call in enumerate(trajectory.calls, 1):
    arguments = call.arguments if isinstance(call.arguments, dict) else {}
    # Numbering (pixel_reasoner.md 1.6): flat; released videos count as one picture as
    # soon as something was appended.
    pictures = images + appended
    if released and video and appended:
      pictures = [None, *appended]
    target = _index(arguments.get("target_image"))
    if target is not None and 1 <= target <= len(pictures):
      picture = pictures[target - 1]
      written = arguments.get("bbox_2d")
      box = picture and box_of(written, picture.image.size, released and picture.view)
      if box:
        kind = "error" if call.error else "call"
        picture.marks.append(Mark(box, str(number), kind))
    frames = arguments.get("target_frames")
    for frame in frames if isinstance(frames, list) and video else []:
      if (frame := _index(frame)) is not None and 1 <= frame <= len(images):
        label = f"{number}!" if call.error else str(number)
        if label not in images[frame - 1].chosen:
          images[frame - 1].chosen.append(label)
    if number <= len(shown.returned):
      appended += shown.returned[number - 1]

  reference = trajectory.task.reference
  target = _index(reference.get("target_image", 1)) or 1
  if reference.get("bbox_2d") and 1 <= target <= len(images):
    picture = images[target - 1]
    if box := box_of(reference["bbox_2d"], picture.image.size):
      picture.marks.append(Mark(box, "", "reference"))
  wanted = reference.get("target_frames")
  for frame in wanted if isinstance(wanted, list) else []:
    if (frame := _index(frame)) is not None and 1 <= frame <= len(images):
      images[frame - 1].wanted = True


def _index(x) -> int | None:
  if isinstance(x, bool) or not isinstance(x, int | float):
    return None
  return int(x) if abs(x) < 1e9 and x == int(x) else None


def box_of(bbox, size, view=None) -> tuple[float, float, float, float] | None:
  """A written box in pixels of a picture of `size`, cut to it; None where it is no box.

  `view`, for the released profile: the size by which a box is divided that is not
  entirely below 1, because it then counts as pixels (pixel_reasoner.md 1.5).  The 0.1
  that the released code adds on every side is not drawn.
  """
  if not isinstance(bbox, list) or len(bbox) != 4:
    return None
  if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in bbox):
    return None
  if not all(math.isfinite(v) and abs(v) < 1e9 for v in bbox):
    return None
  w, h = size
  if view and view[0] and not all(v < 1 for v in bbox):
    w, h = w / view[0], h / view[1]
  xs = sorted(min(max(v * w, 0), size[0]) for v in bbox[::2])
  ys = sorted(min(max(v * h, 0), size[1]) for v in bbox[1::2])
  return xs[0], ys[0], xs[1], ys[1]
