"""Qwen2.5-VL as pure functions: vision and text joined.  Read this first in the room.

  params = init(config, key)
  hidden = forward(config, params, batch)                 # f[B T D], normed
  logp, entropy = token_logp(config, params, batch)       # of tokens[t] given the past
  cache = init_cache(config, B, max_len)
  hidden, cache = extend(config, params, cache, tokens, position, count, index)

`config` is static (frozen, hashable), `params` a pure nested dict, f32 or any float;
each function casts it to `config.dtype` before use, so that under FSDP the bf16 copy is
what is gathered.  With `config.lora` the tree holds adapters beside their weights.
Nothing is jitted here but what makes parameters: callers jit what they compose.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pixel_jax import parallel
from pixel_jax.batch import Batch, Cache, Prompts
from pixel_jax.model import logp, lora, table
from pixel_jax.model.config import ModelConfig
from pixel_jax.model.text import Text
from pixel_jax.model.vision import Vision

Params = Any  # nested dict of arrays; paths as in the table of hf.py


class Model(nnx.Module):
  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    self.vision = Vision(config, rngs)
    self.text = Text(config, rngs)
    for path in table.adapted(config):  # last: they leave the weights' numbers alone
      functools.reduce(getattr, path.split("/"), self).adapt(config.lora, rngs)


# ---- Parameters ----------------------------------------------------------------------


def init(config: ModelConfig, key: jax.Array, shardings: Any = None) -> Params:
  """Random f32 parameters, made where `shardings` (a tree, or None) puts them."""
  return jax.jit(_init, static_argnums=0, out_shardings=shardings)(config, key)


def abstract(config: ModelConfig) -> Params:
  """The tree of `init` as ShapeDtypeStructs; costs nothing."""
  return jax.eval_shape(functools.partial(_init, config), jax.random.key(0))


def adapt(
  config: ModelConfig, params: Params, key: jax.Array, shardings: Any = None
) -> Params:
  """`params`, of `config.merged`, with new f32 adapters that change nothing yet."""
  chosen = [row.path for row in table.adapters(config)]

  def draw(key):
    flat = table.unnest(_init(config, key))
    return {path: flat[path] for path in chosen}

  if shardings is not None:
    flat = table.unnest(shardings)
    shardings = {path: flat[path] for path in chosen}
  return table.nest(
    {**table.unnest(params), **jax.jit(draw, out_shardings=shardings)(key)}
  )


def merge(config: ModelConfig, params: Params) -> Params:
  """Parameters of `config.merged`, the adapters added to their weights.

  What has no adapter is shared with `params`, not copied.  A merged weight is f32, or
  bf16 where both the weight and `config.dtype` are.
  """
  flat = table.unnest(params)
  merged = {path: x for path, x in flat.items() if not lora.is_adapter(path)}
  for path in table.adapted(config):
    w, a, b = (flat[f"{path}/{name}"] for name in ("w", "lora_a", "lora_b"))
    merged[f"{path}/w"] = lora.merge(
      w,
      a,
      b,
      scale=config.lora.scale,
      stacked="/blocks/" in path,
      dtype=jnp.promote_types(w.dtype, config.dtype),
    )
  return table.nest(merged)


def cast(config: ModelConfig, params: Params) -> Params:
  """Parameters, or a part of them, in the compute dtype; norm scales stay as they are."""

  def one(path, x):
    return x if path[-1].key == "scale" else x.astype(config.dtype)

  return jax.tree_util.tree_map_with_path(one, params)


def is_wide(config: ModelConfig, params: Params) -> bool:
  """Whether `cast` would change anything: jitted it copies even what it leaves alone."""
  narrow = jax.eval_shape(functools.partial(cast, config), params)
  pairs = zip(jax.tree.leaves(params), jax.tree.leaves(narrow))
  return any(x.dtype != y.dtype for x, y in pairs)


def _init(config: ModelConfig, key: jax.Array) -> Params:
  return nnx.to_pure_dict(nnx.state(Model(config, nnx.Rngs(key)), nnx.Param))


@functools.lru_cache(maxsize=16)
def _graphdefs(config: ModelConfig) -> dict[str, Any]:
  model = nnx.eval_shape(lambda: Model(config, nnx.Rngs(0)))
  return {"vision": nnx.graphdef(model.vision), "text": nnx.graphdef(model.text)}


def _vision(config: ModelConfig, params: Params) -> Vision:
  """The tower around its parameters, cast to the compute dtype."""
  return nnx.merge(_graphdefs(config)["vision"], cast(config, params["vision"]))


def _text(config: ModelConfig, params: Params) -> Text:
  return nnx.merge(_graphdefs(config)["text"], cast(config, params["text"]))


# ---- Packed rows ---------------------------------------------------------------------


def encode_vision(config: ModelConfig, params: Params, batch: Any) -> jax.Array:
  """Features f[B M D] of the patches, in window order; M = P / 4.

  Args:
    batch: a `Batch`, or any object with patches, patch_pos, patch_image, patch_window.
  """
  B, P = batch.patches.shape[:2]
  if P == 0:  # text only
    return jnp.zeros((B, 0, config.text.width), config.dtype)
  return _vision(config, params)(
    batch.patches, batch.patch_pos, batch.patch_image, batch.patch_window
  )


def forward(config: ModelConfig, params: Params, batch: Batch) -> jax.Array:
  """Hidden states f[B T D] after the last norm."""
  features = batch.features
  if features is None:
    features = encode_vision(config, params, batch)
  features = parallel.by_rows(features)
  x = _embed(config, params, batch.tokens, batch.vision_index, features)
  return _text(config, params)(x, batch.position, batch.segment)


def token_logp(
  config: ModelConfig,
  params: Params,
  batch: Batch,
  temperature: float = 1.0,
  where: Bool[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
  """Log-prob of tokens[t] and the entropy it was drawn from, f32[B T].

  Both are of the distribution after the tokens before t in its segment; 0 at the first
  token of a segment and at padding.  The logits of at most `config.logp_chunk` tokens
  exist at a time, and the head runs only where it is asked to (logp.py).

  Args:
    where: tokens whose log-prob is wanted; elsewhere both are 0.  None = all.
  """
  hidden = forward(config, params, batch)
  segment = batch.segment
  known = (segment[:, 1:] == segment[:, :-1]) & (segment[:, 1:] > 0)
  if where is not None:
    known &= where[:, 1:]
  head, equation = _text(config, params).output()
  # Position t - 1 predicts token t; the last one predicts nothing.

  def chosen(hidden, labels, where, head):
    return logp.chosen(
      hidden, head, labels, where, equation=equation, temperature=temperature,
      limit=config.logp_chunk // parallel.row_groups(),
    )  # fmt: skip

  out = parallel.map_rows(
    chosen,
    hidden,
    jnp.roll(batch.tokens, -1, axis=1),
    jnp.pad(known, [(0, 0), (0, 1)]),
    whole=head,
    axis=equation.split(",")[1].index("D"),
  )
  return tuple(jnp.pad(x[:, :-1], [(0, 0), (1, 0)]) for x in out)


def logits(config: ModelConfig, params: Params, hidden: jax.Array) -> jax.Array:
  """f32[... V] of hidden states [... D] as `forward` and `extend` return them."""
  x = hidden.reshape(1, -1, hidden.shape[-1])
  y = _text(config, params).logits(x)
  return y.reshape(*hidden.shape[:-1], y.shape[-1])


# ---- Cache ---------------------------------------------------------------------------


def init_cache(config: ModelConfig, batch: int, max_len: int) -> Cache:
  """An empty cache for `batch` rows of at most `max_len` tokens."""
  t = config.text
  shape = (t.depth, batch, t.kv_heads, max_len, t.head_dim)
  return Cache(
    k=jnp.zeros(shape, config.dtype),
    v=jnp.zeros(shape, config.dtype),
    length=jnp.zeros((batch,), jnp.int32),
  )


def extend(
  config: ModelConfig,
  params: Params,
  cache: Cache,
  tokens: Int[Array, "R T"],
  position: Int[Array, "R T 3"],
  count: Int[Array, " R"],
  vision_index: Int[Array, "R T"],
  features: Float[Array, "R M D"] | None = None,
  rows: Int[Array, " R"] | None = None,
  *,
  prompts: Prompts | None = None,
  view: int | None = None,
) -> tuple[Float[Array, "R T D"], Cache]:
  """Appends tokens to the cache: prefill, a later turn, or (T = 1) a decoding step.

  Row r writes its first `count[r]` tokens at the end of cache row `rows[r]` and attends
  to all that lies there.  Tokens beyond the count change nothing, and what is returned
  for them means nothing; a row with count 0 is left as it was.  Tokens beyond the end
  of the cache are lost: the caller keeps length + count <= S.

  Args:
    features: what vision_index points to, row-local; None = text only.
    rows: distinct rows of the cache; None = the first R.  An index >= B is padding and
      is dropped.
    prompts: what the rows of the cache go on from; `view` holds for both.
    view: attend to the first `view` slots only (static; length + count must fit in it);
      a decoding step reads as far as its longest row anyway.
  """
  x = _embed(config, params, tokens, vision_index, features)
  view = cache.k.shape[3] if view is None else view
  return _text(config, params).extend(x, position, count, cache, rows, prompts, view)


def _embed(config, params, tokens, vision_index, features) -> jax.Array:
  """Token embeddings, with vision features where vision_index points to one."""
  x = params["text"]["embed"]["w"].astype(config.dtype)[tokens]
  if features is None or features.shape[1] == 0:
    return x
  index = jnp.maximum(vision_index, 0)[..., None]
  seen = jnp.take_along_axis(features.astype(x.dtype), index, axis=1)
  return jnp.where(vision_index[..., None] < 0, x, seen)
