"""The teacher: requests to a model that writes, many at once, each answered once.

`Teacher.ask(request)` finds the reply in the journal, or sends the request: retries
with exponential backoff and jitter, waits as long as the server says, keeps a rate, a
number of requests at once, and a budget in tokens that is never exceeded, since the
worst that a request can cost is set aside before it leaves.  `endpoint(...)` speaks to
anything with OpenAI's chat completions; whatever else can complete a request (a local
checkpoint) may stand in its place.  Not here: what is asked and what a reply means.

  ask --known--> Reply                         Exhausted   the budget has no room
      --send---> Reply | Again (429, 500, cut) Unanswered  so many attempts, no reply
                       | Declined (400)        Fatal       a wrong key: ends the run

The order in which replies come changes nothing but the time that it takes.
"""

import asyncio
import base64
import collections
import contextlib
import dataclasses
import email.utils
import functools
import hashlib
import io
import json
import math
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from absl import logging
from PIL import Image

from pixel_jax import fields
from pixel_jax.fields import (
  NonNegativeFloat,
  NonNegativeInt,
  PositiveFloat,
  PositiveInt,
)
from pixel_jax.pixels import image
from pixel_jax.synthesis.journal import Journal, Reply

# What a teacher sees of a picture: no less than a crop that a person could read, no
# more than 2048 tokens of Qwen2.5-VL (GPT-4o makes about 1,100 of any large picture).
VIEW = dict(min_pixels=224 * 224, max_pixels=2048 * 784)
LONGEST = 600.0  # seconds that a server may ask us to wait
MAX_TEXT = 20_000  # characters of a reply; more is no answer to what we ask


class TeacherError(ValueError):
  """A teacher that cannot be used at all: the key, the model, the quota."""


class Fatal(TeacherError):
  """No request will succeed; the run ends."""


class Exhausted(Exception):
  """The request does not fit what is left of the budget."""


class Unanswered(Exception):
  """Every attempt failed; another day it may not."""


class Declined(Exception):
  """The server answers that it will not take this request (400, 413, 422)."""


class Again(Exception):
  """One attempt failed in a way that passes."""

  def __init__(self, cause: str, after: float | None = None, billed: bool = False):
    super().__init__(cause)
    self.cause = cause
    self.after = after  # seconds that the server asks for
    self.billed = billed  # it may have been: the answer was lost on its way


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
  """One question to a teacher.  `take` counts the times that it is asked anew."""

  system: str
  text: str
  pictures: Sequence[Image.Image] = ()
  max_tokens: int = 600
  temperature: float = 0.7
  take: int = 0

  @functools.cached_property
  def views(self) -> list[Image.Image]:
    return [image.resize(picture, **VIEW) for picture in self.pictures]

  def key(self, model: str) -> str:
    """A hash of all that the reply depends on; of pixels, not of files."""
    pictures = [
      [*p.size, p.mode, hashlib.blake2b(p.tobytes(), digest_size=16).hexdigest()]
      for p in self.pictures
    ]
    content = [1, model, self.system, self.text, pictures, VIEW]
    content += [self.max_tokens, self.temperature, self.take]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=20).hexdigest()

  def messages(self) -> list[dict]:
    """As OpenAI's chat completions take them: the pictures, then the text."""
    pictures = [
      {"type": "image_url", "image_url": {"url": data_url(view)}} for view in self.views
    ]
    return [
      {"role": "system", "content": self.system},
      {"role": "user", "content": [*pictures, {"type": "text", "text": self.text}]},
    ]


Complete = Callable[[Request], Awaitable[Reply]]


def data_url(picture: Image.Image) -> str:
  file = io.BytesIO()
  picture.save(file, "JPEG", quality=95, subsampling=0)
  return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


