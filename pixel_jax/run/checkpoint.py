"""Everything that a bit-exact resume needs, as one orbax step; and bare parameters.

  WORKDIR/checkpoints/120/   params/  state/ (optimizer, counters)  host/ (JSON)
  DIR/                       params/  extra.json       by `save_params`: init, export

`host` is what Python knows: iterator states, replay, counters.  It may hold JSON, bytes
and numpy arrays; tuples come back as lists.  With several processes each gives its part
(its logical shards) and everyone gets the whole back, so a run may resume on another
number of hosts.  What it is not: it decides neither when to save nor what.

Deviations from orbax, which casts silently when a dtype differs and lets errors of a
relative path or a full disk surface in a thread: both are errors here, in one line.
"""

import base64
import contextlib
import json
import math
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.sharding import SingleDeviceSharding

from pixel_jax import fields, parallel
from pixel_jax.fields import PositiveInt
from pixel_jax.run import bucket

PARAMS, STATE, HOST = "params", "state", "host"
SPARE = 64 * 2**20  # bytes that must stay free on the disk beside a step


class CheckpointError(RuntimeError):
  """A step could not be written or read; says what remains usable."""


class Checkpoints:
  """The steps of one workdir.

  Args:
    workdir: the run; steps lie in workdir/checkpoints, or in the bucket behind it.
    keep: newest steps that stay.
    keep_best: name of a metric; the step where it was best stays, too: where it was
      least, if it is a loss.  "" = none.
    extra: JSON stored beside every step, what `load_params` gives back: as keywords,
      `Checkpoints(workdir, model=config.to_hf())`.
  """

  @fields.checked
  def __init__(
    self,
    workdir: str | pathlib.Path,
    *,
    keep: PositiveInt = 3,
    keep_best: str = "",
    **extra: Any,
  ):
    self._workdir = pathlib.Path(workdir).expanduser().resolve()
    self.directory = bucket.behind(self._workdir) / "checkpoints"
    self._extra = extra
    self._kept = _Kept(keep, keep_best, _read_scores(self.directory))
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=self._kept, cleanup_tmp_directories=True, create=True
      ),
    )

  def latest(self) -> int | None:
    """The newest complete step; what a killed save left behind does not count."""
    self.wait()
    return self._manager.latest_step()

  def has(self, step: int) -> bool:
    return step in self._manager.all_steps()

  def save(
    self, step: int, state: dict, host: Any = None, metrics: Mapping[str, float] = {}
  ) -> None:
    """Writes `state` (with key "params") and `host` as `step`.

    `metrics` are those of the step, among which `keep_best` is looked for.

    Returns once everything has left the device; the disk is written behind the run.
    The small files of a workdir in a bucket are copied there first: no step may last
    whose metrics do not.
    An error there is raised by the next `save`, `wait` or `close`.
    """
    self.wait()
    if self.has(step):
      raise CheckpointError(f"{self.directory}/{step} exists already; delete it first")
    self._kept.add(step, metrics)
    host = merge(parallel.gather_json(encode(host)))
    items = {k: ocp.args.StandardSave(v) for k, v in _parts(state).items()} | {
      HOST: ocp.args.JsonSave(
        {"host": host, "extra": self._extra, "scores": self._kept.scores}
      )
    }
    if bad := nonfinite(state):
      raise self._failure(
        ValueError(
          f"{len(bad)} arrays hold numbers that are not finite, first {bad[0]}"
        )
      )
    try:
      bucket.sync(self._workdir)
      need = _local_bytes(state) + SPARE
      free = _free(self.directory)
      if parallel.agree(free < need, "any"):  # on any host: nobody begins
        raise OSError(
          f"{need / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free on the disk"
        )
      self._manager.save(step, args=ocp.args.Composite(**items))
      if jax.default_backend() == "cpu":
        # There the "copy" off the device may be a view, and the next update donates it.
        self._manager.wait_until_finished()
    except Exception as error:
      raise self._failure(error) from error

  def wait(self) -> None:
    """Returns when the last `save` is on the disk."""
    try:
      self._manager.wait_until_finished()
      self._manager.check_for_errors()
    except Exception as error:
      raise self._failure(error) from error

  def restore(self, state: dict, step: int | None = None) -> tuple[int, dict, Any]:
    """The newest step, or `step`, in the layout of `state` -> (step, state, host).

    Where there is none: (0, state, None).  A newest step that is damaged is set aside, and
    the one before it is taken; CheckpointError where there is none before it.
    """
    if step is not None:
      return self._restore(state, step)
    while (newest := self.latest()) is not None:
      try:
        found, why = self._restore(state, newest), ""
      except CheckpointError:
        raise  # of another model or optimizer
      except Exception as error:  # whatever orbax makes of half a file
        why = f"{type(error).__name__}: {error}".splitlines()[0][:300]
      if not parallel.agree(bool(why), "any"):
        return found
      told = (
        f"step {newest} in {self.directory} is damaged ({why or 'on another host'})"
      )
      if complete_steps(self.directory) == [newest]:
        raise CheckpointError(
          f"{told}, and no other is there.  Bring it back, or begin with a new --workdir"
        )
      logging.warning("%s: it is set aside, and the one before it is taken", told)
      self._set_aside(newest)
    return 0, state, None

  def _set_aside(self, step: int) -> None:
    """Moves a damaged step to WORKDIR/damaged; in a bucket it is deleted."""
    parallel.barrier("damaged")
    if jax.process_index() == 0:
      damaged = self.directory / str(step)
      if isinstance(damaged, pathlib.Path):
        aside = self.directory.parent / "damaged" / str(step)
        aside.parent.mkdir(exist_ok=True)
        while aside.exists():  # it was damaged before
          aside = aside.with_name(aside.name + "_")
        damaged.rename(aside)
      else:
        damaged.rmtree()
    parallel.barrier("set aside")
    self._manager.reload()
    self._kept.scores = _read_scores(self.directory)

  def _restore(self, state: dict, step: int) -> tuple[int, dict, Any]:
    where = self.directory / str(step)
    parts = _parts(jax.tree.map(_abstract, state))
    for item, tree in parts.items():
      _check(where / item, tree)
    items = {k: ocp.args.StandardRestore(v) for k, v in parts.items()}
    found = self._manager.restore(
      step, args=ocp.args.Composite(host=ocp.args.JsonRestore(), **items)
    )
    rest = found[STATE] if STATE in parts else {}
    return step, {PARAMS: found[PARAMS], **rest}, decode(found[HOST]["host"])

  def close(self) -> None:
    try:
      self.wait()
    finally:
      self._manager.close()

  def _failure(self, error: Exception) -> CheckpointError:
    try:
      last = max(complete_steps(self.directory), default=None)
    except OSError:
      last = None
    kept = "no earlier step exists" if last is None else f"step {last} is intact"
    return CheckpointError(
      f"checkpoint in {self.directory} not written: {error}; {kept}. Free some "
      "space or mend the cause, then run the same command again."
    )


