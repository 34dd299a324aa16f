"""Pictures equal HF's bytes and floats; damaged and hostile files are refused."""

import contextlib
import io
import pathlib
import subprocess
import sys
import zlib

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from pixel_jax.pixels import image

GOLDEN = dict(np.load(pathlib.Path(__file__).parent / "golden/pixels.npz"))
PICTURES = sorted(
  name.removesuffix("/file") for name in GOLDEN if name.endswith("/file")
)


def _noise(width, height, channels=3, seed=0):
  random = np.random.default_rng(seed)
  return random.integers(0, 256, (height, width, channels), np.uint8)


def _encoded(picture, kind="PNG", **options) -> bytes:
  file = io.BytesIO()
  picture.save(file, kind, **options)
  return file.getvalue()


# ---- Equal to HF ---------------------------------------------------------------------


@pytest.mark.parametrize("name", PICTURES)
def test_golden_picture(name):
  low, high = map(int, GOLDEN[f"{name}/budget"])
  picture = image.load_image(GOLDEN[f"{name}/file"].tobytes())
  picture = image.resize(picture, min_pixels=low, max_pixels=high)
  patches, grid = image.patchify(np.asarray(picture)[None])
  assert grid == tuple(GOLDEN[f"{name}/grid"])
  np.testing.assert_array_equal(patches, GOLDEN[f"{name}/patches"])


def test_golden_normalize():
  """All 256 levels of all channels: bit for bit, and so every picture is."""
  levels = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 256)).reshape(1, -1)
  values = image.normalize(levels)
  assert values.dtype == np.float32 and values.shape == levels.shape
  np.testing.assert_array_equal(values.reshape(3, 256), GOLDEN["table"])


def test_golden_smart_resize():
  rows = GOLDEN["resized"].tolist()
  assert len(rows) == 2000
  for h, w, low, high, *expected in rows:
    got = image.smart_resize(h, w, min_pixels=low, max_pixels=high)
    assert list(got) == expected, (h, w, low, high)


@pytest.mark.torch
@hypothesis.settings(max_examples=3000, deadline=None)
@hypothesis.given(
  st.integers(1, 10_000), st.integers(1, 10_000), st.integers(1, 10**6),
  st.integers(1, 10**7), st.sampled_from([28, 32, 14]),
)  # fmt: skip
@hypothesis.example(70, 70, 3136, 10**6, 28)  # 2.5 rounds to 2
@hypothesis.example(2800, 280_000, 1, 28 * 28 * 4, 28)
@hypothesis.example(1, 200, 3136, 10**6, 28)
@hypothesis.example(1, 201, 3136, 10**6, 28)
def test_smart_resize_equals_hf(height, width, low, high, factor):
  pytest.importorskip("torch")
  from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as hf

  try:
    expected = hf.smart_resize(height, width, factor, low, high)
  except ValueError:
    expected = None
  try:
    got = image.smart_resize(
      height, width, min_pixels=low, max_pixels=high, factor=factor
    )
  except image.ImageError:
    got = None
  assert got == expected


@pytest.mark.torch
@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
  st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**32 - 1),
  st.sampled_from(["RGB", "RGBA", "LA", "L", "1", "P", "CMYK", "YCbCr", "HSV"]),
  st.sampled_from([(3136, 6272), (784, 784), (20_000, 40_000), (3136, 1003520)]),
)  # fmt: skip
def test_pixel_values_equal_hf(width, height, seed, mode, budget):
  pytest.importorskip("torch")
  from transformers import Qwen2VLImageProcessorPil

  hypothesis.assume(max(width, height) <= 200 * min(width, height))
  low, high = budget
  picture = Image.fromarray(_noise(width, height, 3, seed)).convert(mode)
  if mode in ("RGBA", "LA"):
    picture.putalpha(Image.fromarray(_noise(width, height, 1, seed + 1)[..., 0]))
  size = {"shortest_edge": low, "longest_edge": high}
  hf = Qwen2VLImageProcessorPil(size=size)(images=[picture], return_tensors="np")
  ours = image.resize(image.load_image(picture), min_pixels=low, max_pixels=high)
  patches, grid = image.patchify(np.asarray(ours)[None])
  assert grid == tuple(hf["image_grid_thw"][0])
  values = image.normalize(patches)
  assert values.dtype == hf["pixel_values"].dtype
  assert values.tobytes() == hf["pixel_values"].tobytes()


