"""The launchers: ./launch/local.sh --fast runs every stage and leaves every output."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


def launch(*arguments, **kwargs):
  return subprocess.run(
    [str(ROOT / "launch/local.sh"), *map(str, arguments)],
    capture_output=True, text=True, timeout=900, env=os.environ | kwargs,
  )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--full"]])
def test_fast_run_leaves_every_output_and_is_reused(options, tmp_path):
  first = launch("--fast", *options, tmp_path)
  assert first.returncode == 0, first.stdout + first.stderr
  assert (tmp_path / "base").exists() == bool(options)  # the shipped one has no stage
  for name in (*["base"] * bool(options), "sft", "rl", "rl_alpha0"):
    rows = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(r)["step"] for r in rows] == [1, 2]
    assert (tmp_path / name / "checkpoints").is_dir()
  evaluation = json.loads((tmp_path / "eval" / "evaluation.json").read_text())
  assert [r["name"] for r in evaluation["rows"]] == ["BASE", "SFT", "RL", "RL alpha=0"]
  html = (tmp_path / "report.html").read_text()
  assert "RL alpha=0" in html and not re.search(r"(src|href)=.https?://", html)
  outputs = [tmp_path / "rl/metrics.jsonl", tmp_path / "eval/evaluation.json"]
  before = [file.read_bytes() for file in outputs]
  several = [] if options else ["--processes", "2"]  # another number of processes
  again = launch("--fast", "--trap", *several, *options, tmp_path)
  assert again.returncode == 0, again.stdout + again.stderr
  assert "<svg" in (tmp_path / "trap.svg").read_text()
  assert [file.read_bytes() for file in outputs] == before


@pytest.mark.slow
def test_sigterm_saves_and_ends_the_whole_path(tmp_path):
  process = subprocess.Popen(
    [str(ROOT / "launch/local.sh"), str(tmp_path)],
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
  )  # fmt: skip
  metrics = tmp_path / "sft" / "metrics.jsonl"
  while not (metrics.exists() and metrics.read_bytes()):
    assert process.poll() is None, process.communicate()[0]
    time.sleep(0.1)
  process.send_signal(signal.SIGTERM)
  out, _ = process.communicate(timeout=600)
  assert process.returncode == 0 and "the same command goes on" in out, out
  done = len(metrics.read_text().splitlines())
  assert (tmp_path / "sft" / "checkpoints" / str(done)).is_dir() and done < 70
  assert not (tmp_path / "rl").exists()


@pytest.mark.parametrize(
  "arguments, told",
  [
    (["--fats"], "--fast"),
    (["--processes", "3"], "1, 2 or 4"),
    (["--processes"], "1,"),
  ],
)
def test_an_unknown_option_is_told(arguments, told):
  process = launch(*arguments)
  assert process.returncode == 2 and told in process.stderr


ARM = """import signal, sys, time
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
print("runs", flush=True)
while not told:
  time.sleep(0.05)
print("saved", flush=True)
"""


def side_by_side(tmp_path, *arms):
  """Two programs under the functions of local.sh that run arms of RL."""
  lines = (ROOT / "launch/local.sh").read_text()
  functions = lines[lines.index("set -m\n") : lines.index("train() {")]
  (tmp_path / "arm.py").write_text(ARM)
  script = f"""set -euo pipefail
workdir={tmp_path}
{functions}
good() {{ exec {sys.executable} {tmp_path}/arm.py; }}
bad() {{ exec {sys.executable} -c 'import sys; sys.exit("boom")'; }}
beside arms {" ".join(arms)}
echo all of it"""
  return subprocess.Popen(
    ["bash", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  )


@pytest.mark.parametrize("arms", [("good", "bad"), ("bad", "good")])
def test_when_an_arm_fails_the_other_is_told_to_leave(arms, tmp_path):
  process = side_by_side(tmp_path, *arms)
  out, _ = process.communicate(timeout=300)
  assert process.returncode == 1 and "bad: boom" in out
  assert "all of it" not in out
  # One that was told before it listened has nothing to save.
  assert out.count("good: runs") == out.count("good: saved")


def test_sigterm_is_told_to_both_arms(tmp_path):
  process = side_by_side(tmp_path, "good", "good")
  said = ""
  while said.count("runs") < 2:
    said += process.stdout.readline()
  process.send_signal(signal.SIGTERM)
  out, _ = process.communicate(timeout=300)
  assert process.returncode == 0 and "the same command goes on" in out
  assert out.count("good: saved") == 2 and "all of it" not in out
