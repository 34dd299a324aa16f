"""A clip, from a file or from a list of frames, as a few upright RGB frames.

Not the resize and not the temporal pairs (`image.py`: the caller resizes every frame
and `patchify` pairs them).  The main value is `Video`: n frames at original resolution,
spread evenly over the clip:

  clip     |--0--|--1--|--2--|--3--|--4--|--5--|--6--|--7--|   duration 4 s
  n = 4       ^           ^                 ^           ^      seconds_per_frame 1.0

Which frames: numpy's round(linspace(0, N - 1, n)), as qwen-vl-utils does; where frames
last unequally long, the ones nearest to n equal steps of *time* (a frame that stays on
the screen may then be taken twice).  seconds_per_frame = duration / n, Qwen's rule, so
that `second_per_grid` = 2 * seconds_per_frame.

decord reads the file; PyAV does where there is no decord (it has no wheel for ARM) and
where decord refuses a clip (16 pixels wide, say).  Both choose the same frames at the
same times, and their RGB is equal bit for bit.  decord's traps (oracles.md
5.2): a reader shared by threads, or opened before a fork, crashes or hangs, so each call
opens its own, with one thread; rotation metadata makes it return garbage, so the MP4
rotation is taken out of the bytes first and applied here, for both.
"""

import dataclasses
import importlib.util
import io
import math
import os
import pathlib
import struct
from collections.abc import Sequence

import numpy as np
from PIL import Image

from pixel_jax.pixels import image as image_lib

LIST_FPS = 2.0  # a list of frames of unknown rate: what qwen-vl-utils assumes


class VideoError(ValueError):
  """A clip that cannot be used; the text says what, got, allowed, remedy."""


@dataclasses.dataclass
class Video:
  """The chosen frames of a clip."""

  frames: list[Image.Image]  # original resolution, one size
  timestamps: list[float]  # seconds since the first frame of the clip
  seconds_per_frame: float  # duration of the clip / number of frames


def read_video(
  source: str
  | pathlib.Path
  | bytes
  | Sequence[str | pathlib.Path | bytes | Image.Image],
  *,
  num_frames: int = 16,
  fps: float = 0.0,
  part: tuple[float, float] | None = None,
) -> Video:
  """`num_frames` frames evenly over the clip (all of them if it has fewer).

  Args:
    source: a file FFmpeg reads (a path, or its bytes), or the frames in order.
    num_frames: how many to take.
    fps: frames a second of a list of frames, 0 = unknown; a file knows its own.
    part: of a file, the seconds from and to which it counts; then its frames are those in
      the middles of `num_frames` equal parts, as MVBench's notebook takes them.
  """
  if num_frames < 1:
    raise VideoError(f"{num_frames=}; expected 1 or more. Change the config.")
  if isinstance(source, bytes):
    return _read_file(source, num_frames, part)
  if isinstance(source, str | pathlib.Path):
    return _read_file(pathlib.Path(source), num_frames, part)
  return _read_frames(list(source), num_frames, fps)


# ---- A list of frames ----------------------------------------------------------------


def _read_frames(sources: list, num_frames: int, fps: float) -> Video:
  if not sources:
    raise VideoError("a clip of 0 frames; expected 1 or more. Drop the example.")
  if not 0 <= fps < math.inf:
    raise VideoError(f"{fps=} of a list of frames; expected a rate, or 0 for unknown.")
  fps = fps or LIST_FPS
  chosen = spread(np.arange(len(sources)) / fps, num_frames)
  try:
    frames = [image_lib.load_image(sources[i]) for i in chosen]
  except image_lib.ImageError as e:
    raise VideoError(f"a frame of a clip of {len(sources)}: {e}") from e
  sizes = sorted({frame.size for frame in frames})
  if len(sizes) > 1:
    raise VideoError(
      f"frames of one clip differ in size: {sizes[:4]}; expected one size. Resize them,"
      f" or make them pictures of their own."
    )
  return Video(frames, [i / fps for i in chosen], len(sources) / fps / len(frames))


# ---- A file --------------------------------------------------------------------------


