"""The fuzz campaign: hostile outputs of a model, and broken files of every data format.

  python tests/fuzz.py                  100,000 outputs, 30 broken files of each format
  python tests/fuzz.py --outputs=1000

Nothing may crash, no output may take 50 ms from its text to its reward, and every record
is either read as it was written or set aside with its reason.  Exit code 1 says that
something was not so; tests/test_fuzz.py runs a small part of it.
"""

import argparse
import collections
import io
import json
import pathlib
import sys
import tempfile
import time
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tqdm import tqdm

from pixel_jax import answers
from pixel_jax.chat import tools
from pixel_jax.data import sources
from pixel_jax.pixels import image, ops

SLOWEST = 0.050  # seconds of one output

# ---- Outputs of a model --------------------------------------------------------------

NUMBERS = (
  "0", "1", "-1", "0.5", "1e999", "-1e999", "NaN", "Infinity", "-Infinity", "9" * 400,
  "0." + "1" * 400, "1e-400", "true", "null", '"0.3"', "[]", "{}", "0x10", "1_000", "٣",
  "1e18", "2147483648", "9223372036854775807", "-0.0", ".5", "5.", "+1", "1,5", "",
)  # fmt: skip
WORDS = (
  "红色", "красный", "لون", "🟥" * 9, "a\u0301" * 20, "\u202e", "\ufeff", "\x00\x07\x1b[2J",
  "\r\n", "\ud800", "\\", "\\\\boxed{", "\\boxed{", "}", "{", "$", "\\text{", "%", "\\frac",
  "<tool_call>", "</tool_call>", "<tool_call", "tool_call>", "<|im_end|>", "<|im_start|>",
  "<|image_pad|>", "<|endoftext|>", "<answer>", "</answer>", "answer:", "Answer is",
  "(A)", "B.", "C) red", "<script>alert(1)</script>", "__import__('os').system('id')",
  "../../etc/passwd", "{{7*7}}", "%s%n", "' OR 1=1 --", '"', "\u2028", "ﬁ", "ⅷ", "½",
)  # fmt: skip
NAMES = (
  *tools.OPERATIONS * 4,
  "crop_image",
  "zoom",
  "",
  "os.system",
  "é" * 200,
  "\ud800",
)


def output(rng: np.random.Generator) -> str:
  """One hostile turn of a model."""

  def some(items):
    return items[int(rng.integers(len(items)))]

  def numbers(most=6):
    return "[" + ", ".join(some(NUMBERS) for _ in range(rng.integers(most))) + "]"

  def call():
    box = f'"bbox_2d": {some((numbers(), some(NUMBERS)))}'
    rest = f'"target_image": {some(NUMBERS)}, "target_frames": {numbers(40)}'
    left, right = some(("0.1", "0", "-1", "0.5")), some(("0.9", "0.1", "2"))
    near = some((  # a call that may even be right
      f'{{"bbox_2d": [{left}, 0.1, {right}, 0.9], "target_image": {some("12")}}}',
      f'{{"target_frames": {some(("[3]", "[9, 1]"))}}}',
    ))  # fmt: skip
    arguments = some((
      near, near, f"{{{box}, {rest}}}", f"{{{box}}}", "{}", "[]", numbers(), some(NUMBERS),
      '"' + some(WORDS) + '"', "[" * 3000 + "]" * 3000, '{"a":' * 2000 + "1" + "}" * 2000,
    ))  # fmt: skip
    name = json.dumps(some(NAMES), ensure_ascii=False)
    inside = some((
      *[f'{{"name": {name}, "arguments": {arguments}}}'] * 3, arguments,
      f'{{"name": {name}', f'{{"arguments": {arguments}}}', "",
      some(WORDS) * int(rng.integers(1, 400)),
    ))  # fmt: skip
    return some((
      f"<tool_call>\n{inside}\n</tool_call>", f"<tool_call>{inside}",
      f"{inside}</tool_call>", f"<tool_call><tool_call>{inside}</tool_call></tool_call>",
      f"\\boxed{{<tool_call>{inside}</tool_call>}}", f"{inside}</tool_call>\n \n",
    ))  # fmt: skip

  def long():
    unit = some(
      (*WORDS, *NUMBERS, "9", " ", "a ", "1,000,", "\\boxed{", "{", "}", "((", "$$")
    )
    return (unit or "7") * int(rng.integers(1, 1_000_000) // max(len(unit), 1))

  parts = []
  for _ in range(rng.integers(0, 4)):
    parts.append(some((call, lambda: some(WORDS), lambda: numbers(9)))())
  parts.append(call())
  if rng.random() < 0.01:
    parts.insert(int(rng.integers(len(parts) + 1)), long())
  if rng.random() < 0.3:
    parts.append(f"\\boxed{{{some(WORDS)}{some(NUMBERS)}}}")
  return some(("", " ", "\n")).join(parts)


def seen(video: bool) -> ops.Seen:
  frame = Image.fromarray(np.arange(56 * 84 * 3, dtype=np.uint8).reshape(56, 84, 3))
  source = [frame] * 8 if video else frame
  return ops.Seen([ops.Picture("video" if video else "image", source, source)])


def shrink(picture: Image.Image, role: str) -> Image.Image:
  return image.resize(picture, min_pixels=784, max_pixels=7056)


def play(text: str, profile: str, shown: ops.Seen) -> str:
  """What becomes of a turn: "answer", "ok", or the kind of its error."""
  call = tools.parse_call(text, profile)
  if call is None:
    right = answers.judge(text, ["red", "3"])
    if right not in (0.0, 1.0) or not 0.0 <= answers.anls(text, "red") <= 1.0:
      raise AssertionError(f"judged {right}")
    return "answer"
  observation = tools.run_call(call, shown, profile, shrink=shrink)
  observation.text.encode()  # it becomes tokens
  json.dumps(call.arguments).encode()  # and is stored
  if not observation.error and not observation.images:
    raise AssertionError("neither pictures nor an error")
  return observation.error.kind if observation.error else "ok"


def outputs(count: int, seed: int = 0) -> tuple[collections.Counter, list[str], float]:
  """How many of each kind, the crashes, and the seconds of the slowest."""
  shown = {video: seen(video) for video in (False, True)}
  kinds, crashes, slowest = collections.Counter(), [], 0.0
  for i in tqdm(range(count), desc="outputs", disable=None):
    rng = np.random.default_rng((seed, i))
    text, profile = output(rng), tools.PROFILES[i % 2]
    times = []
    for _ in range(3):  # the least of three: this machine may be busy
      start = time.perf_counter()
      try:
        kind = play(text, profile, shown[i % 3 == 0])
      except Exception as error:
        crashes.append(f"output {i}: {type(error).__name__}: {error}"[:300])
        break
      times.append(time.perf_counter() - start)
      if times[-1] < SLOWEST / 5:
        break
    else:
      pass
    if times:
      kinds[kind] += 1
      slowest = max(slowest, min(times))
  return kinds, crashes, slowest


# ---- Broken files --------------------------------------------------------------------


def records(count: int) -> list[dict]:
  return [
    {
      "qid": f"q{i}",
      "question": f"What is number {i}?",
      "answer": f"a{i}",
      "image": "0.png",
    }
    for i in range(count)
  ]


def write(kind: str, root: pathlib.Path, rows: list[dict]) -> tuple[pathlib.Path, str]:
  """A good file of a format -> the file, and its URI."""
  file = root / f"x.{kind}"
  if kind == "jsonl":
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
  elif kind == "json":
    file.write_text(json.dumps(rows))
  elif kind == "parquet":
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=4)
  elif kind == "arrayrecord":
    writer = ArrayRecordWriter(str(file), "group_size:1")
    for r in rows:
      writer.write(json.dumps(r).encode())
    writer.close()
  else:
    with zipfile.ZipFile(file, "w") as archive:
      for r in rows:
        out = io.BytesIO()
        Image.new("RGB", (30, 30), (len(r["qid"]), 9, 9)).save(out, "PNG")
        archive.writestr(f"{r['qid']}.png", out.getvalue())
    return file, f"images:x.{kind}"
  return file, f"{kind}:x.{kind}"


