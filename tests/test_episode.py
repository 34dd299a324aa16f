"""A conversation stops for the right reason and loses nothing that was said."""

import pytest
import questions
from questions import ANSWER, crop, load_media, replay, select, task

from pixel_jax.chat.encode import Conversation
from pixel_jax.rollout.episode import Episode


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
  return questions.codec(tmp_path_factory.mktemp("words"))


def begin(codec, question=None, **limits):
  limits = dict(max_len=400, max_patches=64, max_turns=3, max_new_tokens=100) | limits
  conversation = Conversation(codec, question or task(0), load_media)
  return Episode(conversation, **limits)


def say(codec, episode, turn):
  ids = codec.tokenizer.encode(turn)
  return episode.feed(ids, [-1.0] * len(ids), ended=ids[-1] == codec.tokenizer.im_end)


def test_answer(codec):
  e = begin(codec)
  assert say(codec, e, ANSWER) == "done"
  t = e.conversation.trajectory
  assert t.stop == "answer" and t.turns[-1]["text"] == "\\boxed{O}"
  assert t.ids == replay(codec, task(0), [ANSWER]).trajectory.ids


@pytest.mark.parametrize("video", [False, True])
def test_operate_then_answer(codec, video):
  question, call = task(1, video), select("3, 5") if video else crop()
  e = begin(codec, question)
  assert say(codec, e, call) == "operate" and e.operate()
  shown = list(e.shown(0, len(e.ids)))
  assert len(shown) == (3 if video else 2)
  first = e.conversation.trajectory.slots[1].start
  assert [s for s, _ in e.shown(first, first + 1)] == [first]
  assert say(codec, e, ANSWER) == "done"
  t, expected = e.conversation.trajectory, replay(codec, question, [call, ANSWER])
  assert (t.ids, t.position) == (expected.trajectory.ids, expected.trajectory.position)
  assert t.slots == expected.trajectory.slots and t.calls == expected.trajectory.calls
  assert [p.key for p in e.conversation.pixels] == [p.key for p in expected.pixels]
  assert [x for x, s in zip(t.logp, t.sampled) if s] == [-1.0] * sum(t.sampled)


def test_a_turn_may_come_in_pieces(codec):
  e, ids = begin(codec), codec.tokenizer.encode(crop())
  for i in ids[:-1]:
    assert e.feed([i], [0.0], ended=False) == "decode"
  assert e.budget == 100 - len(ids) + 1
  assert e.feed(ids[-1:], [0.0], ended=True) == "operate"
  assert e.ids == replay(codec, task(0), []).trajectory.ids + ids


def test_turn_without_end_is_truncated_and_kept(codec):
  e = begin(codec, max_new_tokens=3)
  ids = codec.tokenizer.encode("abc")
  assert e.feed(ids[:2], [0.0] * 2, ended=False) == "decode"
  assert e.feed(ids[2:], [0.0], ended=False) == "done"
  assert e.conversation.trajectory.stop == "length" and e.ids[-3:] == ids


def test_end_on_the_last_token_of_the_budget_is_an_answer(codec):
  e = begin(codec, max_new_tokens=4)
  assert say(codec, e, ANSWER) == "done"  # \boxed{ O } <|im_end|>
  assert e.conversation.trajectory.stop == "answer"


def test_call_in_the_last_turn_is_not_run(codec):
  e = begin(codec, max_turns=2)
  assert say(codec, e, crop()) == "operate" and e.operate()
  assert say(codec, e, crop()) == "done"
  t = e.conversation.trajectory
  assert t.stop == "turns" and len(t.calls) == 1 and t.turns[-1]["role"] == "assistant"


def test_observation_that_does_not_fit_loses_nothing(codec):
  whole = replay(codec, task(0), [crop()]).trajectory
  for max_len, fits in ((len(whole.ids) + 1, True), (len(whole.ids), False)):
    e = begin(codec, max_len=max_len)
    assert say(codec, e, crop()) == "operate"
    said = list(e.ids)
    assert e.operate() is fits
    t = e.conversation.trajectory
    assert len(t.calls) == 1
    assert t.calls[0].error == (None if fits else "no_room") and t.ops_succeeded == fits
    if fits:
      assert t.ids == whole.ids and e.budget == 1
    else:
      assert t.stop == "length" and t.ids == said and len(t.slots) == 1
      assert t.turns[-1]["role"] == "assistant" and len(e.conversation.pixels) == 1


def test_an_episode_ends_before_a_row_is_too_small(codec):
  whole = replay(codec, task(0), [crop()])
  tokens = len(whole.trajectory.ids)
  patches = sum(p.num_patches for p in whole.pixels)
  for row, fits in (
    ((tokens + 1, patches), True), ((tokens, patches), False), ((999, patches - 1), False)
  ):  # fmt: skip
    e = begin(codec, row=row)
    assert say(codec, e, crop()) == "operate" and e.operate() is fits
    t = e.conversation.trajectory
    assert t.stop == ("" if fits else "row") and len(t.ids) < row[0]
    assert fits or t.calls[0].error == "no_room"
  question = len(replay(codec, task(0), []).trajectory.ids)
  e = begin(codec, row=(question + 3, patches))
  assert e.budget == 3
  assert e.feed([65] * 3, [0.0] * 3, ended=False) == "done"
  assert e.conversation.trajectory.stop == "row" and len(e.ids) == question + 3
  e = begin(codec, row=(question, patches))
  assert not e.fits
  e.refuse()
  assert e.conversation.trajectory.stop == "row"


def test_where_operations_are_forbidden_none_is_run(codec):
  e = begin(codec, operations=False)
  assert say(codec, e, crop()) == "done"
  t = e.conversation.trajectory
  assert t.stop == "turns" and not t.calls and len(t.slots) == 1


def test_limits_are_checked(codec):
  with pytest.raises(ValueError, match="must be positive"):
    begin(codec, max_turns=0)
