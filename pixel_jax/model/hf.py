"""Hugging Face checkpoints in and out, through the table of `table.py`.

Hub names (`model.layers.0...`, `visual...`) and those that transformers 5 uses in
memory (`model.language_model...`, `model.visual...`) are read; hub names are written.
A host never holds more than a tensor (import) or a file (export).  Not here: torch, the
hub itself, what a forward pass computes.
"""

import functools
import json
import math
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from pixel_jax.model import config as model_config
from pixel_jax.model import lora, table
from pixel_jax.model.config import ModelConfig
from pixel_jax.model.table import TABLE as TABLE
from pixel_jax.model.table import logical_axes as logical_axes
from pixel_jax.model.table import paths as paths

PyTree = Any
# A tensor of a file: its shape, and a function that gives something to slice.
Tensor = tuple[tuple[int, ...], Callable[[], Any]]
# Beside the weights, what a tokenizer or a processor of transformers reads.
COMPANIONS = (
  "tokenizer.json",
  "tokenizer_config.json",
  "vocab.json",
  "merges.txt",
  "added_tokens.json",
  "special_tokens_map.json",
  "chat_template.json",
  "chat_template.jinja",
  "preprocessor_config.json",
  "video_preprocessor_config.json",
  "processor_config.json",
  "generation_config.json",
  "pixel_jax.json",  # ours: run/policies.py
)


# ---- In ------------------------------------------------------------------------------


def is_checkpoint(directory: Any) -> bool:
  """Whether this is a local folder of config.json and *.safetensors."""
  if not isinstance(directory, pathlib.Path):  # gs://
    return False
  return (directory / "config.json").is_file() and any(directory.glob("*.safetensors"))


def copy_companions(source: pathlib.Path, out: pathlib.Path) -> int:
  """Copies the files of tokenizer and processor; how many there are."""
  files = [source / name for name in COMPANIONS if (source / name).is_file()]
  out.mkdir(parents=True, exist_ok=True)
  for file in files:
    shutil.copyfile(file, out / file.name)  # not the mode: hub caches are read-only
  return len(files)


def read_config(directory: str | pathlib.Path) -> dict[str, Any]:
  """config.json as a dict; `model.config.from_hf` understands it."""
  path = pathlib.Path(directory) / "config.json"
  if not path.is_file():
    raise FileNotFoundError(
      f"{path} does not exist; give a folder that holds config.json and *.safetensors, "
      "such as a snapshot of Qwen/Qwen2.5-VL-7B-Instruct."
    )
  try:
    return json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f"{path} is no JSON ({error}); fetch it again.") from error


def import_state(
  config: ModelConfig,
  state: Mapping[str, Any],
  shardings: PyTree = None,
  dtype: str = "float32",
) -> PyTree:
  """Parameters from Hugging Face name -> array (numpy, or what slices like numpy)."""
  tensors = {name: (tuple(x.shape), _identity(x)) for name, x in state.items()}
  tensors = _check(config, tensors, "the state dict")
  return load(config, table.rows(config), tensors, shardings, dtype)


def import_checkpoint(
  directory: str | pathlib.Path,
  config: ModelConfig,
  shardings: PyTree = None,
  dtype: str = "float32",
  progress: Callable[[int, int], None] | None = None,
) -> PyTree:
  """Parameters from a folder of safetensors, one tensor at a time.

  A host holds the part of one layer's tensor that its devices need, never a whole
  stack: slices are read from the files and put into the sharded [L ...] array on the
  devices.

  Args:
    shardings: a tree like the parameters, or None = all on the first device.
    dtype: of the parameters made; float32 holds bf16 and f16 files exactly.
    progress: called with (bytes of parameters made, bytes in all).
  """
  tensors = _check(config, open_tensors(directory), str(directory))
  return load(config, table.rows(config), tensors, shardings, dtype, progress)


def open_tensors(directory: str | pathlib.Path) -> dict[str, Tensor]:
  """The tensors of a folder by name, over all its safetensors."""
  from safetensors import SafetensorError, safe_open

  directory = pathlib.Path(directory)
  index = directory / "model.safetensors.index.json"
  if index.is_file():
    shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
  else:
    shards = sorted(p.name for p in directory.glob("*.safetensors"))
  absent = [s for s in shards if not (directory / s).is_file()]
  if absent or not shards:
    what = f"lacks {_listed(absent)} of its index" if absent else "has no *.safetensors"
    raise FileNotFoundError(
      f"{directory} {what}; fetch the whole checkpoint (pytorch_model.bin files must "
      "be saved again as safetensors)."
    )
  tensors = {}
  for shard in shards:
    try:
      file = safe_open(directory / shard, framework="numpy")
    except SafetensorError as error:
      raise ValueError(
        f"{directory / shard} is not a whole safetensors file ({error}); is it a "
        "git-lfs pointer or a broken download? Fetch it again."
      ) from error
    for name in file.keys():  # noqa: SIM118 (a safetensors file is no dict)
      view = file.get_slice(name)
      if view.get_dtype() not in ("F32", "BF16", "F16"):
        raise ValueError(
          f"{directory / shard}: {name} has dtype {view.get_dtype()}; allowed: F32, "
          "BF16, F16. Import the unquantised checkpoint."
        )
      tensors[name] = (
        tuple(view.get_shape()),
        functools.partial(_slice, directory / shard, name),
      )
  return tensors


