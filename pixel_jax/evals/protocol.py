"""How a model is let loose on a benchmark, and what is done to it meanwhile.

A protocol says which words a question gets, and what of the reply is the answer:

  official  the benchmark's own prompt; the whole reply; greedy, as many tokens as it allows
  pixel     the prompt of Pixel Reasoner with operations; the boxed answer
  text      the same without operations

A mode is a control, so that one can see whether a model looks:

  free      nothing is done
  forbidden no token that begins a call is ever drawn
  forced    its first turn begins with a call
  swapped   forced, but operations return the pictures of another scene
  blank     operations return grey pictures
  masked    the target is grey in the picture that is shown and cut from
  likelihood  (official) the options are said for it, and the likeliest is its answer

A model that really looks falls to guessing when swapped, blank or masked.  Forbidding
changes the logits of a few tokens only, so what it costs is what looking is worth.  A mode
is a map from task to task, so its trajectories are stored and can be redrawn.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pixel_jax import answers
from pixel_jax.chat import encode, template
from pixel_jax.data import media
from pixel_jax.evals.benchmark import Benchmark, Row, with_options
from pixel_jax.trajectory import Task, Trajectory


@dataclasses.dataclass(frozen=True)
class Protocol:
  """How a model is asked.

  Attributes:
    ask: a question as the user's turn has it, but for what the prompt profile adds.
    talk: the codec of its conversations.
    decode: the sampling settings, from those of the config.
    answer: what of a trajectory the rules are given.
    modes: that make sense.
  """

  name: str
  ask: Callable[[Benchmark, Task], str]
  talk: Callable[[Benchmark, encode.Codec], encode.Codec]
  decode: Callable[[Benchmark, dict[str, Any]], dict[str, Any]]
  answer: Callable[[Trajectory], str]
  modes: tuple[str, ...]


def _boxed(trajectory: Trajectory) -> str:
  """The answer of the last turn; "" where the rollout gave none."""
  if trajectory.stop != "answer":
    return ""
  return answers.extract(trajectory.turns[-1]["text"]) or ""


def _reply(trajectory: Trajectory) -> str:
  """All of the reply, also where it was cut off, as harnesses do."""
  return trajectory.turns[-1]["text"] if any(trajectory.sampled) else ""


def _say_options(codec: encode.Codec) -> Callable:
  def script(task: Task, sample: int) -> list[list[int]]:
    options = [*task.reference["options"].values()]
    said = options[min(sample, len(options) - 1)]
    return [[*codec.tokenizer.encode(said), codec.tokenizer.im_end]]

  return script


def _greedy(benchmark: Benchmark, settings: dict[str, Any]) -> dict[str, Any]:
  most = min(settings["max_new_tokens"], benchmark.tokens)
  return settings | {"temperature": 0.0, "max_turns": 1, "max_new_tokens": most}


OFFICIAL = Protocol(
  "official",
  ask=lambda benchmark, task: benchmark.ask(task),
  talk=lambda benchmark, codec: dataclasses.replace(
    codec, tools=False, system=benchmark.system
  ),
  decode=_greedy,
  answer=_reply,
  modes=("free", "masked", "likelihood"),
)
PIXEL = Protocol(
  "pixel",
  ask=lambda benchmark, task: with_options(task),
  talk=lambda benchmark, codec: codec,
  decode=lambda benchmark, settings: settings,
  answer=_boxed,
  modes=("free", "forbidden", "forced", "swapped", "blank", "masked"),
)
TEXT = Protocol(
  "text",
  ask=lambda benchmark, task: with_options(task),
  talk=lambda benchmark, codec: dataclasses.replace(codec, tools=False),
  decode=lambda benchmark, settings: settings,
  answer=_boxed,
  modes=("free", "masked"),
)
PROTOCOLS = {p.name: p for p in (OFFICIAL, PIXEL, TEXT)}
FORCE = {"forbidden": "answer", "forced": "operate", "swapped": "operate"}
MODES = ("free", "forbidden", "forced", "swapped", "blank", "masked", "likelihood")


def allows(benchmark: Benchmark, protocol: Protocol, mode: str) -> bool:
  """Whether a mode makes sense there: "masked" wants boxes, "swapped" other scenes."""
  if mode not in protocol.modes:
    return False
  if mode == "swapped":
    return benchmark.other_scene is not None
  if mode == "masked":
    return benchmark.boxes is not None
  return mode != "likelihood" or benchmark.likelihood


def altered(benchmark: Benchmark, mode: str, task: Task) -> Task:
  """The task as a mode has it: other pictures are shown, or cut from."""
  if mode == "swapped":
    others = benchmark.other_scene(task).media
    changed = [
      dataclasses.replace(m, source=other.path) for m, other in zip(task.media, others)
    ]
  elif mode == "blank":
    changed = [dataclasses.replace(m, source=media.blank(m.path)) for m in task.media]
  elif mode == "masked":
    first, *others = task.media  # the boxes are those of the first picture
    hidden = media.masked(first.path, benchmark.boxes(task))
    changed = [dataclasses.replace(first, path=hidden), *others]
  else:
    return task
  return dataclasses.replace(task, media=changed)


def judge(trajectory: Trajectory) -> float:
  """1.0 when the answer is right; a rollout that gave no answer is wrong.

  The rule of training, and of questions without a benchmark.
  """
  if trajectory.stop != "answer":
    return 0.0
  return answers.judge(trajectory.turns[-1]["text"], trajectory.task.answer)


def score(
  benchmark: Benchmark, protocol: Protocol, task: Task, trajectory: Trajectory
) -> Row:
  """What the rules of a benchmark make of a trajectory."""
  answer = protocol.answer(trajectory)
  if protocol is OFFICIAL and benchmark.opening:
    answer = answer.removeprefix(benchmark.opening)
  asked = protocol is OFFICIAL or trajectory.stop == "answer"
  scores = {}
  if benchmark.judge is not None:
    scores["judge"] = float(benchmark.judge(trajectory))
  for name, rule in benchmark.rules.items():
    scores.setdefault(name, float(rule(answer, task)) if asked else 0.0)
  return Row(task, trajectory, answer, scores)


def likeliest(task: Task, said: Sequence[Trajectory]) -> Row:
  """The option whose tokens have the highest mean log-prob, as V*'s own program has it.

  penghao-wu/vstar vstar_bench_eval.py: multiple_choices_inference, which counts the end of
  the turn as one of them.
  """
  letters = [*task.reference["options"]]
  means = []
  for trajectory in said[: len(letters)]:
    logp = [p for p, own in zip(trajectory.logp, trajectory.sampled) if own]
    means.append(sum(logp) / len(logp) if logp else -math.inf)
  best = max(range(len(letters)), key=means.__getitem__)
  right = float(letters[best] == task.answer and math.isfinite(means[best]))
  return Row(task, said[best], letters[best], {"likelihood": right})


# Answers that tell parsers apart: what they make of these is what a parser is.
PROBES = (
  "", "A", "(B)", "C. red", "The answer is D.", "Based on it", "An apple", "two", "3.5",
  "twenty-one", "\\boxed{B}", "<answer>A</answer>", "red", "<box>[0,0,9,9]</box> B",
)  # fmt: skip


def digests(
  benchmark: Benchmark,
  protocol: Protocol,
  questions: Sequence[Task],
  codec: encode.Codec,
) -> dict[str, str]:
  """Of each question, by its id: the prompt with its options in order, and the answer."""
  talk, found = protocol.talk(benchmark, codec), {}
  for task in questions:
    asked = dataclasses.replace(task, question=protocol.ask(benchmark, task))
    messages = encode.question_messages(talk, asked)
    told = [template.render(template.prompt(messages)), task.answer]
    found[task.id] = hashlib.blake2b(json.dumps(told).encode()).hexdigest()
  return found


def parser(benchmark: Benchmark, task: Task) -> list[list[float]]:
  """What the rules make of `PROBES` as answers to a question."""
  return [
    [float(rule(probe, task)) for probe in PROBES] for rule in benchmark.rules.values()
  ]


def fingerprint(
  benchmark: Benchmark,
  protocol: Protocol,
  mode: str,
  codec: encode.Codec,
  *,
  prompts: Mapping[str, str],
  parsed: Sequence,
  samples: int,
  seed: int,
  settings: Mapping[str, Any],
) -> str:
  """16 hex digits of all that a score depends on beside the policy.

  Prompts, options with their order, split, decoding, pixel budgets, and the parser.  Two
  scores of different ones are not comparable.

  Args:
    prompts: `digests` of all questions, those of other hosts too.
    parsed: `parser` of the first of them.
    settings: of `Engine.run`.
  """
  decoding = protocol.decode(benchmark, dict(settings))
  if decoding["temperature"] or samples > 1:
    decoding["seed"] = seed
  parts = [
    benchmark.name, protocol.name, mode, sorted(prompts.items()), [*benchmark.rules],
    parsed, benchmark.opening, sorted(decoding.items()), samples,
    sorted(codec.budgets.items()), codec.video_frames, codec.crop_source,
  ]  # fmt: skip
  told = json.dumps(parts, default=list).encode()
  return hashlib.blake2b(told, digest_size=8).hexdigest()


def play(
  engine,
  params,
  tasks: Sequence[Task],
  *,
  benchmark: Benchmark,
  protocol: Protocol,
  mode: str,
  codec: encode.Codec,
  samples: int = 1,
  ended: Callable[[int, Trajectory], None],
  settings: Mapping[str, Any],
  **rollout: Any,
) -> None:
  """Plays `samples` rollouts of every task, those of one as one group.

  Args:
    tasks: as the benchmark has them.
    samples: with "likelihood" as many as there are options at most.
    ended: called with the place of its task and every trajectory, as they end.
    settings: of sampling, as the config has them.
    rollout: seed and load_media of `Engine.run`.
  """
  asked = [
    dataclasses.replace(
      altered(benchmark, mode, task), question=protocol.ask(benchmark, task)
    )
    for task in tasks
  ]
  talk = protocol.talk(benchmark, codec)
  script, decoding = None, protocol.decode(benchmark, dict(settings))
  if mode == "likelihood":
    asked = [dataclasses.replace(t, question=q.question) for t, q in zip(asked, tasks)]
    options = [o for task in tasks for o in task.reference["options"].values()]
    longest = max((len(talk.tokenizer.encode(o)) for o in options), default=0)
    script, decoding["max_new_tokens"] = _say_options(talk), longest + 1
  elif protocol is OFFICIAL and benchmark.opening:
    begin = talk.tokenizer.encode(benchmark.opening)
    script = lambda task, sample: [begin]  # noqa: E731

  engine.run(
    params, asked, step=0, group_size=samples, codec=talk, script=script, keep=False,
    force=FORCE.get(mode), ended=lambda i, finished: ended(i, finished.trajectory),
    **decoding, **rollout,
  )  # fmt: skip
