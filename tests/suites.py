"""Shared suites: what must hold for every policy, every codec and every implementation.

A variant is one line in `POLICIES` or `CODECS`. What is registered and has no line gets one from its
examples, without what only an oracle knows; a plugin that has an oracle adds a `PolicyCase` of its own.
Implementations are found by asking which run here. A check raises AssertionError, so that the same check
can be shown to fail on planted faults. It takes a `Steps`, its source of compiled steps: shared between
checks on the real code, fresh under a fault, where nothing compiled before may be used.

All checks that can use one family of shapes: B=6, N=4, K=2, H=8, Hv=2*24, 24 slots in blocks of four.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import variants
from oracles import (
    TokenLists,
    assert_accurate,
    assert_lse,
    assert_same_bits,
    attend_token,
    kept_after,
    narrower,
    seen_from,
)
from variants import capacity_of

import kvattn
from kvattn import codecs, errors, policies
from kvattn.attend import api
from kvattn.attend.request import Request
from kvattn.cache import Layout
from kvattn.masks import Mask

B, N, K, H, CAPACITY = 6, 4, 2, 8, 24
HV = K * CAPACITY
"""Room for a one-hot vector per (key/value head, position): what an attendance probe reads."""
CHUNK = 7
"""T of a chunk; longer than the small rings, so that one chunk can fill them and more."""
BLOCK = 4
"""Slots per block: many blocks, partly filled ones, and tails, in a cache of 24 slots."""


# The variants ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PolicyCase:
    """A policy with settings, and what the oracle must know of it.

    Attributes:
        id: name of the case.
        make: builds the policy.
        capacity: argument of `KVCache.create`.
        keeps: the policy keeps (and lets a query see) the last so many tokens; None: all.
        num_sinks: and the first so many.
        limit: most tokens of a sequence; None: any number.
        cuts: the policy lets a query see its own chunk of so many positions; None: it does not cut.
        window: `window` argument of the call.
        chunk: `chunk` argument of the call.
        by_position: which tokens are kept depends on positions alone: the oracle knows them, chunking changes nothing.
        true_distances: RoPE and ALiBi see distances in the text, not in the cache.
        can_trim: whether the last n of `length` tokens can be taken back.
        quick: part of the quick tests; False: of the slow ones only.
    """

    id: str
    make: Callable[[], Any]
    capacity: int | None = CAPACITY
    keeps: int | None = None
    num_sinks: int = 0
    limit: int | None = None
    cuts: int | None = None
    window: int | None = None
    chunk: int | None = None
    by_position: bool = True
    true_distances: bool = True
    can_trim: Callable[[int, int], bool] = lambda length, n: n <= length
    quick: bool = True

    def oracle(self, batch_size=B, **rules):
        """Its list-of-tokens model."""
        settings = {
            "keeps": self.keeps,
            "num_sinks": self.num_sinks,
            "cuts": self.cuts,
            **self.limits,
            "limit": self.limit,
        }
        return TokenLists(batch_size, **settings, **rules)

    def seen_from(self, position):
        """The positions a query at `position` attends to."""
        return seen_from(position, narrower(self.keeps, self.window), self.num_sinks, self.cuts or self.chunk)

    @property
    def limits(self):
        """Arguments of the call."""
        return {"window": self.window, "chunk": self.chunk}


def _ring_trim(slots):
    return lambda length, n: n == 0 or (n <= length <= slots)


def _chunk_trim(size):
    """Within the last token's chunk, or all."""
    return lambda length, n: n in (0, length) or (n < length and (length - 1) // size == (length - n - 1) // size)


def _never_trim(length, n):
    return n == 0


POLICIES: tuple[PolicyCase, ...] = (
    PolicyCase("full", kvattn.Full, limit=CAPACITY),
    PolicyCase("full-window3", kvattn.Full, limit=CAPACITY, window=3),
    PolicyCase("ring5", lambda: kvattn.SlidingWindow(5), None, keeps=5, can_trim=_ring_trim(5)),
    PolicyCase("ring6-window2", lambda: kvattn.SlidingWindow(6), None, keeps=6, window=2, can_trim=_ring_trim(6)),
    PolicyCase("ring1", lambda: kvattn.SlidingWindow(1), None, keeps=1, can_trim=_ring_trim(1), quick=False),
    PolicyCase(
        "ring8-window99", lambda: kvattn.SlidingWindow(8), None, keeps=8, window=99, can_trim=_ring_trim(8), quick=False
    ),
    PolicyCase("ring-short", lambda: kvattn.SlidingWindow(50), keeps=50, limit=CAPACITY),
    PolicyCase("chunks4", lambda: kvattn.Chunked(4), None, cuts=4, can_trim=_chunk_trim(4)),
    PolicyCase("chunks5-of-call", kvattn.Full, limit=CAPACITY, chunk=5, quick=False),
    PolicyCase("ring6-chunks4", lambda: kvattn.SlidingWindow(6), None, keeps=6, chunk=4, can_trim=_ring_trim(6)),
    PolicyCase("chunks-short", lambda: kvattn.Chunked(50), cuts=50, limit=CAPACITY, quick=False),
    PolicyCase(
        "chunks5-window3",
        lambda: kvattn.Chunked(5),
        None,
        keeps=5,
        cuts=5,
        window=3,
        can_trim=_chunk_trim(5),
        quick=False,
    ),
    PolicyCase(
        "streaming2+5",
        lambda: policies.StreamingLLM(2, 5),
        None,
        keeps=5,
        num_sinks=2,
        true_distances=False,
        can_trim=_ring_trim(7),
    ),
    PolicyCase("h2o", lambda: policies.H2O(3, 2), None, by_position=False, can_trim=_never_trim),
    PolicyCase(
        "scissorhands",
        lambda: policies.Scissorhands(5, 2, 8),
        None,
        by_position=False,
        can_trim=_never_trim,
        quick=False,
    ),
    PolicyCase("fastgen", policies.FastGen, by_position=False, can_trim=_never_trim, quick=False),
)
"""One line per policy and setting."""
POLICIES += tuple(
    PolicyCase(
        name, lambda policy=policy: policy, capacity_of(policy, CAPACITY), by_position=False, can_trim=_never_trim
    )
    for name, policy in variants.POLICIES.items()
    if type(policy) not in {type(case.make()) for case in POLICIES}
)


@dataclasses.dataclass(frozen=True)
class CodecCase:
    """A codec and what it promises.

    Attributes:
        id: name of the case.
        make: builds the codec.
        dtype: what tokens are before they are encoded, and the query.
        error: the largest |decode(encode(x)) - x| for |x| <= 1.
    """

    id: str
    make: Callable[[], Any]
    dtype: Any
    error: float


PLAIN: tuple[CodecCase, ...] = (
    CodecCase("float32", lambda: codecs.Plain(jnp.dtype(jnp.float32)), jnp.float32, 0.0),
    CodecCase("bfloat16", lambda: codecs.Plain(jnp.dtype(jnp.bfloat16)), jnp.bfloat16, 2.0**-9),
    CodecCase("float16", lambda: codecs.Plain(jnp.dtype(jnp.float16)), jnp.float16, 2.0**-12),
)
"""What is stored without a codec."""
CODECS = (
    *PLAIN,
    CodecCase("int8", kvattn.Int8, jnp.float32, 1 / 253),
    CodecCase("float8", kvattn.Float8, jnp.float32, 2.0**-4),
    CodecCase("int4", lambda: kvattn.Int4(4), jnp.float32, 1 / 14.8),
)
"""One line per codec of single tokens and setting."""
CODECS += tuple(
    CodecCase(name, lambda codec=codec: codec, jnp.float32, 1 / 8)
    for name, codec in variants.CODECS.items()
    if codec.rows is None and type(codec) not in {type(case.make()) for case in CODECS}
)

IMPLEMENTATIONS = tuple(name for name in kvattn.attend.names() if api.unsupported(name) is None)
"""Those that run on this machine."""


def by_id(cases, *ids):
    """The cases of these ids."""
    return tuple(case for case in cases if case.id in ids)


# Compiled steps, caches and tokens ------------------------------------------------------------------------------------


class Steps:
    """`kvattn.cached_attention` under jit, one compiled program per settings and shapes.

    Args:
        optimized: False compiles faster, to code that runs slower.
    """

    def __init__(self, optimized=True):
        self._made = {}
        self._options = None if optimized else {"xla_backend_optimization_level": 0}

    def __call__(self, query, key, value, cache, num_new=None, **settings):
        settings = {"implementation": None, "padding": "right", "window": None, "chunk": None, **settings}
        name = tuple(sorted(settings.items()))
        if name not in self._made:

            def step(query, key, value, cache, num_new):
                arrays = {n: jnp.asarray(s, jnp.float32) for n, s in settings.items() if isinstance(s, tuple)}
                return kvattn.cached_attention(query, key, value, cache, num_new=num_new, **{**settings, **arrays})

            self._made[name] = jax.jit(step, compiler_options=self._options)
        if num_new is None:
            num_new = np.full(query.shape[0], query.shape[1])
        return self._made[name](query, key, value, cache, jnp.asarray(num_new, jnp.int32))


STEPS = Steps()
"""Shared by all checks on the real code."""


def make_cache(case, batch_size=B, value_head_dim=HV, dtype=jnp.float32):
    """An empty cache of the common family, in blocks of `BLOCK`."""
    return kvattn.KVCache.create(
        batch_size,
        K,
        H,
        capacity=case.capacity,
        policy=case.make(),
        dtype=dtype,
        value_head_dim=value_head_dim,
        layout=Layout(CAPACITY, BLOCK, True),
    )


def filled_with(cache, value):
    """The cache with `value` in every number it stores; an empty cache must not care."""

    def fill(x):
        return jnp.full_like(x, value) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return dataclasses.replace(cache, keys=jax.tree.map(fill, cache.keys), values=jax.tree.map(fill, cache.values))


def tokens(seed, length, batch_size=B, value_head_dim=HV, num_heads=N, num_kv_heads=K, head_dim=H):
    """Random query, key, value as float32 NumPy arrays."""
    rng = np.random.default_rng(seed)
    return tuple(
        rng.normal(size=(batch_size, length, heads, size)).astype(np.float32)
        for heads, size in ((num_heads, head_dim), (num_kv_heads, head_dim), (num_kv_heads, value_head_dim))
    )


def history(seed, limit=CAPACITY, batch_size=B, steps=9):
    """Ragged appends [(T, num_new[B])] that stay within `limit` tokens per row; T is 1 or `CHUNK`."""
    rng = np.random.default_rng(seed)
    left = np.full(batch_size, limit)
    out = []
    for i in range(steps):
        length = CHUNK if i % 3 == 0 else 1
        num_new = np.minimum(rng.integers(0, length + 1, batch_size), left)
        left = left - num_new
        out.append((length, num_new))
    return out


def attend(query, cache, positions, implementation, mask=None, **rules):
    """Asks an implementation directly: out and lse in float32."""
    request = Request(
        jnp.asarray(query),
        jnp.asarray(positions, jnp.int32),
        cache.view(),
        alibi_slopes=rules.pop("alibi_slopes", None),
        mask=Mask() if mask is None else mask,
        scale=rules.pop("scale", 1.0),
        **rules,
    )
    return api.attend(request, implementation)[:2]


def real_tokens(num_new, length, padding):
    """bool [B, T]: which tokens of a padded chunk are real."""
    t = np.arange(length)[None]
    num_new = np.asarray(num_new)[:, None]
    return t < num_new if padding == "right" else t >= length - num_new


# The policy suite: kept set, attended set, oracle, chunking -----------------------------------------------------------


def check_attendance(case, implementation, steps=STEPS, padding="right", seed=0):
    """Zero queries and one-hot values: the output is 1/n on exactly the attended tokens, and on nothing else.

    Returns how many (row, token, head) combinations were looked at.
    """
    cache, lengths, looked_at = make_cache(case), np.zeros(B, int), 0
    for length, num_new in history(seed):
        query, key, _ = tokens(seed, length)
        real = real_tokens(num_new, length, padding)
        value = np.zeros((B, length, K, HV), np.float32)
        position = np.full((B, length), -1)
        for b in range(B):
            position[b, real[b]] = lengths[b] + np.arange(num_new[b])
            for t in np.nonzero(real[b])[0]:
                for k in range(K):
                    value[b, t, k, k * CAPACITY + position[b, t]] = 1
        out, cache = steps(
            0 * query, key, value, cache, num_new, implementation=implementation, padding=padding, **case.limits
        )
        out = np.asarray(out)
        expected = np.zeros_like(out)
        for b, t in zip(*np.nonzero(real), strict=True):
            seen = sorted(case.seen_from(int(position[b, t])))
            for n in range(N):
                expected[b, t, n, np.asarray(seen) + n // (N // K) * CAPACITY] = 1 / len(seen)
        wrong = (out != 0) != (expected != 0)
        assert not wrong.any(), (
            f"{case.id}: attended sets differ at (row, token, head) {np.argwhere(wrong.any(-1))[:3].tolist()}, "
            f"lengths before {lengths.tolist()}, num_new {num_new.tolist()}"
        )
        assert np.abs(out - expected).max() <= 4 * np.finfo(np.float32).eps, "weights are not 1/n"
        lengths = lengths + num_new
        looked_at += int(real.sum()) * N
    check_counts(case, cache, lengths)
    return looked_at


def check_counts(case, cache, lengths):
    """Tokens seen, tokens kept, and the position in each slot: three different things."""
    assert np.asarray(cache.lengths).tolist() == list(lengths), f"lengths {cache.lengths}, seen {list(lengths)}"
    kept, positions = np.asarray(cache.kept), np.asarray(cache.positions)
    assert positions.shape[-1] == cache.num_slots
    for b, length in enumerate(lengths):
        expected = kept_after(int(length), case.keeps, case.num_sinks, case.cuts)
        held = positions[b][positions[b] >= 0].tolist()
        assert kept[b] == len(expected), f"row {b}: kept {kept[b]}, expected {len(expected)}"
        assert len(held) == len(set(held)) and set(held) == expected, f"row {b} holds {held}, expected {expected}"
        assert (positions[b] >= -1).all()


def check_contents(case, cache, lists):
    """What lies in the slots, found by position, is what was appended."""
    keys, values = (np.asarray(x) for x in cache.dense())
    positions = np.asarray(cache.positions)
    for b, row in enumerate(lists.rows):
        for slot in np.nonzero(positions[b] >= 0)[0]:
            key, value = row[positions[b, slot]]
            assert_same_bits(keys[b, :, slot], key.astype(keys.dtype), f"key of row {b}, slot {slot}")
            assert_same_bits(values[b, :, slot], value.astype(values.dtype), f"value of row {b}, slot {slot}")


def check_oracle(case, implementation, steps=STEPS, padding="right", seed=1, **settings):
    """A ragged history equals the list-of-tokens oracle by the accuracy rule, and the cache holds those tokens."""
    cache = make_cache(case)
    truth, low = (case.oracle(dtype=dtype, **settings) for dtype in (np.float64, np.float32))
    for i, (length, num_new) in enumerate(history(seed)):
        new = tokens(seed * 100 + i, length)
        out, cache = steps(
            *new, cache, num_new, implementation=implementation, padding=padding, **case.limits, **settings
        )
        ref, _ = truth.append(*new, num_new, padding)
        low_ref, _ = low.append(*new, num_new, padding)
        out = np.asarray(out)
        assert_accurate(out, ref, low_ref)
        assert (out[~real_tokens(num_new, length, padding)] == 0).all(), "pads must come out as zeros"
    check_counts(case, cache, truth.lengths())
    check_contents(case, cache, truth)
    assert not np.asarray(cache.status).any()


# Memory that does not matter, neighbours that do not matter -----------------------------------------------------------


def _dirty_run(case, implementation, steps, garbage, padding):
    """A history over a cache of garbage, with garbage in the pads and tokens of garbage that were taken back."""
    cache, outs = filled_with(make_cache(case), garbage), []
    for i, (length, num_new) in enumerate(history(2)):
        real = real_tokens(num_new, length, padding)[..., None, None]
        new = [np.where(real, x, np.float32(garbage)) for x in tokens(200 + i, length)]
        out, cache = steps(*new, cache, num_new, implementation=implementation, padding=padding, **case.limits)
        outs.append(np.asarray(out))
        if i == 1 and case.by_position and case.keeps is case.cuts is None:
            # Five tokens of garbage come and go.
            extra = [np.full_like(x, garbage) for x in tokens(0, CHUNK)]
            settings = {"implementation": implementation, "padding": padding, **case.limits}
            _, cache = steps(*extra, cache, np.full(B, 5), **settings)
            cache = cache.trim(5)
    return outs, cache


POISONS = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf, "max": float(np.finfo(np.float32).max)}


def check_dirty_memory(case, implementation, steps=STEPS, poisons=tuple(POISONS), padding="right"):
    """Unused slots, block tails, pads and tokens taken back may hold anything: the same bits come out."""
    clean, clean_cache = _dirty_run(case, implementation, steps, 0.0, padding)
    assert all(np.isfinite(x).all() for x in clean)
    for name in poisons:
        dirty, cache = _dirty_run(case, implementation, steps, POISONS[name], padding)
        for i, (a, b) in enumerate(zip(clean, dirty, strict=True)):
            assert_same_bits(a, b, f"{case.id}, {name}: outputs of step {i}")
        for leaf in ("lengths", "kept", "positions", "status"):
            assert_same_bits(getattr(clean_cache, leaf), getattr(cache, leaf), leaf)


def check_neighbours(case, implementation, steps=STEPS, seed=3):
    """Other rows, their tokens, counts and cache content, NaN included, change no bit of a row."""
    mine = {0: slice(0, 1), 4: slice(4, 5)}

    def run(change):
        rng = np.random.default_rng(change)
        cache, outs, others = make_cache(case), [], np.ones(B, bool)
        others[list(mine)] = False
        left = np.full(B, CAPACITY)
        if change:
            keep = others.reshape(-1, 1, 1, 1)
            garbage = filled_with(cache, np.nan if change > 1 else 3.0)
            pick = functools.partial(jnp.where, keep)
            cache = dataclasses.replace(
                cache,
                keys=jax.tree.map(pick, garbage.keys, cache.keys),
                values=jax.tree.map(pick, garbage.values, cache.values),
            )
        for i, (length, num_new) in enumerate(history(seed)):
            new = [x.copy() for x in tokens(seed * 100 + i, length)]
            if change:
                num_new = np.where(others, np.minimum(rng.integers(0, length + 1, B), left), num_new)
                for x in new:
                    x[others] = rng.normal(size=x[others].shape) * 50
                    if change > 1:
                        x[others] = np.nan
            left = left - num_new
            out, cache = steps(*new, cache, num_new, implementation=implementation, **case.limits)
            outs.append(np.asarray(out))
        return outs, cache

    outs, cache = run(0)
    keys, values = cache.dense()
    for change in (1, 2):
        others, other_cache = run(change)
        other_keys, other_values = other_cache.dense()
        for row in mine.values():
            for i, (a, b) in enumerate(zip(outs, others, strict=True)):
                assert_same_bits(a[row], b[row], f"{case.id}: row {row.start} of step {i}")
            for leaf in ("lengths", "kept", "positions", "status"):
                assert_same_bits(getattr(cache, leaf)[row], getattr(other_cache, leaf)[row], leaf)
            held = np.broadcast_to(np.asarray(cache.positions[row.start]) >= 0, (K, cache.num_slots))
            assert_same_bits(keys[row.start][held], other_keys[row.start][held], "keys of a row")
            assert_same_bits(values[row.start][held], other_values[row.start][held], "values of a row")


# Overflow ------------------------------------------------------------------------------------------------------------


def check_overflow(case, implementation, steps=STEPS, length=CHUNK):
    """A chunk past the end is dropped whole and recorded; rows where it fits do not notice."""
    settings = {"implementation": implementation, **case.limits}
    lists, cache = case.oracle(), make_cache(case)
    for i, count in enumerate((CHUNK, CHUNK, CHUNK, 3)):
        # Rows at 24 (full), 23, 20, 17 (just fits), 0, 22 tokens.
        have = np.asarray(lists.lengths())
        num_new = np.clip(np.asarray([24, 23, 20, 17, 0, 22]) - have, 0, count)
        new = tokens(400 + i, CHUNK)
        _, cache = steps(*new, cache, num_new, **settings)
        lists.append(*new, num_new)
    assert lists.lengths() == [24, 23, 20, 17, 0, 22] == np.asarray(cache.lengths).tolist()
    new = tokens(410, length)
    out, after = steps(*new, cache, **settings)
    ref, _ = lists.append(*new)
    dropped = np.asarray(lists.overflowed)
    assert dropped.any() and not dropped.all()
    out = np.asarray(out)
    assert (out[dropped] == 0).all(), "a dropped chunk must come out as zeros"
    assert np.abs(out - ref).max() < 1e-5, "a row where the chunk fits must not notice"
    assert ((np.asarray(after.status) != 0) == dropped).all(), f"status {after.status}, dropped {dropped}"
    assert np.asarray(after.lengths).tolist() == lists.lengths()
    for name, a, b in zip(("keys", "values"), cache.dense(), after.dense(), strict=True):
        assert_same_bits(a[dropped], b[dropped], f"{name} of the dropped rows")
    check_contents(case, after, lists)
    _raises(errors.CapacityError, after.check, str(np.nonzero(dropped)[0].tolist()))

    # The record stays when what comes next fits.
    new = tokens(411, 1)
    _, later = steps(*new, after, np.zeros(B), **settings)
    assert ((np.asarray(later.status) != 0) == dropped).all(), "the status must be sticky"

    # Outside jit the error comes at once, and nothing is written.
    before = [np.asarray(x).copy() for x in jax.tree.leaves(cache)]
    new = tokens(410, length)
    _raises(errors.CapacityError, lambda: kvattn.cached_attention(*new, cache, **settings), "do not fit")
    for a, b in zip(before, jax.tree.leaves(cache), strict=True):
        assert_same_bits(a, b, "the cache after a refused append")


def _raises(error, call, fragment):
    try:
        call()
    except error as raised:
        assert fragment in str(raised), f"{fragment!r} is not in: {raised}"
    else:
        raise AssertionError(f"{error.__name__} was not raised")


# Chunking -------------------------------------------------------------------------------------------------------------

PROMPT, PROMPT_WINDOW = 97, 8
PIECES = (1, 7, 13, PROMPT)
"""T of the compiled steps; a shorter piece is a ragged one."""


def chunkings(seed=0, num_random=4):
    """Ways to cut the prompt: all at once, ones, sevens, thirteens, and random pieces."""
    ways = [[PROMPT], [1] * PROMPT, [7] * 13 + [6], [13] * 7 + [6], [90] + [1] * 7, [1] * 9 + [13, 7, 68]]
    rng = np.random.default_rng(seed)
    for _ in range(num_random):
        left, way = PROMPT, []
        while left:
            way.append(int(min(left, rng.integers(1, 14))))
            left -= way[-1]
        ways.append(way)
    return ways


def check_chunking(policy, window, implementation, steps=STEPS, ways=None, padded=True, dtype=jnp.float32):
    """Every way to cut a 97-token prompt gives the banded oracle's outputs, and the same cache."""
    shape = {"batch_size": 2, "num_heads": 2, "num_kv_heads": 1, "value_head_dim": 4}
    query, key, value = tokens(7, PROMPT, **shape)
    truth, low = (TokenLists(2, keeps=PROMPT_WINDOW, dtype=d) for d in (np.float64, np.float32))
    ref, low_ref = truth.append(query, key, value)[0], low.append(query, key, value)[0]
    first = None
    for way in chunkings() if ways is None else ways:
        cache = kvattn.KVCache.create(
            2, 1, H, capacity=PROMPT, policy=policy, dtype=dtype, value_head_dim=4, layout=Layout(PROMPT, 16, True)
        )
        outs, start = [], 0
        for piece in way:
            length = min(t for t in PIECES if t >= piece) if padded else piece
            new = [np.zeros((2, length, *x.shape[2:]), np.float32) for x in (query, key, value)]
            for x, whole in zip(new, (query, key, value), strict=True):
                x[:, :piece] = whole[:, start : start + piece]
            out, cache = steps(*new, cache, np.full(2, piece), implementation=implementation, window=window)
            outs.append(np.asarray(out)[:, :piece])
            start += piece
        assert_accurate(np.concatenate(outs, axis=1), ref, low_ref)
        held = [np.asarray(x) for x in (cache.lengths, cache.kept, cache.positions)]
        slots = held[2] >= 0
        held += [np.asarray(x)[np.broadcast_to(slots[:, None], x.shape[:3])] for x in cache.dense()]
        first = held if first is None else first
        for a, b in zip(first, held, strict=True):
            assert_same_bits(a, b, f"caches after cutting into {way[:4]}...")


def check_ring_phases(implementation, steps=STEPS, window=5):
    """A chunk that crosses the wrap point at every phase of the ring, then single tokens."""
    case = PolicyCase("ring", lambda: kvattn.SlidingWindow(window), None, keeps=window)
    cache = make_cache(case)
    truth, low = (case.oracle(dtype=d) for d in (np.float64, np.float32))
    assert window <= B
    # Rows at 2W, 2W + 1, ...: every phase, all after the first wrap.
    start = 2 * window + np.arange(B)
    plan = [np.minimum(start, CHUNK), np.clip(start - CHUNK, 0, CHUNK), np.clip(start - 2 * CHUNK, 0, CHUNK)]
    plan += [np.full(B, CHUNK), np.full(B, 3), *[np.ones(B, int)] * 4]
    for i, num_new in enumerate(plan):
        if i == 3:
            assert {int(x) % window for x in cache.lengths} == set(range(window))
        length = 1 if i >= 5 else CHUNK
        new = tokens(500 + i, length)
        out, cache = steps(*new, cache, num_new, implementation=implementation, window=None)
        ref, low_ref = truth.append(*new, num_new)[0], low.append(*new, num_new)[0]
        assert_accurate(np.asarray(out), ref, low_ref)
        check_counts(case, cache, truth.lengths())


# Positions ------------------------------------------------------------------------------------------------------------


def check_true_positions(case, implementation, steps=STEPS, seed=5):
    """RoPE and ALiBi go by how many tokens came before, for ever: rings that turned included."""
    cache, rope = make_cache(case), kvattn.RoPE(H)
    slopes = (0.5, 0.25, 0.125, 0.0625)
    truth, low = (case.oracle(dtype=d, rope_theta=10000.0, alibi_slopes=slopes) for d in (np.float64, np.float32))
    for i, (length, num_new) in enumerate(history(seed)):
        new = tokens(seed * 100 + i, length)
        out, cache = steps(
            *new, cache, num_new, implementation=implementation, **case.limits, rope=rope, alibi_slopes=slopes
        )
        ref, low_ref = truth.append(*new, num_new)[0], low.append(*new, num_new)[0]
        # The rotation itself rounds, which the low-precision oracle (which turns in float64) does not.
        assert_accurate(np.asarray(out), ref, low_ref + np.sign(low_ref - ref) * 1e-7)
    check_counts(case, cache, truth.lengths())


# The implementation suite: empty rows, numerics -----------------------------------------------------------------------


def check_empty_rows(implementation, steps=STEPS):
    """A row that may attend to nothing gives output 0 and logsumexp -inf, bit for bit; rows beside it do not notice."""
    case = by_id(POLICIES, "full")[0]
    new = tokens(11, CHUNK)
    counts = np.asarray([0, 3, 0, 7, 1, 5])
    _, cache = steps(*new, make_cache(case), counts, implementation=implementation, window=None)
    cache = cache.check()
    query = jnp.asarray(tokens(12, 2)[0])
    positions = np.stack([counts - 1, np.full(B, -1)], axis=1)
    ask = jax.jit(lambda q, c, p: attend(q, c, p, implementation))
    out, lse = (np.asarray(x) for x in ask(query, cache, positions))
    for b in range(B):
        for t in range(2):
            if positions[b, t] < 0:
                assert_same_bits(out[b, t], np.zeros_like(out[b, t]), "output of an empty row")
                assert_same_bits(lse[b, t], np.full_like(lse[b, t], -np.inf), "logsumexp of an empty row")
            else:
                assert np.isfinite(lse[b, t]).all() and (out[b, t] != 0).all()
    # Through the step, sinks included: a row without tokens stays zero.
    for sinks in (None, (1.0, 2.0, 3.0, 4.0)):
        settings = {} if sinks is None else {"sinks": sinks}
        out, _ = steps(*new, cache, np.zeros(B), implementation=implementation, window=None, **settings)
        assert_same_bits(np.asarray(out), np.zeros_like(out), "output of pads")


def check_lse(implementation):
    """The logsumexp against the oracle, with scale, soft cap and ALiBi, windows and sinks that stay visible."""
    case = by_id(POLICIES, "full")[0]
    new = tokens(13, CHUNK)
    counts = np.asarray([7, 3, 6, 7, 1, 5])
    _, cache = STEPS(*new, make_cache(case), counts, implementation=implementation, window=None)
    query, slopes = tokens(14, 1)[0], np.asarray([0.5, 0.25, 0.125, 0.0625], np.float32)
    for mask, rules in (
        (Mask(), {}),
        (Mask(window=2, num_sinks=1), {"scale": 0.7, "softcap": 2.0, "alibi_slopes": slopes}),
    ):
        ask = jax.jit(lambda q, c, p, mask=mask, rules=rules: attend(q, c, p, implementation, mask, **rules))
        out, lse = ask(query, cache, counts[:, None] - 1)
        truth = np.zeros(out.shape), np.zeros(lse.shape)
        for b, count in enumerate(counts):
            position = int(count) - 1
            seen = sorted(seen_from(position, mask.window) | {p for p in range(mask.num_sinks) if p <= position})
            truth[0][b, 0], truth[1][b, 0] = attend_token(
                query[b, 0],
                [new[1][b, j] for j in seen],
                [new[2][b, j] for j in seen],
                distances=[j - position for j in seen],
                **{"scale": 1.0, **rules},
            )
        assert np.abs(np.asarray(out) - truth[0]).max() < 2e-6
        assert_lse(lse, truth[1])


def check_accuracy(codec_case, implementation, steps=STEPS, length=270, size=16, spread=4):
    """A prompt and a decoding step of 270 tokens by the accuracy rule, in the dtype of the case."""
    # Scores are about N(0, spread).
    dtype = np.dtype(codec_case.dtype)
    # Enough heads that the largest of the decoding step's few errors is not luck.
    shape = {"batch_size": 1, "num_heads": 8, "num_kv_heads": 4, "value_head_dim": 2 * size, "head_dim": size}
    cache = kvattn.KVCache.create(
        1, 4, size, capacity=length + 1, codec=codec_case.make(), dtype=codec_case.dtype, value_head_dim=2 * size
    )
    truth, low = TokenLists(1), TokenLists(1, dtype=dtype)
    for i, t in enumerate((length, 1)):
        query, key, value = tokens(21 + i, t, **shape)
        new = [x.astype(dtype) for x in (spread * query, key, value)]
        out, cache = steps(*new, cache, implementation=implementation)
        assert out.dtype == dtype
        assert_accurate(np.asarray(out), truth.append(*new)[0], low.append(*new)[0])


def check_large_scores(codec_case, implementation, steps=STEPS):
    """Scores beyond the range of the storage dtype: float32 softmax stays finite and right."""
    dtype = np.dtype(codec_case.dtype)
    size = 16
    shape = {"batch_size": 1, "num_heads": 2, "num_kv_heads": 1, "value_head_dim": size, "head_dim": size}
    cache = kvattn.KVCache.create(1, 1, size, capacity=8, codec=codec_case.make(), dtype=codec_case.dtype)
    query, key, value = tokens(31, 5, **shape)
    # q k of one head: 300 * 300 * 16 / 4 = 360,000, more than float16 can say; the last keys compete.
    query = np.full_like(query, 300)
    key = np.full_like(key, -300)
    key[:, 3:] = 300
    new = [x.astype(dtype) for x in (query, key, value)]
    truth, low = TokenLists(1), TokenLists(1, dtype=dtype)
    for t in (0, 1):
        part = [x[:, :4] if t == 0 else x[:, 4:] for x in new]
        out, cache = steps(*part, cache, implementation=implementation)
        assert_accurate(np.asarray(out), truth.append(*part)[0], low.append(*part)[0])


# The rule and the mirror ---------------------------------------------------------------------------------------------


def check_mask_rule():
    """`Mask.allowed` pair by pair against Python, and `Mask.reachable` never hides an allowed key."""
    rng = np.random.default_rng(0)
    pairs = 0
    for causal, window, num_sinks, segments in (
        (True, None, 0, False),
        (True, 1, 0, False),
        (True, 4, 0, False),
        (True, 4, 2, False),
        (True, 100, 0, True),
        (False, None, 0, False),
        (False, None, 0, True),
        (True, 3, 1, True),
    ):
        q = rng.integers(-1, 12, (3, 5)).astype(np.int32)
        kv = rng.integers(-1, 12, (3, 2, 9)).astype(np.int32)
        q_ids, kv_ids = (rng.integers(0, 2, s).astype(np.int32) for s in ((3, 5), (3, 9)))
        mask = Mask(causal=causal, window=window, num_sinks=num_sinks)
        ids = {"q_segments": jnp.asarray(q_ids), "kv_segments": jnp.asarray(kv_ids)} if segments else {}
        allowed = np.asarray(mask.allowed(jnp.asarray(q), jnp.asarray(kv), **ids))
        reachable = np.asarray(mask.reachable(jnp.asarray(q), jnp.asarray(kv)))
        for b, k, t, s in np.ndindex(3, 2, 5, 9):
            i, j = int(q[b, t]), int(kv[b, k, s])
            expected = i >= 0 and j >= 0
            if causal:
                expected = expected and j in (seen_from(i, window) | {p for p in range(num_sinks) if p <= i})
            if segments:
                expected = expected and q_ids[b, t] == kv_ids[b, s]
            assert allowed[b, k, t, s] == expected, f"{mask}: query {i}, key {j}"
            assert reachable[b, k, s] or not expected, f"{mask}: key {j} is needed by query {i} but not reachable"
            pairs += 1
    return pairs


def check_mirror_probes(implementation):
    """`dot_product_attention` attends to what `jax.nn` says: aligned at the top left, windows count neighbours."""
    length, keys = 5, 8
    query = jnp.zeros((2, length, 2, keys))
    key = jnp.asarray(np.random.default_rng(0).normal(size=(2, keys, 1, keys)), jnp.float32)
    value = jnp.broadcast_to(jnp.eye(keys)[:, None], (2, keys, 1, keys))
    kv_lengths, q_lengths = [3, 8], [5, 2]
    free = np.random.default_rng(1).random((2, 1, length, keys)) < 0.6
    for causal, local, lengths, masked, extra in (
        (True, None, False, False, False),
        (True, None, False, False, True),
        (False, (2, 1), False, False, False),
        (True, (2, 0), True, False, True),
        (False, None, True, True, False),
        (True, 1, True, True, True),
        (False, (0, 0), False, True, True),
    ):
        out = kvattn.dot_product_attention(
            query,
            key,
            value,
            mask=jnp.asarray(free) if masked else None,
            is_causal=causal,
            local_window_size=local,
            key_value_seq_lengths=jnp.asarray(kv_lengths, jnp.int32) if lengths else None,
            query_seq_lengths=jnp.asarray(q_lengths, jnp.int32) if lengths else None,
            softcap=50.0 if extra else None,
            implementation=implementation,
        )
        left, right = local if isinstance(local, tuple) else (local, local)
        for b, t, n in np.ndindex(2, length, 2):
            seen = [
                s
                for s in range(keys)
                if (not causal or s <= t)
                and (local is None or t - left <= s <= t + right)
                and (not lengths or s < kv_lengths[b])
                and (not masked or free[b, 0, t, s])
            ]
            row = np.zeros(keys)
            if lengths and t >= q_lengths[b]:
                pass
            elif seen:
                row[seen] = 1 / len(seen)
            elif not extra:
                row[:] = 1 / keys  # jax.nn's answer; with an extra it is kvattn's own, zeros
            assert np.abs(np.asarray(out[b, t, n]) - row).max() < 1e-6, f"row {b, t, n}: {out[b, t, n]}, not {row}"


# The step as a value, and as a program -------------------------------------------------------------------------------


def check_explicit(case, implementation, lengths=(CHUNK, 1)):
    """The cache is an argument and a result: nothing is changed behind the caller, nothing is remembered."""
    settings = {"implementation": implementation, **case.limits}
    one, two = make_cache(case), make_cache(case)
    for length in lengths:
        a, b = tokens(70 + length, length), tokens(80 + length, length)
        before = [np.asarray(x).copy() for x in jax.tree.leaves(one)]
        out, after = kvattn.cached_attention(*a, one, **settings)
        assert after is not one and after.lengths is not one.lengths
        for x, y in zip(before, jax.tree.leaves(one), strict=True):
            assert_same_bits(x, y, "the cache that was given")
        # Another sequence in between, then the same call again.
        _, two = kvattn.cached_attention(*b, two, **settings)
        again, after_again = kvattn.cached_attention(*a, one, **settings)
        assert_same_bits(out, again, "the same call, twice")
        for x, y in zip(jax.tree.leaves(after), jax.tree.leaves(after_again), strict=True):
            assert_same_bits(x, y, "the cache of the same call, twice")
        one = after


def check_one_trace(case, implementation, num_steps=2000):
    """A decode loop of growing length is traced once, and every step updates the same memory."""
    cache = kvattn.KVCache.create(1, 1, 4, capacity=num_steps + 1, policy=case.make(), dtype=jnp.float32)

    def step(query, key, value, cache):
        return kvattn.cached_attention(query, key, value, cache, **case.limits, implementation=implementation)

    step = kvattn.jit(step)
    new = [jax.device_put(x) for x in tokens(1, 1, 1, 4, 1, 1, 4)]
    _, cache = step(*new, cache)
    where = cache.keys["data"].unsafe_buffer_pointer()
    try:
        with jax.no_tracing():
            for i in range(num_steps - 1):
                old = cache
                _, cache = step(*new, cache)
                if i % 100 == 0:
                    assert all(x.is_deleted() for x in jax.tree.leaves(old)), "the cache was not donated"
                    assert cache.keys["data"].unsafe_buffer_pointer() == where, "the cache moved"
    except RuntimeError as error:
        raise AssertionError(f"traced again: {error}") from error
    assert int(cache.check().lengths[0]) == num_steps


def check_compiled_memory(policy, dtype, implementation, donate=True):
    """At B8 K8 H128 S4096 the compiled decode step updates the cache in place and needs little beside it."""
    cache = jax.eval_shape(lambda: kvattn.KVCache.create(8, 8, 128, capacity=4096, policy=policy, dtype=dtype))
    query, key = (jax.ShapeDtypeStruct((8, 1, heads, 128), dtype) for heads in (32, 8))
    step = jax.jit(
        lambda q, k, v, cache: kvattn.cached_attention(q, k, v, cache, implementation=implementation),
        donate_argnames="cache" if donate else (),
    )
    memory = step.lower(query, key, key, cache).compile().memory_analysis()
    expected = 2 * 8 * 8 * 4096 * 128 * jnp.dtype(dtype).itemsize
    assert expected <= cache.nbytes <= expected * 1.01, f"nbytes {cache.nbytes}, keys and values {expected}"
    assert memory.alias_size_in_bytes == cache.nbytes, f"{memory.alias_size_in_bytes} of {cache.nbytes} bytes aliased"
    assert memory.temp_size_in_bytes < 0.1 * cache.nbytes, f"{memory.temp_size_in_bytes} bytes beside the cache"


# The codec suite ------------------------------------------------------------------------------------------------------


def check_codec(codec_case):
    """decode(encode(x)) within the declared bound, zeros exact, and unused values never reach a mixture."""
    codec, size = codec_case.make(), 8
    x = np.random.default_rng(0).uniform(-1, 1, (2, 3, 5, size)).astype(np.float32)
    x[0, 0, 0] = 0
    x[0, 0, 1] = 1
    encoded = codec.encode(jnp.asarray(x))
    assert all(e.shape[:-1] == x.shape[:-1] for e in encoded.values())
    decoded = np.asarray(codec.decode(encoded, size, jnp.float32))
    assert np.abs(decoded - x).max() <= codec_case.error
    assert (decoded[0, 0, 0] == 0).all() and np.isfinite(decoded).all()
    assert hash(codec) == hash(codec_case.make()) and codec == codec_case.make()

    # scores and mix are the products of the decoded tokens.
    query = np.random.default_rng(1).normal(size=(2, 3, 4, size)).astype(np.dtype(codec_case.dtype))
    wide = query.astype(np.float32)
    for transposed in (False, True):
        lie = {n: e.swapaxes(-1, -2) if transposed or n in codec.token_minor else e for n, e in encoded.items()}
        scores = codec.scores(jnp.asarray(query), lie, transposed)
        assert jnp.finfo(scores.dtype).bits >= 32, "scores are float32 or wider"
        assert np.abs(np.asarray(scores) - np.einsum("bkmh,bkrh->bkmr", wide, decoded)).max() < 1e-5
    filled = np.ones((2, 1, 5), bool)
    filled[:, :, 3:] = False
    probs = np.where(filled[:, :, None], 0.25, 0).astype(np.float32) * np.ones((2, 3, 4, 5), np.float32)
    lie = {n: e.swapaxes(-1, -2) if n in codec.token_minor else e for n, e in encoded.items()}
    for poison in (None, np.nan, np.inf):
        dirty = lie
        if poison is not None:
            unused = ~filled[:, :, :, None]
            dirty = {
                n: jnp.where(
                    unused.swapaxes(-1, -2) if n in codec.token_minor else unused, jnp.asarray(poison, e.dtype), e
                )
                if jnp.issubdtype(e.dtype, jnp.floating)
                else e
                for n, e in lie.items()
            }
        mixed = codec.mix(jnp.asarray(probs), dirty, jnp.asarray(filled))
        assert jnp.finfo(mixed.dtype).bits >= 32
        expected = np.einsum("bkmr,bkrh->bkmh", probs[..., :3], decoded[..., :3, :])
        assert np.abs(np.asarray(mixed) - expected).max() < 1e-6


POLICY_CHECKS = (check_dirty_memory, check_neighbours)
"""What every policy must pass, with every implementation."""
BY_POSITION_CHECKS = (check_attendance, check_oracle)
"""What a policy must pass whose kept tokens follow from positions."""
