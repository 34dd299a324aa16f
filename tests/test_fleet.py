"""The fleet without models: who plays what, what a failure does, what is reported."""

import dataclasses
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixel_jax import parallel
from pixel_jax.model import config as model_config
from pixel_jax.model import hf, qwen2_5_vl
from pixel_jax.rollout import fleet
from pixel_jax.trajectory import Task

CONFIG = model_config.tiny(300, image_token=0, video_token=1, vision_start=2,
  vision_end=3, bos_token=4, eos_token=5)  # fmt: skip


class Recorder:
  """An engine that notes what it is given."""

  def __init__(self, play=lambda task: None, large=()):
    self.play, self.stats, self.tasks, self.weights = play, {}, [], None
    self.refusal, self.large = "", large  # shards whose prompts have no room

  def run(self, params, tasks, *, ended, **settings):
    self.tasks, self.weights, self.settings = tasks, params, settings
    for i, task in enumerate(tasks):
      self.play(task)
      ended(i, task)
    refused = [t for t in tasks if t.shard in self.large]
    self.refusal = f"{refused[-1].id} has no room" if refused else ""
    self.stats = {"rollout/tokens": 1.0 * len(tasks)}
    if refused:
      self.stats["rollout/too_long_prompts"] = 1.0 * len(refused)
    return [[task.id] for task in tasks]


def tasks(shards, each):
  return [
    Task(f"{s}/{i}", "", "", [], shard=s) for s in range(shards) for i in range(each)
  ]


def make(shards=8, tensor=1, data=4, **kwargs):
  mesh = parallel.make_mesh(data=data)
  return fleet.Fleet(
    lambda: Recorder(**kwargs), CONFIG, mesh, shards=shards, tensor=tensor
  )


@pytest.mark.parametrize("tensor, engines", [(1, 8), (2, 4), (4, 2)])
def test_shards_are_dealt_in_blocks_and_groups_come_in_order(tensor, engines):
  meet = threading.Barrier(engines)  # all play at the same time
  f = make(tensor=tensor, data=8, play=lambda task: meet.wait(10))
  given = tasks(8, 3)
  groups = f.run([f"w{i}" for i in range(engines)], given, seed=7)
  assert groups == [[t.id] for t in given]
  for i, engine in enumerate(f.engines):
    each = 8 // engines
    assert {t.shard for t in engine.tasks} == set(range(i * each, (i + 1) * each))
    assert engine.weights == f"w{i}" and engine.settings == {"seed": 7}
  assert f.stats() == {"rollout/tokens": 24.0}


def test_an_engine_without_tasks_plays_nothing_and_reports_nothing():
  f = make()
  given = [t for t in tasks(8, 2) if t.shard in (0, 7)]
  assert f.run("abcd", given) == [[t.id] for t in given]
  assert [len(e.tasks) for e in f.engines] == [2, 0, 0, 2]
  assert f.stats() == {"rollout/tokens": 4.0}
  assert f.run("abcd", []) == []


def test_shards_that_do_not_divide_are_refused():
  with pytest.raises(ValueError, match="shards=6 of the data for 4 engines"):
    make(shards=6)
  with pytest.raises(ValueError, match="do not fill a host of 4"):
    make(tensor=3)


def test_a_failure_is_raised_and_ends_the_others():
  played = []

  def play(task):
    if task.shard == 2:
      raise OSError("unreadable")
    played.append(task)
    time.sleep(0.02)

  f = make(play=play)
  with pytest.raises(OSError, match="unreadable"):
    f.run("abcd", tasks(8, 5000))
  assert len(played) < 2500  # of 3,750 that the other engines were given


def test_only_where_no_prompt_has_room_the_run_ends():
  """An engine may have a few questions only, and all of them too long."""
  assert len(make(large=(0, 1, 5)).run("abcd", tasks(8, 1))) == 8
  with pytest.raises(ValueError, match="has no room"):
    make(large=range(8)).run("abcd", tasks(8, 1))


def test_a_stop_gives_up_what_is_under_way_and_begins_nothing():
  ended = []
  f = make()
  given = tasks(8, 1000)

  def note(i, finished):
    assert finished is given[i]
    ended.append(i)

  stopped = f.run("abcd", given, ended=note, stop=lambda: len(ended) > 100)
  assert stopped == [] and 100 < len(ended) < 120
  assert f.run("abcd", tasks(8, 1), stop=lambda: True) == []
  assert f.run("abcd", tasks(8, 1)) != []


def test_statistics_of_engines_are_those_of_one():
  a = {"rollout/tokens": 30.0, "rollout/occupancy": 0.5, "rollout/chunks": 2.0,
       "rollout/prefills_per_group": 1.0, "perf/rollout_decode_s": 3.0}  # fmt: skip
  b = {"rollout/tokens": 10.0, "rollout/occupancy": 0.25, "rollout/chunks": 1.0,
       "rollout/prefills_per_group": 1.0, "perf/rollout_decode_s": 1.0}  # fmt: skip
  both = fleet.add_stats([a, b])
  assert both["rollout/tokens"] == 40 and both["rollout/chunks"] == 3
  assert both["rollout/occupancy"] == pytest.approx(40 / (60 + 40))
  assert both["rollout/prefills_per_group"] == 1
  assert both["perf/rollout_decode_s"] == 3
  assert fleet.add_stats([a]) == a and fleet.add_stats([]) == {}


@pytest.mark.slow
@pytest.mark.parametrize("tensor", [1, 2])
def test_weights_are_narrowed_before_they_are_gathered(tensor):
  config = dataclasses.replace(CONFIG, dtype="bfloat16")
  mesh = parallel.make_mesh(2, 2, 2)
  params = qwen2_5_vl.init(config, jax.random.key(0))
  axes = hf.logical_axes(config)
  laid = jax.device_put(params, parallel.shardings(mesh, axes, params))
  f = fleet.Fleet(Recorder, config, mesh, shards=8, tensor=tensor)
  copies = f.sync(laid)
  assert len(copies) == 8 // tensor
  want = qwen2_5_vl.cast(config, params)
  for copy in copies:
    jax.tree.map(np.testing.assert_array_equal, copy, want)
    assert copy["text"]["blocks"]["q"]["w"].dtype == jnp.bfloat16
  dtypes = {x.dtype.name for x in jax.tree.leaves(copies[0])}
  assert dtypes == {"bfloat16", "float32"}  # norm scales
