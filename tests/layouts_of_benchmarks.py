"""Every benchmark in its true layout, with a few questions about small pictures."""

import base64
import csv
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from test_video import _write as write_clip


def picture(seed, size=(120, 90)):
  noise = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
  return Image.fromarray(noise)


def encoded(seed, kind="JPEG"):
  buffer = io.BytesIO()
  picture(seed).save(buffer, kind)
  return buffer.getvalue()


def text(seed):
  return base64.b64encode(encoded(seed)).decode()


def write_tsv(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("w", newline="", encoding="utf-8") as f:
    names = list(dict.fromkeys(k for row in rows for k in row))
    out = csv.DictWriter(f, names, delimiter="\t", lineterminator="\n")
    out.writeheader()
    out.writerows(rows)


def write_json(path, value):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(value))


def vstar(root):
  asked = []
  for kind, options in (
    ("direct_attributes", ["red", "blue", "green", "black"]),
    ("relative_position", ["left of it", "right of it"]),
  ):
    for i in range(2):
      folder = root / "vstar" / kind
      folder.mkdir(parents=True, exist_ok=True)
      picture(i).save(folder / f"sa_{i}.jpg")
      question = f"What about thing {i} in {kind}?"
      about = {"target_object": ["thing"], "bbox": [[60, 45, 12, 9]]}
      write_json(
        folder / f"sa_{i}.json", {**about, "question": question, "options": options}
      )
      shuffled = options[1:] + options[:1]
      lines = "\n".join(f"({k}) {o}" for k, o in zip("ABCD", shuffled))
      asked.append({
        "image": f"{kind}/sa_{i}.jpg", "category": kind, "question_id": len(asked),
        "label": "ABCD"[len(options) - 1], "text": f"{question}\n{lines}\nAnswer with the "
        "option's letter from the given choices directly.",
      })  # fmt: skip
  # Other folders of that repository are no part of the benchmark.
  (root / "vstar" / "OCR").mkdir()
  write_json(root / "vstar" / "OCR" / "x.json", {"question": "?"})
  file = root / "vstar" / "test_questions.jsonl"
  file.write_text("".join(json.dumps(a) + "\n" for a in asked))


def hrbench(root, size="4k"):
  rows, options = [], ["one", "two", "three", "four"]
  for question in range(2):
    for cycle in range(4):
      turned = options[cycle:] + options[:cycle]
      rows.append({
        "index": len(rows), "question": f'How many "{question}"?\nLook.',
        "answer": "ABCD"[turned.index("two")], "category": ("single", "cross")[question],
        **dict(zip("ABCD", turned)), "cycle_category": cycle, "image": text(question),
      })  # fmt: skip
  write_tsv(root / f"hrbench{size}" / f"hr_bench_{size}.tsv", rows)


def hrbench_parquet(root):
  rows = [
    {"index": i, "question": "How many?", "answer": "A", "category": "single", "A": "1",
     "B": "2", "C": "3", "D": "4", "cycle_category": str(i), "image": text(0)}
    for i in range(4)
  ]  # fmt: skip
  folder = root / "hrbench8k" / "hrbench_version_split"
  folder.mkdir(parents=True)
  pq.write_table(
    pa.Table.from_pylist(rows), folder / "hrbench_8k-00000-of-00001.parquet"
  )


def tallyqa(root):
  for part in ("simple", "complex"):
    folder = root / f"tallyqa_{part}"
    (folder / "VG_100K").mkdir(parents=True)
    picture(3).save(folder / "VG_100K" / "1.jpg")
    rows = [
      {"image": "VG_100K/1.jpg", "answer": n, "data_source": "amt", "question": f"How {n}?",
       "image_id": 1, "question_id": 10 + n, "issimple": bool(n % 2)}
      for n in range(4)
    ]  # fmt: skip
    write_json(folder / "test.json", rows)


def tallyqa_evaldata(root):
  folder = root / "tallyqa_evaldata"
  (folder / "images").mkdir(parents=True)
  picture(4).save(folder / "images" / "a.jpg")
  rows = [
    {"qid": f"t-{n}", "question": f"How many {n}?", "answer": [str(n)],
     "image": ["images/a.jpg"], "is_video": False}
    for n in (2, 3)
  ]  # fmt: skip
  pq.write_table(pa.Table.from_pylist(rows), folder / "tallyqa_mini3200.parquet")


