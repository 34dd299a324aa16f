"""Sources: what a URI opens, and what a record may not do."""

import dataclasses
import json
import os

import numpy as np
import pytest
from PIL import Image

from pixel_jax import trajectory
from pixel_jax.chat import encode, tokenizer
from pixel_jax.data import formats, media, pipeline, records, sources, world
from pixel_jax.synthesis import templates
from pixel_jax.trajectory import Media, Task


def write(path, *records):
  lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
  path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def record(**fields):
  media = [{"kind": "image", "path": "a.png"}]
  return {"id": "q", "question": "What?", "answer": "O", "media": media, **fields}


@pytest.mark.parametrize(
  ("uri", "share"),
  [
    ("world:train", 0.25),
    ("world:test/image", 0),
    ("world:5/val/video", 1),
    ("world:full_val", 0.5),
  ],
)
def test_the_world_as_a_source(uri, share):
  source = sources.open_source(uri)
  tasks = [source[i] for i in range(200)]
  assert len({t.id for t in tasks}) == 200
  assert np.mean([t.media[0].kind == "video" for t in tasks]) == pytest.approx(share)
  source[len(source) - 1]
  with pytest.raises(IndexError):
    source[len(source)]
  assert source.synthesis is None


def test_kinds_decide_how_often_there_is_a_video():
  kinds = {"image/single": 0.3, "video/single": 0.3, "video/number": 0.3}
  source = sources.open_source(
    "world:train", synthesis=templates.Templates(kinds=kinds, jitter=1.0)
  )
  tasks = [source[i] for i in range(300)]
  assert abs(np.mean([t.media[0].kind == "video" for t in tasks]) - 2 / 3) < 0.01
  assert len({t.id for t in tasks}) == 300
  source[len(source) - 1]
  assert source.synthesis.jitter == 1.0


@pytest.mark.parametrize(
  "uri",
  [
    "world:",
    "world:nowhere",
    "world:0/train/image/3",
    "ftp:x",
    "jsonl:no.jsonl",
    "x.jsonl",
  ],
)
def test_uris_that_open_nothing(uri, tmp_path):
  with pytest.raises(sources.SourceError):
    sources.open_source(uri, root=tmp_path)
  with pytest.raises(templates.SynthesisError, match="unknown"):
    sources.open_source(
      "world:train", synthesis=templates.Templates(kinds={"image/nothing": 1.0})
    )


def test_lines_in_any_order(tmp_path):
  task = world.task(0, "train", 1)
  words = tokenizer.make_tiny(tmp_path / "words", world.scaffolds())
  trace, _ = templates.Templates()(
    encode.Codec(tokenizer=words), task, np.random.default_rng(0)
  )
  write(
    tmp_path / "x.jsonl",
    record(id="ä"),
    "",
    trajectory.to_json(trace),
    "   ",
    record(id="last", answer=["O", "o"]),
  )
  source = sources.open_source("jsonl:x.jsonl", root=tmp_path)
  assert len(source) == 3
  assert source[2].id == "last" and source[0].id == "ä"
  assert source[1] == trace
  assert source[2].media == [Media("image", "a.png")]
  assert dataclasses.asdict(source[0])["answer"] == "O"


@pytest.mark.parametrize(
  ("line", "says"),
  [
    ("{", "x.jsonl#1"),
    ("[1, 2]", "JSON object"),
    (json.dumps({"id": "q"}), "no layout"),
    (json.dumps(record(anwser="O")), "unknown"),
    (json.dumps(record(answer="")), "no answer"),
    (json.dumps(record(answer=[])), "no answer"),
    (json.dumps(record(answer=None)), "missing"),
    (json.dumps(record(question=" ")), "no question"),
    (json.dumps(record(media=[{"kind": "image"}])), "path"),
    (json.dumps(record(media=3)), "not iterable"),
    (json.dumps(record(media="a.png")), "expected a list of"),
    (json.dumps({"task": 3}), "x.jsonl#1"),
  ],
)
def test_bad_lines_say_where_and_why(tmp_path, line, says):
  write(tmp_path / "x.jsonl", record(), line)
  source = sources.open_source("jsonl:x.jsonl", root=tmp_path)
  assert source[0].id == "q"
  with pytest.raises(records.BadRecord, match=says):
    source[1]


def test_the_mark_of_windows_is_no_part_of_a_line(tmp_path):
  text = json.dumps(record())
  (tmp_path / "x.jsonl").write_bytes(f"\ufeff{text}\r\n{text}\r\n".encode())
  source = sources.open_source("jsonl:x.jsonl", root=tmp_path)
  assert [source[i].id for i in range(len(source))] == ["q", "q"]


