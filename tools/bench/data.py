"""What `bench.py` measures on: sizes, drawn examples, questions, one script of rollouts.

Everything is a function of a seed; both sides of a benchmark are given the same.  Host
only: neither jax nor torch is used, though the model's config comes along.

  examples  log-normal lengths, pictures in most of them, 60 % of the tokens not learned
  script    turns of a rollout as forced ids: 1-6 of them, log-normal lengths, a crop of
            a real box at the end of each but the last (limits.md 6.1, at a quarter)
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from PIL import Image

from pixel_jax.chat import encode, template, tokenizer, tools
from pixel_jax.data import world
from pixel_jax.model import config as model_config
from pixel_jax.model.config import ModelConfig, TextConfig, VisionConfig
from pixel_jax.pixels import geometry, image
from pixel_jax.trajectory import Media, Task

TOKEN = 28 * 28  # pixels of one visual token
UNSUPERVISED = 0.6  # of the tokens of an example: system, question, pictures
TURNS = (0.15, 0.25, 0.20, 0.15, 0.15, 0.10)  # share of rollouts with 1 .. 6: mean 3.2
SIGMA = 0.8  # of the log of a turn's or an example's length
SPECIAL = 300  # ids from here on are drawn; below are bytes and control tokens


@dataclasses.dataclass(frozen=True)
class Size:
  """A model and how much of everything it is measured on."""

  model: str
  rows: tuple[int, int, int]  # same rows: B, T, tokens of the picture in each
  images: tuple[int, int]  # vision: pictures, patches of each
  examples: int  # same data
  mean: int  # tokens of an example
  row: tuple[int, int, int]  # packed: rows of a step, T, P
  batch: int  # examples of a padded step
  groups: tuple[int, int]  # rollout: questions, samples of each
  image: int  # tokens of a question's picture
  crop: int
  turn: int  # mean tokens of a turn
  longest: int
  engine: dict  # of the rollout; max_len, prompt_len and patches follow from the script
  decode: tuple[int, int, int]  # batch, context, new tokens
  pictures: int  # preprocess: of 640 x 480 to 1280 x 960


SIZES = {
  "tiny": Size(
    "tiny", rows=(2, 64, 16), images=(2, 64), examples=12, mean=48, row=(2, 128, 256),
    batch=4, groups=(2, 3), image=9, crop=4, turn=20, longest=32,
    engine=dict(slots=4, extend_len=16, chunk=8), decode=(4, 32, 8), pictures=2,
  ),
  "30m": Size(
    "30m", rows=(4, 512, 144), images=(4, 1024), examples=64, mean=256,
    row=(2, 1024, 1152), batch=8, groups=(8, 8), image=256, crop=121, turn=44,
    longest=192, engine=dict(slots=16, extend_len=160, chunk=8, views=(512, 768, 1024)),
    decode=(16, 512, 64), pictures=8,
  ),
  "3b": Size(
    "3b", rows=(4, 4096, 1024), images=(8, 4096), examples=256, mean=1400,
    row=(4, 8192, 16384), batch=8, groups=(16, 8), image=1024, crop=512, turn=175,
    longest=1024, engine=dict(slots=64, extend_len=640, chunk=32),
    decode=(64, 2048, 128), pictures=16,
  ),
}  # fmt: skip
SIZES["7b"] = dataclasses.replace(SIZES["3b"], model="7b", rows=(2, 8192, 1024))


def model(size: Size, words: tokenizer.Tokenizer, **fields) -> ModelConfig:
  """The model of a size, with the ids of `words` where the rollout meets them."""
  fields |= ids(words)
  if size.model == "tiny":
    return model_config.tiny(1024, **fields)
  if size.model == "30m":
    # A sixth of the parameters in the tower, as the 3B; two periods of window blocks.
    vision = VisionConfig(
      width=192, depth=8, heads=3, mlp=512, out_width=384, fullatt=(3, 7)
    )
    text = TextConfig(
      vocab=8192, width=384, depth=12, heads=6, kv_heads=2, mlp=1024,
      mrope_section=(8, 12, 12),
    )  # fmt: skip
    return ModelConfig(vision, text, **fields)
  return dataclasses.replace(model_config.PRESETS[size.model], **fields)


def ids(words: tokenizer.Tokenizer) -> dict[str, int]:
  """The fields of a ModelConfig that name the control tokens."""
  return dict(
    image_token=words.image_pad, video_token=words.video_pad,
    vision_start=words.vision_start, vision_end=words.vision_end,
    bos_token=words.endoftext, eos_token=words.im_end,
  )  # fmt: skip


# ---- Pictures ------------------------------------------------------------------------


def noise(rng: np.random.Generator, height: int, width: int) -> geometry.Pixels:
  """A picture of random bytes, `height` x `width` visual tokens, laid out."""
  grid = (1, 2 * height, 2 * width)
  patches = rng.integers(0, 256, (4 * height * width, 1176), np.uint8)
  return geometry.lay_out(patches, grid)


def sides(tokens: int, aspect: float = 1.0) -> tuple[int, int]:
  """(height, width) of at most `tokens` visual tokens, about this aspect."""
  height = max(1, min(tokens, round((tokens / aspect) ** 0.5)))
  return height, max(1, tokens // height)


def photos(size: Size, seed: int = 0) -> list[Image.Image]:
  """Smooth pictures of the sizes that cameras and screens give."""
  rng = np.random.default_rng(seed)
  shapes = [(640, 480), (1024, 768), (1280, 720), (1280, 960)]
  return [_draw(rng, *shapes[i % len(shapes)]) for i in range(size.pictures)]


def _draw(rng: np.random.Generator, width: int, height: int) -> Image.Image:
  small = rng.integers(0, 256, (height // 16, width // 16, 3), np.uint8)
  return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


# ---- Examples ------------------------------------------------------------------------


def rows(size: Size, config: ModelConfig, seed: int = 0) -> list[encode.Example]:
  """Examples that fill a row each: a picture, then text, all of it learned."""
  rng = np.random.default_rng(seed)
  B, T, tokens = size.rows
  height, width = sides(tokens)
  return [example(rng, config, T, (height, width), learned=None) for _ in range(B)]


def examples(size: Size, config: ModelConfig, seed: int = 0) -> list[encode.Example]:
  """Log-normal lengths; seven in ten show a picture; 60 % of the tokens not learned."""
  rng = np.random.default_rng(seed)
  out = []
  for _ in range(size.examples):
    n = int(np.clip(length(rng, size.mean), 24, size.row[1]))
    learned = round(n * (1 - UNSUPERVISED))
    given, share = n - learned, rng.uniform(0.3, 0.9)
    picture = None
    if rng.random() < 0.7:
      most = min(given - 4, size.row[2] // 4)
      picture = sides(max(1, int(most * share)), rng.uniform(0.5, 2.0))
    out.append(example(rng, config, n, picture, learned))
  return out


def length(rng: np.random.Generator, mean: int) -> int:
  """A log-normal one."""
  return int(rng.lognormal(np.log(mean) - SIGMA**2 / 2, SIGMA))


def example(rng, config, n, picture, learned) -> encode.Example:
  """One text id, the picture (or None), text; the last `learned` tokens are targets."""
  low, high = min(SPECIAL, config.text.vocab // 2), config.text.vocab
  ids, position, vision = [int(rng.integers(low, high))], [(0, 0, 0)], []
  if picture is not None:
    pixels = noise(rng, *picture)
    where = geometry.image_positions(pixels.grid, 2, config.vision.merge)
    ids += [config.vision_start, *[config.image_token] * pixels.num_merged]
    position += [(1, 1, 1), *map(tuple, where.tolist())]
    vision = [(2, pixels)]
    ids.append(config.vision_end)
    position += [(geometry.next_position(where),) * 3]
  rest = n - len(ids)
  ids += rng.integers(low, high, rest).tolist()
  start = position[-1][0] + 1
  position += [(p, p, p) for p in range(start, start + rest)]
  # None: all text that follows the picture.
  learned = rest if learned is None else learned
  weight = np.zeros(n, np.float32)
  weight[n - learned :] = 1.0
  return encode.Example(
    tokens=np.array(ids, np.int32),
    position=np.array(position, np.int32),
    weight=weight,
    logp=np.zeros(n, np.float32),
    vision=vision,
  )


def learned(data: Sequence[encode.Example]) -> int:
  """Tokens with a loss."""
  return int(sum(e.weight.sum() for e in data))


# ---- Rollouts ------------------------------------------------------------------------

Turns = list[list[int]]
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def codec(size: Size, folder) -> encode.Codec:
  """The tiny world's tokenizer, and the pixel budgets of this size."""
  words = tokenizer.make_tiny(folder, world.scaffolds())
  exact = {"image": size.image * TOKEN, "crop": size.crop * TOKEN}
  budgets = {
    role: (exact.get(role, TOKEN),) * 2 for role in ("image", "video", "crop", "frame")
  }
  return encode.Codec(words, budgets=budgets)


