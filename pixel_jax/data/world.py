"""The tiny world: pictures and clips, drawn from a seed, to be looked at closely.

An image (252x252) has three coloured panels, each with a black letter; the question is
which letter is on the red one.  Easy letters can be read in the 84x84 view, hard ones
are 3 pixels there: the policy has to zoom in.  A clip has eight frames (112x112) with a
panel each, one of them red; the view is 28x28 a frame, and one frame can be selected.
The splits full_train, full_val and full_test are other scenes that hold deep clips, too:
their frames (252x252) show the letter only to who selects one and then crops it.
Sizes and shares: tiny_world.md, part 1.  Not here: traces
(`synthesis/templates.py`) and the order of examples (`pipeline.py`).

  Task("world:0/train/17")      image, answer "X"
    media      [Media("image", "world:0/train/17")]
    reference  {"kind": "image", "difficulty": "hard", "bbox_2d": [.14, .46, .26, .58],
                "glyph_2d": [.18, .5, .22, .54]}

A path may name a part: "world:0/train/17#0.14,0.46,0.26,0.58" is that box of the image,
"world:0/train/19#3" is the third frame of the clip.
"""

import dataclasses
import functools
import random

import numpy as np
from PIL import Image

from pixel_jax.chat import template, tools
from pixel_jax.pixels import ops, video
from pixel_jax.trajectory import Media, OpCall, Task

FULL = "full_"  # how the name of a split with deep clips begins
# Scenes of a split; never the same ones, since the split is part of the seed.
SPLITS = {"train": 1 << 18, "val": 1 << 12, "test": 1 << 13}
SPLITS |= {FULL + split: size for split, size in SPLITS.items()}
KINDS = ("image", "video")
VIDEO_EVERY = 4  # every 4th scene is a clip

LETTERS = "OXTL"
BITMAPS = {
  "O": ("#####", "#...#", "#...#", "#...#", "#####"),
  "X": ("#...#", ".#.#.", "..#..", ".#.#.", "#...#"),
  "T": ("#####", "..#..", "..#..", "..#..", "..#.."),
  "L": ("#....", "#....", "#....", "#....", "#####"),
}
COLOURS = {
  "red": (200, 40, 40),
  "blue": (70, 100, 215),
  "green": (70, 175, 80),
  "yellow": (225, 200, 70),
}
OTHERS = ("blue", "green", "yellow")
QUESTIONS = {
  "image": "Which symbol is on the red panel?",
  "video": "Which symbol is on the red panel of the video?",
}

EASY = 0.45  # share
CANVAS, CELL = 252, 84  # pixels; 3 x 3 cells
PANEL = (54, 62)
GLYPH = {"easy": 40, "hard": 10}  # 13 and 3 pixels in the view
OFFSET = {"easy": 3, "hard": 5}  # of the glyph from the centre of its panel, at most
# Side of the reference box, the glyph in its middle, in steps of GRID: 50 and 30 px.
# Whole steps, since a box that is not square changes its shape when it is resized.
BOX = {"easy": 10, "hard": 6, "deep": 6}
FRAMES, FRAME = 8, 112
FRAME_PANEL = (92, 104)
FRAME_GLYPH = {"easy": 60, "hard": 15, "deep": 10}  # 15, 4 and 1 pixels in the view
FRAME_OFFSET = 3
# Frames of deep clips have the size of an image: the letter is 4 pixels in the 112x112
# view of a selected frame, and a crop of it has one of the sizes that are single tokens.
DEEP = 0.5  # share of the clips of a full split
DEEP_PANEL = (110, 150)
SECONDS_PER_FRAME = 0.25  # temporal ids of the pairs of frames become 0, 1, 2, 3
GRID = 0.02  # of all coordinates: 50 steps over a side
WIDEST = 90  # pixels of a box that still counts as looking closer


class WorldError(ValueError):
  """A path that names no scene."""


@dataclasses.dataclass(frozen=True)
class Panel:
  """A coloured square with a letter; all in pixels of its canvas."""

  colour: str
  x: int
  y: int
  side: int
  letter: str
  glyph_x: int
  glyph_y: int
  noise: tuple[int, int]  # place in the texture


