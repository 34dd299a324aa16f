"""MVBench (Li et al. 2024): 20 kinds of questions about short clips, 200 of each.

Layout (OpenGVLab/MVBench): json/TASK.json, lists of {video, question, candidates, answer:
the text, start, end}, and the clips below video/ in the folders of `FOLDERS`.  16 frames,
the middles of equal parts of the clip or of [start, end], as the official notebook.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from pixel_jax.data.media import Library
from pixel_jax.data.records import SourceError
from pixel_jax.evals import rules
from pixel_jax.evals.benchmark import Benchmark, Row
from pixel_jax.pixels import video
from pixel_jax.trajectory import Media, Task

CHARADES, CLEVRER = "star/Charades_v1_480/", "clevrer/video_validation/"
PERCEPTION = "perception/videos/"
FOLDERS = {
  "action_sequence": CHARADES,
  "action_prediction": CHARADES,
  "action_antonym": "ssv2_video/",
  "fine_grained_action": "Moments_in_Time_Raw/videos/",
  "unexpected_action": "FunQA_test/test/",
  "object_existence": CLEVRER,
  "object_interaction": CHARADES,
  "object_shuffle": PERCEPTION,
  "moving_direction": CLEVRER,
  "action_localization": "sta/sta_video/",
  "scene_transition": "scene_qa/video/",
  "action_count": PERCEPTION,
  "moving_count": CLEVRER,
  "moving_attribute": CLEVRER,
  "state_change": PERCEPTION,
  "fine_grained_pose": "nturgbd/",
  "character_order": PERCEPTION,
  "egocentric_navigation": "vlnqa/",
  "episodic_reasoning": "tvqa/frames_fps3_hq/",
  "counterfactual_inference": CLEVRER,
}
ABOVE = ("video/", "", "video/data0613/")  # where those folders lie
FRAMES, FRAMES_PER_SECOND = 16, 3  # of a folder of frames
SYSTEM = (
  "Carefully watch the video and pay attention to the cause and sequence of events, the "
  "detail and movement of objects, and the action and pose of persons. Based on your "
  "observations, select the best option that accurately addresses the question.\n"
)


def read(library: Library, folder: str) -> list[Task]:
  root = pathlib.Path(library.root or ".")
  tasks = []
  for kind in FOLDERS:
    file = root / f"{folder}json/{kind}.json"
    if not file.is_file():
      continue
    for i, row in enumerate(json.loads(file.read_text(encoding="utf-8"))):
      options = dict(zip("ABCDEFGH", row["candidates"]))
      answer = next(k for k, v in options.items() if v == row["answer"])
      reference = {
        "options": options,
        "category": kind,
        "cluster": row["video"],
        "row": {**row, "task_type": kind},
      }
      media = [_clip(root, folder, kind, row)]
      name = f"{kind}/{i}"
      tasks.append(Task(name, row["question"], answer, media, reference=reference))
  if not tasks:
    raise SourceError("no json/TASK.json is there")
  return tasks


def _clip(root: pathlib.Path, folder: str, kind: str, row: dict) -> Media:
  places = [f"{folder}{above}{FOLDERS[kind]}{row['video']}" for above in ABOVE]
  path = next((p for p in places if (root / p).exists()), places[0])
  start, end = row.get("start"), row.get("end")
  if not (root / path).is_dir():
    part = "," if start is None else f"{start},{end}"
    return Media("video", f"{path}#t={part}")
  frames = sorted(p.name for p in (root / path).iterdir())
  begin, over = (0.0, float("inf")) if start is None else (float(start), float(end))
  chosen = video.middles(
    (begin, over), FRAMES_PER_SECOND, len(frames), FRAMES, first=1
  )  # fmt: skip
  seconds = min(over, len(frames) / FRAMES_PER_SECOND) - begin
  rate = FRAMES / seconds if seconds > 0 else FRAMES_PER_SECOND
  return Media("video", [f"{path}/{frames[i - 1]}" for i in chosen], fps=rate)


def ask(task: Task) -> str:
  options = "".join(f"({k}) {v}\n" for k, v in task.reference["options"].items())
  return (
    f"Question: {task.question}\nOptions:\n{options.rstrip()}\n"
    "Only give the best option."
  )


def official(answer: str, task: Task) -> float:
  gold = f"({task.answer}) {task.reference['options'][task.answer]}"
  return float(rules.mvbench_official(answer, gold))


def figures(rows: Sequence[Row]) -> dict[str, Any]:
  """The form of lmms-eval, which leaves empty answers out of its denominator."""
  said = [r.scores["letter_lmms"] for r in rows if r.answer]
  return {"lmms": sum(said) / max(len(said), 1)}


MVBENCH = Benchmark(
  name="mvbench",
  read=read,
  files="json/ and video/ (unpacked) of huggingface.co/datasets/OpenGVLab/MVBench",
  ask=ask,
  system=SYSTEM,
  opening="Best option:(",
  rules={
    "official": official,
    "letter_lmms": lambda answer, task: float(rules.mvbench_lmms(answer, task.answer)),
  },
  figures=figures,
)
