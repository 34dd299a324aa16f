"""Answers: what a turn answers, and whether that is right.  Strings only.

`extract` finds the answer in a text, `judge` compares it with the gold answers and
gives 0.0 or 1.0, `anls` is a graded likeness for the checks of synthesis.  Benchmarks
score by the rules of `evals/rules.py`.  What the model writes is never evaluated as
Python or as mathematics (the released reward lets sympy read prose as a product of
letters, so that anagrams count as right), and every function takes time linear in the
length of the text.

  "... so \\\\boxed{B. red}."  --extract-->  "B. red"  --judge against "B"-->  1.0

Deviations from the released reward (pixel_reasoner.md 3.3): values are 0 and 1, never
-1; an option letter may carry its text; words are equal only as written, apart from
case, spacing and final punctuation; a part of the answer is not enough.
"""

import decimal
import re
import unicodedata
from collections.abc import Iterable

from rapidfuzz.distance import Levenshtein

# Longer than any answer; what is longer is prose, and wrong.
MAX_ANSWER = 4096
# Characters at the end of a turn in which its answer is looked for, four times those of
# 2,048 tokens; with it a turn of a million braces takes 10 ms, not 300.
MAX_TURN = 32_768
# Two backslashes: models that have seen JSON write them.
BOXES = re.compile(r"\\{1,2}boxed\s*\{|\\.|[{}]", re.DOTALL)
ANSWER = re.compile(r"\banswer\s*(?:is\b|:)[ \t]*:?", re.IGNORECASE)
STYLE = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
# "B", "(B)", "B.", "b) red", "Option B: red"; but neither "A red car" nor "A, B".
OPTION = re.compile(
  r"(?:option\s+|choice\s+)?"
  r"(?:[(\[]([a-z])[)\]][.:]?|([a-z])(?:\)|[.:](?=\s|$)|(?=\s*$)))\s*(.*)",
  re.IGNORECASE | re.DOTALL,
)
NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?", re.ASCII)


def extract(text: str) -> str | None:
  """The answer in a turn: the last box, else <answer>, else "answer: ...", else its
  last line; None for an empty text.  Looked for in the last `MAX_TURN` characters."""
  text = text[-MAX_TURN:]
  box = boxed(text)
  if box is not None:
    return box.strip()
  _, opened, rest = text.rpartition("<answer>")
  if opened:
    return rest.split("</answer>", 1)[0].strip()
  said = [found.end() for found in ANSWER.finditer(text)]
  if said:
    return text[said[-1] :].strip().split("\n", 1)[0].strip()
  return text.strip().rsplit("\n", 1)[-1].strip() or None


def boxed(text: str) -> str | None:
  """What stands in the last \\\\boxed{...} whose braces balance."""
  opened: list[tuple[int, bool]] = []  # where its content starts, is it a box
  start = end = -1
  for token in BOXES.finditer(text):
    if token[0].endswith("{") and token[0] != "\\{":
      opened.append((token.end(), token[0] != "{"))
    elif token[0] == "}" and opened:
      at, is_box = opened.pop()
      if is_box and at > start:
        start, end = at, token.start()
  return text[start:end] if start >= 0 else None


def judge(text: str, gold: str | Iterable[str]) -> float:
  """1.0 when the answer of `text` is one of the gold answers, else 0.0."""
  answer = extract(text)
  if not answer or len(answer) > MAX_ANSWER:
    return 0.0
  golds = [gold] if isinstance(gold, str) else gold
  return float(any(same(answer, _unboxed(g)) for g in golds))


def anls(text: str, gold: str | Iterable[str]) -> float:
  """Average normalised Levenshtein similarity of one answer: the best gold's, and 0
  where half of the characters differ or more."""
  answer = extract(text)
  if not answer or len(answer) > MAX_ANSWER:
    return 0.0
  golds = [gold] if isinstance(gold, str) else gold
  best = 0.0
  for g in golds:
    a, b = (" ".join(plain(x).casefold().split()) for x in (answer, _unboxed(g)))
    similarity = Levenshtein.normalized_similarity(a, b)
    best = max(best, similarity if similarity > 0.5 else 0.0)
  return best


def same(answer: str, gold: str) -> bool:
  """Whether two answers say the same: as text, as option letter or as number."""
  answer, gold = plain(answer), plain(gold)
  if not answer or not gold:
    return False
  if words(answer) == words(gold):
    return True
  wanted = option(gold)
  if wanted:
    given = option(answer)
    if not given or given[0] != wanted[0]:
      return False
    # A bare letter on either side is enough; two texts must agree.
    return not given[1] or not wanted[1] or given[1] == wanted[1]
  value = number(gold)
  return value is not None and number(answer, percent="%" in gold) == value


def plain(text: str) -> str:
  """The text without LaTeX's dress: $...$, \\\\text{...}, escapes."""
  text = unicodedata.normalize("NFKC", text).strip()
  for _ in range(3):  # nested styles; deeper ones are noise
    text = STYLE.sub(r"\1", text)
  text = text.replace("{,}", ",")
  text = re.sub(r"\\([%$#&_{} ])", r"\1", text)
  text = re.sub(r"\\[,;:!()\[\]]", "", text)
  if len(text) > 2 and text[0] == text[-1] == "$":
    text = text[1:-1]
  return text.strip()


def words(text: str) -> str:
  """The text without what does not count: case, spacing, quotes, final punctuation."""
  text = text.casefold().strip().strip("\"'`*").rstrip(".!;:").strip()
  text = text.strip("\"'`*")
  return " ".join(re.sub(r"\s*,\s*", ", ", text).split())


def option(text: str) -> tuple[str, str] | None:
  """("b", "red") for "B. red"; None where the text is no option of a choice."""
  found = OPTION.fullmatch(text.strip().strip("*"))
  if not found:
    return None
  return (found[1] or found[2]).casefold(), words(found[3])


def number(text: str, *, percent: bool = True) -> decimal.Decimal | None:
  """The number that `text` is, as a whole; 1,000.0 = 1000.  With `percent`, 5% is 5."""
  text = text.strip().rstrip(".").lstrip("$€£¥").strip()
  if percent:
    text = text.removesuffix("%").strip()
  if not text or not NUMBER.fullmatch(text) or not text[-1].isdigit():
    return None
  return decimal.Decimal(text.replace(",", ""))


def _unboxed(gold: str) -> str:
  box = boxed(gold)
  return gold if box is None else box
