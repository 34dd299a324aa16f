"""What a teacher is asked, and what is taken from its replies.

Three questions, as in the paper (2.3): look at the whole input, look at the cue, and,
where a seed has no cue, propose one.  The teacher does not see the answer: it must find
it in the cue by itself, which `checks.py` compares with the gold one.

A reply is a stranger's text.  It must be one JSON object with the fields asked for, of
the right types and sizes, and no field may hold what a prompt is built of (control
tokens, calls, boxes); else it is `Malformed` and is asked for again.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from pixel_jax import answers
from pixel_jax.chat import tools
from pixel_jax.synthesis.teacher import Request
from pixel_jax.trajectory import Task

SYSTEM = (
  "You write training data for a model that looks closely at pictures. Be factual and "
  "brief, in plain prose without lists or markup. Reply with one JSON object and nothing "
  "else."
)
WHOLE = """Question about {what}: {question}

You see all of it. In two to four sentences, say what it shows and {where}. Do not \
answer the question and do not guess: what decides it is too small or too short to be \
made out here.

{{"analysis": "...", "query": "what must be looked at closely, a short noun phrase such \
as: the sign above the door"}}"""
CUE = """Question about {what}: {question}

You see only {part}. In one to three sentences, say what it shows that settles the \
question. Then give the answer{form}.

{{"analysis": "...", "answer": "..."}}"""
PROPOSE = {
  "image": """Find a small detail of this picture that can only be made out by zooming \
in: a box of at most a quarter of the picture. Write a question about it that names what \
is asked about, has one right answer out of four, and cannot be answered from the rest \
of the picture or from what is usual. Coordinates are fractions of width and height.

{{"valid": true, "bbox_2d": [x1, y1, x2, y2], "question": "...", "options": ["...", \
"...", "...", "..."], "answer": the number of the right option, 1 to 4}}

If the picture has too little in it for such a question: {{"valid": false}}""",
  "video": """These are the {count} frames of a video, numbered from 1. Find a detail \
that only a few of them show: at most {most} frames. Write a question about it that has \
one right answer out of four, and cannot be answered from the other frames or from what \
is usual.

{{"valid": true, "target_frames": [...], "question": "...", "options": ["...", "...", \
"...", "..."], "answer": the number of the right option, 1 to 4}}

