"""JAX beside PyTorch for one checkpoint, stage by stage, in float32.

  pixel-jax parity --hf=DIR [--json=FILE] [--tokens=8] [--no-gradients]

Two pictures, a clip and some text go through `transformers` and through ours; every
block's output, the logits, log-probs, gradients and greedy tokens are compared.  Exit
code 1 when a stage is off; the first one off is where to look.  Position ids are ours
on both sides: transformers 5 numbers what follows a clip differently (geometry.py).

PyTorch runs first and is freed before JAX starts.  Memory: 4 bytes a parameter, 12 with
gradients (a 7B: 33 GB, or 100 GB).  Both run on the CPU.
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw

from pixel_jax.batch import Batch
from pixel_jax.model import config as model_config
from pixel_jax.model import hf, layers, qwen2_5_vl, vision
from pixel_jax.model.config import ModelConfig
from pixel_jax.pixels import geometry, image

TOLERANCE = 1e-4  # relative; fp32 gives 1e-6 on tiny models and 1e-5 on deep ones
PIXELS = dict(min_pixels=56 * 56, max_pixels=28 * 28 * 64)

Stages = dict[str, np.ndarray]


# ---- What both sides are given -------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sample:
  """One conversation: text, two pictures, text, a clip, text."""

  images: list[Image.Image]
  frames: list[Image.Image]
  pixels: list[geometry.Pixels]  # of the images, then of the clip
  ids: np.ndarray  # i32[T]
  position: np.ndarray  # i32[T 3]
  vision_index: np.ndarray  # i32[T]


def make_sample(
  config: ModelConfig, seed: int = 0, sizes=((150, 95), (70, 61)), text: int = 7
) -> Sample:
  """Drawn pictures and random ids below the special ones.

  Args:
    sizes: (width, height) of the two pictures; the first has several windows.
    text: ids in each of the stretches of text.
  """
  rng = np.random.default_rng(seed)
  images = [_draw(rng, *size) for size in sizes]
  frames = [_draw(rng, 84, 56) for _ in range(3)]  # odd: the last one is repeated
  v = config.vision
  cut = dict(patch=v.patch, merge=v.merge)
  pixels = []
  for stack in ([i] for i in images):
    resized = [np.asarray(image.resize(i, **PIXELS)) for i in stack]
    patches, grid = image.patchify(np.stack(resized), temporal=v.temporal, **cut)
    pixels.append(geometry.lay_out(patches, grid, window=v.window, **cut))
  clip = np.stack([np.asarray(image.resize(f, **PIXELS)) for f in frames])
  patches, grid = image.patchify(clip, temporal=v.temporal, **cut)
  pixels.append(geometry.lay_out(patches, grid, window=v.window, **cut))

  special = (config.image_token, config.video_token, config.vision_start)
  low = min(*special, config.vision_end, config.text.vocab)
  ids, position, index, merged = [], [], [], 0

  def add(new, where, rows=None):
    ids.extend(new)
    position.extend(where)
    index.extend(rows if rows is not None else [-1] * len(new))

  def say(new):
    start = geometry.next_position(np.array(position).reshape(-1, 3))
    add(new, geometry.text_positions(len(new), start))

  for picture in pixels:
    say([*rng.integers(0, low, text), config.vision_start])
    start = geometry.next_position(np.array(position))
    if picture is pixels[-1]:
      pad = config.video_token
      where = geometry.video_positions(
        picture.grid, start, 1.0, v.tokens_per_second, v.merge
      )
    else:
      pad, where = (
        config.image_token,
        geometry.image_positions(picture.grid, start, v.merge),
      )
    add([pad] * picture.num_merged, where, picture.merged_row + merged)
    merged += picture.num_merged
    say([config.vision_end])
  say(rng.integers(0, low, text))
  as_array = functools.partial(np.array, dtype=np.int32)
  return Sample(
    images, frames, pixels, as_array(ids), as_array(position), as_array(index)
  )


def _draw(rng: np.random.Generator, width: int, height: int) -> Image.Image:
  picture = Image.new("RGB", (width, height), tuple(rng.integers(0, 256, 3).tolist()))
  pen = ImageDraw.Draw(picture)
  for _ in range(6):
    x, y = rng.integers(0, width), rng.integers(0, height)
    box = (x, y, x + rng.integers(4, width), y + rng.integers(4, height))
    pen.ellipse([int(n) for n in box], tuple(rng.integers(0, 256, 3).tolist()))
  return picture


def to_batch(sample: Sample) -> Batch:
  """The sample as one packed row."""
  pixels = sample.pixels

  def numbered(name):  # ids of the pictures made unique in the row, from 1 on
    out, base = [], 1
    for p in pixels:
      out.append(getattr(p, name) + base)
      base = int(out[-1].max()) + 1
    return np.concatenate(out)

  rows = {
    "tokens": sample.ids,
    "segment": np.ones_like(sample.ids),
    "position": sample.position,
    "weight": (sample.vision_index < 0).astype(np.float32),
    "vision_index": sample.vision_index,
    "patches": np.concatenate([p.patches for p in pixels]),
    "patch_pos": np.concatenate([p.patch_pos for p in pixels]),
    "patch_image": numbered("patch_image"),
    "patch_window": numbered("patch_window"),
  }
  return Batch(**{k: jnp.asarray(x)[None] for k, x in rows.items()})


# ---- Ours ----------------------------------------------------------------------------


def run_jax(
  config: ModelConfig,
  params: dict,
  batch: Batch,
  greedy: np.ndarray,
  gradients: bool = True,
) -> Stages:
  """Stage -> array, of one row; `greedy` are the tokens to decode along (PyTorch's)."""
  # Blocks one by one; then the graphs that run in earnest, scanned and chunked.
  config = dataclasses.replace(
    config, dtype="float32", remat="none", scan_layers=False, logp_chunk=16
  )
  scanned = dataclasses.replace(config, scan_layers=True)
  trained = dataclasses.replace(scanned, remat="full")

  @jax.jit
  def blocks(params, batch):
    with _taps() as taps:
      features = qwen2_5_vl.encode_vision(config, params, batch)
      hidden = qwen2_5_vl.forward(config, params, batch.replace(features=features))
    (vision_in, *vision_out), (text_in, *text_out) = taps
    out = {"vision/patches": vision_in}
    out |= {f"vision/block {i}": x for i, x in enumerate(vision_out)}
    out["vision/features"] = features
    out["text/embeddings"] = text_in
    out |= {f"text/block {i}": x for i, x in enumerate(text_out)}
    out["text/hidden"] = hidden
    out["logits"] = qwen2_5_vl.logits(config, params, hidden)
    return out

  def nll(params, batch):
    logp, _ = qwen2_5_vl.token_logp(trained, params, batch)
    return -(logp * batch.weight).sum() / batch.weight[:, 1:].sum(), logp

  normalized = jax.jit(lambda x: vision.normalize(x, config.vision))(batch.patches)
  stages = {"pixels": normalized} | blocks(params, batch)
  if gradients:
    (_, logp), grads = jax.jit(jax.value_and_grad(nll, has_aux=True))(params, batch)
    stages["log-probs"] = logp[:, 1:]
    named = hf.export_state(config, grads)
    stages |= {f"gradient {name}": x[None] for name, x in named.items()}
  else:
    stages["log-probs"] = jax.jit(nll)(params, batch)[1][:, 1:]
  decoded = _decode(scanned, params, batch, greedy)
  stages |= {"decode/logits": decoded, "decode/tokens": decoded.argmax(-1)}
  return {k: np.asarray(x)[0] for k, x in stages.items()}


@contextlib.contextmanager
def _taps():
  """Collects, for each stack that runs, what enters it and what every block gives."""
  kept: list[list[jax.Array]] = []
  original = layers.run

  def run(blocks, body, carry, *, scan, remat):
    mine = [carry]
    kept.append(mine)

    def tapped(block, x, i):
      mine.append(body(block, x, i))
      return mine[-1]

    return original(blocks, tapped, carry, scan=scan, remat=remat)

  layers.run = run
  try:
    yield kept
  finally:
    layers.run = original


def _decode(config, params, batch: Batch, greedy: np.ndarray) -> jax.Array:
  """Logits f32[1 n V] with a cache: prefill, then one token at a time."""
  T = batch.tokens.shape[1]

  @jax.jit
  def prefill(params, batch):
    cache = qwen2_5_vl.init_cache(config, 1, T + len(greedy))
    features = qwen2_5_vl.encode_vision(config, params, batch)
    hidden, cache = qwen2_5_vl.extend(
      config, params, cache, batch.tokens, batch.position, jnp.array([T]),
      batch.vision_index, features,
    )  # fmt: skip
    return qwen2_5_vl.logits(config, params, hidden[:, -1:]), cache

  @jax.jit
  def step(params, cache, token, at):
    hidden, cache = qwen2_5_vl.extend(
      config, params, cache, token[None, None], jnp.broadcast_to(at, (1, 1, 3)),
      jnp.array([1]), jnp.full((1, 1), -1),
    )  # fmt: skip
    return qwen2_5_vl.logits(config, params, hidden), cache

  out, cache = prefill(params, batch)
  logits = [out]
  start = geometry.next_position(np.asarray(batch.position[0]))
  for i, token in enumerate(greedy[:-1]):
    out, cache = step(params, cache, jnp.int32(token), jnp.int32(start + i))
    logits.append(out)
  return jnp.concatenate(logits, axis=1)


# ---- Theirs --------------------------------------------------------------------------


def run_torch(
  directory: str | pathlib.Path,
  sample: Sample,
  num_tokens: int = 8,
  gradients: bool = True,
) -> Stages:
  """The same stages from transformers, in float32."""
  import torch
  from transformers import Qwen2_5_VLForConditionalGeneration

  model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
    directory, dtype=torch.float32, output_loading_info=True
  )
  # transformers only logs these and leaves the weights random (oracles.md 1.6).
  wrong = {k: sorted(v)[:5] for k, v in info.items() if v}
  if wrong:
    raise ValueError(f"transformers did not load {directory} whole: {wrong}.")
  model.eval().requires_grad_(gradients)
  stages: dict[str, torch.Tensor] = {}

  def keep(name):
    def hook(module, args, output):
      output = output[0] if isinstance(output, tuple) else output
      # The tower runs twice, for pictures, then for clips: the order of our row.
      old = [stages[name]] if name in stages else []
      stages[name] = torch.cat([*old, output.detach().reshape(-1, output.shape[-1])])

    return hook

  def keep_input(name):
    def hook(module, args, kwargs):
      keep(name)(module, args, args[0] if args else kwargs["hidden_states"])

    return hook

  tower, text = model.model.visual, model.model.language_model
  hooks = [
    tower.blocks[0].register_forward_pre_hook(
      keep_input("vision/patches"), with_kwargs=True
    ),
    tower.merger.register_forward_hook(keep("vision/features")),
    text.layers[0].register_forward_pre_hook(
      keep_input("text/embeddings"), with_kwargs=True
    ),
    text.norm.register_forward_hook(keep("text/hidden")),
  ]
  for kind, stack in (("vision", tower.blocks), ("text", text.layers)):
    for i, block in enumerate(stack):
      hooks.append(block.register_forward_hook(keep(f"{kind}/block {i}")))

  still, clip = _processed(sample)
  grids = torch.tensor([p.grid for p in sample.pixels])
  ids = torch.tensor(sample.ids, dtype=torch.long)[None]
  position = torch.tensor(sample.position.T, dtype=torch.long)[:, None]

  def forward(ids, position):
    return model(
      input_ids=ids,
      position_ids=position,
      pixel_values=torch.tensor(still),
      image_grid_thw=grids[:-1],
      pixel_values_videos=torch.tensor(clip),
      video_grid_thw=grids[-1:],
      use_cache=False,
    ).logits[0]

  with torch.set_grad_enabled(gradients):
    logits = forward(ids, position)
  for hook in hooks:
    hook.remove()
  logp = logits.log_softmax(-1)[:-1].gather(-1, ids[0, 1:, None])[:, 0]
  weight = torch.tensor(sample.vision_index[1:] < 0)
  out = {"pixels": _in_windows(sample, np.concatenate([still, clip]))}
  out |= {k: v.numpy() for k, v in stages.items()}
  out |= {"logits": logits.detach().numpy(), "log-probs": logp.detach().numpy()}
  if gradients:
    (-logp[weight].mean()).backward()
    for name, p in model.named_parameters():
      out[f"gradient {hf.hub_name(name)}"] = p.grad.numpy()

  decoded = [logits[-1].detach()]
  with torch.no_grad():
    for _ in range(num_tokens - 1):
      ids = torch.cat([ids, decoded[-1].argmax()[None, None]], dim=1)
      following = (position.max() + 1).expand(3, 1, 1)
      position = torch.cat([position, following], dim=2)
      decoded.append(forward(ids, position)[-1])
  out["decode/logits"] = torch.stack(decoded).numpy()
  out["decode/tokens"] = out["decode/logits"].argmax(-1)
  return out