class _Kept(ocp.checkpoint_managers.PreservationPolicy):
  """Which steps stay: the newest, and the best by a metric."""

  def __init__(self, newest: int, metric: str, scores: dict[str, float]):
    self.scores = scores  # by step; written into every step, so that none gets lost
    self._newest, self._metric = newest, metric

  def add(self, step: int, metrics: Mapping[str, float]) -> None:
    if math.isfinite(score := metrics.get(self._metric, math.nan)):
      self.scores[str(step)] = float(score)

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    steps = [c.step for c in checkpoints]
    scores = {s: self.scores[str(s)] for s in steps if str(s) in self.scores}
    choose = min if self._metric.endswith("loss") else max
    # Of equal ones the newest.
    best = choose(reversed(scores), key=scores.get, default=None)
    return [step == best or step in steps[-self._newest :] for step in steps]


def _read_scores(directory: bucket.Folder) -> dict[str, float]:
  """Those of a run that goes on; {} where the newest step cannot tell."""
  try:
    return dict(_read_host(directory / str(max(complete_steps(directory))))["scores"])
  except Exception:  # there is none, it is of 0.1, or damaged, which `restore` tells
    return {}


def _read_host(step: bucket.Folder) -> dict[str, Any]:
  return ocp.JsonCheckpointHandler().restore(epath.Path(step / HOST))


def nonfinite(state: dict) -> list[str]:
  """Paths of the arrays that hold a number that is not finite; the same on all hosts."""
  flat = jax.tree_util.tree_flatten_with_path(state)[0]
  floats = [(k, x) for k, x in flat if jnp.issubdtype(x.dtype, jnp.floating)]
  fine = jax.device_get(_all_finite([x for _, x in floats]))
  return [jax.tree_util.keystr(k) for (k, _), ok in zip(floats, fine) if not ok]


