"""One picture: load it, resize it as Qwen2.5-VL does, cut it into patches.

Not the layout for the device (`geometry.py`) and not the choice of a pixel budget (the
caller's config).  The main value is `u8[P 1176]`: a row is one patch, its 1176 = 3 x 2
x 14 x 14 bytes ordered (channel, frame of the temporal pair, y, x); rows run over time,
then raster over 2x2 blocks, then raster inside a block:

   0  1 |  4  5        two blocks side by side, a grid of 2 x 4 patches
   2  3 |  6  7

Bytes and floats equal transformers' Qwen2VLImageProcessorPil (tests/golden/pixels.npz),
with two deviations, both in `load_image`:
  * EXIF orientation is always applied (HF applies it to paths, not to PIL objects);
  * 16-bit greyscale is scaled to 8 bits (HF saturates it: a 16-bit scan turns white);
    floating point pictures are refused, since their range is unknown.
"""

import io
import math
import pathlib
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps

PATCH, TEMPORAL, MERGE = 14, 2, 2
FACTOR = PATCH * MERGE  # a side of a resized picture is a multiple of 28
MAX_ASPECT = 200  # Qwen refuses pictures longer than this
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)  # CLIP's, R G B
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
# PIL only *warns* of a bomb at this size (1 GiB / 4 bytes / 3 channels); we refuse.
MAX_LOAD_PIXELS = 89_478_485

_ORIENTATION = 0x0112  # EXIF tag


class ImageError(ValueError):
  """A picture that cannot be used; the text says what, got, allowed, remedy."""


# ---- Load ----------------------------------------------------------------------------


def load_image(source: str | pathlib.Path | bytes | Image.Image) -> Image.Image:
  """A picture as upright 8-bit RGB, transparency laid on white; or `ImageError`."""
  name = _name(source)
  # Decoders of damaged files raise anything (OSError, SyntaxError, struct.error...).
  try:
    image = source if isinstance(source, Image.Image) else _open(source)
    width, height = image.size
    if not 0 < width * height <= MAX_LOAD_PIXELS:
      raise ImageError(
        f"{name}: a picture of {width}x{height} = {width * height} pixels; allowed are"
        f" 1 to {MAX_LOAD_PIXELS}. Scale it down, or cut it, before loading."
      )
    image.load()
    if image.getexif().get(_ORIENTATION, 1) != 1:
      image = ImageOps.exif_transpose(image)
    return _to_rgb(image, name)
  except ImageError:
    raise
  except FileNotFoundError as e:
    raise ImageError(
      f"{name}: no such picture. Check the path and the data root."
    ) from e
  except Exception as e:
    raise ImageError(
      f"{name}: cannot be decoded ({type(e).__name__}: {e}); expected a whole picture"
      f" in a format PIL reads. Replace the file, or drop the example."
    ) from e


def _open(source) -> Image.Image:
  return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def _name(source) -> str:
  if isinstance(source, bytes):
    return f"<{len(source)} bytes>"
  if isinstance(source, Image.Image):
    return f"<PIL {source.mode} {source.width}x{source.height}>"
  return str(source)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
  if image.mode == "RGB" and "transparency" not in image.info:
    return image
  if image.mode == "I" or image.mode.startswith("I;16"):
    return _from_16_bit(image, name).convert("RGB")
  if image.mode == "F":
    raise ImageError(
      f"{name}: floating point pixels (mode F), whose range is unknown; allowed are"
      f" 8-bit and 16-bit pictures. Scale it to 0..255 and save it as uint8."
    )
  if "A" in image.getbands() or image.info.get("transparency") is not None:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")
  return image.convert("RGB")


def _from_16_bit(image: Image.Image, name: str) -> Image.Image:
  # Mode I holds 16-bit data too: PIL reads a PGM of any depth as I, scaled to 0..65535.
  values = np.asarray(image).astype(np.int64)
  low, high = int(values.min()), int(values.max())
  if low < 0 or high > 65535:
    raise ImageError(
      f"{name}: integer pixels in {low}..{high}; allowed are 0..65535 (16 bits)."
      f" Scale it to 0..255 and save it as uint8."
    )
  return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


# ---- Resize --------------------------------------------------------------------------


