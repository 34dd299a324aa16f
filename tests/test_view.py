"""The report: whole, self-contained, nothing of a model's text becomes markup."""

import base64
import html.parser
import io
import json
import math
import random
import re
import sys
import types
import xml.etree.ElementTree

import apps
import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixel_jax import trajectory as trajectories
from pixel_jax.chat import encode, tokenizer
from pixel_jax.tools import view as view_tool
from pixel_jax.trajectory import Media, OpCall, Task, Trajectory
from pixel_jax.view import charts, pictures, report, runs, table
from pixel_jax.view import trajectory as view

HOSTILE = (
  "</pre><script>alert(1)</script><img src=x onerror=alert(2)>\"'&\u202e\ud800\0"
)
BOX = [0.25, 0.5, 0.5, 0.75]


def load_media(media):
  rng = np.random.default_rng(len(media.path))

  def noise(n):
    return PIL.Image.fromarray(rng.integers(0, 255, (n, n, 3), np.uint8))

  if media.kind == "video":
    frames = [noise(112) for _ in range(8)]
    return types.SimpleNamespace(frames=frames, seconds_per_frame=1.0)
  return noise(252)


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
  return encode.Codec(
    tokenizer=tokenizer.make_tiny(tmp_path_factory.mktemp("tokenizer")),
    budgets=dict(
      image=(7056, 7056), video=(784, 784), crop=(3136, 3136), frame=(12544, 12544)
    ),
    video_frames=8,
  )


def play(codec, *says, kind="image", reference=None, step=3, name="q", correct=1.0):
  task = Task(name, "Which letter?", "O", [Media(kind, "world:x")])
  task.reference = reference or {}
  c = encode.Conversation(codec, task, load_media)
  for i, said in enumerate(says):
    if i:
      c.observe(c.call_of_last_turn())
    words = codec.tokenizer
    ids = [*words.encode(said, control=False), words.im_end]
    c.add_sampled(ids, [-0.5] * len(ids))
  c.call_of_last_turn()
  t = c.finish("answer")
  t.policy_step = step
  t.reward = dict(correct=correct, curiosity=0.05, penalty=-0.01, total=1.04, rapr=0.1)
  return t


def call(name="crop_image_normalized", **arguments):
  arguments = arguments or {"bbox_2d": BOX, "target_image": 1}
  body = json.dumps({"name": name, "arguments": arguments})
  return f"<tool_call>\n{body}\n</tool_call>"


class Page(html.parser.HTMLParser):
  """What a browser would make of it: the elements, and every address they name."""

  VOID = ("img", "input", "meta", "link", "br")

  def __init__(self, text):
    super().__init__()
    self.elements, self.addresses, self.text, self.open = [], [], [], []
    self.feed(text)
    self.close()
    assert not self.open, f"never closed: {self.open}"

  def handle_starttag(self, tag, attributes):
    attributes = dict(attributes)
    self.elements.append((tag, attributes))
    assert not any(k.startswith("on") for k in attributes), (tag, attributes)
    self.addresses += [attributes[k] for k in ("src", "href") if attributes.get(k)]
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attributes):
    self.elements.append((tag, dict(attributes)))

  def handle_endtag(self, tag):
    assert self.open and self.open[-1] == tag, (self.open, tag)
    self.open.pop()

  def handle_data(self, data):
    if "script" not in self.open and "style" not in self.open:
      self.text.append(data)

  def count(self, tag, css=""):
    return sum(
      t == tag and (not css or css in (a.get("class") or "").split())
      for t, a in self.elements
    )


# ---- One trajectory ------------------------------------------------------------------


def test_box_lies_on_the_right_pixels(codec):
  reference = {"bbox_2d": [0.0, 0.0, 0.1, 1.0]}
  t = play(codec, call(), "\\boxed{O}", reference=reference)
  page = Page(view.render(t, load_media, codec=codec))
  rects = {a["class"]: a for tag, a in page.elements if tag == "rect"}

  def sides(r):
    return [float(r[k]) for k in ("x", "y", "width", "height")]

  assert sides(rects["call"]) == [63, 126, 63, 63]
  assert sides(rects["reference"]) == [0, 0, 25.2, 252]
  overlay = next(a for tag, a in page.elements if tag == "svg")
  assert overlay["viewbox"] == "0 0 252 252"


