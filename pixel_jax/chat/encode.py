"""`Conversation`: a question, its pictures and the policy's turns as a `Trajectory`.

Synthesis (SFT) and the rollout build their trajectories here, so both see the same ids.
It only ever appends.  What the policy sampled goes in as ids and is never tokenised
again: text is derived from ids, not the other way round.  M-RoPE positions grow along:
what follows starts at max(previous) + 1.

  c = Conversation(codec, task, load_media)  system, user, "<|im_start|>assistant\\n"
  c.add_sampled(ids)                         ... "</tool_call><|im_end|>"
  c.observe(c.call_of_last_turn())           "\\n", crop, "<|im_start|>assistant\\n"
  c.add_sampled(ids)                         ... "\\\\boxed{O}<|im_end|>"
  c.call_of_last_turn() is None              an answer
  c.finish("answer")

Not here: which tokens are sampled, when to stop, what an answer is worth.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import PIL
from annotated_types import Len
from PIL import Image

from pixel_jax import fields
from pixel_jax.chat import template, tools
from pixel_jax.chat.tokenizer import Part, Tokenizer
from pixel_jax.chat.tools import Operation
from pixel_jax.fields import PositiveInt
from pixel_jax.pixels import geometry, image, ops
from pixel_jax.trajectory import Media, OpCall, Slot, Task, Trajectory

ROLES = ("image", "video", "crop", "frame")
STOPS = ("answer", "turns", "length", "row")
# (fewest, most) pixels; pixel_reasoner.md 1.9, the column of RL training.
RELEASED_BUDGETS = {
  "image": (4 * 784, 2000 * 784),
  "video": (4 * 784, 512 * 784),  # a frame
  "crop": (4 * 784, 1000 * 784),
  "frame": (4 * 784, 400 * 784),
}

Pair = Annotated[Sequence[PositiveInt], Len(2, 2)]  # fewest, most

# Opens what a Media names: an image (PIL), or a video with .frames, .seconds_per_frame.
LoadMedia = Callable[[Media], Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Codec:
  """How conversations become ids and pixels: one for SFT, rollout and evaluation."""

  tokenizer: Tokenizer
  profile: Literal["clean", "released"] = "clean"
  budgets: Mapping[str, Pair] = dataclasses.field(
    default_factory=lambda: dict(RELEASED_BUDGETS)
  )  # role -> (fewest, most) pixels; of a frame for "video"
  tokens_per_second: float = 2.0  # of the checkpoint's config
  window: int = geometry.WINDOW
  patch: int = image.PATCH
  temporal: int = image.TEMPORAL
  merge: int = image.MERGE
  tools: bool = True  # False: no operations are offered, every turn is an answer
  # A system turn instead of the profile's; then nothing follows the question, either.
  system: str | None = None
  video_frames: PositiveInt = 16  # of a longer clip, so many are shown, evenly spaced
  # "view": crops from what was shown, as released.
  crop_source: Literal["original", "view"] = "original"
  operations: tuple[Operation, ...] = ()  # of yours, beside the two
  # Bicubic resize to (width, height).  The engine may put one here that runs on its
  # device (pixels/resample.py); the bytes are the same.
  resize: Callable[[Image.Image, tuple[int, int]], Image.Image] = image.bicubic

  def __post_init__(self):
    fields.check(Codec, vars(self))
    names = self.operation_names
    roles = {o.role for o in self.operations}
    if len(set(names)) < len(names) or not roles <= {"crop", "frame"}:
      raise ValueError(
        f"operations {', '.join(names)} of the roles {sorted(roles)}: every name is used "
        "once, and a role is crop or frame"
      )
    if set(self.budgets) != set(ROLES):
      raise ValueError(
        f"budgets are given for {sorted(self.budgets)}; expected {sorted(ROLES)}"
      )
    for role, (fewest, most) in self.budgets.items():
      if fewest > most:
        raise ValueError(
          f"budgets[{role!r}] is {(fewest, most)}; expected fewest <= most pixels"
        )

  @property
  def operation_names(self) -> tuple[str, ...]:
    return (*tools.OPERATIONS, *(o.name for o in self.operations))

  def view_size(self, picture: Image.Image, role: str) -> tuple[int, int]:
    """(width, height) of a picture in the pixel budget of its role."""
    fewest, most = self.budgets[role]
    height, width = image.smart_resize(
      picture.height, picture.width, min_pixels=fewest, max_pixels=most,
      factor=self.patch * self.merge,
    )  # fmt: skip
    return width, height

  def shrink(self, picture: Image.Image, role: str) -> Image.Image:
    """The view of a picture in the pixel budget of its role."""
    size = self.view_size(picture, role)
    return picture if picture.size == size else self.resize(picture, size)


@dataclasses.dataclass(frozen=True)
class Shown:
  """A picture on its way into the conversation."""

  picture: ops.Picture
  pixels: geometry.Pixels
  slot: dict  # fields of its Slot but start, length and grid


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
  """What `data/pack.py` packs."""

  tokens: np.ndarray  # i32[n]
  position: np.ndarray  # i32[n 3]
  weight: np.ndarray  # f32[n]    as targets
  logp: np.ndarray  # f32[n]    at sampling; 0 elsewhere
  vision: list[tuple[int, geometry.Pixels]]  # (first placeholder, picture)
  advantage: float = 0.0
  name: str = ""  # the id of its question


class Conversation:
  """Append-only builder of a trajectory; `pixels[i]` are of `trajectory.slots[i]`."""

  trajectory: Trajectory
  pixels: list[geometry.Pixels]
  seen: ops.Seen

  def __init__(
    self,
    codec: Codec,
    task: Task,
    load_media: LoadMedia,
    *,
    sample: int = 0,
    messages: Sequence[template.Message] | None = None,
  ):
    """Args:
    messages: what was said so far, with the pictures of the task in order; None =
      `question_messages`.
    """
    self.codec = codec
    self.trajectory = Trajectory(
      task=task, sample=sample, profile=codec.profile, pillow=PIL.__version__
    )
    self.pixels = []
    self.seen = ops.Seen()
    self._next = 0  # M-RoPE position of what follows
    shown = question_pictures(codec, task, load_media)
    messages = messages or question_messages(codec, task)
    self._append(messages, template.prompt(messages), shown)

  # ---- Growing -----------------------------------------------------------------------

  def add_sampled(
    self,
    ids: Sequence[int],
    logp: Sequence[float] | None = None,
    weight: float | Sequence[float] = 1.0,
  ) -> None:
    """Appends the policy's own ids, verbatim.  A turn may come in several pieces."""
    ids = [int(i) for i in ids]
    logp = [0.0] * len(ids) if logp is None else [float(x) for x in logp]
    if np.ndim(weight) == 0:
      weight = [float(weight)] * len(ids)
    weight = [float(x) for x in weight]
    if not len(ids) == len(logp) == len(weight):
      raise ValueError(
        f"{len(ids)} ids with {len(logp)} log-probs and {len(weight)} weights; "
        "expected one of each per id"
      )
    t = self.trajectory
    t.ids += ids
    t.sampled += [True] * len(ids)
    t.logp += logp
    t.weight += weight
    self._advance(len(ids))
    text = template.without_end(self.last_text())
    if t.turns[-1]["role"] == "assistant":
      t.turns.pop()
    t.turns.append({"role": "assistant", "text": text})

  def observe(self, observation: tools.Observation) -> None:
    """Closes the policy's turn and appends the answer to its call."""
    codec = self.codec
    views = observation.views or [
      codec.shrink(i, observation.role) for i in observation.images
    ]
    shown = [
      Shown(
        ops.Picture("image", source, view),
        lay_out([view], codec),
        {"role": observation.role, "call": observation.call, "index": i},
      )
      for i, (source, view) in enumerate(zip(observation.images, views, strict=True))
    ]
    self._reply(observation.text, shown)

  def ask(self, question: str) -> None:
    """Closes the policy's turn and appends another question, about the same pictures."""
    self._reply(question, [])

  def _reply(self, said: str, shown: Sequence[Shown]) -> None:
    # A turn that was cut off has no end of its own.
    closed = self.trajectory.ids[-1] == self.codec.tokenizer.im_end
    end = ("\n" if closed else template.END + "\n", True)
    text = {"type": "text", "text": said}
    message = {"role": "user", "content": [text, *[{"type": "image"}] * len(shown)]}
    parts = [end, *template.turn(message), (template.GENERATION, True)]
    self._append([message], parts, shown)

  def finish(self, stop: str) -> Trajectory:
    """Marks why the conversation ended: one of `STOPS`."""
    if stop not in STOPS:
      raise ValueError(f"{stop=}: allowed are {', '.join(STOPS)}")
    self.trajectory.stop = stop
    return self.trajectory

  def fork(self, sample: int) -> "Conversation":
    """Another sample of the same prompt; pictures and their pixels are shared."""
    other = copy.copy(self)
    t = self.trajectory
    lists = {
      f.name: list(getattr(t, f.name))
      for f in dataclasses.fields(t)
      if isinstance(getattr(t, f.name), list)
    }
    other.trajectory = dataclasses.replace(
      t, sample=sample, reward=dict(t.reward), **lists
    )
    other.pixels = list(self.pixels)
    other.seen = ops.Seen(list(self.seen.pictures))
    return other

  # ---- The policy's last turn --------------------------------------------------------

  def last_text(self) -> str:
    """The text of the turn in progress, control tokens included."""
    return self.codec.tokenizer.decode(self.trajectory.ids[self._turn_start :])

  def last_call(self) -> tools.Call | None:
    """What the last turn asks for, not yet run; None when it is an answer."""
    if not self.codec.tools:
      return None
    codec = self.codec
    return tools.parse_call(self.last_text(), codec.profile, codec.operation_names)

  def call_of_last_turn(self, *, planted: bool = False) -> tools.Observation | None:
    """Runs the call of the last turn and records it; None for an answer."""
    call = self.last_call()
    if call is None:
      return None
    observation = run(call, self.seen, self.codec)
    error = observation.error.kind if observation.error else None
    calls = self.trajectory.calls
    calls.append(OpCall(call.name, call.arguments, error, planted))
    return dataclasses.replace(observation, call=len(calls) - 1)

  # ---- Machinery ---------------------------------------------------------------------

  def _append(
    self, messages: list[dict], parts: list[Part], shown: Sequence[Shown]
  ) -> None:
    """Appends turns that the policy did not write; pads widen to their pictures."""
    words, t = self.codec.tokenizer, self.trajectory
    pads = (words.image_pad, words.video_pad)
    ids, first, left = words.encode_parts(parts), len(t.ids), iter(shown)
    last = 0
    for at, token in enumerate(ids):
      if token in pads:
        self._write(ids[last:at])
        self._show(token, next(left))
        last = at + 1
    self._write(ids[last:])
    new = len(t.ids) - first
    t.sampled += [False] * new
    t.weight += [0.0] * new
    t.logp += [0.0] * new
    t.turns += [
      {"role": m["role"], "text": template.render(template.content(m))}
      for m in messages
    ]
    self._turn_start = len(t.ids)  # where the policy goes on

  def _write(self, ids: list[int]) -> None:
    self.trajectory.ids += ids
    self._advance(len(ids))

  def _advance(self, n: int) -> None:
    self.trajectory.position += [(p, p, p) for p in range(self._next, self._next + n)]
    self._next += n

  def _show(self, pad: int, shown: Shown) -> None:
    codec, t, grid = self.codec, self.trajectory, shown.pixels.grid
    slot = Slot(len(t.ids), shown.pixels.num_merged, grid, **shown.slot)
    if slot.role == "video":
      position = geometry.video_positions(
        grid, self._next, slot.second_per_grid, codec.tokens_per_second, codec.merge
      )
    else:
      position = geometry.image_positions(grid, self._next, codec.merge)
    t.ids += [pad] * slot.length
    t.position += map(tuple, position.tolist())
    t.slots.append(slot)
    self._next = geometry.next_position(position)
    self.pixels.append(shown.pixels)
    self.seen.pictures.append(shown.picture)


