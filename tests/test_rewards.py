"""The shaped reward against the table of pixel_reasoner.md 3.4, by hand."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from pixel_jax.rl import rewards

G = 8


def users(*counts):
  """ops i32[Q G]: in query q the first counts[q] rollouts operate once."""
  return np.stack([(np.arange(G) < n).astype(np.int32) for n in counts])


def shaped(ops, correct=None, attempted=None, **kwargs):
  correct = np.zeros(ops.shape, np.float32) if correct is None else correct
  parts = rewards.shaped(
    correct, ops, ops if attempted is None else attempted, **kwargs
  )
  return {k: np.asarray(v) for k, v in parts.items()}


def test_paper_table():
  parts = shaped(users(0, 1, 2, 3, 8))
  np.testing.assert_allclose(parts["rapr"], [0, 0.125, 0.25, 0.375, 1])
  np.testing.assert_allclose(
    parts["curiosity"][:, 0], [0, 0.0875, 0.025, 0, 0], atol=1e-7
  )
  assert (parts["curiosity"][1, 1:] == 0).all()  # only those that operate


@pytest.mark.parametrize(
  "is_video, expected",
  [(False, [0, 0.175, 0.025, 0]), (True, [0, 0.7 / 3, 0.1 / 3, 0])],
)
def test_released_table(is_video, expected):
  parts = shaped(
    users(0, 1, 2, 3),
    is_video=np.full(4, is_video),
    variant="released",
    count="attempts",
  )
  np.testing.assert_allclose(parts["curiosity"][:, 0], expected, atol=1e-6)


def test_penalty_counts_every_attempt_beyond_n():
  attempted = np.array([[0, 1, 2, 5]], np.int32)
  parts = shaped(np.zeros((1, 4), np.int32), attempted=attempted)
  np.testing.assert_allclose(parts["penalty"], [[0, 0, -0.05, -0.2]], atol=1e-7)
  np.testing.assert_allclose(
    shaped(np.zeros((1, 4), np.int32), attempted=attempted, N=3)["penalty"],
    [[0, 0, 0, -0.1]],
    atol=1e-7,
  )


def test_failed_operations_earn_nothing_unless_attempts_count():
  succeeded, attempted = np.zeros((1, G), np.int32), users(1)
  assert shaped(succeeded, attempted=attempted)["curiosity"].sum() == 0
  counted = shaped(succeeded, attempted=attempted, count="attempts")
  np.testing.assert_allclose(counted["curiosity"][0, 0], 0.0875, atol=1e-7)
  np.testing.assert_allclose(counted["rapr"], [0.125])


def test_unrepaired_error_zeroes_its_own_rollout_only():
  correct = np.array([[1, 1, 0, 1], [1, 1, 1, 1]], np.float32)
  error = np.array([[0, 1, 1, 0], [0, 0, 0, 1]], bool)
  ops = np.ones((2, 4), np.int32)
  released = shaped(ops, correct, error_unrepaired=error, variant="released")
  np.testing.assert_array_equal(released["correct"], [[1, 0, 0, 1], [1, 1, 1, 0]])
  paper = shaped(ops, correct, error_unrepaired=error)
  np.testing.assert_array_equal(paper["correct"], correct)


def test_unparsed_is_minus_one_only_as_released():
  unparsed = np.array([[True, False]])
  ops = np.zeros((1, 2), np.int32)
  np.testing.assert_array_equal(
    shaped(ops, unparsed=unparsed, variant="released")["correct"], [[-1, 0]]
  )
  np.testing.assert_array_equal(shaped(ops, unparsed=unparsed)["correct"], [[0, 0]])


def test_alpha_zero_is_no_curiosity_and_shares_the_program():
  assert shaped(users(1), alpha=0.0)["curiosity"].sum() == 0
  program = rewards.shaped.__wrapped__  # below the check of its settings
  size = program._cache_size()
  shaped(users(1), alpha=0.25)
  assert program._cache_size() == size


@pytest.mark.parametrize("wrong", [dict(variant="mine"), dict(count="all")])
def test_unknown_words_are_refused(wrong):
  with pytest.raises(ValueError, match=next(iter(wrong.values()))):
    shaped(users(1), **wrong)


@hypothesis.settings(deadline=None, max_examples=30)
@hypothesis.given(st.integers(0, 2**32 - 1), st.sampled_from(["paper", "released"]))
def test_equals_the_formula_written_as_a_loop(seed, variant):
  rng = np.random.default_rng(seed)
  Q = 3
  correct = rng.integers(0, 2, (Q, G)).astype(np.float32)
  attempted = rng.integers(0, 4, (Q, G)).astype(np.int32)
  succeeded = np.minimum(attempted, rng.integers(0, 4, (Q, G))).astype(np.int32)
  is_video = rng.integers(0, 2, Q).astype(bool)
  parts = shaped(
    succeeded, correct, attempted, is_video=is_video, variant=variant, alpha=0.5
  )
  for q in range(Q):
    rapr = sum(n > 0 for n in succeeded[q]) / G
    for g in range(G):
      bonus = 0.5 * max(0.3 - rapr, 0) if succeeded[q, g] else 0.0
      if variant == "released" and bonus:
        bonus = 0.25 * max(0.3 - rapr, 0) / ((1.5 if is_video[q] else 2.0) * rapr)
      expected = correct[q, g] + bonus + 0.05 * min(1 - attempted[q, g], 0)
      assert abs(parts["total"][q, g] - expected) < 1e-6
