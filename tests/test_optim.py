"""The optimizer against formulas written out, and what freezing leaves alone."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixel_jax import optim, parallel

AXES = {
  "text": {
    "q": {"w": ("embed", "heads"), "b": ("heads",)},
    "norm": {"scale": ("embed",)},
  },
  "vision": {"patch": {"w": (None, "vision_embed")}},
}


def params(seed=0):
  rng = np.random.default_rng(seed)
  shapes = {"q": {"w": (8, 4), "b": (4,)}, "norm": {"scale": (8,)}}
  tree = {"text": shapes, "vision": {"patch": {"w": (6, 8)}}}
  return jax.tree.map(
    lambda s: jnp.asarray(rng.normal(size=s), jnp.float32),
    tree,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def make(tree, **kwargs):
  kwargs = dict(lr=1e-2, total_steps=10, schedule="constant", clip_norm=0.0) | kwargs
  return optim.make(tree, **kwargs)


def test_two_steps_equal_adamw_by_hand():
  p = params()
  tx, _ = make(p, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1)
  x, state = p, optim.init(tx, p)
  grads = [params(1), params(2)]
  for g in grads:
    x, state, _ = optim.apply(tx, g, x, state)
  for leaf, decay in [("w", 0.1), ("b", 0.0)]:
    want, *gs = (np.asarray(t["text"]["q"][leaf], np.float64) for t in (p, *grads))
    m = v = 0.0
    for t, g in enumerate(gs, 1):
      m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
      step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
      want = want - 1e-2 * (step + decay * want)
    np.testing.assert_allclose(x["text"]["q"][leaf], want, rtol=2e-5, err_msg=leaf)


def test_norms_and_biases_do_not_decay():
  p = params()
  tx, _ = make(p, weight_decay=0.5)
  zero = jax.tree.map(jnp.zeros_like, p)
  x, _, _ = optim.apply(tx, zero, p, optim.init(tx, p))
  same = jax.tree.map(lambda a, b: bool((a == b).all()), x, p)
  assert same == {
    "text": {"q": {"w": False, "b": True}, "norm": {"scale": True}},
    "vision": {"patch": {"w": False}},
  }


def test_frozen_parameters_keep_their_bits_and_have_no_moments():
  p = params()
  tx, _ = make(p, freeze=["^vision/", "/norm/"], weight_decay=0.1, clip_norm=1.0)
  state = optim.init(tx, p)
  x, state, _ = optim.apply(tx, params(1), p, state)
  np.testing.assert_array_equal(x["vision"]["patch"]["w"], p["vision"]["patch"]["w"])
  np.testing.assert_array_equal(x["text"]["norm"]["scale"], p["text"]["norm"]["scale"])
  assert (x["text"]["q"]["w"] != p["text"]["q"]["w"]).any()
  sizes = sorted(a.size for a in jax.tree.leaves(state) if a.ndim)
  assert sizes == [4, 4, 32, 32]  # mu and nu of q/b and q/w


def test_clipping_sees_the_trained_gradients_only():
  p = params()
  g = params(1)
  huge = g | {"vision": jax.tree.map(lambda a: a * 1e6, g["vision"])}
  tx, _ = make(p, freeze=["^vision/"], clip_norm=0.5)
  one = optim.apply(tx, g, p, optim.init(tx, p))[0]
  two = optim.apply(tx, huge, p, optim.init(tx, p))[0]
  np.testing.assert_array_equal(one["text"]["q"]["w"], two["text"]["q"]["w"])


def test_trained_stops_the_gradient():
  def f(p):
    return sum((x**2).sum() for x in jax.tree.leaves(optim.trained(p, ["^vision/"])))

  grads = jax.grad(f)(params())
  assert (grads["vision"]["patch"]["w"] == 0).all()
  assert (grads["text"]["q"]["w"] != 0).all()


@hypothesis.settings(deadline=None, max_examples=30)
@hypothesis.given(st.integers(0, 30), st.integers(1, 60), st.floats(0, 1))
def test_cosine_schedule(warmup, after, final):
  total = warmup + after
  rate = optim.make_schedule(
    3.0, "cosine", warmup_steps=warmup, total_steps=total, final=final
  )
  values = np.array([float(rate(s)) for s in range(total + 3)])
  expected = [3.0 * (s + 1) / warmup for s in range(warmup)]
  np.testing.assert_allclose(values[:warmup], expected, rtol=1e-5)
  np.testing.assert_allclose(values[warmup], 3.0, rtol=1e-6)
  np.testing.assert_allclose(values[total:], 3.0 * final, rtol=1e-5, atol=1e-6)
  assert (np.diff(values[warmup:]) <= 1e-6).all()


def test_the_state_counts_its_own_steps():
  p = params()
  tx, rate = make(p, schedule="cosine", warmup_steps=2, b1=0.0, b2=0.0, eps=0.0)
  x, state = p, optim.init(tx, p)
  for step in range(4):
    new, state, _ = optim.apply(tx, params(1), x, state)
    moved = np.abs(np.asarray(new["text"]["q"]["w"] - x["text"]["q"]["w"]))
    np.testing.assert_allclose(moved, float(rate(step)), rtol=1e-3)  # sign descent
    x = new


def test_moments_lie_where_their_parameters_lie():
  mesh = parallel.make_mesh(data=2, fsdp=2, tensor=2)
  p = params()
  layout = parallel.shardings(mesh, AXES, p)
  p = jax.device_put(p, layout)
  tx, _ = make(p, freeze=["norm"])
  state = optim.init(tx, p)
  specs = {a.shape: a.sharding.spec for a in jax.tree.leaves(state) if a.ndim}
  w = layout["text"]["q"]["w"].spec
  assert specs[8, 4] == w == jax.sharding.PartitionSpec("fsdp", "tensor")
  assert all(a.sharding.mesh == mesh for a in jax.tree.leaves(state))


@pytest.mark.parametrize(
  "options, text",
  [
    (dict(freeze=["^visoin/"]), "matches no parameter; paths begin with text/norm"),
    (dict(freeze=["."]), "every parameter"),
    (dict(schedule="linear"), "'cosine' or 'constant'"),
    (dict(warmup_steps=11), "warmup_steps = 11"),
  ],
)
def test_mistakes_are_named(options, text):
  with pytest.raises(ValueError, match=text):
    make(params(), **options)


def test_abstract_parameters_and_low_precision_moments():
  abstract = jax.eval_shape(params)
  tx, _ = make(abstract, moment_dtype="bfloat16")
  state = jax.eval_shape(tx.init, abstract)
  dtypes = sorted(str(a.dtype) for a in jax.tree.leaves(state) if a.ndim)
  assert dtypes == ["bfloat16"] * 4 + ["float32"] * 4
