"""Templates: a question and its cue -> a trace of operations, for SFT.

Templates, as in the paper (2.3, 2.4): look at the cue, then answer; or first go wrong
on purpose and correct it.  Wrong operations are planted: their whole turn has weight 0,
so that recovering is learned and going wrong is not.  Traces grow in `Conversation`,
the same as in a rollout.  With the words of a teacher (`Prose`) they also say why.  Not
here: boxes (`boxes.py`), pictures, teachers, and which question comes when.

  kind            turns of the policy
  image/single    crop, answer                   video/single    frames, answer
  image/recrop1   wrong, crop, answer            video/reselect  wrong, frames, answer
  image/recrop2   wrong, wrong, crop, answer     image/direct, video/direct    answer
  image/zoom      large, crop of it, answer      video/zoom      frame, crop of it, answer
  text/direct     answer; no pictures            text/compare    answer; its own question

Base skills, which stand in for what Qwen2.5-VL brings along (no calls):
  image/box       the box of the cue as the answer: [0.12, 0.40, 0.28, 0.52]
  image/crop      the question, with the crop as its only picture
  video/number    the numbers of the cue's frames as the answer: [3]
  video/frame     the question, with the frame as its only picture

Numbers of the world stand on the grid of .02, two decimals, as single tokens.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from pixel_jax import fields
from pixel_jax.chat import tools
from pixel_jax.chat.encode import Codec, Conversation, LoadMedia
from pixel_jax.chat.tokenizer import Tokenizer
from pixel_jax.data import world
from pixel_jax.fields import NonNegativeFloat, Share
from pixel_jax.pixels import ops
from pixel_jax.pixels.geometry import Pixels
from pixel_jax.synthesis import boxes
from pixel_jax.synthesis.boxes import Box, SynthesisError
from pixel_jax.trajectory import Media, OpCall, Task, Trajectory

# Table 2 of the paper, the shares within a modality; a quarter of them are videos.
PAPER = {
  "image/single": 0.75 * 0.30,
  "image/recrop1": 0.75 * 0.20,
  "image/recrop2": 0.75 * 0.20,
  "image/zoom": 0.75 * 0.30,
  "video/single": 0.25 * 0.90,
  "video/reselect": 0.25 * 0.10,
}
OPERATING = frozenset(PAPER) | {"video/zoom"}
BASE = frozenset(("image/box", "image/crop", "video/number", "video/frame"))
DIRECT = frozenset(("image/direct", "video/direct", "text/direct"))
KINDS = OPERATING | BASE | DIRECT | {"text/compare"}
# Whole frames, which do not show what a deep clip is asked about.
WHOLE = frozenset(("video/single", "video/reselect", "video/frame"))

# What the paper's traces say (pixel_reasoner.md 2.3) before a first operation ...
TRIGGER = {
  "crop_image_normalized": "Now I will zoom in to look clearer at {query}.",
  "select_frames": "Now I will select some frames to look clearer at {query}.",
}
# ... and between a planted one and the next.
CONNECTOR = {
  "image/recrop1": (
    "The cropped part doesn't contain the target object, I will zoom in again."
  ),
  "image/zoom": (
    "Now I can zoom in further to get a clearer view of the target object."
  ),
  "video/reselect": "The selected frames don't show {query}, I will select again.",
}
CONNECTOR["image/recrop2"] = CONNECTOR["image/recrop1"]


@dataclasses.dataclass(frozen=True)
class Prose:
  """What a teacher wrote about a question; the templates put the operations between."""

  whole: str  # analysis of the whole input, which does not tell the answer
  query: str  # what is to be looked at: "the sign above the door"
  cue: str  # analysis of the cue alone


@dataclasses.dataclass(frozen=True)
class Operation:
  """A call of a trace to be.  The arguments are JSON text: 0.40 is a token, 0.4 not."""

  name: str
  arguments: str
  planted: bool = False


@dataclasses.dataclass(frozen=True)
class Templates:
  """How a question becomes a trace: the config section `synthesis`.

  Attributes:
    kinds: shares; of those that a question can be made into one is drawn.  text/compare
      takes its share of every modality and makes a question of its own.
    operation_share: of the traces of an operating kind; the others answer directly.
    jitter: sd of the shift of a box in steps of the grid; two steps count as one frame.
    edge_jitter: sd of each edge, in steps, on top.
    answer_weight: loss weight of the tokens of the label.  An answer whose crop misses
      the glyph has weight 0: the policy would learn to guess.
  """

  kinds: Mapping[str, NonNegativeFloat] = dataclasses.field(
    default_factory=lambda: PAPER
  )
  operation_share: Share = 1.0
  jitter: NonNegativeFloat = 0.0
  edge_jitter: NonNegativeFloat = 0.0
  answer_weight: NonNegativeFloat = 1.0

  def __post_init__(self):
    fields.check(Templates, vars(self))
    object.__setattr__(self, "kinds", check_kinds(dict(self.kinds)))

  @property
  def video_share(self) -> float:
    """How many of the questions must be about videos, so that the shares come true."""
    video = sum(v for k, v in self.kinds.items() if k.startswith("video/"))
    image = sum(v for k, v in self.kinds.items() if k.startswith("image/"))
    return video / (video + image) if video + image else 0.0

  def __call__(
    self,
    codec: Codec,
    task: Task,
    rng: np.random.Generator,
    load_media: LoadMedia = world.load_media,
  ) -> tuple[Trajectory, list[Pixels]]:
    """One trace for `task`, and the pixels of its slots.

    `task.reference` must hold bbox_2d (images) or target_frames (videos).
    """
    kind = choose(dict(self.kinds), task, rng)
    if kind in OPERATING and rng.random() >= self.operation_share:
      kind = modality(task) + "/direct"
    noise = (self.jitter, self.edge_jitter)
    if kind == "text/compare":
      task = compare(task, rng)
    elif kind in BASE:
      codec, task = base_skill(codec, task, kind, rng, noise)
    trace = Conversation(codec, task, load_media)
    if kind in OPERATING:
      operate(trace, kind, rng, noise)
    answer(trace, self.answer_weight)
    return trace.finish("answer"), trace.pixels


def check_kinds(kinds: Mapping[str, float]) -> dict[str, float]:
  """The kinds with their shares summing to 1."""
  unknown = sorted(set(kinds) - KINDS)
  total = float(sum(kinds.values()))
  if unknown or not total > 0 or min(kinds.values()) < 0:
    raise SynthesisError(
      f"kinds of traces {dict(kinds)}: expected shares of 0 or more, not all 0, of "
      f"{', '.join(sorted(KINDS))}" + (f"; unknown: {unknown}" if unknown else "")
    )
  return {k: float(v) / total for k, v in kinds.items()}


def written(
  codec: Codec,
  task: Task,
  kind: str,
  rng: np.random.Generator,
  prose: Prose,
  *,
  grid: boxes.Grid = boxes.WORLD,
  load_media: LoadMedia = world.load_media,
) -> Conversation:
  """One trace of an operating kind in the words of a teacher, exact boxes, finished."""
  trace = Conversation(codec, task, load_media)
  operate(trace, kind, rng, (0.0, 0.0), grid, prose)
  answer(trace, 1.0, prose=prose)
  trace.finish("answer")
  return trace


def modality(task: Task) -> str:
  return task.media[0].kind if task.media else "text"


def choose(kinds: dict[str, float], task: Task, rng: np.random.Generator) -> str:
  """A kind that `task` can be made into, by share."""
  mine = modality(task) + "/"
  fitting = {k: v for k, v in kinds.items() if fits(k, task) and v > 0}
  if rng.random() < kinds.get("text/compare", 0.0):
    return "text/compare"
  if not fitting:
    raise SynthesisError(
      f"task {task.id} is of modality {mine[:-1]!r}, the kinds are {sorted(kinds)}; "
      f"add a kind {mine}... that fits its reference {sorted(task.reference)}, or "
      "leave such tasks out of the source"
    )
  point, upto = rng.random() * sum(fitting.values()), 0.0
  for kind, share in fitting.items():
    upto += share
    if point < upto:
      return kind
  return kind  # the shares add up to a little less


def fits(kind: str, task: Task) -> bool:
  """Whether `task` can become a trace of `kind`, and the trace show the answer."""
  if kind == "video/zoom" and "bbox_2d" not in task.reference:
    return False
  is_deep = task.reference.get("difficulty") == "deep"
  return kind.startswith(modality(task) + "/") and not (is_deep and kind in WHOLE)


# ---- Turns ---------------------------------------------------------------------------


def operate(
  trace: Conversation,
  kind: str,
  rng: np.random.Generator,
  noise,
  grid: boxes.Grid = boxes.WORLD,
  prose: Prose | None = None,
) -> None:
  """The calls of a trace, planted ones first, each with what it returns."""
  task, frames = trace.trajectory.task, 0
  if modality(task) == "video":
    frames = len(trace.seen.pictures[0].source)
  planned = plan(task, kind, rng, noise, frames, trace.codec.profile, grid)
  for i, operation in enumerate(planned):
    said = spoken(kind, planned, i, prose) if prose else ""
    call(trace, operation.name, operation.arguments, operation.planted, said)


def plan(
  task: Task,
  kind: str,
  rng: np.random.Generator,
  noise=(0.0, 0.0),
  frames: int = 0,
  profile: str = "clean",
  grid: boxes.Grid = boxes.WORLD,
) -> list[Operation]:
  """The calls of a trace of `kind`; `frames` are those that the model is shown."""
  reference = task.reference
  need = "target_frames" if kind.startswith("video") else "bbox_2d"
  if need not in reference:
    raise SynthesisError(
      f"task {task.id} has no reference {need!r}, which {kind} needs; "
      f"it has {sorted(reference)}. Give it one, or leave {kind} out of the kinds."
    )
  planned = []
  if kind.startswith("video"):
    cue = reference["target_frames"]
    if kind == "video/reselect":
      planned.append(selection(boxes.wrong_frames(cue, frames, rng), planted=True))
    chosen = boxes.noisy_frames(cue, frames, rng, noise[0])
    planned.append(selection(chosen))
    # In a frame that is not the cue's there is nothing to zoom into.
    if kind == "video/zoom" and chosen == boxes.at_most(cue):
      box = boxes.noisy(tuple(reference["bbox_2d"]), rng, noise, grid)
      # Released prompts count a clip as one picture.
      first = 1 + (frames if profile == "clean" else 1)
      planned.append(zoom(box, first, grid))
    return planned
  cue, target = tuple(reference["bbox_2d"]), reference.get("target_image", 1)
  padding = ops.padding(profile)
  box = boxes.noisy(cue, rng, noise, grid)
  if kind in ("image/recrop1", "image/recrop2"):
    for _ in range(int(kind[-1])):
      planned.append(zoom(boxes.wrong(cue, rng, grid, padding), target, grid, True))
  elif kind == "image/zoom":
    large = boxes.larger(cue, rng, grid)
    planned.append(zoom(large, target, grid, True))
    box = boxes.inside(box, boxes.pad(large, padding), grid)
    target = len(task.media) + 1
  return [*planned, zoom(box, target, grid)]


def zoom(box: Box, target: int, grid: boxes.Grid, planted: bool = False) -> Operation:
  arguments = f'{{"bbox_2d": {grid.text(box)}, "target_image": {target}}}'
  return Operation("crop_image_normalized", arguments, planted)


def selection(frames: Sequence[int], planted: bool = False) -> Operation:
  return Operation("select_frames", f'{{"target_frames": {list(frames)}}}', planted)


def spoken(kind: str, planned: Sequence[Operation], i: int, prose: Prose) -> str:
  """What is said before the i-th call."""
  if i and planned[i - 1].planted:
    return CONNECTOR[kind].format(query=prose.query)
  trigger = TRIGGER[planned[i].name].format(query=prose.query)
  return trigger if i else f"{prose.whole}\n\n{trigger}"


def call(
  trace: Conversation, name: str, arguments: str, planted: bool, said: str = ""
) -> None:
  # Not json.dumps: it would write 0.4, which is not the token 0.40.
  text = f'{tools.OPEN}\n{{"name": "{name}", "arguments": {arguments}}}\n{tools.CLOSE}'
  words = trace.codec.tokenizer
  # A teacher's words are those of a stranger: no control token may come of them.
  ids = [*words.encode_parts([(said, False), (text, True)]), words.im_end]
  trace.add_sampled(ids, weight=0.0 if planted else 1.0)
  observation = trace.call_of_last_turn(planted=planted)
  if observation is None or observation.error:
    raise SynthesisError(
      f"task {trace.trajectory.task.id}: the synthesized call {text!r} does not run: "
      f"{observation and observation.error}. Check the reference."
    )
  trace.observe(observation)


def answer(
  trace: Conversation, answer_weight: float, prose: Prose | None = None
) -> None:
  """The last turn.  Base skills answer plainly, as one points; questions in a box."""
  task, words = trace.trajectory.task, trace.codec.tokenizer
  label = task.answer if isinstance(task.answer, str) else task.answer[0]
  before, after = ("", "") if task.id.endswith(PLAIN) else ("\\boxed{", "}")
  if prose:
    text = f"{prose.cue}\n\n{before}{label}{after}"
    ids = [*words.encode(text, control=False), words.im_end]
    weight = [1.0] * len(ids)
  else:
    ids, is_label = spell(words, before, label, after)
    weight = [answer_weight if is_it else 1.0 for is_it in is_label]
  calls = trace.trajectory.calls
  if calls and not shows_cue(task, calls):
    weight = [0.0] * len(ids)
  trace.add_sampled(ids, weight=weight)


@functools.lru_cache(maxsize=4096)
def spell(words: Tokenizer, before: str, label: str, after: str):
  """Ids of a turn that says so much, and which of them spell the label."""
  ids, is_label, end = words.encode(before + label + after, control=False), [], 0
  for i in range(len(ids)):
    start, end = end, len(words.decode(ids[: i + 1]))
    is_label.append(start < len(before + label) and end > len(before))
  return (*ids, words.im_end), (*is_label, False)


def shows_cue(task: Task, calls: list[OpCall]) -> bool:
  """Whether the last call shows what the question asks for, as far as one can tell."""
  if "glyph_2d" not in task.reference:
    return True
  return world.covers(task, calls[-1], calls[:-1])


# ---- Questions of their own ----------------------------------------------------------

PLAIN = ("/box", "/number")  # ends of the ids of tasks whose answer stands alone


def base_skill(
  codec: Codec, task: Task, kind: str, rng: np.random.Generator, noise
) -> tuple[Codec, Task]:
  """A question that trains one skill, made of a task of the world.

  Crops and frames get the budget they have as results of a call, so that they are read
  at the size at which they will be met.  Such traces cannot be redrawn with the codec
  of the run; they are made for training only and not stored.
  """
  reference, path = task.reference, task.media[0].path
  skill = kind.split("/")[1]
  name = f"{task.id}/{skill}"
  if skill in ("box", "number"):
    cue = reference["bbox_2d" if skill == "box" else "target_frames"]
    if skill == "box":
      label = boxes.WORLD.text(boxes.noisy(tuple(cue), rng, (0.0, noise[1])))
    else:
      label = str(list(cue))
    question = world.BASE_QUESTIONS[kind]
    return codec, dataclasses.replace(task, id=name, question=question, answer=label)
  if skill == "crop":
    role, part = (
      "crop",
      boxes.WORLD.text(covering(task, rng, noise))[1:-1].replace(" ", ""),
    )
  else:
    role, part = "frame", str(reference["target_frames"][0])
  codec = dataclasses.replace(
    codec, budgets={**codec.budgets, "image": codec.budgets[role]}
  )
  media = [Media("image", f"{path}#{part}")]
  return codec, dataclasses.replace(task, id=name, media=media)


def covering(task: Task, rng: np.random.Generator, noise) -> Box:
  """A noisy box that still shows the glyph: a crop without it teaches nothing."""
  cue = tuple(task.reference["bbox_2d"])
  for _ in range(boxes.TRIES):
    box = boxes.noisy(cue, rng, noise)
    arguments = {"bbox_2d": list(box), "target_image": 1}
    if world.covers(task, OpCall("crop_image_normalized", arguments)):
      return box
  return cue


def compare(task: Task, rng: np.random.Generator) -> Task:
  """A question without pictures."""
  a, b = rng.choice(boxes.WORLD.bins + 1, 2, replace=False) * world.GRID
  start, between = world.TEXT_PIECES
  question = f"{start}{a:.2f}{between}{b:.2f}?"
  return Task(f"{task.id}/text", question, f"{max(a, b):.2f}", [], shard=task.shard)
