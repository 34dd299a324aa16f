"""The protocol of the visual operations: how they are told, called and answered.

Two profiles.  "released" is byte for byte what the published Pixel Reasoner checkpoints
were trained with, its slips included (a hint that names another tool, frame numbers one
off, four newlines).  "clean", our default, says the same with one name for each
operation, numbers that match `target_image`, and 1.0 as a legal coordinate.

Nothing here raises on what the model wrote: a call that cannot be run becomes an
`OpError`, and the model reads why.  For that both profiles deviate from the released
code in what is no call of anyone: NaN, Infinity, numbers beyond 64 bits and more than
64 brackets are bad JSON, and an error's text has an end.

  text --parse_call--> Call --run_call--> Observation(text, images)
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from pixel_jax.chat import template
from pixel_jax.pixels import image as image_lib
from pixel_jax.pixels import ops

PROFILES = ("released", "clean")
OPERATIONS = ("crop_image_normalized", "select_frames")
OPEN, CLOSE = "<tool_call>", "</tool_call>"
# More brackets than any call needs: deeper JSON would exhaust a parser's stack.
MAX_BRACKETS = 64
# An error echoes what the model wrote; a long echo would fill its context.
MAX_ERROR = 1000

BOX = {
  "released": (
    "coordinates for bounding box of the area you want to zoom in. Values should be "
    "within [0.0,1.0]."
  ),
  "clean": (
    "[x1, y1, x2, y2] of the area you want to zoom in, relative to the width and "
    "height of the image. Values should be within [0.0,1.0]."
  ),
}
TARGET = {
  "released": (
    "The index of the image to crop. Index from 1 to the number of images. Choose 1 to "
    "operate on original image."
  ),
  "clean": (
    "The index of the image to crop. Images are numbered from 1 in the order in which "
    "they were shown; each frame of a video is one image."
  ),
}
FRAME = {
  "released": "Frame index from 1 to 16.",
  "clean": "Frame index from 1 to the number of frames.",
}
TOOLS = """

# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{signatures}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""
GUIDELINES = (
  "Guidelines: Understand the given visual information and the user query. "
  "Determine if it is beneficial to employ the given visual operations (tools). "
  "For a video, we can look closer by `select_frames`. "
  "For an image, we can look closer by `{crop}`. "
  "Reason with the visual information step by step, and put your final answer within "
  "\\boxed{{}}."
)


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
  """An operation of yours beside the two: what the model is told, and what is run.

  Attributes:
    name: of the function that the model calls.
    description: what it is good for, as the model reads it in the system prompt.
    properties: the arguments as JSON schema, {"angle": {"type": "number", ...}}; all are
      required.  Nobody checks what the model writes against it but `run`.
    run: a pure function (seen, arguments) -> pictures, or an `ops.OpError` that the model
      reads.  The same arguments give the same pixels, so that a trajectory can be
      redrawn.  What it raises becomes an error of the kind "failed".
    role: whose pixel budget the pictures get, "crop" or "frame".
  """

  name: str
  description: str
  properties: dict[str, dict]
  run: Callable[[ops.Seen, Any], list[Image.Image] | ops.OpError]
  role: str = "crop"


@dataclasses.dataclass(frozen=True)
class Call:
  """One attempt at an operation.  `error` says why it cannot even be tried."""

  name: str  # "" where none could be read
  arguments: Any  # parsed JSON; the raw text where it does not parse
  error: ops.OpError | None = None


@dataclasses.dataclass(frozen=True)
class Observation:
  """What the user turn after a call says and shows."""

  text: str
  images: Sequence[Image.Image] = ()  # as cut from the source, for further crops
  views: Sequence[Image.Image] = ()  # the same, resized to what is shown
  role: str = "crop"  # pixel budget: "crop" or "frame"
  error: ops.OpError | None = None
  call: int = -1  # index in the trajectory's calls


