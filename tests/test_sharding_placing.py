"""Where a cache lies on a mesh, which way is chosen, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from sharding_cases import GQA, KINDS, LENGTH, MHA, MQA, B, H, N, kinds, make, mesh_of, tokens

import kvattn
from kvattn import errors, sharding
from kvattn.sharding.split import split_over


def filled(num_kv_heads, **settings):
    """A cache that holds a prompt."""
    cache, (_, key, value) = make(num_kv_heads, **settings), tokens(1, LENGTH, num_kv_heads)
    slots = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), (B, LENGTH))
    return cache.write(slots, jnp.asarray(key), jnp.asarray(value)).replace(lengths=jnp.full((B,), LENGTH, jnp.int32))


def same_contents(a, b):
    """Lengths, positions, and what lies in the slots."""
    a, b = (jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), cache) for cache in (a, b))
    np.testing.assert_array_equal(a.lengths, b.lengths)
    np.testing.assert_array_equal(a.positions, b.positions)
    kept = (np.asarray(a.positions) >= 0)[:, None, :, None]
    for x, y in zip(a.dense(), b.dense(), strict=True):
        np.testing.assert_array_equal(np.where(kept, x, 0), np.where(kept, y, 0))


@pytest.mark.parametrize("by", ["heads", "batch", "sequence", "auto"])
def test_shard_cache_moves_and_changes_nothing(by):
    mesh, cache = mesh_of("auto"), filled(MHA, capacity=44)
    there = sharding.shard_cache(cache, mesh, by=by)
    same_contents(cache, there)
    if by != "sequence":  # 44 slots do not divide: there they are filled up
        assert jax.tree.map(lambda x: x.sharding, there) == sharding.cache_sharding(cache, mesh, by=by)
    assert there.num_slots == 44
    for other in ("heads", "batch", "sequence"):
        same_contents(cache, sharding.shard_cache(there, mesh, by=other))


@pytest.mark.parametrize(
    ("head_dim", "backend", "slots", "parts", "own"),
    [
        (128, "gpu", 256, 8, 32),
        (64, "gpu", 256, 8, 32),
        (128, "gpu", 257, 8, 40),  # eights of slots
        (128, "tpu", 256, 8, 32),
        (64, "tpu", 256, 8, 128),  # tokens along the lanes, in whole 128s
        (64, "cpu", 44, 8, 6),
    ],
)
def test_slots_of_a_device(head_dim, backend, slots, parts, own):
    """What one device needs of them in its layout, and no more."""
    layout = kvattn.cache.Layout.best(slots, head_dim * 4, backend, head_dim)
    divided = layout.divided(parts, head_dim, backend)
    assert divided.num_slots == slots and divided.num_blocks * divided.rows == parts * own


def test_a_device_by_sequence_has_its_part():
    layout = kvattn.cache.Layout(256, 256, False)
    cache = kvattn.KVCache.create(1, 1, 128, capacity=256, layout=layout)
    there = sharding.shard_cache(cache, mesh_of("explicit"), by="sequence")
    own = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(there))
    assert own == sharding.bytes_per_device(cache, mesh_of("explicit"), by="sequence") == 256 // 8 * 512 + 8


def test_a_cache_is_made_where_it_is_to_lie():
    mesh = mesh_of("auto", (2, 4))
    make_it = lambda: sharding.arrange(make(GQA, policy=kvattn.H2O(6, 4)), mesh, by="heads")
    where = sharding.cache_sharding(jax.eval_shape(make_it), mesh, by="heads")
    cache = jax.jit(make_it, out_shardings=where)()
    assert cache.num_kv_heads == 4 and cache.keys["data"].sharding.spec == P(None, "data", "model")
    assert cache.state.scores.sharding.spec == P("data", "model")
    other = jax.jit(lambda: sharding.shard_cache(make(GQA, policy=kvattn.H2O(6, 4)), mesh, by="heads"))()
    for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(other), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_by_heads_then_decoding_by_batch(kind):
    """One head: nothing is moved, rows are cut. Several: copies are taken back; what is sent is a device's share."""
    mesh = mesh_of(kind)
    for num_kv_heads, before, allowed in ((MQA, "replicated", set()), (MHA, "heads", {"all-to-all"})):
        cache = sharding.shard_cache(filled(num_kv_heads, capacity=16), mesh, by=before)
        switch = jax.jit(lambda cache: sharding.shard_cache(cache, mesh, by="batch"))
        after = switch(cache)
        same_contents(cache, after)
        where = sharding.cache_sharding(cache, mesh, by="batch")
        for x, s in zip(jax.tree.leaves(after), jax.tree.leaves(where), strict=True):
            assert x.sharding.is_equivalent_to(s, x.ndim)
        assert set(kinds(switch.lower(cache).compile())) <= allowed
    copied = sharding.shard_cache(filled(GQA, capacity=16), mesh, by="heads")
    assert copied.num_kv_heads == 8
    same_contents(filled(GQA, capacity=16), sharding.shard_cache(copied, mesh, by="batch", num_kv_heads=GQA))


