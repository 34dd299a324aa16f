"""The wire format of POST /v1/chat/completions: requests in, replies out.  Host, no jax.

  body --parse--> Request(messages, pictures, wishes) ... reply | pieces of a stream

What is wrong raises `RequestError` with its HTTP status.  Pictures come as data: URIs of
any format PIL reads (the type that a URI claims is not believed), several in a message; a
clip as the list of its frames, or as a data: URI of a file.  What others write is never a
control token.  With operations the reply's `content` is the bare answer, and all that led
to it stands in `reasoning_content`.
"""

import base64
import binascii
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from pixel_jax import answers
from pixel_jax.chat import encode, template, tools
from pixel_jax.pixels import image, video
from pixel_jax.trajectory import Media, Task, Trajectory

NO_ANSWER = "(no answer)"  # clients take an empty content for an error
MOST_PICTURES = 256
# Of all pictures of a request, 3 bytes each: four of 8K.  A small PNG may hold that many.
MOST_PIXELS = 128 << 20
# Fields that would change what is sampled and that we do not have, and their neutral value.
WITHOUT = {
  "tools": None, "functions": None, "tool_choice": "none", "logit_bias": None,
  "presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1,
  "response_format": {"type": "text"},
}  # fmt: skip


class RequestError(ValueError):
  """A request that is not served, as the client is told."""

  def __init__(self, text: str, *, status: int = 400, field: str | None = None):
    super().__init__(text)
    self.status, self.field = status, field

  def body(self) -> dict[str, Any]:
    kind = "invalid_request_error" if self.status < 500 else "server_error"
    return {
      "error": {"message": str(self), "type": kind, "param": self.field, "code": None}
    }


@dataclasses.dataclass(frozen=True)
class Request:
  """What a client wants.

  Attributes:
    messages: of `chat/template.py`; pictures stand where they were.
    pictures: of all messages, in order.
    max_tokens: None = as many as fit.
    seed: None = another one every time.
    logprobs: whether the log-prob of every token is told.
    usage: whether a stream ends with the counts.
  """

  messages: list[dict[str, Any]]
  pictures: list[Image.Image | video.Video]
  model: str
  temperature: float = 1.0
  top_p: float = 1.0
  top_k: int = 0
  max_tokens: int | None = None
  stop: tuple[str, ...] = ()
  n: int = 1
  seed: int | None = None
  stream: bool = False
  logprobs: bool = False
  usage: bool = False


def parse(body: Any, fetch: Callable[[str], bytes], num_frames: int) -> Request:
  """The request of a JSON body.

  Args:
    fetch: the bytes behind an https address, or `RequestError`.
    num_frames: of a clip that comes as a file.
  """
  if not isinstance(body, dict):
    raise RequestError("the body is no JSON object")
  for field, neutral in WITHOUT.items():
    given = body.get(field)
    if given not in (None, neutral, [], {}) and given != "auto":
      raise RequestError(
        f"{field} is not supported here; leave it out"
        + (", the server runs its own operations" if field == "tools" else ""),
        field=field,
      )
  messages, pictures = _messages(body.get("messages"), fetch, num_frames)
  limit = body.get("max_completion_tokens", body.get("max_tokens"))
  stop = body.get("stop") or ()
  stop = (stop,) if isinstance(stop, str) else tuple(stop)
  if not all(isinstance(s, str) and s for s in stop) or len(stop) > 16:
    raise RequestError("stop is a text, or a list of up to 16 of them", field="stop")
  options = body.get("stream_options") or {}
  return Request(
    messages,
    pictures,
    model=str(body.get("model", "")),
    temperature=_number(body, "temperature", 1.0, 0.0, 100.0),
    top_p=_number(body, "top_p", 1.0, 1e-6, 1.0),
    top_k=max(0, int(_number(body, "top_k", 0, -1, 1e9))),
    max_tokens=None if limit is None else _whole(limit, "max_tokens", 1),
    stop=stop,
    n=_whole(body.get("n") or 1, "n", 1),
    seed=None if body.get("seed") is None else _whole(body["seed"], "seed", -(2**63)),
    stream=bool(body.get("stream")),
    logprobs=bool(body.get("logprobs")),
    usage=bool(isinstance(options, dict) and options.get("include_usage")),
  )


def _number(body, field: str, default, low: float, high: float) -> float:
  x = default if body.get(field) is None else body[field]
  is_number = isinstance(x, int | float) and not isinstance(x, bool)
  if not is_number or not math.isfinite(x) or not low <= x <= high:
    raise RequestError(
      f"{field}={x!r:.60}; a number from {low:g} to {high:g}", field=field
    )
  return x


def _whole(x: Any, field: str, low: int) -> int:
  if isinstance(x, bool) or not isinstance(x, int | float) or x != x or x < low:
    raise RequestError(f"{field}={x!r:.60}; a whole number from {low}", field=field)
  return int(min(x, 2**63 - 1))


# ---- Messages ------------------------------------------------------------------------

ROLES = {
  "system": "system", "developer": "system", "user": "user", "assistant": "assistant",
}  # fmt: skip


