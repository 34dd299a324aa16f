"""chat/tools.py: released texts byte for byte; nothing the model writes raises."""

import hashlib
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from pixel_jax.chat import tools
from pixel_jax.pixels import ops
from pixel_jax.trajectory import OpCall, Task, Trajectory, from_json, to_json

PROFILES = st.sampled_from(tools.PROFILES)


def picture(width=100, height=80):
  image = Image.new("RGB", (width, height), (9, 8, 7))
  return ops.Picture("image", image, image)


def clip(n=4):
  frames = [Image.new("RGB", (112, 84), (i, i, i)) for i in range(n)]
  return ops.Picture("video", frames, frames)


def shrink(image, role):
  return image.resize({"crop": (56, 28), "frame": (84, 56)}[role])


def run(text, pictures, profile):
  call = tools.parse_call(text, profile)
  return tools.run_call(call, ops.Seen(pictures), profile, shrink=shrink)


def sha(text):
  return hashlib.sha256(text.encode()).hexdigest()


def test_released_prompts_are_byte_exact():
  # Hashes of the texts in pixel_reasoner.md 1.2 and 1.3, from the released code.
  assert sha(tools.system_prompt("released")) == (
    "37249a683d675568939125a7058c18ebcad1b817ce2827b621d75bec184f5aba"
  )
  assert sha(tools.user_suffix("released")) == (
    "d491b816c4970936384c858a472503ccd0cf08422559b4c8a742ee8290336d8e"
  )
  assert tools.user_suffix("released").startswith("\n\n\n\nGuidelines: ")
  assert tools.user_suffix("released").endswith("within \\boxed{}.")


@pytest.mark.parametrize("profile", tools.PROFILES)
def test_either_end_of_a_turn_ends_a_call(profile):
  for end in ("<|im_end|>", "<|endoftext|>"):
    call = tools.parse_call(CALL + end, profile)
    assert call is not None and call.error is None


@pytest.mark.parametrize("profile", tools.PROFILES)
def test_without_tools_no_tool_is_told(profile):
  assert tools.system_prompt(profile, tools=False) == "You are a helpful assistant."
  assert tools.user_suffix(profile, tools=False) == (
    "\n\nPlease think step by step, and put your final answer within \\boxed{}."
  )


def test_clean_profile_has_one_name_for_each_operation():
  prompt = tools.system_prompt("clean")
  suffix = tools.user_suffix("clean")
  assert "`crop_image_normalized`" in suffix and "`crop_image`" not in suffix
  lines = prompt.split("<tools>\n")[1].split("\n</tools>")[0].split("\n")
  names = [json.loads(line)["function"]["name"] for line in lines]
  assert tuple(names) == tools.OPERATIONS
  assert "from 1 to 16" not in prompt


def test_unknown_profile_is_refused():
  for function in (tools.system_prompt, tools.user_suffix):
    with pytest.raises(ValueError, match="released, clean"):
      function("fancy")


# ---- Is the turn a call? -------------------------------------------------------------

CALL = tools.call_text("select_frames", {"target_frames": [3]})


def test_call_text_parses_to_itself():
  assert CALL == (
    '<tool_call>\n{"name": "select_frames", "arguments": {"target_frames": [3]}}\n'
    "</tool_call>"
  )
  for profile in tools.PROFILES:
    call = tools.parse_call("I look closer. " + CALL + "<|im_end|>", profile)
    assert call == tools.Call("select_frames", {"target_frames": [3]})


@pytest.mark.parametrize(
  ("text", "released", "clean"),
  [
    ("\\boxed{O}<|im_end|>", False, False),
    (CALL + "<|im_end|>", True, True),
    (CALL, True, True),
    (CALL + "\n<|im_end|>", False, True),
    (CALL + " \n", False, True),
    (CALL + ".", False, False),
    (CALL + " so \\boxed{O}", False, False),
    ("<|im_end|>" + CALL + "<|im_end|><|im_end|>", True, True),
    ("<tool_call>", False, False),
    ("</tool_call>", True, True),
    ("", False, False),
  ],
)
def test_a_turn_calls_when_it_ends_in_a_call(text, released, clean):
  assert (tools.parse_call(text, "released") is not None) == released
  assert (tools.parse_call(text, "clean") is not None) == clean


def test_the_last_call_counts_up_to_its_first_end():
  first = tools.call_text("crop_image_normalized", {})
  assert tools.parse_call(first + CALL, "released").name == "select_frames"
  assert tools.parse_call(CALL + "x</tool_call>", "released").name == "select_frames"


@pytest.mark.parametrize(
  ("json_text", "kind", "released"),
  [
    ("{", "bad_json", "Expecting property name enclosed in double quotes"),
    ("", "bad_json", "Expecting value: line 1 column 1 (char 0)"),
    ('{"name": "zoom_in", "arguments": {}}', "unknown_operation", "'zoom_in'"),
    ('{"name": "select_frames"}', "bad_arguments", "'arguments'"),
    ("{}", "bad_arguments", "'name'"),
    ("[1]", "bad_arguments", "list indices must be integers or slices, not str"),
    ("null", "bad_arguments", "'NoneType' object is not subscriptable"),
    ("NaN", "bad_json", "NaN is not a JSON number"),
    ("1e400", "bad_json", "the number 1e400 is too large"),
    ("1" * 5000, "bad_json", "is too large"),
    ("[" * 100_000, "bad_json", "nested too deeply"),
    ('{"name": {"a": 1}, "arguments": 1}', "unknown_operation", "{'a': 1}"),
  ],
)
def test_what_cannot_be_tried(json_text, kind, released):
  text = f"<tool_call>{json_text}</tool_call>"
  for profile in tools.PROFILES:
    call = tools.parse_call(text, profile)
    assert call.error.kind == kind
    observation = run(text, [picture()], profile)
    assert observation.error == call.error and not observation.images
    assert observation.text.startswith("\nExecution error:\n")
    assert observation.text.endswith("\n")
  assert released in tools.parse_call(text, "released").error.text


