"""Formats: foreign layouts as questions and traces, against the files' own readers."""

import base64
import dataclasses
import importlib
import io
import json
import unicodedata
import zipfile

import layouts
import ml_collections
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pixel_jax import trajectory
from pixel_jax.chat import encode, tools
from pixel_jax.data import formats, media, pipeline, sources, world
from pixel_jax.data.retell import retell
from pixel_jax.synthesis.templates import Templates
from pixel_jax.trajectory import Media, Task, Trajectory

MANY = 1000


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
  return layouts.codec(tmp_path_factory.mktemp("words"))


def pixels(source, media):
  loaded = source.load_media(media)
  return [np.asarray(x) for x in (loaded.frames if media.kind == "video" else [loaded])]


def assert_shows(source, media, want):
  """`want`: paths or bytes, opened by PIL alone, or pixels."""
  got = [p for m in media for p in pixels(source, m)]
  assert len(got) == len(want)
  for a, b in zip(got, want):
    b = io.BytesIO(b) if isinstance(b, bytes) else b
    if not isinstance(b, np.ndarray):
      b = np.asarray(Image.open(b).convert("RGB"))
    np.testing.assert_array_equal(a, b)


# ---- Every record, against an independent reader ------------------------------------
# A function each: the rows of the file as (question, answers, pictures).


def read_pixel_reasoner_sft(root):
  for row in json.loads((root / "release.json").read_text()):
    turns = [m for m in row["message_list"] if m["role"] != "system"]
    question, *shown = turns[0]["content"]
    paths = [p for s in shown for p in (s["video"] or [s["image"]])]
    last = turns[-1]["content"][0]["text"]
    calls = [t["content"][0]["text"] for t in turns[1:-1] if t["role"] == "assistant"]
    yield (
      question["text"].partition("\n")[0],
      last[last.index("{") + 1 : -1],
      [root / p for p in paths],
      [json.loads(c[c.index("{") : c.rindex("}") + 1]) for c in calls],
    )


def read_mini_o3(root):
  for row in json.loads((root / "coldstart.json").read_text()):
    said = [m["value"] for m in row["conversations"]]
    answer = said[-1].split("<answer>")[1].split("</answer>")[0]
    calls = [json.loads(s[s.index("{") : s.index("}") + 1]) for s in said[2:-1:2]]
    calls = [
      {
        "name": "crop_image_normalized",
        "arguments": {
          "bbox_2d": c["bbox_2d"],
          "target_image": 1 + (c["source"] == "observation_1"),
        },
      }
      for c in calls
    ]
    yield said[1].split("\n")[1], answer, [root / row["images"][0]], calls


def read_messages(root):
  for file in sorted(root.glob("train-*.parquet")):
    for row in pq.read_table(file).to_pylist():
      said = [[c["text"] for c in m["content"]] for m in row["messages"]]
      call = said[1][0][len("Look closer.<tool_call>") : -len("</tool_call>")]
      answer = said[3][0].split("{")[1][:-1]
      yield said[0][1], answer, [row["images"][0]["bytes"]], [json.loads(call)]


def read_pixel_reasoner_rl(root):
  for row in pq.read_table(root / "release.parquet").to_pylist():
    answer = [a.replace("\\boxed{", "").replace("}", "") for a in row["answer"]]
    answer = answer if len(answer) > 1 else answer[0]
    yield row["question"], answer, [root / p for p in row["image"]], None


def read_deepeyes(root):
  for row in pq.read_table(root / "data_0.1.2.parquet").to_pylist():
    question = row["extra_info"]["question"].removeprefix("<image>\n")
    gold = row["reward_model"]["ground_truth"]
    yield question, gold, [i["bytes"] for i in row["images"]], None


def read_verl(root):
  for row in pq.read_table(root / "verl.parquet").to_pylist():
    question = row["prompt"][0]["content"].replace("<image>", "")
    paths = [root / i["image"].removeprefix("file://") for i in row["images"]]
    yield question, row["reward_model"]["ground_truth"], paths, None


