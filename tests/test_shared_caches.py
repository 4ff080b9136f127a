"""Layers that share a cache: one appends, the others attend to what it keeps with queries of their own.

Either with its keys and values and the cache as it was (`append=False`), or, without any, with the cache that it has
left. The oracles know of one layer only: it has the readers' queries.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import suites
import variants
from oracles import assert_same_bits, attend_token, kept_after
from suites import CHUNK, B, H, K, N

import kvattn
from kvattn import errors, sharding
from kvattn.cache.status import BAD_COUNT, BAD_PAGE, LOST
from kvattn.pallas.interpreter import interpret
from kvattn.policies import Context, OrderedWindow

LENGTHS = suites.history(3)
ROPE = kvattn.RoPE(H)
BY_POSITION = [
    pytest.param(case, id=case.id, marks=() if case.quick else pytest.mark.slow)
    for case in suites.POLICIES
    if case.by_position
]


@functools.cache
def step(append=True, **settings):
    """One compiled step per setting."""

    def call(query, key, value, cache, num_new):
        given = {n: jnp.asarray(x, jnp.float32) if isinstance(x, tuple) else x for n, x in settings.items()}
        return kvattn.cached_attention(query, key, value, cache, num_new=num_new, append=append, **given)

    return jax.jit(call, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def both(**settings):
    """One compiled step of an owner and of a reader, either way; what each returns."""

    def call(own, query, key, value, cache, num_new):
        given = {n: jnp.asarray(x, jnp.float32) if isinstance(x, tuple) else x for n, x in settings.items()}
        one = functools.partial(kvattn.cached_attention, num_new=num_new, **given)
        out, after = one(own, key, value, cache)
        return (out, after), one(query, key, value, cache, append=False), one(query, None, None, after)

    return jax.jit(call, compiler_options={"xla_backend_optimization_level": 0})


def histories(case, **settings):
    """A ragged history, chunks and single tokens, as (queries of a reader, keys, values, counts, caches, outputs).

    The two caches are those before and after the owner's step; the outputs are those of either way to read.
    """
    cache = suites.make_cache(case)
    limit = case.limit or suites.CAPACITY
    settings |= case.limits
    for i, (length, num_new) in enumerate(suites.history(3, limit)):
        own, key, value = suites.tokens(2 * i, length)
        query = suites.tokens(2 * i + 1, length)[0]
        (_, after), beside, read = both(**settings)(own, query, key, value, cache, num_new)
        yield query, key, value, num_new, (cache, after), (beside, read)
        cache = after


def assert_unchanged(before, after, bit=0):
    """The arrays of a cache that was read, but for a bit of its status."""
    after = after.replace(status=after.status & ~bit)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert_same_bits(a, b, "a cache that was read")


@pytest.mark.parametrize("case", BY_POSITION)
@pytest.mark.parametrize("padding", ["right", pytest.param("left", marks=pytest.mark.slow)])
def test_what_a_reader_attends_to(case, padding):
    """The owner's keys and values always; its cache as long as that holds all that some query of the chunk sees."""
    rules = {"softcap": 3.0, "sinks": (0.5, -1.0, 0.0, 2.0)}
    if case.true_distances:
        rules |= {"alibi_slopes": (0.5, 0.25, 0.1, 0.0)}
    oracle = case.oracle(rope_theta=10000.0 if case.true_distances else None, **rules)
    rope = ROPE if case.true_distances else None
    refused = 0
    for query, key, value, num_new, caches, outs in histories(case, rope=rope, padding=padding, **rules):
        lengths = oracle.lengths()
        expected, _ = oracle.append(query, key, value, num_new, padding)
        (beside, first), (read, second) = outs
        np.testing.assert_allclose(beside, expected, atol=2e-5)
        assert_unchanged(caches[0], first)
        lost = np.zeros(B, bool)
        for row, n in enumerate(num_new):
            seen = set().union(*(case.seen_from(p) for p in range(lengths[row], lengths[row] + n)))
            lost[row] = not seen <= (oracle.kept(row) if case.limit is None else seen)
        np.testing.assert_allclose(read, np.where(lost[:, None, None, None], 0, expected), atol=2e-5)
        assert (np.asarray(second.status) == np.where(lost, LOST, 0)).all()
        assert_unchanged(caches[1], second, LOST)
        refused += lost.sum()
    assert (refused > 0) == (case.limit is None)


