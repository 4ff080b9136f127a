"""A cache on eight devices gives the results of one device.

The oracle is one device (`kvattn.cached_attention`, which has oracles of its own).
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sharding_cases import (
    CODECS,
    GQA,
    KINDS,
    LENGTH,
    MHA,
    MQA,
    POLICIES,
    RAGGED,
    ROPE,
    SCHEMES,
    B,
    H,
    N,
    check_equal,
    make,
    mesh_of,
    sharded_step,
    tokens,
    walk,
)

import kvattn
from kvattn import errors, sharding

QUICK = (
    ("h2o", GQA, "heads", "explicit", (8,)),
    ("int8", MQA, "batch", "explicit", (8,)),
    ("window", MQA, "batch", "auto", (2, 4)),
    ("streaming", MQA, "sequence", "explicit", (2, 4)),
    ("h2o", GQA, "sequence", "auto", (8,)),
    ("h2o in blocks", GQA, "sequence", "auto", (8,)),
    ("full in blocks", GQA, "sequence", "auto", (8,)),
    ("full in blocks", MQA, "batch", "auto", (8,)),
)
FOR_LONG = ("full", "window", "streaming", "h2o", "int8")
ALL = [
    (name, num_kv_heads, by, kind, (8,))
    for name, (num_kv_heads, by), kind in itertools.product(FOR_LONG, SCHEMES, KINDS)
]
MORE = [
    *((name, kv, by, "auto", (8,)) for name in POLICIES if name not in FOR_LONG for kv, by in SCHEMES if kv != MHA),
    *((name, MQA, "sequence", "auto", (8,)) for name in CODECS if name not in (*FOR_LONG, "kivi")),
    *(("kivi", kv, by, "explicit", (8,)) for kv, by in SCHEMES if by != "sequence"),
    *(("h2o", kv, by, "explicit", (2, 4)) for kv, by in SCHEMES),
    *((name, MQA, "replicated", "explicit", (8,)) for name in ("full", "h2o", "scissorhands")),
]


@pytest.mark.parametrize(("name", "num_kv_heads", "by", "kind", "shape"), QUICK)
def test_equals_one_device(name, num_kv_heads, by, kind, shape):
    check_equal(name, num_kv_heads, by, kind, 4, shape)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "num_kv_heads", "by", "kind", "shape"), ALL)
def test_equals_one_device_for_long(name, num_kv_heads, by, kind, shape):
    check_equal(name, num_kv_heads, by, kind, 50, shape)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "num_kv_heads", "by", "kind", "shape"), MORE)
def test_further_policies_and_codecs(name, num_kv_heads, by, kind, shape):
    check_equal(name, num_kv_heads, by, kind, 12, shape)


@pytest.mark.parametrize("transposed", [False, True])
def test_slots_of_several_blocks(transposed):
    """By sequence every device has a part of every block: tokens are written, and gathered, where they belong."""
    mesh, layout, slots = mesh_of("auto"), kvattn.cache.Layout(40, 16, transposed), np.arange(40)
    share = sharding.sequence.Share("model", 8)
    make_it = lambda: kvattn.KVCache.create(2, 2, 4, capacity=40, dtype=jnp.float32, layout=layout)
    rng = np.random.default_rng(0)
    key, value = (jnp.asarray(rng.normal(size=(2, 40, 2, 4)), jnp.float32) for _ in range(2))
    where = jnp.asarray(np.where(slots % 5 == 3, -1, rng.permutation(slots)), jnp.int32)[None].repeat(2, 0)
    specs = sharding.sequence.Sequence().cache_specs(sharding.split.split_over(mesh, "model", None), make_it())

    def on_each(cache, where, key, value):
        written = share.write(cache, where, key, value)
        own, _ = share.view(written.replace(lengths=jnp.full((2,), 40, jnp.int32))).dense(jnp.float32)
        return written, share.all_slots(written, own)

    out = (specs, jax.P())
    mapped = jax.shard_map(on_each, mesh=mesh, in_specs=(specs, *[jax.P()] * 3), out_specs=out, check_vma=False)
    written, gathered = jax.jit(mapped)(make_it(), where, key, value)
    expected = make_it().write(where, key, value)
    for got, given in zip(jax.tree.leaves(written), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(got, given)
    np.testing.assert_array_equal(gathered, expected.dense()[0])


def test_what_devices_measured_is_put_together():
    """By sequence the new tokens of all devices, pads at the end cut off; by heads the mean over a group's copies."""
    mesh, measured = mesh_of("auto"), jnp.arange(16, dtype=jnp.float32)
    each = lambda call, x, out: jax.jit(jax.shard_map(call, mesh=mesh, in_specs=x, out_specs=out, check_vma=False))
    share, part = sharding.sequence.Share("model", 8), sharding.heads.SomeOfGroup("model", 8, 2)
    in_tokens = jax.P(None, None, "model")
    gathered = each(lambda x: share.all_new(x, 13), in_tokens, jax.P())(measured[None, None])
    np.testing.assert_array_equal(gathered[0, 0], measured[:13])
    averaged = each(part.of_group, jax.P("model"), jax.P("model"))(measured[:8])
    np.testing.assert_array_equal(averaged, np.repeat([0.5, 2.5, 4.5, 6.5], 2))