def test_crop_is_what_the_policy_saw(codec):
  t = play(codec, call(), "\\boxed{O}")
  shown = pictures.replay(t, codec, load_media)
  box = [round(v * 252) for v in BOX]
  cut = load_media(t.task.media[0]).crop(box)
  assert shown.returned[0][0].image.size == (56, 56)
  assert shown.returned[0][0].image.tobytes() == codec.shrink(cut, "crop").tobytes()
  fragment = view.render(t, load_media, codec=codec)
  assert fragment.count("data:image/jpeg;base64,") == 3  # source, first view, crop
  at = [fragment.index(s) for s in ("target_image", "Here is the cropped", "image 2 ·")]
  assert at == sorted(at)


def test_second_zoom_is_drawn_on_the_crop(codec):
  again = call(bbox_2d=[0.0, 0.0, 0.5, 1.0], target_image=2)
  t = play(codec, call(), again, "\\boxed{O}")
  shown = pictures.replay(t, codec, load_media)
  pictures.mark_calls(t, shown)
  assert [m.label for m in shown.question[0][0].marks] == ["1"]
  assert [(m.label, m.box) for m in shown.returned[0][0].marks] == [
    ("2", (0, 0, 28, 56))
  ]


def test_video_is_a_filmstrip_with_the_selected_frames_marked(codec):
  select = call("select_frames", target_frames=[3, 5])
  t = play(codec, select, "\\boxed{O}", kind="video", reference={"target_frames": [5]})
  page = Page(view.render(t, load_media, codec=codec))
  assert page.count("figure", "source") == 8
  assert page.count("figure", "chosen") == 2
  assert page.count("figure", "wanted") == 1
  assert page.count("figure", "returned") == 2


def test_failed_call_is_marked_and_its_box_too(codec):
  t = play(
    codec,
    call(bbox_2d=[0.5, 0.5, 0.52, 0.9], target_image=1),
    "\\boxed{O}",
    correct=0.0,
  )
  fragment = view.render(t, load_media, codec=codec)
  page = Page(fragment)
  assert page.count("li", "failed") == 1 and page.count("rect", "error") == 1
  assert "too_small" in fragment and "✗ wrong" in fragment


def test_policy_and_tool_and_reward_are_told_apart(codec):
  fragment = view.render(play(codec, call(), "\\boxed{O}"), load_media, codec=codec)
  page = Page(fragment)
  assert page.count("li", "policy") == 2 and page.count("li", "tool") == 1
  assert page.count("div", "tokens") == 2 and 'title="60.7%"' in fragment
  for piece in ("✓ correct", "curiosity", "+0.05", "-0.01", "1.04", "answered"):
    assert piece in fragment
  assert "<|image_pad|>" not in "".join(page.text)


def test_hostile_text_stays_text(codec):
  call_of = f'<tool_call>\n{{"name": "{HOSTILE}"\n</tool_call>'
  said = HOSTILE.encode("utf-8", "replace").decode()
  t = play(codec, call_of.encode("utf-8", "replace").decode(), said, name=HOSTILE)
  t.task.question = t.task.answer = t.stop = HOSTILE
  t.calls[0].error = HOSTILE
  t.reward[HOSTILE] = HOSTILE
  t.turns.append({"role": HOSTILE, "text": HOSTILE})
  run = runs.Run(HOSTILE, [{"step": 1, "loss": 2.0}], {HOSTILE: HOSTILE}, [t])
  evaluation = {"split": HOSTILE, "rows": [{"name": HOSTILE, "modes": {}}]}
  text = report.report([run], evaluation, load_media, codec=codec, title=HOSTILE)
  text.encode()
  page = Page(text)
  assert page.count("script") == 2 and "alert" not in "".join(page.addresses)
  assert "<script>alert(1)</script>" in "".join(page.text)
  assert "\u202e" not in text and "\0" not in text


@settings(max_examples=60, deadline=None)
@given(
  text=st.text(max_size=60),
  arguments=st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda x: (
      st.lists(x, max_size=4)
      | st.dictionaries(
        st.sampled_from(["bbox_2d", "target_image", "target_frames"]), x, max_size=3
      )
    ),
    max_leaves=8,
  ),
)
def test_anything_a_model_wrote_can_be_shown(text, arguments):
  t = Trajectory(Task("q", text, text, [Media("image", "x")]))
  t.calls = [OpCall(text, arguments, None), OpCall("", arguments, "bad_json")]
  t.turns = [
    {"role": "user", "text": text},
    {"role": "assistant", "text": f"{text}<tool_call>{text}</tool_call>"},
    {"role": "user", "text": text},
    {"role": "assistant", "text": text},
  ]
  page = Page(view.render(t, load_media))
  assert page.count("script") == 0 and page.count("article") == 1


