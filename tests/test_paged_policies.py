"""Pages under every policy and codec hold and read what a contiguous cache does, whatever lies in all other pages."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import variants
from oracles import assert_same_bits

import kvattn
from kvattn import errors
from kvattn.attend import Request, api
from kvattn.cache.status import BAD_PAGE, LOST, NONFINITE
from kvattn.masks import Mask
from kvattn.policies import OrderedWindow

B, N, K, H, CAPACITY, CHUNK = 3, 4, 2, 8, 24, 5
SCHEDULE = (([5, 3, 0], CHUNK), ([1, 1, 1], 1), ([4, 5, 2], CHUNK), ([1, 0, 1], 1), ([5, 5, 1], CHUNK), ([1, 1, 1], 1))
"""How many of the tokens of each row are real, and how many come. Rings turn, budgets are used up."""
SIZES = (1, 8, 16, 128)
POLICIES = {entry.name: entry.examples[0] for entry in kvattn.policies.registered()} | {"ordered": OrderedWindow(6)}
CODECS = ("bfloat16", *(entry.name for entry in kvattn.codecs.registered()[1:]))
KINDS = {entry.name: entry.examples[0] for entry in kvattn.codecs.registered()[1:]}


def codec_of(name, page_size):
    """The codec of a name; one whose tokens share scales in blocks of a page."""
    if name == "bfloat16":
        return None
    codec = KINDS[name]
    return codec if codec.rows is None else kvattn.KIVI(4, min(4, page_size), page_size)


def slots_of(policy):
    """C."""
    return policy.num_slots(variants.capacity_of(policy, CAPACITY))


def paged(policy, codec=None, page_size=8, batch=B, spare=3, dtype=jnp.bfloat16, kv_heads=K):
    """A pool with a few pages more than its rows need at most, and tables that name none."""
    columns = -(-slots_of(policy) // page_size)
    sizes = {"batch_size": batch, "max_pages": columns, "policy": policy, "codec": codec, "dtype": dtype}
    return kvattn.PagedKVCache.create(batch * columns + spare, page_size, kv_heads, H, **sizes)


def contiguous(policy, codec=None, batch=B, dtype=jnp.bfloat16):
    capacity = variants.capacity_of(policy, CAPACITY)
    return kvattn.KVCache.create(batch, K, H, capacity=capacity, policy=policy, codec=codec, dtype=dtype)


def scattered(cache, seed=0):
    """Distinct pages in no order; for heads with tables of their own, strips of pages of whatever head."""
    shape, rng = cache.page_table.shape, np.random.default_rng(seed)
    first, count = (cache.num_pages, cache.num_pages * cache.num_kv_heads) if len(shape) == 3 else (0, cache.num_pages)
    return first + rng.permutation(count)[: int(np.prod(shape))].reshape(shape).astype(np.int32)


def worst(x):
    return jnp.full_like(x, jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).max)


def poisoned(cache, numbers=None):
    """The cache with NaN, or the largest code, in all pages, or in those that these numbers of its tables mean."""

    def spoil(names, x):
        if names.split()[:2] != ["heads", "pages"]:
            return x if numbers is not None else worst(x)
        if numbers is None:
            return worst(x)
        flat = np.asarray(numbers, np.int32).ravel()
        if cache.page_table.ndim == 2:
            return x.at[:, flat].set(worst(x)[:, flat])
        parts, own = x.reshape(-1, *x.shape[2:]), flat < cache.num_pages
        assert not own.any(), "tables of these tests name strips of pages"
        return parts.at[flat - cache.num_pages].set(worst(parts)[0]).reshape(x.shape)

    axes = cache.axes
    keys, values = (jax.tree.map(spoil, getattr(axes, n), getattr(cache, n)) for n in ("keys", "values"))
    return cache.replace(keys=keys, values=values)


def tokens(length, seed, batch=B):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=(batch, length, h, H)), jnp.float32) for h in (N, K, K))


@functools.cache
def step(implementation="xla", **rules):
    call = functools.partial(kvattn.cached_attention, implementation=implementation, **rules)
    return jax.jit(call, compiler_options={"xla_backend_optimization_level": 0})


def feed(cache, schedule=SCHEDULE, first_seed=0, between=lambda cache: cache, **settings):
    """The outputs of a schedule, and the cache."""
    outs = []
    for i, (real, length) in enumerate(schedule):
        out, cache = step(**settings)(*tokens(length, first_seed + i), cache, num_new=jnp.asarray(real, jnp.int32))
        cache = between(cache)
        outs.append(np.asarray(out))
    return outs, cache


@functools.cache
def expected(policy, codec):
    return feed(contiguous(policy, codec))


def combinations():
    """Every policy with every codec and page size; quick are those that have all pairs between them."""
    for i, (policy, kind) in enumerate(POLICIES.items()):
        for j, codec in enumerate(CODECS):
            for k, size in enumerate(SIZES):
                if variants.go_together(kind, codec_of(codec, size)):
                    quick = (i + j) % len(SIZES) == k and (i + 2 * j) % 3 == 0
                    marks = () if quick else pytest.mark.slow
                    yield pytest.param(policy, codec, size, id=f"{policy}-{codec}-{size}", marks=marks)


@pytest.mark.parametrize(("policy", "codec", "page_size"), list(combinations()))
def test_every_policy_and_codec_as_in_a_contiguous_cache(policy, codec, page_size):
    policy, codec = POLICIES[policy], codec_of(codec, page_size)
    cache = poisoned(paged(policy, codec, page_size))
    cache = cache.with_tables(scattered(cache), [0] * B)
    outs, cache = feed(cache)
    others, flat = expected(policy, codec)
    for out, other in zip(outs, others, strict=True):
        np.testing.assert_allclose(out, other, atol=2e-5)
    positions, slots = np.asarray(flat.positions), flat.num_slots  # whole pages may have more slots
    assert_same_bits(np.asarray(cache.positions)[..., :slots], positions, "positions")
    assert_same_bits(cache.kept, flat.kept, "tokens kept")
    there = np.broadcast_to(positions[:, None] >= 0 if positions.ndim == 2 else positions >= 0, (B, K, slots))
    for got, other in zip(cache.check().dense(), flat.dense(), strict=True):
        assert_same_bits(np.asarray(got)[:, :, :slots][there], np.asarray(other)[there], "what is kept")
    # One tenant's pages spoiled: its neighbours do not notice, one token or several.
    spoiled = poisoned(cache, np.asarray(cache.page_table)[0])
    for length in (CHUNK, 1):
        new, num_new = tokens(length, 50 + length), jnp.asarray([1, 1, 1], jnp.int32)
        clean, _ = step()(*new, cache, num_new=num_new)
        out, after = step()(*new, spoiled, num_new=num_new)
        assert_same_bits(np.asarray(out)[1:], np.asarray(clean)[1:], "the other tenants")
        assert not np.asarray(after.status)[1:].any()


SCORED = ("h2o", "scissorhands", "fastgen")


def taken_over(cache, targets, sources):
    """Rows `targets` as forks of rows `sources`: states, and copies in pages of their own."""
    rows = np.arange(cache.batch_size)
    rows[list(targets)] = list(sources)
    table = np.asarray(cache.page_table)
    cache = cache.select(rows).copy_pages(table[list(sources)].ravel(), table[list(targets)].ravel())
    return cache.with_tables(table, np.asarray(cache.lengths))


@pytest.mark.parametrize("codec", ["bfloat16", pytest.param("int8", marks=pytest.mark.slow)])
@pytest.mark.parametrize("policy", ["window", "h2o", "fastgen", pytest.param("scissorhands", marks=pytest.mark.slow)])
def test_copy_on_write_takes_everything_along(policy, codec):
    """Keys, values, scales, and the scores of policies that go by attention; afterwards both go their own ways."""
    policy, codec = POLICIES[policy], codec_of(codec, 8)
    cache = poisoned(paged(policy, codec))
    _, cache = feed(cache.with_tables(scattered(cache), [0] * B))
    forked = taken_over(cache, [2], [0])
    assert forked.lengths.tolist() == [cache.lengths[0], cache.lengths[1], cache.lengths[0]]
    for name, x in zip(("state", "dense"), ((forked.state, cache.state), (forked.dense(), cache.dense())), strict=True):
        for new, old in zip(*map(jax.tree.leaves, x), strict=True):
            assert_same_bits(np.asarray(new)[2], np.asarray(old)[0], f"the fork's {name}")
            assert_same_bits(np.asarray(new)[:2], np.asarray(old)[:2], f"the others' {name}")
    new = tuple(x.at[2].set(x[0]) for x in tokens(1, 60))
    out, _ = step()(*new, forked)
    assert_same_bits(out[2], out[0], "the fork's next token")
    alone, _ = step()(*new, cache)
    assert_same_bits(out[0], alone[0], "the parent's")
    _, after = step()(*tokens(1, 61), forked)
    parent, _ = step()(*tokens(1, 61), cache)
    assert_same_bits(
        step()(*tokens(1, 62), after)[0][0], step()(*tokens(1, 62), _next(cache))[0][0], "the parent later"
    )
    assert np.isfinite(np.asarray(parent)).all()


def _next(cache):
    return step()(*tokens(1, 61), cache)[1]


def test_a_tail_of_a_head_is_copied_by_itself():
    """Strips: one head's copy leaves the same page of the others alone."""
    cache = paged(POLICIES["fastgen"])
    count, rng = cache.num_pages, np.random.default_rng(0)
    fill = lambda x: jnp.asarray(rng.integers(0, 99, x.shape), jnp.int32).astype(x.dtype)
    cache = cache.replace(keys=jax.tree.map(fill, cache.keys), values=jax.tree.map(fill, cache.values))
    copied = cache.copy_pages([count + 1, 3, -1], [2 * count + 4, 5, 0])
    for old, new in ((cache.keys, copied.keys), (cache.values, copied.values)):
        wanted = np.asarray(old["data"]).copy()
        wanted[1, 4], wanted[:, 5] = wanted[0, 1], wanted[:, 3]
        assert_same_bits(new["data"], wanted, "the pool")
    for sources, targets in (([0], [count]), ([count], [0]), ([count * (1 + K)], [0])):
        with pytest.raises(errors.RangeError, match="pages must lie in"):
            cache.copy_pages(sources, targets)


