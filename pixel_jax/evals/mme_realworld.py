"""MME-RealWorld-Lite (Zhang et al. 2025): 1,919 choices of five about large pictures.

Layouts: mme_realworld_lite.tsv (yifanzhang114/MME-RealWorld-Base64: index, image,
question, "multi-choice options": a list as Python writes it, answer, category,
l2-category), or the parquet of lmms-eval, whose picture is in `bytes`.  The mean is over
items; the figures have those of tasks and subtasks.
"""

import ast
from collections.abc import Sequence
from typing import Any

from pixel_jax.data.media import Library
from pixel_jax.evals import rules
from pixel_jax.evals.benchmark import Benchmark, Row, open_first, without_pictures
from pixel_jax.trajectory import Media, Task

OPTIONS = "multi-choice options"


def read(library: Library, folder: str) -> list[Task]:
  rows = open_first(
    library, folder, "tsv:mme_realworld_lite.tsv", "tsv:MME-RealWorld-Lite.tsv",
    "parquet:*.parquet", "parquet:data/*.parquet",
  )  # fmt: skip
  tasks = []
  for i in range(len(rows)):
    row = rows[i]
    given = row[OPTIONS]
    given = ast.literal_eval(given) if isinstance(given, str) else given
    key = "bytes" if "bytes" in row else "image"
    reference = {
      "options": {o[1]: o[3:].strip() for o in given},  # "(A) red"
      "given": given,
      "category": row["category"],
      "row": without_pictures(row),
    }
    question, answer = row["question"], str(row["answer"]).strip()
    media = [Media("image", f"{rows.name(i)}/{key}")]
    tasks.append(Task(str(row["index"]), question, answer, media, reference=reference))
  return tasks


def ask(task: Task) -> str:
  options = "\n".join(task.reference["given"])
  return (
    f"{task.question} The choices are listed below:\n{options}\nSelect the best answer to "
    "the above multiple-choice question based on the image. Respond with only the letter "
    "(A, B, C, D, or E) of the correct option.\nThe best answer is: "
  )


def letter(answer: str, task: Task) -> float:
  read = rules.mme_realworld_lmms(answer).lower()
  return float(task.answer.lower() in read)


def figures(rows: Sequence[Row]) -> dict[str, Any]:
  parts: dict[str, list[float]] = {}
  for row in rows:
    kind = row.task.reference["category"]
    task = "Perception" if "perception" in kind.lower() else "Reasoning"
    sub = f"{task}/{kind.split('/')[-1]}"
    fine = row.task.reference["row"].get("l2-category", "").lower()
    if "attribute" in fine:
      fine = fine.split("/")[0] + "/attribute"
    for name in (task, sub, f"{sub}/{fine}"):
      parts.setdefault(name, []).append(row.scores["letter"])
  return {"tasks": {name: sum(v) / len(v) for name, v in sorted(parts.items())}}


MME_REALWORLD_LITE = Benchmark(
  name="mme_realworld_lite",
  read=read,
  files=(
    "mme_realworld_lite.tsv of huggingface.co/datasets/yifanzhang114/"
    "MME-RealWorld-Base64, or the parquet of MME-RealWorld-lite-lmms-eval"
  ),
  ask=ask,
  tokens=16,
  rules={"letter": letter},
  figures=figures,
)