def test_lost_media_cost_the_pictures_only(codec):
  def lost(media):
    raise FileNotFoundError("gone <b>")

  page = Page(view.render(play(codec, "\\boxed{O}"), lost, codec=codec))
  assert page.count("p", "missing") == 1 and page.count("li", "policy") == 1


def test_released_numbers_and_pixel_boxes():
  t = Trajectory(Task("q", "?", "O", [Media("video", "x")]), profile="released")
  t.calls = [
    OpCall("select_frames", {"target_frames": [2]}),
    OpCall("crop_image_normalized", {"bbox_2d": [0, 0, 28, 56], "target_image": 2}),
  ]

  def frame():
    return pictures.Shown(PIL.Image.new("RGB", (112, 112)), "", (56, 56))

  shown = pictures.Replay([[frame(), frame()]], [[]], [[frame()], []])
  pictures.mark_calls(t, shown)
  assert shown.question[0][1].chosen == ["1"]
  assert [m.box for m in shown.returned[0][0].marks] == [(0, 0, 56, 112)]


@given(bbox=st.lists(st.floats(allow_nan=True) | st.integers(), max_size=5))
def test_a_box_lies_in_its_picture_or_is_none(bbox):
  box = pictures.box_of(bbox, (300, 200))
  if box is not None:
    assert 0 <= box[0] <= box[2] <= 300 and 0 <= box[1] <= box[3] <= 200
  else:
    assert len(bbox) != 4 or not all(math.isfinite(v) and abs(v) < 1e9 for v in bbox)


# ---- The page ------------------------------------------------------------------------


def metrics(n=60):
  rng = random.Random(0)
  return [
    {
      "step": s,
      "ops/rapr": rng.random(),
      "reward/correct": s / n,
      "reward/accuracy_with_ops": math.nan if s % 2 else 0.5,
      "policy/entropy": 1 / s,
      "agreement/logp_diff_max": 10.0**-s if s < 5 else 0.0,
    }
    for s in range(1, n + 1)
  ]


EVALUATION = {
  "split": "world:test",
  "temperature": 1.0,
  "rows": [
    {"name": "SFT", "modes": {"free": {"accuracy": 0.541, "ci": [0.5, 0.58], "n": 64}}},
    {
      "name": "RL",
      "modes": {
        "free": {"accuracy": 0.8, "n": 1024, "rapr": 0.9, "by": {"image/easy": 0.7}},
        "forbidden": {"accuracy": 0.6, "ci": [0.57, 0.63], "n": 1024},
        "forced": None,
      },
    },
  ],
}


def test_page_is_whole_and_needs_no_network(codec):
  some = [
    runs.Run("sft", [{"step": s, "loss": 1 / s} for s in range(1, 30)]),
    runs.Run("rl", metrics(), {"seed": 7, "reward": {"alpha": 0.5}}),
    runs.Run("rl_alpha0", metrics()),
  ]
  some[1].trajectories = [
    play(codec, call(), "\\boxed{O}", name="a"),
    play(codec, "\\boxed{X}", name="a", correct=0.0),
  ]
  text = report.report(some, EVALUATION, load_media, codec=codec)
  page = Page(text)
  assert all(a.startswith(("data:", "#")) for a in page.addresses)
  assert not re.search(r"https?://|@import|url\(|fetch\(", text)
  said = "".join(page.text)
  for piece in ("54.1", "80.0", "60.0", "+20.0", "seed 7", "alpha = 0.5", "image/easy"):
    assert piece in said, piece
  figures = [a for tag, a in page.elements if tag == "figure" and "data-chart" in a]
  names = [
    [line["name"] for line in json.loads(f["data-chart"])["lines"]] for f in figures
  ]
  assert names.count(["rl", "rl_alpha0"]) == 5 and names.count(["sft"]) == 1
  stored = re.search(r'id="pictures">(.*?)</script>', text, re.S).group(1)
  store = json.loads(stored)
  wanted = {a["data-picture"] for t, a in page.elements if "data-picture" in a}
  assert wanted == set(store) and len(store) == 3  # the twin shares its question
  for uri in store.values():
    PIL.Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).load()
  assert page.count("article") == 2


def test_empty_page_says_so():
  page = Page(report.report([], None, load_media))
  assert "".join(page.text).count("here yet") == 3


@pytest.mark.parametrize(
  "evaluation", [{}, {"rows": None}, {"rows": [{}, 3, {"modes": {"free": {"n": "x"}}}]}]
)
def test_broken_evaluations_are_tolerated(evaluation):
  Page(report.report([], evaluation, load_media))


