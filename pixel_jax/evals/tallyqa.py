"""TallyQA (Acharya et al. 2019): how many there are.

Layout (manoja328/TallyQA): test.json, a list of {image, question, answer, question_id,
issimple}, with the pictures of Visual Genome and COCO below the folder.  Simple are 22,991
questions of its test split, complex 15,598.  The set that Pixel Reasoner released is a part
of about 3,200 complex ones with its own layout; figures name the set.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

from pixel_jax.data import formats
from pixel_jax.data.media import Library
from pixel_jax.evals import rules
from pixel_jax.evals.benchmark import (
  Benchmark,
  Row,
  open_first,
  pixel_reasoner,
  without_pictures,
)
from pixel_jax.trajectory import Media, Task


def read(library: Library, folder: str, *, simple: bool) -> list[Task]:
  rows = open_first(library, folder, "json:test.json", "json:tallyqa/test.json")
  tasks = []
  for i in range(len(rows)):
    row = rows[i]
    if bool(row["issimple"]) == simple:
      reference = {
        "category": row.get("data_source", ""), "cluster": row["image"], "row": row
      }  # fmt: skip
      media = [Media("image", library.find(folder + row["image"]))]
      name = str(row.get("question_id", i))
      answer = str(row["answer"])
      tasks.append(Task(name, row["question"], answer, media, reference=reference))
  return tasks


def read_released(library: Library, folder: str) -> list[Task]:
  """The layout of PixelReasoner-EvalData: {qid, question, answer: [..], image: [..]}."""
  rows = open_first(
    library, folder, "parquet:tallyqa*.parquet", "json:tallyqa*.json",
    "jsonl:tallyqa*.jsonl",
  )  # fmt: skip
  tasks = []
  for i in range(len(rows)):
    task = formats.read(rows[i], rows.name(i))
    for media in task.media:
      if "#" not in media.path:
        media.path = library.find(folder + media.path)
    task.reference["row"] = without_pictures(rows[i])
    tasks.append(task)
  return tasks


def exact(answer: str, task: Task) -> float:
  golds = [task.answer] if isinstance(task.answer, str) else task.answer
  return float(any(rules.tallyqa_vlmevalkit(answer) == int(g) for g in golds))


def figures(rows: Sequence[Row]) -> dict[str, Any]:
  """The root mean square error that the paper has beside accuracy; answers that are no
  count are left out, and counted."""
  counts = [(rules.tallyqa_vlmevalkit(r.answer), r.task.answer) for r in rows]
  errors = [
    n - int(gold if isinstance(gold, str) else gold[0])
    for n, gold in counts
    if n is not None
  ]
  mean = sum(e * e for e in errors) / max(len(errors), 1)
  return {"rmse": math.sqrt(mean), "no_count": len(rows) - len(errors)}


def _of(part: str, read, files: str) -> Benchmark:
  return Benchmark(
    name=f"tallyqa_{part}",
    read=read,
    files=files,
    ask=lambda task: task.question + "\nAnswer the question using a single number.",
    tokens=16,
    rules={"exact": exact, "pixel_reasoner": pixel_reasoner},
    figures=figures,
  )


FILES = (
  "test.json of github.com/manoja328/TallyQA with the pictures that it names (VG_100K/, "
  "VG_100K_2/, val2014/)"
)
TALLYQA_SIMPLE = _of("simple", functools.partial(read, simple=True), FILES)
TALLYQA_COMPLEX = _of("complex", functools.partial(read, simple=False), FILES)
TALLYQA_EVALDATA = _of(
  "evaldata",
  read_released,
  "tallyqa*.parquet and images.zip of "
  "huggingface.co/datasets/JasperHaozhe/TallyQA-EvalData-PixelReasoner",
)
