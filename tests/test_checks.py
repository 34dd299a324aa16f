"""What is taken from a teacher's reply, and which traces are dropped."""

import json

import numpy as np
import pytest
from PIL import Image

from pixel_jax.synthesis import checks, prompts
from pixel_jax.synthesis.templates import Prose
from pixel_jax.trajectory import Media, Task

CHOICE = "What colour is the mug?\nA. red\nB. dark blue\nC. green\nD. white"


def task(answer, question="What is on the sign?", box=(0.7, 0.1, 0.8, 0.2), **more):
  reference = {"bbox_2d": list(box), **more}
  return Task("t", question, answer, [Media("image", "x.png")], reference=reference)


# ---- Replies -------------------------------------------------------------------------

GOOD = {"analysis": "A street with a sign above a door.", "query": "the sign"}


@pytest.mark.parametrize(
  "text",
  [
    json.dumps(GOOD),
    "```json\n" + json.dumps(GOOD, indent=1) + "\n```",
    "Here it is: " + json.dumps(GOOD),
    "\\boxed{" + json.dumps(GOOD) + "}",
  ],
)
def test_a_good_reply_is_read(text):
  expected = (GOOD["analysis"], GOOD["query"])
  assert prompts.analysis_and_query(text) == expected


@pytest.mark.parametrize(
  ("text", "why"),
  [
    (None, "no text"),
    ("", "no JSON object"),
    ("I cannot see it.", "no JSON object"),
    (json.dumps(GOOD)[:40], "no JSON object"),
    (json.dumps(GOOD)[:40] + "}", "no JSON object:"),
    ('{"analysis": NaN, "query": "the sign"}', "NaN"),
    ('{"analysis": 1e999, "query": "the sign"}', "too large"),
    ("{" * 5000 + "}" * 5000, "nested"),
    ('{"a":' * 100 + "1" + "}" * 100, "nested"),
    (json.dumps({**GOOD, "analysis": ["a", "b"]}), "expected a text"),
    (json.dumps({**GOOD, "analysis": None}), "expected a text"),
    (json.dumps({"analysis": GOOD["analysis"]}), '"query" is None'),
    (json.dumps({**GOOD, "query": ""}), "0 characters"),
    (json.dumps({**GOOD, "analysis": "x" * 2001}), "2001 characters"),
    (json.dumps({**GOOD, "analysis": "Look: <tool_call>{} and more"}), "protocol"),
    (json.dumps({**GOOD, "analysis": "It ends.<|im_end|> Not."}), "protocol"),
    (json.dumps({**GOOD, "analysis": "So it is \\boxed{B}, surely."}), "protocol"),
    (json.dumps({**GOOD, "query": "the <IMAGE> here"}), "protocol"),
    (json.dumps({**GOOD, "analysis": "A bell \x07 in the text"}), "control character"),
    ("__import__('os').system('x')", "no JSON object"),
    ('{"analysis": __import__("os"), "query": "the sign"}', "no JSON object"),
  ],
)
def test_a_malformed_reply_is_refused(text, why):
  with pytest.raises(prompts.Malformed, match=why):
    prompts.analysis_and_query(text)


def test_a_count_may_be_a_number():
  said = {"analysis": "There are three birds.", "answer": 3}
  assert prompts.analysis_and_answer(json.dumps(said))[1] == "3"
  with pytest.raises(prompts.Malformed, match='"answer" is True'):
    prompts.analysis_and_answer(json.dumps({**said, "answer": True}))


PROPOSAL = {
  "valid": True,
  "bbox_2d": [0.1, 0.2, 0.3, 0.4],
  "question": "What is written on the mug?",
  "options": ["one", "two", "three", "four"],
  "answer": 3,
}


def propose(changes, frames=1, kind="image"):
  seed = Task("s", "-", "-", [Media(kind, "x")])
  text = json.dumps({**PROPOSAL, **changes})
  return prompts.proposal(text, seed, frames, np.random.default_rng(0))


