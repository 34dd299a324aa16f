"""The optimizer against formulas written out, and what freezing leaves alone."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixel_jax import parallel
from pixel_jax.run import optim

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


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_changes_nothing(bad, where):
  p = params()
  tx, _ = make(p, clip_norm=1.0, weight_decay=0.1)
  apply = jax.jit(lambda g, x, s, loss: optim.apply(tx, g, x, s, loss))
  x, state, told = apply(params(1), p, optim.init(tx, p), 0.5)
  assert told["optim/nonfinite"] == 0
  grads, loss = params(2), np.float32(bad if where == "loss" else 0.5)
  if where == "gradient":
    grads["text"]["q"]["b"] = grads["text"]["q"]["b"].at[2].set(bad)
  after, same, told = apply(grads, x, state, loss)
  assert told["optim/nonfinite"] == 1
  for a, b in zip(jax.tree.leaves((after, same)), jax.tree.leaves((x, state))):
    np.testing.assert_array_equal(a, b)
  # The next one goes on as if it had not been.
  for a, b in zip(apply(params(3), after, same, 0.5), apply(params(3), x, state, 0.5)):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_guard_ends_a_run_after_so_many_in_a_row(caplog):
  guard = optim.Guard(3)
  for step, bad in enumerate([1, 1, 0, 1, 1], 1):
    guard.check(step, bad, ["q7", "q9"])
  assert "step 2" in caplog.text and "q7, q9" in caplog.text
  with pytest.raises(optim.NonFiniteError, match=r"step 6.*q1.*max_nonfinite=3"):
    guard.check(6, 1.0, ["q1"])
  with pytest.raises(ValueError, match="max_nonfinite"):
    optim.Guard(0)


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


FREEZE = ["^vision/", "/norm/"]


def test_split_parts_and_merge_joins():
  p = params()
  trained, frozen = optim.split(p, FREEZE)
  assert optim.list_paths(trained) == ["text/q/b", "text/q/w"]
  assert optim.list_paths(frozen) == ["text/norm/scale", "vision/patch/w"]
  joined = optim.merge(trained, frozen)
  assert jax.tree.structure(joined) == jax.tree.structure(p)
  assert all(a is b for a, b in zip(jax.tree.leaves(joined), jax.tree.leaves(p)))
  assert optim.split(p, []) == (p, {}) and optim.merge(p, {}) == p


@hypothesis.given(st.lists(st.sampled_from(["^text", "q", "w$", "scale", "vi"])))
def test_merge_inverts_split(freeze):
  p = params()
  trained, frozen = optim.split(p, freeze)
  assert jax.tree.structure(optim.merge(trained, frozen)) == jax.tree.structure(p)
  assert not set(optim.list_paths(trained)) & set(optim.list_paths(frozen))


def test_nothing_is_kept_for_frozen_parameters():
  """Neither gradients nor sums of them nor moments; checked on the compiled step."""
  p = params()
  tx, _ = make(p, freeze=FREEZE, weight_decay=0.1, clip_norm=1.0)
  trained, frozen = optim.split(p, FREEZE)
  state = optim.init(tx, trained)
  assert sorted(a.size for a in jax.tree.leaves(state) if a.ndim) == [4, 4, 32, 32]

  def loss(trained, frozen, rows):
    full = optim.merge(trained, frozen)
    x = rows @ full["vision"]["patch"]["w"] * full["text"]["norm"]["scale"]
    return ((x @ full["text"]["q"]["w"] + full["text"]["q"]["b"]) ** 2).sum()

  @jax.jit
  def step(trained, frozen, state, rows):
    grads = optim.accumulate(
      lambda part: jax.grad(loss)(trained, frozen, part), rows, 3
    )
    return optim.apply(tx, grads, trained, state)

  rows = jnp.arange(36.0).reshape(6, 6)
  compiled = step.lower(trained, frozen, state, rows).compile()
  text = compiled.as_text()
  made = [x for x in text.splitlines() if "= f32[6,8]" in x]  # like the frozen matrix
  assert made and all("parameter(" in x or "get-tuple-element" in x for x in made)
  assert "= f32[8,4]" in text  # as the trained one is made
  new, _, _ = step(trained, frozen, state, rows)
  assert (new["text"]["q"]["w"] != p["text"]["q"]["w"]).any()


@pytest.mark.parametrize("parts", [1, 2, 6])
def test_parts_of_the_rows_add_up(parts):
  rows = {"a": jnp.arange(12.0).reshape(12, 1), "b": jnp.ones((12, 2, 3))}

  def function(part):
    assert part["a"].shape == (12 // parts, 1)
    return {"sum": (part["a"] ** 2).sum() + part["b"].sum()}

  got = jax.jit(lambda r: optim.accumulate(function, r, parts))(rows)
  assert got["sum"] == sum(i**2 for i in range(12)) + 72


def test_parts_take_rows_of_every_device():
  """No row moves to another device: the parts are strided, not blocks."""
  mesh = parallel.make_mesh(data=4, fsdp=2)
  x = parallel.put_rows(mesh, np.arange(32.0).reshape(16, 2))
  text = (
    jax.jit(lambda r: optim.accumulate(lambda p: p.sum(0), r, 2))
    .lower(x)
    .compile()
    .as_text()
  )
  for move in ("all-to-all", "all-gather", "collective-permute"):
    assert move not in text
  assert "all-reduce" in text


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
  state = optim.init(tx, optim.split(p, ["norm"])[0])
  specs = {a.shape: a.sharding.spec for a in jax.tree.leaves(state) if a.ndim}
  w = layout["text"]["q"]["w"].spec
  assert specs[8, 4] == w == jax.sharding.PartitionSpec("fsdp", "tensor")
  assert all(a.sharding.mesh == mesh for a in jax.tree.leaves(state))


@pytest.mark.parametrize(
  "options, text",
  [
    (dict(freeze=["^visoin/"]), "matches no parameter; paths begin with text/norm"),
    (dict(freeze=["."]), "every parameter"),
    (dict(schedule="linear"), "schedule='linear': expected one of cosine, constant"),
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
