"""Questions for the tests of the rollout: a tiny tokenizer, noise pictures, scripts."""

import dataclasses

import numpy as np
from PIL import Image

from pixel_jax.chat import encode, tokenizer, tools
from pixel_jax.trajectory import Media, Task

BUDGETS = dict(
  image=(84 * 84, 84 * 84),
  video=(28 * 28, 28 * 28),
  crop=(56 * 56, 56 * 56),
  frame=(112 * 112, 112 * 112),
)
SCAFFOLDS = [
  tools.system_prompt("clean"),
  tools.user_suffix("clean"),
  "system\n",
  "user\n",
  "assistant\n",
  "<tool_call>\n",
  "\n</tool_call>",
  '{"name": "crop_image_normalized", "arguments": {"bbox_2d": [',
  '{"name": "select_frames", "arguments": {"target_frames": [',
  '], "target_image": 1}}',
  "]}}",
  "\nHere is the cropped image (Image Size: ",
  "\nHere are the selected frames (Frame Size: ",
  "\nExecution error:\n",
  "Which letter?",
  "\\boxed{",
]


@dataclasses.dataclass
class Video:
  frames: list
  seconds_per_frame: float = 1.0


def codec(path):
  words = tokenizer.make_tiny(path, SCAFFOLDS)
  return encode.Codec(words, budgets=BUDGETS, video_frames=8)


def task(index, video=False):
  media = Media("video" if video else "image", f"noise:{index}")
  return Task(f"q{index}", "Which letter?", "O", [media])


def load_media(media):
  rng = np.random.default_rng(int(media.path.removeprefix("noise:")))
  if media.kind == "image":
    return Image.fromarray(rng.integers(0, 256, (252, 252, 3), np.uint8))
  frames = rng.integers(0, 256, (8, 112, 112, 3), np.uint8)
  return Video([Image.fromarray(f) for f in frames])


def crop(box="0.12, 0.40, 0.28, 0.52", target=1):
  return (
    '<tool_call>\n{"name": "crop_image_normalized", "arguments": '
    f'{{"bbox_2d": [{box}], "target_image": {target}}}}}\n</tool_call><|im_end|>'
  )


def select(frames="3"):
  return (
    '<tool_call>\n{"name": "select_frames", "arguments": '
    f'{{"target_frames": [{frames}]}}}}\n</tool_call><|im_end|>'
  )


ANSWER = "\\boxed{O}<|im_end|>"


def replay(codec, task, turns):
  """What the conversation must be when the policy says `turns` (texts or ids)."""
  c = encode.Conversation(codec, task, load_media)
  for turn in turns:
    c.add_sampled(codec.tokenizer.encode(turn) if isinstance(turn, str) else turn)
    observation = c.call_of_last_turn()
    if observation is None:
      break
    c.observe(observation)
  return c
