"""Synthesis: a question and its cue -> a trace of operations, for SFT.

Templates, as in the paper (2.3, 2.4): look at the cue, then answer; or first go wrong
on purpose and correct it.  Wrong operations are planted: their whole turn has weight 0,
so that recovering is learned and going wrong is not.  Traces grow in `Conversation`,
the same as in a rollout.  Not here: pictures, and which question comes when.

  kind            turns of the policy
  image/single    crop, answer                   video/single    frames, answer
  image/recrop1   wrong, crop, answer            video/reselect  wrong, frames, answer
  image/recrop2   wrong, wrong, crop, answer     image/direct, video/direct    answer
  image/zoom      large, crop of it, answer      video/zoom      frame, crop of it, answer
                                                 text/compare    answer, no pictures

Base skills, which stand in for what Qwen2.5-VL brings along (no calls):
  image/box       the box of the cue as the answer: [0.12, 0.40, 0.28, 0.52]
  image/crop      the question, with the crop as its only picture
  video/number    the numbers of the cue's frames as the answer: [3]
  video/frame     the question, with the frame as its only picture

Numbers stand on the grid of .02, two decimals, so that they are single tokens.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from pixel_jax.chat import tools
from pixel_jax.chat.encode import Codec, Conversation, LoadMedia
from pixel_jax.chat.tokenizer import Tokenizer
from pixel_jax.data import world
from pixel_jax.pixels.geometry import Pixels
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
DIRECT = frozenset(("image/direct", "video/direct"))
KINDS = OPERATING | BASE | DIRECT | {"text/compare"}
# Whole frames, which do not show what a deep clip is asked about.
WHOLE = frozenset(("video/single", "video/reselect", "video/frame"))

BINS = round(1 / world.GRID)
MIN_BINS = 3  # a side of .06: 15 pixels of the canvas, one patch
TRIES = 100

Box = tuple[float, float, float, float]


class SynthesisError(ValueError):
  """Kinds that do not exist, or a question that a kind cannot be made of."""


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


def video_share(kinds: Mapping[str, float]) -> float:
  """How many of the questions must be about videos, so that the shares come true."""
  kinds = check_kinds(kinds)
  video = sum(v for k, v in kinds.items() if k.startswith("video/"))
  image = sum(v for k, v in kinds.items() if k.startswith("image/"))
  return video / (video + image) if video + image else 0.0


def trajectory(
  codec: Codec,
  task: Task,
  rng: np.random.Generator,
  *,
  kinds: Mapping[str, float] = PAPER,
  operation_share: float = 1.0,
  jitter: float = 0.0,
  edge_jitter: float = 0.0,
  answer_weight: float = 1.0,
  load_media: LoadMedia = world.load_media,
) -> tuple[Trajectory, list[Pixels]]:
  """One trace for `task`, and the pixels of its slots.

  Args:
    task: `reference` must hold bbox_2d (images) or target_frames (videos).
    kinds: shares; of those that the task can be made into one is drawn.  text/compare
      takes its share of every modality and makes a question of its own.
    operation_share: of the traces of an operating kind; the others answer directly.
    jitter: sd of the shift of a box in steps of the grid; two steps count as one frame.
    edge_jitter: sd of each edge, in steps, on top.
    answer_weight: loss weight of the tokens of the label.  An answer whose crop misses
      the glyph has weight 0: the policy would learn to guess.
  """
  kind = choose(check_kinds(kinds), task, rng)
  if kind in OPERATING and rng.random() >= operation_share:
    kind = modality(task) + "/direct"
  noise = (jitter, edge_jitter)
  if kind == "text/compare":
    task = compare(task, rng)
  elif kind in BASE:
    codec, task = base_skill(codec, task, kind, rng, noise)
  trace = Conversation(codec, task, load_media)
  if kind in OPERATING:
    operate(trace, kind, rng, noise)
  answer(trace, answer_weight)
  return trace.finish("answer"), trace.pixels


def modality(task: Task) -> str:
  return task.media[0].kind if task.media else "text"


def choose(kinds: dict[str, float], task: Task, rng: np.random.Generator) -> str:
  """A kind that `task` can be made into, by share."""
  mine = modality(task) + "/"
  text = kinds.get("text/compare", 0.0)
  fitting = {k: v for k, v in kinds.items() if fits(k, task) and v > 0}
  if rng.random() < text or (mine == "text/" and text):
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


def operate(trace: Conversation, kind: str, rng: np.random.Generator, noise) -> None:
  """The calls of a trace, planted ones first, each with what it returns."""
  reference = trace.trajectory.task.reference
  need = "target_frames" if kind.startswith("video") else "bbox_2d"
  if need not in reference:
    raise SynthesisError(
      f"task {trace.trajectory.task.id} has no reference {need!r}, which {kind} needs; "
      f"it has {sorted(reference)}. Give it one, or leave {kind} out of the kinds."
    )
  if kind.startswith("video"):
    cue = reference["target_frames"]
    count = len(trace.seen.pictures[0].source)
    if kind == "video/reselect":
      select(trace, wrong_frames(cue, count, rng), planted=True)
    frames = noisy_frames(cue, count, rng, noise[0])
    select(trace, frames)
    # In a frame that is not the cue's there is nothing to zoom into.
    if kind == "video/zoom" and frames == list(cue)[:8]:
      box = noisy(tuple(reference["bbox_2d"]), rng, noise)
      # Released prompts count a clip as one picture.
      first = 1 + (count if trace.codec.profile == "clean" else 1)
      crop(trace, box, first)
    return
  cue, target = tuple(reference["bbox_2d"]), 1
  box = noisy(cue, rng, noise)
  if kind in ("image/recrop1", "image/recrop2"):
    for _ in range(int(kind[-1])):
      crop(trace, wrong_box(cue, rng), 1, planted=True)
  elif kind == "image/zoom":
    large = larger_box(cue, rng)
    crop(trace, large, 1, planted=True)
    box, target = inside(box, large), 2
  crop(trace, box, target)


def crop(trace: Conversation, box: Box, target: int, planted: bool = False) -> None:
  call(trace, "crop_image_normalized", bbox_text(box, target), planted)


def select(trace: Conversation, frames: Sequence[int], planted: bool = False) -> None:
  arguments = f'{{"target_frames": {list(frames)}}}'
  call(trace, "select_frames", arguments, planted)


def call(trace: Conversation, name: str, arguments: str, planted: bool) -> None:
  # Not json.dumps: it would write 0.4, which is not the token 0.40.
  text = f'{tools.OPEN}\n{{"name": "{name}", "arguments": {arguments}}}\n{tools.CLOSE}'
  words = trace.codec.tokenizer
  ids = [*words.encode(text), words.im_end]
  trace.add_sampled(ids, weight=0.0 if planted else 1.0)
  observation = trace.call_of_last_turn(planted=planted)
  if observation is None or observation.error:
    raise SynthesisError(
      f"task {trace.trajectory.task.id}: the synthesized call {text!r} does not run: "
      f"{observation and observation.error}. Check the reference."
    )
  trace.observe(observation)


def answer(trace: Conversation, answer_weight: float) -> None:
  """The last turn.  Base skills answer plainly, as one points; questions in a box."""
  task, words = trace.trajectory.task, trace.codec.tokenizer
  label = task.answer if isinstance(task.answer, str) else task.answer[0]
  before, after = ("", "") if task.id.endswith(PLAIN) else ("\\boxed{", "}")
  ids, is_label = spell(words, before, label, after)
  weight = [answer_weight if is_it else 1.0 for is_it in is_label]
  calls = trace.trajectory.calls
  if calls and not shows_cue(task, calls):
    weight = [0.0] * len(ids)
  trace.add_sampled(ids, weight=weight)


@functools.lru_cache(maxsize=4096)
def spell(words: Tokenizer, before: str, label: str, after: str):
  """Ids of a turn that says so much, and which of them spell the label."""
  ids, is_label, end = words.encode(before + label + after), [], 0
  for i in range(len(ids)):
    start, end = end, len(words.decode(ids[: i + 1]))
    is_label.append(start < len(before + label) and end > len(before))
  return (*ids, words.im_end), (*is_label, False)


def shows_cue(task: Task, calls: list[OpCall]) -> bool:
  """Whether the last call shows what the question asks for, as far as one can tell."""
  if "glyph_2d" not in task.reference:
    return True
  return world.covers(task, calls[-1], calls[:-1])


# ---- Boxes and frames ----------------------------------------------------------------


def bbox_text(box: Box, target: int) -> str:
  return f'{{"bbox_2d": {numbers(box)}, "target_image": {target}}}'


def numbers(box: Sequence[float]) -> str:
  return "[" + ", ".join(f"{v:.2f}" for v in box) + "]"


def on_grid(bins: Sequence[float], least: Sequence[int] = (MIN_BINS,) * 2) -> Box:
  """Edges in steps of the grid -> a box within the picture, no side under `least`."""
  edges = [round(float(v)) for v in bins]
  box = [0.0] * 4
  for i in (0, 1):
    low = min(max(edges[i], 0), BINS - least[i])
    high = min(max(edges[i + 2], low + least[i]), BINS)
    box[i], box[i + 2] = round(low * world.GRID, 2), round(high * world.GRID, 2)
  return tuple(box)


def noisy(box: Box, rng: np.random.Generator, noise: tuple[float, float]) -> Box:
  """The box as somebody imprecise would give it."""
  jitter, edge_jitter = noise
  dx, dy, *edges = rng.normal(0, 1, 6).tolist()
  shift = (dx * jitter, dy * jitter) * 2
  return on_grid([v * BINS + s + e * edge_jitter for v, s, e in zip(box, shift, edges)])


def wrong_box(cue: Box, rng: np.random.Generator) -> Box:
  """A box of about the cue's size that does not overlap it."""
  for _ in range(TRIES):
    # A cue that fills the picture leaves room only for smaller boxes.
    w, h = ((cue[i + 2] - cue[i]) * BINS for i in (0, 1))
    shrink = rng.uniform(0.4, 1.0)
    w, h = max(w * shrink, MIN_BINS), max(h * shrink, MIN_BINS)
    x, y = rng.uniform(0, max(BINS - w, 0)), rng.uniform(0, max(BINS - h, 0))
    box = on_grid((x, y, x + w, y + h))
    if not overlap(box, cue):
      return box
  raise SynthesisError(
    f"no box beside the reference {cue}: it fills the picture. Leave image/recrop1 and "
    "image/recrop2 out of the kinds for such tasks."
  )


