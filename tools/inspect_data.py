"""What a URI of data holds, and what the model will see of it.

  pixel-jax inspect URI [--root=DIR] [--init=DIR] [--records=1000]
    [--tokens=8192 --patches=32768] [--out=page.html]

A sample of the records is read; each is made into what `data.uri=URI` makes of
it: a trace with its pictures, or the prompt of a question.  Printed are counts, fields,
histograms of length and pixels, rows and packing, what is set aside and why, and one
example with its placeholders folded.  --out writes a page of that, with boxes drawn on the
pictures, the tokens coloured by what is learned of them, and records that were set aside.

--init is a workdir or a converted checkpoint: its tokenizer counts the tokens (without
it the tiny one does, one token a letter), its codec gives the pixel budgets.
"""

import argparse
import collections
import dataclasses
import json
import math
import pathlib
import re
import sys
import tempfile
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from pixel_jax.chat import encode, tokenizer
from pixel_jax.data import formats, pack, sources, world
from pixel_jax.data.retell import retell
from pixel_jax.run import checkpoint, policies
from pixel_jax.trajectory import Trajectory
from pixel_jax.view import data as data_page
from pixel_jax.view.data import Table
from pixel_jax.view.pictures import Shown

BARS = 40  # letters of the longest bar
ROWS = (1024, 2048, 4096, 8192, 16384)  # buckets of tokens, with 4 patches for each
PADS = re.compile(r"(<\|(?:image|video)_pad\|>)+")


@dataclasses.dataclass
class Seen:
  """One record that can be used."""

  index: int
  trajectory: Trajectory  # of a question: the prompt
  example: encode.Example
  pixels: list[int]  # of every picture of the question, as the file has it
  what: str  # "trace", "question" or "bare"


@dataclasses.dataclass
class Bad:
  """Records that cannot be used, for one reason."""

  reason: str  # as the first record says it
  index: int
  count: int = 0


@dataclasses.dataclass
class Look:
  """What was found in a source."""

  records: int
  read: int
  fields: collections.Counter
  seen: list[Seen]
  bad: list[Bad]  # the most frequent first


def look(source, codec: encode.Codec, most: int) -> Look:
  """Reads `most` records, drawn from a fixed seed."""
  count = min(len(source), most)
  found = Look(len(source), count, collections.Counter(), [], [])
  told: dict[str, Bad] = {}  # by the reason without names and numbers
  drawn = np.random.default_rng(0).permutation(len(source))[:count]
  for i in tqdm(sorted(drawn.tolist()), desc="records", leave=False, disable=None):
    try:
      if isinstance(source, sources.File):
        found.fields.update(source.records[i].keys())
      found.seen.append(_see(source, codec, i))
    except Exception as error:  # a decoder of a damaged file raises anything
      said = f"{type(error).__name__}: {error}"
      kind = re.sub(r"'[^']*'|\S*[/#]\S*|0x\w+|\d+", "·", said)
      told.setdefault(kind[:120], Bad(said[:240], i)).count += 1
  found.bad = sorted(told.values(), key=lambda bad: -bad.count)
  return found


def _see(source, codec: encode.Codec, i: int) -> Seen:
  record, pixels = source[i], []

  def load(media):
    loaded = source.load_media(media)
    picture = loaded.frames[0] if media.kind == "video" else loaded
    pixels.append(picture.width * picture.height)
    return loaded

  what = "trace"
  if not isinstance(record, Trajectory):
    what = "question" if record.question or record.answer else "bare"
    if what == "question":
      formats.check_task(record)
    prompt = encode.Conversation(codec, record, load)
    made = prompt.trajectory, prompt.pixels
  elif record.turns and not record.ids:
    made = retell(record, codec, load)
  else:
    made = record, encode.redraw(record, codec, load)
  return Seen(i, made[0], encode.example(*made), pixels, what)


# ---- Told ----------------------------------------------------------------------------


def histogram(values: Sequence[int], bins: int = 10) -> list[tuple[int, int, int]]:
  """(from, to, how many); the steps are those of a logarithm."""
  values = np.asarray(values)
  low, high = max(int(values.min()), 1), max(int(values.max()), 1)
  edges = np.unique(np.geomspace(low, high + 1, bins + 1).round().astype(int))
  if len(edges) < 2:
    edges = np.array([low, high + 1])
  counts, _ = np.histogram(np.maximum(values, 1), edges)
  return [(int(a), int(b) - 1, int(n)) for a, b, n in zip(edges, edges[1:], counts)]


