"""Every field of every config: what it may be is declared, and checked before a run."""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Len, Lt
from ml_collections import ConfigDict

from pixel_jax import evaluate, fields, train_rl, train_sft
from pixel_jax.configs import evaluate as evaluate_config
from pixel_jax.configs import rl, sft
from pixel_jax.configs import synthesize as synthesize_config
from pixel_jax.run import settings
from pixel_jax.tools import synthesize

PROGRAMS = {
  "sft": (sft, train_sft.SECTIONS, ("tiny", "tiny,base", "tiny,full", "7b,v5p:4x4x4")),
  "rl": (rl, train_rl.SECTIONS, ("tiny", "tiny,full", "7b", "7b,h200:1")),
  "evaluate": (evaluate_config, evaluate.SECTIONS, ("tiny", "7b", "7b,vstar")),
  "synthesize": (synthesize_config, synthesize.SECTIONS, ("tiny", "7b")),
}
PRESETS = [(name, arg) for name, (*_, args) in PROGRAMS.items() for arg in args]


def leaves(config, before=""):
  """Paths of all fields that are no section."""
  for key, value in config.items():
    if isinstance(value, ConfigDict):
      yield from leaves(value, f"{before}{key}.")
    else:
      yield before + key


def with_value(name, arg, path, value):
  c = PROGRAMS[name][0].get_config(arg)
  c.unlock()
  at = c
  *sections, field = path.split(".")
  for section in sections:
    at = at[section]
  with at.ignore_type():
    at[field] = value
  return c


def refused(name, arg, path, value) -> str:
  try:
    settings.check(with_value(name, arg, path, value), PROGRAMS[name][1])
  except settings.ConfigError as error:
    return str(error)
  return ""


# What a field may be beside what its preset says: 0 means "none", "off", "never" or "all",
# as the docstring of the function that takes it tells.
ZERO = {
  "seed", "seeds", "data.tasks", "eval.tasks", "save_every", "eval_every",
  "keep_trajectories_every", "chips",
  "lora.rank", "optim.warmup_steps", "optim.final_lr_ratio", "optim.b1", "optim.b2",
  "optim.weight_decay", "optim.clip_norm", "features.gib", "data.max_bad_share",
  "data.filter.min_tokens", "data.filter.max_tokens", "data.filter.min_pixels",
  "data.filter.max_pixels", "eval.batches", "synthesis.operation_share",
  "synthesis.jitter", "synthesis.edge_jitter", "synthesis.answer_weight",
  "engine.lag", "rollout.temperature", "rollout.top_k", "eval.rollout.temperature",
  "eval.rollout.top_k", "reward.alpha", "reward.beta",
  "reward.H", "reward.N", "loss.dual_clip", "loss.sampler_cap", "replay.alpha",
  "replay.keep_steps", "recipe.temperature", "teacher.requests_per_minute",
  "teacher.image_tokens", "mesh.data", "mesh.fsdp", "mesh.tensor",
}  # fmt: skip
# make_mesh takes -1 for the devices that are left, and refuses 0 and less itself.
MINUS_ONE = {"mesh.data", "mesh.fsdp", "mesh.tensor"}
# Free text: names, URIs, folders, dotted paths.
TEXT = {
  "init", "judge", "topology", "accelerator", "policies", "local", "data.uri",
  "data.root", "data.layout", "eval.uri", "teacher.model", "checkpoint.keep_best",
  "wandb.project", "wandb.entity", "wandb.name", "mlflow.uri", "mlflow.experiment",
  "mlflow.name",
}  # fmt: skip


@pytest.mark.parametrize("name, arg", PRESETS)
def test_every_field_of_a_preset_refuses_what_it_cannot_be(name, arg):
  config = PROGRAMS[name][0].get_config(arg)
  settings.check(config, PROGRAMS[name][1])
  for path in leaves(config):
    if path.startswith("compiler."):
      continue  # XLA's own flags, which XLA checks
    zero = path in ZERO or path.startswith(("synthesis.kinds.", "recipe.kinds."))
    taken = {
      -1: path in MINUS_ONE, 0: zero, math.nan: False, "no such word": path in TEXT,
      (object(),): False,
    }  # fmt: skip
    for value, fine in taken.items():
      told = refused(name, arg, path, value)
      assert (told == "") == fine, (path, value, told)
      section = ".".join(path.split(".")[:2])  # of budgets and kinds as a whole
      assert not told or told.startswith(f"config.{section}"), told
      assert not told or "expected" in told, told


def test_a_field_that_nobody_takes_is_told_with_the_nearest():
  c = with_value("rl", "tiny", "optim.lrr", 3)
  with pytest.raises(
    settings.ConfigError, match=r"optim.lrr .* mean config.optim.lr\?"
  ):
    settings.check(c, train_rl.SECTIONS)


def test_the_config_of_another_program_is_told():
  with pytest.raises(settings.ConfigError, match="no section 'features'.*another"):
    settings.check(rl.get_config("tiny"), train_sft.SECTIONS)


def test_a_message_names_what_got_allowed_and_near():
  told = refused("rl", "tiny", "rl.masked_stops", ("trns",))
  assert told == (
    "config.rl.masked_stops=('trns',): expected a tuple, each one of answer, turns, "
    "length, row; did you mean turns?"
  )
  told = refused("sft", "tiny", "optim.lr", -1)
  assert told == "config.optim.lr=-1.0: expected a number above 0"


@pytest.mark.parametrize(
  "hint, good, bad",
  [
    (int, [1, -3], [True, 1.0, "1", None]),
    (float, [1, 0.5], [True, math.nan, math.inf, "1"]),
    (bool, [True], [1, "True"]),
    (fields.Share, [0, 1, 0.5], [-0.1, 1.1]),
    (Annotated[int, Ge(0), Lt(3)], [0, 2], [3, -1]),
    (Literal["a", 0], ["a", 0], ["b", False, 0.0]),
    (Sequence[fields.PositiveInt], [(), (1,), [2, 3]], [(0,), 1, "12", {1}]),
    (Annotated[Sequence[int], Len(2, 2)], [(1, 2)], [(1,), (1, 2, 3)]),
    (Mapping[str, float], [{}, {"a": 1}], [{"a": "b"}, {1: 1.0}, ()]),
    (int | None, [None, 3], [0.5]),
    (Any, [object()], []),
  ],
)
def test_what_a_hint_allows(hint, good, bad):
  for value in good:
    assert fields.allows(hint, value) and not fields.refusal(hint, value), value
  for value in bad:
    assert not fields.allows(hint, value), value
    assert fields.refusal(hint, value).startswith("expected "), value


def test_a_checked_function_refuses_by_itself():
  @fields.checked
  def f(a, *, way: Literal["left", "right"], n: fields.PositiveInt = 1):
    return a, way, n

  assert f("anything", way="left") == ("anything", "left", 1)
  with pytest.raises(ValueError, match="way='lefd': .*left, right; did you mean left"):
    f(None, way="lefd")
  with pytest.raises(ValueError, match="n=0: expected a whole number above 0"):
    f(None, way="left", n=0)
