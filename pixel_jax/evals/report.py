"""What an evaluation says of its trajectories: rates with their 95 % intervals."""

import collections
import math
from collections.abc import Callable

from pixel_jax.evals.protocol import judge
from pixel_jax.trajectory import OpCall, Task, Trajectory


def summarize(
  trajectories: list[Trajectory],
  covers: Callable[[Task, OpCall, list[OpCall]], bool] | None = None,
  judge: Callable[[Trajectory], float] = judge,
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


def table(rows: list[dict]) -> str:
  """The rows as aligned text: accuracy [95 % interval], RaPR, coverage for each mode."""
  lines = []
  for row in rows:
    for mode, m in row["modes"].items():
      low, high = m["ci"]
      lines.append(
        f"{row['name']:<10} {mode:<10} accuracy {m['accuracy']:.3f} [{low:.3f}, {high:.3f}]"
        f"  RaPR {m['rapr']:.3f}  covered {m.get('covered', float('nan')):.3f}"
        f"  errors {m['error_rate']:.3f}  "
        + " ".join(f"{k} {v['accuracy']:.2f}" for k, v in m["by"].items())
      )
  return "\n".join(lines)
