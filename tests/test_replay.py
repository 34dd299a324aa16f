"""Selective Sample Replay: what stays, what is drawn, and that it can be repeated."""

import json

import numpy as np
import pytest

from pixel_jax.rl.replay import Replay


def samples(*advantages):
  return [{"id": i, "advantage": a} for i, a in enumerate(advantages)]


def rng(seed=0):
  return np.random.default_rng(seed)


def test_samples_without_advantage_are_replaced():
  given = samples(0.5, 0.0, -0.5, 0.0)
  chosen, drawn = Replay().select(given, rng())
  assert chosen[:2] == [given[0], given[2]] and drawn == 2 and len(chosen) == 4
  assert all(c["advantage"] for c in chosen)


def test_draws_follow_the_advantage_to_the_alpha():
  given = samples(1.0, -3.0, *[0.0] * 40_000)
  for alpha in (0.0, 1.0, 2.0):
    chosen, drawn = Replay(alpha=alpha).select(given, rng())
    share = sum(c["id"] == 1 for c in chosen[2:]) / drawn
    assert abs(share - 3**alpha / (1 + 3**alpha)) < 0.01


def test_the_same_generator_draws_the_same():
  given = samples(*rng(1).normal(size=20), *[0.0] * 20)
  first, second, other = (Replay().select(given, rng(s))[0] for s in (7, 7, 8))
  assert first == second and first != other


def test_all_uniform_gives_nothing_and_no_division_by_zero():
  assert Replay().select(samples(0.0, 0.0), rng()) == ([], 0)
  assert Replay(keep_steps=2).select([], rng()) == ([], 0)


def test_cleared_every_step():
  replay = Replay()
  replay.select(samples(5.0), rng())
  assert replay.select(samples(0.0, 0.0), rng()) == ([], 0)
  assert replay.get_state() == {"steps": []}


def test_keep_steps_draws_from_earlier_steps_and_forgets_older_ones():
  replay = Replay(keep_steps=2)
  for name in "abc":
    replay.select([{"id": name, "advantage": 1.0}], rng())
  chosen, drawn = replay.select(samples(*[0.0] * 100), rng())
  assert drawn == 100 and {c["id"] for c in chosen} == {"b", "c"}


def test_state_continues_bit_for_bit():
  steps = [samples(*rng(s).normal(size=3), 0.0, 0.0) for s in range(4)]
  straight, first = Replay(keep_steps=2), Replay(keep_steps=2)
  for step, given in enumerate(steps[:2]):
    straight.select(given, rng(step)), first.select(given, rng(step))
  second = Replay(keep_steps=2)
  second.set_state(json.loads(json.dumps(first.get_state())))
  for step, given in enumerate(steps[2:]):
    assert straight.select(given, rng(step)) == second.select(given, rng(step))


def test_without_refill_only_the_useless_go():
  given = samples(0.5, 0.0, -0.5)
  assert Replay(refill=False).select(given, rng()) == ([given[0], given[2]], 0)


def test_advantage_spread_over_tokens_and_bad_ones():
  given = [{"advantage": np.array([0.0, -0.5, -0.5])}, {"advantage": np.zeros(3)}]
  chosen, _ = Replay().select(given, rng())
  assert chosen[0] is given[0] and chosen[1] is given[0]
  with pytest.raises(ValueError, match="not finite"):
    Replay().select(samples(np.nan), rng())