def overlap(a: Box, b: Box) -> bool:
  return all(a[i] < b[i + 2] and b[i] < a[i + 2] for i in (0, 1))


def larger_box(cue: Box, rng: np.random.Generator) -> Box:
  """A box that contains the cue, two to three times as wide and high, somewhere."""
  bins = [0.0] * 4
  for i in (0, 1):
    side = (cue[i + 2] - cue[i]) * BINS
    large = min(side * rng.uniform(2.0, 3.0), BINS)
    low = max(0.0, cue[i + 2] * BINS - large)
    high = min(cue[i] * BINS, BINS - large)
    bins[i] = rng.uniform(low, max(low, high))
    bins[i + 2] = bins[i] + large
    # Rounded outwards, so that the cue stays inside.
    bins[i], bins[i + 2] = np.floor(bins[i] + 1e-6), np.ceil(bins[i + 2] - 1e-6)
  return on_grid(bins)


def inside(box: Box, large: Box) -> Box:
  """A box of the whole picture in coordinates of the crop `large`."""
  sides = [large[i + 2] - large[i] for i in (0, 1)]
  bins = [(box[i] - large[i % 2]) / sides[i % 2] * BINS for i in range(4)]
  # A box that sticks out is cut, but keeps as many pixels as one of the picture has.
  return on_grid(bins, [min(math.ceil(MIN_BINS / side), BINS) for side in sides])


