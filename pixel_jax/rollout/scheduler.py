"""Who runs in which slot, and when: a pure function of token counts.  Host, no jax.

A *slot* is a row of the cache.  The samples of group 0 start first, then those of group
1, ...; whenever slots are free the next samples take them, lowest slot first.  A group's
prompt is computed once, in a *row* of its own, which is free again when the last of its
samples is over; while no row is free no group begins.  The clock is never asked: an
operation that was submitted at chunk c is collected before chunk c + delay, late or
not, so a killed run continues the same way.
When no sample waits any more, those that still play move into the lowest slots, and
fewer *lanes* decode.

  chunk          0          1          2          3
  slot 0   g0s0 decode    operate    decode     g1s0 decode ...

Not here: tokens, caches, pictures.
"""

import collections
import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Start:
  """Sample `sample` of group `group` begins in `slot`; its prompt lies in `row`."""

  group: int
  sample: int
  slot: int
  row: int


class Scheduler:
  """Slots, waiting samples and operations under way.

  Args:
    slots: rows of the cache.
    prompts: rows for prompts.
    groups, group_size: what is to be played; any size, also more than the slots.  More
      groups may come (`add`), of at most that size.
    delay: chunks from submitting an operation to collecting it; with 2 the other slots
      decode one chunk meanwhile, with 1 (or 0) none.
  """

  def __init__(
    self, *, slots: int, prompts: int, groups: int, group_size: int, delay: int = 1
  ):
    if min(slots, prompts, group_size) < 1 or min(groups, delay) < 0:
      raise ValueError(
        f"{slots=}, {prompts=}, {groups=}, {group_size=}, {delay=}: there is at least "
        "one slot, one prompt and one sample in a group; no count is negative."
      )
    self.group_size = group_size
    self.delay = delay
    self.chunk = 0
    self._groups = 0  # so far
    # Samples that wait: (group, sample, samples of the group).
    self._samples: collections.deque[tuple[int, int, int]] = collections.deque()
    for _ in range(groups):
      self.add(group_size)
    self._begun = False
    self.decoding: set[int] = set()
    self._refilled = False
    # No more can play at once, so the slots above them are never used.
    self._free = set(range(min(slots, prompts * group_size)))
    self._most = len(self._free)
    self._rows = set(range(prompts))  # that are free
    self._row = -1  # of the group that started last
    self._row_of: dict[int, int] = {}  # slot -> row
    self._left: dict[int, int] = {}  # row -> samples that are not over
    self._operations: list[tuple[int, int]] = []  # (chunk, slot), as submitted

  @property
  def done(self) -> bool:
    return not self._samples and not self.decoding and not self._operations

  def add(self, samples: int) -> int:
    """Another group waits; its number."""
    if not 0 < samples <= self.group_size:
      raise ValueError(f"{samples=}: expected 1 to group_size={self.group_size}.")
    group = self._groups
    self._groups += 1
    self._samples.extend((group, sample, samples) for sample in range(samples))
    return group

  def withdraw(self, group: int) -> None:
    """The samples of a group that have not started never will."""
    gone = [each for each in self._samples if each[0] == group]
    if gone:
      self._samples = collections.deque(s for s in self._samples if s[0] != group)
    if gone and gone[0][1] > 0:  # the others play, or did: it is the last that began
      self._leave(self._row, len(gone))

  def refill(self) -> list[Start]:
    """Gives free slots to waiting samples; sample 0 brings the prompt of its group."""
    self._refilled |= self._begun and bool(self._free)
    starts = []
    for slot in sorted(self._free)[: len(self._samples)]:
      group, sample, samples = self._samples[0]
      if sample == 0:
        if not self._rows:
          break
        self._row = min(self._rows)
        self._rows.remove(self._row)
        self._left[self._row] = samples
      self._samples.popleft()
      starts.append(Start(group, sample, slot, self._row))
      self._row_of[slot] = self._row
      self._begun = True
      self._free.remove(slot)
      self.decoding.add(slot)
    return starts

  @property
  def waiting(self) -> int:
    """Slots whose operation is under way."""
    return len(self._operations)

  @property
  def steady(self) -> bool:
    """From the first refill until no sample waits for a slot."""
    return self._refilled and bool(self._samples)

  def drain(self, buckets: Sequence[int]) -> tuple[int, list[tuple[int, int]]]:
    """(lanes, moves): the fewest lanes that hold all who play, and who moves for that.

    Args:
      buckets: numbers of lanes to choose from, ascending; the last is all slots.
    """
    if self._samples:
      return next(n for n in buckets if n >= self._most), []
    playing = self.decoding | {slot for _, slot in self._operations}
    lanes = next(n for n in buckets if n >= len(playing))
    free = sorted(set(range(lanes)) - playing)
    moves = list(zip(sorted(s for s in playing if s >= lanes), free))
    for source, target in moves:
      self._row_of[target] = self._row_of.pop(source)
      if source in self.decoding:
        self.decoding.remove(source)
        self.decoding.add(target)
    to = dict(moves)
    self._operations = [(chunk, to.get(slot, slot)) for chunk, slot in self._operations]
    return lanes, moves

  def submit(self, slot: int) -> None:
    """The turn of a slot ended in an operation."""
    self.decoding.remove(slot)
    self._operations.append((self.chunk, slot))

  def collect(self) -> list[int]:
    """Slots whose operations are due, as submitted; wait for those that are late."""
    due = [s for c, s in self._operations if c + self.delay <= self.chunk]
    self._operations = self._operations[len(due) :]
    return due

  def resume(self, slot: int) -> None:
    """The result of the operation is in; the slot decodes its next turn."""
    self.decoding.add(slot)

  def release(self, slot: int) -> None:
    """The rollout of a slot, decoding or just collected, is over."""
    self.decoding.discard(slot)
    self._free.add(slot)
    self._leave(self._row_of.pop(slot), 1)

  def _leave(self, row: int, samples: int) -> None:
    self._left[row] -= samples
    if not self._left[row]:
      del self._left[row]
      self._rows.add(row)

  def tick(self) -> None:
    """Counts a chunk as ended; it is called, too, when nothing was decoding."""
    self.chunk += 1
