"""A teacher on the loopback: OpenAI's chat completions over the tiny world, with faults.

It reads the pictures that it is sent (the letter on the red panel), so what it says is
true unless a fault makes it false.  Which fault a request meets is a function of its
content, so that two runs meet the same.

  python tests/teachers.py 8123        then OPENAI_BASE_URL=http://127.0.0.1:8123/v1
"""

import base64
import collections
import hashlib
import http.server
import io
import json
import sys
import threading
import time

import numpy as np
from PIL import Image

from pixel_jax.data import world

# Pass: the same request succeeds the second time.  Stay: the reply is what it is.
PASSING = ("429", "500", "cut body", "bad json", "hang up")
STAYING = (
  "cut reply", "refusal", "list", "number", "no choices", "no usage", "leak",
  "elsewhere", "wrong", "unseen", "protocol", "not an object",
)  # fmt: skip


class Loopback(http.server.ThreadingHTTPServer):
  """Use in `with`; `url` is its address.

  Args:
    passing, staying: shares of requests that meet such faults.
    delay: seconds that a reply takes; some take four times as long.
    never: faults that do not occur.
  """

  daemon_threads = True
  request_queue_size = 128

  def __init__(self, passing=0.0, staying=0.0, delay=0.0, never=(), port=0):
    super().__init__(("127.0.0.1", port), Handler)
    self.passing, self.staying, self.delay = passing, staying, delay
    self.kinds = [[f for f in kinds if f not in never] for kinds in (PASSING, STAYING)]
    self.lock = threading.Lock()
    self.asked = collections.Counter()  # every request, by content
    self.answered = collections.Counter()  # those that got a reply
    self.faults = collections.Counter()
    self.billed = self.now = self.most = 0  # tokens; requests at once
    self.times: list[float] = []
    self.page = ""  # for people, in place of every reply

  def __enter__(self):
    # Server and client share this process: at the usual 5 ms, each piece that is sent
    # waits for its turn behind 16 busy threads.
    self._interval = sys.getswitchinterval()
    sys.setswitchinterval(2e-4)
    threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
    return self

  def __exit__(self, *_):
    self.shutdown()
    self.server_close()
    sys.setswitchinterval(self._interval)

  @property
  def url(self):
    return f"http://127.0.0.1:{self.server_port}/v1"

  def fault(self, key: str) -> tuple[str, str]:
    """The (passing, staying) faults of a request."""
    result = []
    for use, share, kinds in zip(
      "ps", (self.passing, self.staying), self.kinds, strict=True
    ):
      digest = hashlib.blake2b(f"{use}/{key}".encode(), digest_size=8).digest()
      point = int.from_bytes(digest, "big") / 2**64
      hit = kinds and point < share
      result.append(kinds[int(point / share * len(kinds))] if hit else "")
    return tuple(result)


class Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"

  def log_message(self, *_):
    pass

  def do_POST(self):
    server: Loopback = self.server
    body = self.rfile.read(int(self.headers["content-length"]))
    key = hashlib.blake2b(body, digest_size=16).hexdigest()
    with server.lock:
      server.asked[key] += 1
      server.times.append(time.monotonic())
      first = server.asked[key] == 1
      server.now += 1
      server.most = max(server.most, server.now)
    try:
      passing, staying = server.fault(key)
      time.sleep(server.delay * (4 if key[0] in "0123" else 1))
      if passing and first:
        server.faults[passing] += 1
        self.fail(passing)
        return
      if server.page:
        self.send(200, server.page.encode())
        return
      if staying:
        server.faults[staying] += 1
      reply, tokens = answer(json.loads(body), staying)
      with server.lock:
        server.billed += tokens
      self.send(200, json.dumps(reply).encode())
      with server.lock:
        server.answered[key] += 1
    except (BrokenPipeError, ConnectionResetError):
      pass  # the client was killed
    finally:
      with server.lock:
        server.now -= 1

  def fail(self, fault: str):
    good = json.dumps(completion("{}")).encode()
    if fault == "429":
      error = {"error": {"message": "slow down", "code": "rate_limit_exceeded"}}
      self.send(429, json.dumps(error).encode(), {"Retry-After": "0.2"})
    elif fault == "500":
      self.send(500, b"oops")
    elif fault == "cut body":
      self.send(200, good, cut=30)
    elif fault == "bad json":
      self.send(200, good[:-20])
    else:
      self.close_connection = True

  def send(self, status, body, headers=None, cut=None):
    self.send_response(status)
    kind = "text/html" if body.startswith(b"<") else "application/json"
    self.send_header("content-type", kind)
    self.send_header("content-length", str(len(body)))
    for name, value in (headers or {}).items():
      self.send_header(name, value)
    self.end_headers()
    self.wfile.write(body[:cut])
    self.wfile.flush()
    if cut is not None:
      self.close_connection = True


# ---- What it says --------------------------------------------------------------------


def completion(content, tokens=(0, 0), **message) -> dict:
  return {
    "id": "x",
    "object": "chat.completion",
    "created": 0,
    "model": "loopback",
    "choices": [
      {
        "index": 0,
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": content, **message},
      }
    ],
    "usage": {
      "prompt_tokens": tokens[0],
      "completion_tokens": tokens[1],
      "total_tokens": sum(tokens),
    },
  }