@pytest.mark.parametrize("case", [case for case in suites.POLICIES if case.by_position], ids=lambda case: case.id)
def test_what_can_be_read(case):
    """Whatever came before, and however much: where what is kept has all that the new tokens see."""
    policy, most = case.make(), case.limit or 99
    rows = np.array([(n, new) for n in range(14) for new in range(10) if n + new <= most], np.int32)
    came = Context(*map(jnp.asarray, rows.T), 9, policy.num_slots(case.capacity))
    found = policy.can_read((), came, policy.mask().narrowed(case.window).cut(case.chunk))
    for (n, new), can in zip(rows.tolist(), np.asarray(found).tolist(), strict=True):
        seen = set().union(*(case.seen_from(p) for p in range(n, n + new)))
        assert can == (case.limit is not None or seen <= kept_after(n + new, case.keeps, case.num_sinks, case.cuts))


def test_what_can_be_read_of_a_budget():
    """All that came, or single tokens."""
    policy = kvattn.H2O(2, 2)
    positions = jnp.asarray([[[0, 1, 2, -1, -1]], [[0, 2, 4, 5, -1]], [[0, 2, 4, 5, -1]]], jnp.int32)
    state = policy.init(3, 1, 5).replace(positions=positions)
    came = Context(jnp.asarray([1, 4, 5]), jnp.asarray([2, 2, 1]), 2, 5)
    assert policy.can_read(state, came, policy.mask()).tolist() == [True, False, True]


@pytest.mark.parametrize("name", [*variants.POLICIES, "OrderedWindow"])
def test_the_owners_queries_find_what_they_found(name):
    """Of policies that let a token go after each step, what is left is attended to, and nothing is scored."""
    policy = OrderedWindow(3) if name == "OrderedWindow" else variants.POLICIES[name]
    cache = kvattn.KVCache.create(
        B, K, H, policy=policy, capacity=variants.capacity_of(policy, suites.CAPACITY), dtype=jnp.float32
    )
    for i, (length, num_new) in enumerate(LENGTHS):
        query, key, value = suites.tokens(i, length, value_head_dim=H)
        (out, after), (beside, same), (read, there) = both(rope=ROPE)(query, query, key, value, cache, num_new)
        np.testing.assert_allclose(beside, out, atol=2e-5)
        assert_unchanged(cache, same)
        same = there
        assert_unchanged(after, same, LOST)
        if not policy.needs_mass:
            fine = np.asarray(same.status) == 0
            np.testing.assert_allclose(np.asarray(read)[fine], np.asarray(out)[fine], atol=2e-5)
        cache = after


