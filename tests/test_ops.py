"""Operations: both profiles by their tables; nothing a model writes can crash them."""

import contextlib
import json
import time

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from pixel_jax.pixels import ops
from pixel_jax.pixels.ops import OpError, Picture, Seen


def _picture(width, height, seed=0):
  """Every pixel tells where it is: (x, y, seed)."""
  y, x = np.mgrid[:height, :width]
  return Image.fromarray(
    np.stack([x % 256, y % 256, 0 * x + seed], -1).astype(np.uint8)
  )


def _image(width, height, seed=0, view=None):
  source = _picture(width, height, seed)
  return Picture("image", source, source.resize(view) if view else source)


def _video(num, width=100, height=80, view=None):
  frames = [_picture(width, height, seed) for seed in range(1, num + 1)]
  return Picture("video", frames, [f.resize(view) for f in frames] if view else frames)


def _crop(seen, box, target=1, profile="clean", **kwargs):
  arguments = {"bbox_2d": box, "target_image": target}
  return ops.crop_image_normalized(seen, arguments, profile=profile, **kwargs)


def _select(seen, targets, profile="clean", **kwargs):
  arguments = {"target_frames": targets}
  return ops.select_frames(seen, arguments, profile=profile, **kwargs)


def _texts(**values):
  """The clean texts that can be made of these numbers."""
  texts = set()
  for text in ops.CLEAN_TEXTS.values():
    with contextlib.suppress(KeyError):
      texts.add(text.format(**values))
  return texts


def _place(picture):
  """(left, top, seed, size) of a crop of `_picture`."""
  return (*map(int, np.asarray(picture)[0, 0]), picture.size)


# ---- Clean ---------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("box", "left_top_size"),
  [
    ([0.12, 0.40, 0.28, 0.52], (30, 101, (41, 30))),  # 30.24 100.8 70.56 131.04
    ([0, 0, 1, 1], (0, 0, (252, 252))),
    ([0.5, 0.5, 1.0, 1.0], (126, 126, (126, 126))),  # 1.0 is a legal coordinate
    ([0.0, 0.9, 0.06, 1.0], (0, 227, (15, 25))),
  ],
)
def test_clean_crop_cuts_exactly_the_box(box, left_top_size):
  left, top, size = left_top_size
  [crop] = _crop(Seen([_image(252, 252)]), box)
  assert _place(crop) == (left, top, 0, size)


def test_clean_crop_is_cut_from_the_original():
  seen = Seen([_image(252, 252, view=(84, 84))])
  box = [0.5, 0.25, 0.75, 0.5]
  [crop] = _crop(seen, box)
  assert _place(crop) == (126, 63, 0, (63, 63))
  [crop] = _crop(seen, box, source="view")
  assert crop.size == (21, 21)


def test_clean_numbers_are_flat():
  seen = Seen([_image(50, 50, 100), _video(3, 60, 60), _image(40, 40, 200)])
  seeds = [_place(_crop(seen, [0, 0, 1, 1], n)[0])[2] for n in range(1, 6)]
  assert seeds == [100, 1, 2, 3, 200]
  assert [_place(p)[2] for p in ops.flat(seen)] == seeds
  # The same numbers for frames: those of the clip are 2, 3, 4 here.
  assert [_place(p)[2] for p in _select(seen, [4, 2, 2])] == [3, 1, 1]
  assert _select(seen, [1]).kind == _select(seen, [5]).kind == "out_of_range"


