"""The zoom on the device equals PIL, byte for byte."""

import collections
import dataclasses
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import PIL
import pytest
import questions
from PIL import Image
from questions import ANSWER, crop, load_media, replay, select, task

from pixel_jax.model import config as model_config
from pixel_jax.model import qwen2_5_vl
from pixel_jax.pixels import geometry, image, resample
from pixel_jax.rollout import engine


def noise(rng, width, height):
  """Noise, half of it black and white, so that sums below 0 and above 255 come up."""
  pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
  hard = np.where(pixels > 127, 255, 0).astype(np.uint8)
  return Image.fromarray(np.where(rng.random((height, width, 1)) < 0.5, pixels, hard))


def interval(rng, length):
  a, b = sorted(rng.choice(length + 1, 2, replace=False).tolist())
  return a, b


def any_size(rng, width, height, most):
  """A new size: anything, about the same, or one side or both unchanged."""
  kind = rng.integers(6)
  if kind == 0:  # as in a rollout
    low = int(rng.integers(1, 30)) * 784
    high = low + int(rng.integers(1, 30)) * 784
    if max(width, height) <= image.MAX_ASPECT * min(width, height):
      h, w = image.smart_resize(height, width, min_pixels=low, max_pixels=high)
      if max(h, w) <= most:
        return w, h
  w, h = rng.integers(1, most + 1, 2).tolist()
  if kind == 1:
    return min(width, most), h
  if kind == 2:
    return w, min(height, most)
  if kind == 3:
    return min(width, most), min(height, most)
  if kind == 4:  # where the order of the passes turns
    w = width + int(rng.integers(-4, 5))
    h = height + int(rng.integers(-8, 9))
    return tuple(int(np.clip(v, 1, most)) for v in (w, h))
  return w, h


def equal(result, picture, boxes, sizes):
  """Asserts that each result is PIL's, with zeros around it."""
  for pixels, box, (w, h) in zip(np.asarray(result), boxes, sizes):
    mine = pixels[:h, : 3 * w].reshape(h, w, 3)
    pil = np.asarray(picture.crop(box).resize((w, h), Image.Resampling.BICUBIC))
    assert np.array_equal(mine, pil), (box, (w, h))
    assert not pixels[h:].any() and not pixels[:, 3 * w :].any()


@pytest.mark.slow
@pytest.mark.parametrize("thousands", [1, 10])
def test_boxes_equal_pil(thousands):
  assert PIL.__version__.startswith("13.0")  # the pinned one, whose order we follow
  rng = np.random.default_rng(0)
  done, orders = 0, collections.Counter()
  for side, out, pictures in ((128, 112, 3), (256, 224, 1)):
    for _ in range(pictures * thousands):
      picture = noise(rng, *rng.integers(1, side + 1, 2).tolist())
      square = jax.device_put(resample.square(picture, side))
      for _ in range(5):
        x = [interval(rng, picture.width) for _ in range(50)]
        y = [interval(rng, picture.height) for _ in range(50)]
        boxes = [(a, c, b, d) for (a, b), (c, d) in zip(x, y)]
        sizes = [any_size(rng, b[2] - b[0], b[3] - b[1], out) for b in boxes]
        plan = resample.plan(boxes, sizes, source=side, window=side, out=out)
        equal(resample.zoom(square, plan, window=side), picture, boxes, sizes)
        orders.update(plan.columns_first.tolist())
        done += len(boxes)
  assert done == 1000 * thousands and min(orders.values()) > 100 * thousands


def test_boxes_in_a_window_of_a_larger_picture():
  """A window at the edge moves back into the picture's square."""
  rng = np.random.default_rng(1)
  picture = noise(rng, 250, 200)
  square = resample.square(picture, 256)
  boxes, sizes = [], []
  for _ in range(60):
    w, h = rng.integers(1, 65, 2).tolist()
    left, top = int(rng.integers(251 - w)), int(rng.integers(201 - h))
    boxes.append((left, top, left + w, top + h))
    sizes.append(any_size(rng, w, h, 112))
  boxes[0], sizes[0] = (249, 199, 250, 200), (112, 112)  # one pixel, in the corner
  boxes[1], sizes[1] = (200, 150, 250, 200), (50, 50)  # nothing to resize
  plan = resample.plan(boxes, sizes, source=256, window=64, out=112)
  assert plan.corner.max(axis=0).tolist() == [192, 192]
  equal(resample.zoom(square, plan, window=64), picture, boxes, sizes)


