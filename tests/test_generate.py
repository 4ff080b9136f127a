"""Generation against full forward passes, one token at a time; sampling against NumPy in float64."""

import dataclasses
import gc
import inspect
import itertools
import pathlib
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import small_models
from faulty_modules import planted
from flax import nnx

import kvattn
from kvattn.errors import (
    CapacityError,
    ConfigError,
    DTypeError,
    KVAttnError,
    MissingLibraryError,
    RangeError,
    ShapeError,
    StaleCacheError,
)
from kvattn.layers import stateless
from kvattn.models import Decoder, DecoderConfig, from_pretrained, generate, loop, sampling
from kvattn.models import prompts as given_prompts
from kvattn.models.sampling import Sampler, best_reaching, choose

module = sys.modules[generate.__module__]

V = 61
TINY = DecoderConfig(vocab_size=V, model_dim=24, num_layers=1, num_heads=6, num_kv_heads=2, head_dim=8, mlp_dim=40)
PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17], [18], [19, 20, 21, 22, 23]]
"""Ragged, the longest longer than the window; every call with them and the same capacity shares its programs."""
NEW = 10
DRAWN = dict(temperature=1.3, top_k=20, top_p=0.9, seed=7)


def decoder(config=TINY):
    return small_models.decoder(config)


@pytest.fixture(scope="module")
def model():
    return decoder()


def full_passes(model):
    """The oracle: logits after a list of tokens by a full pass without a cache."""
    apply, weights = stateless(model)
    full = jax.jit(apply)

    def after(tokens):
        padded = jnp.asarray([tokens + [0] * (32 - len(tokens))], jnp.int32)
        return full(weights, padded)[0][0, len(tokens) - 1]

    return after


def best_of_full_passes(last_logits):
    """NEW greedy tokens of every prompt, by the oracle."""

    def one(prompt):
        tokens = list(prompt)
        for _ in range(NEW):
            tokens.append(int(np.argmax(last_logits(tokens))))
        return tokens[len(prompt) :]

    return [one(prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def last_logits(model):
    return full_passes(model)


@pytest.fixture(scope="module")
def greedy(last_logits):
    return best_of_full_passes(last_logits)


def cut(tokens, stops):
    """Up to the first stop token, which is kept."""
    ends = [i for i, token in enumerate(tokens) if token in stops]
    return tokens[: ends[0] + 1] if ends else tokens


@pytest.fixture
def caches(monkeypatch):
    """The caches that generations end with."""
    seen, check = [], loop.Decoding.check
    monkeypatch.setattr(loop.Decoding, "check", lambda self: (seen.append(self.cache), check(self))[1])
    return seen


# Greedy, lengths, chunks --------------------------------------------------------------------------


def test_greedy_is_the_argmax_of_full_passes(model, greedy):
    assert generate(model, PROMPTS, NEW) == greedy
    assert generate(model, [bytes(prompt) for prompt in PROMPTS], NEW) == greedy
    assert generate(model, [np.array(prompt, np.uint8) for prompt in PROMPTS], NEW) == greedy
    assert kvattn.generate is generate
    assert all(type(token) is int for row in generate(model, PROMPTS, NEW) for token in row)


def test_layers_of_different_windows():
    model = decoder(dataclasses.replace(TINY, num_layers=2, windows=(6, None)))
    expected = best_of_full_passes(full_passes(model))
    assert [layer.num_slots for layer in model.make_cache(3, 64)] == [6, 64]
    assert generate(model, PROMPTS, NEW, prefill_chunk=7) == expected


def check_chunks(generate, model, greedy, chunks=(1, 3, 7, 16, 64)):
    """Prompts in chunks give the tokens of whole ones."""
    for chunk in chunks:
        assert generate(model, PROMPTS, NEW, prefill_chunk=chunk) == greedy, chunk


def test_chunks_of_prompts_change_nothing(model, greedy):
    check_chunks(generate, model, greedy)
    assert generate(model, PROMPTS, NEW, prefill_chunk=10**9) == greedy


CHUNKED = {
    "window": dict(policy=kvattn.SlidingWindow(5)),
    "streaming": dict(policy=kvattn.StreamingLLM(2, 5)),
    "heavy hitters, all kept": dict(policy=kvattn.H2O(20, 20)),
    "int8": dict(codec=kvattn.Int8()),
    "float8": dict(codec=kvattn.Float8()),
    "int4 in a window": dict(policy=kvattn.SlidingWindow(5), codec=kvattn.Int4(8)),
    "kivi, nothing encoded yet": dict(codec=kvattn.KIVI(group_size=8, residual=32)),
    "scissorhands, all kept": dict(policy=kvattn.Scissorhands(40)),
}
QUICK = ("streaming",)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in CHUNKED], ids=str
)
def test_chunks_with_policies_and_codecs(model, name):
    whole = generate(model, PROMPTS, NEW, **CHUNKED[name])
    assert generate(model, PROMPTS, NEW, prefill_chunk=7, **CHUNKED[name]) == whole
    assert [len(new) for new in whole] == [NEW] * 3


def test_policies_that_go_by_attention_see_chunks(model, greedy):
    """With a small budget the result is that of the same chunks, given to the model by hand."""
    policy, chunk = kvattn.H2O(2, 2), 7
    apply, weights = stateless(model)
    step = jax.jit(apply)

    def by_hand(prompt):
        cache, tokens = model.make_cache(1, policy=policy), list(prompt)
        for start in range(0, len(prompt), chunk):
            part = prompt[start : start + chunk]
            padded = jnp.asarray([part + [0] * (chunk - len(part))], jnp.int32)
            logits, cache = step(weights, padded, cache, jnp.asarray([len(part)], jnp.int32))
        tokens, logits = [], logits[0, len(part) - 1]
        while len(tokens) < NEW:
            tokens.append(int(np.argmax(logits)))
            logits, cache = step(weights, jnp.asarray([tokens[-1:]], jnp.int32), cache)
            logits = logits[0, 0]
        return tokens

    chunked = generate(model, PROMPTS, NEW, policy=policy, prefill_chunk=chunk)
    assert chunked == [by_hand(prompt) for prompt in PROMPTS]
    assert chunked != greedy  # so tokens did leave


