"""Several of each: blocks, pages, tiles, query blocks, page numbers beyond int16; and what nobody looks at.

Small caches have one block and one tile, and a write that hits the wrong one cannot be told there. Here slots are
placed one by one in Python lists.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import filled, request_for, truth
from oracles import assert_same_bits

import kvattn
from kvattn.attend import xla
from kvattn.cache import Layout
from kvattn.cache.base import nbytes_of
from kvattn.cache.pages import Pages
from kvattn.masks import Mask
from kvattn.pallas import tiles

B, K, F, SLOTS, ROWS = 2, 2, 3, 11, 4
"""Three blocks, the last one short."""


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def laid_out(slots, transposed):
    """[B, K, S, F] as [blocks, B, K, R, F] or [blocks, B, K, F, R], slot by slot."""
    blocks = np.zeros((3, B, K, F, ROWS) if transposed else (3, B, K, ROWS, F), np.float32)
    for s in range(slots.shape[2]):
        here = (s // ROWS, slice(None), slice(None), slice(None), s % ROWS)
        blocks[here if transposed else (*here[:3], s % ROWS)] = slots[:, :, s]
    return blocks


@pytest.mark.parametrize("transposed", [False, True])
def test_blocks_of_a_layout(transposed):
    """Where every slot lies, and what a token that is not written leaves alone: each row, head and block."""
    layout, old = Layout(SLOTS, ROWS, True), numbers(B, K, SLOTS, F)
    blocks = jnp.asarray(laid_out(old, transposed))
    np.testing.assert_array_equal(layout.to_blocks(jnp.asarray(old), transposed), blocks)
    np.testing.assert_array_equal(layout.from_blocks(blocks, transposed), old)
    for i in range(3):
        np.testing.assert_array_equal(layout.take(blocks, jnp.int32(i), transposed), blocks[i])
    new = numbers(B, K, 3, F, seed=1)
    for slots in (
        np.array([[10, -1, 4], [-1, -1, -1]]),  # the last slot, nothing, another block; nothing at all
        np.array([[[10, -1, 4], [0, 7, -1]], [[-1, -1, -1], [3, 5, 9]]]),
    ):
        expected = old.copy()
        for b, k, t in np.ndindex(B, K, 3):
            slot = slots[b, t] if slots.ndim == 2 else slots[b, k, t]
            if slot >= 0:
                expected[b, k, slot] = new[b, k, t]
        written = layout.write(blocks, jnp.asarray(slots, jnp.int32), jnp.asarray(new), transposed)
        assert_same_bits(written, laid_out(expected, transposed), f"slots {slots.tolist()}")
    put = jnp.asarray(numbers(B, K, 2, *blocks.shape[3:], seed=2))
    after = np.asarray(layout.put(blocks, jnp.asarray([[2, 3], [0, 1]], jnp.int32), put))
    expected = np.asarray(blocks).copy()
    expected[2, 0], expected[0, 1], expected[1, 1] = put[0, :, 0], put[1, :, 0], put[1, :, 1]
    assert_same_bits(after, expected, "blocks that were put")


COLUMNS, SIZE, PAGES = 5, 2, 12
"""Five pages of two slots a row; blocks of two pages, the last one short."""


def test_tokens_side_by_side():
    """Pages of 4 tokens in two rows, the third beside the first: read, and written, by all heads and head by head."""
    size, rows, columns = 4, 2, 3
    table = np.random.default_rng(0).permutation(PAGES)[: B * columns].reshape(B, columns)
    pages = Pages(Layout(columns * size, 2 * size, False), size, jnp.asarray(table, jnp.int32), PAGES)
    pool = numbers(K, PAGES, rows, 2 * F)

    def token(pool, b, k, s):
        side = s % size // rows
        return pool[k, table[b, s // size], s % rows, side * F : (side + 1) * F]

    dense = np.asarray(pages.from_blocks(jnp.asarray(pool), False))
    for b, k, s in np.ndindex(B, K, columns * size):
        np.testing.assert_array_equal(dense[b, k, s], token(pool, b, k, s))
    block = np.asarray(pages.take(jnp.asarray(pool), jnp.int32(0), False))
    np.testing.assert_array_equal(block, dense[:, :, : 2 * size])
    new = numbers(B, K, 3, F, seed=1)
    of_all = np.array([[9, -1, 4], [columns * size, 0, 7]])
    of_heads = np.stack([of_all, [[2, 11, -1], [5, 6, 3]], [[0, 1, 3], [-1, -1, 8]]], axis=1)[:, :K]
    for slots in (of_all, of_heads):
        expected = pool.copy()
        for b, k, t in np.ndindex(B, K, 3):
            slot = slots[b, t] if slots.ndim == 2 else slots[b, k, t]
            if 0 <= slot < columns * size:
                token(expected, b, k, slot)[...] = new[b, k, t]
        written = pages.write(jnp.asarray(pool), jnp.asarray(slots, jnp.int32), jnp.asarray(new), False)
        assert_same_bits(written, expected, f"the pool, {slots.ndim} axes")


def test_where_tokens_lie_side_by_side():
    """On TPUs, heads of 64 in pages that are no whole registers; not what a codec makes of a whole page."""
    pool = lambda size, pages, platform="tpu", **options: kvattn.PagedKVCache.create(
        4, pages, 2, size, batch_size=1, max_pages=2, platform=platform, **options
    )
    shape = lambda cache: cache.keys["data"].shape[2:]
    assert shape(pool(64, 16)) == (8, 128) and shape(pool(64, 48, codec=kvattn.Int8())) == (24, 128)
    assert pool(64, 16, codec=kvattn.Int8()).keys["scale"].shape[2:] == (1, 16)
    for other in (pool(64, 128), pool(64, 8), pool(128, 16), pool(80, 16), pool(64, 16, "cuda"), pool(64, 16, "cpu")):
        assert shape(other) == (other.page_size, other.key_head_dim)
    assert pool(64, 16).nbytes == pool(64, 16, "cpu").nbytes
    kivi = functools.partial(pool, 128, 64, codec=kvattn.KIVI(residual=64))
    assert jax.tree.map(jnp.shape, kivi().keys) == jax.tree.map(jnp.shape, kivi("cpu").keys)
    x = jnp.asarray(numbers(1, 70, 2, 128))
    out, _ = kvattn.cached_attention(x, x, x, kivi().with_tables([[3, 1]], [0]))
    contiguous = kvattn.KVCache.create(1, 2, 128, capacity=128, codec=kvattn.KIVI(residual=64))
    outs = out, kvattn.cached_attention(x, x, x, contiguous)[0]
    np.testing.assert_allclose(*outs, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_blocks_of_pages(transposed):
    """As a layout's; pages lie anywhere, and those of nobody stay as they are."""
    table = np.random.default_rng(0).permutation(PAGES)[: B * COLUMNS].reshape(B, COLUMNS)
    pages = Pages(Layout(COLUMNS * SIZE, 2 * SIZE, False), SIZE, jnp.asarray(table, jnp.int32), PAGES)
    pool = numbers(K, PAGES, *((F, SIZE) if transposed else (SIZE, F)))
    token = lambda pool, b, k, s: (pool[k, table[b, s // SIZE], :, s % SIZE] if transposed
                                   else pool[k, table[b, s // SIZE], s % SIZE])  # fmt: skip
    dense = np.asarray(pages.from_blocks(jnp.asarray(pool), transposed))
    for b, k, s in np.ndindex(B, K, COLUMNS * SIZE):
        np.testing.assert_array_equal(dense[b, k, s], token(pool, b, k, s))
    for i in range(3):
        block = np.asarray(pages.take(jnp.asarray(pool), jnp.int32(i), transposed))
        block = block.swapaxes(-1, -2) if transposed else block
        real = dense[:, :, i * 2 * SIZE : (i + 1) * 2 * SIZE]
        np.testing.assert_array_equal(block[:, :, : real.shape[2]], real)
    new, slots = numbers(B, K, 3, F, seed=1), np.array([[9, -1, 4], [COLUMNS * SIZE, 0, 7]])
    expected = pool.copy()
    for b, k, t in np.ndindex(B, K, 3):
        if 0 <= slots[b, t] < COLUMNS * SIZE:
            token(expected, b, k, slots[b, t])[...] = new[b, k, t]
    written = pages.write(jnp.asarray(pool), jnp.asarray(slots, jnp.int32), jnp.asarray(new), transposed)
    assert_same_bits(written, expected, "the pool")
    put = numbers(B, K, 2, *pool.shape[2:], seed=2)
    expected = pool.copy()
    expected[:, table[0, 4]], expected[:, table[1, 0]] = put[0, :, 0], put[1, :, 1]
    after = pages.put(jnp.asarray(pool), jnp.asarray([[4, COLUMNS], [COLUMNS, 0]], jnp.int32), jnp.asarray(put))
    assert_same_bits(after, expected, "pages that were put")


def test_a_pool_of_40000_pages():
    """Page numbers are int32 all the way: written, read, copied, and listed for kernels."""
    far = [39_999, 33_000, 32_768, 65_535 - 32_768]
    cache = kvattn.PagedKVCache.create(40_000, 1, 1, 2, batch_size=1, max_pages=4, dtype=jnp.float32)
    cache = cache.with_tables([far], [0])
    key, value = jnp.asarray(numbers(2, 1, 4, 1, 2))
    cache = cache.write(jnp.arange(4, dtype=jnp.int32)[None], key, value).replace(lengths=jnp.asarray([4], jnp.int32))
    blocks = cache.view().key_block(jnp.int32(0))["data"], cache.view().value_block(jnp.int32(0))["data"]
    for got, block, given in zip(cache.dense(), blocks, (key, value), strict=True):
        np.testing.assert_array_equal(got[0, 0], given[0, :, 0])
        np.testing.assert_array_equal(block[0, 0], given[0, :, 0])
    for pool, given in ((cache.keys["data"], key), (cache.values["data"], value)):
        assert np.nonzero(np.asarray(pool).any(axis=(0, 2, 3)))[0].tolist() == sorted(far)
        np.testing.assert_array_equal(pool[0, np.asarray(far), 0], given[0, :, 0])
    copied = cache.copy_pages([39_999], [35_000])
    np.testing.assert_array_equal(copied.values["data"][0, 35_000], value[0, 0])
    one = lambda *x: jnp.asarray(x, jnp.int32)
    chosen = tiles.Plan(one(4), one(0, 0, 0, 0), one(0, 1, 2, 3), one(1, 1, 1, 1), jnp.ones((1, 4), bool))
    holds = jnp.ones((1, 4), bool)
    assert tiles.pages_of(chosen, cache.page_table, holds, 40_000)[:, 0].tolist() == far


def test_which_tiles_are_needed_and_which_are_full():
    """Slot by slot: a window begins with a tile's last slot, a tile lacks its last token, heads differ."""
    rows, slots = 4, 16
    cache = filled([16, 0, 7], slots, 1, 64)
    positions = np.stack([np.arange(slots)] * 6).reshape(3, 2, slots)
    positions[0, 1, 3] = positions[1, 0, 11] = -1  # the last slot of a tile
    positions[1, 1, 4] = positions[2, :, 7:] = -1  # the first one; a row of seven tokens
    for window, sinks in [(1, 0), (4, 0), (5, 1), (8, 0), (9, 0), (13, 1), (None, 0)]:
        mask = Mask(window=window, num_sinks=sinks if window else 0)
        request = request_for(cache.replace(lengths=jnp.asarray([16, 16, 7], jnp.int32)), 1, mask=mask)
        near, full = (np.asarray(x) for x in tiles.near_and_filled(request, jnp.asarray(positions, jnp.int32), rows))
        for b, tile in np.ndindex(3, slots // rows):
            held = positions[b, :, tile * rows : (tile + 1) * rows]
            last = (15, 15, 6)[b]
            reached = [
                p for p in held.ravel() if p >= 0 and (window is None or p > last - window or p < mask.num_sinks)
            ]
            assert near[b, tile] == bool(reached), (window, b, tile)
            assert full[b, tile] == (held >= 0).all(), (b, tile)


def test_blocks_of_queries(monkeypatch):
    """Attention, its logarithm and the mass by blocks of queries, the last one short, over several blocks of slots."""
    monkeypatch.setattr(xla, "QUERY_ROWS", 4)
    cache = kvattn.KVCache.create(3, 2, 8, capacity=20, dtype=jnp.float32, layout=Layout(20, 8, True))
    key, value = jnp.asarray(numbers(2, 3, 20, 2, 8, seed=3)) * 2
    lengths = jnp.asarray([20, 5, 12], jnp.int32)
    slot = jnp.arange(20, dtype=jnp.int32)[None]
    cache = cache.write(jnp.where(slot < lengths[:, None], slot, -1), key, value).replace(lengths=lengths)
    request = request_for(cache, 4, 7, want_mass=True, alibi_slopes=kvattn.alibi_slopes(4), mask=Mask(window=9))
    out, lse, mass = jax.jit(lambda r: xla.attend(r))(request)
    exact, exact_lse = truth(request)
    np.testing.assert_allclose(out, exact, atol=2e-6)
    np.testing.assert_allclose(lse, exact_lse, atol=2e-6)
    # The mass of each slot: what the output of a value that is 1 there, and 0 elsewhere, adds up to.
    one_hot = np.zeros((3, 20, 2, 20), np.float32)
    one_hot[:, np.arange(20), :, np.arange(20)] = 1
    wide = (
        kvattn.KVCache.create(3, 2, 8, capacity=20, dtype=jnp.float32, layout=cache.layout, value_head_dim=20)
        .write(jnp.where(slot < lengths[:, None], slot, -1), key, jnp.asarray(one_hot))
        .replace(lengths=lengths)
    )
    probs = truth(request_for(wide, 4, 7, alibi_slopes=kvattn.alibi_slopes(4), mask=Mask(window=9)))[0]
    expected = probs.reshape(3, 7, 2, 2, 20).mean(axis=3).sum(axis=1)
    np.testing.assert_allclose(mass, expected, atol=5e-6)
    total = lambda probs, q, kv: jnp.sum(probs, axis=2)
    np.testing.assert_allclose(jax.jit(lambda r, l: xla.measure(r, l, total))(request, lse), expected, atol=5e-6)


# What nobody looks at -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [kvattn.Int8(), kvattn.Int4(4)], ids=lambda c: type(c).__name__)
def test_pads_of_an_encoder_are_not_encoded(codec):
    """NaN right behind a row's length is no error."""
    key = jnp.asarray(numbers(2, 5, 1, 8)).at[0, 3:].set(jnp.nan).at[1, 1:].set(jnp.inf)
    cache = kvattn.KVCache.from_encoder(key, key, [3, 1], codec=codec, dtype=jnp.float32).check()
    assert np.isfinite(np.asarray(cache.dense()[1])[0, :, :3]).all()


@pytest.mark.parametrize("own", ["place", "positions", "absorb"])
def test_any_order_of_its_own_is_refused(own):
    """Tokens that share scales need slot s for the token of position s: a policy that answers one question anew."""
    policy = type("Own", (kvattn.Full,), {own: lambda self, *given: getattr(kvattn.Full, own)(self, *given)})
    with pytest.raises(kvattn.errors.UnsupportedError, match="share their scales"):
        kvattn.KVCache.create(1, 1, 8, capacity=16, policy=policy(), codec=kvattn.KIVI(2, 4, 8))
    kvattn.KVCache.create(1, 1, 8, capacity=16, policy=policy())


def test_bytes_of_narrow_types():
    """Two numbers of four bits to a byte, the last one possibly alone."""
    for dtype, shape, size in ((jnp.int4, (3, 3), 5), (jnp.int8, (3,), 3), (jnp.bfloat16, (3, 2), 12), (bool, (9,), 9)):
        assert nbytes_of(jax.ShapeDtypeStruct(shape, dtype)) == size, dtype


def test_a_row_with_two_records():
    """The first of them is raised, with every row that has it."""
    cache = kvattn.KVCache.create(3, 1, 8, capacity=4)
    both = cache.replace(status=jnp.asarray([0, 1 | 2, 2 | 8], jnp.int32))
    with pytest.raises(kvattn.errors.CapacityError, match=r"rows \[1\]"):
        both.check()
    with pytest.raises(kvattn.errors.RangeError, match=r"rows \[1, 2\].*num_new"):
        both.replace(status=both.status & ~1).check()


def test_the_list_of_tiles_and_their_pages():
    """Tile after tile, row after row, as a loop over them finds it; a part that holds nothing has no page."""
    rng = np.random.default_rng(0)
    for batch, count, per_tile, width in [(1, 1, 1, 1), (3, 4, 2, 7), (5, 3, 1, 4), (2, 9, 4, 40)]:
        needed, filled = rng.random((2, batch, count)) < 0.5
        needed[:, 0] |= ~needed.any(axis=1)  # every row has one
        row, tile, whole = (np.asarray(x) for x in tiles._listed(jnp.asarray(needed), jnp.asarray(filled)))
        expected = np.argwhere(needed)
        found = np.stack([row, tile], axis=1)[: len(expected)]
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(whole[: len(expected)], filled[needed])
        table = rng.integers(-3, 12, (batch, width))
        one = lambda x: jnp.asarray(x, jnp.int32)
        chosen = tiles.Plan(one([len(expected)]), one(row), one(tile), one(whole), jnp.asarray(needed))
        holds = rng.random((batch, count * per_tile)) < 0.7
        pages = np.asarray(tiles.pages_of(chosen, one(table), jnp.asarray(holds), 9))[: len(expected)]
        for (b, t), of_tile in zip(expected, pages, strict=True):
            for part in range(per_tile):
                column = t * per_tile + part
                known = column < width and 0 <= table[b, column] < 9
                page = (table[b, column] if known else 0) if holds[b, column] else -1
                assert of_tile[part] == page