def read_ours(root):
  for line in (root / "x.jsonl").read_text().splitlines():
    row = json.loads(line)
    yield row["question"], row["answer"], [root / row["media"][0]["path"]], None


def read_text_only(root):
  for line in (root / "text.jsonl").read_text().splitlines():
    row = json.loads(line)
    yield row["question"], row["answer"], [], None


def read_array_record(root):
  from array_record.python import array_record_module

  reader = array_record_module.ArrayRecordReader(str(root / "x.array_record"))
  for data in reader.read_all():
    row = json.loads(data)
    yield row["question"], row["answer"], [root / row["media"][0]["path"]], None


def read_tfds(root):
  import tensorflow_datasets as tfds

  for row in tfds.builder("questions", data_dir=str(root)).as_data_source("train"):
    answer = [a.decode() for a in row["answers"]]
    answer = answer if len(answer) > 1 else answer[0]
    yield row["question"].decode(), answer, list(row["images"]), None


READERS = {
  name.removeprefix("read_"): f
  for name, f in dict(globals()).items()
  if name.startswith("read_")
}


def assert_same(source, wanted, count):
  """Every record of the source, beside those of the independent reader."""
  wanted, looked_at = list(wanted), set()
  assert len(source) == len(wanted) == count
  for i, (question, answer, shown, calls) in enumerate(wanted):
    record = source[i]
    task = record.task if isinstance(record, Trajectory) else record
    assert (task.question, task.answer) == (question, answer)
    names = str([m.path for m in task.media])
    if names not in looked_at:  # a thousand records name the same few files
      assert_shows(source, task.media, shown)
      looked_at.add(names)
    assert (calls is None) == isinstance(record, Task)
    if calls is not None:
      told = [{"name": c.name, "arguments": c.arguments} for c in record.calls]
      assert told == calls
  return source


@pytest.mark.parametrize("layout", [*layouts.TRACES, *layouts.QUESTIONS])
def test_a_fixture_comes_back_as_its_own_reader_says(layout, tmp_path):
  uri = layout(tmp_path, 12)
  source = sources.open_source(uri, root=tmp_path)
  assert_same(source, READERS[layout.__name__](tmp_path), 12)
  ids = [getattr(source[i], "task", source[i]).id for i in range(12)]
  assert len(set(ids)) == 12
  with pytest.raises(IndexError):
    source[12]


@pytest.mark.parametrize("layout", [*layouts.TRACES, *layouts.QUESTIONS])
def test_a_thousand_records_come_back(layout, tmp_path):
  uri = layout(tmp_path, MANY)
  source = sources.open_source(uri, root=tmp_path)
  assert_same(source, READERS[layout.__name__](tmp_path), MANY)


@pytest.mark.parametrize("inner", [True, False])
def test_archives_are_read_in_place(inner, tmp_path):
  """Members named as the records name them, or without the folder of the archive."""
  uri = layouts.pixel_reasoner_sft(tmp_path, 8)
  wanted = [list(row) for row in READERS["pixel_reasoner_sft"](tmp_path)]
  for row in wanted:
    row[2] = [p.read_bytes() for p in row[2]]
  layouts.zipped(tmp_path, inner)
  assert not list((tmp_path / "images").iterdir())
  source = assert_same(sources.open_source(uri, root=tmp_path), wanted, 8)
  assert source[0].task.media[0].path.startswith("zip:images.zip!")
  with zipfile.ZipFile(tmp_path / "images.zip") as z:
    name = source[0].task.media[0].path.partition("!")[2]
    assert np.array_equal(
      pixels(source, source[0].task.media[0])[0], np.asarray(Image.open(z.open(name)))
    )
  # What a trajectory stores is enough to see its pictures again, without the source.
  stored = json.loads(
    json.dumps([m.path for i in range(8) for m in source[i].task.media])
  )
  for path in stored:
    kind = "image" if isinstance(path, str) else "video"
    assert media.Library(tmp_path).load(Media(kind, path))


# ---- Told traces become exact ones ---------------------------------------------------


