"""Clips: real H.264 files written here, lists of frames, and what must be refused."""

import contextlib
import pathlib
import struct
import threading

import numpy as np
import pytest
from PIL import Image

from pixel_jax.pixels import image, video

WIDTH, HEIGHT = 64, 48
GOLDEN = pathlib.Path(__file__).parent / "golden"


def _level(i):
  return 12 * (i % 20) + 8


def _frame(i, size=(WIDTH, HEIGHT)) -> np.ndarray:
  """Frame i: its grey level is its number; a white corner shows which way is up."""
  frame = np.full((size[1], size[0], 3), _level(i), np.uint8)
  frame[:16, :16] = 255
  return frame


def _number(frame) -> int:
  """Which frame of the clip this is, by the level away from the corner (lossy)."""
  level = np.asarray(frame)[24:40, 24:40].mean()
  return round((level - 8) / 12)


def _write(
  path, num, *, rate=8, times=None, rotation=0, container="mp4", b_frames=0,
  size=(WIDTH, HEIGHT), pixels="yuv420p", codec="libx264",
):  # fmt: skip
  """A clip of `num` frames; `times` are in 1/1000 s."""
  from fractions import Fraction

  import av

  with av.open(str(path), "w", format=container) as out:
    options = {"crf": "5", "bf": str(b_frames), "b_strategy": "0"}
    options = options if codec == "libx264" else {}
    stream = out.add_stream(codec, rate=rate, options=options)
    stream.width, stream.height, stream.pix_fmt = *size, pixels
    if times is not None:
      stream.codec_context.time_base = Fraction(1, 1000)
    for i in range(num):
      frame = av.VideoFrame.from_ndarray(_frame(i, size), format="rgb24")
      if times is not None:
        frame.pts, frame.time_base = times[i], Fraction(1, 1000)
      out.mux(stream.encode(frame))
    out.mux(stream.encode(None))
  if rotation:
    _rotate(path, rotation)
  return path


def _rotate(path, clockwise):
  """Marks the file as to be shown turned, as phones do: the matrix of the track."""
  content = bytearray(path.read_bytes())
  one = 1 << 16
  a, b = {90: (0, one), 180: (-one, 0), 270: (0, -one)}[clockwise]
  place = content.index(b"tkhd") + 4 + 40  # version 0
  struct.pack_into(">9i", content, place, a, b, 0, -b, a, 0, 0, 0, 1 << 30)
  path.write_bytes(content)


# ---- Files ---------------------------------------------------------------------------


@pytest.mark.parametrize("container", ["mp4", "matroska", "avi"])
@pytest.mark.parametrize(
  ("num", "num_frames", "expected"),
  [
    (16, 16, list(range(16))),
    (16, 4, [0, 5, 10, 15]),
    (16, 8, [0, 2, 4, 6, 9, 11, 13, 15]),  # round(linspace(0, 15, 8))
    (3, 16, [0, 1, 2]),
    (16, 1, [0]),
    (1, 4, [0]),
  ],
)
def test_frames_are_spread_evenly(tmp_path, num, num_frames, expected, container):
  path = _write(tmp_path / "clip", num, container=container)
  clip = video.read_video(path, num_frames=num_frames)
  assert [_number(f) for f in clip.frames] == expected
  assert [f.size for f in clip.frames] == [(WIDTH, HEIGHT)] * len(expected)
  np.testing.assert_allclose(clip.timestamps, np.array(expected) / 8, atol=2e-3)
  # Qwen's rule: the duration of the clip over the number of frames taken of it.
  assert clip.seconds_per_frame == pytest.approx(num / 8 / len(expected), abs=2e-3)


