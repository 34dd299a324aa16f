"""model/flops.py against the matmuls of the traced program and published figures."""

import dataclasses
import math

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import pytest

from pixel_jax.batch import Batch
from pixel_jax.model import config as config_lib
from pixel_jax.model import flops, qwen2_5_vl

SEVEN = config_lib.PRESETS["7b"]


def count(jaxpr):
  """FLOPs of all matmuls of a jaxpr without loops."""
  total = 0
  for e in jaxpr.eqns:
    assert e.primitive.name not in ("scan", "while"), "the body would count once"
    if e.primitive.name == "dot_general":
      (contracted, _), _ = e.params["dimension_numbers"]
      length = math.prod(e.invars[0].aval.shape[i] for i in contracted)
      total += 2 * math.prod(e.outvars[0].aval.shape) * length
    total += sum(count(j) for j in jex_core.jaxprs_in_params(e.params))
  return total


def batch(B, T, P):
  ids = jax.ShapeDtypeStruct((B, T), jnp.int32)
  patch = jax.ShapeDtypeStruct((B, P), jnp.int32)
  return Batch(
    tokens=ids, segment=ids, position=jax.ShapeDtypeStruct((B, T, 3), jnp.int32),
    weight=jax.ShapeDtypeStruct((B, T), jnp.float32), vision_index=ids,
    patches=jax.ShapeDtypeStruct((B, P, 1176), jnp.uint8),
    patch_pos=jax.ShapeDtypeStruct((B, P, 2), jnp.int32), patch_image=patch,
    patch_window=patch,
  )  # fmt: skip


def logits(config):
  def f(params, batch):
    hidden = qwen2_5_vl.forward(config, params, batch)
    return qwen2_5_vl.logits(config, params, hidden).sum()

  return f


@pytest.mark.parametrize("tied", [False, True])
def test_forward_equals_the_matmuls_that_are_traced(tied):
  config = config_lib.tiny(99)
  config = dataclasses.replace(config, text=dataclasses.replace(config.text, tied=tied))
  B, T, P = 2, 48, 64  # one span of queries and one window: nothing is skipped
  params = qwen2_5_vl.abstract(config)
  jaxpr = jax.make_jaxpr(logits(config))(params, batch(B, T, P))
  ours = B * T * (flops.text_per_token(config, T) + flops.head_per_token(config))
  assert config.vision.window_patches == P
  assert count(jaxpr.jaxpr) == ours + B * P * flops.vision_per_patch(config, P)


@pytest.mark.parametrize("remat", ["none", "dots", "qkvo", "full"])
def test_a_step_equals_the_matmuls_that_are_traced(remat):
  config = config_lib.tiny(99, remat=remat)
  B, T, P = 2, 48, 64
  params = qwen2_5_vl.abstract(config)
  jaxpr = jax.make_jaxpr(jax.grad(logits(config)))(params, batch(B, T, P))
  ours = flops.train_step(
    config, text_tokens=B * T, context=T, patches=B * P, patches_per_image=P,
    scored=B * T,
  )  # fmt: skip
  again = B * T * flops.head_per_token(config)  # of logp.py, which is not called here
  assert count(jaxpr.jaxpr) + again == ours.executed


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_frozen_tower_has_no_backward_pass(remat):
  config = config_lib.tiny(99, remat=remat)
  B, T, P = 2, 48, 64

  def loss(text, tower, batch):
    return logits(config)({"text": text, "vision": tower}, batch)

  params = qwen2_5_vl.abstract(config)
  gradient = jax.grad(loss)
  jaxpr = jax.make_jaxpr(gradient)(params["text"], params["vision"], batch(B, T, P))
  ours = flops.train_step(
    config, text_tokens=B * T, context=T, patches=B * P, patches_per_image=P,
    scored=B * T, frozen_vision=True,
  )  # fmt: skip
  again = B * T * flops.head_per_token(config)
  assert count(jaxpr.jaxpr) + again == ours.executed


@pytest.mark.parametrize("context, gf", [(4096, 14.96), (8192, 15.79), (32_768, 20.72)])
def test_text_equals_the_published_formula(context, gf):
  ours = flops.text_per_token(SEVEN, context / 2) + flops.head_per_token(SEVEN)
  assert abs(ours / 1e9 / gf - 1) < 2e-3


@pytest.mark.parametrize("image, gf", [(1024, 1.315), (4096, 1.378), (16_384, 1.630)])
def test_vision_equals_the_published_formula(image, gf):
  assert abs(flops.vision_per_patch(SEVEN, image) / 1e9 / gf - 1) < 2e-3


def step(config=SEVEN, **kwargs):
  sizes = dict(
    text_tokens=4096, context=2048, patches=4096, patches_per_image=1024, scored=1000
  )
  return flops.train_step(config, **sizes | kwargs)


def test_a_trained_step_is_three_forward_passes():
  one = step()
  text = 4096 * flops.text_per_token(SEVEN, 2048) + 1000 * flops.head_per_token(SEVEN)
  vision = 4096 * flops.vision_per_patch(SEVEN, 1024)
  assert one.text == pytest.approx(3 * text)
  assert one.vision == pytest.approx(3 * vision, rel=2e-3)  # less: pixels are given
  assert one.total == one.text + one.vision
  assert one.executed == one.total + 1000 * flops.head_per_token(SEVEN)  # no remat
  assert step(frozen_vision=True).vision == pytest.approx(vision)
  assert step(frozen_text=True).text == pytest.approx(2 * text)
  assert step(patches=0).vision == 0


def test_work_counts_what_a_batch_asks_for():
  segment = jnp.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
  image = jnp.array([[1, 1, 1, 1, 2, 2, 0, 0], [0] * 8])
  index = jnp.array([[-1, 0, -1, 1, -1, -1], [-1] * 6])
  given = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), batch(2, 6, 8)).replace(
    segment=segment, patch_image=image, vision_index=index,
    weight=jnp.array([[0, 1, 0.5, 0, 0, 0], [0] * 6]),
  )  # fmt: skip
  got = jax.tree.map(float, flops.work(given))
  assert got == {
    "tokens": 11, "image_tokens": 2, "scored": 2, "keys": 6 + 3 + 21, "patches": 6,
    "patch_keys": 16 + 4,
  }  # fmt: skip
  cached = flops.work(given.replace(features=jnp.zeros((2, 2, 4))))
  assert cached["patches"] == cached["patch_keys"] == 0
  config = config_lib.tiny(99)
  paths = ["text/blocks/q/w", "vision/patch/w"]
  sizes = dict(text_tokens=11, context=30 / 11, patches_per_image=20 / 6, scored=2)
  ours = flops.train_step(config, patches=6, **sizes)
  assert flops.of_work(config, got, paths) == ours
  frozen = flops.train_step(config, patches=6, frozen_vision=True, **sizes)
  assert flops.of_work(config, got, paths[:1]) == frozen
  adapters = flops.of_work(config, got, ["text/blocks/q/lora_a"])
  assert adapters.text == pytest.approx(ours.text * 2 / 3)


def test_remat_costs_what_it_recomputes():
  def at(remat, **kwargs):
    return step(dataclasses.replace(SEVEN, remat=remat), **kwargs).executed

  none = at("none")
  assert none < at("dots") < at("qkvo") < at("full") < none * 4 / 3
  # The tower is not recomputed where nothing flows back through it.
  more = [at(r, frozen_vision=True) - at(r, frozen_vision=True, patches=0)
          for r in ("none", "full")]  # fmt: skip
  assert more[0] == pytest.approx(more[1])
