"""A stream of batches with a state: read ahead by a thread, resumed from its state."""

import functools
import json
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any

from absl import logging

from pixel_jax.data.quarantine import DataError


class Stream:
  """An endless iterator with a state, filled by a thread of its own.

  The state is JSON: {"layout": ..., "shards": {"0": ...}}, the shards of this host; the
  states of several hosts are joined by joining their shards.

    batch = next(stream)
    update(batch)        sent off; the devices are at work
    stream.prepare()     meanwhile the next batch is placed; the state stays that of
                         `batch`
  """

  def __init__(
    self,
    produce,
    layout: dict,
    shards: dict[str, dict],
    read_ahead: int,
    place: Callable[[Any], Any] | None = None,
    accept: bool = False,
  ):
    """`accept`: whether a state of other data is gone on from, see `set_state`."""
    self._produce, self._depth, self._place = produce, read_ahead, place
    self._accept = accept
    self._state = {"layout": layout, "shards": shards}
    self._reader: _Reader | None = None
    self._ready: tuple[Any, dict] | Exception | None = None  # prepared

  def __iter__(self) -> "Stream":
    return self

  def __next__(self) -> Any:
    self.prepare()
    ready, self._ready = self._ready, None
    if isinstance(ready, Exception):
      raise ready
    value, self._state = ready
    return value

  def prepare(self) -> None:
    """Places the next item ahead of its use; what goes wrong is raised by `next`."""
    if self._ready is not None:
      return
    if self._reader is None:
      self._reader = _Reader(self._produce, self._state, self._depth)
      # The thread must not keep this object alive, nor outlive it.
      weakref.finalize(self, self._reader.stop)
    try:
      value, state = self._reader.take()
      self._ready = (self._place(value) if self._place else value, state)
    except Exception as error:
      self._ready = error

  def get_state(self) -> dict:
    """Where the next item begins; as if nothing had been read ahead."""
    return json.loads(json.dumps(self._state))

  def set_state(self, state: dict) -> None:
    """Goes on behind what was consumed when `state` was taken.

    DataError where it was taken of other data.  With `accept` as many records are passed
    over as were consumed, in the order of today's data.
    """
    mine = self._state
    different = {
      k: (state["layout"].get(k), v)
      for k, v in mine["layout"].items()
      if state["layout"].get(k) != v
    }
    missing = sorted(set(mine["shards"]) - set(state["shards"]), key=int)
    told = f"the data of the saved run differs (saved, now): {different}"
    if missing or (different and not self._accept):
      raise DataError(
        f"{told}; shards without a state: {missing}. Continue with the same data; or with "
        "this, in another order than it began: --config.data.changed=accept; or start a "
        "new run"
      )
    self.close()
    shards = {s: state["shards"][s] for s in mine["shards"]}
    if different:
      logging.warning("%s: accepted, what follows comes in another order", told)
      if different.keys() - {"records"}:  # rows are packed in another way
        shards = {s: at | {"row": 0} if "row" in at else at for s, at in shards.items()}
    self._state = {"layout": mine["layout"], "shards": shards}

  def counts(self) -> dict[str, float]:
    """Metrics of what was consumed: records read, set aside as bad, left out."""
    names = ("data/records", "data/bad_records", "data/left_out")
    shards = self._state["shards"].values()
    return {k: float(sum(s["counts"][i] for s in shards)) for i, k in enumerate(names)}

  def close(self) -> None:
    """Ends the thread and forgets what is prepared; the next item starts another."""
    self._ready = None
    if self._reader:
      self._reader.stop()
      self._reader = None


class _Reader:
  """The thread that makes items ahead of their use."""

  def __init__(self, produce, state: dict, depth: int):
    self._queue: queue.Queue = queue.Queue(max(depth, 1))
    self._stopped = threading.Event()
    # Only queue and event: a reference to `self` would keep a forgotten stream alive.
    run = functools.partial(_fill, produce, state, self._queue, self._stopped)
    self._thread = threading.Thread(target=run, daemon=True, name="pixel_jax data")
    self._thread.start()
    self._error: Exception | None = None

  def take(self) -> tuple[Any, dict]:
    if self._error is None:
      item = self._queue.get()
      if not isinstance(item, Exception):
        return item
      self._error = item
    raise self._error

  def stop(self) -> None:
    self._stopped.set()
    if threading.current_thread() is not self._thread:
      self._thread.join(timeout=10)


def _fill(produce, state, items: queue.Queue, stopped: threading.Event) -> None:
  def put(item) -> bool:
    while not stopped.is_set():
      try:
        items.put(item, timeout=0.1)
        return True
      except queue.Full:
        continue
    return False

  try:
    for item in produce(state):
      if not put(item):
        return
  except Exception as error:  # raised again where the item is taken
    put(error)