def tasks(size: Size, seed: int = 0) -> list[Task]:
  """Questions of a few dozen letters about a picture each."""
  rng = np.random.default_rng((seed, 1))
  count = size.groups[0]
  texts = ["".join(rng.choice(list(LETTERS), 3 * size.turn)) for _ in range(count)]
  return [
    Task(f"bench{i}", text, "A", [Media("image", f"bench:{i}")])
    for i, text in enumerate(texts)
  ]


@functools.lru_cache(maxsize=64)
def _original(index: int, side: int) -> Image.Image:
  return _draw(np.random.default_rng((index, 2)), side, side)


def loader(size: Size):
  """`load_media`: originals with twice the side of the view, kept in memory."""
  side = 2 * 28 * int(size.image**0.5)
  return lambda media: _original(int(media.path.removeprefix("bench:")), side)


def script(
  size: Size, words: tokenizer.Tokenizer, *, equal: bool = False, seed: int = 0
) -> dict[tuple[str, int], Turns]:
  """(task, sample) -> the ids of each turn, the last one an answer.

  Args:
    equal: one turn of the mean length each; no calls.
  """
  rng = np.random.default_rng((seed, 3))
  out = {}
  for task in tasks(size, seed):
    for sample in range(size.groups[1]):
      count = 1 if equal else int(rng.choice(len(TURNS), p=TURNS)) + 1
      turns = []
      for turn in range(count):
        n = size.turn if equal else length(rng, size.turn)
        last = turn == count - 1
        end = r"\boxed{A}" if last else _crop(rng)
        end = words.encode(end + template.END)
        n = int(np.clip(n, len(end) + 1, size.longest))
        thought = "".join(rng.choice(list(LETTERS), n - len(end)))
        turns.append(words.encode(thought)[: n - len(end)] + end)
      out[task.id, sample] = turns
  return out


