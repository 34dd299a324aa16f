"""Settings: a mistake in them is told in one line, before anything compiles.

Config files are found beside the package (`--config=rl:7b`), and each section of a config
is the keyword arguments of one function, which refuses what it cannot take.
"""

import difflib
import importlib
import importlib.util
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypedDict

from absl import flags
from ml_collections import ConfigDict

from pixel_jax import fields
from pixel_jax.fields import NonNegativeInt, PositiveInt, Seed


class ConfigError(ValueError):
  """A mistake in the config or the command, told in one line."""


def imported(field: str, path: str) -> Any:
  """What a dotted path in a config names: "my_rewards.brevity", None for "".

  The current folder is looked in, too.  ConfigError tells the field.
  """
  if not path:
    return None
  module, _, name = path.rpartition(".")
  if os.getcwd() not in sys.path:
    sys.path.append(os.getcwd())
  try:
    return getattr(importlib.import_module(module), name)
  except (ImportError, AttributeError, ValueError) as error:
    raise ConfigError(
      f"config.{field}={path!r}: {error}; give MODULE.NAME of a module that can be "
      f"imported, or that lies in {os.getcwd()}"
    ) from error


# ---- What every field may be ----------------------------------------------------------


class Run(TypedDict, total=False):
  """The fields of a training config outside of its sections; 0 steps mean never."""

  seed: Seed
  total_steps: PositiveInt
  save_every: NonNegativeInt
  eval_every: NonNegativeInt
  keep_trajectories_every: NonNegativeInt
  micro_batches: PositiveInt
  init: str
  judge: str
  compiler: Mapping[str, Any]  # flags of XLA
  topology: str
  accelerator: str
  chips: NonNegativeInt


class Named(TypedDict):
  """What a config names by dotted path, and a function takes as an object."""

  layout: str  # of data
  operations: Sequence[str]  # of codec


class Model(TypedDict):
  name: Literal["tiny", "3b", "7b", "32b", "72b"]


class Adapters(TypedDict):
  rank: NonNegativeInt  # 0 = none


def check(config: ConfigDict, sections: Mapping[str, Sequence[Callable]]) -> None:
  """Refuses what the functions that take the sections of a config do not allow.

  Args:
    sections: what takes the fields of each section, "" of those outside of any: functions
      and classes, whose hints say what is allowed.  The hint of a later one counts.
  """
  wrong, known = [], {}
  for section, takers in sections.items():
    held = config
    for part in section.split(".") if section else ():
      held = held.get(part) if isinstance(held, ConfigDict) else None
    if not isinstance(held, ConfigDict):
      raise ConfigError(
        f"the config has no section {section!r}, which this program reads; is it the "
        "config of another one? pixel-jax configs lists them"
      )
    allowed = {k: h for taker in takers for k, h in fields.hints(taker).items()}
    for name, value in held.items():
      path = f"{section}.{name}" if section else name
      if path in sections:
        continue
      if name not in allowed:
        known |= {k: None for k in (f"{section}.{a}".strip(".") for a in allowed)}
        wrong.append(unknown(path, known))
        continue
      value = value.to_dict() if isinstance(value, ConfigDict) else value
      if why := fields.refusal(allowed[name], value):
        usual = preset().get(path, value)
        if usual != value and "did you mean" not in why:
          why += f"; the config file has {usual!r}"
        wrong.append(f"config.{path}={value!r}: {why}")
  if wrong:
    raise ConfigError("; ".join(wrong[:3]))


def preset() -> dict[str, Any]:
  """Fields of the config file of this program without overrides; {} where there is none."""
  words, given = list(sys.argv), list(sys.argv)
  try:
    files = [w for w in with_config_path(words) if w.startswith("--config=")]
    sys.argv = [words[0], files[-1]]  # config_flags looks there, too
    flags.FLAGS(sys.argv)
    return paths(flags.FLAGS["config"].value)
  except Exception:
    return {}
  finally:
    sys.argv = given


