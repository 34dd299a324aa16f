"""A benchmark: its questions in their original layout, its words, and its rules.

A file of this room makes one for each; to add another, copy one of these files.  How a
model is let loose on it is `protocol.py`.

A question is a `Task` whose `reference` holds what the benchmark knows beside the answer:

  options    {"A": "red", ...} of a choice; the answer is then a letter
  category   by which results are told
  cluster    what it shares with others: its picture, its cycle; by itself where absent
  boxes      [[x1, y1, x2, y2], ...] of its target, relative to width and height
  row        what its record says, but for the picture: for exports
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pixel_jax import answers
from pixel_jax.chat import template
from pixel_jax.data import media, records, sources
from pixel_jax.data.records import Records, SourceError
from pixel_jax.evals import rules
from pixel_jax.trajectory import OpCall, Task, Trajectory

Rule = Callable[[str, Task], float]  # (the answer, the question) -> 0 to 1


@dataclasses.dataclass(frozen=True)
class Row:
  """One answer to one question.

  Attributes:
    task: as the benchmark asks it.
    trajectory: what was said and seen.
    answer: what the protocol found in it; that is what the rules were given.
    scores: by rule.
  """

  task: Task
  trajectory: Trajectory
  answer: str
  scores: dict[str, float]

  @property
  def text(self) -> str:
    """The last turn of the policy."""
    turns = [t for t in self.trajectory.turns if t["role"] == "assistant"]
    return turns[-1]["text"] if turns else ""


def judge(answer: str, task: Task) -> float:
  """`answers.judge`, the rule that trains: text, letter or number, as a whole."""
  return answers.judge(f"\\boxed{{{answer}}}", task.answer)


def pixel_reasoner(answer: str, task: Task) -> float:
  """The released rule of Pixel Reasoner, which looks for a box."""
  return rules.pixel_reasoner(f"\\boxed{{{answer}}}", task.answer)


def with_options(task: Task) -> str:
  """The question, and a line for each of its options."""
  options = task.reference.get("options", {})
  return task.question + "".join(f"\n({k}) {v}" for k, v in options.items())


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """What a benchmark is.

  Attributes:
    name: in commands, files and tables.
    read: (library, folder) -> its questions; paths begin with the folder, which ends
      with / or is empty.
    files: what must lie in the folder, and where it comes from.
    ask: a question in the words of the official protocol.
    system, opening: official, too: the system's turn, and how the answer is made to begin.
    tokens: that an official answer may have.
    rules: by name; the first is the one that the benchmark reports.
    figures: (rows, one a question) -> what it reports beside the mean.
    likelihood: whether the official protocol also scores the options by their likelihood.
    category: of a question.
    boxes: of a question's target in its first picture; None = nobody knows them.
    covers: (task, call, earlier calls) -> whether the call shows what is asked for.
    other_scene: a task of the same kind with other pictures, for the mode "swapped".
    judge: scores a trajectory before any rule; None = there is none.
  """

  name: str = "questions"
  read: Callable[[media.Library, str], list[Task]] | None = None
  files: str = ""
  ask: Callable[[Task], str] = lambda task: task.question
  system: str = template.SYSTEM
  opening: str = ""
  tokens: int = 1024
  rules: Mapping[str, Rule] = dataclasses.field(
    default_factory=lambda: {"judge": judge}
  )
  figures: Callable[[Sequence[Row]], dict[str, Any]] = lambda rows: {}
  likelihood: bool = False
  category: Callable[[Task], str] = lambda task: task.reference.get("category", "")
  boxes: Callable[[Task], list[list[float]]] | None = None
  covers: Callable[[Task, OpCall, Sequence[OpCall]], bool] | None = None
  other_scene: Callable[[Task], Task] | None = None
  judge: Callable[[Trajectory], float] | None = None


@dataclasses.dataclass
class Questions:
  """A source (`data/sources.py`) of what a benchmark asks."""

  tasks: list[Task]
  load_media: Callable
  codec: Any
  filter: sources.Filter = sources.NO_FILTER

  def __len__(self) -> int:
    return len(self.tasks)

  def __getitem__(self, i: int) -> Task:
    return self.tasks[i]


def open_benchmark(benchmark: Benchmark, root: str, codec: Any) -> Questions:
  """The questions of a benchmark that lies in ROOT/NAME, or in ROOT itself."""
  folder = f"{benchmark.name}/"
  if not (pathlib.Path(root or ".") / folder).is_dir():
    folder = ""
  library = media.Library(root, codec.video_frames)
  try:
    tasks = benchmark.read(library, folder)
  except (SourceError, OSError, KeyError, ValueError, TypeError) as error:
    what = f"no {error}" if isinstance(error, KeyError) else str(error)
    raise SourceError(
      f"{benchmark.name}: {what}.  {pathlib.Path(root or '.').resolve() / folder} must "
      f"hold {benchmark.files}; data.root names it, or the folder above"
    ) from error
  return Questions(distinct(tasks), library.load, codec)


def distinct(tasks: list[Task]) -> list[Task]:
  """Tasks of different ids: a second one of the same gets a number."""
  seen: dict[str, int] = {}
  out = []
  for task in tasks:
    n = seen[task.id] = seen.get(task.id, 0) + 1
    out.append(task if n == 1 else dataclasses.replace(task, id=f"{task.id}#{n}"))
  return out


# ---- What the files of this room share -----------------------------------------------


def open_first(library: media.Library, folder: str, *uris: str) -> Records:
  """The records of the first of these files that is there; SourceError where none is."""
  for uri in uris:
    scheme, _, file = uri.partition(":")
    if any(pathlib.Path(library.root or ".").glob(folder + file)):
      rows = records.open_records(f"{scheme}:{folder}{file}", library.root)
      library.add(rows)
      return rows
  raise SourceError(f"none of {', '.join(u.partition(':')[2] for u in uris)} is there")


def options_of(row: Mapping[str, Any], letters: str = "ABCDEFGH") -> dict[str, str]:
  """{"A": text, ...} of the columns A, B, ... that are there."""
  return {k: str(row[k]) for k in letters if str(row.get(k, "")).strip()}


def without_pictures(row: Mapping[str, Any]) -> dict[str, Any]:
  """What a record says, but for its pictures."""
  return {k: v for k, v in row.items() if k not in ("image", "bytes", "images")}


def vlmevalkit_choice(task: Task, tail: str) -> str:
  """A choice in the words of VLMEvalKit, `ImageMCQDataset.build_prompt`."""
  hint = task.reference.get("row", {}).get("hint")
  options = "".join(f"{k}. {v}\n" for k, v in task.reference["options"].items())
  return (
    (f"Hint: {hint}\n" if hint else "")
    + f"Question: {task.question}\n"
    + f"Options:\n{options}{tail}"
  )


def letter_rule(read: Callable[[str, Mapping[str, str]], str | None]) -> Rule:
  """A rule that reads a letter, which must be that of the answer."""
  return lambda answer, task: float(
    read(answer, task.reference["options"]) == task.answer
  )


def relative(box: Sequence[float], width: int, height: int) -> list[float]:
  """A box x1, y1, x2, y2 in pixels, relative to the picture and within it."""
  sides = (width, height, width, height)
  return [min(max(v / n, 0.0), 1.0) for v, n in zip(box, sides)]


def boxes_of(task: Task) -> list[list[float]]:
  return task.reference["boxes"]


# Of a picture: a box that shows more than half of it is no closer look.
WIDEST = 0.5


def covers_boxes(task: Task, call: OpCall, earlier: Sequence[OpCall]) -> bool:
  """Whether a crop shows half of one of the target's boxes or more, enlarged.

  Boxes are those of the first picture; the profile is "clean".
  """
  shown: list[tuple | None] = [(0.0, 0.0, 1.0, 1.0)]
  shown += [None] * (len(task.media) - 1)  # other pictures of the question
  for each in [*earlier, call]:
    box = _crop(shown, each)
    if each.error is None:
      shown.append(box)
  if call.error is not None or shown[-1] is None:
    return False
  x1, y1, x2, y2 = shown[-1]
  if (x2 - x1) * (y2 - y1) > WIDEST:
    return False
  for a, b, c, d in task.reference.get("boxes", ()):
    both = max(0.0, min(c, x2) - max(a, x1)) * max(0.0, min(d, y2) - max(b, y1))
    if both >= 0.5 * (c - a) * (d - b) > 0:
      return True
  return False


def _crop(shown: Sequence[tuple | None], call: OpCall) -> tuple | None:
  """The part of the first picture that a call shows; None where it shows none of it."""
  arguments = call.arguments if isinstance(call.arguments, dict) else {}
  target, box = arguments.get("target_image"), arguments.get("bbox_2d")
  if call.error is not None or not isinstance(target, int | float) or not box:
    return None
  if not 1 <= target <= len(shown) or shown[int(target) - 1] is None:
    return None
  x1, y1, x2, y2 = shown[int(target) - 1]
  a, b, c, d = box
  w, h = x2 - x1, y2 - y1
  return x1 + a * w, y1 + b * h, x1 + c * w, y1 + d * h
