"""Workdirs in a bucket: a local folder, and the gs://BUCKET/RUN that stands behind it.

An object of a bucket is written whole, and metrics.jsonl, TensorBoard and
quarantine.jsonl grow line by line.  So a run writes its small files into a local folder,
and `sync` copies what has changed: before a checkpoint is written, so that what a resume
cuts back to is always there, and when the run ends.  Orbax writes the checkpoints to the
bucket itself, and jax the compiled programs.

  workdir = mount("gs://bucket/run")     # a new folder with the run's small files in it
  behind(workdir) / "checkpoints"        # gs://bucket/run/checkpoints
  sync(workdir)

A local workdir stands behind itself.  Needs gcsfs (extra [gcs]).
"""

import atexit
import dataclasses
import importlib.util
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator

import jax
from etils import epath

Folder = pathlib.Path | epath.Path  # epath's have the same methods
# Large, and nothing of it is read by a run that goes on.
LEFT_THERE = ("checkpoints", "logs", "trajectories")


class BucketError(ValueError):
  """A place that cannot hold a run."""


@dataclasses.dataclass
class _Mount:
  remote: epath.Path
  known: dict[str, tuple[int, int]]  # files as they were copied: time, size


_mounts: dict[pathlib.Path, _Mount] = {}


def mount(place: str | pathlib.Path) -> pathlib.Path:
  """The local folder of a workdir: `place` itself, or a new one that stands for gs://."""
  remote = _find(place)
  if isinstance(remote, pathlib.Path):
    return remote
  local = pathlib.Path(tempfile.mkdtemp(prefix="pixel_jax-")).resolve()
  atexit.register(shutil.rmtree, local, ignore_errors=True)
  _mounts[local] = _Mount(remote, {})
  _fetch(remote, local, LEFT_THERE)
  _mounts[local].known = {name: _stamp(file) for name, file in _files(local)}
  return local


def behind(folder: str | pathlib.Path) -> Folder:
  """Where a folder lasts: the gs:// that it was mounted from, or what it names."""
  place = _find(folder)
  return _mounts[place].remote if place in _mounts else place


def is_shared(workdir: pathlib.Path) -> bool:
  """Whether all processes of a run see this folder; of a bucket each has its own."""
  return workdir not in _mounts


def is_writer(workdir: pathlib.Path) -> bool:
  """Whether this process writes what is the same for all: the first does, and each does
  in a workdir of its own."""
  return jax.process_index() == 0 or not is_shared(workdir)


def fetch(folder: Folder, into: pathlib.Path) -> None:
  """Copies a folder with all that is in it; `into` must not exist."""
  if isinstance(folder, pathlib.Path):
    shutil.copytree(folder, into)
  else:
    into.mkdir(parents=True)
    _fetch(folder, into)


def sync(workdir: pathlib.Path) -> None:
  """Makes the bucket equal the files of this process; a local workdir needs none.

  Process 0 owns what all share; process p > 0 those files whose names end in its number,
  as quarantine_3.jsonl and step_000001.003.jsonl.  Trajectories are moved: the disk of a
  worker is small.
  """
  if workdir not in _mounts:
    return
  remote, known = _mounts[workdir].remote, _mounts[workdir].known
  process = jax.process_index() if jax.distributed.is_initialized() else 0
  there = dict(_files(workdir))
  for name, file in there.items():
    mine = process == 0 or re.search(rf"(_|\.0*){process}$", file.stem)
    if not mine or file.suffix == ".partial" or known.get(name) == _stamp(file):
      continue
    known[name] = _stamp(file)  # before: what is written meanwhile goes next time
    target = remote / name
    target.parent.mkdir(parents=True, exist_ok=True)
    epath.Path(file).copy(target, overwrite=True)
    if name.startswith("trajectories/"):
      del known[name]
      file.unlink()
  for name in known.keys() - there.keys():  # cut back when the run went on
    del known[name]
    if process == 0:
      (remote / name).unlink(missing_ok=True)


def files(folder: Folder) -> Iterator[Folder]:
  """All files below a folder; none where it does not exist."""
  return (file for _, file in _files(folder))


def _find(place: str | pathlib.Path) -> Folder:
  text = str(place)
  if "://" not in text:
    return pathlib.Path(place).expanduser().resolve()
  if not re.fullmatch(r"gs://[^/]+(/[^/]+)+/?", text) or "/../" in f"{text}/":
    raise BucketError(f"{text} is no gs://BUCKET/RUN, nor a folder of this machine")
  if importlib.util.find_spec("gcsfs") is None:
    raise BucketError(f"{text} needs gcsfs: pip install 'pixel_jax[gcs]'")
  return epath.Path(text.rstrip("/"))


def _files(folder: Folder, above: str = "") -> Iterator[tuple[str, Folder]]:
  """(name below the folder, file)."""
  if not folder.is_dir():
    return
  for entry in sorted(folder.iterdir()):
    if entry.name in ("", ".", ".."):  # legal in the names of a bucket
      continue
    if entry.is_dir():
      yield from _files(entry, f"{above}{entry.name}/")
    else:
      yield above + entry.name, entry


def _fetch(remote: Folder, local: pathlib.Path, but: tuple[str, ...] = ()) -> None:
  if not remote.is_dir():
    return
  for entry in remote.iterdir():
    if entry.name in but:
      continue
    for name, file in _files(entry) if entry.is_dir() else [("", entry)]:
      target = local / entry.name / name
      target.parent.mkdir(parents=True, exist_ok=True)
      file.copy(epath.Path(target), overwrite=True)


def _stamp(file: pathlib.Path) -> tuple[int, int]:
  stat = file.stat()
  return stat.st_mtime_ns, stat.st_size
