"""docs/extending.md and docs/metrics.md: what they say is run, and compared."""

import importlib
import json
import pathlib
import re
import shlex
import sys

import layouts
import pytest

import pixel_jax
from pixel_jax import train_rl, trajectory
from pixel_jax.chat import encode, tools
from pixel_jax.data import world
from pixel_jax.pixels import ops
from pixel_jax.run import policies, settings

DOCS = pathlib.Path(__file__).resolve().parent.parent / "docs"
PAGE = (DOCS / "extending.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.M | re.S)
FILES = {m[1]: b for b in BLOCKS if (m := re.match(r"# (\w+\.py)\n", b))}


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """The files of the page, in the folder in which a command is typed."""
  for name, text in FILES.items():
    (tmp_path / name).write_text(text)
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "path", list(sys.path))
  yield tmp_path
  for name in FILES:
    sys.modules.pop(name.removesuffix(".py"), None)


def documented(metric: str) -> bool:
  names = re.findall(r"`([a-z_]+(?:/\w+)*)`", (DOCS / "metrics.md").read_text())
  known = {re.sub(r"[A-Z]+", r"\\w+", name) for name in names}
  return any(re.fullmatch(name, metric) for name in known)


def test_all_examples_in_one_run(folder):
  """RL with the reward, the operation and the layout of the page, and its metrics."""
  lines = re.findall(r"^pixel-jax rl .*$", PAGE, flags=re.M)
  fields = dict(
    word.removeprefix("--config.").split("=", 1)
    for line in lines
    for word in shlex.split(line)
    if re.match(r"--config\.(judge|codec|data\.layout)", word)
  )
  assert len(lines) == len(fields) == 3
  layouts.picture(0).save(folder / "0.png")
  row = {"q": "Which symbol is on the red panel?", "a": "O", "img": "0.png"}
  bad = {"q": "And here?", "a": "O"}
  text = "\n".join(map(json.dumps, [row] * 7 + [bad]))
  (folder / "mine.jsonl").write_text(text)
  config = importlib.import_module("pixel_jax.configs.rl").get_config("tiny")
  config.init, config.judge = "tiny_base", fields["judge"]
  config.codec.operations = eval(fields["codec.operations"])
  config.data.update(
    root=str(folder), uri="jsonl:mine.jsonl", layout=fields["data.layout"], shards=2,
    max_bad_share=0.9,
  )  # fmt: skip
  config.eval.update(uri="jsonl:mine.jsonl", tasks=2)
  config.total_steps = config.eval_every = config.keep_trajectories_every = 1
  config.save_every = 0
  config.rl.update(prompts_per_step=2, group_size=2, rows=2, tokens=2304, patches=512)
  for rollout in (config.rollout, config.eval.rollout):
    rollout.update(max_turns=2, max_new_tokens=8)
  config.engine.update(
    slots=4, max_prompt=2048, max_len=2304, prompt_len=2048, extend_rows=2
  )
  config.optim.warmup_steps = 0
  train_rl.main(config, folder / "run")
  (line,) = map(json.loads, (folder / "run/metrics.jsonl").read_text().splitlines())
  assert [k for k in line if not documented(k)] == []
  (file,) = (folder / "run/trajectories").iterdir()
  played = list(trajectory.read_jsonl(file))
  assert len(played) == 4
  import my_rewards

  for t in played:
    assert "mirror_image" in t.turns[0]["text"]  # the system prompt declares it
    assert t.task.question == row["q"] and t.task.media[0].path == row["img"]
    assert t.reward["correct"] == pytest.approx(my_rewards.brief(t))
  (told,) = map(json.loads, (folder / "run/quarantine.jsonl").read_text().splitlines())
  assert told["index"] == 7 and "img" in told["reason"]


