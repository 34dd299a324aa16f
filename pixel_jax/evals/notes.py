"""Notes: answers on their way to a file, one by one, so that a kill loses none that ended.

  trajectories/STEM.KEY.HOST.partial    a line for every answer, as it ends
  trajectories/STEM[.HOST].jsonl        all of a host, in the order of its questions

KEY says what the answers depend on, so what a run of other weights or settings left is not
taken over.  Any host takes over what any host noted.
"""

import contextlib
import dataclasses
import pathlib
import threading
from collections.abc import Callable, Iterator, Sequence

from pixel_jax import trajectory
from pixel_jax.trajectory import Trajectory

Place = tuple[str, int]  # the question's id, the sample


class Notes:
  """What one host notes; a context, which closes its file.

  Args:
    folder: of the trajectories.
    key: of the answers.
    host, hosts: as in `trajectory.host_file`.
  """

  def __init__(
    self, folder: pathlib.Path, stem: str, key: str, *, host: int, hosts: int
  ):
    self._folder, self._stem, self._run = folder, stem, f"{stem}.{key}"
    self._host, self._hosts = host, hosts
    self._lock = threading.Lock()  # engines play in threads
    # Where each answer stands: file, offset, length.
    self._places: dict[Place, tuple[pathlib.Path, int, int]] = {}
    folder.mkdir(parents=True, exist_ok=True)

  def left(self) -> dict[Place, Trajectory]:
    """The answers that were noted before, by whichever host, as `bare` ones."""
    found = {}
    for file in sorted(self._folder.glob(f"{_literal(self._run)}.*.partial")):
      for at, length, t in lines(file):
        found[t.task.id, t.sample] = bare(t)
        self._places[t.task.id, t.sample] = (file, at, length)
    return found

  def __enter__(self) -> "Notes":
    self._own = self._folder / f"{self._run}.{self._host:03d}.partial"
    if self._own.exists():  # a kill may have cut its last line; no other joins it
      with self._own.open("r+b") as f:
        f.truncate(f.read().rfind(b"\n") + 1)
    self._file = self._own.open("ab")
    return self

  def __exit__(self, *error) -> None:
    self._file.close()

  def add(self, t: Trajectory) -> None:
    line = (trajectory.to_json(t) + "\n").encode()
    with self._lock:
      self._places[t.task.id, t.sample] = (self._own, self._file.tell(), len(line))
      self._file.write(line)
      self._file.flush()

  def keep(self, order: Sequence[Place], barrier: Callable[[str], None]) -> None:
    """Writes this host's file; all notes of the stem go.  All hosts call it together."""
    barrier("noted")
    name = trajectory.host_file(self._stem, self._host, self._hosts)
    made = self._folder / f"{name}.tmp"
    with contextlib.ExitStack() as stack, made.open("wb") as out:
      opened = {}
      for each in order:
        file, at, length = self._places[each]
        if file not in opened:
          opened[file] = stack.enter_context(file.open("rb"))
        opened[file].seek(at)
        out.write(opened[file].read(length))
    barrier("copied")
    if self._host == 0:
      of_stem = f"{_literal(self._stem)}."
      for pattern in (f"{of_stem}*jsonl", f"{of_stem}*.partial"):
        for old in self._folder.glob(pattern):
          old.unlink()  # of another number of hosts, or of other settings
    barrier("gone")
    made.replace(self._folder / name)


def bare(t: Trajectory) -> Trajectory:
  """A trajectory without the ids of its prompt, which scores do not need."""
  own = [p for p, sampled in zip(t.logp, t.sampled) if sampled]
  empty: dict = dict(ids=[], weight=[], position=[], slots=[])
  return dataclasses.replace(t, sampled=[True] * len(own), logp=own, **empty)


def lines(file: pathlib.Path) -> Iterator[tuple[int, int, Trajectory]]:
  """(offset, length, what it says) of the whole lines; a kill may cut the last."""
  at = 0
  with file.open("rb") as f:
    for line in f:
      if line.endswith(b"\n"):
        yield at, len(line), trajectory.from_json(line.decode())
      at += len(line)


def _literal(name: str) -> str:
  """A name as `glob` takes it, to which [ and others mean something."""
  return "".join(f"[{c}]" if c in "[]*?" else c for c in name)
