"""Media: from the name of a picture or clip to its pixels.

A trajectory stores names, and must be able to redraw its pictures from them:

  images/a.jpg                       a file below the root
  zip:images.zip!images/a.jpg        a member of an archive below the root, read in place
  parquet:x.parquet#12/images/0      a value in a record (records.py): bytes, data: URI
  world:0/train/7                    a scene of the tiny world
  clips/a.mp4#t=3.5,9                of a clip the frames in the middles of equal parts of
                                     that time; #t=, of the whole of it
  blank:NAME                         grey, of the size that NAME has
  masked:x1,y1,x2,y2+x1,...:NAME     grey boxes in it, relative to its width and height

Names come from elsewhere: none leads out of the root, nothing is unpacked to disk, and
what would inflate without bound is refused.
"""

import dataclasses
import math
import pathlib
import threading
import unicodedata
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from PIL import Image

from pixel_jax.data import records, world
from pixel_jax.data.records import BadRecord
from pixel_jax.pixels import image, video
from pixel_jax.trajectory import Media

BLANK, MASKED = "blank:", "masked:"
GREY = (128, 128, 128)

# A member of an archive: a clip of some minutes.  Deflate shrinks up to 1032 times, and
# pictures and clips, which are compressed already, hardly at all.
MOST_BYTES = 512 << 20
MOST_RATIO = 200
SMALL = 16 << 20  # below it a ratio does no harm


# Decoded pictures that wait for their use, of one batch of questions: 800 of 1.8 MPixel.
HELD = 4 << 30


class Held:
  """Keeps the pictures that a check has decoded until a rollout uses them.

  Those beyond `HELD` bytes are decoded again.
  """

  def __init__(self, load_media: Callable[[Media], Any]):
    self._load_media, self._room = load_media, HELD
    self._found: dict[tuple, Any] = {}

  def load(self, media: Media) -> Image.Image | video.Video:
    names = media.path if isinstance(media.path, str) else tuple(media.path)
    key = (media.kind, names, media.fps)
    if key not in self._found:
      loaded = self._load_media(media)
      frames = loaded.frames if media.kind == "video" else [loaded]
      size = sum(3 * f.width * f.height for f in frames)  # RGB
      if size > self._room:
        return loaded
      self._room -= size
      self._found[key] = loaded
    return self._found[key]


def _part(name: str) -> tuple[str, tuple[float, float] | None]:
  """The name of a clip and the seconds of it that are meant: a media fragment."""
  clip, marked, part = name.rpartition("#t=")
  if not marked:
    return name, None
  start, _, end = part.partition(",")
  try:
    return clip, (float(start or 0), float(end or math.inf))
  except ValueError:
    raise BadRecord(f"media {name!r}: expected #t=START,END in seconds") from None


def _spellings(path: str) -> Iterator[str]:
  """A path as it is, and as other systems write it: Windows parts it by backslashes, Macs
  take letters and their accents apart (NFD)."""
  seen = set()
  for parted in (path, path.replace("\\", "/")):
    for spelled in (
      parted, *(unicodedata.normalize(form, parted) for form in ("NFC", "NFD"))
    ):  # fmt: skip
      if spelled not in seen:
        seen.add(spelled)
        yield spelled


def blank(name: str | list[str]) -> str | list[str]:
  """The name of a picture or clip that is nothing but grey."""
  return BLANK + name if isinstance(name, str) else [BLANK + n for n in name]


def masked(name: str | list[str], boxes: Sequence[Sequence[float]]) -> str | list[str]:
  """The name of a picture or clip in which these boxes are grey, in every frame."""
  if not isinstance(name, str):
    return [masked(n, boxes) for n in name]
  return MASKED + "+".join(",".join(f"{v:.6g}" for v in b) for b in boxes) + f":{name}"


def _altered(name: str) -> tuple[str, list[list[float]]]:
  """The name of the picture behind an altered one, and the boxes that are grey in it."""
  if name.startswith(BLANK):
    return name.removeprefix(BLANK), [[0, 0, 1, 1]]
  boxes, _, rest = name.removeprefix(MASKED).partition(":")
  try:
    read = [[float(v) for v in box.split(",")] for box in boxes.split("+")]
    if any(len(b) != 4 or not all(0 <= v <= 1 for v in b) for b in read):
      raise ValueError
  except ValueError:
    raise BadRecord(
      f"media {name[:80]!r}: expected masked:x1,y1,x2,y2[+...]:NAME with numbers within "
      "[0, 1]"
    ) from None
  return rest, read