@pytest.mark.parametrize(
  ("box", "target", "kind"),
  [
    ([0.4, 0.4, 0.4, 0.9], 1, "too_small"),  # empty
    ([0.9, 0.4, 0.1, 0.9], 1, "too_small"),  # reversed
    ([0.5, 0.1, 0.55, 0.9], 1, "too_small"),  # 13 of 252 pixels
    ([0.1, 0.1, 0.9], 1, "bad_arguments"),
    ([0.1, 0.1, 0.9, 0.9, 0.9], 1, "bad_arguments"),
    ([0.1, 0.1, True, 0.9], 1, "bad_arguments"),
    (["0.1", 0.1, 0.9, 0.9], 1, "bad_arguments"),
    ([[0.1, 0.1, 0.9, 0.9]], 1, "bad_arguments"),
    ("0.1,0.1,0.9,0.9", 1, "bad_arguments"),
    ({"x1": 0}, 1, "bad_arguments"),
    (None, 1, "bad_arguments"),
    ([0.1, 0.1, 0.9, 1.01], 1, "out_of_range"),
    ([-0.1, 0.1, 0.9, 0.9], 1, "out_of_range"),
    ([10, 10, 100, 100], 1, "out_of_range"),
    ([0.1, 0.1, float("nan"), 0.9], 1, "out_of_range"),
    ([0.1, 0.1, float("inf"), 0.9], 1, "out_of_range"),
    ([0.1, 0.1, 10**400, 0.9], 1, "out_of_range"),
    ([0.1, 0.1, 0.9, 0.9], 0, "bad_target"),
    ([0.1, 0.1, 0.9, 0.9], 3, "bad_target"),
    ([0.1, 0.1, 0.9, 0.9], -1, "bad_target"),
    ([0.1, 0.1, 0.9, 0.9], 1.5, "bad_target"),
    ([0.1, 0.1, 0.9, 0.9], float("nan"), "bad_target"),
    ([0.1, 0.1, 0.9, 0.9], "1", "bad_target"),
    ([0.1, 0.1, 0.9, 0.9], True, "bad_target"),
    ([0.1, 0.1, 0.9, 0.9], None, "bad_target"),
    pytest.param([0.1, 0.1, 0.9, 0.9], 10**400, "bad_target", id="huge"),
  ],
)
def test_clean_crop_refuses(box, target, kind):
  error = _crop(Seen([_image(252, 252), _image(60, 60)]), box, target)
  assert isinstance(error, OpError) and error.kind == kind
  assert error.text in _texts(n=2, min=14)


def test_a_sliver_never_reaches_smart_resize():
  """Qwen refuses an aspect over 200, so a crop of it must be an error, not a crash."""
  seen = Seen([_image(6000, 60)])
  assert _crop(seen, [0, 0, 1, 0.25]).kind == "too_narrow"  # 6000 x 15
  assert _crop(seen, [0, 0, 0.5, 0.25])[0].size == (3000, 15)  # exactly 200
  error = _crop(Seen([_image(6100, 40)]), [0, 0, 0.99, 0.63], profile="released")
  assert error == OpError(
    "too_narrow", f"absolute aspect ratio must be smaller than 200, got {6100 / 29}"
  )


@pytest.mark.parametrize(
  ("targets", "kind"),
  [
    ([], "bad_arguments"),
    ("1", "bad_arguments"),
    (1, "bad_arguments"),
    ({"1": 1}, "bad_arguments"),
    (None, "bad_arguments"),
    ([1, "2"], "bad_arguments"),
    ([True], "bad_arguments"),
    ([1.5], "bad_arguments"),
    ([[1]], "bad_arguments"),
    ([float("inf")], "bad_arguments"),
    ([0], "out_of_range"),
    ([17], "out_of_range"),
    ([-1], "out_of_range"),
    ([10**400], "out_of_range"),
    (list(range(1, 10)), "too_many_frames"),
    ([1] * 10**6, "too_many_frames"),
  ],
)
def test_clean_select_refuses(targets, kind):
  error = _select(Seen([_video(16)]), targets)
  assert isinstance(error, OpError) and error.kind == kind
  assert error.text in _texts(max=8, first=1, last=16)


def test_clean_select_takes_what_is_asked_in_its_order():
  seen = Seen([_video(16, view=(28, 28))])
  frames = _select(seen, [16, 1, 1.0, 3])
  assert [_place(f) for f in frames] == [(0, 0, n, (100, 80)) for n in (16, 1, 1, 3)]
  assert [f.size for f in _select(seen, [2], source="view")] == [(28, 28)]
  assert _select(Seen([_image(50, 50)]), [1]).kind == "not_a_video"