def test_numbers_are_answers_and_ids(tmp_path):
  lines = [record(id=7, answer=3), record(answer=[3, "three"]), record(answer={"a": 1})]
  rows = [{"question": "How many?", "answer": 0, "image": "a.png", "id": 0}]
  write(tmp_path / "x.jsonl", *lines, *rows)
  source = sources.open_source("jsonl:x.jsonl", root=tmp_path)
  assert (source[0].id, source[0].answer) == ("7", "3")
  assert source[1].answer == ["3", "three"]
  with pytest.raises(records.BadRecord, match="no answer"):
    source[2]
  assert (source[3].id, source[3].answer) == ("0", "0")


def test_media_stay_below_the_root(tmp_path):
  root = tmp_path / "root"
  (root / "sub").mkdir(parents=True)
  picture = Image.new("RGB", (8, 8), (1, 2, 3))
  picture.save(root / "sub" / "in.png")
  picture.save(tmp_path / "out.png")
  os.symlink(tmp_path / "out.png", root / "link.png")

  def load(path, kind="image"):
    return media.Library(root).load(Media(kind, path))

  assert load("sub/in.png").size == (8, 8)
  assert load("sub/../sub/in.png").size == (8, 8)
  assert load(str(root / "sub" / "in.png")).size == (8, 8)
  for path in ("../out.png", str(tmp_path / "out.png"), "link.png", "/etc/passwd"):
    with pytest.raises(records.BadRecord, match="outside of the root"):
      load(path)
    with pytest.raises(records.BadRecord, match="outside of the root"):
      load(["sub/in.png", path], "video")
  with pytest.raises(records.BadRecord, match="no file"):
    load("sub/none.png")
  with pytest.raises(records.BadRecord, match="kind"):
    load(["sub/in.png", "sub/in.png"], "image")
  assert len(load(["sub/in.png"] * 3, "video").frames) == 3
  assert load("world:0/train/0").size == (252, 252)


def test_a_task_needs_an_answer():
  formats.check_task(Task("t", "What?", ["", "O"][1:], []))
  with pytest.raises(records.BadRecord, match="no answer"):
    formats.check_task(Task("t", "What?", ["O", ""], []))


# ---- Mixtures and filters ------------------------------------------------------------


def write_tasks(root, name, n):
  lines = [record(id=f"{name}{i}", media=[]) for i in range(n)]
  write(root / f"{name}.jsonl", *lines)
  return f"jsonl:{name}.jsonl"


def test_a_mixture_without_weights_holds_every_record_once(tmp_path):
  uri = ",".join(
    write_tasks(tmp_path, k, n) for k, n in (("a", 7), ("b", 30), ("c", 1))
  )
  source = sources.open_source(uri, root=tmp_path)
  names = [source[i].id for i in range(len(source))]
  assert sorted(names) == sorted(
    [f"a{i}" for i in range(7)] + [f"b{i}" for i in range(30)] + ["c0"]
  )
  # Evenly spread: no half has much more of one than the other.
  assert abs(sum(n[0] == "a" for n in names[:19]) - 3.5) <= 1
  assert [source[i].id for i in (5, 3, 5)] == [names[5], names[3], names[5]]
  with pytest.raises(IndexError):
    source[38]


@pytest.mark.parametrize(
  ("sizes", "weights", "counts"),
  [
    ((10, 90), (1, 1), (90, 90)),  # the small one comes round nine times
    ((10, 90), (0.25, 0.75), (30, 90)),
    ((50, 50), (3, 1), (150, 50)),
    ((5, 5, 10), (1, 1, 2), (5, 5, 10)),
  ],
)
def test_weights_are_shares_and_nothing_is_never_seen(sizes, weights, counts, tmp_path):
  uri = ",".join(write_tasks(tmp_path, "abc"[k], n) for k, n in enumerate(sizes))
  source = sources.open_source(uri, root=tmp_path, weights=weights)
  names = [source[i].id for i in range(len(source))]
  for k, (size, count) in enumerate(zip(sizes, counts)):
    mine = [n for n in names if n[0] == "abc"[k]]
    assert len(mine) == count and len(set(mine)) == size
    seen = [mine.count(n) for n in set(mine)]
    assert max(seen) - min(seen) <= 1
    for end in range(8, len(names), 8):  # even everywhere, not only in the whole
      share = sum(n[0] == "abc"[k] for n in names[:end])
      assert abs(share - end * count / len(names)) <= 1


def test_a_mixture_loads_the_pictures_of_its_parts(tmp_path):
  Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "a.png")
  write(tmp_path / "x.jsonl", record())
  source = sources.open_source("jsonl:x.jsonl,world:val/image", root=tmp_path)
  sizes = {source.load_media(source[i].media[0]).size for i in range(len(source))}
  assert sizes == {(8, 8), (252, 252)}


