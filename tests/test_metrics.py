"""The log of a run: what is written, what a restart cuts off, what MFU is of."""

import json
import math
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorboardX
from PIL import Image

from pixel_jax.run import metrics, settings


def lines(root):
  return [json.loads(x) for x in (root / "metrics.jsonl").read_text().splitlines()]


def tensorboard(root):
  """(step, tag, value) of every scalar in tensorboard/."""
  found = []
  for path in sorted((root / "tensorboard").glob("*tfevents*")):
    for _, event in metrics.read_events(path.read_bytes()):
      found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
  return found


def run(root, first, last, **kwargs):
  writer = metrics.Writer(root, first_step=first, total_steps=10, **kwargs)
  for step in range(first + 1, last + 1):
    with writer.timer("update"):
      pass
    writer.write(step, {"loss": jnp.float32(step / 2), "reward/mean": 0.5}, tokens=100)
  writer.close()


def without_perf(row):
  return {k: v for k, v in row.items() if not k.startswith("perf/")}


def test_a_step_is_one_object_and_the_clock_is_under_perf(tmp_path):
  run(tmp_path, 0, 3)
  rows = lines(tmp_path)
  assert [without_perf(r) for r in rows] == [
    {"step": s, "loss": s / 2, "reward/mean": 0.5} for s in (1, 2, 3)
  ]
  for row in rows:
    assert {
      "perf/update_s",
      "perf/step_s",
      "perf/tokens_per_s",
      "perf/compiles",
      "perf/compile_s",
    } <= set(row)
    assert "perf/mfu" not in row  # a CPU has no known peak
  assert (2, "loss", 1.0) in tensorboard(tmp_path)


def test_timers_add_up_and_start_anew(tmp_path, monkeypatch):
  clock = iter(range(100))
  monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
  writer = metrics.Writer(tmp_path)
  for _ in range(2):
    with writer.timer("rollout"):
      pass
  with pytest.raises(KeyError), writer.timer("reward"):
    raise KeyError  # a failed block has taken its time, too
  writer.write(1, {})
  writer.write(2, {})
  first, second = lines(tmp_path)
  assert first["perf/rollout_s"] == 2 and first["perf/reward_s"] == 1
  assert "perf/rollout_s" not in second


def test_nan_is_null(tmp_path):
  writer = metrics.Writer(tmp_path)
  writer.write(1, {"loss": float("nan"), "reward/mean": np.inf, "n": np.int64(3)})
  writer.close()
  assert without_perf(lines(tmp_path)[0]) == {
    "step": 1,
    "loss": None,
    "reward/mean": None,
    "n": 3.0,
  }


def test_going_on_from_a_step_equals_never_having_stopped(tmp_path):
  run(tmp_path / "straight", 0, 6)
  run(tmp_path / "killed", 0, 5)
  with (tmp_path / "killed" / "metrics.jsonl").open("a") as f:
    f.write('{"step": 6, "lo')  # killed in the middle of a line
  run(tmp_path / "killed", 3, 6)
  straight, killed = (
    [without_perf(r) for r in lines(tmp_path / d)] for d in ("straight", "killed")
  )
  assert straight == killed
  steps = [s for s, tag, _ in tensorboard(tmp_path / "killed") if tag == "loss"]
  assert sorted(steps) == [1, 2, 3, 4, 5, 6]


def test_cut_back_of_trajectories(tmp_path):
  folder = tmp_path / "trajectories"
  (folder / "eval").mkdir(parents=True)
  names = [
    "step_000003.jsonl",
    "step_000004.jsonl",
    "eval/step_000009.jsonl",
    "notes.md",
  ]
  for name in [*names, "step_000001.jsonl.partial"]:
    (folder / name).write_text("x")
  metrics.cut_back(tmp_path, 3)
  left = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
  assert left == ["notes.md", "step_000003.jsonl"]


def test_cut_back_to_nothing_and_of_nothing(tmp_path):
  metrics.cut_back(tmp_path, 0)
  run(tmp_path, 0, 2)
  metrics.cut_back(tmp_path, 0)
  assert lines(tmp_path) == [] and tensorboard(tmp_path) == []


def test_a_tensorboard_file_cut_short_is_read_to_its_last_whole_record(tmp_path):
  run(tmp_path, 0, 3)
  (path,) = (tmp_path / "tensorboard").glob("*tfevents*")
  path.write_bytes(path.read_bytes()[:-5])
  before = tensorboard(tmp_path)
  metrics.cut_back(tmp_path, 2)
  assert tensorboard(tmp_path) == [e for e in before if e[0] <= 2]
  assert tensorboardX.__version__  # its checksums are copied, not recomputed


def test_compiles_are_counted():
  before = metrics.count_compiles()
  f = jax.jit(lambda x: jnp.cos(x) * 3.25 + 1.125)
  f(np.ones(11, np.float32)), f(np.ones(11, np.float32))
  assert metrics.count_compiles() == before + 1


def test_log_lines_where_there_is_no_terminal(tmp_path, capsys):
  run(tmp_path, 0, 10)
  shown = capsys.readouterr().err.strip().splitlines()
  assert len(shown) == 2  # the first step, then ten seconds of silence, then the last
  # A run of RL shows what it earns, another one its loss.
  assert shown[0].startswith("step 1/10, ") and "reward 0.5" in shown[0]
  assert "loss" not in shown[0]
  writer = metrics.Writer(tmp_path / "sft", total_steps=1)
  writer.write(1, {"loss": 0.5})
  writer.close()
  assert "loss 0.5" in capsys.readouterr().err


