"""The rules by which benchmarks score, each as the program that it is named after.

They are followed where they are wrong, too, so that figures can be compared; what is odd is
said beside each.  They score and do not train: a reward is `answers.judge`.  Every rule
takes time linear in the length of the answer.  `FAMILIES` has them by name; their oracle is
tests/golden/rules, what those programs returned.

VLMEvalKit at e8e78f05, lmms-eval at 75571cfe.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rapidfuzz.distance import Levenshtein

from pixel_jax import answers

# ---- Text ----------------------------------------------------------------------------


def anls(prediction: str, answers: Sequence[str]) -> float:
  """Average normalised Levenshtein similarity, the best answer's, 0 below a half.

  The distance is between the stripped, lower-cased texts with single spaces, and it is
  divided by the longer of the upper-cased *raw* ones, as the official script of the Robust
  Reading Competition does.  VLMEvalKit `vqa_eval.py: anls_compute`, lmms-eval `metrics.py:
  anls`.
  """

  def distance(answer: str) -> float:
    a, b = (" ".join(text.lower().split()) for text in (answer, prediction))
    longer = max(len(answer.upper()), len(prediction.upper()))
    return Levenshtein.distance(a, b) / longer if longer else 0.0

  similarity = 1.0 - min(map(distance, answers))
  return similarity if similarity >= 0.5 else 0.0


# ---- A letter of a choice ------------------------------------------------------------

NO_ANSWER = "Failed to obtain answer via API"
REFUSALS = (
  "Sorry, I can't help with images of people yet.",
  "I can't process this file.",
  "I'm sorry, but without the image provided",
  "Cannot determine the answer",
)
SPACES = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
ANSWER_IS = re.compile(r"answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)


def mcq_letter_vlmevalkit(prediction: str, options: Mapping[str, str]) -> str | None:
  """The letter of V*, HR-Bench and every choice of VLMEvalKit; None = not to be read.

  A letter that stands alone among the last five words and is the only one of the options
  named, else "answer is X", else the one option whose text the answer has.  A refusal is
  "Z".  `matching_util.py: can_infer`.
  """
  found = _lone_letter(prediction, options, last=5)
  if found is None and NO_ANSWER not in prediction:
    said = ANSWER_IS.search(prediction)
    if said and said[1].upper() in options:
      found = said[1].upper()
  if found is not None:
    return found
  if len(prediction.lower()) > 2 * sum(len(str(text)) for text in options.values()):
    return None
  return _only_option(prediction, options)


def hrbench_letter_lmms(prediction: str, options: Mapping[str, str]) -> str | None:
  """As above, wherever the letter stands and however long the answer is.

  lmms-eval `hrbench_evals.py: can_infer`, before it asks a language model.
  """
  found = _lone_letter(prediction, options)
  return _only_option(prediction, options) if found is None else found


def _lone_letter(text: str, options: Mapping[str, str], last: int = 0) -> str | None:
  """The only one of the letters that is a word of its own; among the `last` words."""
  if NO_ANSWER in text:
    return None
  if any(refusal in text for refusal in REFUSALS):
    return "Z"
  words = text.translate(SPACES).split()
  first: dict[str, int] = {}
  for i, word in enumerate(words):
    first.setdefault(word, i)
  named = [letter for letter in options if letter in first]
  if len(named) == 1:
    is_late = not last or first[named[0]] > len(words) - last
    return named[0] if is_late else None
  return "Z" if not named and "Z" in first else None


def _only_option(text: str, options: Mapping[str, str]) -> str | None:
  """The letter of the only option whose text is in the answer, whatever the case."""
  text = text.lower()
  named = [letter for letter, option in options.items() if str(option).lower() in text]
  return named[0] if len(named) == 1 else None


def hrbench_report(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Accuracies of HR-Bench: by cycle of the options and by type, then their means.

  The score is the mean over the cycles.  VLMEvalKit `hrbench.py: report_acc_hrbench`.

  Args:
    rows: {"category", "cycle_category", "hit"} of each item and cycle.
  """
  cycles = sorted({row["cycle_category"] for row in rows})
  out, sums = [], {}
  for cycle in cycles:
    hits: dict[str, list[float]] = {"all": []}
    for row in rows:
      if row["cycle_category"] == cycle:
        hits["all"].append(row["hit"])
        hits.setdefault(row["category"], []).append(row["hit"])
    for kind in ("all", *sorted(hits.keys() - {"all"})):
      accuracy = sum(hits[kind]) / len(hits[kind])
      sums[kind] = sums.get(kind, 0.0) + accuracy
      out.append({"cycle": str(cycle), "type": kind, "accuracy": accuracy})
  return out + [
    {"cycle": "Average", "type": kind, "accuracy": total / len(cycles)}
    for kind, total in sums.items()
  ]