VERBS = {
    "select": lambda cache: cache.select(np.arange(B)[::-1]),
    "repeat": lambda cache: cache.select(jnp.array([3, 3, 0, 7] * 4)),
    "copy_pages": lambda cache: cache.copy_pages([1, -1, 31, 9], [30, 2, 0, 10]),
    "dense": lambda cache: cache.dense(),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("by", "shape"), [("batch", (8,)), ("sequence", (2, 4))])
def test_verbs_leave_a_cache_where_it_lies(by, shape, kind):
    """Rows and pages may come from any device; the next step is the program that it was."""
    mesh, rng = mesh_of(kind, shape), np.random.default_rng(0)
    contiguous = make(MQA, policy=kvattn.H2O(4, 3), layout=kvattn.cache.Layout(8, 8, True))
    pages = kvattn.PagedKVCache.create(32, 4, 1, H, batch_size=B, max_pages=4, codec=kvattn.Int8())
    contiguous, pages = jax.tree.map(lambda x: jnp.asarray(rng.integers(0, 8, x.shape), x.dtype), (contiguous, pages))
    for cache in (contiguous, pages):
        there = sharding.shard_cache(cache, mesh, by=by)
        before = jax.tree.map(lambda x: x.sharding, there)
        for name, verb in VERBS.items():
            if name == "copy_pages" and cache is not pages:
                continue
            # Inside jit Auto axes cannot be seen: there the compiler puts the result anywhere.
            for call, seen in ((verb, True), (jax.jit(verb), kind == "explicit")):
                after = call(there)
                for a, b in zip(jax.tree.leaves(verb(cache)), jax.tree.leaves(after), strict=True):
                    np.testing.assert_array_equal(np.asarray(b), np.asarray(a))
                assert name == "dense" or not seen or jax.tree.map(lambda x: x.sharding, after) == before


def test_rows_that_no_longer_divide_are_whole():
    mesh, cache = mesh_of("explicit"), filled(MQA, capacity=16)
    after = sharding.shard_cache(cache, mesh, by="batch").select([1, 2, 1])
    same_contents(cache.select([1, 2, 1]), after)
    assert after.lengths.sharding.is_fully_replicated
    assert after.keys["data"].sharding.is_fully_replicated


def test_auto_is_how_the_cache_lies():
    mesh = mesh_of("auto")
    for by, num_kv_heads in (("sequence", MHA), ("batch", MHA), ("heads", GQA)):
        cache = sharding.shard_cache(make(num_kv_heads, capacity=16), mesh, by=by)
        _, cache = sharding.cached_attention(*tokens(0, 1, num_kv_heads), cache, mesh=mesh)
        assert sharding.cache.placed_by(split_over(mesh, "model", "data"), cache).name == by
    assert sharding.bytes_per_device(make(MHA, capacity=16), mesh) == sharding.bytes_per_device(
        make(MHA, capacity=16), mesh, by="heads"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_mesh_of_the_context(kind):
    """What a layer has at hand inside jit: the abstract mesh."""
    with jax.set_mesh(mesh_of(kind)):
        cache = sharding.shard_cache(make(MQA, capacity=16), mesh_of(kind))

        @jax.jit
        def step(*args):
            return sharding.cached_attention(*args, mesh=jax.sharding.get_abstract_mesh())

        out, after = step(*tokens(0, 1, MQA), cache)
    expected, _ = kvattn.cached_attention(*tokens(0, 1, MQA), make(MQA, capacity=16))
    np.testing.assert_allclose(np.asarray(out), np.asarray(expected), atol=1e-6)
    assert after.keys["data"].sharding.shard_shape(after.keys["data"].shape)[1] == B // 8


# Choosing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "batch_size", "axis_size", "expected"),
    [
        (32, 32, 1, 8, "heads"),
        (32, 8, 64, 8, "heads"),
        (71, 1, 64, 8, "batch"),
        (32, 4, 64, 8, "batch"),
        (71, 1, 4, 8, "sequence"),
        (32, 8, 1, 16, "sequence"),
        (32, 4, 12, 8, "heads"),  # rows do not divide, and are not too few: each head twice
        (12, 4, 12, 8, "sequence"),  # as before, but 12 query heads do not divide
        (30, 3, 12, 8, "sequence"),
        (71, 1, 0, 8, "sequence"),
        (8, 1, 3, 1, "heads"),
    ],
)
def test_choose(num_heads, num_kv_heads, batch_size, axis_size, expected):
    assert sharding.choose(num_heads, num_kv_heads, batch_size, axis_size) == expected
    told = sharding.explain(num_heads, num_kv_heads, batch_size, axis_size)
    assert told.by == expected and told.bytes_per_device[expected] is not None
    assert f"by {expected}" in str(told) and f"* {expected}: " in str(told)


