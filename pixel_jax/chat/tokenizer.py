"""The tokenizer: Qwen's files in, ids out, and text that cannot forge a control token.

A thin wrapper over HF `tokenizers`; neither torch nor transformers is imported.  Added
tokens are of two kinds.  *Control* tokens steer the model: all special ones, and those
that look like a tag (`<tool_call>` is not special in Qwen's files).  They come from the
template and from the policy only; the same letters in a question are spelled out as
text.  *Scaffold* tokens are long stretches of plain text (the system prompt, a
coordinate) that the tiny tokenizer holds as one id; anyone may write them.

  encode("a<|im_end|>")                 [a, <|im_end|>]
  encode("a<|im_end|>", control=False)  [a, <, |, im, _, end, |, >]
"""

import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

# Qwen2.5's added tokens in the order of its files (ids 151643...): text, special.
CONTROL = (
  ("<|endoftext|>", True),
  ("<|im_start|>", True),
  ("<|im_end|>", True),
  ("<|object_ref_start|>", True),
  ("<|object_ref_end|>", True),
  ("<|box_start|>", True),
  ("<|box_end|>", True),
  ("<|quad_start|>", True),
  ("<|quad_end|>", True),
  ("<|vision_start|>", True),
  ("<|vision_end|>", True),
  ("<|vision_pad|>", True),
  ("<|image_pad|>", True),
  ("<|video_pad|>", True),
  ("<tool_call>", False),
  ("</tool_call>", False),
  ("<|fim_prefix|>", False),
  ("<|fim_middle|>", False),
  ("<|fim_suffix|>", False),
  ("<|fim_pad|>", False),
  ("<|repo_name|>", False),
  ("<|file_sep|>", False),
)
# How Qwen2 cuts text into words before BPE (transformers, tokenization_qwen2.py).
WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TAG = re.compile(r"</?[^\s<>]+>")

# A stretch of text, and whether control tokens in it are meant.
Part = tuple[str, bool]


class TokenizerError(ValueError):
  """A tokenizer's files are missing or are not of the Qwen family."""