VSTAR = [
  re.compile(pattern)
  for pattern in (
    r"^([A-D])",  # so that "Based on" is B and "Answer: C" is A
    r"(?:ANSWER|CHOICE|OPTION)(?:\s+IS)?[\s:]+([A-D])",
    r"\(([A-D])\)",
    r"([A-D])\s*[.)\]]",
    r"(?:^|\s)([A-D])(?:\s|$)",
  )
]


def vstar_letter_lmms(prediction: str) -> str | None:
  """The letter of V* in lmms-eval, `vstar_bench/utils.py: extract_answer_letter`."""
  text = prediction.strip().upper()
  for pattern in VSTAR:
    if found := pattern.search(text):
      return found[1]
  letters = [c for c in text if c in "ABCD"]
  return letters[0] if len(letters) == 1 else None


PREFIXES = (
  "The best answer is", "The correct answer is", "The answer is", "The answer",
  "The best option is", "The correct option is", "Best answer:", "Best option:",
)  # fmt: skip


def mme_realworld_lmms(prediction: str) -> str:
  """The letter of MME-RealWorld, and of TreeBench behind <answer>; "" = not to be read.

  The first of A to E in capitals wherever it stands, so "An" is A; and an answer that is a
  part of "(A)" .. "(E)", which is also the empty one, is A.  lmms-eval
  `mme_realworld/utils.py: extract_characters_regex`; VLMEvalKit's is the same.
  """
  text = prediction.strip()
  for prefix in PREFIXES:
    text = text.replace(prefix, "")
  if found := re.search(r"[ABCDE]", text):
    return found[0]
  if len(text.split()) > 10:
    return ""
  choices = [f"({letter})" for letter in "abcde"]
  return next((c[1].upper() for c in choices if text.lower() in c), "")


# ---- MVBench -------------------------------------------------------------------------


def mvbench_official(prediction: str, gold: str) -> bool:
  """Whether the first word is, or holds, the option of the gold "(B) text".

  An empty answer counts as right.  VLMEvalKit `mvbench.py: check_ans`, the notebook's.
  """
  option = prediction.lower().strip().split(" ")[0]
  wanted = gold.lower().strip().split(" ")[0]
  return option.replace(".", "") in wanted or wanted in option


MARKS = ';/[]"{}()=+\\_->' + "<@`,?!"
BETWEEN_DIGITS = re.compile(r"\d,\d")
FULL_STOP = re.compile(r"(?!<=\d)\.(?!\d)")


def mvbench_lmms(prediction: str, gold: str) -> int:
  """1 where the letter of the answer is the gold letter; `mvbench/utils.py: mcq_acc`."""
  return int(_mvbench_letter(prediction) == _mvbench_letter(gold))


def _mvbench_letter(text: str) -> str:
  if found := re.match(r"([A-E])\.\s*.+$", text.strip(), re.IGNORECASE):
    return found[1].upper()
  text = before = text.replace("\n", " ").replace("\t", " ").strip()
  number = BETWEEN_DIGITS.search(before) is not None
  for mark in MARKS:
    alone = number or mark + " " in before or " " + mark in before
    text = text.replace(mark, "" if alone else " ")
  # The flags of their `sub` stand where its count is: 32 full stops go, and no more.
  text = FULL_STOP.sub("", text, count=int(re.UNICODE))
  text = text.strip("'").strip('"').strip(")").strip("(").strip().lower()
  found = re.search(r"\b([A-E])\b", text, re.IGNORECASE)
  return found[1].upper() if found else text


# ---- Counts and boxes ----------------------------------------------------------------

NUMBERS = (
  "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
  "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen",
  "eighteen", "nineteen", "twenty",
)  # fmt: skip
COUNT = re.compile(rf"\b(?:([0-9]|1[0-9]|20)|({'|'.join(NUMBERS)}))\b")


