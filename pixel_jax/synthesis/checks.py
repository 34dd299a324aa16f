"""Checks of synthesized traces: which of them would teach the wrong thing, and why.

Each returns None, or (reason, detail); reasons are few and are counted.  The cheap come
first: a seed is looked at before a teacher is asked, the cue before the whole.

  of_seed   large    the cue is most of the picture: there is nothing to zoom in on
            small    the crop of the cue has too few pixels to be read, or is a line
  of_cue    answer   the teacher, shown the cue, answers otherwise
            box      it says that the cue does not show it
  of_whole  leak     the answer stands before the operation that finds it
            box      the text looks in another place, or in other frames

They judge by words, so they err; towards dropping, since a good trace is cheap.  Not
here: malformed replies (`prompts.py`).
"""

import re

from pixel_jax import answers
from pixel_jax.pixels import image
from pixel_jax.synthesis import boxes
from pixel_jax.synthesis.boxes import Box
from pixel_jax.synthesis.templates import Prose
from pixel_jax.trajectory import Task

Found = tuple[str, str] | None

MOST_AREA = 0.5  # of the picture
WORD = re.compile(r"[^\W_]+")
NUMBERS = WORD.findall(
  "zero one two three four five six seven eight nine ten eleven twelve"
)
OPTION = re.compile(r"^\s*\(?([A-H])[.):]\s*(\S.*?)\s*$", re.MULTILINE)
LETTER = (
  r"\b(?:answer|option|choice|letter|symbol|sign|character)\W{{0,3}}"
  r"(?:is|are|would be|must be|reads?|shows?)?\W{{0,3}}{0}(?![\w'])"
  r"|[\"'“‘(\[]{0}[\"'”’)\]]"
)
UNSEEN = re.compile(
  r"\b(?:is|are)(?: not|n't) (?:clearly )?(?:visible|shown|legible|readable|present)\b"
  r"|(?:\bnot|n't) (?:be )?(?:possible to )?(?:see|seen|tell|told|read|make out|made out"
  r"|determined?|discern(?:ed)?|show|contain|depict)\b"
  r"|\bcannot\b|\bcan't\b|\billegible\b|\bunreadable\b"
  r"|\btoo (?:small|blurry|blurred|dark) to\b",
  re.IGNORECASE,
)
SENTENCE = re.compile(r"(?:[^.!?\n]|[.](?=\d))+")
FRAMES = re.compile(
  r"\bframes?\s+(?:number\s+)?(\d{1,6})(?:\s*(?:-|–|to|and|,)\s*(\d{1,6}))?",
  re.IGNORECASE,
)
COORDINATES = re.compile(
  r"\[\s*" + r"\s*,\s*".join([r"(\d?\.?\d{1,6})"] * 4) + r"\s*\]"
)
# A word of place, and the half of the picture (axis, is it the high one).
PLACES = {
  "left": (0, False),
  "right": (0, True),
  "top": (1, False),
  "upper": (1, False),
  "bottom": (1, True),
  "lower": (1, True),
}
# "the left half", "top right corner"; not "left of the door", "on top of".
PLACE = re.compile(
  r"\b((?:left|right|top|upper|bottom|lower)(?:[ -](?:left|right))?)\b"
  r"(?! (?:of|from) (?!the (?:picture|image|frame|photo|scene)\b))",
  re.IGNORECASE,
)
# Words that say nothing of what is looked at.
COMMON = frozenset(
  WORD.findall(
    "a an the of on in at to and or with by for from that this which is are its it "
    "small one part area region detail details picture image frame frames video clip "
    "left right top upper bottom lower side corner middle centre center exact"
  )
)


def of_seed(task: Task, size: tuple[int, int], min_side: int) -> Found:
  """Whether a cue can be zoomed in on; `size` is (width, height) of its picture."""
  if "bbox_2d" not in task.reference:
    return None
  box = task.reference["bbox_2d"]
  area = (box[2] - box[0]) * (box[3] - box[1])
  if area > MOST_AREA:
    return "large", f"the cue is {area:.0%} of the picture, more than {MOST_AREA:.0%}"
  sides = [(box[i + 2] - box[i]) * size[i] for i in (0, 1)]
  if min(sides) < min_side:
    return "small", f"the cue is {sides[0]:.0f}x{sides[1]:.0f} pixels, under {min_side}"
  if max(sides) > image.MAX_ASPECT * min(sides):
    return "small", f"the cue is {sides[0]:.0f}x{sides[1]:.0f} pixels, too narrow"
  return None


def of_cue(task: Task, analysis: str, answer: str) -> Found:
  """Whether the teacher found the answer in the cue; `answer` is its own."""
  unseen = UNSEEN.search(analysis)
  if unseen:
    return "box", f"of the cue it says {unseen[0]!r}"
  if not agrees(answer, task.answer):
    return "answer", f"the teacher answers {answer[:80]!r}, right is {task.answer!r}"
  return None


