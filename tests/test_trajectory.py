"""trajectory.py: JSONL in and out keeps every bit; half files are never left behind."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pixel_jax import trajectory
from pixel_jax.trajectory import Media, OpCall, Slot, Task, Trajectory

TEXT = st.text(max_size=8)
FLOAT = st.floats(allow_nan=False)
JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | FLOAT | TEXT,
  lambda x: st.lists(x, max_size=3) | st.dictionaries(TEXT, x, max_size=3),
  max_leaves=5,
)
TASK = st.builds(
  Task,
  id=TEXT,
  question=TEXT,
  answer=TEXT | st.lists(TEXT, max_size=2),
  media=st.lists(
    st.builds(Media, st.sampled_from(["image", "video"]), TEXT | st.lists(TEXT), FLOAT),
    max_size=2,
  ),
  shard=st.integers(0, 9),
  reference=st.dictionaries(TEXT, JSON, max_size=2),
)
SLOT = st.builds(
  Slot,
  start=st.integers(0, 99),
  length=st.integers(1, 99),
  grid=st.tuples(*[st.integers(1, 9)] * 3),
  role=TEXT,
  media=st.integers(-1, 3),
  call=st.integers(-1, 3),
  index=st.integers(0, 3),
  second_per_grid=FLOAT,
)
TRAJECTORY = st.builds(
  Trajectory,
  task=TASK,
  sample=st.integers(0, 7),
  profile=TEXT,
  policy_step=st.integers(-1, 9),
  ids=st.lists(st.integers(0, 2**31), max_size=3),
  sampled=st.lists(st.booleans(), max_size=3),
  weight=st.lists(FLOAT, max_size=3),
  logp=st.lists(FLOAT, max_size=3),
  position=st.lists(st.tuples(*[st.integers(0, 999)] * 3), max_size=3),
  slots=st.lists(SLOT, max_size=2),
  calls=st.lists(
    st.builds(OpCall, TEXT, JSON, st.none() | TEXT, st.booleans()), max_size=2
  ),
  turns=st.lists(st.fixed_dictionaries({"role": TEXT, "text": TEXT}), max_size=2),
  stop=TEXT,
  reward=st.dictionaries(TEXT, FLOAT, max_size=2),
  advantage=FLOAT,
)


@given(t=TRAJECTORY)
def test_json_round_trip(t):
  line = trajectory.to_json(t)
  assert "\n" not in line and "\r" not in line
  again = trajectory.from_json(line)
  assert again == t
  assert all(type(p) is tuple for p in again.position)
  assert all(type(s.grid) is tuple for s in again.slots)


def test_floats_keep_every_bit():
  values = [0.1, 1 / 3, -0.0, 5e-324, math.pi, math.inf]
  t = Trajectory(Task("a", "q", "g", []), logp=values)
  again = trajectory.from_json(trajectory.to_json(t))
  assert [x.hex() for x in again.logp] == [x.hex() for x in values]


def test_file_round_trip_with_line_separators(tmp_path):
  # U+2028 and U+0085 end a line for str.splitlines, but not in a file.
  several = [
    Trajectory(Task(str(i), "a\u2028b\u0085c\r\n\x1d漢", "g", [])) for i in (1, 2)
  ]
  trajectory.write_jsonl(tmp_path / "deep" / "er" / "t.jsonl", several)
  assert list(trajectory.read_jsonl(tmp_path / "deep" / "er" / "t.jsonl")) == several


def test_a_failed_write_keeps_the_old_file(tmp_path):
  path = tmp_path / "t.jsonl"
  old = Trajectory(Task("old", "q", "g", []))
  trajectory.write_jsonl(path, [old])

  def broken():
    yield Trajectory(Task("new", "q", "g", []))
    raise RuntimeError("killed")

  with pytest.raises(RuntimeError, match="killed"):
    trajectory.write_jsonl(path, broken())
  assert list(trajectory.read_jsonl(path)) == [old]


def test_attempts_and_successes_are_counted():
  calls = [OpCall("a", {}), OpCall("b", {}, error="bad_json"), OpCall("c", {})]
  t = Trajectory(Task("a", "q", "g", []), calls=calls)
  assert (t.ops_attempted, t.ops_succeeded) == (3, 2)


def test_unknown_fields_are_refused():
  line = trajectory.to_json(Trajectory(Task("a", "q", "g", [])))
  with pytest.raises(TypeError, match="colour"):
    trajectory.from_json(line.replace('"sample"', '"colour": 1, "sample"'))