# ---- Patches -------------------------------------------------------------------------


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))
def test_patchify_by_the_slow_formula(num, blocks_high, blocks_wide):
  """Rows over time, blocks, inside; (channel, frame, y, x); last frame repeated."""
  frames = np.random.default_rng(num).integers(
    0, 256, (num, 28 * blocks_high, 28 * blocks_wide, 3), np.uint8
  )
  patches, grid = image.patchify(frames)
  assert grid == ((num + 1) // 2, 2 * blocks_high, 2 * blocks_wide)
  row = 0
  for t in range(grid[0]):
    for top in range(0, 28 * blocks_high, 28):
      for left in range(0, 28 * blocks_wide, 28):
        for y, x in ((0, 0), (0, 14), (14, 0), (14, 14)):
          pair = [frames[min(2 * t + k, num - 1)] for k in (0, 1)]
          cut = [f[top + y : top + y + 14, left + x : left + x + 14] for f in pair]
          expected = np.stack(cut).transpose(3, 0, 1, 2)
          np.testing.assert_array_equal(patches[row], expected.reshape(-1))
          row += 1
  assert row == len(patches)


@pytest.mark.parametrize(
  "frames",
  [
    np.zeros((28, 28, 3), np.uint8),
    np.zeros((1, 28, 28, 3), np.float32),
    np.zeros((1, 28, 28, 4), np.uint8),
    np.zeros((1, 28, 42, 3), np.uint8),
    np.zeros((0, 28, 28, 3), np.uint8),
    np.zeros((1, 0, 28, 3), np.uint8),
  ],
)
def test_patchify_refuses_other_shapes(frames):
  with pytest.raises(image.ImageError, match="expected"):
    image.patchify(frames)


def test_resize_keeps_a_picture_of_the_right_size():
  picture = Image.fromarray(_noise(84, 56))
  assert image.resize(picture, min_pixels=3136, max_pixels=10**6) is picture


# ---- Load ----------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("how", ["path", "bytes", "pil"])
def test_exif_orientation_is_always_applied(tmp_path, orientation, how):
  upright = _noise(40, 30)
  # What a camera stores so that a viewer shows `upright` (EXIF 2.3, tag 274).
  stored = {
    1: upright,
    2: upright[:, ::-1],
    3: upright[::-1, ::-1],
    4: upright[::-1],
    5: upright.transpose(1, 0, 2),
    6: np.rot90(upright, 1),
    7: upright[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(upright, -1),
  }[orientation]
  exif = Image.Exif()
  exif[274] = orientation
  content = _encoded(Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
  (tmp_path / "a.png").write_bytes(content)
  source = {
    "path": str(tmp_path / "a.png"),
    "bytes": content,
    "pil": Image.open(io.BytesIO(content)),
  }[how]
  np.testing.assert_array_equal(np.asarray(image.load_image(source)), upright)


def test_16_bit_grey_is_scaled():
  values = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
  expected = np.round(values / 257).astype(np.uint8)
  for content in (
    _encoded(Image.fromarray(values)),  # mode I;16
    b"P5\n6 1\n65535\n" + values.astype(">u2").tobytes(),  # PGM, mode I
  ):
    assert Image.open(io.BytesIO(content)).mode in ("I", "I;16")
    got = np.asarray(image.load_image(content))
    np.testing.assert_array_equal(got, np.repeat(expected[..., None], 3, -1))


def test_transparency_is_laid_on_white():
  picture = Image.new("RGBA", (2, 1), (100, 100, 100, 0))
  picture.putpixel((1, 0), (100, 100, 100, 128))
  got = np.asarray(image.load_image(picture))
  assert got[0, :, 0].tolist() == [255, 177]
  keyed = Image.new("RGB", (2, 1), (9, 9, 9))
  keyed.putpixel((1, 0), (1, 2, 3))
  got = np.asarray(image.load_image(_encoded(keyed, transparency=(9, 9, 9))))
  assert got[0].tolist() == [[255, 255, 255], [1, 2, 3]]


def test_first_frame_of_an_animation():
  frames = [Image.new("L", (4, 4), level) for level in (10, 200)]
  content = _encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
  assert np.asarray(image.load_image(content))[0, 0].tolist() == [10, 10, 10]


def _bomb() -> bytes:
  """A PNG of a few bytes that claims 60000 x 60000 pixels."""
  content = bytearray(_encoded(Image.new("1", (8, 8))))
  content[16:24] = (60_000).to_bytes(4, "big") * 2
  content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
  return bytes(content)


JPEG = _encoded(Image.fromarray(_noise(64, 64)), "JPEG")


@pytest.mark.parametrize(
  ("source", "words"),
  [
    (JPEG[: len(JPEG) // 2], "cannot be decoded.*Replace the file"),
    (b"", "<0 bytes>: cannot be decoded"),
    (b"not a picture", "cannot be decoded"),
    ("/nowhere/at/all.png", "/nowhere/at/all.png: no such picture. Check the path"),
    (pathlib.Path("/"), "cannot be decoded"),
    (_bomb(), "DecompressionBomb"),
    (Image.new("1", (10_000, 9_000)), "90000000 pixels; allowed are"),
    (Image.new("RGB", (0, 5)), "0x5 = 0 pixels; allowed are"),
    (Image.new("F", (4, 4)), "mode F.*8-bit and 16-bit.*uint8"),
    (Image.new("I", (4, 4), 70_000), "70000; allowed are 0..65535"),
    (Image.new("I", (4, 4), -1), "-1; allowed"),
  ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_cannot_be_used_is_refused_in_words(source, words):
  with pytest.raises(image.ImageError, match=words):
    image.load_image(source)


@pytest.mark.parametrize(
  ("height", "width", "words"),
  [(1, 201, "aspect ratio 201.0; allowed is 200"), (0, 5, "must be 1 or more")],
)
def test_smart_resize_refuses(height, width, words):
  with pytest.raises(image.ImageError, match=words):
    image.smart_resize(height, width, min_pixels=1, max_pixels=10**6)


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(st.integers(0, len(JPEG) - 1), st.binary(min_size=1, max_size=40))
def test_damaged_bytes_give_a_picture_or_an_image_error(at, junk):
  content = JPEG[:at] + junk + JPEG[at + len(junk) :]
  with contextlib.suppress(image.ImageError):
    assert image.load_image(content).mode == "RGB"


# ---- The wall ------------------------------------------------------------------------


def test_the_room_imports_neither_jax_nor_torch_nor_decord():
  code = (
    "import sys\n"
    "from pixel_jax.pixels import geometry, image, ops, video\n"
    "print([m for m in ('jax', 'torch', 'decord', 'transformers') if m in sys.modules])"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert done.stdout.strip() == "[]", done.stderr
