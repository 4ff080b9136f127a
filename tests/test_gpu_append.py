"""The append of `"mosaic_gpu"` in JAX's GPU interpreter: to the bit what XLA writes and concludes, and no races."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from append_cases import PLACES, STORES, B, K, both, filled, made, tokens
from jax.sharding import AxisType
from kernel_cases import BF16, F32
from oracles import assert_same_bits

import kvattn
import kvattn.pallas
from kvattn.attend import at_once
from kvattn.cache import Layout
from kvattn.cache import status as bits
from kvattn.pallas import gpu_append, gpu_decode
from kvattn.policies import Full, OrderedWindow, SlidingWindow


@pytest.fixture(autouse=True)
def interpreted(capsys):
    with kvattn.pallas.interpret():
        yield
    # Older versions of JAX print a race, newer ones raise.
    assert "RACE DETECTED" not in capsys.readouterr().out


def check(cache, key, value, num_new=None):
    """They agree in every bit. Returns what they agree on."""
    ours, theirs = both(cache, key, value, num_new)
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        assert_same_bits(a, b)
        assert a.shape == b.shape, path
    return ours


QUICK = {
    ("bfloat16", "pages"),
    ("float16", "a ring that is too small"),
    ("Int8", "a ring in pages"),
    ("Int8 of float32", "a window in pages"),
    ("Float8", "Full"),
    ("bfloat16", "a ring"),
    ("Int4", "a ring in pages"),
}


def grid():
    for case in itertools.product(STORES, PLACES):
        yield pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow, id="-".join(case))


@pytest.mark.parametrize(("store", "place"), list(grid()))
def test_what_xla_writes(store, place):
    """Rows that get nothing, counts that are impossible, tokens that cannot be encoded, or are all zeros."""
    codec, dtype, given = STORES[store]
    cache = filled(*PLACES[place][:1], codec, dtype, *PLACES[place][1:])
    key, value = tokens(64, given, codec=codec)
    key = key.at[2, 0, 1, 3].set(jnp.nan).at[4, 0, 0].set(0).at[7, 0, 1].set(1e-30)
    value = value.at[3, 0, 0, 63].set(jnp.inf).at[1].set(jnp.nan).at[8, 0, 0, 9].set(3e4)
    after = check(cache, key, value, jnp.asarray([1, 0, 1, 1, 1, 1, 2, -1, 1], jnp.int32))
    status, came = np.asarray(after.status), np.asarray(after.lengths - cache.lengths)
    assert (status[[6, 7]] & bits.BAD_COUNT).all() and not came[[1, 6, 7]].any() and came[[0, 2, 3, 8]].all()
    assert (status & bits.NONFINITE > 0).tolist() == [codec is not None and row in (2, 3) for row in range(B)]
    assert bool(status[5] & bits.OVERFLOW) != bool(came[5])


def test_every_row_gets_a_token_where_nobody_says_otherwise():
    cache = filled(Full(), None, BF16, 0, 24)
    assert np.asarray(check(cache, *tokens(64, BF16)).positions).tolist() == [0, 1, 7, 8, 23, -1, 19, 20, 16]


@pytest.mark.parametrize(
    ("columns", "page_size"), [(3, 8), (15, 8), (130, 1), pytest.param(150, 1, marks=pytest.mark.slow)]
)
def test_pages_that_are_not_there(columns, page_size):
    """A page is missed where it is needed, and nowhere else; tables of less and more than is looked at together."""
    room = columns * page_size
    policy = OrderedWindow(9) if columns == 130 else Full()
    cache = made(policy, None, BF16, page_size, room, 64, columns=columns)
    lengths = jnp.asarray([0, page_size, room - 1, room, 3, room // 2, room - 2, room, 0], jnp.int32)
    table = np.array(cache.page_table)
    table[1, 1], table[1, 2:] = cache.num_pages, -1  # where its token goes
    table[2, 0] = -1  # not seen any more by a window of 9
    table[3, columns - 1] = 2**31 - 1
    table[4, 3 // page_size + 1 :] = -5  # nothing lies there yet
    table[5, (room // 2) // page_size] = -(2**31)
    table[8] = -1  # gets no token, and comes behind a row that is full
    cache = cache.replace(lengths=lengths, page_table=jnp.asarray(table))
    after = check(cache, *tokens(64, BF16), jnp.asarray([1] * 8 + [0], jnp.int32))
    bad = [False, True, columns != 130, True, False, True, False, False, False]
    assert (np.asarray(after.status) & bits.BAD_PAGE > 0).tolist() == bad


@pytest.mark.parametrize("batch", [1, 2])
def test_small_tables(batch):
    """Of less entries than eight, one by one; of less than 128, by other vectors."""
    columns = {1: 3, 2: 30}[batch]
    cache = kvattn.PagedKVCache.create(batch * columns, 8, K, 64, batch_size=batch, max_pages=columns)
    table = jnp.arange(batch * columns, dtype=jnp.int32).reshape(batch, columns)
    for wrong in (0, columns - 2, columns - 1):
        lengths = jnp.full((batch,), 8 * (columns - 1), jnp.int32)
        named = cache.replace(page_table=table.at[-1, wrong].set(-1), lengths=lengths)
        key, value = (x[:batch] for x in tokens(64, BF16))
        assert np.asarray(check(named, key, value).status).tolist() == [0] * (batch - 1) + [bits.BAD_PAGE]


@pytest.fixture
def attends_by_xla(monkeypatch):
    """Only the append is the kernel's: attention in the interpreter takes longer."""
    monkeypatch.setattr(gpu_decode, "unsupported", lambda _: "it is not tried here")


