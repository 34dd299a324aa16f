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
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
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
from pixel_jax.rollout import decode, pictures
from pixel_jax.rollout.episode import Episode, overflow
from pixel_jax.rollout.programs import Programs
from pixel_jax.rollout.session import Finished, Group, Session
from pixel_jax.rollout.table import Table
from pixel_jax.trajectory import Task

CALL = ("<tool_call>", "<tool_call>\n", '<tool_call>{"')  # how a call may begin
Script = Callable[
  [Task, int], Sequence[Sequence[int]]
]  # (task, sample) -> turns of ids
TOKENS = 16_384  # of one prefill or extend call, where the caller does not say


class Engine:
  """Compiled programs of fixed shapes; one engine runs on the devices of its params.

  Args:
    group_size: samples of one task at most; their prompt is stored and read once.
    slots: conversations at once; a multiple of 16 keeps matmuls in full blocks.
    prompts: groups at once; None = three times those that fill the slots.
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
    prompts: PositiveInt | None = None,
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
    self.prompts = min(prompts or prompt_rows_of(slots, group_size), slots)
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
    self.stops = (words.im_end, words.endoftext)
    self._calls = sorted({words.encode(text)[0] for text in CALL})
    self.stats: dict[str, float] = {}
    self.refusal = ""  # why the last prompt without room had none
    self._programs: Programs | None = None
    self._ways: set[bool] = set()  # of decoding: with a ban?

  @property
  def compiles(self) -> int:
    """Programs compiled so far: one per shape."""
    return self._programs.compiles if self._programs else 0

  @property
  def declared(self) -> int:
    """Programs that the buckets so far can ask for."""
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
      temperature: 0 takes the likeliest token.
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
    wish = decode.Wish(temperature, top_p, top_k, force == "answer").check()
    talk = self.codec
    if codec is not None:
      talk = dataclasses.replace(codec, resize=self.codec.resize)
    names = _distinct(tasks)
    limits = dict(
      max_turns=max_turns, max_new_tokens=max_new_tokens, row=row,
      operations=force != "answer",
    )  # fmt: skip
    results: list[list[Finished | None]] = [[None] * group_size for _ in tasks]

    def finish(i: int, finished: Finished) -> None:
      if keep:
        results[i][finished.trajectory.sample] = finished
      if ended:
        ended(i, finished)

    with self.open(
      params, bans=force == "answer", fixed_batch=fixed_batch, most=group_size
    ) as session:
      for i, task in enumerate(tasks):
        group = Group(
          prompt=functools.partial(Conversation, talk, task, load_media),
          keys=[key_of(seed, step, names[i], s) for s in range(group_size)],
          sampling=wish,
          script=[self._turns(script, task, s) for s in range(group_size)],
          limits=limits,
          ended=functools.partial(finish, i),
        )
        session.add(group)
      while not session.done:
        session.step()
    self.stats, self.refusal = session.stats(), session.refusal
    return results if keep else []

  def open(
    self,
    params: Any,
    *,
    bans: bool = False,
    fixed_batch: bool = False,
    most: int | None = None,
  ) -> Session:
    """Conversations with one set of weights, that come and go; `run` is one of these.

    Args:
      bans: whether a `Wish` may ban sequences from drawing a token that begins a call.
      fixed_batch: of `run`.
      most: samples of a group at most; None = the engine's `group_size`.
    """
    return Session(
      self, self._table(params, self._calls if bans else [], fixed_batch),
      lanes=[self.slots] if fixed_batch else self.lanes, most=most or self.group_size,
    )  # fmt: skip

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
      tokens, patches, max_len=self.room(tokens), max_patches=self.patches, row=row
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

  def refusal_of(self, episode: Episode, row: tuple[int, int] | None) -> str:
    """Why a prompt is not played."""
    trajectory = episode.conversation.trajectory
    patches = {p.key: p.num_patches for p in episode.conversation.pixels}
    why = self.refuses(len(trajectory.ids), list(patches.values()), row)
    return f"task {trajectory.task.id}: {why}"

  def room(self, tokens: int) -> int:
    """Ids that a conversation with such a prompt may have; none where it is too long."""
    stored = tokens - 1  # the last is fed when decoding begins
    return stored + self.max_own if stored <= self.max_prompt else 0

  # ---- Device ------------------------------------------------------------------------

  def _table(self, params: Any, ban: Sequence[int], one_bucket: bool) -> Table:
    """An empty cache and bank where `params` lie; freed when the run is over."""
    programs = self.programs(jax.tree.leaves(params)[0].sharding)
    self._ways.add(bool(ban))
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
        stops=self.stops,
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


def key_of(seed: int, step: int, task: str, sample: int) -> np.ndarray:
  """u32[2], the threefry key of one rollout; a hash, so no key is near another."""
  name = f"{seed}/{step}/{sample}/{task}"
  digest = hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=8).digest()
  return np.frombuffer(digest, np.uint32)
