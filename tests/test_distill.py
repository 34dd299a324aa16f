"""Synthesis from end to end: the tiny world, a server with faults, a kill, the files."""

import asyncio
import collections
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import zipfile

import jax
import layouts
import numpy as np
import pytest
import teachers
from PIL import Image

from pixel_jax import trajectory
from pixel_jax.chat import encode, tools
from pixel_jax.configs import synthesize as config_file
from pixel_jax.data import pack, pipeline, sources, world
from pixel_jax.synthesis import checks, distill, journal, teacher, templates
from pixel_jax.tools import synthesize as synthesize_tool
from pixel_jax.trajectory import Media

ROOT = pathlib.Path(__file__).parents[1]
FILES = ("trajectories.jsonl", "dropped.jsonl", "pixel_reasoner/release.json")
openai = pytest.importorskip("openai")


@pytest.fixture
def serve(monkeypatch):
  """Starts servers; the environment names the last of them."""
  running = []

  def start(**faults):
    server = teachers.Loopback(**faults).__enter__()
    running.append(server)
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    return server

  yield start
  for server in running:
    server.__exit__()


def configure(seeds=24, **teacher_settings):
  config = config_file.get_config("tiny")
  config.seeds = seeds
  config.teacher.update(first_wait=0.02, longest_wait=0.05, **teacher_settings)
  return config


def run(config, workdir, codec=None):
  """What `main` does, in this process."""
  workdir.mkdir(exist_ok=True)
  codec = codec or synthesize_tool.open_codec(config, workdir)
  source = sources.open_source(codec=codec, **config.data)
  recipe = distill.Recipe(seed=config.seed, **config.recipe)
  return asyncio.run(
    synthesize_tool.synthesize_all(config, workdir, codec, source, recipe)
  )


def contents(workdir):
  found = {name: (workdir / name).read_bytes() for name in FILES}
  for file in sorted((workdir / "pixel_reasoner").glob("*/*")):
    found[f"{file.parent.name}/{file.name}"] = file.read_bytes()
  return found


def lines(workdir, name):
  return [json.loads(x) for x in (workdir / name).read_text().splitlines()]


# ---- No trajectory lost, none doubled ------------------------------------------------


def test_every_seed_ends_once_whatever_the_server_does(serve, tmp_path):
  server = serve(passing=0.4, staying=0.4, delay=0.005)
  config = configure(60)
  report = run(config, tmp_path / "a")
  written = lines(tmp_path / "a", "trajectories.jsonl")
  dropped = lines(tmp_path / "a", "dropped.jsonl")
  # All faults were met, and no seed was lost or doubled by one.
  assert set(server.faults) == set(teachers.PASSING) | set(teachers.STAYING)
  ids = [t["task"]["id"] for t in written] + [d["task"]["id"] for d in dropped]
  expected = [sources.open_source("world:train")[i].id for i in range(60)]
  assert sorted(ids) == sorted(expected)
  assert report["open"] == 0 and report["written"] == len(written) > 15
  reasons = collections.Counter(d["reason"] for d in dropped)
  assert reasons == report["dropped"] and all(d["detail"] for d in dropped)
  assert {"refused", "leak", "box", "answer"} <= set(reasons)
  # In the order of the seeds; requests that were answered were not asked again.
  places = [expected.index(t["task"]["id"]) for t in written]
  assert places == sorted(places)
  assert set(server.answered.values()) == {1}
  assert server.most <= config.teacher.concurrency
  assert server.billed <= report["teacher"]["tokens"] <= config.teacher.budget
  # What the server said falsely was dropped: all that is written is true and hidden.
  for line in (tmp_path / "a" / "trajectories.jsonl").read_text().splitlines():
    t = trajectory.from_json(line)
    assert world.covers(t.task, t.calls[-1], t.calls[:-1])
    before = t.turns[2]["text"].split("<tool_call>")[0]
    assert checks.leak(before, t.task) is None
    assert t.turns[-1]["text"].endswith(f"\n\n\\boxed{{{t.task.answer}}}")
  # Another order of replies gives the same files.
  server.delay, before = 0.0, sum(server.asked.values())
  config.teacher.concurrency = 3
  (tmp_path / "b").mkdir()
  shared = (tmp_path / "a" / "teacher.jsonl").read_bytes()
  (tmp_path / "b" / "teacher.jsonl").write_bytes(shared)
  again = run(config, tmp_path / "b")
  assert contents(tmp_path / "a") == contents(tmp_path / "b")
  assert sum(server.asked.values()) == before and again["teacher"].get("sent", 0) == 0