CLIPS = {
  "plain": dict(num=30),
  "b_frames": dict(num=16, b_frames=3),
  "uneven": dict(
    num=20, times=[i * 40 if i < 10 else 900 * i - 8600 for i in range(20)]
  ),
  "turned": dict(num=10, rotation=90),
  "matroska": dict(num=20, container="matroska"),
  "avi": dict(num=20, container="avi"),
  "one": dict(num=1),
  "odd": dict(num=10, size=(130, 98)),
  "wide_colour": dict(num=10, pixels="yuv444p"),
  "ten_bits": dict(num=10, pixels="yuv420p10le"),
  "hevc": dict(num=10, codec="libx265"),
  # A file: the encoder fails in a process that has loaded decord's libraries first.
  # Made by _write(path, 20, codec="libvpx", container="webm").
  "vp8": GOLDEN / "vp8.webm",
}


@pytest.mark.parametrize("name", CLIPS)
def test_both_readers_give_the_same(name, tmp_path, monkeypatch):
  """The same frames, bit for bit, at the same times; rotation is applied by both."""
  pytest.importorskip("decord")
  clip = CLIPS[name]
  path = _write(tmp_path / "clip", **clip) if isinstance(clip, dict) else clip
  by_decord = video.read_video(path, num_frames=8)
  monkeypatch.setattr(video, "_by_decord", video._by_av)
  by_av = video.read_video(path.read_bytes(), num_frames=8)
  np.testing.assert_array_equal(np.stack(by_decord.frames), np.stack(by_av.frames))
  # decord rounds to float32.
  np.testing.assert_allclose(by_decord.timestamps, by_av.timestamps, atol=1e-5)
  assert by_decord.seconds_per_frame == pytest.approx(by_av.seconds_per_frame, rel=1e-5)


def test_a_clip_that_decord_refuses_is_read(tmp_path):
  path = _write(tmp_path / "thin.mp4", 10, size=(16, 90))
  clip = video.read_video(path, num_frames=4)
  assert [f.size for f in clip.frames] == [(16, 90)] * 4
  np.testing.assert_allclose(clip.timestamps, np.array([0, 3, 6, 9]) / 8)


def test_b_frames_come_in_the_order_of_showing(tmp_path):
  path = _write(tmp_path / "clip.mp4", 16, b_frames=3)
  clip = video.read_video(path, num_frames=8)
  assert [_number(f) for f in clip.frames] == [0, 2, 4, 6, 9, 11, 13, 15]
  np.testing.assert_allclose(clip.timestamps, np.array([0, 2, 4, 6, 9, 11, 13, 15]) / 8)


def test_a_variable_frame_rate_is_sampled_by_time(tmp_path):
  """Ten frames in the first second, then four that stay a second each."""
  times = [100 * i for i in range(10)] + [1000 * i for i in range(1, 5)]
  path = _write(tmp_path / "clip.mp4", 14, times=times)
  clip = video.read_video(path, num_frames=5)  # at 0, 1, 2, 3 and 4 seconds
  assert [_number(f) for f in clip.frames] == [0, 10, 11, 12, 13]
  np.testing.assert_allclose(clip.timestamps, [0, 1, 2, 3, 4], atol=1e-3)


