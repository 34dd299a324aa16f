"""Writes tests/golden/*.npz: what pinned Hugging Face code answers.

  python -m pixel_jax.tools.golden pixels model [--out=tests/golden]

Each part is one file and names the versions that made it.  Writing needs torch and
transformers; the tests that read the files need neither, and never write them.  Write
anew only when a pin moves, and read the diff.
"""

import argparse
import importlib.metadata
import io
import json
import pathlib
import types

import numpy as np

# (mode, width, height, min_pixels, max_pixels): every mode that a data set holds, both
# branches of smart_resize, shrinking, growing and the size kept.
PICTURES = [
  ("RGB", 252, 252, 84 * 84, 84 * 84),
  ("RGB", 84, 56, 3136, 1003520),  # kept
  ("RGB", 70, 42, 3136, 1003520),  # halves round to even
  ("RGB", 5, 200, 3136, 1003520),  # grown
  ("RGB", 133, 77, 3136, 6272),  # shrunk
  ("RGB", 300, 3, 784, 3136),  # the floor of 28 wins
  ("RGBA", 61, 90, 3136, 9408),
  ("LA", 61, 90, 3136, 9408),
  ("P", 90, 61, 3136, 9408),
  ("PA", 90, 61, 3136, 9408),  # a palette with a transparent colour
  ("L", 56, 112, 3136, 9408),
  ("1", 56, 112, 3136, 9408),
  ("CMYK", 64, 64, 3136, 9408),
  ("YCbCr", 64, 64, 3136, 9408),
]
GRIDS = [
  (1, 2, 2), (1, 6, 6), (1, 8, 8), (1, 4, 18), (1, 16, 8), (1, 10, 26), (4, 2, 2),
  (4, 8, 8), (3, 6, 10), (2, 18, 4), (8, 4, 6),
]  # fmt: skip
# Each sequence: text tokens, then a picture's grid, and so on.
IMAGE_SEQUENCES = [
  [3, (1, 2, 2), 5],
  [14, (1, 6, 6), 7, (1, 4, 18), 1, (1, 16, 8), 9],
  [1, (1, 8, 8), 2, (1, 10, 26), 30],
]
# (grid, second_per_grid): pinned, because 5.23 departs from Qwen's release here.
VIDEO_SEQUENCES = [((8, 4, 6), 1.0), ((4, 8, 8), 0.5), ((2, 18, 4), 0.25)]


def write_pixels(out: pathlib.Path) -> None:
  """Patches, resized sizes, window order, rotary ids and M-RoPE ids."""
  import torch
  from transformers import Qwen2VLImageProcessorPil, vision_utils
  from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as hf

  golden = {"versions": _versions("pillow", "transformers", "numpy", "torch")}
  # Every level of every channel, as HF normalises it: f32[3 256].
  levels = np.tile(np.arange(256, dtype=np.uint8)[:, None, None], (1, 28, 3))
  processor = Qwen2VLImageProcessorPil(do_resize=False)
  values = processor(images=[levels[:252]], return_tensors="np")["pixel_values"]
  rest = processor(images=[levels[-28:]], return_tensors="np")["pixel_values"]
  golden["table"] = table = np.empty((3, 256), np.float32)
  for at, pixels in ((0, values), (228, rest)):
    rows = pixels.reshape(-1, 1, 2, 2, 3, 2, 14, 14)[:, 0, :, 0, :, 0, :, 0]
    rows = rows.transpose(2, 0, 1, 3).reshape(3, -1)  # channel, y
    table[:, at : at + rows.shape[1]] = rows

  for i, (mode, width, height, low, high) in enumerate(PICTURES):
    file = draw(mode, width, height)
    processor = Qwen2VLImageProcessorPil(
      size={"shortest_edge": low, "longest_edge": high}
    )
    o = processor(images=[_open(file)], return_tensors="np")
    pixels = o["pixel_values"]
    rows = pixels.reshape(len(pixels), 3, -1)
    patches = np.stack(
      [np.searchsorted(table[c], rows[:, c]) for c in range(3)], axis=1
    ).astype(np.uint8)
    exact = np.stack([table[c][patches[:, c]] for c in range(3)], axis=1)
    assert (exact == rows).all()  # so bytes and table say it all
    golden[f"picture{i}/file"] = np.frombuffer(file, np.uint8)
    golden[f"picture{i}/budget"] = np.array([low, high])
    golden[f"picture{i}/patches"] = patches.reshape(pixels.shape)
    golden[f"picture{i}/grid"] = o["image_grid_thw"][0]

  golden["resized"] = np.array(
    [
      (h, w, low, high, *hf.smart_resize(h, w, 28, low, high))
      for h, w, low, high in _sizes(2000)
    ],
    np.int32,
  )

  for i, grid in enumerate(GRIDS):
    thw = torch.tensor([grid])
    order, bounds = vision_utils.get_vision_window_index(thw, 2, 112, 14)
    golden[f"grid{i}/thw"] = np.array(grid)
    golden[f"grid{i}/order"] = order.numpy().astype(np.int32)
    golden[f"grid{i}/bounds"] = bounds.numpy()
    golden[f"grid{i}/rotary"] = (
      vision_utils.get_vision_position_ids(thw, 2).numpy().astype(np.int32)
    )

  for i, sequence in enumerate(IMAGE_SEQUENCES):
    golden[f"images{i}/sequence"] = np.frombuffer(
      json.dumps(sequence).encode(), np.uint8
    )
    golden[f"images{i}/position"] = rope_index(sequence)
  for i, (grid, second_per_grid) in enumerate(VIDEO_SEQUENCES):
    golden[f"video{i}/grid"] = np.array(grid)
    golden[f"video{i}/second_per_grid"] = np.array(second_per_grid)
    golden[f"video{i}/position_5_23"] = rope_index([3, grid, 4], second_per_grid)
  _save(out / "pixels.npz", golden)


