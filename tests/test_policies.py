"""StreamingLLM, H2O, Scissorhands and FastGen against brute force over lists of tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import policy_oracles as oracles
import pytest
import variants
from policy_cases import B, H, K, N, T, alone, kept, step, tokens

import kvattn
from kvattn.attend.rules import Rules
from kvattn.attend.step import Step, _measured, nothing
from kvattn.attend.tokens import PerHead
from kvattn.masks import Mask
from kvattn.policies import Context, scored

F32 = 1e-5


def run(policy, q, k, v, chunks, *, implementation="xla", rope=None, ids=None, slopes=None, capacity=None, check=True):
    """Feeds the tokens in chunks; returns outputs and the cache."""
    cache = kvattn.KVCache.create(len(q), k.shape[2], H, capacity=capacity, policy=policy, dtype=jnp.float32)
    outs, i = [], 0
    for n in chunks:
        new = (jnp.asarray(x[:, i : i + n], jnp.float32) for x in (q, k, v))
        more = {} if ids is None else {"token_ids": jnp.asarray(ids[:, i : i + n])}
        more |= {} if slopes is None else {"alibi_slopes": jnp.asarray(slopes, jnp.float32)}
        out, cache = step(implementation, rope)(*new, cache, **more)
        outs.append(np.asarray(out))
        i += n
    return np.concatenate(outs, 1), cache.check() if check else cache


def check_rows(policy, oracle, prompt, seed, *, ids=None, sharp=1.5, **how):
    """Every row of a batch against brute force: outputs and kept sets. `prompt`: its length, or those of chunks."""
    q, k, v = tokens(seed, sharp)
    chunks = [prompt] if isinstance(prompt, int) else prompt
    chunks = [n for n in chunks if n] + [1] * (T - sum(chunks))
    out, cache = run(policy, q, k, v, chunks, ids=ids, **how)
    for row in range(B):
        expected, sets, *choices = oracle(q[row], k[row], v[row], prompt, *(() if ids is None else (ids[row],)))
        assert kept(cache, row) == sets, (policy, prompt, row)
        np.testing.assert_allclose(out[row], expected, atol=F32)
        if choices:
            assert np.asarray(cache.state.choice)[row].tolist() == choices[0]
    return cache


def cases(quick, slow, seeds=10):
    """(settings, prompt, seed): the quick ones with one seed, the rest, and all with more seeds, marked slow."""
    every = [(*case, seed) for seed in range(seeds) for case in quick + slow]
    mark = lambda case: () if case[-1] == 0 and case[:-1] in quick else pytest.mark.slow
    return [pytest.param(*case, marks=mark(case)) for case in every]


H2OS = cases([((5, 4), 0), ((5, 4), 25), ((0, 5), 7)], [((6, 0), 25), ((1, 1), 1), ((6, 0), 0), ((5, 4), 1)])
SCISSORS = cases(
    [((8, 3, 5, 4), 25), ((7, 2, 17, 3), 0), ((6, 4, 24, None), 9)],
    [((10, 0, 8, 1), 1), ((10, 0, 8, 1), 25), ((1, 0, 3, None), 9), ((1, 0, 3, None), 0), ((8, 3, 5, 4), 0)],
)
FASTGENS = cases([(0.3, 9), (0.6, 25)], [(0.6, 9), (0.9, 25)])


@pytest.mark.parametrize(("sizes", "prompt", "seed"), H2OS)
def test_h2o_keeps_what_brute_force_keeps(sizes, prompt, seed):
    check_rows(kvattn.H2O(*sizes), lambda *a: oracles.h2o(*a, *sizes), prompt, seed)


def test_h2o_by_the_reference():
    check_rows(kvattn.H2O(5, 4), lambda *a: oracles.h2o(*a, 5, 4), 7, 3, implementation="reference")


@pytest.mark.parametrize(("sizes", "prompt", "seed"), SCISSORS)
def test_scissorhands_keeps_what_brute_force_keeps(sizes, prompt, seed):
    budget, recent, history, drop = sizes
    policy = kvattn.Scissorhands(budget, recent, history, drop)
    drop = max(budget // 2, 1) if drop is None else drop
    cache = check_rows(policy, lambda *a: oracles.scissorhands(*a, budget, recent, history, drop), prompt, seed)
    assert np.all(np.asarray(cache.kept) <= budget)
    assert np.all(np.asarray(cache.kept) >= budget + 1 - drop)


RAGGED = [[6, 4, 5], [1, 1, 0], [2, 6, 3], *[[1, 1, 1], [1, 0, 1]] * 9, [4, 6, 2], *[[1, 1, 1]] * 5, [2, 3, 5]]
"""New tokens of three rows, step by step."""


def drawn(seed=41):
    """Attention of all of them by two heads: some tokens are heavy for a while, and light or in between again."""
    total = np.sum(RAGGED, axis=0)
    rng, most = np.random.default_rng(seed), max(total)
    weight = rng.choice([1, 5, 12], (3, 2, -(-most // 6), most))
    return total, np.repeat(weight, 6, axis=2)[:, :, :most] * rng.uniform(0.4, 1, (3, 2, most, most))


def check_alone(policy, oracle, **how):
    """A policy that is told of drawn attention, in chunks and steps of rows of different lengths, against a list."""
    total, weights = drawn()
    state = alone(policy, weights, RAGGED, **how)
    for row, n in enumerate(total):
        expected = oracle(row, oracles.Drawn(weights[row, :, :n, :n]), [x[row] for x in RAGGED])[1]
        got = np.asarray(state.positions)[row]
        assert [set(p[p >= 0].tolist()) for p in got] == expected, (policy, row)
        if getattr(state, "cache_positions", None) is not None:
            where = np.asarray(state.cache_positions)[row]
            for positions, places in zip(got, where, strict=True):
                expected = [sorted(positions[positions >= 0]).index(p) if p >= 0 else -1 for p in positions]
                assert places.tolist() == expected


def test_scissorhands_alone():
    """Records are one byte and a bit long, so queries are forgotten soon."""
    sizes = 8, 3, 9, 4
    oracle = lambda row, attend, chunks: oracles.scissorhands(attend, None, None, chunks, *sizes)
    check_alone(kvattn.Scissorhands(*sizes, positions_in="cache"), oracle)


@pytest.mark.parametrize(
    ("prompt", "how"),
    [
        (7, {}),
        ([12, 5, 1, 6], {}),
        pytest.param([12, 5, 1, 6], {"implementation": "reference"}, marks=pytest.mark.slow),
        pytest.param(0, {}, marks=pytest.mark.slow),
    ],
)
def test_h2o_by_places_in_the_cache(prompt, how):
    oracle = lambda *a: oracles.h2o(*a, 5, 4, in_cache=True)
    policy = kvattn.H2O(5, 4, positions_in="cache")
    check_rows(policy, oracle, prompt, 1, rope=kvattn.RoPE(H), **how)
    slopes = np.array([1.0, 0.5, 0.25, 0.125])
    oracle = lambda *a: oracles.h2o(*a, 5, 4, in_cache=True, slopes=slopes)
    check_rows(policy, oracle, prompt, 1, slopes=slopes, **how)


def test_h2o_by_places_where_keys_are_rotated():
    """A chunk, then tokens."""
    oracle = lambda *a: oracles.h2o(*a, 5, 4, in_cache=True)
    check_rows(kvattn.H2O(5, 4, positions_in="cache"), oracle, 12, 1, rope=kvattn.RoPE(H))


@pytest.mark.parametrize(
    ("sizes", "prompt"),
    [((8, 3, 5, 4), [9, 6]), ((8, 3, 5, 4), 25), pytest.param((10, 0, 8, 1), 7, marks=pytest.mark.slow)],
)
def test_scissorhands_by_places_in_the_cache(sizes, prompt):
    policy = kvattn.Scissorhands(*sizes, positions_in="cache")
    oracle = lambda *a: oracles.scissorhands(*a, *sizes, in_cache=True)
    check_rows(policy, oracle, prompt, 2, rope=kvattn.RoPE(H))


class Told(kvattn.Scissorhands):
    """Measures what it is told of positions: of each slot its own, the lowest and the highest of the queries."""

    def measure(self, state, probs, q_positions, kv_positions, step):
        ends = (jnp.min(q_positions, axis=1), jnp.max(q_positions, axis=1))
        told = [kv_positions, *(x[:, None, None] for x in ends)]
        return jnp.stack([jnp.broadcast_to(x, probs.shape[:2] + probs.shape[3:]) for x in told], axis=-1)


def test_policies_are_told_true_positions():
    """Four of nine tokens have left, so what is seen at n came at n + 4; what is empty, and a pad, is nowhere."""
    cache = kvattn.KVCache.create(1, K, H, policy=Told(8, positions_in="cache"), dtype=jnp.float32)
    places = jnp.full((1, K, 9), -1, jnp.int32).at[:, :, :5].set(jnp.arange(5, dtype=jnp.int32))
    cache = cache.replace(lengths=jnp.asarray([9], jnp.int32), state=cache.state.replace(cache_positions=places))
    read = kvattn.KVCache.create(1, K, H, capacity=8, dtype=jnp.float32).replace(lengths=jnp.asarray([7], jnp.int32))
    asked = jnp.asarray([[5, 6, -1]], jnp.int32)
    chunk = Step(nothing, Rules(Mask(), 1.0, None), None, "right", "xla")
    request = chunk.rules.request(jnp.zeros((1, 3, N, H)), asked, read.view(), PerHead())
    context = Context(cache.lengths, jnp.asarray([2], jnp.int32), 3, cache.num_slots)
    told = _measured(chunk, [request], jnp.zeros((1, 3, N)), cache, context)
    expected = [[position, -1, 10] for position in (*range(4, 11), -1)]
    np.testing.assert_array_equal(told, [[expected] * K])


def test_places_in_the_cache_combine():
    """Codecs store unrotated keys; a window, which goes by true positions, is refused."""
    q, k, v = tokens(3, batch=2)
    for policy in (kvattn.H2O(5, 4, positions_in="cache"), kvattn.Scissorhands(9, 2, 9, positions_in="cache")):
        cache = kvattn.KVCache.create(2, K, H, policy=policy, codec=kvattn.Int8(), dtype=jnp.float32)
        plain = kvattn.KVCache.create(2, K, H, policy=policy, dtype=jnp.float32)
        for part in (slice(0, 9), slice(9, 10), slice(10, 14)):
            new = [jnp.asarray(x[:, part], jnp.float32) for x in (q, k, v)]
            out, cache = step("xla", kvattn.RoPE(H))(*new, cache)
            expected, plain = step("xla", kvattn.RoPE(H))(*new, plain)
            np.testing.assert_allclose(out, expected, atol=0.15)
        with pytest.raises(kvattn.errors.UnsupportedError, match="true positions"):
            kvattn.cached_attention(*new, plain, window=4)
        with pytest.raises(kvattn.errors.ConfigError, match="positions_in"):
            dataclasses.replace(policy, positions_in="text")


@pytest.mark.parametrize(("recovery", "prompt", "seed"), FASTGENS)
def test_fastgen_chooses_and_keeps_what_brute_force_does(recovery, prompt, seed):
    ids = np.random.default_rng(seed).integers(0, 6, size=(B, T))
    policy = kvattn.FastGen(recovery, special_tokens=(1,), punctuation_tokens=(2, 3))
    oracle = lambda q, k, v, prompt, ids: oracles.fastgen(q, k, v, prompt, ids, recovery, (1,), (2, 3), 0.3, 0.3)
    for sharp in (1.0, 2.5):
        check_rows(policy, oracle, prompt, seed, ids=ids, capacity=T, sharp=sharp)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_fastgen_keeps_the_same_after_a_token_and_after_a_chunk_of_one(seed):
    """Special tokens count towards the share of frequent ones in both."""
    ids = np.random.default_rng(seed).integers(0, 6, size=(B, T))
    policy = kvattn.FastGen(0.8, special_tokens=(1,), punctuation_tokens=(2, 3), frequent=0.4)
    q, k, v = (jnp.asarray(x, jnp.float32) for x in tokens(seed))
    _, cache = run(policy, q, k, v, [12], ids=ids, capacity=T)
    assert set(np.unique(cache.state.choice)) >= {2, 3}
    one, many = jax.tree.map(jnp.copy, cache), cache
    for t in range(12, T):
        now = slice(t, t + 1)
        _, one = step()(q[:, now], k[:, now], v[:, now], one, token_ids=jnp.asarray(ids[:, now]))
        pad = lambda x, now=now: jnp.concatenate([jnp.asarray(x[:, now]), jnp.zeros_like(x[:, now])], axis=1)
        _, many = step()(pad(q), pad(k), pad(v), many, token_ids=pad(jnp.asarray(ids)), num_new=jnp.ones(B, jnp.int32))
        assert [kept(one, row) for row in range(B)] == [kept(many, row) for row in range(B)]


def test_fastgen_takes_every_way():
    """Rows of special tokens, of punctuation, of few and many tokens that count, and even ones: each way is chosen."""
    rng = np.random.default_rng(0)
    # Of ten tokens so many are special, and so many punctuation.
    ids = np.stack(
        [rng.permutation([1] * s + [2] * p + [5] * (T - s - p)) for s, p in [(27, 1), (3, 25)] + [(3, 3)] * 6]
    )
    sharp = np.array([1, 1, 0.1, 2.5, 2.5, 1.5, 1, 0.5])[:, None, None, None]
    policy = kvattn.FastGen(0.85, special_tokens=(1,), punctuation_tokens=(2, 3))
    oracle = lambda q, k, v, prompt, ids: oracles.fastgen(q, k, v, prompt, ids, 0.85, (1,), (2, 3), 0.3, 0.3)
    cache = check_rows(policy, oracle, 10, 0, ids=ids, capacity=T, sharp=sharp)
    assert set(np.unique(cache.state.choice)) == {0, 1, 2, 3, 4}


def test_fastgen_rounds_shares_down():
    """Of prompts of 0 to 500 tokens, in hundredths: the product of 75 and 0.84 is 63, in float32 a little less."""
    prompt = np.arange(501)
    for hundredths in range(101):
        share = kvattn.FastGen()._share(hundredths / 100, jnp.asarray(prompt))
        np.testing.assert_array_equal(share, prompt * hundredths // 100, err_msg=str(hundredths))


def test_fastgen_takes_capacity_tokens_in_all():
    q, k, v = tokens(0, length=9)
    _, cache = run(kvattn.FastGen(0.01, (1,)), q, k, v, [8], ids=np.arange(8 * B).reshape(B, 8) % 8, capacity=8)
    assert np.asarray(cache.kept).max() < 8
    with pytest.raises(kvattn.errors.CapacityError):
        kvattn.cached_attention(*(jnp.asarray(x[:, 8:], jnp.float32) for x in (q, k, v)), cache, token_ids=[[0]] * B)


def test_fastgen_without_special_tokens_skips_their_way():
    ids = np.zeros((B, T), np.int64)
    policy = kvattn.FastGen(0.01, frequent=0.0, local=0.0)
    cache = check_rows(
        policy, lambda q, k, v, p, i: oracles.fastgen(q, k, v, p, i, 0.01, (), (), 0.0, 0.0), 9, 0, ids=ids, capacity=T
    )
    assert np.all(np.asarray(cache.state.choice) == 4), "nothing qualifies: everything is kept"


def test_fastgen_at_full_recovery_is_full_attention():
    q, k, v = tokens(1)
    chunks = [20] + [1] * (T - 20)
    out, cache = run(kvattn.FastGen(1.0), q, k, v, chunks, capacity=T)
    full, _ = run(kvattn.Full(), q, k, v, chunks, capacity=T)
    np.testing.assert_allclose(out, full, atol=F32)
    assert np.all(np.asarray(cache.kept) == T)


def test_fastgen_synthetic_heads():
    """A head on the first token, one on punctuation, one on its neighbours, one on all: the ways they should take."""
    length, features = 30, 16
    ids = np.zeros((1, length), np.int64)
    ids[0, 0], ids[0, 5::6] = 1, 2
    q, k = np.zeros((1, length, 4, features)), np.zeros((1, length, 4, features))
    q[..., 0] = 12.0
    k[0, 0, 0, 0] = 12.0  # head 0: the first token
    k[0, ids[0] == 2, 1, 0], k[0, 0, 1, 0] = 12.0, 12.0  # head 1: punctuation, the first token before there is any
    angle = np.arange(length) * 0.2
    q[0, :, 2] = k[0, :, 2] = 0
    q[0, :, 2, :2] = 40 * np.stack([np.cos(angle), np.sin(angle)], -1)  # head 2: near by
    k[0, :, 2, :2] = 40 * np.stack([np.cos(angle), np.sin(angle)], -1)
    cache = kvattn.KVCache.create(
        1, 4, features, capacity=40, policy=kvattn.FastGen(0.95, (1,), (2,), frequent=0.1), dtype=jnp.float32
    )
    q, k = (jnp.asarray(x, jnp.float32) for x in (q, k))
    _, cache = kvattn.cached_attention(q, k, k, cache, token_ids=jnp.asarray(ids))
    assert np.asarray(cache.state.choice)[0].tolist() == [0, 1, 3, 4]


@pytest.mark.parametrize(
    ("sizes", "chunks"),
    [
        ((2, 6), [1] * T),
        ((2, 6), [17, 1, 1, 11]),
        ((0, 5), [T]),
        *(pytest.param(s, [9, 1, 20], marks=pytest.mark.slow) for s in [(2, 6), (0, 5), (4, 1), (3, 40)]),
    ],
)
def test_streaming_sees_positions_in_the_cache(sizes, chunks):
    q, k, v = (x[:3] for x in tokens(5))
    slopes = np.array([0.5, 0.25, 0.125, 0.0625])
    rope = kvattn.RoPE(H)
    for kwargs, expect in (
        ({"rope": rope}, {}),
        ({"slopes": slopes}, {"slopes": slopes, "rotated": False}),
    ):
        out, cache = run(kvattn.StreamingLLM(*sizes), q, k, v, chunks, **kwargs)
        for row in range(3):
            expected, sets = oracles.streaming(q[row], k[row], v[row], *sizes, **expect)
            np.testing.assert_allclose(out[row], expected, atol=F32)
            assert kept(cache, row) == sets
    out, _ = run(kvattn.StreamingLLM(*sizes, positions_in="original"), q, k, v, chunks, rope=rope)
    expected = np.stack([oracles.streaming(q[r], k[r], v[r], *sizes, in_cache=False)[0] for r in range(3)])
    np.testing.assert_allclose(out, expected, atol=F32)


@pytest.mark.parametrize("window", [3, 7])
def test_streaming_within_a_window_of_the_call(window):
    """A call's window may hide some of the policy's, or some sinks: by the places they are seen from."""
    q, k, v = (x[:2, :14] for x in tokens(5))
    call = jax.jit(functools.partial(kvattn.cached_attention, implementation="reference", window=window))
    cache = kvattn.KVCache.create(2, K, H, policy=kvattn.StreamingLLM(2, 6), dtype=jnp.float32)
    for part in (slice(0, 13), slice(13, 14)):
        out, cache = call(*(jnp.asarray(x[:, part], jnp.float32) for x in (q, k, v)), cache)
        for row in range(2):
            expected, sets = oracles.streaming(q[row], k[row], v[row], 2, 6, rotated=False, sees=window)
            np.testing.assert_allclose(out[row], expected[part], atol=F32)
    assert [kept(cache, row) for row in range(2)] == [sets] * 2


@pytest.mark.parametrize(
    "policy",
    [
        kvattn.SlidingWindow(2**31 - 1),
        kvattn.SlidingWindow(2**31),
        kvattn.StreamingLLM(2, 2**31 - 1),
        kvattn.StreamingLLM(2**31 - 1, 2),
        kvattn.StreamingLLM(2**40, 2**40, positions_in="original"),
    ],
    ids=repr,
)
def test_a_window_beyond_the_capacity_is_full_attention(policy):
    """Also one that int32 cannot count."""
    q, k, v = tokens(8, batch=2)
    out, cache = run(policy, q, k, v, [9, 1, T - 10], capacity=T, rope=kvattn.RoPE(H))
    full, _ = run(kvattn.Full(), q, k, v, [9, 1, T - 10], capacity=T, rope=kvattn.RoPE(H))
    np.testing.assert_allclose(out, full, atol=F32)
    assert np.asarray(cache.positions).tolist() == [list(range(T))] * 2
    with pytest.raises(kvattn.errors.CapacityError):
        run(policy, q, k, v, [T, 1], capacity=T - 1)


def test_streaming_says_where_each_token_lies():
    """Sinks in their slots, the others in a ring behind them: against a list that is written token by token."""
    policy, slots = kvattn.StreamingLLM(2, 3), [-1] * 5
    for seen in range(14):
        got = policy.positions((), jnp.asarray([seen], jnp.int32), 5)
        assert got.tolist() == [slots], seen
        slots[seen if seen < 2 else 2 + (seen - 2) % 3] = seen


def test_a_window_of_the_call_bounds_sinks_too():
    """By the positions they are seen from: a mask that reaches 4 tokens back, of a window of 6 and 2 sinks."""
    q, kv = jnp.arange(12, dtype=jnp.int32)[None], jnp.arange(-1, 12, dtype=jnp.int32)[None, None]
    mask = kvattn.StreamingLLM(2, 6).mask().narrowed(4)
    assert (mask.window, mask.num_sinks) == (4, 0)
    for reach in (1, 4, 9):
        allowed = np.asarray(dataclasses.replace(kvattn.StreamingLLM(2, 6).mask(), reach=reach).allowed(q, kv))[0, 0]
        for i, j in np.ndindex(12, 13):
            p = j - 1
            assert allowed[i, j] == (0 <= p <= i and (p > i - 6 or p < 2) and p > i - reach), (reach, i, p)


def test_the_oracles_can_tell():
    """Positive control: the wrong variant of each method is further away than the tolerance."""
    q, k, v = (x[0] for x in tokens(5))
    right, _ = oracles.streaming(q, k, v, 2, 6)
    assert np.abs(right - oracles.streaming(q, k, v, 2, 6, in_cache=False)[0]).max() > 1e-2
    assert np.abs(right - oracles.streaming(q, k, v, 2, 7)[0]).max() > 1e-2
    assert oracles.h2o(q, k, v, 7, 5, 4)[1] != oracles.h2o(q, k, v, 7, 4, 5)[1]
    assert oracles.scissorhands(q, k, v, 7, 8, 3, 5, 4)[1] != oracles.scissorhands(q, k, v, 7, 8, 3, 50, 4)[1]


BUDGETED = [
    kvattn.StreamingLLM(4, T),
    kvattn.H2O(T // 2, T // 2),
    kvattn.Scissorhands(T),
    kvattn.FastGen(1.0),
    kvattn.SlidingWindow(T),
]


@pytest.mark.parametrize("policy", BUDGETED, ids=lambda p: type(p).__name__)
def test_a_budget_for_all_is_full_attention(policy):
    q, k, v = tokens(2)
    capacity = T if isinstance(policy, kvattn.FastGen) else None
    full, _ = run(kvattn.Full(), q, k, v, [9, *[1] * (T - 9)], capacity=T, rope=kvattn.RoPE(H))
    out, cache = run(policy, q, k, v, [9, *[1] * (T - 9)], capacity=capacity, rope=kvattn.RoPE(H))
    np.testing.assert_allclose(out, full, atol=F32)
    assert np.all(np.asarray(cache.kept) == T)


SMALL = [policy for policy in variants.POLICIES.values() if not policy.in_order]
each_small = pytest.mark.parametrize("policy", SMALL, ids=variants.name)


@pytest.mark.parametrize(
    "settings",
    [
        {"policy": kvattn.Full()},
        {"policy": kvattn.policies.OrderedWindow(3)},
        {"policy": kvattn.SlidingWindow(4)},
        {"policy": kvattn.Full(), "codec": kvattn.KIVI(bits=2, group_size=8, residual=8)},
    ],
    ids=lambda settings: "-".join(map(variants.name, settings.values())),
)
def test_a_few_tokens_at_a_time(settings):
    """Whether they are stored before they attend, as where that loses nothing, or after, shows in nothing."""
    new = [jnp.asarray(x, jnp.float32) for x in tokens(5, batch=2, length=18, heads=(2, 1))]
    before = kvattn.KVCache.create(2, 1, H, capacity=18, dtype=jnp.float32, **settings)
    copied = functools.partial(jax.tree.map, jnp.copy)  # a step donates
    _, before = step()(*(x[:, :12] for x in new), before, num_new=np.array([6, 6], np.int32))
    few, cache = step()(*(x[:, 6:11] for x in new), copied(before))
    padded, _ = step()(*(x[:, 6:] for x in new), copied(before), num_new=np.array([5, 5], np.int32))
    np.testing.assert_allclose(few, padded[:, :5], atol=1e-6)
    if "codec" in settings and settings["codec"].rows is not None:
        return  # a chunk attends to its own tokens as they came
    for t in range(6, 11):
        out, before = step()(*(x[:, t : t + 1] for x in new), before)
        np.testing.assert_allclose(few[:, t - 6], out[:, 0], atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, cache, before)


@each_small
@pytest.mark.parametrize(
    "heads", [(4, 2), *(pytest.param(h, marks=pytest.mark.slow) for h in [(2, 2), (4, 1)])], ids=["GQA", "MHA", "MQA"]
)
def test_output_is_attention_over_the_kept_tokens(policy, heads):
    """At every step: float64 attention over exactly the tokens that were kept before, and the new one."""
    q, k, v = tokens(3, batch=2, length=14, heads=heads)
    cache = kvattn.KVCache.create(2, heads[1], H, capacity=14, policy=policy, dtype=jnp.float32)
    group = heads[0] // heads[1]
    for t in range(14):
        # The tokens that leave a window or a ring leave before the new one attends.
        before = [[{*s, t} for s in kept(cache, row)] for row in range(2)]
        new = (jnp.asarray(x[:, t : t + 1], jnp.float32) for x in (q, k, v))
        out, cache = step()(*new, cache)
        if not policy.per_head:
            before = [kept(cache, row) for row in range(2)]
        for row in range(2):
            for n in range(heads[0]):
                seen = sorted(before[row][n // group])
                probs = oracles.softmax(k[row, seen, n // group] @ q[row, t, n] / np.sqrt(H))
                np.testing.assert_allclose(out[row, 0, n], probs @ v[row, seen, n // group], atol=F32)
        positions = np.asarray(cache.positions)
        assert all(len(set(p[p >= 0])) == np.sum(p >= 0) for p in positions.reshape(-1, positions.shape[-1]))


@each_small
def test_rows_of_a_batch_do_not_know_each_other(policy):
    q, k, v = tokens(4)
    chunks = [9] + [1] * 12
    out, cache = run(policy, q, k, v, chunks, capacity=T)
    q2, k2, v2 = (np.where(np.arange(B)[:, None, None, None] == 3, x, np.nan) for x in (q, k, v))
    out2, cache2 = run(policy, q2, k2, v2, chunks, capacity=T, check=False)
    np.testing.assert_array_equal(out[3], out2[3])
    np.testing.assert_array_equal(np.asarray(cache.positions)[..., :][3], np.asarray(cache2.positions)[3])


@pytest.mark.parametrize("policy", [kvattn.H2O(4, 3), kvattn.Scissorhands(8, 2, 9)], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("chunk", [1, 5])
def test_attention_that_is_nan(policy, chunk):
    """Refused at once; under jit recorded, the neighbours as they were."""
    q, k, v = (jnp.asarray(x[:2, :chunk], jnp.float32) for x in tokens(6))
    broken = q.at[1, -1, 0, 0].set(jnp.nan)
    cache = kvattn.KVCache.create(2, K, H, policy=policy, dtype=jnp.float32)
    with pytest.raises(kvattn.errors.RangeError, match=r"rows \[1\].*NaN"):
        kvattn.cached_attention(broken, k, v, cache)
    out, after = step()(broken, k, v, jax.tree.map(jnp.copy, cache))
    with pytest.raises(kvattn.errors.RangeError, match=r"rows \[1\].*score"):
        after.check()
    clean, _ = step()(q, k, v, cache)
    np.testing.assert_array_equal(out[0], clean[0])


@pytest.mark.parametrize("policy", [kvattn.H2O(4, 3), kvattn.Scissorhands(8, 2, 9)], ids=lambda p: type(p).__name__)
def test_a_heavy_key_never_leaves(policy):
    q, k, v = tokens(6, sharp=0.5)
    q[..., 0], k[..., 0] = 4.0, 0.0
    k[:, 2, :, 0] = 8.0
    _, cache = run(policy, q, k, v, [5] + [1] * (T - 5))
    assert all(2 in head for row in range(B) for head in kept(cache, row))


def test_of_equal_scores_the_lowest_position_leaves():
    zeros = np.zeros((1, 12, 1, H))
    # Equal keys and queries: attention is even, the earliest tokens got most of it, the recent ones are protected.
    q, k, v = (jnp.asarray(zeros, jnp.float32),) * 3
    scores = jnp.asarray([[[1.0, 0.5, 0.5, jnp.nan, 2.0]]])
    positions = jnp.asarray([[[4, 3, 1, 7, 0]]], jnp.int32)
    leaves = scored.lowest(scores, positions, positions >= 0)
    assert leaves[0, 0].tolist() == [False, False, False, True, False], "NaN leaves first"
    leaves = scored.lowest(scores, positions, (positions >= 0) & ~jnp.isnan(scores))
    assert leaves[0, 0].tolist() == [False, False, True, False, False], "of 0.5 and 0.5 position 1"
    best = scored.best(scores, positions, positions >= 0, 3)
    assert best[0, 0].tolist() == [True, True, False, False, True]
    cache = kvattn.KVCache.create(1, 1, H, policy=kvattn.Scissorhands(4, 0, 8, drop=2), dtype=jnp.float32)
    for t in range(5):
        _, cache = kvattn.cached_attention(q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1], cache)
    assert sorted(p for p in cache.positions[0, 0].tolist() if p >= 0) == [2, 3, 4]


@pytest.mark.parametrize("size", [1, 15, 31, 32, 100, 700])
def test_exactly_one_leaves(size):
    """Whatever the number of slots, among ties, infinities and NaN; nobody where there is no candidate."""
    rng = np.random.default_rng(size)
    scores = rng.choice([0.0, -0.0, 0.5, 1.0, np.inf, -np.inf, np.nan], size=(3, 4, size)).astype(np.float32)
    positions = np.stack([rng.permutation(size) for _ in range(12)]).reshape(3, 4, size).astype(np.int32)
    candidates = rng.random((3, 4, size)) < np.array([0.0, 0.3, 1.0])[:, None, None]
    leaves = np.asarray(jax.jit(scored.lowest)(scores, positions, candidates))
    for row in np.ndindex(3, 4):
        order = [(-np.inf if np.isnan(s) else s, p) for s, p in zip(scores[row], positions[row], strict=True)]
        there = [i for i in range(size) if candidates[row][i]]
        assert np.nonzero(leaves[row])[0].tolist() == ([min(there, key=lambda i: order[i])] if there else [])


def test_one_leaves_whatever_the_compiler_does():
    """Without optimisation XLA computes a score twice, with two results: somebody must leave nevertheless."""
    policy, group = kvattn.H2O(8, 2), 12
    call = jax.jit(kvattn.cached_attention, compiler_options={"xla_backend_optimization_level": 0})
    cache = kvattn.KVCache.create(1, K, H, policy=policy, dtype=jnp.float32)
    q, k, v = (jnp.asarray(x, jnp.float32) for x in tokens(0, 1.0, 1, 40, (group * K, K)))
    for t in range(40):
        _, cache = call(q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1], cache)
        assert np.asarray(cache.kept).tolist() == [[min(t + 1, policy.budget)] * K]


@pytest.mark.parametrize("history", [1, 8, 9, 49, 400])
def test_counts_of_records(history):
    """As many as bits are set, whatever the number of bytes."""
    records = np.random.default_rng(history).integers(0, 256, (2, 3, -(-history // 8), 5), np.uint8)
    records[0, 0] = 255
    counts = jax.jit(kvattn.Scissorhands(4, history=history)._counts)(jnp.asarray(records))
    np.testing.assert_array_equal(counts, np.unpackbits(records, axis=2).sum(axis=2))


def test_a_step_of_scissorhands_does_not_widen_its_records():
    cache = kvattn.KVCache.create(1, K, H, policy=kvattn.Scissorhands(2047, drop=1), dtype=jnp.float32)
    new = [jnp.zeros((1, 1, n, H), jnp.float32) for n in (N, K, K)]
    memory = kvattn.jit(kvattn.cached_attention).lower(*new, cache).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2 * cache.state.low.nbytes


def test_fastgen_keeps_all_of_a_row_that_starts_with_one_token():
    """However the token comes: alone, or in a chunk of pads."""
    ids = jnp.asarray(np.full((3, 4), 1))
    x = jnp.ones((3, 4, K, H), jnp.float32)
    policy = kvattn.FastGen(0.5, special_tokens=(1,))
    cache = kvattn.KVCache.create(3, K, H, capacity=8, policy=policy, dtype=jnp.float32)
    _, alone = kvattn.cached_attention(x[:, :1], x[:, :1], x[:, :1], cache, token_ids=ids[:, :1])
    _, padded = kvattn.cached_attention(x, x, x, cache, num_new=jnp.asarray([1, 4, 0]), token_ids=ids)
    assert np.asarray(alone.state.choice).tolist() == [[4] * K] * 3
    assert np.asarray(padded.state.choice).tolist() == [[4] * K, [0] * K, [-1] * K]


@each_small
def test_ragged_prompts(policy):
    """Right and left padded prompts keep what each row keeps alone."""
    q, k, v = tokens(7)
    real = np.array([0, 1, 5, 9, 13, 20, 20, 3])
    pad = lambda x, n: np.concatenate([x[:n], np.full((20 - n, *x.shape[1:]), np.nan)])
    left = lambda x, n: np.concatenate([np.full((20 - n, *x.shape[1:]), np.nan), x[:n]])
    whole = lambda how: (jnp.asarray(np.stack([how(x[r], real[r]) for r in range(B)]), jnp.float32) for x in (q, k, v))
    make = lambda batch: kvattn.KVCache.create(batch, K, H, capacity=T, policy=policy, dtype=jnp.float32)
    outs, caches = [], []
    for how, padding in ((pad, "right"), (left, "left")):
        out, cache = kvattn.cached_attention(*whole(how), make(B), num_new=real.astype(np.int32), padding=padding)
        outs.append(np.asarray(out))
        caches.append(cache)
    for row, n in enumerate(real):
        np.testing.assert_array_equal(outs[0][row, n:], 0)
        np.testing.assert_array_equal(outs[1][row, : 20 - n], 0)
        np.testing.assert_allclose(outs[1][row, 20 - n :], outs[0][row, :n], atol=1e-6)
        if n in (5, 13, 20):
            alone = (jnp.asarray(x[row : row + 1, :n], jnp.float32) for x in (q, k, v))
            out, cache = kvattn.cached_attention(*alone, make(1))
            np.testing.assert_allclose(outs[0][row, :n], out[0], atol=F32)
            assert kept(caches[0], row) == kept(caches[1], row) == kept(cache, 0)


@pytest.mark.slow
@pytest.mark.parametrize("policy", [p for p in SMALL if variants.capacity_of(p, 1) is None], ids=variants.name)
def test_twenty_thousand_steps(policy):
    """Memory is that of the first step, nothing is compiled again, the numbers stay finite."""
    cache = kvattn.KVCache.create(1, 1, H, policy=policy, dtype=jnp.float32)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 1, H)), jnp.float32)
    traces = []

    @kvattn.jit
    def thousand(x, cache):
        traces.append(1)

        def one(cache, i):
            out, cache = kvattn.cached_attention(x * jnp.cos(i), x * jnp.sin(i), x, cache)
            return cache, out

        return jax.lax.scan(one, cache, jnp.arange(1000, dtype=jnp.float32))[::-1]

    size = cache.nbytes
    for _ in range(20):
        out, cache = thousand(x, cache)
    assert len(traces) == 1
    assert cache.check().nbytes == size
    assert int(cache.lengths[0]) == 20_000
    assert bool(jnp.all(jnp.isfinite(out)))
    assert int(jnp.max(cache.kept)) <= cache.num_slots


BAD = [
    (lambda: kvattn.StreamingLLM(-1, 4), kvattn.errors.ConfigError, "num_sinks"),
    (lambda: kvattn.StreamingLLM(4, 0), kvattn.errors.RangeError, "window"),
    (lambda: kvattn.StreamingLLM(True, 4), kvattn.errors.DTypeError, "num_sinks"),
    (lambda: kvattn.StreamingLLM(4, 8, positions_in="text"), kvattn.errors.ConfigError, "positions_in"),
    (lambda: kvattn.H2O(0, 0), kvattn.errors.RangeError, "must keep something"),
    (lambda: kvattn.H2O(-1, 5), kvattn.errors.RangeError, "num_heavy"),
    (lambda: kvattn.KVCache.create(1, 1, 8, capacity=3, policy=kvattn.H2O(2, 2)), kvattn.errors.ConfigError, "budget"),
    (lambda: kvattn.Scissorhands(0), kvattn.errors.RangeError, "budget"),
    (lambda: kvattn.Scissorhands(-3), kvattn.errors.RangeError, "budget"),
    (lambda: kvattn.Scissorhands(4, drop=5), kvattn.errors.RangeError, "drop"),
    (lambda: kvattn.Scissorhands(4, history=0), kvattn.errors.RangeError, "history"),
    (lambda: kvattn.FastGen(0.0), kvattn.errors.RangeError, "recovery"),
    (lambda: kvattn.FastGen(float("nan")), kvattn.errors.RangeError, "recovery"),
    (lambda: kvattn.FastGen(0.9, frequent=1.2), kvattn.errors.RangeError, "frequent"),
    (lambda: kvattn.FastGen(0.9, special_tokens=(1.5,)), kvattn.errors.DTypeError, "special_tokens"),
    (lambda: kvattn.KVCache.create(1, 1, 8, policy=kvattn.SlidingWindow(2**31)), kvattn.errors.ConfigError, "capacity"),
    (lambda: kvattn.KVCache.create(1, 1, 8, policy=kvattn.StreamingLLM(1, 2**31)), kvattn.errors.ConfigError, "int32"),
    (lambda: kvattn.FastGen(0.9, special_tokens=3), kvattn.errors.DTypeError, "special_tokens"),
    (lambda: kvattn.FastGen(0.9, punctuation_tokens="ab"), kvattn.errors.DTypeError, "punctuation_tokens"),
    (lambda: kvattn.FastGen("a"), kvattn.errors.DTypeError, "recovery"),
    (lambda: kvattn.FastGen(True), kvattn.errors.DTypeError, "recovery"),
    (lambda: kvattn.FastGen(0.9, frequent="a"), kvattn.errors.DTypeError, "frequent"),
    (lambda: kvattn.FastGen(0.9, local=None), kvattn.errors.DTypeError, "local"),
    (lambda: kvattn.FastGen(0.9, local=-0.1), kvattn.errors.RangeError, "local"),
    (lambda: jax.eval_shape(kvattn.FastGen, 0.9), kvattn.errors.ConfigError, "recovery"),
    (lambda: jax.vmap(lambda i: kvattn.FastGen(0.9, (i,)))(jnp.arange(2)), kvattn.errors.ConfigError, "special_tokens"),
    (lambda: kvattn.KVCache.create(1, 1, 8, policy=kvattn.FastGen()), kvattn.errors.ConfigError, "capacity"),
]


@pytest.mark.wrong_types
@pytest.mark.parametrize(("make", "error", "text"), BAD)
def test_bad_settings(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_fastgen_asks_for_token_ids():
    x = jnp.ones((1, 2, 1, 8), jnp.float32)
    cache = kvattn.KVCache.create(1, 1, 8, capacity=4, policy=kvattn.FastGen(0.9, (1,)), dtype=jnp.float32)
    with pytest.raises(kvattn.errors.ConfigError, match="token_ids"):
        kvattn.cached_attention(x, x, x, cache)
    out, cache = kvattn.cached_attention(x, x, x, cache, token_ids=jnp.asarray([[1, 99]]))
    assert out.shape == x.shape


@pytest.mark.parametrize("policy", [kvattn.H2O(2, 2), kvattn.Scissorhands(4), kvattn.StreamingLLM(1, 3)], ids=repr)
def test_trim_needs_what_has_left(policy):
    x = jnp.ones((1, 1, 1, 8), jnp.float32)
    cache = kvattn.KVCache.create(1, 1, 8, policy=policy, dtype=jnp.float32)
    for _ in range(6):
        _, cache = kvattn.cached_attention(x, x, x, cache)
    with pytest.raises(kvattn.errors.UnsupportedError, match="let go"):
        cache.trim(1)
    trimmed = jax.jit(lambda c: c.trim(1))(cache)
    assert int(trimmed.lengths[0]) == 6
    with pytest.raises(kvattn.errors.UnsupportedError):
        trimmed.check()


def test_planted_faults_are_seen(monkeypatch):
    """Wrong copies of single lines make the comparison fail."""
    oracle = lambda *a: oracles.h2o(*a, 5, 4)
    check_rows(kvattn.H2O(5, 4), oracle, 7, 0)
    faults = {
        "the newest of equal or lowest leaves": ("lowest", lambda s, p, c: scored_lowest(-s, p, c)),
        "the best of a prompt are the worst": ("best", lambda s, p, c, n: scored_best(-s, p, c, n)),
    }
    scored_lowest, scored_best = scored.lowest, scored.best
    for name, fault in faults.values():
        with monkeypatch.context() as patch:
            patch.setattr(scored, name, fault)
            step.cache_clear()
            with pytest.raises(AssertionError):
                check_rows(kvattn.H2O(5, 4), oracle, 25, 0)
    step.cache_clear()
    wrong_window = dataclasses.replace(kvattn.StreamingLLM(2, 6), window=7)
    q, k, v = (x[:1] for x in tokens(5))
    out, _ = run(wrong_window, q, k, v, [T], rope=kvattn.RoPE(H))
    assert np.abs(out[0] - oracles.streaming(q[0], k[0], v[0], 2, 6)[0]).max() > 1e-2
