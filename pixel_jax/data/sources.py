"""Sources: random access to questions and traces, and to the pictures they name.

Not the order, not the shards (`pipeline.py`).  A source has `len`, `source[i]`, which
is a `Task` or a `Trajectory`, `load_media`, a `filter` that the pipeline asks, the
`codec` it was opened with, and `synthesis`: None, or how a question without a trace
becomes one, a function like `synthesis.templates.Templates`.

  world:train          the tiny world: a quarter of the scenes are videos
  world:val/image      only the images;  world:7/train is another world, of seed 7
  world:full_train     half of the scenes are videos, half of these deep clips
  jsonl:, json:, parquet:, arrayrecord:, tfds:      records of a file (records.py) in
                       our layout or a foreign one (formats.py), paths below the root
  images:FOLDER        bare pictures, for synthesis
  URI,URI              a mixture; an epoch holds every record of each at least once

Paths never leave the root (media.py): data files come from elsewhere.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from pixel_jax.data import formats, media, records, world
from pixel_jax.data.records import BadRecord, SourceError
from pixel_jax.fields import NonNegativeInt, PositiveFloat
from pixel_jax.pixels import video
from pixel_jax.trajectory import Media, Task, Trajectory


@dataclasses.dataclass(frozen=True)
class Filter:
  """Limits of size; a record outside of them is left out and does not count as bad.

  Tokens are those of the whole trace, or of a question's prompt; pixels those of every
  picture of the question (of a clip: of a frame), before it is resized.
  """

  min_tokens: int = 0
  max_tokens: int = 0
  min_pixels: int = 0
  max_pixels: int = 0

  def __post_init__(self):
    for name in ("tokens", "pixels"):
      low, high = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
      if low < 0 or high < 0 or 0 < high < low:
        raise SourceError(
          f"data.filter: {name} from {low} to {high}; expected 0 <= min <= max, where "
          "a max of 0 is no limit"
        )

  def refuses(self, *, tokens: int | None = None, pixels: int | None = None) -> str:
    """Why an example of so many tokens, a picture of so many pixels, is left out; ""."""
    for name, n in (("tokens", tokens), ("pixels", pixels)):
      low, high = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
      if n is not None and (n < low or 0 < high < n):
        return f"{n} {name}, the filter is {low} to {high or 'any'}"
    return ""


NO_FILTER = Filter()
# Records of an epoch of a mixture: 8 bytes each.
MOST_MIXED = 100_000_000


def open_source(
  uri: str,
  *,
  root: str | pathlib.Path = "",
  codec: Any = None,
  weights: Sequence[PositiveFloat] = (),
  filter: Mapping[str, NonNegativeInt] | None = None,
  synthesis: Any = None,
  layout: formats.Layout | None = None,
) -> "World | File | Mixture":
  """The source of a URI, or the mixture of several with commas between.

  Args:
    root: where the paths begin; "" = the current directory.
    codec: says how many frames of a video are read, and counts tokens for the filter.
    weights: of a mixture, a share each; () = every record once.
    filter: fields of `Filter`.
    layout: reads the records of a file that have a layout of yours: `formats.read`.
    synthesis: makes the trace of a question: (codec, task, rng, load_media) ->
      (Trajectory, pixels), with a `video_share`; None = questions stay questions.
  """
  limits = Filter(**(filter or {}))
  if codec is None and (limits.min_tokens or limits.max_tokens):
    raise SourceError("data.filter counts tokens; open the source with a codec")
  frames = codec.video_frames if codec else 16
  library = media.Library(root, frames)
  parts = [_open_one(u, library, synthesis, layout) for u in split(uri)]
  mixed = len(parts) != 1 or len(weights)
  source = Mixture(parts, library, weights) if mixed else parts[0]
  source.filter, source.codec = limits, codec
  return source


def split(uri: str) -> list[str]:
  """The URIs of a mixture."""
  return [u for u in uri.split(",") if u]


def is_world(uri: str) -> bool:
  """Whether the tiny world is all that a URI names."""
  return all(u.startswith("world:") for u in split(uri))


def _open_one(uri: str, library, synthesis, layout) -> "World | File":
  scheme, colon, rest = uri.partition(":")
  if scheme == "world":
    return World(rest, synthesis)
  if scheme in records.SCHEMES:
    return File(uri, library, synthesis, layout)
  raise SourceError(
    f"data.uri={uri!r}: {f'{scheme!r} is no' if colon else 'it has no'} scheme; allowed "
    "are world:SPLIT, "
    f"{', '.join(f'{s}:FILE' for s in records.SCHEMES[:-2])}, tfds:NAME/SPLIT and "
    "images:FOLDER"
  )


class World:
  """The questions of a split of the tiny world.

  With synthesis, images and videos come as often as the kinds ask for.
  """

  filter: Filter = NO_FILTER
  codec: Any = None

  def __init__(self, rest: str, synthesis: Any = None):
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
      self.share = synthesis.video_share
    else:
      self.share = world.video_share(self.split)
    videos = world.SPLITS[self.split] // world.VIDEO_EVERY
    images = world.SPLITS[self.split] - videos
    lengths = [images / (1 - self.share)] if self.share < 1 else []
    lengths += [videos / self.share] if self.share > 0 else []
    self._len = math.floor(min(lengths))
    self._library = media.Library()

  def __len__(self) -> int:
    return self._len

  def __getitem__(self, i: int) -> Task:
    if not 0 <= i < self._len:
      raise IndexError(f"record {i} of {self._len}")
    before, after = math.floor(i * self.share), math.floor((i + 1) * self.share)
    is_video = after > before  # evenly spread
    index = world.nth("video", before) if is_video else world.nth("image", i - before)
    return world.task(self.seed, self.split, index)

  def load_media(self, named: Media) -> Image.Image | video.Video:
    return self._library.load(named)


class File:
  """The records of a file or several, as questions and traces."""

  filter: Filter = NO_FILTER
  codec: Any = None

  def __init__(
    self, uri: str, library: media.Library, synthesis: Any = None, layout: Any = None
  ):
    self.records = records.open_records(uri, library.root)
    self.synthesis, self._layout = synthesis, layout
    library.add(self.records)
    self._library, self.load_media = library, library.load

  def __len__(self) -> int:
    return len(self.records)

  def __getitem__(self, i: int) -> Task | Trajectory:
    name = self.records.name(i)
    record = formats.read(self.records[i], name, self._layout)
    task = record.task if isinstance(record, Trajectory) else record
    for m in task.media:
      paths = m.path if isinstance(m.path, list) else [m.path]
      if not all(isinstance(p, str) for p in paths):
        raise BadRecord(f"{name}: a media path is no text: {m.path!r:.80}")
      found = [self._library.find(p) for p in paths]
      m.path = found if isinstance(m.path, list) else found[0]
    return record


class Mixture:
  """Several sources in one; the records of each are spaced evenly over an epoch.

  With weights the one that is largest for its share is seen once in an epoch, and the
  others come round again meanwhile; so nothing is never seen.
  """

  filter: Filter = NO_FILTER
  codec: Any = None

  def __init__(
    self, parts: Sequence[Any], library: media.Library, weights: Sequence[float] = ()
  ):
    self.parts, self.load_media = list(parts), library.load
    if not parts:
      raise SourceError("data.uri is empty; give one URI, or several with , between")
    sizes = np.array([len(p) for p in self.parts], float)
    shares = np.array(weights if len(weights) else sizes, float)
    if len(shares) != len(parts) or not np.isfinite(shares).all() or min(shares) <= 0:
      raise SourceError(
        f"data.weights={tuple(weights)} for {len(parts)} sources; expected one each, "
        "above 0, or none at all"
      )
    counts = np.maximum(np.round(shares * (sizes / shares).max()), sizes).astype(int)
    if counts.sum() > MOST_MIXED:
      raise SourceError(
        f"data.weights={tuple(weights)}: {counts.tolist()} records of sources of "
        f"{sizes.astype(int).tolist()} are an epoch, more than {MOST_MIXED}; give the "
        "small ones larger weights"
      )
    self._starts = np.concatenate([[0], np.cumsum(counts)])
    places = [(np.arange(n) + 0.5) / n for n in counts]
    self._order = np.argsort(np.concatenate(places), kind="stable")
    self.synthesis = self.parts[0].synthesis

  def __len__(self) -> int:
    return len(self._order)

  def __getitem__(self, i: int) -> Task | Trajectory:
    if not 0 <= i < len(self):
      raise IndexError(f"record {i} of {len(self)}")
    at = int(self._order[i])
    k = int(np.searchsorted(self._starts, at, side="right")) - 1
    part = self.parts[k]
    return part[(at - int(self._starts[k])) % len(part)]
