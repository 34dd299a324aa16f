"""The fleet: this host's engines, side by side on the same weights.

  state["params"] --sync: one reshard of all hosts--> a copy of the weights per engine
  tasks --by logical shard--> engines, a thread each --> groups in the order of the tasks

An engine is a tensor group of 1, 2 or 4 devices of one host and knows of no other.
Which engine of the run plays a question follows from the question's shard alone, so one
host with four engines deals as four hosts with one.  Hosts need neither lock-step nor
collectives while they play: they meet when the last has ended.
"""

import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import jax

from pixel_jax import parallel
from pixel_jax.fields import PositiveInt
from pixel_jax.model import hf, qwen2_5_vl
from pixel_jax.model.config import ModelConfig
from pixel_jax.rollout import placement
from pixel_jax.rollout.engine import Engine, Finished
from pixel_jax.trajectory import Task


class Fleet:
  """The engines of this host.

  Args:
    make: one engine of `config.merged`.
    config: of the model that is trained.
    mesh: the train mesh, whose devices the engines share.
    shards: logical shards of the data, a multiple of the engines of all hosts.
    tensor: devices of an engine; a divisor of those of a host.
  """

  def __init__(
    self,
    make: Callable[[], Engine],
    config: ModelConfig,
    mesh: jax.sharding.Mesh,
    *,
    shards: int,
    tensor: PositiveInt = 1,
  ):
    rows = placement.engine_mesh(mesh, tensor).devices
    mine = sum(row[0].process_index == jax.process_index() for row in rows)
    if shards % len(rows):
      raise ValueError(
        f"{shards=} of the data for {len(rows)} engines of {tensor=} devices: an engine "
        "plays whole shards. Make data.shards a multiple of the engines, or tensor larger."
      )
    self.each = shards // len(rows)  # shards of an engine
    self.first = jax.process_index() * mine  # engine of this host
    self.engines = [make() for _ in range(mine)]
    self._tensor, self._axes = tensor, hf.logical_axes(config.merged)
    self._prepare = functools.partial(prepare, config)

  def sync(self, params: dict) -> list[dict]:
    """The weights of the policy, for each engine; all processes call it together.

    Adapters are merged and weights narrowed to the compute dtype before anything moves;
    norm scales stay f32.
    """
    parallel.barrier("sync")
    return placement.to_engines(
      params, self._axes, tensor=self._tensor, prepare=self._prepare
    )

  def run(
    self,
    params: Sequence[dict],
    tasks: Sequence[Task],
    *,
    stop: Callable[[], bool] = lambda: False,
    ended: Callable[[int, Finished], None] = lambda task, finished: None,
    **settings: Any,
  ) -> list[list[Finished]]:
    """Plays the tasks of this host, as `Engine.run` does; returns when all hosts have.

    ValueError when the prompts of all tasks of all hosts have no room.

    Args:
      params: of `sync`.
      tasks: each goes to the engine of its shard.
      stop: asked before the first and after every rollout; once it says yes all of
        this host are given up, and the result is [].
      ended, settings: those of `Engine.run`.
    """
    dealt: list[list[int]] = [[] for _ in self.engines]
    for i, task in enumerate(tasks):
      dealt[task.shard // self.each - self.first].append(i)
    over = threading.Event()  # one has failed, or was stopped

    def check() -> None:
      if over.is_set() or stop():
        raise _Stopped

    def play(engine: Engine, weights: dict, mine: list[int]) -> list[list[Finished]]:
      engine.stats, engine.refusal = {}, ""
      if not mine:
        return []
      try:
        check()

        def one_ended(i: int, finished: Finished) -> None:
          check()
          ended(mine[i], finished)

        chosen = [tasks[i] for i in mine]
        return engine.run(weights, chosen, ended=one_ended, **settings)
      except BaseException:
        over.set()
        raise

    with ThreadPoolExecutor(len(self.engines)) as pool:
      futures = [
        pool.submit(play, *each)
        for each in zip(self.engines, params, dealt, strict=True)
      ]
      try:
        wait(futures)
      except BaseException:  # Ctrl-C: the threads must hear of it
        over.set()
        raise
    errors = [e for f in futures if (e := f.exception())]
    for error in errors:
      if not isinstance(error, _Stopped):
        raise error
    parallel.barrier("rollouts")
    n = parallel.total({
      "groups": len(tasks),
      "refused": sum(e.stats.get("rollout/too_long_prompts", 0) for e in self.engines),
    })  # fmt: skip
    if n["refused"] == n["groups"] > 0:
      told = [e.refusal for e in self.engines if e.refusal]
      raise ValueError(told[-1] if told else "no prompt of the other hosts has room")
    if errors:
      return []
    groups: list[list[Finished]] = [[] for _ in tasks]
    if not settings.get("keep", True):
      return []
    for mine, future in zip(dealt, futures):
      for i, group in zip(mine, future.result()):
        groups[i] = group
    return groups

  def refuses(self, tokens: int, patches: Sequence[int], row=None) -> str:
    """`Engine.refuses`; all engines are alike."""
    return self.engines[0].refuses(tokens, patches, row)

  def stats(self) -> dict[str, float]:
    """Of the last run, over the engines of all hosts, which ask together."""
    own = [e.stats for e in self.engines if e.stats]
    return add_stats([s for part in parallel.gather_json(own) for s in part])


class _Stopped(Exception):
  """Ends the run of an engine whose rollouts are not wanted any more."""


def prepare(config: ModelConfig, params: dict) -> dict:
  """What engines take of the trained parameters, before it is laid out for them."""
  return qwen2_5_vl.cast(config, qwen2_5_vl.merge(config, params))


def add_stats(parts: Sequence[dict[str, float]]) -> dict[str, float]:
  """Statistics of several engines as if of one.

  Counts add up, times are those of the slowest.  Rates are means, weighted with what
  they are rates of as far as an engine tells it: the lanes of the decoding loop.
  """
  if len(parts) == 1:
    return dict(parts[0])
  merged: dict[str, float] = {}
  for name in dict.fromkeys(k for part in parts for k in part):
    values = [(part[name], _lanes(part)) for part in parts if name in part]
    if name.endswith("_s"):
      merged[name] = max(v for v, _ in values)
    elif name in RATES:
      merged[name] = sum(v * n for v, n in values) / (sum(n for _, n in values) or 1.0)
    else:
      merged[name] = sum(v for v, _ in values)
  return merged


RATES = (
  "rollout/occupancy",
  "rollout/occupancy_steady",
  "rollout/waiting",
  "rollout/host_syncs_per_chunk",
  "rollout/prefills_per_group",
)


def _lanes(part: dict[str, float]) -> float:
  """How many tokens all lanes could have sampled; `occupancy` of them were."""
  occupancy = part.get("rollout/occupancy", 0.0)
  return part["rollout/tokens"] / occupancy if occupancy else 0.0
