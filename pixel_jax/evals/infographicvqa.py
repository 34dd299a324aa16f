"""InfographicVQA (Mathew et al. 2022): short answers out of infographics, by ANLS.

Layouts: validation-*.parquet (lmms-lab-encoder/DocVQA, InfographicVQA: questionId,
question, answers, image), InfoVQA_VAL.tsv of VLMEvalKit (index, question, answer: a list
as Python writes it, image), or the json of the Robust Reading Competition with its
pictures.  Beside ANLS stands exact match by the rule of Pixel Reasoner, which is what its
84.0 is by its published code.
"""

import ast
import json
import pathlib

from pixel_jax.data.media import Library
from pixel_jax.data.records import SourceError
from pixel_jax.evals import rules
from pixel_jax.evals.benchmark import (
  Benchmark,
  open_first,
  pixel_reasoner,
  without_pictures,
)
from pixel_jax.trajectory import Media, Task

OFFICIAL = "infographicsVQA_val*.json"


def read(library: Library, folder: str) -> list[Task]:
  root = pathlib.Path(library.root or ".")
  tasks = []
  for file in sorted(root.glob(folder + OFFICIAL)):
    for row in json.loads(file.read_text(encoding="utf-8"))["data"]:
      picture = _picture(library, folder, row["image_local_name"])
      tasks.append(_task(row["questionId"], row, row["answers"], picture))
  if tasks:
    return tasks
  try:
    rows = open_first(
      library, folder, "parquet:validation*.parquet",
      "parquet:InfographicVQA/validation*.parquet", "tsv:InfoVQA_VAL.tsv",
    )  # fmt: skip
  except SourceError as error:
    raise SourceError(f"{error}, nor {OFFICIAL}") from error
  for i in range(len(rows)):
    row = rows[i]
    answers = row.get("answers") or ast.literal_eval(row["answer"])
    name = row.get("questionId", row.get("index"))
    is_bytes = isinstance(row["image"], dict)
    place = f"{rows.name(i)}/image" + "/bytes" * is_bytes
    tasks.append(_task(name, row, answers, place))
  return tasks


def _picture(library: Library, folder: str, name: str) -> str:
  places = [f"{folder}{part}{name}" for part in ("", "images/", "infographicsVQA/")]
  found = [p for p in places if (pathlib.Path(library.root or ".") / p).is_file()]
  return found[0] if found else library.find(places[1])


def _task(name, row: dict, answers, picture: str) -> Task:
  golds = [str(a) for a in (answers if isinstance(answers, list) else [answers])]
  kinds = row.get("answer_type") or ""
  reference = {
    "category": kinds if isinstance(kinds, str) else ", ".join(kinds),
    "cluster": row.get("image_url", row.get("image_local_name", str(name))),
    "row": without_pictures(row),
  }
  media = [Media("image", picture)]
  return Task(str(name), str(row["question"]), golds, media, reference=reference)


INFOGRAPHICVQA = Benchmark(
  name="infographicvqa",
  read=read,
  files=(
    "validation-*.parquet of huggingface.co/datasets/lmms-lab-encoder/DocVQA "
    f"(InfographicVQA), InfoVQA_VAL.tsv of VLMEvalKit, or {OFFICIAL} with its pictures"
  ),
  ask=lambda task: (
    task.question + "\nAnswer the question using a single word or phrase."
  ),
  tokens=32,
  rules={
    "anls": lambda answer, task: rules.anls(answer, task.answer),
    "pixel_reasoner": pixel_reasoner,
  },
)
