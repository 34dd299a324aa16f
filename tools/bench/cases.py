"""What `bench.py` can measure: each name pairs one of our sides with its peers.

A `Case` is the same work on both sides.  Its `check` compares what they return and
raises when it was not the same work; the difference goes into the report.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from pixel_jax.chat import encode
from pixel_jax.model import flops
from pixel_jax.model.config import ModelConfig
from pixel_jax.tools.bench import data, ours


@dataclasses.dataclass
class Case:
  """One piece of work, done by us and by peers."""

  name: str
  unit: str
  work: float  # units of one call
  ours: Callable[[], Any] | None
  peers: Mapping[str, Callable[[], Any]]
  flops: float = 0.0  # of the model, without padding and recomputation
  bytes: float = 0.0  # that must be read at least
  target: Mapping[str, float] = dataclasses.field(default_factory=dict)  # peer -> ratio
  check: Callable[[Any, Any], dict] | None = None  # (ours, theirs) -> differences
  repeats: int = 5
  slow: bool = False  # minutes a call: peers, which compile nothing, are called once
  note: str = ""


@dataclasses.dataclass(frozen=True)
class Bench:
  """Who takes part: one model in two frameworks; None is not measured."""

  size: data.Size
  config: ModelConfig
  codec: encode.Codec
  params: Any
  model: Any  # of peers.load, or None
  with_ours: bool = True

  def own(self, make: Callable, *args, **kwargs) -> Callable | None:
    """Our side: make(config, params, ...)."""
    if not self.with_ours:
      return None
    return make(self.config, self.params, *args, **kwargs)

  def theirs(self, name: str, *args, **kwargs) -> Any:
    """Of the other side: peers.<name>(model, ...)."""
    if self.model is None:
      return None
    from pixel_jax.tools.bench import peers  # here: it imports torch

    return getattr(peers, name)(self.model, *args, **kwargs)


class Unequal(AssertionError):
  """The two sides did not do the same work."""


def close(name: str, tolerance: float) -> Callable[[Any, Any], dict]:
  """A check: the largest difference, relative to the largest number."""

  def check(mine, theirs):
    mine, theirs = np.asarray(mine, np.float64), np.asarray(theirs, np.float64)
    if mine.shape != theirs.shape:
      raise Unequal(f"{name}: ours {mine.shape}, theirs {theirs.shape}.")
    gap = float(np.abs(mine - theirs).max() / max(np.abs(theirs).max(), 1e-9))
    if not gap <= tolerance:
      raise Unequal(f"{name} differ by {gap:.2g} of the largest; allowed {tolerance}.")
    return {f"{name}_difference": gap}

  return check


def _tolerance(b: Bench) -> float:
  return 1e-4 if b.config.dtype == "float32" else 0.1


def _present(**peers: Callable | None) -> dict[str, Callable]:
  return {name.replace("_", " "): f for name, f in peers.items() if f is not None}


# ---- Host ----------------------------------------------------------------------------


def preprocess(b: Bench) -> list[Case]:
  photos = data.photos(b.size)
  mine = ours.preprocess(b.codec, photos) if b.with_ours else None
  peer = b.theirs("preprocess", b.codec, photos)

  def check(mine, theirs):
    if not all(np.array_equal(data.raster(p), q) for p, q in zip(mine, theirs)):
      raise Unequal("pixels differ; they must be equal to the bit.")
    return {"pixels_difference": 0.0}

  return [
    Case(
      "preprocess", "pictures", len(photos), mine, _present(HF_PIL=peer), check=check,
      note="640x480 to 1280x960, one thread; ours gives bytes, normalised on the device",
    )
  ]  # fmt: skip


# ---- Forward -------------------------------------------------------------------------


def vision(b: Bench) -> list[Case]:
  count, patches = b.size.images
  rng = np.random.default_rng(0)
  side = round((patches / 4) ** 0.5)
  pictures = [data.noise(rng, side, side) for _ in range(count)]
  P = pictures[0].num_patches
  return [
    Case(
      f"vision {count} x {P} patches", "pictures", count, b.own(ours.vision, pictures),
      _present(HF_SDPA=b.theirs("vision", pictures)),
      flops=count * P * flops.vision_per_patch(b.config, P),
      check=close("features", _tolerance(b)),
    )
  ]  # fmt: skip


def prefill(b: Bench) -> list[Case]:
  rows = data.rows(b.size, b.config)
  head = len(rows) * flops.head_per_token(b.config)
  return [
    Case(
      "prefill {} x {}".format(*b.size.rows), "tokens", sum(len(e.tokens) for e in rows),
      b.own(ours.prefill, rows), _present(HF_SDPA=b.theirs("prefill", rows)),
      flops=forward_flops(b.config, rows) + head, check=close("logits", _tolerance(b)),
    )
  ]  # fmt: skip


def decode(b: Bench) -> list[Case]:
  B, S, tokens = b.size.decode
  rng = np.random.default_rng(0)
  low = b.config.text.vocab // 2
  context = rng.integers(low, b.config.text.vocab, (B, S)).astype(np.int32)
  t = b.config.text
  weights = sum(x.size for x in jax.tree.leaves(b.params["text"]))
  weights -= 0 if t.tied else t.vocab * t.width  # of the embedding only B rows are read
  width = 4 if b.config.dtype == "float32" else 2
  keys = B * (S + tokens / 2) * t.depth * 2 * t.kv_heads * t.head_dim
  each = flops.text_per_token(b.config, S + tokens / 2) + flops.head_per_token(b.config)

  def check(mine, theirs):
    # Random weights leave near ties; from there on two greedy texts are two texts.
    same = np.asarray(mine) == np.asarray(theirs)
    first = same[:, 0].mean()
    if first < 0.9:
      raise Unequal(f"{first:.0%} of the first greedy tokens agree.")
    return {"greedy_agreement": float(same.mean())}

  return [
    Case(
      f"decode {B} x {tokens} after {S}", "tokens", B * tokens,
      b.own(ours.generate, context, tokens),
      _present(HF_generate=b.theirs("generate", context, tokens)),
      flops=B * tokens * each, bytes=tokens * width * (weights + keys), check=check,
    )
  ]  # fmt: skip


# ---- Training ------------------------------------------------------------------------


def forward_flops(config: ModelConfig, examples) -> float:
  """Text blocks and tower of examples, each picture once an example; no head."""
  total = 0.0
  for e in examples:
    n = len(e.tokens)
    total += n * flops.text_per_token(config, n / 2)
    for _, p in e.vision:
      total += p.num_patches * flops.vision_per_patch(config, p.num_patches)
  return total


def train_flops(config: ModelConfig, examples, *, frozen: bool) -> float:
  """Forward and backward; logits of learned tokens only."""
  text = [dataclasses.replace(e, vision=[]) for e in examples]
  block = forward_flops(config, text)
  tower = forward_flops(config, examples) - block
  head = data.learned(examples) * flops.head_per_token(config)
  return 3 * (block + head) + (1 if frozen else 3) * tower


def sft(b: Bench) -> list[Case]:
  return [same_rows(b), *same_data(b)]


def same_rows(b: Bench) -> Case:
  """Full rows on both sides, everything trained."""
  rows = data.rows(b.size, b.config)
  mine = b.own(ours.train, [ours.full(rows)])
  peer = b.theirs("train", [b.theirs("full", rows)])
  return Case(
    "sft step, same rows {} x {}".format(*b.size.rows), "tokens",
    sum(len(e.tokens) for e in rows), mine, _present(torch_SDPA=peer),
    flops=train_flops(b.config, rows, frozen=False),
    check=close("loss_and_norm", _tolerance(b)),
  )  # fmt: skip


def same_data(b: Bench) -> list[Case]:
  """A pass over one set of examples, tower frozen: packed against padded.

  First with the tower in every step, then as in every epoch but the first, with its
  features kept (the peers keep none).
  """
  examples = data.examples(b.size, b.config)
  n = b.size.batch
  groups = [examples[i : i + n] for i in range(0, len(examples), n)]
  first = b.own(ours.train, ours.packed(examples, b.size.row), freeze=ours.FROZEN)
  kept = b.own(ours.with_features, examples, b.size.row)
  later = b.own(ours.train, kept, freeze=ours.FROZEN)
  padded = b.theirs("train", [b.theirs("padded", g) for g in groups], freeze=True)
  packed = b.theirs("train", b.theirs("packed", examples, b.size.row), freeze=True)

  def check(mine, theirs):  # the sum of the pass; the norm is of other batches
    return close("loss", _tolerance(b))(mine[:1], theirs[:1])

  tokens = sum(len(e.tokens) for e in examples)
  share = 1 - data.learned(examples) / tokens
  name = f"sft pass, same data, {len(examples)} examples"
  common = dict(unit="tokens", work=tokens, check=check, repeats=3)
  note = f"{share:.0%} of the tokens unsupervised, tower frozen"
  text = [dataclasses.replace(e, vision=[]) for e in examples]
  return [
    Case(
      name, ours=first, peers=_present(torch_padded=padded, torch_packed=packed),
      flops=train_flops(b.config, examples, frozen=True), note=note,
      target={"torch padded": 1.5}, **common,
    ),
    Case(
      f"{name}, features kept", ours=later, peers=_present(torch_padded=padded),
      flops=train_flops(b.config, text, frozen=True), note=f"{note}, later epochs",
      **common,
    ),
  ]  # fmt: skip


def rl(b: Bench) -> list[Case]:
  """One GRPO update from two groups of scripted rollouts."""
  turns = data.script(b.size, b.codec.tokenizer)
  conversations = data.replay(b.size, b.codec, turns)
  chosen = list(conversations.values())[: 2 * b.size.groups[1]]
  examples = [encode.example(c.trajectory, c.pixels) for c in chosen]
  rng = np.random.default_rng(0)
  advantage = rng.normal(size=len(examples)).round(3)
  examples = [
    dataclasses.replace(e, advantage=float(a)) for e, a in zip(examples, advantage)
  ]
  longest = max(len(e.tokens) for e in examples)
  patches = max(sum(p.num_patches for _, p in e.vision) for e in examples)
  # Two of the longest a row; those of one question share its picture.
  row = (b.size.row[0] // 2, 64 * -(-2 * longest // 64), 64 * -(-3 * patches // 128))
  mine = b.own(ours.train, ours.packed(examples, row), policy=True)
  peer = b.theirs("train_policy", examples, b.size.groups[1])
  return [
    Case(
      f"rl update, {len(examples)} rollouts", "tokens",
      sum(len(e.tokens) for e in examples), mine, _present(TRL_padded=peer),
      flops=train_flops(b.config, examples, frozen=False),
      check=close("entropy_and_norm", _tolerance(b)), repeats=3,
      note="everything trained, one update a batch: no pass for the old log-probs",
    )
  ]  # fmt: skip


# ---- Rollout -------------------------------------------------------------------------


def rollout(b: Bench) -> list[Case]:
  return [play(b, equal) for equal in (False, True)]


def play(b: Bench, equal: bool) -> Case:
  """The script of `data.script`, by both sides."""
  turns = data.script(b.size, b.codec.tokenizer, equal=equal)
  conversations = data.replay(b.size, b.codec, turns)
  count = len(turns)
  mine = b.own(ours.rollout, b.codec, b.size, turns, conversations)
  # In small batches, where a CPU wastes less on padding; all at once, as on a GPU, only
  # in the short case, where it is a fifth slower.
  sizes = sorted({count, max(1, count // 4)}) if equal else [max(1, count // 4)]
  peers = {
    f"HF generate, {n} at a time": b.theirs("rollout", b.codec, b.size, turns, n)
    for n in sizes
    if b.model is not None
  }
  said = {k: c.trajectory.ids for k, c in conversations.items()}

  def check(mine, theirs):
    for side, played in (("ours", mine), ("theirs", theirs)):
      wrong = [k for k, ids in said.items() if played[k].ids != ids]
      if wrong:
        raise Unequal(
          f"{side} did not say the script in {wrong[:3]}, {len(wrong)} in all."
        )
    return {"trajectories_equal": len(said)} | _agreement(b, mine, conversations)

  sampled = sum(len(ids) for t in turns.values() for ids in t)
  shape = "one turn of equal length" if equal else "1-6 turns, log-normal"
  return Case(
    f"rollout {count}, {shape}", "sampled tokens", sampled, mine, peers,
    target={name: 1.5 if equal else 5.0 for name in peers}, check=check,
    repeats=2, slow=True,
  )  # fmt: skip


def _agreement(b: Bench, mine, conversations) -> dict:
  """Our log-probs at sampling against their forward pass, of a few trajectories."""
  gap = 0.0
  for key in list(mine)[:: max(1, len(mine) // 4)]:
    c, played = conversations[key], mine[key]
    want = b.theirs("logp", encode.example(c.trajectory, c.pixels))
    own = np.array(played.sampled)
    gap = max(gap, float(np.abs(np.array(played.logp) - want)[own].max()))
  allowed = 1e-3 if b.config.dtype == "float32" else 0.5
  if gap > allowed:
    raise Unequal(f"log-probs at sampling are off by {gap:.2g}; allowed {allowed}.")
  return {"logp_difference": gap}


CASES = {
  "preprocess": preprocess,
  "vision": vision,
  "prefill": prefill,
  "decode": decode,
  "rollout": rollout,
  "sft": sft,
  "rl": rl,
}
