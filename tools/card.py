"""The model card of an exported checkpoint: what it is, from the files of its runs alone.

Not a program: `pixel-jax convert export` writes it.  What the files do not say is left out.
"""

import json
import pathlib
from typing import Any

from pixel_jax.run import checkpoint, policies
from pixel_jax.view.runs import read_json

MOST = 8  # runs that began from one another


def lineage(run: pathlib.Path) -> list[tuple[str, dict]]:
  """(name, config) of the run and of those it began from, the first one first."""
  found = []
  while len(found) < MOST:
    config = read_json(run / "config.json")
    if not config.get("total_steps"):
      break
    found.insert(0, (run.name, config))
    init = str(config.get("init", ""))
    if not init or not (run_of(init) / "config.json").is_file():
      break
    run = run_of(init)
  return found


def run_of(init: str) -> pathlib.Path:
  return policies.run_of(pathlib.Path(init).expanduser().resolve())


def scores(source: pathlib.Path, evaluation: pathlib.Path) -> list[dict]:
  """The rows of an evaluation that are of these weights; `ValueError` where none is."""
  told = read_json(evaluation / "evaluation.json")
  rows = [row for row in told.get("rows", []) if isinstance(row, dict)]
  if not rows:
    raise ValueError(f"--scores: {evaluation} has no evaluation.json with rows")
  mine = checkpoint.fingerprint(source)
  found = [row for row in rows if row.get("weights") == mine]
  if not found:
    names = ", ".join(f"{row.get('name')} ({row.get('policy')})" for row in rows)
    raise ValueError(
      f"--scores: no row of {evaluation}/evaluation.json is of the weights in {source}; "
      f"there are {names}"
    )
  return [{"split": told.get("split"), "temperature": told.get("temperature"), **row}
          for row in found]  # fmt: skip


def card(
  source: pathlib.Path,
  extra: dict[str, Any],
  *,
  name: str,
  rows: list[dict],
  adapter: bool = False,
) -> str:
  """The text of README.md.

  Args:
    extra: of the checkpoint (`checkpoint.load_extra`).
    rows: of `scores`.
    adapter: whether only adapters are written, in PEFT's layout.
  """
  runs = lineage(policies.run_of(source))
  base = _base(extra, runs)
  head = ["library_name: " + ("peft" if adapter else "transformers")]
  head += ["pipeline_tag: image-text-to-text"]
  head += [f"base_model: {json.dumps(base)}"] if base else []
  head += ["tags:", "- pixel-reasoner", "- visual-operations", "- pixel_jax"]
  parts = ["---", *head, "---", "", f"# {name}", "", _what(extra, base, adapter), ""]
  if runs:
    parts += ["## How it was trained", "", *map(_trained, runs), ""]
  if rows:
    parts += ["## Scores", "", *_table(rows), ""]
  parts += ["## How to use it", "", *_use(adapter, base)]
  return "\n".join(parts) + "\n"


def _base(extra: dict, runs: list) -> str:
  """The name of what the weights began as; where it lay on this machine is nobody's."""
  began = extra.get("hf") or (runs[0][1].get("init", "") if runs else "")
  return pathlib.PurePath(str(began)).name


def _what(extra: dict, base: str, adapter: bool) -> str:
  model = extra["model"]
  kind = "Adapters (LoRA) for a" if adapter else "A"
  text = (
    f"{kind} vision-language model of the architecture "
    f"`{(model.get('architectures') or [model.get('model_type', '?')])[0]}` that looks "
    "again while it thinks: it calls `crop_image_normalized` and `select_frames`, gets the "
    "pictures back in the same conversation, and goes on, as in [Pixel "
    "Reasoner](https://arxiv.org/abs/2505.15966)."
  )
  return text + (f" It began as `{base}`." if base else "")


def _trained(run: tuple[str, dict]) -> str:
  name, config = run
  method = "Reinforcement learning" if "rl" in config else "Supervised fine-tuning"
  facts = [f"{config['total_steps']} steps", f"seed {config.get('seed', '?')}"]
  if uri := config.get("data", {}).get("uri"):
    facts.append(f"data `{uri}`")
  if rate := config.get("lora", {}).get("rank"):
    facts.append(f"LoRA of rank {rate}")
  if lr := config.get("optim", {}).get("lr"):
    facts.append(f"learning rate {lr:g}")
  if reward := config.get("reward"):
    facts.append(
      f"{config['rl']['prompts_per_step']} questions a step with "
      f"{config['rl']['group_size']} answers each, curiosity reward (variant "
      f"{reward['variant']}) with alpha = {reward['alpha']:g}, beta = {reward['beta']:g}, "
      f"H = {reward['H']:g}, N = {reward['N']:g}"
    )
  return f"- {method} (`{name}`): {', '.join(facts)}."


def _table(rows: list[dict]) -> list[str]:
  """Accuracies with their intervals, each with the hash of how it was asked."""
  out = ["| benchmark | protocol | mode | n | accuracy, % | asked as |"]
  out += ["|---|---|---|---|---|---|"]
  for row in rows:
    for mode, m in row["modes"].items():
      if not isinstance(m, dict) or "accuracy" not in m:
        continue
      low, high = m.get("ci") or (None, None)
      interval = f" [{100 * low:.1f}, {100 * high:.1f}]" if low is not None else ""
      of = row.get("benchmark", "world")
      of = f"{of} ({row['split']})" if row.get("split") else of
      out.append(
        f"| {of} | {row.get('protocol', 'pixel')} | {mode} | {m.get('n', '?')} | "
        f"{100 * m['accuracy']:.1f}{interval} | `{m.get('hash', '–')}` |"
      )
  told = (
    "Two figures are comparable where they were asked in the same way: the hash is of "
    "prompt, options, decoding, pixel budgets, parser and split."
  )
  return [*out, "", told]


def _use(adapter: bool, base: str) -> list[str]:
  if adapter:
    return [
      f"Put on its base (`{base or 'the base model'}`) by PEFT, or:", "", "```",
      "pixel-jax convert import --hf=BASE --adapter=. --out=CKPT",
      "pixel-jax demo --checkpoint=CKPT", "```",
    ]  # fmt: skip
  return [
    "With operations, as it was trained:",
    "",
    "```python",
    "import pixel_jax",
    "",
    'model = pixel_jax.load(".")',
    'print(model.ask("What does the small sign say?", "picture.jpg").text)',
    "```",
    "",
    "`pixel-jax demo --checkpoint=.` asks in a browser, `pixel-jax serve --checkpoint=.` "
    "answers any client of OpenAI's API.  In `transformers` it is a model like its base, "
    "which reads and writes the calls but does not run them:",
    "",
    "```python",
    "from transformers import AutoModelForImageTextToText",
    "",
    'model = AutoModelForImageTextToText.from_pretrained(".")',
    "```",
  ]