def tallyqa_vlmevalkit(prediction: str) -> int | None:
  """The first whole number or number word of 0 to 20: "3.5" is 3, "twenty-one" is 20.

  VLMEvalKit `tallyqa.py: extract_count_from_prediction`.
  """
  found = COUNT.search(prediction.lower())
  if not found:
    return None
  return int(found[1]) if found[1] else NUMBERS.index(found[2])


BOX = re.compile(r"\[(\d{1,18}),(\d{1,18}),(\d{1,18}),(\d{1,18})\]")


def treebench_iou(prediction: str, targets: Sequence[Sequence[float]]) -> float:
  """Mean over the targets of the best IoU with a box <box>[x1,y1,x2,y2]</box>, no spaces.

  VLMEvalKit `image_mcq.py: TreeBench.evaluate_box_iou`.
  """
  boxes, at = [], 0
  while (opened := prediction.find("<box>", at)) >= 0:
    closed = prediction.find("</box>", opened)
    if closed < 0:
      break
    at = closed + len("</box>")
    inside = prediction[opened + len("<box>") : closed].strip()
    if found := BOX.match(inside):
      x1, y1, x2, y2 = map(int, found.groups())
      if x1 < x2 and y1 < y2:
        boxes.append((x1, y1, x2, y2))
  if not boxes or not len(targets):
    return float(bool(boxes))
  return sum(max(iou(target, box) for box in boxes) for target in targets) / len(
    targets
  )


def iou(a: Sequence[float], b: Sequence[float]) -> float:
  """Intersection over union of two boxes (x1, y1, x2, y2)."""
  width = max(0, min(a[2], b[2]) - max(a[0], b[0]))
  height = max(0, min(a[3], b[3]) - max(a[1], b[1]))
  both = width * height
  union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
  return both / union if union > 0 else 0.0


# ---- Pixel Reasoner ------------------------------------------------------------------

ANSWER_TAGS = re.compile(r"<answer>([^<]*)</answer>")
A_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def pixel_reasoner(prediction: str, gold: str | Sequence[str]) -> float:
  """The released reward of Pixel Reasoner as a score, pixel_reasoner.md 3.3.

  Lower case; the last box, else <answer>, else the last number; any gold counts, also
  without its %.  Numbers are compared as such, and words as products of their letters, so
  that anagrams are equal; "B. red" is not "B", "(B)" is.  A gold with commas wants each of
  its parts behind the last "boxed".  Not here: algebra, which its math_verify does on what
  the model wrote.
  """
  text = prediction.lower()
  _, found, behind = text.rpartition("boxed")
  said = answers.boxed(text) if found else None
  if said is None and (tag := ANSWER_TAGS.search(text)):
    said = tag[1]
  if said is None and (numbers := A_NUMBER.findall(text)):
    said = numbers[-1]
  golds = [gold] if isinstance(gold, str) else gold
  golds = [g.lower() for g in golds]
  golds += [g.replace("%", "") for g in golds if "%" in g]
  for g in golds:
    if "," in g and found and all(p.strip() in behind for p in g.split(",")):
      return 1.0
    if said is not None and _released_form(said) == _released_form(g) != "":
      return 1.0
  return 0.0


def _released_form(text: str) -> object:
  text = answers.plain(text[: answers.MAX_ANSWER]).strip()
  if len(text) > 1 and text[0] == "(" and text[-1] == ")":
    text = text[1:-1].strip()
  value = answers.number(text)
  if value is not None:
    return value
  joined = "".join(text.split())
  return "".join(sorted(joined)) if joined.isalpha() else joined


FAMILIES: dict[str, Callable[..., Any]] = {
  "anls_vlmevalkit": anls,
  "anls_lmms_eval": anls,
  "mcq_letter_vlmevalkit": mcq_letter_vlmevalkit,
  "hrbench_letter_lmms": hrbench_letter_lmms,
  "hrbench_report_vlmevalkit": hrbench_report,
  "mvbench_official": mvbench_official,
  "mvbench_lmms": mvbench_lmms,
  "tallyqa_vlmevalkit": tallyqa_vlmevalkit,
  "mme_realworld_lmms": mme_realworld_lmms,
  "vstar_letter_lmms": vstar_letter_lmms,
  "treebench_iou_vlmevalkit": treebench_iou,
}
