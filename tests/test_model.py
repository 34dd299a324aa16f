"""model/: parity with transformers, packing, the cache, log-probs.

The oracle gets OUR position ids: its `get_rope_index` differs for videos (oracles.md
1.4).  Networks are random in every leaf, biases and norms included, so that nothing
passes because it is zero or one.
"""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import rest_slow

from pixel_jax.batch import Batch
from pixel_jax.model import config as config_lib
from pixel_jax.model import hf, layers
from pixel_jax.model import qwen2_5_vl as model
from pixel_jax.model.config import ModelConfig, TextConfig, VisionConfig
from pixel_jax.pixels import geometry

VOCAB = 99
IDS = dict(
  image_token=90, video_token=91, vision_start=92, vision_end=93, bos_token=94,
  eos_token=95,
)  # fmt: skip

SMALL = config_lib.tiny(VOCAB, **IDS)
CONFIGS = {
  "tiny": SMALL,
  # One kv head, tied, windows of 56 px, every third block full: scanned in periods.
  "tied": ModelConfig(
    VisionConfig(32, 6, 2, 40, 48, window=56, fullatt=(2, 5)),
    TextConfig(VOCAB, 48, 3, 6, 1, 56, (1, 1, 2), 1e4, tied=True),
    **IDS,
  ),
  # As many kv heads as heads, no period: unrolled, the text scanned all the same.
  "odd": ModelConfig(
    VisionConfig(48, 3, 3, 24, 64, window=84, fullatt=(0, 2)),
    TextConfig(VOCAB, 64, 2, 2, 2, 40, (3, 5, 8), 1e6, 1e-5),
    remat="full",
    **IDS,
  ),
}
# For what does not depend on depth: compiles fast.
ONE = ModelConfig(
  VisionConfig(32, 2, 2, 24, 32, window=56, fullatt=(1,)),
  TextConfig(VOCAB, 32, 2, 4, 2, 24, (1, 1, 2), 100.0),
  **IDS,
)
forward = jax.jit(model.forward, static_argnums=0)
encode_vision = jax.jit(model.encode_vision, static_argnums=0)
extend = jax.jit(model.extend, static_argnums=0, static_argnames="view")
token_logp = jax.jit(model.token_logp, static_argnums=0)

IMAGE, LARGE, VIDEO = (
  (1, 4, 6),
  (1, 18, 22),
  (3, 6, 10),
)  # grids; LARGE has ragged windows