def test_an_operation_is_run_told_and_redrawn(folder):
  operation = settings.imported("codec.operations", "my_operations.MIRROR")
  codec = policies.open_codec("tiny_base")
  codec = policies.make_codec(
    codec.tokenizer,
    {
      "operations": ["my_operations.MIRROR"],
      "profile": "clean",
      "budgets": codec.budgets,
    },
  )
  assert [o.name for o in codec.operations] == [operation.name]
  task = world.task(0, "train", 1)
  for arguments, error in (
    ({"target_image": 1}, None),
    ({"target_image": 9}, "bad_target"),
    ("no object", "bad_target"),
    ({"target_image": float(1)}, "bad_target"),
  ):
    c = encode.Conversation(codec, task, world.load_media)
    said = codec.tokenizer.encode(tools.call_text(operation.name, arguments))
    c.add_sampled([*said, codec.tokenizer.im_end])
    observation = c.call_of_last_turn()
    assert (observation.error and observation.error.kind) == error
    c.observe(observation)
    assert c.trajectory.ops_succeeded == (error is None)
    again = encode.redraw(c.trajectory, codec, world.load_media)
    assert [p.key for p in again] == [p.key for p in c.pixels]
    if error is None:
      assert "Here is what mirror_image returned" in c.trajectory.turns[-1]["text"]
      (mirrored,) = observation.images
      assert (
        mirrored.transpose(0).tobytes() == world.load_media(task.media[0]).tobytes()
      )


@pytest.mark.parametrize(
  "returned", [None, [], "text", ["text"], KeyError("x"), [layouts.picture(0)] * 2]
)
def test_what_an_operation_does_cannot_end_a_run(returned):
  def run(seen, arguments):
    if isinstance(returned, Exception):
      raise returned
    return returned

  own = tools.Operation("own", "Mine.", {}, run)
  call = tools.parse_call(tools.call_text("own", {}), "clean", ("own",))
  seen = ops.Seen([ops.Picture("image", layouts.picture(0), layouts.picture(0))])
  observation = tools.run_call(
    call, seen, "clean", shrink=lambda image, role: image, operations=(own,)
  )
  if isinstance(returned, list) and len(returned) == 2:
    assert len(observation.images) == 2 and "Numbered 2 to 3" in observation.text
  else:
    assert observation.error.kind == "failed"


def test_what_an_operation_raises_late_is_told_too():
  def late(seen, arguments):
    yield layouts.picture(0)
    raise RuntimeError("boom")

  own = tools.Operation("own", "Mine.", {}, late)
  call = tools.parse_call(tools.call_text("own", {}), "clean", ("own",))
  observation = tools.run_call(
    call, ops.Seen(), "clean", shrink=lambda image, role: image, operations=(own,)
  )
  assert observation.error.kind == "failed" and "boom" in observation.text


@pytest.mark.parametrize("path", ["nothing.at_all", "json.nothing", "brief"])
def test_a_path_that_leads_nowhere_is_told(path):
  with pytest.raises(settings.ConfigError, match=f"config.judge='{path}'.*MODULE.NAME"):
    settings.imported("judge", path)
  assert settings.imported("judge", "") is None


def test_ask(folder):
  """The five lines of the page, on a scene whose letter the base can read."""
  task = next(
    t
    for t in (world.task(0, "test", world.nth("image", i)) for i in range(99))
    if t.reference["difficulty"] == "easy"
  )
  world.load_media(task.media[0]).save(folder / "panels.png")
  space = {}
  exec(next(b for b in BLOCKS if "pixel_jax.load" in b), space)
  model, answer = space["model"], space["answer"]
  assert answer.answer == task.answer and task.answer in answer.text
  same = model.ask(answer.trajectory.task.question, world.load_media(task.media[0]))
  assert same.trajectory.ids == answer.trajectory.ids  # a path or its picture
  blind = model.ask(task.question, folder / "panels.png", operations=False)
  assert not blind.trajectory.calls and not blind.pictures
  assert len(answer.pictures) == sum(s.role != "image" for s in answer.trajectory.slots)
  assert pixel_jax.__version__ == "0.2.0"