If the video has too little in it for such a question: {{"valid": false}}""",
}
LETTERS = "ABCD"
MOST_FRAMES = 8
ANALYSIS = (10, 2000)  # characters
QUERY = (2, 150)
OPTION = (1, 200)
QUESTION = (10, 600)
# Of the protocol, in any spelling that a tokenizer or a loader could take for the real.
PROTOCOL = re.compile(
  r"<\|[^|<>]*\|>|</?\s*(?:tool_call|tools|image|video|answer|think)\s*/?>|\\boxed",
  re.IGNORECASE,
)


class Malformed(ValueError):
  """A reply that is not what was asked for."""


class NotValid(ValueError):
  """The teacher says that nothing can be made of this picture or clip."""


# ---- Questions -----------------------------------------------------------------------


def whole(task: Task, pictures: Sequence[Image.Image], *, place: bool) -> Request:
  """Asks for the analysis of the whole input.

  Args:
    place: whether it may say where to look; not before an operation that goes wrong.
  """
  where = (
    "where in it to look for the answer"
    if place
    else ("what the answer depends on, but not where that is")
  )
  what = _what(task, len(pictures))
  text = WHOLE.format(what=what, question=task.question, where=where)
  return Request(SYSTEM, text, pictures)


def cue(task: Task, pictures: Sequence[Image.Image]) -> Request:
  """Asks for the analysis of the cue, and for the answer."""
  part = "the part of it that was zoomed in on"
  if "target_frames" in task.reference:
    numbers = ", ".join(map(str, task.reference["target_frames"]))
    part = f"its frames {numbers}"
  gold = task.answer if isinstance(task.answer, str) else task.answer[0]
  form = " by its letter" if re.fullmatch("[A-H]", gold) else ", as short as can be"
  what = _what(task, 0)
  text = CUE.format(what=what, question=task.question, part=part, form=form)
  return Request(SYSTEM, text, pictures)


def propose(task: Task, pictures: Sequence[Image.Image]) -> Request:
  """Asks for a cue, a question about it and four options."""
  most = max(1, min(MOST_FRAMES, len(pictures) // 2))
  text = PROPOSE[task.media[0].kind].format(count=len(pictures), most=most)
  return Request(SYSTEM, text, pictures)


def _what(task: Task, count: int) -> str:
  if task.media[0].kind == "video":
    return (
      f"a video, of which these are {count} frames in order" if count else "a video"
    )
  return "a picture" if len(task.media) == 1 else f"{len(task.media)} pictures"


# ---- Replies -------------------------------------------------------------------------


def analysis_and_query(text: str | None) -> tuple[str, str]:
  """The reply to `whole`."""
  d = parse(text)
  query = prose(d, "query", QUERY).rstrip(".").strip()
  return prose(d, "analysis", ANALYSIS), " ".join(query.split())


def analysis_and_answer(text: str | None) -> tuple[str, str]:
  """The reply to `cue`."""
  d = parse(text)
  if isinstance(d.get("answer"), int) and not isinstance(d["answer"], bool):
    d["answer"] = str(d["answer"])  # a count is a number in JSON
  return prose(d, "analysis", ANALYSIS), prose(d, "answer", (1, 500))


def proposal(
  text: str | None, task: Task, frames: int, rng: np.random.Generator
) -> Task:
  """The task of a reply to `propose`, its options in an order by chance.

  Teachers favour a place for the right option; a student would learn the place.
  """
  d = parse(text)
  if d.get("valid") is False:
    raise NotValid("the teacher answers that the input is not valid")
  if d.get("valid") is not True:
    raise Malformed(f'"valid" is {_short(d.get("valid"))}; expected true or false')
  question, options = prose(d, "question", QUESTION), d.get("options")
  if not isinstance(options, list) or len(options) != len(LETTERS):
    raise Malformed(f'"options" is {_short(options)}; expected 4 texts')
  options = [prose({"option": o}, "option", OPTION) for o in options]
  if len({answers.words(o) for o in options}) < len(options):
    raise Malformed(f"two of the options {_short(options)} are the same")
  right = d.get("answer")
  if not _is_int(right) or not 1 <= right <= len(LETTERS):
    raise Malformed(f'"answer" is {_short(right)}; expected 1 to 4')
  order = rng.permutation(len(options)).tolist()
  listed = "\n".join(f"{a}. {options[i]}" for a, i in zip(LETTERS, order))
  return dataclasses.replace(
    task,
    question=f"{question}\n{listed}",
    answer=LETTERS[order.index(right - 1)],
    reference=_place(d, task, frames),
  )


def _place(d: dict, task: Task, frames: int) -> dict[str, Any]:
  if task.media[0].kind == "video":
    numbers = d.get("target_frames")
    most = max(1, min(MOST_FRAMES, frames // 2))
    if not isinstance(numbers, list) or not 1 <= len(numbers) <= most:
      raise Malformed(f'"target_frames" is {_short(numbers)}; expected 1 to {most}')
    if not all(_is_int(n) and 1 <= n <= frames for n in numbers):
      raise Malformed(
        f'"target_frames" is {_short(numbers)}; there are {frames} frames'
      )
    return {"kind": "video", "target_frames": sorted(set(numbers))}
  box = d.get("bbox_2d")
  numeric = isinstance(box, list) and len(box) == 4
  if not numeric or not all(_is_number(v) and 0 <= v <= 1 for v in box):
    raise Malformed(f'"bbox_2d" is {_short(box)}; expected 4 fractions of the picture')
  if not (box[0] < box[2] and box[1] < box[3]):
    raise Malformed(f'"bbox_2d" is {_short(box)}; expected x1 < x2 and y1 < y2')
  return {"kind": "image", "bbox_2d": [float(v) for v in box]}


def parse(text: str | None) -> dict[str, Any]:
  """The JSON object of a reply; fences and a box around it are forgiven."""
  if text is None:
    raise Malformed("the reply has no text, or far too much")
  body = text.strip()
  if body.startswith("\\boxed"):  # as our own checkpoints answer
    body = answers.boxed(body) or body
  start, end = body.find("{"), body.rfind("}")
  if not 0 <= start < end:
    raise Malformed(f"no JSON object in the reply {_short(text)}")
  try:
    d = tools.loads(body[start : end + 1])
  except (ValueError, RecursionError) as error:
    raise Malformed(f"the reply is no JSON object: {error}") from error
  if not isinstance(d, dict):
    raise Malformed(f"the reply is a {type(d).__name__}; expected a JSON object")
  return d


def prose(d: dict, key: str, limits: tuple[int, int]) -> str:
  """A field that is text, of so many characters, without a word of the protocol."""
  text = d.get(key)
  if not isinstance(text, str):
    raise Malformed(f'"{key}" is {_short(text)}; expected a text')
  text = text.strip()
  if not limits[0] <= len(text) <= limits[1]:
    raise Malformed(
      f'"{key}" has {len(text)} characters; allowed are {limits[0]} to {limits[1]}'
    )
  found = PROTOCOL.search(text)
  if found:
    raise Malformed(f'"{key}" holds {found[0]!r}, which belongs to the protocol')
  if any(ord(c) < 32 and c not in "\n\t" for c in text):
    raise Malformed(f'"{key}" holds a control character')
  return text


def _is_int(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 80 else text[:77] + "..."
