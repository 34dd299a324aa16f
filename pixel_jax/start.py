"""How every entry point starts: flags, workdir, policy.  Nothing else reads a config.

A *policy* is what can talk: the model's config, its parameters, its tokenizer and the
codec (prompt profile, pixel budgets).  It comes from a workdir, a converted checkpoint or
a Hugging Face folder, or fresh from a preset.
"""

import dataclasses
import difflib
import importlib
import importlib.util
import json
import os
import pathlib
import sys
import tempfile
import traceback
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from pixel_jax import bucket, checkpoint, metrics, optim, parallel
from pixel_jax.chat import encode, tokenizer
from pixel_jax.data import pipeline, sources, world
from pixel_jax.model import config as model_config
from pixel_jax.model import hf, lora, qwen2_5_vl, table

CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives; again = go on.")


# The base of the tiny world that ships with the package; README.md says how it was made.
TINY_BASE = pathlib.Path(__file__).resolve().parent / "data" / "tiny_base"

# What may change when a run goes on: nothing that a step depends on.
FREE = ("total_steps", "save_every", "eval_every", "keep_trajectories_every")


class ConfigError(ValueError):
  """A mistake in the config or the command, told in one line."""


def run(main, needs_workdir: bool = True) -> None:
  """Runs `main(config, workdir)`; a wrong flag is one line on stderr and exit code 2.

  Without `needs_workdir` it is `main(config)`.
  """

  def parse(argv):
    if {"-h", "--help"} & set(argv):
      print(sys.modules[main.__module__].__doc__)
      sys.exit()
    try:
      argv = flags.FLAGS(_with_config_path(argv))
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
      stop(_named(e, sys.argv))

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
      else:
        main(CONFIG.value)
    except (
      ConfigError,
      bucket.BucketError,
      checkpoint.CheckpointError,
      pipeline.DataError,
      sources.SourceError,
      tokenizer.TokenizerError,
    ) as error:
      stop(error)
    except BaseException:
      if not jax.distributed.is_initialized():
        raise
      # The usual end would wait for the others, which wait for this process.
      traceback.print_exc()
      _leave(1)

  app.run(start, flags_parser=parse)


def _with_config_path(argv: list[str]) -> list[str]:
  """`--config=rl:7b` and `--config=configs/rl.py:7b` name the installed file where there
  is none in the current folder; any config may import `configs.common`."""
  installed = importlib.import_module("pixel_jax.configs")
  try:
    importable = importlib.util.find_spec("configs.common")
  except ModuleNotFoundError:
    importable = None
  if importable is None:
    sys.modules["configs"] = installed

  def locate(value: str) -> str:
    path, colon, arg = value.partition(":")
    name = path.removeprefix("configs/").removesuffix(".py")
    if not pathlib.Path(path).is_file():
      if name not in installed.NAMES:
        near = difflib.get_close_matches(name, installed.NAMES, 1, cutoff=0.0)[0]
        raise ConfigError(
          f"--config={value}: there is no file {path}; did you mean {near}? The "
          f"installed ones are {', '.join(installed.NAMES)}"
        )
      path = str(pathlib.Path(installed.__path__[0]) / f"{name}.py")
    return path + colon + arg

  out = list(argv)
  for i, word in enumerate(argv):
    if word.startswith(("--config=", "-config=")):
      out[i] = "--config=" + locate(word.partition("=")[2])
    elif i and argv[i - 1] in ("--config", "-config"):
      out[i] = locate(word)
  return out


def _named(error: Exception, argv: list[str]) -> Exception:
  """ml_collections says only the last word of a key that resembles no other."""
  key = str(_inner(error)).strip("'\"")
  words = (w.removeprefix("--").partition("=")[0] for w in argv)
  field = next(
    (w for w in words if w.startswith("config.") and key in w.split(".")), ""
  )
  if not key.isidentifier() or not field:
    return error
  file = next((w for w in argv if w.startswith("--config=")), "--config")
  return ConfigError(f"{field}: {key!r} is unknown and near no field of {file}")


def _inner(error: Exception) -> object:
  """What was first said: ml_collections wraps errors, and a KeyError quotes its text."""
  text: object = error
  while isinstance(text, AttributeError | KeyError) and text.args:
    text = text.args[0]
  return text


def stop(error: Exception) -> None:
  lines = str(_inner(error)).strip().splitlines()
  if any("Traceback" in line for line in lines):  # of a config file that refused
    lines = lines[-1:]
  print("error:", " ".join(lines), file=sys.stderr)
  if jax.distributed.is_initialized():
    _leave(2)
  sys.exit(2)