def packing(examples: Sequence[encode.Example], T: int, P: int) -> tuple:
  """(share that fits, rows, utilisation of tokens, of patches)."""
  fitting = [e for e in examples if pack.fits(e, T, P)]
  rows = pack.first_fit(fitting, T, P)
  used = np.zeros(2)
  for row in rows:
    pictures = {k: n for i in row for k, n in pack.distinct(fitting[i]).items()}
    used += sum(len(fitting[i].tokens) for i in row), sum(pictures.values())
  share = used / (max(len(rows), 1) * np.array([T, P]))
  return len(fitting) / max(len(examples), 1), len(rows), *share.tolist()


def fold(text: str) -> str:
  """The text with a run of placeholders as one and its length."""

  def count(run):
    return f"{run[1]} x {len(run[0]) // len(run[1])}"

  return PADS.sub(count, text)


def tables(found: Look) -> list[Table]:
  """Everything that is counted, as it is printed and drawn."""
  seen, kinds = found.seen, collections.Counter()
  for s in seen:
    shown = [m.kind for m in s.trajectory.task.media] or ["text"]
    mix = f"{len(shown)} {shown[0]}s" if len(shown) > 1 else shown[0]
    kinds[f"{s.what}, {mix}"] += 1
  calls = collections.Counter(
    f"{c.name or '(unreadable)'}{', fails' if c.error else ''}{', planted' * c.planted}"
    for s in seen
    for c in s.trajectory.calls
  )
  out = [Table("kinds", kinds.most_common())]
  out += [Table("fields", found.fields.most_common())] if found.fields else []
  out += [Table("calls", calls.most_common())] if calls else []
  lengths = [len(s.example.tokens) for s in seen]
  pixels = [n for s in seen for n in s.pixels]
  for name, values in (("tokens", lengths), ("pixels of a picture", pixels)):
    if values:
      rows = [(f"{a:>10,} .. {b:>10,}", n) for a, b, n in histogram(values)]
      out.append(Table(f"{name} (mean {np.mean(values):,.0f})", rows))
  return out


def buckets(found: Look, T: int, P: int) -> list[tuple]:
  """(T, P, share that fits, rows, use of T, of P): as configured, then others."""
  examples = [s.example for s in found.seen]
  sizes = dict.fromkeys([(T, P), *((t, 4 * t) for t in ROWS)])
  return [(t, p, *packing(examples, t, p)) for t, p in sizes]


