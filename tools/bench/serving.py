"""The server beside `Engine.run` on the same questions: what HTTP and arrivals cost.

  python -m pixel_jax.tools.bench.serving [--json=FILE] [--questions=96] [--clients=32]

Random weights of 30 million parameters, greedy, a picture of 144 tokens in every question;
every reply is compared with what the engine says.  The clients are a process of their own
on the same machine, each asks again as soon as it has its answer.  `ratio` is the
engine's seconds over the server's: 1 is no loss.
"""

import argparse
import base64
import dataclasses
import functools
import io
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import jax

from pixel_jax import hosting
from pixel_jax.chat import completions, encode, template
from pixel_jax.model import qwen2_5_vl
from pixel_jax.pixels import image
from pixel_jax.rollout.engine import Engine
from pixel_jax.rollout.service import Service
from pixel_jax.server import Limits, Server
from pixel_jax.tools.bench import data
from pixel_jax.trajectory import Media, Task

NEW_TOKENS = 48
CLIENTS = """
import concurrent.futures, json, sys, time, urllib.request
url, clients, bodies = sys.argv[1], int(sys.argv[2]), json.load(open(sys.argv[3]))
def ask(body):
  asked = urllib.request.Request(url, body.encode(), {"Content-Type": "application/json"})
  with urllib.request.urlopen(asked, timeout=600) as reply:
    return json.load(reply)["choices"][0]["message"]["content"]
with concurrent.futures.ThreadPoolExecutor(clients) as pool:
  begun = time.perf_counter()
  said = list(pool.map(ask, bodies))
  print(json.dumps([time.perf_counter() - begun, said]))
"""


def main(argv: Sequence[str] | None = None) -> dict:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--questions", type=int, default=96)
  parser.add_argument("--clients", type=int, default=32)
  parser.add_argument("--chunk", type=int, default=hosting.CHUNK, help="of the server")
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--size", choices=("tiny", "30m"), default="30m")
  parser.add_argument("--json", type=pathlib.Path, help="also write the figures here")
  args = parser.parse_args(argv)
  size, seconds = data.SIZES[args.size], {"engine": [], "server": []}
  with tempfile.TemporaryDirectory() as folder:
    codec = encode.Codec(
      data.codec(size, folder).tokenizer, tools=False,
      budgets={role: (144 * data.TOKEN,) * 2 for role in encode.ROLES},
    )  # fmt: skip
    config = data.model(size, codec.tokenizer, dtype="float32")
    params = jax.device_put(
      qwen2_5_vl.init(config, jax.random.key(0)), jax.devices()[0]
    )
    make = functools.partial(
      Engine, config, codec, slots=32, max_prompt=512, max_len=640, prompt_len=256,
      prompt_rows=2, extend_len=64, extend_rows=2, patches=576,
    )  # fmt: skip
    bodies = [question(i) for i in range(args.questions)]
    sides = {
      "engine": alone(make(), params, codec, bodies),
      "server": served(
        make(chunk=args.chunk),
        params,
        codec,
        bodies,
        args.clients,
        pathlib.Path(folder),
      ),
    }
    said = {}
    for turn in range(args.repeats + 1):
      for name, run in sides.items():
        spent, said[name] = run()
        print(f"turn {turn}  {name:<6} {spent:6.2f} s", flush=True)
        if turn:  # the first one compiles
          seconds[name].append(spent)
      if said["engine"] != said["server"]:
        raise SystemExit("error: the replies differ from what the engine says")
  median = {name: statistics.median(s) for name, s in seconds.items()}
  result = {
    "questions": args.questions,
    "clients": args.clients,
    "new_tokens": NEW_TOKENS,
    "seconds": seconds,
    "ratio": median["engine"] / median["server"],
  }
  print(f"ratio  {result['ratio']:.2f}")
  if args.json:
    args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {args.json.resolve()}")
  return result


def question(i: int) -> str:
  """The body of a request about a picture of its own."""
  buffer = io.BytesIO()
  data._original(i, 336).save(buffer, "PNG")
  url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
  content = [
    {"type": "image_url", "image_url": {"url": url}},
    {"type": "text", "text": f"What is in picture {i}?"},
  ]
  asked = {"messages": [{"role": "user", "content": content}], "temperature": 0}
  return json.dumps({**asked, "max_tokens": NEW_TOKENS})


def alone(engine, params, codec, bodies) -> Callable[[], tuple[float, list[str]]]:
  # Both sides are given the bytes of the pictures.
  urls = [
    json.loads(b)["messages"][0]["content"][0]["image_url"]["url"] for b in bodies
  ]
  pictures = {f"bench:{i}": base64.b64decode(u[22:]) for i, u in enumerate(urls)}
  # As the server builds its prompts: the question alone, without a hint.
  talk = dataclasses.replace(codec, system=template.SYSTEM)
  tasks = [
    Task(f"{i}", f"What is in picture {i}?", "", [Media("image", f"bench:{i}")])
    for i in range(len(bodies))
  ]

  def run():
    begun = time.perf_counter()
    groups = engine.run(
      params, tasks, seed=0, step=0, group_size=1, temperature=0.0, codec=talk,
      load_media=lambda m: image.load_image(pictures[m.path]), max_turns=1,
      max_new_tokens=NEW_TOKENS, fixed_batch=True,
    )  # fmt: skip
    spent = time.perf_counter() - begun
    texts = [g[0].trajectory.turns[-1]["text"] or completions.NO_ANSWER for g in groups]
    return spent, texts

  return run


def served(engine, params, codec, bodies, clients, folder) -> Callable:
  file = folder / "bodies.json"
  file.write_text(json.dumps(bodies))

  def run():
    service = Service(engine, params, most=2 * len(bodies))
    app = Server([service], codec, name="bench", limits=Limits(max_turns=1)).app
    with hosting.listening(app) as address:
      url = f"{address}/v1/chat/completions"
      command = [sys.executable, "-c", CLIENTS, url, str(clients), str(file)]
      out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    service.close()
    return json.loads(out)

  return run


if __name__ == "__main__":
  main()