# Beyond a jitted step -------------------------------------------------------------------------------------------------


def test_gradients():
    check_gradients("sequence", GQA, "auto", 3)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_kv_heads", "by"), [*SCHEMES, (MQA, "replicated")])
def test_all_gradients(by, num_kv_heads, kind, length):
    check_gradients(by, num_kv_heads, kind, length)


def check_gradients(by, num_kv_heads, kind, length):
    """Those of the outputs with respect to queries, keys and values of the new tokens."""
    mesh, prompt = mesh_of(kind), tokens(1, LENGTH, num_kv_heads)
    weight = np.random.default_rng(0).normal(size=(B, length, N, H)).astype(np.float32)
    alone = jax.jit(kvattn.cached_attention)(*prompt, make(num_kv_heads, capacity=24))[1]
    there = sharding.shard_cache(alone, mesh, by=by)
    new = [jnp.asarray(x) for x in tokens(2, length, num_kv_heads)]
    loss = lambda step, cache: lambda *new: jnp.sum(step(*new, cache)[0] * weight)
    step = lambda *args: sharding.cached_attention(*args, mesh=mesh, by=by)
    expected = jax.jit(jax.grad(loss(kvattn.cached_attention, alone), (0, 1, 2)))(*new)
    for a, b in zip(expected, jax.jit(jax.grad(loss(step, there), (0, 1, 2)))(*new), strict=True):
        assert np.abs(a).max() > 0.01, "nothing to compare"
        np.testing.assert_allclose(np.asarray(b), np.asarray(a), atol=1e-5)


def test_outside_jit():
    """The same calls one by one, of a cache that lies on one device; what does not fit is refused at once."""
    mesh, new = mesh_of("auto"), tokens(1, LENGTH, MHA)
    alone, cache = (make(MHA, capacity=8) for _ in range(2))
    for number in (LENGTH, 1):
        part = [x[:, :number] for x in new]
        expected, alone = kvattn.cached_attention(*part, alone)
        out, cache = sharding.cached_attention(*part, cache, mesh=mesh)
        np.testing.assert_allclose(np.asarray(out), np.asarray(expected), atol=1e-6)
    assert len(cache.keys["data"].sharding.device_set) == 8
    with pytest.raises(errors.CapacityError, match="Nothing was written"):
        sharding.cached_attention(*new, cache, mesh=mesh)
    with pytest.raises(errors.StaleCacheError):
        jax.tree.map(lambda x: x.delete(), cache)
        sharding.cached_attention(*part, cache, mesh=mesh)
    empty = sharding.shard_cache(make(MHA, capacity=8), mesh)
    out, _ = sharding.cached_attention(*(x[:, :0] for x in new), empty, mesh=mesh)
    assert out.shape == (B, 0, N, H)


@pytest.mark.parametrize("by", ["heads", "batch", "sequence"])
def test_an_encoders_cache(by):
    """Cross-attention: nothing is appended; every query sees all tokens, none where there are none."""
    mesh, rng = mesh_of("auto"), np.random.default_rng(0)
    key, value = (jnp.asarray(rng.normal(size=(B, 20, 8, H)), jnp.float32) for _ in range(2))
    lengths = np.array([20, 1, 0, 7, 20, 2, 3, 19], np.int32)
    cache = kvattn.KVCache.from_encoder(key, value, lengths)
    query = tokens(1, 2, MHA)[0]
    out, _ = sharded_step(mesh, by, rope=None)(query, None, None, sharding.shard_cache(cache, mesh, by=by), None)
    scores = np.einsum("btkgh,bskh->bkgts", query.reshape(B, 2, 8, 2, H).astype(float), np.asarray(key)) / H**0.5
    weights = np.exp(scores) * (np.arange(20) < lengths[:, None])[:, None, None, None]
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-30)
    expected = np.einsum("bkgts,bskh->btkgh", weights, np.asarray(value)).reshape(B, 2, N, H)
    np.testing.assert_allclose(np.asarray(out), expected, atol=1e-6)
    assert (np.asarray(out[2]) == 0).all()


