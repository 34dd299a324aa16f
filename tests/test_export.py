"""The layout of PixelReasoner-SFT-Data: which files are copied, which are drawn.

What a whole run writes is read back in test_distill.py.
"""

import json

import numpy as np
from PIL import Image

from pixel_jax.chat import encode, tokenizer
from pixel_jax.data import media, world
from pixel_jax.synthesis import boxes, export, templates
from pixel_jax.trajectory import Media, Task

PROSE = templates.Prose("A street with a door.", "the sign", "It reads so.")


def test_files_of_the_seeds_are_copied_where_they_read_the_same(tmp_path):
  words = tokenizer.make_tiny(tmp_path / "words", world.scaffolds())
  codec = encode.Codec(tokenizer=words)
  rng = np.random.default_rng(0)
  picture = Image.fromarray(rng.integers(0, 255, (320, 240, 3), np.uint8))
  picture.save(tmp_path / "plain.jpg")
  exif = Image.Exif()
  exif[export.ORIENTATION] = 6
  picture.save(tmp_path / "turned.jpg", exif=exif)
  picture.convert("L").save(tmp_path / "grey.png")
  with export.PixelReasoner(tmp_path / "out", tmp_path) as layout:
    for i, name in enumerate(("plain.jpg", "turned.jpg", "grey.png")):
      reference = {"bbox_2d": [0.2, 0.2, 0.5, 0.5]}
      task = Task(name, "What?", "A", [Media("image", name)], reference=reference)
      source = media.Library(tmp_path).load
      trace = templates.written(
        codec, task, "image/single", rng, PROSE,
        grid=boxes.fine(240, 320, 28), load_media=source,
      )  # fmt: skip
      layout.add(i, trace)
      stored = json.loads(json.dumps(layout._messages(9, trace)))[1]["content"][1][
        "image"
      ]
      seen = Image.open(tmp_path / "out.partial" / stored)
      assert np.array_equal(seen, trace.seen.pictures[0].source)
  copied = (tmp_path / "out" / "images" / "0-0.jpg").read_bytes()
  assert copied == (tmp_path / "plain.jpg").read_bytes()
