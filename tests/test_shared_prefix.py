"""Rows that read shared pages together attend to what each would attend to alone, and shared pages are read once."""

import collections
import contextlib
import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bad_input_table import Table, run
from flax import nnx
from oracles import assert_accurate, assert_same_bits, attend_token, rotated, seen_from
from sharding_cases import KINDS, mesh_of

import kvattn
from kvattn import errors
from kvattn.attend import api
from kvattn.attend.together import parted
from kvattn.cache import groups_of, with_tables
from kvattn.cache.status import BAD_SPAN
from kvattn.serving import BlockPool, shared_prefixes, sharing_shapes, tokens_read

B, N, K, H, R, COLUMNS = 8, 4, 2, 16, 4, 10
PAGES = B * COLUMNS + 4
SHAPES = ((1, B), (3, 4))
"""Of two levels: one span of all rows, three of four."""
ROPE = kvattn.RoPE(H)


# Batches that share -------------------------------------------------------------------------------------------------


def random_tables(seed, batch=B, columns=COLUMNS):
    """Tables of which some begin like others, and lengths: empty rows, pages that are just full, hardly begun ones."""
    rng = np.random.default_rng(seed)
    table = rng.permutation(batch * columns + 4)[: batch * columns].reshape(batch, columns)
    lengths = rng.integers(0, columns * R, batch)
    for row in range(1, batch):
        other = int(rng.integers(0, row))
        common = int(rng.integers(0, columns))
        table[row, :common] = table[other, :common]
        lengths[row] = max(lengths[row], common * R)  # new tokens go to pages of their own
    order = rng.permutation(batch)
    table, lengths = table[order], lengths[order]
    # Nobody writes to what another row reads: a row is as long as what it shares.
    for row in range(batch):
        same = [int(np.argmin(np.append(table[row] == table[other], False))) for other in range(batch) if other != row]
        lengths[row] = max(lengths[row], max(same) * R)
    lengths[rng.integers(batch)] *= int(rng.integers(2))
    return table, np.minimum(lengths, columns * R - 1)


def make(codec=None, policy=None, dtype=jnp.float32, heads=K, **sizes):
    sizes = {"num_pages": PAGES, "page_size": R, "batch_size": B, "max_pages": COLUMNS, **sizes}
    return kvattn.PagedKVCache.create(num_kv_heads=heads, head_dim=H, policy=policy, codec=codec, dtype=dtype, **sizes)


def worst(x):
    return jnp.full_like(x, jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).max)


@jax.jit
def filled(cache, table, lengths):
    """A pool that holds a token in every slot that a row has filled, and poison in all others."""
    cache = cache.replace(keys=jax.tree.map(worst, cache.keys), values=jax.tree.map(worst, cache.values))
    shape = (cache.num_pages, cache.page_size, cache.num_kv_heads, H)
    key, value = (jax.random.normal(k, shape, cache.dtype) for k in jax.random.split(jax.random.key(0)))
    slot = jnp.arange(cache.num_slots, dtype=jnp.int32)[None]
    page = jnp.take_along_axis(table, slot // cache.page_size, axis=1)
    of_slots = lambda x: x[page, slot % cache.page_size]
    cache = cache.replace(page_table=table)
    return cache.write(jnp.where(slot < lengths[:, None], slot, -1), of_slots(key), of_slots(value))


def new_tokens(seed, length=1, batch=B, heads=K, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=(batch, length, h, H)), dtype) for h in (N, heads, heads))


@functools.cache
def step(implementation="xla", **rules):
    """A step that is given tables, as an engine's is. Arrays among the rules are tuples."""
    arrays = {name: jnp.asarray(x) if isinstance(x, tuple) else x for name, x in rules.items()}

    @jax.jit
    def call(new, cache, table, lengths, num_new, shared):
        cache = cache.with_tables(table, lengths, shared)
        return kvattn.cached_attention(*new, cache, num_new=num_new, implementation=implementation, **arrays)

    return call