def of_whole(task: Task, prose: Prose, first: dict) -> Found:
  """Whether what is said before the operation asks for it, and for no other.

  Args:
    first: the arguments of the first operation, which may be a planted one.
  """
  for text in (prose.whole, prose.query):
    leaked = leak(text, task)
    if leaked:
      return "leak", f"{leaked!r} stands before the operation"
  contradicted = contradiction(prose, task.reference) or contradiction(prose, first)
  return ("box", contradicted) if contradicted else None


def agrees(answer: str, gold: str | list[str]) -> bool:
  """Right, or, where the answer is a sentence, nearly the same in its letters."""
  boxed = f"\\boxed{{{answer}}}"
  return bool(answers.judge(boxed, gold)) or answers.anls(boxed, gold) >= 0.8


# ---- Leaks ---------------------------------------------------------------------------


def leak(text: str, task: Task) -> str | None:
  """What of the text gives the answer away; what the question says is no secret."""
  golds = [task.answer] if isinstance(task.answer, str) else task.answer
  options = dict(OPTION.findall(task.question))
  for gold in golds:
    gold = (answers.boxed(gold) or gold).strip()
    letter = gold.strip("().:").upper()
    found = None
    if letter in options:
      found = letter_in(text, letter, bare=False) or _option(text, letter, options)
    elif len(gold) == 1 and gold.isalpha():
      found = letter_in(text, gold, bare=gold not in "AIai")
    elif not _has(task.question, gold):
      found = next((s for s in (gold, *_in_words(gold)) if _has(text, s)), None)
    if found:
      return found
  return None


def letter_in(text: str, letter: str, *, bare: bool) -> str | None:
  """Finds an option letter that is named as one; with `bare` also one that stands alone."""
  pattern = LETTER.format(re.escape(letter))
  if bare:
    pattern += rf"|(?<![\w'’]){re.escape(letter)}(?![\w'’])"
  found = re.search(pattern, text)
  return found[0] if found else None


def _option(text: str, right: str, options: dict[str, str]) -> str | None:
  """The text of the right option, unless the others are weighed with it."""
  others = [o for a, o in options.items() if a != right]
  if not _has(text, options[right]) or all(_has(text, o) for o in others):
    return None
  return options[right]


def _in_words(gold: str) -> list[str]:
  value = answers.number(gold)
  if value is None or value != int(value) or not 0 <= value < len(NUMBERS):
    return []
  return [NUMBERS[int(value)], str(int(value))]


def _has(text: str, part: str) -> bool:
  """Whether the words of `part` stand in `text`, one after the other."""
  inside, outside = ([w.casefold() for w in WORD.findall(t)] for t in (part, text))
  n = len(inside)
  return n > 0 and any(
    outside[i : i + n] == inside for i in range(len(outside) - n + 1)
  )


# ---- Contradictions ------------------------------------------------------------------


def contradiction(prose: Prose, place: dict) -> str | None:
  """Where the text and the place (bbox_2d or target_frames) cannot both be right."""
  box, frames = (place.get(k) for k in ("bbox_2d", "target_frames"))
  # What is said of other things is no contradiction: only the words that name the
  # target, and sentences that have some of them.
  target = {w.casefold() for w in WORD.findall(prose.query)} - COMMON
  about = [prose.query]
  for sentence in SENTENCE.findall(prose.whole):
    if target & {w.casefold() for w in WORD.findall(sentence)}:
      about.append(sentence)
  for sentence in about:
    found = None
    if frames:
      found = _other_frames(sentence, frames)
    elif box:
      found = _other_place(sentence, tuple(box))
    if found:
      return found
  for numbers in COORDINATES.findall(f"{prose.whole} {prose.cue}"):
    told = tuple(map(float, numbers))
    if box and not frames and max(told) <= 1 and not boxes.overlap(told, tuple(box)):
      return f"it gives the box {list(told)}, not {list(box)}"
  return None


def _other_frames(sentence: str, frames: list[int]) -> str | None:
  for first, last in FRAMES.findall(sentence):
    low, high = int(first), int(last or first)
    if not any(low <= frame <= high for frame in frames):
      return f"it looks for it in frames {low} to {high}, not in {frames}"
  return None


def _other_place(sentence: str, box: Box) -> str | None:
  """A half of the picture in which the box has no part.

  Only where one place is named: of two, either may be that of something else.
  """
  places = PLACE.findall(sentence)
  if len(places) != 1:
    return None
  for word in re.split("[ -]", places[0].lower()):
    axis, is_high = PLACES[word]
    if (box[axis + 2] <= 0.5) if is_high else (box[axis] >= 0.5):
      return f"it looks for it at the {places[0].lower()}, not in {list(box)}"
  return None