@jax.jit
def _all_finite(arrays: list[jax.Array]) -> list[jax.Array]:
  return [jnp.isfinite(x).all() for x in arrays]


def _parts(state: dict) -> dict[str, dict]:
  """The parameters by themselves, so that they can be read alone; orbax wants no {}."""
  rest = {k: v for k, v in state.items() if k != PARAMS}
  return {PARAMS: state[PARAMS]} | ({STATE: rest} if rest else {})


def complete_steps(directory: bucket.Folder) -> list[int]:
  """Finished steps.

  Orbax writes under another name and renames at the end; in a bucket, where nothing can
  be renamed, it adds a last file.
  """
  if not directory.is_dir():
    return []
  last = PARAMS if isinstance(directory, pathlib.Path) else "commit_success.txt"
  return sorted(
    int(p.name) for p in directory.iterdir() if p.name.isdigit() and (p / last).exists()
  )


def _free(directory: bucket.Folder) -> float:
  """Bytes; a bucket has no end."""
  if isinstance(directory, pathlib.Path):
    return shutil.disk_usage(directory).free
  return math.inf


# ---- Bare parameters -----------------------------------------------------------------


def save_params(directory: str | pathlib.Path, params: dict, extra: dict) -> None:
  """Writes parameters (a pure dict) and `extra` (JSON) into a new directory."""
  root = bucket.behind(directory)
  if (root / PARAMS).exists():
    raise CheckpointError(f"{root / PARAMS} exists already; choose another directory")
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(root / PARAMS, params)
  if jax.process_index() == 0:
    partial = root / "extra.json.partial"
    partial.write_text(json.dumps(extra, indent=1) + "\n")
    partial.replace(root / "extra.json")


def load_params(
  directory: str | pathlib.Path, abstract: dict | None = None, shardings: Any = None
) -> tuple[dict, dict]:
  """Parameters and `extra` of `save_params`, or of the newest step of a workdir.

  Args:
    abstract: tree of ShapeDtypeStruct that the file must equal; None takes what is
      there.
    shardings: where the arrays go; None = the first device.
  """
  where = _locate(directory)
  if abstract is None:
    abstract = stored(directory)
  with _told(where):
    _check(where / PARAMS, abstract)
  if shardings is None:
    if jax.process_count() > 1:
      raise ValueError("load_params with several processes needs shardings")
    one = SingleDeviceSharding(jax.local_devices()[0])
    shardings = jax.tree.map(lambda _: one, abstract)
  target = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
  )
  with _told(where), ocp.StandardCheckpointer() as checkpointer:
    params = checkpointer.restore(where / PARAMS, target)
  return params, load_extra(directory)


def stored(directory: str | pathlib.Path) -> dict:
  """Tree of ShapeDtypeStruct of the parameters that `load_params` finds."""
  where = _locate(directory)
  with _told(where):
    tree = _stored(where / PARAMS)
  return jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), tree)


@contextlib.contextmanager
def _told(where: bucket.Folder) -> Iterator[None]:
  """Whatever orbax makes of half a file is a CheckpointError, in one line."""
  try:
    yield
  except CheckpointError:
    raise
  except Exception as error:
    why = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    raise CheckpointError(
      f"{where} is damaged ({why}); name another step of the run, such as "
      "RUN/checkpoints/50"
    ) from error


def load_extra(directory: str | pathlib.Path) -> dict:
  """The JSON beside the parameters; see `load_params` for what `directory` may be."""
  where = _locate(directory)
  with _told(where):
    if (where / "extra.json").exists():
      return json.loads((where / "extra.json").read_text())
    return _read_host(where)["extra"]


def holds_params(directory: str | pathlib.Path) -> bool:
  """Whether `load_params` finds some there."""
  try:
    return bool(_locate(directory))
  except CheckpointError:
    return False


def fingerprint(directory: str | pathlib.Path) -> str:
  """Names the stored parameters, also of an HF folder: changes with every writing."""
  root = bucket.behind(directory)
  files = [*root.glob("*.safetensors")] if isinstance(root, pathlib.Path) else []
  where = root if files else _locate(directory)
  files = files or [where / PARAMS, *(where / PARAMS).iterdir()]
  stats = [file.stat() for file in files]
  if isinstance(where, pathlib.Path):
    newest = max(s.st_mtime_ns for s in stats)
  else:  # a bucket keeps seconds
    newest = max(s.mtime or 0 for s in stats)
  return f"{where.name}-{newest}"


