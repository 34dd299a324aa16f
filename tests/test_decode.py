"""Sampling, moves and the pieces of a prefill, on arrays."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import rest_slow

from pixel_jax.batch import Cache, Prompts
from pixel_jax.model import config as model_config
from pixel_jax.model import qwen2_5_vl
from pixel_jax.rollout import decode
from pixel_jax.rollout.decode import Wish

B, V, S = 8, 40, 32
END = 3


@pytest.fixture(scope="module")
def model():
  config = model_config.tiny(V, scan_layers=True)  # compiles faster
  params = qwen2_5_vl.init(config, jax.random.key(1))
  params["text"]["head"]["w"] = params["text"]["head"]["w"] * 2
  return config, params


def keys(n, start=0):
  return np.stack([np.arange(start, start + n), np.zeros(n)], 1).astype(np.uint32)


# ---- Sampling ------------------------------------------------------------------------

SAMPLE = jax.jit(decode.sample)


def test_frequencies_follow_the_softmax_at_the_temperature():
  logits = jnp.log(jnp.array([0.5, 0.3, 0.2, 1e-30]))
  n = 20_000
  token, logp = SAMPLE(jnp.tile(logits, (n, 1)), keys(n), Wish(temperature=2.0).rows(n))
  p = np.sqrt([0.5, 0.3, 0.2])
  p /= p.sum()
  got = np.bincount(token, minlength=4)[:3] / n
  np.testing.assert_allclose(got, p, atol=4 * 0.5 / n**0.5)
  np.testing.assert_allclose(np.exp(logp), p[np.asarray(token)], rtol=1e-5)


@pytest.mark.parametrize("V", [3, 128, 300])
def test_every_token_is_drawn_at_its_rate(V):
  """Over several blocks of the vocabulary; what cannot be said never is."""
  rng = np.random.default_rng(V)
  p = rng.exponential(size=V) ** 2
  p[rng.permutation(V)[: V // 3]] = 0
  p /= p.sum()
  n = 100_000
  logits = jnp.tile(jnp.log(jnp.asarray(p, jnp.float32)), (n, 1))
  token, logp = SAMPLE(logits, keys(n), Wish().rows(n))
  got = np.bincount(token, minlength=V)
  assert (got[p == 0] == 0).all()
  np.testing.assert_allclose(np.exp(logp), p[np.asarray(token)], rtol=1e-5)
  seen = p > 0
  chi2 = ((got - n * p)[seen] ** 2 / (n * p)[seen]).sum()
  free = seen.sum() - 1
  assert chi2 < free + 5 * (2 * free) ** 0.5


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 12), st.floats(0.01, 1), st.floats(0.3, 3))
def test_truncation_keeps_the_likeliest_and_reports_the_full_logp(
  seed, top_k, top_p, temperature
):
  logits = np.random.default_rng(seed).normal(size=(16, 10)).astype(np.float32) * 2
  wishes = Wish(temperature, top_p, top_k).rows(16)
  with jax.disable_jit():  # step by step, as log_softmax below
    token, logp = decode.sample(jnp.asarray(logits), keys(16, seed), wishes)
  full = np.asarray(jax.nn.log_softmax(jnp.asarray(logits) / temperature))
  for row, t, lp in zip(full, np.asarray(token), np.asarray(logp)):
    assert lp == row[t]
    order = np.argsort(-row)
    kept = order[: top_k or None]
    p = np.exp(row[kept]) / np.exp(row[kept]).sum()
    before = np.cumsum(p) - p  # mass of what is likelier
    assert t in kept and before[list(kept).index(t)] < top_p + 1e-5


@pytest.mark.slow
def test_greedy_and_tiny_top_p_agree():
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(B, V)), jnp.float32)
  best = logits.argmax(-1)
  assert (SAMPLE(logits, keys(B), Wish(0.0).rows(B))[0] == best).all()
  assert (SAMPLE(logits, keys(B), Wish(top_p=1e-6).rows(B))[0] == best).all()
  assert (SAMPLE(logits, keys(B), Wish(top_k=1).rows(B))[0] == best).all()


def test_banned_ids_stay_banned_under_truncation():
  logits = jnp.where(jnp.arange(V) < V - 2, -jnp.inf, jnp.zeros((B, V)))
  token, logp = SAMPLE(logits, keys(B), Wish(top_k=5, top_p=0.9).rows(B))
  assert (token >= V - 2).all()
  np.testing.assert_allclose(logp, np.log(0.5), rtol=1e-6)


def test_every_row_is_sampled_as_it_wishes():
  """Beside rows of other wishes each draws what it draws among its own kind."""
  logits = jnp.asarray(np.random.default_rng(1).normal(size=(B, V)), jnp.float32)
  wishes = [Wish(), Wish(0.0), Wish(0.5, 0.7), Wish(2.0, 1.0, 3)]
  wishes = [wishes[i % 4] for i in range(B)]
  mixed = decode.Sampling(*map(np.array, zip(*wishes)))
  token, logp = SAMPLE(logits, keys(B), mixed)
  for wish in set(wishes):
    mine = [i for i in range(B) if wishes[i] == wish]
    alone = SAMPLE(logits, keys(B), wish.rows(B))
    np.testing.assert_array_equal(token[np.array(mine)], alone[0][np.array(mine)])
    np.testing.assert_array_equal(logp[np.array(mine)], alone[1][np.array(mine)])


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}])
def test_sampling_is_checked(bad):
  with pytest.raises(ValueError, match="0 takes the likeliest token"):
    Wish(**bad).check()


# ---- Decoding ------------------------------------------------------------------------


def slots(ids, budget, start=0):
  """Where slots stand after prompts of `ids` i32[B n], fed but for the last."""
  n = ids.shape[1]
  return decode.Slots(
    length=np.full(B, n - 1, np.int32),
    last=ids[:, -1],
    position=np.full(B, n - 1, np.int32),
    budget=np.asarray(budget, np.int32),
    key=keys(B, start),
    sampling=Wish().rows(B),
  )


def prefill(model, ids, pieces):
  """A cache that holds ids[:, :-1], fed in pieces."""
  config, params = model
  cache = qwen2_5_vl.init_cache(config, B, S)
  bank = jnp.zeros((4, config.text.width))
  at = 0
  for n in pieces:
    T = n + 2  # two tokens of padding
    tokens, position = np.zeros((B, T), np.int32), np.zeros((B, T, 3), np.int32)
    tokens[:, :n] = ids[:, at : at + n]
    position[:, :n] = np.arange(at, at + n)[:, None]
    rows = np.arange(B)[::-1].astype(np.int32)  # any order of rows
    turns = decode.Turns(
      slot=rows,
      length=np.full(B, at, np.int32),
      count=np.full(B, n, np.int32),
      tokens=tokens[rows],
      position=position,
      feature=np.full((B, T), -1, np.int32),
    )
    extend = jax.jit(decode.extend, static_argnames=("config", "view"))
    cache = extend(config, params, cache, turns, bank, view=S)
    at += n
  assert at == ids.shape[1] - 1
  return cache


def alone(cache):
  """Nobody has a prompt: all that was said lies in the cache itself."""
  nothing = jnp.zeros((cache.k.shape[0], 1, *cache.k.shape[2:]))
  zero = np.zeros(1, np.int32)
  lane = np.full((1, 1), B, np.int32)
  return Prompts(nothing, nothing, zero, np.zeros(B, np.int32), lane)


DECODE = jax.jit(decode.decode, static_argnames=("config", "stops", "lanes"))


def send(
  model, cache, standing, chunk=6, banned=(), forced=None, lanes=B, prompts=None,
  sampling=None, who=None, **kwargs,
):  # fmt: skip
  """(cache, slots, tokens, log-probs, count)"""
  config, params = model
  mask = np.zeros(V, bool)
  mask[list(banned)] = True
  forced = np.full((B, chunk), -1, np.int32) if forced is None else forced
  kwargs = dict(stops=(END,), lanes=lanes) | kwargs
  if sampling:
    standing = standing.replace(sampling=sampling.rows(B))
  if banned and who is None:
    who = np.ones(B, bool)
  if who is not None:
    own = standing.sampling.replace(is_banned=who)
    standing = standing.replace(sampling=own)
  banned = mask if banned else None
  prompts = prompts or alone(cache)
  return DECODE(config, params, cache, prompts, standing, forced, banned, **kwargs)


def play(*args, **kwargs):
  """(cache, tokens, log-probs, count)"""
  cache, _, *out = send(*args, **kwargs)
  return cache, *(np.asarray(x) for x in out)


@pytest.fixture(scope="module")
def ids():
  return np.random.default_rng(2).integers(4, V, (B, 9)).astype(np.int32)


def full_logits(model, rows):
  config, params = model
  n = len(rows[0])
  position = jnp.tile(jnp.arange(n)[None, :, None], (len(rows), 1, 3))
  extend = jax.jit(qwen2_5_vl.extend, static_argnums=0)
  hidden, _ = extend(
    config,
    params,
    qwen2_5_vl.init_cache(config, len(rows), n),
    rows,
    position,
    np.full(len(rows), n, np.int32),
    np.full((len(rows), n), -1, np.int32),
  )
  return np.array(qwen2_5_vl.logits(config, params, hidden))


def test_only_who_is_banned_is(model, ids):
  """Beside those who are, the others draw what they draw without a ban, bit for bit."""
  who, heat = np.arange(B) % 2 == 0, Wish(1.0)
  cache = prefill(model, ids, (8,))
  standing, ban = slots(ids, [6] * B), range(4, 30)
  _, free, free_logp, _ = play(model, cache, standing, sampling=heat)
  _, mixed, logp, _ = play(model, cache, standing, sampling=heat, banned=ban, who=who)
  assert not np.isin(mixed[who], ban).any() and np.isin(free[who], ban).any()
  np.testing.assert_array_equal(mixed[~who], free[~who])
  np.testing.assert_array_equal(logp[~who], free_logp[~who])


@pytest.mark.parametrize(("pieces",), rest_slow([((3, 5),), ((8,),)]))
def test_greedy_equals_the_argmax_of_a_full_pass(model, ids, pieces):
  cache = prefill(model, ids, pieces)
  _, tokens, logp, count = play(
    model, cache, slots(ids, [6] * B), sampling=Wish(0.0), banned=[END]
  )
  assert (count == 6).all()
  scores = full_logits(model, np.concatenate([ids, tokens], 1))[:, 8:14]
  scores[:, :, END] = -np.inf
  assert (scores.argmax(-1) == tokens).all()
  full = np.asarray(jax.nn.log_softmax(scores))
  np.testing.assert_allclose(logp, full.max(-1), atol=1e-5)


def test_budget_stop_and_idle_slots(model, ids):
  cache = prefill(model, ids, (8,))
  budget = [0, 1, 2, 3, 4, 5, 6, 60]
  after, tokens, _, count = play(model, cache, slots(ids, budget))
  ended = [(END in row[:n]) for row, n in zip(tokens, count)]
  for b, n, row, end in zip(budget, count, tokens, ended):
    assert n == min(b, 6) or end
    assert END not in row[: n - 1] if n else True
    assert (row[n:] == 0).all()
  np.testing.assert_array_equal(after.length, 8 + count)
  # An idle slot's cache is left alone.
  np.testing.assert_array_equal(after.k[:, 0], cache.k[:, 0])


def test_two_chunks_equal_one(model, ids):
  cache = prefill(model, ids, (8,))
  one = play(model, cache, slots(ids, [12] * B), chunk=12, banned=[END])
  first = play(model, cache, slots(ids, [12] * B), chunk=5, banned=[END])
  then = slots(np.concatenate([ids, first[1]], 1), [7] * B)
  second = play(model, first[0], then, chunk=7, banned=[END])
  for i in (1, 2):
    np.testing.assert_array_equal(one[i], np.concatenate([first[i], second[i]], axis=1))


@pytest.mark.slow
def test_a_chunk_follows_without_the_host(model, ids):
  """Where slots stand after a chunk is known on the device: stops, budgets, all."""
  cache, budget = prefill(model, ids, (8,)), [0, 1, 4, 5, 6, 9, 12, 12]
  one = play(model, cache, slots(ids, budget), chunk=12)
  cache, standing, *first = send(model, cache, slots(ids, budget), chunk=5)
  cache, standing, *second = send(model, cache, standing, chunk=7)
  tokens = np.concatenate([first[0], second[0]], axis=1)
  np.testing.assert_array_equal(one[1], tokens)
  np.testing.assert_array_equal(one[3], np.asarray(first[2]) + second[2])
  np.testing.assert_array_equal(standing.length, 8 + one[3])
  assert not np.asarray(standing.budget).any() and END in tokens


@pytest.mark.slow
def test_lanes_above_rest(model, ids):
  cache = prefill(model, ids, (8,))
  whole = send(model, cache, slots(ids, [4] * B))
  some = send(model, cache, slots(ids, [4] * B), lanes=B // 2)
  assert some[2].shape == (B // 2, 6)
  np.testing.assert_array_equal(some[2], whole[2][: B // 2])
  np.testing.assert_allclose(some[3], whole[3][: B // 2], rtol=0, atol=1e-4)
  np.testing.assert_array_equal(some[0].k[:, B // 2 :], cache.k[:, B // 2 :])
  assert (np.asarray(some[1].budget)[B // 2 :] == 4).all()


def test_place_moves_and_begins(ids):
  old = slots(ids, range(B))
  source = np.arange(B)
  source[1] = 6
  new = np.arange(B) == 2
  out = decode.place(
    jax.tree.map(jnp.asarray, old), source, new, slots(ids, [9] * B, 50)
  )
  np.testing.assert_array_equal(out.budget, [0, 6, 9, 3, 4, 5, 6, 7])
  np.testing.assert_array_equal(out.key[:, 0], [0, 6, 52, 3, 4, 5, 6, 7])


def test_forced_tokens_are_said_with_the_models_logp(model, ids):
  cache = prefill(model, ids, (8,))
  rng = np.random.default_rng(4)
  forced = np.where(rng.random((B, 6)) < 0.6, rng.integers(4, V, (B, 6)), -1)
  forced[0], forced[1] = -1, [9, END, 9, 9, 9, 9]
  _, tokens, logp, count = play(
    model, cache, slots(ids, [6] * B), forced=forced, sampling=Wish(0.7)
  )
  said = np.arange(6) < count[:, None]
  assert (tokens == forced)[said & (forced >= 0)].all() and count[1] == 2
  scores = full_logits(model, np.concatenate([ids, tokens], 1))[:, 8:14] / 0.7
  full = np.asarray(jax.nn.log_softmax(scores))
  expected = np.take_along_axis(full, tokens[..., None], axis=2)[..., 0]
  # Unlikely tokens have log-probs of -10, known to 1e-6 of themselves.
  np.testing.assert_allclose(logp[said], expected[said], rtol=2e-6, atol=1e-5)
  # What is not forced is drawn as if nothing were: the first turns are the same.
  _, free, *_ = play(model, cache, slots(ids, [6] * B), sampling=Wish(0.7))
  assert (free[0] == tokens[0]).all()


def test_ban(model, ids):
  cache = prefill(model, ids, (8,))
  banned = range(4, 30)
  _, tokens, logp, count = play(model, cache, slots(ids, [4] * B), banned=banned)
  assert not np.isin(tokens, banned).any() and count.min() >= 1
  # The log-prob is that of the distribution under the ban.
  scores = full_logits(model, np.concatenate([ids, tokens], 1))[:, 8]
  scores[:, list(banned)] = -np.inf
  full = np.asarray(jax.nn.log_softmax(scores))
  np.testing.assert_allclose(logp[:, 0], full[np.arange(B), tokens[:, 0]], atol=1e-5)


def test_a_row_does_not_depend_on_the_others(model, ids):
  cache = prefill(model, ids, (8,))
  whole = play(model, cache, slots(ids, [6] * B))
  order = np.random.default_rng(0).permutation(B)
  moved = prefill(model, ids[order], (8,))
  standing = slots(ids[order], [6] * B)
  standing = standing.replace(key=keys(B)[order])
  mixed = play(model, moved, standing)
  for i in (1, 2, 3):
    np.testing.assert_array_equal(whole[i][order], mixed[i])


# ---- Prompts -------------------------------------------------------------------------


def share(model, prompts, rows):
  """(an empty cache, prompts i32[P n] that slot b goes on from by rows[b], lengths)"""
  config, _ = model
  P, n = prompts.shape
  filled = prefill(model, np.resize(prompts, (B, n)), (n - 1,))
  lane = np.full((P, max(collections.Counter(rows).values())), B, np.int32)
  for p in range(P):
    slots = [b for b in range(B) if rows[b] == p]
    lane[p, : len(slots)] = slots
  length = np.full(P, n - 1, np.int32)
  k, v = (x[:, :P, :, :16] for x in (filled.k, filled.v))
  return qwen2_5_vl.init_cache(config, B, S), Prompts(
    k, v, length, np.array(rows), lane
  )


def test_sequences_go_on_from_prompts_they_share(model):
  """As if each had its own: tokens, log-probs, keys, and what operations return."""
  rng = np.random.default_rng(6)
  stored = rng.integers(4, V, (3, 9)).astype(np.int32)
  rows = [0, 2, 0, 1, 2, 0, 0, 2]
  ids = stored[rows]
  whole = prefill(model, ids, (8,))
  standing = slots(ids, [5] * B)
  one = play(model, whole, standing, banned=[END])
  own, prompts = share(model, stored, rows)
  mine = standing.replace(length=np.zeros(B, np.int32))
  two = play(model, own, mine, banned=[END], prompts=prompts)
  np.testing.assert_array_equal(one[1], two[1])
  np.testing.assert_allclose(one[2], two[2], rtol=0, atol=1e-5)
  np.testing.assert_array_equal(two[0].length, 5)
  # A turn of three that lies behind: keys and values come out alike.
  new = rng.integers(4, V, (B, 3)).astype(np.int32)
  config, params = model
  extend = jax.jit(decode.extend, static_argnames=("config", "view"))
  bank = jnp.zeros((4, config.text.width))
  behind = np.full(B, 8 + 5, np.int32)
  position = np.broadcast_to((behind[:, None] + np.arange(3))[..., None], (B, 3, 3))
  turns = decode.Turns(
    slot=np.arange(B, dtype=np.int32), length=behind, count=np.full(B, 3, np.int32),
    tokens=new, position=position, feature=np.full((B, 3), -1, np.int32),
  )  # fmt: skip
  a = extend(config, params, one[0], turns, bank, view=S)
  turns = turns.replace(length=behind - 8)
  b = extend(config, params, two[0], turns, bank, prompts, view=12)
  np.testing.assert_allclose(a.k[..., 8:16, :], b.k[..., :8, :], rtol=0, atol=1e-5)
  np.testing.assert_allclose(a.v[..., 8:16, :], b.v[..., :8, :], rtol=0, atol=1e-5)


def test_a_sequence_does_not_depend_on_who_shares_its_prompt(model):
  rng = np.random.default_rng(7)
  stored = rng.integers(4, V, (4, 9)).astype(np.int32)
  rows = [0, 0, 1, 1, 2, 2, 3, 3]
  out = []
  for order in (np.arange(B), rng.permutation(B)):
    own, prompts = share(model, stored, [rows[i] for i in order])
    standing = slots(stored[rows][order], [6] * B).replace(
      length=np.zeros(B, np.int32), key=keys(B)[order]
    )
    played = play(model, own, standing, prompts=prompts)
    out.append([x[np.argsort(order)] for x in played[1:]])
  for a, b in zip(*out):
    np.testing.assert_array_equal(a, b)


# ---- Moves ----------------------------------------------------------------------------


def test_moves_copy_in_the_given_order_and_no_more():
  rng = np.random.default_rng(0)
  k, v = rng.normal(size=(2, 2, B, 1, 6, 3)).astype(np.float32)
  cache = Cache(k=jnp.asarray(k), v=jnp.asarray(v), length=jnp.zeros(B, jnp.int32))
  source, target = np.array([1, 1, 4, 0]), np.array([2, 0, 5, 7])
  length = np.array([1, 4, 5, 6])
  move = jax.jit(decode.move, static_argnames="size")
  out = move(cache, source, target, length, 3, size=4)
  for got, x in ((out.k, k), (out.v, v)):
    expected = x.copy()
    for s, t, n in zip(source[:3], target[:3], (4, 4, 6)):  # whole pieces
      expected[:, t, :, :n] = x[:, s, :, :n]
    np.testing.assert_array_equal(got, expected)