def example(config, seed, pieces):
  """One conversation: `pieces` are numbers of text tokens or grids of pictures."""
  rng = np.random.default_rng(seed)
  v = config.vision
  tokens, position, index, pictures, start, merged = [], [], [], [], 0, 0
  for piece in pieces:
    if isinstance(piece, int):
      tokens.append(rng.integers(0, 90, piece))
      position.append(geometry.text_positions(piece, start))
      index.append(np.full(piece, -1))
    else:
      is_video = piece[0] > 1
      P = int(np.prod(piece))
      raster = rng.integers(0, 256, (P, 1176)).astype(np.uint8)
      laid = geometry.lay_out(raster, piece, window=v.window)
      tokens.append(
        np.full(P // 4, config.video_token if is_video else config.image_token)
      )
      if is_video:
        position.append(
          geometry.video_positions(piece, start, 1.0, v.tokens_per_second)
        )
      else:
        position.append(geometry.image_positions(piece, start))
      index.append(laid.merged_row + merged)
      merged += P // 4
      pictures.append((raster, laid, is_video))
    start = int(position[-1].max()) + 1
  return types.SimpleNamespace(
    tokens=np.concatenate(tokens).astype(np.int32),
    position=np.concatenate(position).astype(np.int32),
    index=np.concatenate(index).astype(np.int32),
    pictures=pictures,
  )


def pack(rows, T, P):
  """Batch of rows of examples, padded; the plain way, to be independent of data/pack."""
  B = len(rows)
  out = dict(
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
  for b, examples in enumerate(rows):
    t = p = image = window = 0
    for s, e in enumerate(examples, 1):
      n = len(e.tokens)
      here = slice(t, t + n)
      out["tokens"][b, here] = e.tokens
      out["segment"][b, here] = s
      out["position"][b, here] = e.position
      out["vision_index"][b, here] = np.where(e.index < 0, -1, e.index + p // 4)
      t += n
      for _, laid, _ in e.pictures:
        there = slice(p, p + len(laid.patches))
        out["patches"][b, there] = laid.patches
        out["patch_pos"][b, there] = laid.patch_pos
        out["patch_image"][b, there] = laid.patch_image + image + 1
        out["patch_window"][b, there] = laid.patch_window + window + 1
        p, image = there.stop, image + int(laid.patch_image.max()) + 1
        window += int(laid.patch_window.max()) + 1
  return Batch(**jax.tree.map(jnp.asarray, out))


def alone(e):
  """A batch of just this example, without padding."""
  P = sum(len(laid.patches) for _, laid, _ in e.pictures)
  return pack([[e]], len(e.tokens), P)


def noisy(config, seed=0):
  """Parameters that are random in every leaf."""
  rng = np.random.default_rng(seed)

  def draw(path, x):
    mean, scale = float(path[-1].key == "scale"), 0.03 if 1176 in x.shape else 0.1
    return jnp.array(mean + scale * rng.normal(size=x.shape), jnp.float32)

  return jax.tree_util.tree_map_with_path(draw, model.abstract(config))


def close(got, want, tolerance):
  """max |difference| relative to the scale of what is wanted."""
  got, want = np.asarray(got), np.asarray(want)
  assert got.shape == want.shape
  assert np.isfinite(got).all()
  scale = np.abs(want).max()
  assert np.abs(got - want).max() <= tolerance * scale, (
    f"differ by {np.abs(got - want).max() / scale:.1e} of {scale:.2g}"
  )


# ---- transformers --------------------------------------------------------------------


def oracle(config, seed=0):
  """A transformers model with noise in every parameter, and its weights as ours."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  torch.manual_seed(seed)
  theirs = transformers.Qwen2_5_VLForConditionalGeneration(
    transformers.Qwen2_5_VLConfig(**config_lib.to_hf(config))
  )
  theirs = theirs.float().eval()
  with torch.no_grad():
    for name, p in theirs.named_parameters():
      one = 1.0 if "norm" in name or "ln_q" in name else 0.0
      fan_in = p[0].numel() if p.ndim > 1 else 1
      p.copy_(one + torch.randn_like(p) * (0.1 if p.ndim == 1 else fan_in**-0.5))
  return theirs, ours(config, theirs.state_dict())


def ours(config, state):
  state = {k: v.detach().numpy() for k, v in state.items()}
  if config.text.tied:
    state.pop("lm_head.weight", None)
  return hf.import_state(config, state)


def inputs(e):
  """What `forward` of transformers takes for one example."""
  import torch

  from pixel_jax.model import vision

  def pixels(is_video):
    found = [raster for raster, _, v in e.pictures if v == is_video]
    if not found:
      return None
    x = np.concatenate(found)[None]
    return torch.tensor(np.array(vision.normalize(jnp.array(x), VisionConfig())[0]))

  def grids(is_video):
    found = [laid.grid for _, laid, v in e.pictures if v == is_video]
    return torch.tensor(found) if found else None

  tokens = torch.tensor(e.tokens[None].astype(np.int64))
  kinds = (tokens == 90).int() + 2 * (tokens == 91).int()
  out = dict(
    input_ids=tokens,
    attention_mask=torch.ones_like(tokens),
    mm_token_type_ids=kinds,
    position_ids=torch.tensor(e.position.T[:, None].astype(np.int64)),
    pixel_values=pixels(False),
    image_grid_thw=grids(False),
    pixel_values_videos=pixels(True),
    video_grid_thw=grids(True),
  )
  return {k: v for k, v in out.items() if v is not None}


PIECES = [5, IMAGE, 3, LARGE, 4, VIDEO, 6]


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_equal_transformers(name):
  """Two images, ragged windows and a video in one sequence; every parameter's gradient."""
  import torch

  config = CONFIGS[name]
  theirs, params = oracle(config)
  e = example(config, 0, PIECES)
  batch = alone(e)

  want = theirs(**inputs(e)).logits[0]
  weight = np.random.default_rng(1).normal(size=len(e.tokens)).astype(np.float32)

  def loss(params):
    hidden = model.forward(config, params, batch)
    logp, _ = model.token_logp(config, params, batch)
    return (logp[0] * weight).sum(), (logp[0], model.logits(config, params, hidden)[0])

  logp = torch.log_softmax(want[:-1].double(), -1)
  logp = logp.gather(1, torch.tensor(e.tokens[1:, None].astype(np.int64)))[:, 0]
  (logp * torch.tensor(weight[1:])).sum().backward()
  grads = {k: p.grad for k, p in theirs.named_parameters()}
  assert all(g is not None for g in grads.values())

  got, (found, logits) = jax.jit(jax.grad(loss, has_aux=True))(params)
  close(logits, want.detach(), 1e-4)
  close(found[1:], logp.detach(), 1e-4)
  assert found[0] == 0
  jax.tree.map(lambda a, b: close(a, b, 2e-4), got, ours(config, grads))


@pytest.mark.torch
@pytest.mark.slow
def test_every_block_equals_transformers():
  """Towers cut after each block; their hidden states are taken by hooks."""
  import torch

  config = dataclasses.replace(CONFIGS["odd"], scan_layers=False, remat="none")
  theirs, params = oracle(config)
  e = example(config, 1, PIECES)
  batch = alone(e)
  towers = theirs.model.visual.blocks, theirs.model.language_model.layers
  seen = [[], []]
  for tower, out in zip(towers, seen, strict=True):
    for block in tower:
      block.register_forward_hook(
        lambda _, __, y, out=out: out.append(y[0] if isinstance(y, tuple) else y)
      )
  with torch.no_grad():
    theirs(**inputs(e))
    # transformers runs its tower once for the images and once for the videos.
    vision, text = seen
    blocks = config.vision.depth
    vision = [torch.cat(pair) for pair in zip(vision[:blocks], vision[blocks:])]
    vision = [theirs.model.visual.merger(x).numpy() for x in vision]
    text = [theirs.model.language_model.norm(x[0]).numpy() for x in text]

  def cut(tree, depth):
    return {**tree, "blocks": jax.tree.map(lambda w: w[:depth], tree["blocks"])}

  for i, want in enumerate(vision, 1):
    fullatt = tuple(j for j in config.vision.fullatt if j < i)
    shallow = dataclasses.replace(
      config, vision=dataclasses.replace(config.vision, depth=i, fullatt=fullatt)
    )
    some = {**params, "vision": cut(params["vision"], i)}
    close(encode_vision(shallow, some, batch)[0], want, 2e-5)
  for i, want in enumerate(text, 1):
    shallow = dataclasses.replace(
      config, text=dataclasses.replace(config.text, depth=i)
    )
    some = {**params, "text": cut(params["text"], i)}
    close(forward(shallow, some, batch)[0], want, 2e-5)


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "tied"])
def test_greedy_generation_equals_transformers(name):
  import torch

  config = CONFIGS[name]
  theirs, params = oracle(config, seed=3)
  e = example(config, 2, [5, IMAGE, 3, LARGE, 4])
  feed = inputs(e)
  del feed["position_ids"]  # generate() makes its own; images agree with ours
  steps = 12
  with torch.no_grad():
    theirs.model.rope_deltas = None
    out = theirs.generate(
      **feed, max_new_tokens=steps, do_sample=False, eos_token_id=None,
      pad_token_id=0, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
  want_ids = out.sequences[0, len(e.tokens) :].numpy()
  want = torch.stack(out.logits)[:, 0].numpy()

  batch = alone(e)
  n = len(e.tokens)
  cache = model.init_cache(config, 1, n + steps)
  features = encode_vision(config, params, batch)
  hidden, cache = extend(
    config, params, cache, batch.tokens, batch.position, jnp.array([n]),
    batch.vision_index, features,
  )  # fmt: skip
  last, position, ids, got = hidden[:, -1], int(e.position.max()) + 1, [], []
  for _ in range(steps):
    got.append(model.logits(config, params, last)[0])
    ids.append(int(got[-1].argmax()))
    hidden, cache = extend(
      config, params, cache, jnp.array([[ids[-1]]]), jnp.full((1, 1, 3), position),
      jnp.array([1]), jnp.array([[-1]]),
    )  # fmt: skip
    last, position = hidden[:, 0], position + 1
  assert ids == want_ids.tolist()
  close(np.stack(got), want, 1e-4)


@pytest.mark.torch
def test_pixels_equal_transformers():
  """Normalisation bit for bit, under jit, for all 256 values of each channel."""
  pytest.importorskip("torch")
  from pixel_jax.model import vision

  x = np.arange(256, dtype=np.uint8)
  patches = np.broadcast_to(x[:, None], (256, 1176))[None]
  got = jax.jit(vision.normalize, static_argnums=1)(patches, VisionConfig())
  mean, std = np.repeat(vision.MEAN, 392), np.repeat(vision.STD, 392)
  want = (patches.astype(np.float32) / np.float32(255) - mean) / std
  assert want.dtype == np.float32
  np.testing.assert_array_equal(got, want)


# ---- Packing -------------------------------------------------------------------------


@pytest.mark.slow
def test_packed_rows_equal_examples_alone():
  """log-probs, entropies and the gradient of their sum do not know their neighbours."""
  config = ONE
  params = noisy(config)
  pieces = [[3, IMAGE, 9], [7], [2, VIDEO, 3, IMAGE, 5], [4, VIDEO, 6]]
  es = [example(config, i, p) for i, p in enumerate(pieces)]
  rows = [[es[0], es[1], es[2]], [es[3]]]
  packed = pack(rows, 88, 228)

  def loss(params, batch):
    logp, entropy = model.token_logp(config, params, batch, 0.7)
    return logp.sum() + 0.1 * entropy.sum(), (logp, entropy)

  grad = jax.jit(jax.grad(loss, has_aux=True))
  total, (logp, entropy) = grad(params, packed)
  parts = []
  for b, row in enumerate(rows):
    start = 0
    for e in row:
      g, (one, h) = grad(params, pack([[e]], 88, 228))
      n = len(e.tokens)
      here = slice(start, start + n)
      np.testing.assert_allclose(logp[b, here], one[0, :n], atol=2e-5)
      np.testing.assert_allclose(entropy[b, here], h[0, :n], atol=2e-5)
      parts.append(g)
      start = here.stop
    assert not np.any(logp[b, start:])
    assert not np.any(entropy[b, start:])
  jax.tree.map(lambda a, *b: close(a, sum(b), 1e-4), total, *parts)


def test_a_picture_shared_by_two_segments():
  """A row holds each distinct image once; both segments point at it."""
  config, params = ONE, noisy(ONE)
  a = example(config, 5, [3, IMAGE, 4])
  b = types.SimpleNamespace(**{**vars(a), "tokens": a.tokens.copy()})
  b.tokens[-3:] = (1, 2, 3)
  twice = pack([[a, b]], 40, 48)
  shared = pack([[a, types.SimpleNamespace(**{**vars(b), "pictures": []})]], 40, 24)
  n = len(a.tokens)
  index = np.array(shared.vision_index)
  index[0, n : 2 * n] = b.index  # not moved behind a's pictures
  shared = shared.replace(vision_index=jnp.array(index))
  got, _ = token_logp(config, params, shared)
  want, _ = token_logp(config, params, twice)
  np.testing.assert_allclose(got, want, atol=1e-5)


# ---- Log-probs -----------------------------------------------------------------------


@pytest.mark.parametrize("chunk", rest_slow([7 * 2, 1, 10**6]))
def test_logp_is_log_softmax_whatever_the_chunk(chunk):
  config = dataclasses.replace(ONE, logp_chunk=chunk)
  params = noisy(config)
  rows = [[example(config, 0, [13]), example(config, 1, [9])],
          [example(config, 2, [11])]]  # fmt: skip
  batch = pack(rows, 24, 0)
  hidden = forward(config, params, batch)
  full = jax.nn.log_softmax(model.logits(config, params, hidden) / 1.3)
  want = np.zeros((2, 24), np.float32)
  bits = np.zeros((2, 24), np.float32)
  segment = np.array(batch.segment)
  for b, t in np.ndindex(2, 24):
    if t and segment[b, t] and segment[b, t] == segment[b, t - 1]:
      want[b, t] = full[b, t - 1, batch.tokens[b, t]]
      bits[b, t] = -(jnp.exp(full[b, t - 1]) * full[b, t - 1]).sum()
  assert (want != 0).sum() == 13 - 1 + 9 - 1 + 11 - 1

  def loss(params):
    logp, entropy = model.token_logp(config, params, batch, 1.3)
    return (logp * logp).sum() + entropy.sum(), (logp, entropy)

  def slow(params):
    hidden = model.forward(config, params, batch)
    full = jax.nn.log_softmax(model.logits(config, params, hidden) / 1.3)
    at = jnp.array(np.argwhere(want))
    rows = full[at[:, 0], at[:, 1] - 1]
    logp = rows[jnp.arange(len(at)), batch.tokens[at[:, 0], at[:, 1]]]
    return (logp * logp).sum() - (jnp.exp(rows) * rows).sum()

  grads, (logp, entropy) = jax.jit(jax.grad(loss, has_aux=True))(params)
  np.testing.assert_allclose(logp, want, atol=2e-5)
  np.testing.assert_allclose(entropy, bits, atol=2e-5)
  jax.tree.map(lambda a, b: close(a, b, 1e-4), grads, jax.jit(jax.grad(slow))(params))


@pytest.mark.slow
def test_where_leaves_out_what_is_not_wanted():
  config, params = ONE, noisy(ONE)
  batch = pack([[example(config, 0, [9, IMAGE, 20]), example(config, 1, [11])]], 64, 24)
  where = jnp.asarray(np.random.default_rng(0).random((1, 64)) < 0.4)

  def loss(params, where):
    out = model.token_logp(config, params, batch, 0.9, where)
    kept = [jnp.where(mine, x, 0) for x in out]
    return (kept[0] - 0.1 * kept[1]).sum(), out

  mine = where
  grad = jax.jit(jax.grad(loss, has_aux=True))
  grads, got = grad(params, where)
  want_grads, want = grad(params, None)
  for a, b in zip(got, want):
    np.testing.assert_allclose(a, jnp.where(where, b, 0), atol=1e-6)
    assert 5 < np.count_nonzero(a) < np.count_nonzero(b)
  jax.tree.map(lambda a, b: close(a, b, 1e-5), grads, want_grads)


@pytest.mark.slow
def test_logits_of_all_tokens_never_exist():
  """With chunks, the step needs less memory than f32[B T V] alone."""
  text = dataclasses.replace(ONE.text, vocab=50_000)
  config = dataclasses.replace(ONE, text=text, logp_chunk=64)
  B, T = 2, 512
  e = example(ONE, 0, [T])
  batch = pack([[e]] * B, T, 0)

  def loss(params):
    return model.token_logp(config, params, batch)[0].sum()

  compiled = jax.jit(jax.grad(loss)).lower(model.abstract(config)).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 4 * B * T * 50_000 / 2


# ---- Cache ---------------------------------------------------------------------------


def padded(x, T, fill=0):
  return np.pad(x, [(0, T - len(x))] + [(0, 0)] * (x.ndim - 1), constant_values=fill)


@pytest.mark.parametrize("scan", rest_slow([True, False]))
def test_turns_equal_a_full_forward(scan):
  """Prefill, decoding steps, an observation with an image, more steps; ragged rows."""
  config = dataclasses.replace(ONE, scan_layers=scan)
  params = noisy(config)
  es = [
    example(config, 0, [6, IMAGE, 9, IMAGE, 7]),
    example(config, 1, [4, LARGE, 3]),
    example(config, 2, [30, IMAGE, 2]),
  ]
  # Where each row stands after each call; a row that does not move has count 0.
  stops = [
    [0, 0, 0],
    [14, 9, 20],
    [15, 10, 20],
    [16, 10, 21],
    [26, 90, 36],
    [27, 106, 36],
  ]
  stops += [[len(e.tokens) for e in es]]
  batch = pack([[e] for e in es], 128, 420)
  want = forward(config, params, batch)
  features = encode_vision(config, params, batch)
  cache = model.init_cache(config, 3, 128)
  for before, after in zip(stops[:-1], stops[1:], strict=True):
    count = np.subtract(after, before)
    T = 1 if max(count) == 1 else 82  # two compilations, always some padding
    cut = [slice(a, b) for a, b in zip(before, after, strict=True)]
    junk = np.random.default_rng(0).integers(0, 90, (3, T)).astype(np.int32)

    def rows(name, fill, T=T, cut=cut):
      return np.stack([padded(getattr(e, name)[c], T, fill) for e, c in zip(es, cut)])

    tokens = np.where(np.arange(T) < count[:, None], rows("tokens", 0), junk)
    arrays = tokens, rows("position", 0), count.astype(np.int32), rows("index", -1)
    hidden, cache = extend(config, params, cache, *map(jnp.array, arrays), features)
    assert cache.length.tolist() == after
    for b, c in enumerate(cut):
      np.testing.assert_allclose(hidden[b, : count[b]], want[b, c], atol=1e-5)


@pytest.mark.slow
def test_rows_and_views():
  """A call on some rows leaves the others; padding rows vanish; a view is exact."""
  config, params = ONE, noisy(ONE)
  es = [example(config, i, [5 + i, IMAGE, 4]) for i in range(4)]
  batch = pack([[e] for e in es], 32, 24)
  want = forward(config, params, batch)
  features = encode_vision(config, params, batch)
  cache = model.init_cache(config, 4, 32)
  cache = cache.replace(k=cache.k + 5, v=cache.v - 5)  # stale, as after a finished row
  before = jax.tree.map(np.array, cache)
  rows = jnp.array([2, 0, 4, 4])
  pick = np.array([2, 0, 1, 1])
  n = np.array([len(e.tokens) for e in es])
  count = jnp.where(rows < 4, n[pick], 7)
  hidden, after = extend(
    config, params, cache, batch.tokens[pick], batch.position[pick], count,
    batch.vision_index[pick], features[pick], rows, view=24,
  )  # fmt: skip
  assert after.length.tolist() == [n[0], 0, n[2], 0]
  for r, b in enumerate([2, 0]):
    np.testing.assert_allclose(hidden[r, : n[b]], want[b, : n[b]], atol=1e-5)
    np.testing.assert_array_equal(after.k[:, b, :, n[b] :], before.k[:, b, :, n[b] :])
  for b in (1, 3):
    np.testing.assert_array_equal(after.k[:, b], before.k[:, b])
    np.testing.assert_array_equal(after.v[:, b], before.v[:, b])


def test_decoding_updates_the_cache_in_place():
  """A loop of steps needs no second cache: it rides in the carry."""
  config = dataclasses.replace(SMALL, scan_layers=True)
  B, S = 8, 4096
  cache = jax.eval_shape(lambda: model.init_cache(config, B, S))

  def loop(params, cache):
    def step(_, carry):
      cache, token = carry
      hidden, cache = model.extend(
        config, params, cache, token[:, None], jnp.ones((B, 1, 3), jnp.int32),
        jnp.ones((B,), jnp.int32), jnp.full((B, 1), -1),
      )  # fmt: skip
      return cache, model.logits(config, params, hidden[:, 0]).argmax(-1)

    return jax.lax.fori_loop(0, 9, step, (cache, jnp.zeros((B,), jnp.int32)))

  lowered = jax.jit(loop, donate_argnums=1).lower(model.abstract(config), cache)
  memory = lowered.compile().memory_analysis()
  whole = 2 * 4 * np.prod(cache.k.shape)
  assert memory.alias_size_in_bytes >= whole
  # One layer of keys and one of values are read as copies on a CPU; never all of them.
  assert memory.temp_size_in_bytes < whole


# ---- Runtime options -----------------------------------------------------------------


@pytest.mark.slow
def test_runtime_options_change_nothing():
  """scan, remat and chunks are ways to run, not another function."""
  base = dataclasses.replace(ONE, scan_layers=False)
  params = noisy(base)
  batch = pack([[example(base, 0, [3, IMAGE, 5])]], 20, 24)

  def run(config):
    def loss(params):
      return model.token_logp(config, params, batch)[0].sum()

    return jax.jit(jax.value_and_grad(loss))(params)

  want = run(base)
  for options in ({"remat": "full"},
                  {"scan_layers": True, "remat": "full", "logp_chunk": 7}):  # fmt: skip
    got = run(dataclasses.replace(base, **options))
    jax.tree.map(lambda a, b: close(a, b, 1e-4), got, want)


REMAT = ("none", "dots", "qkvo", "full")


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_remat_keeps_less_and_gives_the_same_gradient(scan):
  """Of both towers; the vision tower of "tied" is scanned in periods."""
  params = noisy(CONFIGS["tied"])
  batch = pack([[example(CONFIGS["tied"], 0, [3, IMAGE, 9])]], 24, 24)
  kept, grads = {}, {}
  for remat in REMAT:
    config = dataclasses.replace(CONFIGS["tied"], scan_layers=scan, remat=remat)

    def loss(params, config=config):
      return model.token_logp(config, params, batch)[0].sum()

    grads[remat] = jax.jit(jax.grad(loss))(params)
    # What a vjp closes over is what the forward pass hands to the backward pass.
    residuals = jax.eval_shape(lambda p, loss=loss: jax.vjp(loss, p)[1], params)
    kept[remat] = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(residuals))
    jax.tree.map(lambda a, b: close(a, b, 1e-4), grads[remat], grads["none"])
  assert kept["none"] > 1.5 * kept["dots"] > 1.5 * kept["full"]
  assert kept["dots"] > kept["qkvo"] > kept["full"], kept


def test_an_unknown_remat_is_told():
  with pytest.raises(ValueError, match="'half'.*none, dots, qkvo, full"):
    layers.checkpoint(lambda x: x, "half", scan=False)
  assert tuple(layers.REMAT) == REMAT


@pytest.mark.slow
def test_bf16_runs_close_to_f32():
  config = dataclasses.replace(ONE, dtype="bfloat16")
  params = noisy(config)
  batch = alone(example(config, 0, PIECES))
  hidden = forward(config, params, batch)
  assert hidden.dtype == jnp.bfloat16
  assert model.init_cache(config, 1, 8).k.dtype == jnp.bfloat16

  def loss(params, config):
    logp, entropy = model.token_logp(config, params, batch)
    assert logp.dtype == entropy.dtype == jnp.float32
    return logp.mean()

  grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
  got, grads = grad(params, config)
  want = token_logp(ONE, params, batch)[0].mean()
  assert abs(got - want) < 0.02 * abs(want)
  assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads))
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("name", rest_slow(CONFIGS))
def test_parameter_paths_are_those_of_the_table(name):
  config = CONFIGS[name]
  abstract = model.abstract(config)
  flat = jax.tree_util.tree_flatten_with_path(abstract)[0]
  found = {"/".join(k.key for k in path) for path, _ in flat}
  assert found == set(hf.paths(config))
  params = model.init(config, jax.random.key(0))
  assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
    lambda x: (x.shape, x.dtype), abstract
  )


def test_text_only_rows():
  """P = 0: no tower is run."""
  config, params = ONE, noisy(ONE)
  e = example(config, 0, [12])
  got, _ = token_logp(config, params, pack([[e]], 12, 0))
  want, _ = token_logp(config, params, pack([[e]], 12, 64))
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_features_stand_in_for_patches():
  config, params = ONE, noisy(ONE)
  batch = alone(example(config, 0, [3, IMAGE, 4]))
  features = encode_vision(config, params, batch)
  frozen = batch.replace(patches=jnp.zeros_like(batch.patches), features=features)
  np.testing.assert_array_equal(
    forward(config, params, batch), forward(config, params, frozen)
  )
