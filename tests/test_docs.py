"""Every command of README.md and docs/ is one that works: its program, flags and config.

Programs of ours are started as printed, in a folder that holds nothing, up to where they
have read their arguments; launchers are asked for their dry run.
"""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# A process for each would import jax each time, two seconds; so they are forks of one.
CHILD = """
import argparse, json, os, runpy, sys
from absl import app
from pixel_jax import __main__ as cli
from pixel_jax.run import start
from pixel_jax.rollout import fleet
from pixel_jax.tools.compile import table
parse_args = argparse.ArgumentParser.parse_args

def parsed(*args, **kwargs):
  parse_args(*args, **kwargs)
  os._exit(0)

def parse(main, flags_parser):
  flags_parser(sys.argv)
  os._exit(0)

def run(argv):
  if argv[0] == "pixel-jax":
    sys.argv = argv
    cli.main()
    os._exit(0 if argv[1] == "configs" else 9)
  assert argv[:2] == ["python", "-m"]
  sys.argv = argv[2:]
  runpy.run_module(argv[2], run_name="__main__")
  os._exit(9)  # it ended without having read its arguments

argparse.ArgumentParser.parse_args, app.run = parsed, parse
table.make = lambda *_: os._exit(0)
for argv in json.load(sys.stdin):
  read, write = os.pipe()
  pid = os.fork()
  if not pid:
    os.dup2(write, 1), os.dup2(write, 2)
    try:
      run(argv)
    except SystemExit as end:
      os._exit(end.code or 0)
    except BaseException as error:
      os.write(2, repr(error).encode())
    os._exit(8)
  os.close(write)
  said = os.fdopen(read).read()
  code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
  print(json.dumps([argv, code, said]), flush=True)
"""


def commands() -> list[str]:
  """Those of the code blocks: without comments and prompts, one of each choice."""
  found = []
  for page in PAGES:
    for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(), flags=re.M | re.S):
      for line in block.replace("\\\n", " ").splitlines():
        line = re.sub(r"(^\$ )|(\s+#.*)|(\s{4,}\S.*)|( &$)", "", line)
        if loop := re.fullmatch(r"for (\w+) in (\w+).*; do (.*); done", line):
          line = loop[3].replace(f"${loop[1]}", loop[2])
        line = re.sub(r"(?<=\w)(\|\w+)+", "", re.sub(r"[\[\]]", "", line)).strip()
        line = re.sub(r"\b[NK]$|\b[NK](?= )", "1", line)
        if re.match(r"pixel-jax |python |\./launch/|sbatch ", line):
          found.append(line)
  return sorted(set(found))


OURS = [c for c in commands() if c.startswith(("pixel-jax", "python -m"))]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
  """What each of our commands said, and its exit code."""
  asked = json.dumps(
    [shlex.split(c) for c in [*OURS, "pixel-jax sft --config=sft:tinny"]]
  )
  env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
  done = subprocess.run(
    [sys.executable, "-c", CHILD], cwd=tmp_path_factory.mktemp("empty"), env=env,
    input=asked, capture_output=True, text=True, timeout=900,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  rows = map(json.loads, done.stdout.splitlines())
  return {shlex.join(argv): (code, said) for argv, code, said in rows}


def test_there_are_commands_on_every_page_that_has_some():
  assert len(OURS) > 25
  assert {c.split()[1] for c in OURS if c.startswith("pixel-jax")} >= {
    "sft", "rl", "evaluate", "synthesize", "inspect", "convert", "parity", "view",
    "trap", "bench", "compile-check", "configs", "serve", "compare",
  }  # fmt: skip


@pytest.mark.parametrize("command", OURS)
def test_a_program_takes_what_is_printed(command, answers):
  code, said = answers[shlex.join(shlex.split(command))]
  if "No module named 'torch'" in said:
    pytest.skip("needs torch: ./launch/test.sh --all")
  assert code == 0, said


def test_a_wrong_one_would_be_noticed(answers):
  code, said = answers["pixel-jax sft --config=sft:tinny"]
  assert code == 2 and "tinny" in said


@pytest.mark.parametrize("command", [c for c in commands() if c not in OURS])
def test_a_script_takes_what_is_printed(command):
  words = shlex.split(command)
  words = words[1:] if words[0] in ("python", "sbatch") else words
  script = ROOT / words[0]
  assert script.is_file(), script
  if script.suffix == ".py":
    return
  assert os.access(script, os.X_OK)
  # They have no dry run: their help has the flags.
  if script.stem in ("local", "test", "accelerator"):
    shown = subprocess.run(
      [script, "--help"], capture_output=True, text=True, timeout=600
    )
    assert shown.returncode == 0
    for flag in re.findall(r"--[a-z]+", command):
      assert flag in shown.stdout, flag
    return
  rest = [w for w in words[1:] if w != "--dry-run"]
  shown = subprocess.run(
    [script, "--dry-run", *rest], capture_output=True, text=True, timeout=600,
    env=os.environ | {"HOME": "/nowhere"},
  )  # fmt: skip
  assert shown.returncode == 0, shown.stderr


def test_pages_name_no_file_that_is_missing():
  for page in PAGES:
    named = re.findall(
      r"[`(]((?:pixel_jax|tools|configs|launch|docs|tests)/[\w/.-]+)[`)]",
      page.read_text(),
    )
    for path in named:
      assert (ROOT / path).exists(), f"{page.name}: {path}"