def _processed(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
  """pixel_values of the pictures and of the clip, by Hugging Face's PIL processor.

  Its video processor needs torchvision; frame by frame with pairs stacked on the
  temporal axis is the same (oracles.md 1.3).
  """
  from transformers import Qwen2VLImageProcessorPil

  size = {"shortest_edge": PIXELS["min_pixels"], "longest_edge": PIXELS["max_pixels"]}
  processor = Qwen2VLImageProcessorPil(size=size)

  def process(images):
    return processor(images=images, return_tensors="np")["pixel_values"]

  frames = [process([f]).reshape(-1, 3, 2, 14, 14)[:, :, 0] for f in sample.frames]
  frames += frames[-1:] * (len(frames) % 2)
  pairs = [
    np.stack([a, b], axis=2).reshape(len(a), -1)
    for a, b in zip(frames[::2], frames[1::2], strict=True)
  ]
  return process(sample.images), np.concatenate(pairs)


def _in_windows(sample: Sample, raster: np.ndarray) -> np.ndarray:
  """Patches in the processor's order -> in the order of our row."""
  out, start = [], 0
  for p in sample.pixels:
    mine = raster[start : start + p.num_patches].reshape(p.num_merged, -1)
    ordered = np.empty_like(mine)
    ordered[p.merged_row] = mine
    out.append(ordered.reshape(p.num_patches, -1))
    start += p.num_patches
  return np.concatenate(out)


# ---- Side by side --------------------------------------------------------------------


def compare(ours: Stages, theirs: Stages, tolerance: float = TOLERANCE) -> list[dict]:
  """A row a stage: max abs difference, relative (norms), ok.  Pixels must be equal."""
  rows = []
  for stage, want in theirs.items():
    got = ours.get(stage)
    if got is None or got.shape != want.shape:
      shape = None if got is None else list(got.shape)
      reason = f"shape {shape}, not {list(want.shape)}"
      rows.append({"stage": stage, "ok": False, "reason": reason})
      continue
    if stage == "decode/tokens":
      differ = int((got != want).sum())
      top = np.sort(theirs["decode/logits"], axis=-1)
      tie = top[:, -1] - top[:, -2] <= tolerance * np.abs(top).max()
      ok = bool(((got == want) | tie).all())
      rows.append(_row(stage, differ, differ / len(want), ok))
      continue
    gap = np.abs(got.astype(np.float64) - want)
    norm = np.linalg.norm(want.astype(np.float64))
    relative = float(np.linalg.norm(gap) / norm) if norm else float(gap.max())
    ok = relative <= (0 if stage == "pixels" else tolerance)  # False for NaN
    rows.append(_row(stage, gap.max(), relative, ok))
  rows += [
    {"stage": s, "ok": False, "reason": "PyTorch has none"}
    for s in ours.keys() - theirs
  ]
  return rows


def _row(stage: str, max_abs: float, relative: float, ok: bool) -> dict:
  return {
    "stage": stage, "max_abs": float(max_abs), "relative": relative, "ok": bool(ok)
  }  # fmt: skip


def table(rows: list[dict]) -> str:
  """Aligned text; gradients are summed up in one line for each tower, the worst one."""
  shown, worst = [], {}
  for row in rows:
    if not row["stage"].startswith("gradient "):
      shown.append(row)
      continue
    name = row["stage"].removeprefix("gradient ")
    tower = "vision" if name.startswith("visual.") else "text"
    count, old = worst.get(tower, (0, None))
    bad = (not row["ok"], row.get("relative", np.inf))
    if old is None or bad > (not old["ok"], old.get("relative", np.inf)):
      old = row
    worst[tower] = (count + 1, old)
  for tower, (count, row) in worst.items():
    name = row["stage"].removeprefix("gradient ")
    shown.append(row | {"stage": f"gradients of {tower} ({count}; worst {name})"})
  width = max(len(r["stage"]) for r in shown)
  lines = [f"{'stage':<{width}}  {'max abs':>9}  {'relative':>9}"]
  for r in shown:
    verdict = "ok" if r["ok"] else "OFF"
    if "reason" in r:
      lines.append(f"{r['stage']:<{width}}  {r['reason']}  {verdict}")
    else:
      lines.append(
        f"{r['stage']:<{width}}  {r['max_abs']:9.2e}  {r['relative']:9.2e}  {verdict}"
      )
  return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--hf", required=True, help="folder of config.json, *.safetensors"
  )
  parser.add_argument("--json", help="also write the rows to this file")
  parser.add_argument("--tokens", type=int, default=8, help="greedy tokens")
  parser.add_argument("--no-gradients", action="store_true")
  parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="relative")
  args = parser.parse_args(argv)

  jax.config.update("jax_default_matmul_precision", "highest")
  try:
    config = model_config.from_hf(hf.read_config(args.hf))
    sample = make_sample(config)
    print(f"PyTorch: {args.hf}, {len(sample.ids)} tokens", file=sys.stderr)
    theirs = run_torch(args.hf, sample, args.tokens, not args.no_gradients)
    gc.collect()
    print("JAX: the same", file=sys.stderr)
    params = hf.import_checkpoint(args.hf, config)
  except (ValueError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  greedy = theirs["decode/tokens"]
  ours = run_jax(config, params, to_batch(sample), greedy, not args.no_gradients)
  rows = compare(ours, theirs, args.tolerance)
  print(table(rows))
  off = [r["stage"] for r in rows if not r["ok"]]
  if args.json:
    result = {"hf": args.hf, "ok": not off, "tolerance": args.tolerance, "stages": rows}
    pathlib.Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
  print(
    f"{len(off)} of {len(rows)} stages are off, first {off[0]}" if off else "parity"
  )
  return 1 if off else 0


if __name__ == "__main__":
  sys.exit(main())
