"""Who runs in which slot, and when: a pure function of token counts.  Host, no jax.

A *slot* is a row of the cache.  The samples of group 0 start first, then those of group
1, ...; whenever slots are free the next samples take them, lowest slot first.  A group's
prompt is computed once, in its *home* slot (that of sample 0), and copied into the
others.  The clock is never asked: an operation that was submitted at chunk c is
collected before chunk c + delay, late or not, so a killed run continues the same way.
When no sample waits any more, those that still play move into the lowest slots, and
fewer *lanes* decode.

  chunk          0          1          2          3
  slot 0   g0s0 decode    operate    decode     g1s0 decode ...

Not here: tokens, caches, pictures.
"""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Start:
  """Sample `sample` of group `group` begins in `slot` with the prompt of `home`."""

  group: int
  sample: int
  slot: int
  home: int


class Scheduler:
  """Slots, waiting samples and operations under way.

  Args:
    slots: rows of the cache.
    groups, group_size: what is to be played; any size, also more than the slots.
    delay: chunks from submitting an operation to collecting it; with 2 the other slots
      decode one chunk meanwhile, with 1 (or 0) none.
  """

  def __init__(self, *, slots: int, groups: int, group_size: int, delay: int = 1):
    if min(slots, group_size) < 1 or min(groups, delay) < 0:
      raise ValueError(
        f"{slots=}, {groups=}, {group_size=}, {delay=}: there is at least one slot and "
        "one sample in a group; no count is negative."
      )
    self.group_size = group_size
    self.total = groups * group_size
    self.delay = delay
    self.chunk = 0
    self.started = 0  # samples
    self.decoding: set[int] = set()
    self._refilled = False
    self._free = set(range(slots))
    self._home = -1  # slot with the prompt of the group that started last
    self._operations: list[tuple[int, int]] = []  # (chunk, slot), as submitted

  @property
  def done(self) -> bool:
    return self.started == self.total and not self.decoding and not self._operations

  def refill(self) -> tuple[list[Start], list[Start]]:
    """Gives free slots to waiting samples: (of a group that has begun, of new groups).

    The prompts of the first list must be copied before those of the second are
    computed: a free home may be among the slots that the second list takes.  Until its
    group has wholly started nothing else can take a home, because the group's samples
    come first.
    """
    self._refilled |= self.started > 0 and bool(self._free)
    begun, new = [], []
    for slot in sorted(self._free)[: self.total - self.started]:
      group, sample = divmod(self.started, self.group_size)
      if sample == 0:
        self._home = slot
      fresh = sample == 0 or (new and new[-1].group == group)
      (new if fresh else begun).append(Start(group, sample, slot, self._home))
      self.started += 1
      self._free.remove(slot)
      self.decoding.add(slot)
    return begun, new

  @property
  def waiting(self) -> int:
    """Slots whose operation is under way."""
    return len(self._operations)

  @property
  def steady(self) -> bool:
    """From the first refill until no sample waits for a slot."""
    return self._refilled and self.started < self.total

  def drain(self, buckets: Sequence[int]) -> tuple[int, list[tuple[int, int]]]:
    """(lanes, moves): the fewest lanes that hold all who play, and who moves for that.

    Args:
      buckets: numbers of lanes to choose from, ascending; the last is all slots.
    """
    if self.started < self.total:
      return buckets[-1], []
    playing = self.decoding | {slot for _, slot in self._operations}
    lanes = next(n for n in buckets if n >= len(playing))
    free = sorted(set(range(lanes)) - playing)
    moves = list(zip(sorted(s for s in playing if s >= lanes), free))
    for source, target in moves:
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

  def tick(self) -> None:
    """A chunk has ended (or would have: nothing was decoding)."""
    self.chunk += 1
