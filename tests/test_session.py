"""Groups that come and go while others play: who stays is not touched by it."""

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixel_jax import parallel
from pixel_jax.chat import encode
from pixel_jax.data import world
from pixel_jax.rollout import decode, fleet
from pixel_jax.rollout.engine import Engine, key_of
from pixel_jax.rollout.scheduler import Scheduler
from pixel_jax.rollout.session import Group
from pixel_jax.run import policies

LIKELIEST = decode.Wish(0.0)


@pytest.fixture(scope="module")
def playing():
  """An engine of four slots, and its weights."""
  mesh = parallel.make_mesh(1, 1, 1)
  policy = policies.open_policy(
    "tiny_base", model=dict(dtype="float32", attention="xla"), codec=None, mesh=mesh
  )
  params = fleet.prepare(policy.config, policy.params)
  engine = Engine(
    policy.config, policy.codec, group_size=3, slots=4, max_prompt=16, max_len=112,
    prompt_len=16, extend_len=16, patches=512, chunk=4,
  )  # fmt: skip
  return engine, params


def group(engine, index, log, samples=1, sampling=LIKELIEST, **more):
  task = world.task(0, "test", index)
  return Group(
    prompt=functools.partial(encode.Conversation, engine.codec, task, world.load_media),
    keys=[key_of(0, 0, task.id, s) for s in range(samples)],
    sampling=sampling,
    script=[[]] * samples,
    limits=dict(max_turns=3, max_new_tokens=24),
    ended=lambda f: log.append((index, f.trajectory.sample, f.trajectory.ids)),
    **more,
  )


def played(engine, params, indices, events=(), **kwargs):
  """What every group says; `events` are called with the session before a step."""
  log = []
  with engine.open(params, fixed_batch=True) as session:
    for i in indices:
      session.add(group(engine, i, log, **kwargs))
    step = 0
    while not session.done:
      for at, event in events:
        if at == step:
          event(session, log)
      session.step()
      step += 1
      assert step < 1000
    assert session.playing == 0
  return {(i, s): ids for i, s, ids in log}


def test_newcomers_and_leavers_change_nothing_for_the_others(playing):
  engine, params = playing
  alone = played(engine, params, [0, 1, 2, 4, 5, 6, 8])
  events = [
    (1, lambda s, log: s.add(group(engine, 9, log))),
    (2, lambda s, log: s.withdraw(1)),  # plays
    (2, lambda s, log: s.withdraw(6)),  # waits
    (3, lambda s, log: s.withdraw(6)),  # is gone
    (4, lambda s, log: s.add(group(engine, 10, log))),
  ]
  mixed = played(engine, params, [0, 1, 2, 4, 5, 6, 8], events)
  assert {i for i, _ in mixed} == {0, 2, 4, 5, 6, 9, 10}
  assert all(ids == alone[key] for key, ids in mixed.items() if key in alone)
  assert played(engine, params, [9, 10]) == {k: mixed[k] for k in mixed if k[0] > 8}


def test_rows_of_other_wishes_play_side_by_side(playing):
  engine, params = playing
  wishes = [
    decode.Wish(0.0),
    decode.Wish(1.0),
    decode.Wish(0.7, 0.9),
    decode.Wish(1, 1, 5),
  ]
  alone = {}
  for i, wish in enumerate(wishes):
    alone |= played(engine, params, [i], sampling=wish)
  log = []
  with engine.open(params, fixed_batch=True) as session:
    for i, wish in enumerate(wishes):
      session.add(group(engine, i, log, sampling=wish))
    while not session.done:
      session.step()
  assert {(i, s): ids for i, s, ids in log} == alone


def test_a_prompt_that_cannot_be_made_is_told_and_frees_its_slots(playing):
  engine, params = playing
  failed = []

  def broken():
    raise ValueError("no such picture")

  log = []
  with engine.open(params, fixed_batch=True) as session:
    for i in (0, 1):
      good = group(engine, i, log, samples=3)
      session.add(good)
      bad = group(engine, i, log, samples=3, failed=failed.append)
      session.add(Group(**{**vars(bad), "prompt": broken}))
    while not session.done:
      session.step()
    assert session.playing == 0
  assert [str(e) for e in failed] == ["no such picture"] * 2
  assert sorted((i, s) for i, s, _ in log) == [(i, s) for i in (0, 1) for s in range(3)]


def test_what_is_heard_is_what_was_sampled(playing):
  engine, params = playing
  heard, log = [], []
  with engine.open(params, fixed_batch=True) as session:
    session.add(group(engine, 1, log, heard=lambda s, ids, logp: heard.extend(ids)))
    while not session.done:
      session.step()
  ((_, _, ids),) = log
  said = [i for i in heard if i in ids]
  assert said == heard and len(heard) >= 4
  text = engine.codec.tokenizer.decode(ids)
  assert engine.codec.tokenizer.decode(heard[-3:]) in text


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_rows_and_slots_come_back_whoever_leaves(data):
  """Groups of any size come, play for a while, and are withdrawn at any time."""
  slots, prompts = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
  plan = Scheduler(slots=slots, prompts=prompts, groups=0, group_size=3)
  playing, gone = {}, set()
  for _ in range(data.draw(st.integers(1, 25))):
    move = data.draw(st.sampled_from(("add", "refill", "release", "withdraw")))
    if move == "add":
      plan.add(data.draw(st.integers(1, 3)))
    elif move == "refill":
      for start in plan.refill():
        assert start.slot not in playing and start.group not in gone
        rows = {s.row for s in playing.values() if s.group != start.group}
        assert start.row not in rows
        playing[start.slot] = start
    elif move == "release" and playing:
      slot = data.draw(st.sampled_from(sorted(playing)))
      plan.release(slot)
      del playing[slot]
    elif move == "withdraw" and plan._groups:
      number = data.draw(st.integers(0, plan._groups - 1))
      plan.withdraw(number)
      gone.add(number)
      for slot in [s for s, x in playing.items() if x.group == number]:
        plan.release(slot)
        del playing[slot]
  for _ in range(200):
    for start in plan.refill():
      playing[start.slot] = start
    for slot in [*playing]:
      plan.release(slot)
      del playing[slot]
  assert plan.done and len(plan._rows) == prompts and not plan._left