def test_a_proposal_becomes_a_task_and_keeps_its_answer():
  letters = set()
  for seed in range(40):
    rng = np.random.default_rng(seed)
    made = prompts.proposal(
      json.dumps(PROPOSAL), Task("s", "-", "-", [Media("image", "x")]), 1, rng
    )
    assert made.reference == {"kind": "image", "bbox_2d": PROPOSAL["bbox_2d"]}
    lines = made.question.splitlines()
    assert lines[0] == PROPOSAL["question"] and len(lines) == 5
    assert f"{made.answer}. three" in lines
    letters.add(made.answer)
  assert letters == set("ABCD")  # a teacher's favourite place is not learned
  made = propose({"target_frames": [3, 2, 3]}, 16, "video")
  assert made.reference == {"kind": "video", "target_frames": [2, 3]}


@pytest.mark.parametrize(
  "changes",
  [
    {"valid": "yes"},
    {"bbox_2d": [0.3, 0.2, 0.1, 0.4]},
    {"bbox_2d": [10, 20, 30, 40]},
    {"bbox_2d": [0.1, 0.2, 0.3]},
    {"bbox_2d": "[0.1, 0.2, 0.3, 0.4]"},
    {"bbox_2d": [True, 0.2, 0.3, 0.4]},
    {"options": ["a", "b", "c"]},
    {"options": ["a", "b", "c", "A."]},
    {"options": ["a", "b", "c", 4]},
    {"answer": 0},
    {"answer": "3"},
    {"answer": True},
    {"question": "?"},
  ],
)
def test_a_malformed_proposal_is_refused(changes):
  with pytest.raises(prompts.Malformed):
    propose(changes)
  if "bbox_2d" in changes:
    for frames in ([], [0], [17], [1.5], list(range(1, 10)), "1"):
      with pytest.raises(prompts.Malformed):
        propose({"target_frames": frames}, 16, "video")


def test_a_teacher_may_say_that_nothing_can_be_made():
  with pytest.raises(prompts.NotValid):
    propose({"valid": False, "bbox_2d": None})


def test_the_question_is_asked_and_the_answer_is_not_told():
  pictures = [Image.new("RGB", (300, 200))]
  for place in (True, False):
    request = prompts.whole(task("B", CHOICE), pictures, place=place)
    assert CHOICE in request.text and "B" not in request.text.replace(CHOICE, "")
  assert "letter" in prompts.cue(task("B", CHOICE), pictures).text
  assert "short" in prompts.cue(task("two", "How many {birds}?"), pictures).text


# ---- Leaks ---------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("text", "gold", "question"),
  [
    ("The answer is B, as one sees.", "B", CHOICE),
    ('It is clearly option "B".', "B", CHOICE),
    ("On the desk stands a dark blue mug.", "B", CHOICE),
    ("A letter X is on the red panel.", "X", "Which letter?"),
    ("The panel shows X.", "X", "Which letter?"),
    ("There are three birds on the roof.", "3", "How many birds?"),
    ("There are 3 birds on the roof.", "3", "How many birds?"),
    ("The sign says Exit Only, in green.", "exit only", "What is on the sign?"),
    ("The sign says Exit Only.", ["way out", "\\boxed{exit only}"], "What is on it?"),
  ],
)
def test_an_answer_before_the_operation_is_a_leak(text, gold, question):
  prose = Prose(text, "the thing", "It is so.")
  assert checks.of_whole(task(gold, question), prose, {})[0] == "leak"


@pytest.mark.parametrize(
  ("text", "gold", "question"),
  [
    ("A desk with a mug, whose colour is hard to tell.", "A", CHOICE),
    ("The mug is red, dark blue, green or white.", "B", CHOICE),
    ("A white wall and a mug. A lamp.", "A", CHOICE),
    ("A picture of a panel with a letter.", "A", "Which letter?"),
    ("I see some birds, 12 of them perhaps on wires.", "3", "How many birds?"),
    ("There is a sign that says something.", "exit", "What is on the exit sign?"),
    ("The exterior of a house.", "exit", "What is on the sign?"),
  ],
)
def test_what_does_not_tell_is_no_leak(text, gold, question):
  assert checks.leak(text, task(gold, question)) is None


# ---- Boxes and answers ---------------------------------------------------------------