def rope_index(sequence, second_per_grid=None, tokens_per_second=2) -> np.ndarray:
  """HF's M-RoPE ids i32[T 3] of a sequence of text lengths and grids."""
  import torch
  from transformers import Qwen2_5_VLConfig
  from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

  config = Qwen2_5_VLConfig()
  config.vision_config.tokens_per_second = tokens_per_second
  model = types.SimpleNamespace(  # the method needs no weights
    config=config,
    get_vision_position_ids=lambda *a, **k: Qwen2_5_VLModel.get_vision_position_ids(
      None, *a, **k
    ),
  )
  kinds, grids = [], []
  for part in sequence:
    if isinstance(part, int):
      kinds += [0] * part
    else:
      kinds += [1 if second_per_grid is None else 2] * (
        part[0] * part[1] * part[2] // 4
      )
      grids.append(part)
  kinds = torch.tensor([kinds])
  name = "image_grid_thw" if second_per_grid is None else "video_grid_thw"
  seconds = None if second_per_grid is None else [second_per_grid] * len(grids)
  position, _ = Qwen2_5_VLModel.get_rope_index(
    model,
    torch.zeros_like(kinds),
    kinds,
    second_per_grid_ts=seconds,
    **{name: torch.tensor(grids)},
  )
  return position[:, 0].T.numpy().astype(np.int32)


def draw(mode: str, width: int, height: int) -> bytes:
  """A picture as a lossless file: arithmetic only, so every machine draws the same."""
  from PIL import Image

  y, x = np.mgrid[:height, :width]
  rgb = np.stack([x * 5 + y, (x // 7) * (y // 5) * 31, (x * x + y * y) // 9], -1) % 256
  image = Image.fromarray(rgb.astype(np.uint8))
  options = {}
  if mode in ("RGBA", "LA"):
    image = image.convert(mode)
    image.putalpha(Image.fromarray(((x * 3 + y * 2) % 256).astype(np.uint8)))
  elif mode in ("P", "PA"):
    image = Image.fromarray(((x // 6 + y // 9) % 16).astype(np.uint8)).convert("P")
    image.putpalette([(i * 37) % 256 for i in range(48)])
    options = {"transparency": 5} if mode == "PA" else {}
  else:
    image = image.convert(mode)
  file = io.BytesIO()
  image.save(file, "TIFF" if mode in ("CMYK", "YCbCr") else "PNG", **options)
  return file.getvalue()


def _open(file: bytes):
  from PIL import Image

  return Image.open(io.BytesIO(file))


def _sizes(num: int):
  random = np.random.default_rng(0)
  while num:
    h, w = (int(v) for v in np.exp(random.uniform(0, np.log(6000), 2)))
    low, high = sorted(int(v) for v in np.exp(random.uniform(6, 16, 2)))
    if max(h, w) <= 200 * min(h, w):
      yield h, w, low, high
      num -= 1


def _versions(*packages: str) -> np.ndarray:
  versions = {name: importlib.metadata.version(name) for name in packages}
  return np.frombuffer(json.dumps(versions).encode(), np.uint8)


def _save(path: pathlib.Path, golden: dict[str, np.ndarray]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  np.savez_compressed(path, **golden)
  print(f"{path}: {len(golden)} arrays, {path.stat().st_size} bytes")


def write_model(out: pathlib.Path) -> None:
  """A tiny checkpoint and every stage of what transformers makes of it."""
  import golden_model  # beside this file, as is parity
  import parity

  golden_model.write(out, parity, _versions("transformers", "torch", "pillow"))


PARTS = {"pixels": write_pixels, "model": write_model}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("part", choices=PARTS, nargs="+")
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("tests/golden"))
  args = parser.parse_args()
  for part in args.part:
    PARTS[part](args.out)


if __name__ == "__main__":
  main()
