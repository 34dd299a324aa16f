"""VisualProbe (Mini-o3, Lai et al. 2025): hard searches in large pictures, open answers.

Layout (Mini-o3/VisualProbe_Easy, _Medium, _Hard): in a folder for each, val.json, a list of
{problem, solution, images, doc_id}, and data/ with the pictures.  Published figures are by
a language model as the judge; ours are by exact match (text, letter or number as a whole),
which is stricter, so they stand beside each other and not beside published ones.
"""

import pathlib

from pixel_jax.data import formats, records
from pixel_jax.data.media import Library
from pixel_jax.data.records import SourceError
from pixel_jax.evals.benchmark import Benchmark, without_pictures
from pixel_jax.trajectory import Media, Task

PARTS = ("easy", "medium", "hard")


def read(library: Library, folder: str) -> list[Task]:
  root, tasks = pathlib.Path(library.root or "."), []
  for part in PARTS:
    own = f"{folder}VisualProbe_{part.capitalize()}/"
    if (root / own / "val.json").is_file():
      rows = records.open_records(f"json:{own}val.json", library.root)
      tasks += [_task(library, own, part, rows[i], i) for i in range(len(rows))]
  if not tasks:
    raise SourceError("no VisualProbe_Easy/val.json, _Medium or _Hard is there")
  return tasks


def _task(library: Library, folder: str, part: str, row: dict, i: int) -> Task:
  question = row.get("problem", row.get("question"))
  answer = row.get("solution", row.get("answer"))
  pictures = row.get("images", row.get("image"))
  pictures = pictures if isinstance(pictures, list) else [pictures]
  reference = {"category": part, "row": without_pictures(row)}
  return Task(
    f"{part}/{row.get('doc_id', i)}",
    formats.clean(question),
    str(answer),
    [Media("image", library.find(folder + p)) for p in pictures],
    reference=reference,
  )


VISUALPROBE = Benchmark(
  name="visualprobe",
  read=read,
  files=(
    "VisualProbe_Easy/, VisualProbe_Medium/ and VisualProbe_Hard/ of "
    "huggingface.co/Mini-o3, each with val.json and data/"
  ),
)