def _paint(picture: Image.Image, boxes: list[list[float]]) -> Image.Image:
  painted, (w, h) = picture.copy(), picture.size
  for x1, y1, x2, y2 in boxes:
    box = (math.floor(x1 * w), math.floor(y1 * h), math.ceil(x2 * w), math.ceil(y2 * h))
    painted.paste(GREY, box)
  return painted


class Library:
  """Everything below a root; archives and files of records stay open."""

  def __init__(self, root: str | pathlib.Path = "", num_frames: int = 16):
    """`num_frames`: that are read of a clip."""
    self.root, self.num_frames = root, num_frames
    self._zips: dict[str, zipfile.ZipFile | BadRecord] = {}
    self._records: dict[str, records.Records] = {}
    self._lock = threading.RLock()
    self._beside: list[str] | None = None

  def add(self, opened: records.Records) -> None:
    """Files of records that are open already."""
    self._records |= opened.parts()

  def load(self, media: Media) -> Image.Image | video.Video:
    """A picture (RGB), or a clip of at most `num_frames` frames."""
    names = [media.path] if isinstance(media.path, str) else media.path
    if names and all(
      isinstance(n, str) and n.startswith((BLANK, MASKED)) for n in names
    ):
      behind, boxes = zip(*map(_altered, names))
      path = behind[0] if isinstance(media.path, str) else list(behind)
      loaded = self.load(dataclasses.replace(media, path=path))
      if media.kind != "video":
        return _paint(loaded, boxes[0])
      frames = [_paint(frame, boxes[0]) for frame in loaded.frames]
      return dataclasses.replace(loaded, frames=frames)
    one = isinstance(media.path, str)
    if one and media.path.startswith("world:"):
      return world.load_media(media)
    names = [media.path] if one else media.path
    if not names:
      raise BadRecord(f"a {media.kind} of 0 frames; drop the example")
    if media.kind == "image" and len(names) == 1:
      return self._image(names[0])
    if media.kind == "video":
      first, part = _part(names[0]) if one else (names[0], None)
      source = self.open(first) if one else [self.open(name) for name in names]
      try:
        return video.read_video(
          source, num_frames=self.num_frames, fps=media.fps, part=part
        )
      except video.VideoError as error:
        raise BadRecord(f"media {names[0]!r}: {error}") from error
    raise BadRecord(
      f"media of kind {media.kind!r} with {len(names)} paths; expected an image with "
      "one path, or a video with one path or its frames"
    )

  def _image(self, name: str) -> Image.Image:
    source = self.open(name)
    if isinstance(source, pathlib.Path):
      return image.load_image(source)
    try:
      return image.load_image(source)
    except image.ImageError as error:
      raise BadRecord(f"media {name!r}: {error}") from error

  def open(self, name: str) -> pathlib.Path | bytes:
    """The file that a name means, or the bytes."""
    if not isinstance(name, str):
      raise BadRecord(f"a media path is {type(name).__name__}; expected text")
    scheme, _, rest = name.partition(":")
    if scheme == "zip":
      archive, _, member = rest.partition("!")
      return self._member(archive, member)
    if scheme in records.SCHEMES and "#" in rest:
      uri, _, place = name.partition("#")
      row, *keys = place.split("/")
      if not row.isdecimal():
        raise BadRecord(f"media {name!r}: expected URI#ROW/KEY/...")
      rows = self.records(uri)
      if int(row) >= len(rows):
        raise BadRecord(f"media {name!r}: {uri} has {len(rows)} records")
      return records.value(rows[int(row)], keys, name)
    full = records.resolve(name, self.root)
    if not full.is_file():
      broken = [z for z in self._archives() if isinstance(self._zip(z), BadRecord)]
      but = f" ({', '.join(broken)}: cannot be read)" if broken else ""
      near = self._near(name)
      raise BadRecord(
        f"media path {name!r}: no file {full}, nor in an archive below the root{but}; "
        + (f"did you mean {near}?" if near else "check data.root")
      )
    return full

  def find(self, path: str) -> str:
    """The name of a path that a record holds: of a file, or of a member of an archive.

    Archives are those directly below the root; images.zip may hold images/a.jpg or only
    a.jpg.
    """
    known = path.startswith(("world:", "zip:", BLANK, MASKED)) or (
      "#" in path and path.partition(":")[0] in records.SCHEMES
    )
    if known:
      return path
    members = None
    for spelled in _spellings(path):
      if records.resolve(spelled, self.root).is_file():
        return spelled
      if members is None:
        members = {
          name: opened.NameToInfo
          for name in self._archives()
          if isinstance(opened := self._zip(name), zipfile.ZipFile)
        }
      for archive, inside in members.items():
        if spelled in inside:
          return f"zip:{archive}!{spelled}"
      first, _, rest = spelled.partition("/")
      if rest in members.get(f"{first}.zip", ()):
        return f"zip:{first}.zip!{rest}"
    return path  # it is absent; to load it says so

  def _near(self, path: str) -> str:
    """The file below the root whose name differs from this in case alone; ""."""
    at, found = pathlib.Path(self.root or "."), []
    for part in pathlib.PurePosixPath(path.replace("\\", "/")).parts:
      wanted = unicodedata.normalize("NFC", part).casefold()
      try:
        names = sorted(p.name for p in at.iterdir())
      except OSError:
        return ""
      same = [n for n in names if unicodedata.normalize("NFC", n).casefold() == wanted]
      if not same:
        return ""
      at, found = at / same[0], [*found, same[0]]
    return "/".join(found) if at.is_file() else ""

  def records(self, uri: str) -> records.Records:
    """The records of a URI, opened once."""
    with self._lock:
      if uri not in self._records:
        rest = uri.partition(":")[2]
        records.resolve(rest, self.root, "file of records")
        if records.is_pattern(rest):  # what it matches could be a link to anywhere
          raise BadRecord(f"media of {uri!r}: one file is meant, not a pattern")
        try:
          self._records[uri] = records.open_records(uri, self.root)
        except records.SourceError as error:
          raise BadRecord(str(error)) from error
      return self._records[uri]

  # ---- Archives ----------------------------------------------------------------------

  def _archives(self) -> list[str]:
    if self._beside is None:
      self._beside = sorted(
        p.name for p in pathlib.Path(self.root or ".").glob("*.zip")
      )
    return self._beside

  def _zip(self, name: str) -> zipfile.ZipFile | BadRecord:
    """The archive, or why it is none."""
    with self._lock:
      if name not in self._zips:
        full = records.resolve(name, self.root, "archive")
        try:
          self._zips[name] = zipfile.ZipFile(full)
        except (OSError, zipfile.BadZipFile) as error:
          why = BadRecord(f"archive {name!r}: {error}; expected a whole zip")
          self._zips[name] = why
      return self._zips[name]

  def _member(self, archive: str, member: str) -> bytes:
    opened, name = self._zip(archive), f"zip:{archive}!{member}"
    if isinstance(opened, BadRecord):
      raise opened
    info = opened.NameToInfo.get(member)
    if info is None or info.is_dir():
      raise BadRecord(f"media {name!r}: no such member of {archive}")
    ratio = info.file_size / max(info.compress_size, 1)
    if info.file_size > MOST_BYTES or (info.file_size > SMALL and ratio > MOST_RATIO):
      raise BadRecord(
        f"media {name!r}: {info.file_size} bytes out of {info.compress_size}, a zip "
        f"bomb; allowed are {MOST_BYTES} bytes, and {MOST_RATIO} times the packed size "
        f"above {SMALL}. Put the file beside the archive if it is meant."
      )
    # RuntimeError: encrypted; NotImplementedError: a method Python does not know.
    try:
      with opened.open(info) as f:
        return f.read(info.file_size + 1)
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, ValueError) as error:
      raise BadRecord(f"media {name!r}: {error}") from error
    except Exception as error:  # zlib.error, lzma.LZMAError
      raise BadRecord(f"media {name!r}: {type(error).__name__}: {error}") from error
