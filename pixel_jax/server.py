"""The chat completions of OpenAI's API over the engines of this machine: an ASGI app.

  Server(services, codec, ...).app     POST /v1/chat/completions, GET /v1/models, ...

A request becomes a group of a service's session (`rollout/service.py`) and joins free slots
between two chunks.  When its client leaves, or has waited for the end of a body too long,
its slots are free; when too many wait, it is told when to come again.  The wire format is
`chat/completions.py`; flags and start are `serve.py`.
"""

import asyncio
import contextlib
import dataclasses
import functools
import hmac
import ipaddress
import json
import secrets
import socket
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route

from pixel_jax import hosting
from pixel_jax.chat import completions
from pixel_jax.chat.completions import RequestError
from pixel_jax.chat.encode import Codec
from pixel_jax.rollout import decode, fleet
from pixel_jax.rollout.engine import key_of
from pixel_jax.rollout.service import Busy, Service
from pixel_jax.rollout.session import Group

MOST_FETCHED = 32 << 20


@dataclasses.dataclass(frozen=True)
class Limits:
  """What one request may ask for."""

  max_turns: int = 5
  max_new_tokens: int = 2048  # of one turn; of a reply without operations, its limit
  samples: int = 8
  https: bool = False  # whether pictures are fetched
  key: str = ""  # "" = anyone


class Server:
  """The ASGI app over the services of this machine's engines."""

  def __init__(
    self, services: Sequence[Service], codec: Codec, *, name: str, limits: Limits
  ):
    self.services, self.codec = list(services), codec
    self.name, self.limits = name, limits
    self.counts = dict.fromkeys(("requests", "rejected", "failed", "cancelled"), 0)
    self.tokens = {"prompt": 0, "sampled": 0}
    self.app = Starlette(
      routes=[
        Route("/v1/chat/completions", self.complete, methods=["POST"]),
        Route("/v1/models", self.models),
        Route("/health", self.health),
        Route("/metrics", self.metrics),
      ]
    )

  # ---- Small things ------------------------------------------------------------------

  async def models(self, request: Request):
    if (refused := self._refuse_key(request)) is not None:
      return refused
    one = {"id": self.name, "object": "model", "created": 0, "owned_by": "pixel_jax"}
    return JSONResponse({"object": "list", "data": [one]})

  async def health(self, request: Request):
    fine = all(s.alive for s in self.services)
    return JSONResponse(
      {"status": "ok" if fine else "failed", "model": self.name},
      status_code=200 if fine else 503,
    )

  async def metrics(self, request: Request):
    """Prometheus' text format."""
    lines = []

    def tell(name: str, kind: str, told: str, value: float) -> None:
      lines.append(f"# HELP pixel_jax_{name} {told}\n# TYPE pixel_jax_{name} {kind}")
      lines.append(f"pixel_jax_{name} {value:g}")

    for what, n in self.counts.items():
      tell(f"{what}_total", "counter", f"Requests: {what}.", n)
    for what, n in self.tokens.items():
      tell(f"{what}_tokens_total", "counter", f"Tokens: {what}.", n)
    load = sum(s.load for s in self.services)
    slots = sum(s.engine.slots for s in self.services)
    tell("load", "gauge", "Requests that wait or play.", load)
    tell("slots", "gauge", "Conversations that play at once.", slots)
    failures = sum(s.failures for s in self.services)
    tell("engine_failures_total", "counter", "Sessions that were given up.", failures)
    for key, n in sorted(fleet.add_stats([s.stats for s in self.services]).items()):
      name = key.replace("/", "_")
      tell(name, "gauge", f"{key} of the engine's session.", n)
    return PlainTextResponse(
      "\n".join(lines) + "\n", media_type="text/plain; version=0.0.4"
    )

  def _refuse_key(self, request: Request):
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if self.limits.key and not hmac.compare_digest(
      given.encode(), self.limits.key.encode()
    ):
      error = RequestError("this server wants Authorization: Bearer KEY", status=401)
      return JSONResponse(error.body(), status_code=401)
    return None

  # ---- POST /v1/chat/completions -----------------------------------------------------

  async def complete(self, request: Request):
    self.counts["requests"] += 1
    if (refused := self._refuse_key(request)) is not None:
      self.counts["rejected"] += 1
      return refused
    try:
      if all(s.full for s in self.services):
        raise Busy  # before a body of 64 MB is read
      body = await hosting.read_body(request)
      asked = await run_in_threadpool(self._parse, body)
      del body
      play = Play(self, asked)
    except RequestError as error:
      self.counts["rejected"] += 1
      return JSONResponse(error.body(), status_code=error.status)
    except Busy:
      self.counts["rejected"] += 1
      wait = min(s.wait() for s in self.services)
      error = RequestError("too many requests wait; come again", status=429)
      after = {"Retry-After": str(round(wait))}
      return JSONResponse(error.body(), status_code=429, headers=after)
    except ClientDisconnect:
      self.counts["cancelled"] += 1
      return PlainTextResponse("", status_code=499)
    if asked.stream:
      return await self._stream(request, play)
    return await self._at_once(request, play)

  def _parse(self, body: bytes) -> completions.Request:
    try:
      parsed = json.loads(body)
    except (ValueError, RecursionError) as error:
      raise RequestError(f"the body is no JSON: {error}") from error
    fetch = functools.partial(_fetch, allowed=self.limits.https)
    asked = completions.parse(parsed, fetch, self.codec.video_frames)
    if asked.n > self.limits.samples:
      raise RequestError(f"n={asked.n}; allowed are {self.limits.samples}", field="n")
    return asked

  async def _at_once(self, request: Request, play: "Play"):
    """Waits for the reply, and for the client to leave."""
    whole = asyncio.ensure_future(play.whole())
    gone = asyncio.ensure_future(hosting.has_left(request))
    try:
      await asyncio.wait({whole, gone}, return_when=asyncio.FIRST_COMPLETED)
      if not whole.done():
        self.counts["cancelled"] += 1
        return PlainTextResponse("", status_code=499)
      return JSONResponse(whole.result())
    except RequestError as error:
      self._count(error)
      return JSONResponse(error.body(), status_code=error.status)
    finally:
      play.cancel()
      for task in (whole, gone):
        task.cancel()

  async def _stream(self, request: Request, play: "Play"):
    """Server-sent events; a request that fails at once is answered by its status."""
    pieces = play.pieces()
    try:
      head = await anext(pieces)
    except RequestError as error:
      self._count(error)
      play.cancel()
      return JSONResponse(error.body(), status_code=error.status)

    async def events() -> AsyncIterator[str]:
      try:
        yield f"data: {json.dumps(head)}\n\n"
        async for one in hosting.while_there(request, pieces):
          yield f"data: {json.dumps(one)}\n\n"
        if not play.over:
          return
      except RequestError as error:
        self._count(error)
        yield f"data: {json.dumps(error.body())}\n\n"
      finally:
        self.counts["cancelled"] += not play.over
        play.cancel()
      yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")

  def _count(self, error: RequestError) -> None:
    self.counts["failed" if error.status >= 500 else "rejected"] += 1


