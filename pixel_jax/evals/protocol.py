"""How a policy is asked: one rollout a question, in one of four modes, and judged.

  free       it looks closer where it likes
  forbidden  no token that begins a call is ever drawn
  forced     its first turn begins with a call
  swapped    forced, but operations return the pictures of another scene

A policy that really looks falls to guessing when swapped.  Forbidding changes the logits
of a few tokens only, so what it costs is what looking is worth.
"""

from collections.abc import Callable

from pixel_jax import answers
from pixel_jax.trajectory import Task, Trajectory

FORCE = {
  "free": None,
  "forbidden": "answer",
  "forced": "operate",
  "swapped": "operate",
}


def play(
  engine,
  params,
  tasks: list[Task],
  *,
  mode: str,
  seed: int,
  load_media: Callable,
  other_scene: Callable[[Task], Task] | None = None,
  **rollout,
) -> list[Trajectory]:
  """One rollout per task, in task order; `other_scene` is what "swapped" needs."""
  if mode not in FORCE:
    raise ValueError(
      f"evaluation mode {mode!r} is unknown; allowed: {', '.join(FORCE)}"
    )
  groups = engine.run(
    params,
    tasks,
    seed=seed,
    step=0,
    group_size=1,
    load_media=load_media,
    force=FORCE[mode],
    swap=other_scene if mode == "swapped" else None,
    **rollout,
  )
  return [group[0].trajectory for group in groups]


def judge(trajectory: Trajectory) -> float:
  """1.0 when the answer is right; a rollout that gave no answer is wrong."""
  if trajectory.stop != "answer":
    return 0.0
  return answers.judge(trajectory.turns[-1]["text"], trajectory.task.answer)
