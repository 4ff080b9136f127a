"""What one does with a cache besides appending: trim, select, reset, cross-attention, merge; JAX's transformations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import suites
import variants
from oracles import TokenLists, assert_accurate, assert_same_bits, attend_token, cross
from suites import CHUNK, HV, POLICIES, STEPS, B, by_id, make_cache, tokens

import kvattn
from kvattn import errors
from kvattn.cache import status as bits

FULL, RING = by_id(POLICIES, "full", "ring5")
IMPLEMENTATION = "xla"


def append(seed, length, cache, lists, num_new=None):
    """Appends random tokens to the cache and to its model, and compares the outputs."""
    new = tokens(seed, length)
    out, cache = STEPS(*new, cache, num_new, implementation=IMPLEMENTATION)
    ref = lists.append(*new, num_new)[0]
    assert np.abs(np.asarray(out) - ref).max() < 2e-6
    return cache


def start(case, counts):
    """A cache whose rows hold `counts` tokens, and its model."""
    cache, lists = make_cache(case), case.oracle()
    left = np.asarray(counts)
    for seed in range(10):
        now = np.minimum(left, CHUNK)
        if now.any():
            cache = append(600 + seed, CHUNK, cache, lists, now)
        left = left - now
    assert lists.lengths() == list(counts)
    return cache, lists


def goes_on(cache, lists, case=FULL):
    """The cache is what its model is, now and after more tokens."""
    for seed, length in ((700, 1), (701, CHUNK)):
        suites.check_counts(case, cache, lists.lengths())
        suites.check_contents(case, cache, lists)
        cache = append(seed, length, cache, lists)
    suites.check_contents(case, cache, lists)
    return cache


jit_trim = jax.jit(lambda cache, n: cache.trim(n))
jit_select = jax.jit(lambda cache, rows: cache.select(rows))


# trim -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amount", [0, 3, [0, 1, 2, 3, 4, 5]], ids=str)
@pytest.mark.parametrize("trim", [lambda c, n: c.trim(n), jit_trim], ids=["eager", "jit"])
def test_trim(trim, amount):
    cache, lists = start(FULL, [3, 4, 5, 12, 7, 9])
    cache = trim(cache, amount if isinstance(amount, int) else np.asarray(amount, np.int32))
    lists.trim(np.broadcast_to(amount, (B,)).tolist())
    goes_on(cache.check(), lists)


def test_trim_everything():
    cache, lists = start(FULL, [3, 4, 5, 12, 0, 9])
    cache = cache.trim(cache.lengths)
    lists.trim(lists.lengths())
    goes_on(cache, lists)


def test_trim_ring_before_it_wraps():
    cache, lists = start(RING, [5, 4, 3, 2, 5, 0])
    amount = [5, 1, 0, 2, 3, 0]
    cache = cache.trim(np.asarray(amount, np.int32))
    lists.trim(amount)
    goes_on(cache, lists, RING)


def test_trim_ring_after_it_wrapped():
    cache, lists = start(RING, [6, 5, 11, 2, 0, 24])
    with pytest.raises(errors.UnsupportedError, match=r"rows \[0, 2, 5\]"):
        cache.trim([1, 1, 1, 1, 0, 1])
    # No token taken back: nothing is lost.
    cache = cache.trim([0, 2, 0, 1, 0, 0])
    lists.trim([0, 2, 0, 1, 0, 0])
    # Under jit the rows that cannot are left as they are, and say so.
    amount = np.asarray([1, 1, 2, 1, 0, 5], np.int32)
    after = jit_trim(cache, amount)
    lists.trim([0, 1, 0, 1, 0, 0])
    assert (np.asarray(after.status) != 0).tolist() == [True, False, True, False, False, True]
    with pytest.raises(errors.UnsupportedError, match=r"rows \[0, 2, 5\]"):
        after.check()
    goes_on(after, lists, RING)


@pytest.mark.parametrize(
    "amount, error, fragment",
    [
        (4, errors.RangeError, "4"),
        ([0, 0, 0, 13, 0, 0], errors.RangeError, "13"),
        (-1, errors.RangeError, "-1"),
        ([0, 0, 0, 0, -2, 0], errors.RangeError, "-2"),
        (2**31, errors.RangeError, str(2**31)),
        (1.0, errors.DTypeError, "num_tokens"),
        (True, errors.DTypeError, "num_tokens"),
        ([1, 1], errors.ShapeError, r"\(6,\)"),
    ],
)
def test_trim_refuses(amount, error, fragment):
    cache, _ = start(FULL, [3, 4, 5, 12, 7, 9])
    with pytest.raises(error, match=fragment):
        cache.trim(amount)


def test_trim_out_of_range_under_jit():
    cache, lists = start(FULL, [3, 4, 5, 12, 7, 9])
    after = jit_trim(cache, np.asarray([4, -1, 5, 13, 2, 0], np.int32))
    lists.trim([0, 0, 5, 0, 2, 0])
    assert (np.asarray(after.status) != 0).tolist() == [True, True, False, True, False, False]
    with pytest.raises(errors.RangeError, match=r"rows \[0, 1, 3\]"):
        after.check()
    goes_on(after, lists)


# select and reset -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [FULL, RING], ids=lambda c: c.id)
@pytest.mark.parametrize("rows", [[5, 4, 3, 2, 1, 0], [2, 2, 0, 2, 5, 5], [3, 3, 3, 3, 3, 3]], ids=str)
@pytest.mark.parametrize("select", [lambda c, r: c.select(r), jit_select], ids=["eager", "jit"])
def test_select(select, rows, case):
    cache, lists = start(case, [3, 4, 5, 12, 7, 9])
    cache = select(cache, np.asarray(rows))
    lists.select(rows)
    # Repeated rows are copies: what each of them takes next stays its own.
    goes_on(cache.check(), lists, case)


def test_select_drops_rows_and_none_at_all():
    cache, lists = start(FULL, [3, 4, 5, 12, 7, 9])
    fewer = cache.select([4, 1])
    lists.select([4, 1])
    assert fewer.batch_size == 2 and np.asarray(fewer.lengths).tolist() == [7, 4]
    suites.check_contents(FULL, fewer, lists)
    new = [x[:2] for x in tokens(1, 1)]
    out, fewer = kvattn.cached_attention(*new, fewer)
    assert np.abs(np.asarray(out) - lists.append(*new)[0]).max() < 2e-6
    for rows in ([], np.zeros(0, np.int32)):
        none = cache.select(rows)
        assert none.batch_size == 0 and none.lengths.shape == none.kept.shape == (0,)
        assert none.positions.shape == (0, 24)
    out, none = kvattn.cached_attention(*(x[:0] for x in new), none)
    assert out.shape == (0, 1, 4, HV)


@pytest.mark.parametrize(
    "rows, error, fragment",
    [
        ([0, 6], errors.RangeError, "6"),
        ([-1], errors.RangeError, "-1"),
        ([0.5], errors.DTypeError, "float"),
        ([True] * 6, errors.DTypeError, "bool"),
        ([[0]], errors.ShapeError, r"\(1, 1\)"),
        (0, errors.ShapeError, "vector"),
    ],
)
def test_select_refuses(rows, error, fragment):
    with pytest.raises(error, match=fragment):
        make_cache(FULL).select(rows)


def test_select_out_of_range_under_jit():
    cache, lists = start(FULL, [3, 4, 5, 12, 7, 9])
    after = jit_select(cache, np.asarray([1, 6, 0, -1, 99, 3]))
    lists.select([1, 0, 0, 0, 0, 3])
    lists.reset([False, True, False, True, True, False])
    assert (np.asarray(after.status) != 0).tolist() == [False, True, False, True, True, False]
    with pytest.raises(errors.RangeError, match=r"rows \[1, 3, 4\]"):
        after.check()
    goes_on(after, lists)


def test_select_takes_the_record_along():
    cache, _ = start(FULL, [24, 3, 0, 0, 0, 0])
    _, cache = STEPS(*tokens(0, 1), cache, implementation=IMPLEMENTATION)
    status = np.asarray(cache.select([1, 0, 0]).status)
    assert (status != 0).tolist() == [False, True, True]


def test_select_of_unknown_rows_takes_no_record_along():
    """A row that is not there is not row 0: what happened to row 0 is not its business."""
    cache, _ = start(FULL, [24, 3, 0, 0, 0, 0])
    _, cache = STEPS(*tokens(0, 1), cache, implementation=IMPLEMENTATION)
    after = jit_select(cache, np.asarray([1, 2, 6, 3, 4, 5]))
    with pytest.raises(errors.RangeError, match=r"rows \[2\]"):
        after.check()


@pytest.mark.parametrize(
    "policy",
    [
        kvattn.H2O(2, 2),
        kvattn.H2O(2, 2, positions_in="cache"),
        kvattn.Scissorhands(4, 1, 8),
        kvattn.FastGen(0.5),
    ],
    ids=repr,
)
def test_select_of_unknown_rows_remembers_nothing(policy):
    """What a policy remembers of row 0 is not the business of a row that is not there, now or in the next step."""
    one = jnp.ones((2, 4, 1, 2), jnp.float32)
    cache = kvattn.KVCache.create(2, 1, 2, policy=policy, capacity=8, dtype=jnp.float32)
    _, cache = kvattn.cached_attention(one, one, 100 * one, cache)
    after = jit_select(cache, np.asarray([1, 7, 0]))
    fresh = kvattn.KVCache.create(1, 1, 2, policy=policy, capacity=8, dtype=jnp.float32)
    assert np.asarray(after.lengths).tolist() == [4, 0, 4] and np.asarray(after.kept)[1].tolist() == [0]
    assert (np.asarray(after.positions)[1] == -1).all()
    assert (np.asarray(after.status) != 0).tolist() == [False, True, False]
    new = jnp.ones((3, 1, 1, 2), jnp.float32)
    for _ in range(2):
        for a, b in zip(jax.tree.leaves(after.state), jax.tree.leaves(fresh.state), strict=True):
            np.testing.assert_array_equal(a[1], b[0])
        out, after = kvattn.cached_attention(new, new, new, after)
        expected, fresh = kvattn.cached_attention(new[:1], new[:1], new[:1], fresh)
        assert_same_bits(out[1], expected[0], "a step on the row")


@pytest.mark.parametrize("policy", list(variants.POLICIES.values()), ids=repr)
def test_a_row_that_is_not_there_has_the_state_of_an_empty_one(policy):
    """Other rows take along what the policy remembers of them: whatever it is."""
    cache = kvattn.KVCache.create(3, 2, 2, policy=policy, capacity=8, dtype=jnp.float32)
    empty = jax.tree.leaves(cache.state)
    rng = np.random.default_rng(0)
    state = [jnp.asarray(rng.integers(0, 2, x.shape) * 7).astype(x.dtype) for x in empty]
    cache = cache.replace(state=jax.tree.unflatten(jax.tree.structure(cache.state), state))
    after = jit_select(cache, np.asarray([2, 7, 0]))
    for given, fresh, got in zip(state, empty, jax.tree.leaves(after.state), strict=True):
        np.testing.assert_array_equal(got, np.stack([given[2], fresh[1], given[0]]))


def test_positions_end_where_int32_does():
    """A ring never fills up; the count of its tokens does."""
    ring = kvattn.KVCache.create(2, 1, 2, policy=kvattn.SlidingWindow(4), dtype=jnp.float32)
    ring = ring.replace(lengths=jnp.asarray([2**31 - 3, 2**31 - 4], jnp.int32))
    with pytest.raises(errors.CapacityError, match=r"rows \[0\]"):
        kvattn.cached_attention(*[jnp.ones((2, 3, 1, 2))] * 3, ring)


@pytest.mark.parametrize("case", [FULL, RING], ids=lambda c: c.id)
def test_reset(case):
    cache, lists = start(case, [3, 4, 5, 12, 7, 9])
    rows = [True, False, True, False, False, True]
    cache = cache.reset(np.asarray(rows))
    lists.reset(rows)
    cache = goes_on(cache, lists, case)
    lists.reset([True] * B)
    goes_on(cache.reset(), lists, case)


def test_reset_clears_the_record():
    cache, _ = start(FULL, [24, 24, 0, 0, 0, 0])
    _, cache = STEPS(*tokens(0, 1), cache, implementation=IMPLEMENTATION)
    one = cache.reset(np.arange(B) == 0)
    with pytest.raises(errors.CapacityError, match=r"rows \[1\]"):
        one.check()
    assert np.asarray(cache.reset().check().lengths).tolist() == [0] * B
    with pytest.raises(errors.ShapeError, match="rows"):
        cache.reset(np.ones(2, bool))


def test_reset_forgets_nan():
    """A row that broke is as good as new after a reset."""
    cache = make_cache(FULL)
    broken = [np.full_like(x, np.nan) for x in tokens(0, CHUNK)]
    _, cache = STEPS(*broken, cache, implementation=IMPLEMENTATION)
    goes_on(cache.reset(), FULL.oracle())


READERS = {
    "kept": lambda cache: cache.kept,
    "positions": lambda cache: cache.positions,
    "dense": lambda cache: cache.dense(),
    "view": lambda cache: cache.view(),
    "select": lambda cache: cache.select([0]),
    "trim": lambda cache: cache.trim(0),
    "reset": lambda cache: cache.reset(),
    "check": lambda cache: cache.check(),
}


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
def test_a_donated_cache_says_so(paged):
    """Whatever is asked of it; what needs none of its arrays still answers."""
    if paged:
        cache = kvattn.PagedKVCache.create(2, 4, 1, 2, batch_size=1, max_pages=2)
    else:
        cache = kvattn.KVCache.create(1, 1, 2, policy=kvattn.H2O(2, 2))
    size, slots = cache.nbytes, cache.num_slots
    jax.jit(lambda c: c, donate_argnums=0)(cache)
    for name, read in READERS.items():
        with pytest.raises(errors.StaleCacheError, match="donated"):
            pytest.fail(f"{name}: {read(cache)}")
    assert (cache.nbytes, cache.num_slots, cache.batch_size) == (size, slots, 1)
    assert "KVCache(" in repr(cache)


# A static cache for cross-attention -----------------------------------------------------------------------------------

S = 9
ENCODER_LENGTHS = [9, 0, 4, 1, 8, 9]


def encoder(lengths=None, dtype=np.float32, garbage=None):
    rng = np.random.default_rng(0)
    key = rng.normal(size=(B, S, 2, 8)).astype(dtype)
    value = rng.normal(size=(B, S, 2, 5)).astype(dtype)
    if garbage is not None:
        unused = np.arange(S)[None] >= np.asarray(lengths)[:, None]
        key[unused], value[unused] = garbage, garbage
    return key, value


@pytest.mark.parametrize("implementation", suites.IMPLEMENTATIONS)
@pytest.mark.parametrize("padding", ["right", "left"])
def test_cross_attention(padding, implementation):
    key, value = encoder()
    cache = kvattn.KVCache.from_encoder(key, value, ENCODER_LENGTHS)
    assert cache.is_static and np.asarray(cache.lengths).tolist() == ENCODER_LENGTHS
    assert np.asarray(cache.kept).tolist() == ENCODER_LENGTHS
    query = tokens(1, 4)[0]
    num_new = [4, 2, 0, 1, 3, 4]
    rules = {"scale": 0.4, "softcap": 3.0, "sinks": (0.5, -1.0, 3.0, 0.0)}
    out, after = STEPS(query, None, None, cache, num_new, implementation=implementation, padding=padding, **rules)
    truth, low = (
        cross(query, key, value, ENCODER_LENGTHS, num_new, padding, dtype=d, **rules)[0]
        for d in (np.float64, np.float32)
    )
    assert_accurate(out, truth, low)
    for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(after.check()), strict=True):
        assert_same_bits(a, b, "a static cache after a step")
    # What lies behind an encoder's tokens does not matter.
    for garbage in (np.nan, np.inf):
        dirty = kvattn.KVCache.from_encoder(*encoder(ENCODER_LENGTHS, garbage=garbage), ENCODER_LENGTHS)
        again, _ = STEPS(query, None, None, dirty, num_new, implementation=implementation, padding=padding, **rules)
        assert_same_bits(out, again, "cross-attention over a dirty encoder")


def test_cross_attention_one_query_and_dtypes():
    key, value = encoder()
    cache = kvattn.KVCache.from_encoder(key, value, dtype=jnp.bfloat16)
    query = tokens(1, 1)[0].astype(jnp.bfloat16)
    out, _ = STEPS(query, None, None, cache)
    assert out.dtype == jnp.bfloat16 and out.shape == (B, 1, 4, 5)
    key, value = (x.astype(jnp.bfloat16) for x in (key, value))
    assert_accurate(out, cross(query, key, value)[0], cross(query, key, value, dtype=jnp.bfloat16)[0])


def test_cross_attention_over_nothing():
    cache = kvattn.KVCache.from_encoder(jnp.zeros((2, 0, 2, 8)), jnp.zeros((2, 0, 2, 5)))
    out, _ = kvattn.cached_attention(jnp.ones((2, 3, 4, 8)), None, None, cache)
    assert out.shape == (2, 3, 4, 5) and not np.asarray(out).any()


@pytest.mark.wrong_types
def test_static_cache_refuses():
    key, value = encoder()
    cache = kvattn.KVCache.from_encoder(key, value)
    query, new_key, new_value = tokens(1, 1)
    for error, call in (
        (errors.ConfigError, lambda: kvattn.cached_attention(query, new_key, new_value, cache)),
        (errors.ConfigError, lambda: kvattn.cached_attention(query, None, None, cache, rope=kvattn.RoPE(8))),
        (errors.ConfigError, lambda: kvattn.cached_attention(query, None, None, cache, window=3)),
        (errors.RangeError, lambda: kvattn.cached_attention(query, None, None, make_cache(FULL))),  # it has no tokens
        (errors.UnsupportedError, lambda: cache.trim(1)),
        (errors.RangeError, lambda: kvattn.KVCache.from_encoder(key, value, [10] * B)),
        (errors.RangeError, lambda: kvattn.KVCache.from_encoder(key, value, [-1] * B)),
        (errors.ShapeError, lambda: kvattn.KVCache.from_encoder(key, value[:, :-1])),
        (errors.ShapeError, lambda: kvattn.KVCache.from_encoder(key[0], value[0])),
        (errors.DTypeError, lambda: kvattn.KVCache.from_encoder(key.astype(int), value)),
    ):
        with pytest.raises(error):
            call()


def test_bad_counts_on_a_static_cache_under_jit():
    cache = kvattn.KVCache.from_encoder(*encoder())
    out, after = STEPS(tokens(1, 4)[0], None, None, cache, [4, 5, -1, 0, 4, 4])
    assert (np.asarray(after.status) != 0).tolist() == [False, True, True, False, False, False]
    assert not np.asarray(out)[[1, 2, 3]].any() and np.asarray(out)[[0, 4, 5]].all()
    with pytest.raises(errors.RangeError, match=r"rows \[1, 2\]"):
        after.check()


def test_bad_encoder_lengths_under_jit():
    """A length that cannot be seen when it is wrong is recorded, not clamped in silence."""
    key, value = encoder()
    cache = jax.jit(kvattn.KVCache.from_encoder)(key, value, jnp.asarray([9, 10, -1, 3, 0, 99], jnp.int32))
    assert (np.asarray(cache.status) != 0).tolist() == [False, True, True, False, False, True]
    assert np.asarray(cache.lengths).tolist() == [9, 0, 0, 3, 0, 0]
    with pytest.raises(errors.RangeError, match=r"rows \[1, 2, 5\]"):
        cache.check()


def test_select_of_a_static_cache():
    key, value = encoder()
    cache = kvattn.KVCache.from_encoder(key, value, ENCODER_LENGTHS).select([4, 4, 1])
    query = tokens(1, 2)[0][:3]
    rows = np.asarray([4, 4, 1])
    out, _ = kvattn.cached_attention(query, None, None, cache)
    ref = cross(query, key[rows], value[rows], [8, 8, 0])[0]
    assert np.abs(np.asarray(out) - ref).max() < 2e-6


# merge_states ---------------------------------------------------------------------------------------------------------


def parts():
    """Attention over three disjoint sets of tokens, one of them empty in places, and over their union."""
    rng = np.random.default_rng(0)
    query = rng.normal(size=(4, 8))
    keys, values = rng.normal(size=(12, 4, 8)), rng.normal(size=(12, 4, 6))
    cuts = (slice(0, 5), slice(5, 6), slice(6, 12))
    sums = [attend_token(query, list(keys[c]), list(values[c])) for c in cuts]
    whole = attend_token(query, list(keys), list(values))
    return [tuple(jnp.asarray(x, jnp.float32) for x in s) for s in sums], whole


def test_merge_is_attention_over_the_union():
    (a, b, c), (out, lse) = parts()
    left = kvattn.merge_states(*kvattn.merge_states(*a, *b), *c)
    right = kvattn.merge_states(*a, *kvattn.merge_states(*b, *c))
    swapped = kvattn.merge_states(*kvattn.merge_states(*c, *a), *b)
    for merged in (left, right, swapped):
        assert np.abs(np.asarray(merged[0]) - out).max() < 1e-6
        assert np.abs(np.asarray(merged[1]) - lse).max() < 1e-6


@pytest.mark.parametrize("garbage", [0.0, np.nan, np.inf, -np.inf])
def test_merge_with_nothing(garbage):
    (a, _, _), _ = parts()
    nothing = jnp.full_like(a[0], garbage), jnp.full_like(a[1], -jnp.inf)
    for merged in (kvattn.merge_states(*a, *nothing), kvattn.merge_states(*nothing, *a)):
        assert_same_bits(merged[0], a[0], "out merged with nothing")
        assert np.abs(np.asarray(merged[1]) - np.asarray(a[1])).max() < 1e-6
    out, lse = kvattn.merge_states(*nothing, *nothing)
    assert_same_bits(out, jnp.zeros_like(out), "nothing merged with nothing")
    assert_same_bits(lse, jnp.full_like(lse, -jnp.inf), "its logsumexp")


def test_merge_far_apart_and_dtypes():
    (a, b, _), _ = parts()
    out, lse = kvattn.merge_states(a[0], a[1] + 1e4, b[0], b[1] - 1e4)
    assert_same_bits(out, a[0], "a side that outweighs the other")
    assert np.isfinite(np.asarray(lse)).all()
    out, lse = kvattn.merge_states(a[0].astype(jnp.bfloat16), a[1], b[0].astype(jnp.bfloat16), b[1])
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    with pytest.raises(errors.ShapeError, match="lse"):
        kvattn.merge_states(a[0], a[1], b[0], b[1][:2])


def test_merge_gradient_is_finite_beside_nothing():
    (a, _, _), _ = parts()
    nothing = jnp.zeros_like(a[0]), jnp.full_like(a[1], -jnp.inf)
    total = lambda *x: jnp.sum(kvattn.merge_states(*x)[0])
    grads = jax.grad(total, argnums=(0, 1, 2))(*a, *nothing)
    assert all(np.isfinite(np.asarray(g)).all() for g in grads)
    assert_same_bits(grads[0], jnp.ones_like(a[0]), "gradient of the side that is there")


# Under JAX's transformations ------------------------------------------------------------------------------------------


def test_scan():
    cache, lists = start(FULL, [3, 4, 5, 12, 7, 9])
    new = [jnp.asarray(x) for x in tokens(3, CHUNK)]

    def body(cache, token):
        out, cache = kvattn.cached_attention(*(x[:, None] for x in token), cache)
        return cache, out[:, 0]

    after, outs = jax.jit(lambda cache, xs: jax.lax.scan(body, cache, xs))(cache, [x.swapaxes(0, 1) for x in new])
    ref = lists.append(*new)[0]
    assert np.abs(np.asarray(outs).swapaxes(0, 1) - ref).max() < 2e-6
    suites.check_contents(FULL, after, lists)


def test_overflow_inside_scan():
    cache, lists = start(FULL, [22, 4, 5, 12, 24, 9])
    new = [jnp.asarray(x)[:, :4].swapaxes(0, 1) for x in tokens(3, CHUNK)]

    def body(cache, token):
        out, cache = kvattn.cached_attention(*(x[:, None] for x in token), cache)
        return cache, out[:, 0]

    after, outs = jax.jit(lambda cache, xs: jax.lax.scan(body, cache, xs))(cache, new)
    assert (np.asarray(after.status) != 0).tolist() == [True, False, False, False, True, False]
    assert np.asarray(after.lengths).tolist() == [24, 8, 9, 16, 24, 13]
    assert not np.asarray(outs)[2:, 0].any() and not np.asarray(outs)[:, 4].any()
    assert np.asarray(outs)[:2, 0].all()
    with pytest.raises(errors.CapacityError, match=r"rows \[0, 4\]"):
        after.check()
    del lists


@pytest.mark.parametrize("case", [FULL, RING], ids=lambda c: c.id)
def test_vmap(case):
    caches, models = zip(*(start(case, counts) for counts in ([3, 4, 5, 12, 7, 9], [23, 0, 1, 2, 3, 24])), strict=True)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *caches)
    new = [tokens(seed, 1) for seed in (1, 2)]
    step = jax.jit(jax.vmap(lambda q, k, v, cache: kvattn.cached_attention(q, k, v, cache)))
    out, after = step(*(np.stack(x) for x in zip(*new, strict=True)), stacked)
    for i, lists in enumerate(models):
        ref = lists.append(*new[i])[0]
        assert np.abs(np.asarray(out)[i] - ref).max() < 2e-6
        one = jax.tree.map(lambda x, i=i: x[i], after)
        suites.check_contents(case, one, lists)
        assert (np.asarray(one.status) != 0).tolist() == lists.overflowed


@pytest.mark.parametrize("case", [FULL, RING], ids=lambda c: c.id)
def test_structure_is_preserved(case):
    cache, _ = start(case, [3, 4, 5, 12, 7, 9])
    same = jax.tree.map(lambda x: x, cache)
    assert isinstance(same, kvattn.KVCache) and jax.tree.structure(same) == jax.tree.structure(cache)
    new = tokens(1, 1)
    shapes = jax.eval_shape(lambda *x: kvattn.cached_attention(*x), *new, cache)[1]
    assert jax.tree.structure(shapes) == jax.tree.structure(cache)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(shapes)] == [(x.shape, x.dtype) for x in jax.tree.leaves(cache)]
    assert shapes.nbytes == cache.nbytes == sum(x.nbytes for x in jax.tree.leaves(cache))
    # Saved as plain arrays and put back together.
    leaves, structure = jax.tree.flatten(cache)
    back = jax.tree.unflatten(structure, [jnp.asarray(np.asarray(x)) for x in leaves])
    a, b = (STEPS(*new, c, implementation=IMPLEMENTATION)[0] for c in (cache, back))
    assert_same_bits(a, b, "outputs of a cache that was saved")


def test_while_loop():
    cache, lists = start(RING, [3, 4, 5, 12, 7, 9])
    new = [jnp.asarray(x) for x in tokens(3, 1)]
    loop = jax.jit(lambda c: jax.lax.fori_loop(0, 6, lambda i, c: kvattn.cached_attention(*new, c)[1], c))
    after = loop(cache)
    for _ in range(6):
        lists.append(*new)
    suites.check_contents(RING, after, lists)


# Gradients ------------------------------------------------------------------------------------------------------------

RULES = {"scale": 0.5, "softcap": 2.0, "window": 6}


def run_two_steps(implementation, cache, first, second):
    """A chunk and a token: what the token's output owes to the chunk goes through the cache."""
    out_a, cache = kvattn.cached_attention(*first, cache, num_new=[3, 1, 2], implementation=implementation, **RULES)
    out_b, _ = kvattn.cached_attention(*second, cache, implementation=implementation, **RULES)
    return out_a, out_b


