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
import dataclasses
import os
import pathlib
import sys
import time
from collections.abc import Sequence

from pixel_jax import hosting
from pixel_jax.run import metrics
from pixel_jax.server import Limits, Server


def open_server(args: argparse.Namespace) -> Server:
  """The policy on the engines of this machine, behind the app."""
  services, codec = hosting.open_services(args.checkpoint, args, samples=args.samples)
  codec = dataclasses.replace(codec, tools=args.operations == "pixel")
  limits = Limits(
    args.max_turns, args.max_new_tokens, args.samples, args.https, args.api_key
  )
  name = args.name or pathlib.Path(args.checkpoint).name
  return Server(services, codec, name=name, limits=limits)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    "pixel-jax serve", description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )  # fmt: skip
  hosting.add_flags(parser, port=8000, slots=32)
  add = parser.add_argument
  add("--operations", choices=("pixel", "none"), default="pixel")
  add("--name", default="", help="of the model, as clients see it")
  add("--api_key", default=os.environ.get("PIXEL_JAX_API_KEY", ""))
  add("--https", action="store_true", help="fetch pictures from the net")
  add(
    "--samples", type=hosting.at_least(1), default=8, help="the largest n of a request"
  )
  return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
  args = parse_args(argv)
  begun = time.monotonic()
  listener = hosting.listen(args.host, args.port)
  hosting.keep_programs()
  server = hosting.or_stop(lambda: open_server(args))
  metrics.say(
    f"compiling what {len(server.services)} engines of {args.slots} slots run"
  )
  hosting.warm(server.services, server.codec)
  host, port = listener.getsockname()[:2]
  metrics.say(
    f"ready in {time.monotonic() - begun:.0f} s: http://{host}:{port}/v1, model "
    f"{server.name}, operations {args.operations}; {metrics.compiled()}"
  )
  if not args.api_key and not hosting.is_loopback(listener):
    metrics.say(
      "anyone who reaches this address may use it; --api_key=KEY asks for a key"
    )
  hosting.run(server.app, listener, server.services)


if __name__ == "__main__":
  sys.exit(main())
