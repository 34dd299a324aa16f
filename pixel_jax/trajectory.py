"""The host noun: `Trajectory`, what was said, seen, sampled and earned; JSONL in and out.

Synthesis and rollout write it; SFT, RL, evaluation and the viewer read it.  The ids are
the truth: they only ever grow, and text is derived from them for reading, never the
other way round.  Operations are pure, so a trajectory stores the *calls*; the crops can
be redrawn from the media.  No jax here.

  ids       <|im_start|> ... <|vision_start|> pad pad pad <|vision_end|> ... \\boxed{O}
  sampled                                                                  ^^^^^^^^^^^
  slots                                       ^^^^^^^^^^^ Slot(media=0)
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any


@dataclasses.dataclass
class Media:
  """The name of one picture or clip of a question; it holds no pixels."""

  kind: str  # "image" or "video"
  # A file below the data root, or a name of data/media.py: "world:...", "zip:a.zip!b.png",
  # "parquet:x.parquet#12/images/0".  A list: the frames of a video.
  path: str | list[str]
  fps: float = 0.0  # frames a second of a list of frames; 0 = the file knows
  # What operations cut from where it is another picture: a control of evaluation.
  source: str | list[str] | None = None


@dataclasses.dataclass
class Task:
  """A question to be answered.  `reference` is the cue, where the source knows it."""

  id: str
  question: str
  answer: str | list[str]
  media: list[Media]
  shard: int = 0
  reference: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class OpCall:
  """One attempt at an operation, as the policy wrote it."""

  name: str
  arguments: Any  # parsed JSON; the raw text when it does not parse
  error: str | None = None  # kind of the OpError; None = it succeeded
  planted: bool = False  # a wrong operation of a synthesized trace, not to be learned


@dataclasses.dataclass
class Slot:
  """Where a picture stands in `ids`."""

  start: int  # first placeholder
  length: int  # placeholders = merged patches
  grid: tuple[int, int, int]  # patches (time, height, width)
  role: str  # pixel budget: "image", "video", "crop" or "frame"
  media: int = -1  # index into `media`; -1 = made by a call
  call: int = -1  # index into `calls`; -1 = part of the question
  index: int = 0  # which of the pictures that the call returned
  second_per_grid: float = 0.0  # videos: seconds between two temporal patches


@dataclasses.dataclass
class Trajectory:
  """One answer to a task: append-only ids with their masks, positions and pictures."""

  task: Task
  sample: int = 0  # index in its group
  profile: str = "clean"  # prompt profile
  pillow: str = ""  # version that cut and resized the pictures
  policy_step: int = -1  # training step of the policy that sampled; -1 = synthesized
  ids: list[int] = dataclasses.field(default_factory=list)
  sampled: list[bool] = dataclasses.field(default_factory=list)  # the policy's own
  weight: list[float] = dataclasses.field(default_factory=list)  # loss weight as target
  logp: list[float] = dataclasses.field(
    default_factory=list
  )  # at sampling; 0 elsewhere
  position: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)
  slots: list[Slot] = dataclasses.field(default_factory=list)
  calls: list[OpCall] = dataclasses.field(default_factory=list)
  turns: list[dict[str, str]] = dataclasses.field(default_factory=list)  # role, text
  stop: str = ""  # "answer", "turns" (too many), "length", "row" or "" (open)
  reward: dict[str, float] = dataclasses.field(default_factory=dict)
  advantage: float = 0.0

  @property
  def ops_attempted(self) -> int:
    return len(self.calls)

  @property
  def ops_succeeded(self) -> int:
    return sum(call.error is None for call in self.calls)


def to_json(trajectory: Trajectory) -> str:
  """One line of JSON; floats keep every bit (repr round-trips float64)."""
  return json.dumps(dataclasses.asdict(trajectory), ensure_ascii=False)


def from_json(line: str) -> Trajectory:
  """The inverse of `to_json`: `from_json(to_json(t)) == t`."""
  return from_dict(json.loads(line))


def from_dict(fields: dict[str, Any]) -> Trajectory:
  """A trajectory of `dataclasses.asdict`, as JSON or parquet give it back."""
  d = dict(fields)
  task = dict(d.pop("task"))
  task["media"] = [Media(**m) for m in task["media"]]
  d["position"] = [tuple(p) for p in d["position"]]
  d["slots"] = [Slot(**{**s, "grid": tuple(s["grid"])}) for s in d["slots"]]
  d["calls"] = [OpCall(**c) for c in d["calls"]]
  return Trajectory(task=Task(**task), **d)


def host_file(stem: str, host: int, hosts: int) -> str:
  """The name below trajectories/ of what one of several hosts played."""
  return f"{stem}.{host:03d}.jsonl" if hosts > 1 else f"{stem}.jsonl"


def write_jsonl(path: str | pathlib.Path, trajectories: Iterable[Trajectory]) -> None:
  """`write_lines` of trajectories."""
  write_lines(path, map(to_json, trajectories))


def write_lines(path: str | pathlib.Path, lines: Iterable[str]) -> None:
  """Writes the whole file or nothing (a killed run leaves no half line behind)."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(path.name + ".partial")
  with partial.open("w", encoding="utf-8") as f:
    f.writelines(line + "\n" for line in lines)
  partial.replace(path)


def read_jsonl(path: str | pathlib.Path) -> Iterator[Trajectory]:
  with pathlib.Path(path).open(encoding="utf-8") as f:
    for line in f:
      yield from_json(line)