@dataclasses.dataclass(frozen=True)
class Scene:
  """The panels to draw: those of one image, or one for each frame of a clip."""

  kind: str
  difficulty: str
  panels: tuple[Panel, ...]
  target: int  # index of the red panel
  noise: tuple[int, int]

  @property
  def glyph(self) -> int:
    return (GLYPH if self.kind == "image" else FRAME_GLYPH)[self.difficulty]

  @property
  def canvas(self) -> int:
    return CANVAS if self.kind == "image" or self.difficulty == "deep" else FRAME

  @property
  def answer(self) -> str:
    return self.panels[self.target].letter


# ---- Scenes --------------------------------------------------------------------------


def kind_of(index: int) -> str:
  return "video" if index % VIDEO_EVERY == VIDEO_EVERY - 1 else "image"


def nth(kind: str, n: int) -> int:
  """The index of the n-th scene of a kind."""
  if kind == "video":
    return n * VIDEO_EVERY + VIDEO_EVERY - 1
  return n // (VIDEO_EVERY - 1) * VIDEO_EVERY + n % (VIDEO_EVERY - 1)


def video_share(split: str) -> float:
  """Of the questions of a split."""
  return 0.5 if split.startswith(FULL) else 1 / VIDEO_EVERY


@functools.lru_cache(maxsize=4096)
def scene(seed: int, split: str, index: int) -> Scene:
  """The scene `index` of a split; a pure function of its arguments."""
  if split not in SPLITS:
    raise WorldError(f"split {split!r} is unknown; allowed: {', '.join(SPLITS)}")
  if not 0 <= index < SPLITS[split]:
    raise WorldError(f"scene {index} of {split}: allowed are 0 to {SPLITS[split] - 1}")
  # A string seed goes through SHA-512: neighbours and splits have nothing in common.
  rng = random.Random(f"pixel_jax world {seed}/{split}/{index}")
  difficulty = "easy" if rng.random() < EASY else "hard"
  if kind_of(index) == "image":
    return _image(rng, difficulty)
  if split.startswith(FULL) and rng.random() < DEEP:
    difficulty = "deep"
  return _video(rng, difficulty)


def _image(rng: random.Random, difficulty: str) -> Scene:
  cells, colours = list(range(9)), list(OTHERS)
  colours = ["red", *(colours.pop(_int(rng, 0, n)) for n in (2, 1))]
  panels = []
  for colour, last in zip(colours, (8, 7, 6)):
    cell = cells.pop(_int(rng, 0, last))
    side = _int(rng, *PANEL)
    x = cell % 3 * CELL + _int(rng, 0, CELL - side)
    y = cell // 3 * CELL + _int(rng, 0, CELL - side)
    panels.append(
      _panel(rng, colour, x, y, side, GLYPH[difficulty], OFFSET[difficulty])
    )
  return Scene("image", difficulty, tuple(panels), 0, _place(rng))


def _video(rng: random.Random, difficulty: str) -> Scene:
  canvas, sides, offset = FRAME, FRAME_PANEL, FRAME_OFFSET
  if difficulty == "deep":
    canvas, sides, offset = CANVAS, DEEP_PANEL, OFFSET["hard"]
  target = _int(rng, 0, FRAMES - 1)
  panels = []
  for i in range(FRAMES):
    side = _int(rng, *sides)
    x, y = _int(rng, 0, canvas - side), _int(rng, 0, canvas - side)
    colour = "red" if i == target else OTHERS[_int(rng, 0, 2)]
    panels.append(_panel(rng, colour, x, y, side, FRAME_GLYPH[difficulty], offset))
  return Scene("video", difficulty, tuple(panels), target, _place(rng))


def _panel(rng, colour, x, y, side, glyph, offset) -> Panel:
  middle = (side - glyph) // 2
  return Panel(
    colour,
    x,
    y,
    side,
    LETTERS[_int(rng, 0, len(LETTERS) - 1)],
    x + middle + _int(rng, -offset, offset),
    y + middle + _int(rng, -offset, offset),
    _place(rng),
  )


