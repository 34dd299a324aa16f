"""The tiny world: what is drawn, what its references say, which calls show the cue."""

import collections
import dataclasses
import hashlib
import json

import numpy as np
import pytest

from pixel_jax.chat import tokenizer, tools
from pixel_jax.data import world
from pixel_jax.trajectory import Media, OpCall


def crop(box, target=1, error=None):
  arguments = {"bbox_2d": list(box), "target_image": target}
  return OpCall("crop_image_normalized", arguments, error)


def frames(*numbers):
  return OpCall("select_frames", {"target_frames": list(numbers)})


def first(kind, difficulty, split="train"):
  return next(
    t
    for t in (world.task(0, split, world.nth(kind, n)) for n in range(100))
    if t.reference["difficulty"] == difficulty
  )


def test_the_default_world_has_not_changed():
  """What the measured runs were drawn from, byte for byte."""
  digest = hashlib.blake2b(digest_size=8)
  for split in ("train", "val", "test"):
    for i in range(40):
      task = world.task(0, split, i)
      told = dataclasses.asdict(task)
      assert [m.pop("source") for m in told["media"]] == [None]  # is younger than they
      digest.update(json.dumps(told, sort_keys=True).encode())
      drawn = world.load_media(task.media[0])
      for picture in [drawn] if task.media[0].kind == "image" else drawn.frames:
        digest.update(np.asarray(picture).tobytes())
  assert digest.hexdigest() == "2fc9da077eba41c6"


def test_kinds_and_their_numbering():
  kinds = [world.kind_of(i) for i in range(16)]
  for kind in world.KINDS:
    where = [i for i, k in enumerate(kinds) if k == kind]
    assert where == [world.nth(kind, n) for n in range(len(where))]