def answer(request: dict, fault: str) -> tuple[dict, int]:
  """The completion of a request, and what it costs."""
  parts = request["messages"][1]["content"]
  pictures = [open_url(p["image_url"]["url"]) for p in parts if "image_url" in p]
  text = parts[-1]["text"]
  said = reply(text, pictures, fault)
  content = json.dumps(said)
  tokens = (len(text) // 4 + 255 * len(pictures), len(content) // 4)
  made = completion(content, tokens)
  message = made["choices"][0]["message"]
  if fault == "cut reply":
    message["content"] = content[: len(content) // 2]
    made["choices"][0]["finish_reason"] = "length"
  elif fault == "refusal":
    message.update(content=None, refusal="I can't help with that.")
  elif fault == "list":
    message["content"] = [{"type": "text", "text": content}]
  elif fault == "number":
    message["content"] = 17
  elif fault == "no choices":
    made["choices"] = []
  elif fault == "no usage":
    made["usage"] = None
  elif fault == "not an object":
    message["content"] = json.dumps([said])[1:-1] and "[1, 2, 3]"
  return made, sum(tokens)


def reply(text: str, pictures: list[Image.Image], fault: str) -> dict:
  if '"valid"' in text:
    return proposal(pictures[0], fault)
  if '"query"' in text:
    return whole(pictures, "not where" not in text, fault)
  letter = read(pictures[0])
  if fault == "wrong":
    letter = next(a for a in world.LETTERS if a != letter)
  said = {"analysis": f"The red panel bears a black {letter}.", "answer": letter}
  options = [line for line in text.splitlines() if line[1:3] == ". "]
  if options:  # a choice: the letter of the option
    said["answer"] = next(o[0] for o in options if o.endswith(f"the {letter}"))
  if fault == "unseen":
    said["analysis"] = "The symbol is too small to be made out."
  if fault == "protocol":
    said["analysis"] += " <tool_call>{}</tool_call>"
  return said


def whole(pictures: list[Image.Image], place_allowed: bool, fault: str) -> dict:
  query = "the symbol on the red panel"
  if len(pictures) > 1:
    frame = 1 + int(np.argmax([red(p)[0].sum() for p in pictures]))
    if fault == "elsewhere":
      frame = frame % len(pictures) + 1
    place = f"in frame {frame}"
  else:
    x, y = red(pictures[0])[1]
    if fault == "elsewhere":
      x, y = 1 - x, 1 - y
    place = f"at the {'top' if y < 0.5 else 'bottom'} {'left' if x < 0.5 else 'right'}"
  place = f" {place}" if place_allowed or fault == "elsewhere" else ""
  said = f"There are panels in several colours, a red one{place}. Its symbol is tiny."
  if fault == "leak":
    letter = read(max(pictures, key=lambda p: red(p)[0].sum()))
    said += f" It is probably the letter {letter}."
  return {"analysis": said, "query": query}


def proposal(picture: Image.Image, fault: str) -> dict:
  if fault == "wrong":
    return {"valid": False}
  x, y = red(picture)[1]
  low = [min(max(v - 0.1, 0.0), 0.8) for v in (x, y)]
  letters = sorted(world.LETTERS)
  return {
    "valid": True,
    "bbox_2d": [*low, *(v + 0.2 for v in low)],
    "question": "Which symbol stands on the red panel?",
    "options": [f"the {a}" for a in letters],
    "answer": 1 + letters.index(read(picture, red_only=True)),
  }


def open_url(url: str) -> Image.Image:
  return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def red(picture: Image.Image) -> tuple[np.ndarray, tuple[float, float]]:
  """Where it is red, and the middle of that, as fractions."""
  r, g, b = np.moveaxis(np.asarray(picture.convert("RGB"), np.int32), 2, 0)
  mask = (r > 140) & (g < 90) & (b < 90)
  if not mask.any():
    return mask, (0.5, 0.5)
  y, x = np.nonzero(mask)
  h, w = mask.shape
  return mask, ((x.min() + x.max()) / 2 / w, (y.min() + y.max()) / 2 / h)


def read(picture: Image.Image, red_only: bool = True) -> str:
  """The black letter on the red panel, by the shape of what is dark there."""
  mask, _ = red(picture)
  y, x = np.nonzero(mask)
  part = picture.convert("L")
  if len(x):
    part = part.crop((x.min(), y.min(), x.max() + 1, y.max() + 1))
  dark = np.asarray(part) < 55
  y, x = np.nonzero(dark)
  if not len(x):
    return "O"
  glyph = part.crop((x.min(), y.min(), x.max() + 1, y.max() + 1))
  small = np.asarray(glyph.resize((5, 5), Image.Resampling.BOX)) < 60
  shapes = {a: np.array([[c == "#" for c in row] for row in world.BITMAPS[a]])
            for a in world.LETTERS}  # fmt: skip
  return max(shapes, key=lambda a: (shapes[a] == small).sum())


if __name__ == "__main__":
  with Loopback(
    passing=0.15, staying=0.15, delay=0.05, port=int(sys.argv[1])
  ) as server:
    print(server.url, flush=True)
    threading.Event().wait()
