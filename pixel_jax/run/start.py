"""How every entry point starts and ends: flags, workdir, policy, one line for a mistake."""

import contextlib
import errno
import json
import math
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from pixel_jax import parallel
from pixel_jax.chat import encode, tokenizer
from pixel_jax.data import pipeline, sources
from pixel_jax.model import lora
from pixel_jax.model.config import ModelConfig
from pixel_jax.run import (
  bucket,
  checkpoint,
  lock,
  metrics,
  optim,
  policies,
  settings,
  trackers,
)
from pixel_jax.run.policies import Policy
from pixel_jax.run.settings import ConfigError

CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)


WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives; again = go on.")


# What takes the fields of each section of a training config (`settings.check`).
SECTIONS = {
  "": (settings.Run,),
  "model": (ModelConfig, settings.Model),
  "codec": (encode.Codec, settings.Named),
  "lora": (lora.Config, settings.Adapters),
  "mesh": (parallel.make_mesh,),
  "optim": (optim.make, optim.Guard),
  "checkpoint": (checkpoint.Checkpoints,),
  "wandb": (trackers.Wandb,),
  "mlflow": (trackers.Mlflow,),
}


# What may change when a run goes on: beginnings of paths that no step depends on.
FREE = (
  "total_steps", "save_every", "eval_every", "keep_trajectories_every", "data.changed",
  "checkpoint.", "wandb.", "mlflow.",
)  # fmt: skip


def run(main, needs_workdir: bool = True) -> None:
  """Runs `main(config, workdir)`; a wrong flag is one line on stderr and exit code 2.

  Without `needs_workdir` it is `main(config)`.
  """

  def parse(argv):
    if {"-h", "--help"} & set(argv):
      print(sys.modules[main.__module__].__doc__)
      sys.exit()
    try:
      argv = flags.FLAGS(settings.with_config_path(argv))
      if CONFIG.value is None or (needs_workdir and not WORKDIR.value):
        both = "both are" if needs_workdir else "it is"
        raise ConfigError(
          f"{both} needed: --config=NAME:SIZE"
          + " --workdir=DIR" * needs_workdir
          + "; pixel-jax configs lists them"
        )
      CONFIG.value.to_dict()  # a file that did not load says so when it is used
      return argv
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as e:
      stop(settings.named(e, sys.argv))

  def start(argv):
    if len(argv) > 1:
      stop(
        ConfigError(
          f"unexpected arguments {argv[1:]}; overrides are --config.KEY=VALUE"
        )
      )
    logging.set_verbosity(logging.WARNING)
    try:
      if needs_workdir:
        workdir = bucket.mount(WORKDIR.value)
        try:
          main(CONFIG.value, workdir)
        finally:
          bucket.sync(workdir)
          lock.release()
      else:
        main(CONFIG.value)
    except (
      ConfigError,
      bucket.BucketError,
      lock.HeldError,
      checkpoint.CheckpointError,
      optim.NonFiniteError,
      pipeline.DataError,
      sources.SourceError,
      tokenizer.TokenizerError,
    ) as error:
      stop(error)
    except OSError as error:
      if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
        raise
      stop(error)
    except BaseException:
      if not jax.distributed.is_initialized():
        raise
      # The usual end would wait for the others, which wait for this process.
      traceback.print_exc()
      _leave(1)

  app.run(start, flags_parser=parse)


def stop(error: Exception) -> None:
  lines = str(settings.innermost(error)).strip().splitlines()
  if any("Traceback" in line for line in lines):  # of a config file that refused
    lines = [lines[-1].partition("Error: ")[2] or lines[-1]]
  print("error:", " ".join(lines), file=sys.stderr)
  if jax.distributed.is_initialized():
    _leave(2)
  sys.exit(2)