def test_the_budget_ends_a_run_and_more_of_it_goes_on(serve, tmp_path):
  control = serve()
  run(configure(16), tmp_path / "control")
  server = serve()
  workdir, budgets, was_open = tmp_path / "a", (6_000, 11_000, 200_000), []
  for budget in budgets:
    report = run(configure(16, budget=budget), workdir)
    assert server.billed == report["teacher"]["tokens"] <= budget
    assert ("Exhausted" in report["open_detail"]) == (report["open"] > 0)
    assert report["seeds"] == report["written"] + report["open"]
    was_open.append(report["open"])
  assert was_open[0] > was_open[1] > was_open[2] == 0
  assert contents(workdir) == contents(tmp_path / "control")
  assert server.answered == control.answered  # each once


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_files(serve, tmp_path):
  faults = dict(passing=0.2, staying=0.2)
  serve(**faults)
  config = configure(40, concurrency=4)
  run(config, tmp_path / "control")
  server = serve(**faults, delay=0.05)
  workdir = tmp_path / "killed"
  command = [sys.executable, "-m", "pixel_jax", "synthesize", f"--workdir={workdir}"]
  command += ["--config=configs/synthesize.py:tiny", "--config.seeds=40"]
  command += [f"--config.teacher.{k}={config.teacher[k]}" for k in config.teacher]
  process = subprocess.Popen(command, cwd=ROOT, env=os.environ)
  while sum(server.answered.values()) < 25:
    assert process.poll() is None, "it ended before it was killed"
    time.sleep(0.005)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert not (workdir / "trajectories.jsonl").exists()  # whole files or none
  time.sleep(0.5)  # what the server still had under way is over
  before = dict(server.answered)
  server.delay = 0.0
  report = run(config, workdir)
  assert contents(workdir) == contents(tmp_path / "control")
  # At most what was under way at the kill was asked, and answered, again.
  twice = [key for key, n in server.answered.items() if n > 1]
  assert report["teacher"]["lost_requests"] <= config.teacher.concurrency
  assert len(twice) <= config.teacher.concurrency
  assert all(before.get(key) for key in twice) and max(server.answered.values()) <= 2
  assert report["teacher"]["known"] >= 25 - config.teacher.concurrency
  assert report["teacher"]["tokens"] >= server.billed


def test_a_wrong_key_ends_the_run_and_leaves_the_files(serve, tmp_path, monkeypatch):
  server = serve()
  run(configure(8), tmp_path / "a")
  before = contents(tmp_path / "a")
  monkeypatch.setattr(teachers.Handler, "fail", lambda self, _: self.send(401, b"{}"))
  server.passing, server.kinds[0] = 1.0, ["401"]
  with pytest.raises(teacher.Fatal, match="OPENAI_API_KEY"):
    run(configure(16), tmp_path / "a")
  assert contents(tmp_path / "a") == before


# ---- What is written -----------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """A run without faults, seeds of all kinds, and its codec."""
  workdir = tmp_path_factory.mktemp("made")
  patch = pytest.MonkeyPatch()
  with teachers.Loopback() as server:
    patch.setenv("OPENAI_API_KEY", "k")
    patch.setenv("OPENAI_BASE_URL", server.url)
    config = configure(60)
    config.data.uri = "world:full_train"
    config.recipe.kinds["video/zoom"] = 0.3
    run(config, workdir)
    patch.undo()
  return workdir, synthesize_tool.open_codec(config, workdir)