def test_pope_table_1():
    """Longest context of PaLM 540B on 64 chips in 30 % of their memory (arXiv:2211.05102, table 1), within 2 %."""
    layers, head_dim, room = 118, 128, 0.3 * 32 * 2**30
    longest = lambda told, by: room / layers / told.bytes_per_device[by]
    for batch_size, multihead, by_heads, by_batch in ((128, 1320, 660, 43000), (512, 330, 165, 10700)):
        mqa = sharding.explain(48, 1, batch_size, 64, head_dim=256, num_slots=1)
        mha = sharding.explain(64, 64, batch_size, 64, head_dim=head_dim, num_slots=1)  # 48 heads, filled up to 64
        assert mqa.by == "batch" and mha.by == "heads"
        assert abs(longest(mha, "heads") / multihead - 1) < 0.02
        assert abs(longest(mqa, "batch") / by_batch - 1) < 0.02
        assert abs(longest(mqa, "batch") / 64 / by_heads - 1) < 0.02  # every device holds it all


# Errors ---------------------------------------------------------------------------------------------------------------


def ready(num_kv_heads, by="auto", mesh=None, **settings):
    return sharding.shard_cache(make(num_kv_heads, **{"capacity": 16, **settings}), mesh or mesh_of("auto"), by=by)


def decode(cache, num_kv_heads, mesh=None, num_heads=N, **settings):
    new = tokens(0, 1, num_kv_heads, num_heads)
    return sharding.cached_attention(*new, cache, mesh=mesh or mesh_of("auto"), **settings)


def six_rows(num_kv_heads):
    return kvattn.KVCache.create(6, num_kv_heads, H, capacity=16)


REFUSED = {
    "no such axis": (lambda: ready(MHA, mesh=jax.make_mesh((8,), ("x",))), "no axis 'model'; it has 'x'"),
    "MQA by heads": (lambda: ready(MQA, "heads"), 'Use by="batch"'),
    "heads that do not divide": (lambda: ready(3, "heads"), "neither divides the other.*by=.batch"),
    "query heads that do not divide": (lambda: decode(ready(4, "heads"), 4, num_heads=12), "12 query heads do not"),
    "rows that do not divide": (
        lambda: sharding.shard_cache(six_rows(1), mesh_of("auto"), by="batch"),
        "6 rows do not divide over 8.*by=.sequence",
    ),
    "rows over the data axis": (
        lambda: sharding.shard_cache(kvattn.KVCache.create(3, 4, H, capacity=16), mesh_of("auto", (2, 4)), by="heads"),
        "3 rows do not divide over 2 devices .*'data'",
    ),
    "slots that do not divide": (
        lambda: sharding.cache_sharding(make(GQA, capacity=44), mesh_of("auto"), by="sequence"),
        "44 slots do not divide.*shard_cache",
    ),
    "heads without copies": (
        lambda: sharding.cache_sharding(make(GQA, capacity=16), mesh_of("auto"), by="heads"),
        "shard_cache.* stores each 4 times",
    ),
    "a step by heads without copies": (lambda: decode(make(GQA, capacity=16), GQA, by="heads"), "stores each 4 times"),
    "another mesh": (
        lambda: decode(ready(MHA, mesh=jax.make_mesh((4,), ("model",), devices=jax.devices()[:4])), MHA),
        r"the cache lies on the mesh \(model: 4\), not on the mesh \(model: 8\)",
    ),
    "split another way": (lambda: decode(ready(MHA, "heads"), MHA, by="batch"), "split by heads, not by batch"),
    "several heads, replicated": (lambda: ready(GQA, "replicated"), 'use by="heads"'),
    "no mesh": (lambda: decode(ready(MHA), MHA, mesh="model"), "must be a jax.sharding.Mesh"),
    "axes of two types": (
        lambda: ready(MHA, mesh=jax.make_mesh((2, 4), ("data", "model"), axis_types=tuple(KINDS.values()))),
        "make all Explicit, or all Auto",
    ),
    "copies of another number": (
        lambda: sharding.arrange(make(MHA, capacity=16), mesh_of("auto"), num_kv_heads=3),
        "no copies of 3",
    ),
    "inside shard_map": (
        lambda: jax.shard_map(
            lambda x: x + decode(make(MHA, capacity=16), MHA)[0].sum(),
            mesh=mesh_of("auto"),
            in_specs=P(),
            out_specs=P(),
        )(jnp.zeros(())),
        "is jax.shard_map's here",
    ),
    "heads filled up, and a policy that averages them": (
        lambda: decode(
            ready(MQA, "replicated", policy=kvattn.H2O(6, 4), capacity=None), MQA, num_heads=71, by="replicated"
        ),
        "71 query heads do not divide.*by=.batch",
    ),
}