def due(step: int, every: int, last: int = 0) -> bool:
  """Whether what happens every so many steps, and after the last, happens after `step`.

  0 steps means never.
  """
  return every > 0 and (step % every == 0 or step == last)


def call(section: str, function, *args, **kwargs):
  """Calls `function` with a config section; what it refuses is a `ConfigError`."""
  try:
    return function(*args, **kwargs)
  except (TypeError, ValueError) as error:
    if isinstance(error, TypeError) and "argument" not in str(error):
      raise
    raise ConfigError(f"config.{section}: {error}") from error


def frozen(config: ConfigDict) -> tuple[str, ...]:
  """What is not trained: `optim.freeze`, or with LoRA all but the adapters."""
  return (r"(?<!/lora_[ab])$",) if config.lora.rank else tuple(config.optim.freeze)


def of_data(config: ConfigDict) -> dict[str, Any]:
  """The section `data` with the function that its `layout` names."""
  return {**config.data, "layout": imported("data.layout", config.data.layout)}


def of_optim(config: ConfigDict, updates: int) -> tuple[dict[str, Any], int]:
  """The settings of `optim.make` for a run of so many updates, and `max_nonfinite`."""
  tuned = {**config.optim, "freeze": frozen(config), "total_steps": updates}
  return tuned, tuned.pop("max_nonfinite")


def with_config_path(argv: list[str]) -> list[str]:
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
      out[i - 1 : i + 1] = ["", "--config=" + locate(word)]
  return [word for word in out if word]


def named(error: Exception, argv: list[str]) -> Exception:
  """A mistake in an override told with its full path, and the nearest that exists."""
  if isinstance(error, ConfigError):
    return error
  words = [w.removeprefix("--").partition("=") for w in argv]
  overrides = [(k, v) for k, _, v in words if k.startswith("config.")]
  known = preset() if overrides else {}
  if not known:
    return error
  for field, value in overrides:
    if field.removeprefix("config.") not in known:
      return ConfigError(unknown(field.removeprefix("config."), known))
    if f"--{field}={value}:" in str(error):
      kind = type(known[field.removeprefix("config.")]).__name__
      return ConfigError(f"{field}={value}: expected a value of the type {kind}")
  return error


def paths(config: ConfigDict, before: str = "") -> dict[str, Any]:
  """Every field and section of a config by its path, "optim.lr"."""
  found = {}
  for key, value in config.items():
    found[before + key] = value
    if isinstance(value, ConfigDict):
      found |= paths(value, f"{before}{key}.")
  return found


def differences(old: Mapping, new: Mapping, before: str = "") -> dict[str, str]:
  """Fields whose values differ, by path, each as "config.optim.lr was 0.1 and is 0.2"."""
  found = {}
  for key in sorted(old.keys() | new.keys()):
    a, b = old.get(key), new.get(key)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
      found |= differences(a, b, f"{before}{key}.")
    elif a != b:
      found[before + key] = f"config.{before}{key} was {a!r} and is {b!r}"
  return found


def unknown(path: str, known: Mapping[str, Any]) -> str:
  """What to say of a field that does not exist: the nearest one, or those beside it."""
  section, _, name = path.rpartition(".")
  beside = [k for k in known if k.rpartition(".")[0] == section]
  same = [k for k in known if k.rpartition(".")[2] == name]
  near = difflib.get_close_matches(path, beside, 1, cutoff=0.75) or same
  near = near or difflib.get_close_matches(path, known, 1, cutoff=0.75)
  if near:
    return f"config.{path} does not exist; did you mean config.{near[0]}?"
  names = ", ".join(k.rpartition(".")[2] for k in beside)
  where = f"config.{section}" if section else "the config"
  return f"config.{path} does not exist; the fields of {where} are {names or 'none'}"


def innermost(error: Exception) -> object:
  """What was first said: ml_collections wraps errors, and a KeyError quotes its text."""
  text: object = error
  while isinstance(text, AttributeError | KeyError) and text.args:
    text = text.args[0]
  return text
