"""HR-Bench 4K and 8K (Wang et al. 2024): 200 questions, each in four orders of its options.

Layout (DreamMr/HR-Bench): hr_bench_4k.tsv with index, question, answer, category (single,
cross), A to D, cycle_category, image (base64); or the same as parquet.  The score is the
mean over the cycles; the figures also have cycle 0 alone, which one harness reports, and
how often a question is right in all four.
"""

import functools
from collections.abc import Sequence
from typing import Any

from pixel_jax.data.media import Library
from pixel_jax.evals import rules
from pixel_jax.evals.benchmark import (
  Benchmark,
  Row,
  letter_rule,
  open_first,
  options_of,
  vlmevalkit_choice,
  without_pictures,
)
from pixel_jax.trajectory import Media, Task

TAIL = "Please select the correct answer from the options above. \n"


def read(library: Library, folder: str, *, size: str) -> list[Task]:
  rows = open_first(
    library, folder, f"tsv:hr_bench_{size}.tsv", f"parquet:hr_bench_{size}*.parquet",
    f"parquet:hrbench_version_split/hrbench_{size}*.parquet",
  )  # fmt: skip
  tasks = []
  for i in range(len(rows)):
    row = rows[i]
    reference = {
      "options": options_of(row, "ABCD"),
      "category": row["category"],
      "cluster": row["question"],  # its cycles have one picture
      "cycle": str(row["cycle_category"]),
      "row": without_pictures(row),
    }
    media = [Media("image", f"{rows.name(i)}/image")]
    question, answer = str(row["question"]), str(row["answer"]).strip()
    tasks.append(Task(str(row["index"]), question, answer, media, reference=reference))
  return tasks


def figures(rows: Sequence[Row]) -> dict[str, Any]:
  hits = [
    {
      "category": row.task.reference["category"],
      "cycle_category": row.task.reference["cycle"],
      "hit": row.scores["letter"],
    }
    for row in rows
  ]
  report = {
    f"{r['cycle']}/{r['type']}": r["accuracy"] for r in rules.hrbench_report(hits)
  }
  together: dict[str, list[float]] = {}
  for row in rows:
    together.setdefault(row.task.reference["cluster"], []).append(row.scores["letter"])
  first = min(hit["cycle_category"] for hit in hits)
  return {
    "cycles": report,
    "cycle_0": report[f"{first}/all"],
    "right_in_all_cycles": sum(min(v) for v in together.values()) / len(together),
  }


def _of(size: str) -> Benchmark:
  return Benchmark(
    name=f"hrbench{size}",
    read=functools.partial(read, size=size),
    files=f"hr_bench_{size}.tsv of huggingface.co/datasets/DreamMr/HR-Bench",
    ask=lambda task: vlmevalkit_choice(task, TAIL),
    rules={
      "letter": letter_rule(rules.mcq_letter_vlmevalkit),
      "letter_lmms": letter_rule(rules.hrbench_letter_lmms),
    },
    figures=figures,
  )


HRBENCH_4K, HRBENCH_8K = _of("4k"), _of("8k")
