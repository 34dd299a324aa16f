"""Preemption: SIGTERM or Ctrl-C asks a run to save and to leave, with exit code 0.

Clouds and batch systems send SIGTERM some time before they take a machine away.  The
loops ask for it where their state is whole; whether it has come is known to a process at
once (`given`) and to all of them when they agree (`agreed`).  A second Ctrl-C leaves at
once, as a kill does, and what was saved stays.
"""

import os
import signal

from pixel_jax import parallel
from pixel_jax.run import lock

SIGNALS = (signal.SIGTERM, signal.SIGINT)
AT_ONCE = 130  # the exit code of a program that Ctrl-C ended


class Notice:
  """Catches SIGTERM and Ctrl-C until it is closed.

  Nothing is raised where the signal comes: an exception amid a compilation would crash
  the compiler.  Made after `parallel.initialize`: jax has a handler of SIGTERM of its own
  then, which notes the signal for its own protocol and nothing else.
  """

  def __init__(self):
    self._given = False
    self._before = {number: signal.signal(number, self._catch) for number in SIGNALS}

  def given(self) -> bool:
    """Whether this process was told."""
    return self._given

  def agreed(self) -> bool:
    """Whether any process was told; all of them ask together."""
    return parallel.agree(self._given, "any")

  def close(self) -> None:
    """The signals mean again what they did."""
    for number, before in self._before.items():
      signal.signal(number, before)

  def _catch(self, number, frame) -> None:
    if number == signal.SIGINT:
      if self._given:
        lock.release()
        os._exit(AT_ONCE)
      os.write(
        2, b"\nstopping: the run saves and leaves; Ctrl-C again leaves at once\n"
      )
    self._given = True
