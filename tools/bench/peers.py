"""The other side of `bench.py`: Hugging Face transformers and a plain torch train step.

What a user would run instead, with the same weights (through `model/hf.py`), SDPA
attention, as many threads, and everything that costs nothing to give: position ids come
precomputed, pictures are prepared once.  The only file that imports torch.  As in
`ours.py` a side is a function that does the work once and returns numpy.
"""

import concurrent.futures
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from transformers import LogitsProcessor, LogitsProcessorList

from pixel_jax.chat import encode
from pixel_jax.data import pack
from pixel_jax.model import config as model_config
from pixel_jax.model import hf
from pixel_jax.model.config import ModelConfig
from pixel_jax.rollout.episode import Episode
from pixel_jax.tools.bench import data

IGNORED = -100  # label without a loss
CLIP = (0.2, 0.28)
Model = transformers.Qwen2_5_VLForConditionalGeneration


def load(config: ModelConfig, params: Any | None, *, gpu: bool | None = None) -> Model:
  """Their model with our weights, on the GPU in bfloat16 where there is one.

  Args:
    params: None = random weights of their own, made where the model is.
    gpu: False = on the CPU in float32 all the same; None = what is there.
  """
  torch.set_num_threads(len(os.sched_getaffinity(0)))  # as XLA does
  gpu = torch.cuda.is_available() if gpu is None else gpu
  described = transformers.Qwen2_5_VLConfig.from_dict(model_config.to_hf(config))
  make = functools.partial(
    Model._from_config, described, attn_implementation="sdpa",
    dtype=torch.bfloat16 if gpu else torch.float32,
  )  # fmt: skip
  if params is None:
    with torch.device("cuda" if gpu else "cpu"):
      return make().eval()
  model = make()
  state = hf.export_state(config, params)
  with torch.no_grad():
    for name, p in model.named_parameters():
      p.copy_(torch.from_numpy(np.array(state.pop(hf.hub_name(name)), np.float32)))
  if state:
    raise ValueError(f"transformers lacks {sorted(state)[:5]}; its names have changed.")
  return model.to("cuda" if gpu else "cpu").eval()


def ceiling(n: int = 1024) -> Callable:
  """A square matmul in the dtype and on the device of `load`."""
  gpu = torch.cuda.is_available()
  dtype = torch.bfloat16 if gpu else torch.float32
  x = torch.randn(n, n, dtype=dtype, device="cuda" if gpu else "cpu")

  def run():
    x @ x
    if gpu:
      torch.cuda.synchronize()

  return run


# ---- Inputs --------------------------------------------------------------------------


def _tensors(model: Model, **arrays: np.ndarray) -> dict[str, torch.Tensor]:
  out = {}
  for name, x in arrays.items():
    x = torch.from_numpy(np.ascontiguousarray(x))
    if x.is_floating_point():
      x = x.to(model.dtype)
    out[name] = x.to(model.device)
  return out


def _pictures(pictures: Sequence) -> dict[str, np.ndarray]:
  """pixel_values and image_grid_thw of pictures one after the other; {} for none."""
  if not pictures:
    return {}
  return dict(
    pixel_values=np.concatenate([data.raster(p) for p in pictures]),
    image_grid_thw=np.array([p.grid for p in pictures], np.int64),
  )


def padded(model: Model, examples: Sequence) -> dict[str, torch.Tensor]:
  """A batch as TRL's and HF's collators make it: all as long as the longest."""
  B, T = len(examples), max(len(e.tokens) for e in examples)
  ids = np.zeros((B, T), np.int64)
  labels = np.full((B, T), IGNORED, np.int64)
  mask = np.zeros((B, T), np.int64)
  position = np.zeros((3, B, T), np.int64)
  for b, e in enumerate(examples):
    n = len(e.tokens)
    ids[b, :n], mask[b, :n], position[:, b, :n] = e.tokens, 1, e.position.T
    labels[b, :n] = np.where(e.weight > 0, e.tokens, IGNORED)
  pictures = [p for e in examples for _, p in e.vision]
  return _tensors(
    model, input_ids=ids, labels=labels, attention_mask=mask, position_ids=position,
    **_pictures(pictures),
  )  # fmt: skip


