"""Decode + resize + pack in pictures/s, beside a PyTorch DataLoader with HF's processor.

  python -m pixel_jax.tools.bench.pipeline [--json=FILE] [--pictures=128]
    [--workers=2] [--repeats=3]

The same JPEGs on the disk for both, sizes log-normal about 1.8 MPixel, the budget of the
paper's evaluation (512 to 5,120 visual tokens).  Ours is what `train_sft` reads: a source,
`pipeline.batches` with as many threads as the DataLoader has processes, packed rows of
20,480 patches as bytes.  The peer decodes and lets HF's image processor make float32
patches, eight pictures a batch, neither text nor packing.  Beside its workers each side has
one thread that puts batches together.  Both are warm and take turns, medians are told, and
the patches of some pictures are compared to the bit first.  As it stands: two to three
minutes on two idle cores, 2 GB.

Below it: how full rows get from 4,096 sizes of the same distribution, nothing decoded.
"""

import argparse
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
import transformers
from PIL import Image

from pixel_jax.chat import encode, tokenizer
from pixel_jax.data import pack, pipeline, sources, world
from pixel_jax.pixels import image
from pixel_jax.synthesis.templates import Templates
from pixel_jax.tools.bench import data as bench_data

BUDGET = (512 * 784, 5120 * 784)
ROW = dict(tokens=8192, patches=20480)
WINDOW = 256  # examples that are packed together: configs/sft.py
AREA, SIGMA, ASPECT = 1.8e6, 0.8, 0.35  # of the logarithms of pixels and width/height
TEXT, TEXT_SIGMA = 250, 0.6  # tokens beside the pictures


def sizes(rng: np.random.Generator, count: int) -> list[tuple[int, int]]:
  """(width, height) of pictures, log-normal."""
  area = np.exp(rng.normal(np.log(AREA), SIGMA, count))
  aspect = np.exp(rng.normal(0, ASPECT, count))
  return [
    (max(round((a * r) ** 0.5), 28), max(round((a / r) ** 0.5), 28))
    for a, r in zip(area, aspect)
  ]


def write_pictures(root: pathlib.Path, count: int) -> None:
  """JPEGs with detail at every scale, and their questions: x.jsonl."""
  rng = np.random.default_rng(0)
  with (root / "x.jsonl").open("w", encoding="utf-8") as f:
    for i, (width, height) in enumerate(sizes(rng, count)):
      picture = np.zeros((height, width, 3))
      for side in (8, 32, 128):
        noise = rng.integers(0, 85, (side, side, 3), np.uint8)
        picture += np.asarray(Image.fromarray(noise).resize((width, height)))
      Image.fromarray(picture.astype(np.uint8)).save(root / f"{i}.jpg", quality=90)
      shown = [{"kind": "image", "path": f"{i}.jpg"}]
      task = {"id": str(i), "question": "What is it?", "answer": "A", "media": shown}
      f.write(json.dumps(task) + "\n")


def ours(root: pathlib.Path, codec: encode.Codec, workers: int, count: int) -> Callable:
  """Reads `count` pictures as training does -> share of the rows' patches that is used."""
  source = sources.open_source(
    "jsonl:x.jsonl",
    root=root,
    codec=codec,
    synthesis=Templates(kinds={"image/direct": 1.0}),
  )
  stream = pipeline.batches(
    source, codec, seed=0, rows=1, pack_window=count, threads=workers,
    max_bad_share=0.0, **ROW,
  )  # fmt: skip

  def run() -> float:
    # From the first row of a window to that of the next: its rows are made, and all
    # pictures of the next are decoded.  Behind it the reader is three rows ahead and
    # waits, so that nothing runs beside the peer.
    used, before = [], stream.counts()["data/records"] or count
    while stream.counts()["data/records"] <= before:
      used.append((next(stream)["patch_image"] > 0).mean())
    return float(np.mean(used))

  return run


class Pictures(torch.utils.data.Dataset):
  """The files, each through HF's processor."""

  def __init__(self, files: Sequence[pathlib.Path]):
    self.files = files
    self.processor = transformers.Qwen2VLImageProcessorPil(
      size={"shortest_edge": BUDGET[0], "longest_edge": BUDGET[1]}
    )

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, i: int) -> torch.Tensor:
    with Image.open(self.files[i]) as picture:
      made = self.processor(images=[picture.convert("RGB")], return_tensors="pt")
    return made["pixel_values"]


