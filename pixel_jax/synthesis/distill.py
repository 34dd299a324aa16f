"""Distillation: seeds and a teacher -> traces, checked, in the order of the seeds.

  seed --load--> pictures --no cue? propose--> task, cue --kind, boxes, of_seed-->
  what the cue shows --of_cue--> what the whole shows --of_whole--> trace

Many seeds are under way at once; what comes of one depends on its id, the run's seed
and the teacher's replies, never on time.  A seed ends in one of three ways: a trace; a
reason why there is none; or open, because the teacher did not answer (the budget, a
server that is down): another run asks only for these.  Not here: files.
"""

import asyncio
import collections
import dataclasses
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from pixel_jax import fields
from pixel_jax.chat import encode
from pixel_jax.chat.encode import Codec, Conversation
from pixel_jax.data import formats
from pixel_jax.fields import NonNegativeFloat, PositiveInt, Seed
from pixel_jax.pixels import ops
from pixel_jax.synthesis import boxes, checks, prompts, templates
from pixel_jax.synthesis.teacher import Exhausted, Request, Teacher, Unanswered
from pixel_jax.synthesis.templates import Prose
from pixel_jax.trajectory import Task, Trajectory

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Outcome:
  """The trace that was made of a seed, or the reason why none was made."""

  index: int  # of the seed in its source
  task: Task | None = None  # as far as it got; None where it could not be read
  kind: str = ""
  prose: Prose | None = None
  trace: Conversation | None = None
  reason: str = ""
  detail: str = ""
  is_open: bool = False  # the teacher was not reached; not dropped


