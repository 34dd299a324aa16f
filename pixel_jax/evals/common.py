"""What every evaluation shares: play the tasks, judge the answers, sum up.

A *mode* is what the policy may do: "free" (its own choice), "forbidden" (no token that
begins a call is ever drawn), "forced" (its first turn begins with a call) or "swapped"
(forced, but operations return the pictures of another scene: a policy that really looks
falls to guessing).  Forbidding changes the logits of a few tokens, so what it costs is
what looking is worth.
"""

import collections
import math
from collections.abc import Callable

from pixel_jax import answers
from pixel_jax.trajectory import OpCall, Task, Trajectory

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


def summarize(
  trajectories: list[Trajectory],
  covers: Callable[[Task, OpCall, list[OpCall]], bool] | None = None,
) -> dict:
  """Accuracy with its 95 % Wilson interval, and how the operations went.

  `covers(task, call, earlier calls)` tells whether a call shows what the question asks
  for; `covered` is its rate over the rollouts that operated.
  """
  n = len(trajectories)
  right = [judge(t) for t in trajectories]
  used = [t for t in trajectories if t.ops_attempted]
  calls = [c for t in trajectories for c in t.calls]
  by = collections.defaultdict(list)
  for t, r in zip(trajectories, right):
    reference = t.task.reference
    by[
      "/".join(str(reference[k]) for k in ("kind", "difficulty") if k in reference)
    ] += [r]
  out = {
    "n": n,
    "accuracy": sum(right) / n,
    "ci": wilson(sum(right), n),
    "rapr": sum(t.ops_succeeded > 0 for t in trajectories) / n,
    "ops_per_rollout": len(calls) / n,
    "error_rate": sum(c.error is not None for c in calls) / max(len(calls), 1),
    "by": {
      k: {"accuracy": sum(v) / len(v), "n": len(v)} for k, v in sorted(by.items()) if k
    },
    "stops": dict(collections.Counter(t.stop for t in trajectories)),
  }
  if covers is not None and used:
    hits = sum(
      any(covers(t.task, c, t.calls[:i]) for i, c in enumerate(t.calls)) for t in used
    )
    out |= {"covered": hits / len(used), "covered_ci": wilson(hits, len(used))}
  return out


def wilson(successes: float, n: int, z: float = 1.96) -> tuple[float, float]:
  """The 95 % interval of a rate (Wilson 1927); also sound near 0 and 1."""
  if n == 0:
    return 0.0, 1.0
  p = successes / n
  centre = p + z * z / (2 * n)
  half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
  scale = 1 + z * z / n
  return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)
