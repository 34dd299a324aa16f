"""The one table of parameters: everything that is said about one is said here, once.

Its Hugging Face name, its path here, how the one array becomes the other, and the
logical axes that a sharding rule may name.  Import and export (`hf.py`), sharding and
freezing by path derive from it.  Adapters (`lora.py`) have rows beside those of
their weights.  Not here: files, arrays on devices, how an axis lies on a mesh
(`parallel.py`).

Parameters are a nested dict {"text": ..., "vision": ...}; what a stack of blocks owns
has a leading axis L, one entry a layer.  The names are those of the hub
(`model.layers.0...`, `visual...`).
"""

import functools
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from pixel_jax import fields
from pixel_jax.model.config import ModelConfig

PyTree = Any


class Row(NamedTuple):
  """One parameter.

  name: of Hugging Face; {layer} where every block has one.
  path: ours, without the name of the layer.
  equation: their axes -> ours, for one layer; "(N H)" is one axis made of two.  Read
    from right to left it is the inverse.
  axes: a logical name for each of our axes, L included; None = never sharded.
  """

  name: str
  path: str
  equation: str
  axes: tuple[str | None, ...]

  @property
  def stacked(self) -> bool:
    return "{layer}" in self.name

  @property
  def tower(self) -> str:
    return self.path.split("/")[0]


def _text(name: str, path: str, equation: str, *axes: str | None) -> Row:
  axes = ("layer", *axes)
  return Row(f"model.layers.{{layer}}.{name}", f"text/blocks/{path}", equation, axes)


def _vision(name: str, path: str, equation: str, *axes: str | None) -> Row:
  axes = ("layer", *axes)
  return Row(f"visual.blocks.{{layer}}.{name}", f"vision/blocks/{path}", equation, axes)


# Norms and the biases of what writes to the residual stream stay whole: together they
# are under 0.1 % of the bytes, and sharding them would cost a collective each.
# fmt: off
TABLE = (
  Row("model.embed_tokens.weight", "text/embed/w", "V D -> V D", ("vocab", "embed")),
  _text("input_layernorm.weight", "attn_norm/scale", "D -> D", None),
  _text("self_attn.q_proj.weight", "q/w", "(N H) D -> D N H",
        "embed", "heads", "head_dim"),
  _text("self_attn.q_proj.bias", "q/b", "(N H) -> N H", "heads", "head_dim"),
  _text("self_attn.k_proj.weight", "k/w", "(K H) D -> D K H",
        "embed", "kv_heads", "head_dim"),
  _text("self_attn.k_proj.bias", "k/b", "(K H) -> K H", "kv_heads", "head_dim"),
  _text("self_attn.v_proj.weight", "v/w", "(K H) D -> D K H",
        "embed", "kv_heads", "head_dim"),
  _text("self_attn.v_proj.bias", "v/b", "(K H) -> K H", "kv_heads", "head_dim"),
  _text("self_attn.o_proj.weight", "o/w", "D (N H) -> N H D",
        "heads", "head_dim", "embed"),
  _text("post_attention_layernorm.weight", "mlp_norm/scale", "D -> D", None),
  _text("mlp.gate_proj.weight", "gate/w", "F D -> D F", "embed", "mlp"),
  _text("mlp.up_proj.weight", "up/w", "F D -> D F", "embed", "mlp"),
  _text("mlp.down_proj.weight", "down/w", "D F -> F D", "mlp", "embed"),
  Row("model.norm.weight", "text/norm/scale", "D -> D", (None,)),
  Row("lm_head.weight", "text/head/w", "V D -> D V", ("embed", "vocab")),  # untied only
  Row("visual.patch_embed.proj.weight", "vision/patch/w", "D c t h w -> (c t h w) D",
      (None, "vision_embed")),
  _vision("norm1.weight", "attn_norm/scale", "D -> D", None),
  _vision("attn.qkv.weight", "qkv/w", "(3 N H) D -> D 3 N H",
          "vision_embed", None, "vision_heads", "head_dim"),
  _vision("attn.qkv.bias", "qkv/b", "(3 N H) -> 3 N H",
          None, "vision_heads", "head_dim"),
  _vision("attn.proj.weight", "o/w", "D (N H) -> N H D",
          "vision_heads", "head_dim", "vision_embed"),
  _vision("attn.proj.bias", "o/b", "D -> D", None),
  _vision("norm2.weight", "mlp_norm/scale", "D -> D", None),
  _vision("mlp.gate_proj.weight", "gate/w", "F D -> D F", "vision_embed", "vision_mlp"),
  _vision("mlp.gate_proj.bias", "gate/b", "F -> F", "vision_mlp"),
  _vision("mlp.up_proj.weight", "up/w", "F D -> D F", "vision_embed", "vision_mlp"),
  _vision("mlp.up_proj.bias", "up/b", "F -> F", "vision_mlp"),
  _vision("mlp.down_proj.weight", "down/w", "D F -> F D", "vision_mlp", "vision_embed"),
  _vision("mlp.down_proj.bias", "down/b", "D -> D", None),
  Row("visual.merger.ln_q.weight", "vision/merger/norm/scale", "D -> D", (None,)),
  # E = 4 D: the four patches of a merged one.  O: the width of the text model.
  Row("visual.merger.mlp.0.weight", "vision/merger/up/w", "U E -> E U",
      ("vision_embed", "vision_mlp")),
  Row("visual.merger.mlp.0.bias", "vision/merger/up/b", "U -> U", ("vision_mlp",)),
  Row("visual.merger.mlp.2.weight", "vision/merger/down/w", "O U -> U O",
      ("vision_mlp", "vision_embed")),
  Row("visual.merger.mlp.2.bias", "vision/merger/down/b", "O -> O", (None,)),
)
# fmt: on


