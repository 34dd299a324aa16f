"""A session: conversations that come and go on one cache, with one set of weights.

  add(Group) ... waits for free slots;   step()  is what happens between two chunks:
  refill free slots | go on where operations are due | send a chunk off | read one

Here the host's parts meet: `scheduler` says who runs where, `episode` what a turn means,
`table` what the device does.  `Engine.run` adds its tasks and steps until all are over; a
server adds what arrives, and withdraws what nobody waits for any more.
"""

import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import logging

from pixel_jax.chat.encode import Conversation
from pixel_jax.pixels.geometry import Pixels
from pixel_jax.rollout import decode
from pixel_jax.rollout.episode import Episode
from pixel_jax.rollout.scheduler import Scheduler, Start
from pixel_jax.rollout.table import Table
from pixel_jax.trajectory import Trajectory

if TYPE_CHECKING:
  from pixel_jax.rollout.engine import Engine

AHEAD = 5  # prompts that are prepared before their turn


@dataclasses.dataclass(frozen=True)
class Finished:
  """A rollout that has ended, with one `Pixels` for every slot of its trajectory."""

  trajectory: Trajectory
  pixels: list[Pixels]


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
  """Samples of one prompt.

  Attributes:
    prompt: makes it; called in a worker thread.
    keys: u32[2], of the sampling of each sample; one a sample.
    sampling: how their tokens are drawn.
    script: turns that each sample is made to say.
    limits: max_turns, max_new_tokens, row and operations of `Episode`.
    ended: called with every sample that is over, in the thread of `step`.
    heard: called with (sample, ids, log-probs) of every piece of a turn.
    looked: called with a copy of the trajectory so far when an operation has returned.
    failed: called with what `prompt` raised; without it `step` raises that.
  """

  prompt: Callable[[], Conversation]
  keys: Sequence[np.ndarray]
  sampling: decode.Wish
  script: Sequence[Sequence[Sequence[int]]]
  limits: Mapping[str, Any]
  ended: Callable[[Finished], None]
  heard: Callable[[int, list[int], list[float]], None] | None = None
  looked: Callable[[Trajectory], None] | None = None
  failed: Callable[[Exception], None] | None = None