PICTURE = Image.new("RGB", (40, 30), (200, 40, 40))


@pytest.mark.parametrize("name, key", [("wandb", "project"), ("mlflow", "uri")])
def test_a_missing_tracker_says_what_to_install(name, key, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, name, None)
  with pytest.raises(settings.ConfigError, match=rf"pip install 'pixel_jax\[{name}\]'"):
    metrics.Writer(tmp_path, **{name: {key: "x"}})


def test_mlflow_goes_on_with_the_same_run(tmp_path, monkeypatch):
  """The real package, on a folder of its own."""
  mlflow = pytest.importorskip("mlflow")
  monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # else it wants a server
  told = {"uri": f"file://{tmp_path}/runs", "experiment": "pixels", "name": ""}
  config = {"optim": {"lr": 0.1}, "codec": {"budgets": list(range(3000))}}
  workdir = tmp_path / "run"
  for first in (0, 2):
    writer = metrics.Writer(workdir, first_step=first, mlflow=told, config=config)
    writer.write(first + 1, {"loss": 0.5 + first, "reward/mean": math.nan})
    writer.show(first + 1, lambda: {"looked": PICTURE})
    writer.close()
  client = mlflow.MlflowClient(told["uri"])
  run = client.get_run((workdir / "mlflow_id").read_text().strip())
  assert run.info.run_name == "run" and run.data.params["optim.lr"] == "0.1"
  history = client.get_metric_history(run.info.run_id, "loss")
  assert [(m.step, m.value) for m in history] == [(1, 0.5), (3, 2.5)]


def test_tensorboard_holds_pictures_and_the_config(tmp_path):
  config = {"optim": {"lr": 0.1}, "freeze": ["vision"]}
  writer = metrics.Writer(tmp_path, config=config)
  writer.write(1, {"loss": 0.5})
  writer.show(1, lambda: {"looked": PICTURE})
  writer.write(2, {"loss": 0.4})
  writer.show(2, lambda: {"looked": PICTURE})
  writer.close()

  def seen():
    events = [
      event
      for path in (tmp_path / "tensorboard").rglob("*tfevents*")
      for _, event in metrics.read_events(path.read_bytes())
    ]
    values = [(e.step, v) for e in events for v in e.summary.value]
    pictures = [s for s, v in values if v.tag.startswith("trajectories/looked")]
    return pictures, [v.tag for _, v in values if "hparams" in v.tag]

  pictures, told = seen()
  assert pictures == [1, 2] and "_hparams_/session_start_info" in told
  metrics.cut_back(tmp_path, 1)  # a resumed run
  pictures, told = seen()
  assert pictures == [1] and "_hparams_/session_start_info" in told


def test_wandb_goes_on_with_the_same_run(tmp_path):
  """The real package, offline: two starts of a workdir are one run of W&B."""
  pytest.importorskip("wandb")
  told = {"project": "pixels", "entity": "", "name": "", "mode": "offline"}
  ids = []
  for first in (0, 2):
    writer = metrics.Writer(
      tmp_path, first_step=first, wandb=told, config={"optim": {"lr": 0.1}}
    )
    writer.write(first + 1, {"loss": 0.5})
    run = writer._trackers[1].run
    writer.show(first + 1, lambda: {"looked": PICTURE})
    ids.append(run.id)
    assert (run.project, run.name) == ("pixels", tmp_path.name)
    assert run.config["optim"] == {"lr": 0.1}
    writer.close()
  assert ids[0] == ids[1] == (tmp_path / "wandb_id").read_text().strip()
  logs = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
  # W&B's own process writes; on a busy machine `finish` returns before it has.
  deadline = time.monotonic() + 60
  while not all(b"loss" in file.read_bytes() for file in logs):
    assert time.monotonic() < deadline
    time.sleep(0.1)
  assert len(logs) == 2
  assert list((tmp_path / "wandb").rglob("media/images/trajectories/*.png"))
  metrics.Writer(tmp_path, first_step=3, wandb=told | {"project": ""}).close()
  assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2


# ---- MFU -----------------------------------------------------------------------------


@pytest.mark.parametrize(
  "kind, peak",
  [
    ("TPU v5 lite", 197e12),
    ("TPU v5p", 459e12),
    ("NVIDIA H200 NVL", 989e12),
    ("cpu", None),
  ],
)
def test_peaks(monkeypatch, kind, peak):
  device = types.SimpleNamespace(device_kind=kind)
  monkeypatch.setattr(jax, "local_devices", lambda: [device])
  assert metrics.peak_flops() == peak


def test_mfu_is_of_the_update_and_part_by_part(tmp_path, monkeypatch):
  clock = iter(range(0, 100, 2))
  monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
  monkeypatch.setattr(metrics, "peak_flops", lambda: 1e12)
  writer = metrics.Writer(tmp_path)  # reads 0
  with writer.timer("update"):  # 2 and 4
    pass
  flops = {"text": 6e12, "vision": 2e12}
  writer.write(1, {}, tokens=30, image_tokens=12, flops=flops)  # 6
  writer.write(2, {}, flops=flops)  # no update, no rate
  writer.close()
  row, idle = lines(tmp_path)
  limit = 8 * 1e12 * 2  # eight devices, two seconds
  assert row["perf/mfu"] == pytest.approx(8e12 / limit)
  assert row["perf/mfu_text"] == pytest.approx(6e12 / limit)
  assert row["perf/mfu_vision"] == pytest.approx(2e12 / limit)
  assert row["perf/tokens_per_s"] == 5 and row["perf/image_tokens_per_s"] == 2
  assert not any(k.startswith("perf/mfu") for k in idle)