def _leave(code: int) -> None:
  """Ends this process at once; the others miss its heartbeat and stop, too."""
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


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
  parallel.initialize()
  workdir.mkdir(parents=True, exist_ok=True)
  file, text = workdir / "config.json", config.to_json_best_effort(indent=1)
  lasting = bucket.behind(workdir)
  if (lasting / "checkpoints").is_dir() and file.exists():
    old, new = json.loads(file.read_text()), json.loads(text)
    differ = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
    differ = [k for k in differ if k not in FREE]
    if differ:
      raise ConfigError(
        f"{lasting} was begun with another config ({', '.join(differ)}); continue with "
        "the same, or give a new --workdir"
      )
  parallel.barrier("config")  # nobody reads what is being written
  if _writes(workdir):
    file.write_text(text + "\n")
  cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", lasting.parent / "compiled")
  jax.config.update("jax_compilation_cache_dir", str(cache))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
  metrics.count_compiles()  # from here on


@dataclasses.dataclass(frozen=True)
class Policy:
  """What can talk.  `params` is a pure dict, sharded over the mesh it was opened on."""

  config: model_config.ModelConfig
  codec: encode.Codec
  params: dict
  source: str  # where the parameters came from
  base: str | None = None  # the Hugging Face folder they were first imported from

  @property
  def extra(self) -> dict:
    """Stored beside every checkpoint: what it takes to open it without a config."""
    adapters = self.config.lora
    return {
      "model": model_config.to_hf(self.config),
      "lora": dataclasses.asdict(adapters) if adapters else None,
      "hf": self.base,
    }


def open_run(
  config: ConfigDict, workdir: pathlib.Path
) -> tuple[jax.sharding.Mesh, Policy]:
  """What a training run begins with: its workdir, its mesh and the policy to train."""
  open_workdir(workdir, config)
  mesh = call("mesh", parallel.make_mesh, **config.mesh)
  policy = open_policy(
    config.init,
    model=config.model,
    codec=config.codec,
    mesh=mesh,
    seed=config.seed,
    workdir=workdir,
    adapters=config.lora,
  )
  return mesh, policy


def open_policy(
  init: str,
  *,
  model: dict,
  codec: dict,
  mesh,
  seed: int,
  workdir: pathlib.Path,
  adapters: dict | None = None,
) -> Policy:
  """The policy of `init`, or a fresh one with the tiny tokenizer when `init` is empty.

  `init` is what `find` understands: a workdir, a converted checkpoint, an HF folder.
  `model`, `codec` and `adapters` (`config.lora`) are the config sections: name, dtype,
  remat, ..., profile, budgets, ... and rank, alpha, targets.  The tokenizer is copied
  into the workdir, so that every run can talk.

  Args:
    adapters: rank > 0 trains those of `init`, or new ones where it has none; rank 0
      trains the whole model, those of `init` merged into it.  None = nothing is
      trained: they are merged too, and the weights may be bfloat16.
  """
  model = dict(model)
  name = model.pop("name")
  asked, extra = None, {}
  if adapters and adapters["rank"]:
    asked = call("lora", lora.Config, **adapters)
  if init:
    root = find(init)
    if not root.is_dir():
      raise ConfigError(
        f"config.init: {root} does not exist; give a workdir, a Hugging Face folder or "
        "what `pixel-jax convert` wrote"
      )
    words = _load_tokenizer(_words_of(root))
    if hf.is_checkpoint(root):
      extra = {"model": hf.read_config(root), "hf": str(root)}
    else:
      extra = checkpoint.load_extra(root)
    config = call("init", model_config.from_hf, extra["model"])
  elif name == "tiny":
    if _writes(workdir):
      tokenizer.make_tiny(workdir / "tokenizer", world.scaffolds())
    parallel.barrier("tokenizer")
    words = tokenizer.load(workdir / "tokenizer")
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
      "convert a checkpoint first: pixel-jax convert import --hf=DIR --out=DIR"
    )
  if _writes(workdir) and not (workdir / "tokenizer").exists():
    # With what lies beside it: an export wants the processor's files too.
    if hf.is_checkpoint(root):
      hf.copy_companions(root, workdir / "tokenizer")
    else:
      bucket.fetch(root / "tokenizer", workdir / "tokenizer")
  config = call("model", dataclasses.replace, config, **model, lora=asked)
  call("lora", table.adapted, config)  # a target that matches nothing is told now
  if init:
    found = extra.get("lora") and lora.Config(**extra["lora"])
    whole = adapters is not None and asked is None
    params = load(root, config, found, mesh=mesh, seed=seed, whole=whole)
  else:
    params = qwen2_5_vl.init(config, jax.random.key(seed), layout(config, mesh))
  talk = make_codec(words, codec, config.vision)
  return Policy(config, talk, params, init or "fresh", extra.get("hf"))


def make_codec(
  words: tokenizer.Tokenizer,
  section: Mapping[str, Any],
  vision: model_config.VisionConfig | None = None,
) -> encode.Codec:
  """A tokenizer, `config.codec` and how a model cuts pictures; None = as Qwen's."""
  v = vision or model_config.VisionConfig()
  names = ("window", "patch", "temporal", "merge", "tokens_per_second")
  cut = {name: getattr(v, name) for name in names}
  return call("codec", encode.Codec, tokenizer=words, **cut, **section)