@pytest.mark.parametrize("split", ["train", "full_train"])
@pytest.mark.parametrize("kind", world.KINDS)
def test_the_answer_is_drawn_where_the_reference_says(kind, split):
  for n in range(60):
    task = world.task(0, split, world.nth(kind, n))
    picture = world.load_media(task.media[0])
    if kind == "video":
      assert len(picture.frames) == world.FRAMES
      picture = picture.frames[task.reference["target_frames"][0] - 1]
    pixels = np.asarray(picture).astype(int)
    x1, y1, x2, y2 = (round(v * len(pixels)) for v in task.reference["glyph_2d"])
    side = x2 - x1
    cells = pixels[y1:y2, x1:x2].reshape(5, side // 5, 5, side // 5, 3)
    is_black = cells.max((1, 3, 4)) == 0
    drawn = tuple("".join("#" if b else "." for b in row) for row in is_black)
    assert world.BITMAPS[task.answer] == drawn
    # Around the letter it is red; elsewhere of no other panel.
    edge = pixels[y1 - 2, x1 - 2]
    assert edge[0] > 130 and edge[1:].max() < 100


def test_answers_and_difficulties_are_balanced():
  scenes = [world.scene(0, "train", i) for i in range(4000)]
  answers = collections.Counter(s.answer for s in scenes)
  assert set(answers) == set(world.LETTERS)
  assert min(answers.values()) > 900
  easy = sum(s.difficulty == "easy" for s in scenes) / len(scenes)
  assert abs(easy - world.EASY) < 0.03
  videos = [s for s in scenes if s.kind == "video"]
  targets = collections.Counter(s.target for s in videos)
  assert len(targets) == world.FRAMES and min(targets.values()) > 80
  for s in videos:
    assert [p.colour for p in s.panels].count("red") == 1
  cells = collections.Counter(
    (s.panels[0].x // world.CELL, s.panels[0].y // world.CELL)
    for s in scenes
    if s.kind == "image"
  )
  assert len(cells) == 9


def test_splits_and_seeds_share_no_scene():
  scenes = [
    world.scene(seed, split, i)
    for seed in (0, 1)
    for split in world.SPLITS
    for i in range(1500)
  ]
  assert len(set(scenes)) == len(scenes)


def test_a_scene_is_a_function_of_its_path():
  media = Media("image", "world:3/val/5")
  a, b = (np.asarray(world.load_media(media)) for _ in range(2))
  assert (a == b).all()
  # Drawn once with seed 3: a change here changes every world.
  assert world.scene(3, "val", 5).panels[0] == world.Panel(*PINNED)


PINNED = ("red", 11, 16, 61, "O", 33, 43, (56, 231))


@pytest.mark.parametrize("n", range(40))
def test_the_reference_box_is_square_and_covers(n):
  task = world.task(0, "train", world.nth("image", n))
  box = task.reference["bbox_2d"]
  steps = [round(v / world.GRID) for v in box]
  assert [round(s * world.GRID, 2) for s in steps] == box
  side = world.BOX[task.reference["difficulty"]]
  assert steps[2] - steps[0] == steps[3] - steps[1] == side
  assert world.covers(task, crop(box))


def test_covers_images():
  task = first("image", "hard")
  box = task.reference["bbox_2d"]
  assert not world.covers(task, crop((0.0, 0.0, 1.0, 1.0)))  # nothing enlarged
  assert not world.covers(task, crop(box, error="too_small"))
  x1, y1, x2, y2 = task.reference["glyph_2d"]
  assert not world.covers(task, crop(((x1 + x2) / 2, box[1], box[2], box[3])))
  # A crop of a crop counts with the box that it has in the image.
  whole = crop((0.0, 0.0, 1.0, 1.0))
  assert world.covers(task, crop(box, target=2), [whole])
  assert not world.covers(task, crop(box, target=2))
  wide = (max(x1 - 0.4, 0), max(y1 - 0.4, 0), min(x2 + 0.4, 1), min(y2 + 0.4, 1))
  assert not world.covers(task, crop(wide))
  inner = [
    (v - wide[i % 2]) / (wide[i % 2 + 2] - wide[i % 2]) for i, v in enumerate(box)
  ]
  assert world.covers(task, crop(inner, target=2), [crop(wide)])


def test_covers_videos():
  task = first("video", "hard")
  (red,) = task.reference["target_frames"]
  other = red % world.FRAMES + 1
  assert world.covers(task, frames(red))
  assert world.covers(task, frames(other, red))
  assert not world.covers(task, frames(other))
  middle = (0.2, 0.2, 0.8, 0.8)
  assert world.covers(task, crop(middle, target=red))
  assert not world.covers(task, crop(middle, target=other))
  assert world.covers(task, crop(middle, target=world.FRAMES + 1), [frames(red)])


def test_deep_clips():
  clips = [world.scene(0, "full_val", world.nth("video", n)) for n in range(1000)]
  share = sum(s.difficulty == "deep" for s in clips) / len(clips)
  assert abs(share - world.DEEP) < 0.05
  assert {s.difficulty for s in clips} == {"easy", "hard", "deep"}
  task = first("video", "deep", "full_val")
  frame = world.load_media(task.media[0]).frames[0]
  assert frame.size == (world.CANVAS, world.CANVAS)
  # Which letter it is: only a crop of the red frame shows it.
  (red,) = task.reference["target_frames"]
  other, box = red % world.FRAMES + 1, task.reference["bbox_2d"]
  selected, number = [frames(other, red)], world.FRAMES + 2
  assert not world.covers(task, frames(red))
  assert not world.covers(task, crop((0.0, 0.0, 1.0, 1.0), number), selected)
  assert world.covers(task, crop(box, number), selected)
  assert not world.covers(task, crop(box, number - 1), selected)
  assert world.covers(task, crop(box, task.reference["target_image"]))


@pytest.mark.parametrize("split", ["test", "full_test"])
@pytest.mark.parametrize("kind", world.KINDS)
def test_the_other_scene_has_another_answer(kind, split):
  for n in range(20):
    task = world.task(0, split, world.nth(kind, n))
    other = world.other_scene(task)
    assert other.answer != task.answer
    assert other.question == task.question
    assert other.reference["difficulty"] == task.reference["difficulty"]
    assert other.media[0].kind == kind


def test_parts_of_a_scene():
  task = first("image", "easy")
  whole = np.asarray(world.load_media(task.media[0]))
  part = world.load_media(Media("image", task.id + "#0.5,0.25,1.00,0.75"))
  assert (np.asarray(part) == whole[63:189, 126:252]).all()
  clip = first("video", "easy")
  third = world.load_media(Media("image", clip.id + "#3"))
  assert (
    np.asarray(third) == np.asarray(world.load_media(clip.media[0]).frames[2])
  ).all()


@pytest.mark.parametrize(
  "path",
  [
    "world:train/17",
    "world:0/train/x",
    "world:0/nowhere/1",
    f"world:0/val/{world.SPLITS['val']}",
    "world:0/val/-1",
    "world:0/val/0#1,2",
    "world:0/val/0#3",
    "world:0/val/3#9",
    "elsewhere:0/val/1",
  ],
)
def test_paths_that_name_nothing_are_refused(path):
  with pytest.raises(world.WorldError, match=r"allowed|expected"):
    world.load_media(Media("image", path))


def test_kinds_must_match():
  for media in (Media("video", "world:0/val/0"), Media("image", "world:0/val/3")):
    with pytest.raises(world.WorldError, match="the record says"):
      world.load_media(media)


def test_scaffolds_are_single_tokens(tmp_path):
  words = tokenizer.make_tiny(tmp_path, world.scaffolds())
  for text in world.scaffolds():
    assert len(words.encode(text)) == 1, text
    assert words.decode(words.encode(text)) == text
  box = {"bbox_2d": [0.12, 0.46, 0.28, 0.54], "target_image": 1}
  text = tools.call_text("crop_image_normalized", box)
  assert len(words.encode(text)) == 8  # and <|im_end|>
  assert words.decode(words.encode(text)) == text
  # The same letters in a question stay letters.
  assert words.im_start not in words.encode("<|im_start|>user\n", control=False)
  spelled = words.encode("<tool_call>\n", control=False)
  assert len(spelled) == len("<tool_call>\n")
