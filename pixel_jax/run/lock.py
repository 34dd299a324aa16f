"""One run at a time in a workdir: WORKDIR/lock.json says who is at work there.

  {"host": "vm-3", "pid": 812, "born": "4711", "since": "2026-11-27 16:03", "beat": 1.7e9}

The holder renews `beat` while it lives.  On its own host a dead holder is known by its
pid, and its lock is taken over at once; of another host a lock is taken over when its
last beat is `STALE` seconds old.  The file is small, so it works in a bucket, too.
"""

import atexit
import contextlib
import json
import os
import pathlib
import socket
import threading
import time
from typing import Any

BEAT = 20.0  # seconds between two signs of life
STALE = 120.0  # a holder on another host that gave none for so long is dead


class HeldError(ValueError):
  """A workdir in which another process is at work."""


_held: dict[str, "_Lock"] = {}


def take(folder: Any) -> None:
  """Takes the lock of a folder (a pathlib or epath one) until the process ends.

  HeldError tells who has it.  Taking it again in the same process is allowed.
  """
  if str(folder) in _held:
    return
  file = folder / "lock.json"
  found = _read(file)
  if found and _is_alive(found, folder):
    ago = max(0.0, time.time() - found.get("beat", 0.0))
    raise HeldError(
      f"{folder} is in use: process {found.get('pid')} on {found.get('host')} has worked "
      f"there since {found.get('since')}, and gave a sign of life {ago:.0f} s ago. Wait "
      "for it, stop it, or give another --workdir (the lock of a host that is gone ends "
      f"{STALE:.0f} s after its last sign of life)"
    )
  mine = {
    "host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid()),
    "since": time.strftime("%Y-%m-%d %H:%M:%S"), "beat": time.time(),
    "folder": str(folder),
  }  # fmt: skip
  _write(file, mine)
  now = _read(file) or {}
  if (now.get("host"), now.get("pid")) != (mine["host"], mine["pid"]):
    raise HeldError(f"{folder} was taken by process {now.get('pid')} at this moment")
  _held[str(folder)] = _Lock(file, mine)


def release() -> None:
  """Gives back every lock of this process."""
  for lock in list(_held.values()):
    lock.end()
  _held.clear()


atexit.register(release)


class _Lock:
  """A lock that is held, and the thread that renews it."""

  def __init__(self, file: Any, mine: dict[str, Any]):
    self._file, self._mine = file, mine
    self._over = threading.Event()
    self._thread = threading.Thread(target=self._beat, daemon=True, name="lock")
    self._thread.start()

  def _beat(self) -> None:
    while not self._over.wait(BEAT):
      try:
        _write(self._file, self._mine | {"beat": time.time()})
      except Exception:  # a full disk, or whatever the client of a bucket raises
        continue  # without this thread another host would take the lock

  def end(self) -> None:
    self._over.set()
    self._thread.join(timeout=5.0)
    with contextlib.suppress(Exception):  # what stays ends with its last sign of life
      found = _read(self._file) or {}
      if found.get("pid") == self._mine["pid"] == os.getpid():  # not in a fork
        self._file.unlink()


def _is_alive(found: dict[str, Any], folder: Any) -> bool:
  if found.get("host") != socket.gethostname():
    beat = found.get("beat")
    return isinstance(beat, int | float) and time.time() - beat < STALE
  pid = found.get("pid")
  if not isinstance(pid, int) or pid == os.getpid():
    return False
  if found.get("folder", str(folder)) != str(folder):
    return False  # it came along when a workdir was copied
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    pass  # of another user
  return _born(pid) in ("", found.get("born"))  # else its number was given again


def _born(pid: int) -> str:
  """When a process began, in ticks of Linux; "" where the system does not tell."""
  try:
    stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
  except OSError:
    return ""
  return stat.rpartition(")")[2].split()[19]


def _read(file: Any) -> dict[str, Any] | None:
  try:
    found = json.loads(file.read_text())
  except (OSError, ValueError):
    return None  # none, or one that was cut off
  return found if isinstance(found, dict) else None


def _write(file: Any, what: dict[str, Any]) -> None:
  text = json.dumps(what) + "\n"
  if not isinstance(file, pathlib.Path):
    file.write_text(text)  # an object of a bucket is written whole
    return
  partial = file.with_suffix(f".{os.getpid()}.partial")
  partial.write_text(text)
  partial.replace(file)
