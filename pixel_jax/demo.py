"""Ask the model about your pictures in a browser, and see where it looks.

  pixel-jax demo --checkpoint=DIR [--compare=OTHER] [--port=7860]
  python -m pixel_jax.demo --checkpoint=DIR ...    the same program

DIR is a workdir, a Hugging Face folder or what `pixel-jax convert` wrote; "tiny_base" is
the model of the tiny world, from which the page takes its examples.  With --compare two
policies answer side by side.  Questions go the way of `pixel-jax evaluate`: greedy, with
the checkpoint's own prompt and pixel budgets, until the page's sampling says otherwise.

Several people at once share the slots of the engine.  Pictures are held in memory alone,
those of the last answers so that their links open; nothing is written to disk.  It listens
on this machine unless --host says otherwise; whoever reaches the address may then ask.
"""

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import functools
import json
import pathlib
import secrets
import sys
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from pixel_jax import answers, hosting
from pixel_jax.chat import completions, encode
from pixel_jax.chat.completions import RequestError
from pixel_jax.data import world
from pixel_jax.pixels import video
from pixel_jax.rollout import decode
from pixel_jax.rollout.engine import key_of
from pixel_jax.rollout.service import Busy, Service
from pixel_jax.rollout.session import Group
from pixel_jax.run import metrics
from pixel_jax.trajectory import Media, Task, Trajectory
from pixel_jax.view import demo as pages
from pixel_jax.view import page
from pixel_jax.view import trajectory as view

MOST_SECONDS = 600  # of a clip: sixteen frames of more tell little of it
KEPT = 512 << 20  # bytes of the pictures of answers whose links still open
LOOPBACK = ["127.0.0.1", "localhost", "[::1]"]


@dataclasses.dataclass(frozen=True)
class Policy:
  """One of those that answer."""

  name: str
  services: Sequence[Service]
  codec: encode.Codec


@dataclasses.dataclass(frozen=True)
class Question:
  """What a visitor wants to know."""

  policy: Policy
  task: Task
  shown: dict[str, Image.Image | video.Video]  # by the names of the task's media
  wish: decode.Wish
  seed: int
  look: bool  # False: it can begin no operation, as evaluation's "forbidden"

  def load_media(self, media: Media) -> Image.Image | video.Video:
    return self.shown[media.path]


