"""A workdir has one run at a time, and a dead one does not block it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from etils import epath

from pixel_jax.run import lock

HOLDER = """import pathlib, sys, time
from pixel_jax.run import lock
lock.take(pathlib.Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def given_back():
  yield
  lock.release()


@pytest.fixture
def holder(tmp_path):
  process = subprocess.Popen(
    [sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True
  )
  assert process.stdout.readline() == "held\n"
  yield process
  process.kill()
  process.wait()


def test_the_second_is_told_who_is_at_work(holder, tmp_path):
  with pytest.raises(lock.HeldError) as told:
    lock.take(tmp_path)
  for word in (str(tmp_path), str(holder.pid), socket.gethostname(), "--workdir"):
    assert word in str(told.value)
  holder.send_signal(signal.SIGKILL)
  holder.wait()
  assert (tmp_path / "lock.json").exists()
  lock.take(tmp_path)  # what is left of a killed process
  assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()
  lock.take(tmp_path)  # the same process again
  lock.release()
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", [lambda p: p, epath.Path])
def test_a_lock_of_another_host_ends_with_its_signs_of_life(folder, tmp_path):
  other = {"host": "vm-3", "pid": 1, "born": "1", "since": "then", "beat": time.time()}
  (tmp_path / "lock.json").write_text(json.dumps(other))
  with pytest.raises(lock.HeldError, match="process 1 on vm-3"):
    lock.take(folder(tmp_path))
  other["beat"] -= lock.STALE + 1
  (tmp_path / "lock.json").write_text(json.dumps(other))
  lock.take(folder(tmp_path))


def test_the_holder_gives_signs_of_life(tmp_path, monkeypatch):
  monkeypatch.setattr(lock, "BEAT", 0.01)
  lock.take(tmp_path)
  first = json.loads((tmp_path / "lock.json").read_text())["beat"]
  for _ in range(6000):
    if json.loads((tmp_path / "lock.json").read_text())["beat"] > first:
      break
    time.sleep(0.1)
  else:
    raise AssertionError("no sign of life within ten minutes")


def test_a_copied_workdir_is_nobodys(holder, tmp_path):
  shutil.copytree(tmp_path, tmp_path.parent / "copy")
  lock.take(tmp_path.parent / "copy")


def test_a_beat_that_fails_is_followed_by_others(tmp_path, monkeypatch):
  """Whatever the client of a bucket raises: else another host would take the lock."""
  monkeypatch.setattr(lock, "BEAT", 0.01)
  write, left = lock._write, [3]

  def fails(file, what):
    if left[0]:
      left[0] -= 1
      raise RuntimeError("503")
    write(file, what)

  lock.take(tmp_path)
  monkeypatch.setattr(lock, "_write", fails)
  first = json.loads((tmp_path / "lock.json").read_text())["beat"]
  for _ in range(6000):
    if not left[0] and json.loads((tmp_path / "lock.json").read_text())["beat"] > first:
      return
    time.sleep(0.1)
  raise AssertionError("no sign of life after a failure")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": 3}', '{"pid": "x"}'])
def test_a_broken_lock_blocks_nobody(text, tmp_path):
  (tmp_path / "lock.json").write_text(text)
  lock.take(tmp_path)


def test_a_number_that_was_given_again_is_another_process(tmp_path):
  mine = {"host": socket.gethostname(), "pid": os.getppid(), "born": "1", "beat": 0}
  (tmp_path / "lock.json").write_text(json.dumps(mine))
  if lock._born(os.getppid()):  # Linux
    lock.take(tmp_path)