@pytest.mark.parametrize("implementation", suites.IMPLEMENTATIONS)
def test_gradient_through_a_chunk_and_a_decode_step(implementation):
    shape = {"batch_size": 3, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4, "value_head_dim": 3}
    steps = [tokens(seed, length, **shape) for seed, length in ((1, 3), (2, 3), (3, 1))]
    weights = [np.random.default_rng(seed).normal(size=(3, length, 2, 3)) for seed, length in ((8, 3), (9, 1))]
    empty = kvattn.KVCache.create(3, 1, 4, capacity=8, dtype=jnp.float32, value_head_dim=3)

    def total(first, second, garbage=0.0):
        _, cache = kvattn.cached_attention(*steps[0], suites.filled_with(empty, garbage), num_new=[3, 3, 0])
        outs = run_two_steps(implementation, cache, first, second)
        return sum(jnp.sum(out * w.astype(np.float32)) for out, w in zip(outs, weights, strict=True))

    def truth(first, second):
        lists = TokenLists(3, window=RULES["window"], scale=RULES["scale"], softcap=RULES["softcap"])
        lists.append(*steps[0], [3, 3, 0])
        outs = lists.append(*first, [3, 1, 2])[0], lists.append(*second)[0]
        return sum(np.sum(out * w) for out, w in zip(outs, weights, strict=True))

    gradient = jax.jit(jax.grad(total, argnums=(0, 1)))
    grads = gradient(steps[1], steps[2])
    flat = [np.asarray(g) for g in jax.tree.leaves(grads)]
    arrays = [x.astype(np.float64) for x in (*steps[1], *steps[2])]
    for i, grad in enumerate(flat):
        assert np.abs(grad).max() > 1e-3, "a gradient that vanishes"
        direction, eps = np.random.default_rng(i).normal(size=grad.shape), 1e-5
        moved = []
        for sign in (1, -1):
            x = list(arrays)
            x[i] = x[i] + sign * eps * direction
            moved.append(truth(x[:3], x[3:]))
        numeric = (moved[0] - moved[1]) / (2 * eps)
        assert abs(numeric - np.sum(grad * direction)) < 1e-4 * max(1, abs(numeric)), f"argument {i}"