def _locate(directory: str | pathlib.Path) -> bucket.Folder:
  """The directory that holds params/."""
  root = bucket.behind(directory)
  if (root / "checkpoints").is_dir():
    steps = complete_steps(root / "checkpoints")
    if steps:
      return root / "checkpoints" / str(steps[-1])
  if (root / PARAMS).is_dir():
    return root
  raise CheckpointError(
    f"{root} holds neither params/ nor a complete step in checkpoints/; give a workdir "
    "that has saved a step, or what `pixel-jax convert import` wrote"
  )


# ---- Checks --------------------------------------------------------------------------


def _stored(where: bucket.Folder) -> dict:
  """Tree of shapes and dtypes of one saved item."""
  return ocp.StandardCheckpointHandler().metadata(epath.Path(where)).tree


def _check(where: bucket.Folder, target: Any) -> None:
  """Refuses a tree whose paths, shapes or dtypes are not those of the file."""
  have, want = _by_path(_stored(where)), _by_path(target)
  wrong = [f"{k} is missing" for k in want if k not in have]
  wrong += [f"{k} is not expected" for k in have if k not in want]
  for k in want.keys() & have.keys():
    stored = (tuple(have[k].shape), np.dtype(have[k].dtype))
    asked = (tuple(want[k].shape), np.dtype(want[k].dtype))
    if stored != asked:
      wrong.append(f"{k} is {stored[1]}{stored[0]}, expected {asked[1]}{asked[0]}")
  if wrong:
    more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
    raise CheckpointError(
      f"{where} does not fit: {'; '.join(sorted(wrong)[:5])}{more}. Use the model and "
      "optimizer config it was saved with; dtypes are never cast here."
    )


def _by_path(tree: Any) -> dict[str, Any]:
  flat = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {"/".join(_name(k) for k in keys): x for keys, x in flat}


def _name(key: Any) -> str:
  # A named tuple (GetAttrKey) and a list (SequenceKey) are stored by name and index.
  return str(next(getattr(key, a) for a in ("key", "name", "idx") if hasattr(key, a)))


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _local_bytes(tree: Any) -> int:
  shards = (s for x in jax.tree.leaves(tree) for s in x.addressable_shards)
  return sum(s.data.nbytes for s in shards if s.replica_id == 0)


# ---- Host state ----------------------------------------------------------------------


def encode(value: Any) -> Any:
  """JSON that `decode` turns back, bit for bit; tuples become lists."""
  if isinstance(value, Mapping):
    odd = [k for k in value if not isinstance(k, str)]
    if odd:
      raise TypeError(f"host state: key {odd[0]!r} is not a string")
    return {k: encode(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [encode(v) for v in value]
  if isinstance(value, bytes):
    return {"__bytes__": base64.b64encode(value).decode()}
  if isinstance(value, np.ndarray | np.generic):
    array = np.asarray(value)
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    return {"__array__": data, "dtype": array.dtype.str, "shape": list(array.shape)}
  if value is None or isinstance(value, bool | int | float | str):
    return value
  raise TypeError(
    f"host state: {type(value).__name__} cannot be saved; use JSON, bytes or numpy"
  )


def decode(value: Any) -> Any:
  if isinstance(value, list):
    return [decode(v) for v in value]
  if not isinstance(value, dict):
    return value
  if value.keys() == {"__bytes__"}:
    return base64.b64decode(value["__bytes__"])
  if value.keys() == {"__array__", "dtype", "shape"}:
    data = np.frombuffer(base64.b64decode(value["__array__"]), value["dtype"])
    return data.reshape(value["shape"]).copy()
  return {k: decode(v) for k, v in value.items()}


def merge(parts: list[Any], path: str = "host") -> Any:
  """Host states of all processes as one: dicts are united, the rest must be equal."""
  first = parts[0]
  if all(isinstance(p, dict) for p in parts):
    keys = dict.fromkeys(k for p in parts for k in p)
    return {k: merge([p[k] for p in parts if k in p], f"{path}/{k}") for k in keys}
  if any(p != first for p in parts):
    raise ValueError(
      f"{path} differs between processes; file what a process owns under its logical "
      "shards, as in {'shards': {'3': ...}}"
    )
  return first
