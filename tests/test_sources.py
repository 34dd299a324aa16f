"""Sources: what a URI opens, and what a record may not do."""

import dataclasses
import json
import os

import numpy as np
import pytest
from PIL import Image

from pixel_jax import trajectory
from pixel_jax.chat import encode, tokenizer
from pixel_jax.data import formats, media, records, sources, synthesize, world
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
  source = sources.open_source("world:train", kinds=kinds, jitter=1.0)
  tasks = [source[i] for i in range(300)]
  assert abs(np.mean([t.media[0].kind == "video" for t in tasks]) - 2 / 3) < 0.01
  assert len({t.id for t in tasks}) == 300
  source[len(source) - 1]
  assert source.synthesis["jitter"] == 1.0


@pytest.mark.parametrize(
  "uri", ["world:", "world:nowhere", "world:0/train/image/3", "ftp:x", "jsonl:no.jsonl"]
)
def test_uris_that_open_nothing(uri, tmp_path):
  with pytest.raises(sources.SourceError):
    sources.open_source(uri, root=tmp_path)
  with pytest.raises(synthesize.SynthesisError, match="unknown"):
    sources.open_source("world:train", kinds={"image/nothing": 1.0})


def test_lines_in_any_order(tmp_path):
  task = world.task(0, "train", 1)
  words = tokenizer.make_tiny(tmp_path / "words", world.scaffolds())
  trace, _ = synthesize.trajectory(
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
    (json.dumps({"task": 3}), "x.jsonl#1"),
  ],
)
def test_bad_lines_say_where_and_why(tmp_path, line, says):
  write(tmp_path / "x.jsonl", record(), line)
  source = sources.open_source("jsonl:x.jsonl", root=tmp_path)
  assert source[0].id == "q"
  with pytest.raises(records.BadRecord, match=says):
    source[1]


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