def _slice(file: pathlib.Path, name: str) -> Any:
  """A tensor of a file that is opened for it alone: what was read of a file that stays
  open counts as memory of this process, in the end a whole checkpoint."""
  from safetensors import safe_open

  return safe_open(file, framework="numpy").get_slice(name)


def load(
  config: ModelConfig,
  rows: tuple[table.Row, ...],
  tensors: Mapping[str, Tensor],
  shardings: PyTree = None,
  dtype: str = "float32",
  progress: Callable[[int, int], None] | None = None,
) -> PyTree:
  """The parameters of `rows` from their tensors, which are all there."""
  if shardings is None:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = dict.fromkeys(paths(config), device)
  else:
    placed = table.unnest(shardings)
  width = jnp.dtype(dtype).itemsize
  every = [math.prod(table.hf_shape(config, r)) * table.depth(config, r) for r in rows]
  total = width * sum(every)
  done = 0
  params = {}
  for row in rows:
    sharding, shape = placed[row.path], table.shape_of(config, row)
    if row.stacked:
      params[row.path] = _zeros(shape, dtype, sharding)()
      put, sharding, shape = _put(sharding), _of_layer(sharding), shape[1:]
    for layer in range(table.depth(config, row)):
      name = row.name.format(layer=layer)
      read = functools.partial(_read, config, row, name, tensors[name][1]())
      x = _to_device(read, shape, sharding)
      del read  # and the file behind it
      if row.stacked:
        # Waiting for the layer before keeps two of them on the host, not all.
        jax.block_until_ready(params[row.path])
        params[row.path] = put(params[row.path], x, layer)
      else:
        params[row.path] = x.astype(dtype)
      done += width * math.prod(shape)
      if progress is not None:
        progress(done, total)
  return table.nest(params)


