"""Quarantine: many kinds of broken input, each set aside with its reason; flat memory.

The kinds are the table in docs/data.md, which is checked here.
"""

import base64
import io
import json
import os
import pathlib
import re
import struct
import zipfile
import zlib

import layouts
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from marks import rest_slow
from PIL import Image

from pixel_jax import trajectory
from pixel_jax.data import media, pipeline, quarantine, records, sources, world
from pixel_jax.synthesis.templates import Templates
from pixel_jax.trajectory import Media

GOOD = 24
PLAN = {"rows": 1, "tokens": 400, "patches": 256, "shards": 1, "max_bad_share": 1.0}


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
  return layouts.codec(tmp_path_factory.mktemp("words"))


def task(path="images/0.png", **fields):
  shown = path if isinstance(path, list) else [{"kind": "image", "path": path}]
  return {"id": "t", "question": "What?", "answer": "A", "media": shown, **fields}


def talk(*said, media=("images/0.png",)):
  """HF rows: user and assistant in turn, a picture behind each call."""
  turns = [{"role": "user", "content": "<image>What?"}]
  for text in said[:-1]:
    turns.append({"role": "assistant", "content": text})
    turns.append({"role": "user", "content": "Here: <image>"})
  turns.append({"role": "assistant", "content": said[-1]})
  return {"messages": turns, "images": [*media, *["images/0.png"] * (len(said) - 1)]}


def png_of(width, height):
  """A PNG that claims a size and holds next to nothing."""
  head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
  return b"\x89PNG\r\n\x1a\n" + b"".join(
    struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d))
    for k, d in chunks
  )


def trace(codec, **changes):
  t, _ = Templates(kinds={"image/direct": 1})(
    codec, world.task(0, "train", 1), np.random.default_rng(0)
  )
  d = json.loads(trajectory.to_json(t))
  return {**d, **{k: f(d) for k, f in changes.items()}}