def full(model: Model, rows: Sequence) -> dict[str, torch.Tensor]:
  """Rows of one length, with no mask: SDPA may take its causal kernel."""
  batch = padded(model, rows)
  del batch["attention_mask"]
  return batch


def packed(
  model: Model, examples: Sequence, row: tuple[int, int, int]
) -> list[dict[str, torch.Tensor]]:
  """Our packed rows for SDPA: a block-diagonal causal mask, position ids given."""
  B, T, P = row
  bins = [[examples[i] for i in b] for b in pack.first_fit(examples, T, P)]
  batches = []
  for group in (bins[i : i + B] for i in range(0, len(bins), B)):
    rows = pack.collate(group, T, P, num_rows=len(group))
    segment = rows["segment"]
    same = segment[:, :, None] == segment[:, None]
    mask = (same & np.tri(T, dtype=bool))[:, None]
    labels = np.where(rows["weight"] > 0, rows["tokens"], IGNORED)
    batches.append(
      _tensors(
        model, input_ids=rows["tokens"].astype(np.int64),
        labels=labels.astype(np.int64), attention_mask=mask,
        position_ids=rows["position"].transpose(2, 0, 1).astype(np.int64),
        **_pictures([p for examples in group for e in examples for _, p in e.vision]),
      )
    )  # fmt: skip
  return batches


# ---- Model ---------------------------------------------------------------------------


def vision(model: Model, pictures: Sequence) -> Callable:
  """Features f32[pictures M D] of pictures of one grid."""
  inputs = _tensors(model, **_pictures(pictures))
  pixels, grid = inputs["pixel_values"], inputs["image_grid_thw"]

  def run():
    with torch.inference_mode():
      out = model.model.visual(pixels, grid_thw=grid).pooler_output
    return _numpy(out).reshape(len(pictures), -1, out.shape[-1])

  return run


def prefill(model: Model, rows: Sequence) -> Callable:
  """Logits f32[B V] after the last token of each row, its cache filled."""
  inputs = full(model, rows)
  del inputs["labels"]

  def run():
    with torch.inference_mode():
      out = model(**inputs, use_cache=True, logits_to_keep=1)
    return _numpy(out.logits[:, -1])

  return run


def generate(model: Model, context: np.ndarray, tokens: int) -> Callable:
  """Ids [B tokens] after text [B S] whose cache was filled beforehand; greedy."""
  ids = torch.from_numpy(context.astype(np.int64)).to(model.device)
  model.model.rope_deltas = None
  with torch.no_grad():
    cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values

  def run():
    if (extra := cache.get_seq_length() - (ids.shape[1] - 1)) > 0:
      cache.crop(-extra)  # what an earlier run appended
    model.model.rope_deltas = None
    out = model.generate(
      input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache,
      max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0,
      eos_token_id=None,
    )  # fmt: skip
    return out[:, ids.shape[1] :].cpu().numpy()

  return run


def _numpy(x: torch.Tensor) -> np.ndarray:
  return x.detach().float().cpu().numpy()


# ---- Training ------------------------------------------------------------------------


def _optimizer(model: Model, freeze_tower: bool) -> tuple[list, torch.optim.Optimizer]:
  model.train()
  model.model.visual.requires_grad_(not freeze_tower)
  own = [p for p in model.parameters() if p.requires_grad]
  # Fused, the default of transformers' Trainer; the rate is that of ours.py.
  adam = torch.optim.AdamW(
    own, lr=1e-12, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True
  )
  return own, adam


