"""Told traces with exact ids: their turns are spelled, and their calls are run again."""

from pixel_jax.chat import template, tools
from pixel_jax.chat.encode import Codec, Conversation, LoadMedia
from pixel_jax.data.formats import CROP
from pixel_jax.data.records import BadRecord
from pixel_jax.pixels import ops
from pixel_jax.pixels.geometry import Pixels
from pixel_jax.trajectory import Trajectory


def retell(
  told: Trajectory, codec: Codec, load_media: LoadMedia
) -> tuple[Trajectory, list[Pixels]]:
  """A told trace with exact ids, and the pixels of its slots; its calls are run again."""
  trace = Conversation(codec, told.task, load_media)
  if told.calls and not codec.tools:
    raise BadRecord(f"task {told.task.id} calls operations, and codec.tools is False")
  said = [t["text"] for t in told.turns if t["role"] == "assistant"]
  results = [t["text"] for t in told.turns[1:] if t["role"] == "user"]
  for i, text in enumerate(said):
    call = tools.parse_call(text, codec.profile, codec.operation_names)
    if call is not None:
      text = _here(text, call, trace)
    planted = i < len(told.calls) and told.calls[i].planted
    ids = _spell(text, codec, is_call=call is not None)
    trace.add_sampled(ids, weight=0.0 if planted else 1.0)
    observation = trace.call_of_last_turn(planted=planted)
    if observation is None:
      if i < len(said) - 1:
        trace.ask(results[i])
      continue
    if observation.error and not planted:  # nobody should learn it
      raise BadRecord(
        f"task {told.task.id}: call {i + 1} fails when it is run: "
        f"{observation.error.text}"
      )
    shown, made = results[i].count(template.IMAGE), len(observation.images)
    if shown != made:
      raise BadRecord(
        f"task {told.task.id}: call {i + 1} shows {shown} pictures in the record and "
        f"{made} when it is run"
      )
    trace.observe(observation)
  return trace.finish("answer"), trace.pixels


def _here(text: str, call: tools.Call, trace: Conversation) -> str:
  """The call in the coordinates and numbers of the run's profile."""
  arguments, box, target = call.arguments, None, None
  if call.name == CROP and isinstance(arguments, dict):
    box, target = arguments.get("bbox_2d"), arguments.get("target_image")
  if not (isinstance(box, list) and len(box) == 4 and isinstance(target, int)):
    return text
  seen, number = trace.seen.pictures, target
  if seen and seen[0].kind == "video" and 2 <= target <= len(seen):
    # Released: behind the first result a clip is picture 1, and results are 2, 3, ...
    number += len(seen[0].source) - 1
  if trace.codec.profile == "clean":
    target = number
  pictures = ops.flat(trace.seen)
  pixels = all(isinstance(v, int | float) for v in box) and max(box) > 1
  if pixels and 1 <= number <= len(pictures):  # crop_image, as first published
    width, height = pictures[number - 1].size
    box = [round(v / n, 4) for v, n in zip(box, (width, height) * 2)]
  if (box, target) == (arguments["bbox_2d"], arguments["target_image"]):
    return text
  new = {**arguments, "bbox_2d": box, "target_image": target}
  return text.rpartition(tools.OPEN)[0] + tools.call_text(CROP, new)


def _spell(text: str, codec: Codec, is_call: bool) -> list[int]:
  """Ids of a turn; only the tags of its call are control tokens."""
  parts = [(text, False)]
  if is_call:
    head, opened, rest = text.rpartition(tools.OPEN)
    body, closed, _ = rest.rpartition(tools.CLOSE)
    parts = [(head, False), (opened, True), (body, False), (closed, True)]
  return [*codec.tokenizer.encode_parts(parts), codec.tokenizer.im_end]