# FastGen --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [1, 4])
def test_heads_give_back_the_pages_that_they_do_not_need(page_size):
    """What is live is what each head keeps, rounded up to pages. The others are poisoned, and go to any head."""
    policy = kvattn.FastGen(0.6, special_tokens=(0,), local=0.2, frequent=0.2)
    cache, flat = poisoned(paged(policy, page_size=page_size)), contiguous(policy)
    cache = cache.with_tables(scattered(cache), [0] * B)
    free, given_back, ids = set(), 0, jnp.zeros((B, CHUNK), jnp.int32).at[:, 1:].set(7)
    for i, (real, length) in enumerate(SCHEDULE):
        call = functools.partial(step(), *tokens(length, i), num_new=jnp.asarray(real, jnp.int32))
        out, cache = call(cache, token_ids=ids[:, -length:])
        other, flat = call(flat, token_ids=ids[:, -length:])
        np.testing.assert_allclose(out, other, atol=2e-5)
        assert_same_bits(cache.kept, flat.kept, "tokens kept")
        cache = cache.check().compact()
        kept, table = np.asarray(cache.kept), np.array(cache.page_table)
        live = np.asarray(cache.live)
        np.testing.assert_array_equal(live.sum(-1), -(-kept // page_size))
        np.testing.assert_array_equal(live, np.arange(live.shape[-1]) < live.sum(-1, keepdims=True))
        # Back to the pool goes what no head needs, and from there, spoiled, what the next tokens need: to any head.
        back = table[(table >= 0) & ~live].tolist()
        free |= set(back)
        given_back += len(back)
        table[~live] = -1
        cache = poisoned(cache, back)
        most = kept + (1 if i + 1 == len(SCHEDULE) else SCHEDULE[i + 1][1])
        for b, k in np.ndindex(B, K):
            for column in range(live[b, k].sum(), min(-(-most[b, k] // page_size), table.shape[-1])):
                table[b, k, column] = free.pop()
        cache = cache.with_tables(table, cache.lengths)
    assert given_back > B * K and (kept < np.asarray(cache.lengths)[:, None]).any(), "no head let go of anything"


def test_what_is_remembered_of_a_token_moves_with_it():
    """Positions, scores and kinds of every head go to the slots that its own order says; what heads chose stays."""
    policy, rng = POLICIES["fastgen"], np.random.default_rng(0)
    numbered = lambda x: rng.permutation(x.size).reshape(x.shape).astype(x.dtype)
    state = jax.tree.map(numbered, policy.init(B, K, CAPACITY))
    order = rng.permuted(np.broadcast_to(np.arange(CAPACITY, dtype=np.int32), (B, K, CAPACITY)), axis=-1)
    moved = policy.moved(jax.tree.map(jnp.asarray, state), jnp.asarray(order))
    of_slots = {"positions", "scores", "kinds"}
    for name in (*of_slots, "choice", "prompt"):
        before = getattr(state, name)
        expected = np.take_along_axis(before, order, axis=-1) if name in of_slots else before
        np.testing.assert_array_equal(getattr(moved, name), expected, name)


def test_pages_of_all_heads_serve_heads_with_tables_too():
    """A table [B, W] gives each head its strip of the pages: the same bits as any other strips."""
    cache = poisoned(paged(POLICIES["fastgen"]))
    table = np.random.default_rng(1).permutation(cache.num_pages)[: B * cache.max_pages].reshape(B, -1)
    outs, _ = feed(cache.with_tables(table, [0] * B))
    others, _ = feed(cache.with_tables(scattered(cache), [0] * B))
    for out, other in zip(outs, others, strict=True):
        assert_same_bits(out, other, "outputs")


# Windows --------------------------------------------------------------------------------------------------------------


def test_pages_that_a_window_has_left_are_not_looked_at():
    """The table may name nothing there, or pages of others; a page that the next token sees must be there."""
    policy = OrderedWindow(6)
    cache, flat = poisoned(paged(policy, page_size=4)), contiguous(policy)
    table = scattered(cache)
    cache = cache.with_tables(table, [0] * B)
    for i, (real, length) in enumerate(SCHEDULE):
        new, real = tokens(length, i), jnp.asarray(real, jnp.int32)
        out, cache = step()(*new, cache, num_new=real)
        other, flat = step()(*new, flat, num_new=real)
        np.testing.assert_allclose(out, other, atol=2e-5)
        left = (np.asarray(cache.lengths)[:, None] - policy.window + 1) // 4 > np.arange(cache.max_pages)
        cache = poisoned(cache, table[left]).with_tables(np.where(left, -1, table), cache.lengths)
        wanted = ~left & (np.arange(cache.max_pages) * 4 < np.asarray(cache.lengths)[:, None])
        assert (np.asarray(cache.live) >= wanted).all()
    assert left.any()
    row, column = np.argwhere(wanted)[0]
    broken = np.where(left, -1, table)
    broken[row, column] = -1
    with pytest.raises(errors.RangeError, match=rf"page -1 .* row {row}"):
        cache.with_tables(broken, cache.lengths)
    under_jit = jax.jit(lambda cache, table: cache.with_tables(table, cache.lengths))(cache, broken)
    out, after = step()(*tokens(1, 9), under_jit)
    assert (np.asarray(out)[row] == 0).all() and np.asarray(after.status)[row] == BAD_PAGE
    # What came last can be taken back as long as its pages are there.
    _, more = step()(*tokens(1, 70), cache)
    again, _ = step()(*tokens(1, 71), more.trim(1))
    assert_same_bits(again, step()(*tokens(1, 71), cache)[0], "the token in place of the one taken back")


def test_a_prefix_behind_a_window_is_shared():
    policy = OrderedWindow(5)
    cache = paged(policy, page_size=4).with_tables([[0, 1, 2], [3, 4, 5], [6, 7, 8]], [0] * B)
    _, cache = step()(*tokens(8, 0), cache, num_new=jnp.asarray([8, 0, 0], jnp.int32))
    cache = cache.with_tables([[-1, 1, 2], [-1, 1, 5], [6, 7, 8]], [8, 8, 0])
    new = tuple(x.at[1].set(x[0]) for x in tokens(1, 1))
    out, _ = step()(*new, cache)
    assert_same_bits(out[0], out[1], "rows that share a prefix")


# What is refused ------------------------------------------------------------------------------------------------------


def test_budgets_need_their_pages():
    for policy, pages in ((kvattn.H2O(4, 3), 4), (kvattn.Scissorhands(7, 2, 8), 4)):
        sizes = {"batch_size": 1, "policy": policy, "dtype": jnp.float32}
        with pytest.raises(errors.ConfigError, match=rf"8 tokens .* max_pages={pages}"):
            kvattn.PagedKVCache.create(9, 2, K, H, max_pages=pages - 1, **sizes)
        assert kvattn.PagedKVCache.create(9, 2, K, H, max_pages=pages, **sizes).num_slots == 8
    short = kvattn.PagedKVCache.create(9, 2, K, H, batch_size=1, max_pages=2, policy=kvattn.SlidingWindow(6))
    with pytest.raises(errors.CapacityError):  # a ring that never turns, as with a capacity below the window
        kvattn.cached_attention(*tokens(5, 0, 1), short.with_tables([[0, 1]], [0]))
    with pytest.raises(errors.ConfigError, match="must be a policy"):
        kvattn.PagedKVCache.create(9, 2, K, H, batch_size=1, max_pages=2, policy="h2o")
    with pytest.raises(errors.UnsupportedError, match="share their scales"):
        sizes = {"batch_size": 1, "max_pages": 2, "policy": kvattn.SlidingWindow(6), "codec": KINDS["kivi"]}
        kvattn.PagedKVCache.create(9, 8, K, H, **sizes)
    with pytest.raises(errors.RangeError, match="num_pages"):
        jax.eval_shape(functools.partial(paged, POLICIES["fastgen"], spare=2**30))


@pytest.mark.parametrize("policy", SCORED)
def test_rows_with_a_memory_take_over_nobodys_tokens(policy):
    cache = paged(POLICIES[policy])
    table = scattered(cache)
    cache = cache.with_tables(table, [0] * B)
    _, cache = step()(*tokens(CHUNK, 0), cache, num_new=jnp.asarray([5, 3, 4], jnp.int32))
    again = cache.with_tables(table, [5, 0, 4])
    assert again.lengths.tolist() == [5, 0, 4] and again.kept[1].max() == 0 and again.kept[0].min() > 0
    with pytest.raises(errors.UnsupportedError, match=r"rows \[1\].*cache\.select"):
        cache.with_tables(table, [5, 4, 4])
    under_jit = jax.jit(lambda cache: cache.with_tables(table, jnp.asarray([5, 4, 4], jnp.int32)))(cache)
    assert under_jit.lengths.tolist() == [5, 0, 4] and under_jit.status.tolist() == [0, LOST, 0]


def test_tables_of_heads_are_checked_head_by_head():
    cache = paged(POLICIES["fastgen"], page_size=4)
    count, columns = cache.num_pages, cache.max_pages
    table = scattered(cache)
    for bad, match in ((count * (1 + K), "pages 0 to"), (-1, "page -1")):
        broken = table.copy()
        broken[1, 1, 0] = bad
        with pytest.raises(errors.RangeError, match=rf"{match}|row 1, head 1"):
            kvattn.cached_attention(*tokens(1, 0), cache.with_tables(broken, [0] * B))
    both = table.copy()
    both[0, 1, 0], both[0, 0, 0] = 2, count + count + 2  # page 2 of head 1: its own, and by the number of its strip
    with pytest.raises(errors.RangeError, match="row 0, head 0 and row 0, head 1 would both write"):
        kvattn.cached_attention(*tokens(1, 0), cache.with_tables(both, [0] * B))
    for shape in ((B, K + 1, 1), (B, K, columns + 1), (B + 1, 1), (B,)):
        with pytest.raises(errors.ShapeError, match=r"\[B, K, W\]"):
            cache.with_tables(np.zeros(shape, np.int32), [0] * B)
    with pytest.raises(errors.ShapeError, match=r"\[B, W\]"):
        paged(kvattn.Full()).with_tables(np.zeros((B, K, 1), np.int32), [0] * B)


def test_a_ring_is_not_written_where_another_row_reads():
    cache = paged(kvattn.SlidingWindow(8), page_size=4).with_tables([[0, 1], [2, 3], [4, 5]], [0] * B)
    _, cache = step()(*tokens(8, 0), cache)
    shared = cache.with_tables([[0, 1], [0, 3], [4, 5]], [8, 8, 8])
    with pytest.raises(errors.RangeError, match="rows 0 and 1 would both write to page 0"):
        kvattn.cached_attention(*tokens(1, 1), shared)
    with pytest.raises(errors.BlockStateError, match="row 0 would write to page 0, where row 1 reads"):
        kvattn.cached_attention(*tokens(1, 1), shared, num_new=[1, 0, 0])


@pytest.mark.parametrize("name", [n for n in kvattn.attend.names() if n.startswith("mosaic")])
def test_kernels_refuse_tables_of_heads(name):
    """By their record, so that the best that works is `"xla"`."""
    cache = paged(POLICIES["fastgen"], page_size=128).with_tables([[0], [1], [2]], [0] * B)
    query, mask = jnp.zeros((B, 1, N, H)), Mask()
    request = Request(query, jnp.zeros((B, 1), jnp.int32), cache.view(), alibi_slopes=None, mask=mask, scale=1.0)
    from kvattn.pallas import common

    assert "each key/value head has its own" in common.refusal(request)
    assert api.choose(request, (name, "xla"))[0] == "xla"


def test_nothing_is_compiled_for_other_tables():
    """Tables, lengths, compacted heads: one program for a step of one token, updated in place."""
    cache = paged(POLICIES["fastgen"], page_size=4)
    traces = []

    @kvattn.jit
    def append(q, k, v, cache):
        traces.append(1)
        return kvattn.cached_attention(q, k, v, cache, implementation="xla")

    for seed in range(3):
        cache = cache.with_tables(scattered(cache, seed), [0, 0, 0] if seed == 0 else cache.lengths)
        pointer = cache.keys["data"].unsafe_buffer_pointer()
        _, cache = append(*tokens(1, seed), cache)
        assert cache.keys["data"].unsafe_buffer_pointer() == pointer
        cache = cache.compact()
    assert len(traces) == 1


def test_nan_in_a_row_marks_that_row():
    cache = paged(kvattn.H2O(4, 3))
    _, cache = feed(cache.with_tables(scattered(cache), [0] * B), SCHEDULE[:2])
    _, after = step()(*tokens(1, 3), poisoned(cache, np.asarray(cache.page_table)[1]))
    assert after.status.tolist() == [0, NONFINITE, 0]


def test_reference_reads_tables_of_heads():
    cache = paged(POLICIES["fastgen"], page_size=4, dtype=jnp.float32)
    cache = poisoned(cache).with_tables(scattered(cache), [0] * B)
    outs, _ = feed(cache, SCHEDULE[:1])
    others, _ = feed(cache, SCHEDULE[:1], implementation="reference")
    for out, other in zip(outs, others, strict=True):
        np.testing.assert_allclose(out, other, atol=2e-5)


# Planted faults -------------------------------------------------------------------------------------------------------


def one_table(self, pool, pages):
    """Every head reads its own strip, whatever the number."""
    heads, count = pool.shape[:2]
    return pages % count + count * jnp.arange(heads, dtype=jnp.int32)[None, :, None]


FAULTS = {
    "every head has its own strip only": (
        kvattn.cache.pages.Pages,
        "_strip",
        one_table,
        lambda: test_heads_give_back_the_pages_that_they_do_not_need(4),
    ),
    "scores stay where they were": (
        kvattn.FastGen,
        "moved",
        lambda self, state, order: dataclasses.replace(
            state, positions=jnp.take_along_axis(state.positions, order, axis=-1)
        ),
        test_what_is_remembered_of_a_token_moves_with_it,
    ),
    "a window needs all its pages": (
        OrderedWindow,
        "needed",
        kvattn.policies.Policy.needed,
        test_pages_that_a_window_has_left_are_not_looked_at,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault(name, monkeypatch):
    owner, attribute, fault, check = FAULTS[name]
    monkeypatch.setattr(owner, attribute, fault)
    step.cache_clear()
    try:
        with pytest.raises((AssertionError, errors.RangeError)):
            check()
    finally:
        step.cache_clear()