def theirs(root: pathlib.Path, workers: int, count: int) -> Callable:
  loader = torch.utils.data.DataLoader(
    Pictures([root / f"{i}.jpg" for i in range(count)]),
    batch_size=8,
    shuffle=True,
    num_workers=workers,
    collate_fn=torch.cat,
    persistent_workers=True,
  )
  return lambda: sum(len(batch) for batch in loader)


def check_equal(root: pathlib.Path, codec: encode.Codec, count: int) -> None:
  for i in range(min(count, 4)):
    picture = image.load_image(root / f"{i}.jpg")
    mine = bench_data.raster(encode.pixels_of(picture, "image", codec))
    peer = Pictures([root / f"{i}.jpg"])[0].numpy()
    if not np.array_equal(mine, peer):
      raise SystemExit(f"error: the patches of {i}.jpg differ; nothing was timed")


class Sized:
  """An example that has a length and one picture, as `pack` asks for."""

  class Picture:
    def __init__(self, key: int, patches: int):
      self.key, self.num_patches = str(key), patches

  def __init__(self, key: int, patches: int, text: int):
    self.tokens = range(patches // 4 + text)
    self.vision = [(0, self.Picture(key, patches))]


def utilisation(count: int = 4096, **row: int) -> tuple[float, float]:
  """Shares of tokens and patches that are used when windows of examples are packed."""
  rng, examples = np.random.default_rng(1), []
  for i, (width, height) in enumerate(sizes(rng, count)):
    h, w = image.smart_resize(height, width, min_pixels=BUDGET[0], max_pixels=BUDGET[1])
    text = round(float(np.exp(rng.normal(np.log(TEXT), TEXT_SIGMA))))
    examples.append(Sized(i, h * w // image.PATCH**2, text))
  T, P, rows = row["tokens"], row["patches"], 0
  for first in range(0, count, WINDOW):
    rows += len(pack.first_fit(examples[first : first + WINDOW], T, P))
  tokens = sum(len(e.tokens) for e in examples)
  patches = sum(n for e in examples for n in pack.distinct(e).values())
  return tokens / (rows * T), patches / (rows * P)


def main(argv: Sequence[str] | None = None) -> dict:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--pictures", type=int, default=128)
  parser.add_argument("--workers", type=int, default=2, help="threads, and processes")
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--json", type=pathlib.Path, help="also write the figures here")
  args = parser.parse_args(argv)
  count, seconds = args.pictures, {"ours": [], "torch": []}
  torch.set_num_threads(1)
  with tempfile.TemporaryDirectory() as folder:
    root = pathlib.Path(folder)
    print(f"writing {count} JPEGs ...", flush=True)
    write_pictures(root, count)
    words = tokenizer.make_tiny(root / "words", world.scaffolds())
    codec = encode.Codec(
      tokenizer=words, budgets={**encode.RELEASED_BUDGETS, "image": BUDGET}
    )
    check_equal(root, codec, count)
    sides = {
      "ours": ours(root, codec, args.workers, count),
      "torch": theirs(root, args.workers, count),
    }
    for turn in range(args.repeats + 1):
      for name, run in sides.items():
        start = time.perf_counter()
        found = run()
        spent = time.perf_counter() - start
        print(f"turn {turn}  {name:<6} {count / spent:7.1f} pictures/s", flush=True)
        if turn:  # the first one warms up
          seconds[name].append(spent)
        if name == "ours":
          packed = found
  median = {name: statistics.median(s) for name, s in seconds.items()}
  tokens, patches = utilisation(**ROW)
  result = {
    "pictures": count,
    "workers": args.workers,
    "pictures_per_s": {name: count / s for name, s in median.items()},
    "seconds": seconds,
    "ratio": median["torch"] / median["ours"],
    "utilisation": {"run": packed, "tokens": tokens, "patches": patches},
  }
  for name, rate in result["pictures_per_s"].items():
    print(f"{name:<6} {rate:7.1f} pictures/s, {args.workers} workers")
  print(f"ratio  {result['ratio']:7.2f}")
  print(f"rows of {ROW}: {patches:.3f} of the patches used, {tokens:.3f} of the tokens")
  if args.json:
    args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {args.json.resolve()}")
  return result


if __name__ == "__main__":
  main()
