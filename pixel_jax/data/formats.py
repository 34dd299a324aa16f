"""Formats: a record of a foreign data set -> a Task, or a Trajectory that is told.

Which layout a record has, its fields say; which file it came in does not matter.  Pure
functions, no pixels, no files.  `name` is the record's (records.py): bytes inside of it
become media named `NAME/KEY/...`.

  task                       our Trajectory (trajectory.py)
  media                      our Task
  message_list               PixelReasoner-SFT-Data                       a trace
  conversations              ShareGPT: Mini-o3, LLaMA-Factory             a trace
  messages, or prompt with completion     HF conversational rows (TRL)    a trace
  prompt with reward_model   verl, DeepEyes                               a question
  question with answer(s)    PixelReasoner-RL-Data and -EvalData          a question
  query with response        ms-swift                                     a question
  problem with solution      open-r1-multimodal                           a question
  image or video, no question     a bare one, for synthesis

A conversation may ask again after an answer, about the same pictures: every answer is
learned, and the question of the trace is the first.

A trace that is *told* has turns and calls, and no ids yet: `retell` says it again in our
protocol (system prompt, tool names, numbering) and runs its calls again, so that its ids
and its pictures are exact.  What the record shows as a result is only compared.

Deviations: pictures stand before the question, also where a record has them behind or
in between; `crop_image`, `zoom_in`, `image_zoom_in_tool` and Mini-o3's <grounding>
become `crop_image_normalized`; a hint to the tools at the end of a question is taken
off, since the prompt has its own; of PixelReasoner's traces only the last two turns of
the policy are learned, as released (pixel_reasoner.md 2.5).
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable
from typing import Any

from absl import logging

from pixel_jax import answers, trajectory
from pixel_jax.chat import template, tools
from pixel_jax.data import records
from pixel_jax.data.records import BadRecord
from pixel_jax.trajectory import Media, OpCall, Task, Trajectory

FIELDS = {f.name for f in dataclasses.fields(Task)}
NEEDED = ("id", "question", "answer", "media")
CROP = tools.OPERATIONS[0]
CROPS = (CROP, "crop_image", "zoom_in", "image_zoom_in_tool")
ROLES = {
  "system": "system",
  **dict.fromkeys(("user", "human", "tool", "observation", "function"), "user"),
  **dict.fromkeys(("assistant", "gpt", "function_call"), "assistant"),
}
HINTS = re.compile(
  r"(?:Guidelines: Understand the given visual information.*"
  r"|Please (?:think|reason) step by step, and put your final answer within "
  r"\\boxed\{\}\.\s*)\Z",
  re.DOTALL,
)
PAIRS = (("query", "response"), ("problem", "solution"))
HOLES = {"<image>": "image", "<video>": "video"}
HOLE = re.compile("|".join(HOLES))


@dataclasses.dataclass
class Turn:
  """What one side said in a record."""

  role: str  # "system", "user" or "assistant"
  text: str
  media: list[Media] = dataclasses.field(default_factory=list)


Layout = Callable[[dict[str, Any], str], Task | Trajectory]


def read(
  record: dict[str, Any], name: str, layout: Layout | None = None
) -> Task | Trajectory:
  """The record as a question or a trace; BadRecord, with its name, where it is none.

  Args:
    layout: reads records of a layout of yours; None = those known here, by their fields.
  """
  try:
    return (layout or _read)(record, name)
  except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
    text = f"no {error}" if isinstance(error, KeyError) else str(error)
    raise BadRecord(f"{name}: {text}") from error


def _read(record, name) -> Task | Trajectory:
  if "task" in record:
    return trajectory.from_dict(record)
  if "media" in record:
    return _task(record)
  if "message_list" in record:
    return _pixel_reasoner(record, name)
  if "conversations" in record:
    return _sharegpt(record, name)
  if "messages" in record or ("prompt" in record and "completion" in record):
    return _messages(record, name)
  if "prompt" in record and "reward_model" in record:
    return _verl(record, name)
  if "question" in record and ("answer" in record or "answers" in record):
    return _question(record, name)
  for asked, answered in PAIRS:
    if asked in record and answered in record:
      own = _id(record, name)
      return _asked(own, record[asked], record[answered], _column(record, name))
  if record.keys() & {"image", "video"} and "question" not in record:
    _say_unread(record)
    return Task(_id(record, name), "", "", _column(record, name))
  raise BadRecord(
    f"the fields {sorted(record)[:12]} are those of no layout known here: "
    f"a task has {', '.join(NEEDED)}; others message_list, conversations, messages, "
    "prompt and reward_model, question and answer, query and response, problem and "
    "solution, or image alone"
  )


def check_task(task: Task) -> None:
  """Raises BadRecord for a question that cannot be learned from."""
  if not task.question and not task.answer and task.media:
    raise BadRecord(
      f"task {task.id} is a bare {task.media[0].kind}; `pixel-jax synthesize` makes "
      "questions of such"
    )
  try:
    json.dumps(dataclasses.asdict(task), ensure_ascii=False).encode()
  except UnicodeEncodeError as error:
    raise BadRecord(f"task {task.id!r}: half a character ({error})") from error
  golds = task.answer if isinstance(task.answer, list) else [task.answer]
  if not golds or not all(isinstance(a, str) and a.strip() for a in golds):
    raise BadRecord(f"task {task.id}: no answer ({task.answer!r}); give it a text")
  if not isinstance(task.question, str) or not task.question.strip():
    raise BadRecord(f"task {task.id}: no question ({task.question!r})")


@functools.cache  # once a kind of record
def _warn_unread(fields: tuple[str, ...]) -> None:
  logging.warning(
    "records with a picture and no question are bare pictures; of them nobody reads %s",
    ", ".join(fields),
  )


def _say_unread(record) -> None:
  own = {"image", "images", "video", "videos", "id", "qid", "question_id", "uid"}
  if unread := sorted(
    k for k, v in record.items() if isinstance(v, str) and k not in own
  ):
    _warn_unread(tuple(unread))


# ---- Questions -----------------------------------------------------------------------


def _task(record) -> Task:
  missing = [k for k in NEEDED if k not in record]
  unknown = sorted(set(record) - FIELDS)
  if missing or unknown:
    raise BadRecord(
      f"a task needs {', '.join(NEEDED)}; missing {missing}, unknown {unknown}"
    )
  if not all(isinstance(m, dict) for m in record["media"]):
    raise BadRecord(
      f"media is {record['media']!r:.80}; expected a list of "
      '{"kind": "image" or "video", "path": ...}'
    )
  media, golds = [Media(**m) for m in record["media"]], record["answer"]
  if isinstance(golds, list):
    golds = [g if isinstance(g, str) else _gold(g) for g in golds]
  elif not isinstance(golds, str):
    golds = _gold(golds)  # a number
  own = {"id": str(record["id"]), "media": media, "answer": golds}
  task = Task(**record | own)
  check_task(task)
  return task


def _question(record, name) -> Task:
  """PixelReasoner-RL-Data: {qid, question, answer: [..], image: [..], is_video}."""
  media = _column(record, name)
  if record.get("is_video") and media and media[0].kind == "image":
    media = [Media("video", [m.path for m in media])]
  answer = record["answers"] if "answer" not in record else record["answer"]
  return _asked(_id(record, name), record["question"], answer, media)


def _verl(record, name) -> Task:
  """{prompt: [{role, content}], images: [..], reward_model: {ground_truth}, ...}."""
  info = record.get("extra_info") or {}
  question = info.get("question")
  if question is None:
    users = [t for t in _turns(record["prompt"], None) if t.role == "user"]
    if not users:
      raise BadRecord("the prompt has no turn of a user")
    question = users[-1].text
  own = info.get("index", info.get("id"))
  own = name if own is None else f"{record.get('data_source', 'verl')}/{own}"
  gold = record["reward_model"].get("ground_truth")
  return _asked(own, question, gold, _column(record, name))


def _asked(own: str, question: Any, answer: Any, media: list[Media]) -> Task:
  if not isinstance(question, str):
    raise BadRecord(f"the question is {type(question).__name__}; expected text")
  golds = answer if isinstance(answer, list) else [answer]
  golds = [_gold(g) for g in golds]
  task = Task(own, clean(question), golds[0] if len(golds) == 1 else golds, media)
  check_task(task)
  return task


def _gold(answer: Any) -> str:
  if not isinstance(answer, str | int | float):
    raise BadRecord(f"no answer ({answer!r:.60}); give it a text")
  text = str(answer).lower() if isinstance(answer, bool) else str(answer)
  box = answers.boxed(_box_answer(text))
  return (text if box is None else box).strip()


def _box_answer(text: str) -> str:
  """A text whose last <answer>..</answer> is a \\boxed{..} instead."""
  before, opened, rest = text.rpartition("<answer>")
  inside, closed, after = rest.partition("</answer>")
  if not (opened and closed):
    return text
  return f"{before}\\boxed{{{inside.strip()}}}{after}"


def clean(question: str) -> str:
  """A question without what the prompt adds again: hints, places of its pictures."""
  text, before = HINTS.sub("", question).strip(), None
  while text != before:
    before = text
    for hole in HOLES:
      text = text.removeprefix(hole).removesuffix(hole).strip()
  return text


def _id(record, name) -> str:
  for key in ("qid", "id", "question_id", "uid"):
    if record.get(key) not in (None, ""):
      return str(record[key])
  return name


# ---- Pictures of a record ------------------------------------------------------------


def _column(record, name) -> list[Media]:
  """The media that stand beside the text: image(s), video(s)."""
  out = []
  for key in ("images", "image"):
    if key in record:
      values = record[key] if isinstance(record[key], list) else [record[key]]
      many = isinstance(record[key], list)
      for i, x in enumerate(values):
        place = f"{name}/{key}/{i}" if many else f"{name}/{key}"
        out.append(Media("image", _path(x, place)))
      break
  for key in ("videos", "video"):
    if key in record:
      out += _clips(record[key], f"{name}/{key}", several=key == "videos")
      break
  return out


def _clips(x, place: str, several: bool) -> list[Media]:
  """One clip, or a list of them; a clip is a file or the list of its frames."""
  if several:
    return [m for i, v in enumerate(x) for m in _clips(v, f"{place}/{i}", False)]
  if isinstance(x, dict) and isinstance(x.get("video"), list):
    x, place = x["video"], f"{place}/video"
  if isinstance(x, list):
    if not x:
      raise BadRecord("a video of 0 frames")
    return [Media("video", [_path(v, f"{place}/{i}") for i, v in enumerate(x)])]
  return [Media("video", _path(x, place))]


def _path(x: Any, place: str) -> str:
  """The name of a picture: its path, or its place where the record holds its bytes."""
  if isinstance(x, bytes):
    return place
  if isinstance(x, dict):  # {bytes, path} of HF datasets, {"image": ..}, {"url": ..}
    for key in ("bytes", "image", "video", "image_url", "url", "path"):
      if x.get(key) is not None:
        return _path(x[key], f"{place}/{key}")
  if isinstance(x, str) and x.strip():
    if x.startswith("data:") or records.is_base64(x):
      return place
    if re.match(r"(?:https?|ftp|s3|gs)://", x):
      raise BadRecord(f"media {x[:80]!r} lies in the net; download it below data.root")
    return x.removeprefix("file://")
  raise BadRecord(f"a picture is {x!r:.60}; expected a path, bytes or a data: URI")


# ---- Traces --------------------------------------------------------------------------


def _pixel_reasoner(record, name) -> Trajectory:
  """{qid, message_list: [{role, content: [{text} | {image} | {video: [..]}]}]}."""
  turns = _turns(record["message_list"], None, f"{name}/message_list")
  return _told(_id(record, name), turns, last=2)


def _sharegpt(record, name) -> Trajectory:
  """{conversations: [{from, value}], images: [..]}, a place in a text for each."""
  messages = [
    {"role": m.get("from", m.get("role")), "content": m.get("value", m.get("content"))}
    for m in record["conversations"]
  ]
  return _told(_id(record, name), _with_column(messages, record, name))


def _messages(record, name) -> Trajectory:
  """HF: {messages: [{role, content}], images: [..]}, or prompt and completion."""
  key = "messages"
  messages = record.get(key)
  if messages is None:
    key, messages = "prompt", []
    for side, role in (("prompt", "user"), ("completion", "assistant")):
      said = record[side]
      messages += said if isinstance(said, list) else [{"role": role, "content": said}]
  return _told(_id(record, name), _with_column(messages, record, name, f"{name}/{key}"))


def _with_column(messages, record, name, place: str = "") -> list[Turn]:
  """The turns; the media beside them go to their places, or all to the question."""
  beside = None
  if any(k in record for k in ("images", "image", "videos", "video")):
    beside = {"image": [], "video": []}
    for media in reversed(_column(record, name)):
      beside[media.kind].append(media)
  turns = _turns(messages, beside, place)
  rest = [media for kind in (beside or {}).values() for media in reversed(kind)]
  user = next((t for t in turns if t.role == "user"), None)
  if rest and user is not None:
    if any(t.media for t in turns):
      raise BadRecord(f"{len(rest)} media have no place in the text")
    user.media = rest
  return turns


def _turns(messages, beside, place: str = "") -> list[Turn]:
  """Messages as turns.

  Args:
    beside: media of the columns by kind, the last one first, taken at their places;
      None = there is no column, and <image> in a text is only text.
  """
  if not isinstance(messages, list):
    raise BadRecord(f"the messages are {type(messages).__name__}; expected a list")
  turns = []
  for i, message in enumerate(messages):
    role = ROLES.get(message.get("role"))
    if role is None:
      raise BadRecord(f"message {i} has the role {message.get('role')!r:.40}")
    turn = Turn(role, "")
    content = message.get("content", "")
    items = [{"text": content}] if isinstance(content, str) else content
    for j, item in enumerate(items):
      at = f"{place}/{i}/content/{j}"
      if isinstance(item.get("video"), list):
        turn.media += _clips(item["video"], f"{at}/video", several=False)
      elif found := [k for k in ("image", "image_url", "video") if k in item]:
        kind = "video" if found[0] == "video" else "image"
        turn.media.append(Media(kind, _path(item[found[0]], f"{at}/{found[0]}")))
      elif item.get("type") in ("image", "video"):
        turn.media.append(_next(beside, item["type"], i))
      elif "text" in item:
        turn.text += item["text"]
        if role == "user" and beside is not None:
          holes = HOLE.findall(item["text"])
          turn.media += [_next(beside, HOLES[hole], i) for hole in holes]
      else:
        raise BadRecord(f"message {i} holds {sorted(item)}; expected text or media")
    if message.get("role") == "function_call":
      turn.text = f"{tools.OPEN}\n{turn.text.strip()}\n{tools.CLOSE}"
    for call in message.get("tool_calls") or ():
      call = call.get("function", call)
      arguments = call["arguments"]
      if isinstance(arguments, str):
        arguments = json.loads(arguments)
      turn.text += tools.call_text(call["name"], arguments)
    turns.append(turn)
  return turns


def _next(beside, kind: str, i: int) -> Media:
  if not (beside and beside[kind]):
    raise BadRecord(f"message {i} has a place for the {kind} that the record lacks")
  return beside[kind].pop()


def _told(own: str, turns: list[Turn], last: int = 0) -> Trajectory:
  """The trace of question, policy, result, policy, ..., told in our words.

  Args:
    last: so many turns of the policy are learned, calls before them are planted; 0 =
      all.
  """
  turns = [t for t in turns if t.role != "system"]
  for i, turn in enumerate(turns):
    if turn.role != ("user", "assistant")[i % 2]:
      raise BadRecord(f"turn {i} is the {turn.role}'s; expected user, assistant, ...")
  if not turns or len(turns) % 2:
    raise BadRecord(f"{len(turns)} turns; expected to end with one of the assistant")
  asked, said = turns[0], [_in_protocol(t.text, turns[0]) for t in turns[1::2]]
  said = [_box_answer(text) for text in said]
  first = next((x for x in said if tools.parse_call(x, "clean") is None), said[-1])
  answer = answers.boxed(first)  # of the question; others may follow
  task = Task(
    own,
    clean(asked.text),
    (first if answer is None else answer).strip(),
    asked.media,
  )
  check_task(task)
  t = Trajectory(task, stop="answer")
  t.turns.append({"role": "user", "text": task.question})
  for i, text in enumerate(said):
    call, final = tools.parse_call(text, "clean"), i == len(said) - 1
    next_turn = None if final else turns[2 * i + 2]
    if call is None and not final and next_turn.media:
      raise BadRecord(
        f"turn {2 * i + 1} of the assistant is no call: {text[-60:]!r}, and pictures "
        "follow it; expected them behind a call, or in the first question"
      )
    if call is not None and final:
      raise BadRecord(
        f"turn {2 * i + 1} of the assistant ends with a call: {text[-60:]!r}; expected "
        "an answer"
      )
    t.turns.append({"role": "assistant", "text": text})
    if call is not None:
      planted = bool(last) and i < len(said) - last
      t.calls.append(OpCall(call.name, call.arguments, planted=planted))
    if next_turn is not None:  # a result, or another question
      shown = template.IMAGE * len(next_turn.media)
      words = next_turn.text if call is not None else clean(next_turn.text)
      t.turns.append({"role": "user", "text": words + shown})
  return t


def _in_protocol(text: str, asked: Turn) -> str:
  """A turn whose call has our name and arguments; what has them already stays."""
  text = text.removesuffix(template.END).rstrip()
  before, opened, rest = text.rpartition("<grounding>")
  if opened and rest.endswith("</grounding>"):
    # Mini-o3: {"bbox_2d": [..], "source": "original_image" | "observation_2"}
    arguments = json.loads(rest.removesuffix("</grounding>"))
    source = str(arguments.get("source", "original_image"))
    number = re.fullmatch(r"original_image|observation_(\d{1,3})", source)
    if number is None:
      raise BadRecord(f"the source of a <grounding> is {source!r:.60}")
    target = 1 if number[1] is None else len(asked.media) + int(number[1])
    box = {"bbox_2d": arguments.get("bbox_2d"), "target_image": target}
    return before + tools.call_text(CROP, box)
  call = tools.parse_call(text, "clean")
  named = call.name if call else ""
  if named not in CROPS[1:]:
    return text
  raw = json.loads(text.rsplit(tools.OPEN, 1)[1].split(tools.CLOSE, 1)[0])
  arguments = raw.get("arguments") if isinstance(raw, dict) else None
  if not isinstance(arguments, dict):
    raise BadRecord(f"the arguments of {named} are {arguments!r:.60}")
  box = {
    "bbox_2d": arguments.get("bbox_2d"),
    "target_image": arguments.get("target_image", 1),
  }
  return text.rpartition(tools.OPEN)[0] + tools.call_text(CROP, box)
