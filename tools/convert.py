"""Hugging Face checkpoints to ours and back.

  pixel-jax convert import --hf=DIR --out=DIR [--dtype=float32|bfloat16]
  pixel-jax convert import --checkpoint=DIR --adapter=DIR --out=DIR
  pixel-jax convert export --checkpoint=DIR --out=DIR [--scores=EVAL]
    [--dtype=bfloat16|float32]
  pixel-jax convert export --checkpoint=DIR --adapter --out=DIR

What import writes is what `--config.init=DIR` takes: params/ (orbax), extra.json and
tokenizer/.  Training every weight wants float32, which holds a bfloat16 file exactly;
under LoRA the base may be bfloat16.  Export takes that, or the workdir of a run (its
newest step), and writes a folder that transformers and vLLM load, adapters merged, with a
model card: what the runs behind it were, and its rows of the evaluation in EVAL.

--adapter is PEFT's layout: a folder to put on the imported model, or on a checkpoint
of ours; on export, write only the adapters.
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import shutil
import sys
from collections.abc import Iterator

import jax
from tqdm import tqdm

from pixel_jax import parallel
from pixel_jax.model import config as model_config
from pixel_jax.model import hf, lora, peft, qwen2_5_vl, table
from pixel_jax.run import checkpoint, policies
from pixel_jax.tools import card


def import_hf(source: str, out: str, dtype: str, adapter: str | None = None) -> None:
  """An HF folder -> a checkpoint of ours, sharded over all devices on the way."""
  source = _folder(source)
  described = hf.read_config(source)
  config = model_config.from_hf(described)
  with _whole(out) as folder:
    with _Bar("import") as progress:
      params = hf.import_checkpoint(source, config, _mesh(config), dtype, progress)
    extra = {"model": described, "hf": str(source)}
    _finish(folder, config, params, extra, source, adapter)


def adapt(source: str, out: str, adapter: str) -> None:
  """A checkpoint of ours without adapters -> the same with those of a PEFT folder."""
  source = _folder(source)
  extra = checkpoint.load_extra(source)
  if extra.get("lora"):
    raise ValueError(
      f"{source} has adapters already; export it (they are merged), import that, and "
      "put the others on it."
    )
  config = model_config.from_hf(extra["model"])
  with _whole(out) as folder:
    params, _ = checkpoint.load_params(source, None, _spread(config))
    _finish(folder, config, params, extra, source / "tokenizer", adapter)


def _finish(out, config, params, extra, companions, adapter) -> None:
  if adapter:
    adapters, leaves = peft.read(_folder(adapter), config, _spread)
    extra = extra | {"lora": dataclasses.asdict(adapters)}
    params = table.nest(table.unnest(params) | table.unnest(leaves))
  print("writing ...")
  checkpoint.save_params(out, params, extra)
  copied = hf.copy_companions(companions, out / "tokenizer")
  print(f"{_size(params)}: params/, extra.json, tokenizer/ ({copied} files)")
  words = out / "tokenizer"
  two = all((words / name).is_file() for name in ("vocab.json", "merges.txt"))
  if not two and not (words / "tokenizer.json").is_file():
    print(
      f"{companions} has no tokenizer.json, nor vocab.json and merges.txt: add them to "
      "tokenizer/ before a run"
    )


def export_hf(
  source: str, out: str, dtype: str | None, adapter: bool = False, scores: str = ""
) -> None:
  """A checkpoint of ours, or a workdir -> an HF folder, or a PEFT folder."""
  source = _folder(source)
  extra = checkpoint.load_extra(source)
  rows = card.scores(source, _folder(scores)) if scores else []
  name = pathlib.Path(out).expanduser().resolve().name
  text = card.card(source, extra, name=name, rows=rows, adapter=adapter)
  found = extra.get("lora") and lora.Config(**extra["lora"])
  config = model_config.from_hf(extra["model"], lora=found)
  with _whole(out) as folder:
    (folder / "README.md").write_text(text, encoding="utf-8")
    print("reading ...")
    params, _ = checkpoint.load_params(source, None, _spread(config))
    if adapter:
      base = extra.get("hf")
      peft.write(config, params, folder, base=base, dtype=dtype or "float32")
      print("adapter_config.json, adapter_model.safetensors, README.md")
      return
    dtype = dtype or "bfloat16"
    with _Bar("export") as progress:
      hf.export_checkpoint(config, params, folder, dtype, progress=progress)
    copied = hf.copy_companions(policies.run_of(source) / "tokenizer", folder)
    if codec := policies.read_codec(source):
      text = json.dumps({"codec": codec}, indent=1) + "\n"
      (folder / policies.OURS).write_text(text)
    print(
      f"{_size(params)}: config.json, *.safetensors, README.md and {copied} more files"
    )


def _spread(config: model_config.ModelConfig):
  """None on one device, which `load_params` takes for all; else over all of them."""
  return None if jax.device_count() == 1 else _mesh(config)


def _mesh(config: model_config.ModelConfig):
  mesh = parallel.make_mesh(data=1, fsdp=-1)
  return parallel.shardings(mesh, hf.logical_axes(config), qwen2_5_vl.abstract(config))


def _folder(path: str) -> pathlib.Path:
  folder = pathlib.Path(path).expanduser().resolve()
  if not folder.is_dir():
    raise FileNotFoundError(f"{folder} is not a folder; give one that exists.")
  return folder


@contextlib.contextmanager
def _whole(path: str) -> Iterator[pathlib.Path]:
  """A folder to write into, which is --out once all of it is there, and gone before."""
  out = pathlib.Path(path).expanduser().resolve()
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise FileExistsError(f"--out={out} is not empty; give a new folder.")
  partial = out.with_name(out.name + ".partial")
  shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
  partial.mkdir(parents=True)  # told now where nobody may write
  try:
    yield partial
    if out.exists():
      out.rmdir()
    partial.rename(out)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise
  print(f"in {out}")


def _size(params: dict) -> str:
  leaves = jax.tree.leaves(params)
  total = sum(x.nbytes for x in leaves) / 1e9
  kinds = ", ".join(sorted({str(x.dtype) for x in leaves}))
  return f"{sum(x.size for x in leaves):,} parameters, {total:.2f} GB of {kinds}"


class _Bar:
  """A progress bar in bytes with its rate: what `progress=` of hf.py takes."""

  def __init__(self, what: str):
    self._bar = tqdm(desc=what, unit="B", unit_scale=True, unit_divisor=1000)

  def __call__(self, done: int, total: int) -> None:
    self._bar.total = total
    self._bar.update(done - self._bar.n)

  def __enter__(self):
    return self

  def __exit__(self, *error) -> None:
    self._bar.close()


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  commands = parser.add_subparsers(dest="command", required=True)
  one = commands.add_parser("import", help="Hugging Face -> ours")
  base = one.add_mutually_exclusive_group(required=True)
  base.add_argument("--hf", help="folder of config.json, *.safetensors")
  base.add_argument("--checkpoint", help="output of import, or a workdir")
  one.add_argument("--adapter", help="folder that PEFT wrote")
  one.add_argument("--out", required=True, help="new folder, for --config.init")
  one.add_argument("--dtype", choices=("float32", "bfloat16"), help="default float32")
  two = commands.add_parser("export", help="ours -> Hugging Face")
  two.add_argument("--checkpoint", required=True, help="output of import, or a workdir")
  two.add_argument("--out", required=True, help="new folder")
  two.add_argument("--adapter", action="store_true", help="only the adapters, as PEFT")
  two.add_argument("--scores", default="", help="workdir of an evaluation of it")
  two.add_argument(
    "--dtype", choices=("bfloat16", "float32"),
    help="default bfloat16, of adapters float32",
  )  # fmt: skip
  args = parser.parse_args(argv)
  if args.command == "import" and args.checkpoint and (args.dtype or not args.adapter):
    parser.error("import --checkpoint takes --adapter=DIR, and keeps its own dtype")
  try:
    if args.command == "import" and args.hf:
      import_hf(args.hf, args.out, args.dtype or "float32", args.adapter)
    elif args.command == "import":
      adapt(args.checkpoint, args.out, args.adapter)
    else:
      export_hf(args.checkpoint, args.out, args.dtype, args.adapter, args.scores)
  except (ValueError, OSError, checkpoint.CheckpointError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main())