def steps_of(cache, num_new, **rules):
    """Outputs of three steps, and the cache."""

    @jax.jit
    def run(cache, query, key, value, num_new):
        # Compiled anew: a fault may be planted.
        return kvattn.cached_attention(
            query, key, value, cache, num_new=num_new, implementation=("mosaic_gpu", "xla"), **rules
        )

    outs = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        new = [jnp.asarray(rng.normal(size=(cache.batch_size, 1, n, 64)), BF16) for n in (4, K, K)]
        out, cache = run(cache, *new, num_new)
        outs.append(out)
    return outs, cache


@pytest.mark.parametrize(
    ("place", "by"),
    [("a ring", "xla"), *(pytest.param(place, "", marks=pytest.mark.slow) for place in PLACES)],
)
def test_steps_are_those_without_it(place, by, monkeypatch, request):
    """With positions turned, and counts: outputs and caches to the bit."""
    if by == "xla":
        request.getfixturevalue("attends_by_xla")
    policy, page_size, slots = PLACES[place]
    num_new, rules = jnp.asarray([1, 0, 1, 1, 1, 1, 2, 1, 1], jnp.int32), {"rope": kvattn.RoPE(64)}
    cache = filled(policy, None, BF16, page_size, slots)
    ours = steps_of(cache, num_new, **rules)
    monkeypatch.setattr(at_once, "takes", lambda *_: False)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(steps_of(cache, num_new, **rules)), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("is_checked", [False, True])
