"""A service: an engine that plays what arrives, in a thread of its own.

  submit(Job) -> number      from any thread; Busy where too many wait
  cancel(number)             nobody waits for it any more: its slots are free at once

The thread keeps one session open.  What a job hears is called in that thread and must
return at once.
"""

import collections
import dataclasses
import itertools
import threading
import time
from typing import Any

from absl import logging

from pixel_jax.rollout.engine import Engine
from pixel_jax.rollout.session import Group, Session


class Busy(Exception):
  """So many wait that another would wait too long."""


@dataclasses.dataclass(eq=False)
class Job:
  """A group with what becomes of it; `Group.failed` hears of every failure."""

  group: Group
  number: int = -1
  begun: float = 0.0


class Service:
  """One engine with its weights.

  Args:
    most: jobs that may be there, those that play included.
  """

  def __init__(self, engine: Engine, params: Any, *, most: int):
    self.engine, self._params, self._most = engine, params, most
    self._inbox: collections.deque[Job] = collections.deque()
    self._unwanted: collections.deque[int] = collections.deque()
    self._jobs: dict[int, tuple[Job, int]] = {}  # number -> job, group of the session
    self._numbers = itertools.count()
    self._wake = threading.Condition()
    self._closed = False
    self.failures = 0
    self.stats: dict[str, float] = {}
    self.seconds: collections.deque[float] = collections.deque(maxlen=64)  # of jobs
    self._thread = threading.Thread(target=self._serve, daemon=True, name="service")
    self._thread.start()

  @property
  def load(self) -> int:
    """Jobs that wait or play."""
    return len(self._inbox) + len(self._jobs)

  @property
  def full(self) -> bool:
    return self.load >= self._most

  @property
  def alive(self) -> bool:
    return self._thread.is_alive()

  def submit(self, group: Group) -> int:
    with self._wake:
      if self.full:
        raise Busy
      job = Job(group, next(self._numbers), time.monotonic())
      self._inbox.append(job)
      self._wake.notify()
    return job.number

  def cancel(self, number: int) -> None:
    with self._wake:
      self._unwanted.append(number)
      self._wake.notify()

  def close(self) -> None:
    """Ends the thread; what waits is told that it failed."""
    with self._wake:
      self._closed = True
      self._wake.notify()
    self._thread.join(timeout=60)

  # ---- In its thread -----------------------------------------------------------------

  def _serve(self) -> None:
    while not self._closed:
      try:
        with self.engine.open(self._params, bans=True, fixed_batch=True) as session:
          while not self._closed:
            self._meet(session)
            if not session.done:
              session.step()
              self.stats = session.stats()
      except Exception as error:  # the session may be in any state: a new one
        logging.exception("the engine failed; what it played is given up")
        self.failures += 1
        self._fail(error)
    self._fail(RuntimeError("the server is closing"))

  def _meet(self, session: Session) -> None:
    """Takes in what has arrived, and gives up what is unwanted; waits while idle."""
    with self._wake:
      while session.done and not (self._inbox or self._unwanted or self._closed):
        self._wake.wait()
      arrived, unwanted = [*self._inbox], {*self._unwanted}
      for job in arrived:  # known before the inbox forgets them, for `load`
        self._jobs[job.number] = (job, -1)
      self._inbox.clear()
      self._unwanted.clear()
    for job in arrived:
      if job.number in unwanted:
        self._jobs.pop(job.number, None)
      else:
        number = session.add(self._watched(job))
        self._jobs[job.number] = (job, number)
    for number in unwanted & self._jobs.keys():
      _, group = self._jobs.pop(number)
      session.withdraw(group)

  def _watched(self, job: Job) -> Group:
    """The job's group, whose end is noticed here, too."""
    left = len(job.group.keys)

    def ended(finished) -> None:
      nonlocal left
      left -= 1
      if not left:
        self._jobs.pop(job.number, None)
        self.seconds.append(time.monotonic() - job.begun)
      job.group.ended(finished)

    def failed(error: Exception) -> None:
      self._jobs.pop(job.number, None)
      job.group.failed(error)

    return dataclasses.replace(job.group, ended=ended, failed=failed)

  def _fail(self, error: Exception) -> None:
    with self._wake:
      jobs = [job for job, _ in self._jobs.values()] + [*self._inbox]
      self._jobs.clear()
      self._inbox.clear()
    for job in jobs:
      job.group.failed(error)

  def wait(self) -> float:
    """About how many seconds a new job would wait for a free slot."""
    each = sum(self.seconds) / len(self.seconds) if self.seconds else 1.0
    rounds = self.load / max(1, self.engine.slots)
    return max(1.0, each * rounds)