def _read_file(
  source: pathlib.Path | bytes, num_frames: int, part: tuple[float, float] | None
) -> Video:
  in_memory = isinstance(source, bytes)
  name = f"<{len(source)} bytes>" if in_memory else str(source)
  is_there = in_memory or source.is_file()
  if not is_there or not (len(source) if in_memory else source.stat().st_size):
    got = "it is empty" if is_there else "no such file"
    raise VideoError(
      f"{name}: {got}; expected a video file. Check the path and the data root."
    )
  readers = [_by_decord] if importlib.util.find_spec("decord") else []
  for read in [*readers, _by_av]:
    # Damage shows as RuntimeError or DECORDError, av.FFmpegError or AVError, at open or
    # at any frame.
    try:
      with io.BytesIO(source) if in_memory else source.open("rb") as f:
        turns, upright = _take_rotation(f)
      if upright is None:
        upright = io.BytesIO(source) if in_memory else str(source)
      starts, rate, chosen, pixels = read(upright, num_frames, part)
      break
    except Exception as e:
      refused = e
  else:
    first_line = str(refused).strip().partition("\n")[0]
    raise VideoError(
      f"{name}: cannot be decoded ({type(refused).__name__}: {first_line}); expected a"
      f" whole video that FFmpeg reads. Re-encode it (ffmpeg -i in -c:v libx264 out.mp4),"
      f" or drop the example."
    ) from refused
  # The last frame stays as long as the mean of the others: readers differ about its end.
  lasting = (
    (starts[-1] - starts[0]) / (len(starts) - 1) if len(starts) > 1 else 1 / rate
  )
  duration = float(lasting * len(starts))
  if part:
    duration = max(min(part[1], duration) - part[0], float(lasting))
  if pixels.ndim != 4 or pixels.shape[3] != 3 or not 0 < duration < math.inf:
    raise VideoError(
      f"{name}: decoded to {list(pixels.shape)} over {duration} seconds; expected"
      f" [n h w 3] over more than 0. Re-encode it without rotation metadata."
    )
  frames = [Image.fromarray(np.ascontiguousarray(np.rot90(p, -turns))) for p in pixels]
  return Video(
    frames,
    [float(starts[i] - starts[0]) for i in chosen],
    duration / len(frames),
  )


# A reader: (file, number, part) -> f64[N] seconds at which all frames begin, frames a
# second, the chosen ones, u8[n h w 3].
# Imported here only: importing either loads FFmpeg, which most processes never need.


def _by_decord(source: str | io.BytesIO, num_frames: int, part) -> tuple:
  import decord

  reader = decord.VideoReader(source, num_threads=1)
  shown = reader.get_frame_timestamp(range(len(reader)))
  rate = reader.get_avg_fps()
  starts = _known(np.asarray(shown, np.float64)[:, 0], rate)
  chosen = _choose(starts, rate, num_frames, part)
  return starts, rate, chosen, reader.get_batch(chosen).asnumpy()


def _by_av(source: str | io.BytesIO, num_frames: int, part) -> tuple:
  import av

  with av.open(source) as file:
    if not file.streams.video:
      raise ValueError("it has no pictures")
    stream = file.streams.video[0]
    packets = [p for p in file.demux(stream) if p.size and not p.is_discard]
    # They come in the order of decoding.
    shown = np.sort([math.nan if p.pts is None else p.pts for p in packets])
    rate = float(stream.average_rate)
    starts = _known(shown * float(stream.time_base), rate)
  chosen = _choose(starts, rate, num_frames, part)
  wanted, pixels = set(chosen), {}
  if isinstance(source, io.BytesIO):
    source.seek(0)
  with av.open(source) as file:
    file.streams.video[0].thread_count = 1
    for i, frame in enumerate(file.decode(video=0)):
      if i in wanted:
        pixels[i] = frame.to_ndarray(format="rgb24")
      if len(pixels) == len(wanted):
        break
  if len(pixels) < len(wanted):
    raise ValueError(f"frame {max(wanted)} of {len(starts)} is missing")
  return starts, rate, chosen, np.stack([pixels[i] for i in chosen])


def _known(starts: np.ndarray, rate: float) -> np.ndarray:
  """f64[N] seconds as they are, or at a steady rate where the file does not say."""
  # Of AVI, and of Matroska of a few frames, decord gives AV_NOPTS_VALUE, 1e16 or more.
  if np.all(np.abs(starts) < 1e9) and np.all(np.diff(starts) >= 0):  # NaN fails too
    return starts
  return np.arange(len(starts)) / rate


def _choose(starts: np.ndarray, rate: float, num: int, part) -> list[int]:
  if part is None:
    return spread(starts, num)
  return middles(part, rate, len(starts) - 1, num)