def broken(root, codec) -> dict[str, tuple]:
  """kind -> (a line of the file, what its reason says).  Writes the files it needs."""
  layouts.media_files(root)
  whole = (root / "images/0.png").read_bytes()
  (root / "half.png").write_bytes(whole[: len(whole) // 2])
  (root / "text.png").write_text("no picture")
  (root / "empty.png").write_bytes(b"")
  (root / "bomb.png").write_bytes(png_of(60_000, 60_000))
  Image.new("RGB", (4100, 20)).save(root / "long.png")
  Image.fromarray(np.ones((9, 9), np.float32), "F").save(root / "float.tiff")
  Image.new("RGB", (41, 36)).save(root / "wide.png")
  (root / "clip.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + b"x" * 200)
  (root.parent / "secret.png").write_bytes(whole)
  os.symlink(root.parent / "secret.png", root / "link.png")
  (root / "no.zip").write_text("PK, not")
  with zipfile.ZipFile(root / "all.zip", "w", zipfile.ZIP_DEFLATED) as z:
    z.writestr("bomb.png", b"\0" * (media.SMALL + 1))
    z.writestr("a.png", whole, zipfile.ZIP_STORED)
    z.writestr("locked.png", whole, zipfile.ZIP_STORED)
  data = bytearray((root / "all.zip").read_bytes())
  data[data.index(whole) + 60] ^= 1
  for place in (m.start() for m in re.finditer(rb"PK\x01\x02", bytes(data))):
    if data[place + 46 : place + 56] == b"locked.png":
      data[place + 8] |= 1  # "encrypted"
  (root / "all.zip").write_bytes(data)

  crop = layouts.crop
  return {
    "a line that is no JSON": ("{", "Expecting"),
    "a line that is no UTF-8": (b'{"id": "\xff"}', "utf-8"),
    "a line that is no object": ("[1, 2]", "JSON object"),
    "JSON nested without end": ("[" * 100_000 + "]" * 100_000, "recursion"),
    "fields of no known layout": ({"text": "hello"}, "no layout"),
    "a field of a task missing": ({"id": "t", "media": []}, "missing"),
    "a field of a task unknown": (task(anwser="A"), "unknown"),
    "an answer missing": (task(answer=[]), "no answer"),
    "an empty answer": (task(answer=" "), "no answer"),
    "an answer that is no text": (
      {"question": "What?", "answer": {"a": 1}, "image": []},
      "no answer",
    ),
    "an empty question": (task(question=""), "no question"),
    "half a character": (task(question="What \ud83d?"), "surrogates not allowed"),
    "a file that is absent": (task("images/none.png"), "no file"),
    "a path outside of the root": (task("../secret.png"), "outside of the root"),
    "an absolute path": (task("/etc/passwd"), "outside of the root"),
    "a link that leads outside": (task("link.png"), "outside of the root"),
    "a path with NUL": (task("a\0.png"), "NUL"),
    "a path that is no text": (task([{"kind": "image", "path": 3}]), "no text"),
    "an address in the net": (
      {"question": "What?", "answer": "A", "image": "https://example.org/a.png"},
      "in the net",
    ),
    "half a picture": (task("half.png"), "cannot be decoded"),
    "text instead of a picture": (task("text.png"), "cannot be decoded"),
    "an empty picture": (task("empty.png"), "cannot be decoded"),
    "a picture that inflates without bound": (task("bomb.png"), "DecompressionBomb"),
    "a picture too long for its width": (task("long.png"), "aspect ratio"),
    "floating point pixels": (task("float.tiff"), "floating point"),
    "media of an unknown kind": (task([{"kind": "audio", "path": "a"}]), "audio"),
    "a clip that cannot be decoded": (
      task([{"kind": "video", "path": "clip.mp4"}]),
      "cannot be decoded",
    ),
    "a clip without frames": (task([{"kind": "video", "path": []}]), "0 frames"),
    "frames of different sizes": (
      task([{"kind": "video", "path": ["videos/0/0.jpg", "wide.png"]}]),
      "differ in size",
    ),
    "an archive that is none": (task("zip:no.zip!a.png"), "whole zip"),
    "a member that is absent": (task("zip:all.zip!b.png"), "no such member"),
    "a member that inflates without bound": (task("zip:all.zip!bomb.png"), "zip bomb"),
    "a member whose checksum is wrong": (task("zip:all.zip!a.png"), "CRC"),
    "a member that is encrypted": (task("zip:all.zip!locked.png"), "encrypted"),
    "an archive outside of the root": (
      task("zip:../x.zip!a.png"),
      "outside of the root",
    ),
    "a row that a file does not have": (
      task("parquet:x.parquet#99/image"),
      "has 1 records",
    ),
    "a value that a row does not have": (
      task("parquet:x.parquet#0/picture"),
      "no 'picture'",
    ),
    "records outside of the root": (
      task("jsonl:../../x.jsonl#0/image"),
      "outside of the root",
    ),
    "a pattern of files as a name": (task("parquet:*.parquet#0/image"), "pattern"),
    "base64 that is damaged": (
      {"question": "What?", "answer": "A", "image": "data:image/png;base64,?"},
      "base64",
    ),
    "a place without a picture": (
      {**talk("\\boxed{A}"), "images": [], "image": ["images/0.png"]},
      "lacks",
    ),
    "an unknown role": (
      {"messages": [{"role": "narrator", "content": "Once"}]},
      "narrator",
    ),
    "two turns of one side": (
      {"messages": [{"role": "user", "content": "A?"}] * 2},
      "expected user, assistant",
    ),
    "a trace that ends with a call": (talk(crop([0, 0, 1, 1], 1)), "ends with a call"),
    "a call that is no JSON": (
      talk("<tool_call>{no}</tool_call>", "\\boxed{A}"),
      "fails when it is run",
    ),
    "a call that fails when it is run": (
      talk(crop([0.5, 0.5, 0.4, 0.4], 1), "\\boxed{A}"),
      "too small",
    ),
    "an operation that we do not have": (
      {
        "messages": [
          {"role": "user", "content": "What?"},
          {
            "role": "assistant",
            "tool_calls": [{"function": {"name": "python", "arguments": "{}"}}],
          },
          {"role": "tool", "content": "3"},
          {"role": "assistant", "content": "\\boxed{3}"},
        ]
      },
      "Unknown function",
    ),
    "a call on a picture that is not there": (
      talk(crop([0, 0, 0.9, 0.9], 7), "\\boxed{A}"),
      "numbered in range",
    ),
    "a result with too few pictures": (
      {
        "messages": [
          {"role": "user", "content": "<image>What?"},
          {"role": "assistant", "content": crop([0, 0, 0.9, 0.9], 1)},
          {"role": "user", "content": "Here it is."},
          {"role": "assistant", "content": "\\boxed{A}"},
        ],
        "images": ["images/0.png"],
      },
      "shows 0 pictures",
    ),
    "a text longer than a row": (task(question="What? " * 200), "tokens and"),
    "more pictures than a row holds": (
      task([{"kind": "image", "path": p} for i in (0, 1) for p in layouts.frames(i)]),
      "patches; a row",
    ),
    "a trace of another profile": (
      trace(codec, profile=lambda d: "released"),
      "profile",
    ),
    "a trace of another tokenizer": (
      trace(codec, ids=lambda d: [10**6, *d["ids"][1:]]),
      "another tokenizer",
    ),
    "a trace of unequal lists": (
      trace(codec, weight=lambda d: d["weight"][1:]),
      "length",
    ),
    "a trace whose pictures have changed": (
      trace(
        codec,
        task=lambda d: {
          **d["task"],
          "media": [{"kind": "image", "path": "images/0.png"}],
        },
        slots=lambda d: [{**s, "grid": [1, 2, 2], "length": 1} for s in d["slots"]],
      ),
      "redrawn",
    ),
  }


@pytest.fixture(scope="module")
def dirty(tmp_path_factory, codec):
  root = tmp_path_factory.mktemp("dirty") / "root"
  root.mkdir()
  kinds = broken(root, codec)
  row = {"image": (root / "images/0.png").read_bytes()}
  pq.write_table(pa.Table.from_pylist([row]), root / "x.parquet")
  lines = [task(f"images/{i % 4}.png", id=f"good{i}") for i in range(GOOD)]
  lines += [line for line, _ in kinds.values()]
  with (root / "x.jsonl").open("wb") as f:
    for line in lines:
      line = json.dumps(line) if isinstance(line, dict) else line
      f.write((line if isinstance(line, bytes) else line.encode()) + b"\n")
  return root, kinds


def quarantined(workdir):
  lines = (workdir / "quarantine.jsonl").read_text().splitlines()
  return {d["index"]: d["reason"] for d in map(json.loads, lines)}


@pytest.mark.parametrize("threads", [1, 3])
def test_every_kind_of_broken_input_is_set_aside_with_its_reason(
  dirty, codec, tmp_path, threads
):
  root, kinds = dirty
  assert len(kinds) >= 20
  source = sources.open_source(
    "jsonl:x.jsonl",
    root=root,
    codec=codec,
    synthesis=Templates(kinds={"image/direct": 1, "video/direct": 1}),
  )
  n = len(source)
  assert n == GOOD + len(kinds)
  stream = pipeline.batches(
    source, codec, seed=0, workdir=tmp_path, threads=threads, pack_window=n, **PLAN
  )
  seen = 0
  while stream.counts()["data/records"] < 2 * n:  # the first epoch whole
    batch = next(stream)
    if stream.counts()["data/records"] == n:
      seen += int(batch["segment"].max())
      counts = stream.counts()
  stream.close()
  assert seen == GOOD  # every good one once
  assert counts == {
    "data/records": n,
    "data/bad_records": len(kinds),
    "data/left_out": 0,
  }
  reasons = quarantined(tmp_path)
  assert sorted(reasons) == list(range(GOOD, n))
  for index, (kind, (_, says)) in enumerate(kinds.items(), GOOD):
    assert says in reasons[index], kind


def test_questions_are_looked_at_too(dirty, codec, tmp_path):
  root, kinds = dirty
  source = sources.open_source("jsonl:x.jsonl", root=root, codec=codec)
  plan = dict(seed=0, shards=1, batch=1, max_bad_share=1.0, workdir=tmp_path)
  stream, names = pipeline.tasks(source, **plan), []
  while stream.counts()["data/records"] < len(source):
    names += [t.id for t in next(stream).tasks]
  assert set(names) >= {f"good{i}" for i in range(GOOD)}
  reasons = quarantined(tmp_path)
  assert min(reasons) == GOOD and len(reasons) > 20
  # A question has no calls: what a trace does wrong does not matter for it.
  told = [i for i, kind in enumerate(kinds, GOOD) if " call " in kind]
  assert not [i for i in told if "it is run" in reasons.get(i, "")]


def test_the_share_ends_the_run(dirty, codec, tmp_path):
  root, kinds = dirty
  source = sources.open_source(
    "jsonl:x.jsonl",
    root=root,
    codec=codec,
    synthesis=Templates(kinds={"image/direct": 1, "video/direct": 1}),
  )
  plan = {**PLAN, "max_bad_share": (len(kinds) - 1) / quarantine.FEW}
  stream = pipeline.batches(source, codec, seed=0, pack_window=200, **plan)
  with pytest.raises(pipeline.DataError, match="max_bad_share"):
    next(stream)
  plan["max_bad_share"] = (2 * len(kinds) + 9) / quarantine.FEW
  assert next(pipeline.batches(source, codec, seed=0, pack_window=76, **plan))


def test_the_table_of_the_page_names_every_kind(dirty):
  page = (pathlib.Path(__file__).parent.parent / "docs/data.md").read_text()
  for kind in dirty[1]:
    assert f"| {kind} |" in page, kind


# ---- Files that cannot be opened -----------------------------------------------------


@pytest.mark.parametrize(
  ("uri", "content", "says"),
  [
    ("json:x", b'{"a": 1}', "a list"),
    ("json:x", b'[{"a": 1} {"a": 2}]', "behind record 0"),
    ("json:x", b'[{"a": 1}, {"a"', "cannot be read"),
    ("json:x", b"[" * 100_000, "cannot be read"),
    ("json:x", b"[]", "no record"),
    ("jsonl:x", b"\n \n", "no record"),
    ("jsonl:*.jsonl", b"", "no record"),
    ("parquet:x", b"PAR1 no", "cannot be read"),
    ("parquet:x", b"", "cannot be read"),
    ("arrayrecord:x", b"no", "cannot be read"),
    ("tfds:x/train", b"no", "tfds:NAME/SPLIT"),
    ("json:none", b"", "no file"),
  ],
)
def test_a_file_that_cannot_be_opened_is_told_at_once(uri, content, says, tmp_path):
  (tmp_path / "x").write_bytes(content)
  with pytest.raises(sources.SourceError, match=says):
    sources.open_source(uri, root=tmp_path)


# ---- Memory --------------------------------------------------------------------------


def resident() -> int:
  """Bytes of this process, files that are mapped aside."""
  pages = [int(x) for x in pathlib.Path("/proc/self/statm").read_text().split()]
  return (pages[1] - pages[2]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("n", rest_slow([8_000, 100_000]))
def test_memory_stays_flat_over_many_records(n, tmp_path):
  out = io.BytesIO()
  Image.new("RGB", (30, 30)).save(out, "PNG")
  with zipfile.ZipFile(tmp_path / "images.zip", "w") as z:
    z.writestr("images/0.png", out.getvalue())
  with (tmp_path / "x.jsonl").open("w") as f:
    for i in range(n):
      f.write(json.dumps(task(id=str(i))) + "\n")
  source = sources.open_source("jsonl:x.jsonl", root=tmp_path)
  few = n // 100
  stream = pipeline.tasks(source, seed=0, shards=4, batch=few, workdir=tmp_path)
  names, after = set(), {}
  for done in range(few, n + 1, few):
    names |= {int(t.id) for t in next(stream).tasks}
    after[done] = resident()
  stream.close()
  assert names == set(range(n))
  names.clear()
  # The set of names itself is 10 MB.
  assert after[n] - after[n // 10] < 30e6, after


@pytest.mark.parametrize(
  ("n", "small"), rest_slow([(10_000, 0), (100_000, 4 << 20), (30_000, 0)])
)
def test_parquet_keeps_little(n, small, tmp_path, monkeypatch):
  """Row groups of 2 MB that are kept for a while, and such that are unpacked."""
  monkeypatch.setattr(records, "KEPT", 4 << 20)
  monkeypatch.setattr(records, "SMALL_GROUP", small)
  noise = np.random.default_rng(0)
  schema = pa.schema(
    [("question", pa.string()), ("answer", pa.string()), ("image", pa.binary())]
  )
  with pq.ParquetWriter(tmp_path / "x.parquet", schema) as writer:
    for first in range(0, n, 1000):
      rows = [
        {"question": f"{i}?", "answer": "A", "image": noise.bytes(2000)}
        for i in range(first, first + 1000)
      ]
      writer.write_table(pa.Table.from_pylist(rows, schema))
  source = sources.open_source("parquet:x.parquet", root=tmp_path)
  before = resident()
  for i in range(n):
    assert source[i].question == f"{i}?"
  assert resident() - before < 2000 * n * 0.3


def test_a_data_uri_is_a_picture(tmp_path):
  layouts.media_files(tmp_path)
  raw = (tmp_path / "images/0.png").read_bytes()
  uri = "data:image/png;base64," + base64.b64encode(raw).decode()
  line = {"question": "What?", "answer": "A", "images": [uri]}
  (tmp_path / "x.jsonl").write_text(json.dumps(line) + "\n")
  source = sources.open_source("jsonl:x.jsonl", root=tmp_path)
  (shown,) = source[0].media
  assert shown == Media("image", "jsonl:x.jsonl#0/images/0")
  assert source.load_media(shown).size == Image.open(io.BytesIO(raw)).size