@pytest.mark.parametrize("arguments", [None, 3, "x", [], [1], True, float("nan")])
def test_arguments_must_be_an_object(arguments):
  for profile in ("clean", "released"):
    for operation in (ops.crop_image_normalized, ops.select_frames):
      error = operation(Seen([_video(4)]), arguments, profile=profile)
      assert isinstance(error, OpError) and error.kind == "bad_arguments"


def test_clean_texts_say_one_thing_each():
  assert len(set(ops.CLEAN_TEXTS.values())) == len(ops.CLEAN_TEXTS)
  assert max(map(len, ops.CLEAN_TEXTS.values())) < 160  # a token each in the tiny model


# ---- Released ------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("box", "left_top_size"),
  [
    # Numbers of pixel_reasoner.md 1.5, made with the released code.
    ([0.5, 0.5, 1.0, 1.0], (0, 0, (101, 81))),  # 1.0 turns the box into pixels
    ([0.4, 0.5, 0.6, 0.7], (300, 320, (400, 320))),  # 0.1 on every side
    ([0.0, 0.0, 0.05, 0.05], (0, 0, (150, 120))),  # clamped at the border
    ([0.95, 0.9, 0.99, 0.99], (850, 640, (150, 160))),
    ([500, 400, 600, 480], (400, 320, (300, 240))),  # pixels
    ([0, 0, 1, 1], (0, 0, (101, 81))),
    ([float("nan"), 0.5, 0.6, 0.7], (0, 0, (101, 81))),  # NaN is not < 1, then 0
    ([float("-inf"), 0.5, float("inf"), 0.7], (0, 0, (1000, 81))),
    ([True, 0.5, 600, 0.7, "ignored"], (0, 0, (700, 81))),
  ],
)
def test_released_crop(box, left_top_size):
  left, top, size = left_top_size
  [crop] = _crop(Seen([_image(1000, 800)]), box, profile="released")
  assert _place(crop) == (left % 256, top % 256, 0, size)


def test_released_pixels_are_those_of_the_view():
  seen = Seen([_image(1000, 800, view=(500, 400))])
  [crop] = _crop(seen, [250, 200, 300, 240], profile="released")
  assert crop.size == (300, 240)
  [crop] = _crop(seen, [250, 200, 300, 240], profile="released", source="view")
  assert crop.size == (150, 120)
  seen = Seen([_video(4, 1000, 800, view=(500, 400))])
  [crop] = _crop(seen, [250, 200, 300, 240], 3, profile="released")
  assert crop.size == (300, 240) and _place(crop)[2] == 3


WRONG = (
  "Execution Error: Incorrect `target_image` argument in `crop_image_normalized`"
  " operation. You can only pick an image"
)