@pytest.mark.parametrize("clockwise", [90, 180, 270])
def test_rotation_metadata_is_applied(tmp_path, clockwise):
  av = pytest.importorskip("av")
  path = _write(tmp_path / "clip.mp4", 5, rotation=clockwise)
  with av.open(str(path)) as f:
    rotation = next(f.decode(video=0)).rotation  # counter-clockwise
  assert -rotation % 360 == clockwise  # so the file says what we mean
  plain = video.read_video(_write(tmp_path / "plain.mp4", 5))
  clip = video.read_video(path)
  for turned, frame in zip(clip.frames, plain.frames):
    expected = np.rot90(np.asarray(frame), -clockwise // 90)
    np.testing.assert_array_equal(np.asarray(turned), expected)
  assert clip.timestamps == plain.timestamps


def test_threads_each_read_their_own_way(tmp_path):
  """A shared reader crashes the process; a reader a call does not."""
  path = _write(tmp_path / "clip.mp4", 16)
  numbers = {}

  def read(i):
    clips = [video.read_video(path, num_frames=4) for _ in range(5)]
    numbers[i] = [[_number(f) for f in clip.frames] for clip in clips]

  threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert numbers == {i: [[0, 5, 10, 15]] * 5 for i in range(4)}


@pytest.mark.parametrize("damage", ["missing", "empty", "junk", "half", "folder"])
def test_broken_files_are_refused_in_words(tmp_path, damage):
  path = tmp_path / "clip.mp4"
  if damage == "half":
    _write(path, 16)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  elif damage == "folder":
    path.mkdir()
  elif damage != "missing":
    path.write_bytes(b"" if damage == "empty" else b"junk" * 100)
  with pytest.raises(video.VideoError, match=r"clip\.mp4: .*expected") as e:
    video.read_video(path)
  assert "Check the path" in str(e.value) or "Re-encode it" in str(e.value)


def test_flipped_bits_give_a_clip_or_a_video_error(tmp_path):
  whole = _write(tmp_path / "clip.mp4", 16).read_bytes()
  random = np.random.default_rng(0)
  path = tmp_path / "broken.mp4"
  refused = 0
  for _ in range(40):
    content = bytearray(whole)
    for at in random.integers(0, len(whole), 6):
      content[at] ^= 1 << int(random.integers(8))
    path.write_bytes(content)
    refused += 1
    with contextlib.suppress(video.VideoError):
      assert len(video.read_video(path, num_frames=4).frames) >= 1
      refused -= 1
  assert refused  # so the damage was real


# ---- Lists of frames -----------------------------------------------------------------


def test_a_list_of_frames(tmp_path):
  paths = []
  for i in range(16):
    paths.append(tmp_path / f"{i}.png")
    Image.fromarray(_frame(i)).save(paths[-1])
  clip = video.read_video(paths, num_frames=4, fps=8.0)
  assert [_number(f) for f in clip.frames] == [0, 5, 10, 15]
  assert clip.timestamps == [0, 5 / 8, 10 / 8, 15 / 8]
  assert clip.seconds_per_frame == 0.5
  # Paths as text, pictures and bytes are alike; a rate unknown is 2 a second.
  mixed = [str(paths[0]), Image.open(paths[1]), paths[2].read_bytes()]
  clip = video.read_video(mixed)
  assert [_number(f) for f in clip.frames] == [0, 1, 2]
  assert clip.seconds_per_frame == 0.5 and clip.timestamps == [0, 0.5, 1.0]


@pytest.mark.parametrize(
  ("frames", "kwargs", "words"),
  [
    ([], {}, "0 frames.*Drop"),
    ([Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9))], {}, "differ in size"),
    ([b"junk"], {}, "a frame of a clip of 1: .*cannot be decoded"),
    ([pathlib.Path("/nowhere.png")], {}, "no such picture"),
    ([Image.new("RGB", (8, 8))], {"num_frames": 0}, "num_frames=0; expected"),
    ([Image.new("RGB", (8, 8))], {"fps": -1.0}, "fps=-1.0"),
    ([Image.new("RGB", (8, 8))], {"fps": float("nan")}, "fps=nan"),
  ],
)
def test_lists_that_are_refused(frames, kwargs, words):
  with pytest.raises(video.VideoError, match=words):
    video.read_video(frames, **kwargs)


# ---- Temporal pairs ------------------------------------------------------------------


@pytest.mark.parametrize("num", [1, 2, 5])
def test_pairs_equal_the_image_processor_frame_by_frame(num):
  """The torch-free oracle of HF's video processor: frame k alone, then two to a row."""
  frames = [np.random.default_rng(i).integers(0, 256, (56, 84, 3), np.uint8)
            for i in range(num)]  # fmt: skip
  patches, grid = image.patchify(np.stack(frames))
  alone = [image.patchify(frame[None])[0].reshape(-1, 3, 2, 196)[:, :, 0]
           for frame in [*frames, frames[-1]]]  # fmt: skip
  pairs = [np.stack([alone[2 * k], alone[2 * k + 1]], axis=2) for k in range(grid[0])]
  np.testing.assert_array_equal(patches, np.concatenate(pairs).reshape(-1, 1176))
  assert grid == ((num + 1) // 2, 4, 6)