def test_every_setting_of_the_step():
    """Sinks, slopes, soft cap, window, left padding, rows that do not fit: as one device, however it is split."""
    check_settings("sequence", GQA)


@pytest.mark.slow
@pytest.mark.parametrize(("by", "num_kv_heads"), [("heads", GQA), ("batch", MQA), ("replicated", MQA)])
def test_every_setting_otherwise(by, num_kv_heads):
    check_settings(by, num_kv_heads)


def check_settings(by, num_kv_heads):
    rng = np.random.default_rng(0)
    settings = {
        "sinks": jnp.asarray(rng.normal(size=N), jnp.float32),
        "alibi_slopes": kvattn.alibi_slopes(N),
        "softcap": 5.0,
        "window": 5,
        "scale": 0.3,
        "padding": "left",
    }
    alone = jax.jit(lambda q, k, v, c, n: kvattn.cached_attention(q, k, v, c, num_new=n, **settings))
    step = sharded_step(mesh_of("auto"), by, rope=None, **settings)
    expected, there = make(num_kv_heads, capacity=8), make(num_kv_heads, capacity=8)
    there = sharding.shard_cache(there, mesh_of("auto"), by=by)
    for seed in (1, 2):  # the second time some rows do not fit
        new = tokens(seed, LENGTH, num_kv_heads)
        a, expected = alone(*new, expected, RAGGED)
        b, there = step(*new, there, RAGGED)
        np.testing.assert_allclose(np.asarray(b), np.asarray(a), atol=1e-5)
    np.testing.assert_array_equal(there.lengths, expected.lengths)
    np.testing.assert_array_equal(there.status, expected.status)
    with pytest.raises(errors.CapacityError):
        there.check()


def test_a_token_that_cannot_be_encoded_is_marked_once():
    """By sequence one device alone stores it; all must say the same of it."""
    mesh = mesh_of("auto")
    query, key, value = (x.copy() for x in tokens(1, 1, GQA))
    key[3] = np.nan
    cache = sharding.shard_cache(make(GQA, capacity=16, codec=kvattn.Int8()), mesh, by="sequence")
    _, cache = sharded_step(mesh, "sequence")(query, key, value, cache, np.ones(B, np.int32))
    for shard in cache.status.addressable_shards:
        assert np.asarray(shard.data).astype(bool).tolist() == [False] * 3 + [True] + [False] * 4
    with pytest.raises(errors.RangeError, match=r"rows \[3\]"):
        cache.check()


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_last_device_alone_saw_is_told(kind):
    """By heads each device marks the rows of its own: `check` asks all of them."""
    mesh = mesh_of(kind)
    cache = kvattn.KVCache.create(2, 8, 8, capacity=4, codec=kvattn.Int8(), dtype=jnp.float32)
    key = jnp.ones((2, 1, 8, 8)).at[1, 0, 7, 0].set(jnp.nan)
    cache = kvattn.sharding.shard_cache(cache, mesh, by="heads")
    step = lambda key, cache: kvattn.sharding.cached_attention(key, key, key, cache, mesh=mesh, by="heads")[1]
    with pytest.raises(errors.RangeError, match=r"rows \[1\]"):
        jax.jit(step)(key, cache).check()


def kernel_case(by, num_kv_heads):
    make_it = lambda: kvattn.KVCache.create(
        B, num_kv_heads, 128, capacity=64, dtype=jnp.float32, layout=kvattn.cache.Layout(64, 64, False)
    )
    rng = np.random.default_rng(0)
    new = [rng.normal(size=(B, 1, n, 128)).astype(np.float32) for n in (N, num_kv_heads, num_kv_heads)]
    return new, make_it(), sharding.shard_cache(make_it(), mesh_of("explicit"), by=by)


@pytest.mark.parametrize(("by", "num_kv_heads"), [("heads", GQA), ("batch", MQA), ("sequence", GQA)])
def test_kernels_are_taken(by, num_kv_heads):
    """Inside, every axis is `jax.shard_map`'s, which no compiler has to divide. Outside they are passed over."""
    mesh = mesh_of("explicit")
    new, alone, there = kernel_case(by, num_kv_heads)
    with jax.set_mesh(mesh), kvattn.pallas.interpret():
        step = lambda *args: sharding.cached_attention(*args, mesh=mesh, by=by, implementation="mosaic_tpu")
        assert "pallas_call" in str(jax.make_jaxpr(step)(*new, there))
        with pytest.raises(errors.UnsupportedError, match="mesh axes"):
            kvattn.cached_attention(*new, alone, implementation="mosaic_tpu")