class Demo:
  """The app: the page, POST /ask, and the answers by their links."""

  def __init__(
    self,
    policies: Sequence[Policy],
    *,
    max_turns: int,
    max_new_tokens: int,
    hosts: list,
  ):
    self.policies = list(policies)
    self.limits = dict(max_turns=max_turns, max_new_tokens=max_new_tokens)
    self._kept: collections.OrderedDict[str, tuple] = collections.OrderedDict()
    names = [policy.name for policy in policies]
    self._page = pages.page(names, [_example(i) for i in EXAMPLES])
    self.app = Starlette(
      routes=[
        Route("/", self.page),
        Route("/demo.js", self.script),
        Route("/ask", self.ask, methods=["POST"]),
        Route("/trajectory/{key}", self.trajectory),
      ],
      # Else a page elsewhere could have its own name resolve to this machine.
      middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
    )

  async def page(self, request: Request) -> Response:
    return _html(self._page)

  async def script(self, request: Request) -> Response:
    return Response(pages.SCRIPT, media_type="text/javascript")

  async def trajectory(self, request: Request) -> Response:
    key = request.path_params["key"]
    if key not in self._kept:
      told = (
        "This answer is not kept any more: links hold until newer ones need the room."
      )
      return _html(pages.gone(told), status=404)
    question, trajectory = self._kept[key]
    html = await run_in_threadpool(
      pages.whole, trajectory, question.load_media, question.policy.codec
    )
    return _html(html)

  # ---- POST /ask ---------------------------------------------------------------------

  async def ask(self, request: Request) -> Response:
    """The answer as server-sent events; a mistake is answered by its status."""
    try:
      if not request.headers.get("content-type", "").startswith("application/json"):
        raise RequestError("a question is application/json", status=415)
      if all(s.full for policy in self.policies for s in policy.services):
        raise Busy  # before a body of 64 MB is read
      body = await hosting.read_body(request)
      question = await run_in_threadpool(self._parse, body)
      del body
      play = Play(question, self.limits)
    except RequestError as error:
      return JSONResponse(error.body(), status_code=error.status)
    except Busy:
      error = RequestError("too many questions wait; ask again in a moment", status=429)
      return JSONResponse(error.body(), status_code=429)
    except ClientDisconnect:
      return Response(status_code=499)

    async def events() -> AsyncIterator[str]:
      try:
        async for one in hosting.while_there(request, play.events()):
          if one["kind"] == "end":
            one["link"] = f"/trajectory/{self._keep(question, one.pop('trajectory'))}"
          yield f"data: {json.dumps(one)}\n\n"
      except RequestError as error:
        yield f"data: {json.dumps({'kind': 'error', 'text': str(error)})}\n\n"
      finally:
        play.cancel()

    return StreamingResponse(events(), media_type="text/event-stream")

  def _parse(self, body: bytes) -> Question:
    """The question of a body: that of a chat completion, and `policy`, `look`, `example`.

    example: a scene of the tiny world instead of pictures, loaded as evaluation does.
    """
    try:
      given = json.loads(body)
      number, look = int(given.pop("policy", 0)), given.pop("look", True) is True
      example = given.pop("example", None)
      policy = self.policies[number]
    except (ValueError, RecursionError, AttributeError, IndexError, TypeError) as error:
      raise RequestError(f"no question of this page: {error}") from error
    frames = policy.codec.video_frames
    asked = completions.parse({"model": policy.name, **given}, _fetch, frames)
    parts = asked.messages[-1]["content"]
    text = "\n".join(p["text"] for p in parts if p["type"] == "text").strip()
    if not text:
      raise RequestError("there is no question; write one")
    kinds, shown = [], asked.pictures
    if example is not None:
      if example not in EXAMPLES:
        raise RequestError(f"{example!r:.60} is no example of this page")
      known = _task(example)
      shown = [world.load_media(media) for media in known.media]
    for x in shown:
      is_clip = isinstance(x, video.Video)
      kinds.append("video" if is_clip else "image")
      seconds = x.seconds_per_frame * len(x.frames) if is_clip else 0
      if seconds > MOST_SECONDS:
        raise RequestError(
          f"the clip lasts {seconds / 60:.0f} minutes; allowed are {MOST_SECONDS // 60}; "
          "cut it"
        )
    names = [f"picture {i + 1}" for i in range(len(shown))]
    task = Task("question", text, "", [*map(Media, kinds, names)])
    wish = decode.Wish(asked.temperature, asked.top_p, asked.top_k, not look).check()
    seed = secrets.randbits(62) if asked.seed is None else asked.seed
    return Question(policy, task, dict(zip(names, shown)), wish, seed, look)

  def _keep(self, question: Question, trajectory: Trajectory) -> str:
    """The key of its link; the oldest make room."""
    key = secrets.token_urlsafe(12)
    self._kept[key] = (question, trajectory)
    sizes = [_bytes(q.shown.values()) for q, _ in self._kept.values()]
    while len(self._kept) > 1 and sum(sizes) > KEPT:
      self._kept.popitem(last=False)
      sizes.pop(0)
    return key


class Play:
  """A question on its way through an engine; `Busy` where that has no room."""

  def __init__(self, question: Question, limits: dict[str, int]):
    self._question, self._begun, self._over = question, time.monotonic(), False
    self._heard: asyncio.Queue = asyncio.Queue()
    self._loop = asyncio.get_running_loop()
    self._sent: set[str] = set()  # pictures that the page has
    q = question
    group = Group(
      prompt=lambda: encode.Conversation(q.policy.codec, q.task, q.load_media),
      keys=[key_of(q.seed, 0, "question", 0)], sampling=q.wish, script=[[]],
      limits=limits | {"operations": q.look}, ended=functools.partial(self._tell, "ended"),
      heard=lambda sample, ids, logp: self._tell("heard", ids),
      looked=functools.partial(self._tell, "looked"),
      failed=functools.partial(self._tell, "failed"),
    )  # fmt: skip
    self._service = min(q.policy.services, key=lambda s: s.load)
    self._number = self._service.submit(group)

  def _tell(self, *event: Any) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
      self._loop.call_soon_threadsafe(self._heard.put_nowait, event)

  def cancel(self) -> None:
    """Frees its slot, if it has one."""
    if not self._over:
      self._over = True
      self._service.cancel(self._number)

  async def events(self) -> AsyncIterator[dict[str, Any]]:
    """What the page is told: text as it comes, the turns when one has looked, the end."""
    words = self._question.policy.codec.tokenizer
    text = completions.Text(words.decode)
    if self._service.load > self._service.engine.slots:
      yield {"kind": "wait"}
    while not self._over:
      kind, what = await self._heard.get()
      if kind == "heard":
        if new := text.add(what):
          yield {"kind": "text", "text": new}
        if words.im_end in what:
          text = completions.Text(words.decode)
      elif kind == "looked":
        yield {"kind": "turns", **await self._drawn(what)}
      elif kind == "failed":
        self._over = True
        if isinstance(what, ValueError):  # a picture too narrow, say
          raise RequestError(str(what))
        raise RequestError(f"the engine failed ({type(what).__name__}); ask again")
      else:
        self._over = True
        yield {"kind": "end", **await self._told(what.trajectory)}

  async def _drawn(self, trajectory: Trajectory) -> dict[str, Any]:
    """Its turns as HTML, with the pictures that the page has not got yet."""
    q, store = self._question, {}
    html = await run_in_threadpool(
      view.render_turns, trajectory, q.load_media, codec=q.policy.codec, store=store
    )
    new = {key: uri for key, uri in store.items() if key not in self._sent}
    self._sent |= new.keys()
    return {"html": html, "pictures": new}

  async def _told(self, trajectory: Trajectory) -> dict[str, Any]:
    if not any(trajectory.sampled):
      engine = self._service.engine
      raise RequestError(
        f"the question and its pictures have {len(trajectory.ids)} tokens; there is room "
        f"for {engine.max_prompt} (--max_prompt); show fewer or smaller pictures"
      )
    said = trajectory.turns[-1]["text"]
    return await self._drawn(trajectory) | {
      "answer": answers.extract(said) if trajectory.stop == "answer" else "",
      "stop": view.STOPS.get(trajectory.stop, trajectory.stop),
      "looks": trajectory.ops_succeeded,
      "errors": trajectory.ops_attempted - trajectory.ops_succeeded,
      "tokens": sum(trajectory.sampled),
      "seconds": round(time.monotonic() - self._begun, 1),
      "trajectory": trajectory,
    }


