"""Runs side by side: what each framework writes is read, matched and told."""

import json

import pytest
from tensorboardX import SummaryWriter

from pixel_jax.tools import compare_runs as compare


def jsonl(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(r) + "\n" for r in rows))
  return path


@pytest.fixture
def ours(tmp_path):
  rows = [
    {"step": s, "loss": 1 / s, "reward/mean": s / 10, "perf/x": 1.0}
    for s in range(1, 11)
  ]
  jsonl(tmp_path / "ours" / "metrics.jsonl", rows)
  return tmp_path / "ours"


def trl(folder):
  rows = [
    {"step": s, "loss": 1 / s + 0.01, "reward": s / 10, "epoch": 0.1}
    for s in range(1, 11)
  ]
  file = folder / "trainer_state.json"
  file.write_text(json.dumps({"log_history": rows}))
  return file


def verl(folder):
  return jsonl(folder / "verl.jsonl", [
    {"step": s, "data": {"actor/pg_loss": 1 / s + 0.01, "critic/rewards/mean": s / 10,
                         "val-core/vstar/acc/mean@1": 0.5}}
    for s in range(1, 11)
  ])  # fmt: skip


def openrlhf(folder):
  writer = SummaryWriter(str(folder / "tb"))
  for s in range(1, 11):
    writer.add_scalar("train/policy_loss", 1 / s + 0.01, s)
    writer.add_scalar("train/reward", s / 10, s)
  writer.close()
  return folder / "tb"


@pytest.mark.parametrize("write", [trl, verl, openrlhf])
def test_curves_of_each_framework(write, ours, tmp_path):
  a, b = compare.read(ours), compare.read(write(tmp_path))
  rows = {r["metric"]: r for r in compare.curves(a, b)}
  assert {"loss", "reward/mean"} <= rows.keys()
  assert rows["loss"]["steps"] == 10
  assert rows["loss"]["largest_gap"] == pytest.approx(0.01, rel=1e-4)
  assert rows["reward/mean"]["largest_gap"] == pytest.approx(0, abs=1e-6)
  if write is verl:
    assert b.metrics[0]["eval/accuracy"] == 0.5


def predictions(right):
  return [
    {"id": f"q{i}", "question": "?", "gold": "A", "answer": "A" if r else "<b>",
     "scores": {"letter": float(r)}, "cluster": f"q{i}"}
    for i, r in enumerate(right)
  ]  # fmt: skip


def test_answers_of_ours_and_of_others(tmp_path, capsys):
  for name, right in (("a", [1, 1, 0, 1, 1, 1]), ("b", [1, 0, 0, 0, 1, 0])):
    jsonl(
      tmp_path / name / "predictions" / "m_vstar_pixel_free.jsonl", predictions(right)
    )
  theirs = jsonl(tmp_path / "samples_vstar.jsonl", [
    {"doc_id": f"q{i}", "doc": {}, "target": "A", "filtered_resps": ["A"], "acc": 1.0}
    for i in range(6)
  ])  # fmt: skip
  compare.main(
    [str(tmp_path / "a"), str(tmp_path / "b"), f"--out={tmp_path / 'c.html'}"]
  )
  out = capsys.readouterr().out
  assert "6 questions, difference +0.500" in out and "right alone 0.500 / 0.000" in out
  page = (tmp_path / "c.html").read_text()
  assert (
    "&lt;b&gt;" in page
    and '<b>"' not in page
    and "3 of them right in one alone" in page
  )
  assert "http" not in page.replace("http://www.w3.org", "")
  compare.main(
    [str(tmp_path / "a"), f"--torch={theirs}", f"--out={tmp_path / 'd.html'}"]
  )
  assert "difference -0.167" in capsys.readouterr().out


def test_runs_that_were_asked_differently_are_not_comparable(tmp_path):
  for name in "ab":
    jsonl(
      tmp_path / name / "predictions" / "m_vstar_pixel_free.jsonl", predictions([1, 0])
    )
    modes = {"free": {"hash": name}}
    row = {"name": "m", "benchmark": "vstar", "protocol": "pixel", "modes": modes}
    (tmp_path / name / "evaluation.json").write_text(json.dumps({"rows": [row]}))
  a, b = (compare.read(tmp_path / n) for n in "ab")
  assert "NOT COMPARABLE" in compare.table(a, b, [], compare.items(a, b))
  assert "NOT COMPARABLE" not in compare.table(a, a, [], compare.items(a, a))


@pytest.mark.parametrize("args", [["nowhere", "x"], ["a"], ["a", "b", "c"]])
def test_mistakes_end_with_2(args, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(SystemExit, match="2"):
    compare.main(args)
  assert "error: " in capsys.readouterr().err


def test_a_log_without_anything_is_refused(tmp_path):
  with pytest.raises(ValueError, match="neither curves nor answers"):
    compare.read(jsonl(tmp_path / "x.jsonl", [{"hello": 1}]))
