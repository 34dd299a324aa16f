"""A mistake in a config is told with the full path of the field, and the nearest one."""

import sys

import ml_collections
import pytest
from absl import flags

from pixel_jax.run import settings, start

CONFIG = ml_collections.ConfigDict(
  {"n": 1, "optim": {"lr": 0.1, "clip_norm": 1.0}, "mesh": {"data": 1, "fsdp": 1}}
)
KNOWN = settings.paths(CONFIG)


def test_paths_are_those_of_fields_and_sections():
  assert list(KNOWN) == sorted(KNOWN, key=list(KNOWN).index)
  assert {"n", "optim", "optim.lr", "mesh.fsdp"} <= KNOWN.keys()
  assert KNOWN["optim.lr"] == 0.1


@pytest.mark.parametrize(
  "path, told",
  [
    ("optim.lrr", "did you mean config.optim.lr?"),
    ("lr", "did you mean config.optim.lr?"),
    ("optim.clipnorm", "did you mean config.optim.clip_norm?"),
    ("optin.lr", "did you mean config.optim.lr?"),
    ("mesh.zzz", "the fields of config.mesh are data, fsdp"),
    ("zzz", "the fields of the config are mesh, n, optim"),
    ("nothing.zzz", "the fields of config.nothing are none"),
  ],
)
def test_an_unknown_field_is_told_with_the_nearest(path, told):
  said = settings.unknown(path, KNOWN)
  assert said.startswith(f"config.{path} does not exist; ") and told in said


def test_differences_are_told_with_both_values():
  other = {"n": 1, "optim": {"lr": 0.2, "clip_norm": 1.0}, "mesh": 3}
  found = settings.differences(CONFIG.to_dict(), other)
  assert found["optim.lr"] == "config.optim.lr was 0.1 and is 0.2"
  assert set(found) == {"optim.lr", "mesh"}


@pytest.mark.parametrize(
  "step, every, last, want",
  [(4, 2, 9, True), (3, 2, 9, False), (9, 2, 9, True), (9, 0, 9, False), (3, 2, 0, False)],
)  # fmt: skip
def test_what_is_due(step, every, last, want):
  assert settings.due(step, every, last) == want


def parsed(*arguments):
  """What an entry point would say of its arguments."""
  argv = ["program", *arguments]
  sys.argv = list(argv)
  flags.FLAGS.unparse_flags()
  try:
    flags.FLAGS(settings.with_config_path(argv))
    return start.CONFIG.value
  except Exception as error:
    return settings.named(error, argv)


@pytest.mark.parametrize(
  "words, told",
  [
    (["--config=sft:tiny", "--config.optim.lrr=3"], "mean config.optim.lr?"),
    (["--config", "sft:tiny", "--config.lr=3"], "mean config.optim.lr?"),
    (["--config=sft:tiny", "--config.optim.lr=abc"], "a value of the type float"),
    (["--config=sfft:tiny"], "did you mean sft?"),
  ],
)
def test_a_command_with_a_mistake(words, told, monkeypatch):
  monkeypatch.setattr(sys, "argv", sys.argv)
  error = parsed(*words)
  assert isinstance(error, Exception) and told in str(settings.innermost(error))


def test_a_config_beside_the_package_is_found(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for word in ("rl:7b", "configs/rl.py:7b"):
    (found,) = settings.with_config_path([f"--config={word}"])
    assert found.endswith("configs/rl.py:7b") and found.startswith("--config=/")
  (tmp_path / "mine.py").write_text("")
  argv = ["--config=mine.py:x", "--workdir=w"]
  assert settings.with_config_path(argv) == argv