FORMATS = ("jsonl", "json", "parquet", "arrayrecord", "zip")


def damage(data: bytes, rng: np.random.Generator) -> bytes:
  """A file with one wound: cut, flipped bits, zeros, a part twice, swapped, or noise."""
  at, to = sorted(int(x) for x in rng.integers(0, len(data), 2))
  noise = rng.integers(0, 256, max(to - at, 1), dtype=np.uint8).tobytes()
  flipped = bytearray(data)
  for i in rng.integers(0, len(data), 5):
    flipped[i] ^= 1 << int(rng.integers(8))
  return [
    data[:at], bytes(flipped), data[:at] + b"\0" * (to - at) + data[to:],
    data[:to] + data[at:], data[to:] + data[:to], data[:at] + noise + data[to:],
  ][int(rng.integers(6))]  # fmt: skip


def files(count: int, seed: int = 0) -> tuple[collections.Counter, list[str]]:
  """What became of the records of `count` broken files of each format, and crashes."""
  told, crashes = collections.Counter(), []
  for kind in FORMATS:
    for i in tqdm(range(count), desc=kind, disable=None):
      rng = np.random.default_rng((seed, i, FORMATS.index(kind)))
      with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        Image.new("RGB", (30, 30)).save(root / "0.png")
        file, uri = write(kind, root, records(12))
        file.write_bytes(damage(file.read_bytes(), rng))
        try:
          source = sources.open_source(uri, root=root)
        except sources.SourceError as error:
          told[f"{kind}: refused"] += 1
          if len(str(error)) < 20:
            crashes.append(f"{kind} {i}: no reason: {error}")
          continue
        except Exception as error:
          crashes.append(f"{kind} {i}: {type(error).__name__}: {error}"[:300])
          continue
        for j in range(min(len(source), 100)):
          try:
            for media in source[j].media:
              source.load_media(media)
            told[f"{kind}: read"] += 1
          except (sources.BadRecord, image.ImageError) as error:
            told[f"{kind}: set aside"] += 1
            if len(str(error)) < 20:
              crashes.append(f"{kind} {i}, record {j}: no reason: {error}")
          except Exception as error:
            crashes.append(
              f"{kind} {i}, record {j}: {type(error).__name__}: {error}"[:300]
            )
  return told, crashes


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--outputs", type=int, default=100_000)
  parser.add_argument("--files", type=int, default=30, help="of each format")
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args(argv)
  kinds, crashes, slowest = outputs(args.outputs, args.seed)
  print(f"{args.outputs} outputs: {dict(kinds.most_common())}")
  print(f"the slowest took {slowest * 1e3:.1f} ms, allowed are {SLOWEST * 1e3:.0f}")
  told, wrong = files(args.files, args.seed)
  print(f"{args.files} broken files of each format: {dict(sorted(told.items()))}")
  crashes += wrong
  print(f"{len(crashes)} crashes")
  for line in crashes[:20]:
    print(" ", line)
  return int(bool(crashes) or slowest > SLOWEST)


if __name__ == "__main__":
  sys.exit(main())
