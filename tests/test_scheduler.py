"""Every sample plays once, in order, on a prompt that really lies in its row."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixel_jax.rollout.scheduler import Scheduler


def play(slots, groups, group_size, delay, turns, prompts=None):
  """Plays with `turns[i]` = chunks of each turn of sample i; returns what happened."""
  plan = Scheduler(
    slots=slots, prompts=prompts or slots, groups=groups, group_size=group_size,
    delay=delay,
  )  # fmt: skip
  prompt = [None] * (prompts or slots)  # group whose prompt lies in the row
  playing, left, log = {}, {}, []
  prefills, last = [], group_size - 1
  while not plan.done:
    assert plan.chunk < 10_000, "the scheduler never ends"
    for s in plan.refill():
      if s.sample == 0:
        prefills.append(s.group)
        prompt[s.row] = s.group
      assert s.slot not in playing
      playing[s.slot] = s
      left[s.slot] = list(turns[s.group * group_size + s.sample])
      log.append((s.group, s.sample))
    for slot in plan.collect():
      assert slot not in plan.decoding
      plan.resume(slot)
    # No prompt is lost while anybody goes on from it.
    assert all(prompt[s.row] == s.group for s in playing.values())
    waiting = plan.waiting
    lanes, moves = plan.drain([n for n in (2, 4) if n < slots] + [slots])
    for source, target in moves:
      assert source >= lanes > target and target not in playing
      playing[target], left[target] = playing.pop(source), left.pop(source)
    fewer = log[-1] == (groups - 1, last) or len(prompt) * group_size < slots
    assert lanes == slots or (lanes > max(playing) and fewer)
    assert playing.keys() >= plan.decoding and plan.waiting == waiting
    for slot in sorted(plan.decoding):
      left[slot][0] -= 1
      if left[slot][0] == 0:
        left[slot].pop(0)
        if left[slot]:
          plan.submit(slot)
        else:
          plan.release(slot)
          del playing[slot]
    plan.tick()
  assert not playing
  return log, prefills, plan.chunk


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_every_sample_starts_once_in_order(data):
  slots = data.draw(st.integers(1, 9))
  groups = data.draw(st.integers(0, 6))
  group_size = data.draw(st.integers(1, 12))
  delay = data.draw(st.integers(0, 3))
  prompts = data.draw(st.integers(1, 4))
  turn = st.lists(st.integers(1, 4), min_size=1, max_size=3)
  n = groups * group_size
  turns = data.draw(st.lists(turn, min_size=n, max_size=n))
  log, prefills, _ = play(slots, groups, group_size, delay, turns, prompts)
  assert log == [(g, s) for g in range(groups) for s in range(group_size)]
  assert prefills == list(range(groups))


def test_a_slot_is_refilled_while_others_decode():
  # One long sample must not hold up the short ones: 1 x 8 chunks beside 8 x 1.
  _, _, chunks = play(2, 9, 1, 0, [[8]] + [[1]] * 8)
  assert chunks == 8


def test_a_prompt_stays_until_its_last_sample_is_over():
  plan = Scheduler(slots=4, prompts=1, groups=2, group_size=2)
  assert [(s.slot, s.row) for s in plan.refill()] == [(0, 0), (1, 0)]
  assert plan.drain([2, 4]) == (2, [])  # more can never play
  plan.release(0)
  assert plan.refill() == []
  plan.release(1)
  assert [(s.group, s.sample) for s in plan.refill()] == [(1, 0), (1, 1)]


def test_operations_return_in_the_order_and_chunk_they_were_submitted_for():
  plan = Scheduler(slots=4, prompts=4, groups=4, group_size=1, delay=2)
  plan.refill()
  plan.submit(2)
  plan.submit(0)
  plan.tick()
  plan.submit(1)
  assert plan.collect() == []
  plan.tick()
  assert plan.collect() == [2, 0]
  plan.tick()
  assert plan.collect() == [1]
  assert plan.decoding == {3} and not plan.done


def test_drain_moves_those_who_play_into_the_lowest_slots():
  plan = Scheduler(slots=8, prompts=8, groups=8, group_size=1)
  assert plan.drain([2, 4, 8]) == (8, [])  # samples wait
  plan.refill()
  assert plan.drain([2, 4, 8]) == (8, [])
  for slot in (0, 2, 4, 5):
    plan.release(slot)
  plan.submit(7)
  assert plan.drain([2, 4, 8]) == (4, [(6, 0), (7, 2)])
  assert plan.decoding == {0, 1, 3} and plan.waiting == 1
  plan.tick()
  assert plan.collect() == [2]


def test_steady_from_the_first_refill_until_nobody_waits():
  plan = Scheduler(slots=2, prompts=2, groups=4, group_size=1)
  seen = []
  for _ in range(4):
    plan.refill()
    seen.append(plan.steady)
    plan.release(min(plan.decoding))
  assert seen == [False, True, False, False]


def test_sizes_are_checked():
  with pytest.raises(ValueError, match="at least one slot"):
    Scheduler(slots=0, prompts=1, groups=1, group_size=1)
