"""Visual operations: pure functions (what was seen, arguments) -> pictures | OpError.

Not the parsing of a call, not the text around a result (`chat/tools.py`).  `arguments`
is whatever JSON the model wrote: nothing in it is evaluated, repeated or printed at
length, and nothing in it can raise; what is wrong comes back as an `OpError` whose text
the model reads and whose kind is counted.

Profile "clean" (ours).  Pictures have flat numbers: those of the question first, a clip
counting as its N frames, then every picture an operation returned.  `target_image` and
`target_frames` use the same numbers.  Coordinates lie in [0, 1], 1.0 included, and
exactly that box is cut.

Profile "released" (what the published checkpoints know; texts and quirks of the
released code, TIGER-AI-Lab/Pixel-Reasoner a3a6c3a, experience_maker.py 150-170 and
1171-1242).  A clip counts as one picture; before anything is returned `target_image`
picks a frame of the clip, afterwards 2..len; any coordinate of 1 or more turns the
whole box into pixels; 0.1 is added on every side; 0 and negative numbers wrap.
Deviations, all for the safety of a run: texts are cut at 400 characters, and an empty
`target_frames` always answers with the sentence of Python 3.11 and before.
"""

import dataclasses
import math
from typing import Any, Literal

from PIL import Image

from pixel_jax.pixels import image as image_lib

Profile = Literal["clean", "released"]
Source = Literal["original", "view"]

MAX_FRAMES = 8  # a call of select_frames
MIN_SIDE = 14  # clean: pixels of the source, one patch
RELEASED_MIN_SIDE = 29  # the released code asserts > 28
RELEASED_PADDING = 0.1  # of width and height, on every side
MAX_TEXT = 400  # characters; the longest regular released text has about 230


def padding(profile: Profile) -> float:
  """What a crop is given on every side, as a share of width and height."""
  return RELEASED_PADDING if profile == "released" else 0.0


@dataclasses.dataclass(frozen=True)
class OpError:
  """Why an operation failed.  It is a value; operations raise nothing."""

  kind: str  # stable slug, counted: bad_arguments, bad_target, too_small, ...
  text: str  # what the model reads


@dataclasses.dataclass
class Picture:
  """One picture or clip as the file has it, and as the model was shown it."""

  kind: str  # "image" or "video"
  source: Image.Image | list[Image.Image]  # original resolution
  view: Image.Image | list[Image.Image]  # resized to the budget of its role


@dataclasses.dataclass
class Seen:
  """The pictures of the question, then those that calls returned, in order."""

  pictures: list[Picture] = dataclasses.field(default_factory=list)


# Clean texts are few and constant, so that a small tokenizer can hold them whole.
CLEAN_TEXTS = {
  "bad_arguments/object": "The arguments must be a JSON object.",
  "bad_arguments/box": (
    "`bbox_2d` must be a list of 4 numbers [x1, y1, x2, y2] within [0.0,1.0]."
  ),
  "out_of_range/box": (
    "`bbox_2d` is out of range. Each of its 4 numbers must be within [0.0,1.0]."
  ),
  "bad_target": (
    "There are {n} images numbered in range [1,{n}]. `target_image` must be one of"
    " them."
  ),
  "too_small": (
    "The box is empty or too small. It needs x1 < x2, y1 < y2, and {min} or more pixels"
    " on each side. Choose a larger box."
  ),
  "too_narrow": (
    "The box is too narrow. One side may be at most {max} times the other. Choose a"
    " squarer box."
  ),
  "not_a_video": (
    "There is no video to select frames from. Use `crop_image_normalized` to look at an"
    " image."
  ),
  "bad_arguments/frames": (
    "`target_frames` must be a list of 1 to {max} integers, the numbers of frames."
  ),
  "too_many_frames": (
    "You have selected too many frames. Choose at most {max} frames in one call."
  ),
  "out_of_range/frames": (
    "There are frames numbered in range [{first},{last}]. Choose `target_frames` among"
    " them."
  ),
}