@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        ({}, [(2, 64), (2, 64)]),
        ({"prefill_chunk": 100}, [(2, 100)]),
        ({"prefill_chunk": 1000}, [(2, 128)]),
        ({"policy": kvattn.H2O(4, 4)}, [(2, 128)]),
        ({"codec": kvattn.KIVI(group_size=8, residual=32)}, [(2, 128)]),
    ],
    ids=str,
)
def test_prompts_whose_activations_would_be_large_come_in_chunks(model, monkeypatch, options, shapes):
    """But not by themselves where chunks make a difference."""
    given = []

    def append(weights, chunk, cache, rows, settings, forced):
        given.append(chunk.tokens.shape)
        return rows, cache

    monkeypatch.setattr(loop.PROGRAMS, "of", lambda model: ([], loop.Programs(append, None)))
    monkeypatch.setattr(given_prompts, "_ACTIVATIONS", 2 * (2 * TINY.mlp_dim) * 100)
    generate(model, [[1] * 100, [2]], 1, **options)
    assert given == shapes


def test_capacity(model, greedy):
    enough = len(PROMPTS[0]) + NEW - 1  # the last token is not appended
    assert generate(model, PROMPTS, NEW, capacity=enough) == greedy
    with pytest.raises(CapacityError, match=str(enough)):
        generate(model, PROMPTS, NEW, capacity=enough - 1)
    assert [len(new) for new in generate(model, PROMPTS, 40, policy=kvattn.StreamingLLM(2, 5))] == [40] * 3
    assert generate(model, [], 5) == [] and generate(model, [[1], [2]], 0) == [[], []]


# Stop tokens --------------------------------------------------------------------------------------


def check_stops(generate, model, greedy, caches):
    """Each row ends with its first stop token, whatever the others do, and appends nothing after it."""
    for stops in itertools.chain(
        [greedy[0][0], greedy[1][4]],
        [(greedy[0][2], greedy[2][5]), [row[3] for row in greedy], [row[0] for row in greedy], ()],
    ):
        got = generate(model, PROMPTS, NEW, stop_tokens=stops)
        expected = [cut(row, np.atleast_1d(stops).tolist()) for row in greedy]
        assert got == expected
        for layer in caches[-1]:
            lengths = [len(prompt) + len(new) - 1 for prompt, new in zip(PROMPTS, expected, strict=True)]
            assert layer.lengths.tolist() == lengths, stops


def test_rows_end_with_their_stop_token(model, greedy, caches):
    check_stops(generate, model, greedy, caches)


def test_stop_tokens_in_chunks_and_draws(model):
    options = {**DRAWN, "seed": 4}
    free = generate(model, PROMPTS, NEW, **options)
    stops = {free[0][3], free[1][0], free[2][7]}
    expected = [cut(row, stops) for row in free]
    for chunk in (None, 7):
        assert generate(model, PROMPTS, NEW, stop_tokens=stops, prefill_chunk=chunk, **options) == expected
    assert generate(model, PROMPTS, NEW, stop_tokens=np.array(sorted(stops)), **options) == expected
    assert generate(model, PROMPTS, NEW, stop_tokens=bytes(sorted(stops)), **options) == expected


@pytest.mark.parametrize("ahead", [0, 1, 5, 100])
def test_how_far_the_device_is_ahead_does_not_matter(model, greedy, monkeypatch, ahead):
    monkeypatch.setattr(loop, "AHEAD", ahead)
    streamed = [[] for _ in PROMPTS]
    stops = greedy[0][2], greedy[2][5]
    got = generate(model, PROMPTS, NEW, stop_tokens=stops, on_token=lambda row, token: streamed[row].append(token))
    assert got == streamed == [cut(row, stops) for row in greedy]
    assert generate(model, PROMPTS, NEW) == greedy


def test_the_loop_ends_with_the_last_row(model, greedy, monkeypatch):
    count, step = [], loop.Decoding.step
    monkeypatch.setattr(loop.Decoding, "step", lambda self: (count.append(1), step(self))[1])
    generate(model, PROMPTS, 100, capacity=128, stop_tokens=[row[2] for row in greedy])
    assert 2 <= len(count) <= 2 + loop.AHEAD


def test_rows_that_ended_do_not_fill_the_cache(model, greedy, caches):
    """An ended row appends nothing, the others go on; also where nothing would overflow."""
    for policy in (None, kvattn.StreamingLLM(2, 5)):
        free = generate(model, PROMPTS, NEW, policy=policy)
        stop = free[0][1]
        got = generate(model, PROMPTS, NEW, policy=policy, stop_tokens=stop, capacity=len(PROMPTS[0]) + NEW - 1)
        assert got == [cut(row, [stop]) for row in free]
        assert int(caches[-1][0].lengths[0]) == len(PROMPTS[0]) + len(got[0]) - 1


# Turns --------------------------------------------------------------------------------------------

TURNS = [PROMPTS, [[31, 32], [33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44], [45]], [[50], [51], [52, 53, 54]]]
"""What is new in every turn: of other lengths in every row, and not the same row's the longest."""
KEPT = {
    "full": dict(),
    "window": dict(policy=kvattn.SlidingWindow(5)),
    "streaming": dict(policy=kvattn.StreamingLLM(2, 5)),
    "heavy hitters": dict(policy=kvattn.H2O(3, 4)),
    "int8": dict(codec=kvattn.Int8()),
}
CHUNK = 32