@pytest.mark.parametrize("profile", ["clean", "released"])
@pytest.mark.parametrize("layout", layouts.TRACES)
def test_traces_have_exact_ids_and_can_be_redrawn(layout, profile, codec, tmp_path):
  codec = dataclasses.replace(codec, profile=profile)
  source = sources.open_source(layout(tmp_path, 8), root=tmp_path)
  for i in range(8):
    told = source[i]
    t, shown = retell(told, codec, source.load_media)
    again = trajectory.from_json(trajectory.to_json(t))
    redrawn = encode.redraw(again, codec, media.Library(tmp_path).load)
    assert [p.key for p in redrawn] == [p.key for p in shown]
    assert [c.error for c in t.calls] == [None] * len(told.calls)
    assert t.stop == "answer" and t.profile == profile
    # The ids are those of the template, with each picture as wide as it is.
    text = codec.tokenizer.decode(t.ids)
    assert text.startswith(
      f"<|im_start|>system\n{tools.system_prompt(profile)}<|im_end|>"
    )
    assert text.count("<|image_pad|>") + text.count("<|video_pad|>") == sum(
      s.length for s in t.slots
    )
    said = [x["text"] for x in told.turns if x["role"] == "assistant"]
    for words in said:
      assert f"<|im_start|>assistant\n{words}<|im_end|>" in text
    mine = [k for k, is_mine in zip(t.ids, t.sampled) if is_mine]
    assert codec.tokenizer.decode(mine) == "".join(f"{x}<|im_end|>" for x in said)


def test_only_the_last_two_turns_of_pixel_reasoner_are_learned(codec, tmp_path):
  source = sources.open_source(layouts.pixel_reasoner_sft(tmp_path, 2), root=tmp_path)
  t, _ = retell(source[1], codec, source.load_media)
  assert [c.planted for c in t.calls] == [True, False]
  learned = [i for i, w in zip(t.ids, t.weight) if w]
  assert codec.tokenizer.decode(learned).count("</tool_call>") == 1
  single, _ = retell(source[0], codec, source.load_media)
  assert [c.planted for c in single.calls] == [False]


def conversation(*said, media=("images/0.png",), results=1):
  """A record of HF rows: the turns of the assistant, a picture behind each call."""
  messages = [{"role": "user", "content": "<image>" * len(media) + "What?"}]
  for text in said[:-1]:
    messages.append({"role": "assistant", "content": text})
    messages.append({"role": "user", "content": "Here:" + "<image>" * results})
  messages.append({"role": "assistant", "content": said[-1]})
  images = [*media, *["images/0.png"] * (results * (len(said) - 1))]
  return {"messages": messages, "images": images}


@pytest.mark.parametrize(
  ("call", "arguments"),
  [
    # Pixels of the picture, which is 64 x 48; then names of the same operation.
    (layouts.crop([16, 12, 48, 36], 1, "crop_image"), [0.25, 0.25, 0.75, 0.75]),
    (layouts.crop([0.1, 0.1, 0.9, 0.9], 1, "zoom_in"), [0.1, 0.1, 0.9, 0.9]),
    (
      '<tool_call>{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": '
      '[0, 0, 32, 48], "label": "dog"}}</tool_call>',
      [0, 0, 0.5, 1],
    ),
  ],
)
def test_other_names_and_pixels_become_our_operation(call, arguments, codec, tmp_path):
  layouts.media_files(tmp_path)
  told = formats.read(conversation(call, "\\boxed{A}"), "x#0")
  load = media.Library(tmp_path).load
  t, _ = retell(told, codec, load)
  (done,) = t.calls
  assert (done.name, done.error) == ("crop_image_normalized", None)
  assert done.arguments["target_image"] == 1
  assert done.arguments["bbox_2d"] == pytest.approx(arguments)


def test_numbers_of_pictures_behind_a_clip(codec, tmp_path):
  """Released records call the first result of a clip picture 2; clean, 17."""
  layouts.media_files(tmp_path)
  record = conversation(
    layouts.select([3]), layouts.crop([0, 0, 0.9, 0.9], 2), "\\boxed{A}"
  )
  record["videos"] = [layouts.frames(0)]
  record["images"] = record["images"][1:]
  record["messages"][0]["content"] = "<video>What?"
  load = media.Library(tmp_path).load
  for profile, target in (("clean", 17), ("released", 2)):
    told = formats.read(json.loads(json.dumps(record)), "x#0")
    t, _ = retell(told, dataclasses.replace(codec, profile=profile), load)
    assert [c.error for c in t.calls] == [None, None]
    assert t.calls[1].arguments["target_image"] == target


