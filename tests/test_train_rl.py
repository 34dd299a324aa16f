"""RL from data of every layout by one config line; pictures are decoded once."""

import collections
import importlib
import json
import os
import signal

import jax
import jax.numpy as jnp
import layouts
import ml_collections
import numpy as np
import optax
import pytest

from pixel_jax import parallel, train_rl, trajectory
from pixel_jax.chat import encode
from pixel_jax.evals import protocol
from pixel_jax.model import config as model_config
from pixel_jax.model import flops
from pixel_jax.pixels import image
from pixel_jax.run import optim


@pytest.fixture(scope="module")
def rl():
  """The tiny config on foreign data: every URI is the same programs."""
  config = importlib.import_module("pixel_jax.configs.rl").get_config("tiny")
  config.total_steps = config.eval_every = config.save_every = 1
  config.init = "random"
  config.keep_trajectories_every, config.optim.warmup_steps = 1, 0
  config.data.shards, config.eval.tasks = 2, 3
  config.rl.update(prompts_per_step=4, group_size=4, rows=4, tokens=256, patches=512)
  for rollout in (config.rollout, config.eval.rollout):
    rollout.update(max_turns=2, max_new_tokens=4)
  config.engine.update(
    slots=16, max_prompt=192, max_len=256, prompt_len=192, extend_rows=4
  )
  return config


@pytest.fixture
def run(rl, tmp_path, monkeypatch):
  """Runs on a URI; a policy that knows nothing is rewarded for something."""
  monkeypatch.setattr(protocol, "judge", lambda t: float(sum(t.ids) % 2))

  def start(root, uri, name, eval_uri="", steps=1, **data):
    config = ml_collections.ConfigDict(rl.to_dict())
    config.total_steps = config.save_every = steps
    config.data.update(root=str(root), uri=uri, **data)
    config.eval.uri = eval_uri or uri
    workdir = tmp_path / "runs" / name
    train_rl.main(config, workdir)
    text = (workdir / "metrics.jsonl").read_text()
    played = [
      t
      for file in sorted((workdir / "trajectories").iterdir())
      for t in trajectory.read_jsonl(file)
    ]
    assert len(played) == 16 * steps
    return [json.loads(line) for line in text.splitlines()], played

  return start


