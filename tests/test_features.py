"""The frozen tower's features: the tower's own, made once, the same bits every time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixel_jax import parallel
from pixel_jax.batch import Batch
from pixel_jax.chat.encode import Example
from pixel_jax.data import pack
from pixel_jax.model import config as model_config
from pixel_jax.model import qwen2_5_vl
from pixel_jax.pixels import geometry
from pixel_jax.rollout import features
from pixel_jax.run import optim
from pixel_jax.run.policies import layout

T, P = 48, 128
GRIDS = [(1, 4, 4), (1, 8, 8), (1, 2, 6), (2, 4, 4), (1, 8, 16)]
FROZEN = ("^vision/",)


def picture(index):
  grid = GRIDS[index % len(GRIDS)]
  n = int(np.prod(grid))
  patches = np.random.default_rng(index).integers(0, 256, (n, 1176), np.uint8)
  return geometry.lay_out(patches, grid)


def example(index):
  """A picture, then words."""
  p, rng = picture(index), np.random.default_rng(index)
  n = p.num_merged + 6
  tokens = rng.integers(5, 90, n).astype(np.int32)
  weight = np.where(np.arange(n) > p.num_merged, 1.0, 0.0).astype(np.float32)
  position = np.repeat(np.arange(n, dtype=np.int32)[:, None], 3, axis=1)
  return Example(tokens, position, weight, np.zeros(n, np.float32), [(0, p)])


@pytest.fixture(scope="module")
def tiny():
  config = model_config.tiny(99)
  mesh = parallel.make_mesh(data=2, fsdp=2, tensor=1)
  return config, mesh, qwen2_5_vl.init(config, jax.random.key(0), layout(config, mesh))


def open_bank(tiny, gib=1.0, freeze=FROZEN):
  config, _, params = tiny
  trained = optim.list_paths(optim.split(params, freeze)[0])
  return features.open_bank(config, params, trained, patches=P, gib=gib)


def rows(*indices, **kwargs):
  some = [example(i) for i in indices]
  groups = [[some[i] for i in bin] for bin in pack.first_fit(some, T, P)]
  return pack.collate(groups, T, P, num_rows=8, **kwargs)


def shown(batch, b):
  """Features of the placeholders of a row, whatever lies where."""
  index = batch["vision_index"][b]
  return batch["features"][b][index[index >= 0]]


@pytest.mark.slow
def test_log_probs_are_those_with_the_tower_in_the_step(tiny):
  config, mesh, params = tiny
  bank = open_bank(tiny)
  own = bank.fill(rows(*range(9), apart=True))
  assert own["patches"].shape == (8, 0, 1176) and own["features"].shape[1] == P // 4
  given = Batch(**jax.tree.map(jnp.asarray, rows(*range(9))))
  cached = parallel.to_devices(mesh, own)
  want = qwen2_5_vl.token_logp(config, params, given)[0]
  got = qwen2_5_vl.token_logp(config, params, cached)[0]
  assert np.abs(want).max() > 1
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_a_picture_is_encoded_once_while_there_is_room(tiny):
  bank = open_bank(tiny)
  first = bank.fill(rows(0, 1, 0, 2, 1, apart=True))
  assert bank.encoded == 3
  again = bank.fill(rows(0, 1, 0, 2, 1, apart=True))
  assert bank.encoded == 3
  np.testing.assert_array_equal(first["features"], again["features"])


def test_bits_depend_neither_on_neighbours_nor_on_what_was_kept(tiny):
  """So a killed run needs no memory of the features that it had."""
  alone = shown(open_bank(tiny).fill(rows(6, apart=True)), 0)
  bank = open_bank(tiny, gib=2**-18)  # 4 KB: three pictures at most
  for company in ([0, 1, 2], [3, 4, 5, 11], [1, 8, 9, 10]):
    filled = bank.fill(rows(6, *company, apart=True))
    np.testing.assert_array_equal(shown(filled, 0)[: len(alone)], alone)
  assert bank.encoded > len({6, 0, 1, 2, 3, 4, 5, 11, 8, 9, 10}), "nothing was dropped"


def test_rows_without_pictures(tiny):
  bank = open_bank(tiny)
  assert not bank.fill(pack.collate([], T, P, num_rows=4, apart=True))["features"].any()
  assert bank.encoded == 0


@pytest.mark.parametrize(
  "freeze, gib", [((), 1.0), (("^vision/blocks/",), 1.0), (FROZEN, 0)]
)
def test_no_bank_for_a_tower_that_is_trained(tiny, freeze, gib):
  assert open_bank(tiny, gib, freeze) is None


def test_negative_memory_is_refused(tiny):
  with pytest.raises(ValueError, match="gib=-1.0: expected a number of 0 or more"):
    open_bank(tiny, -1.0)