def _leave(code: int) -> None:
  """Ends this process at once; the others miss its heartbeat and stop, too."""
  lock.release()
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def open_workdir(workdir: pathlib.Path, config: ConfigDict) -> None:
  """Makes the workdir and writes config.json; caches compiled programs beside it."""
  parallel.initialize()
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ConfigError(
      f"--workdir={workdir} cannot be made: {error.strerror}"
    ) from error
  file, text = workdir / "config.json", config.to_json_best_effort(indent=1)
  lasting = bucket.behind(workdir)
  if jax.process_index() == 0:
    lock.take(lasting)
  if checkpoint.complete_steps(lasting / "checkpoints") and file.exists():
    try:
      begun = json.loads(file.read_text())
    except ValueError as error:
      raise ConfigError(
        f"{file} is damaged ({error}); it says what the run was begun with.  Delete it to "
        "go on with the config that you give"
      ) from error
    differ = settings.differences(begun, json.loads(text))
    if "total_steps" in differ and config.get("optim", {}).get("schedule") == "cosine":
      logging.warning(
        "%s: the cosine ends there now, so the rate jumps", differ["total_steps"]
      )
    free = FREE
    if config.get("data", {}).get("changed") == "accept":
      free += ("data.",)
    differ = [
      told
      for path, told in differ.items()
      if not path.startswith(free) or path == "data.shards"
    ]
    if differ:
      raise ConfigError(
        f"{lasting} was begun with another config: {'; '.join(differ)}. Continue with "
        "the same, or give a new --workdir"
      )
  parallel.barrier("config")  # nobody reads what is being written
  if bucket.is_writer(workdir):
    file.write_text(text + "\n")
  keep_programs(lasting.parent / "compiled")


def keep_programs(folder: bucket.Folder) -> None:
  """Caches what is compiled in a folder, or where JAX_COMPILATION_CACHE_DIR says."""
  cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", folder)
  jax.config.update("jax_compilation_cache_dir", str(cache))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
  metrics.count_compiles()  # from here on


def open_run(
  config: ConfigDict, workdir: pathlib.Path, sections: Mapping[str, Sequence[Callable]]
) -> tuple[jax.sharding.Mesh, Policy]:
  """What a training run begins with: its workdir, its mesh and the policy to train.

  Args:
    sections: of `settings.check`.
  """
  settings.check(config, sections)
  open_workdir(workdir, config)
  mesh = settings.call("mesh", parallel.make_mesh, **config.mesh)
  policy = policies.open_policy(
    config.init,
    model=config.model,
    codec=config.codec,
    mesh=mesh,
    seed=config.seed,
    workdir=workdir,
    adapters=config.lora,
  )
  return mesh, policy


def describe(config: ConfigDict, policy: Policy, tx: Any) -> None:
  """What a run logs before it reads the weights; `tx` is its optimizer."""
  freeze, params, mesh = settings.frozen(config), policy.abstract, policy.mesh
  sizes = [x.size for x in jax.tree.leaves(params)]
  trained = jax.tree.leaves(optim.split(params, freeze)[0])
  device = f"{jax.devices()[0].device_kind} x {jax.device_count()}"
  if jax.process_count() > 1:
    device += f" of {jax.process_count()} processes"
  fields = json.dumps(json.loads(config.to_json_best_effort()))
  metrics.say(f"device   {device}, mesh {dict(mesh.shape)}")
  metrics.say(
    f"model    {sum(sizes):,} parameters in {len(sizes)} arrays of {policy.source}, "
    f"{sum(x.size for x in trained):,} of them trained"
  )
  need, there = optim.memory(tx, params, freeze), memory_of_device()
  metrics.say(
    f"memory   {need / 1e9:.2f} GB of weights, gradients and moments on each device, "
    f"which has {there / 1e9:.1f} GB"
  )
  if need > 0.9 * there:
    logging.warning(
      "that leaves too little for the rest, so the system may end this process without a "
      "word; take more devices (config.mesh), or adapters (config.lora.rank)"
    )
  metrics.say(f"config   {fields}")


def memory_of_device() -> float:
  """Bytes that a device of this process has; of CPU devices, what is free for each."""
  device = jax.local_devices()[0]
  if device.platform != "cpu":
    return (device.memory_stats() or {}).get("bytes_limit", math.inf)
  free = [math.inf]
  with contextlib.suppress(OSError, ValueError):
    for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
      if line.startswith("MemAvailable:"):
        free.append(int(line.split()[1]) * 1024)
  with contextlib.suppress(OSError, ValueError):  # a container's share
    free.append(int(pathlib.Path("/sys/fs/cgroup/memory.max").read_text()))
  return min(free) / jax.local_device_count()


def end(config: ConfigDict, step: int, saver, writer, notice, written: str) -> None:
  """Closes what a run has open, and says where what it wrote lies."""
  saver.close()
  writer.close()
  notice.close()
  metrics.say(metrics.ended(step, config.total_steps))
  metrics.say(f"in {saver.directory.parent}: {written}")