@pytest.mark.parametrize("policy", [kvattn.H2O(3, 2), kvattn.H2O(3, 2, positions_in="cache")], ids=str)
def test_a_budget_is_read_once_the_owner_has_let_go(policy):
    cache = kvattn.KVCache.create(B, K, H, policy=policy, dtype=jnp.float32)
    keys, values = np.zeros((B, 9, K, H)), np.zeros((B, 9, K, H))
    for t in range(9):
        own, key, value = suites.tokens(t, 1, value_head_dim=H)
        query = suites.tokens(t + 50, 1)[0]
        keys[:, t], values[:, t] = key[:, 0], value[:, 0]
        (_, cache), _, (out, same) = both(rope=ROPE)(own, query, key, value, cache, np.ones(B, np.int32))
        assert_unchanged(cache, same)
        for b in range(B):
            for k in range(K):
                held = np.asarray(cache.positions)[b, k]
                held = sorted(held[held >= 0])
                places = list(range(len(held))) if policy.positions_in == "cache" else held
                at = places[-1] if policy.positions_in == "cache" else t
                turned = [np.asarray(ROPE(jnp.asarray(keys[b, p, None, k : k + 1], jnp.float32), [at]))[0]
                          for p, at in zip(held, places, strict=True)]  # fmt: skip
                mine = slice(k * N // K, (k + 1) * N // K)
                asked = np.asarray(ROPE(jnp.asarray(query[b, :, mine]), [at]))[0]
                expected, _ = attend_token(asked, turned, [values[b, p, k : k + 1] for p in held])
                np.testing.assert_allclose(np.asarray(out)[b, 0, mine], expected, atol=2e-5)
    assert len(held) == 5


@pytest.mark.parametrize("name", variants.CODECS)
def test_codecs(name):
    """What is read is what is stored: the attention of the same queries over the decoded cache."""
    cache = kvattn.KVCache.create(B, K, H, capacity=suites.CAPACITY, codec=variants.CODECS[name], dtype=jnp.float32)
    for i, (length, num_new) in enumerate(LENGTHS):
        own, key, value = suites.tokens(i, length, value_head_dim=H)
        query = suites.tokens(i + 50, length)[0]
        (_, cache), _, (out, _) = both()(own, query, key, value, cache, num_new)
        keys, values = (np.asarray(x) for x in cache.dense())
        for b, n in enumerate(num_new):
            for t in range(n):
                p = int(cache.lengths[b]) - n + t
                seen = [[x[b, :, j] for j in range(p + 1)] for x in (keys, values)]
                np.testing.assert_allclose(np.asarray(out)[b, t], attend_token(query[b, t], *seen)[0], atol=2e-3)
            assert (np.asarray(out)[b, n:] == 0).all()


# Pages ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy", [kvattn.Full(), OrderedWindow(6), kvattn.SlidingWindow(6), kvattn.H2O(3, 2)], ids=str
)
def test_pages(policy):
    """As without pages; a window's pages are there until the host takes them."""
    slots = 6 if isinstance(policy, kvattn.SlidingWindow | kvattn.H2O) else suites.CAPACITY
    paged = kvattn.PagedKVCache.create(
        B * 6 + 1, 4, K, H, batch_size=B, max_pages=-(-slots // 4), policy=policy, dtype=jnp.float32
    )
    columns = paged.max_pages
    table = np.random.default_rng(0).permutation(B * 6)[: B * columns].reshape(B, columns)
    paged = suites.filled_with(paged, jnp.nan).with_tables(table, [0] * B)
    capacity = None if slots == 6 else suites.CAPACITY
    whole = kvattn.KVCache.create(B, K, H, policy=policy, capacity=capacity, dtype=jnp.float32)
    for i, (length, num_new) in enumerate(LENGTHS):
        own, key, value = suites.tokens(i, length, value_head_dim=H)
        query = suites.tokens(i + 50, length)[0]
        (_, whole), (expected, _), (read, one) = both()(own, query, key, value, whole, num_new)
        (_, paged), (beside, _), (out, other) = both()(own, query, key, value, paged, num_new)
        np.testing.assert_allclose(beside, expected, atol=2e-5)
        expected = read
        np.testing.assert_allclose(out, expected, atol=2e-5)
        assert_same_bits(one.status, other.status)


def test_pages_that_a_window_has_left():
    """They are there until the host takes them, and the first tokens of a chunk see them; nobody else does."""
    cache = kvattn.PagedKVCache.create(
        4, 2, K, H, batch_size=1, max_pages=4, policy=OrderedWindow(2), dtype=jnp.float32
    )
    cache = suites.filled_with(cache, jnp.nan).with_tables([[3, 0, 2, 1]], [0])
    query, key, value = (x[:1] for x in suites.tokens(0, CHUNK, value_head_dim=H))
    out, cache = kvattn.cached_attention(query, key, value, cache)
    read, _ = kvattn.cached_attention(query, None, None, cache)
    np.testing.assert_allclose(read, out, atol=2e-5)
    gone = cache.replace(page_table=jnp.asarray([[-1, -1, 2, 1]], jnp.int32))
    read, _ = kvattn.cached_attention(query[:, -1:], None, None, gone)
    np.testing.assert_allclose(read, out[:, -1:], atol=2e-5)
    with pytest.raises(errors.RangeError, match="page_table names page -1"):
        kvattn.cached_attention(query, None, None, gone)


def test_pages_that_rows_share():
    """Spans that end before the last tokens are read together by another layer too."""
    shared = kvattn.PagedKVCache.create(8, 4, K, H, batch_size=2, max_pages=4, dtype=jnp.float32)
    table = np.array([[0, 1, 2, 3], [0, 1, 4, 5]])
    key, value = (x[:2] for x in suites.tokens(0, 8, value_head_dim=H)[1:])
    key, value = (np.repeat(x[:1], 2, 0) for x in (key, value))
    slots = jnp.broadcast_to(jnp.arange(8, dtype=jnp.int32), (2, 8))
    shared = shared.with_tables(table, [0, 0]).write(slots, jnp.asarray(key), jnp.asarray(value))
    shared = shared.with_tables(table, [8, 8], shared=[([[0, 1]], [0], [2])])
    alone = shared.replace(shared=None)
    own, key, value = (x[:2] for x in suites.tokens(1, 3, value_head_dim=H))
    query = suites.tokens(2, 3)[0][:2]
    num_new = np.array([3, 1], np.int32)
    _, _, (expected, _) = both()(own, query, key, value, alone, num_new)
    np.testing.assert_allclose(both()(own, query, key, value, shared, num_new)[2][0], expected, atol=2e-5)


# Devices, kernels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("by", "policy", "kind"),
    [("heads", kvattn.H2O(3, 2), "Explicit"), ("batch", kvattn.SlidingWindow(6), "Auto"),
     ("sequence", kvattn.SlidingWindow(8), "Auto"), ("sequence", kvattn.H2O(4, 3), "Auto")],
    ids=str,
)  # fmt: skip
def test_on_a_mesh(by, policy, kind):
    axis_type = getattr(jax.sharding.AxisType, kind)
    mesh = jax.make_mesh((2,), ("model",), axis_types=(axis_type,), devices=jax.devices()[:2])
    whole = kvattn.KVCache.create(B, K, H, policy=policy, dtype=jnp.float32)
    split = sharding.shard_cache(whole, mesh, by=by)

    @functools.partial(jax.jit, static_argnames="append")
    def on(query, key, value, cache, num_new, append=True):
        return sharding.cached_attention(query, key, value, cache, num_new=num_new, mesh=mesh, by=by, append=append)

    for i, (length, num_new) in enumerate(LENGTHS[:2]):
        own, key, value = suites.tokens(i, length, value_head_dim=H)
        query = suites.tokens(i + 50, length)[0]
        np.testing.assert_allclose(
            on(query, key, value, split, num_new, append=False)[0],
            step(append=False)(query, key, value, whole, num_new)[0],
            atol=2e-5,
        )
        _, whole = step()(own, key, value, whole, num_new)
        _, split = on(own, key, value, split, num_new)
        expected, one = step()(query, None, None, whole, num_new)
        out, other = on(query, None, None, split, num_new)
        np.testing.assert_allclose(out, expected, atol=2e-5)
        assert (np.asarray(one.status) == np.asarray(other.status)).all()


