"""Adapters in the model: which, where, how they begin, what they add, how they merge."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import rest_slow
from test_model import CONFIGS, IMAGE, PIECES, alone, close, example, noisy

from pixel_jax import parallel
from pixel_jax.model import config as model_config
from pixel_jax.model import hf, lora, table
from pixel_jax.model import qwen2_5_vl as model
from pixel_jax.run import optim, policies, settings

EVERYTHING = ("^text/", "^vision/")
SEVEN = ("q", "k", "v", "o", "gate", "up", "down")
forward = jax.jit(model.forward, static_argnums=0)
extend = jax.jit(model.extend, static_argnums=0)


def adapted(config, targets=(lora.TEXT,), rank=4, alpha=6.0):
  return dataclasses.replace(config, lora=lora.Config(rank, alpha, targets))


@pytest.fixture(scope="module")
def tiny():
  """Config and parameters of the tiny model, every adapter random."""
  config = adapted(CONFIGS["tiny"])
  return config, noisy(config)


# ---- Which matrices ------------------------------------------------------------------


def matrices(config):
  """PEFT's names of the adapted matrices, without the adapters' own part."""
  rows = table.adapters(config)
  names = [name for name, _, _ in table.tensors(config, rows)]
  assert len(names) == len(set(names))
  return {re.sub(r"\.lora_[AB]\.weight$", "", name) for name in names}


def test_text_layers_by_name():
  config = adapted(model_config.PRESETS["7b"])
  parts = [f"self_attn.{p}_proj" for p in "qkvo"]
  parts += [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
  want = {f"model.layers.{i}.{p}" for i in range(28) for p in parts}
  assert len(want) == 28 * 7
  assert matrices(config) == want
  assert table.adapted(config) == tuple(f"text/blocks/{p}" for p in SEVEN)
  assert len(list(table.tensors(config, table.adapters(config)))) == 2 * 28 * 7


def test_vision_layers_by_name():
  config = adapted(model_config.PRESETS["7b"], ("^vision/",))
  parts = ("attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
  want = {f"visual.blocks.{i}.{p}" for i in range(32) for p in parts}
  want |= {"visual.merger.mlp.0", "visual.merger.mlp.2"}
  assert matrices(config) == want  # no convolution, no norm


def test_one_kind_of_layer():
  config = adapted(CONFIGS["tiny"], ("^text/blocks/[qv]$", "merger/down"))
  want = ("text/blocks/q", "text/blocks/v", "vision/merger/down")
  assert table.adapted(config) == want


@pytest.mark.parametrize("name", model_config.PRESETS)
def test_the_tree_has_the_rows_of_the_table(name):
  config = adapted(model_config.PRESETS[name], EVERYTHING)
  tree = table.unnest(model.abstract(config))
  assert {path: x.shape for path, x in tree.items()} == table.shapes(config)
  bare = table.unnest(model.abstract(config.merged))
  assert {path for path in tree if not lora.is_adapter(path)} == set(bare)
  assert len(tree) - len(bare) == 2 * (7 + 5 + 2)
  for path, axes in table.unnest(hf.logical_axes(config)).items():
    assert len(axes) == tree[path].ndim, path
    assert {a for a in axes if a} <= set(parallel.RULES), path


@pytest.mark.parametrize("target", ["^text/embed$", "q_proj", "text/head"])
def test_an_unknown_target_lists_what_there_is(target):
  with pytest.raises(ValueError, match=re.escape(repr(target))) as error:
    model.abstract(adapted(CONFIGS["tiny"], (lora.TEXT, target)))
  listed = str(error.value).partition("there are ")[2]
  assert all(f"text/blocks/{p}" in listed for p in SEVEN)
  assert "vision/merger/up" in listed and "embed" not in listed


@pytest.mark.parametrize(
  "fields, told",
  [
    (dict(rank=0), "rank=0"),
    (dict(alpha=0.0), "alpha=0.0"),
    (dict(alpha=math.nan), "alpha=nan"),
    (dict(targets="^text/"), "tuple"),
    (dict(targets=()), "tuple"),
    (dict(targets=["("]), "regular expression"),
  ],
)
def test_what_is_refused(fields, told):
  with pytest.raises(ValueError, match=told):
    lora.Config(**{"rank": 4, "alpha": 8.0, **fields})


# ---- How they begin ------------------------------------------------------------------


@pytest.mark.slow
def test_they_begin_as_those_of_peft():
  config = adapted(CONFIGS["tiny"], EVERYTHING, rank=64)
  flat = table.unnest(model.init(config, jax.random.key(0)))
  bare = table.unnest(model.init(config.merged, jax.random.key(0)))
  for path, x in bare.items():  # the weights do not depend on adapters
    np.testing.assert_array_equal(x, flat[path], err_msg=path)
  for path in table.adapted(config):
    a, b = flat[f"{path}/lora_a"], flat[f"{path}/lora_b"]
    assert not b.any()
    stacked = "/blocks/" in path
    bound = math.prod(a.shape[stacked:-1]) ** -0.5
    # torch: kaiming_uniform_(a=sqrt(5)) is uniform in +- sqrt(6 / ((1 + 5) fan_in)).
    assert 0.95 * bound < jnp.abs(a).max() <= bound, path
    assert float(a.std()) == pytest.approx(bound / 3**0.5, rel=0.1), path
    if stacked:
      assert not (a[0] == a[1]).any()


@pytest.mark.slow
def test_new_adapters_change_no_bit():
  config = adapted(CONFIGS["tiny"], EVERYTHING)
  params = noisy(config.merged)
  batch = alone(example(config, 0, PIECES))
  with_them = model.adapt(config, params, jax.random.key(1))
  assert table.unnest(with_them).keys() == table.shapes(config).keys()
  np.testing.assert_array_equal(
    forward(config, with_them, batch), forward(config.merged, params, batch)
  )


# ---- What they add -------------------------------------------------------------------


def matmuls(config):
  batch = alone(example(config, 0, [3, IMAGE]))
  closed = jax.make_jaxpr(lambda p: model.forward(config, p, batch))
  return str(closed(model.abstract(config))).count("dot_general")


def test_the_graph_holds_two_small_matmuls_a_matrix():
  config = CONFIGS["tiny"]  # unrolled
  bare = matmuls(config)
  assert matmuls(adapted(config)) == bare + 2 * len(matrices(adapted(config)))
  everything = adapted(config, EVERYTHING)
  assert matmuls(everything) == bare + 2 * len(matrices(everything))


@pytest.mark.parametrize("name", rest_slow(CONFIGS))
def test_merged_equals_unmerged(name):
  """Scanned, in periods and unrolled; images, a video and text."""
  config = adapted(CONFIGS[name], EVERYTHING)
  params = noisy(config)
  batch = alone(example(config, 0, PIECES))

  def logits(config, params):
    return model.logits(config, params, forward(config, params, batch))

  got = logits(config, params)
  close(logits(config.merged, model.merge(config, params)), got, 1e-5)
  bare = {p: x for p, x in table.unnest(params).items() if not lora.is_adapter(p)}
  plain = logits(config.merged, table.nest(bare))
  assert np.abs(np.asarray(got - plain)).max() > 0.01 * np.abs(np.asarray(got)).max()


@pytest.mark.slow
def test_with_a_cache(tiny):
  config, params = tiny
  e = example(config, 0, [9])
  batch = alone(e)
  want = forward(config, params, batch)
  cache = model.init_cache(config, 1, 12)
  got = []
  for cut in (slice(0, 5), slice(5, 9)):
    hidden, cache = extend(
      config, params, cache, batch.tokens[:, cut], batch.position[:, cut],
      jnp.array([cut.stop - cut.start]), batch.vision_index[:, cut],
    )  # fmt: skip
    got.append(hidden)
  close(jnp.concatenate(got, 1), want, 1e-5)


def test_merging_by_formula(tiny):
  config, params = tiny
  merged = model.merge(config, params)
  assert table.unnest(merged).keys() == table.shapes(config.merged).keys()
  letters = dict(q="DNH", k="DKH", v="DKH", o="NHD", gate="DF", up="DF", down="FD")
  inner = dict(o="NH", down="F")
  for name, kept in letters.items():
    x = jax.tree.map(
      lambda x: np.asarray(x, np.float64), params["text"]["blocks"][name]
    )
    left = inner.get(name, "D")
    right = kept[len(left) :]
    added = np.einsum(f"L{left}r,Lr{right}->L{kept}", x["lora_a"], x["lora_b"])
    close(merged["text"]["blocks"][name]["w"], x["w"] + 6.0 / 4 * added, 1e-6)
  same = merged["text"]["embed"]["w"], params["text"]["embed"]["w"]
  assert same[0] is same[1]  # shared, not copied
  assert model.merge(config.merged, merged)["text"]["embed"]["w"] is same[0]
  inside = jax.jit(model.merge, static_argnums=0)(config, params)  # as engines get it
  close(inside["text"]["blocks"]["q"]["w"], merged["text"]["blocks"]["q"]["w"], 1e-6)


@pytest.mark.slow
def test_merging_rounds_once(tiny):
  config, params = tiny
  half = jax.tree_util.tree_map_with_path(
    lambda path, x: x if "lora" in path[-1].key else x.astype(jnp.bfloat16), params
  )
  wide = jax.tree.map(lambda x: x.astype(jnp.float32), half)
  want = model.merge(config, wide)["text"]["blocks"]["q"]["w"]
  got = model.merge(config, half)["text"]["blocks"]["q"]["w"]
  np.testing.assert_array_equal(got, want)  # computed in f32: f32 it stays
  low = dataclasses.replace(config, dtype="bfloat16")
  got = model.merge(low, half)["text"]["blocks"]["q"]["w"]
  np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))


# ---- What is trained -----------------------------------------------------------------


def lora_section(rank):
  return dict(rank=rank, alpha=8.0, targets=(lora.TEXT,))


class Section(dict):
  __getattr__ = dict.__getitem__


def freeze(rank):
  return settings.frozen(
    Section(lora=Section(rank=rank), optim=Section(freeze=["^vision/"]))
  )


def test_only_adapters_have_gradients_and_moments(tiny):
  config, params = tiny
  assert freeze(0) == ("^vision/",)
  trained, frozen = optim.split(params, freeze(4))
  want = {p for p in table.shapes(config) if lora.is_adapter(p)}
  assert set(optim.list_paths(trained)) == want and len(want) == 14
  assert set(optim.list_paths(frozen)) == set(table.shapes(config.merged))
  tx, _ = optim.make(params, lr=1e-3, total_steps=2, freeze=freeze(4))
  state = optim.init(tx, trained)
  size = sum(x.size for x in jax.tree.leaves(trained))
  assert sum(x.size for x in jax.tree.leaves(state) if x.ndim) == 2 * size
  batch = alone(example(config, 0, [4, IMAGE, 5]))

  def loss(trained):
    return model.token_logp(config, optim.merge(trained, frozen), batch)[0].sum()

  grads = jax.jit(jax.grad(loss))(trained)
  assert all(np.abs(np.asarray(g)).max() > 0 for g in jax.tree.leaves(grads))


def test_weight_decay_is_for_matrices():
  assert all(optim._is_decayed(f"text/blocks/q/{x}") for x in ("w", "lora_a", "lora_b"))
  assert not any(optim._is_decayed(f"x/{leaf}") for leaf in ("b", "scale"))


# ---- On a mesh -----------------------------------------------------------------------


@pytest.mark.slow
def test_eight_devices_give_the_hidden_states_of_one(tiny):
  config, params = tiny
  mesh = parallel.make_mesh(2, 2, 2)
  layout = policies.layout(config, mesh)
  specs = {path: tuple(s.spec) for path, s in table.unnest(layout).items()}
  for path in table.adapted(config):  # as w, and the rank whole
    stacked = 1
    w, a, b = (specs[f"{path}/{x}"] for x in ("w", "lora_a", "lora_b"))
    kept = len(a) - 1  # axes of a but its rank
    assert a[-1] is None and b[stacked] is None
    assert a[:kept] == w[:kept] and b[stacked + 1 :] == w[kept:], path
  batch = alone(example(config, 0, [4, IMAGE, 5]))
  batch = jax.tree.map(lambda x: jnp.repeat(x, 4, 0), batch)
  want = forward(config, params, batch)
  placed = jax.tree.map(jax.device_put, params, layout)
  got = forward(config, placed, parallel.to_devices(mesh, dataclasses.asdict(batch)))
  close(got, want, 1e-5)
  merged = model.merge(config, placed)
  for path, x in table.unnest(merged).items():
    assert x.sharding == table.unnest(layout)[path], path
  once = table.unnest(model.merge(config, params))
  for path, x in table.unnest(merged).items():
    close(x, once[path], 1e-6)


# ---- What it takes -------------------------------------------------------------------


def test_sizes_of_the_7b():
  """The numbers of the README, from shapes."""
  config = adapted(model_config.PRESETS["7b"], rank=32)
  size = {path: math.prod(shape) for path, shape in table.shapes(config).items()}
  few = sum(n for path, n in size.items() if lora.is_adapter(path))
  rest = sum(size.values()) - few
  assert few == 80_740_352 and rest == 8_292_166_656
  # f32 weights, gradient and two moments each; or a bf16 base and f32 adapters.
  assert round(16 * rest / 1e9, 1) == 132.7
  assert round((2 * rest + 16 * few) / 1e9, 1) == 17.9
