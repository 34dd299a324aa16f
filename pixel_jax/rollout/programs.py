"""The compiled programs of one engine, and how many there may be.

Each is a function of `decode.py` with static shapes, for parameters that lie on one
device or on a mesh with "tensor".  What lives from call to call (cache, standing of the
slots, bank) is donated and comes back in the same place.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pixel_jax import parallel
from pixel_jax.batch import Cache
from pixel_jax.model import qwen2_5_vl
from pixel_jax.model.config import ModelConfig
from pixel_jax.rollout import decode


class Programs:
  """The programs for parameters with this sharding.

  Args:
    slots, max_len: of the cache, after the prompts.
    prompts, max_prompt: of the cache of prompts.
    bank: features of pictures that are kept.
    piece: tokens that "move" copies at a time.
    stops: ids that end a turn.
  """

  def __init__(
    self,
    config: ModelConfig,
    sharding: jax.sharding.Sharding,
    *,
    slots: int,
    max_len: int,
    prompts: int,
    max_prompt: int,
    bank: int,
    piece: int,
    stops: tuple[int, ...],
  ):
    mesh = getattr(sharding, "mesh", None)
    self.where = mesh or sharding
    cut = whole = sharding
    if mesh is not None:
      whole = parallel.replicated(mesh)
      names = (None, None, "kv_heads", None, None)
      t = config.text
      shape = (t.depth, slots, t.kv_heads, max_len, t.head_dim)
      cut = jax.sharding.NamedSharding(mesh, parallel.spec(mesh, names, shape, "cache"))
    layout = Cache(k=cut, v=cut, length=whole)

    def open_():
      zero = jnp.zeros(slots, jnp.int32)
      key = jnp.zeros((slots, 2), jnp.uint32)
      one = jnp.ones(slots, jnp.float32)
      standing = decode.Slots(
        length=zero, last=zero, position=zero, budget=zero, key=key,
        sampling=decode.Sampling(one, one, zero, zero > 0),
      )  # fmt: skip
      features = jnp.zeros((bank, config.text.width), config.dtype)
      shared = qwen2_5_vl.init_cache(config, prompts, max_prompt)
      return qwen2_5_vl.init_cache(config, slots, max_len), shared, standing, features

    def bind(f, *args, **kwargs):
      # jit takes the name of a trace from its function; a partial has none.  A partial
      # even of nothing: engines that jit one function share, and count, its programs.
      return functools.update_wrapper(functools.partial(f, *args, **kwargs), f)

    self.open = jax.jit(open_, out_shardings=(layout, layout, whole, whole))
    self.cast = jax.jit(bind(qwen2_5_vl.cast, config))
    self.encode = jax.jit(
      bind(decode.encode, config), donate_argnums=1, out_shardings=whole
    )
    self.extend = jax.jit(
      bind(decode.extend, config),
      static_argnames="view",
      donate_argnums=1,
      out_shardings=layout,
    )
    self.move = jax.jit(
      bind(decode.move, size=min(piece, max_len)),
      donate_argnums=0,
      out_shardings=layout,
    )
    self.place = jax.jit(bind(decode.place), donate_argnums=0, out_shardings=whole)
    self.decode = jax.jit(
      bind(decode.decode, config, stops=stops),
      static_argnames="lanes",
      donate_argnums=(1, 3),
      out_shardings=(layout, whole, whole, whole, whole),
    )

  @property
  def all(self) -> tuple[Callable, ...]:
    return (
      self.open, self.cast, self.encode, self.extend, self.move, self.place, self.decode
    )  # fmt: skip

  @property
  def compiles(self) -> int:
    """Programs compiled so far."""
    return sum(f._cache_size() for f in self.all)