def infographicvqa(root):
  folder = root / "infographicvqa"
  folder.mkdir(parents=True)
  rows = [
    {"questionId": str(i), "question": f"What {i}?", "answers": ["Twitter", "the bird"],
     "answer_type": ["single span"], "image": {"bytes": encoded(i), "path": f"{i}.png"},
     "image_url": f"u{i}"}
    for i in range(2)
  ]  # fmt: skip
  pq.write_table(
    pa.Table.from_pylist(rows), folder / "validation-00000-of-00001.parquet"
  )


def infographicvqa_rrc(root):
  (root / "images").mkdir(parents=True)
  picture(1).save(root / "images" / "7.jpeg")
  rows = [{"questionId": 9, "question": "What?", "image_local_name": "7.jpeg",
           "answers": ["x"], "answer_type": ["single span"]}]  # fmt: skip
  write_json(root / "infographicsVQA_val_v1.0_withQT.json", {"data": rows})


def infographicvqa_tsv(root):
  rows = [
    {"index": 5, "question": "What?", "answer": "['x', \"y's\"]", "image": text(1)}
  ]
  write_tsv(root / "InfoVQA_VAL.tsv", rows)


def mvbench(root):
  folder = root / "mvbench"
  clips = folder / "video" / "star" / "Charades_v1_480"
  clips.mkdir(parents=True)
  write_clip(clips / "A.mp4", 20)
  frames = folder / "video" / "tvqa" / "frames_fps3_hq" / "B"
  frames.mkdir(parents=True)
  for i in range(1, 31):
    picture(i, (64, 48)).save(frames / f"{i:05d}.jpg")
  one = {
    "question": "What happened?",
    "candidates": ["ran", "sat", "slept"],
    "answer": "sat",
  }
  write_json(
    folder / "json" / "action_sequence.json",
    [{**one, "video": "A.mp4", "start": 0.5, "end": 2.0}],
  )
  write_json(
    folder / "json" / "episodic_reasoning.json",
    [{**one, "video": "B", "start": 2.0, "end": 8.0}],
  )


def visualprobe(root):
  for part in ("Easy", "Hard"):
    folder = root / "visualprobe" / f"VisualProbe_{part}"
    (folder / "data").mkdir(parents=True)
    picture(5).save(folder / "data" / "0.jpg")
    rows = [{"doc_id": 0, "problem": "<image>\nWhat stands there?", "solution": "STOP",
             "images": ["data/0.jpg"]}]  # fmt: skip
    write_json(folder / "val.json", rows)


def treebench(root):
  rows = [
    {"index": i, "image": text(i), "question": f"Which {i}?", "A": "red", "B": "blue",
     "C": "green", "D": "black", "answer": "B", "category": kind,
     "target_instances": "[[60, 45, 72, 54]]", "hint": hint}
    for i, (kind, hint) in enumerate(
      [("Perception/OCR", ""), ("Reasoning/Comparison", "mind the left")]
    )
  ]  # fmt: skip
  write_tsv(root / "treebench" / "TreeBench.tsv", rows)


def mme_realworld_lite(root):
  options = [f"({k}) {v}" for k, v in zip("ABCDE", ("1", "2", "3", "4", "not there"))]
  rows = [
    {"index": i, "image": text(i), "question": f"How many {i}?",
     "multi-choice options": str(options), "answer": "C",
     "category": kind, "l2-category": "count"}
    for i, kind in enumerate(("Perception/Remote Sensing", "Reasoning/Monitoring"))
  ]  # fmt: skip
  write_tsv(root / "mme_realworld_lite" / "mme_realworld_lite.tsv", rows)


def all_of_them(root):
  hrbench(root)
  for write in (
    vstar, hrbench_parquet, tallyqa, tallyqa_evaldata, infographicvqa, mvbench,
    visualprobe, treebench, mme_realworld_lite,
  ):  # fmt: skip
    write(root)