def test_inside_shard_map(is_checked, attends_by_xla):
    """Values are those of the same step outside; where types name mesh axes, XLA writes."""
    cache = kvattn.KVCache.create(4, K, 64, capacity=16, layout=Layout(16, 16, False))
    cache = cache.replace(lengths=jnp.asarray([0, 3, 16, 7], jnp.int32))
    new = [jnp.concatenate([x[:4]] * n, axis=2) for n, x in zip((2, 1, 1), tokens(64, BF16)[:1] * 3, strict=True)]
    step = lambda *args: kvattn.cached_attention(*args, implementation=("mosaic_gpu", "xla"))
    rows = jax.tree.map(lambda axes: jax.P(*(None, "b") if axes.startswith("blocks") else ("b",)), cache.axes)

    def mapped(devices):
        mesh = jax.make_mesh((devices,), ("b",), axis_types=(AxisType.Auto,))
        specs = (jax.P("b"),) * 3 + (rows,)
        return jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=(jax.P("b"), rows), check_vma=is_checked)

    assert ("kvattn_gpu_append" in str(jax.make_jaxpr(mapped(2))(*new, cache))) != is_checked
    if not is_checked:  # JAX's interpreter takes what two devices do to one block for a race
        outside = jax.tree.leaves(jax.jit(step)(*new, cache))
        for a, b in zip(jax.tree.leaves(jax.jit(mapped(1))(*new, cache)), outside, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("codec", [None, pytest.param(kvattn.Int8(), marks=pytest.mark.slow)], ids=str)
def test_derivatives_and_rows_mapped_over(codec, attends_by_xla):
    """They are those of what XLA writes: to the token that comes and to those that were there."""
    cache = kvattn.KVCache.create(B, K, 64, capacity=16, codec=codec, layout=Layout(16, 16, False), dtype=F32)
    key, value = tokens(64, F32)
    query = jnp.ones((B, 1, K, 64), F32)
    store = cache.replace(lengths=jnp.asarray([3] * B, jnp.int32))
    before = store.keys["data"].astype(F32) + 0.5

    def loss(implementation, key, value, before):
        keys = {**store.keys, "data": before.astype(store.keys["data"].dtype)}
        step = lambda *x: kvattn.cached_attention(*x, implementation=implementation)
        out, after = step(query, key, value, store.replace(keys=keys))
        return jnp.sum(out**2) + jnp.sum(after.keys["data"].astype(F32) ** 2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_append, "unsupported", lambda *_: None)  # what it writes is not looked at here
        ours = jax.jit(jax.grad(lambda *x: loss(("mosaic_gpu", "xla"), *x), argnums=(0, 1, 2)))(key, value, before)
    theirs = jax.jit(jax.grad(lambda *x: loss("xla", *x), argnums=(0, 1, 2)))(key, value, before)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)

    def mapped(implementation):
        step = lambda key, lengths: kvattn.cached_attention(
            query, key, value, store.replace(lengths=lengths), implementation=implementation
        )
        return jax.jit(jax.vmap(step))(jnp.stack([key, value]), jnp.stack([store.lengths, store.lengths + 13]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_append, "unsupported", lambda *_: None)
        ours = mapped(("mosaic_gpu", "xla"))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(mapped("xla")), strict=True):
        assert_same_bits(a, b)


def test_what_it_leaves_to_xla(attends_by_xla):
    """Policies that remember something, several tokens, codecs that it does not encode, rows that read together."""

    def writes(length=1, dtype=BF16, key_dtype=None, heads=K, **settings):
        cache = kvattn.KVCache.create(2, heads, 64, layout=Layout(16, 16, False), dtype=dtype, **settings)
        new = [jnp.ones((2, length, n, 64), key_dtype or dtype) for n in (2 * heads, heads, heads)]
        step = lambda *args: kvattn.cached_attention(*args, implementation=("mosaic_gpu", "xla"))
        return "kvattn_gpu_append" in str(jax.make_jaxpr(step)(*new, cache))

    assert writes(capacity=16) and writes(policy=SlidingWindow(16)) and writes(capacity=16, codec=kvattn.Int8())
    assert not writes(policy=kvattn.StreamingLLM(4, 12))
    assert not writes(policy=kvattn.H2O(8, 7))
    assert not writes(2, capacity=16)
    assert writes(capacity=16, codec=kvattn.Int4(), heads=8)
    assert not writes(capacity=16, codec=kvattn.Int4(4), heads=8) and not writes(capacity=16, codec=kvattn.Int4())
    assert not writes(capacity=16, dtype=F32) and not writes(capacity=16, key_dtype=F32)
    cache = kvattn.PagedKVCache.create(6, 8, K, 64, batch_size=2, max_pages=3)
    cache = cache.with_tables([[0, 1, 2], [0, 1, 3]], [17, 18], shared=[([[0, 1]], [0], [2])])
    new = [jnp.ones((2, 1, n, 64), BF16) for n in (4, K, K)]
    step = lambda *args: kvattn.cached_attention(*args, implementation=("mosaic_gpu", "xla"))
    assert "kvattn_gpu_append" not in str(jax.make_jaxpr(step)(*new, cache))
    assert "kvattn_gpu_append" in str(jax.make_jaxpr(step)(*new, cache.replace(shared=None)))


def test_small_tables_are_read_one_entry_at_a_time():
    """A row of a table begins at any entry, and a GPU loads two from an address for two only. No interpreter looks."""
    layout = gpu_append.TABLE.to_mgpu()
    assert layout.vector_length == 1 and layout.registers_shape((24,)) == (3, 1, 1)
