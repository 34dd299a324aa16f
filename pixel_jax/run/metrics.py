"""What a run says about itself: metrics.jsonl, TensorBoard, W&B, a progress bar.

  {"step": 12, "loss": 0.41, "reward/mean": 0.6, "perf/update_s": 0.8, ...}

One JSON object a step, written by process 0.  Everything that depends on the clock or
the machine lies under "perf/", so two runs are equal when their files without "perf/"
are.  What it is not: it computes no metric but times and rates.
"""

import contextlib
import json
import math
import pathlib
import re
import shutil
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import tqdm
from PIL import Image

from pixel_jax.run import bucket, trackers

# Dense bf16 peak of one jax device, FLOP/s (limits.md 2.1; a v7x chip is two).
PEAK_FLOPS = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5": 459e12,
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
  "TPU7x": 1153.5e12,
  "NVIDIA A100": 312e12,
  "NVIDIA H100": 989e12,
  "NVIDIA H200": 989e12,
}


def say(text: str) -> None:
  """A line on stdout, of all processes once."""
  if jax.process_index() == 0:
    print(text, flush=True)


class Writer:
  """Writes the metrics of one workdir.

  Args:
    workdir: gets metrics.jsonl and tensorboard/.
    first_step: finished steps of the checkpoint that the run goes on from; what an
      earlier, killed process wrote after it is cut off (`cut_back`).
    total_steps: where the progress bar ends; None shows none.
    wandb, mlflow: of `trackers.open_trackers`.
    config: of the run, for the trackers.
  """

  def __init__(
    self,
    workdir: str | pathlib.Path,
    *,
    first_step: int = 0,
    total_steps: int | None = None,
    wandb: Mapping[str, str] | None = None,
    mlflow: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
  ):
    self._root = pathlib.Path(workdir).expanduser().resolve()
    self._seconds: dict[str, float] = {}
    self._bar = self._file = None
    self._trackers: list[trackers.Tracker] = []
    self._printed = -math.inf
    if jax.process_index() == 0:
      self._root.mkdir(parents=True, exist_ok=True)
      cut_back(self._root, first_step)
      self._file = (self._root / "metrics.jsonl").open("a", encoding="utf-8")
      self._trackers = trackers.open_trackers(
        self._root, first_step=first_step, config=config or {}, wandb=wandb or {},
        mlflow=mlflow or {},
      )  # fmt: skip
      if total_steps is not None:
        self._bar = tqdm.tqdm(
          total=total_steps, initial=first_step, dynamic_ncols=True, disable=None
        )
    count_compiles()
    self._since = time.perf_counter()

  @contextlib.contextmanager
  def timer(self, name: str) -> Iterator[None]:
    """Adds the seconds of its block to perf/<name>_s of the next `write`."""
    start = time.perf_counter()
    try:
      yield
    finally:
      spent = time.perf_counter() - start
      self._seconds[name] = self._seconds.get(name, 0.0) + spent

  def write(
    self,
    step: int,
    values: Mapping[str, Any],
    *,
    tokens: float | None = None,
    image_tokens: float | None = None,
    flops: Mapping[str, float] | None = None,
  ) -> None:
    """Writes the metrics of a finished step (the first is step 1).

    Args:
      values: numbers; NaN and infinities are written as null.
      tokens, image_tokens: trained or sampled in the step by all processes; give
        perf/tokens_per_s and perf/image_tokens_per_s.
      flops: of the update, part by part; over the time of the timer "update" they give
        perf/mfu and perf/mfu_<part> on known devices.
    """
    now = time.perf_counter()
    spent, self._since = now - self._since, now
    perf = {f"perf/{k}_s": v for k, v in self._seconds.items()}
    perf |= {"perf/step_s": spent, "perf/compiles": count_compiles()}
    perf["perf/compile_s"] = _compile_seconds
    if tokens is not None:
      perf["perf/tokens_per_s"] = tokens / spent
    if image_tokens is not None:
      perf["perf/image_tokens_per_s"] = image_tokens / spent
    if flops and "update" in self._seconds and (peak := peak_flops()) is not None:
      limit = peak * jax.device_count() * self._seconds["update"]
      perf["perf/mfu"] = sum(flops.values()) / limit
      perf |= {f"perf/mfu_{k}": v / limit for k, v in flops.items()}
    self._seconds = {}
    if self._file is None:
      return
    numbers = {k: float(v) for k, v in {**values, **perf}.items()}
    finite = {k: v if math.isfinite(v) else None for k, v in numbers.items()}
    self._file.write(json.dumps({"step": step, **finite}) + "\n")
    self._file.flush()
    for tracker in self._trackers:
      tracker.write(step, numbers)
    if self._bar is not None:
      self._show(step, numbers)

  def show(
    self, step: int, draw: Callable[..., Mapping[str, Image.Image]], *args: Any
  ) -> None:
    """Pictures of a step for the trackers; `draw(*args)` is called where they are kept."""
    if self._trackers:
      pictures = draw(*args)
      for tracker in self._trackers:
        tracker.show(step, pictures)

  def close(self) -> None:
    if self._file is not None:
      self._file.close()
      if self._bar is not None:
        self._bar.close()
    for tracker in self._trackers:
      tracker.close()

  def _show(self, step: int, numbers: Mapping[str, float]) -> None:
    """The bar on a terminal; in a log file a plain line every ten seconds."""
    names = (OF_RL if "reward/mean" in numbers else OF_SFT) | OF_ALL
    main = {name: f"{numbers[k]:.3g}" for k, name in names.items() if k in numbers}
    bar = self._bar
    if not bar.disable:
      bar.set_postfix(main, refresh=False)
      bar.update(step - bar.n)
      return
    if time.perf_counter() - self._printed >= 10 or step == bar.total:
      self._printed = time.perf_counter()
      each = numbers["perf/step_s"]
      left = bar.format_interval((bar.total - step) * each)
      text = " ".join(f"{k} {v}" for k, v in main.items())
      line = f"step {step}/{bar.total}, {left} left  {text}  {each:.2f} s a step"
      print(line, file=sys.stderr, flush=True)