class Dropped(Exception):
  """No trace comes of this seed."""

  def __init__(self, reason: str, detail: str):
    super().__init__(detail)
    self.reason, self.detail = reason, detail


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How traces are made.

  Args:
    kinds: shares of operating kinds; each seed gets one of those that it fits.
    seed: of the kinds, the boxes and the order of proposed options.
    min_side: pixels of the sides of a cue, at least; the released operation refuses
      less than 29.
    takes: times that a teacher is asked the same where its reply is malformed.
    max_tokens, temperature: of a reply.
  """

  kinds: Mapping[str, NonNegativeFloat]
  seed: Seed = 0
  min_side: PositiveInt = 28
  takes: PositiveInt = 3
  max_tokens: PositiveInt = 600
  temperature: NonNegativeFloat = 0.7

  def __post_init__(self):
    fields.check(Recipe, vars(self))
    wrong = sorted(set(self.kinds) - templates.OPERATING)
    if wrong or self.min_side < ops.MIN_SIDE:
      raise ValueError(
        f"min_side={self.min_side} ({ops.MIN_SIDE} or more), kinds {wrong}; kinds of "
        "traces with operations are "
        f"{', '.join(sorted(templates.OPERATING))}"
      )
    templates.check_kinds(self.kinds)

  def rng(self, task: Task, use: str) -> np.random.Generator:
    digest = hashlib.blake2b(f"{use}/{task.id}".encode("utf-8", "replace")).digest()
    return np.random.default_rng((self.seed, int.from_bytes(digest[:8], "big")))


async def distill(
  source: Any, codec: Codec, teacher: Teacher, recipe: Recipe, count: int
) -> AsyncIterator[Outcome]:
  """The outcomes of the first `count` seeds, in their order.

  A `Fatal` of the teacher ends it.  At most four seeds for each request under way are
  in memory.
  """
  ahead: collections.deque[asyncio.Task[Outcome]] = collections.deque()
  try:
    for index in range(count):
      if len(ahead) >= 4 * teacher.concurrency:
        yield await ahead.popleft()
      work = _Seed(source, codec, teacher, recipe, index).outcome()
      ahead.append(asyncio.create_task(work))
    while ahead:
      yield await ahead.popleft()
  finally:
    for task in ahead:
      task.cancel()
    await asyncio.gather(*ahead, return_exceptions=True)


class _Seed:
  """One seed on its way; the fields grow as it goes."""

  def __init__(self, source, codec, teacher, recipe: Recipe, index: int):
    self.source, self.codec, self.teacher = source, codec, teacher
    self.recipe, self.index = recipe, index
    self.task: Task | None = None
    self.kind, self.prose = "", None

  async def outcome(self) -> Outcome:
    trace, reason, detail, is_open = None, "", "", False
    try:
      trace = await self._trace()
    except Dropped as error:
      reason, detail = error.reason, error.detail
    except templates.SynthesisError as error:
      reason, detail = "kind", str(error)
    except (Exhausted, Unanswered) as error:
      reason, detail, is_open = "open", f"{type(error).__name__}: {error}", True
    return Outcome(
      self.index, self.task, self.kind, self.prose, trace, reason, detail, is_open
    )

  async def _trace(self) -> Conversation:
    recipe = self.recipe
    pictures = await asyncio.to_thread(self._load)
    if not _has_cue(self.task):
      await self._propose(pictures)
    check_reference(self.task, len(pictures))
    self.kind = templates.choose(
      dict(recipe.kinds), self.task, recipe.rng(self.task, "kind")
    )
    picture = pictures[self._cued(pictures)]
    found = checks.of_seed(self.task, picture.size, recipe.min_side)
    if found:
      raise Dropped(*found)
    is_world = str(self.task.media[0].path).startswith("world:")
    fine = boxes.fine(*picture.size, recipe.min_side, self.codec.profile)
    grid = boxes.WORLD if is_world else fine
    # What cannot be drawn is found before anything is asked.
    planned = templates.plan(
      self.task,
      self.kind,
      recipe.rng(self.task, "boxes"),
      frames=len(pictures),
      profile=self.codec.profile,
      grid=grid,
    )
    cue, answer = await self._reply(
      prompts.cue(self.task, self._cue(pictures, grid)),
      prompts.analysis_and_answer,
    )
    self.prose = Prose("", "", cue)
    found = checks.of_cue(self.task, cue, answer)
    if found:
      raise Dropped(*found)
    first = json.loads(planned[0].arguments)
    # A larger box shows the cue, too.
    place = not planned[0].planted or self.kind == "image/zoom"
    whole, query = await self._reply(
      prompts.whole(self.task, pictures, place=place), prompts.analysis_and_query
    )
    self.prose = Prose(whole, query, cue)
    found = checks.of_whole(self.task, self.prose, first)
    if found:
      raise Dropped(*found)
    return await asyncio.to_thread(
      templates.written,
      self.codec,
      self.task,
      self.kind,
      recipe.rng(self.task, "boxes"),
      self.prose,
      grid=grid,
      load_media=self.source.load_media,
    )

  def _load(self) -> list[Image.Image]:
    """The pictures of the seed, or the frames of its clip, as operations cut them."""
    try:
      record = self.source[self.index]
      self.task = record.task if isinstance(record, Trajectory) else record
      if not self.task.media:
        raise Dropped("seed", "it has no picture; only seeing is taught here")
      if not isinstance(self.task.reference, dict):
        raise Dropped(
          "seed", f"reference is {self.task.reference!r}; expected an object"
        )
      if _has_cue(self.task):
        formats.check_task(self.task)
      shown = encode.question_pictures(self.codec, self.task, self.source.load_media)
    except Dropped:
      raise
    except Exception as error:  # a decoder of a damaged file raises anything
      raise Dropped("seed", f"{type(error).__name__}: {error}") from error
    if self.task.media[0].kind == "video":
      return list(shown[0].picture.source)
    return [s.picture.source for s in shown]

  async def _propose(self, pictures: list[Image.Image]) -> None:
    if len(self.task.media) > 1:
      raise Dropped("seed", "it has several pictures and no cue; give it one")
    order = self.recipe.rng(self.task, "options")

    def parse(text):
      return prompts.proposal(text, self.task, len(pictures), order)

    try:
      request = prompts.propose(self.task, pictures)
      self.task = await self._reply(request, parse)
    except prompts.NotValid as error:
      raise Dropped("not valid", str(error)) from error

  async def _reply(self, request: Request, parse: Callable[[str | None], T]) -> T:
    """What the teacher's reply says; a malformed one is asked for again."""
    recipe = self.recipe
    how = dict(max_tokens=recipe.max_tokens, temperature=recipe.temperature)
    for take in range(recipe.takes):
      reply = await self.teacher.ask(dataclasses.replace(request, take=take, **how))
      if reply.refusal:
        raise Dropped("refused", reply.refusal)
      try:
        return parse(reply.text)
      except prompts.Malformed as error:
        last = str(error)
    raise Dropped("malformed", f"{recipe.takes} replies, the last: {last}")

  def _cued(self, pictures: list[Image.Image]) -> int:
    """Which picture the cue's box lies in; any frame where there is no box."""
    reference = self.task.reference
    if "target_frames" in reference:
      return reference["target_frames"][0] - 1
    return reference.get("target_image", 1) - 1

  def _cue(self, pictures: list[Image.Image], grid: boxes.Grid) -> list[Image.Image]:
    """What the right operation will return."""
    reference, picture = self.task.reference, pictures[self._cued(pictures)]
    if "target_frames" in reference and self.kind != "video/zoom":
      return [pictures[n - 1] for n in boxes.at_most(reference["target_frames"])]
    box = boxes.cover(tuple(reference["bbox_2d"]), grid)
    box = boxes.pad(box, ops.padding(self.codec.profile))
    return [picture.crop([round(v * n) for v, n in zip(box, picture.size * 2)])]


def _has_cue(task: Task) -> bool:
  need = "target_frames" if task.media[0].kind == "video" else "bbox_2d"
  return need in task.reference


def check_reference(task: Task, count: int) -> None:
  """Raises Dropped for a cue that is none; `count` pictures or frames are shown."""
  reference = task.reference
  box, frames = reference.get("bbox_2d"), reference.get("target_frames")
  target = reference.get("target_image", 1)
  whole = [target, *(frames if isinstance(frames, list) else [])]
  if not all(type(n) is int and 1 <= n <= count for n in whole):
    raise Dropped("seed", f"its cue names {whole} of {count} pictures or frames")
  if frames is not None and not (isinstance(frames, list) and frames):
    raise Dropped("seed", f"target_frames is {frames!r}; expected a list of numbers")
  if box is not None:
    good = isinstance(box, list | tuple) and len(box) == 4
    good = good and all(type(v) in (int, float) and 0 <= v <= 1 for v in box)
    if not good or not (box[0] < box[2] and box[1] < box[3]):
      raise Dropped("seed", f"bbox_2d is {box!r}; expected fractions x1 < x2, y1 < y2")
