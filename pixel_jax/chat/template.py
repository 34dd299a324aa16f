"""Qwen2.5-VL's chat template as text: messages in, the parts of the prompt out.

Messages are those of HF's `apply_chat_template`: {"role", "content"}, the content a
string or a list of {"type": "text", "text"}, {"type": "image"}, {"type": "video"}.  The
text equals HF's rendering byte for byte (tests/golden/chat_renderings.json).  A picture
is one pad here; `encode` widens it.  No ids, no pixels.

  <|im_start|>system\\n...<|im_end|>\\n
  <|im_start|>user\\n<|vision_start|><|image_pad|><|vision_end|>question<|im_end|>\\n
  <|im_start|>assistant\\n
"""

from collections.abc import Iterable, Sequence
from typing import Any

from pixel_jax.chat.tokenizer import Part

SYSTEM = "You are a helpful assistant."
END = "<|im_end|>"
ENDS = (END, "<|endoftext|>")  # of a turn, as the model may sample it
GENERATION = "<|im_start|>assistant\n"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"

Message = dict[str, Any]


def head(role: str) -> str:
  return f"<|im_start|>{role}\n"


def content(message: Message) -> list[Part]:
  """What stands between a turn's head and its end.

  Control tokens count in the system's text, in pictures and in the assistant's turns;
  in all other text their letters are only letters, and so in a text of {"foreign": True}.
  """
  control = message["role"] in ("system", "assistant")
  if isinstance(message["content"], str):
    return [(message["content"], control)]
  parts = []
  for item in message["content"]:
    # The order and the tests are the template's: a text with a key "image" is an image.
    if item.get("type") == "image" or "image" in item or "image_url" in item:
      parts.append((IMAGE, True))
    elif item.get("type") == "video" or "video" in item:
      parts.append((VIDEO, True))
    elif "text" in item:
      parts.append((item["text"], control and not item.get("foreign")))
  return parts


def turn(message: Message) -> list[Part]:
  """One turn with its head and its end."""
  return [(head(message["role"]), True), *content(message), (END + "\n", True)]


def prompt(messages: Sequence[Message], *, generation: bool = True) -> list[Part]:
  """A whole conversation; the default system turn is added where none is given."""
  parts = []
  if messages and messages[0]["role"] != "system":
    parts += turn({"role": "system", "content": SYSTEM})
  for message in messages:
    parts += turn(message)
  return [*parts, (GENERATION, True)] if generation else parts


def render(parts: Iterable[Part]) -> str:
  return "".join(text for text, _ in parts)


def without_end(text: str) -> str:
  """A turn without the token that ended it."""
  for end in ENDS:
    text = text.removesuffix(end)
  return text