class Session:
  """What is being played; `Engine.open` makes one.  A context, which ends its threads.

  Args:
    lanes: numbers of slots that decoding is compiled for, ascending.
    most: samples of a group at most.
  """

  def __init__(
    self, engine: "Engine", table: Table, *, lanes: Sequence[int], most: int
  ):
    self._engine, self._table, self._lanes = engine, table, lanes
    self._plan = Scheduler(
      slots=engine.slots, prompts=engine.prompts, groups=0, group_size=most,
      delay=engine.delay,
    )  # fmt: skip
    self._pool = ThreadPoolExecutor(engine.workers)
    self._groups: dict[int, Group] = {}  # that are not over
    self._left: dict[int, int] = {}  # samples of them
    self._waiting: collections.deque[int] = collections.deque()  # not being prepared
    self._ahead: dict[int, Future[Conversation]] = {}  # prompts of groups to come
    self._prompts: dict[int, Conversation] = {}  # of groups that have begun
    self._starts: dict[int, Start] = {}  # slot -> who plays there
    self._operations: dict[int, Future[bool]] = {}  # slot -> under way
    self._watch = Stopwatch()
    self._added = self._refused = 0  # groups; those whose prompts have no room
    self.refusal = ""  # why the last of them had none

  def __enter__(self) -> "Session":
    return self

  def __exit__(self, *error) -> None:
    self._pool.shutdown(cancel_futures=True)

  @property
  def done(self) -> bool:
    return self._plan.done

  @property
  def playing(self) -> int:
    """Slots that are taken."""
    return len(self._starts)

  # ---- Who comes and goes ------------------------------------------------------------

  def add(self, group: Group) -> int:
    """A group waits for free slots; its number, for `withdraw`."""
    number = self._plan.add(len(group.keys))
    self._groups[number], self._left[number] = group, len(group.keys)
    self._waiting.append(number)
    self._added += 1
    self._prepare()
    return number

  def withdraw(self, number: int) -> None:
    """Gives up what is left of a group; `ended` is not called for it any more."""
    if number not in self._groups:
      return
    playing = [slot for slot, s in self._starts.items() if s.group == number]
    self._plan.withdraw(number)
    self._groups.pop(number)
    for slot in playing:
      if slot not in self._operations:  # else when its operation is over
        self._table.halt(slot)
        self._free(slot)
    self._prompts.pop(number, None)
    if number in self._waiting:
      self._waiting.remove(number)
    if prompt := self._ahead.pop(number, None):
      prompt.cancel()
    if not playing:
      self._left.pop(number)

  def _prepare(self) -> None:
    while self._waiting and len(self._ahead) < AHEAD:
      number = self._waiting.popleft()
      self._ahead[number] = self._pool.submit(self._groups[number].prompt)

  def _free(self, slot: int) -> None:
    number = self._starts.pop(slot).group
    self._plan.release(slot)
    left = self._left.pop(number, 1) - 1
    if left:
      self._left[number] = left
    else:
      self._groups.pop(number, None)

  def _finish(self, slot: int) -> None:
    group = self._groups.get(self._starts[slot].group)
    conversation = self._table.episodes[slot].conversation
    self._free(slot)
    if group is not None:
      group.ended(Finished(conversation.trajectory, conversation.pixels))

  # ---- Between two chunks ------------------------------------------------------------

  def step(self) -> None:
    """Refills, goes on where operations are due, sends a chunk off, and reads one."""
    plan, table, watch = self._plan, self._table, self._watch
    self._refill()
    # ---- Go on with the turns whose operations are due ----
    with watch("operate"):
      due = [(slot, self._operations.pop(slot).result()) for slot in plan.collect()]
    fed = []
    for slot, fits in due:
      group = self._groups.get(self._starts[slot].group)
      if group is None:
        self._free(slot)  # was withdrawn meanwhile
      elif fits:
        plan.resume(slot)
        fed.append(slot)
        if group.looked:
          conversation = table.episodes[slot].conversation
          group.looked(conversation.fork(self._starts[slot].sample).trajectory)
      else:
        self._finish(slot)
    with watch("extend"):
      table.feed(fed, self._engine.turn)
    # ---- Decode a chunk; look at what was said ----
    if plan.decoding:
      lanes, moves = plan.drain(self._lanes)
      for source, target in moves:
        for column in (self._starts, self._operations):
          if source in column:
            column[target] = column.pop(source)
      table.move(moves)
      with watch("decode"):
        table.decode(
          sorted(plan.decoding), lanes, steady=plan.steady, waiting=plan.waiting
        )
    while len(table.unread) > (self._engine.lag if plan.decoding else 0):
      with watch("decode"):
        sampled = table.read()
      with watch("feed"):
        for each in sampled:
          self._hear(*each)
    plan.tick()

  def _refill(self) -> None:
    """Gives free slots to waiting samples; a prompt is computed once a group."""
    plan, table, watch = self._plan, self._table, self._watch
    begun = []
    with watch("prompts"):
      for s in plan.refill():
        prompt = self._prompt_of(s)
        if prompt is None:
          continue
        group = self._groups[s.group]
        episode = Episode(
          prompt.fork(s.sample), max_len=self._engine.room(len(prompt.trajectory.ids)),
          max_patches=self._engine.patches, script=group.script[s.sample], **group.limits,
        )  # fmt: skip
        table.begin(s, episode, group.keys[s.sample], group.sampling)
        self._starts[s.slot] = s
        begun.append(s)
        if s.sample == 0 and not episode.fits:
          self._refused += 1
          self.refusal = self._engine.refusal_of(episode, group.limits.get("row"))
          logging.warning("set aside: %s", self.refusal)
    fits = {s: table.episodes[s.slot].fits for s in begun}
    with watch("prefill"):
      homes = [s.slot for s in begun if fits[s] and s.sample == 0]
      table.prefill(homes, self._engine.prompt)
      table.start([s.slot for s in begun if fits[s]])
    for s in begun:
      if not fits[s]:
        table.episodes[s.slot].refuse()
        self._finish(s.slot)

  def _prompt_of(self, s: Start) -> Conversation | None:
    """The prompt of a sample; None where it cannot be made, and that was told."""
    group = self._groups.get(s.group)
    if s.sample == 0:
      if s.group in self._waiting:
        self._waiting.remove(s.group)
        self._ahead[s.group] = self._pool.submit(group.prompt)
      try:
        self._prompts[s.group] = self._ahead.pop(s.group).result()
      except Exception as error:
        if group.failed is None:
          raise
        self._plan.withdraw(s.group)
        self._groups.pop(s.group)
        group.failed(error)
        group = None
      finally:
        self._prepare()
    if group is None:  # this sample started before it was known
      self._starts[s.slot] = s
      self._free(s.slot)
      return None
    prompt = self._prompts[s.group]
    if s.sample == len(group.keys) - 1:
      self._prompts.pop(s.group)
    return prompt

  def _hear(self, slot: int, ids: list[int], logp: list[float]) -> None:
    start, episode = self._starts[slot], self._table.episodes[slot]
    outcome = episode.feed(ids, logp, ended=ids[-1] in self._engine.stops)
    group = self._groups[start.group]
    if group.heard:
      group.heard(start.sample, ids, logp)
      if start.group not in self._groups:
        return  # withdrawn by who heard it
    if outcome == "operate":
      self._operations[slot] = self._pool.submit(episode.operate)
      self._plan.submit(slot)
    elif outcome == "done":
      self._finish(slot)

  # ---- Figures -----------------------------------------------------------------------

  def stats(self) -> dict[str, float]:
    """What `train_rl` logs of a run."""
    c, bank = self._table.stats, self._table.bank
    names = ("prefills", "extends", "chunks", "steps", "tokens", "host_syncs")
    stats = {name: c[name] for name in names} | {
      "pictures": bank.encoded,
      "vision_calls": bank.calls,
      # Of the tokens that the decoding loop could have sampled, those that it did.
      "occupancy": c["tokens"] / max(1, c["lane_steps"]),
      "waiting": c["waiting"] / max(1, c["lane_steps"]),  # for an operation
      "host_syncs_per_chunk": c["host_syncs"] / max(1, c["chunks"]),
      "prefills_per_group": c["prefills"] / max(1, self._added - self._refused),
      "too_long_prompts": self._refused,
    }
    if c["steady_lane_steps"]:  # from the first refill until no sample waits
      stats["occupancy_steady"] = c["steady_tokens"] / c["steady_lane_steps"]
    stats = {f"rollout/{k}": float(v) for k, v in stats.items()}
    stats |= {f"perf/rollout_{k}_s": v for k, v in self._watch.seconds.items()}
    return stats | {
      "perf/rollout_compiles": float(self._engine.compiles),
      "perf/rollout_programs_declared": float(self._engine.declared),
    }


class Stopwatch:
  """Seconds by phase; those of the device are told where the host waits: "decode"."""

  def __init__(self):
    self.seconds: dict[str, float] = collections.defaultdict(float)

  @contextlib.contextmanager
  def __call__(self, phase: str):
    start = time.perf_counter()
    yield
    self.seconds[phase] += time.perf_counter() - start