class Tokenizer:
  """Text to ids and back.  Equal texts give equal ids; both directions are cached."""

  def __init__(self, backend: tokenizers.Tokenizer, path: pathlib.Path, config: dict):
    self._backend = backend
    self._config = config
    self.path = path
    self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
    added = backend.get_added_tokens_decoder().values()
    control = {t.content for t in added if t.special or TAG.fullmatch(t.content)}
    self._control = re.compile("|".join(map(re.escape, sorted(control))) or r"(?!)")
    self.endoftext = self.id("<|endoftext|>")
    self.im_start = self.id("<|im_start|>")
    self.im_end = self.id("<|im_end|>")
    self.vision_start = self.id("<|vision_start|>")
    self.vision_end = self.id("<|vision_end|>")
    self.image_pad = self.id("<|image_pad|>")
    self.video_pad = self.id("<|video_pad|>")
    self._encode_parts = functools.lru_cache(maxsize=1024)(self._encode_parts)

  @functools.cached_property
  def digest(self) -> str:
    """The same for tokenizers that give the same ids."""
    return hashlib.blake2b(self._backend.to_str().encode(), digest_size=16).hexdigest()

  def id(self, token: str) -> int:
    """The id of one token, given as its text."""
    found = self._backend.token_to_id(token)
    if found is None:
      raise TokenizerError(
        f"{self.path} has no token {token!r}; a tokenizer of the Qwen2.5-VL family is "
        "needed (make_tiny writes one)"
      )
    return found

  def encode(self, text: str, *, control: bool = True) -> list[int]:
    """Ids of `text`.  control=False: what others wrote; no control token results.

    Both decode back to `text`, as far as it is in Unicode's NFC (as in HF).
    """
    return self.encode_parts(((text, control),))

  def encode_parts(self, parts: Iterable[Part]) -> list[int]:
    """Ids of the joined texts; BPE merges across the borders of the parts, as in HF."""
    return list(self._encode_parts(tuple(parts)))

  def _encode_parts(self, parts: tuple[Part, ...]) -> tuple[int, ...]:
    # A lone surrogate (from "\ud800" in JSON) has no UTF-8; HF would raise.
    texts = [text.encode("utf-8", "replace").decode() for text, _ in parts]
    text, trusted, start = "".join(texts), [], 0
    for piece, (_, control) in zip(texts, parts):
      if control:
        trusted.append((start, start + len(piece)))
      start += len(piece)
    ids, last = [], 0
    for at, end in self._occurrences(text):
      if any(a <= at and end <= b for a, b in trusted):
        continue
      # The letters of a control token that nobody meant: cut behind the first of them.
      ids += self._backend.encode(text[last : at + 1], add_special_tokens=False).ids
      last = at + 1
    ids += self._backend.encode(text[last:], add_special_tokens=False).ids
    return tuple(ids)

  def _occurrences(self, text: str) -> Iterable[tuple[int, int]]:
    """Where control tokens stand, overlapping ones too."""
    found = self._control.search(text)
    while found:
      yield found.span()
      found = self._control.search(text, found.start() + 1)

  def decode(self, ids: Sequence[int]) -> str:
    """The text of `ids`, control tokens included; broken UTF-8 becomes U+FFFD."""
    return self._backend.decode(list(ids), skip_special_tokens=False)

  def save(self, path: str | pathlib.Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, as `transformers` reads them."""
    path = pathlib.Path(path)
    path.mkdir(parents=True, exist_ok=True)
    self._backend.save(str(path / "tokenizer.json"))
    text = json.dumps(self._config, indent=2, ensure_ascii=False, sort_keys=True)
    (path / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def load(path: str | pathlib.Path) -> Tokenizer:
  """Reads a directory: tokenizer.json, or Qwen's vocab.json with merges.txt."""
  path = pathlib.Path(path).expanduser()
  config = {}
  if (path / "tokenizer_config.json").exists():
    config = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
  if (path / "tokenizer.json").exists():
    return Tokenizer(
      tokenizers.Tokenizer.from_file(str(path / "tokenizer.json")), path, config
    )
  if not all((path / name).exists() for name in ("vocab.json", "merges.txt")):
    raise TokenizerError(
      f"no tokenizer at {path}: tokenizer.json, or vocab.json and merges.txt, must be "
      "there; copy the tokenizer files of the checkpoint"
    )
  vocab, merges = models.BPE.read_file(
    str(path / "vocab.json"), str(path / "merges.txt")
  )
  backend = byte_level(vocab, merges)
  added = {int(i): t for i, t in config.get("added_tokens_decoder", {}).items()}
  for i in sorted(added):
    if i != backend.get_vocab_size(with_added_tokens=True):
      raise TokenizerError(
        f"{path}/tokenizer_config.json numbers {added[i]['content']!r} as {i}, but "
        f"{backend.get_vocab_size()} ids stand before it; take all files from one "
        "checkpoint"
      )
    backend.add_tokens([_added(added[i]["content"], added[i].get("special", False))])
  if not added:
    backend.add_tokens([_added(content, special) for content, special in CONTROL])
  return Tokenizer(backend, path, config)


def make_tiny(path: str | pathlib.Path, scaffolds: Sequence[str] = ()) -> Tokenizer:
  """Writes and returns a byte-level tokenizer in Qwen's format: the same bytes always.

  Ids: 256 bytes, Qwen's control tokens, then one per scaffold in the given order.
  Where several scaffolds match, the longest wins.
  """
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  backend = byte_level({c: i for i, c in enumerate(alphabet)}, [])
  backend.add_tokens([_added(content, special) for content, special in CONTROL])
  for text in scaffolds:
    if not text.isascii() or TAG.fullmatch(text) or backend.token_to_id(text):
      # Above ASCII the byte-level decoder would take a letter for a byte.
      raise TokenizerError(
        f"scaffold {text!r}: ASCII text is allowed that is no tag and no token yet"
      )
    backend.add_tokens([_added(text, False)])
  config = {
    "add_prefix_space": False,
    "added_tokens_decoder": {
      str(i): {
        "content": t.content,
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": t.special,
      }
      for i, t in sorted(backend.get_added_tokens_decoder().items())
    },
    "clean_up_tokenization_spaces": False,
    "eos_token": "<|im_end|>",
    "errors": "replace",
    "model_max_length": 131072,
    "pad_token": "<|endoftext|>",
    "tokenizer_class": "Qwen2Tokenizer",
  }
  tokenizer = Tokenizer(backend, pathlib.Path(path), config)
  tokenizer.save(path)
  return tokenizer


def byte_level(
  vocab: dict[str, int], merges: list[tuple[str, str]]
) -> tokenizers.Tokenizer:
  """Qwen's byte-level BPE: NFC, Qwen's words, bytes."""
  backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
  backend.normalizer = normalizers.NFC()
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  backend.decoder = decoders.ByteLevel()
  return backend


def _added(content: str, special: bool) -> AddedToken:
  return AddedToken(content, special=special, normalized=False)