def test_sft_reads_the_trajectories_and_masks_what_was_planted(made):
  workdir, codec = made
  source = sources.open_source("jsonl:trajectories.jsonl", root=workdir, codec=codec)
  planted = 0
  for i in range(len(source)):
    t = source[i]
    example = encode.example(t, encode.redraw(t, codec, source.load_media))
    pack.check_fits(example, 2048, 512)
    sampled = np.array(t.sampled)
    assert (example.weight[~sampled] == 0).all()
    starts = np.flatnonzero(np.diff(np.r_[0, sampled.astype(int)]) == 1)
    ends = np.flatnonzero(np.diff(np.r_[sampled.astype(int), 0]) == -1) + 1
    assert len(starts) == len(t.calls) + 1
    for j, (a, b) in enumerate(zip(starts, ends)):
      is_planted = j < len(t.calls) and t.calls[j].planted
      planted += is_planted
      assert set(example.weight[a:b]) == {0.0 if is_planted else 1.0}
      text = codec.tokenizer.decode(t.ids[a:b])
      call = tools.parse_call(text, t.profile)
      assert (call is None) == (j == len(t.calls))
  assert planted > 10
  stream = pipeline.batches(
    source, codec, seed=0, rows=4, tokens=2048, patches=512, pack_window=8, shards=2
  )
  batch = next(stream)
  assert (batch["weight"] > 0).any() and stream.counts()["data/bad_records"] == 0
  stream.close()


def test_kinds_say_what_they_do(made):
  workdir, _ = made
  kinds = collections.Counter()
  for t in lines(workdir, "trajectories.jsonl"):
    said = [turn["text"] for turn in t["turns"][2:] if turn["role"] == "assistant"]
    wrong = sum(call["planted"] for call in t["calls"])
    assert "look clearer at the symbol on the red panel" in said[0]
    for i, text in enumerate(said[1 : wrong + 1]):
      assert text.startswith(
        ("The cropped part doesn't", "Now I can zoom in further", "The selected frames")
      )
      assert t["calls"][i]["planted"]
    kinds[len(said) - 1, wrong] += 1
  assert {(1, 0), (2, 1), (3, 2), (2, 0)} <= set(kinds)


def test_the_layout_of_pixel_reasoner_loads_with_plain_json(made):
  """As a user of PyTorch reads it: json, paths and PIL, nothing of ours."""
  workdir, _ = made
  folder = workdir / "pixel_reasoner"
  items = json.loads((folder / "release.json").read_text())
  traces = lines(workdir, "trajectories.jsonl")
  assert [i["qid"] for i in items] == [t["task"]["id"] for t in traces]
  used = []
  for item, trace in zip(items, traces):
    assert set(item) == {"qid", "message_list"}
    messages = item["message_list"]
    turns = ["assistant", "user"] * len(messages)
    roles = ["system", "user", *turns[: len(messages) - 2]]
    assert [m["role"] for m in messages] == roles and roles[-1] == "assistant"
    for message in messages:
      assert set(message["content"][0]) == {"text"}  # before its pictures
      for part in message["content"][1:]:
        ((kind, paths),) = part.items()
        paths = [paths] if kind == "image" else paths
        assert kind in ("image", "video") and message["role"] == "user"
        for path in paths:
          assert path.startswith(f"{kind}s/") and ".." not in path
          Image.open(folder / path).load()
          used.append(path)
      assert "<|" not in message["content"][0]["text"]
    assert messages[1]["content"][0]["text"].startswith(trace["task"]["question"])
    said = [m["content"][0]["text"] for m in messages if m["role"] == "assistant"]
    calls = [text for text in said if text.endswith("</tool_call>")]
    assert len(calls) == len(trace["calls"])
    # A crop is the box of its call, cut from the picture that it names.
    shown = [p for m in messages for part in m["content"][1:] for p in part.values()]
    flat = [
      p for paths in shown for p in (paths if isinstance(paths, list) else [paths])
    ]
    returned = len(flat) - len(trace["calls"])
    for call, path in zip(trace["calls"], flat[returned:]):
      if call["name"] == "crop_image_normalized":
        whole = Image.open(folder / flat[call["arguments"]["target_image"] - 1])
        box = [
          round(v * n) for v, n in zip(call["arguments"]["bbox_2d"], whole.size * 2)
        ]
        expected = whole.crop(box)
      else:
        expected = Image.open(folder / flat[call["arguments"]["target_frames"][0] - 1])
      assert np.array_equal(expected, Image.open(folder / path))
  on_disk = [p.relative_to(folder).as_posix() for p in folder.glob("*/*")]
  assert sorted(on_disk) == sorted(used)  # each once, none without a use