@pytest.mark.parametrize(
  "size, new",
  [
    ((1, 1), (56, 28)),
    ((300, 1), (1, 28)),
    ((1, 300), (28, 1)),
    ((500, 400), (1, 1)),  # 1000 taps and more: the loop over them
    ((500, 400), (28, 400)),
    ((500, 400), (500, 28)),
    ((500, 33), (448, 28)),
    ((33, 500), (28, 448)),
    ((400, 300), (400, 300)),
    ((700, 900), (868, 868)),
  ],
)
def test_one_picture(size, new):
  picture = noise(np.random.default_rng(2), *size)
  mine = resample.Resize()(picture, new)
  assert mine.size == new and mine.mode == "RGB"
  assert mine.tobytes() == picture.resize(new, Image.Resampling.BICUBIC).tobytes()


def test_pillows_order():
  """Rows go first where the height loses more than twice what the width loses."""
  rng = np.random.default_rng(3)
  for lower in range(-2, 7):
    for narrower in range(-2, 4):
      picture = noise(rng, 40, 40)
      new = (40 - narrower, 40 - lower)
      plan = resample.plan([(0, 0, 40, 40)], [new], source=64, window=64, out=64)
      assert plan.columns_first[0] == (not (lower > 0 and lower > 2 * narrower))
      square = resample.square(picture, 64)
      equal(resample.zoom(square, plan, window=64), picture, [(0, 0, 40, 40)], [new])


def test_no_sum_leaves_int32():
  rng = np.random.default_rng(4)
  worst = 0
  for length, out in [*rng.integers(1, 200, (3000, 2)).tolist(), (4096, 1), (4096, 28)]:
    start, taps = resample.table(length, out)
    total = np.abs(taps.astype(np.int64)).sum(axis=1).max()
    worst = max(worst, int(total))
    used = (taps != 0) * (start[:, None] + np.arange(taps.shape[1]))
    assert start.min() >= 0 and used.max() < length
  assert 1.2 < worst / (1 << resample.BITS) < 1.4
  assert 255 * worst + resample.HALF < 1.4 * 2**30


@pytest.mark.slow
def test_programs_are_bounded():
  """A varied run compiles one program a pair of squares, whatever the sizes."""
  rng = np.random.default_rng(5)
  resize = resample.Resize()
  resample.zoom.clear_cache()
  for _ in range(100):
    width, height = (2 ** rng.uniform(4, 9, 2)).astype(int).tolist()
    budget = dict(min_pixels=4 * 784, max_pixels=int(rng.integers(8, 200)) * 784)
    h, w = image.smart_resize(height, width, **budget)
    picture = noise(rng, width, height)
    mine = image.resize(picture, **budget, by=resize)
    assert mine.tobytes() == image.bicubic(picture, (w, h)).tobytes()
  assert 3 < resample.zoom._cache_size() == len(resize.programs)
  assert len(resize.programs) <= len(resample.WINDOWS) * len(resample.OUTPUTS) <= 30


def test_a_picture_beyond_the_squares_is_resized_by_pil():
  resize = resample.Resize()
  picture = noise(np.random.default_rng(6), resample.WINDOWS[-1] + 1, 30)
  assert (
    resize(picture, (4088, 28)).tobytes()
    == image.bicubic(picture, (4088, 28)).tobytes()
  )
  assert resize.programs == set()


def test_threads_may_share_it():
  rng = np.random.default_rng(7)
  resize = resample.Resize()
  pictures = [noise(rng, *rng.integers(20, 120, 2).tolist()) for _ in range(40)]
  with ThreadPoolExecutor(8) as pool:
    mine = list(pool.map(lambda p: resize(p, (84, 56)), pictures))
  for a, picture in zip(mine, pictures):
    assert a.tobytes() == image.bicubic(picture, (84, 56)).tobytes()