def open_codec(
  root: str | pathlib.Path, section: Mapping[str, Any] | None = None
) -> encode.Codec:
  """That of a workdir, a converted checkpoint or a Hugging Face folder.

  Args:
    section: a `config.codec`; None = that of the workdir, else the released budgets.
  """
  root = pathlib.Path(find(root))
  words, vision = tokenizer.load(_words_of(root)), None
  if section is None:
    section = {}
    if (root / "config.json").is_file():
      config = json.loads((root / "config.json").read_text(encoding="utf-8"))
      section = config.get("codec", {})
    if "budgets" in section:
      section["budgets"] = {k: tuple(v) for k, v in section["budgets"].items()}
  if hf.is_checkpoint(root):
    vision = model_config.from_hf(hf.read_config(root)).vision
  elif (root / checkpoint.PARAMS).is_dir() or (root / "checkpoints").is_dir():
    vision = model_config.from_hf(checkpoint.load_extra(root)["model"]).vision
  return make_codec(words, section, vision)


def find(init: str | pathlib.Path) -> bucket.Folder:
  """The folder that `config.init` names; "tiny_base" is the one in the package."""
  return TINY_BASE if init == "tiny_base" else bucket.behind(init)


def _words_of(root: bucket.Folder) -> bucket.Folder:
  """Where the tokenizer of a policy lies."""
  return root if hf.is_checkpoint(root) else root / "tokenizer"


def _writes(workdir: pathlib.Path) -> bool:
  """Whether this process writes what is the same for all: the first does.  Of a workdir
  in a bucket each has a local folder of its own."""
  return jax.process_index() == 0 or not bucket.is_shared(workdir)


def _load_tokenizer(folder: bucket.Folder) -> tokenizer.Tokenizer:
  if isinstance(folder, pathlib.Path):
    return tokenizer.load(folder)
  with tempfile.TemporaryDirectory() as local:  # transformers reads local files
    bucket.fetch(folder, pathlib.Path(local) / "tokenizer")
    return tokenizer.load(pathlib.Path(local) / "tokenizer")


def load(
  root: bucket.Folder,
  config: model_config.ModelConfig,
  found: lora.Config | None,
  *,
  mesh,
  seed: int,
  whole: bool,
) -> dict:
  """The parameters at `root` as those of `config`: adapters kept, merged or added.

  Args:
    found: the adapters that are stored there.
    whole: every weight is to be trained, so all must be f32; else bfloat16 ones stay so.
      Those of a Hugging Face folder become f32.
  """
  stored = dataclasses.replace(config, lora=found)
  if found and config.lora:
    same = table.adapted(stored) == table.adapted(config)
    if not same or (found.rank, found.alpha) != (config.lora.rank, config.lora.alpha):
      raise ConfigError(
        f"config.lora: {root} has adapters of rank={found.rank}, alpha={found.alpha}, "
        f"targets={found.targets}; go on with the same, or merge them first: "
        "pixel-jax convert export, then import"
      )
  if hf.is_checkpoint(root):
    half = not whole and hf.read_config(root).get("torch_dtype") == "bfloat16"
    dtype = "bfloat16" if half else "float32"
    there = layout(stored, mesh)
    params = call("init", hf.import_checkpoint, root, stored, there, dtype)
  else:
    want = table.unnest(qwen2_5_vl.abstract(stored))
    if not whole:
      have = table.unnest(checkpoint.stored(root))
      for path in want.keys() & have.keys():
        if have[path].dtype == jnp.bfloat16 and not lora.is_adapter(path):
          want[path] = want[path].update(dtype=jnp.bfloat16)
    params = checkpoint.load_params(root, table.nest(want), layout(stored, mesh))[0]
  if found and not config.lora:
    return qwen2_5_vl.merge(stored, params)
  if config.lora and not found:
    return qwen2_5_vl.adapt(config, params, jax.random.key(seed), layout(config, mesh))
  return params


def layout(config: model_config.ModelConfig, mesh) -> dict:
  """Where the parameters lie: a tree of shardings."""
  abstract = qwen2_5_vl.abstract(config)
  return parallel.shardings(mesh, hf.logical_axes(config), abstract)


def frozen(config: ConfigDict) -> tuple[str, ...]:
  """What is not trained: `optim.freeze`, or with LoRA all but the adapters."""
  return (r"(?<!/lora_[ab])$",) if config.lora.rank else tuple(config.optim.freeze)


def describe(config: ConfigDict, policy: Policy, mesh) -> None:
  """What a run logs before step 0."""
  sizes = [x.size for x in jax.tree.leaves(policy.params)]
  trained = jax.tree.leaves(optim.split(policy.params, frozen(config))[0])
  device = f"{jax.devices()[0].device_kind} x {jax.device_count()}"
  if jax.process_count() > 1:
    device += f" of {jax.process_count()} processes"
  settings = json.dumps(json.loads(config.to_json_best_effort()))
  metrics.say(f"device   {device}, mesh {dict(mesh.shape)}")
  metrics.say(
    f"model    {sum(sizes):,} parameters in {len(sizes)} arrays of {policy.source}, "
    f"{sum(x.size for x in trained):,} of them trained"
  )
  metrics.say(f"config   {settings}")