class Teacher:
  """Asks; all limits in one place.

  Args:
    complete: sends one request: a Reply, or raises Again or Fatal.
    model: its name, part of every key.
    concurrency: requests under way at once.
    requests_per_minute: 0 = as many as there are.
    budget: tokens, prompt and reply, of all runs of this journal.
    attempts: for one request.
    first_wait, longest_wait: seconds of backoff; a wait that the server asks for is
      kept instead, and then by everyone.
    image_tokens: set aside for each picture until its cost is known.
  """

  @fields.checked
  def __init__(
    self,
    complete: Complete,
    journal: Journal,
    *,
    model: str,
    concurrency: PositiveInt = 16,
    requests_per_minute: NonNegativeFloat = 0.0,
    budget: PositiveInt = 10_000_000,
    attempts: PositiveInt = 8,
    first_wait: PositiveFloat = 1.0,
    longest_wait: PositiveFloat = 60.0,
    image_tokens: NonNegativeInt = 2500,
  ):
    if first_wait > longest_wait:
      raise ValueError(f"{first_wait=} seconds are more than {longest_wait=}")
    self.model, self.journal = model, journal
    self.concurrency, self.attempts, self.budget = concurrency, attempts, budget
    self.stats: collections.Counter[str] = collections.Counter()
    self._complete = complete
    self._waits = (first_wait, longest_wait)
    self._image_tokens = image_tokens
    self._every = 60.0 / requests_per_minute if requests_per_minute else 0.0
    self._places = asyncio.Semaphore(concurrency)
    self._settled = asyncio.Condition()  # a request that was under way is over
    self._reserved = 0  # tokens of the requests under way
    self._scale = 1.0  # what a prompt cost over what we thought, at worst
    self._next = 0.0  # when the rate allows another request
    self._pause = 0.0  # until when the server wants silence
    self._asking: dict[str, asyncio.Future[Reply]] = {}
    self._fatal: Fatal | None = None

  async def ask(self, request: Request) -> Reply:
    """The reply to a request, from the journal where it was answered before."""
    key = await asyncio.to_thread(request.key, self.model)
    known = self.journal.get(key)
    if known is not None:
      self.stats["known"] += 1
      return known
    if key not in self._asking:  # of two who ask the same, one asks
      future = asyncio.ensure_future(self._ask(key, request))
      future.add_done_callback(lambda done: self._forget(key, done))
      self._asking[key] = future
    return await asyncio.shield(self._asking[key])

  def _forget(self, key: str, done: asyncio.Future) -> None:
    del self._asking[key]
    if not done.cancelled():
      done.exception()  # seen, also where those who asked are gone

  async def _ask(self, key: str, request: Request) -> Reply:
    last = ""
    for attempt in range(self.attempts):
      async with self._places:
        await self._pace()
        if self._fatal:
          raise self._fatal
        reserve = self._reserve(request)
        await self._afford(reserve)
        try:
          return await self._attempt(key, request, reserve)
        except Again as again:
          last = again.cause
          wait = self._backoff(attempt)
          if not self.stats[f"retry/{again.cause}"]:  # each cause is told once
            logging.warning(
              "the teacher: %s; asked again in %.0f s, %d times at most", last, wait,
              self.attempts - 1,
            )  # fmt: skip
          self.stats[f"retry/{again.cause}"] += 1
          if again.after is not None:
            wait = min(max(again.after, 0.0), LONGEST)
            self._pause = max(self._pause, time.monotonic() + wait)
        except Fatal as error:
          self._fatal = error
          raise
        finally:
          async with self._settled:
            self._reserved -= reserve
            self._settled.notify_all()
      await asyncio.sleep(wait)
    told = f"{self.attempts} attempts failed, the last by {last}"
    if not len(self.journal):
      self._fatal = Fatal(
        f"{told}, and the teacher has never answered; check OPENAI_BASE_URL and "
        "config.teacher.model"
      )
      raise self._fatal
    raise Unanswered(told)

  async def _attempt(self, key: str, request: Request, reserve: int) -> Reply:
    self.journal.sent(key, reserve)
    self.stats["sent"] += 1
    try:
      reply = await self._complete(request)
    except Declined as error:
      if not len(self.journal):
        self.journal.failed(key, 0)
        raise Fatal(
          f"the teacher declined before it answered anything ({error}); check "
          "config.teacher, or leave this seed out"
        ) from error
      reply = Reply(None, refusal=str(error))
      self.journal.reply(key, reply)
      self.stats["declined"] += 1
      return reply
    except (Again, Fatal) as error:
      lost = isinstance(error, Again) and error.billed
      self.journal.failed(key, reserve if lost else 0)
      raise
    if not reply.tokens:  # a server that does not count: as if it had cost the most
      reply = dataclasses.replace(reply, prompt_tokens=reserve)
    else:
      thought = self._thought(request)
      self._scale = max(self._scale, reply.prompt_tokens / thought)
    self.journal.reply(key, reply)
    self.stats["answered"] += 1
    self.stats["prompt_tokens"] += reply.prompt_tokens
    self.stats["completion_tokens"] += reply.completion_tokens
    return reply

  # ---- Limits ------------------------------------------------------------------------

  def _thought(self, request: Request) -> int:
    """Tokens of a prompt, at most: no token is shorter than a byte."""
    text = len((request.system + request.text).encode("utf-8", "replace"))
    return text + 50 + self._image_tokens * len(request.pictures)

  def _reserve(self, request: Request) -> int:
    return math.ceil(self._thought(request) * self._scale) + request.max_tokens

  async def _afford(self, reserve: int) -> None:
    """Sets tokens aside; waits while requests under way may turn out cheaper."""
    async with self._settled:
      while self.journal.spent + self._reserved + reserve > self.budget:
        if not self._reserved:
          raise Exhausted(
            f"{self.journal.spent} of {self.budget} tokens are spent, and this request "
            f"may need {reserve}"
          )
        await self._settled.wait()
      self._reserved += reserve

  async def _pace(self) -> None:
    """Waits for the rate's next place, and for the end of a pause."""
    at = max(time.monotonic(), self._next)
    self._next = at + self._every
    while (wait := max(at, self._pause) - time.monotonic()) > 0:
      await asyncio.sleep(wait)

  def _backoff(self, attempt: int) -> float:
    first, longest = self._waits
    # Half of it by chance, so that those who failed together do not return together.
    return min(first * 2.0**attempt, longest) * random.uniform(0.5, 1.0)


