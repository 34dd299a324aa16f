"""A small part of the fuzz campaign; all of it: python tests/fuzz.py."""

import fuzz


def test_no_output_of_a_model_crashes():
  kinds, crashes, _ = fuzz.outputs(1500)
  assert not crashes
  assert {
    "answer",
    "ok",
    "bad_json",
    "bad_arguments",
    "unknown_operation",
  } <= kinds.keys()
  assert sum(kinds.values()) == 1500


def test_every_record_of_a_broken_file_is_read_or_set_aside():
  told, crashes = fuzz.files(6)
  assert not crashes
  for kind in fuzz.FORMATS:
    assert any(k.startswith(kind) and not k.endswith("read") for k in told), told


def test_a_turn_of_a_million_characters_has_an_answer():
  from pixel_jax import answers

  for filler in ("}", "{", "\\boxed{", "9", "\\text{"):
    turn = filler * 10**6 + " so \\boxed{red}"
    assert answers.judge(turn, "red") == 1.0
    assert answers.judge(filler * 10**6, "red") == 0.0