def _clean_error(name: str, **values: int) -> OpError:
  return OpError(name.split("/")[0], CLEAN_TEXTS[name].format(**values))


# ---- What was seen -------------------------------------------------------------------


def flat(seen: Seen, source: Source = "original") -> list[Image.Image]:
  """Every picture under its clean number, minus 1; a clip counts as its frames."""
  pictures = []
  for picture in seen.pictures:
    pixels = _pixels(picture, source)
    pictures.extend(pixels if picture.kind == "video" else [pixels])
  return pictures


def _pixels(picture: Picture, source: Source):
  return picture.source if source == "original" else picture.view


def _is_video(seen: Seen) -> bool:
  return bool(seen.pictures) and seen.pictures[0].kind == "video"


# ---- crop_image_normalized -----------------------------------------------------------


def crop_image_normalized(
  seen: Seen, arguments: Any, *, profile: Profile, source: Source = "original"
) -> list[Image.Image] | OpError:
  """Zooms in: the box `bbox_2d` of picture `target_image`, as a list of one picture."""
  if profile == "released":
    return _released(_released_crop, seen, arguments, source)
  return _clean_crop(seen, arguments, source)


def _clean_crop(seen, arguments, source) -> list[Image.Image] | OpError:
  if not isinstance(arguments, dict):
    return _clean_error("bad_arguments/object")
  box = arguments.get("bbox_2d")
  if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))):
    return _clean_error("bad_arguments/box")
  if not all(0 <= value <= 1 for value in box):  # NaN fails too
    return _clean_error("out_of_range/box")
  pictures = flat(seen, source)
  target = _whole(arguments.get("target_image"))
  if target is None or not 1 <= target <= len(pictures):
    return _clean_error("bad_target", n=len(pictures))
  picture = pictures[target - 1]
  width, height = picture.size
  pixels = [round(v * n) for v, n in zip(box, (width, height, width, height))]
  w, h = pixels[2] - pixels[0], pixels[3] - pixels[1]
  if min(w, h) < MIN_SIDE:
    return _clean_error("too_small", min=MIN_SIDE)
  if max(w, h) > image_lib.MAX_ASPECT * min(w, h):
    return _clean_error("too_narrow", max=image_lib.MAX_ASPECT)
  return [picture.crop(pixels)]


def _released_crop(seen, arguments, source) -> list[Image.Image]:
  """The released rules on the released types: what Python raises is what it said."""
  target = arguments["target_image"]
  index = target - 1
  wrong = (
    "Execution Error: Incorrect `target_image` argument in `crop_image_normalized`"
    " operation. You can only pick an image"
  )
  given = f", but the current argument `target_image={target}`."
  if _is_video(seen) and len(seen.pictures) == 1:
    picture = seen.pictures[0]
    num = len(picture.view)
    if not index < num:
      raise _Refused(
        "bad_target", f"{wrong} **from** the video within [1,{num}]{given}"
      )
    view, cut = picture.view[index], _pixels(picture, source)[index]
  else:
    num = len(seen.pictures)
    if _is_video(seen) and not index >= 1:
      raise _Refused("bad_target", f"{wrong} within range [2,{num}]{given}")
    if not _is_video(seen) and not index < num:
      raise _Refused("bad_target", f"{wrong} within [1,{num}]")
    picture = seen.pictures[index]
    view, cut = picture.view, _pixels(picture, source)

  box = arguments["bbox_2d"]
  # Pixel coordinates are those of the picture as the model was shown it.
  scale = (1, 1) if all(box[i] < 1 for i in range(4)) else view.size
  left, top, right, bottom = (
    # min(max(0, nan), 1) is 0 in Python, in this order.
    min(max(0, float(box[i]) / scale[i % 2] + pad), 1) * cut.size[i % 2]
    for i, pad in enumerate([-RELEASED_PADDING] * 2 + [RELEASED_PADDING] * 2)
  )
  # PIL rounds a float box, and refuses a reversed one by these texts.
  if right < left:
    raise _Refused("too_small", "Coordinate 'right' is less than 'left'")
  if bottom < top:
    raise _Refused("too_small", "Coordinate 'lower' is less than 'upper'")
  pixels = [round(v) for v in (left, top, right, bottom)]
  w, h = pixels[2] - pixels[0], pixels[3] - pixels[1]
  if min(w, h) < RELEASED_MIN_SIDE:
    raise _Refused("too_small", f"Cropped image is too small: {w}x{h}")
  if max(w, h) / min(w, h) > image_lib.MAX_ASPECT:
    raise _Refused(
      "too_narrow",
      f"absolute aspect ratio must be smaller than {image_lib.MAX_ASPECT},"
      f" got {max(w, h) / min(w, h)}",
    )
  return [cut.crop(pixels)]