def _messages(given: Any, fetch, num_frames: int) -> tuple[list[dict], list]:
  if not isinstance(given, list) or not given:
    raise RequestError("messages is a list of at least one", field="messages")
  messages, pictures, room = [], [], MOST_PIXELS
  for i, message in enumerate(given):
    message = message if isinstance(message, dict) else {}
    role = ROLES.get(str(message.get("role")))
    if role is None:
      raise RequestError(
        f"messages[{i}] has the role {message.get('role')!r:.40}; allowed are "
        f"{', '.join(ROLES)}",
        field="messages",
      )
    content = message.get("content")
    items = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(items, list):
      raise RequestError(f"messages[{i}].content is text or a list", field="messages")
    parts = []
    for j, item in enumerate(items):
      part, picture = _item(item, f"messages[{i}].content[{j}]", fetch, num_frames)
      parts.append(part)
      if picture is not None:
        if role != "user":
          raise RequestError(f"messages[{i}]: only the user shows pictures")
        pictures.append(picture)
        room -= pixels(picture)
        if room < 0 or len(pictures) > MOST_PICTURES:
          raise RequestError(
            f"too many pictures: allowed are {MOST_PICTURES} of {MOST_PIXELS} pixels in "
            "all; send smaller ones",
            field="messages",
          )
    messages.append({"role": role, "content": parts})
  if any(m["role"] == "system" for m in messages[1:]):
    raise RequestError("a message of the system comes first", field="messages")
  if messages[-1]["role"] != "user":
    raise RequestError("the last message is the user's", field="messages")
  return messages, pictures


def pixels(picture: Image.Image | video.Video) -> int:
  """Of a picture, or of all frames of a clip."""
  frames = picture.frames if isinstance(picture, video.Video) else [picture]
  return sum(frame.width * frame.height for frame in frames)


def _item(item: Any, place: str, fetch, num_frames: int) -> tuple[dict, Any]:
  kind = item.get("type") if isinstance(item, dict) else None
  if kind == "text" and isinstance(item.get("text"), str):
    return {"type": "text", "text": item["text"], "foreign": True}, None
  try:
    if kind == "image_url":
      return {"type": "image"}, image.load_image(_bytes(item["image_url"], fetch))
    if kind in ("video", "video_url"):
      frames = item[kind]
      if isinstance(frames, list):
        source = [_bytes(frame, fetch) for frame in frames]
      else:
        source = _bytes(frames, fetch)
      return {"type": "video"}, video.read_video(source, num_frames=num_frames)
  except (image.ImageError, video.VideoError, KeyError, TypeError) as error:
    raise RequestError(f"{place}: {error}", field="messages") from error
  raise RequestError(
    f"{place} is of the type {kind!r:.40}; allowed are text, image_url, and video or "
    "video_url",
    field="messages",
  )


def _bytes(given: Any, fetch) -> bytes:
  url = given.get("url") if isinstance(given, dict) else given
  if not isinstance(url, str):
    raise RequestError("a picture is {'url': 'data:...'}", field="messages")
  if url.startswith("https://"):
    return fetch(url)
  head, found, data = url.partition("base64,")
  if not url.startswith("data:") or not found or len(head) > 256:
    raise RequestError(
      f"a picture is a data: URI with base64, not {url[:40]!r}", field="messages"
    )
  try:
    return base64.b64decode("".join(data.split()), validate=True)
  except (binascii.Error, ValueError) as error:
    raise RequestError(f"a picture's base64: {error}", field="messages") from error


# ---- The conversation ----------------------------------------------------------------


def conversation(request: Request, codec: encode.Codec) -> encode.Conversation:
  """What the model is shown; with the codec's tools the operations are told to it."""
  messages, kinds = [*request.messages], []
  if codec.tools:
    messages = _with_operations(messages, codec)
  for picture in request.pictures:
    kinds.append("video" if isinstance(picture, video.Video) else "image")
  media = [Media(kind, f"request:{i}") for i, kind in enumerate(kinds)]
  shown = {m.path: picture for m, picture in zip(media, request.pictures)}
  question = template.render(template.content(messages[-1]))
  task = Task("request", question, "", media)
  return encode.Conversation(codec, task, lambda m: shown[m.path], messages=messages)


def _with_operations(messages: list[dict], codec: encode.Codec) -> list[dict]:
  """The system's turn declares them, and the last question has the profile's hint."""
  ours = tools.system_prompt(codec.profile, True, codec.operations)
  own = [{"type": "text", "text": ours}]
  if messages[0]["role"] == "system":
    rest = ours.removeprefix(template.SYSTEM)
    own = [*messages[0]["content"], {"type": "text", "text": rest}]
    messages = messages[1:]
  hint = {"type": "text", "text": tools.user_suffix(codec.profile, True)}
  last = {"role": "user", "content": [*messages[-1]["content"], hint]}
  return [{"role": "system", "content": own}, *messages[:-1], last]


# ---- Replies -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Choice:
  """One finished reply."""

  content: str
  reasoning: str | None  # with operations
  finish: str  # "stop" or "length"
  tokens: list[tuple[str, float]]  # of the content, with their log-probs
  sampled: int  # tokens in all


