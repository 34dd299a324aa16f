"""Advantages and loss: TRL's numbers, hand-made groups, masks that must not leak."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixel_jax.rl import advantages, objectives

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "trl_grpo.npz")


def all_of(reward):
  return np.ones(reward.shape, bool)


# ---- TRL -----------------------------------------------------------------------------

OPTIONS = {
  "dapo": {},
  "bnpo": {},
  "kl": dict(kl=0.05, logp_reference=GOLDEN["reference"]),
  "sampler": dict(sampler_cap=2.0, logp_sampler=GOLDEN["sampler"]),
}


def golden_loss(logp, name, **more):
  advantage = np.repeat(GOLDEN["normed"].reshape(-1, 1), logp.shape[1], axis=1)
  options = {k: jnp.asarray(v) for k, v in OPTIONS[name].items() if np.ndim(v)}
  options |= {k: v for k, v in OPTIONS[name].items() if not np.ndim(v)}
  arrays = (jnp.asarray(x) for x in (GOLDEN["old"], advantage, GOLDEN["mask"]))
  return objectives.loss(logp, *arrays, **options, **more)


@pytest.mark.parametrize("name", OPTIONS)
def test_loss_and_gradient_equal_trl(name):
  logp = jnp.asarray(GOLDEN["logp"])
  (value, m), grad = jax.value_and_grad(golden_loss, has_aux=True)(logp, name)
  assert GOLDEN["version"] == "1.16.0"
  np.testing.assert_allclose(value, GOLDEN[f"{name}/loss"], atol=1e-5)
  np.testing.assert_allclose(grad, GOLDEN[f"{name}/grad"], atol=1e-5)
  np.testing.assert_allclose(
    m["policy/clip_fraction"], GOLDEN[f"{name}/clip_fraction"], atol=1e-6
  )
  assert 0.1 < m["policy/clip_fraction"] < 0.9  # both sides of the clip are tested


@pytest.mark.parametrize("std, name", [(True, "normed"), (False, "centred")])
def test_advantages_equal_trl(std, name):
  reward = GOLDEN["reward"]
  ours, _ = advantages.group_relative(reward, all_of(reward), std=std)
  np.testing.assert_allclose(ours, GOLDEN[name], atol=1e-5)


# ---- Advantages ----------------------------------------------------------------------


def test_masked_rollouts_leave_mean_and_deviation():
  reward = np.array([[1, 0, 1, 100.0]], np.float32)
  mask = np.array([[True, True, True, False]])
  ours, counts = advantages.group_relative(reward, mask, std=True)
  alone, _ = advantages.group_relative(reward[:, :3], all_of(reward[:, :3]), std=True)
  np.testing.assert_allclose(ours[:, :3], alone, rtol=1e-6)
  assert ours[0, 3] == 0 and counts["groups/uniform"] == 0


def test_small_groups_are_dropped_and_uniform_ones_counted():
  reward = np.array([[1, 0, 0, 0], [0.1, 0.1, 0.1, 0.1], [1, 0, 1, 1]], np.float32)
  mask = np.array([[True, False, False, False], [True] * 4, [True] * 4])
  for std in (True, False):
    ours, counts = advantages.group_relative(reward, mask, std=std)
    assert (ours[0] == 0).all() and (ours[1] == 0).all() and (ours[2] != 0).all()
    assert counts["groups/dropped"] == 1 and counts["groups/uniform"] == 1
  np.testing.assert_array_equal(
    advantages.kept(mask), [[False] * 4, [True] * 4, [True] * 4]
  )


def test_without_std_it_is_reward_minus_mean():
  reward = np.array([[1, 0, 0, 0]], np.float32)
  ours, _ = advantages.group_relative(reward, all_of(reward), std=False)
  np.testing.assert_allclose(ours, [[0.75, -0.25, -0.25, -0.25]])


# ---- Loss ----------------------------------------------------------------------------


def rows(seed=0, B=4, T=6):
  rng = np.random.default_rng(seed)
  old = -rng.exponential(1.0, (B, T))
  logp = old + rng.normal(0, 0.3, (B, T))
  advantage = rng.normal(size=(B, T))
  weight = (rng.random((B, T)) < 0.7).astype(float)
  return [jnp.asarray(x, jnp.float32) for x in (logp, old, advantage, weight)]


def test_gradient_at_ratio_one_is_the_policy_gradient():
  logp, _, advantage, weight = rows()
  grad = jax.grad(lambda x: objectives.loss(x, logp, advantage, weight)[0])(logp)
  np.testing.assert_allclose(grad, -advantage * weight / weight.sum(), atol=1e-7)


def test_what_has_no_weight_does_not_matter():
  logp, old, advantage, weight = rows()
  wild = jnp.where(weight > 0, logp, 1e4)  # exp would be inf
  f = jax.value_and_grad(lambda x: objectives.loss(x, old, advantage, weight)[0])
  np.testing.assert_array_equal(f(wild)[0], f(logp)[0])
  assert np.isfinite(f(wild)[1]).all() and (f(wild)[1][weight == 0] == 0).all()
  _, m = objectives.loss(wild, old, advantage, weight)
  assert all(np.isfinite(v) for v in m.values())


def test_micro_batches_add_up():
  logp, old, advantage, weight = rows()
  total = weight.sum()
  whole, m = objectives.loss(logp, old, advantage, weight)
  halves = [
    objectives.loss(*(x[s] for x in (logp, old, advantage, weight)), normalizer=total)
    for s in (slice(0, 1), slice(1, 4))
  ]
  np.testing.assert_allclose(halves[0][0] + halves[1][0], whole, atol=1e-6)
  for k, v in m.items():
    parts = [h[1][k] for h in halves]
    joined = max(parts) if k.endswith("_max") else sum(parts)
    np.testing.assert_allclose(joined, v, atol=1e-6, err_msg=k)


def test_an_empty_batch_is_zero():
  logp, old, advantage, weight = rows()
  value, m = objectives.loss(logp, old, advantage, weight * 0)
  assert value == 0 and all(v == 0 for v in m.values())


@pytest.mark.parametrize("options", [dict(kl=0.1), dict(sampler_cap=2.0)])
def test_missing_log_probs_are_named(options):
  with pytest.raises(ValueError, match=r"loss\.\w+ is on"):
    objectives.loss(*rows(), **options)


def test_agreement():
  logp, sampler, _, weight = rows()
  m = objectives.agreement(logp, sampler, weight)
  gap = np.abs(np.asarray(logp - sampler))[np.asarray(weight) > 0]
  np.testing.assert_allclose(m["agreement/logp_diff_mean"], gap.mean(), rtol=1e-5)
  np.testing.assert_allclose(m["agreement/logp_diff_max"], gap.max(), rtol=1e-6)
  assert m["agreement/kl"] > 0
  same = objectives.agreement(logp, logp, weight)
  assert all(v == 0 for v in same.values())


@pytest.mark.parametrize("far", [100.0, -100.0, 1e4])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("options", [{}, {"sampler_cap": 2.0}, {"kl": 0.1}])
def test_a_log_ratio_far_off_has_a_finite_gradient(far, sign, options):
  logp, old, advantage, weight = rows()
  advantage, weight = jnp.abs(advantage) * sign, jnp.ones_like(weight)
  logp = logp.at[0, 0].set(old[0, 0] + far)
  if "sampler_cap" in options:
    options = options | {"logp_sampler": old - far}
  if "kl" in options:
    options = options | {"logp_reference": old + far}

  def f(x):
    return objectives.loss(x, old, advantage, weight, **options)[0]

  value, grad = jax.value_and_grad(f)(logp)
  assert jnp.isfinite(value) and jnp.isfinite(grad).all()


def test_dual_clip_bounds_what_a_bad_token_costs():
  logp = jnp.array([[np.log(10.0), np.log(10.0), 0.0]], jnp.float32)
  advantage, weight = jnp.array([[-1.0, 1.0, -1.0]]), jnp.ones((1, 3))

  def cost(dual_clip):
    value, _ = objectives.loss(
      logp, jnp.zeros((1, 3)), advantage, weight, dual_clip=dual_clip
    )
    return float(value) * 3

  assert cost(0.0) == pytest.approx(10.0 - 1.28 + 1.0)
  assert cost(3.0) == pytest.approx(3.0 - 1.28 + 1.0)


@pytest.mark.parametrize(
  "wrong",
  [{"clip": (0.2,)}, {"clip": (-0.1, 0.2)}, {"sampler_cap": -1.0}, {"kl": -1.0},
   {"dual_clip": 0.5}, {"dual_clip": -3.0}],
)  # fmt: skip
def test_settings_that_turn_learning_around_are_refused(wrong):
  with pytest.raises(ValueError, match=next(iter(wrong))):
    objectives.loss(*rows(), **wrong)