def test_clean_errors_name_the_remedy():
  text = '<tool_call>{"name": "zoom_in", "arguments": {}}</tool_call>'
  assert run(text, [picture()], "clean").text == (
    '\nExecution error:\nUnknown function "zoom_in". '
    "Use one of crop_image_normalized, select_frames.\n"
  )


# ---- What comes back -----------------------------------------------------------------


def crop(target, box=(0.1, 0.1, 0.9, 0.9)):
  arguments = {"bbox_2d": list(box), "target_image": target}
  return tools.call_text("crop_image_normalized", arguments)


@pytest.mark.parametrize("profile", tools.PROFILES)
def test_crop_tells_the_size_of_the_view(profile):
  observation = run(crop(1), [picture()], profile)
  assert observation.text == "\nHere is the cropped image (Image Size: 56x28):"
  assert [v.size for v in observation.views] == [(56, 28)]
  assert observation.images[0].size != (56, 28)  # further crops come from the source
  assert observation.role == "crop" and observation.error is None


@pytest.mark.parametrize(
  ("profile", "before", "numbers"),
  [
    ("released", [], "1 to 2"),  # although `target_image` must then be 2 or 3
    ("released", [picture()] * 2, "3 to 4"),
    ("clean", [], "5 to 6"),
    ("clean", [picture()] * 2, "7 to 8"),
  ],
)
def test_frames_are_numbered(profile, before, numbers):
  text = tools.call_text("select_frames", {"target_frames": [1, 3]})
  observation = run(text, [clip(), *before], profile)
  assert observation.text == (
    f"\nHere are the selected frames (Frame Size: 84x56, Numbered {numbers}):"
  )
  assert [i.getpixel((0, 0))[0] for i in observation.images] == [0, 2]
  assert observation.role == "frame" and len(observation.views) == 2


def test_clean_numbers_are_those_that_target_image_takes():
  seen = [clip()]
  text = tools.call_text("select_frames", {"target_frames": [2, 4]})
  observation = run(text, seen, "clean")
  number = int(observation.text.split("Numbered ")[1].split(" to ")[0])
  seen += [ops.Picture("image", i, i) for i in observation.images]
  again = run(crop(number, (0, 0, 1, 1)), seen, "clean")
  assert again.images[0].tobytes() == observation.images[0].tobytes()


def test_one_is_a_legal_coordinate_in_clean():
  observation = run(crop(1, (0.5, 0.5, 1.0, 1)), [picture()], "clean")
  assert observation.images[0].size == (50, 40)


# ---- Hostile text --------------------------------------------------------------------

VALUES = st.recursive(
  st.none()
  | st.booleans()
  | st.integers()
  | st.floats()
  | st.text(max_size=4)
  | st.sampled_from([0, 1, 2, -1, 0.5, 1.0, 10**6, 10**30, "1", "\ud800"]),
  lambda x: (
    st.lists(x, max_size=5)
    | st.dictionaries(
      st.sampled_from(["name", "arguments", "bbox_2d", "target_image"])
      | st.text(max_size=2),
      x,
      max_size=4,
    )
  ),
  max_leaves=12,
)
ARGUMENTS = st.fixed_dictionaries(
  {},
  optional={
    "bbox_2d": st.lists(st.floats(-0.5, 1.5) | st.integers(-2, 300), max_size=5)
    | VALUES,
    "target_image": st.integers(-3, 8) | VALUES,
    "target_frames": st.lists(st.integers(-3, 9), max_size=9) | VALUES,
  },
)
CALLS = st.fixed_dictionaries(
  {
    "name": st.sampled_from(tools.OPERATIONS) | VALUES,
    "arguments": ARGUMENTS | VALUES,
  }
)


def check_run(text, profile, pictures):
  """Runs a hostile turn; it becomes an answer, an error or pictures, and is stored."""
  call = tools.parse_call(text, profile)
  if call is None:
    return
  observation = tools.run_call(call, ops.Seen(pictures), profile, shrink=shrink)
  assert (observation.error is None) == bool(observation.images)
  assert len(observation.images) == len(observation.views) <= ops.MAX_FRAMES
  assert len(observation.text) < tools.MAX_ERROR + 40
  observation.text.encode()
  t = Trajectory(Task("a", "", "", []), calls=[OpCall(call.name, call.arguments)])
  assert from_json(to_json(t).encode().decode()) == t


@given(call=CALLS | VALUES, profile=PROFILES, pictures=st.sampled_from("iv"))
def test_no_json_raises(call, profile, pictures):
  pictures = [picture(), picture(300, 15)] if pictures == "i" else [clip(), picture()]
  text = json.dumps(call)
  check_run(f"x <tool_call>{text}</tool_call>", profile, pictures)


PIECES = (
  *("<tool_call>", "</tool_call>", '{"name":', '"select_frames"', '"arguments":'),
  *("{", "}", "[", "]", ",", '"', '"\\ud800"', "\\", "1e999", "-Infinity", "\0", " "),
)


@given(
  text=st.lists(st.sampled_from(PIECES) | st.text(max_size=3)).map("".join),
  profile=PROFILES,
)
@example('{"name": "\\ud83d\\ude00", "arguments": "\\ud800"}', "released")
@example('{"name": "' + "a" * 100_000 + '", "arguments": {}}', "clean")
def test_no_text_raises(text, profile):
  check_run(text, profile, [picture()])
  check_run(f"<tool_call>{text}</tool_call>", profile, [picture()])