@pytest.fixture(scope="module")
def by_hand(model):
    """The oracle: a conversation of one row, its turns appended to a cache one after the other."""
    apply, weights = stateless(model)
    step = jax.jit(apply)

    def talk(turns, stops=(), chunk=CHUNK, capacity=96, **settings):
        cache, answers, logits = model.make_cache(1, capacity, **settings), [], None

        def append(tokens, size):
            nonlocal cache
            padded = jnp.asarray([tokens + [0] * (size - len(tokens))], jnp.int32)
            out, cache = step(weights, padded, cache, jnp.asarray([len(tokens)], jnp.int32))
            return out[0, len(tokens) - 1]

        for prompt in turns:
            for start in range(0, len(prompt), chunk):
                logits = append(prompt[start : start + chunk], chunk)
            answers.append([])
            while len(answers[-1]) < NEW and not (answers[-1] and answers[-1][-1] in stops):
                answers[-1].append(int(np.argmax(logits)))
                logits = append(answers[-1][-1:], 1)
        return answers, cache

    return talk


def assert_holds(cache, expected, row):
    """A row of a batch's caches is a cache of one row: lengths, positions, keys and values."""
    for layer, alone in zip(cache, expected, strict=True):
        assert int(layer.lengths[row]) == int(alone.lengths[0])
        positions, wanted = np.asarray(layer.positions)[row], np.asarray(alone.positions)[0]
        for held, other in zip(np.atleast_2d(positions), np.atleast_2d(wanted), strict=True):
            assert sorted(held[held >= 0]) == sorted(other[other >= 0])
        for mine, theirs in zip(layer.dense(), alone.dense(), strict=True):
            mine, theirs = np.asarray(mine)[row], np.asarray(theirs)[0]
            for head in range(len(mine)):
                slots, others = (np.broadcast_to(x, mine.shape[:2])[head] for x in (positions, wanted))
                order, other = (np.argsort(x)[np.sort(x) >= 0] for x in (slots, others))
                np.testing.assert_allclose(mine[head][order], theirs[head][other], atol=2e-2)


def in_turns(generate, model, stops=(), **options):
    """The answers of every turn, and the caches in the end."""
    settings = {name: options.pop(name) for name in ("policy", "codec") if name in options} | {"capacity": 96}
    answers, cache = [], None
    for prompts in TURNS:
        given = settings if cache is None else {"cache": cache}
        new, cache = generate(model, prompts, NEW, stop_tokens=stops, return_cache=True, **given, **options)
        answers.append(new)
    return answers, cache


def check_turns(generate, model, by_hand, name, stops=(), **options):
    settings, chunk = KEPT[name], options.get("prefill_chunk", CHUNK)
    answers, cache = in_turns(generate, model, stops, **settings, **options)
    for row in range(len(PROMPTS)):
        turns = [prompts[row] for prompts in TURNS]
        expected, alone = by_hand(turns, stops, chunk, **settings)
        assert [new[row] for new in answers] == expected, row
        assert int(cache[0].lengths[row]) == sum(map(len, turns)) + sum(map(len, expected))
        assert_holds(cache, alone, row)


@pytest.mark.parametrize("name", KEPT)
def test_a_conversation_goes_on_from_its_cache(model, by_hand, name):
    check_turns(generate, model, by_hand, name)


@pytest.mark.parametrize("name", KEPT)
def test_a_conversation_in_chunks_whose_rows_stop(model, by_hand, name):
    first, _ = in_turns(generate, model, **KEPT[name], prefill_chunk=7)
    stops = (first[0][0][3], first[0][2][0])  # in the middle, and at once
    check_turns(generate, model, by_hand, name, stops, prefill_chunk=7)
    ends = [len(new) for answers in in_turns(generate, model, stops, **KEPT[name])[0] for new in answers]
    assert min(ends) == 1 and len(set(ends)) > 2


def test_a_conversation_is_its_tokens_at_once(model, last_logits):
    """Every token of every turn is the best one after all that was said, by full passes without a cache."""
    answers, cache = in_turns(generate, model)
    for row in range(len(PROMPTS)):
        said = []
        for prompts, new in zip(TURNS, answers, strict=True):
            said += prompts[row]
            for token in new[row]:
                if len(said) < 32:  # what the oracle holds
                    assert token == int(np.argmax(last_logits(said)))
                said.append(token)
        assert int(cache[0].lengths[row]) == len(said)


def test_prompts_alone_fill_a_cache(model, greedy):
    """No new tokens: the caches hold the prompts, which the next call goes on from."""
    none, cache = generate(model, [prompt[:-1] or prompt for prompt in PROMPTS], 0, capacity=96, return_cache=True)
    assert none == [[], [], []] and cache[0].lengths.tolist() == [16, 1, 4]
    assert generate(model, [[17], [1], [23]], NEW, cache=cache)[0] == greedy[0]
    cache = model.make_cache(3, 96)  # any caches of the model
    assert generate(model, PROMPTS, NEW, cache=cache) == greedy
    none, cache = generate(model, [], 3, capacity=8, return_cache=True)
    assert none == [] and cache[0].batch_size == 0


def test_draws_of_a_conversation_can_be_repeated(model):
    first, second = (in_turns(generate, model, **DRAWN)[0] for _ in range(2))
    assert first == second != in_turns(generate, model, **{**DRAWN, "seed": 8})[0]


def test_later_turns_are_the_same_programs(model):
    model = decoder(dataclasses.replace(TINY, norm_epsilon=2e-5))
    in_turns(generate, model, stops=(1, 2))
    assert compiled(model) == [1, 1]


def test_a_cache_is_used_up(model):
    _, cache = generate(model, PROMPTS, NEW, capacity=96, return_cache=True)
    with pytest.raises(
        CapacityError, match=r"rows \[0, 1\].* 96 slots.*\[27, 11\].*\[70, 86\].*\[1, 1\] slots are missing"
    ):
        generate(model, [[1] * 60, [2] * 76, [3]], 10, cache=cache, return_cache=True)
    assert not any(x.is_deleted() for x in jax.tree.leaves(cache))  # so it can be used for less
    _, newer = generate(model, [[1] * 59, [2] * 75, [3]], 10, cache=cache, return_cache=True)
    assert newer[0].lengths.tolist() == [96, 96, 26]
    with pytest.raises(StaleCacheError):
        generate(model, [[1], [2], [3]], 1, cache=cache)
    assert all(x.is_deleted() for x in jax.tree.leaves((cache[0].keys, cache[0].values)))


