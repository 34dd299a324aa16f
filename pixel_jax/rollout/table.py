"""The table of the slots: what lies where on the device, and every call that changes it.

One row per slot, in numpy: how many ids of its conversation the cache holds, the id and
position to go on from, what the turn may still cost.  `feed` brings the cache up to the
conversation, `decode` runs ahead of it by what was sampled.  Who plays where is decided
by `scheduler`, what a turn means by `episode`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from pixel_jax.batch import Cache
from pixel_jax.rollout import decode
from pixel_jax.rollout.episode import Episode
from pixel_jax.rollout.pictures import Bank

Sampled = tuple[int, list[int], list[float]]  # slot, ids, log-probs


class Table:
  """The slots of one run.

  Args:
    programs: the compiled "extend", "fork" and "decode" of `decode.py`.
    banned: bool[V], ids that are never drawn.
    views: lengths of the cache that "decode" is compiled for, ascending.
    chunk: steps of one call of "decode".
  """

  def __init__(
    self,
    programs: dict[str, Callable],
    params: Any,
    cache: Cache,
    bank: Bank,
    *,
    banned: np.ndarray,
    views: Sequence[int],
    chunk: int,
  ):
    self.bank = bank
    self.stats = dict(prefills=0, extends=0, chunks=0, steps=0, tokens=0, host_syncs=0)
    self._programs, self._params, self._cache = programs, params, cache
    self._banned, self._views, self._chunk = banned, views, chunk
    B = cache.k.shape[1]
    self.episodes: list[Episode | None] = [None] * B
    self._length = np.zeros(B, np.int32)  # ids in the cache: all but the last
    self._last = np.zeros(B, np.int32)
    self._position = np.zeros(B, np.int32)
    self._budget = np.zeros(B, np.int32)
    self._forced: list[Sequence[int]] = [()] * B  # of the turn, not yet said
    self._key = np.zeros((B, 2), np.uint32)

  def begin(self, slot: int, episode: Episode, key: np.ndarray) -> None:
    """A conversation enters an empty slot; its prompt is fed or forked next."""
    self.episodes[slot] = episode
    self._length[slot], self._key[slot] = 0, key

  def fork(self, pairs: Sequence[tuple[int, int]]) -> None:
    """Copies the prompt of each (home, slot); they are prompts of one conversation."""
    moves = [(home, slot) for home, slot in pairs if home != slot]
    if moves:
      index = np.zeros((2, len(self.episodes)), np.int32)
      index[:, : len(moves)] = np.transpose(moves)
      self._cache = self._programs["fork"](self._cache, *index, np.int32(len(moves)))
    for _, slot in pairs:
      self._go_on_from(slot)

  def feed(self, slots: Sequence[int], shape: tuple[int, int], name: str) -> None:
    """Prefills what the cache lacks of these conversations, but for the last id.

    Args:
      shape: rows and tokens of a call; more slots take more calls, more tokens pieces.
      name: which statistic counts the slots.
    """
    R, T = shape
    self.stats[name] += len(slots)
    left = list(slots)
    while left:
      pieces = []
      for slot in left[:R]:
        begin = int(self._length[slot])
        end = min(begin + T, len(self.episodes[slot].ids) - 1)
        pieces.append((slot, begin, end))
        self._length[slot] = end
      self._extend(pieces, shape)
      left = [s for s in left if self._length[s] < len(self.episodes[s].ids) - 1]
    for slot in slots:
      self._go_on_from(slot)

  def _extend(self, pieces: list[tuple[int, int, int]], shape: tuple[int, int]) -> None:
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
      turns.slot[r], turns.length[r], turns.count[r] = slot, begin, n
      turns.tokens[r, :n] = episode.ids[begin:end]
      turns.position[r, :n] = episode.positions[begin:end]
      shown += [(r, begin, *s) for s in episode.shown(begin, end)]
    self.bank.hold(pixels for _, _, _, pixels in shown)
    for r, begin, start, pixels in shown:
      rows = self.bank.rows(pixels)
      lo, hi = max(start, begin), min(start + len(rows), begin + T)
      turns.feature[r, lo - begin : hi - begin] = rows[lo - start : hi - start]
    self._cache = self._programs["extend"](
      self._params, self._cache, turns, self.bank.features
    )

  def _go_on_from(self, slot: int) -> None:
    episode = self.episodes[slot]
    self._length[slot] = len(episode.ids) - 1
    self._last[slot] = episode.ids[-1]
    self._position[slot] = episode.positions[-1][0]
    self._budget[slot] = episode.budget
    self._forced[slot] = episode.forced

  def decode(self, slots: Sequence[int], sampling: decode.Sampling) -> list[Sampled]:
    """Samples a chunk in these slots; the one place where the host waits."""
    on = np.zeros(len(self.episodes), bool)
    on[slots] = True
    reach = (self._length + np.minimum(self._budget, self._chunk))[on].max()
    view = next(v for v in self._views if v >= reach)
    forced = np.full((len(on), self._chunk), -1, np.int32)
    for slot in slots:
      said = self._forced[slot][: self._chunk]
      forced[slot, : len(said)] = said
      # A turn that goes on has used up the chunk.
      self._forced[slot] = self._forced[slot][self._chunk :]
    standing = decode.Slots(
      length=self._length,
      last=self._last,
      position=self._position,
      budget=np.where(on, self._budget, 0),
      key=self._key,
      forced=forced,
    )
    self._cache, *out = self._programs["decode"](
      self._params, self._cache, standing, self._banned, sampling=sampling, view=view
    )
    tokens, logp, count = jax.device_get(out)
    self._length += count
    self._position += count
    self._budget -= count
    self._last = np.where(on, tokens[np.arange(len(on)), count - 1], self._last)
    self.stats["chunks"] += 1
    self.stats["host_syncs"] += 1
    self.stats["steps"] += int(count.max())
    self.stats["tokens"] += int(count.sum())
    return [
      (slot, tokens[slot, :n].tolist(), logp[slot, :n].tolist())
      for slot in slots
      if (n := count[slot])
    ]
