"""Packing: nothing is lost, budgets hold, pictures are shared within a row."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixel_jax.data import pack
from pixel_jax.pixels import geometry

GRIDS = [(1, 2, 2), (1, 4, 4), (2, 2, 4), (1, 6, 10), (1, 10, 2)]


@dataclasses.dataclass
class Example:
  tokens: np.ndarray
  position: np.ndarray
  weight: np.ndarray
  logp: np.ndarray
  vision: list
  advantage: float = 0.0


def picture(n):
  """The n-th picture of the tests: other pixels for every n."""
  grid = GRIDS[n % len(GRIDS)]
  rng = np.random.default_rng(n)
  patches = rng.integers(0, 256, (int(np.prod(grid)), 1176), dtype=np.uint8)
  return geometry.lay_out(patches, grid)


PICTURES = [picture(n) for n in range(8)]


def example(seed, text, pictures):
  rng = np.random.default_rng(seed)
  vision, at = [], 1
  for n in pictures:
    vision.append((at, PICTURES[n]))
    at += PICTURES[n].num_merged + 1
  n = at + text
  return Example(
    tokens=rng.integers(1, 99, n).astype(np.int32),
    position=rng.integers(0, 99, (n, 3)).astype(np.int32),
    weight=rng.random(n).astype(np.float32),
    logp=-rng.random(n).astype(np.float32),
    vision=vision,
    advantage=float(rng.normal()),
  )


examples = st.lists(
  st.builds(
    example,
    st.integers(0, 99),
    st.integers(1, 20),
    st.lists(st.integers(0, 7), max_size=3),
  ),
  max_size=12,
)
T, P = 96, 192


def unpacked(e):
  """What the device should see of one example: every token with its pixels."""
  tokens = [(int(t), *map(int, p)) for t, p in zip(e.tokens, e.position)]
  seen = {}
  for start, pixels in e.vision:
    for m, row in enumerate(pixels.merged_row):
      block = slice(4 * row, 4 * row + 4)
      seen[start + m] = (
        pixels.patches[block].tobytes(),
        pixels.patch_pos[block].tobytes(),
      )
  return tokens, e.weight.tolist(), e.logp.tolist(), e.advantage, seen


def unpack(out, row, segment):
  at = np.flatnonzero(out["segment"][row] == segment)
  assert (np.diff(at) == 1).all()
  tokens = [
    (int(t), *map(int, p))
    for t, p in zip(out["tokens"][row, at], out["position"][row, at])
  ]
  seen = {}
  for i, m in enumerate(out["vision_index"][row, at]):
    if m >= 0:
      block = slice(4 * m, 4 * m + 4)
      seen[i] = (
        out["patches"][row, block].tobytes(),
        out["patch_pos"][row, block].tobytes(),
      )
  (advantage,) = set(out["advantage"][row, at].tolist())
  weight = out["weight"][row, at].tolist()
  return tokens, weight, out["logp_sampler"][row, at].tolist(), advantage, seen


@settings(max_examples=60, deadline=None)
@given(examples)
def test_packed_rows_hold_the_unpacked_examples(some):
  rows = pack.first_fit(some, T, P)
  assert sorted(i for row in rows for i in row) == list(range(len(some)))
  assert rows == pack.first_fit(some, T, P)
  out = pack.collate([[some[i] for i in row] for row in rows], T, P, len(rows) + 1)
  for r, row in enumerate(rows):
    for segment, i in enumerate(row, 1):
      want = unpacked(some[i])
      got = unpack(out, r, segment)
      assert got[:3] == want[:3] and got[4] == want[4]
      assert got[3] == pytest.approx(want[3])
    # The rest is padding.
    assert (out["segment"][r] > 0).sum() == sum(len(some[i].tokens) for i in row)
    keys = {p.key: p.num_patches for i in row for _, p in some[i].vision}
    assert (out["patch_image"][r] > 0).sum() == sum(keys.values()) <= P
    assert ((out["patch_window"][r] > 0) == (out["patch_image"][r] > 0)).all()
  for name, x in out.items():
    assert (x[-1] == (-1 if name == "vision_index" else 0)).all()


@settings(max_examples=30, deadline=None)
@given(examples)
def test_attention_segments_of_a_row_belong_to_one_picture(some):
  rows = pack.first_fit(some, T, P)
  out = pack.collate([[some[i] for i in row] for row in rows], T, P, max(len(rows), 1))
  for r, row in enumerate(rows):
    distinct = {p.key: p for i in row for _, p in some[i].vision}
    for name, of in (("patch_image", "patch_image"), ("patch_window", "patch_window")):
      ids, counts = np.unique(out[name][r], return_counts=True)
      counts = sorted(counts[ids > 0])
      want = [
        c
        for p in distinct.values()
        for c in np.unique(getattr(p, of), return_counts=True)[1]
      ]
      assert counts == sorted(want)


def test_a_group_shares_its_picture_in_a_row():
  group = [example(s, 5, [3]) for s in range(4)]
  rows = pack.first_fit(group, 400, 64)
  assert rows == [[0, 1, 2, 3]]  # 60 patches each, but they are the same
  out = pack.collate([group], 400, 64, 1)
  assert (out["patch_image"] > 0).sum() == 60
  shown = [out["vision_index"][0][out["segment"][0] == s] for s in range(1, 5)]
  for other in shown[1:]:
    assert (other[other >= 0] == shown[0][shown[0] >= 0]).all()


def test_a_row_that_holds_the_picture_comes_first():
  a, b = example(0, 40, [0]), example(1, 60, [1])
  again = example(2, 5, [1])
  # `again` fits into both rows; its picture is in the second.
  assert pack.first_fit([a, b, again], 100, 64) == [[0], [1, 2]]


def test_a_picture_shown_twice_by_one_example_is_held_once():
  e = example(0, 3, [1, 1])
  out = pack.collate([[e]], 64, 64, 1)
  assert (out["patch_image"] > 0).sum() == 16
  first, second = (out["vision_index"][0, s : s + 4] for s, _ in e.vision)
  assert (first == second).all()


@pytest.mark.parametrize(
  ("T", "P", "says"),
  [
    (10, 64, "example 1 has 37 tokens and 16 patches; a row holds T=10"),
    (96, 0, "multiple of 64"),
    (96, 100, "multiple of 64"),
  ],
)
def test_errors_name_the_example_and_the_remedy(T, P, says):
  some = [example(0, 3, []), example(1, 31, [1])]
  with pytest.raises(pack.PackError, match=says):
    pack.first_fit(some, T, P)


def test_collate_refuses_rows_that_do_not_fit():
  e = example(0, 30, [1])
  with pytest.raises(pack.PackError, match="first_fit"):
    pack.collate([[e, e, e]], 96, 64, 1)
  with pytest.raises(pack.PackError, match="2 packed rows"):
    pack.collate([[e], [e]], 96, 64, 1)