@pytest.mark.slow
def test_kernels_run_where_the_mesh_is():
    """By heads: in the interpreter devices wait for each other, and collectives beside that would not end."""
    mesh = mesh_of("explicit")
    new, alone, there = kernel_case("heads", 8)
    expected, _ = kvattn.cached_attention(*new, alone)
    for name in ("mosaic_tpu", "reference"):
        with jax.set_mesh(mesh), kvattn.pallas.interpret():
            out, _ = jax.jit(
                lambda *args: sharding.cached_attention(*args, mesh=mesh, implementation=name)  # noqa: B023
            )(*new, there)
        np.testing.assert_allclose(np.asarray(out), np.asarray(expected), atol=1e-5, err_msg=name)


# Pages ----------------------------------------------------------------------------------------------------------------


def paged(num_kv_heads, by, shape=(8,), **settings):
    """A pool whose pages lie anywhere, as far as the scheme allows."""
    rng, num_pages, columns = np.random.default_rng(0), 64, 4
    shards = 8 if by == "batch" else shape[0] if len(shape) > 1 else 1
    each, rows = num_pages // shards, B // shards
    table = [rng.permutation(each)[: rows * columns].reshape(rows, columns) + i * each for i in range(shards)]
    cache = kvattn.PagedKVCache.create(
        num_pages, 8, num_kv_heads, H, batch_size=B, max_pages=columns, dtype=jnp.float32, **settings
    )
    return cache.with_tables(np.concatenate(table), [0] * B)


PAGES = (
    ("heads", 8, (8,), {}),
    ("heads", GQA, (2, 4), {"codec": kvattn.KIVI(bits=4, group_size=4, residual=8)}),
    ("batch", MQA, (8,), {"codec": kvattn.Int8()}),
    ("batch", GQA, (2, 4), {}),
    ("sequence", GQA, (8,), {}),
    ("sequence", MQA, (2, 4), {"codec": kvattn.Int8()}),
    ("replicated", MQA, (2, 4), {}),
)


@pytest.mark.parametrize(("by", "num_kv_heads", "shape", "settings"), PAGES[4:5])
def test_pages(by, num_kv_heads, shape, settings):
    check_pages(by, num_kv_heads, "auto", shape, settings)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("by", "num_kv_heads", "shape", "settings"), PAGES)
def test_all_pages(by, num_kv_heads, kind, shape, settings):
    check_pages(by, num_kv_heads, kind, shape, settings)


def check_pages(by, num_kv_heads, kind, shape, settings):
    mesh = mesh_of(kind, shape)
    alone = paged(num_kv_heads, by, shape, **settings)
    step = jax.jit(lambda q, k, v, cache, num_new: kvattn.cached_attention(q, k, v, cache, num_new=num_new, rope=ROPE))
    expected, after = walk(step, alone, num_kv_heads, 6)
    cache = sharding.shard_cache(paged(num_kv_heads, by, shape, **settings), mesh, by=by)
    outs, cache = walk(sharded_step(mesh, by), cache, num_kv_heads, 6)
    for a, b in zip(expected, outs, strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5)
    np.testing.assert_array_equal(cache.page_table, alone.page_table)
    np.testing.assert_array_equal(cache.lengths, after.lengths)
    own = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(cache))
    assert own == sharding.bytes_per_device(cache, mesh, by=by)


def test_pages_of_another_device():
    """By batch a row's pages lie where the row does; else it is refused, or marked."""
    mesh, new = mesh_of("auto"), tokens(1, 1, MQA)
    cache = paged(MQA, "batch")
    table = np.asarray(cache.page_table).copy()
    table[[2, 3], 0] = table[[3, 2], 0]
    cache = sharding.shard_cache(cache.with_tables(table, [0] * B), mesh, by="batch")
    with pytest.raises(errors.RangeError, match="row 2 lies on device 2 of 8, which has the pages 16 to 23"):
        sharding.cached_attention(*new, cache, mesh=mesh, by="batch")
    out, after = sharded_step(mesh, "batch")(*new, cache, None)
    assert after.lengths.tolist() == [1, 1, 0, 0, 1, 1, 1, 1]
    assert (np.asarray(out[2:4]) == 0).all() and np.abs(np.asarray(out[4])).max() > 0
    with pytest.raises(errors.RangeError, match=r"rows \[2, 3\]"):
        after.check()
    with pytest.raises(errors.ShardingError, match=r"60 pages do not divide over 8 devices.*num_pages=64"):
        odd = kvattn.PagedKVCache.create(60, 8, MQA, H, batch_size=B, max_pages=4)
        sharding.shard_cache(odd, mesh, by="batch")
