"""AdamW with a schedule, clipping and freezing by parameter path.

What it is not: a train step; `apply` is the last three lines of one.  Parameters are
known by their path, "text/blocks/q/w"; a pattern of `freeze` is a regular expression
searched in it.  `split` parts the trained from the frozen ones; gradients, moments and
all that follows exist for the trained ones only.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import optax
from absl import logging
from annotated_types import Ge, Lt
from jax.sharding import NamedSharding

from pixel_jax import fields, parallel
from pixel_jax.fields import (
  NonNegativeFloat,
  NonNegativeInt,
  Number,
  PositiveFloat,
  PositiveInt,
  Share,
)

Schedule = Callable[[Any], jax.Array]
Decay = Annotated[Number, Ge(0), Lt(1)]


@fields.checked
def make(
  params: dict,
  *,
  lr: PositiveFloat,
  total_steps: PositiveInt,
  schedule: Literal["cosine", "constant"] = "cosine",
  warmup_steps: NonNegativeInt = 0,
  final_lr_ratio: Share = 0.0,
  b1: Decay = 0.9,
  b2: Decay = 0.999,
  eps: NonNegativeFloat = 1e-8,
  weight_decay: NonNegativeFloat = 0.0,
  clip_norm: NonNegativeFloat = 1.0,
  freeze: Sequence[str] = (),
  moment_dtype: Literal["float32", "bfloat16"] = "float32",
) -> tuple[optax.GradientTransformation, Schedule]:
  """The optimizer and its schedule.

  Args:
    params: all parameters, abstract or real; only their paths are read.
    total_steps: optimizer steps, after which the rate stays at lr * final_lr_ratio.
    clip_norm: largest global norm of the trained gradients; 0 does not clip.
    freeze: regular expressions of paths that are not trained; checked here, used by
      `split`.  The optimizer itself wants trained parameters only.
    moment_dtype: of Adam's first moment; bfloat16 fits the 7B on one H200.
  """
  rate = make_schedule(
    lr,
    schedule,
    warmup_steps=warmup_steps,
    total_steps=total_steps,
    final=final_lr_ratio,
  )
  paths = list_paths(params)
  for pattern in freeze:
    if not any(re.search(pattern, p) for p in paths):
      roots = sorted({"/".join(p.split("/")[:2]) for p in paths})
      raise ValueError(
        f"optim.freeze pattern {pattern!r} matches no parameter; paths begin with "
        f"{', '.join(roots)}. Correct or remove it."
      )
  if all(is_frozen(p, freeze) for p in paths):
    raise ValueError(f"optim.freeze {list(freeze)} freezes every parameter; train some")
  steps = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
  steps += [
    optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=jnp.dtype(moment_dtype)),
    optax.add_decayed_weights(weight_decay, mask=_by_path(_is_decayed)),
    optax.scale_by_learning_rate(rate),
  ]
  return optax.chain(*steps), rate


def begin(
  tx: optax.GradientTransformation,
  params: dict,
  freeze: Sequence[str],
  mesh: jax.sharding.Mesh,
) -> dict:
  """The state of a run before its first step: all that an update reads and changes.

  It is {"params", "opt", "step"}; `params` are real, laid out on `mesh`.
  """
  step = jax.device_put(jnp.int32(0), parallel.replicated(mesh))
  return {"params": params, "opt": init(tx, split(params, freeze)[0]), "step": step}


def memory(
  tx: optax.GradientTransformation, params: dict, freeze: Sequence[str]
) -> int:
  """Bytes of weights, gradients and moments on one device.

  Args:
    params: abstract, with shardings.
  """
  trained = split(params, freeze)[0]
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves((params, trained, abstract(tx, trained)))
  )


def make_schedule(
  lr: float, kind: str, *, warmup_steps: int, total_steps: int, final: float
) -> Schedule:
  """Step (0-based) -> rate: lr/warmup, 2 lr/warmup, ... lr, then `kind`.

  The first step already moves (optax's warm-up begins at 0 and wastes it).
  """
  if not 0 <= warmup_steps <= total_steps:
    raise ValueError(
      f"optim.warmup_steps = {warmup_steps} is not within 0 .. {total_steps} steps"
    )

  def rate(step):
    step = jnp.asarray(step, jnp.float32)
    warm = (step + 1) / max(warmup_steps, 1)
    if kind == "constant":
      after = jnp.ones_like(step)
    else:
      done = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
      bend = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(done, 0, 1)))
      after = final + (1 - final) * bend
    return lr * jnp.where(step < warmup_steps, warm, after)

  return rate


def init(tx: optax.GradientTransformation, params: dict) -> Any:
  """The first optimizer state, every moment laid out as its parameter.

  A bare jit(tx.init) would replicate the moments: zeros depend on no input.
  """
  return jax.jit(tx.init, out_shardings=state_shardings(tx, params))(params)


def abstract(tx: optax.GradientTransformation, params: dict) -> Any:
  """The state of `init` for abstract params with shardings: nothing is allocated."""
  return parallel.place(jax.eval_shape(tx.init, params), state_shardings(tx, params))


def state_shardings(tx: optax.GradientTransformation, params: dict) -> Any:
  """Layout of `tx`'s state; `params` is real, or abstract with shardings."""
  layout = {
    _join(keys): x.sharding
    for keys, x in jax.tree_util.tree_flatten_with_path(params)[0]
  }
  some = next(iter(layout.values()))
  rest = some
  if isinstance(some, NamedSharding):
    rest = parallel.replicated(some.mesh)

  def place(keys, x):
    # A moment's key path ends with the path of its parameter.
    names = [str(k.key) for k in keys if isinstance(k, jax.tree_util.DictKey)]
    tails = ("/".join(names[i:]) for i in range(len(names)))
    return next((layout[t] for t in tails if t in layout and x.ndim), rest)

  return jax.tree_util.tree_map_with_path(place, jax.eval_shape(tx.init, params))


def apply(
  tx: optax.GradientTransformation,
  grads: dict,
  params: dict,
  state: Any,
  loss: jax.Array | float = 0.0,
) -> tuple[dict, Any, dict[str, jax.Array]]:
  """One step -> params, optimizer state, metrics.

  Where `loss` or a gradient is not finite, params and state stay as they were.  An update
  of finite gradients and moments is finite, so the norm is all that has to be looked at.

  Returns metrics: optim/grad_norm, the global norm before clipping, and optim/nonfinite,
  1 where nothing was changed.
  """
  norm = optax.global_norm(grads)
  fine = jnp.isfinite(norm) & jnp.isfinite(loss)
  updates, new = tx.update(grads, state, params)

  def keep(changed, unchanged):
    return jax.tree.map(lambda a, b: jnp.where(fine, a, b), changed, unchanged)

  told = {"optim/grad_norm": norm, "optim/nonfinite": 1.0 - fine}
  return keep(optax.apply_updates(params, updates), params), keep(new, state), told


def pass_over(state: dict, updates: int) -> dict:
  """The state of a run whose schedule goes on by so many updates that are not made."""
  if not updates:
    return state

  def later(x):
    is_schedule = isinstance(x, optax.ScaleByScheduleState)
    return x._replace(count=x.count + updates) if is_schedule else x

  opt = jax.tree.map(
    later, state["opt"], is_leaf=lambda x: isinstance(x, optax.ScaleByScheduleState)
  )
  return {**state, "opt": opt, "step": state["step"] + updates}


class NonFiniteError(RuntimeError):
  """Several updates in a row whose loss or gradient was not finite."""


class Guard:
  """Counts the updates in a row that were left out because they were not finite.

  Args:
    max_nonfinite: of them in a row; the last of these ends the run.
  """

  @fields.checked
  def __init__(self, max_nonfinite: PositiveInt):
    self._most, self._row = max_nonfinite, 0

  def check(self, step: int, nonfinite: float, names: Sequence[str]) -> None:
    """Names the examples of an update that was left out; NonFiniteError after `most`."""
    self._row = self._row + 1 if nonfinite else 0
    if not nonfinite:
      return
    shown = ", ".join(list(names)[:8]) + (", ..." if len(names) > 8 else "")
    told = (
      f"step {step}: loss or gradient is not finite, nothing was changed; of {shown}"
    )
    if self._row < self._most:
      logging.warning("%s", told)
      return
    raise NonFiniteError(
      f"{told}.  That is optim.max_nonfinite={self._most} updates in a row, so the run "
      "ends; its last checkpoint is sound.  Look at these examples, or lower optim.lr"
    )


def accumulate(function: Callable[[Any], Any], rows: Any, parts: int) -> Any:
  """Sum of function(part) over `parts` parts of the rows, one after the other.

  Part i takes rows i, i + parts, ...: where rows lie over devices in contiguous blocks,
  each device gives rows of its own and nothing moves.

  Args:
    rows: a pytree whose leaves have B rows first; B is a multiple of `parts`.
  """
  if parts == 1:
    return function(rows)

  def stride(x):  # B .. -> parts B/parts ..
    return jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)

  def add(total, part):
    return jax.tree.map(jnp.add, total, function(part)), None

  rows = jax.tree.map(stride, rows)
  like = jax.eval_shape(function, jax.tree.map(lambda x: x[0], rows))
  zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
  return jax.lax.scan(add, zero, rows)[0]


