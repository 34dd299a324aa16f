"""Preemption: SIGTERM asks a run to save and to leave, with exit code 0.

Clouds and batch systems send it some time before they take a machine away.  The loops
ask for it where their state is whole; whether it has come is known to a process at once
(`given`) and to all of them when they agree (`agreed`).
"""

import signal

from pixel_jax import parallel


class Notice:
  """Catches SIGTERM until it is closed.

  Made after `parallel.initialize`: jax has a handler of its own then, which notes the
  signal for its own protocol and nothing else.
  """

  def __init__(self):
    self._given = False
    self._before = signal.signal(signal.SIGTERM, self._catch)

  def given(self) -> bool:
    """Whether this process was told."""
    return self._given

  def agreed(self) -> bool:
    """Whether any process was told; all of them ask together."""
    return parallel.agree(self._given, "any")

  def close(self) -> None:
    """SIGTERM means again what it did."""
    signal.signal(signal.SIGTERM, self._before)

  def _catch(self, number, frame) -> None:
    self._given = True