def smart_resize(
  height: int, width: int, *, min_pixels: int, max_pixels: int, factor: int = FACTOR
) -> tuple[int, int]:
  """Qwen's (height, width): multiples of `factor`, about this aspect, in the budget.

  The floor of one factor a side wins over `max_pixels`: 2800 x 280000 at a budget of 4
  blocks gives 28 x 560, 20 blocks, as in HF.
  """
  if min(height, width) < 1:
    raise ImageError(
      f"a picture of {width}x{height} pixels; each side must be 1 or more."
    )
  if max(height, width) / min(height, width) > MAX_ASPECT:
    raise ImageError(
      f"a picture of {width}x{height}: aspect ratio"
      f" {max(height, width) / min(height, width):.1f}; allowed is {MAX_ASPECT} at"
      f" most. Crop or pad it."
    )
  h = round(height / factor) * factor
  w = round(width / factor) * factor
  if h * w > max_pixels:
    beta = math.sqrt((height * width) / max_pixels)
    h = max(factor, math.floor(height / beta / factor) * factor)
    w = max(factor, math.floor(width / beta / factor) * factor)
  elif h * w < min_pixels:
    beta = math.sqrt(min_pixels / (height * width))
    h = math.ceil(height * beta / factor) * factor
    w = math.ceil(width * beta / factor) * factor
  return h, w


def bicubic(image: Image.Image, size: tuple[int, int]) -> Image.Image:
  """The picture at (width, height) by PIL; `resample.Resize` is the same on a device."""
  return image.resize(size, Image.Resampling.BICUBIC)


def resize(
  image: Image.Image,
  *,
  min_pixels: int,
  max_pixels: int,
  factor: int = FACTOR,
  by: Callable[[Image.Image, tuple[int, int]], Image.Image] = bicubic,
) -> Image.Image:
  """The picture at its `smart_resize` size, made by `by`; itself if it has it."""
  height, width = smart_resize(
    image.height,
    image.width,
    min_pixels=min_pixels,
    max_pixels=max_pixels,
    factor=factor,
  )
  if image.size == (width, height):
    return image
  return by(image, (width, height))


# ---- Patches -------------------------------------------------------------------------


def patchify(
  frames: np.ndarray, patch: int = PATCH, temporal: int = TEMPORAL, merge: int = MERGE
) -> tuple[np.ndarray, tuple[int, int, int]]:
  """u8[F H W 3] -> (u8[P 3*temporal*patch*patch], grid (time, height, width)).

  The last frame is repeated up to a multiple of `temporal`; a still picture is F = 1.
  """
  if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8:
    raise ImageError(
      f"frames are {frames.dtype}{list(frames.shape)}; expected uint8[F H W 3]."
      f" A single picture is np.asarray(image)[None]."
    )
  num, height, width, channels = frames.shape
  side = patch * merge
  if num < 1 or height < 1 or width < 1 or height % side or width % side:
    raise ImageError(
      f"{num} frames of {width}x{height}; expected one or more, each side a multiple of"
      f" {side}. Call image.resize first."
    )
  if num % temporal:
    repeats = temporal - num % temporal
    frames = np.concatenate([frames, np.repeat(frames[-1:], repeats, axis=0)])
  t, h, w = len(frames) // temporal, height // patch, width // patch
  blocks = frames.reshape(
    t, temporal, h // merge, merge, patch, w // merge, merge, patch, channels
  )
  rows = blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
  return rows.reshape(t * h * w, channels * temporal * patch * patch), (t, h, w)


def normalize(patches: np.ndarray) -> np.ndarray:
  """u8[P C*rest] -> f32 of the same shape, bit for bit HF's `pixel_values`."""
  rows = patches.reshape(len(patches), 3, -1)
  out = np.empty(rows.shape, np.float32)
  for channel in range(3):
    np.take(_NORMALIZED[channel], rows[:, channel], out=out[:, channel])
  return out.reshape(patches.shape)


# HF multiplies by 1/255 in float64, rounds to float32, then subtracts and divides in
# float32.  256 values a channel are all there are.
_NORMALIZED = (
  (np.arange(256) * (1 / 255)).astype(np.float32)[None] - MEAN[:, None]
) / STD[:, None]