# What the progress bar shows, where a run has it; a narrow terminal cuts the end off.
OF_RL = {
  "reward/mean": "reward",
  "ops/rapr": "rapr",
  "reward/correct": "correct",
  "eval/accuracy": "accuracy",
}
OF_SFT = {"loss": "loss", "eval/loss": "held out", "policy/entropy": "entropy"}
OF_ALL = {"perf/tokens_per_s": "tok/s", "perf/mfu": "mfu"}


# ---- Going back ----------------------------------------------------------------------


def cut_back(workdir: str | pathlib.Path, last: int) -> None:
  """Removes what was written after step `last`: steps 1 .. last stay.

  Covers metrics.jsonl (half lines of a killed process too), tensorboard/ and those
  files of trajectories/ whose name ends in a larger step number.
  """
  root = pathlib.Path(workdir)
  metrics = root / "metrics.jsonl"
  if metrics.exists():
    lines = metrics.read_bytes().splitlines(keepends=True)
    _replace(metrics, b"".join(x for x in lines if _is_kept(x, last)))
  # Those of a workdir in a bucket lie there.
  for path in bucket.files(bucket.behind(root) / "trajectories"):
    number = re.search(r"(\d+)$", path.name.split(".")[0])
    is_partial = path.name.endswith(".partial")
    if is_partial or (number and int(number[1]) > last):
      path.unlink()
  for path in sorted((root / "tensorboard").rglob("*tfevents*")):
    events = list(read_events(path.read_bytes()))
    keep = [raw for raw, event in events if event.step <= last]
    if any(event.summary.value for _, event in events if event.step <= last):
      _replace(path, b"".join(keep))
    else:
      path.unlink()


def _is_kept(line: bytes, last: int) -> bool:
  try:
    return line.endswith(b"\n") and json.loads(line)["step"] <= last
  except (ValueError, KeyError, TypeError):
    return False


def _replace(path: pathlib.Path, data: bytes) -> None:
  if path.stat().st_size == len(data):
    return  # nothing was cut
  partial = path.with_name(path.name + ".partial")
  partial.write_bytes(data)
  shutil.copystat(path, partial)
  partial.replace(path)


def read_events(data: bytes) -> Iterator[tuple[bytes, Any]]:
  """(record, Event) of a TensorBoard file up to the first that is cut short.

  A record is its length (u64), a checksum (u32), the event and a checksum (u32).
  """
  from tensorboardX.proto import event_pb2

  at = 0
  while at + 12 <= len(data):
    (size,) = struct.unpack_from("<Q", data, at)
    end = at + 12 + size + 4
    if end > len(data):
      return
    event = event_pb2.Event.FromString(data[at + 12 : end - 4])
    yield data[at:end], event
    at = end


# ---- Performance ---------------------------------------------------------------------

_compiles, _compile_seconds = 0, 0.0
_is_listening = False


def count_compiles() -> int:
  """Programs compiled (or read from the compilation cache) since the first call."""
  global _is_listening
  if not _is_listening:
    _is_listening = True
    jax.monitoring.register_event_duration_secs_listener(_on_duration)
  return _compiles


def ended(done: int, total: int) -> str:
  """The last line but one of a run that ends, or leaves, after step `done`."""
  if done < total:
    return (
      f"stopped by a signal: step {done} of {total} is saved, the same command goes on"
    )
  return f"done: {done} steps, {compiled()}"


def compiled() -> str:
  """What compiling cost so far."""
  return f"{count_compiles()} programs compiled in {_compile_seconds:.0f} s"


def _on_duration(event: str, duration: float, **_: Any) -> None:
  global _compiles, _compile_seconds
  if event == "/jax/core/compile/backend_compile_duration":
    _compiles += 1
    _compile_seconds += duration


def peak_flops() -> float | None:
  """Of one local device; None where it is not in the table (a CPU)."""
  kind = jax.local_devices()[0].device_kind
  # The longest name wins: "TPU v5 lite" is not a "TPU v5".
  known = [k for k in PEAK_FLOPS if kind.startswith(k)]
  return PEAK_FLOPS[max(known, key=len)] if known else None
