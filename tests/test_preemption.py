"""SIGTERM and Ctrl-C ask; a second Ctrl-C leaves at once."""

import signal
import subprocess
import sys

import pytest

CHILD = """import pathlib, sys, time
from pixel_jax.run import lock, preemption
lock.take(pathlib.Path(sys.argv[1]))
notice = preemption.Notice()
print("runs", flush=True)
while not notice.given():
  time.sleep(0.01)
print("asked", flush=True)
if sys.argv[2] == "hangs":
  time.sleep(600)
notice.close()
print("saved", notice.agreed())
"""


def start(folder, how):
  process = subprocess.Popen(
    [sys.executable, "-c", CHILD, folder, how],
    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip
  assert process.stdout.readline() == "runs\n"
  return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_request(number, tmp_path):
  process = start(tmp_path, "ends")
  process.send_signal(number)
  said, told = process.communicate(timeout=600)
  assert process.returncode == 0 and said.endswith("saved True\n")
  assert ("Ctrl-C again" in told) == (number == signal.SIGINT)
  assert "Traceback" not in told


def test_a_second_one_leaves_at_once(tmp_path):
  process = start(tmp_path, "hangs")
  process.send_signal(signal.SIGINT)
  assert process.stdout.readline() == "asked\n"
  process.send_signal(signal.SIGINT)
  _, told = process.communicate(timeout=600)
  assert process.returncode == 130 and "Traceback" not in told
  assert not (tmp_path / "lock.json").exists()