def truth(new, after, lengths, num_new, dtype, window=None, rope=None, **rules):
    """Every row alone: its tokens as the cache decodes them, one query at a time."""
    query = np.asarray(new[0].astype(jnp.float32), np.float64)
    keys, values = (np.asarray(x.astype(jnp.float32), np.float64) for x in after)
    out = np.zeros((*query.shape[:3], values.shape[-1]))
    for b, t in itertools.product(range(len(lengths)), range(query.shape[1])):
        if t >= num_new[b]:
            continue
        at = lengths[b] + t
        seen = sorted(seen_from(at, window))
        rows = [keys[b, :, s] for s in seen], [values[b, :, s] for s in seen]
        asks = query[b, t] if rope is None else rotated(query[b, t], at)
        out[b, t], _ = attend_token(asks, *rows, distances=[s - at for s in seen], dtype=dtype, **rules)
    return out


dense = jax.jit(lambda cache: cache.dense())


def check(seeds, cache, *, length=1, implementation="xla", shapes=SHAPES, beside=False, **rules):
    """Random batches: the accuracy rule, and `beside` the step without, the same caches. Returns what was shared."""
    call, dtype = step(implementation, **rules), cache.dtype
    window = rules.pop("window", None) if cache.policy == kvattn.Full() else cache.policy.window
    rules = {name: np.asarray(x) if isinstance(x, tuple) else x for name, x in rules.items()}
    found, empty = [], cache
    for seed in seeds:
        table, lengths = random_tables(seed)
        lengths = np.minimum(lengths, COLUMNS * R - length)
        shared = shared_prefixes(table, lengths, R, shapes=shapes, fewest=0)
        if shared is None:
            continue
        found.append(shared)
        rng = np.random.default_rng(seed)
        num_new = np.where(rng.random(B) < 0.8, rng.integers(1, length + 1, B), 0).astype(np.int32)
        new, cache = new_tokens(seed, length, dtype=dtype), filled(empty, table, lengths)
        args = new, cache, table, lengths.astype(np.int32), num_new
        out, after = call(*args, shared)
        tokens = dense(after)
        exact = truth(new, tokens, lengths, num_new, np.float64, window, **rules)
        assert (np.asarray(out)[np.arange(length)[None] >= num_new[:, None]] == 0).all()
        assert not after.status.any()
        low = truth(new, tokens, lengths, num_new, dtype, window, **rules)
        if beside:
            alone, expected = call(*args, None)
            for one, other in zip(jax.tree.leaves(after.replace(shared=None)), jax.tree.leaves(expected), strict=True):
                assert_same_bits(one, other, "caches")
            # Of codecs it is the honest computation: it multiplies scales in where this one does.
            low = low if cache.codec == kvattn.codecs.Plain(dtype) else alone
        assert_accurate(out, exact, low)
    assert found
    return found


def test_random_groups_and_levels():
    """Every shape of sharing there is, in one compiled program."""
    found = check(range(10), make())
    sizes = {tuple(int((level.members >= 0).sum(1).max()) for level in shared) for shared in found}
    assert len(sizes) > 4 and any(a > 2 and b > 1 for a, b in sizes) and any(a == 0 for a, _ in sizes)
    assert step("xla")._cache_size() == 1


RULES = {
    "window": {"window": 9},
    "everything": {
        "softcap": 2.0,
        "sinks": (0.5, -1.0, 0.0, 2.0),
        "alibi_slopes": (0.5, 0.25, 0.125, 0.06),
        "scale": 0.4,
    },
    "rotated": {"rope": kvattn.RoPE(H), "window": 21},
}


@pytest.mark.parametrize("name", RULES)
def test_rules(name):
    check(range(3), make(), **RULES[name])


CODECS = {"bfloat16": {"dtype": jnp.bfloat16}} | {
    type(codec).__name__: {"codec": codec} for codec in (kvattn.Int8(), kvattn.Float8(), kvattn.Int4(8))
}


@pytest.mark.parametrize("name", CODECS)
def test_codecs(name):
    check(range(3), make(**CODECS[name]), shapes=SHAPES[1:2], beside=True)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_several_tokens_of_a_row(implementation):
    """Drafts that are verified, or a short rest of a prompt."""
    check(range(3), make(), length=3, implementation=implementation, window=17)


def batch_of_two_levels():
    """Rows 0 to 5 share 5 pages, 0 to 2 two more; rows 6 and 7 share 3. Pages are in no order."""
    table = np.random.default_rng(0).permutation(PAGES)[: B * COLUMNS].reshape(B, COLUMNS)
    table[1:6, :5] = table[0, :5]
    table[1:3, :7] = table[0, :7]
    table[7, :3] = table[6, :3]
    lengths = np.array([33, 28, 30, 21, 20, 39, 12, 13], np.int32)
    return table, lengths, shared_prefixes(table, lengths, R, shapes=SHAPES, fewest=0)


