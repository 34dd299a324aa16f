"""`pixel-jax NAME`: its words, and the wheel in an environment that sees nothing else."""

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

from pixel_jax import __main__ as cli

ROOT = pathlib.Path(__file__).resolve().parent.parent


def run(*command, cwd, status=0):
  env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
  done = subprocess.run(
    [str(word) for word in command], cwd=cwd, env=env, capture_output=True, text=True,
    timeout=900,
  )  # fmt: skip
  assert done.returncode == status, done.stdout + done.stderr
  return done.stdout if status == 0 else done.stderr


def call(capsys, monkeypatch, *arguments):
  monkeypatch.setattr(sys, "argv", ["pixel-jax", *arguments])
  cli.main()
  return capsys.readouterr().out


def test_help_names_every_program_on_one_screen(capsys, monkeypatch):
  said = call(capsys, monkeypatch)
  assert said == call(capsys, monkeypatch, "--help")
  for name, module in cli.PROGRAMS.items():
    assert f"  {name} " in said
    shown = call(capsys, monkeypatch, name, "--help").splitlines()
    assert len(shown) <= 40 and max(map(len, shown)) <= 92, name
    assert any(f"pixel-jax {name}" in line for line in shown), module
  assert max(map(len, said.splitlines())) <= 92


def test_help_imports_nothing_heavy(tmp_path):
  code = (
    "import sys; from pixel_jax import __main__ as cli; "
    "sys.argv[1:] = ['rl', '--help']; cli.main(); "
    "print(sorted({'jax', 'numpy', 'absl'} & set(sys.modules)))"
  )
  assert run(sys.executable, "-c", code, cwd=tmp_path).splitlines()[-1] == "[]"


def test_a_reader_may_leave_early(tmp_path):
  read, write = os.pipe()
  os.close(read)
  command = [sys.executable, "-m", "pixel_jax", "--help"]
  done = subprocess.run(command, cwd=tmp_path, stdout=write, stderr=subprocess.PIPE)
  os.close(write)
  assert done.returncode == 0 and done.stderr == b""


def test_a_wrong_name_is_one_line(tmp_path):
  said = run(sys.executable, "-m", "pixel_jax", "sfft", cwd=tmp_path, status=2)
  assert said.startswith("error: ") and "did you mean sft?" in said
  assert len(said.splitlines()) == 1


def test_a_package_that_is_missing_is_named_with_its_extra(
  tmp_path, monkeypatch, capsys
):
  (tmp_path / "wants_torch.py").write_text("import torch")
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.setitem(cli.PROGRAMS, "bench", "wants_torch")
  monkeypatch.setitem(sys.modules, "torch", None)
  monkeypatch.setattr(sys, "argv", ["pixel-jax", "bench", "decode"])
  with pytest.raises(SystemExit) as end:
    cli.main()
  assert end.value.code == 2
  assert capsys.readouterr().err == (
    "error: pixel-jax bench needs torch: pip install 'pixel_jax[parity]'\n"
  )


def test_configs_lists_what_there_is(capsys, monkeypatch):
  said = call(capsys, monkeypatch, "configs")
  for word in ("sft", "rl", "evaluate", "synthesize", "base", "full", "v5p:4x4x4"):
    assert word in said


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
  """The folder of programs of a new environment that holds our wheel, and beside it the
  dependencies of this one, but neither the editable install nor the repository."""
  folder = tmp_path_factory.mktemp("wheel")
  pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
  source = folder / "source"  # a build leaves its modules beside the sources
  for name in ("pixel_jax", "configs", "tools"):
    shutil.copytree(
      ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__")
    )
  for name in ("pyproject.toml", "README.md"):
    shutil.copy(ROOT / name, source)
  run(*pip, "wheel", source, "--no-deps", "--wheel-dir", folder, cwd=folder)
  (wheel,) = folder.glob("*.whl")
  run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
  python = folder / "venv" / "bin" / "python"
  run(*pip, "--python", python, "install", "--no-deps", wheel, cwd=folder)
  where = run(
    python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder
  )
  # A line of a .pth file is a folder of modules; that folder's own .pth files, the
  # editable install among them, are not read.
  beside = pathlib.Path(where.strip()) / "dependencies.pth"
  beside.write_text(sysconfig.get_path("purelib") + "\n")
  return wheel, python.parent


def test_the_wheel_holds_every_module(installed):
  wheel, _ = installed
  held = set(zipfile.ZipFile(wheel).namelist())
  for folder, name in (
    ("pixel_jax", "pixel_jax"),
    ("configs", "pixel_jax/configs"),
    ("tools", "pixel_jax/tools"),
  ):
    for file in (ROOT / folder).rglob("*"):
      if file.is_file() and "__pycache__" not in file.parts:
        assert f"{name}/{file.relative_to(ROOT / folder)}" in held, file


def test_help_and_mistakes_from_an_empty_folder(installed, tmp_path):
  command = installed[1] / "pixel-jax"
  for name in cli.PROGRAMS:
    assert f"pixel-jax {name}" in run(command, name, "--help", cwd=tmp_path)
  assert "base" in run(command, "configs", cwd=tmp_path)
  wrong = ("sft", "--config=sfft:tiny", "--workdir=run")
  told = run(command, *wrong, cwd=tmp_path, status=2)
  assert "did you mean sft?" in told and len(told.splitlines()) == 1


@pytest.mark.slow
def test_training_from_an_empty_folder(installed, tmp_path):
  """A config of one's own elsewhere, from the shipped base, to a Hugging Face model."""
  command = installed[1] / "pixel-jax"
  mine = tmp_path / "elsewhere" / "mine.py"
  mine.parent.mkdir()
  mine.write_text(
    "from configs import common, sft\n"
    "def get_config(arg='tiny'):\n"
    "  c = sft.get_config('tiny')\n"
    "  assert c.model.to_dict() == common.model('tiny')\n"
    "  c.total_steps = int(arg)\n"
    "  return c\n"
  )
  empty = tmp_path / "empty"
  empty.mkdir()
  said = run(
    command, "sft", f"--config={mine}:1", "--workdir=run", "--config.init=tiny_base",
    "--config.optim.warmup_steps=0", cwd=empty,
  )  # fmt: skip
  assert "done: 1 steps" in said
  run(command, "convert", "export", "--checkpoint=run", "--out=hf", cwd=empty)
  assert (empty / "hf" / "model.safetensors").is_file()
