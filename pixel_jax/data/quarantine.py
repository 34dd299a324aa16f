"""Quarantine: records that cannot be used, why, and when they are too many.

WORKDIR/quarantine.jsonl holds every bad record once: {"index", "shard", "reason"}.  What
data.filter leaves out is not bad: it is counted, and not written.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

# A share of very few records says nothing: it is taken of at least so many.
FEW = 1000


class DataError(ValueError):
  """Settings that do not fit the data, or data that is mostly bad."""


class LeftOut(Exception):
  """A record that the filter of its source refuses; it is not used and not bad."""


@dataclasses.dataclass(frozen=True)
class Bad:
  """A record that was set aside."""

  index: int
  reason: str
  left_out: bool = False  # by the filter, so that it counts as no failure


def attempt(index: int, work: Callable[[], Any]) -> Any:
  """What `work` returns, or `Bad` for any exception; decoders raise all kinds."""
  try:
    return work()
  except LeftOut as why:
    return Bad(int(index), str(why), left_out=True)
  except Exception as error:
    return Bad(int(index), f"{type(error).__name__}: {error}")


class Quarantine:
  """WORKDIR/quarantine.jsonl: every bad record once, with its shard and the reason."""

  def __init__(self, workdir: str | pathlib.Path | None, host: int, share: float):
    name = "quarantine.jsonl" if host == 0 else f"quarantine_{host}.jsonl"
    self.path = pathlib.Path(workdir) / name if workdir else None
    self.share = share
    self._known: set[tuple[int, str]] = set()
    if self.path and self.path.exists():
      for line in self.path.read_text(encoding="utf-8").splitlines():
        try:
          d = json.loads(line)
          self._known.add((d["index"], d["reason"]))
        except (ValueError, KeyError, TypeError):
          continue  # a killed run may leave half a line

  def add(self, bad: Bad, shard: int) -> None:
    key = (bad.index, bad.reason)
    if key in self._known:
      return
    self._known.add(key)
    if self.path:
      self.path.parent.mkdir(parents=True, exist_ok=True)
      line = json.dumps({"index": bad.index, "shard": shard, "reason": bad.reason})
      with self.path.open("a", encoding="utf-8") as f:
        f.write(line + "\n")

  def of_shard(self, shard: int, records: int) -> "SetAside":
    return SetAside(self, shard, records)


class SetAside:
  """The bad records of a shard, and when there are too many of them."""

  def __init__(self, quarantine: Quarantine, shard: int, records: int):
    self.quarantine, self.shard, self.records = quarantine, shard, records
    self._new, self._last = [0, 0], ""

  def takes(self, made: Any) -> bool:
    if not isinstance(made, Bad):
      return False
    self._new[made.left_out] += 1
    if not made.left_out:
      self.quarantine.add(made, self.shard)
    self._last = made.reason
    return True

  def add_to(self, before: list[int]) -> list[int]:
    """[bad, left out by the filter], with those since the last call."""
    new, self._new = self._new, [0, 0]
    return [a + b for a, b in zip(before, new)]

  def check(self, seen: int, bad: int, left_out: int) -> None:
    if bad <= self.quarantine.share * max(seen, FEW) and (
      bad + left_out < seen or seen < self.records
    ):
      return
    file = self.quarantine.path or "no file: give a workdir"
    raise DataError(
      f"{bad} of {seen} records of shard {self.shard} cannot be used, more than "
      f"data.max_bad_share={self.quarantine.share} allows, or none is left: data.filter "
      f"leaves out {left_out}. The last: {self._last}. The bad ones are in {file}; repair "
      "them, raise data.max_bad_share, or widen data.filter."
    )