def spans_of(shared):
    """What is read together: the rows of each span and its columns."""
    found = []
    for members, begin, end in shared:
        spans = zip(members.tolist(), begin.tolist(), end.tolist(), strict=True)
        found.append([(sorted(row for row in rows if row >= 0), b, e) for rows, b, e in spans if e > b])
    return found


ALL = np.ones(B, np.int32)
given = jax.jit(lambda cache, table, lengths, shared: cache.with_tables(table, lengths, shared))


def test_what_is_not_read_changes_no_bit_and_neighbours_do_not_meet():
    table, lengths, shared = batch_of_two_levels()
    assert spans_of(shared)[0] == [([0, 1, 2, 3, 4, 5], 0, 5)] and ([0, 1, 2], 5, 7) in spans_of(shared)[1]
    cache, new, call = filled(make(), table, lengths), new_tokens(1), step("xla")
    out = np.asarray(call(new, cache, table, lengths, ALL, shared)[0])
    assert np.isfinite(out).all()  # over a pool of NaN
    own, of_three, of_six = table[3, 5], table[0, 6], table[4, 2]
    for page, rows in ((own, [3]), (of_three, [0, 1, 2]), (of_six, [0, 1, 2, 3, 4, 5])):
        bad = cache.replace(values={"data": cache.values["data"].at[:, page].set(jnp.nan)})
        poisoned = np.asarray(call(new, bad, table, lengths, ALL, shared)[0])
        others = [row for row in range(B) if row not in rows]
        assert np.isnan(poisoned[rows]).all()
        assert_same_bits(poisoned[others], out[others], "rows that do not read the page")
    query = new[0].at[2].set(jnp.nan)
    asked = np.asarray(call((query, *new[1:]), cache, table, lengths, ALL, shared)[0])
    assert_same_bits(np.delete(asked, 2, 0), np.delete(out, 2, 0), "rows beside one of NaN")


def test_a_row_is_read_by_whoever_is_left():
    """A plan outlives what happens to its rows: they grow, are trimmed, forgotten and chosen anew."""
    table, lengths, shared = batch_of_two_levels()
    step_alone = jax.jit(kvattn.cached_attention)

    def both(change, num_new):
        cache, change = filled(make(), table, lengths), jax.jit(change)
        caches = [change(given(cache, table, lengths, plan)) for plan in (shared, None)]
        for i in range(3):
            results = [step_alone(*new_tokens(i), cache, num_new=num_new) for cache in caches]
            np.testing.assert_allclose(*(out for out, _ in results), atol=1e-6)
            caches = [after for _, after in results]
        return caches[0]

    both(lambda cache: cache, np.array([1, 1, 0, 1, 1, 0, 1, 0], np.int32))
    both(
        lambda cache: cache.trim(jnp.asarray([20, 8, 0, 3, 2, 0, 1, 13])), np.array([0, 0, 1, 0, 0, 0, 0, 0], np.int32)
    )
    chosen = both(lambda cache: cache.select(jnp.arange(B)[::-1]), 0)
    assert all((level.members == -1).all() for level in chosen.shared)


def test_windows_that_have_given_pages_back():
    """Under `OrderedWindow` tables say -1 where the window has been, each row elsewhere; the page is others' by now."""
    policy, call = kvattn.policies.OrderedWindow(14), step("xla")
    table, lengths, _ = batch_of_two_levels()
    lengths = np.array([31, 28, 30, 21, 20, 26, 12, 13], np.int32)
    gone = np.maximum(lengths + 1 - 14, 0) // R
    left = np.where(np.arange(COLUMNS)[None] < gone[:, None], -1, table)
    cache = filled(make(policy=policy), table, np.zeros(B, np.int32))
    slots = jnp.where(np.arange(COLUMNS * R)[None] < lengths[:, None], np.arange(COLUMNS * R)[None], -1)
    slots = jnp.where(np.arange(COLUMNS * R)[None] < R * gone[:, None], -1, slots)
    rng = np.random.default_rng(0)
    pages = [jnp.asarray(rng.normal(size=(PAGES, R, K, H)), jnp.float32) for _ in range(2)]
    cache = cache.write(slots, *(x[table].reshape(B, -1, K, H) for x in pages))
    shared = shared_prefixes(left, lengths, R, window=14, shapes=SHAPES, fewest=0)
    assert shared is not None
    new = new_tokens(2)
    results = [call(new, cache, left, lengths, ALL, plan) for plan in (shared, None)]
    np.testing.assert_allclose(results[0][0], results[1][0], atol=1e-6)
    assert np.isfinite(results[0][0]).all() and not results[0][1].status.any()
    rows = np.array([(members >= 0).sum() for members, *_ in shared]).sum()
    assert rows > 3


