"""V* Bench (Wu and Xie 2024): 191 questions about a detail of a large picture.

Layout (craigwu/vstar_bench): direct_attributes/ and relative_position/ with NAME.jpg and
NAME.json {"question", "options": [the right one first], "bbox": [[x, y, w, h]]}, and
test_questions.jsonl, which shuffles the options.  Its own program scores options by their
likelihood; the letter form is that of test_questions.jsonl.
"""

import hashlib
import json
import pathlib
import re

from PIL import Image

from pixel_jax.data.media import Library
from pixel_jax.data.records import SourceError
from pixel_jax.evals import rules
from pixel_jax.evals.benchmark import (
  Benchmark,
  boxes_of,
  covers_boxes,
  letter_rule,
  relative,
  with_options,
)
from pixel_jax.trajectory import Media, Task

# The repository has GPT4V-hard and OCR beside them, which are no part of the benchmark.
FOLDERS = ("direct_attributes", "relative_position")
PICTURES = (".jpg", ".jpeg", ".png")
TAIL = "\nAnswer with the option's letter from the given choices directly."


def read(library: Library, folder: str) -> list[Task]:
  root = pathlib.Path(library.root or ".") / folder
  shuffled = {}
  if (root / "test_questions.jsonl").is_file():
    lines = (root / "test_questions.jsonl").read_text(encoding="utf-8").splitlines()
    shuffled = {r["image"]: r for r in map(json.loads, filter(str.strip, lines))}
  tasks = []
  for kind in FOLDERS:
    for file in sorted((root / kind).glob("*.json")):
      tasks.append(_task(root, folder, kind, file, shuffled))
  if not tasks:
    raise SourceError(f"no NAME.json is in {' or '.join(FOLDERS)}")
  return tasks


def _task(root, folder, kind, file, shuffled) -> Task:
  about = json.loads(file.read_text(encoding="utf-8"))
  found = [p for e in PICTURES if (p := file.with_suffix(e)).is_file()]
  if not found:
    raise SourceError(f"{kind}/{file.stem} has no picture ({', '.join(PICTURES)})")
  name = f"{kind}/{found[0].name}"
  right, given = about["options"][0], shuffled.get(name)
  if given:
    options = dict(re.findall(r"^\(([A-D])\) (.*?)\s*$", given["text"], re.MULTILINE))
    answer = given["label"].strip().upper()
  else:  # an order of its own that nothing else decides

    def key(text: str) -> bytes:
      return hashlib.blake2b(f"{name}/{text}".encode()).digest()

    options = dict(zip("ABCD", sorted(about["options"], key=key)))
    answer = next(letter for letter, text in options.items() if text == right)
  with Image.open(found[0]) as picture:
    size = picture.size
  boxes = [relative((x, y, x + w, y + h), *size) for x, y, w, h in about["bbox"]]
  reference = {"options": options, "category": kind, "boxes": boxes}
  reference["row"] = {"index": name, "question": about["question"]}
  media = [Media("image", folder + name)]
  return Task(name, about["question"], answer, media, reference=reference)


VSTAR = Benchmark(
  name="vstar",
  read=read,
  files=(
    "direct_attributes/, relative_position/ and test_questions.jsonl of "
    "huggingface.co/datasets/craigwu/vstar_bench"
  ),
  ask=lambda task: with_options(task) + TAIL,
  tokens=16,
  rules={
    "letter": letter_rule(rules.mcq_letter_vlmevalkit),
    "letter_lmms": letter_rule(lambda answer, _: rules.vstar_letter_lmms(answer)),
  },
  likelihood=True,
  boxes=boxes_of,
  covers=covers_boxes,
)