def test_where_arguments_lie():
    """`kvattn.cached_attention` on an Explicit mesh: split by rows and by heads as the queries are."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    query, key, value = suites.tokens(0, 1, value_head_dim=H)
    cache = kvattn.KVCache.create(B, K, H, capacity=8, dtype=jnp.float32)
    _, cache = step()(query, key, value, cache, np.ones(B, np.int32))
    expected, _ = step()(query, None, None, cache, np.ones(B, np.int32))
    with jax.set_mesh(mesh):
        put = lambda x: jax.device_put(x, jax.NamedSharding(mesh, jax.P("data", None, "model", None)))
        out, _ = jax.jit(lambda q, c: kvattn.cached_attention(q, None, None, c))(put(jnp.asarray(query)), cache)
    np.testing.assert_allclose(out, expected, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mosaic_gpu", "mosaic_tpu"])
def test_kernels(name):
    """One token at a time, as any other step of one token."""
    size = 128
    rng = np.random.default_rng(0)
    cache = kvattn.KVCache.create(1, 1, size, capacity=128, dtype=jnp.float32)
    key, value = (jnp.asarray(rng.normal(size=(1, 5, 1, size)), jnp.float32) for _ in range(2))
    query = jnp.asarray(rng.normal(size=(1, 5, 4, size)), jnp.float32)
    _, cache = kvattn.cached_attention(query, key, value, cache)
    expected, _ = kvattn.cached_attention(query[:, -1:], None, None, cache, implementation="reference")
    with interpret():
        try:
            out, _ = kvattn.cached_attention(query[:, -1:], None, None, cache, implementation=name)
        except errors.UnsupportedError as error:
            assert name in str(error)
            return
    np.testing.assert_allclose(out, expected, atol=2e-2)


# Errors ---------------------------------------------------------------------------------------------------------------


def test_what_is_gone_is_refused():
    cache = kvattn.KVCache.create(1, K, H, policy=kvattn.SlidingWindow(4), dtype=jnp.float32)
    query, key, value = (x[:1] for x in suites.tokens(0, CHUNK, value_head_dim=H))
    _, after = kvattn.cached_attention(query, key, value, cache)
    with pytest.raises(errors.UnsupportedError, match=r"let go of tokens that the first of 7 .* append=False"):
        kvattn.cached_attention(query, None, None, after)
    # The last token alone, or a window that the ring has room for.
    kvattn.cached_attention(query[:, -1:], None, None, after)
    few, _ = kvattn.cached_attention(query[:, -3:], None, None, after, window=2)
    again = kvattn.cached_attention(query, key, value, cache, window=2)[0]
    np.testing.assert_allclose(few, again[:, -3:], atol=2e-5)
    with pytest.raises(errors.UnsupportedError, match="SlidingWindow"):
        kvattn.cached_attention(query[:, -4:], None, None, after, window=2)


@pytest.mark.wrong_types
def test_calls_that_cannot_be():
    cache = kvattn.KVCache.create(1, K, H, capacity=8, dtype=jnp.float32)
    query, key, value = (x[:1] for x in suites.tokens(0, 3, value_head_dim=H))
    with pytest.raises(errors.RangeError, match="last tokens of the cache"):
        kvattn.cached_attention(query, None, None, cache)
    out, marked = step()(query, None, None, cache, np.array([3], np.int32))
    assert (np.asarray(out) == 0).all() and marked.status.tolist() == [BAD_COUNT]
    with pytest.raises(errors.ConfigError, match="go together"):
        kvattn.cached_attention(query, key, None, cache)
    with pytest.raises(errors.DTypeError, match="append"):
        kvattn.cached_attention(query, key, value, cache, append="no")
    with pytest.raises(errors.CapacityError):  # as the owner's step
        kvattn.cached_attention(*(np.repeat(x, 3, 1) for x in (query, key, value)), cache, append=False)


def test_pages_that_are_not_there():
    paged = kvattn.PagedKVCache.create(4, 4, K, H, batch_size=1, max_pages=2, dtype=jnp.float32)
    query, key, value = (x[:1] for x in suites.tokens(0, 3, value_head_dim=H))
    _, paged = kvattn.cached_attention(query, key, value, paged.with_tables([[0, 1]], [0]))
    full = dataclasses.replace(paged, page_table=jnp.asarray([[0, -1]], jnp.int32))
    kvattn.cached_attention(query, key, value, full, append=False)  # tokens that do not stay need no page
    gone = dataclasses.replace(paged, page_table=jnp.asarray([[-1, 1]], jnp.int32))
    with pytest.raises(errors.RangeError, match="page_table names page -1"):
        kvattn.cached_attention(query, None, None, gone)
    out, marked = step()(query, None, None, gone, np.array([3], np.int32))
    assert (np.asarray(out) == 0).all() and marked.status.tolist() == [BAD_PAGE]