@pytest.mark.parametrize("codec", [None, kvattn.Int8()], ids=["plain", "Int8"])
def test_derivatives(codec):
    """Those of keys too, where they have any."""
    table, lengths, shared = batch_of_two_levels()
    cache, new = filled(make(codec), table, lengths), new_tokens(3)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1) if codec is None else (0,))
    def derivatives(new, keys, plan):
        full = cache.replace(keys=keys).with_tables(table, lengths, plan)
        return jnp.sum(jnp.sin(kvattn.cached_attention(*new, full)[0]))

    found = [jax.tree.leaves(derivatives(new, cache.keys, plan)) for plan in (shared, nothing())]
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
        assert np.abs(other).max() > 0


def test_what_is_left_of_a_row_is_counted_from_its_first_token():
    table, lengths, shared = batch_of_two_levels()
    left = parted(given(filled(make(), table, lengths), table, lengths, shared), 1)
    own = lengths - R * np.array([7, 7, 7, 5, 5, 5, 3, 3], np.int32)
    np.testing.assert_array_equal(left.own.lengths, own)
    for count in (left.slots, left.positions):
        np.testing.assert_array_equal(count(jnp.asarray(lengths)[:, None]), own[:, None])
    assert (left.slots(jnp.full((B, 1), -1, jnp.int32)) < 0).all()


# What it costs --------------------------------------------------------------------------------------------------------


def test_who_shares_what_is_no_new_program_and_the_pool_is_updated_in_place():
    cache = kvattn.PagedKVCache.create(2048, 16, K, H, batch_size=B, max_pages=64, dtype=jnp.bfloat16)
    table = np.arange(512, dtype=np.int32).reshape(B, 64)
    cache = cache.with_tables(table, np.zeros(B, np.int32), nothing())
    traces = []

    @kvattn.jit
    def append(q, k, v, cache):
        traces.append(1)
        return kvattn.cached_attention(q, k, v, cache)

    new = new_tokens(0, dtype=jnp.bfloat16)
    memory = append.lower(*new, cache).compile().memory_analysis()
    assert memory.alias_size_in_bytes == cache.nbytes
    assert memory.temp_size_in_bytes < 0.1 * cache.nbytes
    for seed in range(3):
        shared_table = table.copy()
        shared_table[seed + 1 :, : seed + 5] = table[0, : seed + 5]
        lengths = np.full(B, 16 * (seed + 5), np.int32)
        plan = shared_prefixes(shared_table, lengths, 16, shapes=SHAPES, fewest=0)
        cache = cache.with_tables(shared_table, lengths, plan)
        pointer = cache.keys["data"].unsafe_buffer_pointer()
        _, cache = append(*new, cache)
        assert cache.keys["data"].unsafe_buffer_pointer() == pointer
    assert len(traces) == 1


def nothing():
    """Levels without members."""
    return tuple((np.full(shape, -1, np.int32), *np.zeros((2, shape[0]), np.int32)) for shape in SHAPES)


def test_blocks_are_visited_once_for_all():
    """What is attended to: of a row its own tokens, from the first block on, and of spans theirs once."""
    table, lengths, shared = batch_of_two_levels()
    cache = given(filled(make(), table, lengths), table, lengths, shared)
    own, first = jax.jit(lambda cache: (lambda x: (x.own.lengths, x.first))(parted(cache, 1, ALL)))(cache)
    assert own.tolist() == [6, 1, 3, 2, 1, 20, 1, 2] and first.tolist() == [28, 28, 28, 20, 20, 20, 12, 12]
    levels = jax.jit(lambda cache: [x.cache.lengths for x in parted(cache, 1, ALL).levels])(cache)
    assert [sorted(x.tolist()) for x in levels] == [[20], [0, 8, 12]]
    alone = jax.jit(lambda cache: [x.cache.lengths for x in parted(cache, 9).levels])(cache)
    assert alone == []  # many tokens are bound by products


