"""Benchmarks: read in their true layouts, asked, scored, told and exported."""

import dataclasses
import json

import layouts_of_benchmarks as layouts
import openpyxl
import pytest
from test_train import play
from test_video import _number

from pixel_jax import evaluate, parallel, trajectory
from pixel_jax.chat import encode
from pixel_jax.data import media, records
from pixel_jax.evals import benchmark, protocol, report, rules
from pixel_jax.run import policies
from pixel_jax.run.settings import ConfigError
from pixel_jax.trajectory import OpCall, Task, Trajectory

NAMES = [*evaluate.BENCHMARKS]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  folder = tmp_path_factory.mktemp("benchmarks")
  layouts.all_of_them(folder)
  return folder


@pytest.fixture(scope="module")
def codec():
  return policies.open_codec(policies.TINY_BASE)


def opened(name, root, codec):
  return benchmark.open_benchmark(evaluate.BENCHMARKS[name], str(root), codec)


def said(text, task, stop="answer", calls=()):
  t = Trajectory(task, stop=stop, sampled=[True], calls=list(calls))
  t.turns = [{"role": "user", "text": "?"}, {"role": "assistant", "text": text}]
  return t


def scores(name, task, text, how="official"):
  row = protocol.score(
    evaluate.BENCHMARKS[name], protocol.PROTOCOLS[how], task, said(text, task)
  )
  return row.scores


# ---- Read ----------------------------------------------------------------------------