# ---- What derives from the table alone -----------------------------------------------


def rows(config: ModelConfig) -> tuple[Row, ...]:
  """The rows of the table that this model has; with tied embeddings there is no head."""
  return tuple(r for r in TABLE if not (config.text.tied and r.path == "text/head/w"))


def adapted(config: ModelConfig) -> tuple[str, ...]:
  """Paths of the linear layers that have an adapter: "text/blocks/q".

  Of those that can, all but embedding, head and the convolution of patches, the ones in
  which a pattern of `config.lora.targets` is found.
  """
  if config.lora is None:
    return ()
  can = [
    r.path.removesuffix("/w")
    for r in rows(config)
    if r.path.endswith("/w") and ("/blocks/" in r.path or "/merger/" in r.path)
  ]
  for pattern in config.lora.targets:
    if not any(re.search(pattern, path) for path in can):
      raise ValueError(
        f"target {pattern!r} matches no linear layer; there are {', '.join(can)}."
      )
  found = (p for p in can if any(re.search(t, p) for t in config.lora.targets))
  return tuple(found)


def adapters(config: ModelConfig) -> tuple[Row, ...]:
  """Two rows, lora_a and lora_b, for each weight that has an adapter.

  Names are PEFT's under the names of the hub.  With the weight "(N H) D -> D N H", A is
  "r D -> D r" and B "(N H) r -> r N H".
  """
  chosen = {f"{path}/w" for path in adapted(config)}
  found = []
  for row in rows(config):
    if row.path not in chosen:
      continue
    (outer, inner), ours = parse(row.equation)
    axis = dict(zip((a for (a,) in ours), row.axes[row.stacked :], strict=True))
    lead = row.axes[: row.stacked]
    name, path = row.name.removesuffix("weight"), row.path.removesuffix("w")
    found += [
      Row(
        f"{name}lora_A.weight",
        f"{path}lora_a",
        f"r {_spell(inner)} -> {' '.join(inner)} r",
        (*lead, *(axis[a] for a in inner), None),
      ),
      Row(
        f"{name}lora_B.weight",
        f"{path}lora_b",
        f"{_spell(outer)} r -> r {' '.join(outer)}",
        (*lead, None, *(axis[a] for a in outer)),
      ),
    ]
  return tuple(found)


