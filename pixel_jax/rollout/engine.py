"""The engine: many conversations at once on one cache.  Joins host and device.

  tasks --Conversation--> prompts --prefill once a group--> slots --decode a chunk
  --> sampled ids --Episode--> done | operation --worker threads--> new tokens + pictures
  --encode, extend--> the slot decodes on; a finished slot is refilled at the boundary;
  when no sample waits any more, fewer and fewer lanes decode

`scheduler` says who runs where, `episode` what a turn means, `decode` what the device
does, `pictures` where features lie; only this file knows all of them.  It knows no tool.
Main value: `run(...)` -> list[list[Finished]], groups in task order.

Sampling depends on (seed, step, task id, sample index) and the token's index only.  In
one bucket of lanes and length (`fixed_batch`), a rollout does not depend on its
neighbours or its slot, bit for bit; between buckets log-probs round differently.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Annotated, Any, Literal

import jax
import numpy as np
from absl import logging
from annotated_types import Gt, Le

from pixel_jax import fields
from pixel_jax.chat.encode import Codec, Conversation
from pixel_jax.fields import NonNegativeFloat, NonNegativeInt, Number, PositiveInt
from pixel_jax.model import qwen2_5_vl
from pixel_jax.model.config import ModelConfig
from pixel_jax.pixels import resample
from pixel_jax.pixels.geometry import Pixels
from pixel_jax.rollout import decode, pictures
from pixel_jax.rollout.episode import Episode, overflow
from pixel_jax.rollout.programs import Programs
from pixel_jax.rollout.scheduler import Scheduler, Start
from pixel_jax.rollout.table import Table
from pixel_jax.trajectory import Task, Trajectory

CALL = ("<tool_call>", "<tool_call>\n", '<tool_call>{"')  # how a call may begin
Script = Callable[
  [Task, int], Sequence[Sequence[int]]
]  # (task, sample) -> turns of ids
TOKENS = 16_384  # of one prefill or extend call, where the caller does not say


@dataclasses.dataclass(frozen=True)
class Finished:
  """A rollout that has ended, with one `Pixels` for every slot of its trajectory."""

  trajectory: Trajectory
  pixels: list[Pixels]


class Engine:
  """Compiled programs of fixed shapes; one engine runs on the devices of its params.

  Args:
    group_size: samples of one task at most; their prompt is stored and read once.
    slots: conversations at once; a multiple of 16 keeps matmuls in full blocks.
    max_prompt: tokens of a prompt at most.
    max_len: tokens of a conversation with the longest prompt; after any prompt there is
      room for max_len - max_prompt.
    prompt_len, extend_len: tokens of a row of a prefill and of an extend call; longer
      prompts and observations go in pieces.
    prompt_rows, extend_rows: rows of those calls; None = about `TOKENS` tokens a call.
    patches: of the largest picture; a vision call encodes as many.  A conversation
      that shows a larger one ends (stop "length"), as does one that is too long.
    pages: of the feature bank, patches / 4 features each.
    chunk: decoding steps between two looks of the host.
    delay: chunks from an operation's submission to its collection (`Scheduler`).
    lag: chunks that are sent off before the oldest is read.  With 1 the host works
      while the device does, but hears of the end of a turn one chunk late.
    views: lengths of prompts, and of what follows them, that prefill is compiled for;
      None = the largest alone.
    workers: threads that run operations and prepare prompts.
    zoom: who resizes pictures and crops, PIL on the "host" or the "device"; same bytes.
  """

  @fields.checked
  def __init__(
    self,
    config: ModelConfig,
    codec: Codec,
    *,
    group_size: PositiveInt = 1,
    slots: PositiveInt,
    max_prompt: PositiveInt,
    max_len: PositiveInt,
    prompt_len: PositiveInt,
    extend_len: PositiveInt,
    patches: PositiveInt,
    prompt_rows: PositiveInt | None = None,
    extend_rows: PositiveInt | None = None,
    pages: PositiveInt | None = None,
    chunk: PositiveInt = 16,
    delay: NonNegativeInt = 1,
    lag: NonNegativeInt = 0,
    views: Sequence[PositiveInt] | None = None,
    workers: PositiveInt = 2,
    zoom: Literal["host", "device"] = "host",
  ):
    if zoom == "device":
      codec = dataclasses.replace(codec, resize=resample.Resize())
    if max_prompt >= max_len - 1:
      raise ValueError(
        f"{max_prompt=}, {max_len=}: a prompt leaves room for an answer, so max_prompt "
        "is below max_len - 1"
      )
    if patches % 4:
      raise ValueError(
        f"{patches=}: a positive multiple of 4 (2 x 2 patches a feature)."
      )
    self.config, self.codec = config, codec
    self.group_size, self.slots, self.patches = group_size, slots, patches
    self.prompts = prompt_rows_of(slots, group_size)
    self.max_prompt, self.max_own = max_prompt, max_len - max_prompt
    self.chunk, self.delay, self.lag, self.workers = chunk, delay, lag, workers
    self.views = tuple(
      sorted({min(v, n) for v in views or ()} | {n})
      for n in (max_prompt, max(max_prompt, self.max_own))
    )  # of prompts; of either segment where turns follow
    self.lanes = sorted({max(1, slots // n) for n in (1, 2, 4)})
    prompt_len = min(prompt_len, max_prompt)
    self.prompt = (prompt_rows or call_rows_of(slots, prompt_len), prompt_len)
    self.turn = (extend_rows or call_rows_of(slots, extend_len), extend_len)
    # What one call may show at worst: pictures of 1 feature in rows of 4, and two
    # pictures of the largest size that stick out of either end of each row.
    page = patches // 4
    worst = max(R * (-(-4 * T // page) + 2) for R, T in (self.prompt, self.turn))
    self.pages = pages or max(32, worst + len(pictures.row_sizes(patches)))
    words = codec.tokenizer
    self._stops = (words.im_end, words.endoftext)
    self._calls = sorted({words.encode(text)[0] for text in CALL})
    self.stats: dict[str, float] = {}
    self.refusal = ""  # why the last prompt without room had none
    self._programs: Programs | None = None
    self._ways: set[tuple[decode.Sampling, bool]] = set()  # of sampling; with a ban?

  @property
  def compiles(self) -> int:
    """Programs compiled so far: one per shape and way of sampling."""
    return self._programs.compiles if self._programs else 0

  @property
  def declared(self) -> int:
    """Programs that the buckets and the ways of sampling so far can ask for."""
    extend = sum(len(views) for views in self.views)
    encode = len(pictures.row_sizes(self.patches))
    decode = len(self._ways) * len(self.lanes)
    return extend + encode + decode + len(("open", "cast", "move", "place"))

  # ---- Run ---------------------------------------------------------------------------

  def run(
    self,
    params: Any,
    tasks: Sequence[Task],
    *,
    seed: int,
    step: int,
    group_size: int,
    load_media: Callable,
    max_turns: PositiveInt,
    max_new_tokens: PositiveInt,
    temperature: NonNegativeFloat = 1.0,
    top_p: Annotated[Number, Gt(0), Le(1)] = 1.0,
    top_k: NonNegativeInt = 0,
    greedy: bool = False,
    force: str | None = None,
    script: Script | None = None,
    fixed_batch: bool = False,
    row: tuple[int, int] | None = None,
    codec: Codec | None = None,
    ended: Callable[[int, Finished], None] | None = None,
    keep: bool = True,
  ) -> list[list[Finished]]:
    """Plays every task `group_size` times with one set of weights.

    A task whose prompt has no room says nothing (stop "length"), and `refusal` tells of
    the last of them.  ValueError when `group_size` is larger than the engine's.

    Args:
      seed, step: with the task's id and the sample's index the key of its sampling.  A
        task that comes again in one shard gets keys of its own.
      temperature: 0 takes the likeliest token, as `greedy` does.
      max_turns: assistant turns; a call in the last one is not run (stop "turns").
      max_new_tokens: of one turn; a turn that does not end within them stops "length".
      row: tokens and patches that a rollout may have, so that a row of training holds it;
        one that would have more ends (stop "row").  None = any.
      force: for evaluation.  "answer": no token that begins a call is ever drawn, and a
        call that is spelled in letters is not run; "operate": the first turn begins with
        a call.
      script: ids that a rollout is made to say, turn by turn; beyond them it is free.
        A stop id ends the turn as ever, and log-probs are those of the model.
      fixed_batch: all slots decode to the end, and prefill sees the full length.
      codec: of these conversations; None = the engine's.
      ended: called with every rollout that has ended, and the place of its task.
      keep: False gives each of them to `ended` and returns none: their pictures would fill
        the memory where there are thousands.
    """
    if force not in (None, "answer", "operate"):
      raise ValueError(f"{force=} is unknown; allowed: None, 'answer', 'operate'.")
    if force == "operate":
      if script is not None:
        raise ValueError(
          "force='operate' is a script of one token: give it or a script, not both."
        )
      script = self._begin_with_a_call
    if group_size > self.group_size:
      raise ValueError(
        f"{group_size=}: this engine was made for groups of at most {self.group_size}."
      )
    if temperature < 0:
      raise ValueError(f"{temperature=}: 0 takes the likeliest token, above 0 samples.")
    greedy = greedy or temperature == 0
    sampling = decode.Sampling(temperature or 1.0, top_p, top_k, greedy)
    names = _distinct(tasks)
    limits = dict(
      max_patches=self.patches,
      max_turns=max_turns,
      max_new_tokens=max_new_tokens,
      row=row,
      operations=force != "answer",
    )
    ban = self._calls if force == "answer" else []
    table = self._table(params, sampling, ban, fixed_batch)
    buckets = [self.slots] if fixed_batch else self.lanes
    plan = Scheduler(
      slots=self.slots, prompts=self.prompts, groups=len(tasks), group_size=group_size,
      delay=self.delay,
    )  # fmt: skip
    results: list[list[Finished | None]] = [[None] * group_size for _ in tasks]
    starts: dict[int, Start] = {}  # slot -> who plays there
    prompts: dict[int, Conversation] = {}  # group -> of groups that have begun
    operations: dict[int, Future[bool]] = {}  # slot -> under way
    refused = 0  # tasks whose prompts have no room
    self.refusal = ""
    watch = _Stopwatch()

    def finish(slot: int) -> None:
      start, conversation = starts[slot], table.episodes[slot].conversation
      finished = Finished(conversation.trajectory, conversation.pixels)
      if keep:
        results[start.group][start.sample] = finished
      plan.release(slot)
      if ended:
        ended(start.group, finished)

    with ThreadPoolExecutor(self.workers) as pool:
      talk = self.codec
      if codec is not None:
        talk = dataclasses.replace(codec, resize=self.codec.resize)
      prompt_of = functools.partial(Conversation, talk, load_media=load_media)
      ahead = _Ahead(pool, prompt_of, tasks)
      while not plan.done:
        # ---- Refill free slots; a prompt is computed once a group ----
        begun = plan.refill()
        with watch("prompts"):
          for s in begun:
            if s.sample == 0:
              prompts[s.group] = ahead.take(s.group)
            last = s.sample == group_size - 1
            prompt = prompts.pop(s.group) if last else prompts[s.group]
            key = _key(seed, step, names[s.group], s.sample)
            turns = self._turns(script, tasks[s.group], s.sample)
            room = self._room(len(prompt.trajectory.ids))
            episode = Episode(
              prompt.fork(s.sample), max_len=room, script=turns, **limits
            )
            table.begin(s, episode, key)
            starts[s.slot] = s
            if s.sample == 0 and not episode.fits:
              refused += 1
              self.refusal = self._refusal(tasks[s.group], episode, row)
              logging.warning("set aside: %s", self.refusal)
        fits = {s: table.episodes[s.slot].fits for s in begun}
        with watch("prefill"):
          homes = [s.slot for s in begun if fits[s] and s.sample == 0]
          table.prefill(homes, self.prompt)
          table.start([s.slot for s in begun if fits[s]])
        for s in begun:
          if not fits[s]:
            table.episodes[s.slot].refuse()
            finish(s.slot)
        # ---- Go on with the turns whose operations are due ----
        with watch("operate"):
          due = [(slot, operations.pop(slot).result()) for slot in plan.collect()]
        for slot, fits in due:
          (plan.resume if fits else finish)(slot)
        with watch("extend"):
          table.feed([slot for slot, fits in due if fits], self.turn)
        # ---- Decode a chunk; look at what was said ----
        if plan.decoding:
          lanes, moves = plan.drain(buckets)
          for source, target in moves:
            for column in (starts, operations):
              if source in column:
                column[target] = column.pop(source)
          table.move(moves)
          with watch("decode"):
            table.decode(
              sorted(plan.decoding), sampling, lanes,
              steady=plan.steady, waiting=plan.waiting,
            )  # fmt: skip
        while len(table.unread) > (self.lag if plan.decoding else 0):
          with watch("decode"):
            sampled = table.read()
          with watch("feed"):
            for slot, ids, logp in sampled:
              episode = table.episodes[slot]
              outcome = episode.feed(ids, logp, ended=ids[-1] in self._stops)
              if outcome == "operate":
                operations[slot] = pool.submit(episode.operate)
                plan.submit(slot)
              elif outcome == "done":
                finish(slot)
        plan.tick()
    self.stats = self._summary(table, len(tasks), refused, watch.seconds)
    return results if keep else []

  def _begin_with_a_call(self, task: Task, sample: int) -> Sequence[Sequence[int]]:
    return [self.codec.tokenizer.encode(CALL[1])[:1]]

  def _turns(self, script: Script | None, task: Task, sample: int) -> list[list[int]]:
    turns = [[int(i) for i in turn] for turn in script(task, sample)] if script else []
    vocab = self.config.text.vocab
    bad = [i for turn in turns for i in turn if not 0 <= i < vocab]
    if bad:
      raise ValueError(
        f"the script of task {task.id}, sample {sample} has the id {bad[0]}; ids are "
        f"0 to {vocab - 1}."
      )
    return turns

  def refuses(
    self, tokens: int, patches: Sequence[int], row: tuple[int, int] | None = None
  ) -> str:
    """Why a prompt of so many tokens and pictures of so many patches is not played; "".

    Args:
      row: of `run`.
    """
    why = overflow(
      tokens, patches, max_len=self._room(tokens), max_patches=self.patches, row=row
    )
    if not why:
      return ""
    if why == "row":
      has, of = sum(patches), "in all; a row of training"
      limits = f"tokens={row[0]} and patches={row[1]}"
    else:
      has, of = max(patches, default=0), "in its largest picture; the engine"
      limits = f"max_prompt={self.max_prompt} and patches={self.patches}"
    return (
      f"the prompt has {tokens} tokens and {has} patches {of} takes {limits}.  Raise "
      "these, or lower the pixel budgets"
    )

  def _room(self, tokens: int) -> int:
    """Ids that a conversation with such a prompt may have; none where it is too long."""
    stored = tokens - 1  # the last is fed when decoding begins
    return stored + self.max_own if stored <= self.max_prompt else 0

  def _refusal(self, task: Task, episode: Episode, row) -> str:
    """Why a task is not played."""
    patches = {p.key: p.num_patches for p in episode.conversation.pixels}
    why = self.refuses(len(episode.ids), list(patches.values()), row)
    return f"task {task.id}: {why}"

  def _summary(
    self, table: Table, groups: int, refused: int, seconds: dict[str, float]
  ) -> dict[str, float]:
    """What `train_rl` logs of a run."""
    c = table.stats
    names = ("prefills", "extends", "chunks", "steps", "tokens", "host_syncs")
    stats = {name: c[name] for name in names} | {
      "pictures": table.bank.encoded,
      "vision_calls": table.bank.calls,
      # Of the tokens that the decoding loop could have sampled, those that it did.
      "occupancy": c["tokens"] / max(1, c["lane_steps"]),
      "waiting": c["waiting"] / max(1, c["lane_steps"]),  # for an operation
      "host_syncs_per_chunk": c["host_syncs"] / max(1, c["chunks"]),
      "prefills_per_group": c["prefills"] / max(1, groups - refused),
      "too_long_prompts": refused,
    }
    if c["steady_lane_steps"]:  # from the first refill until no sample waits
      stats["occupancy_steady"] = c["steady_tokens"] / c["steady_lane_steps"]
    stats = {f"rollout/{k}": float(v) for k, v in stats.items()}
    stats |= {f"perf/rollout_{k}_s": v for k, v in seconds.items()}
    return stats | {
      "perf/rollout_compiles": float(self.compiles),
      "perf/rollout_programs_declared": float(self.declared),
    }

  # ---- Device ------------------------------------------------------------------------

  def _table(
    self, params: Any, sampling: decode.Sampling, ban: Sequence[int], one_bucket: bool
  ) -> Table:
    """An empty cache and bank where `params` lie; freed when the run is over."""
    programs = self.programs(jax.tree.leaves(params)[0].sharding)
    self._ways.add((sampling, bool(ban)))
    if qwen2_5_vl.is_wide(self.config, params):
      params = programs.cast(params)
    cache, prompts, slots, features = programs.open()
    encode = functools.partial(programs.encode, params)
    banned = np.zeros(self.config.text.vocab, bool)
    banned[list(ban)] = True
    return Table(
      programs,
      params,
      cache,
      prompts,
      slots,
      pictures.Bank(features, encode, self.patches),
      group_size=self.group_size,
      banned=banned if ban else None,
      views=tuple(v[-1:] for v in self.views) if one_bucket else self.views,
      chunk=self.chunk,
    )

  def programs(self, sharding: jax.sharding.Sharding) -> Programs:
    """The programs for parameters of one engine: a device, or a mesh with "tensor"."""
    where = getattr(sharding, "mesh", None) or sharding
    if self._programs is None or self._programs.where != where:
      self._ways = set()
      self._programs = Programs(
        self.config,
        sharding,
        slots=self.slots,
        max_len=self.max_own,
        prompts=self.prompts,
        max_prompt=self.max_prompt,
        bank=self.pages * self.patches // 4,
        piece=self.prompt[1],
        stops=self._stops,
      )
    return self._programs


def prompt_rows_of(slots: int, group_size: int) -> int:
  """How many prompts the cache holds: three times the groups that fill the slots.

  While a group waits for its longest sample the next ones begin; with these no slot of
  log-normal turns stays empty (docs/performance.md).
  """
  return min(slots, -(-3 * slots // group_size))


def call_rows_of(slots: int, length: int) -> int:
  """Rows of a prefill or extend call of this many tokens each, about `TOKENS` in all."""
  return max(1, min(TOKENS // length, slots // 8))


def _distinct(tasks: Sequence[Task]) -> list[str]:
  """The ids of tasks, each further one of the same id and shard with its number."""
  seen: collections.Counter = collections.Counter()
  names = []
  several = collections.Counter(task.id for task in tasks)
  if doubled := [name for name, n in several.items() if n > 1]:
    logging.log_first_n(
      logging.WARNING, "%d ids come more than once among %d questions, the first is %.60r; "
      "each is played by itself", 1, len(doubled), len(tasks), doubled[0],
    )  # fmt: skip
  for task in tasks:
    again = seen[task.shard, task.id]
    seen[task.shard, task.id] += 1
    names.append(f"{task.id}#{again}" if again else task.id)
  return names


def _key(seed: int, step: int, task: str, sample: int) -> np.ndarray:
  """u32[2], the threefry key of one rollout; a hash, so no key is near another."""
  name = f"{seed}/{step}/{sample}/{task}"
  digest = hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=8).digest()
  return np.frombuffer(digest, np.uint32)


class _Ahead:
  """Prepares the prompts of the next few tasks in worker threads."""

  def __init__(self, pool: ThreadPoolExecutor, make: Callable, tasks: Sequence[Task]):
    self._pool, self._make = pool, make
    self._left = collections.deque(enumerate(tasks))
    self._futures: dict[int, Future[Conversation]] = {}

  def take(self, group: int, ahead: int = 4) -> Conversation:
    """The prompt of `group`; groups are taken in order."""
    while self._left and self._left[0][0] <= group + ahead:
      i, task = self._left.popleft()
      self._futures[i] = self._pool.submit(self._make, task)
    return self._futures.pop(group).result()


class _Stopwatch:
  """Seconds by phase; those of the device are told where the host waits: "decode"."""

  def __init__(self):
    self.seconds: dict[str, float] = collections.defaultdict(float)

  @contextlib.contextmanager
  def __call__(self, phase: str):
    start = time.perf_counter()
    yield
    self.seconds[phase] += time.perf_counter() - start