def train(model: Model, batches: Sequence[dict], *, freeze: bool = False) -> Callable:
  """One pass over `batches`, an AdamW update each -> (sum of token losses, norm)."""

  def run():
    own, adam = _optimizer(model, freeze) if "adam" not in held else held["adam"]
    held["adam"] = own, adam
    total = 0.0
    for batch in batches:
      loss = model(**batch, use_cache=False).loss
      loss.backward()
      norm = torch.nn.utils.clip_grad_norm_(own, 1.0)
      adam.step()
      adam.zero_grad(set_to_none=True)
      count = (batch["labels"][:, 1:] != IGNORED).sum()
      total = total + loss.detach() * count
    return np.array([float(total), float(norm)])

  held: dict[str, Any] = {}
  return run


def train_policy(model: Model, examples: Sequence, batch: int) -> Callable:
  """GRPO as TRL's trainer computes it, one update from micro-batches of `batch`.

  Prompts end and completions begin in one column; the head runs on the completions
  only; the loss is "dapo" with an epsilon of 0.2 and 0.28, ratio 1 (one update).
  """
  steps = [
    _completions(model, examples[i : i + batch]) for i in range(0, len(examples), batch)
  ]
  tokens = data.learned(examples)
  held: dict[str, Any] = {}

  def run():
    own, adam = _optimizer(model, False) if "adam" not in held else held["adam"]
    held["adam"] = own, adam
    total = 0.0
    for inputs, labels, weight, advantage in steps:
      keep = labels.shape[1]
      logits = model(**inputs, use_cache=False, logits_to_keep=keep + 1).logits[:, :-1]
      chosen = logits.gather(-1, labels[..., None])[..., 0]
      logp = chosen - logits.logsumexp(-1)
      with torch.no_grad():  # TRL reports it at every step
        spread = logits.log_softmax(-1)
        entropy = -(spread.exp() * spread).sum(-1)
      ratio = torch.exp(logp - logp.detach())
      clipped = ratio.clamp(1 - CLIP[0], 1 + CLIP[1])
      per_token = -torch.min(ratio * advantage, clipped * advantage)
      loss = (per_token * weight).sum() / tokens
      loss.backward()
      total = total + (entropy * weight).sum() / tokens
    norm = torch.nn.utils.clip_grad_norm_(own, 1.0)
    adam.step()
    adam.zero_grad(set_to_none=True)
    return np.array([float(total), float(norm)])

  return run


def _completions(model: Model, examples: Sequence):
  """Inputs, labels, weight and advantage of a micro-batch, prompts padded left."""
  # The first sampled token: what stands before it is the prompt.
  cuts = [int(np.flatnonzero(e.weight)[0]) for e in examples]
  left, right = max(cuts), max(len(e.tokens) - c for e, c in zip(examples, cuts))
  B = len(examples)
  ids = np.zeros((B, left + right), np.int64)
  mask = np.zeros((B, left + right), np.int64)
  position = np.zeros((3, B, left + right), np.int64)
  weight = np.zeros((B, right), np.float32)
  for b, (e, cut) in enumerate(zip(examples, cuts)):
    here = slice(left - cut, left - cut + len(e.tokens))
    ids[b, here], mask[b, here], position[:, b, here] = e.tokens, 1, e.position.T
    weight[b, : len(e.tokens) - cut] = e.weight[cut:]
  advantage = np.array([[e.advantage] for e in examples], np.float32)
  inputs = _tensors(
    model, input_ids=ids, attention_mask=mask, position_ids=position,
    **_pictures([p for e in examples for _, p in e.vision]),
  )  # fmt: skip
  other = _tensors(model, labels=ids[:, left:], weight=weight, advantage=advantage)
  return inputs, other["labels"], other["weight"].float(), other["advantage"].float()


# ---- Host and rollout ----------------------------------------------------------------


def preprocess(_: Model, codec: encode.Codec, photos: Sequence) -> Callable:
  """HF's PIL image processor with the codec's budget, one picture after the other."""
  fewest, most = codec.budgets["image"]
  processor = transformers.Qwen2VLImageProcessorPil(
    size={"shortest_edge": fewest, "longest_edge": most}
  )
  return lambda: [
    processor(images=[photo], return_tensors="np")["pixel_values"] for photo in photos
  ]