def tell(
  uri: str, found: Look, counted: list[Table], packed: list[tuple], codec: encode.Codec
) -> list[str]:
  """The report as lines.

  Args:
    counted: of `tables`.
    packed: of `buckets`.
  """
  out = [f"{uri}: {found.records:,} records, {found.read:,} of them read"]
  for table in counted:
    top = max((n for _, n in table.rows), default=1) or 1
    out += ["", table.title]
    if ".." in (table.rows or [("", 0)])[0][0]:
      out += [
        f"  {name} {n:>7,} {'█' * math.ceil(n / top * BARS)}" for name, n in table.rows
      ]
    else:
      out += [f"  {n:>7,} {name}" for name, n in table.rows]
  ids = collections.Counter(s.trajectory.task.id for s in found.seen)
  if doubled := [name for name, n in ids.items() if n > 1]:
    records = sum(ids[name] for name in doubled)
    out += ["", f"ids that several records share: {len(doubled)}, by {records} records, "
            f"the first is {doubled[0]!r:.60}"]  # fmt: skip
  if found.bad:
    out += ["", "set aside"]
    out += [f"  {bad.count:>7,} {bad.reason}" for bad in found.bad[:20]]
  if not found.seen:
    return [*out, "", "no record can be used"]
  out += ["", "rows of T tokens and P patches: share that fits, rows, use of T, of P"]
  for i, (t, p, fit, rows, tokens, patches) in enumerate(packed):
    mark = "" if i else " <- --tokens, --patches"
    out.append(
      f"  T {t:>6,} P {p:>6,} {fit:>7.1%} {rows:>7,} {tokens:>6.3f} {patches:>6.3f}{mark}"
    )
  first = found.seen[len(found.seen) // 2]
  text = fold(codec.tokenizer.decode(first.trajectory.ids))
  return [*out, "", f"record {first.index} as the model sees it", text]


# ---- Shown ---------------------------------------------------------------------------


def write_page(
  out: pathlib.Path, uri: str, source, found: Look, counted, packed, codec, most: int
) -> int:
  """The page; how many examples it has."""
  chosen = found.seen[:: max(1, math.ceil(len(found.seen) / most))]
  drawn = [*counted]
  if found.seen:
    T, P, *_ = packed[0]
    for i, name in ((2, "examples that fit"), (4, "use of T"), (5, "use of P")):
      rows = [(f"T {b[0]:,}, P {b[1]:,}", b[i]) for b in packed]
      note = f"Rows of T tokens and P patches; the first is --tokens={T} --patches={P}."
      drawn.append(Table(name, rows, note, share=True))
  told = f"{found.records:,} records, {found.read:,} of them read"
  if count := sum(bad.count for bad in found.bad):
    told += f", {count:,} set aside"
  examples = [
    (s.trajectory, source.load_media, f"{s.what} · {len(s.example.tokens):,} tokens")
    for s in chosen
  ]
  faults = [_fault(source, bad) for bad in found.bad[:20]]
  html = data_page.document(uri, told, drawn, faults, examples, codec)
  out.parent.mkdir(parents=True, exist_ok=True)
  out.write_text(html, encoding="utf-8")
  return len(chosen)


def _fault(source, bad: Bad) -> data_page.Fault:
  """With the record as it stands, and those of its pictures that can be opened."""
  record, pictures = "", []
  try:
    if isinstance(source, sources.File):
      record = json.dumps(source.records[bad.index], default=str, ensure_ascii=False)
    task = source[bad.index]
    task = task.task if isinstance(task, Trajectory) else task
    record = record or json.dumps(dataclasses.asdict(task), default=str)
    for media in task.media[:4]:
      try:
        loaded = source.load_media(media)
        frames = loaded.frames[:4] if media.kind == "video" else [loaded]
        pictures += [Shown(frame, str(media.path)) for frame in frames]
      except Exception:  # it may be the reason
        continue
  except Exception as error:
    record = record or f"it cannot be read: {error}"
  return data_page.Fault(bad.reason, bad.count, bad.index, record[:4000], pictures)


def main(argv: Sequence[str] | None = None) -> int:
  """Prints, and returns 1 where no record can be used."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("uri", metavar="URI", help="as data.uri: docs/data.md")
  parser.add_argument("--root", default="", help="where the paths begin")
  parser.add_argument("--init", default="", help="whose tokenizer and codec to take")
  parser.add_argument("--records", type=int, default=1000, help="to read at most")
  parser.add_argument("--tokens", type=int, default=8192, help="of a row")
  parser.add_argument("--patches", type=int, default=32768, help="of a row")
  parser.add_argument("--examples", type=int, default=60, help="on the page at most")
  parser.add_argument("--out", type=pathlib.Path, help="write a page")
  args = parser.parse_args(argv)
  if min(args.records, args.examples) < 1:
    parser.error("--records and --examples must be 1 or more")
  with tempfile.TemporaryDirectory() as folder:
    try:
      if args.init:
        codec = policies.open_codec(args.init)
      else:
        words = tokenizer.make_tiny(folder, world.scaffolds())
        codec = policies.make_codec(words, {})
      source = sources.open_source(args.uri, root=args.root, codec=codec)
      pack.check_limits(args.tokens, args.patches)
    except (ValueError, checkpoint.CheckpointError) as error:
      parser.error(str(error))
    found = look(source, codec, args.records)
    counted, packed = tables(found), buckets(found, args.tokens, args.patches)
    print("\n".join(tell(args.uri, found, counted, packed, codec)))
    if args.out:
      n = write_page(
        args.out, args.uri, source, found, counted, packed, codec, args.examples
      )  # fmt: skip
      size = args.out.stat().st_size / 1e6
      print(f"\npage: {args.out.resolve()} ({n} records, {size:.1f} MB)")
  return 0 if found.seen else 1


if __name__ == "__main__":
  sys.exit(main())