@pytest.mark.wrong_types
def test_caches_that_do_not_fit_are_refused(model):
    prompts = [[1], [2], [3]]
    cache = model.make_cache(3, 32)
    other = decoder(dataclasses.replace(TINY, num_kv_heads=3))
    wide = decoder(dataclasses.replace(TINY, head_dim=16))
    deep = decoder(dataclasses.replace(TINY, num_layers=2))
    more = deep.make_cache(3, 32)
    _, ahead = stateless(deep)[0](stateless(deep)[1], jnp.ones((3, 2), jnp.int32), deep.make_cache(3, 32))
    encoder = kvattn.KVCache.from_encoder(jnp.zeros((3, 4, 2, 8)), jnp.zeros((3, 4, 2, 8)))
    overflown = cache[0].replace(status=jnp.asarray([0, kvattn.cache.status.OVERFLOW, 0], jnp.int32))
    for given, error, part in (
        (more, ShapeError, "1 layers but was given 2 caches"),
        ((), ShapeError, "given 0 caches"),
        (model.make_cache(2, 32), ShapeError, "2 rows, but there are 3 prompts"),
        (other.make_cache(3, 32), ShapeError, "3 key/value heads"),
        (wide.make_cache(3, 32), ShapeError, "heads of 16"),
        (cache[0], DTypeError, "KVCache"),
        ((1,), DTypeError, "tuple"),
        ("cache", DTypeError, "str"),
        ((encoder,), ConfigError, "static"),
        ((overflown,), CapacityError, "rows [1]"),
    ):
        with pytest.raises(error) as caught:
            generate(model, prompts, 2, cache=given, return_cache=True)
        assert part in str(caught.value)
    with pytest.raises(ConfigError, match=r"layer 1 holds \[2, 2, 2\] tokens, that of layer 0 \[0, 0, 0\]"):
        generate(deep, prompts, 2, cache=(more[0], ahead[1]))
    with pytest.raises(StaleCacheError, match="several"):
        generate(deep, prompts, 2, cache=(cache[0], cache[0]))
    for name, value in (("capacity", 64), ("policy", kvattn.Full()), ("codec", kvattn.Int8())):
        with pytest.raises(ConfigError, match=f"{name} cannot be changed"):
            generate(model, prompts, 2, cache=cache, **{name: value})
    with pytest.raises(DTypeError, match="return_cache"):
        generate(model, prompts, 2, return_cache="yes")


def test_learned_positions_count_those_in_the_cache():
    model = decoder(dataclasses.replace(TINY, positions="learned", max_positions=12))
    _, cache = generate(model, [[1, 2, 3], [5]], 4, capacity=64, return_cache=True)
    with pytest.raises(RangeError, match=r"12 learned positions.*7 of them in the cache.*at most 3 new"):
        generate(model, [[1, 2], [3]], 4, cache=cache, return_cache=True)
    _, cache = generate(model, [[1, 2], [3]], 3, cache=cache, return_cache=True)
    assert cache[0].lengths.tolist() == [12, 9]


# Draws --------------------------------------------------------------------------------------------


def test_draws_are_those_of_full_passes(model, last_logits):
    """Draw n of row i is `choose` on the logits of a full pass, with i and n: not of chunks, nor of the other rows."""
    options = DRAWN
    sampler = Sampler.create(V, **options).repeated(len(PROMPTS))
    one = jax.jit(choose)
    expected = []
    for i, prompt in enumerate(PROMPTS):
        tokens = list(prompt)
        for n in range(NEW):
            rows = jnp.broadcast_to(last_logits(tokens), (len(PROMPTS), V))
            tokens.append(int(one(sampler, rows, jnp.full(len(PROMPTS), n))[0][i]))
        expected.append(tokens[len(prompt) :])
    assert generate(model, PROMPTS, NEW, **options) == expected
    assert generate(model, PROMPTS, NEW, prefill_chunk=7, **options) == expected
    assert generate(model, [PROMPTS[0], [5, 6], [7] * 9], NEW, **options)[0] == expected[0]
    assert generate(model, PROMPTS, NEW, **{**options, "seed": 8}) != expected
    assert generate(model, PROMPTS, NEW, **{**options, "temperature": 1e-4}) == generate(model, PROMPTS, NEW)


@pytest.mark.slow
def test_draws_do_not_depend_on_the_number_of_rows(model):
    options = dict(temperature=1.3, seed=7)
    expected = generate(model, PROMPTS, NEW, **options)
    assert generate(model, PROMPTS[:1], NEW, **options) == expected[:1]
    assert generate(model, [*PROMPTS, [5, 6], [7]], NEW, **options)[:3] == expected


def filtered(logits, temperature=1.0, top_k=None, top_p=None):
    """Probabilities after the filters, float64; equal ones go by id."""
    scores = np.asarray(logits, np.float64) / temperature
    order = np.lexsort((np.arange(len(scores)), -scores))[:top_k]
    probabilities = np.exp(scores[order] - scores[order[0]])
    probabilities /= probabilities.sum()
    if top_p is not None:
        size = int(np.argmax(np.cumsum(probabilities) >= top_p)) + 1
        order, probabilities = order[:size], probabilities[:size] / probabilities[:size].sum()
    out = np.zeros(len(scores))
    out[order] = probabilities
    return out