def noisy_frames(cue, count: int, rng: np.random.Generator, jitter: float) -> list[int]:
  """The cue's frames, all moved by the same number of frames."""
  shift = round(float(rng.normal(0, 1)) * jitter / 2)
  shift = min(max(shift, 1 - min(cue)), count - max(cue))
  return [frame + shift for frame in cue][:8]


def wrong_frames(cue, count: int, rng: np.random.Generator) -> list[int]:
  """As many frames as the cue has, none of them in it."""
  others = [f for f in range(1, count + 1) if f not in cue]
  if not others:
    raise SynthesisError(
      f"no frames beside the reference {list(cue)} of {count}. Leave video/reselect "
      "out of the kinds for such tasks."
    )
  size = min(len(cue), len(others), 8)
  return sorted(rng.choice(others, size, replace=False).tolist())


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
      label = numbers(noisy(tuple(cue), rng, (0.0, noise[1])))
    else:
      label = str(list(cue))
    question = world.BASE_QUESTIONS[kind]
    return codec, dataclasses.replace(task, id=name, question=question, answer=label)
  if skill == "crop":
    role, part = "crop", numbers(covering(task, rng, noise))[1:-1].replace(" ", "")
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
  for _ in range(TRIES):
    box = noisy(cue, rng, noise)
    arguments = {"bbox_2d": list(box), "target_image": 1}
    if world.covers(task, OpCall("crop_image_normalized", arguments)):
      return box
  return cue


def compare(task: Task, rng: np.random.Generator) -> Task:
  """A question without pictures."""
  a, b = rng.choice(BINS + 1, 2, replace=False) * world.GRID
  start, between = world.TEXT_PIECES
  question = f"{start}{a:.2f}{between}{b:.2f}?"
  return Task(f"{task.id}/text", question, f"{max(a, b):.2f}", [], shard=task.shard)