@pytest.mark.parametrize(
  "minibatches, replayed, each, updates",
  [(1, 0, 40.0, 1), (2, 0, 20.0, 2), (4, 0, 10.0, 3), (1, 2, 12.0, 1), (2, 2, 6.0, 2)],
)
def test_every_update_is_over_an_even_share_of_the_tokens(
  rl, minibatches, replayed, each, updates
):
  """One definition, however many minibatches and whatever was drawn again.  Of 40 tokens
  that were kept 12 have an advantage; minibatches without an example pass in the
  schedule."""
  config = ml_collections.ConfigDict(rl.to_dict())
  config.rl.minibatches = minibatches
  size = 3 if minibatches == 4 else 4
  examples = [
    encode.Example(
      tokens=np.arange(5, dtype=np.int32), position=np.zeros((5, 3), np.int32),
      weight=np.float32([0] * (5 - 12 // size) + [1] * (12 // size)),
      logp=np.zeros(5, np.float32), vision=[], advantage=1.0, name=f"q{i}",
    )
    for i in range(size)
  ]  # fmt: skip
  mesh = parallel.make_mesh(1, 1, 1)
  tx, _ = optim.make({"w": jnp.zeros(2)}, lr=1.0, total_steps=9)
  state = {"params": {"w": jnp.zeros(2)}, "opt": tx.init({"w": jnp.zeros(2)})}
  state["step"] = jax.device_put(jnp.int32(0), parallel.replicated(mesh))
  given = []

  def accumulate(total, params, batch, tokens):
    given.append(float(tokens))
    return total, ({"loss": 1.0 / tokens}, flops.work(batch))

  def apply(state, total, loss):
    return {**state, "step": state["step"] + 1}, {"optim/nonfinite": jnp.float32(0)}

  steps = (dict, accumulate, apply, lambda params, batch: batch.weight * 0)
  state, m, _ = train_rl.update(
    config, model_config.tiny(99), steps, state, {0: examples}, learned=[], tokens=40.0,
    replayed=replayed, stop=lambda: False, noticed=lambda *_: None,
  )  # fmt: skip
  assert given == [each] * updates and m["loss"] == pytest.approx(1 / each)
  assert state["step"] == minibatches
  (schedule,) = [x for x in state["opt"] if isinstance(x, optax.ScaleByScheduleState)]
  assert schedule.count == minibatches - updates


@pytest.mark.slow
@pytest.mark.parametrize("layout", layouts.QUESTIONS)
def test_rl_runs_from_every_source_by_one_line(layout, run, tmp_path):
  ((line,), played) = run(tmp_path, layout(tmp_path, 8), layout.__name__)
  assert np.isfinite([line["loss"], line["eval/accuracy"]]).all()
  assert line["optim/skipped"] == 0 and line["optim/grad_norm"] > 0
  assert line["agreement/logp_diff_max"] < 1e-3
  assert line["data/records"] == 4 and line["data/bad_records"] == 0
  assert len({t.task.id for t in played}) == 4


def test_a_step_decodes_the_pictures_of_its_questions_once(run, tmp_path, monkeypatch):
  """They are looked at before they are asked, for filters and what is broken."""
  for folder in ("train", "val"):
    (tmp_path / folder).mkdir()
    rows = [
      {**layouts.task(i), "media": [{"kind": "image", "path": f"{folder}/{i}.png"}]}
      for i in range(32)
    ]
    for i in range(32):
      layouts.picture(i % 4).save(tmp_path / f"{folder}/{i}.png")
    (tmp_path / f"{folder}.jsonl").write_text("\n".join(map(json.dumps, rows)))
  decoded, load_image = collections.Counter(), image.load_image

  def counted(path):
    decoded[path.relative_to(tmp_path).as_posix()] += 1
    return load_image(path)

  monkeypatch.setattr(image, "load_image", counted)
  filter = dict(min_tokens=1, max_tokens=0, min_pixels=1, max_pixels=0)
  uris = ("jsonl:train.jsonl", "decoded", "jsonl:val.jsonl")
  _, played = run(tmp_path, *uris, steps=2, filter=filter)
  asked = {t.task.media[0].path for t in played}
  assert len(asked) == 8  # of two steps, a group of four rollouts each
  train = {k: n for k, n in decoded.items() if k.startswith("train/")}
  assert asked <= train.keys() and set(train.values()) == {1}
  # Those held out: once when they are chosen, once for each evaluation.
  val = {k: n for k, n in decoded.items() if k.startswith("val/")}
  assert list(val.values()) == [3, 3, 3]


@pytest.mark.slow
def test_rl_of_a_mixture_with_weights_and_a_filter(run, tmp_path):
  """Questions with pictures and without, some of them bad: the config says how many."""
  few = layouts.text_only(tmp_path, 4)
  uri = f"{layouts.pixel_reasoner_rl(tmp_path, 9)},{few}"
  with (tmp_path / "text.jsonl").open("a") as f:
    f.write('{"question": "And what is this?", "answer": ""}\n' * 6)
  filter = dict(min_tokens=0, max_tokens=0, min_pixels=0, max_pixels=50 * 64)
  share = dict(weights=(0.5, 0.5), max_bad_share=0.9, filter=filter)
  lines, played = run(tmp_path, uri, "mixture", eval_uri=few, steps=3, **share)
  kinds = collections.Counter(len(t.task.media) for t in played)
  assert kinds[0] and kinds[1]
  assert lines[-1]["data/bad_records"] > 0 and lines[-1]["data/left_out"] > 0
  assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)


@pytest.mark.slow
def test_told_to_leave_in_an_update(rl, tmp_path, monkeypatch):
  """Before its first update the step is given up; from then on it is finished."""
  monkeypatch.setattr(protocol, "judge", lambda t: float(sum(t.ids) % 2))
  config = ml_collections.ConfigDict(rl.to_dict())
  config.total_steps, config.rl.minibatches = 3, 2
  config.data.update(root=str(tmp_path), uri=layouts.text_only(tmp_path, 8))
  config.eval.uri = config.data.uri
  made, told, calls = train_rl.programs, [], []

  def programs(*args):
    zeros, accumulate, apply, old_logp = made(*args)

    def noted(name, f):
      def call(*args):
        calls.append(name)
        if len(calls) in told:
          os.kill(os.getpid(), signal.SIGTERM)
        return f(*args)

      return call

    return zeros, noted("accumulate", accumulate), noted("apply", apply), old_logp

  def start(name, *at):
    """The metrics, after a SIGTERM at the calls `at` of accumulate and apply."""
    calls[:], told[:] = [], at
    train_rl.main(config, tmp_path / name)
    lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [{k: v for k, v in r.items() if not k.startswith("perf/")} for r in rows]

  monkeypatch.setattr(train_rl, "programs", programs)
  whole = start("whole")
  first, second = [i for i, name in enumerate(calls, 1) if name == "apply"][2:4]
  assert len(whole) == 3 and first + 1 < second
  for at, done in ((first - 1, 1), (first + 1, 2)):
    assert start(f"told{at}", at) == whole[:done]
    assert (tmp_path / f"told{at}" / "checkpoints" / str(done)).is_dir()
    assert start(f"told{at}") == whole