@functools.cache
def system_prompt(
  profile: str, tools: bool = True, operations: tuple[Operation, ...] = ()
) -> str:
  """The system turn; with `tools` it declares the two operations, and yours."""
  check_profile(profile)
  if not tools:
    return template.SYSTEM
  crop = {
    "bbox_2d": {
      "type": "array",
      "description": BOX[profile],
      "items": {"type": "number"},
    },
    "target_image": {"type": "number", "description": TARGET[profile]},
  }
  frames = {
    "target_frames": {
      "type": "array",
      "description": "List of frame indices to select from the video (no more than 8 "
      "frames in total).",
      "items": {"type": "integer", "description": FRAME[profile]},
    }
  }
  signatures = (
    _signature(
      "crop_image_normalized",
      "Zoom in on the image based on the bounding box coordinates. It is useful when "
      "the object or text in the image is too small to be seen.",
      crop,
    ),
    _signature("select_frames", "Select frames from a video.", frames),
    *(_signature(o.name, o.description, o.properties) for o in operations),
  )
  return template.SYSTEM + TOOLS.format(signatures="\n".join(signatures))


def _signature(name: str, description: str, properties: dict) -> str:
  parameters = {
    "type": "object",
    "properties": properties,
    "required": list(properties),
  }
  function = {"name": name, "description": description, "parameters": parameters}
  return json.dumps({"type": "function", "function": function}, ensure_ascii=False)


@functools.cache
def user_suffix(profile: str, tools: bool = True) -> str:
  """What follows the question."""
  check_profile(profile)
  if not tools:
    return "\n\nPlease think step by step, and put your final answer within \\boxed{}."
  if profile == "released":
    return "\n\n\n\n" + GUIDELINES.format(crop="crop_image")
  return "\n\n" + GUIDELINES.format(crop="crop_image_normalized")


def call_text(name: str, arguments: dict) -> str:
  """A call as the policy should write it."""
  call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
  return f"{OPEN}\n{call}\n{CLOSE}"


def parse_call(
  text: str, profile: str, known: Sequence[str] = OPERATIONS
) -> Call | None:
  """The call at the end of an assistant's turn; None when the turn is an answer.

  As released, a turn calls only if it ends exactly with `</tool_call>` ("clean"
  forgives white space behind it), and the last `<tool_call>` of the turn counts.

  Args:
    known: the names of the operations that there are.
  """
  check_profile(profile)
  text = template.without_end(text).replace(template.END, "")
  if profile == "clean":
    text = text.rstrip()
  if not text.endswith(CLOSE):
    return None
  raw = text.rsplit(OPEN, 1)[-1].split(CLOSE, 1)[0]
  try:
    call = loads(raw)
  except ValueError as error:
    return Call("", _clean_text(raw), ops.OpError("bad_json", str(error)))
  if profile == "released":  # its error texts are those of Python
    try:
      name, arguments = call["name"], call["arguments"]
      found = isinstance(name, str) and name in known
      error = None if found else ops.OpError("unknown_operation", repr(name))
    except (KeyError, TypeError) as e:
      name, arguments, error = "", call, ops.OpError("bad_arguments", str(e))
    return Call(name if isinstance(name, str) else "", arguments, error)
  if not isinstance(call, dict) or not {"name", "arguments"} <= call.keys():
    wanted = (
      'The call must be {"name": <function-name>, "arguments": <args-json-object>}.'
    )
    return Call("", call, ops.OpError("bad_arguments", wanted))
  name, arguments = call["name"], call["arguments"]
  if not isinstance(name, str) or name not in known:
    wanted = f"Unknown function {json.dumps(name)}. Use one of {', '.join(known)}."
    error = ops.OpError("unknown_operation", wanted)
    return Call(name if isinstance(name, str) else "", arguments, error)
  return Call(name, arguments)