@pytest.mark.parametrize("implementation", suites.IMPLEMENTATIONS)
def test_gradient_does_not_see_unused_memory(implementation):
    """NaN in unused slots and in pads: the gradients have the same bits."""
    new = [jnp.asarray(x) for x in tokens(5, 1)]
    counts = jnp.asarray([1, 0, 1, 1, 1, 1], jnp.int32)

    def total(query, key, value, cache):
        out, _ = kvattn.cached_attention(query, key, value, cache, num_new=counts, implementation=implementation)
        return jnp.sum(out * jnp.cos(jnp.arange(HV, dtype=jnp.float32)[None, None, None]))

    gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
    clean, dirty = (gradient(*new, suites.filled_with(make_cache(FULL), x)) for x in (0.0, np.nan))
    for name, a, b in zip(("query", "key", "value"), clean, dirty, strict=True):
        assert np.isfinite(np.asarray(a)).all()
        assert not np.asarray(a)[1].any(), f"gradient of a row without tokens, by {name}"
        assert_same_bits(a, b, f"gradient by {name}")


def test_a_fork_of_a_wrapped_ring_is_independent():
    cache, lists = start(RING, [12, 13, 14, 15, 16, 17])
    fork, fork_lists = cache.select(np.arange(B)), RING.oracle()
    fork_lists.rows = [list(row) for row in lists.rows]
    cache = append(801, CHUNK, cache, lists)
    fork = append(802, 1, fork, fork_lists)
    goes_on(cache, lists, RING)
    goes_on(fork, fork_lists, RING)


