"""A varied epoch runs through one compiled program: shapes never depend on the data."""

import chex
import jax
import jax.numpy as jnp
import pytest

from pixel_jax import parallel
from pixel_jax.chat import encode, tokenizer
from pixel_jax.data import pipeline, sources, world
from pixel_jax.model import config as model_config
from pixel_jax.model import qwen2_5_vl
from pixel_jax.synthesis import templates


@pytest.fixture
def codec(tmp_path):
  words = tokenizer.make_tiny(tmp_path / "tokenizer", world.scaffolds())
  budgets = {
    "image": (7056, 7056),
    "video": (784, 784),
    "crop": (1568, 3136),
    "frame": (12544, 12544),
  }
  return encode.Codec(tokenizer=words, budgets=budgets, video_frames=8)


@pytest.mark.slow
def test_every_kind_of_trace_is_one_trace_of_the_program(codec):
  config = model_config.tiny(codec.tokenizer.vocab_size)
  params = qwen2_5_vl.init(config, jax.random.key(0))
  mesh = parallel.make_mesh(1, 1, 1)
  chex.clear_trace_counter()

  @jax.jit
  @chex.assert_max_traces(n=1)
  def gradient(params, batch):
    def loss(params):
      logp, _ = qwen2_5_vl.token_logp(config, params, batch)
      return -(logp * batch.weight).sum() / jnp.maximum(batch.weight.sum(), 1.0)

    return jax.value_and_grad(loss)(params)

  kinds = {k: 1.0 for k in templates.KINDS if k != "video/zoom"}  # needs full_train
  source = sources.open_source(
    "world:train",
    synthesis=templates.Templates(kinds=kinds, jitter=2.0, edge_jitter=1.0),
  )
  stream = pipeline.batches(
    source, codec, seed=0, rows=4, tokens=192, patches=320, pack_window=8, shards=2
  )
  losses = []
  for _ in range(8):
    rows = next(stream)
    del rows["names"]
    loss, _ = gradient(params, parallel.to_devices(mesh, rows))
    losses.append(float(loss))
  stream.close()
  assert len(set(losses)) == 8 and all(jnp.isfinite(jnp.array(losses)))
