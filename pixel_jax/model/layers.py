"""Linear, RMSNorm, the gated MLP and `run`, shared by vision tower and text model.

Every weight of a stack of blocks has a leading axis L; `run` hands each block its
slice, so `__call__` sees one layer.  Not here: attention, rotary, anything that knows of
pixels or tokens.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pixel_jax.model import lora

PyTree = Any


class Linear(nnx.Module):
  """`einsum(equation, x, w) + b`: the one place where a weight meets an activation.

  Args:
    equation: such as "BTD,DNH->BNTH".  The letters of w that the result lacks are
      contracted; they give the fan-in, and those it keeps are the axes of the bias.
    sizes: of the letters of w.
    layers: length of the leading axis L; None = not part of a stack.
  """

  lora_a = lora_b = None  # see `adapt`

  def __init__(
    self,
    equation: str,
    sizes: Sequence[int],
    *,
    bias: bool = False,
    layers: int | None = None,
    rngs: nnx.Rngs,
  ):
    inputs, out = equation.split("->")
    left, right = inputs.split(",")
    self.equation = equation
    kept = [c in out for c in right]
    lead = () if layers is None else (layers,)
    fan_in = 1
    for size, keep in zip(sizes, kept, strict=True):
      fan_in *= 1 if keep else size
    init = jax.random.normal(rngs.params(), (*lead, *sizes)) * fan_in**-0.5
    self.w = nnx.Param(init)
    shape = [s for s, keep in zip(sizes, kept) if keep]
    self.b = nnx.Param(jnp.zeros((*lead, *shape))) if bias else None
    # Rows of x times columns of w, then the order asked for: told both at once XLA
    # transposes w instead, on a CPU with every token that is decoded.
    product = [c for c in left + right if c in out]
    self.product = f"{inputs}->{''.join(product)}"
    self.order = tuple(product.index(c) for c in out)

  def adapt(self, config: lora.Config, rngs: nnx.Rngs) -> None:
    """Puts A and B beside w; they begin as PEFT's, whose B = 0 changes nothing."""
    inputs, out = self.equation.split("->")
    left, right = inputs.split(",")
    size = dict(zip(right, self.w.shape[-len(right) :]))
    inner = "".join(c for c in right if c not in out)
    outer = "".join(c for c in right if c in out)
    rows = "".join(c for c in left if c not in inner)
    self.lora_equations = (
      f"{left},{inner}r->{rows}r", f"{rows}r,r{outer}->{rows}{outer}"
    )  # fmt: skip
    self.lora_scale = config.scale
    lead = self.w.shape[: -len(right)]
    shape = [size[c] for c in inner]
    # kaiming_uniform_(a=sqrt(5)) of torch: +- 1 / sqrt(fan in).
    bound = math.prod(shape) ** -0.5
    a = jax.random.uniform(
      rngs.params(), (*lead, *shape, config.rank), minval=-bound, maxval=bound
    )
    self.lora_a = nnx.Param(a)
    shape = [size[c] for c in outer]
    self.lora_b = nnx.Param(jnp.zeros((*lead, config.rank, *shape)))

  def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
    y = product(self.product, x, self.w[...])
    if self.lora_a is not None:
      down, up = self.lora_equations
      low = jnp.einsum(down, x, self.lora_a[...]) * self.lora_scale
      y = y + jnp.einsum(up, low, self.lora_b[...])
    if self.b is not None:
      y = y + self.b[...]
    return y.transpose(self.order)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
  """`einsum(equation, x, w)`; its gradient of w transposes the smaller factor.

  That gradient is x times that of the result, of which one must be transposed.  JAX takes
  the latter, and XLA's CPU backend fuses the transpose with what has made it: gradients
  of a SwiGLU were computed column by column, a quarter of a whole training step.
  """
  return jnp.einsum(equation, x, w)