def paths(config: ModelConfig) -> list[str]:
  """Every parameter path, "text/blocks/q/w", in the order of the table."""
  return [r.path for r in every(config)]


def logical_axes(config: ModelConfig) -> PyTree:
  """A tree like the parameters; a leaf is the tuple of logical axis names."""
  return nest({r.path: r.axes for r in every(config)})


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """path -> shape."""
  return {r.path: shape_of(config, r) for r in every(config)}


def names(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Hugging Face name -> shape, in the order in which export writes them."""
  return {name: hf_shape(config, r) for name, r, _ in tensors(config, rows(config))}


def every(config: ModelConfig) -> tuple[Row, ...]:
  """The rows of weights, then those of adapters."""
  return rows(config) + adapters(config)


# ---- Reading the table ---------------------------------------------------------------


def tensors(config: ModelConfig, rows: Iterable[Row]) -> Iterator[tuple[str, Row, int]]:
  """(their name, row, layer) of every tensor of `rows`, one block after the other."""
  for _, group in itertools.groupby(rows, key=lambda r: (r.stacked, r.tower)):
    group = list(group)
    for layer in range(depth(config, group[0])):
      yield from ((r.name.format(layer=layer), r, layer) for r in group)


def depth(config: ModelConfig, row: Row) -> int:
  if not row.stacked:
    return 1
  return config.text.depth if row.tower == "text" else config.vision.depth


def sizes(config: ModelConfig, row: Row) -> dict[str, int]:
  """Letter of an equation -> size."""
  v, t = config.vision, config.text
  rank = {"r": config.lora.rank} if config.lora else {}
  # fmt: off
  if row.tower == "text":
    return {**rank, "V": t.vocab, "D": t.width, "N": t.heads, "K": t.kv_heads,
            "H": t.head_dim, "F": t.mlp}
  merged = v.width * v.merge**2
  return {**rank, "D": v.width, "N": v.heads, "H": v.head_dim, "F": v.mlp, "3": 3,
          "c": 3, "t": v.temporal, "h": v.patch, "w": v.patch,
          "E": merged, "U": merged, "O": v.out_width}
  # fmt: on


def shape_of(config: ModelConfig, row: Row) -> tuple[int, ...]:
  size = sizes(config, row)
  _, ours = parse(row.equation)
  lead = (depth(config, row),) if row.stacked else ()
  return lead + tuple(math.prod(size[a] for a in group) for group in ours)


def hf_shape(config: ModelConfig, row: Row) -> tuple[int, ...]:
  size = sizes(config, row)
  theirs, _ = parse(row.equation)
  return tuple(math.prod(size[a] for a in group) for group in theirs)


@functools.cache
def parse(equation: str) -> tuple[tuple[tuple[str, ...], ...], ...]:
  """ "(N H) D -> D N H" -> ((("N", "H"), ("D",)), (("D",), ("N",), ("H",)))."""
  sides = []
  for side in equation.split("->"):
    groups: list[tuple[str, ...]] = []
    for piece in side.replace(")", ")\n").replace("(", "\n(").split("\n"):
      if piece.startswith("("):
        groups.append(tuple(piece.strip("()").split()))
      else:
        groups += [(letter,) for letter in piece.split()]
    sides.append(tuple(groups))
  return tuple(sides)


def _spell(group: tuple[str, ...]) -> str:
  return group[0] if len(group) == 1 else f"({' '.join(group)})"


def permute(
  x: np.ndarray,
  source: tuple[tuple[str, ...], ...],
  target: tuple[tuple[str, ...], ...],
) -> np.ndarray:
  """x with an axis for each letter of `source` -> order and groups of `target`."""
  letters = [a for group in source for a in group]
  size = dict(zip(letters, x.shape, strict=True))
  x = x.transpose([letters.index(a) for group in target for a in group])
  return x.reshape([math.prod(size[a] for a in group) for group in target])


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
  tree: dict[str, Any] = {}
  for path, leaf in flat.items():
    *parents, last = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree


def unnest(tree: Mapping[str, Any]) -> dict[str, Any]:
  return fields.flat(tree, "/")