COUNTS = {
  "vstar": 4, "hrbench4k": 8, "hrbench8k": 4, "tallyqa_simple": 2, "tallyqa_complex": 2,
  "tallyqa_evaldata": 2, "infographicvqa": 2, "mvbench": 2, "visualprobe": 2,
  "treebench": 2, "mme_realworld_lite": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_question_is_read_and_its_picture_is_found(name, root, codec):
  source = opened(name, root, codec)
  assert len(source) == COUNTS[name]
  assert len({task.id for task in source.tasks}) == len(source)
  for task in source.tasks:
    loaded = [source.load_media(m) for m in task.media]
    assert len(loaded) == 1
    options = task.reference.get("options")
    assert options is None or task.answer in options
    for box in task.reference.get("boxes", ()):
      assert box == pytest.approx([0.5, 0.5, 0.6, 0.6])


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_without_it_says_what_must_lie_there(name, tmp_path, codec):
  with pytest.raises(records.SourceError, match=f"{name}: .* must hold .* of "):
    opened(name, tmp_path, codec)


@pytest.mark.parametrize(
  "write", [layouts.infographicvqa_rrc, layouts.infographicvqa_tsv]
)
def test_other_layouts_of_infographicvqa(write, tmp_path, codec):
  write(tmp_path)
  (task,) = opened("infographicvqa", tmp_path, codec).tasks
  assert task.answer in (["x"], ["x", "y's"])
  opened("infographicvqa", tmp_path, codec).load_media(task.media[0])


def test_vstar_without_its_list_has_an_order_of_its_own(tmp_path, codec):
  layouts.vstar(tmp_path)
  (tmp_path / "vstar" / "test_questions.jsonl").unlink()
  once, again = (opened("vstar", tmp_path, codec).tasks for _ in "ab")
  assert once == again
  for task in once:
    assert task.reference["options"][task.answer] in ("red", "left of it")


def test_a_bounded_clip_gives_the_middles_of_its_part(root, codec):
  """As MVBench's notebook: start + size / 2 + round(size * i) of equal parts."""
  source = opened("mvbench", root, codec)
  clip, folder = source.tasks
  assert clip.media[0].path.endswith("A.mp4#t=0.5,2.0")
  size = (16 - 4) / codec.video_frames  # at 8 frames a second
  wanted = [int(4 + size / 2 + round(size * i)) for i in range(codec.video_frames)]
  loaded = source.load_media(clip.media[0])
  assert [_number(f) for f in loaded.frames] == wanted
  names = [int(p.rpartition("/")[2][:-4]) for p in folder.media[0].path]
  assert names == [int(6 + 18 / 32 + round(18 / 16 * i)) for i in range(16)]


# ---- Ask -----------------------------------------------------------------------------


def test_the_official_words(root, codec):
  first = {n: opened(n, root, codec).tasks[0] for n in NAMES}
  asked = {n: evaluate.BENCHMARKS[n].ask(t) for n, t in first.items()}
  assert asked["vstar"] == (
    "What about thing 0 in direct_attributes?\n(A) blue\n(B) green\n(C) black\n(D) red\n"
    "Answer with the option's letter from the given choices directly."
  )
  assert asked["hrbench4k"] == (
    'Question: How many "0"?\nLook.\nOptions:\nA. one\nB. two\nC. three\nD. four\n'
    "Please select the correct answer from the options above. \n"
  )
  assert (
    asked["tallyqa_complex"] == "How 0?\nAnswer the question using a single number."
  )
  assert asked["infographicvqa"].endswith("using a single word or phrase.")
  assert asked["mvbench"] == (
    "Question: What happened?\nOptions:\n(A) ran\n(B) sat\n(C) slept\n"
    "Only give the best option."
  )
  assert asked["treebench"].endswith(
    "Answer with the correct option's letter directly. \n"
  )
  second = opened("treebench", root, codec).tasks[1]
  assert (
    evaluate.BENCHMARKS["treebench"].ask(second).startswith("Hint: mind the left\nQ")
  )
  assert asked["mme_realworld_lite"].startswith(
    "How many 0? The choices are listed below:\n(A) 1\n"
  )
  assert asked["mme_realworld_lite"].endswith("\nThe best answer is: ")


def test_protocols_make_their_prompts(root, codec):
  vstar, task = evaluate.BENCHMARKS["vstar"], opened("vstar", root, codec).tasks[0]
  prompts = {}
  for name, how in protocol.PROTOCOLS.items():
    asked = dataclasses.replace(task, question=how.ask(vstar, task))
    messages = encode.question_messages(how.talk(vstar, codec), asked)
    prompts[name] = [messages[0]["content"], messages[1]["content"][-1]["text"]]
  assert prompts["official"] == ["You are a helpful assistant.", vstar.ask(task)]
  assert "<tools>" in prompts["pixel"][0] and "\\boxed{}" in prompts["pixel"][1]
  assert "<tools>" not in prompts["text"][0] and "\\boxed{}" in prompts["text"][1]
  for name in ("pixel", "text"):
    assert "\n(A) blue\n(B) green\n(C) black\n(D) red" in prompts[name][1]


# ---- Score ---------------------------------------------------------------------------


def test_rules_get_what_the_protocol_finds(root, codec):
  tasks = {n: opened(n, root, codec).tasks[0] for n in NAMES}
  assert scores("vstar", tasks["vstar"], "D") == {"letter": 1, "letter_lmms": 1}
  assert scores("vstar", tasks["vstar"], "It is red.")["letter"] == 1
  assert scores("vstar", tasks["vstar"], "so \\boxed{red}", "pixel")["letter"] == 1
  assert scores("hrbench4k", tasks["hrbench4k"], "The answer is B")["letter"] == 1
  counted = tasks["tallyqa_evaldata"]
  assert scores("tallyqa_evaldata", counted, "\\boxed{two}", "text") == {
    "exact": 1, "pixel_reasoner": 0
  }  # fmt: skip
  info = tasks["infographicvqa"]
  assert scores("infographicvqa", info, "twiter")["anls"] == pytest.approx(6 / 7)
  assert scores("infographicvqa", info, "twiter")["pixel_reasoner"] == 0
  assert scores("mvbench", tasks["mvbench"], "Best option:(B) sat")["official"] == 1
  assert (
    scores("mvbench", tasks["mvbench"], "Best option:(")["official"] == 1
  )  # as theirs
  assert scores("visualprobe", tasks["visualprobe"], "\\boxed{stop}", "pixel")["judge"]
  tree = tasks["treebench"]
  assert scores("treebench", tree, "<think>A</think><answer>B</answer>")["letter"] == 1
  # "An" begins with A: under "pixel" the rule must see the answer alone.
  mme = tasks["mme_realworld_lite"]
  assert scores("mme_realworld_lite", mme, "An answer: C")["letter"] == 0
  assert scores("mme_realworld_lite", mme, "An answer: \\boxed{C}", "pixel")["letter"]


def test_a_rollout_without_an_answer_is_wrong_where_it_should_have_boxed_one(
  root, codec
):
  task = opened("mvbench", root, codec).tasks[0]
  for stop in ("turns", "length"):
    row = protocol.score(
      evaluate.BENCHMARKS["mvbench"], protocol.PIXEL, task, said("(B)", task, stop)
    )
    assert set(row.scores.values()) == {0}


@pytest.mark.parametrize("name", NAMES)
def test_figures_are_those_of_the_rows(name, root, codec):
  bench, source = evaluate.BENCHMARKS[name], opened(name, root, codec)
  rows = [
    protocol.score(bench, protocol.OFFICIAL, t, said(right_answer(t), t))
    for t in source.tasks
  ]
  told = report.summarize(rows, bench)
  assert told["n"] == len(rows) and told["accuracy"] == 1
  json.dumps(told)
  if name.startswith("hrbench"):
    assert told["cycles"]["Average/all"] == told["right_in_all_cycles"] == 1
    assert told["cycle_0"] == 1
  if name == "treebench":
    assert told["miou"] == 1 and told["tasks"] == {"Perception": 1, "Reasoning": 1}
  if name.startswith("tallyqa"):
    assert told["rmse"] == 0


def right_answer(task):
  gold = task.answer if isinstance(task.answer, str) else task.answer[0]
  return gold + "<box>[60,45,72,54]</box>" * ("targets" in task.reference)


def test_one_cycle_of_four_is_a_quarter(root, codec):
  """The score is the mean over the cycles; the same letter each time is right once."""
  bench, source = evaluate.BENCHMARKS["hrbench4k"], opened("hrbench4k", root, codec)
  rows = [
    protocol.score(bench, protocol.OFFICIAL, t, said("B", t)) for t in source.tasks
  ]
  told = report.summarize(rows, bench)
  assert told["accuracy"] == 0.25 and told["right_in_all_cycles"] == 0
  assert told["cycle_0"] == 1
  low, high = told["ci"]  # of two clusters that are alike: no spread between them
  assert low == high == 0.25


def test_the_likeliest_option_is_that_of_the_highest_mean():
  task = Task("t", "?", "B", [], reference={"options": {"A": "x", "B": "y z"}})
  a = Trajectory(task, logp=[0.0, -1.0], sampled=[False, True], stop="answer")
  b = Trajectory(task, logp=[-0.9, -0.9], sampled=[True, True], stop="answer")
  for t in (a, b):
    t.turns = [{"role": "assistant", "text": "x"}]
  row = protocol.likeliest(task, [a, b, b])
  assert row.answer == "B" and row.scores == {"likelihood": 1.0}


def test_covering_half_of_the_target_enlarged_counts():
  reference = {"boxes": [[0.5, 0.5, 0.6, 0.6]]}
  task = Task("t", "?", "A", [media.Media("image", "a")], reference=reference)

  def crop(*box, target=1, error=None):
    arguments = {"bbox_2d": list(box), "target_image": target}
    return OpCall("crop_image_normalized", arguments, error)

  cover = benchmark.covers_boxes
  assert cover(task, crop(0.4, 0.4, 0.7, 0.7), [])
  assert cover(task, crop(0.4, 0.4, 0.55, 0.7), [])  # half of it
  assert not cover(task, crop(0.4, 0.4, 0.54, 0.7), [])
  assert not cover(task, crop(0, 0, 1, 1), [])  # no closer look
  assert not cover(task, crop(0.4, 0.4, 0.7, 0.7, error="too_small"), [])
  half = crop(0.5, 0.5, 1, 1)
  assert cover(task, crop(0, 0, 0.3, 0.3, target=2), [half])
  assert not cover(task, crop(0.5, 0.5, 0.9, 0.9, target=2), [half])
  failed = crop(0, 0, 0.5, 0.5, error="too_small")  # shows nothing, so it has no number
  assert cover(task, crop(0, 0, 0.3, 0.3, target=2), [failed, half])


def test_pixel_reasoners_rule():
  """pixel_reasoner.md 3.3, what was run there."""
  rule = rules.pixel_reasoner
  for text in (r"\boxed{(B)}", r"\boxed{\text{B}}", r"\boxed{b}", "<answer>b</answer>"):
    assert rule(text, "B") == 1, text
  for text in (r"\boxed{B. red}", r"\boxed{B.}", r"\boxed{B) red}", "", "\\boxed{}"):
    assert rule(text, "B") == 0, text
  assert rule(r"\boxed{livers}", "silver") == rule(r"\boxed{the cat}", "the act") == 1
  assert rule(r"\boxed{2}", "two") == 0 and rule("there are 3, no 4", "4") == 1
  assert rule(r"\boxed{5}", ["7", "5%"]) == 1
  assert rule(r"\boxed{in red, or so: blue}", "red, blue") == 1


# ---- Controls ------------------------------------------------------------------------


def test_controls_show_other_pictures_and_can_be_redrawn(root, codec):
  source = opened("vstar", root, codec)
  vstar, task = evaluate.BENCHMARKS["vstar"], source.tasks[0]
  plain = source.load_media(task.media[0])
  grey = protocol.altered(vstar, "blank", task).media[0]
  assert grey.path == task.media[0].path
  behind = source.load_media(dataclasses.replace(grey, path=grey.source))
  assert behind.size == plain.size and set(behind.getdata()) == {(128, 128, 128)}
  masked = source.load_media(protocol.altered(vstar, "masked", task).media[0])
  box = (60, 45, 72, 54)
  assert set(masked.crop(box).getdata()) == {(128, 128, 128)}
  masked.paste(plain.crop(box), box)
  assert masked.tobytes() == plain.tobytes()
  assert protocol.altered(vstar, "free", task) is task


@pytest.mark.parametrize(
  "name", ["masked:0.1,0.2:a.jpg", "masked::a.jpg", "masked:0,0,2,1:a"]
)
def test_a_mask_that_is_none_is_refused(name):
  with pytest.raises(records.BadRecord, match="expected masked:"):
    media.Library().load(trajectory.Media("image", name))


# ---- Whole ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(root, tmp_path_factory):
  """All of them under all protocols, by the tiny base."""
  workdir = tmp_path_factory.mktemp("evaluated")
  with pytest.MonkeyPatch.context() as patch:
    one = parallel.make_mesh(1, 1, 1)
    patch.setattr(parallel, "make_mesh", lambda: one)
    play(ENTRY, workdir, **settings_of(root))
  return workdir


ENTRY = ("evaluate", f"configs/evaluate.py:tiny,{','.join(NAMES)}")


def settings_of(root):
  return {
    "policies": "BASE=tiny_base", "data.root": str(root),
    "modes": ("free", "masked"), "exports": ("vlmevalkit", "lmms_eval"),
    "rollout.max_new_tokens": 4, "rollout.max_turns": 2,
  }  # fmt: skip


def test_all_benchmarks_from_read_to_export(evaluated):
  result = json.loads((evaluated / "evaluation.json").read_text())
  told = {(r["benchmark"], r["protocol"]): r["modes"] for r in result["rows"]}
  assert {b for b, _ in told} == set(NAMES) and len(told) == 3 * len(NAMES)
  hashes = [m["hash"] for modes in told.values() for m in modes.values()]
  assert len(set(hashes)) == len(hashes)
  for (name, how), modes in told.items():
    has_boxes = name in ("vstar", "treebench")
    wanted = {"free", "masked"} if has_boxes else {"free"}
    wanted |= {"likelihood"} if (name, how) == ("vstar", "official") else set()
    assert set(modes) == wanted
    for m in modes.values():
      assert m["n"] == COUNTS[name] and m["set_aside"] == 0


def test_what_looking_is_worth_is_told_in_pairs(evaluated):
  pairs = json.loads((evaluated / "evaluation.json").read_text())["pairs"]
  told = {(p["first"], p["second"]): p for p in pairs}
  gain = told["BASE_vstar_pixel_free", "BASE_vstar_text_free"]
  assert gain["n"] == 4 and 0 <= gain["mcnemar_p"] <= 1
  low, high = gain["ci"]
  assert low <= gain["difference"] <= high
  difference = gain["only_first"] - gain["only_second"]
  assert gain["difference"] == pytest.approx(difference)
  assert ("BASE_treebench_pixel_free", "BASE_treebench_pixel_masked") in told


def test_policies_that_were_asked_differently_are_named():
  def row(name, hash, benchmark="vstar"):
    modes = {"free": {"hash": hash}}
    return {"name": name, "benchmark": benchmark, "protocol": "pixel", "modes": modes}

  rows = [row("A", "1"), row("B", "2"), row("C", "1"), row("D", "9", "treebench")]
  assert [*evaluate.incomparable(rows[:2], rows[1])] == [("free", "A")]
  assert [*evaluate.incomparable(rows, rows[2])] == [("free", "B")]
  assert [*evaluate.incomparable(rows, rows[3])] == []


def test_the_hash_changes_with_what_a_score_depends_on(root, codec):
  vstar, source = evaluate.BENCHMARKS["vstar"], opened("vstar", root, codec)
  settings = dict(temperature=0.0, max_new_tokens=32, max_turns=3)

  def of(tasks=source.tasks, codec=codec, bench=vstar, mode="free", **changed):
    told = protocol.digests(bench, protocol.PIXEL, tasks, codec)
    parsed = protocol.parser(bench, min(tasks, key=lambda t: t.id))
    return protocol.fingerprint(
      bench, protocol.PIXEL, mode, codec, prompts=told, parsed=parsed, samples=1, seed=0,
      settings=settings | changed,
    )  # fmt: skip

  turned = dataclasses.replace(source.tasks[0], reference={
    **source.tasks[0].reference, "options": {"A": "red", "B": "blue"},
  })  # fmt: skip
  lenient = dataclasses.replace(vstar, rules={"letter": lambda a, t: 1.0})
  smaller = {**codec.budgets, "image": (784, 784)}
  hashes = [
    of(), of(tasks=[turned, *source.tasks[1:]]), of(tasks=source.tasks[1:]),
    of(bench=lenient), of(codec=dataclasses.replace(codec, budgets=smaller)),
    of(mode="masked"), of(temperature=0.5), of(max_turns=2),
  ]  # fmt: skip
  assert len(set(hashes)) == len(hashes)
  assert of(tasks=source.tasks[::-1]) == hashes[0]


def test_exports_are_scored_to_the_same_numbers(evaluated):
  result = json.loads((evaluated / "evaluation.json").read_text())
  for row in result["rows"]:
    if row["benchmark"] != "hrbench4k":
      continue
    stem = f"BASE_hrbench4k_{row['protocol']}_free"
    book = openpyxl.load_workbook(evaluated / "exports/vlmevalkit" / f"{stem}.xlsx")
    names, *lines = book.active.iter_rows(values_only=True)
    records = [dict(zip(names, line)) for line in lines]
    assert {"index", "question", "A", "answer", "category", "prediction"} <= set(names)
    hits = [
      rules.mcq_letter_vlmevalkit(r["prediction"] or "", {k: r[k] for k in "ABCD"})
      == r["answer"]
      for r in records
    ]
    assert sum(hits) / len(hits) == row["modes"]["free"]["accuracy"]
    samples = evaluated / "exports/lmms_eval" / f"{stem}.jsonl"
    for line, record in zip(map(json.loads, samples.read_text().splitlines()), records):
      assert line["filtered_resps"] == [record["prediction"] or ""]
      assert line["doc"]["index"] == record["index"]


def test_text_is_no_formula(tmp_path):
  from pixel_jax.evals import exports

  task = Task("t", "?", "A", [], reference={"row": {"question": "=1+1"}})
  row = benchmark.Row(
    task, said("=HYPERLINK(1)", task), "=HYPERLINK(1)", {"letter": 0.0}
  )
  exports.vlmevalkit(tmp_path / "x.xlsx", [row])
  sheet = openpyxl.load_workbook(tmp_path / "x.xlsx").active
  assert {c.data_type for line in sheet.iter_rows() for c in line} == {"s"}


def test_a_killed_evaluation_goes_on_answer_by_answer(
  evaluated, root, tmp_path, monkeypatch
):
  """Killed in the middle of an answer: whole lines are taken over, the rest is played."""
  one = parallel.make_mesh(1, 1, 1)
  monkeypatch.setattr(parallel, "make_mesh", lambda: one)
  entry = ("evaluate", "configs/evaluate.py:tiny,vstar")
  few = settings_of(root) | {"protocols": ("pixel",)}
  real, count = trajectory.to_json, []

  class Killed(BaseException):
    pass

  def to_json(t):
    count.append(t.task.id)
    if len(count) == 3:
      raise Killed
    return real(t)

  with monkeypatch.context() as patch, pytest.raises(Killed):
    patch.setattr(trajectory, "to_json", to_json)
    play(entry, tmp_path / "run", **few)
  (partial,) = (tmp_path / "run" / "trajectories").glob("*.partial")
  assert len(partial.read_text().splitlines()) == 2
  with partial.open("a") as f:
    f.write(real(next(trajectory.read_jsonl(partial)))[:100])  # a torn line
  played = []
  with monkeypatch.context() as patch:
    patch.setattr(
      trajectory, "to_json", lambda t: (played.append(t.task.id), real(t))[1]
    )
    play(entry, tmp_path / "run", **few)
  assert len(played) == 2 + 4  # the rest of "free", and "masked"
  for mode in ("free", "masked"):
    file = f"predictions/BASE_vstar_pixel_{mode}.jsonl"
    assert (tmp_path / "run" / file).read_text() == (evaluated / file).read_text()
    file = f"trajectories/BASE_vstar_pixel_{mode}.jsonl"
    again, before = (
      [dataclasses.asdict(t) for t in trajectory.read_jsonl(folder / file)]
      for folder in (tmp_path / "run", evaluated)
    )
    assert again == before
  assert not list((tmp_path / "run" / "trajectories").glob("*.partial"))


def test_mistakes_are_told_before_anything_is_opened(root, tmp_path):
  entry = ("evaluate", "configs/evaluate.py:tiny,hrbench4k")
  few = {"policies": "BASE=nowhere", "data.root": str(root)}
  for wrong, words in (
    ({"modes": ("free", "masked")}, "config.modes has 'masked'"),
    ({"data.uri": "world:test"}, "give one of them"),
    ({"protocols": ("oficial",)}, "protocols"),
    ({"policies": ""}, "NAME=DIR"),
    ({"policies": "A=x,A=y"}, "every NAME once"),
    ({"policies": "../A=x"}, "without /"),
  ):
    with pytest.raises(ConfigError, match=words):
      play(entry, tmp_path / "x", **few | wrong)
  assert not (tmp_path / "x").exists()