def test_page_stays_below_its_bytes(codec):
  many = [play(codec, call(), "\\boxed{O}", name=f"q{i}", step=i) for i in range(40)]
  for i, t in enumerate(many):
    t.task.media[0].path = "x" * i  # another picture each
  run = runs.Run("rl", metrics(), {}, many)
  text = report.report([run], None, load_media, codec=codec, most_bytes=400_000)
  assert 250_000 < len(text.encode()) <= 400_000
  assert 2 <= Page(text).count("article") < 40 and "of 40, taken evenly" in text


def test_spread_takes_whole_groups_evenly_over_runs_and_steps():
  def t(step, name):
    return Trajectory(Task(name, "", "", []), policy_step=step)

  a = runs.Run("a", trajectories=[t(s, n) for s in (1, 2) for n in "xxyyzz"])
  b = runs.Run("b", trajectories=[t(9, "w")])
  took = [(r.name, g[0].policy_step, len(g)) for r, g in report.spread([a, b])]
  assert took[:3] == [("a", 1, 2), ("a", 2, 2), ("b", 9, 1)]
  assert sum(n for *_, n in took) == 13
  # Every fourth question is a clip: of the first eight that are taken, about two.
  many = runs.Run("c", trajectories=[t(1, f"{i}") for i in range(96)])
  first = [int(g[0].task.id) for _, g in report.spread([many])][:8]
  assert 1 <= sum(i % 4 == 3 for i in first) <= 3 and max(first) > 60


# ---- Charts and table ----------------------------------------------------------------


def test_line_of_skips_gaps_and_the_last_of_a_repeated_step_holds():
  rows = [
    {"step": 1, "a": 1.0},
    {"step": 2, "a": math.nan},
    {"step": 3, "a": None},
    {"a": 5.0},
    {"step": 1, "a": 2},
    {"step": 4, "a": math.inf},
    {"step": 5, "a": 3.0},
  ]
  line = charts.line_of("x", rows, "a")
  assert (line.x, line.y) == ([1, 5], [2, 3])


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300))
def test_smoothing_stays_within_the_data(y):
  calm = charts.smooth(y)
  assert len(calm) == len(y)
  slack = 1e-9 * (1 + max(map(abs, y)))
  assert min(y) - slack <= min(calm) and max(calm) <= max(y) + slack


@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e9))
def test_ticks_cover_the_range_in_even_steps(low, span):
  found = charts.ticks(low, low + span)
  gaps = np.diff(found)
  assert found[0] <= low + 1e-6 * span and found[-1] >= low + span * (1 - 1e-6)
  assert 3 <= len(found) <= 12 and np.allclose(gaps, gaps[0], rtol=1e-6)


def test_curve_goes_through_its_points():
  line = charts.Line("x", [0, 10], [0.0, 1.0])
  drawn, frame = charts.panel([line], y_range=(0, 1))
  assert frame.at(0, 0) == (44, 160) and frame.at(10, 1) == (344, 10)
  assert 'd="M44.0 160.0L344.0 10.0"' in drawn


@given(
  st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=30), st.booleans()
)
def test_any_numbers_can_be_drawn(values, log):
  rows = [{"step": i, "v": v} for i, v in enumerate(values)]
  drawn = charts.chart("t", "v", [charts.line_of("x", rows, "v")], log=log)
  assert "nan" not in drawn.lower().replace("nance", "") and "inf" not in drawn
  if drawn:
    xml.etree.ElementTree.fromstring(drawn)


def test_trap_figure_is_an_svg_file_with_both_arms():
  svg = charts.trap_figure(
    {"with <curiosity>": [metrics()] * 2, "without": [metrics()]}
  )
  root = xml.etree.ElementTree.fromstring(svg)
  names = [e.text for e in root.iter() if e.tag.endswith("text")]
  assert "with <curiosity>" in names and "without" in names
  curves = [e for e in root.iter() if "curve" in (e.get("class") or "")]
  assert len(curves) == 8  # two panels, three runs, two arms in the legend


def test_intervals():
  r = table.rate({"a": 0.5, "n": 100}, "a", "ci", "n")
  assert (r.low, r.high) == pytest.approx((0.40383, 0.59617), abs=1e-5)
  # Newcombe 1998, Table II (a): 56/70 - 48/80, method 10.
  a = table.Rate(56 / 70, *table.wilson(56 / 70, 70))
  b = table.Rate(48 / 80, *table.wilson(48 / 80, 80))
  d = table.difference(a, b)
  assert (d.value, d.low, d.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=2e-4)


