"""The engine against a host replay, a full forward, its neighbours and its own rules.

A *script* makes the policy say given turns through the whole engine, and the host
replays them.  Log-probs stay those of the model.
"""

import collections
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import questions
from marks import rest_slow
from questions import ANSWER, crop, load_media, replay, select, task

from pixel_jax.batch import Batch
from pixel_jax.chat import encode
from pixel_jax.model import config as model_config
from pixel_jax.model import qwen2_5_vl
from pixel_jax.rollout import engine

SHAPES = dict(
  group_size=6, slots=16, max_prompt=80, max_len=240, prompt_len=24, extend_len=16,
  patches=64, extend_rows=4, prompt_rows=2, chunk=5,
)  # fmt: skip
TOKEN_LOGP = jax.jit(qwen2_5_vl.token_logp, static_argnums=(0, 3))
LIMITS = dict(max_turns=4, max_new_tokens=60, load_media=load_media)


SCRIPTS = {  # (task, sample) -> turns; odd tasks are videos
  ("q0", 0): [ANSWER],
  ("q0", 1): [crop(), ANSWER],
  ("q0", 2): [crop("0.0, 0.0, 1.0, 1.0"), crop("0.5, 0.5, 0.9, 0.9", 2), ANSWER],
  ("q1", 0): [select("1, 8, 3, 3"), ANSWER],
  ("q1", 1): [crop(target=4), select("2"), ANSWER],
  ("q1", 2): ["thinking aloud " * 3 + crop("nonsense"), crop(target=9), ANSWER],
  ("q2", 0): [crop(), crop(), crop(), crop()],
  ("q2", 1): ["no end" * 30],
  ("q2", 2): [crop(), "<|im_end|>"],
}
HOSTILE = [
  crop("NaN, 0, 1, 1"),
  crop("Infinity, 0, 1, 1"),
  crop("1e400, 0, 1, 1"),
  crop("[[[0]]], 0, 1, 1"),
  crop("0, 0, 1, 1", target="true"),
  crop("0, 0, 1, 1", target='"one"'),
  crop("0, 0, 1, 1", target=10**30),
  crop("0.9, 0.9, 0.1, 0.1"),
  crop('"a", null, {}, []'),
  select("1e400"),
  select(", ".join(["1"] * 40)),
  select("-1"),
  select("true, null"),
  "<tool_call>\nnot json\n</tool_call><|im_end|>",
  "<tool_call>\n" + "[" * 50 + "\n</tool_call><|im_end|>",
  "<tool_call></tool_call><|im_end|>",
  "</tool_call><|im_end|>",
  '<tool_call>{"name": "rm -rf", "arguments": {}}</tool_call><|im_end|>',
  '<tool_call>{"name": "\\ud800", "arguments": "\\udfff"}</tool_call><|im_end|>',
  '<tool_call>{"name": ["x"], "arguments": 3}</tool_call><|im_end|>',
  "<tool_call>42</tool_call><|im_end|>",
  "<|im_end|>",
  "<|endoftext|>",
  "<|im_start|><|vision_start|><|image_pad|><|video_pad|>" + crop(),
  "<tool_call><tool_call></tool_call></tool_call>" + crop(),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
  codec = questions.codec(tmp_path_factory.mktemp("words"))
  # A few ids more than the tokenizer knows, as in Qwen's padded vocabulary.
  config = model_config.tiny(codec.tokenizer.vocab_size + 3, scan_layers=True)
  params = qwen2_5_vl.init(config, jax.random.key(0))
  # Random weights are nearly indifferent; sharper logits make sampling a real choice.
  params["text"]["head"]["w"] = params["text"]["head"]["w"] * 3
  return codec, config, params


@pytest.fixture(scope="module")
def plain(world):
  codec, config, _ = world
  return engine.Engine(config, codec, **SHAPES)


def run(playing, params, tasks, **kwargs):
  kwargs = dict(seed=0, step=0, group_size=2) | LIMITS | kwargs
  return playing.run(params, tasks, **kwargs)


@pytest.fixture(scope="module")
def wide(world):
  """An engine for groups that are larger than its slots."""
  codec, config, _ = world
  return engine.Engine(config, codec, **(SHAPES | dict(max_len=480, group_size=40)))


@pytest.fixture(scope="module")
def scripted(world):
  """An engine with room for SCRIPTS."""
  codec, config, _ = world
  odd = [0xFF, 0x80, 0xC3, config.text.vocab - 1, codec.tokenizer.im_end]
  for question in ("q3", "q4"):
    for sample, turn in enumerate([*HOSTILE, odd]):
      SCRIPTS[question, sample] = [turn, ANSWER]
  return engine.Engine(config, codec, **(SHAPES | dict(max_len=480)))


def perform(playing, world, tasks, **kwargs):
  """The policy says SCRIPTS."""
  codec, _, params = world

  def script(task, sample):
    turns = SCRIPTS[task.id, sample]
    return [codec.tokenizer.encode(t) if isinstance(t, str) else t for t in turns]

  return run(playing, params, tasks, script=script, **kwargs)


def question_of(name):
  """Odd questions are videos."""
  index = int(name.removeprefix("q"))
  return task(index, video=index % 2 == 1)


def flat(groups):
  return [f for group in groups for f in group]


def _up(n, step):
  return -(-n // step) * step


def batch_of(finished):
  """One row per rollout, padded; the pictures of a row one after the other."""
  # Few shapes, few compilations.
  B = _up(len(finished), 8)
  T = _up(max(len(f.trajectory.ids) for f in finished), 64)
  P = _up(max(sum(p.num_patches for p in f.pixels) for f in finished), 128)
  b = Batch(
    tokens=np.zeros((B, T), np.int32),
    segment=np.zeros((B, T), np.int32),
    position=np.zeros((B, T, 3), np.int32),
    weight=np.zeros((B, T), np.float32),
    vision_index=np.full((B, T), -1, np.int32),
    patches=np.zeros((B, P, 1176), np.uint8),
    patch_pos=np.zeros((B, P, 2), np.int32),
    patch_image=np.zeros((B, P), np.int32),
    patch_window=np.zeros((B, P), np.int32),
  )
  for r, f in enumerate(finished):
    e = encode.example(f.trajectory, f.pixels)
    n = len(e.tokens)
    b.tokens[r, :n], b.segment[r, :n], b.position[r, :n] = e.tokens, 1, e.position
    b.weight[r, :n] = e.weight
    at = image = window = 0
    for start, p in e.vision:
      end = at + p.num_patches
      b.patches[r, at:end], b.patch_pos[r, at:end] = p.patches, p.patch_pos
      b.patch_image[r, at:end] = p.patch_image + image + 1
      b.patch_window[r, at:end] = p.patch_window + window + 1
      b.vision_index[r, start : start + p.num_merged] = at // 4 + p.merged_row
      at = end
      image, window = b.patch_image[r, :at].max(), b.patch_window[r, :at].max()
  return b


def check_logp(world, finished, temperature=1.0):
  _, config, params = world
  b = batch_of(finished)
  logp = TOKEN_LOGP(config, params, jax.tree.map(jnp.asarray, b), temperature)[0]
  checked = 0
  for row, f in zip(np.asarray(logp), finished):
    mine = np.flatnonzero(f.trajectory.sampled)
    checked += len(mine)
    np.testing.assert_allclose(
      np.array(f.trajectory.logp)[mine], row[mine], rtol=0, atol=1e-4
    )
  assert checked == sum(sum(f.trajectory.sampled) for f in finished) > 0


# ---- Against the host and the full forward -------------------------------------------


@pytest.mark.parametrize("delay", [0, 2])
def test_multi_turn_equals_replay_and_full_forward(world, scripted, delay):
  codec = world[0]
  scripted.delay = delay
  tasks = [question_of(f"q{i}") for i in range(3)]
  groups = perform(scripted, world, tasks, group_size=3, temperature=0.7)
  stops = {}
  for question, group in zip(tasks, groups):
    for sample, f in enumerate(group):
      t = f.trajectory
      stops[question.id, sample] = t.stop
      c = replay(codec, question, SCRIPTS[question.id, sample])
      n = len(t.ids)  # "no end" is cut, and the fourth crop of q2 is not run
      assert t.ids == c.trajectory.ids[:n] and t.sample == sample
      assert t.position == c.trajectory.position[:n]
      if t.stop == "answer":
        assert t.ids == c.trajectory.ids and t.calls == c.trajectory.calls
      assert [p.key for p in f.pixels] == [p.key for p in c.pixels[: len(f.pixels)]]
  assert stops.pop(("q2", 0)) == "turns" and stops.pop(("q2", 1)) == "length"
  assert set(stops.values()) == {"answer"}
  check_logp(world, flat(groups), temperature=0.7)
  assert scripted.stats["rollout/prefills"] == 3
  # A frame selected twice, a crop cut by two rollouts: encoded once.
  shown = {p.key for f in flat(groups) for p in f.pixels}
  assert scripted.stats["rollout/pictures"] == len(shown)


@pytest.mark.slow
def test_hostile_turns_end_cleanly(world, wide, scripted):
  codec = world[0]
  tasks = [question_of("q3"), question_of("q4")]
  groups = perform(wide, world, tasks, group_size=len(HOSTILE) + 1, max_new_tokens=200)
  kinds = collections.Counter()
  for question, group in zip(tasks, groups):
    for sample, f in enumerate(group):
      turns = SCRIPTS[question.id, sample]
      expected = replay(codec, question, turns).trajectory
      assert f.trajectory.stop == "answer", turns
      assert f.trajectory.ids == expected.ids and f.trajectory.calls == expected.calls
      kinds.update(c.error for c in f.trajectory.calls)
    # Broken UTF-8, an id that no tokenizer knows: nothing was tokenised again.
    assert group[-1].trajectory.ids[-5:] == SCRIPTS[question.id, sample][0]
  assert kinds["bad_json"] >= 10 and kinds["unknown_operation"] == 2 * 3
  assert kinds["bad_arguments"] >= 6 and kinds[None] >= 2
  check_logp(world, flat(groups))


# ---- Sampling ------------------------------------------------------------------------


def test_sampled_logp_equals_the_trainers(world, plain):
  _, _, params = world
  tasks = [task(i, video=i == 1) for i in range(3)]
  groups = run(plain, params, tasks, temperature=1.3, max_new_tokens=24)
  check_logp(world, flat(groups), temperature=1.3)


def test_greedy_is_the_argmax_of_the_full_forward(world, plain):
  _, config, params = world
  groups = run(
    plain, params, [task(0), task(1, True)], temperature=0.0, max_new_tokens=24
  )
  finished = flat(groups)
  b = jax.tree.map(jnp.asarray, batch_of(finished))
  hidden = jax.jit(qwen2_5_vl.forward, static_argnums=0)(config, params, b)
  best = np.asarray(qwen2_5_vl.logits(config, params, hidden)).argmax(-1)
  for row, f in zip(best, finished):
    mine = np.flatnonzero(f.trajectory.sampled)
    assert (row[mine - 1] == np.array(f.trajectory.ids)[mine]).all()
  a, b = finished[0].trajectory.ids, finished[1].trajectory.ids
  assert a == b  # samples of one group differ by chance only


def test_keys_make_rollouts_differ_and_repeat(world, plain):
  _, _, params = world

  def ids(**kwargs):
    groups = run(plain, params, [task(0)], max_new_tokens=24, **kwargs)
    return [f.trajectory.ids for f in flat(groups)]

  first = ids()
  assert first == ids() and first[0] != first[1]
  assert first != ids(seed=1) and first != ids(step=1)


# ---- Neighbours and slots ------------------------------------------------------------


def summary(f):
  t = f.trajectory
  return t.ids, t.logp, t.position, t.stop, [p.key for p in f.pixels]


def test_rollout_does_not_depend_on_neighbours_or_slot(world, plain):
  """Bit for bit: alone, among others, in another order, with other slots refilled."""
  _, _, params = world
  limits = dict(max_new_tokens=30, force="operate", fixed_batch=True)
  tasks = [task(i, video=i % 2 == 1) for i in range(12)]
  crowd = run(plain, params, tasks, group_size=3, **limits)
  by_id = {q.id: [summary(f) for f in group] for q, group in zip(tasks, crowd)}
  assert len({str(x) for group in by_id.values() for x in group}) == 36
  for order in ([5], [7, 2], list(range(11, -1, -1))):
    some = [tasks[i] for i in order]
    groups = run(plain, params, some, group_size=3, **limits)
    for question, group in zip(some, groups):
      assert [summary(f) for f in group] == by_id[question.id], (order, question.id)


def test_scripted_turns_do_not_depend_on_neighbours(world, scripted):
  """The same with operations: other rows of extend, other pages of the bank."""
  tasks = [question_of(f"q{i}") for i in range(3)]
  crowd = perform(scripted, world, tasks, group_size=3, fixed_batch=True)
  for i, question in enumerate(tasks):
    alone = perform(scripted, world, [question], group_size=3, fixed_batch=True)
    assert [summary(f) for f in alone[0]] == [summary(f) for f in crowd[i]]


@pytest.mark.slow
def test_a_late_reader_hears_the_same(world, plain):
  """Chunks sent off before the last is read: other schedules, the same rollouts."""
  codec, config, params = world
  limits = dict(max_new_tokens=30, force="operate", group_size=3, fixed_batch=True)
  tasks = [task(i, video=i % 2 == 1) for i in range(12)]
  prompt = run(plain, params, tasks, **limits)
  chunks = plain.stats["rollout/chunks"]
  for lag in (1, 2):
    late = engine.Engine(config, codec, **(SHAPES | dict(lag=lag)))
    got = run(late, params, tasks, **limits)
    assert [summary(f) for f in flat(got)] == [summary(f) for f in flat(prompt)]
    assert late.stats["rollout/chunks"] > chunks
    assert late.stats["rollout/host_syncs_per_chunk"] == 1
    moved = run(late, params, tasks, **(limits | dict(fixed_batch=False)))
    check_logp(world, flat(moved))


# ---- Buckets -------------------------------------------------------------------------


@pytest.mark.slow
def test_buckets_change_nothing_but_rounding(world, plain, record_property):
  """Draining into fewer lanes, and shorter views: log-probs agree within 1e-4."""
  codec, config, params = world
  short = engine.Engine(config, codec, **(SHAPES | dict(views=(48, 80))))
  tasks = [task(i, video=i % 2 == 1) for i in range(14)]
  limits = dict(max_new_tokens=60, force="operate", group_size=3)
  fixed = flat(run(short, params, tasks, fixed_batch=True, **limits))
  assert short.compiles < short.declared
  before = short.compiles
  free = flat(run(short, params, tasks, **limits))
  assert before < short.compiles <= short.declared  # other buckets were in use
  same = total = 0
  for a, b in zip(fixed, free):
    sampled = np.array(a.trajectory.sampled)
    n = min(len(sampled), len(b.trajectory.ids))
    equal = np.array(a.trajectory.ids[:n]) == b.trajectory.ids[:n]
    until = n if equal.all() else int(equal.argmin())  # then they go their own ways
    np.testing.assert_allclose(
      a.trajectory.logp[:until], b.trajectory.logp[:until], rtol=0, atol=1e-4
    )
    total += sampled.sum()
    same += sampled[:until].sum()
  rate = 1 - same / total
  record_property("tokens that differ between buckets", float(rate))
  print(f"{rate:.2%} of {total} tokens differ between buckets")
  assert rate < 0.02
  check_logp(world, free)


@pytest.mark.slow
def test_steady_state_keeps_the_slots_busy(world):
  """Log-normal turns, as limits.md 6.1 scaled: mean 40 tokens for chunks of 4."""
  codec, config, params = world
  shapes = SHAPES | dict(slots=8, max_len=480, chunk=4, extend_rows=8)
  playing = engine.Engine(config, codec, **shapes)
  rng = np.random.default_rng(0)
  pad = codec.tokenizer.encode("a")[0]

  def script(task, sample):
    lengths = np.clip(rng.lognormal(np.log(30), 0.8, rng.integers(1, 5)), 2, 120)
    call = codec.tokenizer.encode(crop())
    answer = codec.tokenizer.encode(ANSWER)
    turns = [[pad] * int(n) + call for n in lengths[:-1]]
    return [*turns, [pad] * int(lengths[-1]) + answer]

  tasks = [task(i) for i in range(10)]
  run(
    playing, params, tasks, group_size=6, script=script, max_turns=5,
    max_new_tokens=200,
  )  # fmt: skip
  m = playing.stats
  assert m["rollout/prefills"] == 10 and m["rollout/prefills_per_group"] == 1
  assert m["rollout/host_syncs_per_chunk"] == 1
  assert m["perf/rollout_compiles"] <= m["perf/rollout_programs_declared"]
  assert 0.85 <= m["rollout/occupancy_steady"] <= 1
  assert m["rollout/occupancy"] >= 0.8  # the tail decodes in fewer lanes


def test_refill_keeps_task_order_and_prefills_once(world, plain):
  _, _, params = world
  ended = []
  tasks = [task(i) for i in range(9)]
  groups = run(
    plain, params, tasks, group_size=5, max_new_tokens=12,
    ended=lambda i, finished: ended.append((i, finished)),
  )  # fmt: skip
  assert [[f.trajectory.task.id for f in g] for g in groups] == [
    [q.id] * 5 for q in tasks
  ]
  assert [[f.trajectory.sample for f in g] for g in groups] == [[0, 1, 2, 3, 4]] * 9
  assert plain.stats["rollout/prefills"] == 9
  assert len(ended) == 45 and all(f is groups[i][f.trajectory.sample] for i, f in ended)
  sampled = sum(sum(f.trajectory.sampled) for f in flat(groups))
  assert plain.stats["rollout/tokens"] == sampled


@pytest.mark.slow
def test_group_larger_than_the_slots(world, wide):
  _, _, params = world
  (group,) = run(wide, params, [task(0)], group_size=40, max_new_tokens=6)
  assert wide.stats["rollout/prefills"] == 1
  check_logp(world, group)


# ---- Forcing, shapes, errors ---------------------------------------------------------


def test_force_and_script(world, plain):
  codec, config, params = world
  words = codec.tokenizer
  opening = words.encode("<tool_call>\n")
  assert len(opening) == 1
  # Weights that love to operate, so that forbidding it means something.
  head = params["text"]["head"]["w"]
  calls = sorted({words.encode("<tool_call>")[0], *opening})
  keen = jax.tree.map(lambda x: x, params)
  keen["text"]["head"]["w"] = head.at[:, jnp.array(calls)].set(3 * head[:, :1])
  tasks = [task(i) for i in range(4)]
  free = flat(run(plain, keen, tasks, max_new_tokens=20))
  answer = flat(run(plain, keen, tasks, max_new_tokens=20, force="answer"))
  operate = flat(run(plain, params, tasks, max_new_tokens=20, force="operate"))

  def said(f):
    return [i for i, s in zip(f.trajectory.ids, f.trajectory.sampled) if s]

  assert any(set(calls) & set(said(f)) for f in free)
  assert not any(set(calls) & set(said(f)) for f in answer)
  for f in operate:
    first = f.trajectory.sampled.index(True)
    assert f.trajectory.ids[first] == opening[0]
  check_logp(world, operate)
  with pytest.raises(ValueError, match="force"):
    run(plain, params, tasks, force="both")
  with pytest.raises(ValueError, match="not both"):
    run(plain, params, tasks, force="operate", script=lambda task, sample: ())
  for bad in ([[3, -1]], [[3], [config.text.vocab]]):
    with pytest.raises(ValueError, match=f"q0, sample 0 .* id {bad[-1][-1]}"):
      run(plain, params, tasks, script=lambda task, sample, bad=bad: bad)


def test_a_question_that_comes_again_is_played_anew(world, plain, caplog):
  _, _, params = world
  twice = flat(run(plain, params, [task(0), task(1), task(0)], max_new_tokens=20))
  assert "1 ids come more than once among 3 questions" in caplog.text
  alone = flat(run(plain, params, [task(0)], max_new_tokens=20))
  ids = [f.trajectory.ids for f in twice]
  assert ids[:2] == [f.trajectory.ids for f in alone] and ids[4:] != ids[:2]
  likely = [
    [
      f.trajectory.ids
      for f in flat(run(plain, params, [task(0)], max_new_tokens=9, **k))
    ]
    for k in ({"temperature": 0.0}, {"temperature": 0.0, "seed": 1})
  ]
  assert likely[0] == likely[1]
  with pytest.raises(ValueError, match="temperature"):
    run(plain, params, [task(0)], temperature=-1.0)


def test_compiles_once_per_shape(world, scripted):
  _, _, params = world
  tasks = [question_of(f"q{i}") for i in range(3)]
  for temperature in (1.0, 0.7):
    perform(scripted, world, tasks, group_size=3, temperature=temperature)
  # open, place, move; prompts and turns of "extend"; rows of 64, 48, 32 and 16 patches;
  # 16, 8 or 4 lanes, however they sample.  Nothing is cast.
  assert scripted.compiles == 12 == scripted.declared - 1
  perform(scripted, world, tasks[::-1], group_size=3, seed=1)
  other = jax.tree.map(lambda x: x + 0, params)
  perform(scripted, (*world[:2], other), tasks[:1], group_size=3, step=3)
  assert scripted.compiles == 12


@pytest.mark.slow
def test_one_engine_on_a_tensor_mesh(world, plain):
  codec, config, params = world
  mesh = jax.make_mesh(
    (1, 2), ("engine", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  split = jax.device_put(params, whole)
  playing = engine.Engine(config, codec, **SHAPES)
  tasks = [task(0), task(1, True)]
  a = flat(run(plain, params, tasks, max_new_tokens=12))
  b = flat(run(playing, split, tasks, max_new_tokens=12))
  assert [f.trajectory.ids for f in a] == [f.trajectory.ids for f in b]
  compiled = playing.compiles
  run(playing, split, tasks, max_new_tokens=12)
  assert playing.compiles == compiled


@pytest.mark.slow
def test_bfloat16_engine_agrees_with_itself(world):
  codec, config, params = world
  playing = engine.Engine(
    dataclasses.replace(config, dtype="bfloat16"), codec, **SHAPES
  )
  a = run(playing, params, [task(0)], max_new_tokens=12, fixed_batch=True)
  b = run(playing, params, [task(1), task(0)], max_new_tokens=12, fixed_batch=True)
  assert [summary(f) for f in a[0]] == [summary(f) for f in b[1]]


def test_errors_name_the_remedy(world, plain):
  codec, config, params = world
  with pytest.raises(ValueError, match="leaves room"):
    engine.Engine(config, codec, **(SHAPES | dict(max_prompt=240)))
  long = dataclasses.replace(task(0), question="x" * 200)
  (group,) = run(plain, params, [long])
  assert all(f.trajectory.stop == "length" for f in group)
  assert re.search(r"task q0: the prompt has .* max_prompt=80", plain.refusal)
  small = engine.Engine(config, codec, **(SHAPES | dict(patches=16)))
  run(small, params, [task(0)])
  assert re.search("36 patches .* patches=16", small.refusal)
  with pytest.raises(ValueError, match="groups of at most 6"):
    run(plain, params, [task(0)], group_size=7)
  with pytest.raises(ValueError, match="lag=-1"):
    engine.Engine(config, codec, **(SHAPES | dict(lag=-1)))


def test_a_long_prompt_goes_in_pieces_and_is_shared(world, wide):
  _, _, params = world
  tasks = [
    dataclasses.replace(task(i), question="x" * n) for i, n in enumerate((56, 9))
  ]
  groups = run(wide, params, tasks, group_size=20, max_new_tokens=8)
  assert len(groups[0][0].trajectory.ids) > 3 * SHAPES["prompt_len"]
  assert wide.stats["rollout/prefills"] == 2
  check_logp(world, flat(groups))


@pytest.mark.slow
@pytest.mark.parametrize("lag", rest_slow([0, 1]))
def test_what_has_no_room_is_set_aside(world, lag):
  codec, config, params = world
  playing = engine.Engine(
    config, codec, **(SHAPES | dict(group_size=10, patches=36, lag=lag))
  )
  long = dataclasses.replace(task(2), question="x" * 200)
  large = task(4)
  large.media[0] = dataclasses.replace(large.media[0], kind="video")
  call = codec.tokenizer.encode(select("3"))  # a frame of 64 patches

  def script(task, sample):
    return [call] if task.media[0].kind == "video" else []

  tasks = [task(0), long, large, task(6)]
  groups = run(playing, params, tasks, group_size=10, script=script, max_new_tokens=24)
  assert [len(g) for g in groups] == [10] * 4
  for t in (f.trajectory for f in groups[1]):
    assert t.stop == "length" and not any(t.sampled) and t.task is long
  for t in (f.trajectory for f in groups[2]):
    assert t.stop == "length" and len(t.calls) == 1
  assert playing.stats["rollout/too_long_prompts"] == 1
  assert playing.stats["rollout/prefills"] == 3
  check_logp(world, groups[0] + groups[2] + groups[3])