# ---- Seeds without a cue, and seeds that are none ------------------------------------


def run_on(tasks, root):
  """Tasks of a file as seeds; what is written lies in root/out."""
  lines = "".join(json.dumps(dataclasses.asdict(t)) + "\n" for t in tasks)
  (root / "seeds.jsonl").write_text(lines)
  config = configure(0)
  config.data.update(uri="jsonl:seeds.jsonl", root=str(root))
  return run(config, root / "out", layouts.world_codec(root / "words"))


def test_a_teacher_proposes_where_there_is_no_cue(serve, tmp_path):
  server = serve(staying=0.5)
  server.kinds[1] = ["wrong"]  # half of the pictures are not valid, it says
  tasks = [world.task(0, "train", world.nth("image", n)) for n in range(16)]
  bare = [dataclasses.replace(t, question="-", answer="-", reference={}) for t in tasks]
  report = run_on(bare, tmp_path)
  assert report["dropped"]["not valid"] >= 3 and report["written"] >= 2
  assert report["written"] + sum(report["dropped"].values()) == 16
  right = {t.id: t.answer for t in tasks}
  for t in lines(tmp_path / "out", "trajectories.jsonl"):
    task = t["task"]
    options = dict(x.split(". ") for x in task["question"].splitlines()[1:])
    assert options[task["answer"]] == f"the {right[task['id']]}"
    assert len(task["reference"]["bbox_2d"]) == 4


@pytest.mark.parametrize("uri", ["images:photos", "images:photos.zip"])
def test_bare_pictures_become_questions(uri, serve, tmp_path):
  """A folder or a zip of pictures is all there is; half of them are not valid."""
  serve(staying=0.5).kinds[1] = ["wrong"]
  (tmp_path / "photos").mkdir()
  right = {}
  with zipfile.ZipFile(tmp_path / "photos.zip", "w") as z:
    for n in range(16):
      task, name = world.task(0, "train", world.nth("image", n)), f"photos/{n}.png"
      world.load_media(task.media[0]).save(tmp_path / name)
      z.write(tmp_path / name, f"{n}.png")
      right[f"zip:photos.zip!{n}.png" if "zip" in uri else name] = task.answer
  config = configure(0)
  config.data.update(uri=uri, root=str(tmp_path))
  out, codec = tmp_path / "out", layouts.world_codec(tmp_path / "words")
  report = run(config, out, codec)
  assert report["dropped"]["not valid"] >= 3 and report["written"] >= 2
  assert report["written"] + sum(report["dropped"].values()) == 16
  for t in lines(out, "trajectories.jsonl"):
    task = t["task"]
    options = dict(x.split(". ") for x in task["question"].splitlines()[1:])
    assert options[task["answer"]] == f"the {right[task['id']]}"
  # What is written is trained on, its pictures read from where they were.
  source = sources.open_source(
    f"jsonl:{out / 'trajectories.jsonl'}", root=tmp_path, codec=codec
  )
  for i in range(len(source)):
    t = source[i]
    assert len(encode.redraw(t, codec, source.load_media)) == len(t.slots)
  release = json.loads((out / "pixel_reasoner/release.json").read_text())
  assert len(release) == report["written"]