# ---- Endpoints -----------------------------------------------------------------------


@contextlib.asynccontextmanager
async def endpoint(
  model: str, *, timeout: PositiveFloat = 120.0, json_mode: bool = True
) -> AsyncIterator[Complete]:
  """Chat completions of an OpenAI-compatible server; open while in `async with`.

  Where it is and the key come from the environment alone: OPENAI_BASE_URL,
  OPENAI_API_KEY.  Neither is printed, nor stored.

  Args:
    timeout: seconds for one attempt.
    json_mode: ask the server for JSON; some know no `response_format`.
  """
  try:
    import openai  # an extra: only synthesis needs it
  except ImportError as error:
    raise TeacherError(
      "an endpoint as the teacher needs openai: pip install 'pixel_jax[synthesis]'"
    ) from error
  key = os.environ.get("OPENAI_API_KEY", "")
  if not key:
    raise TeacherError(
      "the environment has no OPENAI_API_KEY; set it (any word does for a server of "
      "your own) and, for another server than OpenAI's, OPENAI_BASE_URL"
    )
  # Retries are ours: theirs are not in the journal.
  client = openai.AsyncOpenAI(max_retries=0, timeout=timeout)
  more = {"response_format": {"type": "json_object"}} if json_mode else {}

  def told(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}"
    # Any word does for a server of your own; a short one is no secret, and in every text.
    return (text.replace(key, "***") if len(key) >= 8 else text)[:400]

  async def complete(request: Request) -> Reply:
    messages = await asyncio.to_thread(request.messages)
    try:
      completion = await client.chat.completions.create(
        model=model,
        messages=messages,
        max_completion_tokens=request.max_tokens,
        temperature=request.temperature,
        seed=request.take,
        **more,
      )
    except openai.APITimeoutError as error:
      raise Again("timeout", billed=True) from error
    except openai.APIConnectionError as error:
      raise Again("connection", billed=True) from error
    except openai.APIStatusError as error:
      raise _refused(error, told(error)) from error
    except ValueError as error:  # JSON that ends in the middle
      raise Again("cut off", billed=True) from error
    if not hasattr(completion, "choices"):  # a page for people, say
      raise Again(f"no chat completion but {str(completion)[:40]!r}")
    return read(completion)

  async with client:
    yield complete


def _refused(error, told: str) -> Exception:
  """Whether an HTTP error means to wait, to give up this request, or to end the run."""
  status, code = error.status_code, str(getattr(error, "code", "") or "")
  if code == "insufficient_quota":
    return Fatal(f"the teacher's account has no quota left ({told})")
  if status in (408, 409, 429) or status >= 500:
    return Again(str(status), retry_after(error.response.headers))
  if status in (401, 403, 404):
    return Fatal(
      f"the teacher refuses requests ({told}); check OPENAI_API_KEY, OPENAI_BASE_URL and "
      "config.teacher.model"
    )
  return Declined(told)


def retry_after(headers) -> float | None:
  """Seconds of a Retry-After: a number, or a date; None where it says nothing."""
  value = headers.get("retry-after")
  if not value:
    return None
  try:
    seconds = float(value)
  except ValueError:
    try:
      seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except ValueError:
      return None
  return max(seconds, 0.0) if math.isfinite(seconds) else None


def read(completion) -> Reply:
  """The reply in a completion, whatever it is: servers differ, and the client checks
  no types."""
  choices = getattr(completion, "choices", None)
  choice = choices[0] if isinstance(choices, list) and choices else None
  message = getattr(choice, "message", None)
  text, refusal = (getattr(message, k, None) for k in ("content", "refusal"))
  if getattr(choice, "finish_reason", None) == "content_filter":
    refusal = refusal or "content_filter"
  usage = getattr(completion, "usage", None)
  tokens = [getattr(usage, f"{k}_tokens", 0) for k in ("prompt", "completion")]
  if not all(isinstance(n, int) and 0 <= n < 1 << 31 for n in tokens):
    tokens = [0, 0]
  if isinstance(refusal, str) and refusal:
    return Reply(None, _clean(refusal)[:400], *tokens)
  usable = isinstance(text, str) and len(text) <= MAX_TEXT
  return Reply(_clean(text) if usable else None, "", *tokens)


def _clean(text: str) -> str:
  return text.encode("utf-8", "replace").decode()