def _place(rng: random.Random) -> tuple[int, int]:
  return _int(rng, 0, 255), _int(rng, 0, 255)


def _int(rng: random.Random, low: int, high: int) -> int:
  """low..high.  Only `random()` draws the same numbers in every version of Python."""
  return low + int(rng.random() * (high - low + 1))


# ---- Drawing -------------------------------------------------------------------------


def draw(scene: Scene) -> Image.Image | video.Video:
  """The image, or the clip, of a scene."""
  if scene.kind == "image":
    canvas = _background(scene.noise, CANVAS)
    for panel in scene.panels:
      _blit(canvas, panel, scene.glyph)
    return Image.fromarray(canvas)
  return video.Video(
    [draw_frame(scene, i) for i in range(FRAMES)],
    [i * SECONDS_PER_FRAME for i in range(FRAMES)],
    SECONDS_PER_FRAME,
  )


def draw_frame(scene: Scene, index: int) -> Image.Image:
  x, y = scene.noise
  canvas = _background(((x + 31 * index) % 256, y), scene.canvas)
  _blit(canvas, scene.panels[index], scene.glyph)
  return Image.fromarray(canvas)


def _background(place: tuple[int, int], side: int) -> np.ndarray:
  x, y = place
  return _texture("background")[y : y + side, x : x + side].copy()


def _blit(canvas: np.ndarray, panel: Panel, glyph: int) -> None:
  nx, ny = panel.noise
  x, y, side = panel.x, panel.y, panel.side
  fill = _texture(panel.colour)[ny : ny + side, nx : nx + side]
  canvas[y : y + side, x : x + side] = fill
  x, y = panel.glyph_x, panel.glyph_y
  place = canvas[y : y + glyph, x : x + glyph]
  np.multiply(place, _stencil(panel.letter, glyph), out=place)


@functools.cache
def _texture(colour: str) -> np.ndarray:
  """u8[512 512 3]: the colour with noise; scenes take pieces of it."""
  rgb, spread = COLOURS.get(colour, (205, 205, 205)), 8
  if colour == "background":
    spread = 12
  noise = np.random.default_rng(sum(map(ord, colour))).normal(0, spread, (512, 512, 3))
  return (noise + rgb).clip(0, 255).astype(np.uint8)