# ---- select_frames -------------------------------------------------------------------


def select_frames(
  seen: Seen, arguments: Any, *, profile: Profile, source: Source = "original"
) -> list[Image.Image] | OpError:
  """Looks closer at 1 to 8 frames of the clip, in the order asked for."""
  if profile == "released":
    return _released(_released_frames, seen, arguments, source)
  return _clean_frames(seen, arguments, source)


def _clean_frames(seen, arguments, source) -> list[Image.Image] | OpError:
  frames, before = None, 0
  for picture in seen.pictures:
    if picture.kind == "video":
      frames = _pixels(picture, source)
      break
    before += 1
  if frames is None:
    return _clean_error("not_a_video")
  if not isinstance(arguments, dict):
    return _clean_error("bad_arguments/object")
  targets = arguments.get("target_frames")
  if not isinstance(targets, list) or not targets:
    return _clean_error("bad_arguments/frames", max=MAX_FRAMES)
  if len(targets) > MAX_FRAMES:
    return _clean_error("too_many_frames", max=MAX_FRAMES)
  targets = [_whole(target) for target in targets]
  if None in targets:
    return _clean_error("bad_arguments/frames", max=MAX_FRAMES)
  first, last = before + 1, before + len(frames)
  if not all(first <= target <= last for target in targets):
    return _clean_error("out_of_range/frames", first=first, last=last)
  return [frames[target - first] for target in targets]


def _released_frames(seen, arguments, source) -> list[Image.Image]:
  if not _is_video(seen):
    raise _Refused(
      "not_a_video",
      "Execution Error: You attempted to `select_frames` from **image** not **video**."
      " You should use `crop_image_normalized` instead for inspecting **image**.",
    )
  targets = arguments["target_frames"]
  if len(targets) > MAX_FRAMES:
    raise _Refused(
      "too_many_frames",
      f"Execution Error: You have selected {len(targets)} frames in total. Think again"
      " which frames you need to check in details (no more than 8 frames)",
    )
  if len(targets) == 0:  # Python 3.12 says it in other words
    raise _Refused("bad_arguments", "max() arg is an empty sequence")
  frames = _pixels(seen.pictures[0], source)
  if max(targets) > len(frames):
    raise _Refused(
      "out_of_range",
      f"Execution Error: There are {len(frames)} frames numbered in range"
      f" [1,{len(frames)}]. Your selection `target_frames={targets}` is out of range.",
    )
  return [frames[index] for index in [target - 1 for target in targets]]


# ---- Hostile values ------------------------------------------------------------------


class _Refused(Exception):
  def __init__(self, kind: str, text: str):
    super().__init__(text)
    self.kind = kind


def _released(operation, seen, arguments, source) -> list[Image.Image] | OpError:
  # The released code turns *any* exception into a turn that quotes it (EM:2319-2332).
  try:
    return operation(seen, arguments, source)
  except _Refused as e:
    return OpError(e.kind, _cut(str(e)))
  except Exception as e:
    return OpError("bad_arguments", _cut(str(e)))


def _cut(text: str) -> str:
  return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 3] + "..."


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(value: Any) -> int | None:
  """An integer, also when JSON wrote it as 2.0; None for anything else."""
  if not _is_number(value):
    return None
  if isinstance(value, float):
    return int(value) if math.isfinite(value) and value.is_integer() else None
  return value
