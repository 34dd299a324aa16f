"""What runs only in `./launch/test.sh --all`."""

import pytest


def rest_slow(values):
  """For parametrize: the first value is tried in every run, the others in --all."""
  first, *rest = values
  marked = [
    pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=pytest.mark.slow)
    for v in rest
  ]
  return [first, *marked]