# ---- The tool ------------------------------------------------------------------------


def test_tool_reads_a_folder_of_runs(codec, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(
    view_tool.media.Library, "load", lambda self, media: load_media(media)
  )
  rl, evaluated = tmp_path / "rl", tmp_path / "eval"
  rl.mkdir()
  evaluated.mkdir()
  lines = "".join(json.dumps(m) + "\n" for m in metrics())
  (rl / "metrics.jsonl").write_text(lines + '{"step": 61, "lo\n{"step": 62')
  config = {"codec": {"profile": "clean", "budgets": codec.budgets, "video_frames": 8}}
  config |= {"reward": {"alpha": 0.5}}
  (rl / "config.json").write_text(json.dumps(config))
  codec.tokenizer.save(rl / "tokenizer")
  t = play(codec, call(), "\\boxed{O}")
  trajectories.write_jsonl(rl / "trajectories" / "step_000010.jsonl", [t])
  t.reward = {}
  trajectories.write_jsonl(evaluated / "trajectories" / "RL_free.jsonl", [t])
  (evaluated / "evaluation.json").write_text(json.dumps(EVALUATION))
  out = tmp_path / "page" / "report.html"
  monkeypatch.setattr(
    sys,
    "argv",
    ["view.py", str(tmp_path), f"--out={out}", f"--figure={tmp_path}/t.svg"],
  )
  view_tool.main()
  printed = capsys.readouterr()
  assert str(out) in printed.out and "metrics.jsonl:61" in printed.err
  page = Page(out.read_text())
  assert page.count("article") == 2 and page.count("article", "correct") == 2
  assert page.count("figure", "returned") == 2  # the codec was found
  said = "".join(page.text)
  assert "rl (alpha = 0.5)" in said and "80.0" in said and "RL, free" in said
  assert "rl (alpha = 0.5)" in (tmp_path / "t.svg").read_text()


# ---- In a browser --------------------------------------------------------------------


def test_the_file_in_a_browser(codec, tmp_path):
  """Filters, keys, the pointer on a chart, links; nothing asked of the net; open to all."""
  run = runs.Run("rl", metrics(), {"seed": 7, "reward": {"alpha": 0.5}})
  run.trajectories = [
    play(codec, call(), "\\boxed{O}", name="a"),
    play(codec, "\\boxed{X}", name="a", correct=0.0),
    play(codec, HOSTILE, name="b", correct=0.0),
    play(codec, call([3, 1]), "\\boxed{O}", name="c"),
  ]
  path = tmp_path / "report.html"
  path.write_text(report.report([run], EVALUATION, load_media, codec=codec))
  with apps.chromium() as browser:
    page, wrong = browser.new_page(), []
    page.on("pageerror", lambda e: wrong.append(str(e)))
    page.on("dialog", lambda d: (wrong.append(d.message), d.dismiss()))
    page.on("request", lambda r: wrong.append(r.url) if r.url[:4] == "http" else None)
    page.goto(path.as_uri())
    shown = page.locator(".list li:visible")
    opened = page.locator(".list [aria-current=true]")
    assert shown.count() == 4 and opened.count() == 1
    assert page.locator(".pane > div.open .picture img").first.evaluate(
      "i => i.naturalWidth"
    )
    first = opened.inner_text()
    page.keyboard.press("j")
    assert opened.inner_text() != first
    page.keyboard.press("w")
    assert shown.count() == 2
    page.keyboard.press("w")
    page.keyboard.press("/")
    page.keyboard.type("c")
    page.fill(".filters input", "nowhere")
    assert page.get_by_text("Nothing fits these filters").is_visible()
    page.fill(".filters input", "")
    page.keyboard.press("Escape")
    page.locator("h1").click()
    page.keyboard.press("o")
    assert shown.count() == 2
    page.keyboard.press("o")
    plot = page.locator(".chart > svg").first
    plot.scroll_into_view_if_needed()
    plot.hover()
    assert page.locator(".chart .hover").first.is_visible()
    assert "step" in page.locator(".chart .hover").first.inner_text()
    third = page.locator(".list a").nth(2)
    page.goto(f"{path.as_uri()}{third.get_attribute('href')}")
    page.reload()
    assert page.locator(".list a").nth(2).get_attribute("aria-current") == "true"
    for scheme in ("light", "dark"):
      page.emulate_media(color_scheme=scheme)
      assert apps.serious(page) == []
    assert not wrong