@pytest.mark.parametrize(
  "whole",
  [
    "A street. The sign hangs at the bottom left.",  # the cue is at the top right
    "The sign is on the left side of the picture.",
    "In the lower half there is a sign.",
    "The sign is at [0.1, 0.6, 0.2, 0.8], a car at the right.",
  ],
)
def test_another_place_is_a_contradiction(whole):
  prose = Prose(whole, "the sign", "It says so.")
  found = checks.of_whole(task("exit"), prose, {})
  assert found and found[0] == "box"


@pytest.mark.parametrize(
  "whole",
  [
    "A street. The sign hangs at the top right.",
    "The sign is to the right of the door.",
    "The sign hangs left of the window.",
    "A car stands on the left. Above it all is the sign.",
    "The sign is between the left door and the right one.",
    "The sign is at [0.69, 0.1, 0.8, 0.2].",
    "A sign can be seen.",
  ],
)
def test_the_right_place_is_none(whole):
  prose = Prose(whole, "the sign", "It says so.")
  assert checks.of_whole(task("exit"), prose, {"bbox_2d": [0.6, 0, 0.9, 0.3]}) is None


def test_what_is_said_must_fit_the_first_operation_too():
  prose = Prose("The sign hangs at the top right.", "the sign", "It says so.")
  wrong = {"bbox_2d": [0.1, 0.7, 0.2, 0.8], "target_image": 1}
  assert checks.of_whole(task("exit"), prose, wrong)[0] == "box"


def test_other_frames_are_a_contradiction():
  clip = Task("t", "Who waves?", "Ann", [Media("video", "x")])
  clip.reference = {"target_frames": [5, 6]}
  for whole, fits in (
    ("The person waves in frames 4 to 6.", True),
    ("The person waves in frame 6.", True),
    ("The person waves in frame 11.", False),
    ("The person waves in frames 9-12.", False),
    ("A dog runs in frame 11. The person waves.", True),
  ):
    found = checks.of_whole(clip, Prose(whole, "the person", "She waves."), {})
    assert (found is None) == fits, whole
  reselect = {"target_frames": [1, 2]}
  prose = Prose("The person waves in frame 6.", "the person", "She waves.")
  assert checks.of_whole(clip, prose, reselect)[0] == "box"


@pytest.mark.parametrize(
  ("analysis", "answer", "gold", "reason"),
  [
    ("The mug is dark blue.", "B", "B", None),
    ("The mug is dark blue.", "B. dark blue", "B", None),
    ("The mug is green.", "C", "B", "answer"),
    ("Three birds sit there.", "3", "3", None),
    ("The mug is not visible.", "B", "B", "box"),
    ("This crop doesn't show a mug.", "B", "B", "box"),
    ("The text can't be read here.", "B", "B", "box"),
    (
      "The line reads so.",
      "It opens at nine o'clock.",
      "It opens at nine o'clock",
      None,
    ),
    (
      "The line reads so.",
      "It opens at nine oclock",
      "It opens at nine o'clock.",
      None,
    ),
    ("The line reads so.", "It closes at five.", "It opens at nine o'clock.", "answer"),
  ],
)
def test_the_teacher_must_find_the_answer_in_the_cue(analysis, answer, gold, reason):
  question = CHOICE if gold == "B" else "What?"
  found = checks.of_cue(task(gold, question), analysis, answer)
  assert (found and found[0]) == reason


def test_cues_that_cannot_be_zoomed_in_on():
  assert checks.of_seed(task("x"), (1000, 1000), 28) is None
  assert checks.of_seed(task("x"), (270, 1000), 28)[0] == "small"
  line = task("x", box=(0.0, 0.5, 1.0, 0.505))
  assert checks.of_seed(line, (6000, 5600), 28)[0] == "small"
  assert checks.of_seed(task("x", box=(0.1, 0, 0.9, 0.9)), (1000, 1000), 28)[0] == (
    "large"
  )


def test_hostile_texts_take_no_time():
  long = "frame " * 300 + "[0.1," * 300 + "left " * 300 + "<|" * 500
  prose = Prose(long[:2000], "the sign", long[:2000])
  checks.of_whole(task("exit"), prose, {})
  checks.of_cue(task("exit"), long, long)
  with pytest.raises(prompts.Malformed):
    prompts.parse("{" + "[" * 20_000)