class _Forced(LogitsProcessor):
  """Leaves one token a row to be sampled: the next of its turn, then the end of turn."""

  def __init__(self, turns: Sequence[Sequence[int]], start: int, end: int):
    longest = max(map(len, turns))
    self._ids = torch.tensor([[*t, *[end] * (longest - len(t))] for t in turns])
    self._start = start

  def __call__(self, input_ids, scores):
    token = self._ids[:, input_ids.shape[1] - self._start].to(scores.device)
    return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0.0)


def rollout(
  model: Model, codec: encode.Codec, size: data.Size, turns: dict, batch: int
) -> Callable:
  """The script through HF `generate`, as a careful user would write the loop.

  `batch` rollouts at a time, left-padded.  A turn is one call of `generate` with its KV
  cache, for all that are not done; then their operations run in a pool of threads, and
  the next turn prefills the whole dialogues again, since rows grow by different lengths
  and pictures.  Pixels come from our own pipeline (equal to HF's, and faster), each
  picture prepared once.  -> (task, sample) -> trajectory.
  """
  tasks, load_media = data.tasks(size), data.loader(size)
  words = codec.tokenizer
  limits = dict(
    max_len=10**6,
    max_patches=10**6,
    max_turns=max(map(len, turns.values())),
    max_new_tokens=max(len(ids) for t in turns.values() for ids in t),
  )

  def run():
    model.eval()
    prompts = [encode.Conversation(codec, task, load_media) for task in tasks]
    waiting = [
      (task.id, sample, Episode(prompt.fork(sample), **limits))
      for task, prompt in zip(tasks, prompts)
      for sample in range(size.groups[1])
    ]
    done = {}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      for i in range(0, len(waiting), batch):
        active, turn = waiting[i : i + batch], 0
        while active:
          said = _generate(
            model,
            words,
            [e for *_, e in active],
            [turns[t, s][turn] for t, s, _ in active],
          )
          calling = []
          for (task, sample, episode), ids in zip(active, said):
            outcome = episode.feed(ids, [0.0] * len(ids), ids[-1] == words.im_end)
            if outcome == "operate":
              calling.append((task, sample, episode))
            else:
              done[task, sample] = episode.conversation.trajectory
          list(pool.map(lambda c: c[2].operate(), calling))
          active, turn = calling, turn + 1
    return done

  return run


def _generate(model, words, episodes: Sequence[Episode], forced) -> list[list[int]]:
  """One turn of every episode."""
  B, T = len(episodes), max(len(e.ids) for e in episodes)
  ids = np.full((B, T), words.endoftext, np.int64)
  mask = np.zeros((B, T), np.int64)
  for b, e in enumerate(episodes):
    ids[b, T - len(e.ids) :], mask[b, T - len(e.ids) :] = e.ids, 1
  pictures = [p for e in episodes for p in e.conversation.pixels]
  inputs = _tensors(
    model, input_ids=ids, attention_mask=mask,
    mm_token_type_ids=(ids == words.image_pad).astype(np.int64), **_pictures(pictures),
  )  # fmt: skip
  with torch.inference_mode():
    out = model.generate(
      **inputs, max_new_tokens=max(map(len, forced)), do_sample=True, temperature=1.0,
      top_k=0, top_p=1.0, eos_token_id=words.im_end, pad_token_id=words.endoftext,
      logits_processor=LogitsProcessorList([_Forced(forced, T, words.im_end)]),
    )[:, T:].tolist()  # fmt: skip
  ends = [
    row.index(words.im_end) + 1 if words.im_end in row else len(row) for row in out
  ]
  return [row[:end] for row, end in zip(out, ends)]


def logp(model: Model, example: encode.Example) -> np.ndarray:
  """Log-prob f32[n] of each token given those before it, all known; 0 at the first."""
  inputs = full(model, [example])
  del inputs["labels"]
  with torch.inference_mode():
    logits = model.eval()(**inputs, use_cache=False).logits[0].float()
  chosen = logits[:-1].log_softmax(-1).gather(-1, inputs["input_ids"][0, 1:, None])
  return np.concatenate([[0.0], _numpy(chosen[:, 0])])