def middles(
  part: tuple[float, float], rate: float, last: int, num: int, first: int = 0
) -> list[int]:
  """The frames in the middles of equal parts of a time, among `first` to `last`.

  OpenGVLab's mvbench.ipynb: get_index.
  """
  begin = max(first, round(part[0] * rate))
  end = last if part[1] == math.inf else min(round(part[1] * rate), last)
  size = (end - begin) / num
  chosen = [int(begin + size / 2 + np.round(size * i)) for i in range(num)]
  return [min(max(i, first), last) for i in chosen]  # a time beyond the end


def spread(starts: np.ndarray, num: int) -> list[int]:
  """Indices of min(num, N) frames evenly over N frames that start at these seconds."""
  n = min(num, len(starts))
  by_index = np.linspace(0, len(starts) - 1, n)
  even = np.linspace(starts[0], starts[-1], len(starts))
  # Containers round times (Matroska: to 1 ms), so a steady rate is not exactly even.
  step = even[1] - even[0] if len(even) > 1 else 1.0
  if np.abs(starts - even).max() <= 0.25 * abs(step):
    return np.round(by_index).astype(int).tolist()
  wanted = np.linspace(starts[0], starts[-1], n)
  return [int(np.abs(starts - second).argmin()) for second in wanted]


# ---- Rotation of MP4 and MOV ---------------------------------------------------------

# The matrix of a track header (ISO 14496-12, 8.3.2), 16.16 fixed point except the last
# column: a b u | c d v | x y w with (x', y') = (a x + c y, b x + d y).
_ONE = 1 << 16
_TURNS = {  # (a, b, c, d) -> clockwise quarter turns
  (0, _ONE, -_ONE, 0): 1,
  (-_ONE, 0, 0, -_ONE): 2,
  (0, -_ONE, _ONE, 0): 3,
}
_IDENTITY = struct.pack(">9i", _ONE, 0, 0, 0, _ONE, 0, 0, 0, 1 << 30)
_MAX_HEADER = 256 << 20  # a moov box larger than this is not a video we know


def _take_rotation(f: io.BufferedIOBase) -> tuple[int, io.BytesIO | None]:
  """(clockwise quarter turns, the file without its rotation; None if it has none)."""
  size = f.seek(0, os.SEEK_END)
  found = _find_box(f, 0, size, b"moov")
  if found is None or found[1] - found[0] > _MAX_HEADER:
    return 0, None  # not MP4: other containers seldom carry a rotation
  f.seek(found[0])
  header = f.read(found[1] - found[0])
  place = _video_matrix(header)
  if place is None:
    return 0, None
  a, b, _, c, d, *_ = struct.unpack_from(">9i", header, place)
  turns = _TURNS.get((a, b, c, d), 0)
  if not turns:
    return 0, None
  f.seek(0)
  content = bytearray(f.read())
  content[found[0] + place : found[0] + place + len(_IDENTITY)] = _IDENTITY
  return turns, io.BytesIO(content)


def _video_matrix(moov: bytes) -> int | None:
  """Where the matrix of the first video track begins in the payload of `moov`."""
  f = io.BytesIO(moov)
  at = 0
  while track := _find_box(f, at, len(moov), b"trak"):
    at = track[1]
    media = _find_box(f, *track, b"mdia")
    handler = media and _find_box(f, *media, b"hdlr")
    head = _find_box(f, *track, b"tkhd")
    if handler and head and moov[handler[0] + 8 : handler[0] + 12] == b"vide":
      version = moov[head[0]]
      place = head[0] + (52 if version == 1 else 40)  # version 1 has 64-bit times
      return place if place + 36 <= head[1] else None
  return None


def _find_box(f, start: int, end: int, name: bytes) -> tuple[int, int] | None:
  """(begin, end) of the payload of the first box of this name between two offsets."""
  while start + 8 <= end:
    f.seek(start)
    head = f.read(16)
    if len(head) < 8:
      return None
    size, kind = struct.unpack_from(">I4s", head)
    payload = start + 8
    if size == 1 and len(head) == 16:
      size, payload = struct.unpack_from(">Q", head, 8)[0], start + 16
    elif size == 0:  # up to the end
      size = end - start
    if size < payload - start:
      return None  # not a box: not an MP4, or a damaged one
    if kind == name:
      return payload, min(start + size, end)
    start += size
  return None