@pytest.mark.parametrize(
  "tag",
  [
    "<|im_end|>",
    "<|image_pad|>",
    "</tool_call> <tool_call>",
    "<tool_call>a</tool_call>",
  ],
)
def test_text_of_a_record_forges_no_control_token(tag, codec, tmp_path):
  layouts.media_files(tmp_path)
  record = conversation(
    f"a {tag} b " + layouts.crop([0, 0, 0.9, 0.9], 1), f"{tag} \\boxed{{A}}"
  )
  t, _ = retell(formats.read(record, "x#0"), codec, media.Library(tmp_path).load)
  words = codec.tokenizer
  mine = [i for i, is_mine in zip(t.ids, t.sampled) if is_mine]
  assert mine.count(words.im_end) == 2 and words.image_pad not in mine
  assert (
    mine.count(words.id("<tool_call>")) == mine.count(words.id("</tool_call>")) == 1
  )


def test_the_pipeline_takes_told_traces(codec, tmp_path):
  uri = layouts.pixel_reasoner_sft(tmp_path, 8)
  source = sources.open_source(uri, root=tmp_path)
  plan = dict(seed=0, rows=2, tokens=1024, patches=512, pack_window=8, workdir=tmp_path)
  batch = next(pipeline.batches(source, codec, **plan))
  assert not (tmp_path / "quarantine.jsonl").exists()
  texts = codec.tokenizer.decode(batch["tokens"].ravel().tolist())
  for i in range(8):
    t, _ = retell(source[i], codec, source.load_media)
    assert codec.tokenizer.decode(t.ids) in texts
  assert batch["weight"].sum() > 0


@pytest.mark.parametrize(
  ("question", "want"),
  [
    ("<image>\nWhat?", "What?"),
    ("<image><image> Sum?" + layouts.HINT, "Sum?"),
    ("What? <image>", "What?"),
    ("Is <image> like <image> here?", "Is <image> like <image> here?"),
    (
      "A?\n\nPlease think step by step, and put your final answer within \\boxed{}.",
      "A?",
    ),
  ],
)
def test_a_question_loses_what_the_prompt_adds(question, want):
  assert formats.clean(question) == want


def test_traces_of_every_container_are_the_same(tmp_path, codec):
  """A trajectory of ours, as parquet gives it back."""
  task = world.task(0, "train", 1)
  t, _ = Templates(kinds={"image/single": 1})(codec, task, np.random.default_rng(0))
  t.reward = {"correct": 1.0}  # parquet has no empty structs
  rows = pa.Table.from_pylist([json.loads(trajectory.to_json(t))])
  pq.write_table(rows, tmp_path / "x.parquet")
  got = sources.open_source("parquet:x.parquet", root=tmp_path)[0]
  want = trajectory.from_json(trajectory.to_json(t))
  assert got.ids == want.ids and got.slots == want.slots
  assert got.position == want.position and got.calls[0].name == want.calls[0].name


# ---- Hosts, and whole runs -----------------------------------------------------------


