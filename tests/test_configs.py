"""The configs: each loads, and the tiny ones hold what they ask the world for."""

import importlib

import numpy as np
import pytest

from pixel_jax.chat import encode, tokenizer
from pixel_jax.configs import common
from pixel_jax.data import pack, sources, world
from pixel_jax.synthesis import templates

ARGS = {"sft": ("base", "full", "base,full"), "rl": ("full",), "evaluate": ("full",)}
ARGS["synthesize"] = ()
TINY = [(name, option) for name in ARGS for option in ("", *ARGS[name])]


def load(name, *words):
  config = importlib.import_module(f"pixel_jax.configs.{name}")
  return config.get_config(",".join(filter(None, words)))


@pytest.mark.parametrize("name", ARGS)
def test_every_size_loads(name):
  for size in common.SIZES:
    assert load(name, size).model.name == size
  with pytest.raises(ValueError, match="full"):
    load(name, "tiny", "fulll")


@pytest.mark.parametrize(("name", "option"), TINY)
def test_full_runs_draw_from_the_full_world(name, option):
  c = load(name, "tiny", option)
  uris = [c.data.uri] + ([c.eval.uri] if "eval" in c else [])
  for uri in uris:
    assert uri.startswith("world:full_") == ("full" in option)
    sources.open_source(uri)


@pytest.mark.parametrize("option", ARGS["sft"])
def test_a_row_holds_every_trace(option, tmp_path):
  c = load("sft", "tiny", option)
  words = tokenizer.make_tiny(tmp_path, world.scaffolds())
  codec = encode.Codec(tokenizer=words, **c.codec)
  source = sources.open_source(c.data.uri, synthesis=templates.Templates(**c.synthesis))
  kinds = set(c.synthesis.kinds)
  assert ("video/zoom" in kinds) == ("full" in option)
  for i in range(300):
    rng = np.random.default_rng(i)
    made = source.synthesis(codec, source[i], rng)
    pack.check_fits(encode.example(*made), c.data.tokens, c.data.patches)


def test_a_row_holds_all_that_a_full_conversation_can_show(tmp_path):
  c = load("rl", "tiny,full")
  words = tokenizer.make_tiny(tmp_path, world.scaffolds())
  codec = encode.Codec(tokenizer=words, **c.codec)
  task = world.task(0, "full_train", world.nth("video", 0))
  most = 0
  for n in range(1, world.FRAMES + 1):  # so many frames in one call
    trace = encode.Conversation(codec, task, world.load_media)
    selected = templates.selection(range(1, n + 1))
    templates.call(trace, selected.name, selected.arguments, False)
    example = encode.example(trace.trajectory, trace.pixels)
    if len(example.tokens) < c.engine.max_len:  # else the engine ends it before
      pack.check_fits(example, c.rl.tokens, c.rl.patches)
      most = n
  assert most == 4 and c.rl.tokens >= c.engine.max_len
