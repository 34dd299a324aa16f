"""Pixel Reasoner in JAX: every program under one name, from any folder.

pixel-jax NAME [arguments]        pixel-jax NAME --help
"""

import ast
import difflib
import importlib.util
import os
import pathlib
import runpy
import sys

PROGRAMS = {
  "sft": "pixel_jax.train_sft",
  "rl": "pixel_jax.train_rl",
  "evaluate": "pixel_jax.evaluate",
  "serve": "pixel_jax.serve",
  "demo": "pixel_jax.demo",
  "synthesize": "pixel_jax.tools.synthesize",
  "inspect": "pixel_jax.tools.inspect_data",
  "convert": "pixel_jax.tools.convert",
  "parity": "pixel_jax.tools.parity",
  "view": "pixel_jax.tools.view",
  "compare": "pixel_jax.tools.compare_runs",
  "trap": "pixel_jax.tools.trap",
  "bench": "pixel_jax.tools.bench.compare",
  "bench accelerator": "pixel_jax.tools.bench.accelerator",
  "compile-check": "pixel_jax.tools.compile.check",
  "configs": "pixel_jax.tools.configs",
}
# Packages that some programs need, and the extra that brings them.
EXTRAS = {
  "torch": "parity", "openai": "synthesis", "wandb": "wandb", "mlflow": "mlflow",
  "starlette": "serve", "uvicorn": "serve",
}  # fmt: skip


def main() -> None:
  """Runs the program that the first argument names, as `python -m` would run it."""
  name, *arguments = sys.argv[1:] or ["--help"]
  if (both := " ".join([name, *arguments[:1]])) in PROGRAMS:
    name, arguments = both, arguments[1:]
  if name in ("-h", "--help", "help"):
    width = max(len(name) for name in PROGRAMS if " " not in name)
    listed = [f"  {n:{width}}  {_docstring(m, 1)}" for n, m in PROGRAMS.items()]
    tell(__doc__, *listed)
  elif name not in PROGRAMS:
    near = difflib.get_close_matches(name, PROGRAMS, 1, cutoff=0.0)[0]
    known = ", ".join(PROGRAMS)
    print(
      f"error: pixel-jax {name} is unknown; did you mean {near}? Known: {known}",
      file=sys.stderr,
    )
    sys.exit(2)
  elif {"-h", "--help"} & set(arguments):
    tell(_docstring(PROGRAMS[name]))
  else:
    sys.argv = [f"pixel-jax {name}", *arguments]
    try:
      runpy.run_module(PROGRAMS[name], run_name="__main__", alter_sys=False)
    except ModuleNotFoundError as error:
      if error.name not in EXTRAS:
        raise
      print(
        f"error: pixel-jax {name} needs {error.name}: pip install "
        f"'pixel_jax[{EXTRAS[error.name]}]'",
        file=sys.stderr,
      )
      sys.exit(2)


def tell(*lines: str) -> None:
  try:
    print(*lines, sep="\n", flush=True)
  except BrokenPipeError:  # the reader, such as head, has seen enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _docstring(module: str, lines: int | None = None) -> str:
  """That of a module which is not imported: jax alone would take seconds."""
  source = pathlib.Path(importlib.util.find_spec(module).origin)
  text = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8")))
  return "\n".join(text.splitlines()[:lines])


if __name__ == "__main__":
  main()
