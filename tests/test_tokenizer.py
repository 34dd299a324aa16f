"""chat/tokenizer.py: ids as HF gives them, and no control token from foreign text."""

import json
import subprocess
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers, trainers

from pixel_jax.chat import tokenizer

SCAFFOLDS = [
  "system\n",
  "0.12",
  ", 0.12",
  '<tool_call>\n{"name": "',
  '<tool_call>\n{"name": "crop',
  "\n</tool_call>",
  "A prompt that explains <tool_call> and <|im_end|>.",
]
CONTROL = [content for content, _ in tokenizer.CONTROL]
# Text in which control tokens, their halves and scaffolds are as likely as letters.
HOSTILE = st.lists(
  st.one_of(
    st.text(max_size=3),
    st.sampled_from(CONTROL + SCAFFOLDS),
    st.sampled_from(["<", "<|", "|>", "<|im_", "end|>", "<tool", "_call>", "</", "\n"]),
  ),
  max_size=12,
).map("".join)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  return tokenizer.make_tiny(tmp_path_factory.mktemp("tiny"), SCAFFOLDS)


@pytest.fixture(scope="module")
def qwen_files(tmp_path_factory):
  """A directory as Qwen publishes it, without tokenizer.json, with real merges."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  backend = tokenizer.byte_level({c: i for i, c in enumerate(alphabet)}, [])
  text = "user\n\nHere is the cropped image of the question, the user said.\n\n" * 3
  trainer = trainers.BpeTrainer(
    vocab_size=320, initial_alphabet=alphabet, show_progress=False
  )
  backend.train_from_iterator([text], trainer)
  path = tmp_path_factory.mktemp("qwen")
  backend.model.save(str(path))
  first = backend.get_vocab_size()
  config = {
    "added_tokens_decoder": {
      str(first + i): {"content": c, "special": special, "normalized": False}
      for i, (c, special) in enumerate(tokenizer.CONTROL)
    },
    "tokenizer_class": "Qwen2Tokenizer",
  }
  (path / "tokenizer_config.json").write_text(json.dumps(config))
  return path


def test_make_tiny_writes_the_same_bytes(tmp_path):
  for name in ("a", "b"):
    tokenizer.make_tiny(tmp_path / name, SCAFFOLDS)
  for file in ("tokenizer.json", "tokenizer_config.json"):
    assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_ids_are_bytes_then_control_then_scaffolds(tiny):
  assert tiny.vocab_size == 256 + len(tokenizer.CONTROL) + len(SCAFFOLDS)
  assert [tiny.encode(c) for c in CONTROL] == [[256 + i] for i in range(len(CONTROL))]
  assert tiny.endoftext == 256 and tiny.im_start == 257 and tiny.im_end == 258
  assert tiny.encode(SCAFFOLDS[0]) == [256 + len(CONTROL)]


def test_load_and_save_keep_every_id(tiny, tmp_path):
  text = "system\n<tool_call>\n{0.12, 0.12} é 漢<|im_end|>"
  tiny.save(tmp_path / "copy")
  copy = tokenizer.load(tmp_path / "copy")
  assert copy.encode(text) == tiny.encode(text)
  assert copy.vocab_size == tiny.vocab_size
  for file in ("tokenizer.json", "tokenizer_config.json"):
    assert (tmp_path / "copy" / file).read_bytes() == (tiny.path / file).read_bytes()


def test_longest_scaffold_wins(tiny):
  assert len(tiny.encode('<tool_call>\n{"name": "crop')) == 1
  assert len(tiny.encode('<tool_call>\n{"name": "cr')) == 3
  assert tiny.encode(", 0.12") == [tiny.id(", 0.12")]
  assert tiny.encode(SCAFFOLDS[-1]) == [tiny.id(SCAFFOLDS[-1])]


@given(text=HOSTILE)
def test_text_comes_back(tiny, text):
  for control in (True, False):
    back = tiny.decode(tiny.encode(text, control=control))
    assert unicodedata.normalize("NFC", back) == unicodedata.normalize("NFC", text)


@given(text=HOSTILE)
def test_foreign_text_makes_no_control_token(tiny, text):
  ids = tiny.encode(text, control=False)
  steering = {tiny.id(c) for c in CONTROL} | {
    tiny.id(s) for s in SCAFFOLDS if any(c in s for c in CONTROL)
  }
  assert not steering & set(ids)


@given(parts=st.lists(st.tuples(HOSTILE, st.booleans()), max_size=4))
def test_control_tokens_come_from_trusted_parts_only(tiny, parts):
  ids = tiny.encode_parts(parts)
  trusted = [text for text, control in parts if control]
  for c in CONTROL:
    assert ids.count(tiny.id(c)) <= sum(text.count(c) for text in trusted)
  text = "".join(text for text, _ in parts)
  back = tiny.decode(ids)
  assert unicodedata.normalize("NFC", back) == unicodedata.normalize("NFC", text)


def test_a_forged_token_is_spelled_out(tiny):
  ids = tiny.encode("a<|im_end|>", control=False)
  assert ids == [tiny.id(c) for c in "a<|im_end|>"]
  assert tiny.encode("a<|im_end|>") == [tiny.id("a"), tiny.im_end]
  assert tiny.encode("0.12", control=False) == [tiny.id("0.12")]  # scaffolds stay


def test_strange_text_never_raises(tiny):
  assert tiny.decode(tiny.encode("a\ud800b")) == "a?b"
  assert tiny.decode(tiny.encode("é")[:1]) == "\ufffd"
  assert tiny.decode([tiny.id("a"), 10**6]) == "a"  # a row of a padded vocabulary
  assert tiny.encode("") == [] and tiny.decode([]) == ""


def test_qwen_published_layout_equals_transformers(qwen_files):
  transformers = pytest.importorskip("transformers")
  ours = tokenizer.load(qwen_files)
  vocab = json.loads((qwen_files / "vocab.json").read_text())
  merges = (qwen_files / "merges.txt").read_text().splitlines()[1:]
  theirs = transformers.Qwen2Tokenizer(
    vocab=vocab, merges=[tuple(m.split(" ")) for m in merges]
  )
  # Qwen2Tokenizer adds its own three tokens first; compare what lies between.
  for text in (
    "user\n\nHere is the image",
    "12 345\r\n  é 漢字 don't",
    "e\u0301  \n x",
  ):
    assert ours.encode(text) == theirs.encode(text)
  assert ours.encode("<tool_call>x<|im_end|>") == [
    ours.vocab_size - len(CONTROL) + CONTROL.index("<tool_call>"),
    *theirs.encode("x"),
    ours.im_end,
  ]
  ours.save(qwen_files / "saved")
  again = tokenizer.load(qwen_files / "saved")
  assert again.encode("user\n\n<|im_end|>") == ours.encode("user\n\n<|im_end|>")


def test_tiny_files_load_in_transformers(tiny):
  transformers = pytest.importorskip("transformers")
  theirs = transformers.AutoTokenizer.from_pretrained(tiny.path)
  for text in ("system\n0.12, 0.12 é", "<tool_call>\n{<|im_end|>", "\n</tool_call>"):
    assert theirs.encode(text) == tiny.encode(text)
    assert theirs.decode(tiny.encode(text)) == text
  assert theirs.eos_token_id == tiny.im_end


def test_bpe_merges_across_parts(qwen_files):
  words = tokenizer.load(qwen_files)
  joined = words.encode_parts([("user\n", True), ("\nHere", False)])
  assert joined == words.encode("user\n\nHere")
  assert joined != words.encode("user\n") + words.encode("\nHere")


def test_errors_tell_the_remedy(tmp_path):
  with pytest.raises(tokenizer.TokenizerError, match="copy the tokenizer files"):
    tokenizer.load(tmp_path / "nothing")
  for scaffold in ("é", "<tag>", "a"):  # above ASCII; would be control; a byte already
    with pytest.raises(tokenizer.TokenizerError, match="scaffold"):
      tokenizer.make_tiny(tmp_path, [scaffold])
  backend = tokenizer.byte_level({"a": 0}, [])
  backend.save(str(tmp_path / "tokenizer.json"))
  with pytest.raises(tokenizer.TokenizerError, match="no token"):
    tokenizer.load(tmp_path)


def test_published_files_that_do_not_belong_together(qwen_files, tmp_path):
  for name in ("vocab.json", "merges.txt"):
    (tmp_path / name).write_bytes((qwen_files / name).read_bytes())
  config = {"added_tokens_decoder": {"151643": {"content": "<|endoftext|>"}}}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  with pytest.raises(tokenizer.TokenizerError, match="from one checkpoint"):
    tokenizer.load(tmp_path)


def test_cutting_is_linear_in_the_text(tiny):
  text = "<|im_end|>" * 20_000
  assert len(tiny.encode(text, control=False)) == len(text)


def test_chat_needs_neither_jax_nor_torch():
  code = (
    "import sys, pixel_jax.chat.encode, pixel_jax.answers;"
    "print([m for m in ('jax', 'torch', 'transformers') if m in sys.modules])"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert done.stdout.strip() == "[]", done.stderr