@pytest.mark.parametrize(
  ("seen", "arguments", "kind", "text"),
  [
    ("image", {"target_image": 3}, "bad_target", f"{WRONG} within [1,2]"),
    ("image", {"target_image": float("nan")}, "bad_target", f"{WRONG} within [1,2]"),
    ("video", {"target_image": 17}, "bad_target",
     f"{WRONG} **from** the video within [1,16], but the current argument"
     " `target_image=17`."),
    ("both", {"target_image": 1}, "bad_target",
     f"{WRONG} within range [2,3], but the current argument `target_image=1`."),
    ("both", {"target_image": 4}, "bad_arguments", "list index out of range"),
    ("image", {"target_image": -5}, "bad_arguments", "list index out of range"),
    ("image", {"target_image": 1.0}, "bad_arguments",
     "list indices must be integers or slices, not float"),
    ("image", {"target_image": "1"}, "bad_arguments",
     "unsupported operand type(s) for -: 'str' and 'int'"),
    ("image", {"bbox_2d": None}, "bad_arguments",
     "'NoneType' object is not subscriptable"),
    ("image", {"bbox_2d": [0.1, 0.2, 0.3]}, "bad_arguments", "list index out of range"),
    ("image", {"bbox_2d": ["a", 0, 0, 0]}, "bad_arguments",
     "'<' not supported between instances of 'str' and 'int'"),
    ("image", {"bbox_2d": [0.1, 0.1, 10**400, 1]}, "bad_arguments",
     "int too large to convert to float"),
    ("image", {"bbox_2d": [0.9, 0.1, 0.2, 0.5]}, "too_small",
     "Coordinate 'right' is less than 'left'"),
    ("image", {"bbox_2d": [0.1, 0.9, 0.5, 0.2]}, "too_small",
     "Coordinate 'lower' is less than 'upper'"),
    ("small", {"bbox_2d": [0.4, 0.4, 0.5, 0.5]}, "too_small",
     "Cropped image is too small: 28x24"),
  ],
)  # fmt: skip
def test_released_crop_texts(seen, arguments, kind, text):
  seen = {
    "image": Seen([_image(1000, 800), _image(200, 200)]),
    "video": Seen([_video(16)]),
    "both": Seen([_video(16), _image(200, 200), _image(100, 100)]),
    "small": Seen([_image(93, 80)]),
  }[seen]
  arguments = {"bbox_2d": [0.1, 0.1, 0.9, 0.9], "target_image": 1, **arguments}
  got = ops.crop_image_normalized(seen, arguments, profile="released")
  assert got == OpError(kind, text)


def test_released_crop_missing_keys():
  seen = Seen([_image(100, 100)])
  for arguments, text in (
    ({"bbox_2d": [0, 0, 0.5, 0.5]}, "'target_image'"),
    ({"target_image": 1}, "'bbox_2d'"),
  ):
    got = ops.crop_image_normalized(seen, arguments, profile="released")
    assert got == OpError("bad_arguments", text)


def test_released_target_image():
  box, kwargs = [0.2, 0.2, 0.8, 0.8], {"profile": "released"}
  images = Seen([_image(100, 80, 50), _image(100, 80, 60)])
  video, both = Seen([_video(16)]), Seen([_video(16), _image(100, 80, 70)])
  for seen, target, seed in (
    (images, 1, 50), (images, 2, 60), (images, 0, 60), (images, True, 50),
    (video, 1, 1), (video, 16, 16), (video, 0, 16), (both, 2, 70),
  ):  # fmt: skip
    assert _place(_crop(seen, box, target, **kwargs)[0])[2] == seed


@pytest.mark.parametrize(
  ("targets", "kind", "text"),
  [
    ([], "bad_arguments", "max() arg is an empty sequence"),
    ([1, 17], "out_of_range",
     "Execution Error: There are 16 frames numbered in range [1,16]. Your selection"
     " `target_frames=[1, 17]` is out of range."),
    (list(range(16)), "too_many_frames",
     "Execution Error: You have selected 16 frames in total. Think again which frames"
     " you need to check in details (no more than 8 frames)"),
    ([1] * 10**6, "too_many_frames",
     "Execution Error: You have selected 1000000 frames in total. Think again which"
     " frames you need to check in details (no more than 8 frames)"),
    ([1.0], "bad_arguments", "list indices must be integers or slices, not float"),
    ([-16], "bad_arguments", "list index out of range"),
    (["1"], "bad_arguments", "'>' not supported between instances of 'str' and 'int'"),
    (3, "bad_arguments", "object of type 'int' has no len()"),
  ],
)  # fmt: skip
def test_released_select_texts(targets, kind, text):
  assert _select(Seen([_video(16)]), targets, profile="released") == OpError(kind, text)


def test_released_select():
  seen = Seen([_video(16), _image(50, 50)])
  frames = _select(seen, [1, 16, 0, -1], profile="released")  # 0 and -1 wrap
  assert [_place(f)[2] for f in frames] == [1, 16, 16, 15]
  assert _select(Seen([_image(50, 50)]), [1], profile="released") == OpError(
    "not_a_video",
    "Execution Error: You attempted to `select_frames` from **image** not **video**."
    " You should use `crop_image_normalized` instead for inspecting **image**.",
  )


