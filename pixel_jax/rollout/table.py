"""The table of the slots: what lies where on the device, and every call that changes it.

One row per slot, in numpy: which prompt it goes on from, how many ids the cache holds
after that, and what the host wants changed.  `prefill` computes prompts, `feed` brings
the cache up to the conversation, `decode` runs ahead of it by what was sampled, `read`
tells what that was.  How far a turn has come is
known on the device, so a chunk may be sent off before the last one is read.  Who plays
where is decided by `scheduler`, what a turn means by `episode`.
"""

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from pixel_jax.batch import Cache, Prompts
from pixel_jax.rollout import decode
from pixel_jax.rollout.episode import Episode
from pixel_jax.rollout.pictures import Bank
from pixel_jax.rollout.programs import Programs
from pixel_jax.rollout.scheduler import Start

Sampled = tuple[int, list[int], list[float]]  # slot, ids, log-probs


@dataclasses.dataclass
class Chunk:
  """One that was sent off and not read yet."""

  lane: dict[int, int]  # slot -> where it decoded
  lanes: int
  notes: dict[str, float]
  out: list[jax.Array]  # tokens, log-probs, count


class Table:
  """The slots of one run.

  Args:
    prompts: of the groups; it holds all ids but the last of each.
    slots: their standing on the device.
    group_size: samples that go on from one prompt at most.
    banned: bool[V], ids that who is banned never draws; None = nobody is.
    views: lengths that "prefill" and "feed" are compiled for, ascending.
    chunk: steps of one call of "decode".
  """

  def __init__(
    self,
    programs: Programs,
    params: Any,
    cache: Cache,
    prompts: Cache,
    slots: decode.Slots,
    bank: Bank,
    *,
    group_size: int,
    banned: np.ndarray | None,
    views: tuple[Sequence[int], Sequence[int]],
    chunk: int,
  ):
    self.bank = bank
    self.stats: dict[str, float] = collections.Counter()
    self.unread: collections.deque[Chunk] = collections.deque()
    self._programs, self._params = programs, params
    self._cache, self._prompts, self._slots = cache, prompts, slots
    self._banned, self._views, self._chunk = banned, views, chunk
    B, P = cache.k.shape[1], prompts.k.shape[1]
    self.episodes: list[Episode | None] = [None] * B
    self._length = np.zeros(B, np.int32)  # ids in the cache, as far as was read
    self._row = np.zeros(B, np.int32)  # where the prompt lies
    self._before = np.zeros(P, np.int32)  # ids of each prompt that lie there
    self._lane = np.full((P, group_size), B, np.int32)  # slots that go on from it
    self._key = np.zeros((B, 2), np.uint32)
    self._sampling = decode.Wish().rows(B)
    self._new = np.zeros(B, bool)  # a turn begins: the device is to be told
    self._halted: set[int] = set()  # slots that are to stop
    self._source = np.arange(B, dtype=np.int32)  # who moved here since the last chunk
    self._forced: list[Sequence[int]] = [()] * B  # of the turn, not yet said

  @property
  def _columns(self) -> tuple[np.ndarray, ...]:
    s = self._sampling
    return s.temperature, s.top_p, s.top_k, s.is_banned

  # ---- New ids -----------------------------------------------------------------------

  def begin(
    self, start: Start, episode: Episode, key: np.ndarray, sampling: decode.Wish
  ) -> None:
    """A conversation enters an empty slot; `start` follows when its prompt is there."""
    slot = start.slot
    self.episodes[slot], self._key[slot] = episode, key
    self._halted.discard(slot)
    for column, wish in zip(self._columns, sampling):
      column[slot] = wish
    self._row[slot] = start.row
    self._lane[self._lane == slot] = len(self.episodes)
    self._lane[start.row, start.sample] = slot

  def prefill(self, slots: Sequence[int], shape: tuple[int, int]) -> None:
    """Computes the prompts of these conversations, but for the last id of each.

    Args:
      shape: rows and tokens of a call; more prompts take more calls, more tokens pieces.
    """
    self.stats["prefills"] += len(slots)
    for pieces in _pieces({s: 0 for s in slots}, self._ends(slots), shape):
      turns = self._turns(pieces, shape, self._row, {s: 0 for s in slots})
      self._prompts = self._programs.extend(
        self._params, self._prompts, turns, self.bank.features,
        view=_view(self._views[0], max(end for _, _, end in pieces)),
      )  # fmt: skip

  def start(self, slots: Sequence[int]) -> None:
    """Begins the first turn of these conversations, whose prompts are in the cache."""
    for slot in slots:
      self._before[self._row[slot]] = len(self.episodes[slot].ids) - 1
      self._go_on_from(slot)

  def move(self, pairs: Sequence[tuple[int, int]]) -> None:
    """Slots give up their rows for others; what is on its way to them comes along."""
    for source, target in pairs:
      columns = (self._length, self._row, self._key, self._new, self._source)
      for column in (*columns, *self._columns):
        column[target] = column[source]
      self._halted.discard(target)
      self._halted.add(source)  # what goes on there is a copy
      self._new[source] = True
      self._lane[self._lane == target] = len(self.episodes)
      self._lane[self._lane == source] = target
      for column in (self.episodes, self._forced):
        column[target] = column[source]
      for chunk in self.unread:
        if source in chunk.lane:
          chunk.lane[target] = chunk.lane.pop(source)
    self._copy(pairs)

  def _copy(self, pairs: Sequence[tuple[int, int]]) -> None:
    pairs = [(source, target) for source, target in pairs if source != target]
    if not pairs:
      return
    rows = np.zeros((3, len(self.episodes)), np.int32)
    rows[:2, : len(pairs)] = np.transpose(pairs)
    # What is not read yet may be longer by this.
    late = self._chunk * len(self.unread)
    rows[2, : len(pairs)] = [self._length[target] + late for _, target in pairs]
    rows[2] = np.minimum(rows[2], self._cache.k.shape[3])
    self._cache = self._programs.move(self._cache, *rows, np.int32(len(pairs)))

  def feed(self, slots: Sequence[int], shape: tuple[int, int]) -> None:
    """Prefills what the cache lacks of these conversations, but for the last id.

    Args:
      shape: as of `prefill`.
    """
    self.stats["extends"] += len(slots)
    before = {s: int(self._before[self._row[s]]) for s in slots}
    begins = {s: before[s] + int(self._length[s]) for s in slots}
    for pieces in _pieces(begins, self._ends(slots), shape):
      turns = self._turns(pieces, shape, range(len(self.episodes)), before)
      self._cache = self._programs.extend(
        self._params, self._cache, turns, self.bank.features, self._shared,
        view=_view(
          self._views[1], max(max(before[s], end - before[s]) for s, _, end in pieces)
        ),
      )  # fmt: skip
    for slot in slots:
      self._go_on_from(slot)

  def _ends(self, slots: Sequence[int]) -> dict[int, int]:
    return {s: len(self.episodes[s].ids) - 1 for s in slots}

  @property
  def _shared(self) -> Prompts:
    # Copies, because a call may read its arguments after it returns.
    k, v = self._prompts.k, self._prompts.v
    rest = (self._before.copy(), self._row.copy(), self._lane.copy())
    return Prompts(k, v, *rest)

  def _turns(
    self,
    pieces: list[tuple[int, int, int]],
    shape: tuple[int, int],
    row_of: Sequence[int],
    before: Mapping[int, int],
  ) -> decode.Turns:
    """What "extend" takes for ids[begin:end] of each (slot, begin, end).

    Args:
      row_of: the row of the cache, by slot.
      before: ids of each slot that lie elsewhere.
    """
    R, T = shape
    turns = decode.Turns(
      slot=np.full(R, len(self.episodes), np.int32),  # out of range: dropped
      length=np.zeros(R, np.int32),
      count=np.zeros(R, np.int32),
      tokens=np.zeros((R, T), np.int32),
      position=np.zeros((R, T, 3), np.int32),
      feature=np.full((R, T), -1, np.int32),
    )
    shown = []
    for r, (slot, begin, end) in enumerate(pieces):
      episode, n = self.episodes[slot], end - begin
      turns.slot[r], turns.count[r] = row_of[slot], n
      turns.length[r] = begin - before[slot]
      turns.tokens[r, :n] = episode.ids[begin:end]
      turns.position[r, :n] = episode.positions[begin:end]
      shown += [(r, begin, *s) for s in episode.shown(begin, end)]
    self.bank.hold(pixels for _, _, _, pixels in shown)
    for r, begin, start, pixels in shown:
      rows = self.bank.rows(pixels)
      lo, hi = max(start, begin), min(start + len(rows), begin + T)
      turns.feature[r, lo - begin : hi - begin] = rows[lo - start : hi - start]
    return turns

  def _go_on_from(self, slot: int) -> None:
    episode = self.episodes[slot]
    self._length[slot] = len(episode.ids) - 1 - self._before[self._row[slot]]
    self._forced[slot] = episode.forced
    self._new[slot] = True

  # ---- Chunks ------------------------------------------------------------------------

  def halt(self, slot: int) -> None:
    """Nobody wants any more what a slot would say."""
    for chunk in self.unread:
      chunk.lane.pop(slot, None)
    self._halted.add(slot)
    self._new[slot] = True

  def decode(self, slots: Sequence[int], lanes: int, **notes: float) -> None:
    """Sends off a chunk; `slots` are those that decode, or did when last read.

    Args:
      notes: of this chunk; `read` weighs them with its steps.
    """
    self._place()
    forced = np.full((len(self.episodes), self._chunk), -1, np.int32)
    for slot in slots:
      said = self._forced[slot][: self._chunk]
      forced[slot, : len(said)] = said
      # A turn that goes on has used up the chunk.
      self._forced[slot] = self._forced[slot][self._chunk :]
    self._cache, self._slots, *out = self._programs.decode(
      self._params,
      self._cache,
      self._shared,
      self._slots,
      forced,
      self._banned,
      lanes=lanes,
    )
    for x in out:
      x.copy_to_host_async()
    self.unread.append(Chunk({s: s for s in slots}, lanes, notes, out))

  def _place(self) -> None:
    """Tells the device which slots begin a turn, and which have moved."""
    B = len(self.episodes)
    if not self._new.any() and (self._source == np.arange(B)).all():
      return
    given = decode.Slots(
      length=self._length.copy(),  # a call may read its arguments after it returns
      last=np.zeros(B, np.int32),
      position=np.zeros(B, np.int32),
      budget=np.zeros(B, np.int32),
      key=self._key.copy(),
      sampling=jax.tree.map(np.copy, self._sampling),
    )
    for slot in np.flatnonzero(self._new):
      if slot in self._halted:
        continue  # its budget is 0
      episode = self.episodes[slot]
      given.last[slot] = episode.ids[-1]
      given.position[slot] = episode.positions[-1][0]
      given.budget[slot] = episode.budget
    self._slots = self._programs.place(self._slots, self._source, self._new, given)
    self._source = np.arange(B, dtype=np.int32)
    self._new = np.zeros(B, bool)

  def read(self) -> list[Sampled]:
    """What the oldest chunk sampled; the one place where the host waits."""
    chunk = self.unread.popleft()
    tokens, logp, count = jax.device_get(chunk.out)
    steps = int(count.max(initial=0))
    now = dict(chunks=1, host_syncs=1, steps=steps, lane_steps=steps * chunk.lanes)
    now |= dict(tokens=int(count.sum()))
    now |= {name: weight * steps for name, weight in chunk.notes.items()}
    if chunk.notes.get("steady"):
      now |= {f"steady_{k}": now[k] for k in ("lane_steps", "tokens")}
    self.stats.update(now)
    sampled = []
    for slot, lane in chunk.lane.items():
      n = int(count[lane])
      if n:  # 0 where it had stopped, as an earlier chunk has told by now
        self._length[slot] += n
        sampled.append((slot, tokens[lane, :n].tolist(), logp[lane, :n].tolist()))
    return sampled


def _pieces(
  begins: Mapping[int, int], ends: Mapping[int, int], shape: tuple[int, int]
) -> Iterator[list[tuple[int, int, int]]]:
  """(slot, begin, end) of each call, until every slot has come from begin to end."""
  R, T = shape
  at = dict(begins)
  while at:
    pieces = [(s, at[s], min(at[s] + T, ends[s])) for s in list(at)[:R]]
    yield pieces
    at |= {s: end for s, _, end in pieces}
    at = {s: begin for s, begin in at.items() if begin < ends[s]}


def _view(views: Sequence[int], reach: int) -> int:
  return next(v for v in views if v >= reach)