def test_errors_name_the_remedy():
  squares = dict(source=64, window=64, out=56)
  with pytest.raises(ValueError, match="within the picture's square"):
    resample.plan([(0, 0, 65, 10)], [(28, 28)], **squares)
  with pytest.raises(ValueError, match="within the picture's square"):
    resample.plan([(5, 0, 5, 10)], [(28, 28)], **squares)
  with pytest.raises(ValueError, match="larger squares"):
    resample.plan([(0, 0, 10, 10)], [(57, 28)], **squares)
  with pytest.raises(ValueError, match="expected RGB"):
    resample.square(Image.new("L", (4, 4)), 8)
  with pytest.raises(ValueError, match="1 pixel"):
    resample.table(4, 0)


# ---- Patches -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(28, 28), (56, 84), (168, 140), (224, 28)])
def test_patch_rows_are_those_of_the_host(size):
  """Zoom and patches on the device, without the picture coming back in between."""
  picture = noise(np.random.default_rng(8), 130, 110)
  box = (3, 5, 127, 99)
  plan = resample.plan([box], [size], source=256, window=128, out=224)
  resized = resample.zoom(resample.square(picture, 256), plan, window=128)[0]
  view = picture.crop(box).resize(size, Image.Resampling.BICUBIC)
  host = geometry.lay_out(*image.patchify(np.asarray(view)[None]))
  pos = geometry.patch_positions(host.grid)
  padded = np.full((256, 2), -1, np.int32)
  padded[: len(pos)] = pos
  rows = np.asarray(resample.patch_rows(resized, padded))
  assert np.array_equal(rows[: len(pos)], host.patches)
  assert not rows[len(pos) :].any()


# ---- In a rollout --------------------------------------------------------------------

TURNS = {
  0: [crop(), crop("0.0, 0.0, 0.9, 0.6", 2), ANSWER],
  1: [select("1, 8"), crop("0.1, 0.1, 0.7, 0.9", 9), ANSWER],
}


@pytest.mark.slow
def test_a_rollout_is_the_same_by_host_and_device(tmp_path):
  codec = questions.codec(tmp_path)
  words = codec.tokenizer
  config = model_config.tiny(words.vocab_size)
  params = qwen2_5_vl.init(config, jax.random.key(0))
  shapes = dict(
    slots=2,
    group_size=2,
    max_prompt=128,
    max_len=512,
    prompt_len=24,
    extend_len=16,
    patches=64,
    chunk=16,
  )
  tasks = [task(0), task(1, video=True)]

  def script(task, sample):
    return [words.encode(t) for t in TURNS[tasks.index(task)]]

  def play():
    return playing.run(
      params, tasks, seed=0, step=0, group_size=1, max_turns=4, max_new_tokens=60,
      load_media=load_media, script=script,
    )  # fmt: skip

  playing = engine.Engine(config, codec, zoom="device", **shapes)
  device = play()
  assert playing.codec.resize.programs
  playing.codec = engine.Engine(config, codec, zoom="host", **shapes).codec
  assert playing.codec is codec
  for (mine,), (other,) in zip(device, play(), strict=True):
    assert mine.trajectory == other.trajectory
    assert [c.error for c in mine.trajectory.calls] == [None, None]
    for a, b in zip(mine.pixels, other.pixels, strict=True):
      assert a.key == b.key and np.array_equal(a.patches, b.patches)
  with pytest.raises(ValueError, match="zoom='tpu': expected one of host, device"):
    engine.Engine(config, codec, zoom="tpu", **shapes)


@pytest.mark.parametrize("profile", ["clean", "released"])
@pytest.mark.parametrize("source", ["original", "view"])
def test_a_conversation_is_the_same_in_every_profile(tmp_path, profile, source):
  """The released crop is padded by 0.1 before it is resized."""
  codec = questions.codec(tmp_path)
  host = dataclasses.replace(codec, profile=profile, crop_source=source)
  device = dataclasses.replace(host, resize=resample.Resize())
  still = [crop("0.1, 0.2, 0.7, 0.9"), ANSWER]
  for question, turns in ((task(0), still), (task(1, video=True), TURNS[1])):
    a, b = (replay(c, question, turns) for c in (host, device))
    assert a.trajectory == b.trajectory and len(a.pixels) > 1
    assert [p.key for p in a.pixels] == [p.key for p in b.pixels]
  assert device.resize.programs