# ---- The question --------------------------------------------------------------------


def question_messages(codec: Codec, task: Task) -> list[dict]:
  """The system's turn, and the user's with the pictures and the question."""
  system, text = codec.system, task.question
  if system is None:
    system = tools.system_prompt(codec.profile, codec.tools, codec.operations)
    text += tools.user_suffix(codec.profile, codec.tools)
  pictures = [{"type": media.kind} for media in task.media]
  return [
    {"role": "system", "content": system},
    {"role": "user", "content": [*pictures, {"type": "text", "text": text}]},
  ]


def measure(codec: Codec, task: Task, load_media: LoadMedia) -> tuple[int, list[int]]:
  """Tokens of the prompt of a `Conversation`, and patches of each of its pictures.

  Nothing is resized, and what a conversation would refuse is raised here, too.
  """
  patches = []
  for media in task.media:
    loaded = load_media(media)
    _check_kind(media, task)
    is_video = media.kind == "video"
    picture = loaded.frames[0] if is_video else loaded
    frames = min(len(loaded.frames), codec.video_frames) if is_video else 1
    width, height = codec.view_size(picture, media.kind)
    grid = -(-frames // codec.temporal), height // codec.patch, width // codec.patch
    patches.append(math.prod(grid))
  ids = codec.tokenizer.encode_parts(template.prompt(question_messages(codec, task)))
  pads = sum(n // codec.merge**2 - 1 for n in patches)  # one of each is there
  return len(ids) + pads, patches


def _check_kind(media: Media, task: Task) -> None:
  if media.kind not in ("image", "video"):
    raise ValueError(f"{media.kind=} of task {task.id}: allowed are image, video")


# ---- Pictures ------------------------------------------------------------------------


def pixels_of(
  picture: Image.Image | Sequence[Image.Image], role: str, codec: Codec
) -> geometry.Pixels:
  """A picture, or the frames of a video, resized and laid out for the device."""
  frames = [picture] if isinstance(picture, Image.Image) else picture
  return lay_out(view_frames(frames, role, codec), codec)


def view_frames(
  frames: Sequence[Image.Image], role: str, codec: Codec
) -> list[Image.Image]:
  """The frames in the budget of `role`, all of the size of the first."""
  first = codec.shrink(frames[0], role)
  return [first] + [
    f if f.size == first.size else codec.resize(f, first.size) for f in frames[1:]
  ]


def lay_out(views: Sequence[Image.Image], codec: Codec) -> geometry.Pixels:
  """Lays out views without resizing them: a second resize could change their size."""
  patches, grid = image.patchify(
    np.stack([np.asarray(v) for v in views]), codec.patch, codec.temporal, codec.merge
  )
  return geometry.lay_out(
    patches, grid, window=codec.window, patch=codec.patch, merge=codec.merge
  )


def question_pictures(codec: Codec, task: Task, load_media: LoadMedia) -> list[Shown]:
  """The pictures of the question, as the model is to see them."""
  result = []
  for i, media in enumerate(task.media):
    loaded = load_media(media)
    _check_kind(media, task)
    behind = loaded
    if media.source is not None:
      behind = load_media(dataclasses.replace(media, path=media.source, source=None))
    slot = {"role": media.kind, "media": i}
    if media.kind == "video":
      frames, seconds = _frames(loaded, codec)
      source = _frames(behind, codec)[0]
      view = views = view_frames(frames, "video", codec)
      slot["second_per_grid"] = float(seconds * codec.temporal)
    else:
      source, view = behind, codec.shrink(loaded, "image")
      views = [view]
    picture = ops.Picture(media.kind, source, view)
    result.append(Shown(picture, lay_out(views, codec), slot))
  return result


def _frames(clip: Any, codec: Codec) -> tuple[list[Image.Image], float]:
  """Those of a clip that are shown, and the seconds of each."""
  frames, seconds = clip.frames, clip.seconds_per_frame
  if len(frames) > codec.video_frames:
    chosen = np.linspace(0, len(frames) - 1, codec.video_frames).round().astype(int)
    seconds *= len(frames) / codec.video_frames
    frames = [frames[j] for j in chosen]
  return frames, seconds


def run(call: tools.Call, seen: ops.Seen, codec: Codec) -> tools.Observation:
  """Runs a call on what was seen, with the budgets of the codec."""
  return tools.run_call(
    call, seen, codec.profile, shrink=codec.shrink, source=codec.crop_source,
    operations=codec.operations,
  )  # fmt: skip


# ---- Afterwards ----------------------------------------------------------------------


def example(trajectory: Trajectory, pixels: Iterable[geometry.Pixels]) -> Example:
  """The arrays of a trajectory; `pixels` as in `Conversation.pixels` or `redraw`."""
  t = trajectory
  return Example(
    tokens=np.asarray(t.ids, np.int32),
    position=np.asarray(t.position, np.int32).reshape(-1, 3),
    weight=np.asarray(t.weight, np.float32),
    logp=np.asarray(t.logp, np.float32),
    vision=[(s.start, p) for s, p in zip(t.slots, pixels, strict=True)],
    advantage=t.advantage,
    name=t.task.id,
  )


def redraw(
  trajectory: Trajectory, codec: Codec, load_media: LoadMedia
) -> list[geometry.Pixels]:
  """The pixels of every slot again, key for key, by replaying the calls."""
  shown = question_pictures(codec, trajectory.task, load_media)
  seen = ops.Seen([s.picture for s in shown])
  pixels = [s.pixels for s in shown]
  answered = {slot.call for slot in trajectory.slots}
  for i, call in enumerate(trajectory.calls):
    if i not in answered:  # it failed, or the conversation ended with it
      continue
    observation = run(tools.Call(call.name, call.arguments), seen, codec)
    for source, view in zip(observation.images, observation.views, strict=True):
      pixels.append(lay_out([view], codec))
      seen.pictures.append(ops.Picture("image", source, view))
  grids = [p.grid for p in pixels]
  if grids != [s.grid for s in trajectory.slots]:
    raise ValueError(
      f"task {trajectory.task.id}: redrawn pictures have the grids {grids}, the slots "
      f"say {[s.grid for s in trajectory.slots]}; profile, budgets and media must be "
      f"those of the run (Pillow {trajectory.pillow} then, {PIL.__version__} now)"
    )
  return pixels