def run_call(
  call: Call,
  seen: ops.Seen,
  profile: str,
  *,
  shrink: Callable[[Image.Image, str], Image.Image],
  source: str = "original",
  operations: Sequence[Operation] = (),
) -> Observation:
  """Runs `call` on what was seen.  `shrink(image, role)` makes the view shown."""
  own = next((o for o in operations if o.name == call.name), None)
  role = "frame" if call.name == "select_frames" else own.role if own else "crop"
  result = call.error
  if result is None and own is not None:
    result = _run_own(own, seen, call.arguments)
  elif result is None and call.name == "select_frames":
    result = ops.select_frames(seen, call.arguments, profile=profile)
  elif result is None:
    result = ops.crop_image_normalized(
      seen, call.arguments, profile=profile, source=source
    )
  if isinstance(result, ops.OpError):
    text = f"\nExecution error:\n{_clean_text(result.text)[:MAX_ERROR]}\n"
    return Observation(text, role=role, error=result)
  views = [shrink(image, role) for image in result]
  width, height = views[0].size
  if own is not None:
    first = number_of_next(seen, profile)
    text = (
      f"\nHere is what {own.name} returned (Image Size: {width}x{height}, "
      f"Numbered {first} to {first + len(views) - 1}):"
    )
  elif role == "crop":
    text = f"\nHere is the cropped image (Image Size: {width}x{height}):"
  else:
    first = number_of_next(seen, profile)
    text = (
      f"\nHere are the selected frames (Frame Size: {width}x{height}, "
      f"Numbered {first} to {first + len(views) - 1}):"
    )
  return Observation(text, images=result, views=views, role=role)


def _run_own(
  operation: Operation, seen: ops.Seen, arguments: Any
) -> list[Image.Image] | ops.OpError:
  """Pictures or an error, whatever it returns or raises: the arguments are the model's."""
  try:  # a generator, or a picture that is not read yet, raises later than `run`
    result = operation.run(seen, arguments)
    if isinstance(result, ops.OpError):
      return result
    pictures = list(result or ())
    if not pictures or not all(isinstance(p, Image.Image) for p in pictures):
      return ops.OpError("failed", f"{operation.name} returned no pictures.")
    pictures = [p.convert("RGB") for p in pictures]
  except Exception as error:
    return ops.OpError("failed", f"{type(error).__name__}: {error}")
  if any(max(p.size) > image_lib.MAX_ASPECT * min(p.size) for p in pictures):
    return ops.OpError("too_narrow", f"{operation.name} returned too narrow a picture.")
  return pictures


def number_of_next(seen: ops.Seen, profile: str) -> int:
  """The number that is told for the next picture.

  "released" tells the count of pictures so far, a video counting as one: that is one
  less than the `target_image` that works.
  """
  if profile == "released":
    return len(seen.pictures)
  return 1 + len(ops.flat(seen))


def check_profile(profile: str) -> None:
  if profile not in PROFILES:
    raise ValueError(f"{profile=}: unknown; allowed are {', '.join(PROFILES)}")


def loads(raw: str) -> Any:
  """JSON of bounded depth with finite numbers and no lone surrogates, or ValueError."""
  if raw.count("[") + raw.count("{") > MAX_BRACKETS:
    raise ValueError("the JSON is nested too deeply")
  call = json.loads(
    raw, parse_float=_finite, parse_int=_short, parse_constant=_refuse_constant
  )
  if "\\u" in raw:
    # "\ud800" alone has no UTF-8, so it could be neither shown nor stored.
    call = json.loads(_clean_text(json.dumps(call, ensure_ascii=False)))
  return call


def _finite(digits: str) -> float:
  number = float(digits)
  if not math.isfinite(number):
    raise ValueError(f"the number {digits[:20]} is too large")
  return number


def _short(digits: str) -> int:
  if len(digits) > 18:  # within 64 bits, so that no later arithmetic overflows
    raise ValueError(f"the number {digits[:20]}... is too large")
  return int(digits)


def _refuse_constant(name: str) -> float:
  raise ValueError(f"{name} is not a JSON number")


def _clean_text(text: str) -> str:
  return text.encode("utf-8", "replace").decode()
