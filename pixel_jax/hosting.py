"""A policy on the engines of this machine, behind a socket.

  services, codec = open_services(checkpoint, ...)     an engine and its thread each
  warm(services, codec)                                compiles what they will run
  run(app, listener, services)                         until Ctrl-C or SIGTERM

`serve.py` and `demo.py` are two apps on it.  The flags they share are here, too, and how a
body is read from a client that may be slow, large or gone.
"""

import argparse
import asyncio
import contextlib
import functools
import ipaddress
import os
import pathlib
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import jax
import uvicorn
from PIL import Image
from starlette.requests import Request

from pixel_jax import parallel
from pixel_jax.chat import completions, encode, tools
from pixel_jax.chat.completions import RequestError
from pixel_jax.rollout import decode, fleet
from pixel_jax.rollout.engine import Engine, key_of
from pixel_jax.rollout.service import Service
from pixel_jax.rollout.session import Finished, Group
from pixel_jax.run import metrics, policies, settings, start

# Tokens between two looks at the queue.  Who arrives waits for the end of a chunk, and a
# free slot idles as long: with 16 of 48 tokens the server loses a fifth to `Engine.run`.
CHUNK = 2
MOST_BYTES = 64 << 20  # of a body: a picture of 8K as PNG in base64 has 50 MB
SLOW = 60.0  # seconds that a client may take between two pieces of its body


# ---- Flags ---------------------------------------------------------------------------


def at_least(low: int) -> Callable[[str], int]:
  """The type of a flag that is a whole number."""

  def whole(text: str) -> int:
    if not text.isdigit() or int(text) < low:
      raise argparse.ArgumentTypeError(f"{text!r}; a whole number from {low}")
    return int(text)

  return whole


def add_flags(parser: argparse.ArgumentParser, *, port: int, slots: int) -> None:
  """Those of every app: the policy, where it listens, and how much it holds."""
  whole, add = at_least(1), parser.add_argument
  add("--checkpoint", required=True, metavar="DIR")
  add("--host", default="127.0.0.1", help="0.0.0.0 = every address of this machine")
  add("--port", type=int, default=port, help="0 = a free one")
  add("--slots", type=whole, default=slots, help="conversations at once, of an engine")
  add("--queue", type=whole, default=256, help="requests of an engine; beyond them 429")
  add("--max_prompt", type=whole, default=8192, help="tokens of a conversation so far")
  add("--max_tokens", type=whole, default=4096, help="tokens that may follow it")
  add("--max_new_tokens", type=whole, default=2048, help="of one turn")
  add("--max_turns", type=whole, default=5, help="of the model, with operations")
  add(
    "--chunk", type=whole, default=CHUNK, help="tokens between two looks at the queue"
  )
  add("--tensor", type=int, choices=(1, 2, 4), default=1, help="devices of an engine")
  add("--dtype", choices=("float32", "bfloat16"), default="")
  add("--attention", choices=("xla", "splash", "cudnn"), default="xla")


# ---- Engines -------------------------------------------------------------------------


def open_services(
  checkpoint: str, args: argparse.Namespace, *, samples: int = 1
) -> tuple[list[Service], encode.Codec]:
  """The policy on this machine's engines; its codec offers operations.

  Args:
    samples: of one request at most.
  """
  on_cpu = jax.default_backend() == "cpu"
  dtype = args.dtype or ("float32" if on_cpu else "bfloat16")
  parallel.initialize()
  mesh = parallel.make_mesh()
  policy = policies.open_policy(
    checkpoint, model=dict(dtype=dtype, attention=args.attention), codec=None, mesh=mesh
  )
  codec = policy.codec
  largest = max(most for _, most in codec.budgets.values()) // codec.patch**2
  patches = max(4, -(-largest // 4) * 4)
  make = functools.partial(
    settings.call, "engine", Engine, policy.config, codec, group_size=samples,
    slots=args.slots, prompts=args.slots, max_prompt=args.max_prompt,
    # Requests come one by one: calls of few rows, so that few of them are empty.
    max_len=args.max_prompt + args.max_tokens, prompt_len=512, prompt_rows=2,
    extend_len=min(args.max_tokens, 256), extend_rows=2, patches=patches,
    chunk=args.chunk,
  )  # fmt: skip
  engines = fleet.Fleet(make, policy.config, mesh, shards=mesh.size, tensor=args.tensor)
  services = [
    Service(engine, weights, most=args.queue)
    for engine, weights in zip(engines.engines, engines.sync(policy.read()))
  ]
  return services, codec


def warm(services: Sequence[Service], codec: encode.Codec) -> None:
  """Plays a question with a picture, and a look at it, on every engine, so that no client
  waits for what that compiles."""
  picture = Image.new("RGB", (640, 480), (128, 128, 128))
  asked = completions.Request(
    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}],
    [picture], model="", temperature=0.0,
  )  # fmt: skip
  words = codec.tokenizer
  box = {"bbox_2d": [0.25, 0.25, 0.75, 0.75], "target_image": 1}
  call = words.encode(tools.call_text(tools.OPERATIONS[0], box))
  for service in services:
    talk = completions.conversation(asked, codec)
    over: list = []
    group = Group(
      prompt=lambda talk=talk: talk, keys=[key_of(0, 0, "warm", 0)],
      sampling=decode.Wish(0.0), script=[[[*call, words.im_end]]],
      limits=dict(max_turns=2, max_new_tokens=len(call) + 1),
      ended=over.append, failed=over.append,
    )  # fmt: skip
    service.submit(group)
    while not over:
      time.sleep(0.05)
    if not isinstance(over[0], Finished):
      raise over[0]