@pytest.mark.parametrize(
  ("uri", "weights", "says"),
  [
    ("world:val,world:test", (1,), "for 2 sources"),
    ("world:val,world:test", (1, 0), "above 0"),
    ("world:val,world:test", (1, float("nan")), "above 0"),
    ("world:val,world:test", (1, 1e9), "larger weights"),
    (",", (), "empty"),
  ],
)
def test_mixtures_that_make_no_sense(uri, weights, says, tmp_path):
  with pytest.raises(sources.SourceError, match=says):
    sources.open_source(uri, root=tmp_path, weights=weights)


@pytest.mark.parametrize(
  "filter", [{"min_tokens": -1}, {"min_pixels": 9, "max_pixels": 8}]
)
def test_filters_that_make_no_sense(filter):
  with pytest.raises(sources.SourceError, match=r"data\.filter"):
    sources.open_source("world:val", filter=filter)
  with pytest.raises(sources.SourceError, match="codec"):
    sources.open_source("world:val", filter={"max_tokens": 5})


def sizes_and_texts(root):
  """16 questions of 4 lengths on pictures of 4 sizes."""
  lines = []
  for i in range(16):
    side = 30 + 20 * (i % 4)
    Image.new("RGB", (side, 40)).save(root / f"{side}.png")
    shown = [{"kind": "image", "path": f"{side}.png"}]
    lines.append(record(id=f"q{i}", question="What? " * (1 + i // 4), media=shown))
  write(root / "x.jsonl", *lines)


@pytest.mark.parametrize(
  ("filter", "kept"),
  [
    ({}, range(16)),
    (
      {"min_pixels": 50 * 40, "max_pixels": 70 * 40},
      [i for i in range(16) if i % 4 in (1, 2)],
    ),
    ({"max_tokens": "two"}, range(8)),
    ({"min_tokens": "two", "min_pixels": 90 * 40}, [7, 11, 15]),
  ],
)
def test_filters_leave_out_and_do_not_set_aside(filter, kept, tmp_path):
  sizes_and_texts(tmp_path)
  words = tokenizer.make_tiny(tmp_path / "words", world.scaffolds())
  budgets = {role: (784, 784) for role in encode.ROLES}
  codec = encode.Codec(tokenizer=words, budgets=budgets)
  plain = sources.open_source("jsonl:x.jsonl", root=tmp_path, codec=codec)

  def prompt(i):
    return encode.Conversation(codec, plain[i], plain.load_media).trajectory.ids

  filter = {k: len(prompt(4)) if v == "two" else v for k, v in filter.items()}
  source = sources.open_source(
    "jsonl:x.jsonl", root=tmp_path, codec=codec, filter=filter
  )
  kept = [f"q{i}" for i in kept]
  stream = pipeline.tasks(source, seed=0, shards=1, batch=1, workdir=tmp_path)
  names = []
  while stream.counts()["data/records"] < 16:
    names += [t.id for t in next(stream).tasks]
  assert sorted(set(names)) == sorted(kept)
  assert {t.id for t in pipeline.fixed_tasks(source, 99, workdir=tmp_path)} == set(kept)
  # SFT: the tokens of the whole trace, which is longer by its answer.
  answer = len(words.encode("\\boxed{O}<|im_end|>"))
  filter = {k: v + answer * k.endswith("tokens") for k, v in filter.items()}
  traces = sources.open_source(
    "jsonl:x.jsonl",
    root=tmp_path,
    codec=codec,
    filter=filter,
    synthesis=templates.Templates(kinds={"image/direct": 1}),
  )
  plan = dict(rows=1, tokens=2048, patches=1024, pack_window=16, workdir=tmp_path)
  batches = pipeline.batches(traces, codec, seed=0, **plan)
  assert int(next(batches)["segment"].max()) == len(kept)
  counts = batches.counts()
  assert counts["data/left_out"] == 16 - len(kept) and counts["data/bad_records"] == 0
  assert not (tmp_path / "quarantine.jsonl").exists()


def test_a_filter_that_leaves_nothing_is_told(tmp_path):
  sizes_and_texts(tmp_path)
  source = sources.open_source("jsonl:x.jsonl", root=tmp_path, filter={"max_pixels": 9})
  with pytest.raises(pipeline.DataError, match="widen data.filter"):
    next(pipeline.tasks(source, seed=0, shards=1, batch=1))
  with pytest.raises(pipeline.DataError, match=r"data\.filter"):
    pipeline.fixed_tasks(source, 3)