class Play:
  """One request on its way through an engine; `Busy` where that has no room."""

  def __init__(self, server: Server, asked: completions.Request):
    self.server, self.asked, self.codec = server, asked, server.codec
    self.name = f"chatcmpl-{secrets.token_hex(12)}"
    self.model = asked.model or server.name
    self.prompt = 0  # tokens
    self._events: asyncio.Queue = asyncio.Queue()
    self._loop = asyncio.get_running_loop()
    self.over = False
    # With operations stops are of the answer, which stands only at the end.
    self._stops = () if self.codec.tools else asked.stop
    limits = server.limits
    most = limits.max_new_tokens
    if not self.codec.tools and asked.max_tokens is not None:
      most = min(most, asked.max_tokens)
    seed = secrets.randbits(62) if asked.seed is None else asked.seed
    group = Group(
      prompt=functools.partial(completions.conversation, asked, self.codec),
      keys=[key_of(seed, 0, "request", i) for i in range(asked.n)],
      sampling=decode.Wish(asked.temperature, asked.top_p, asked.top_k).check(),
      script=[[] for _ in range(asked.n)],
      limits=dict(max_turns=limits.max_turns, max_new_tokens=most),
      ended=functools.partial(self._tell, "ended"),
      heard=self._heard if asked.stream or self._stops else None,
      failed=functools.partial(self._tell, "failed"),
    )
    self._service = min(server.services, key=lambda s: s.load)
    self._number = self._service.submit(group)

  def _tell(self, *event: Any) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
      self._loop.call_soon_threadsafe(self._events.put_nowait, event)

  def _heard(self, sample: int, ids: list[int], logp: list[float]) -> None:
    self._tell("heard", sample, ids)

  def cancel(self) -> None:
    """Frees its slots, if it has any."""
    if not self.over:
      self.over = True
      self._service.cancel(self._number)

  async def whole(self) -> dict[str, Any]:
    """The body of a reply that comes at once."""
    done = {i: choice async for kind, i, choice in self._follow() if kind == "choice"}
    choices = [done[i] for i in range(self.asked.n)]
    return completions.reply(
      self.name, self.model, choices, self.prompt, self.asked.logprobs
    )

  async def pieces(self) -> AsyncIterator[dict[str, Any]]:
    """The pieces of a stream."""
    piece = functools.partial(completions.piece, self.name, self.model)
    thinks, choices = self.codec.tools, []
    key = "reasoning_content" if thinks else "content"
    said = [0] * self.asked.n
    opened = False
    async for kind, i, x in self._follow():
      if not opened:
        opened = True
        for j in range(self.asked.n):
          yield piece(j, {"role": "assistant", "content": ""})
      if kind == "text":
        said[i] += len(x)
        yield piece(i, {key: x})
      else:
        choices.append(x)
        if thinks or not said[i]:
          yield piece(i, {"content": x.content})
        yield piece(i, {}, x.finish)
    if self.asked.usage:
      told = completions.usage(choices, self.prompt)
      yield {**piece(0, {}), "choices": [], "usage": told}

  async def _follow(self) -> AsyncIterator[tuple[str, int, Any]]:
    """("text", sample, what is new) as it comes, ("choice", sample, Choice) at its end."""
    words, asked, left = self.codec.tokenizer, self.asked, set(range(self.asked.n))
    texts = [completions.Text(words.decode, self._stops) for _ in range(asked.n)]
    while left:
      kind, *event = await self._events.get()
      if kind == "failed":
        self.over = True
        raise _as_request_error(event[0])
      if kind == "heard":
        i, ids = event
        if i not in left:
          continue
        if new := texts[i].add(ids):
          yield "text", i, new
        if words.im_end in ids and self.codec.tools:  # another turn follows
          if rest := texts[i].rest():
            yield "text", i, rest
          texts[i] = completions.Text(words.decode)
        if texts[i].stopped is not None and asked.n == 1:
          self.cancel()
          left.discard(i)
          yield "choice", i, self._cut(texts[i])
        continue
      trajectory = event[0].trajectory
      i = trajectory.sample
      self.prompt = trajectory.sampled.index(True) if any(trajectory.sampled) else 0
      if not self.prompt:
        self.over = True
        raise RequestError(
          f"the conversation has {len(trajectory.ids)} tokens; there is room for "
          f"{self._service.engine.max_prompt} tokens and pictures of "
          f"{self._service.engine.patches} patches",
          field="messages",
        )
      if i not in left:
        continue
      left.discard(i)
      if asked.stream and texts[i].stopped is None and (rest := texts[i].rest()):
        yield "text", i, rest
      cut = texts[i].stopped
      choice = completions.choice(trajectory, self.codec, asked, cut)
      self.server.tokens["sampled"] += choice.sampled
      self.server.tokens["prompt"] += self.prompt
      yield "choice", i, choice
    self.over = True

  def _cut(self, text: completions.Text) -> completions.Choice:
    said = text.stopped or completions.NO_ANSWER
    count = len(self.codec.tokenizer.encode(said, control=False))
    return completions.Choice(said, None, "stop", [], count)


