"""Intervals and tests against values worked out elsewhere."""

import numpy as np
import pytest

from pixel_jax import statistics


def test_wilson():
  """Newcombe 1998, table I: 81 of 263, and 0 of 20."""
  assert statistics.wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
  assert statistics.wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
  assert statistics.wilson(0, 0) == (0.0, 1.0)


def test_mcnemar():
  """Exact binomial: 2 against 8 of 10 is 2 * 56 / 1024."""
  a = [1] * 8 + [0] * 2 + [1] * 5
  b = [0] * 8 + [1] * 2 + [1] * 5
  assert statistics.mcnemar(a, b) == statistics.mcnemar(b, a) == 2 * 56 / 1024
  assert statistics.mcnemar([1, 0], [1, 0]) == 1.0


@pytest.mark.parametrize("right", [0, 1, 3, 8])
@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_pass_at_k_is_the_mean_over_all_choices(right, k):
  import itertools

  outcomes = [1] * right + [0] * (8 - right)
  chosen = [any(c) for c in itertools.combinations(outcomes, k)]
  assert statistics.pass_at_k(right, 8, k) == pytest.approx(np.mean(chosen))


def test_clusters_widen_an_interval():
  """Four copies of each answer are no more knowledge than one."""
  values = [0, 1] * 50
  alone = statistics.interval(values, range(100))
  assert alone == statistics.wilson(0.5, 100)
  low, high = statistics.interval(np.repeat(values, 4), np.repeat(np.arange(100), 4))
  assert high - low == pytest.approx(alone[1] - alone[0], rel=0.1)
  assert statistics.interval([0.25, 0.75], "ab") == statistics.interval(
    [0.25, 0.75], "ab"
  )


def test_pairs():
  a, b = [1, 1, 0, 1] * 25, [0, 1, 0, 1] * 25
  difference, low, high = statistics.paired_difference(a, b, range(100))
  assert difference == 0.25 and 0.15 < low < 0.25 < high < 0.35