@functools.cache
def _stencil(letter: str, side: int) -> np.ndarray:
  """u8[side side 3]: 0 where the letter is black."""
  cells = np.array([[c != "#" for c in row] for row in BITMAPS[letter]], np.uint8)
  return cells.repeat(side // 5, 0).repeat(side // 5, 1)[..., None].repeat(3, 2)


# ---- Tasks ---------------------------------------------------------------------------


def task(seed: int, split: str, index: int) -> Task:
  """The question of a scene, with its cue as the reference."""
  s = scene(seed, split, index)
  path = f"world:{seed}/{split}/{index}"
  panel = s.panels[s.target]
  x, y = panel.glyph_x, panel.glyph_y
  reference = {
    "kind": s.kind,
    "difficulty": s.difficulty,
    "glyph_2d": [v / s.canvas for v in (x, y, x + s.glyph, y + s.glyph)],
  }
  if s.canvas == CANVAS:
    reference["bbox_2d"] = _box(x + s.glyph / 2, y + s.glyph / 2, BOX[s.difficulty])
  if s.kind == "video":
    reference["target_frames"] = [s.target + 1]
  if s.difficulty == "deep":
    reference["target_image"] = s.target + 1  # that the box lies in
  return Task(
    path, QUESTIONS[s.kind], s.answer, [Media(s.kind, path)], reference=reference
  )


def _box(x: float, y: float, steps: int) -> list[float]:
  """The box on the grid, `steps` a side, whose middle is closest to a pixel."""
  last = round(1 / GRID) - steps
  low = [min(max(round(v / CANVAS / GRID - steps / 2), 0), last) for v in (x, y)]
  return [round(v * GRID, 2) for v in (*low, low[0] + steps, low[1] + steps)]


def parse(path: str) -> tuple[int, str, int, str]:
  """ "world:0/train/17#3" -> (0, "train", 17, "3")."""
  try:
    name, _, rest = path.partition(":")
    place, _, part = rest.partition("#")
    seed, split, index = place.split("/")
    if name != "world":
      raise ValueError
    return int(seed), split, int(index), part
  except ValueError:
    raise WorldError(
      f"{path!r} is no scene; expected world:SEED/SPLIT/INDEX with split in "
      f"{', '.join(SPLITS)}, e.g. world:0/train/17"
    ) from None


def load_media(media: Media) -> Image.Image | video.Video:
  """Draws what a path of this world names."""
  if not isinstance(media.path, str):
    raise WorldError(f"{media.path!r}: a clip of the world is one path, not a list")
  seed, split, index, part = parse(media.path)
  s = scene(seed, split, index)
  shown = "image" if part else s.kind
  if media.kind != shown:
    raise WorldError(f"{media.path!r} is of kind {shown}, the record says {media.kind}")
  if not part:
    return draw(s)
  try:
    numbers = [float(v) for v in part.split(",")]
    if s.kind == "video" and len(numbers) == 1:
      return draw_frame(s, range(FRAMES)[int(numbers[0]) - 1])
    if s.kind == "image" and len(numbers) == 4:
      return draw(s).crop([round(v * CANVAS) for v in numbers])
  except (ValueError, IndexError):
    pass
  raise WorldError(
    f"{media.path!r}: #{part} is no part of a {s.kind}; expected #x1,y1,x2,y2 of an "
    f"image or #1 to #{FRAMES} of a video"
  )


def other_scene(question: Task) -> Task:
  """A task of the same kind and difficulty with another answer: a counterfactual."""
  seed, split, index, _ = parse(question.id)
  difficulty = question.reference["difficulty"]
  for step in range(1, SPLITS[split]):
    at = (index + step) % SPLITS[split]
    if kind_of(at) != kind_of(index):
      continue
    other = scene(seed, split, at)
    if other.difficulty == difficulty and other.answer != question.answer:
      return task(seed, split, at)
  raise WorldError(f"no other scene for {question.id}")  # not with splits of thousands


# ---- What a call shows ---------------------------------------------------------------


def covers(task: Task, call: OpCall, earlier: list[OpCall] = ()) -> bool:
  """Whether a call shows the detail, enlarged.

  The glyph must lie wholly in a box of at most 90 px, or the red frame be among the
  selected ones, which does not show that of a deep clip.

  Args:
    earlier: the calls before it, needed where it looks at a picture they returned.
  """
  pictures = _pictures(task, earlier)
  new = _shown(pictures, call)
  glyph, red = task.reference["glyph_2d"], task.reference.get("target_frames")
  is_deep = task.reference.get("difficulty") == "deep"
  side = FRAME if red and not is_deep else CANVAS
  for frame, box in new:
    x1, y1, x2, y2 = box
    # Boxes are cut at whole pixels, so half a pixel is given.
    e = 0.5 / side
    inside = x1 - e <= glyph[0] and y1 - e <= glyph[1]
    inside = inside and x2 + e >= glyph[2] and y2 + e >= glyph[3]
    is_small = (x2 - x1) * side <= WIDEST
    is_small |= call.name == "select_frames" and not is_deep
    if inside and is_small and (not red or frame in red):
      return True
  return False


def _pictures(task: Task, calls) -> list[tuple[int, tuple]]:
  """(frame, box in it) under each number, minus 1, that a call may name."""
  n = FRAMES if task.reference["kind"] == "video" else 1
  pictures = [(i + 1, (0.0, 0.0, 1.0, 1.0)) for i in range(n)]
  for call in calls:
    pictures += _shown(pictures, call)
  return pictures


def _shown(pictures, call: OpCall) -> list[tuple[int, tuple]]:
  if call.error is not None:
    return []
  if call.name == "select_frames":
    return [pictures[int(i) - 1] for i in call.arguments["target_frames"]]
  target = int(call.arguments["target_image"])
  if not 1 <= target <= len(pictures):
    return []  # it looks at what `earlier` would tell
  frame, (x, y, right, low) = pictures[target - 1]
  a, b, c, d = call.arguments["bbox_2d"]
  w, h = right - x, low - y
  return [(frame, (x + a * w, y + b * h, x + c * w, y + d * h))]


# ---- Tokens --------------------------------------------------------------------------


def scaffolds(profile: str = "clean") -> list[str]:
  """Texts that the tiny tokenizer holds as one token each, so that a call costs nine.

  Where several match, the longest wins: a prompt without pictures is three tokens, and
  the short pieces serve what is put together otherwise.
  """
  head = template.head("system") + tools.system_prompt(profile)
  between = template.END + "\n" + template.head("user")
  tail = template.END + "\n" + template.GENERATION
  crop = "\nHere is the cropped image (Image Size: "
  frames = "\nHere are the selected frames (Frame Size: "
  again = "\n" + template.head("user")
  grid = [f"{i * GRID:.2f}" for i in range(round(1 / GRID) + 1)]
  sizes = [28 * i for i in range(1, 19)]  # 504: the longest crop of 252 x 14 pixels
  texts = [
    head + between,
    tools.user_suffix(profile) + tail,
    template.head("system"),
    tools.system_prompt(profile),
    tools.user_suffix(profile),
    template.head("user"),
    template.head("assistant"),
    template.END + "\n",
    tail,
    again,
    again + crop,
    again + frames,
    *QUESTIONS.values(),
    *BASE_QUESTIONS.values(),
    *TEXT_PIECES,
    r"\boxed{",
    "<tool_call>\n",
    '{"name": "crop_image_normalized", "arguments": {"bbox_2d": [',
    '{"name": "select_frames", "arguments": {"target_frames": [',
    *(f'], "target_image": {i}}}}}' for i in range(1, FRAMES + 9)),
    "]}}",
    "\n</tool_call>",
    *grid,
    *(f", {number}" for number in grid),
    *(f", {i}" for i in range(1, FRAMES + 1)),
    *(f"{n}x" for n in sizes),
    *map(str, sizes),
    *(f"{n}):" for n in sizes),
    *(f", Numbered {n}" for n in range(1, 2 * FRAMES + 9)),
    *(f" to {n}):" for n in range(1, 2 * FRAMES + 9)),
    *_errors(again),
  ]
  return list(dict.fromkeys(texts))


BASE_QUESTIONS = {
  "image/box": "Where is the symbol on the red panel? Answer with [x1, y1, x2, y2].",
  "video/number": "Which frames show the red panel? Answer with their numbers.",
}
TEXT_PIECES = ("Which number is larger, ", " or ")


def _errors(again: str) -> list[str]:
  """The error turns; what a policy at T = 1 writes often enough is one token."""
  texts = []
  for name, text in ops.CLEAN_TEXTS.items():
    if name == "bad_target":
      texts += [text.format(n=n) for n in range(1, FRAMES + 9)]
    else:
      largest = 200 if name == "too_narrow" else ops.MAX_FRAMES
      minimum = ops.MIN_SIDE
      texts.append(text.format(min=minimum, max=largest, first=1, last=FRAMES))
  call = 'The call must be {"name": <function-name>, "arguments": <args-json-object>}.'
  opened = again + "\nExecution error:\n"
  whole = [f"{opened}{text}\n{template.END}\n{template.GENERATION}" for text in texts]
  pieces = [
    opened,
    call,
    "Unknown function ",
    f". Use one of {', '.join(tools.OPERATIONS)}.",
    "the JSON is nested too deeply",
    "Expecting value: line ",
    "Expecting ',' delimiter: line ",
    "Expecting ':' delimiter: line ",
    "Expecting property name enclosed in double quotes: line ",
    "Illegal trailing comma before end of object: line ",  # Python 3.13
    "Illegal trailing comma before end of array: line ",
    "Invalid control character at: line ",
    "Unterminated string starting at: line ",
    "Extra data: line ",
    " column ",
    " (char ",
  ]
  return whole + pieces