LOGITS = np.log(np.array([0.02, 0.30, 0.08, 0.10, 0.05, 0.17, 0.10, 0.18])).astype(np.float32)
SETTINGS = [
    dict(temperature=1.0),
    dict(temperature=0.5),
    dict(temperature=3.0),
    dict(temperature=1.0, top_k=3),
    dict(temperature=1.0, top_k=5),  # one of two that tie
    dict(temperature=1.0, top_p=0.5),
    dict(temperature=1.0, top_p=0.7),  # one of two that tie
    dict(temperature=2.0, top_p=0.5),  # another set than before temperature
    dict(temperature=1.0, top_k=2, top_p=0.6),  # one token; two if top_p came first
    dict(temperature=0.7, top_k=6, top_p=0.9),
    dict(temperature=1.0, top_p=1e-30),
    dict(temperature=1.0, top_p=0.9999),
]


def check_frequencies(choose, settings, draws=20_000):
    """Chi-square of many rows with the same logits; what the filters leave out never comes."""
    expected = filtered(LOGITS, **settings)
    sampler = Sampler.create(len(LOGITS), **{"top_k": None, "top_p": None, "seed": 0, **settings})
    numbers = jnp.full(draws, 3)
    token, sound = choose(sampler.repeated(draws), jnp.broadcast_to(LOGITS, (draws, len(LOGITS))), numbers)
    assert bool(jnp.all(sound)) and token.dtype == jnp.int32
    counts = np.bincount(token, minlength=len(LOGITS))
    assert np.array_equal(counts > 0, expected > 0)
    left = expected > 0
    if left.sum() > 1:
        assert scipy.stats.chisquare(counts[left], expected[left] * draws).pvalue > 1e-3


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_draws_follow_the_filtered_probabilities(settings):
    check_frequencies(jax.jit(choose), settings)


def test_drawn_numbers_and_rows_differ():
    sampler = Sampler.create(V, temperature=1.0, top_k=None, top_p=None, seed=0).repeated(50)
    one = jax.jit(choose)
    tokens = np.stack([one(sampler, jnp.zeros((50, V)), jnp.full(50, n))[0] for n in range(50)])
    agree = [np.mean(tokens[:, a] == tokens[:, b]) for a, b in itertools.combinations(range(50), 2)]
    agree += [np.mean(tokens[a] == tokens[b]) for a, b in itertools.combinations(range(50), 2)]
    assert abs(np.mean(agree) - 1 / V) < 0.005  # independent draws agree by chance only


def test_filters_that_leave_everything_change_no_bit(model):
    plain = generate(model, PROMPTS, NEW, temperature=1.3, seed=5)
    for same in (dict(top_p=1.0), dict(top_p=1), dict(top_k=V), dict(top_k=V, top_p=1.0)):
        assert generate(model, PROMPTS, NEW, temperature=1.3, seed=5, **same) == plain


def test_one_candidate_is_the_greedy_choice(model, greedy):
    ties = jnp.asarray([[-0.0, 0.0, -1.0, 0.0], [2.0, 3.0, 3.0, -jnp.inf]])
    one = jax.jit(choose)
    for temperature in (1e-37, 1.0, 3e38):
        options = dict(temperature=temperature, top_k=1, top_p=0.9)
        assert generate(model, PROMPTS, NEW, **options) == greedy
        assert one(Sampler.create(4, seed=0, **options).repeated(2), ties, jnp.zeros(2, int))[0].tolist() == [0, 1]
    assert jnp.argmax(ties, axis=-1).tolist() == [0, 1]
    assert generate(model, PROMPTS, NEW, temperature=1.0, top_k=30, top_p=1e-9) == greedy


def smallest_set(scores, weights, target):
    """NumPy: the best scores, equal ones by index, until their weights reach the target."""
    order = np.lexsort((np.arange(len(scores)), -scores.astype(np.float64)))
    total = np.cumsum(weights[order].astype(np.float64))
    size = int(np.argmax(total >= target)) + 1 if total[-1] >= target else len(scores)
    return sorted(order[:size].tolist())