# Kernels --------------------------------------------------------------------------------------------------------------


def kernel_batch(implementation, rows, common, codec=None, policy=None):
    """Rows that share `common` pages, two of them one more, in a pool that a kernel reads; and what they share."""
    size, columns = (16, 6) if codec is None else (32, 4)
    head_dim = 64 if implementation == "mosaic_gpu" else 128
    cache = kvattn.PagedKVCache.create(
        rows * columns + 1,
        size,
        1,
        head_dim,
        batch_size=rows,
        max_pages=columns,
        dtype=jnp.bfloat16,
        codec=codec,
        policy=policy,
    )
    table = np.random.default_rng(0).permutation(rows * columns + 1)[:-1].reshape(rows, columns)
    table[:, :common] = table[0, :common]
    table[1, : common + 1] = table[0, : common + 1]
    lengths = size * (common + 1) + np.arange(rows, dtype=np.int32)
    lengths[-1] = size * common
    key, value = (jax.random.normal(jax.random.key(i), (*cache.keys["data"].shape[:3], head_dim)) for i in range(2))
    slot = np.arange(columns * size)
    of_slots = lambda x: x[0][table[:, slot // size], slot % size][:, :, None].astype(jnp.bfloat16)
    cache = cache.replace(keys=jax.tree.map(worst, cache.keys), values=jax.tree.map(worst, cache.values))
    cache = cache.replace(page_table=jnp.asarray(table, jnp.int32))
    cache = cache.write(jnp.where(slot[None] < lengths[:, None], slot[None], -1), of_slots(key), of_slots(value))
    shared = shared_prefixes(table, lengths, size, shapes=((1, rows), (1, 2)), fewest=0)
    assert spans_of(shared)[0] == [(list(range(rows)), 0, common)] and spans_of(shared)[1][0][0] == [0, 1]
    query = jax.random.normal(jax.random.key(2), (rows, 1, 2, head_dim))
    new = query, *(jax.random.normal(jax.random.key(i), (rows, 1, 1, head_dim)).astype(jnp.bfloat16) for i in (3, 4))
    return new, cache, table, lengths, shared


KERNELS = {
    "few": {"rows": 3, "common": 2},
    "more members than new tokens": {"rows": 10, "common": 2},
    "Int8": {"rows": 3, "common": 1, "codec": kvattn.Int8()},
    "window": {"rows": 3, "common": 3, "policy": kvattn.policies.OrderedWindow(36)},
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("implementation", ["mosaic_gpu", "mosaic_tpu"])
def test_through_kernels(implementation, name, monkeypatch):
    new, cache, table, lengths, shared = kernel_batch(implementation, **KERNELS[name])
    asked = []
    choose = api.choose
    monkeypatch.setattr(api, "choose", lambda request, i: asked.append((request.of_several, i)) or choose(request, i))
    outs = {}
    for each in (implementation, "reference"):
        with kvattn.pallas.interpret():
            cache_of = given(cache, table, lengths, shared if each == implementation else None)
            call = jax.jit(lambda new, cache, each=each: kvattn.cached_attention(*new, cache, implementation=each)[0])
            outs[each] = call(new, cache_of)
    np.testing.assert_allclose(*outs.values(), atol=2e-5 if cache.codec.rounds is False else 1e-4)
    assert asked == [(False, implementation), (True, implementation), (True, implementation), (False, "reference")]


# Meshes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by", ["heads", "sequence", "batch"])
def test_on_a_mesh(by, kind):
    """By heads and by sequence pages are read once; where rows are split each reads them by itself."""
    table, lengths, shared = batch_of_two_levels()
    mesh, new = mesh_of(kind, (2,)), new_tokens(5)
    if by == "batch":  # each device has the pages of its rows
        table = np.concatenate([np.arange(40).reshape(4, 10), 42 + np.arange(40).reshape(4, 10)])
        table[:4, :5] = table[0, :5]
        shared = shared_prefixes(table, np.maximum(lengths, 20), R, shapes=SHAPES, fewest=0)
        lengths = np.maximum(lengths, 20)
    cache = filled(make(), table, lengths)
    expected = step("xla")(new, cache, table, lengths, ALL, None)[0]
    cache = kvattn.sharding.shard_cache(cache, mesh, by=by).with_tables(table, lengths, shared)
    traces = []

    @kvattn.jit
    def call(new, cache):
        traces.append(1)
        return kvattn.sharding.cached_attention(*new, cache, mesh=mesh, by=by)

    with jax.set_mesh(mesh) if kind == "explicit" else contextlib.nullcontext():
        out, after = call(new, cache)
        np.testing.assert_allclose(out, expected, atol=1e-5)
        assert jax.tree.structure(after) == jax.tree.structure(cache) and after.shared is not None
        call(new, after.with_tables(table, lengths, shared))
    assert len(traces) == 1


# Models ---------------------------------------------------------------------------------------------------------------


def test_layers_of_a_model_share_by_group():
    """Tables and plans are arguments of a compiled step; windows share less, and a plan may be None for a group."""
    config = kvattn.models.DecoderConfig(
        vocab_size=31, model_dim=16, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=16, windows=(6, None)
    )
    model = kvattn.models.Decoder(config, rngs=nnx.Rngs(0))
    caches = model.make_paged_cache(64, R, batch_size=B, max_length=COLUMNS * R)
    groups = groups_of(caches)
    pool, prompt = BlockPool(64, R, watermark=0), list(range(13))
    pool.allocate("prompt", len(prompt))
    for row in range(B):
        pool.allocate(row, 14 + row % 3, prefix=pool.table("prompt")[: 12 // R])
    table, lengths = pool.page_table(range(B), COLUMNS), np.full(B, 12, np.int32)
    texts = np.random.default_rng(0).integers(0, 31, (B, 16))
    texts[:, :12] = texts[0, :12]

    @functools.partial(jax.jit, donate_argnames="caches")
    def append(caches, tables, lengths, shared, tokens):
        caches = with_tables(caches, tables, lengths, shared=shared)
        logits, caches = model(tokens, caches)
        return logits, tuple(cache.replace(shared=None) for cache in caches)

    first = np.full_like(table, -1)
    first[0] = table[0]
    alone = np.array([12, 0, 0, 0, 0, 0, 0, 0])
    _, caches = model(jnp.asarray(texts[:, :12]), with_tables(caches, [first] * 2, [0] * B), jnp.asarray(alone))
    shared = [
        shared_prefixes(table, lengths, R, window=group.policy.mask().window, fewest=0, shapes=SHAPES)
        for group in groups
    ]
    assert spans_of(shared[1])[0] == [(list(range(B)), 0, 3)]
    results = {}
    for name, plans in {"with": shared, "without": None, "one": [None, shared[1]]}.items():
        given_caches = jax.tree.map(jnp.copy, caches)
        results[name], after = append(given_caches, [table] * 2, lengths, plans, jnp.asarray(texts[:, 12:13]))
        assert all(not cache.status.any() for cache in after)
    expected = model(jnp.asarray(texts[:, :13]))[0][:, 12:]
    for logits in results.values():
        np.testing.assert_allclose(logits, expected, atol=1e-5)


# What the host finds --------------------------------------------------------------------------------------------------


def plain_reads(table, lengths, shared):
    """Pages that the step fetches, found one by one; every token of every row is read once, by the row or a span."""
    seen = {row: [] for row in range(len(lengths))}
    fetched = 0
    for members, begin, end in shared or ():
        for span in range(len(begin)):
            rows = [row for row in members[span].tolist() if row >= 0]
            columns = range(begin[span], end[span])
            fetched += R * len(columns) * bool(rows)
            for row in rows:
                seen[row] += [(column, table[rows[0]][column]) for column in columns]
    for row, length in enumerate(lengths.tolist()):
        assert seen[row] == [(column, table[row][column]) for column in range(len(seen[row]))]
        assert len(seen[row]) * R <= length
        fetched += length - len(seen[row]) * R
    return fetched


def test_what_is_found_is_there_and_saves_reads():
    """200 random batches, of which every plan is taken apart page by page."""
    for seed in range(200):
        table, lengths = random_tables(seed, columns=3 + seed % 9)
        for shapes in (SHAPES, ((4, 2),), None):
            shared = shared_prefixes(table, lengths, R, shapes=shapes, fewest=0)
            read = plain_reads(table, lengths, shared)
            assert read == tokens_read(lengths, R, shared) <= lengths.sum() == tokens_read(lengths, R, None)
            if shared is not None:
                assert read < lengths.sum()
                assert [level.members.shape for level in shared] == list(shapes or sharing_shapes(B))
                assert {x.dtype for level in shared for x in level} == {np.dtype(np.int32)}
            given = [len(set(level.members[level.members >= 0].tolist())) for level in shared or ()]
            assert given == [int((level.members >= 0).sum()) for level in shared or ()]  # one span of each level


def test_what_is_worth_it():
    rows, columns = 16, 40
    table = np.arange(rows * columns).reshape(rows, columns)
    lengths = np.full(rows, columns * 16 - 3)
    find = functools.partial(shared_prefixes, page_size=16)
    assert find(table, lengths) is None
    every = table.copy()
    every[:, :32] = table[0, :32]
    assert spans_of(find(every, lengths)) == [[(list(range(rows)), 0, 32)], []]
    assert tokens_read(lengths, 16, find(every, lengths)) == 512 + lengths.sum() - 16 * 512  # P + B S
    some = every.copy()
    some[4:8, :36] = some[4, :36]
    assert spans_of(find(some, lengths, fewest=0))[1] == [([4, 5, 6, 7], 32, 36)]
    assert spans_of(find(some, lengths)) == [[(list(range(rows)), 0, 32)], []]  # 3 x 64 tokens are not worth a level
    fours = table.copy()
    for first in range(0, rows, 4):
        fours[first : first + 4, :30] = table[first, :30]
    first, second = spans_of(find(fours, lengths))
    assert (first, sorted(second)) == ([], [([a, a + 1, a + 2, a + 3], 0, 30) for a in range(0, rows, 4)])
    two = table.copy()
    two[1, :39] = table[0, :39]
    assert find(two, lengths) is None and spans_of(find(two, lengths, fewest=0))[0] == []  # 14 empty seats
    short = every.copy()
    assert spans_of(find(short, np.minimum(lengths, 511)))[0] == [(list(range(rows)), 0, 31)]  # full pages only
    assert find(every, lengths, window=100) is None  # the window has left what is shared
    assert spans_of(find(every, lengths, window=500))[0] == [(list(range(rows)), 0, 32)]
    ten = table.copy()
    ten[:10, :30] = table[0, :30]
    assert [len(rows) for rows, *_ in spans_of(find(ten, lengths, shapes=[(4, 4)]))[0]] == [4, 4, 2]
    assert find(table[:0], lengths[:0]) is None and find(table, np.zeros(rows, int)) is None
    assert sharing_shapes(16) == ((1, 16), (4, 4)) and sharing_shapes(1) == ((1, 1),)


def test_it_is_found_column_by_column():
    """64 rows of 256 columns, of which 2,016 pairs could be compared: in fewer calls than that takes."""
    table = np.arange(64 * 256, dtype=np.int32).reshape(64, 256)
    table[:, :128] = table[0, :128]
    for first in range(0, 64, 4):
        table[first : first + 4, :200] = table[first, :200]
    calls = collections.Counter()
    sys.setprofile(lambda frame, event, _: calls.update([event] if "kvattn" in frame.f_code.co_filename else []))
    try:
        shared = shared_prefixes(table, np.full(64, 4000), 16)
    finally:
        sys.setprofile(None)
    assert [len(spans) for spans in spans_of(shared)] == [1, 16]
    assert 0 < calls["call"] + calls["c_call"] < 3000


# Bad input ------------------------------------------------------------------------------------------------------------

TABLE = Table()
bad, defined = TABLE.bad, TABLE.defined


def small(shared, policy=None, codec=None, lengths=(20, 20, 9)):
    cache = make(codec, policy, batch_size=3, max_pages=6, num_pages=18)
    table = np.arange(18).reshape(3, 6)
    table[1, :4] = table[0, :4]
    return cache.with_tables(table, lengths, shared)


FIT = [([[0, 1]], [0], [4])]
for why, shared, words in (
    ("no such row", [([[0, 3]], [0], [4])], ("span 0 of shared[0]", "row 3", "no such row")),
    ("no such columns", [([[0, 1]], [0], [7])], ("row 0", "columns 0 to 6", "no such columns")),
    ("a span without a first member", [([[-1, 1]], [0], [4])], ("row 1", "come first")),
    ("a row twice in a level", [([[0, 1], [1, -1]], [0, 0], [4, 2])], ("row 1", "one span of a level")),
    ("a gap between levels", [([[0, 1]], [0], [2]), ([[0, 1]], [3], [4])], ("shared[1]", "follow one another")),
    ("other pages", [([[0, 1, 2]], [0], [2])], ("row 2", "row 0's table", "names other pages")),
):
    bad(70, f"shared with {why}", errors.RangeError, *words)(lambda shared=shared: small(shared))
bad(70, "shared pages not full of tokens", errors.RangeError, "row 1", "not all of these pages are full")(
    lambda: small(FIT, lengths=(20, 15, 9))
)
bad(70, "shared of floats", errors.DTypeError, "members of shared[0]")(lambda: small([([[0.5]], [0], [4])]))
bad(70, "shared that is no levels", errors.ShapeError, "a sequence of levels")(lambda: small(3))
bad(70, "a level of two arrays", errors.ShapeError, "(members, begin, end)")(lambda: small([([[0]], [0])]))
bad(70, "members of other shape", errors.ShapeError, "[spans, members]")(lambda: small([([0, 1], [0], [4])]))
for policy in (kvattn.SlidingWindow(8), kvattn.H2O(4, 4), kvattn.StreamingLLM(2, 6)):
    bad(70, f"shared under {type(policy).__name__}", errors.UnsupportedError, "slots in order")(
        lambda policy=policy: small(FIT, policy, lengths=(0, 0, 0))
    )
bad(70, "shared with KIVI", errors.UnsupportedError, "one by one")(
    lambda: small(FIT, None, kvattn.KIVI(2, 4, 4), lengths=(0, 0, 0))
)
bad(70, "one plan for two groups", errors.ShapeError, "2 groups", "3 for shared")(
    lambda: with_tables(
        [make(), make(policy=kvattn.policies.OrderedWindow(8))], [np.zeros((B, 1), int)] * 2, 0, [None] * 3
    )
)
host = functools.partial(shared_prefixes, np.zeros((2, 3), int), [0, 0], 4)
bad(70, "no shapes", errors.ConfigError, "shapes is empty")(lambda: host(shapes=[]))
bad(70, "lengths of other rows", errors.ShapeError, "[B, W] and [B]")(
    lambda: shared_prefixes(np.zeros((2, 3), int), [0], 4)
)
bad(70, "more tokens than columns", errors.RangeError, "[0, 12]")(
    lambda: shared_prefixes(np.eye(2, 3, dtype=int), [0, 13], 4)
)
bad(70, "tables of floats", errors.DTypeError, "tables must hold")(lambda: shared_prefixes(np.eye(2), [0, 0], 4))
bad(70, "a window of 0", errors.RangeError, "window")(lambda: host(window=0))


@defined(70, "shared that contradicts the tables, under jit")
def spans_that_do_not_fit():
    """Their rows read by themselves, and say so; others share on."""
    table, lengths, shared = batch_of_two_levels()
    wrong = [np.array(x) for x in shared[1]]
    span = int(np.argmax(wrong[2] == 3))
    wrong[2][span] = 4  # row 7 names another page there, and neither row has filled it
    cache, new = filled(make(), table, lengths), new_tokens(1)
    out, after = step("xla")(new, cache, table, lengths, ALL, (shared[0], tuple(wrong)))
    np.testing.assert_allclose(out, step("xla")(new, cache, table, lengths, ALL, None)[0], atol=1e-6)
    assert (np.asarray(after.status) == np.isin(np.arange(B), [6, 7]) * BAD_SPAN).all()
    with pytest.raises(errors.RangeError, match="read by themselves"):
        after.check()


def test_a_span_of_other_pages_is_taken_apart():
    """Under jit, where it cannot be refused: nobody is left in it, and the other span stays."""
    cache = make(batch_size=3, max_pages=6, num_pages=18)
    table = np.arange(18).reshape(3, 6)
    levels = (np.array([[0, 2], [1, -1]], np.int32), np.zeros(2, np.int32), np.full(2, 2, np.int32))
    lengths = jnp.array([20, 20, 9], jnp.int32)
    found = jax.jit(lambda table, *level: cache.with_tables(table, lengths, [level]))(table, *levels)
    assert found.shared[0].members.tolist() == [[-1, -1], [1, -1]]
    assert found.status.tolist() == [0, 0, BAD_SPAN]


@pytest.mark.parametrize("row", TABLE.parameters())
def test_rows(row):
    run(row)
