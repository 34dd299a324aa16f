"""Statistics of evaluations: intervals of rates and of differences, paired tests.

Numbers in, numbers out; no jax.  Resampling is seeded, so that the same answers give the
same interval.
"""

import math
from collections.abc import Hashable, Sequence

import numpy as np

RESAMPLES = 2000


def wilson(p: float, n: float, z: float = 1.96) -> tuple[float, float]:
  """The 95 % interval of a rate p out of n (Wilson 1927); sound near 0 and 1."""
  if n == 0:
    return 0.0, 1.0
  p = min(max(p, 0.0), 1.0)
  centre = p + z * z / (2 * n)
  half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
  scale = 1 + z * z / n
  return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def interval(
  values: Sequence[float], clusters: Sequence[Hashable]
) -> tuple[float, float]:
  """The 95 % interval of the mean of scores in [0, 1].

  Wilson's where every score is 0 or 1 and stands alone; else from drawing whole clusters
  anew (percentile bootstrap), since answers about one picture, or samples of one question,
  are not independent.
  """
  alone = len(set(clusters)) == len(values)
  if alone and all(v in (0, 1) for v in values):
    return wilson(sum(values) / max(len(values), 1), len(values))
  return _bootstrap(values, clusters)


def paired_difference(
  a: Sequence[float], b: Sequence[float], clusters: Sequence[Hashable]
) -> tuple[float, float, float]:
  """mean(a) - mean(b) of the same questions, and its 95 % interval by clusters."""
  d = np.subtract(a, b)
  return float(d.mean()), *_bootstrap(d, clusters)


def mcnemar(a: Sequence[float], b: Sequence[float]) -> float:
  """The exact two-sided p of "neither is right more often" (McNemar 1947).

  Only questions that one of them gets right and the other wrong count.
  """
  more = sum(x > y for x, y in zip(a, b, strict=True))
  fewer = sum(x < y for x, y in zip(a, b, strict=True))
  n, least = more + fewer, min(more, fewer)
  tail = sum(math.comb(n, i) for i in range(least + 1))
  return min(1.0, 2 * tail / 2**n)


def pass_at_k(right: int, samples: int, k: int) -> float:
  """The chance that one of k samples is right, without bias (Chen et al. 2021)."""
  if samples - right < k:
    return 1.0
  return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def _bootstrap(values, clusters) -> tuple[float, float]:
  index: dict[Hashable, int] = {}
  member = np.array([index.setdefault(c, len(index)) for c in clusters])
  if not len(member):
    return 0.0, 1.0
  sums = np.bincount(member, weights=np.asarray(values, float))
  sizes = np.bincount(member).astype(float)
  rng, n = np.random.default_rng(0), len(sums)
  means = np.empty(RESAMPLES)
  for i in range(RESAMPLES):  # one at a time: n may be 20,000
    drawn = rng.integers(0, n, n)
    means[i] = sums[drawn].sum() / sizes[drawn].sum()
  low, high = np.percentile(means, [2.5, 97.5])
  return float(low), float(high)
