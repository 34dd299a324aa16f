"""The page of runs that go on: the index, what the app says, and the page in a browser."""

import dataclasses
import json
import os
import re

import apps
import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixel_jax import hosting
from pixel_jax import trajectory as trajectories
from pixel_jax.data import world
from pixel_jax.run import policies
from pixel_jax.trajectory import Media, OpCall, Task, Trajectory
from pixel_jax.view import curves, live, runs
from pixel_jax.view.index import File, Index, Stored, Wish, without_numbers
from pixel_jax.view.trajectory import Scored

EVIL = '"ids": [1], "slots": [ </script><img src=x onerror=alert(1)>'
BOX = {"bbox_2d": [0.1, 0.1, 0.4, 0.4], "target_image": 1}


def made(
  step, task, sample=0, *, correct=1.0, ops=1, errors=0, said="O", stop="answer"
):
  """A trajectory as training writes it."""
  crop, n = "crop_image_normalized", 40
  calls = [OpCall(crop, BOX)] * ops + [OpCall(crop, {}, "bad_box")] * errors
  turns = [{"role": "user", "text": f"Which {task}?"}]
  turns += [{"role": "assistant", "text": f"\\boxed{{{said}}}"}]
  return Trajectory(
    Task(task, f"Which {task}?", "O", [Media("image", "world:0/test/1")]),
    sample=sample, policy_step=step, ids=[7] * n, sampled=[True] * n, weight=[1.0] * n,
    logp=[-0.5] * n, position=[(i, i, i) for i in range(n)], calls=calls, turns=turns,
    stop=stop, reward={"correct": correct, "total": correct}, advantage=correct - 0.5,
  )  # fmt: skip


def write(folder, name, played):
  trajectories.write_jsonl(folder / "trajectories" / name, played)


GROUP = [made(10, "data/a", i, correct=i < 2, ops=i in (0, 3)) for i in range(4)]


@pytest.fixture
def folder(tmp_path):
  """A run of two steps and an evaluation."""
  rl, evaluated = tmp_path / "rl", tmp_path / "eval"
  write(rl, "step_000010.jsonl", [*GROUP, made(10, "data/b", errors=2, stop="turns")])
  write(rl, "step_000020.jsonl", [made(20, "data/a", said=EVIL), made(20, "other/c")])
  (rl / "config.json").write_text(json.dumps({"seed": 0, "total_steps": 40}))
  measured(rl, range(1, 21))
  free = made(-1, "q", correct=1.0)
  blind = made(-1, "q", correct=0.0, ops=0, said="X")
  for t in (free, blind):
    t.reward = {}  # an evaluation keeps no judgement
  write(evaluated, "SFT_free.jsonl", [free])
  write(evaluated, "SFT_forbidden.jsonl", [blind])
  return tmp_path


def measured(folder, steps, **more):
  with (folder / "metrics.jsonl").open("a") as f:
    for s in steps:
      row = {"step": s, "ops/rapr": s / 40, "reward/correct": 0.5, "perf/step_s": 2.0}
      f.write(
        json.dumps(row | {"perf/update_s": 1.0, "perf/rollout_s": 0.5} | more) + "\n"
      )


def judge(t):
  return float("\\boxed{O}" in t.turns[-1]["text"])


def opened(folder, path=None):
  found = runs.open_runs(runs.find([folder]))
  index = Index(path, judge=judge)
  index.update(runs.files(found))
  return found, index


# ---- The index -----------------------------------------------------------------------


