"""Predictions as files: ours, and those that other harnesses score again.

  predictions/STEM.jsonl              a line for every answer, with all of its scores
  exports/vlmevalkit/STEM.xlsx        for `run.py --mode eval --reuse`
  exports/lmms_eval/STEM.jsonl        as `--log_samples` writes them

The prediction is what our rules were given, so that theirs return the same.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import openpyxl

from pixel_jax import trajectory
from pixel_jax.evals import report
from pixel_jax.evals.benchmark import Benchmark, Row


def prediction(row: Row, benchmark: Benchmark) -> dict[str, Any]:
  """A line of predictions.jsonl."""
  played = row.trajectory
  told = {
    "id": row.task.id,
    "sample": played.sample,
    "question": row.task.question,
    "gold": row.task.answer,
    "answer": row.answer,
    "text": row.text,
    "scores": row.scores,
    "category": benchmark.category(row.task),
    "cluster": report.cluster(row),
    "calls": [
      {"name": c.name, "arguments": c.arguments, "error": c.error} for c in played.calls
    ],
    "stop": played.stop,
    "tokens": sum(played.sampled),
  }
  if benchmark.covers is not None and played.calls:
    told["covered"] = report.shows(row, benchmark)
  return told


def write_jsonl(path: pathlib.Path, lines: Sequence[dict]) -> None:
  """Writes the whole file or nothing."""
  trajectory.write_lines(path, (json.dumps(x, ensure_ascii=False) for x in lines))


def vlmevalkit(path: pathlib.Path, rows: Sequence[Row]) -> None:
  """A sheet with the columns of the benchmark's table and `prediction`."""
  records = [{**_record(row), "prediction": row.answer} for row in rows]
  names = list(dict.fromkeys(k for record in records for k in record))
  book = openpyxl.Workbook(write_only=True)
  sheet = book.create_sheet()
  sheet.append(names)
  for record in records:
    sheet.append([_cell(sheet, record.get(name)) for name in names])
  path.parent.mkdir(parents=True, exist_ok=True)
  book.save(path)


def lmms_eval(path: pathlib.Path, rows: Sequence[Row]) -> None:
  """A line a question, with the reply where that harness has it."""
  write_jsonl(
    path,
    [
      {
        "doc_id": i,
        "doc": _record(row),
        "target": row.task.answer,
        "arguments": [row.trajectory.task.question],
        "resps": [[row.answer]],
        "filtered_resps": [row.answer],
        **row.scores,
      }
      for i, row in enumerate(rows)
    ],
  )


def _record(row: Row) -> dict[str, Any]:
  """The row of the benchmark's own file, or what is known of the question."""
  told = {
    "index": row.task.id,
    "question": row.task.question,
    "answer": row.task.answer,
  }
  told |= row.task.reference.get("options", {})
  return told | row.task.reference.get("row", {})


def _cell(sheet, value: Any) -> Any:
  """What a cell of a sheet can hold: text without control characters, or a number.

  Text that begins with = stays text: what a model wrote is no formula.
  """
  if isinstance(value, int | float | None):
    return value
  text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
  text = openpyxl.cell.cell.ILLEGAL_CHARACTERS_RE.sub("", text)
  cell = openpyxl.cell.WriteOnlyCell(sheet, text[:32_767])  # the longest in Excel
  cell.data_type = "s"
  return cell


# How each is written, and what its files end with.
FORMATS = {"vlmevalkit": (vlmevalkit, "xlsx"), "lmms_eval": (lmms_eval, "jsonl")}