def choice(
  trajectory: Trajectory, codec: encode.Codec, request: Request, cut: str | None = None
) -> Choice:
  """What a client is told of a trajectory.

  Args:
    cut: without operations, the text up to a stop of the request, where it came to one.
  """
  t = trajectory
  own = [(i, p) for i, p, sampled in zip(t.ids, t.logp, t.sampled) if sampled]
  words, text = codec.tokenizer, trajectory.turns[-1]["text"]
  finish = "stop" if t.stop == "answer" or cut is not None else "length"
  if not codec.tools:
    if cut is not None:
      text = cut
    tokens = [(words.decode([i]), p) for i, p in own if i != words.im_end]
    return Choice(text or NO_ANSWER, None, finish, tokens, len(own))
  content = answers.extract(text) or NO_ANSWER
  for stop in request.stop:  # of what is shown, as the limit below
    content = content.partition(stop)[0]
  if request.max_tokens is not None:  # the limit is of what is shown
    ids = words.encode(content, control=False)
    if len(ids) > request.max_tokens:
      content, finish = words.decode(ids[: request.max_tokens]), "length"
  return Choice(content or NO_ANSWER, reasoning(trajectory.turns), finish, [], len(own))


def reasoning(turns: Sequence[Mapping[str, str]]) -> str:
  """All turns behind the question, calls and what they returned."""
  last = max(
    (
      i for i, t in enumerate(turns) if t["role"] == "user" and not _is_result(turns, i)
    ),
    default=0,
  )
  return "\n".join(t["text"].strip("\n") for t in turns[last + 1 :])


def _is_result(turns, i: int) -> bool:
  """Whether a turn of the user is what an operation returned."""
  before = turns[i - 1] if i else {"role": "", "text": ""}
  return before["role"] == "assistant" and before["text"].rstrip().endswith(tools.CLOSE)


def reply(
  name: str, model: str, choices: Sequence[Choice], prompt: int, logprobs: bool
) -> dict[str, Any]:
  """The body of a reply that comes at once."""
  return {
    "id": name,
    "object": "chat.completion",
    "created": int(time.time()),
    "model": model,
    "choices": [
      {
        "index": i,
        "message": _message(c),
        "finish_reason": c.finish,
        "logprobs": _logprobs(c.tokens) if logprobs else None,
      }
      for i, c in enumerate(choices)
    ],
    "usage": usage(choices, prompt),
  }


def _message(c: Choice) -> dict[str, Any]:
  message = {"role": "assistant", "content": c.content, "refusal": None}
  return (
    message if c.reasoning is None else message | {"reasoning_content": c.reasoning}
  )


def _logprobs(tokens: Sequence[tuple[str, float]]) -> dict[str, Any]:
  """Of the sampled tokens; others are not known, so `top_logprobs` is empty."""
  return {
    "content": [
      {"token": t, "logprob": p, "bytes": [*t.encode()], "top_logprobs": []}
      for t, p in tokens
    ],
    "refusal": None,
  }


def usage(choices: Sequence[Choice], prompt: int) -> dict[str, Any]:
  sampled = sum(c.sampled for c in choices)
  thought = sum(c.sampled for c in choices if c.reasoning is not None)
  return {
    "prompt_tokens": prompt,
    "completion_tokens": sampled,
    "total_tokens": prompt + sampled,
    "completion_tokens_details": {"reasoning_tokens": thought},
  }


def piece(
  name: str, model: str, index: int, delta: dict[str, Any], finish: str | None = None
) -> dict[str, Any]:
  """A piece of a stream."""
  one = {"index": index, "delta": delta, "finish_reason": finish, "logprobs": None}
  return {
    "id": name, "object": "chat.completion.chunk", "created": int(time.time()),
    "model": model, "choices": [one],
  }  # fmt: skip


class Text:
  """The text of a turn that grows by ids: what may be shown of it so far.

  Held back are half characters, and what may become one of the stops.
  """

  def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()):
    self._decode, self._stops = decode, stops
    self._ids: list[int] = []
    self._sent = 0
    self.stopped: str | None = None  # the text before a stop

  def add(self, ids: Sequence[int]) -> str:
    """What is new since the last call."""
    self._ids += ids
    text = template.without_end(self._decode(self._ids))
    found = [at for s in self._stops if (at := text.find(s)) >= 0]
    if found:
      self.stopped = text[: min(found)]
      return self._new(len(self.stopped), self.stopped)
    end = len(text.rstrip("\ufffd"))
    for stop in self._stops:
      for n in range(min(len(stop) - 1, end), 0, -1):
        if text.endswith(stop[:n], 0, end):
          end = min(end, len(text) - n)
          break
    return self._new(end, text)

  def rest(self) -> str:
    """What was held back, when nothing more comes."""
    text = template.without_end(self._decode(self._ids))
    return self._new(len(text), text) if self.stopped is None else ""

  def _new(self, end: int, text: str) -> str:
    new = text[self._sent : end]
    self._sent = max(self._sent, end)
    return new
