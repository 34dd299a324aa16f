"""Sources: random access to questions and traces, and to the pictures they name.

Not the order, not the shards (`pipeline.py`).  A source has `len`, `source[i]`, which
is a `Task` or a `Trajectory`, `load_media`, and `synthesis`: None, or how a task
becomes a trace (keyword arguments of `synthesize.trajectory`).

  world:train          the tiny world: a quarter of the scenes are videos
  world:val/image      only the images;  world:7/train is another world, of seed 7
  world:full_train     half of the scenes are videos, half of these deep clips
  jsonl:data/x.jsonl   a Trajectory or a Task a line, paths relative to the root

Media paths never leave the root: data files come from elsewhere.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from pixel_jax import trajectory
from pixel_jax.data import synthesize, world
from pixel_jax.pixels import image, video
from pixel_jax.trajectory import Media, Task, Trajectory

FIELDS = {f.name for f in dataclasses.fields(Task)}
NEEDED = ("id", "question", "answer", "media")


class SourceError(ValueError):
  """A source that cannot be opened."""


class BadRecord(ValueError):
  """One record that cannot be used; it is set aside, the others are not."""


def open_source(
  uri: str,
  *,
  root: str | pathlib.Path = "",
  codec: Any = None,
  kinds: Mapping[str, float] | None = None,
  operation_share: float = 1.0,
  jitter: float = 0.0,
  edge_jitter: float = 0.0,
  answer_weight: float = 1.0,
) -> "World | Jsonl":
  """The source of a URI.

  Args:
    root: where the paths begin; "" = the current directory.
    codec: says how many frames of a video are read.
    kinds: shares of the kinds of traces; None = tasks stay tasks.  The others are those
      of `synthesize.trajectory`, too.
  """
  synthesis = None
  if kinds is not None:
    synthesis = {
      "kinds": synthesize.check_kinds(dict(kinds)),
      "operation_share": operation_share,
      "jitter": jitter,
      "edge_jitter": edge_jitter,
      "answer_weight": answer_weight,
    }
  scheme, _, rest = uri.partition(":")
  if scheme == "world":
    return World(rest, synthesis)
  if scheme == "jsonl":
    frames = codec.video_frames if codec else 16
    return Jsonl(rest, root, synthesis, num_frames=frames)
  raise SourceError(
    f"data.uri={uri!r}: the scheme {scheme!r} is unknown; allowed are world:SPLIT and "
    "jsonl:FILE"
  )


class World:
  """The questions of a split of the tiny world.

  With synthesis, images and videos come as often as the kinds ask for.
  """

  def __init__(self, rest: str, synthesis: dict | None = None):
    words = rest.split("/")
    self.seed = int(words.pop(0)) if words[0].isdigit() else 0
    self.split = words.pop(0) if words else ""
    kind = words.pop(0) if words else ""
    if self.split not in world.SPLITS or words or kind not in ("", *world.KINDS):
      raise SourceError(
        f"world:{rest}: expected world:[SEED/]SPLIT[/KIND], SPLIT one of "
        f"{', '.join(world.SPLITS)}, KIND one of {', '.join(world.KINDS)}"
      )
    self.synthesis = synthesis
    if kind:
      self.share = float(kind == "video")
    elif synthesis:
      self.share = synthesize.video_share(synthesis["kinds"])
    else:
      self.share = world.video_share(self.split)
    videos = world.SPLITS[self.split] // world.VIDEO_EVERY
    images = world.SPLITS[self.split] - videos
    lengths = [images / (1 - self.share)] if self.share < 1 else []
    lengths += [videos / self.share] if self.share > 0 else []
    self._len = math.floor(min(lengths))

  def __len__(self) -> int:
    return self._len

  def __getitem__(self, i: int) -> Task:
    if not 0 <= i < self._len:
      raise IndexError(f"record {i} of {self._len}")
    before, after = math.floor(i * self.share), math.floor((i + 1) * self.share)
    is_video = after > before  # evenly spread
    index = world.nth("video", before) if is_video else world.nth("image", i - before)
    return world.task(self.seed, self.split, index)

  def load_media(self, media: Media) -> Image.Image | video.Video:
    return world.load_media(media)


class Jsonl:
  """The lines of a file; only where they begin is kept in memory."""

  def __init__(
    self,
    path: str,
    root: str | pathlib.Path = "",
    synthesis: dict | None = None,
    num_frames: int = 16,
  ):
    self.path = pathlib.Path(root or ".") / path
    self.synthesis = synthesis
    self.load_media = functools.partial(load_media, root=root, num_frames=num_frames)
    if not self.path.is_file():
      raise SourceError(
        f"jsonl:{path}: no file {self.path.absolute()}; check data.uri and data.root"
      )
    self._file = os.open(self.path, os.O_RDONLY)
    ends, at = [0], 0
    with self.path.open("rb") as f:
      for line in f:
        at += len(line)
        if line.strip():
          ends.append(at)
        else:
          ends[-1] = at
    self._ends = np.array(ends)
    if not len(self):
      raise SourceError(f"jsonl:{path}: the file is empty; it needs a record a line")

  def __del__(self):
    if hasattr(self, "_file"):
      os.close(self._file)

  def __len__(self) -> int:
    return len(self._ends) - 1

  def __getitem__(self, i: int) -> Task | Trajectory:
    if not 0 <= i < len(self):
      raise IndexError(f"record {i} of {len(self)}")
    start, end = int(self._ends[i]), int(self._ends[i + 1])
    # pread has no file position, so threads may read at the same time.
    line = os.pread(self._file, end - start, start)
    try:
      return parse_record(line.decode("utf-8"))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
      raise BadRecord(f"{self.path.name} line {i + 1}: {error}") from error


def parse_record(line: str) -> Task | Trajectory:
  """A line: a Trajectory if it has a task, else a Task."""
  d = json.loads(line)
  if not isinstance(d, dict):
    raise BadRecord(f"expected a JSON object, got {type(d).__name__}")
  if "task" in d:
    return trajectory.from_json(line)
  missing, unknown = [k for k in NEEDED if k not in d], sorted(set(d) - FIELDS)
  if missing or unknown:
    raise BadRecord(
      f"a task needs {', '.join(NEEDED)}; missing {missing}, unknown {unknown}"
    )
  task = Task(**{**d, "media": [Media(**m) for m in d["media"]]})
  check_task(task)
  return task


def check_task(task: Task) -> None:
  """Raises BadRecord for a question that cannot be learned from."""
  answers = task.answer if isinstance(task.answer, list) else [task.answer]
  if not answers or not all(isinstance(a, str) and a.strip() for a in answers):
    raise BadRecord(f"task {task.id}: no answer ({task.answer!r}); give it a text")
  if not isinstance(task.question, str) or not task.question.strip():
    raise BadRecord(f"task {task.id}: no question ({task.question!r})")


# ---- Media ---------------------------------------------------------------------------


def load_media(
  media: Media, root: str | pathlib.Path = "", num_frames: int = 16
) -> Image.Image | video.Video:
  """The picture or clip that a record names, from the world or below `root`."""
  paths = [media.path] if isinstance(media.path, str) else media.path
  if isinstance(media.path, str) and media.path.startswith("world:"):
    return world.load_media(media)
  paths = [resolve(path, root) for path in paths]
  if media.kind == "image" and len(paths) == 1:
    return image.load_image(paths[0])
  if media.kind == "video":
    one = isinstance(media.path, str)
    return video.read_video(
      paths[0] if one else paths, num_frames=num_frames, fps=media.fps
    )
  raise BadRecord(
    f"media of kind {media.kind!r} with {len(paths)} paths; expected an image with one "
    "path, or a video with one path or its frames"
  )


def resolve(path: str, root: str | pathlib.Path = "") -> pathlib.Path:
  """`path` below `root`, links followed."""
  base = pathlib.Path(root or ".").resolve()
  full = (base / path).resolve()
  if not full.is_relative_to(base):
    raise BadRecord(
      f"media path {path!r} leads to {full}, outside of the root {base}; use paths "
      "below it, or set data.root"
    )
  if not full.is_file():
    raise BadRecord(f"media path {path!r}: no file {full}; check data.root")
  return full
