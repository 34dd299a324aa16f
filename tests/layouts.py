"""Small data sets in the true layouts of others, made from a seed; not a test.

A layout, called with (root, n), writes n records and gives their URI.  What stands in
the files is read again in the tests by the files' own readers.
"""

import io
import json
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pixel_jax.chat import encode, tokenizer
from pixel_jax.configs import common
from pixel_jax.data import world

# Small views of these pictures, no two roles the same.
BUDGETS = {
  "image": (56 * 56, 84 * 84),
  "video": (28 * 28, 28 * 28),
  "crop": (28 * 28, 56 * 56),
  "frame": (28 * 28, 56 * 56),
}
HINT = (
  "\n\nGuidelines: Understand the given visual information and the user query. "
  "Determine if it is beneficial to employ the given visual operations (tools). For a "
  "video, we can look closer by `select_frames`. For an image, we can look closer by "
  "`crop_image`. Reason with the visual information step by step, and put your final "
  "answer within \\boxed{}."
)
SYSTEM = "You are a helpful assistant.\n\n# Tools\n..."
PICTURES = 4  # distinct ones; a data set of 1,000 names them over and over


def codec(folder) -> encode.Codec:
  words = tokenizer.make_tiny(folder, world.scaffolds())
  return encode.Codec(tokenizer=words, budgets=BUDGETS, video_frames=16)


def world_codec(folder) -> encode.Codec:
  """That of the tiny configs."""
  words = tokenizer.make_tiny(folder, world.scaffolds())
  return encode.Codec(tokenizer=words, **common.codec("tiny"))


def picture(i: int) -> Image.Image:
  rng = np.random.default_rng(i)
  return Image.fromarray(rng.integers(0, 256, (48 + 4 * i, 64, 3), np.uint8))


def encoded(i: int, kind: str = "PNG") -> bytes:
  out = io.BytesIO()
  picture(i % PICTURES).save(out, kind)
  return out.getvalue()


def frames(i: int) -> list[str]:
  return [f"videos/{i % 2}/{f}.jpg" for f in range(16)]


def media_files(root) -> None:
  """images/0.png ... and videos/0/0.jpg ... as files."""
  for folder in ("images", "videos/0", "videos/1"):
    (root / folder).mkdir(parents=True, exist_ok=True)
  for i in range(PICTURES):
    (root / f"images/{i}.png").write_bytes(encoded(i))
  for i in range(2):
    for f, path in enumerate(frames(i)):
      Image.new("RGB", (40, 36), (f * 15, 100 * i, 7)).save(root / path)


def zipped(root, inner: bool = True) -> None:
  """The same in images.zip and videos.zip, and no more as files."""
  for folder in ("images", "videos"):
    with zipfile.ZipFile(root / f"{folder}.zip", "w", zipfile.ZIP_DEFLATED) as z:
      for path in sorted((root / folder).rglob("*.*")):
        z.write(path, path.relative_to(root if inner else root / folder))
        path.unlink()


def crop(box, target, name="crop_image_normalized") -> str:
  call = json.dumps(
    {"name": name, "arguments": {"bbox_2d": box, "target_image": target}}
  )
  return f"Look closer.<tool_call>{call}</tool_call>"


def select(numbers) -> str:
  return (
    '<tool_call>{"name": "select_frames", "arguments": {"target_frames": '
    f"{numbers}}}}}</tool_call>"
  )


# ---- Traces --------------------------------------------------------------------------


