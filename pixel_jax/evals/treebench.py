"""TreeBench (Wang et al. 2025): 405 questions whose target's boxes are given.

Layout (HaochenWang/TreeBench): TreeBench.tsv with index, image (base64), question, A to D,
answer, category ("Perception/OCR"), target_instances (boxes x1, y1, x2, y2 in pixels, a
list as Python writes it) and perhaps hint.  Reported are the mean over items, by task and
subtask, and the mean IoU of boxes that the reply writes as <box>[x1,y1,x2,y2]</box>.
"""

import ast
import io
import re
from collections.abc import Sequence
from typing import Any

from PIL import Image

from pixel_jax.data.media import Library
from pixel_jax.evals import rules
from pixel_jax.evals.benchmark import (
  Benchmark,
  Row,
  boxes_of,
  covers_boxes,
  open_first,
  options_of,
  relative,
  vlmevalkit_choice,
  without_pictures,
)
from pixel_jax.trajectory import Media, Task

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
THOUGHT = re.compile(r"<think>(.*?)</think>", re.DOTALL)


def read(library: Library, folder: str) -> list[Task]:
  rows = open_first(library, folder, "tsv:TreeBench.tsv")
  tasks = []
  for i in range(len(rows)):
    row, place = rows[i], f"{rows.name(i)}/image"
    with Image.open(io.BytesIO(library.open(place))) as picture:
      size = picture.size
    targets = ast.literal_eval(row["target_instances"])
    reference = {
      "options": options_of(row),
      "category": row["category"],
      "boxes": [relative(box, *size) for box in targets],
      "targets": targets,
      "row": without_pictures(row),
    }
    question, answer = row["question"], row["answer"].strip()
    media = [Media("image", place)]
    tasks.append(Task(row["index"], question, answer, media, reference=reference))
  return tasks


def letter(answer: str, task: Task) -> float:
  found = ANSWER.search(answer)
  read = rules.mme_realworld_lmms(found[1].strip().upper() if found else answer)
  return float(read != "" and read == task.answer)


def figures(rows: Sequence[Row]) -> dict[str, Any]:
  ious, tasks = [], {}
  for row in rows:
    thought = THOUGHT.search(row.text)
    text = thought[1].strip() if thought else row.text
    ious.append(rules.treebench_iou(text, row.task.reference["targets"]))
    task = row.task.reference["category"].partition("/")[0]
    tasks.setdefault(task, []).append(row.scores["letter"])
  parts = {task: sum(v) / len(v) for task, v in sorted(tasks.items())}
  return {"miou": sum(ious) / len(ious), "tasks": parts}


TREEBENCH = Benchmark(
  name="treebench",
  read=read,
  files="TreeBench.tsv of huggingface.co/datasets/HaochenWang/TreeBench",
  ask=lambda task: vlmevalkit_choice(
    task, "Answer with the correct option's letter directly. \n"
  ),
  rules={"letter": letter},
  figures=figures,
  boxes=boxes_of,
  covers=covers_boxes,
)
