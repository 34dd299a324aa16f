"""How every entry point starts: flags, workdir, policy.  Nothing else reads a config.

A *policy* is what can talk: the model's config, its parameters, its tokenizer and the
codec (prompt profile, pixel budgets).  It comes from a workdir or a converted
checkpoint, or fresh from a preset.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import sys

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from pixel_jax import checkpoint, metrics, parallel
from pixel_jax.chat import encode, tokenizer
from pixel_jax.data import pipeline, sources, world
from pixel_jax.model import config as model_config
from pixel_jax.model import hf, qwen2_5_vl

CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives; again = go on.")


# What may change when a run goes on: nothing that a step depends on.
FREE = ("total_steps", "save_every", "eval_every", "keep_trajectories_every")


class ConfigError(ValueError):
  """A mistake in the config or the command, told in one line."""


def run(main) -> None:
  """Runs `main(config, workdir)`; a wrong flag is one line on stderr and exit code 2."""

  def parse(argv):
    try:
      argv = flags.FLAGS(argv)
      if not WORKDIR.value or CONFIG.value is None:
        raise ConfigError(
          "both are needed: --config=configs/NAME.py:SIZE --workdir=DIR"
        )
      CONFIG.value.to_dict()  # a file that did not load says so when it is used
      return argv
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as e:
      stop(e)

  def start(argv):
    if len(argv) > 1:
      stop(
        ConfigError(
          f"unexpected arguments {argv[1:]}; overrides are --config.KEY=VALUE"
        )
      )
    logging.set_verbosity(logging.WARNING)
    try:
      main(CONFIG.value, pathlib.Path(WORKDIR.value).expanduser().resolve())
    except (
      ConfigError,
      checkpoint.CheckpointError,
      pipeline.DataError,
      sources.SourceError,
      tokenizer.TokenizerError,
    ) as error:
      stop(error)

  app.run(start, flags_parser=parse)


def stop(error: Exception) -> None:
  text = error
  while isinstance(text, AttributeError | KeyError) and text.args:
    text = text.args[0]  # ml_collections wraps them, and a KeyError quotes its text
  lines = str(text).strip().splitlines()
  if any("Traceback" in line for line in lines):  # of a config file that refused
    lines = lines[-1:]
  print("error:", " ".join(lines), file=sys.stderr)
  sys.exit(2)


def call(section: str, function, *args, **kwargs):
  """Calls `function` with a config section; what it refuses is a `ConfigError`."""
  try:
    return function(*args, **kwargs)
  except (TypeError, ValueError) as error:
    if isinstance(error, TypeError) and "argument" not in str(error):
      raise
    raise ConfigError(f"config.{section}: {error}") from error


def open_workdir(workdir: pathlib.Path, config: ConfigDict) -> None:
  """Makes the workdir and writes config.json; caches compiled programs beside it."""
  workdir.mkdir(parents=True, exist_ok=True)
  file, text = workdir / "config.json", config.to_json_best_effort(indent=1)
  if (workdir / "checkpoints").is_dir() and file.exists():
    old, new = json.loads(file.read_text()), json.loads(text)
    differ = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
    differ = [k for k in differ if k not in FREE]
    if differ:
      raise ConfigError(
        f"{workdir} was begun with another config ({', '.join(differ)}); continue with "
        "the same, or give a new --workdir"
      )
  file.write_text(text + "\n")
  cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", workdir.parent / "compiled")
  jax.config.update("jax_compilation_cache_dir", str(cache))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
  parallel.initialize()
  metrics.count_compiles()  # from here on


@dataclasses.dataclass(frozen=True)
class Policy:
  """What can talk.  `params` is a pure dict, sharded over the mesh it was opened on."""

  config: model_config.ModelConfig
  codec: encode.Codec
  params: dict
  source: str  # where the parameters came from

  @property
  def config_json(self) -> dict:
    """The config.json of the model, stored beside every checkpoint."""
    return model_config.to_hf(self.config)


def open_policy(
  init: str, *, model: dict, codec: dict, mesh, seed: int, workdir: pathlib.Path
) -> Policy:
  """The policy of `init`, or a fresh one with the tiny tokenizer when `init` is empty.

  `model` and `codec` are the config sections: name, dtype, remat, ... and profile,
  budgets, ...  The tokenizer is copied into the workdir, so that every run can talk.
  """
  model = dict(model)
  name = model.pop("name")
  if init:
    root = pathlib.Path(init).expanduser().resolve()
    if not root.exists():
      raise ConfigError(
        f"config.init: {root} does not exist; give a workdir or what tools/convert.py "
        "wrote"
      )
    words = tokenizer.load(root / "tokenizer")
    extra = checkpoint.load_extra(root)
    config = model_config.from_hf(extra["model"])
  elif name == "tiny":
    words = tokenizer.make_tiny(workdir / "tokenizer", world.scaffolds())
    config = model_config.tiny(
      words.vocab_size,
      image_token=words.image_pad,
      video_token=words.video_pad,
      vision_start=words.vision_start,
      vision_end=words.vision_end,
      bos_token=words.endoftext,
      eos_token=words.im_end,
    )
  else:
    raise ConfigError(
      f"config.init is empty, and the {name} model has no tokenizer of its own; "
      "convert a checkpoint first: python tools/convert.py import --hf=DIR --out=DIR"
    )
  if not (workdir / "tokenizer").exists():
    # With what lies beside it: an export wants the processor's files too.
    shutil.copytree(root / "tokenizer", workdir / "tokenizer")
  config = call("model", dataclasses.replace, config, **model)
  abstract = qwen2_5_vl.abstract(config)
  shardings = parallel.shardings(mesh, hf.logical_axes(config), abstract)
  if init:
    params = checkpoint.load_params(root, abstract, shardings)[0]
  else:
    params = qwen2_5_vl.init(config, jax.random.key(seed), shardings)
  v = config.vision
  layout = dict(window=v.window, patch=v.patch, temporal=v.temporal, merge=v.merge)
  talk = call(
    "codec",
    encode.Codec,
    tokenizer=words,
    tokens_per_second=v.tokens_per_second,
    **layout,
    **codec,
  )
  return Policy(config, talk, params, init or "fresh")


def describe(config: ConfigDict, policy: Policy, mesh) -> None:
  """What a run logs before step 0."""
  sizes = [x.size for x in jax.tree.leaves(policy.params)]
  device = f"{jax.devices()[0].device_kind} x {jax.device_count()}"
  settings = json.dumps(json.loads(config.to_json_best_effort()))
  print(f"device   {device}, mesh {dict(mesh.shape)}")
  print(f"model    {sum(sizes):,} parameters in {len(sizes)} arrays of {policy.source}")
  print(f"config   {settings}")