def test_the_given_cache_survives_verbs():
    cache, _ = start(FULL, [3, 4, 5, 12, 7, 9])
    before = [np.asarray(x).copy() for x in jax.tree.leaves(cache)]
    cache.trim(1), cache.select([0]), cache.reset(), dataclasses.replace(cache)
    for a, b in zip(before, jax.tree.leaves(cache), strict=True):
        assert_same_bits(a, b, "a cache after its verbs")


@pytest.mark.parametrize(
    ("dtype", "given", "codec", "largest"),
    [
        (jnp.float16, jnp.float32, None, 65504.0),
        (jnp.float16, jnp.bfloat16, None, 65504.0),
        (jnp.bfloat16, jnp.float32, None, 3.38e38),
        (jnp.float16, jnp.float32, kvattn.KIVI(2, 2, 2), 65504.0),
    ],
)
def test_a_number_that_is_too_large_is_not_stored_silently(dtype, given, codec, largest):
    """It would become infinite. What is infinite or NaN already is stored as it is, unless a codec cannot."""
    cache = kvattn.KVCache.create(2, 1, 4, capacity=4, codec=codec, dtype=dtype)
    ones = jnp.ones((2, 1, 1, 4), given)
    step = jax.jit(kvattn.cached_attention)
    for name, key, value in (("key", 0, 1), ("value", 1, 0)):
        pair = [ones, ones.at[1, 0, 0, 2].set(jnp.asarray(-1.02 * largest if largest < 1e38 else 3.4e38, given))]
        with pytest.raises(errors.RangeError, match=r"rows \[1\] have keys or values .*beyond"):
            kvattn.cached_attention(ones, pair[1 - key], pair[1 - value], cache)
        _, marked = step(ones, pair[1 - key], pair[1 - value], cache)
        with pytest.raises(errors.RangeError, match=r"rows \[1\].*too large"):
            marked.check()
        assert np.asarray(marked.status).tolist() == [0, bits.NONFINITE], name
    fits = ones.at[1, 0, 0, 2].set(jnp.asarray(0.99 * largest, given))
    assert not np.asarray(step(ones, fits, fits, cache)[1].check().status).any()
    if codec is None:
        bad = ones.at[1, 0, 0, 2].set(jnp.nan).at[1, 0, 0, 3].set(jnp.inf)
        assert not np.asarray(step(ones, bad, bad, cache)[1].check().status).any()


def test_float8_and_int8_take_what_float16_does_not():
    """They keep a float32 scale: nothing becomes infinite, whatever the cache's dtype."""
    big = jnp.full((1, 1, 1, 4), 1e6, jnp.float32)
    for codec in (kvattn.Int8(), kvattn.Float8()):
        cache = kvattn.KVCache.create(1, 1, 4, capacity=4, codec=codec, dtype=jnp.float16)
        out, cache = kvattn.cached_attention(big * 1e-6, big, big, cache)
        np.testing.assert_allclose(out, big, rtol=0.01)
        cache.check()