def _as_request_error(error: Exception) -> RequestError:
  if isinstance(error, RequestError):
    return error
  if isinstance(error, ValueError):  # of the conversation: a picture too narrow, say
    return RequestError(str(error))
  return RequestError(f"the engine failed: {type(error).__name__}", status=500)


# ---- What comes from outside ---------------------------------------------------------


def _fetch(url: str, *, allowed: bool) -> bytes:
  """A picture from the net, where that is allowed: https, public addresses, no detours."""
  if not allowed:
    raise RequestError(
      "this server fetches no pictures; send them as data: URIs (or start it with "
      "--https)",
      field="messages",
    )
  host = urllib.parse.urlsplit(url).hostname or ""
  try:
    found = {info[4][0] for info in socket.getaddrinfo(host, 443)}
    if not found or not all(ipaddress.ip_address(a).is_global for a in found):
      raise RequestError(f"{host} is not a public address", field="messages")
    opener = urllib.request.build_opener(_NoRedirect)
    with opener.open(url, timeout=20) as answer:
      data = answer.read(MOST_FETCHED + 1)
  except (OSError, ValueError, urllib.error.URLError) as error:
    if isinstance(error, RequestError):
      raise
    raise RequestError(f"{url[:200]}: {error}", field="messages") from error
  if len(data) > MOST_FETCHED:
    raise RequestError(f"{url[:200]}: more than {MOST_FETCHED >> 20} MB")
  return data


class _NoRedirect(urllib.request.HTTPRedirectHandler):
  def redirect_request(self, *args, **kwargs):
    return None  # what it leads to was not looked at