def _fetch(url: str) -> bytes:
  raise RequestError("pictures are dropped on the page, not fetched from elsewhere")


def _html(text: str, status: int = 200) -> Response:
  return HTMLResponse(text, status_code=status, headers=page.HEADERS)


def _bytes(shown) -> int:
  """Of decoded pictures."""
  return 3 * sum(map(completions.pixels, shown))


# ---- Examples ------------------------------------------------------------------------

# Held-out scenes of the tiny world with hard letters, which RL of every seed has read.
EXAMPLES = [f"world:0/test/{i}" for i in (4, 9, 13, 7)]


def _task(example: str) -> Task:
  seed, split, index = example.removeprefix("world:").split("/")
  return world.task(int(seed), split, int(index))


def _example(name: str) -> pages.Example:
  task = _task(name)
  loaded = world.load_media(task.media[0])
  frames = loaded.frames if isinstance(loaded, video.Video) else [loaded]
  return pages.Example(name, task.question, str(task.answer), frames)


# ---- Start ---------------------------------------------------------------------------


def open_demo(args: argparse.Namespace) -> Demo:
  """The policies on the engines of this machine, behind the app."""
  policies = []
  for checkpoint in filter(None, (args.checkpoint, args.compare)):
    name = pathlib.Path(checkpoint).resolve().name
    policies.append(Policy(name, *hosting.open_services(checkpoint, args)))
  if len({policy.name for policy in policies}) < len(policies):
    names = args.checkpoint, args.compare
    policies = [dataclasses.replace(p, name=n) for p, n in zip(policies, names)]
  hosts = LOOPBACK if args.host in ("127.0.0.1", "localhost", "::1") else ["*"]
  limits = dict(max_turns=args.max_turns, max_new_tokens=args.max_new_tokens)
  return Demo(policies, **limits, hosts=hosts)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    "pixel-jax demo", description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )  # fmt: skip
  hosting.add_flags(parser, port=7860, slots=8)
  parser.add_argument("--compare", default="", metavar="DIR", help="a second policy")
  return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
  args = parse_args(argv)
  begun = time.monotonic()
  listener = hosting.listen(args.host, args.port)
  hosting.keep_programs()
  demo = hosting.or_stop(lambda: open_demo(args))
  metrics.say(f"compiling what {len(demo.policies)} policies on {args.slots} slots run")
  for policy in demo.policies:
    hosting.warm(policy.services, policy.codec)
  host, port = listener.getsockname()[:2]
  metrics.say(
    f"ready in {time.monotonic() - begun:.0f} s: open http://{host}:{port} in a browser; "
    f"{metrics.compiled()}"
  )
  if not hosting.is_loopback(listener):
    metrics.say("anyone who reaches this address may ask; Ctrl-C ends it")
  services = [s for policy in demo.policies for s in policy.services]
  hosting.run(demo.app, listener, services)


if __name__ == "__main__":
  sys.exit(main())
