"""How long one waits for the trajectories of a large run, and for a report of many.

  python -m pixel_jax.tools.bench.viewer [--json=FILE] [--trajectories=100000]
    [--tokens=500]

So many rollouts of so many tokens are written as training writes them, indexed, and looked
through by every filter.  `ratio` is the time that the json module alone takes for the lines
over that of indexing them, on a step of 4,096.  Where Chromium is found, a report of 1,000
trajectories is opened in it, too.
"""

import argparse
import json
import pathlib
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence

from pixel_jax import trajectory as trajectories
from pixel_jax.data import world
from pixel_jax.run import policies
from pixel_jax.trajectory import Media, OpCall, Task, Trajectory
from pixel_jax.view import report, runs
from pixel_jax.view.index import EMPTY, File, Index, Stored, Wish

OF_A_STEP = 4096  # 512 questions with 8 answers each
REPORTED = 1000
WORDS = (
  "sign", "red", "left", "boat", "what", "number", "third", "shelf", "behind", "man",
)  # fmt: skip
WISHES = (
  Wish(), Wish(verdict="wrong"), Wish(help="harmed"), Wish(errors=True),
  Wish(stop="turns"), Wish(sort="worst"), Wish(verdict="correct", sort="best"),
  Wish(sort="errors"), Wish(step="12"), Wish(dataset="data/3"), Wish(text="boat"),
  Wish(text="third shelf", verdict="wrong"), Wish(text="nowhere to be found"),
)  # fmt: skip


def rollout(number: int, rng: random.Random) -> Trajectory:
  """One without its numbers; its picture is drawn by the tiny world."""
  step, place = divmod(number, OF_A_STEP)
  task, sample = divmod(place, 8)
  box = {"bbox_2d": [0.1, 0.2, 0.6, 0.7], "target_image": 1}
  ops, error = rng.choice((0, 1, 1, 2)), rng.choice((None, None, None, "bad_box"))
  said = f"{' '.join(rng.choices(WORDS, k=120))} \\boxed{{{rng.choice('ABCD')}}}"
  turns = [{"role": "user", "text": " ".join(rng.choices(WORDS, k=12))}]
  turns += [{"role": "assistant", "text": said}]
  correct, path = float(rng.random() < 0.5), f"world:0/test/{4 * task}"
  return Trajectory(
    Task(f"data/{task % 8}/{step}_{task}", turns[0]["text"], "A", [Media("image", path)]),
    sample=sample, policy_step=step, turns=turns, advantage=rng.gauss(0, 1),
    calls=[OpCall("crop_image_normalized", box, error)] * ops,
    stop=rng.choice(("answer", "answer", "answer", "turns")),
    reward={"correct": correct, "total": correct},
  )  # fmt: skip


def write(folder: pathlib.Path, count: int, tokens: int) -> list[File]:
  """Files of a step each."""
  rng = random.Random(0)
  numbers = {
    "ids": [rng.randrange(150_000) for _ in range(tokens)],
    "sampled": [i % 4 == 0 for i in range(tokens)],
    "weight": [float(i % 4 == 0) for i in range(tokens)],
    "logp": [-rng.random() if i % 4 == 0 else 0.0 for i in range(tokens)],
    "position": [[i, i, i] for i in range(tokens)],
  }
  long = ", " + json.dumps(numbers)[1:-1]
  files = []
  for first in range(0, count, OF_A_STEP):
    path = folder / f"step_{first // OF_A_STEP:06d}.jsonl"
    with path.open("w") as f:
      for number in range(first, min(first + OF_A_STEP, count)):
        line = trajectories.to_json(rollout(number, rng))
        f.write(line.replace(EMPTY.decode(), long, 1) + "\n")
    files.append(File("rl", path))
  return files


def look_through(index: Index, times: int = 5) -> dict[str, float]:
  """Milliseconds of each wish: the median, and the longest of all."""
  spent = []
  for wish in WISHES:
    for _ in range(times):
      begun = time.perf_counter()
      index.search(wish)
      spent.append(1000 * (time.perf_counter() - begun))
  return {"search_ms": statistics.median(spent), "search_ms_max": max(spent)}


def open_report(index: Index) -> dict[str, float]:
  """Seconds until a report of 1,000 trajectories is there, and answers to a key."""
  chromium = shutil.which("chromium") or shutil.which("chromium-browser")
  if chromium is None:
    return {}
  from playwright import sync_api

  run = runs.Run("rl", trajectories=Stored(index, "rl"))
  html = report.report(
    [run], None, world.load_media, codec=policies.open_codec("tiny_base"),
    most=REPORTED, most_bytes=60_000_000,
  )  # fmt: skip
  with tempfile.TemporaryDirectory() as folder, sync_api.sync_playwright() as play:
    path = pathlib.Path(folder) / "report.html"
    path.write_text(html)
    browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
    page = browser.new_page()
    begun = time.perf_counter()
    page.goto(path.as_uri())
    page.keyboard.press("j")
    shown = page.locator(".pane > div.open img").first
    shown.wait_for()
    seconds = time.perf_counter() - begun
    count = page.locator(".list a").count()
    browser.close()
  return {"report_s": seconds, "report_mb": len(html) / 1e6, "reported": count}


def main(argv: Sequence[str] | None = None) -> dict:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--trajectories", type=int, default=100_000)
  parser.add_argument("--tokens", type=int, default=500, help="of a trajectory")
  parser.add_argument("--json", type=pathlib.Path, help="write the figures there")
  args = parser.parse_args(argv)
  with tempfile.TemporaryDirectory() as folder:
    root = pathlib.Path(folder)
    files = write(root, args.trajectories, args.tokens)
    size = sum(file.path.stat().st_size for file in files)
    begun = time.perf_counter()
    with files[0].path.open("rb") as lines:
      for line in lines:
        json.loads(line)
    parsed = time.perf_counter() - begun
    index = Index(root / "index.sqlite")
    begun = time.perf_counter()
    index.update(files[:1])
    first = time.perf_counter() - begun
    index.update(files)
    whole = time.perf_counter() - begun
    told = {
      "trajectories": args.trajectories, "gb": size / 1e9, "index_s": whole,
      "index_mb_per_s": size / 1e6 / whole, "ratio": parsed / first,
    }  # fmt: skip
    told |= look_through(index) | open_report(index)
  for key, value in told.items():
    print(f"{key:18} {value:,.4g}" if value < 1000 else f"{key:18} {value:,.0f}")
  if args.json:
    args.json.write_text(json.dumps(told, indent=1))
  return told


if __name__ == "__main__":
  sys.exit(main() is None)
