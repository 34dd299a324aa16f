"""answers.py: what is right, what is not, and that hostile text costs linear time."""

import decimal
import string
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pixel_jax import answers


@pytest.mark.parametrize(
  ("text", "answer"),
  [
    ("so \\boxed{O}.", "O"),
    ("\\boxed{A} no, \\boxed{B}", "B"),
    ("\\boxed{A} no, \\boxed{B", "A"),  # cut off
    ("\\boxed{\\text{a {b} c}}", "\\text{a {b} c}"),
    ("\\boxed{\\boxed{B}}", "B"),
    ("{ \\boxed{A}", "A"),
    ("} \\boxed{A} }", "A"),
    ("\\boxed{\\{1\\}}", "\\{1\\}"),
    ("\\boxed {A}", "A"),
    ("\\\\boxed{A}", "A"),  # as in JSON
    ("\\boxed{}", ""),
    ("boxed{A}", "boxed{A}"),
    ("<answer> C </answer>", "C"),
    ("<answer>B</answer> <answer>C", "C"),
    ("<answer>B</answer> \\boxed{C}", "C"),
    ("The answer is D", "D"),
    ("Answer: 12\nas said", "12"),
    ("the answer is: **D**", "**D**"),
    ("I see.\nO\n", "O"),
    ("", None),
    (" \n ", None),
  ],
)
def test_extract(text, answer):
  assert answers.extract(text) == answer


RIGHT = [
  # The option letter, however it is dressed; the released reward fails four of these.
  *[(a, "B") for a in ("B", "b", "(B)", "B.", "B. red", "B) red", "B: red", "(B) red")],
  *[
    (a, "B") for a in ("[B]", "\\text{B}", "$B$", "Option B", "**B**", "\\mathrm{(B)}")
  ],
  *[("B. red", g) for g in ("B. red", "(B)", "\\boxed{B}", "b. Red.")],
  ("B", "B. red"),
  # Numbers
  *[("5", g) for g in ("5", "5.0", "5%", "05")],
  *[(a, "1000") for a in ("1,000", "1000.0", "1{,}000", "$1000$", "$1,000", "1000.")],
  *[(a, "50%") for a in ("50", "50%", "50\\%", "50.0%")],
  ("-.5", "-0.5"),
  # Words
  *[(a, "the cat") for a in ("the cat", "The  Cat.", '"the cat"', "\\text{the cat}")],
  ("a,b", "a, b"),
  ("Straße", "STRASSE"),
  ("two", "two"),
  ("ﬁne", "fine"),
]
WRONG = [
  *[
    (a, "A") for a in ("B", "A, B", "AB", "A and B", "A/B", "A red car", "A-frame", "")
  ],
  ("B. blue", "B. red"),
  ("C. red", "B. red"),
  ("U.S.", "u"),
  ("silver", "livers"),  # anagrams: right in the released reward
  ("on", "no"),
  ("the act", "the cat"),
  ("cat the", "the cat"),
  ("3 or 4", "3"),
  ("3", "3 or 4"),
  ("50%", "50"),
  ("1.5", "15"),
  ("1,00", "100"),
  ("--5", "5"),
  ("5", "-5"),
  ("nan", "5"),
  ("1e3", "1000"),
  ("2+3", "5"),
  ("two", "2"),
  ("not red", "red"),
  ("red, blue", "red"),
]


@pytest.mark.parametrize(("answer", "gold"), RIGHT)
def test_right(answer, gold):
  assert answers.judge(f"I think \\boxed{{{answer}}}", gold) == 1.0


@pytest.mark.parametrize(("answer", "gold"), WRONG)
def test_wrong(answer, gold):
  assert answers.judge(f"I think \\boxed{{{answer}}}", gold) == 0.0


def test_gold_may_be_a_list():
  assert answers.judge("\\boxed{b}", ["x", "\\boxed{B}"]) == 1.0
  assert answers.judge("\\boxed{b}", ["x", "c"]) == 0.0
  assert answers.judge("\\boxed{b}", []) == 0.0


def test_nothing_said_is_wrong():
  for text in ("", "\\boxed{}", "\\boxed{", "\\boxed{ }"):
    assert answers.judge(text, ["", "A"]) == 0.0


def test_no_answer_before_the_box_counts():
  assert answers.judge("The answer is A. \\boxed{B}", "A") == 0.0


@given(word=st.text(string.ascii_lowercase, min_size=2, max_size=8), data=st.data())
def test_only_the_word_itself_is_right(word, data):
  other = "".join(data.draw(st.permutations(word)))
  assert answers.judge(f"\\boxed{{{other}}}", word) == float(other == word)


@given(value=st.decimals(-(10**9), 10**9, places=3))
def test_numbers_are_right_however_they_are_written(value):
  for text in (f"{value}", f"{value:,}", f"{value:.5f}", f"${value}$"):
    assert answers.judge(f"\\boxed{{{text}}}", str(value)) == 1.0
  near = value + decimal.Decimal("0.001")
  assert answers.judge(f"\\boxed{{{near}}}", str(value)) == 0.0


@given(text=st.text(), gold=st.text())
def test_no_text_raises(text, gold):
  for said in (text, f"\\boxed{{{text}}}", f"<answer>{text}"):
    assert answers.judge(said, gold) in (0.0, 1.0)
    assert 0.0 <= answers.anls(said, gold) <= 1.0


PIECES = [
  "\\boxed{",
  "{",
  "}",
  "\\",
  "\\{",
  "\\text{",
  "$",
  "(",
  "B",
  ". ",
  "1",
  ",",
  "%",
]


@given(text=st.lists(st.sampled_from(PIECES), max_size=30).map("".join))
def test_boxes_balance(text):
  box = answers.boxed(text)
  assert answers.judge(text, "B") in (0.0, 1.0)
  if box is not None:
    assert "\\boxed" in text and "{" + box + "}" in text
    depth = 0
    for token in answers.BOXES.finditer(box):
      if token[0].endswith("{") and token[0] != "\\{":
        depth += 1
      elif token[0] == "}":
        depth -= 1
      assert depth >= 0
    assert depth == 0


@pytest.mark.parametrize(
  "piece",
  (
    *(
      "{",
      "}",
      "\\",
      "\\boxed{",
      "\\boxed ",
      "\\text{",
      "answer",
      "answer:",
      "<answer>",
    ),
    *(" ", "\n", "1,", "(", "option ", "$", "a", "\\boxed{B}"),
  ),
)
def test_hostile_text_is_linear(piece):
  def spent(n):
    start = time.process_time()
    for text in (piece * n, f"\\boxed{{{piece * n}}}", f"\\boxed{{{piece * 500}B}}"):
      answers.judge(text, ["B", "5", "red"])
      answers.anls(text, "red")
    return time.process_time() - start

  # Quadratic time would be minutes of CPU here, linear time is a tenth of a second.
  assert spent(100_000) < 10.0


def test_anls():
  # 1 - edit distance / longer length, 0 from half the letters on; best of the golds.
  assert answers.anls("\\boxed{abcde}", "abcde") == 1.0
  assert answers.anls("\\boxed{ABCDE}", " abcde ") == 1.0
  assert answers.anls("\\boxed{abcdx}", "abcde") == pytest.approx(0.8)
  assert answers.anls("\\boxed{abxy}", "abcd") == 0.0  # exactly a half is too far
  assert answers.anls("\\boxed{abxxx}", ["abcde", "abxxy"]) == pytest.approx(0.8)
  assert answers.anls("\\boxed{abcxy}", "abcde") == pytest.approx(0.6)
  assert answers.anls("", "abc") == 0.0
