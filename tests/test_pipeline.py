"""The pipeline: order, resume, hosts, and records that cannot be used."""

import collections
import gc
import json
import threading

import layouts
import numpy as np
import pytest
from PIL import Image

from pixel_jax import trajectory
from pixel_jax.chat import encode
from pixel_jax.data import media, pack, pipeline, sources, world
from pixel_jax.synthesis.templates import Templates
from pixel_jax.trajectory import Media

KINDS = {"image/single": 0.6, "image/box": 0.2, "video/single": 0.2}
PLAN = {"rows": 8, "tokens": 96, "patches": 192, "pack_window": 6, "shards": 4}


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
  return layouts.world_codec(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def source(codec):
  return sources.open_source(
    "world:train", codec=codec, synthesis=Templates(kinds=KINDS, jitter=0.5)
  )


def open_batches(source, codec, seed=0, **changes):
  return pipeline.batches(source, codec, seed=seed, **{**PLAN, **changes})


def take(stream, n):
  return [next(stream) for _ in range(n)]


def assert_equal(a, b):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_batches_have_the_fields_of_batch(source, codec):
  (batch,) = take(open_batches(source, codec), 1)
  assert batch["patches"].shape == (8, 192, pack.PATCH_BYTES)
  assert batch["tokens"].shape == batch["segment"].shape == (8, 96)
  assert (batch["segment"].max(1) > 0).all()
  assert batch["weight"].sum() > 8


def test_the_seed_decides_and_threads_do_not(source, codec):
  first = take(open_batches(source, codec), 4)
  for again in (
    take(open_batches(source, codec, threads=3, read_ahead=1), 4),
    take(open_batches(source, codec, read_ahead=8), 4),
  ):
    for a, b in zip(first, again):
      assert_equal(a, b)
  other = take(open_batches(source, codec, seed=1), 1)[0]
  assert (other["tokens"] != first[0]["tokens"]).any()
  # Batches differ from each other, and so do the blocks of the shards.
  assert (first[0]["tokens"] != first[1]["tokens"]).any()
  assert (first[0]["tokens"][:2] != first[0]["tokens"][2:4]).any()


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_together_see_the_same_global_batches(source, codec, hosts):
  whole = take(open_batches(source, codec), 4)
  streams = [open_batches(source, codec, host=h, hosts=hosts) for h in range(hosts)]
  for want in whole:
    blocks = [next(s) for s in streams]
    got = {k: np.concatenate([b[k] for b in blocks]) for k in want}
    assert_equal(want, got)
  # Their states, joined, continue on one host.
  states = [s.get_state() for s in streams]
  joined = {"layout": states[0]["layout"], "shards": {}}
  for state in states:
    joined["shards"] |= state["shards"]
  one = open_batches(source, codec)
  one.set_state(joined)
  direct = open_batches(source, codec)
  take(direct, 4)
  assert_equal(next(one), next(direct))


@pytest.mark.parametrize("consumed", [0, 1, 2, 5])
def test_resume_is_exact_in_the_middle_of_a_window(source, codec, consumed):
  straight = open_batches(source, codec)
  take(straight, consumed)
  state = json.loads(json.dumps(straight.get_state()))
  want = take(straight, 4)
  resumed = open_batches(source, codec, threads=2)
  resumed.set_state(state)
  assert resumed.get_state() == state
  for a, b in zip(want, take(resumed, 4)):
    assert_equal(a, b)
  assert resumed.get_state() == straight.get_state()
  assert resumed.counts() == straight.counts()
  # Also on a stream that has gone elsewhere meanwhile.
  straight.set_state(state)
  assert_equal(want[0], next(straight))


def test_windows_end_inside_of_batches(source, codec):
  """Else the test above would not test what it says."""
  stream = open_batches(source, codec)
  take(stream, 2)
  rows = [s["row"] for s in stream.get_state()["shards"].values()]
  windows = [s["window"] for s in stream.get_state()["shards"].values()]
  assert max(rows) > 0 and max(windows) > 0


def test_what_is_prepared_is_placed_once_and_not_yet_taken(source, codec):
  placed, plain = [], open_batches(source, codec)

  def place(batch):
    placed.append(batch)
    return len(placed), batch

  stream = open_batches(source, codec, place=place)
  for step in range(1, 4):
    want = next(plain)
    number, batch = next(stream)
    assert number == step
    assert_equal(batch, want)
    stream.prepare()  # as often as one likes
    stream.prepare()
    assert len(placed) == step + 1
    # Another run would go on with the batch that is prepared here.
    assert stream.get_state() == plain.get_state()
    assert stream.counts() == plain.counts()
  state = stream.get_state()
  want = next(stream)[1]
  stream.prepare()
  stream.set_state(state)
  assert_equal(next(stream)[1], want)


def test_what_goes_wrong_ahead_is_told_when_it_is_needed(tmp_path, codec):
  write_tasks(tmp_path, [task_line("mute", "no.jpg", answer="")])
  source = sources.open_source("jsonl:x.jsonl", root=tmp_path, codec=codec)
  stream = open_batches(source, codec, rows=1, shards=1)
  stream.prepare()
  for _ in range(2):
    with pytest.raises(pipeline.DataError, match="cannot be used"):
      next(stream)


def test_questions_are_decoded_once_for_check_and_use(tmp_path, codec, monkeypatch):
  """Two that share a picture too; beyond the room that is held, again."""
  side = 40
  for name in "abcdef":
    Image.new("RGB", (side, side)).save(tmp_path / f"{name}.png")
  lines = [task_line(f"q{i}", f"{'abcdef'[i % 6]}.png") for i in range(12)]
  write_tasks(tmp_path, lines)
  source = sources.open_source("jsonl:x.jsonl", root=tmp_path, codec=codec)
  decoded = collections.Counter()
  monkeypatch.setattr(source, "load_media", counted(source.load_media, decoded))

  def play(questions):
    for _ in range(2):  # check, use; what the engine forks it does not load
      for t in questions.tasks:
        encode.Conversation(codec, t, questions.load_media)

  def take_one():
    stream = pipeline.tasks(source, seed=0, shards=1, batch=12)
    asked = next(stream)
    stream.close()
    return asked

  asked = take_one()
  # Looked at are this batch, the next, and some of a third; each shows a picture twice.
  assert len(decoded) == 6 and max(decoded.values()) <= 3
  decoded.clear()
  play(asked)
  assert not decoded
  monkeypatch.setattr(media, "HELD", 2 * 3 * side * side)
  asked = take_one()
  decoded.clear()
  play(asked)
  assert sorted(decoded.values()) == [4] * 4  # two are held; of the others each use


def counted(load_media, decoded):
  def load(media):
    decoded[media.path] += 1
    return load_media(media)

  return load


def test_an_epoch_holds_every_record_once_and_is_shuffled(tmp_path, codec):
  write_tasks(tmp_path, world_lines(22))
  source = sources.open_source("jsonl:x.jsonl", root=tmp_path)
  stream = pipeline.tasks(source, seed=0, shards=2, batch=2)
  epochs = [[t.id for q in take(stream, 11) for t in q.tasks] for _ in range(3)]
  for epoch in epochs:
    assert sorted(epoch) == sorted(f"q{i}" for i in range(22))
  assert epochs[0] != epochs[1] != epochs[2]


def test_packing_loses_no_record(tmp_path, codec):
  write_tasks(tmp_path, world_lines(12))
  source = sources.open_source(
    "jsonl:x.jsonl",
    root=tmp_path,
    synthesis=Templates(kinds={"image/box": 1.0}),
  )
  # One window an epoch: its rows hold the 12 questions, no more and no less.
  stream = open_batches(source, codec, rows=1, shards=1, pack_window=12)
  examples = [0, 0, 0]
  while True:
    batch = next(stream)
    window = stream.get_state()["shards"]["0"]["window"]
    if window == len(examples):
      break
    examples[window] += int(batch["segment"].max())
  assert examples == [12, 12, 12]


def test_tasks_resume_and_hosts(source):
  def open_tasks(**kwargs):
    return pipeline.tasks(source, seed=3, shards=4, batch=8, **kwargs)

  straight = open_tasks()
  first = take(straight, 2)
  state = straight.get_state()
  want = take(straight, 2)
  resumed = open_tasks(read_ahead=7)
  resumed.set_state(state)
  assert take(resumed, 2) == want
  hosts = [open_tasks(host=h, hosts=2) for h in range(2)]
  assert next(hosts[0]).tasks + next(hosts[1]).tasks == first[0].tasks
  assert [t.shard for t in first[0].tasks] == [0, 0, 1, 1, 2, 2, 3, 3]


# ---- Bad records ---------------------------------------------------------------------


def task_line(name, path, **fields):
  media = [{"kind": "image", "path": path}]
  reference = {"bbox_2d": [0.2, 0.2, 0.4, 0.4]}
  return {
    "id": name,
    "question": world.QUESTIONS["image"],
    "answer": "O",
    "media": media,
    "reference": reference,
    **fields,
  }


def world_lines(n):
  return [
    task_line(f"q{i}", f"world:0/train/{world.nth('image', i)}") for i in range(n)
  ]


def write_tasks(root, records):
  lines = "".join(json.dumps(r) + "\n" for r in records)
  (root / "x.jsonl").write_text(lines, encoding="utf-8")


@pytest.fixture
def dirty(tmp_path):
  """A root with 20 good records and five bad ones, and the reasons for these."""
  root = tmp_path / "root"
  root.mkdir()
  picture = Image.fromarray(
    np.arange(252 * 252 * 3, dtype=np.uint8).reshape(252, 252, 3)
  )
  picture.save(root / "good.jpg")
  picture.save(tmp_path / "secret.jpg")
  whole = (root / "good.jpg").read_bytes()
  (root / "half.jpg").write_bytes(whole[: len(whole) // 2])
  (root / "text.jpg").write_text("no picture")
  records = [task_line(f"good{i}", "good.jpg") for i in range(20)]
  records[3:3] = [
    task_line("half", "half.jpg"),
    task_line("text", "text.jpg"),
    task_line("missing", "none.jpg"),
    task_line("outside", "../secret.jpg"),
    task_line("mute", "good.jpg", answer=""),
  ]
  write_tasks(root, records)
  reasons = (
    "cannot be decoded",
    "cannot be decoded",
    "no file",
    "outside",
    "no answer",
  )
  return root, dict(zip(range(3, 8), reasons))


def quarantined(workdir):
  lines = (workdir / "quarantine.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_bad_records_are_set_aside(dirty, codec, tmp_path):
  root, reasons = dirty
  source = sources.open_source(
    "jsonl:x.jsonl",
    root=root,
    synthesis=Templates(kinds={"image/single": 1.0}),
  )
  workdir = tmp_path / "work"
  plan = {"rows": 2, "shards": 1, "pack_window": 5, "workdir": workdir}
  plan["max_bad_share"] = 0.5
  stream = open_batches(source, codec, **plan)
  batches = take(stream, 6)
  assert stream.counts()["data/bad_records"] > 0
  take(stream, 12)  # epochs later they are noted only once
  lines = quarantined(workdir)
  assert sorted(line["index"] for line in lines) == sorted(reasons)
  for line in lines:
    assert reasons[line["index"]] in line["reason"]
  # The same again, and behind a resume with bad records in the window.
  again = open_batches(source, codec, **plan)
  for a, b in zip(batches[:3], take(again, 3)):
    assert_equal(a, b)
  resumed = open_batches(source, codec, **plan)
  resumed.set_state(again.get_state())
  for b in batches[3:]:
    assert_equal(b, next(resumed))
  assert len(quarantined(workdir)) == len(lines)


def test_tasks_leave_bad_records_out(dirty, tmp_path):
  root, reasons = dirty
  source = sources.open_source("jsonl:x.jsonl", root=root)
  stream = pipeline.tasks(source, seed=0, shards=1, batch=4, workdir=tmp_path)
  names = [t.id for q in take(stream, 5) for t in q.tasks]
  assert sorted(names) == sorted(f"good{i}" for i in range(20))
  next(stream)
  assert stream.counts()["data/bad_records"] >= len(reasons)
  assert len(quarantined(tmp_path)) == len(reasons)


def test_too_many_bad_records_end_the_run(dirty, codec, tmp_path):
  root, _ = dirty
  source = sources.open_source(
    "jsonl:x.jsonl",
    root=root,
    synthesis=Templates(kinds={"image/single": 1.0}),
  )
  stream = open_batches(
    source, codec, rows=2, shards=1, max_bad_share=0.002, workdir=tmp_path
  )
  with pytest.raises(pipeline.DataError, match=r"shard 0 .*max_bad_share=0\.002"):
    take(stream, 9)
  with pytest.raises(pipeline.DataError):
    next(stream)  # it stays broken


def test_a_source_without_one_good_record_ends_the_run(tmp_path, codec):
  write_tasks(tmp_path, [task_line(f"q{i}", "none.jpg") for i in range(4)])
  kinds = {"image/single": 1.0}
  source = sources.open_source(
    "jsonl:x.jsonl", root=tmp_path, synthesis=Templates(kinds=kinds)
  )
  for stream in (
    open_batches(source, codec, rows=1, shards=1, max_bad_share=1.0),
    pipeline.tasks(source, seed=0, shards=1, batch=1, max_bad_share=1.0),
  ):
    with pytest.raises(pipeline.DataError, match="no file"):
      next(stream)


@pytest.mark.parametrize(
  ("changes", "says"),
  [({"tokens": 24}, "tokens and"), ({"patches": 64, "tokens": 30}, "a row holds")],
)
def test_too_long_examples_are_set_aside(source, codec, tmp_path, changes, says):
  stream = open_batches(
    source, codec, max_bad_share=1.0, workdir=tmp_path, pack_window=40, **changes
  )
  batch = next(stream)
  assert batch["tokens"].shape[1] == changes["tokens"]
  assert all(says in line["reason"] for line in quarantined(tmp_path))


def test_a_question_is_no_trace(codec, tmp_path):
  source = sources.open_source("world:train")
  stream = open_batches(source, codec, max_bad_share=0.0, workdir=tmp_path)
  with pytest.raises(pipeline.DataError, match="without a trace"):
    next(stream)


def test_traces_of_a_file_are_redrawn(source, codec, tmp_path):
  rng = np.random.default_rng(0)
  made = [source.synthesis(codec, source[i], rng) for i in range(5)]
  other = trajectory.from_json(trajectory.to_json(made[0][0]))
  other.profile = "released"
  trajectory.write_jsonl(tmp_path / "x.jsonl", [*(t for t, _ in made), other])
  stream = open_batches(
    sources.open_source("jsonl:x.jsonl", root=tmp_path),
    codec,
    rows=1,
    shards=1,
    pack_window=6,
    tokens=256,
    patches=512,
    workdir=tmp_path,
  )
  (row,) = (next(stream)["tokens"],)
  assert [line["index"] for line in quarantined(tmp_path)] == [5]
  text = codec.tokenizer.decode(row[0].tolist())
  for t, _ in made:
    assert codec.tokenizer.decode(t.ids) in text


# ---- Settings and state --------------------------------------------------------------


@pytest.mark.parametrize(
  ("changes", "says"),
  [
    ({"rows": 6}, "multiple of 4"),
    ({"hosts": 3}, "multiple of the number of hosts"),
    ({"shards": 0}, "data.shards=0"),
    ({"patches": 100}, "multiple of 64"),
  ],
)
def test_settings_that_do_not_fit(source, codec, changes, says):
  with pytest.raises(ValueError, match=says):
    open_batches(source, codec, **changes)


def test_more_shards_than_records(codec, tmp_path):
  write_tasks(tmp_path, [task_line("q", "a.png")])
  with pytest.raises(
    pipeline.DataError, match="data.shards=4, and the source has 1 records"
  ):
    open_batches(sources.open_source("jsonl:x.jsonl", root=tmp_path), codec)


def test_a_state_of_other_data_is_refused(source, codec):
  state = open_batches(source, codec).get_state()
  with pytest.raises(pipeline.DataError, match="'tokens': \\(96, 112\\)"):
    open_batches(source, codec, tokens=112).set_state(state)
  half = open_batches(source, codec, host=0, hosts=2).get_state()
  with pytest.raises(pipeline.DataError, match=r"without a state: \['2', '3'\]"):
    open_batches(source, codec).set_state(half)


def test_changed_data_may_be_accepted(tmp_path, codec):
  """A record was removed: the run is refused, with the way to go on in any case."""
  write_tasks(tmp_path, world_lines(12))

  def open_tasks(**how):
    source = sources.open_source("jsonl:x.jsonl", root=tmp_path)
    return pipeline.tasks(source, seed=0, shards=2, batch=2, **how)

  stream = open_tasks()
  take(stream, 2)
  state = stream.get_state()
  write_tasks(tmp_path, world_lines(11))
  with pytest.raises(
    pipeline.DataError, match=r"records.*--config.data.changed=accept"
  ):
    open_tasks().set_state(state)
  goes_on = open_tasks(changed="accept")
  goes_on.set_state(state)
  seen = [t.id for q in take(goes_on, 4) for t in q.tasks]
  assert len(seen) == 8 and set(seen) <= {f"q{i}" for i in range(11)}


@pytest.mark.parametrize("index", [1, 4])  # a picture, a clip
def test_a_prompt_is_measured_without_being_made(source, codec, index):
  task = world.task(0, "train", index)
  made = encode.Conversation(codec, task, source.load_media)
  tokens, patches = encode.measure(codec, task, source.load_media)
  assert tokens == len(made.trajectory.ids)
  assert patches == [p.num_patches for p in made.pixels]


def test_what_the_engine_would_refuse_is_set_aside(tmp_path, codec):
  """A picture 201 times as long as wide, and one of too many patches: no rollout sees
  them, and the run goes on."""
  Image.new("RGB", (201 * 4, 4)).save(tmp_path / "long.png")
  Image.new("RGB", (100, 100)).save(tmp_path / "fine.png")
  Image.new("RGB", (56, 56)).save(tmp_path / "small.png")
  names = ["long.png", *["fine.png"] * 7]
  write_tasks(tmp_path, [task_line(f"q{i}", name) for i, name in enumerate(names)])
  source = sources.open_source("jsonl:x.jsonl", root=tmp_path, codec=codec)
  plan = dict(seed=0, shards=1, batch=1, max_bad_share=1.0, workdir=tmp_path)
  stream = pipeline.tasks(source, **plan)
  assert {t.id for q in take(stream, 14) for t in q.tasks} == {
    f"q{i}" for i in range(1, 8)
  }
  assert "aspect ratio 201.0" in (tmp_path / "quarantine.jsonl").read_text()
  assert stream.counts()["data/bad_records"] == 2  # once an epoch
  full = pipeline.tasks(source, refuses=lambda tokens, patches: "no room", **plan)
  with pytest.raises(pipeline.DataError, match="8 of 8 records .*no room"):
    next(full)
  with pytest.raises(pipeline.DataError, match="none of 8 records"):
    pipeline.fixed_tasks(source, 4, refuses=lambda tokens, patches: "no room")


def test_a_forgotten_stream_takes_its_thread_with_it(source, codec):
  def running():
    return sum(t.name == "pixel_jax data" for t in threading.enumerate())

  gc.collect()
  before = running()
  stream = open_batches(source, codec)
  next(stream)
  assert running() == before + 1
  del stream
  gc.collect()
  assert running() == before


def test_media_of_the_world_need_no_root():
  assert media.Library().load(Media("video", "world:0/train/3")).frames