def _product_forward(equation, x, w):
  # What has no gradient, as a weight beside adapters, keeps nothing for it.
  kept = x.value if w.perturbed else None, w.value if x.perturbed else None
  return jnp.einsum(equation, x.value, w.value), kept


def _product_backward(equation, kept, grad):
  x, w = kept
  inputs, out = equation.split("->")
  left, right = inputs.split(",")
  d_x = d_w = None
  if isinstance(grad, jax.custom_derivatives.SymbolicZero):
    return d_x, d_w
  if w is not None:
    d_x = jnp.einsum(f"{out},{right}->{left}", grad, w)
  if x is not None:
    (a, first), (b, second) = sorted(
      ((left, x), (out, grad)), key=lambda factor: factor[1].size
    )
    d_w = jnp.einsum(f"{a},{b}->{right}", first, second)
  return d_x, d_w


product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)


class RMSNorm(nnx.Module):
  """Root mean square norm, computed in f32 whatever comes in."""

  def __init__(self, width: int, eps: float, *, layers: int | None = None):
    self.scale = nnx.Param(jnp.ones((width,) if layers is None else (layers, width)))
    self.eps = eps

  def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
    return (y * self.scale[...]).astype(x.dtype)


def gated_mlp(block: nnx.Module, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
  """SwiGLU of a block's own gate, up and down."""
  return block.down(jax.nn.silu(block.gate(x)) * block.up(x))


# What the backward pass of a block finds, rather than computes again; more memory and
# less work from the last to the first.
REMAT: dict[str, Callable[..., Any] | None] = {
  "none": jax.checkpoint_policies.everything_saveable,
  # Results of matmuls with weights, not of those between activations (attention).
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  # What attention reads and gives: neither projections nor the sum over values again.
  "qkvo": jax.checkpoint_policies.save_only_these_names("q", "k", "v", "heads"),
  "full": None,  # nothing but what enters the block
}


def checkpoint(step: Callable[..., Any], remat: str, *, scan: bool) -> Callable:
  """`step`, one block, that keeps what the policy `remat` says.

  Args:
    remat: "none", "dots", "qkvo" or "full", see `REMAT`; the names that "qkvo" saves
      are given in the blocks and in attention.py.
    scan: the step is the body of a scan, which separates forward and backward by
      itself: common subexpressions may be eliminated.
  """
  if remat not in REMAT:
    raise ValueError(f"remat is {remat!r}; known: {', '.join(REMAT)}.")
  if remat == "none":
    return step
  return jax.checkpoint(step, prevent_cse=not scan, policy=REMAT[remat])


def run(
  blocks: nnx.Module,
  body: Callable[[nnx.Module, PyTree, Any], PyTree],
  carry: PyTree,
  *,
  scan: bool,
  remat: str,
) -> PyTree:
  """Sends `carry` through a stack of blocks: carry = body(block, carry, index).

  Args:
    blocks: a module whose leaves have the leading axis L.
    scan: one compiled block, looped over; else L copies of it.
    remat: what is kept for the backward pass, a name of `checkpoint`.
  """
  graphdef, state = nnx.split(blocks)
  depth = jax.tree.leaves(state)[0].shape[0]

  def layer(index, carry, state):
    return body(nnx.merge(graphdef, state), carry, index)

  if scan:
    step = checkpoint(
      lambda carry, xs: (layer(xs[1], carry, xs[0]), None), remat, scan=True
    )
    return jax.lax.scan(step, carry, (state, jnp.arange(depth)))[0]
  # Cut at once: the gradient is one concatenation, where that of w[i] is a whole stack
  # of zeros for each layer, all to be added.
  leaves, treedef = jax.tree.flatten(state)
  cut = [jax.lax.split(w, [1] * depth) for w in leaves]
  for i in range(depth):  # the index stays a Python number
    step = checkpoint(functools.partial(layer, i), remat, scan=False)
    carry = step(carry, jax.tree.unflatten(treedef, [w[i][0] for w in cut]))
  return carry