BAD = {
  "no picture": dict(media=[]),
  "no file": dict(media=[Media("image", "absent.png")]),
  "outside": dict(media=[Media("image", "../secret.png")]),
  "no box": dict(reference={"bbox_2d": [0.1, 0.2, 0.3]}),
  "pixels": dict(reference={"bbox_2d": [10, 20, 30, 40]}),
  "list": dict(reference=["bbox_2d"]),
  "reversed": dict(reference={"bbox_2d": [0.5, 0.2, 0.3, 0.4]}),
  "nan": dict(reference={"bbox_2d": [0.5, 0.2, float("nan"), 0.4]}),
  "text": dict(reference={"bbox_2d": ["a", "b", "c", "d"]}),
  "tiny": dict(reference={"bbox_2d": [0.5, 0.5, 0.55, 0.55]}),
  "whole": dict(reference={"bbox_2d": [0.0, 0.0, 1.0, 1.0]}),
  "another picture": dict(
    reference={"bbox_2d": [0.1, 0.1, 0.4, 0.4], "target_image": 2}
  ),
  "frames": dict(
    media=[Media("video", "world:0/train/3")], reference={"target_frames": [9]}
  ),
  "no frames": dict(
    media=[Media("video", "world:0/train/3")], reference={"target_frames": []}
  ),
}


def test_bad_seeds_cost_nothing(serve, tmp_path):
  server = serve()
  seeds = [
    dataclasses.replace(world.task(0, "train", 0), id=name, **changes)
    for name, changes in BAD.items()
  ]
  report = run_on(seeds, tmp_path)
  assert report["dropped"] == {"large": 1, "seed": len(BAD) - 2, "small": 1}
  dropped = lines(tmp_path / "out", "dropped.jsonl")
  assert [d["index"] for d in dropped] == list(range(len(BAD)))
  assert not server.asked


# ---- Settings ----------------------------------------------------------------------


def test_a_recipe_says_what_is_wrong_with_it():
  for wrong in ({"takes": 0}, {"min_side": 3}, {"kinds": {"image/box": 1.0}}):
    told = "takes=0: expected|min_side=.*kinds of traces with operations"
    with pytest.raises(ValueError, match=told):
      distill.Recipe(**{"kinds": templates.PAPER, **wrong})


@pytest.fixture
def quick_compiles():
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.slow
def test_a_checkpoint_of_ours_can_be_the_teacher(tmp_path, quick_compiles, monkeypatch):
  """A fresh model says nothing of use: all is dropped, counted, and kept.  Made to say
  what a teacher would, it writes a trace: the whole way through our engine."""
  from pixel_jax.run import checkpoint, policies

  config = configure(2)
  config.engine.update(
    slots=2, max_prompt=1280, max_len=2048, prompt_len=1280, views=(), patches=64
  )
  config.recipe.update(max_tokens=16, takes=2)
  workdir = tmp_path / "a"
  workdir.mkdir()
  mesh = synthesize_tool.parallel.make_mesh(1, 1, 1)
  policy = policies.open_policy(
    "random", model=config.model, codec=config.codec, mesh=mesh, seed=0, workdir=workdir
  )
  saver = checkpoint.Checkpoints(workdir, **policy.extra)
  saver.save(1, {"params": policy.params}, {})
  saver.close()
  config.local = str(workdir)
  report = run(config, workdir)
  assert report["dropped"] == {"malformed": 2} and report["open"] == 0
  t = report["teacher"]
  assert t["sent"] == t["answered"] == 4 and t["tokens"] > 1000
  assert run(config, workdir)["teacher"].get("sent", 0) == 0
  notes = journal.Journal(workdir / "teacher.jsonl")
  assert len(notes) == 4
  notes.close()

  play, words = synthesize_tool.engine.Engine.run, policy.codec.tokenizer
  true = {}  # what a teacher would say to a question about these pictures

  def says(task, _):
    return [[*words.encode(json.dumps(true[task.id]), control=False), words.im_end]]

  def scripted(self, params, tasks, *, load_media, **how):
    for t in tasks:
      pictures = [load_media(m) for m in t.media]
      true[t.id] = teachers.reply(t.question, pictures, "")
    return play(self, params, tasks, load_media=load_media, script=says, **how)

  monkeypatch.setattr(synthesize_tool.engine.Engine, "run", scripted)
  config.recipe.max_tokens, config.init = 400, str(workdir)
  report = run(config, tmp_path / "b")
  assert report["written"] == 2 and report["teacher"]["answered"] == 4
  for t in lines(tmp_path / "b", "trajectories.jsonl"):
    assert t["turns"][-1]["text"].endswith(f"\\boxed{{{t['task']['answer']}}}")