def check_sets(best_reaching):
    """Counts and probabilities, with ties, zeros of both signs and -inf."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(6, 50)).astype(np.float32)
    scores[1] = np.round(scores[1])  # a few values
    scores[2] = 0
    scores[2, ::3] = -0.0
    scores[3, 20:] = -np.inf
    scores[4] *= 1e30
    scores[5] *= 1e-30
    ones = jnp.ones(scores.shape)
    for count in (1, 2, 7, 20, 21, 49, 50):
        keep = np.asarray(best_reaching(jnp.asarray(scores), ones, jnp.float32(count)))
        for row, taken in zip(scores, keep, strict=True):
            assert np.nonzero(taken)[0].tolist() == smallest_set(row, np.ones(50), count), count
    probabilities = np.asarray(jax.nn.softmax(scores, axis=-1))
    for p in (1e-38, 1e-6, 0.1, 0.3, 0.5, 0.77, 0.9, 0.99):
        keep = np.asarray(best_reaching(jnp.asarray(scores), jnp.asarray(probabilities), jnp.float32(p)))
        for row, weights, taken in zip(scores, probabilities, keep, strict=True):
            got = np.nonzero(taken)[0].tolist()
            # Sums of float32 may fall on either side of p where they come to it.
            assert got in [smallest_set(row, weights, p * (1 + error)) for error in (-1e-6, 0, 1e-6)], p


def test_the_smallest_set_that_reaches_a_weight():
    check_sets(jax.jit(best_reaching))
    uniform = jnp.zeros((1, 8))
    for size in range(1, 9):  # exact in float32
        keep = best_reaching(uniform, jnp.full((1, 8), 0.125), jnp.float32(size / 8))
        assert np.nonzero(keep[0])[0].tolist() == list(range(size))
    assert bool(jnp.all(best_reaching(uniform, jnp.full((1, 8), 0.1), jnp.float32(0.9))))  # never reached: all
    # Exactly reached: the smallest set has none of those that weigh nothing.
    scores, weights = jnp.asarray([[1.0, 4.0, 3.0, 2.0]]), jnp.asarray([[0, 0.5, 0.25, 0]])
    assert best_reaching(scores, weights, jnp.float32(0.75)).tolist() == [[False, True, True, False]]


# What it costs ------------------------------------------------------------------------------------


def compiled(model):
    """How often each program of a model was compiled."""
    _, programs = loop.PROGRAMS[model]
    return [program._cache_size() for program in programs]


def test_programs_go_with_their_models_and_serve_those_alike():
    """One of the same structure needs none of its own; one of another does; nothing is kept of what is gone."""
    config = dataclasses.replace(TINY, norm_epsilon=3e-5)
    first, second, other = decoder(config), decoder(config), decoder(dataclasses.replace(config, mlp_dim=24))
    for model in (first, second, other):
        generate(model, [[1, 2, 3]], 3)
    assert compiled(first) == compiled(second) == compiled(other) == [1, 1]
    assert loop.PROGRAMS[first] is loop.PROGRAMS[second] is not loop.PROGRAMS[other]
    models = [weakref.ref(model) for model in (first, second, other)]
    programs = [weakref.ref(loop.PROGRAMS[model][1].step) for model in (second, other)]
    alive = len(loop.PROGRAMS)
    del first, other, model
    gc.collect()
    assert [ref() is None for ref in models] == [True, False, True] and len(loop.PROGRAMS) == alive - 2
    assert [ref() is None for ref in programs] == [False, True]
    del second
    gc.collect()
    assert programs[0]() is None


def test_a_model_that_changed_has_other_programs():
    model = decoder(dataclasses.replace(TINY, norm_epsilon=4e-5))
    before = generate(model, [[1, 2, 3]], 8)
    old = loop.PROGRAMS[model]
    model.layers[0].attention.rope = kvattn.RoPE(model.layers[0].attention.head_dim, theta=3.0)
    assert generate(model, [[1, 2, 3]], 8) != before
    assert loop.PROGRAMS[model] is not old


def test_one_program_for_the_prompts_and_one_for_the_step():
    model = decoder(dataclasses.replace(TINY, norm_epsilon=1e-5))
    known = len({id(programs) for programs in loop.PROGRAMS.values()})
    generate(model, [[1, 2, 3]], 30, capacity=128)
    generate(model, [[4] * 20], 9, capacity=128, stop_tokens=3)
    generate(model, [[5]], 1, capacity=128, stop_tokens=(1, 2, 3), on_token=lambda row, token: None, seed=3)
    assert compiled(model) == [1, 1]
    drawn = dict(temperature=1.0, top_k=5, top_p=0.7)
    for change in (dict(top_p=0.5), dict(top_k=1), dict(top_k=20), dict(temperature=2.0, seed=4), dict(stop_tokens=7)):
        generate(model, [[1, 2, 3]], 3, capacity=128, **{**drawn, **change})
    assert compiled(model) == [1, 1]  # whatever the choice
    for length in (1, 16, 17, 60, 100):
        generate(model, [[1] * length], 3, capacity=128, prefill_chunk=16)
    assert compiled(model) == [2, 1]  # one for chunks, however many
    assert len({id(programs) for programs in loop.PROGRAMS.values()}) == known + 1


def test_split_over_devices():
    """A checkpoint over a mesh decodes the same tokens, and its step is compiled once there too."""
    folder = pathlib.Path(__file__).parent / "golden" / "hf" / "llama3"
    golden = np.load(folder / "golden.npz")
    prompts = [row[:n].tolist() for row, n in zip(golden["prompts"], golden["lengths"], strict=True)]
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    model = from_pretrained(folder, mesh=mesh)
    assert any(len(x.sharding.device_set) == 2 for x in jax.tree.leaves(nnx.state(model)))
    assert generate(model, prompts, golden["greedy"].shape[1]) == golden["greedy"].tolist()
    assert compiled(model) == [1, 1]


def test_caches_are_updated_in_place(model, monkeypatch):
    made, make = [], Decoder.make_cache
    monkeypatch.setattr(
        Decoder, "make_cache", lambda *args, **options: (made.append(make(*args, **options)), made[-1])[1]
    )
    amounts = []

    def count(row, token):
        amounts.append(sum(x.size for x in jax.live_arrays() if not x.is_deleted() and x.shape == shape))

    shape = jax.tree.leaves(jax.eval_shape(lambda: make(model, 3, 64))[0].values)[0].shape
    generate(model, PROMPTS, NEW, prefill_chunk=7, on_token=count)
    assert all(x.is_deleted() for x in jax.tree.leaves((made[0][0].keys, made[0][0].values)))
    assert set(amounts) <= {int(np.prod(shape)), 2 * int(np.prod(shape))}  # one cache: keys may lie otherwise


# Streaming and progress ---------------------------------------------------------------------------


def test_tokens_come_step_by_step(model, greedy):
    for options in ({}, DRAWN, dict(stop_tokens=greedy[1][2])):
        streamed = []
        got = generate(model, PROMPTS, NEW, on_token=lambda *pair, to=streamed: to.append(pair), **options)
        assert got == generate(model, PROMPTS, NEW, **options)
        steps = itertools.zip_longest(*got)
        assert streamed == [(row, token) for step in steps for row, token in enumerate(step) if token is not None]


class Interrupt(Exception):
    pass


def test_what_a_callback_raises_comes_through(model, greedy):
    def interrupt(row, token):
        streamed.append(token)
        if len(streamed) == 5:
            raise Interrupt

    for progress in (False, lambda done, total: None):
        streamed = []
        with pytest.raises(Interrupt):
            generate(model, PROMPTS, NEW, on_token=interrupt, progress=progress)
        assert len(streamed) == 5
    assert generate(model, PROMPTS, NEW) == greedy


def test_progress(model, greedy, capsys, monkeypatch):
    calls = []
    assert generate(model, PROMPTS, NEW, progress=lambda *numbers: calls.append(numbers)) == greedy
    assert calls == [(3 * n, 3 * NEW) for n in range(1, NEW + 1)]
    calls.clear()
    stop = greedy[1][2]
    got = generate(model, PROMPTS, NEW, stop_tokens=stop, progress=lambda *numbers: calls.append(numbers))
    assert calls[-1] == (sum(map(len, got)), 3 * NEW)
    assert capsys.readouterr().err == ""
    assert generate(model, PROMPTS, NEW, progress=True) == greedy
    assert f"{3 * NEW}/{3 * NEW}" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(MissingLibraryError, match=r"kvattn\[hf\]"):
        generate(model, PROMPTS, NEW, progress=True)
    assert issubclass(MissingLibraryError, ImportError)


# Bad input ----------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("arguments", "error", "part"),
    [
        (dict(prompts=[[]]), ShapeError, "prompt 0"),
        (dict(prompts=[[1], []]), ShapeError, "prompt 1"),
        (dict(prompts=[[[1]]]), ShapeError, "prompt 0"),
        (dict(prompts=[[[1], [1, 2]]]), ShapeError, "prompt 0"),
        (dict(prompts=[1, 2]), ShapeError, "list"),
        (dict(prompts=b"bytes"), ShapeError, "list"),
        (dict(prompts="text"), ShapeError, "list"),
        (dict(prompts=3), DTypeError, "int"),
        (dict(prompts=[[1.5]]), DTypeError, "float64"),
        (dict(prompts=[[True]]), DTypeError, "bool"),
        (dict(prompts=[[1, True]]), DTypeError, "bool"),
        (dict(prompts=[np.array([True])]), DTypeError, "bool"),
        (dict(prompts=[["a"]]), DTypeError, "prompt 0"),
        (dict(prompts=["text"]), DTypeError, "encode"),
        (dict(prompts=[[V]]), RangeError, "61"),
        (dict(prompts=[[-1]]), RangeError, "-1"),
        (dict(prompts=[[2**70]]), RangeError, str(2**70)),
        (dict(max_new_tokens=-1), RangeError, "max_new_tokens"),
        (dict(max_new_tokens=2.0), DTypeError, "max_new_tokens"),
        (dict(max_new_tokens=True), DTypeError, "max_new_tokens"),
        (dict(max_new_tokens=2**31), RangeError, "int32"),
        (dict(temperature=-0.1), RangeError, "-0.1"),
        (dict(temperature=NAN), RangeError, "nan"),
        (dict(temperature=INF), RangeError, "inf"),
        (dict(temperature=1e-45), RangeError, "float32"),
        (dict(temperature=1e39), RangeError, "float32"),
        (dict(temperature="hot"), DTypeError, "hot"),
        (dict(temperature=True), DTypeError, "True"),
        (dict(temperature=None), DTypeError, "None"),
        (dict(seed=-1), RangeError, "seed"),
        (dict(seed=2**32), RangeError, "seed"),
        (dict(seed=0.5), DTypeError, "seed"),
        (dict(temperature=1.0, top_k=0), RangeError, "top_k"),
        (dict(temperature=1.0, top_k=-3), RangeError, "top_k"),
        (dict(temperature=1.0, top_k=V + 1), RangeError, "61"),
        (dict(temperature=1.0, top_k=2.0), DTypeError, "top_k"),
        (dict(temperature=1.0, top_k=True), DTypeError, "top_k"),
        (dict(temperature=1.0, top_p=0), RangeError, "temperature=0"),
        (dict(temperature=1.0, top_p=-0.5), RangeError, "-0.5"),
        (dict(temperature=1.0, top_p=1.5), RangeError, "1.5"),
        (dict(temperature=1.0, top_p=NAN), RangeError, "top_p"),
        (dict(temperature=1.0, top_p="0.5"), DTypeError, "top_p"),
        (dict(temperature=1.0, top_p=True), DTypeError, "top_p"),
        (dict(top_k=5), ConfigError, "temperature"),
        (dict(top_p=0.5), ConfigError, "temperature"),
        (dict(stop_tokens=V), RangeError, "61"),
        (dict(stop_tokens=-1), RangeError, "stop token"),
        (dict(stop_tokens=[1, -1]), RangeError, "stop token"),
        (dict(stop_tokens=True), DTypeError, "bool"),
        (dict(stop_tokens=1.0), DTypeError, "1.0"),
        (dict(stop_tokens=[1, None]), DTypeError, "None"),
        (dict(stop_tokens=np.array([1.0])), DTypeError, "1.0"),
        (dict(stop_tokens="</s>"), DTypeError, "token_to_id"),
        (dict(stop_tokens=len), DTypeError, "stop_tokens"),
        (dict(prefill_chunk=0), RangeError, "prefill_chunk"),
        (dict(prefill_chunk=-1), RangeError, "prefill_chunk"),
        (dict(prefill_chunk=1.5), DTypeError, "prefill_chunk"),
        (dict(prefill_chunk=True), DTypeError, "prefill_chunk"),
        (dict(on_token="print"), DTypeError, "on_token"),
        (dict(progress="yes"), DTypeError, "progress"),
        (dict(progress=1), DTypeError, "progress"),
        (dict(capacity=0), ConfigError, "capacity"),
    ],
    ids=str,
)
def test_generation_refuses(model, arguments, error, part):
    with pytest.raises(error, match=None) as caught:
        generate(model, **{"prompts": [[1]], "max_new_tokens": 2, **arguments})
    assert isinstance(caught.value, KVAttnError) and part in str(caught.value)


def test_learned_positions_are_not_run_past():
    config = dataclasses.replace(TINY, positions="learned", max_positions=12)
    model = decoder(config)
    assert len(generate(model, [[1, 2, 3, 4], [5]], 9)[0]) == 9  # the last is not appended: 12 positions
    with pytest.raises(RangeError, match="12"):
        generate(model, [[1, 2, 3, 4], [5]], 10)


def test_logits_that_are_no_distribution_are_an_error(model):
    broken = nnx.clone(model)
    broken.embed.embedding[...] = broken.embed.embedding[...].at[5].set(jnp.nan)
    for options in ({}, dict(temperature=1.0, top_k=3, top_p=0.5), dict(stop_tokens=range(V))):
        with pytest.raises(RangeError, match=r"rows \[0, 1, 2\].*NaN"):
            generate(broken, PROMPTS, NEW, **options)


@pytest.mark.parametrize("settings", [dict(temperature=0), dict(temperature=1.0, top_k=2, top_p=0.5)], ids=str)
def test_unsound_logits_are_found(settings):
    sampler = Sampler.create(4, **{"top_k": None, "top_p": None, "seed": 0, **settings})
    rows = [[0, 1, NAN, 0], [0, 1, INF, 0], [-INF] * 4, [-INF, 1, -INF, -INF], [0, -3e38, 3e38, 0]]
    token, sound = choose(sampler.repeated(5), jnp.asarray(rows, jnp.float32), jnp.zeros(5, int))
    assert sound.tolist() == [False, False, False, True, True]
    assert token[3:].tolist() == [1, 2]


# Planted faults -----------------------------------------------------------------------------------


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("decoding.append_last(np.array(", "len(np.array("),  # the last tokens are forgotten
        ("new[-1] for new in results", "results[0][-1] for new in results"),
        ("np.ones(len(tokens), bool)", "np.arange(len(tokens)) == 0"),
    ],
)
def test_planted_faults_in_turns(model, by_hand, monkeypatch, right, wrong):
    faulty = generating(monkeypatch, right, wrong)
    with pytest.raises(AssertionError):
        check_turns(faulty, model, by_hand, "full")


def generating(monkeypatch, right, wrong):
    """`generate` with a part of its source, or of the loop's, replaced."""
    if right in inspect.getsource(module):
        return planted(module, right, wrong).generate
    monkeypatch.setattr(module, "loop", planted(loop, right, wrong))
    return generate


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("last = jnp.maximum(num_new - 1, 0)", "last = jnp.full_like(num_new, tokens.shape[1] - 1)"),
        ("came = ends & (num_new > 0)", "came = ends"),
        ("came = ends & (num_new > 0)", "came = num_new > 0"),
        ("np.clip(lengths - start, 0, chunk)", "np.clip(lengths, 0, chunk)"),
        ("tokens[:, start : start + chunk]", "tokens[:, :chunk]"),
    ],
)
def test_planted_faults_in_chunks(model, greedy, monkeypatch, right, wrong):
    faulty = generating(monkeypatch, right, wrong)
    with pytest.raises((AssertionError, CapacityError)):
        check_chunks(faulty, model, greedy, chunks=(7,))


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("rows.running.astype(jnp.int32)", "jnp.ones_like(rows.new)"),  # ended rows go on
        ("~_holds(settings.stop, token)", "sound"),
        ("~_holds(settings.stop, token)", "~_holds(settings.stop, token) & (rows.num_drawn < 4)"),
        ("token[:, None] // _WORD", "token[:, None] * 0"),
        ("words << np.arange", "words[:, ::-1] << np.arange"),
        ("if num_running == 0:", "if num_running < 3:"),
        ("num_running -= int(stop[token])", "num_running -= 1"),
    ],
)
def test_planted_faults_in_stopping(model, greedy, monkeypatch, right, wrong):
    faulty = generating(monkeypatch, right, wrong)
    caches, check = [], module.loop.Decoding.check
    monkeypatch.setattr(module.loop.Decoding, "check", lambda self: (caches.append(self.cache), check(self))[1])
    with pytest.raises((AssertionError, KVAttnError)):
        check_stops(faulty, model, greedy, caches)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("(logits - best) / jnp.where(draws", "(logits - best) * jnp.where(draws"),
        ("weight(above) + tied_before * weights < target", "weight(above) <= 2 * target"),
        ("weight(order >= higher) >= target", "weight(order > higher) >= target"),
        ("jax.nn.softmax(scores, axis=-1)", "jax.nn.softmax(logits, axis=-1)"),  # neither temperature nor top_k
        ("return above | (tied", "return above & (tied"),
        ("bits | sign, ~bits", "bits, bits"),  # negative ones the wrong way round
    ],
)
def test_planted_faults_in_sampling(right, wrong):
    faulty = planted(sampling, right, wrong)
    with pytest.raises(AssertionError):
        for settings in SETTINGS:
            check_frequencies(jax.jit(faulty.choose), settings)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("jnp.where(scores == 0, 0.0, scores)", "scores"),
        ("jnp.where(bits < sign, bits | sign, ~bits)", "bits | sign"),
        ("jnp.maximum(target, FLOAT32_TINY)", "jnp.maximum(target, 0.2)"),
        ("dtype=jnp.float32) - 1", "dtype=jnp.float32)"),
        ("jnp.uint32(0), jnp.uint32(32), refine", "jnp.uint32(0), jnp.uint32(24), refine"),
    ],
)
def test_planted_faults_in_sets(right, wrong):
    faulty = planted(sampling, right, wrong)
    with pytest.raises(AssertionError):
        check_sets(faulty.best_reaching)


def test_steps_take_the_caches_over(model, monkeypatch):
    """Every chunk of the prompts and every step is given the caches for good: what went in is gone afterwards."""
    gone, of = [], loop.PROGRAMS.of

    def watched(program):
        def call(weights, *given):
            result = program(weights, *given)
            caches = next(x for x in given if isinstance(x, tuple) and isinstance(x[0], kvattn.KVCache))
            gone.append(all(x.is_deleted() for x in jax.tree.leaves(caches)))
            return result

        return call

    def programs(model):
        weights, programs = of(model)
        return weights, loop.Programs(*map(watched, programs))

    monkeypatch.setattr(loop.PROGRAMS, "of", programs)
    generate(model, PROMPTS, NEW)
    assert gone == [True] * NEW  # the prompts bring the first token