def _crop(rng: np.random.Generator) -> str:
  """A call on the question's picture, a box of a quarter to half of each side."""
  steps = round(1 / world.GRID)
  width, height = rng.integers(steps // 4, steps // 2, 2)
  x, y = rng.integers(0, steps - width), rng.integers(0, steps - height)
  box = [round(float(c) * world.GRID, 2) for c in (x, y, x + width, y + height)]
  arguments = {"bbox_2d": box, "target_image": 1}
  return tools.call_text("crop_image_normalized", arguments)


# ---- For the other side --------------------------------------------------------------


def raster(pixels: geometry.Pixels) -> np.ndarray:
  """f32[P 1176]: what HF's image processor returns as pixel_values, bit for bit."""
  blocks = pixels.patches.reshape(pixels.num_merged, -1)[pixels.merged_row]
  return image.normalize(blocks.reshape(pixels.patches.shape))


def replay(
  size: Size, codec: encode.Codec, turns: dict[tuple[str, int], Turns]
) -> dict[tuple[str, int], encode.Conversation]:
  """What every rollout of the script must become, said on the host alone."""
  load_media, out = loader(size), {}
  for task in tasks(size):
    prompt = encode.Conversation(codec, task, load_media)
    for sample in range(size.groups[1]):
      conversation = prompt.fork(sample)
      for ids in turns[task.id, sample]:
        conversation.add_sampled(ids)
        if (observation := conversation.call_of_last_turn()) is None:
          break
        conversation.observe(observation)
      out[task.id, sample] = conversation
  return out