@pytest.mark.parametrize("layout", [layouts.pixel_reasoner_sft, layouts.messages])
def test_two_hosts_read_every_record_once_in_the_batches_of_one(
  layout, codec, tmp_path
):
  """An epoch of both kinds of stream; the rows of one host and of two are equal."""
  n = 24
  source = sources.open_source(layout(tmp_path, n), root=tmp_path, codec=codec)
  plan = dict(seed=3, rows=4, tokens=1024, patches=512, pack_window=3, shards=4)
  one = pipeline.batches(source, codec, **plan)
  two = [
    pipeline.batches(source, codec, **plan, host=h, hosts=2, threads=1 + h)
    for h in (0, 1)
  ]
  for _ in range(3):
    want, parts = next(one), [next(stream) for stream in two]
    for key, x in want.items():
      np.testing.assert_array_equal(x, np.concatenate([p[key] for p in parts]))
  plan = dict(seed=3, batch=8, shards=4)
  one = pipeline.tasks(source, **plan)
  two = [pipeline.tasks(source, **plan, host=h, hosts=2) for h in (0, 1)]
  for _ in range(2):  # epochs
    names = []
    for _ in range(n // 8):
      got = [t for stream in two for t in next(stream).tasks]
      assert got == next(one).tasks
      names += [t.id for t in got]
    assert len(names) == len(set(names)) == n


# ---- Properties of public bug reports ------------------------------------------------


def encoded(path, kind="PNG", **how):
  out = io.BytesIO()
  Image.open(path).save(out, kind, **how)
  return base64.b64encode(out.getvalue()).decode()


def write(root, *records):
  lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
  (root / "x.jsonl").write_text(lines, encoding="utf-8")
  return sources.open_source("jsonl:x.jsonl", root=root)


def asked(image, **fields):
  return {"qid": "q", "question": "What?", "answer": "x", "image": image, **fields}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_picture_may_be_bare_base64(tmp_path, kind):
  layouts.media_files(tmp_path)
  text = encoded(tmp_path / "images/0.png", kind)
  wrapped = "\n".join(text[i : i + 76] for i in range(0, len(text), 76))
  source = write(tmp_path, asked(text), asked([text]), asked(wrapped))
  want = io.BytesIO(base64.b64decode(text))
  for i in range(3):
    (got,) = pixels(source, source[i].media[0])
    np.testing.assert_array_equal(got, np.asarray(Image.open(want).convert("RGB")))


def test_names_as_other_systems_spell_them(tmp_path):
  layouts.media_files(tmp_path)
  accent = {form: unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD")}
  picture = (tmp_path / "images/0.png").read_bytes()
  (tmp_path / "images" / accent["NFD"]).write_bytes(picture)  # from a Mac
  with zipfile.ZipFile(tmp_path / "more.zip", "w") as archive:
    archive.writestr(f"in/{accent['NFC']}", picture)
  names = [
    f"images/{accent['NFC']}",
    "images\\0.png",
    f"in\\{accent['NFD']}",
    "IMAGES/0.PNG",
  ]
  source = write(tmp_path, *(asked(name) for name in names))
  for i in range(3):
    assert_shows(source, source[i].media, [tmp_path / "images/0.png"])
  with pytest.raises(formats.BadRecord, match="did you mean images/0.png"):
    source.load_media(source[3].media[0])


def test_a_conversation_may_ask_again(tmp_path, codec):
  """LLaVA's: every answer is a target, the question of the trace is the first."""
  layouts.media_files(tmp_path)
  said = ["<image>\nWhat?", "A \\boxed{cat}.", "Which colour?", "It is \\boxed{red}."]
  talk = [
    {"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)
  ]
  source = write(
    tmp_path, {"id": "a", "conversations": talk, "images": ["images/0.png"]}
  )
  told = source[0]
  assert (told.task.question, told.task.answer, told.calls) == ("What?", "cat", [])
  trace, _ = retell(told, codec, source.load_media)
  words = codec.tokenizer
  learned = [i for i, w in zip(trace.ids, trace.weight) if w]
  want = [[*words.encode(text), words.im_end] for text in said[1::2]]
  assert learned == want[0] + want[1]
  assert [t["role"] for t in trace.turns][1:] == ["user", "assistant"] * 2
  assert "Which colour?" in words.decode(trace.ids)
  assert len(encode.redraw(trace, codec, source.load_media)) == 1
  talk[2]["value"] = "<image>\nAnd this?"
  both = {"id": "a", "conversations": talk, "images": ["images/0.png"] * 2}
  with pytest.raises(formats.BadRecord, match=r"is no call: .*pictures follow it"):
    write(tmp_path, both)[0]


@pytest.mark.parametrize(
  "record, answer",
  [
    ({"query": "<image>What?", "response": "\\boxed{x}"}, "x"),
    ({"problem": "<image>What?", "solution": "<answer> x </answer>"}, "x"),
    ({"question": "What?", "answer": True}, "true"),
    ({"question": "What?", "answer": [False, "no"]}, ["false", "no"]),
  ],
)
def test_more_layouts_and_golds(tmp_path, record, answer):
  layouts.media_files(tmp_path)
  task = write(tmp_path, {**record, "images": ["images/0.png"]})[0]
  assert (task.question, task.answer) == ("What?", answer)
  assert [m.path for m in task.media] == ["images/0.png"]


def test_text_that_nobody_reads_is_said_once(tmp_path, caplog):
  layouts.media_files(tmp_path)
  source = write(tmp_path, *[{"image": "images/0.png", "legend": "A cat."}] * 3)
  assert [source[i].question for i in range(3)] == [""] * 3
  assert caplog.text.count("nobody reads legend") == 1


@pytest.fixture(scope="module")
def sft():
  """The tiny config on foreign data: every URI is the same program, compiled once."""
  config = importlib.import_module("pixel_jax.configs.sft").get_config("tiny")
  config.total_steps = config.eval_every = config.save_every = 1
  config.init = "random"
  config.data.update(rows=1, shards=1, tokens=512, patches=512, pack_window=8)
  config.eval.batches, config.optim.warmup_steps = 1, 0
  kinds = ("image/direct", "video/direct", "text/direct")
  config.synthesis.kinds = dict.fromkeys(kinds, 1.0)
  config.synthesis.operation_share = 1.0
  return config


@pytest.mark.slow
@pytest.mark.parametrize("layout", [*layouts.TRACES, *layouts.QUESTIONS])
def test_sft_runs_from_every_source_by_one_line(layout, sft, tmp_path):
  from pixel_jax import train_sft

  config = ml_collections.ConfigDict(sft.to_dict())
  config.data.root = str(tmp_path)
  config.data.uri = config.eval.uri = layout(tmp_path, 8)
  workdir = tmp_path / "run"
  train_sft.main(config, workdir)
  (line,) = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  assert np.isfinite([line["loss"], line["eval/loss"]]).all()
  assert line["data/bad_records"] == line["data/left_out"] == 0
  assert 0 < line["data/utilisation"] <= 1
  has_pictures = layout is not layouts.text_only
  assert (0 < line["data/patch_utilisation"] <= 1) == has_pictures


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_sft_of_texts_with_a_frozen_tower(share, sft, tmp_path):
  """Alone and between pictures; the tower's features are kept, and may be none."""
  from pixel_jax import train_sft

  config = ml_collections.ConfigDict(sft.to_dict())
  config.data.root, config.optim.freeze = str(tmp_path), ("^vision/",)
  config.data.uri = config.eval.uri = layouts.text_only(tmp_path, 8)
  if share:
    config.data.update(
      uri=f"{config.data.uri},{layouts.ours(tmp_path, 8)}", weights=(1 - share, share)
    )
  workdir = tmp_path / "run"
  train_sft.main(config, workdir)
  (line,) = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  assert np.isfinite([line["loss"], line["eval/loss"]]).all() and line["loss"] > 0
  assert line["data/bad_records"] == line["data/left_out"] == 0
  assert (line["perf/pictures_encoded"] > 0) == (share > 0)


@pytest.mark.slow
def test_sft_of_a_mixture_with_weights_and_a_filter(sft, tmp_path):
  from pixel_jax import train_sft

  config = ml_collections.ConfigDict(sft.to_dict())
  config.data.root = str(tmp_path)
  uri = layouts.mini_o3(tmp_path, 4)
  config.data.update(uri=f"{uri},world:train/image", weights=(0.5, 0.5))
  config.data.filter.max_pixels = 252 * 252 - 1  # the world's pictures have one more
  config.eval.uri = uri
  workdir = tmp_path / "run"
  train_sft.main(config, workdir)
  (line,) = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  assert line["data/records"] == 8 and line["data/left_out"] > 0
  assert line["data/bad_records"] == 0