# ---- Frozen and trained --------------------------------------------------------------


def split(params: dict, freeze: Sequence[str]) -> tuple[dict, dict]:
  """(trained, frozen): nested dicts, each with its own leaves only; see `merge`."""
  return _pick(params, lambda p: not is_frozen(p, freeze)), _pick(
    params, lambda p: is_frozen(p, freeze)
  )


def merge(trained: dict, frozen: dict) -> dict:
  """The parameters that `split` parted."""
  both = trained.keys() & frozen.keys()
  return trained | frozen | {k: merge(trained[k], frozen[k]) for k in both}


def _pick(tree: dict, wanted: Callable[[str], bool], prefix: str = "") -> dict:
  out = {}
  for key, x in tree.items():
    path = prefix + key
    if isinstance(x, dict):
      if inner := _pick(x, wanted, path + "/"):
        out[key] = inner
    elif wanted(path):
      out[key] = x
  return out


def is_frozen(path: str, freeze: Sequence[str]) -> bool:
  return any(re.search(pattern, path) for pattern in freeze)


def list_paths(params: dict) -> list[str]:
  return [_join(k) for k, _ in jax.tree_util.tree_flatten_with_path(params)[0]]


def _is_decayed(path: str) -> bool:
  return path.split("/")[-1] in ("w", "lora_a", "lora_b")  # not scales, not biases


def _by_path(function: Callable[[str], Any]) -> Callable[[dict], dict]:
  """A tree of function(path); a callable, because optax hides masked leaves."""
  return lambda tree: jax.tree_util.tree_map_with_path(
    lambda k, _: function(_join(k)), tree
  )


def _join(keys) -> str:
  return "/".join(str(k.key) for k in keys)
