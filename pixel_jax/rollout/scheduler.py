"""Who runs in which slot, and when: a pure function of token counts.  Host, no jax.

A *slot* is a row of the cache.  The samples of group 0 start first, then those of group
1, ...; whenever slots are free the next samples take them, lowest slot first.  A group's
prompt is computed once, in its *home* slot (that of sample 0), and copied into the
others.  The clock is never asked: an operation that was submitted at chunk c is
collected at chunk c + delay, late or not, so a killed run continues the same way.

  chunk          0          1          2          3
  slot 0   g0s0 decode    operate    decode     g1s0 decode ...

Not here: tokens, caches, pictures.
"""

import dataclasses


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
    delay: chunks that an operation may take while the other slots decode on.
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