def _check(
  config: ModelConfig, tensors: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
  want = table.names(config)
  ends = ("emb.inv_freq", "emb.original_inv_freq")
  if buffers := [n for n in tensors if n.endswith(ends)]:
    logging.warning("%s: %s are computed, not read", source, _listed(buffers))
    tensors = {n: x for n, x in tensors.items() if n not in buffers}
  names = {hub_name(n): n for n in tensors}
  # Some tied checkpoints repeat the embedding as a head; a head of its own is refused.
  if config.text.tied and names.keys() - want.keys() == {"lm_head.weight"}:
    head = names["lm_head.weight"]
    embed = names.get("model.embed_tokens.weight", head)
    if embed != head and np.array_equal(*(tensors[n][1]()[:] for n in (embed, head))):
      tensors = {n: x for n, x in tensors.items() if n != head}
  return check(
    want,
    tensors,
    f"{source} is not the Qwen2.5-VL that its config describes",
    "Names must be model.*, visual.* and lm_head.weight, or "
    "model.language_model.* and model.visual.*, with lm_head.weight exactly "
    "where tie_word_embeddings is false. Save the model again with "
    "save_pretrained (adapters merged), and check that config.json belongs to them.",
  )


def check(
  want: Mapping[str, tuple[int, ...]],
  tensors: Mapping[str, Tensor],
  what: str,
  remedy: str,
) -> dict[str, Tensor]:
  """The tensors under their hub names, or one error that names all that is wrong."""
  found: dict[str, Tensor] = {}
  twice = []
  for name, tensor in tensors.items():
    hub = hub_name(name)
    if hub in found:
      twice.append(name)
    found[hub] = tensor
  missing = [n for n in want if n not in found]
  unexpected = [n for n in found if n not in want]
  misshapen = [
    f"{n} {list(found[n][0])}, not {list(want[n])}"
    for n in want
    if n in found and found[n][0] != want[n]
  ]
  wrong = [
    f"{len(items)} {what}: {_listed(items)}"
    for what, items in (
      ("missing", missing),
      ("unexpected", unexpected),
      ("of another shape than config.json says", misshapen),
      ("there under two names", twice),
    )
    if items
  ]
  if wrong:
    raise ValueError(f"{what}.\n  " + "\n  ".join(wrong) + f"\n{remedy}")
  return found


def hub_name(name: str) -> str:
  """The name on the hub of a tensor that transformers 5 has in memory."""
  for theirs, hub in (
    ("model.language_model.", "model."),
    ("model.visual.", "visual."),
  ):
    if name.startswith(theirs):
      return hub + name[len(theirs) :]
  return name


def _read(
  config: ModelConfig, row: table.Row, name: str, tensor: Any, index: tuple[slice, ...]
) -> np.ndarray:
  """The part `index` of one layer of ours, reading as little of `tensor` as it can.

  An axis of theirs is read from its first of ours on, "(N H)" by the heads wanted; what
  lies inside ("(3 N H)" cut by heads) is cut after reading.
  """
  size = table.sizes(config, row)
  theirs, ours = table.parse(row.equation)
  part = {}
  for group, cut in zip(ours, index, strict=True):
    for letter in group:
      part[letter] = cut if len(group) == 1 else slice(None)
  where, inside, lengths = [], [], []
  for first, *rest in theirs:
    stride = math.prod(size[a] for a in rest)
    start, stop, _ = part[first].indices(size[first])
    where.append(slice(start * stride, stop * stride))
    lengths += [stop - start, *(size[a] for a in rest)]
    inside += [slice(None), *(part[a] for a in rest)]
  x = np.asarray(tensor[tuple(where)])
  if not _is_finite(x):
    raise ValueError(
      f"{name} holds numbers that are not finite; its file is damaged, or its training "
      "diverged.  Fetch it again, or take another checkpoint"
    )
  x = x.reshape(lengths)[tuple(inside)]
  x = table.permute(x, theirs, ours)
  # An axis of ours made of several has been read whole.
  x = x[tuple(i if len(g) > 1 else slice(None) for g, i in zip(ours, index))]
  return _packed(x)


def _is_finite(x: np.ndarray) -> bool:
  """By the bits, because numpy is slow with dtypes that are not its own."""
  bits, ones = {  # a NaN or an infinity has an exponent of ones
    "float32": (np.uint32, 0x7F800000), "bfloat16": (np.uint16, 0x7F80),
    "float16": (np.uint16, 0x7C00),
  }[x.dtype.name]  # fmt: skip
  return not ((x.view(bits) & bits(ones)) == bits(ones)).any()


def _to_device(
  read: Callable[[tuple[slice, ...]], np.ndarray], shape: tuple[int, ...], sharding: Any
) -> jax.Array:
  """A sharded array; devices that hold the same part share one read of it."""
  parts: dict[str, np.ndarray] = {}

  def part(index: tuple[slice, ...]) -> np.ndarray:
    key = str(index)
    if key not in parts:
      parts[key] = read(index)
    return parts[key]

  return jax.make_array_from_callback(shape, sharding, part)


@functools.cache  # jit would trace and compile a new lambda every time
def _zeros(
  shape: tuple[int, ...], dtype: str, sharding: Any
) -> Callable[[], jax.Array]:
  return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.cache
def _put(sharding: Any) -> Callable[[jax.Array, jax.Array, int], jax.Array]:
  """stack, x, layer -> stack with x at that layer, in place."""

  def put(stack, x, layer):
    return jax.lax.dynamic_update_index_in_dim(stack, x.astype(stack.dtype), layer, 0)

  return jax.jit(put, donate_argnums=0, out_shardings=sharding)


def _of_layer(sharding: Any) -> Any:
  """The sharding of one layer of a stack that is sharded so."""
  if isinstance(sharding, jax.sharding.SingleDeviceSharding):
    return sharding
  spec = tuple(sharding.spec)
  if spec and spec[0] is not None:
    raise ValueError(
      f"axis L is sharded ({sharding.spec}), which import cannot fill layer by layer; "
      "the rule of 'layer' must be None."
    )
  return jax.sharding.NamedSharding(
    sharding.mesh,
    jax.sharding.PartitionSpec(*spec[1:]),
    memory_kind=sharding.memory_kind,
  )


# ---- Out -----------------------------------------------------------------------------


def export_state(config: ModelConfig, params: PyTree) -> dict[str, np.ndarray]:
  """Hugging Face name -> array under hub names, in the dtype of the parameters.

  Adapters are merged into their weights, in f32.
  """
  return {name: x for name, x in _export(config, params, None)}


def export_checkpoint(
  config: ModelConfig,
  params: PyTree,
  directory: str | pathlib.Path,
  dtype: str = "bfloat16",
  shard_bytes: int = 5_000_000_000,
  progress: Callable[[int, int], None] | None = None,
) -> None:
  """Writes config.json and safetensors in the hub's layout, for transformers and vLLM.

  Adapters are merged into their weights, in f32, before anything is rounded to `dtype`.
  The host holds one file, of at most shard_bytes (or one tensor), at a time.  On
  several hosts all of them must call; the first one writes.

  Args:
    dtype: of the files, "bfloat16" or "float32".
    progress: called with (bytes of tensors collected, bytes in all).
  """
  from safetensors.numpy import save_file

  if dtype not in ("bfloat16", "float32"):
    raise ValueError(f"{dtype=} of an export; allowed: 'bfloat16', 'float32'.")
  directory = pathlib.Path(directory)
  if any(directory.glob("*.safetensors")):
    raise FileExistsError(
      f"{directory} already holds safetensors, and a reader would mix them; give an "
      "empty folder."
    )
  writes = jax.process_index() == 0
  num_bytes = {
    name: math.prod(shape) * jnp.dtype(dtype).itemsize
    for name, shape in table.names(config).items()
  }
  total = sum(num_bytes.values())
  shards = _shards(num_bytes, shard_bytes)
  if writes:
    directory.mkdir(parents=True, exist_ok=True)
    described = model_config.to_hf(config) | {"torch_dtype": dtype}
    (directory / "config.json").write_text(json.dumps(described, indent=2) + "\n")

  done = 0
  weight_map: dict[str, str] = {}
  tensors = _export(config, params, dtype)
  for i, shard in enumerate(shards, 1):
    file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
    if len(shards) == 1:
      file = "model.safetensors"  # as save_pretrained does; then there is no index
    held = {}
    for name in shard:
      produced, x = next(tensors)
      assert produced == name
      if writes:
        held[name] = x
      weight_map[name] = file
      done += num_bytes[name]
      if progress is not None:
        progress(done, total)
    if writes:
      save_file(held, directory / file, metadata={"format": "pt"})
      # safetensors makes its files private (0600) whatever the umask.
      (directory / file).chmod((directory / "config.json").stat().st_mode)
  if writes and len(shards) > 1:
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(
      json.dumps(index, indent=2) + "\n"
    )


def _export(
  config: ModelConfig, params: PyTree, dtype: str | None
) -> Iterator[tuple[str, np.ndarray]]:
  flat = match(config, params)
  for name, row, layer in table.tensors(config, table.rows(config)):
    x = _part(flat, row.path, row, layer)
    if row.path.removesuffix("/w") in table.adapted(config):
      a, b = (
        _part(flat, row.path.removesuffix("/w") + end, row, layer)
        for end in lora.LEAVES
      )
      x = lora.merge(
        x, a, b, scale=config.lora.scale, stacked=False,
        dtype=x.dtype if dtype is None else dtype,
      )  # fmt: skip
    yield name, to_hf(config, row, x, dtype)


def match(config: ModelConfig, params: PyTree) -> dict[str, jax.Array]:
  """path -> array of the parameters, which are those of the table."""
  flat = table.unnest(params)
  want = table.shapes(config)
  odd = sorted(set(flat) ^ set(want))
  odd += [
    f"{p} {flat[p].shape}" for p in want if p in flat and flat[p].shape != want[p]
  ]
  if odd:
    raise ValueError(
      f"the parameters are not those of this model; they differ in {_listed(odd)}. "
      "Merge adapters first, and take the config of the same checkpoint."
    )
  return flat


def _part(
  flat: Mapping[str, jax.Array], path: str, row: table.Row, layer: int
) -> jax.Array:
  return flat[path][layer] if row.stacked else flat[path]


def to_hf(config: ModelConfig, row: table.Row, x: Any, dtype: str | None) -> np.ndarray:
  """One layer of ours as the tensor of theirs, on the host."""
  x = _on_host(x, dtype)
  theirs, ours = table.parse(row.equation)
  size = table.sizes(config, row)
  x = x.reshape([size[a] for group in ours for a in group])
  return _packed(table.permute(x, ours, theirs))


def _on_host(x: Any, dtype: str | None) -> np.ndarray:
  x = x if dtype is None else x.astype(dtype)
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(x, tiled=True)
  return np.asarray(x)


def _shards(num_bytes: Mapping[str, int], shard_bytes: int) -> list[list[str]]:
  """Names cut into files of at most shard_bytes, in order."""
  shards: list[list[str]] = [[]]
  room = shard_bytes
  for name, size in num_bytes.items():
    if size > room and shards[-1]:
      shards.append([])
      room = shard_bytes
    shards[-1].append(name)
    room -= size
  return shards


def _packed(x: np.ndarray) -> np.ndarray:
  """x in C order; as plain bits, because numpy moves its own dtypes 3 times faster."""
  bits = x.view(f"u{x.dtype.itemsize}")
  return np.ascontiguousarray(bits).view(x.dtype)


def _identity(x: Any) -> Callable[[], Any]:
  return lambda: x


def _listed(items: list[str]) -> str:
  more = f", ... ({len(items) - 10} more)" if len(items) > 10 else ""
  return ", ".join(items[:10]) + more
