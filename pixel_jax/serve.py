"""A policy as a server that speaks the chat completions of OpenAI's API.

  pixel-jax serve --checkpoint=DIR [--operations=pixel|none] [--port=8000]
  python -m pixel_jax.serve --checkpoint=DIR ...    the same program

DIR is a workdir, a Hugging Face folder or what `pixel-jax convert` wrote; "tiny_base" is
the model of the tiny world.  With --operations=pixel the model zooms and selects frames on
the server; the reply's `content` is its answer, `reasoning_content` the whole trajectory.

POST /v1/chat/completions   GET /v1/models   GET /health   GET /metrics

  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"messages": [{"role": "user", "content": "What is 6 x 7?"}]}'

It listens on this machine alone unless --host says otherwise; give --api_key (or set
PIXEL_JAX_API_KEY) before it does.  Greedy replies do not depend on who else is served.
"""

import argparse
import contextlib
import dataclasses
import functools
import ipaddress
import os
import pathlib
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence

import jax
import uvicorn
from PIL import Image

from pixel_jax import parallel
from pixel_jax.chat import completions, tools
from pixel_jax.rollout import decode, fleet
from pixel_jax.rollout.engine import Engine, key_of
from pixel_jax.rollout.service import Service
from pixel_jax.rollout.session import Finished, Group
from pixel_jax.run import metrics, policies, settings, start
from pixel_jax.server import Limits, Server

# Tokens between two looks at the queue.  Who arrives waits for the end of a chunk, and a
# free slot idles as long: with 16 of 48 tokens the server loses a fifth to `Engine.run`.
CHUNK = 2


def open_server(args: argparse.Namespace) -> Server:
  """The policy on the engines of this machine, each with what it will run compiled."""
  parallel.initialize()
  mesh = parallel.make_mesh()
  policy = policies.open_policy(
    args.checkpoint, model=dict(dtype=args.dtype, attention=args.attention),
    codec=None, mesh=mesh,
  )  # fmt: skip
  codec = dataclasses.replace(policy.codec, tools=args.operations == "pixel")
  largest = max(most for _, most in codec.budgets.values()) // codec.patch**2
  patches = max(4, -(-largest // 4) * 4)
  make = functools.partial(
    settings.call, "engine", Engine, policy.config, codec, group_size=args.samples,
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
  limits = Limits(
    args.max_turns, args.max_new_tokens, args.samples, args.https, args.api_key
  )
  name = args.name or pathlib.Path(args.checkpoint).name
  return Server(services, codec, name=name, limits=limits)


def warm(server: Server) -> None:
  """Plays a question with a picture, and a look at it, on every engine, so that no client
  waits for what that compiles."""
  picture = Image.new("RGB", (640, 480), (128, 128, 128))
  asked = completions.Request(
    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}],
    [picture], model="", temperature=0.0,
  )  # fmt: skip
  words = server.codec.tokenizer
  box = {"bbox_2d": [0.25, 0.25, 0.75, 0.75], "target_image": 1}
  call = words.encode(tools.call_text(tools.OPERATIONS[0], box))
  for service in server.services:
    talk = completions.conversation(asked, server.codec)
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


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    "pixel-jax serve", description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )  # fmt: skip
  whole = _at_least(1)
  add = parser.add_argument
  add("--checkpoint", required=True, metavar="DIR")
  add("--operations", choices=("pixel", "none"), default="pixel")
  add("--host", default="127.0.0.1", help="0.0.0.0 = every address of this machine")
  add("--port", type=int, default=8000, help="0 = a free one")
  add("--name", default="", help="of the model, as clients see it")
  add("--api_key", default=os.environ.get("PIXEL_JAX_API_KEY", ""))
  add("--https", action="store_true", help="fetch pictures from the net")
  add("--slots", type=whole, default=32, help="conversations at once, of an engine")
  add("--queue", type=whole, default=256, help="requests of an engine; beyond them 429")
  add("--max_prompt", type=whole, default=8192, help="tokens of a conversation so far")
  add("--max_tokens", type=whole, default=4096, help="tokens that may follow it")
  add("--max_new_tokens", type=whole, default=2048, help="of one turn")
  add("--max_turns", type=whole, default=5, help="of the model, with operations")
  add("--samples", type=whole, default=8, help="the largest n of a request")
  add(
    "--chunk", type=whole, default=CHUNK, help="tokens between two looks at the queue"
  )
  add("--tensor", type=int, choices=(1, 2, 4), default=1, help="devices of an engine")
  add("--dtype", choices=("float32", "bfloat16"), default="")
  add("--attention", choices=("xla", "splash", "cudnn"), default="xla")
  args = parser.parse_args(argv)
  on_cpu = jax.default_backend() == "cpu"
  args.dtype = args.dtype or ("float32" if on_cpu else "bfloat16")
  return args


def _at_least(low: int) -> Callable[[str], int]:
  def whole(text: str) -> int:
    if not text.isdigit() or int(text) < low:
      raise argparse.ArgumentTypeError(f"{text!r}; a whole number from {low}")
    return int(text)

  return whole


def main(argv: Sequence[str] | None = None) -> None:
  args = parse_args(argv)
  begun = time.monotonic()
  try:
    listener = socket.create_server((args.host, args.port), reuse_port=False)
  except (OSError, OverflowError) as error:
    told = getattr(error, "strerror", None) or error
    start.stop(settings.ConfigError(f"--host={args.host} --port={args.port}: {told}"))
  home = os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")
  start.keep_programs(pathlib.Path(home) / "pixel_jax")
  try:
    server = open_server(args)
  except (OSError, ValueError) as error:  # ConfigError is one
    told = str(settings.innermost(error)).replace("config.init: ", "--checkpoint: ")
    start.stop(settings.ConfigError(told))
  metrics.say(
    f"compiling what {len(server.services)} engines of {args.slots} slots run"
  )
  warm(server)
  host, port = listener.getsockname()[:2]
  metrics.say(
    f"ready in {time.monotonic() - begun:.0f} s: http://{host}:{port}/v1, model "
    f"{server.name}, operations {args.operations}; {metrics.compiled()}"
  )
  if not args.api_key and not ipaddress.ip_address(host).is_loopback:
    metrics.say(
      "anyone who reaches this address may use it; --api_key=KEY asks for a key"
    )
  config = uvicorn.Config(
    server.app, log_level="warning", timeout_keep_alive=75, timeout_graceful_shutdown=5
  )
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  with contextlib.suppress(KeyboardInterrupt):
    uvicorn.Server(config).run(sockets=[listener])
  for service in server.services:
    service.close()
  metrics.say("stopped")


if __name__ == "__main__":
  sys.exit(main())