def pixel_reasoner_sft(root, n: int) -> str:
  """release.json: every key of a content is there, null where it is not meant."""

  def item(**one):
    return {"type": next(iter(one)), "text": None, "image": None, "video": None, **one}

  def said(role, *items):
    return {"role": role, "content": list(items)}

  def crops(i, *boxes):
    turns = []
    for k, box in enumerate(boxes):
      turns.append(said("assistant", item(text=crop(box, 1))))
      result = "\nHere is the cropped image (Image Size: 56x56):"
      turns.append(
        said("user", item(text=result), item(image=f"images/{(i + k) % PICTURES}.png"))
      )
    return turns

  rows = []
  for i in range(n):
    kind = ("single", "recrop", "video", "text")[i % 4]
    first = [item(text=f"Which letter is number {i}?{HINT}")]
    if kind in ("single", "recrop"):
      first.append(item(image=f"images/{i % PICTURES}.png"))
    if kind == "video":
      first.append(item(video=frames(i)))
    turns = [said("system", item(text=SYSTEM)), said("user", *first)]
    if kind == "single":
      turns += crops(i, [0.1, 0.1, 0.6, 0.7])
    if kind == "recrop":
      turns += crops(i, [0.5, 0.5, 0.9, 0.9], [0.0, 0.25, 0.5, 0.75])
    if kind == "video":
      turns += [
        said("assistant", item(text=select([3, 5]))),
        said(
          "user",
          item(text="\nHere are the selected frames: "),
          *(item(image=frames(i)[f - 1]) for f in (3, 5)),
        ),
      ]
    turns.append(said("assistant", item(text=f"I see. \\boxed{{{'ABCD'[i % 4]}}}")))
    rows.append({"qid": f"{kind}-{i}", "message_list": turns})
  (root / "release.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False))
  media_files(root)
  return "json:release.json"


def mini_o3(root, n: int) -> str:
  """ShareGPT: relative boxes in <grounding>, the answer in <answer>."""
  rows = []
  for i in range(n):
    ground = (
      '<think>Small.</think><grounding>{"bbox_2d": [0.2, 0.1, 0.9, 0.8], "source": '
    )
    turns = [
      {"from": "system", "value": "Output <grounding>{...}</grounding> to zoom in."},
      {"from": "human", "value": f"<image>\nWhat is on sign {i}?"},
      {"from": "gpt", "value": ground + '"original_image"}</grounding>'},
      {"from": "human", "value": "After the above Action 0 (Observation 1):\n<image>."},
      {"from": "gpt", "value": ground + '"observation_1"}</grounding>'},
      {"from": "human", "value": "After the above Action 1 (Observation 2):\n<image>."},
      {"from": "gpt", "value": f"<think>Yes.</think><answer>No. {i}</answer>"},
    ]
    names = [f"images/{(i + k) % PICTURES}.png" for k in range(3)]
    rows.append({"conversations": turns, "images": names, "image_names": names[:1]})
  (root / "coldstart.json").write_text(json.dumps(rows, ensure_ascii=False))
  media_files(root)
  return "json:coldstart.json"


def messages(root, n: int) -> str:
  """HF conversational rows (TRL), in two files, pictures as {bytes, path}."""
  for part in range(2):
    rows = []
    for i in range(part * (n // 2), n if part else n // 2):
      turns = [
        ("user", [("image", None), ("text", f"Read line {i}, please.")]),
        ("assistant", [("text", crop([0.0, 0.0, 0.5, 0.6], 1))]),
        ("tool", [("text", "Here it is:"), ("image", None)]),
        ("assistant", [("text", f"It says \\boxed{{line {i}}}")]),
      ]
      rows.append(
        {
          "messages": [
            {"role": r, "content": [{"type": k, "text": t} for k, t in c]}
            for r, c in turns
          ],
          "images": [{"bytes": encoded(i + k), "path": f"{i}.png"} for k in (0, 1)],
        }
      )
    pq.write_table(
      pa.Table.from_pylist(rows), root / f"train-{part}.parquet", row_group_size=7
    )
  return "parquet:train-*.parquet"


# ---- Questions -----------------------------------------------------------------------


def pixel_reasoner_rl(root, n: int) -> str:
  rows = []
  for i in range(n):
    is_video = i % 3 == 2
    images = [f"images/{(i + k) % PICTURES}.png" for k in range(1 + i % 2)]
    rows.append(
      {
        "qid": f"tally-{i}",
        "question": f"How many are there in {i}?",
        "answer": [f"\\boxed{{{i}}}"] if i % 5 else [f"\\boxed{{{i}}}", f"{i}.0"],
        "image": frames(i) if is_video else images,
        "is_video": is_video,
      }
    )
  pq.write_table(
    pa.Table.from_pylist(rows), root / "release.parquet", row_group_size=100
  )
  media_files(root)
  return "parquet:release.parquet"


def deepeyes(root, n: int) -> str:
  rows = []
  for i in range(n):
    question = f"<image>\nWhat colour is dot {i}?\n(A) red\n(B) blue"
    rows.append(
      {
        "data_source": "vstar",
        "prompt": [
          {"role": "system", "content": "# Tools ... image_zoom_in_tool"},
          {
            "role": "user",
            "content": question
            + "\nThink first, call **image_zoom_in_tool** if needed",
          },
        ],
        "images": [{"bytes": encoded(i, "JPEG"), "path": None}],
        "ability": "vqa",
        "env_name": "visual_toolbox_v2",
        "reward_model": {"ground_truth": "AB"[i % 2], "style": "model"},
        "extra_info": {
          "question": question,
          "answer": "AB"[i % 2],
          "index": str(i),
          "split": "train",
        },
      }
    )
  pq.write_table(
    pa.Table.from_pylist(rows), root / "data_0.1.2.parquet", row_group_size=50
  )
  return "parquet:data_0.1.2.parquet"


def verl(root, n: int) -> str:
  """Generic: the question only in the prompt, pictures as {"image": path}."""
  rows = [
    {
      "data_source": "geo",
      "prompt": [{"role": "user", "content": f"<image><image>Add {i} and 1."}],
      "images": [
        {"image": f"file://{path}"} for path in ("images/0.png", "images/1.png")
      ],
      "reward_model": {"style": "rule", "ground_truth": str(i + 1)},
      "extra_info": {"index": i, "need_tools_kwargs": False},
    }
    for i in range(n)
  ]
  pq.write_table(pa.Table.from_pylist(rows), root / "verl.parquet", row_group_size=64)
  media_files(root)
  return "parquet:verl.parquet"


def ours(root, n: int) -> str:
  media_files(root)
  (root / "x.jsonl").write_text(
    "".join(json.dumps(task(i), ensure_ascii=False) + "\n" for i in range(n))
  )
  return "jsonl:x.jsonl"


def text_only(root, n: int) -> str:
  """Questions without a picture."""
  rows = [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(n)]
  (root / "text.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
  return "jsonl:text.jsonl"


def task(i: int) -> dict:
  media = [{"kind": "image", "path": f"images/{i % PICTURES}.png", "fps": 0.0}]
  return {
    "id": f"ü{i}",
    "question": f"Who is {i}?",
    "answer": f"No. {i}",
    "media": media,
  }


def array_record(root, n: int) -> str:
  from array_record.python import array_record_module

  media_files(root)
  writer = array_record_module.ArrayRecordWriter(
    str(root / "x.array_record"), "group_size:1"
  )
  for i in range(n):
    writer.write(json.dumps(task(i)).encode())
  writer.close()
  return "arrayrecord:x.array_record"


def tfds(root, n: int) -> str:
  """A prepared data set, written without TensorFlow, pictures as PNG bytes."""
  import tensorflow_datasets as lib

  with lib.core.registered.skip_registration():
    return _tfds(lib, root, n)


def _tfds(lib, root, n: int) -> str:
  class Questions(lib.core.GeneratorBasedBuilder):
    VERSION = lib.core.Version("1.0.0")

    def _info(self):
      features = {
        "question": lib.features.Text(),
        "answers": lib.features.Sequence(lib.features.Text()),
        "images": lib.features.Sequence(lib.features.Image(encoding_format="png")),
      }
      return lib.core.DatasetInfo(
        builder=self, features=lib.features.FeaturesDict(features)
      )

    def _split_generators(self, _):
      return {"train": self._generate_examples()}

    def _generate_examples(self):
      for i in range(n):
        yield (
          i,
          {
            "question": f"Où est {i} ?",
            "answers": [f"là {i}", "ici"][: 1 + i % 2],
            "images": [io.BytesIO(encoded(i + k)) for k in range(1 + i % 2)],
          },
        )

  builder = Questions(data_dir=str(root), file_format="array_record")
  builder.download_and_prepare()
  return "tfds:questions/1.0.0/train"


TRACES = (pixel_reasoner_sft, mini_o3, messages)
QUESTIONS = (pixel_reasoner_rl, deepeyes, verl, ours, text_only, array_record, tfds)