@pytest.mark.wrong_types
def test_one_array_where_values_are_in_keys():
    """576 numbers of a token, not 2 * 576; and heads cannot be split."""
    options = {"head_dim": 576, "num_slots": 4096, "value_head_dim": 512}
    told = sharding.explain(128, 1, 32, 8, values_in_keys=True, **options)
    assert told.bytes_per_device == {"heads": None, "batch": 4 * 4096 * 1152, "sequence": 32 * 512 * 1152}
    assert "cannot be split" in told.reasons["heads"] and "one key for all query heads" in told.reasons["heads"]
    assert sharding.explain(128, 1, 32, 8, **options).bytes_per_device["batch"] == 4 * 4096 * (576 + 512) * 2
    with pytest.raises(errors.ConfigError, match=r"value_head_dim \(577\)"):
        sharding.explain(128, 1, 32, 8, head_dim=576, value_head_dim=577, values_in_keys=True)
    with pytest.raises(errors.DTypeError, match="values_in_keys"):
        sharding.explain(128, 1, 32, 8, values_in_keys="yes")


@pytest.mark.wrong_types
@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_what_to_do(name):
    call, message = REFUSED[name]
    with pytest.raises(errors.ShardingError, match=message):
        call()


@pytest.mark.wrong_types
def test_other_errors():
    with pytest.raises(errors.UnsupportedError, match=r"by=\"heads\" or by=\"batch\", or a codec of single tokens"):
        ready(GQA, "sequence", codec=kvattn.KIVI(bits=4, group_size=4, residual=8))
    kivi = lambda rows, heads: kvattn.KVCache.create(
        rows, heads, H, capacity=16, codec=kvattn.KIVI(bits=4, group_size=4, residual=8)
    )
    # What is advised works: one head is not split by heads, one row not by batch.
    for rows, heads, advice in ((1, 1, 'use by="replicated", or a'), (16, 1, 'use by="batch", or a'), (1, 3, "use a")):
        with pytest.raises(errors.UnsupportedError, match=f"cannot lie elsewhere: {advice} codec of single tokens"):
            sharding.shard_cache(kivi(rows, heads), mesh_of("auto"), by="sequence")
    with pytest.raises(errors.UnsupportedError, match='use by="replicated"'):
        sharding.shard_cache(kivi(1, 1), mesh_of("auto"))
    sharding.shard_cache(kivi(1, 1), mesh_of("auto"), by="replicated")
    with pytest.raises(
        errors.ConfigError, match="the known ones are 'heads', 'batch', 'sequence', 'replicated', 'auto'"
    ):
        ready(GQA, "rows")
    with pytest.raises(errors.ConfigError, match="num_heads"):
        sharding.choose(7, 2, 1, 8)
    with pytest.raises(errors.ShapeError, match="fewer than num_heads 17"):
        sharding.cached_attention(*tokens(0, 1, MHA), ready(MHA), mesh=mesh_of("auto"), num_heads=17)
    # What one device refuses is refused before anything is moved.
    with pytest.raises(errors.CapacityError, match="do not fit"):
        sharding.cached_attention(*tokens(0, 24, MHA), ready(MHA), mesh=mesh_of("auto"))
    with pytest.raises(errors.ShapeError, match="key must be"):
        query, key, value = tokens(0, 1, MHA)
        sharding.cached_attention(query, key[:, :, :5], value, ready(MHA), mesh=mesh_of("auto"))