def test_released_texts_are_cut():
  error = _crop(Seen([_video(4)]), [0, 0, 1, 1], 10**4000, profile="released")
  assert error.kind == "bad_target" and len(error.text) == ops.MAX_TEXT


# ---- Anything ------------------------------------------------------------------------

SCALARS = st.one_of(
  st.none(), st.booleans(), st.text(max_size=5), st.floats(),
  st.integers(-3, 20), st.integers(),
  st.sampled_from([1e308, -1e308, 10**400, -(10**400), 0.999, 1.0, "a" * 10**5]),
  st.just(5000).map(lambda digits: 10**digits),  # Python refuses to print it
)  # fmt: skip
VALUES = st.recursive(
  st.one_of(SCALARS, st.lists(st.floats(0, 1), min_size=4, max_size=4)),
  lambda inner: st.one_of(
    st.lists(inner, max_size=9), st.dictionaries(st.text(max_size=3), inner, max_size=3)
  ),
  max_leaves=12,
)
ARGUMENTS = st.one_of(
  VALUES,
  st.fixed_dictionaries(
    {"bbox_2d": st.one_of(VALUES, st.lists(SCALARS, min_size=4, max_size=4))},
    optional={"target_image": SCALARS, "target_frames": VALUES},
  ),
  st.fixed_dictionaries({"target_frames": st.lists(SCALARS, max_size=9)}),
)
SEEN = [
  Seen([]),
  Seen([_image(300, 200, view=(84, 56))]),
  Seen([_video(5, view=(28, 28))]),
  Seen([_video(2), _image(40, 600)]),
  Seen([_image(40, 40), _video(3)]),
]


@hypothesis.settings(max_examples=600, deadline=None)
@hypothesis.given(
  ARGUMENTS, st.sampled_from(SEEN), st.sampled_from(["clean", "released"]),
  st.sampled_from(["original", "view"]),
  st.sampled_from([ops.crop_image_normalized, ops.select_frames]),
)  # fmt: skip
def test_nothing_a_model_writes_raises(arguments, seen, profile, source, operation):
  got = operation(seen, arguments, profile=profile, source=source)
  if isinstance(got, OpError):
    assert got.kind and len(got.text) <= ops.MAX_TEXT
    return
  assert 1 <= len(got) <= (1 if operation is ops.crop_image_normalized else 8)
  largest = max(p.width * p.height for p in ops.flat(seen, source))
  for picture in got:
    assert 0 < picture.width * picture.height <= largest
    assert max(picture.size) <= 200 * min(picture.size)


@pytest.mark.parametrize("profile", ["clean", "released"])
@pytest.mark.parametrize(
  "text",
  [
    '{"bbox_2d": [NaN, 1e400, -Infinity, 1e400], "target_image": 1e400}',
    '{"target_frames": [' + "1," * 10**6 + "1]}",
    '{"bbox_2d": ' + "[" * 900 + "]" * 900 + ', "target_image": 1}',
    '{"target_frames": [' + "[" * 900 + "]" * 900 + ", " + "[" * 900 + "]" * 900 + "]}",
    '{"target_frames": "' + "9" * 10**6 + '"}',
    '{"bbox_2d": "' + "9" * 10**6 + '", "target_image": "' + "9" * 10**6 + '"}',
    '{"target_image": ' + "9" * 4000 + ', "bbox_2d": [' + "9" * 4000 + ",1,2,3]}",
  ],
)
def test_large_arguments_are_refused_at_once(text, profile):
  arguments = json.loads(text)
  seen = Seen([_video(16)])
  start = time.process_time()
  for operation in (ops.crop_image_normalized, ops.select_frames):
    got = operation(seen, arguments, profile=profile)
    assert isinstance(got, OpError) and len(got.text) <= ops.MAX_TEXT
  assert time.process_time() - start < 10  # of CPU; it takes a hundredth