# ---- The socket ----------------------------------------------------------------------


def listen(host: str, port: int) -> socket.socket:
  """Taken before anything is loaded, so that a port in use is told at once."""
  try:
    return socket.create_server((host, port), reuse_port=False)
  except (OSError, OverflowError) as error:
    told = getattr(error, "strerror", None) or error
    start.stop(settings.ConfigError(f"--host={host} --port={port}: {told}"))


def is_loopback(listener: socket.socket) -> bool:
  return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def keep_programs() -> None:
  """Compiled programs lie in the user's cache: an app has no workdir."""
  home = os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")
  start.keep_programs(pathlib.Path(home) / "pixel_jax")


def or_stop(open_it: Callable[[], Any]) -> Any:
  """What a function opens; a policy that cannot be is told in one line."""
  try:
    return open_it()
  except (OSError, ValueError) as error:  # ConfigError is one
    told = str(settings.innermost(error)).replace("config.init: ", "--checkpoint: ")
    start.stop(settings.ConfigError(told))


def run(app: Any, listener: socket.socket, services: Sequence[Service] = ()) -> None:
  """Serves until Ctrl-C or SIGTERM, then ends the services."""
  config = uvicorn.Config(
    app, log_level="warning", timeout_keep_alive=75, timeout_graceful_shutdown=5
  )
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  with contextlib.suppress(KeyboardInterrupt):
    uvicorn.Server(config).run(sockets=[listener])
  for service in services:
    service.close()
  metrics.say("stopped")


@contextlib.contextmanager
def listening(app: Any) -> Iterator[str]:
  """The address of an app that is served in a thread, for as long as the block lasts."""
  listener = socket.create_server(("127.0.0.1", 0))
  config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
  server = uvicorn.Server(config)
  thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
  thread.start()
  try:
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
  finally:
    server.should_exit = True
    thread.join(timeout=30)


# ---- Clients -------------------------------------------------------------------------


async def read_body(request: Request) -> bytes:
  """The body, of bounded size, from a client that is not too slow."""
  declared = request.headers.get("content-length", "0")
  too_large = RequestError(
    f"the body is larger than {MOST_BYTES >> 20} MB; send smaller pictures", status=413
  )
  if declared.isdigit() and int(declared) > MOST_BYTES:
    raise too_large
  parts, size = [], 0
  stream = request.stream()
  while True:
    try:
      part = await asyncio.wait_for(anext(stream, None), SLOW)
    except TimeoutError:
      raise RequestError("the body came too slowly", status=408) from None
    if part is None:
      return b"".join(parts)
    size += len(part)
    if size > MOST_BYTES:
      raise too_large
    parts.append(part)


async def has_left(request: Request) -> None:
  """Returns when the client has left."""
  while not await request.is_disconnected():
    await asyncio.sleep(0.2)


async def while_there(request: Request, events: AsyncIterator) -> AsyncIterator:
  """The events, up to the last or to when the client leaves."""
  gone = asyncio.ensure_future(has_left(request))
  one = asyncio.ensure_future(anext(events, None))
  try:
    while True:
      await asyncio.wait({one, gone}, return_when=asyncio.FIRST_COMPLETED)
      if not one.done() or one.result() is None:
        return
      yield one.result()
      one = asyncio.ensure_future(anext(events, None))
  finally:
    for task in (one, gone):
      task.cancel()