@given(st.text(), st.text(), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_cutting_the_numbers_out_loses_nothing_else(question, said, n):
  t = made(3, "a", said=said)
  t.task.question = question + '", "ids": ['
  t.task.reference = {'"policy_step": 3, "ids": [': said, "ids": [1], "slots": [n]}
  t.ids = list(range(n))
  cut = without_numbers(trajectories.to_json(t).encode())
  assert not (cut.ids or cut.sampled or cut.weight or cut.logp or cut.position)
  emptied = dict(ids=[], sampled=[], weight=[], logp=[], position=[])
  assert cut == dataclasses.replace(t, **emptied)


def test_filters_find_what_they_say(folder):
  _, index = opened(folder)

  def found(**wish):
    rows, total = index.search(Wish(**wish))
    assert len(rows) == total
    return [(r.run, r.step, r.task, r.sample) for r in rows]

  assert len(found()) == 9
  a = [("rl", 10, "data/a", i) for i in range(4)]
  assert found(verdict="wrong", run="rl") == [a[2], a[3]]
  assert found(run="rl", step="10", ops=True) == [a[0], a[3], ("rl", 10, "data/b", 0)]
  assert found(errors=True) == found(stop="turns") == [("rl", 10, "data/b", 0)]
  # Those that did not look are right in half of the cases: it neither helps nor harms.
  assert found(help="harmed") == []
  assert found(help="helped") == [("SFT, free", -1, "q", 0)]
  assert found(dataset="other") == [("rl", 20, "other/c", 0)]
  assert found(text="WHICH onerror=") == [("rl", 20, "data/a", 0)]  # words, any case
  assert found(text="% _ '") == []
  assert [x[1] for x in found(run="rl")] == [20, 20, 10, 10, 10, 10, 10]
  assert found(run="rl", sort="worst")[:2] == [a[2], a[3]]
  assert found(run="rl", sort="oldest")[0] == a[0]
  assert index.choices()["dataset"] == ["", "data", "other"]
  rows, total = index.search(Wish(run="rl"), limit=2, offset=4)
  assert total == 7 and [r.sample for r in rows] == [2, 3]


def test_who_looked_is_set_against_the_rest_of_the_group(tmp_path):
  group = [made(1, "a", 0, correct=1.0), made(1, "a", 1, correct=0.0, ops=0)]
  group += [made(1, "b", 0, correct=0.0), made(1, "b", 1, correct=1.0, ops=0)]
  group += [made(2, "b", 0, correct=1.0)]  # of another step: nobody to compare with
  write(tmp_path, "step_000001.jsonl", group)
  _, index = opened(tmp_path)
  rows, _ = index.search(Wish(sort="oldest"))
  assert [r.help for r in rows] == ["helped", "", "harmed", "", ""]


def test_read_gives_the_whole_and_the_same_question_elsewhere(folder):
  _, index = opened(folder)
  rows, _ = index.search(Wish(run="rl", sort="oldest"))
  assert index.read(rows[1].number) == GROUP[1]
  group, others = index.same_question(rows[1])
  assert [r.sample for r in group] == [0, 1, 2, 3] and [r.step for r in others] == [20]
  stored = Stored(index, "rl")
  assert (
    len(stored) == 7 and stored[0] == GROUP[0] and stored.heads[0] == (10, "data/a")
  )
  (found,), _ = index.search(Wish(run="SFT, forbidden"))
  assert found.verdict == "wrong" and index.read(found.number).reward["correct"] == 0.0


def test_only_what_is_new_is_read_and_what_is_gone_is_forgotten(folder, monkeypatch):
  path = folder / "kept" / "index.sqlite"
  found, index = opened(folder, path)
  before = index.search()[0]
  index.close()
  found, index = opened(folder, path)
  assert index.version == 0 and index.search()[0] == before  # nothing was read again
  write(folder / "rl", "step_000030.jsonl", [made(30, "d")])
  changed = folder / "rl" / "trajectories" / "step_000020.jsonl"
  trajectories.write_jsonl(changed, [made(20, "e")])
  os.remove(folder / "rl" / "trajectories" / "step_000010.jsonl")
  assert index.update(runs.files(found)) == 2
  assert [r.task for r in index.search(Wish(run="rl"))[0]] == ["d", "e"]
  with pytest.raises(KeyError):
    index.read(before[0].number)


def test_a_broken_line_is_told_and_the_others_are_there(tmp_path):
  write(tmp_path, "step_000001.jsonl", [made(1, "a")])
  with (tmp_path / "trajectories" / "step_000001.jsonl").open("a") as f:
    f.write('{"task": {"id"\n[]\n' + trajectories.to_json(made(1, "b")) + "\n")
  told, index = [], Index()
  index.update(
    [File("x", tmp_path / "trajectories" / "step_000001.jsonl")], warn=told.append
  )
  assert [r.task for r in index.search()[0]] == ["a", "b"]
  assert [re.search(r":(\d+) is left out", t)[1] for t in told] == ["2", "3"]


# ---- Runs ----------------------------------------------------------------------------


def test_metrics_are_read_on_and_again_after_a_cut(folder):
  (run,) = (r for r in runs.open_runs(runs.find([folder])) if r.name == "rl")
  assert len(run.metrics) == 20 and not run.update()
  measured(run.folder, [21, 22])
  with (run.folder / "metrics.jsonl").open("a") as f:
    f.write('{"step": 23')  # being written
  assert run.update() and run.metrics[-1]["step"] == 22
  lines = (run.folder / "metrics.jsonl").read_text().splitlines(keepends=True)
  (run.folder / "metrics.jsonl").write_text("".join(lines[:5]))  # a resumed run
  assert run.update() and [m["step"] for m in run.metrics] == [1, 2, 3, 4, 5]


def test_progress(folder):
  (run,) = (r for r in runs.open_runs(runs.find([folder])) if r.name == "rl")
  p = runs.progress(run)
  assert (p.step, p.total, p.seconds, p.left, p.state) == (20, 40, 2.0, 40.0, "running")
  assert p.goodput == pytest.approx(0.75)
  assert runs.progress(run, now=2e9 + 1e9).state == "quiet"
  measured(run.folder, range(21, 41))
  run.update()
  assert runs.progress(run).state == "done" and runs.progress(run).left == 0
  assert runs.progress(runs.Run("x")) is None


def test_seeds_are_one_arm_with_a_band(tmp_path):
  for seed in (0, 1):
    for alpha in (0.0, 0.5):
      workdir = tmp_path / f"seed_{seed}" / f"rl_{alpha}"
      workdir.mkdir(parents=True)
      config = {"seed": seed, "init": f"{seed}", "reward": {"alpha": alpha}}
      (workdir / "config.json").write_text(json.dumps(config))
      measured(workdir, range(1, 30), **{"reward/correct": 0.2 + 0.6 * seed})
  found = runs.open_runs(runs.find([tmp_path / "seed_0", tmp_path / "seed_1"]))
  assert len({run.name for run in found}) == 4
  arms = runs.arms(found)
  assert [(name, len(alike)) for name, alike in arms] == [
    ("rl_0.0 (alpha = 0), 2 seeds", 2), ("rl_0.5 (alpha = 0.5), 2 seeds", 2),
  ]  # fmt: skip
  drawn = curves.draw(found)
  assert drawn.count('class="band') == 2 * drawn.count("<figure")
  assert '"y": [0.5, 0.5' in drawn.replace("&quot;", '"')  # the mean
  differing = curves.configs(found)
  assert '<td class="name">reward.alpha</td><td>0.0</td><td>0.5</td>' in differing
  assert '<td class="name">seed' not in differing


# ---- The app -------------------------------------------------------------------------


def scored(run, t):
  if run != "rl":
    raise ValueError("an <evaluation> has no checkpoints")
  return Scored("checkpoint 5", [-1.0] * len(t.ids), [0.25] * len(t.ids))


@pytest.fixture
def address(folder, monkeypatch):
  monkeypatch.setattr(live, "EVERY", 0.0)
  found, index = opened(folder)
  codec = policies.open_codec("tiny_base")
  app = live.Live(found, index, world.load_media, codec, score=scored)
  with hosting.listening(app.app) as address:
    yield address


def test_the_app_says_what_is_new(address, folder):
  state = httpx.get(address + "/state").json()
  (rl,) = (run for run in state["runs"] if run["name"] == "rl")
  assert rl["step"] == 20 and rl["total"] == 40 and rl["latest"]["RaPR"] == 0.5
  measured(folder / "rl", [21])
  write(folder / "rl", "step_000030.jsonl", [made(30, "fresh")])
  later = httpx.get(address + "/state").json()
  assert later["curves"] > state["curves"]
  assert (
    later["trajectories"] > state["trajectories"] and 30 in later["choices"]["step"]
  )
  page = httpx.get(address + "/list", params={"text": "which fresh"}).json()
  assert page["total"] == 1 and page["rows"][0]["task"] == "fresh"
  odd = {"offset": "-1", "step": "x'", "sort": "; DROP", "nothing": "1", "ops": "yes"}
  assert httpx.get(address + "/list", params=odd).json()["total"] == 10
  assert httpx.get(address, headers={"Host": "evil.example"}).status_code == 400
  assert "<svg" in httpx.get(address + "/curves").text


def test_a_trajectory_and_its_pictures(address):
  rows = httpx.get(address + "/list", params={"run": "rl", "step": "10"}).json()["rows"]
  html = httpx.get(f"{address}/trajectory/{rows[0]['number']}").text
  assert html.count("the group:") == 1 and html.count("in other runs (1)") == 1
  keys = re.findall(r'data-picture="(\w+)"', html)
  assert keys
  picture = httpx.get(f"{address}/picture/{rows[0]['number']}/{keys[0]}")
  assert picture.headers["content-type"] in ("image/jpeg", "image/png")
  assert len(picture.content) > 500
  assert httpx.get(f"{address}/picture/{rows[0]['number']}/none").status_code == 404
  assert httpx.get(f"{address}/trajectory/999").status_code == 404


def test_every_token_by_sampler_and_trainer(address):
  def tokens(**wish):
    rows = httpx.get(address + "/list", params=wish).json()["rows"]
    return httpx.get(f"{address}/tokens/{rows[0]['number']}").text

  told = tokens(run="rl", step="20")
  assert told.count("<tr") == 41 and "The trainer is checkpoint 5." in told
  assert "<td>60.65%</td><td>36.79%</td><td>-0.5</td><td>0.250</td>" in told
  assert "advantage +0.50" in told
  failed = tokens(run="SFT, free")
  assert "an &lt;evaluation&gt; has no checkpoints" in failed
  assert failed.count("<tr") == 41 and "60.65%" in failed and "trainer −" not in failed


def listed(page, count):
  apps.until(page, lambda: page.locator("#list a").count() == count)


def test_the_page_in_a_browser(address, folder):
  with apps.chromium() as browser:
    page, errors = browser.new_page(), []
    page.on("pageerror", lambda e: errors.append(str(e)))
    page.on("dialog", lambda d: (errors.append(d.message), d.dismiss()))
    page.goto(address)
    links = page.locator("#list a")
    listed(page, 9)
    assert "20 of 40" in page.inner_text("#runs")
    # ---- filters, search, keys ----
    page.get_by_role("button", name="wrong").click()
    listed(page, 3)
    page.keyboard.press("w")
    page.keyboard.press("/")
    page.keyboard.type("other/c")
    listed(page, 1)
    page.fill("#filters input", "")
    listed(page, 9)
    page.keyboard.press("Escape")
    page.locator("h1").click()
    page.select_option('[data-key="step"]', "10")
    listed(page, 5)
    page.locator("h1").click()
    first = page.locator("#list [aria-current=true]").inner_text()
    page.keyboard.press("p")
    page.keyboard.press("j")
    apps.until(page, lambda: page.locator(".pane article").count() == 2)
    assert page.locator("#list [aria-current=true]").inner_text() != first
    image = page.locator("#pane .picture img").first
    image.wait_for()
    apps.until(page, lambda: image.evaluate("i => i.naturalWidth") == 252)
    page.locator(".pane .more summary").first.click()
    page.locator("#pane .tokens-of summary").click()
    page.locator("#pane .one-by-one").wait_for()
    assert apps.serious(page) == []
    # ---- the address holds what is looked at ----
    again = browser.new_page()
    again.goto(page.url)
    listed(again, 5)
    again.close()
    # ---- it grows ----
    page.select_option('[data-key="step"]', "")
    measured(folder / "rl", range(21, 31))
    write(folder / "rl", "step_000030.jsonl", [made(30, "new")])
    listed(page, 10)
    apps.until(page, lambda: "30 of 40" in page.inner_text("#runs"))
    assert "new" in links.first.inner_text()
    page.emulate_media(color_scheme="dark")
    assert apps.serious(page) == []
    assert not errors
