"""`PagedKVCache`: pages in any order hold what lists of tokens hold, whatever lies in the others; rows 10 and 70-80."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bad_input_table import Table, run
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from oracles import assert_same_bits, attend_token

import kvattn
from kvattn import errors
from kvattn.cache.pages import Pages
from kvattn.cache.status import BAD_PAGE

B, N, K, H, PAGES, COLUMNS = 3, 4, 2, 8, 23, 7
CODECS = (None, kvattn.Int8(), kvattn.Float8(), kvattn.Int4(4), kvattn.KIVI(2, 4, 8))
SCHEDULE = (([7, 3, 0], 7), ([1, 1, 1], 1), ([6, 5, 2], 6), ([1, 0, 1], 1), ([1, 1, 1], 1))
"""How many of the tokens of each row are real, and how many come: ragged chunks and single tokens."""


def new_tokens(length, seed, kv_heads=K, batch=B, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=(batch, length, h, H)), dtype) for h in (N, kv_heads, kv_heads))


def scattered(seed=0, batch=B, columns=COLUMNS):
    """A table of distinct pages in no order."""
    return np.random.default_rng(seed).permutation(PAGES)[: batch * columns].reshape(batch, columns)


def make(page_size=8, codec=None, kv_heads=K, batch=B, pages=PAGES, columns=COLUMNS, dtype=jnp.float32):
    return kvattn.PagedKVCache.create(
        pages, page_size, kv_heads, H, batch_size=batch, max_pages=columns, codec=codec, dtype=dtype
    )


def poisoned(cache):
    """Every number of the pool NaN, or the largest code."""
    worst = lambda x: jnp.full_like(x, jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).max)
    return dataclasses.replace(cache, keys=jax.tree.map(worst, cache.keys), values=jax.tree.map(worst, cache.values))


@functools.cache
def step(implementation="xla", **rules):
    return jax.jit(functools.partial(kvattn.cached_attention, implementation=implementation, **rules))


def feed(cache, implementation="xla", schedule=SCHEDULE, **rules):
    """Outputs of the schedule, token by token and row by row, and the cache."""
    outs = []
    for i, (real, length) in enumerate(schedule):
        new = new_tokens(length, i, cache.num_kv_heads)
        out, cache = step(implementation, **rules)(*new, cache, num_new=jnp.asarray(real, jnp.int32))
        outs.append(np.asarray(out))
    return outs, cache.check()


class Lists:
    """Keys and values of every row as lists, and attention over them in float64."""

    def __init__(self, kv_heads=K, window=None):
        self.rows = [([], []) for _ in range(B)]
        self.kv_heads, self.window = kv_heads, window

    def append(self, new, real):
        query, key, value = (np.asarray(x, np.float64) for x in new)
        out = np.zeros(query.shape)
        for b, (keys, values) in enumerate(self.rows):
            for t in range(real[b]):
                keys.append(key[b, t])
                values.append(value[b, t])
                first = 0 if self.window is None else max(0, len(keys) - self.window)
                group = N // self.kv_heads
                for k in range(self.kv_heads):
                    heads = slice(k * group, (k + 1) * group)
                    seen = [x[k][None] for x in keys[first:]], [x[k][None] for x in values[first:]]
                    out[b, t, heads], _ = attend_token(query[b, t, heads], *seen)
        return out


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize(("page_size", "kv_heads", "window"), [(1, 2, None), (5, 1, 4), (8, 4, None), (16, 2, 3)])
def test_pages_are_lists(page_size, kv_heads, window, implementation):
    """Every page size, head count and window, through a table in no order over a pool of NaN."""
    columns = -(-17 // page_size)
    pages = max(PAGES, B * columns)
    cache = poisoned(make(page_size, None, kv_heads, columns=columns, pages=pages))
    table = np.random.default_rng(1).permutation(pages)[: B * columns].reshape(B, columns)
    outs, cache = feed(cache.with_tables(table, [0] * B), implementation, window=window)
    lists = Lists(kv_heads, window)
    for i, (out, (real, length)) in enumerate(zip(outs, SCHEDULE, strict=True)):
        np.testing.assert_allclose(out, lists.append(new_tokens(length, i, kv_heads), real), atol=2e-6)
    assert cache.lengths.tolist() == [len(keys) for keys, _ in lists.rows]
    keys, values = (np.asarray(x) for x in cache.dense())
    for b, row in enumerate(lists.rows):
        for got, given in zip((keys, values), row, strict=True):
            np.testing.assert_array_equal(got[b, :, : len(given)], np.asarray(given, np.float32).swapaxes(0, 1))


@pytest.mark.parametrize(
    "codec",
    [pytest.param(c, marks=pytest.mark.slow if type(c).__name__ in ("Float8", "Int4") else ()) for c in CODECS],
    ids=lambda c: type(c).__name__,
)
def test_every_codec_as_in_a_contiguous_cache(codec):
    outs, cache = feed(poisoned(make(codec=codec)).with_tables(scattered(), [0] * B))
    flat = kvattn.KVCache.create(B, K, H, capacity=COLUMNS * 8, codec=codec, dtype=jnp.float32)
    expected, flat = feed(flat)
    for out, other in zip(outs, expected, strict=True):
        np.testing.assert_allclose(out, other, atol=1e-5)
    for got, other in zip(cache.dense(), flat.dense(), strict=True):
        for b, n in enumerate(cache.lengths.tolist()):
            assert_same_bits(np.asarray(got)[b, :, :n], np.asarray(other)[b, :, :n], f"row {b}")
    other_pages, _ = feed(make(codec=codec).with_tables(scattered(7), [0] * B))
    for a, b in zip(outs, other_pages, strict=True):
        assert_same_bits(a, b, "outputs under another table, over other garbage")


def test_rules_of_the_call():
    """RoPE, ALiBi, caps and sinks go by positions, not by pages."""
    rules = {"rope": kvattn.RoPE(H), "softcap": 3.0, "scale": 0.7}
    arrays = {"sinks": jnp.arange(N, dtype=jnp.float32) / 4, "alibi_slopes": kvattn.alibi_slopes(N)}
    flat = kvattn.KVCache.create(B, K, H, capacity=COLUMNS * 8, dtype=jnp.float32)
    caches = [make().with_tables(scattered(), [0] * B), flat]
    for i, (real, length) in enumerate(SCHEDULE):
        new, real = new_tokens(length, i), jnp.asarray(real, jnp.int32)
        outs = []
        for j, cache in enumerate(caches):
            out, caches[j] = step(**rules)(*new, cache, num_new=real, **arrays)
            outs.append(out)
        np.testing.assert_allclose(*outs, atol=2e-6)


def test_new_tables_are_no_new_program_and_the_pool_is_updated_in_place():
    cache = make(16, dtype=jnp.bfloat16, pages=512, columns=64)
    traces = []

    @kvattn.jit
    def append(q, k, v, cache):
        traces.append(1)
        return kvattn.cached_attention(q, k, v, cache)

    new = new_tokens(1, 0, dtype=jnp.bfloat16)
    memory = append.lower(*new, cache).compile().memory_analysis()
    assert memory.alias_size_in_bytes == cache.nbytes
    assert memory.temp_size_in_bytes < 0.1 * cache.nbytes
    for seed in range(3):
        table = np.random.default_rng(seed).permutation(512)[: B * 64].reshape(B, 64)
        cache = cache.with_tables(table, [seed * 16, 5, 0])
        pointer = cache.keys["data"].unsafe_buffer_pointer()
        _, cache = append(*new, cache)
        assert cache.keys["data"].unsafe_buffer_pointer() == pointer
    assert len(traces) == 1
    with pytest.raises(errors.StaleCacheError):
        before = cache
        append(*new, cache)
        append(*new, before)


def test_verbs():
    cache = make().with_tables(scattered(), [0] * B)
    _, cache = feed(cache)
    lengths = cache.lengths.tolist()
    back = cache.trim([2, 0, 1])
    assert back.lengths.tolist() == [lengths[0] - 2, lengths[1], lengths[2] - 1]
    with pytest.raises(errors.RangeError, match="trim"):
        cache.trim(100)
    picked = cache.select([2, 0, 2])
    for got, given in zip(picked.dense(), cache.dense(), strict=True):
        assert_same_bits(np.asarray(got), np.asarray(given)[[2, 0, 2]], "the rows selected")
    assert cache.reset(jnp.asarray([False, True, False])).lengths.tolist() == [lengths[0], 0, lengths[2]]
    positions = np.asarray(cache.positions)
    assert [(p >= 0).sum() for p in positions] == lengths == cache.kept.tolist()
    pools = 2 * K * PAGES * 8 * H * 4
    assert cache.nbytes == pools + 4 * (B * COLUMNS + 2 * B)
    leaves, tree = jax.tree.flatten(cache)
    assert repr(jax.tree.unflatten(tree, leaves)) == repr(cache)


@pytest.mark.parametrize("codec", [None, kvattn.Int4(4)], ids=lambda c: type(c).__name__)
def test_copy_on_write(codec):
    """A fork shares full pages, gets its own copy of the last one, and leaves its parent alone."""
    cache = make(codec=codec, batch=2).with_tables(scattered(3, 2), [0, 0])
    first = new_tokens(11, 0, batch=2)
    _, cache = step()(*first, cache, num_new=jnp.asarray([11, 0], jnp.int32))
    parent = np.asarray(cache.page_table)[0]
    spare = next(p for p in range(PAGES) if p not in np.asarray(cache.page_table))
    cache = cache.copy_pages([int(parent[1]), -1], [spare, 0])
    child = [int(parent[0]), spare, *np.asarray(cache.page_table)[1, 2:].tolist()]
    cache = cache.with_tables(np.stack([parent, child]), [11, 11])
    before = [np.asarray(x)[0, :, :11] for x in cache.dense()]
    for parents, dense in zip(before, cache.dense(), strict=True):
        assert_same_bits(parents, np.asarray(dense)[1, :, :11], "the fork")
    _, cache = step()(*new_tokens(1, 1, batch=2), cache)
    for got, old in zip(cache.dense(), before, strict=True):
        assert_same_bits(np.asarray(got)[0, :, :11], old, "the parent")
    for x in map(np.asarray, cache.dense()):
        assert np.abs(x[0, :, 11] - x[1, :, 11]).max() > 0.1, "the forks wrote to one page"
    for bad, error in (([PAGES], errors.RangeError), ([0.5], errors.DTypeError), ([[0]], errors.ShapeError)):
        with pytest.raises(error, match=r"pages|sources"):
            cache.copy_pages(bad, [0])


def with_any_content(cache, seed=0):
    """The cache with random bits in every array of its store: keys, values and scales all different."""
    rng = np.random.default_rng(seed)

    def fill(x):
        return jnp.asarray(rng.integers(0, 100, x.shape), jnp.int32).astype(x.dtype)

    return dataclasses.replace(cache, keys=jax.tree.map(fill, cache.keys), values=jax.tree.map(fill, cache.values))


@pytest.mark.parametrize("codec", [None, CODECS[3], CODECS[4]], ids=lambda c: type(c).__name__)
def test_copies_and_selections_take_everything_along(codec):
    """Keys, values, scales and minima: pages are copied, what lies outside pages is selected, nothing else moves."""
    cache = with_any_content(make(codec=codec).with_tables(scattered(), [0] * B))
    cache = dataclasses.replace(cache, lengths=jnp.asarray([9, 3, 17], jnp.int32), status=jnp.asarray([0, 4, 0]))
    copied, picked, rows = cache.copy_pages([3, -1, 5], [7, 1, 2]), cache.select([2, 0, 2, 1]), np.asarray([2, 0, 2, 1])
    for role in ("keys", "values"):
        for name, x in getattr(cache, role).items():
            before = np.asarray(x)
            expected, chosen = before.copy(), before
            if name == "residual":
                chosen = before[:, rows]
            else:
                expected[:, 7], expected[:, 2] = before[:, 3], before[:, 5]
            assert_same_bits(getattr(copied, role)[name], expected, f"{role}, {name} of copied pages")
            assert_same_bits(getattr(picked, role)[name], chosen, f"{role}, {name} of selected rows")
    for name in ("page_table", "lengths", "status"):
        assert_same_bits(getattr(copied, name), getattr(cache, name), name)
        assert_same_bits(getattr(picked, name), np.asarray(getattr(cache, name))[rows], name)


def test_copies_that_cannot_be_are_left_out_under_jit():
    """From and to pages that are not there: no page changes, the first and the last neither."""
    cache = with_any_content(make().with_tables(scattered(), [0] * B))
    copied = jax.jit(lambda cache, *pages: cache.copy_pages(*pages))(
        cache, jnp.asarray([-1, PAGES, 1, 3, 3]), jnp.asarray([5, 4, -1, PAGES, 2])
    )
    for before, after in ((cache.keys, copied.keys), (cache.values, copied.values)):
        expected = np.asarray(before["data"]).copy()
        expected[:, 2] = expected[:, 3]
        assert_same_bits(after["data"], expected, "the pool")


def test_layers_and_models_take_paged_caches():
    layer = kvattn.layers.GroupedQueryAttention(
        N, 16, num_kv_heads=K, head_dim=H, rope=kvattn.RoPE(H), rngs=nnx.Rngs(0)
    )
    x = jax.random.normal(jax.random.key(0), (B, 9, 16))
    expected, _ = layer(x, cache=layer.make_cache(B, 9))
    y, cache = layer(x, cache=make().with_tables(scattered(), [0] * B))
    np.testing.assert_allclose(y, expected, atol=1e-5)
    assert isinstance(cache, kvattn.PagedKVCache)
    config = kvattn.models.DecoderConfig(
        vocab_size=17, model_dim=16, num_layers=2, num_heads=N, num_kv_heads=K, head_dim=H, mlp_dim=16
    )
    model = kvattn.models.Decoder(config, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(1), (B, 9), 0, 17)
    logits, _ = model(tokens, tuple(make().with_tables(scattered(i), [0] * B) for i in range(2)))
    np.testing.assert_allclose(logits, model(tokens)[0], atol=1e-5)


def test_split_by_heads_on_an_explicit_mesh():
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
    cache = make().with_tables(scattered(), [0] * B)
    new = new_tokens(3, 0)
    expected, _ = step()(*new, cache)
    with jax.set_mesh(mesh):
        split = lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec))
        out, after = step()(*(split(x, P(None, None, "model")) for x in new), cache)
        np.testing.assert_allclose(out, expected, atol=1e-6)
        pool = after.keys["data"]
        assert pool.sharding.shard_shape(pool.shape) == (K // 2, *pool.shape[1:])
        rows = new_tokens(3, 0, batch=4)
        other = make(batch=4, columns=5).with_tables(scattered(batch=4, columns=5), [0] * 4)
        with pytest.raises(errors.ShardingError, match="share one pool"):
            kvattn.cached_attention(*(split(x, P("model")) for x in rows), other)


# Bad input ------------------------------------------------------------------------------------------------------------

TABLE = Table()
bad, defined = TABLE.bad, TABLE.defined


def paged(**settings):
    return kvattn.PagedKVCache.create(
        **{
            "num_pages": 4,
            "page_size": 8,
            "num_kv_heads": 2,
            "head_dim": 8,
            "batch_size": 2,
            "max_pages": 3,
            **settings,
        }
    )


for size in (0, -16):
    bad(10, f"page_size={size}", errors.ConfigError, "page_size", str(size))(lambda size=size: paged(page_size=size))
bad(10, "page_size=True", errors.DTypeError, "page_size", "True")(lambda: paged(page_size=True))
bad(10, "num_pages=0", errors.ConfigError, "num_pages", "0")(lambda: paged(num_pages=0))
bad(10, "a codec of other blocks", errors.ConfigError, "KIVI", "128", "8")(lambda: paged(codec=kvattn.KIVI()))
TABLE.defined(10, "page_size=5")(lambda: test_pages_are_lists(5, 2, None, "xla"))

ONE = tuple(jnp.asarray(x) for x in np.ones((3, 2, 1, 2, 8), np.float32))
for page in (4, 10**6, -1, -2):
    bad(70, f"page {page} for a token that is there", errors.RangeError, f"page {page}", "row 1", "0 to 3")(
        lambda page=page: paged().with_tables([[0, 1], [page, 2]], [1, 1])
    )
    bad(70, f"page {page} for the token that comes", errors.RangeError, f"page {page}", "row 1", "tokens from 8")(
        lambda page=page: (
            kvattn.cached_attention(*ONE, paged(dtype=jnp.float32).with_tables([[0], [1, page][:1]], [0, 8]))
            if page == -1
            else kvattn.cached_attention(*ONE, paged(dtype=jnp.float32).with_tables([[0, 3], [1, page]], [0, 8]))
        )
    )


def bad_page_under_jit(page):
    """The row comes out as zeros and its status says why; nothing is written, and the other row does not notice."""
    cache = paged(dtype=jnp.float32, num_pages=6)
    start = cache.with_tables([[0, 3], [1, 2]], [0, 0])
    for length in (5, 3, 1):
        new = new_tokens(length, length, batch=2)
        _, start = step()(*new, start)
    new = new_tokens(1, 9, batch=2)
    clean, after_clean = step()(*new, start)
    broken = dataclasses.replace(start, page_table=start.page_table.at[1, 1].set(page))
    out, after = step()(*new, broken)
    assert_same_bits(np.asarray(out)[1], np.zeros_like(np.asarray(out)[1]), "the row")
    assert_same_bits(out[0], clean[0], "the other row")
    assert np.asarray(after.status).tolist() == [0, BAD_PAGE] and after.lengths.tolist() == [10, 9]
    assert_same_bits(
        after.keys["data"][:, (1, 2, 4, 5)], start.keys["data"][:, (1, 2, 4, 5)], "pages of the row, free ones"
    )
    assert after_clean.lengths.tolist() == [10, 10]
    with pytest.raises(errors.RangeError, match=r"rows \[1\].*page"):
        after.check()


for page in (6, 10**6, -1, -2):
    defined(70, f"page {page} under jit")(functools.partial(bad_page_under_jit, page))


@defined(70, "a row that select does not know: no pages of another")
def _():
    start = paged(dtype=jnp.float32).with_tables([[0, 3], [1, 2]], [0, 0])
    _, start = step()(*new_tokens(3, 0, batch=2), start)
    after = jax.jit(lambda c, rows: c.select(rows))(start, np.asarray([1, 7]))
    with pytest.raises(errors.RangeError, match=r"rows \[1\].*row number"):
        after.check()
    _, after = step()(*new_tokens(1, 1, batch=2), after)
    assert after.lengths.tolist() == [4, 0]
    assert_same_bits(after.keys["data"][:, 0], start.keys["data"][:, 0], "the page of row 0")


@defined(71, "any ids past the tokens")
def _():
    outs = []
    for rest in (-7, 0, 2**31 - 1):
        table = scattered()
        table[:, 3:] = rest
        out, _ = feed(poisoned(make()).with_tables(table, [0] * B))
        outs.append(np.concatenate([x.ravel() for x in out]))
    assert_same_bits(outs[0], outs[1], "outputs")
    assert_same_bits(outs[0], outs[2], "outputs")


@defined(72, "a shared prefix")
def _():
    cache = make(batch=2).with_tables([[3, 5], [4, 6]], [0, 0])
    _, cache = step()(*new_tokens(8, 0, batch=2), cache, num_new=jnp.asarray([8, 0], jnp.int32))
    cache = cache.with_tables([[3, 5], [3, 6]], [8, 8])
    new = new_tokens(1, 1, batch=2)
    out, cache = step()(*new, cache)
    for row in range(2):
        alone = kvattn.KVCache.create(1, K, H, capacity=16, dtype=jnp.float32)
        _, alone = step()(*(x[:1] for x in new_tokens(8, 0, batch=2)), alone)
        expected, _ = step()(*(x[row : row + 1] for x in new), alone)
        np.testing.assert_allclose(out[row], expected[0], atol=1e-6)


@defined(73, "a page twice in one table: its tokens twice")
def _():
    cache = make(batch=1).with_tables([[3, 5]], [0])
    first = new_tokens(8, 0, batch=1)
    _, cache = step()(*first, cache)
    out, _ = step()(*new_tokens(1, 1, batch=1), cache.with_tables([[3, 3, 5]], [16]))
    twice = kvattn.KVCache.create(1, K, H, capacity=24, dtype=jnp.float32)
    _, twice = step()(*first, twice)
    _, twice = step()(*first, twice)
    expected, _ = step()(*new_tokens(1, 1, batch=1), twice)
    np.testing.assert_allclose(out, expected, atol=1e-6)


bad(74, "a table of floats", errors.DTypeError, "page_table", "float")(
    lambda: paged().with_tables(np.ones((2, 2)), [0, 0])
)
bad(74, "a table beyond int32", errors.RangeError, "page_table", str(2**40))(
    lambda: paged().with_tables(np.full((2, 2), 2**40), [0, 0])
)
bad(74, "lengths of floats", errors.DTypeError, "lengths")(lambda: paged().with_tables([[0], [1]], [0.0, 1.0]))
bad(74, "a table of other rows", errors.ShapeError, "page_table", "(3, 1)")(
    lambda: paged().with_tables([[0]] * 3, [0, 0])
)
bad(74, "a table of too many columns", errors.ShapeError, "page_table", "(2, 4)")(
    lambda: paged().with_tables([[0] * 4] * 2, [0, 0])
)
bad(75, "a table too narrow for the length", errors.RangeError, "17 tokens need 3 columns", "has 2")(
    lambda: paged().with_tables([[0, 1], [2, 3]], [17, 0])
)
bad(75, "a negative length", errors.RangeError, "lengths", "-1")(lambda: paged().with_tables([[0], [1]], [-1, 0]))


@defined(75, "lengths out of range under jit")
def _():
    cache = jax.jit(lambda c, n: c.with_tables(jnp.asarray([[0], [1]], jnp.int32), n))(paged(), jnp.asarray([9, -1]))
    assert cache.lengths.tolist() == [0, 0]
    with pytest.raises(errors.RangeError, match=r"rows \[0, 1\]"):
        cache.check()


bad(75, "a token past the last column", errors.CapacityError, "[24] tokens of 24", "max_pages")(
    lambda: kvattn.cached_attention(*ONE, paged(dtype=jnp.float32).with_tables([[0, 1, 2], [3, 3, 3]], [24, 1]))
)
for size in (1, 16, 32, 64, 128):
    TABLE.defined(76, f"page_size={size}")(lambda size=size: test_pages_are_lists(size, 2, None, "xla"))
bad(77, "a pool of more pages than int32 counts", errors.RangeError, "num_pages", str(2**31))(
    lambda: jax.eval_shape(lambda: paged(num_pages=2**31))
)
TABLE.defined(78, "other pages, the same bits")(lambda: test_every_codec_as_in_a_contiguous_cache(None))


@defined(79, "slots below 0 and past the end on write: nothing")
def _():
    cache = make(batch=1).with_tables([[3, 5]], [0])
    same = cache.write(jnp.asarray([[-1, 8 * COLUMNS, 10**9]], jnp.int32), *new_tokens(3, 0, batch=1)[1:])
    assert_same_bits(same.keys["data"], cache.keys["data"], "the pool")


def shared(table, lengths, num_new, **rules):
    """A step that appends `num_new` tokens to rows of `lengths` that lie in the pages of `table`."""
    cache = paged(dtype=jnp.float32, num_pages=6).with_tables(table, lengths)
    new = new_tokens(max(num_new), 0, batch=2)
    return kvattn.cached_attention(*new, cache, num_new=num_new, **rules)


bad(
    73, "a page twice in one table, written over what it holds", errors.BlockStateError, "row 0", "page 2", "copy_pages"
)(lambda: shared([[2, 2], [0, 1]], [8, 0], [1, 0]))
bad(73, "a page that another row reads", errors.BlockStateError, "row 1", "page 0", "row 0", "copy_pages")(
    lambda: shared([[0, 1], [0, 3]], [9, 1], [0, 1])
)
bad(73, "a page that another row reads and also appends behind", errors.BlockStateError, "row 1", "page 4")(
    lambda: shared([[4, 1], [0, 4]], [9, 8], [1, 1])
)
bad(73, "a page that a window still reads", errors.BlockStateError, "row 1", "page 0")(
    lambda: shared([[0, 1], [0, 3]], [9, 1], [0, 1], window=3)
)


@defined(73, "a page that nobody reads any more, or nobody writes to")
def _():
    shared([[0, 1], [0, 3]], [10, 1], [0, 1], window=3)  # the window has left it
    shared([[0, 1], [0, 3]], [8, 8], [1, 1])  # a prefix
    shared([[0, 1], [0, 3]], [8, 9], [0, 1])
    shared([[0, 1], [3, 0]], [0, 1], [0, 9])  # named, and empty


bad(80, "a row that writes to one page twice", errors.RangeError, "row 1", "page 3", "columns 0 and 1")(
    lambda: shared([[0, 1], [3, 3]], [0, 7], [0, 2])
)
bad(80, "copies to one page", errors.RangeError, "targets", "[2]")(lambda: paged().copy_pages([0, 1, 0], [2, 2, 3]))


@defined(80, "copies that are left out go nowhere")
def _():
    paged().copy_pages([-1, -1, 0], [2, 2, 2])


bad(80, "rows that write to one page", errors.RangeError, "rows 0 and 1", "page 2")(
    lambda: kvattn.cached_attention(*ONE, paged(dtype=jnp.float32).with_tables([[2], [2]], [3, 3]))
)
bad(114, "a row that takes over the tokens of another", errors.UnsupportedError, "KIVI", "[1]")(
    lambda: paged(codec=kvattn.KIVI(2, 4, 8)).with_tables([[0], [1]], [0, 3])
)


@pytest.mark.parametrize("row", TABLE.parameters(slow=[f"page_size={n}" for n in (1, 16, 32, 128)]))
def test_rows(row):
    run(row)


def test_rows_covered():
    assert TABLE.numbers() == {10, *range(70, 81), 114}


# Planted faults -------------------------------------------------------------------------------------------------------


def off_by_a_page(self, pool, column, wanted):
    return Pages_page(self, pool, jnp.maximum(column - 1, 0), wanted)


def clamped(self, pool, column, wanted):
    return jnp.minimum(Pages_page(self, pool, column, wanted), pool.shape[1] - 1)


def rows_and_pages_swapped(pool, pages, transposed):
    x = jnp.take(pool, pages, axis=1, mode="clip")
    heads, batch, count, *tail = x.shape
    if transposed:
        return x.transpose(1, 0, 3, 4, 2).reshape(batch, heads, tail[0], count * tail[1])
    return x.transpose(1, 0, 3, 2, 4).reshape(batch, heads, count * tail[0], tail[1])


Pages_page = Pages._page
FAULTS = {
    "tokens go one page too early": ("_page", off_by_a_page, lambda: test_pages_are_lists(5, 1, 4, "xla")),
    "what is to be dropped goes to the last page": ("_page", clamped, lambda: run(TABLE.row("page 6 under jit"))),
    "rows and pages are mixed up": (
        "_gather",
        staticmethod(rows_and_pages_swapped),
        lambda: test_every_codec_as_in_a_contiguous_cache(CODECS[1]),
    ),
    "the table is not looked at": (
        "_gather",
        staticmethod(lambda pool, pages, transposed: Pages_gather(pool, pages * 0, transposed)),
        lambda: test_pages_are_lists(8, 4, None, "xla"),
    ),
}
Pages_gather = Pages._gather


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault(name, monkeypatch):
    attribute, fault, check = FAULTS[name]
    monkeypatch.setattr(Pages, attribute, fault)
    step.cache_clear()
    try:
        with pytest.raises((AssertionError, errors.RangeError)):
            check()
    finally:
        step.cache_clear()
