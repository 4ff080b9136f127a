"""Caches in the host's memory against the same caches in the device's, bit by bit, and what may never be on the device.

CPUs have both kinds of memory, so that JAX refuses there what it refuses on any device: to compute with arrays of both.
"""

import dataclasses
import itertools
import pickle
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
import variants
from flax import nnx
from flax.serialization import from_bytes, to_bytes
from jax.sharding import AxisType

import kvattn
from kvattn import sharding
from kvattn.attend import Implementation, register, unregister
from kvattn.cache import HostLayout, Layout, host
from kvattn.errors import ConfigError, RangeError, UnsupportedError
from kvattn.masks import Mask

B, N, K, H = 4, 4, 2, 8
TINY = kvattn.models.DecoderConfig(
    vocab_size=61, model_dim=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=32, windows=(None, 6)
)
SLOTS, BLOCK = 24, 4
CHUNKS = (7, (7, 3, 0, 6)), (1, (1, 1, 1, 0)), (7, (2, 7, 5, 7)), (1, (1,) * B), (1, (1,) * B), (1, (1, 0, 1, 1))
"""T and the real tokens of each row: ragged rows, chunks across several blocks, rows that wait."""


def layout(kind, codec=None):
    return kind(SLOTS, (codec and codec.rows) or BLOCK, True)


def made(kind, policy=None, codec=None, **options):
    """An empty cache in blocks of four; Full keeps 24 tokens."""
    policy = kvattn.Full() if policy is None else policy
    options = {"capacity": variants.capacity_of(policy, SLOTS), "dtype": jnp.float32, **options}
    return kvattn.KVCache.create(B, K, H, policy=policy, codec=codec, layout=layout(kind, codec), **options)


def tokens(length, seed=0, batch=B):
    draw = np.random.default_rng(seed)
    return tuple(jnp.asarray(draw.normal(size=(batch, length, n, H)), jnp.float32) for n in (N, K, K))


@pytest.fixture(scope="module")
def step():
    """One for all tests of the module: a program per kind of cache and length."""
    return kvattn.jit(kvattn.cached_attention)


@pytest.fixture(scope="module")
def filled():
    """A cache in the device's memory and its twin in the host's, of ragged rows."""
    _, key, value = tokens(11)
    lengths = jnp.asarray([11, 6, 0, 9], jnp.int32)
    t = jnp.arange(11, dtype=jnp.int32)[None]
    slots = jnp.where(t < lengths[:, None], t, -1)
    return tuple(made(kind).write(slots, key, value).replace(lengths=lengths) for kind in (Layout, HostLayout))


def kinds(cache):
    """The memories that the arrays of keys and values lie in, but for tokens that a codec keeps as they came."""
    arrays = {**{f"keys {n}": x for n, x in cache.keys.items()}, **{f"values {n}": x for n, x in cache.values.items()}}
    return {x.sharding.memory_kind for n, x in arrays.items() if "residual" not in n}


def others(cache):
    """The memories of everything else."""
    residual = [x for arrays in (cache.keys, cache.values) for n, x in arrays.items() if n == "residual"]
    rest = (cache.lengths, cache.status, cache.state, residual)
    return {x.sharding.memory_kind for x in jax.tree.leaves(rest)}


def assert_same(one, other):
    """The same settings but for the layout's kind, and the same numbers, bit by bit."""
    assert jax.tree.structure(one.replace(layout=None)) == jax.tree.structure(other.replace(layout=None))
    assert dataclasses.astuple(one.layout) == dataclasses.astuple(other.layout)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def assert_same_steps(step, cache, host, chunks=CHUNKS, **options):
    """Both go through all the chunks with the same outputs, and hold the same afterwards."""
    for seed, (length, num_new) in enumerate(chunks):
        args, num_new = tokens(length, seed), jnp.asarray(num_new, jnp.int32)
        out, cache = step(*args, cache, num_new=num_new, **options)
        found, host = step(*args, host, num_new=num_new, **options)
        np.testing.assert_array_equal(np.asarray(found), np.asarray(out), err_msg=f"chunk {seed}")
        assert kinds(host) == {"pinned_host"} and others(host) == {"device"}
    assert np.isfinite(np.asarray(found)).all()
    assert_same(host.check(), cache.check())


ALL = [
    (policy, codec)
    for policy, codec in itertools.product(variants.POLICIES, (None, *variants.CODECS))
    if variants.go_together(variants.POLICIES[policy], variants.CODECS.get(codec))
]


@pytest.mark.parametrize(("policy", "codec"), ALL)
def test_the_same_bits(step, policy, codec):
    policy, codec = variants.POLICIES[policy], variants.CODECS.get(codec)
    assert_same_steps(step, made(Layout, policy, codec), made(HostLayout, policy, codec))


@pytest.mark.parametrize("codec", [None, *variants.CODECS])
def test_tokens_are_written_where_they_belong(codec):
    codec = variants.CODECS.get(codec)
    _, key, value = tokens(11)
    rows = [(0, 11), (3, 9), (17, 7), (5, 0)]  # the first slot of each row, and how many
    if codec and codec.rows:
        rows = [(0, 11), (0, 9), (0, 1), (0, 0)]  # as it appends: from the first token on
    t = np.arange(11)
    slots = jnp.asarray([np.where(t < count, first + t, -1) for first, count in rows], jnp.int32)
    write = jax.jit(lambda cache: cache.write(slots, key, value))
    filled = write(made(HostLayout, codec=codec))
    assert kinds(filled) == {"pinned_host"}
    assert_same(filled, write(made(Layout, codec=codec)))


def test_heads_that_keep_other_tokens():
    _, key, value = tokens(5)
    slots = jnp.asarray(np.random.default_rng(1).permuted(np.tile(np.arange(-2, SLOTS), (B, K, 1)), axis=2)[..., :5])
    write = jax.jit(lambda cache: cache.write(slots.astype(jnp.int32), key, value))
    assert_same(write(made(HostLayout)), write(made(Layout)))


def test_only_blocks_that_take_tokens_go_back(monkeypatch):
    """Each once; rows that wait have none."""
    _, key, _ = tokens(2)
    slots = jnp.asarray([[9, -1], [-1, -1], [10, 11], [-1, 22]], jnp.int32)
    cache, brought = made(HostLayout), []

    def changed(blocks, numbers, change):
        def recorded(i, block):
            jax.debug.callback(lambda i: brought.append(int(i)), i)
            return change(i, block)

        return original(blocks, numbers, recorded)

    original = host._changed
    monkeypatch.setattr(host, "_changed", changed)
    jax.block_until_ready(cache.store.write(cache.keys["data"], slots, key.swapaxes(1, 2), True))
    jax.effects_barrier()
    assert sorted(brought) == [2, 5]


def test_whole_blocks_of_single_rows():
    """What `KIVI` does once a residual is full: M blocks of each row, those past the end dropped."""
    far, cache = made(HostLayout), made(Layout)
    new = jnp.asarray(np.random.default_rng(2).normal(size=(B, K, 2, BLOCK, H)), jnp.float32)
    index = jnp.asarray([[0, 1], [4, 5], [9, 3], [9, 9]], jnp.int32)
    found = jax.jit(far.store.put)(far.values["data"], index, new)
    assert found.sharding.memory_kind == "pinned_host"
    expected = np.zeros((SLOTS // BLOCK, B, K, BLOCK, H), np.float32)
    for row, m in itertools.product(range(B), range(2)):
        if index[row, m] < len(expected):
            expected[index[row, m], row] = new[row, :, m]
    np.testing.assert_array_equal(np.asarray(found), expected)
    np.testing.assert_array_equal(np.asarray(jax.jit(cache.store.put)(cache.values["data"], index, new)), expected)


def with_nan(cache):
    """A copy with NaN in all slots without a token."""
    empty = np.asarray(cache.view().positions) < 0
    nan = lambda x, empty: jax.device_put(np.where(empty, np.nan, np.asarray(x)), x.sharding)
    copied = jax.tree.map(lambda x: jax.device_put(np.array(x), x.sharding), cache)
    keys, values = cache.keys["data"], cache.values["data"]  # [blocks, B, K, H, R] and [blocks, B, K, R, H]
    return copied.replace(
        keys={"data": nan(keys, empty[:, :, :, None])}, values={"data": nan(values, empty[..., None])}
    )


def test_decoding(filled):
    """Step by step the same outputs, by one program, in place; what is in empty slots is never seen."""
    query, key, value = tokens(1)
    cache, host = map(with_nan, filled)
    step, num_new = kvattn.jit(kvattn.cached_attention), jnp.asarray([1, 1, 1, 0], jnp.int32)
    program = step.lower(query, key, value, host, num_new=num_new).compile()
    assert program.memory_analysis().alias_size_in_bytes >= sum(x.nbytes for x in jax.tree.leaves(host.keys)) * 2
    for seed in range(3):
        args, old = tokens(1, seed), host
        out, cache = step(*args, cache, num_new=num_new)
        found, host = program(*args, host, num_new=num_new)
        np.testing.assert_array_equal(np.asarray(found), np.asarray(out))
        assert old.keys["data"].is_deleted()
        assert kinds(host) == {"pinned_host"} and others(host) == {"device"}
    assert np.isfinite(np.asarray(found)).all()
    assert_same(host, cache)


def compiled_step(blocks):
    """What XLA says of a decode step over so many blocks of 32 tokens, and the bytes of keys and values."""
    cache = kvattn.KVCache.create(2, K, 128, capacity=32 * blocks, layout=HostLayout(32 * blocks, 32, False))
    args = [jnp.ones((2, 1, n, 128), jnp.bfloat16) for n in (N, K, K)]
    program = kvattn.jit(kvattn.cached_attention).lower(*args, cache).compile()
    return program.memory_analysis(), sum(x.nbytes for x in jax.tree.leaves((cache.keys, cache.values)))


def test_a_larger_cache_needs_no_more_of_the_device():
    (small, _), (large, size) = compiled_step(4), compiled_step(32)
    assert large.alias_size_in_bytes >= size
    # What grows are positions, 4 bytes and a few of masks per slot and row; keys and values have 1024.
    more = 2 * 32 * (32 - 4)
    assert large.temp_size_in_bytes - small.temp_size_in_bytes < 32 * more < size / 16


@pytest.mark.wrong_types
def test_a_block_is_fetched_once_while_the_one_before_is_computed():
    """In the order in which a program has it, so that the copy can begin first."""
    events = []

    def fetch(i):
        events.append(("fetch", int(i)))
        return (i,)

    def step(i, carry, block):
        assert int(block[0]) == int(i)
        events.append(("compute", int(i)))
        return carry

    view = types.SimpleNamespace(on_host=True)
    walk = types.SimpleNamespace(request=types.SimpleNamespace(view=view), first=jnp.int32(2), last=jnp.int32(5))
    with jax.disable_jit():
        kvattn.attend.xla._Walk.over_blocks(walk, fetch, step, jnp.int32(0))
    order = [("fetch", 2), ("fetch", 3), ("compute", 2), ("fetch", 4), ("compute", 3), ("compute", 4)]
    assert events == order


def test_a_prompt_has_the_cache_come_over_once(filled):
    """Queries are cut only where their scores would not fit: each of their blocks reads all keys and values."""
    query, positions = jnp.zeros((B, 4096, N, H)), jnp.zeros((B, 4096), jnp.int32)
    requests = (kvattn.attend.Request(query, positions, x.view(), None, mask=Mask(), scale=1.0) for x in filled)
    near, far = map(kvattn.attend.xla._query_blocks, requests)
    assert near == (256, 16) and far == (4096, 1)
    large = dataclasses.replace(
        filled[1].view(), layout=HostLayout(SLOTS, 4096, True)
    )  # of as many slots as scores fit
    request = kvattn.attend.Request(query, positions, large, None, mask=Mask(), scale=1.0)
    assert kvattn.attend.xla._query_blocks(request) == (512, 8)


# What one does with them ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "verb",
    [
        lambda cache: cache.select([3, 1]),
        lambda cache: cache.select([0, 0, 2, 1, 3, 3]),
        lambda cache: jax.jit(lambda cache: cache.select(jnp.asarray([2, 9])))(cache),
        lambda cache: cache.trim([2, 6, 0, 1]),
        lambda cache: cache.reset([True, False, False, True]),
        lambda cache: pickle.loads(pickle.dumps(cache)).usable(),
        lambda cache: jax.device_get(cache).usable(),
        lambda cache: from_bytes(made(type(cache.layout)), to_bytes(cache)).usable(),
    ],
    ids=["fewer rows", "more rows", "under jit", "trim", "reset", "pickled", "from NumPy", "serialized"],
)
def test_verbs(filled, verb):
    cache, host = map(verb, filled)
    assert kinds(host) == {"pinned_host"} and others(host) == {"device"}
    assert_same(host, cache)


def test_dense_is_on_the_device(filled):
    for a, b in zip(filled[0].dense(), filled[1].dense(), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        assert b.sharding.memory_kind == "device"


def test_arrays_elsewhere_are_brought_back(filled):
    """Whoever moves the arrays of a cache moves none of its tokens: the layout says where they are."""
    moved = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), filled[1])
    assert kinds(moved) == {"device"}
    assert_same(moved.usable(), filled[1])
    assert kinds(moved.usable()) == {"pinned_host"}


def test_bytes_and_kinds(filled):
    cache, host = filled
    assert (cache.memory_kind, host.memory_kind) == ("device", "pinned_host")
    assert host.nbytes == cache.nbytes
    made = kvattn.KVCache.create(1, 2, 8, capacity=16, memory_kind="pinned_host")
    assert made.memory_kind == "pinned_host" and kinds(made) == {"pinned_host"}
    assert kvattn.KVCache.create(1, 2, 8, capacity=16, memory_kind="device").layout == Layout.best(16, 16)


@pytest.mark.parametrize(("slots", "rows"), [(100, 104), (512, 512), (513, 512), (100_000, 512)])
def test_blocks_on_devices(slots, rows):
    assert HostLayout.best(slots, 256, "gpu") == HostLayout(slots, rows, False)
    assert HostLayout.best(slots, 256, "tpu", head_dim=64).rows % 128 == 0
    assert HostLayout.best(slots, 256, "cpu") == HostLayout(*dataclasses.astuple(Layout.best(slots, 256, "cpu")))


def test_generated_tokens():
    model = small_models.decoder(TINY)
    prompts = [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11]]
    expected = kvattn.generate(model, prompts, 6)
    found, caches = kvattn.generate(model, prompts, 6, memory_kind="pinned_host", return_cache=True)
    assert found == expected
    assert {cache.memory_kind for cache in caches} == {"pinned_host"}
    assert set().union(*map(kinds, caches)) == {"pinned_host"}


def test_an_encoder():
    query, key, value = tokens(9)
    lengths = [9, 4, 0, 1]
    far, near = (
        kvattn.KVCache.from_encoder(key, value, lengths, memory_kind=kind) for kind in ("pinned_host", "device")
    )
    assert kinds(far) == {"pinned_host"} and far.is_static
    assert_same(far, near)
    attend = lambda cache: kvattn.cached_attention(query, None, None, cache)[0]
    np.testing.assert_array_equal(np.asarray(attend(far)), np.asarray(attend(near)))


# What is refused ------------------------------------------------------------------------------------------------------


def test_kernels_refuse_by_name(filled):
    """A kernel that reads arrays is never handed what lies on the host; None chooses "xla"."""
    asked = []
    toy = types.SimpleNamespace(unsupported=lambda request: asked.append(request), attend=None)
    register(Implementation("toy", lambda: toy))
    try:
        request = kvattn.attend.Request(
            tokens(1)[0], filled[1].lengths[:, None], filled[1].view(), None, mask=Mask(), scale=1.0
        )
        with pytest.raises(UnsupportedError, match=r"'toy': it reads the device's memory.* brings them"):
            kvattn.attend.choose(request, "toy")
        name, reasons = kvattn.attend.choose(request, ("toy", "xla"))
        assert name == "xla" and len(reasons) == 1 and not asked
        assert kvattn.attend.choose(request)[0] == "xla"
    finally:
        unregister("toy")


def test_what_create_refuses():
    with pytest.raises(ConfigError, match=r"unpinned_host.*pinned_host"):
        kvattn.KVCache.create(1, 1, 8, capacity=8, memory_kind="unpinned_host")
    with pytest.raises(ConfigError, match="HostLayout"):
        kvattn.KVCache.create(1, 1, 8, capacity=8, memory_kind="pinned_host", layout=Layout(8, 8, True))
    with pytest.raises(ConfigError, match=r"kvattn.cache.Layout for 'device'"):
        kvattn.KVCache.create(1, 1, 8, capacity=8, memory_kind="device", layout=HostLayout(8, 8, True))


def test_a_platform_without_it(monkeypatch):
    device = types.SimpleNamespace(addressable_memories=lambda: [types.SimpleNamespace(kind="device")])
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    with pytest.raises(UnsupportedError, match=r"no such memory, only 'device'.*Leave memory_kind out"):
        kvattn.KVCache.create(1, 1, 8, capacity=8, memory_kind="pinned_host")


def test_derivatives_and_vmap(filled):
    query, key, value = tokens(1)
    loss = lambda key: jnp.sum(kvattn.cached_attention(query, key, value, filled[1])[0])
    with pytest.raises(UnsupportedError, match=r"derivatives.*memory_kind=.device"):
        jax.grad(loss)(key)
    stacked = jax.tree.map(lambda x: jax.device_put(np.asarray(x)[None], x.sharding), filled[1])
    with pytest.raises(UnsupportedError, match=r"jax.vmap"):
        jax.vmap(lambda cache: kvattn.cached_attention(query, key, value, cache)[0])(stacked)


def test_derivatives_that_pass(filled):
    """Those of the queries; and where a codec rounds, which passes them by, those of the call's keys and values."""
    args = tokens(1)
    loss = lambda query, key, value, cache: jnp.sum(kvattn.cached_attention(query, key, value, cache)[0] ** 2)
    near, far = (jax.grad(loss)(*args, cache) for cache in filled)
    np.testing.assert_array_equal(np.asarray(far), np.asarray(near))
    caches = (made(kind, codec=kvattn.Int8()) for kind in (Layout, HostLayout))
    near, far = (jax.grad(loss, argnums=(0, 1, 2))(*args, cache) for cache in caches)
    for a, b in zip(near, far, strict=True):
        np.testing.assert_array_equal(np.asarray(b), np.asarray(a))
    assert np.abs(np.asarray(far[2])).max() > 0


def test_stages_refuse_them(filled):
    with pytest.raises(UnsupportedError, match=r"stages.*host"):
        sharding.layer_caches(lambda: filled[1], 2, 1)
    with pytest.raises(UnsupportedError, match=r"stages.*host"):
        mesh = jax.make_mesh((1,), ("stage",))
        sharding.pipeline(lambda w, x, cache: (x, cache), jnp.ones((1,)), jnp.ones((1, 2)), [filled[1]], mesh=mesh)


def test_a_row_that_does_not_exist(filled):
    with pytest.raises(RangeError):
        filled[1].select([4])


# Meshes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["heads", "batch", "sequence"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_on_a_mesh(by, kind):
    """Each device's part is in its host's memory, and the outputs are those of the same mesh without."""
    mesh = jax.make_mesh((2,), ("model",), axis_types=(kind,))
    cache, host = (sharding.shard_cache(made(layout), mesh, by=by) for layout in (Layout, HostLayout))
    assert kinds(host) == {"pinned_host"}
    for x, where in zip(
        jax.tree.leaves(host), jax.tree.leaves(sharding.cache_sharding(host, mesh, by=by)), strict=True
    ):
        assert x.sharding.is_equivalent_to(where, x.ndim) and x.sharding.memory_kind == where.memory_kind
    step = kvattn.jit(
        lambda *args, num_new: sharding.cached_attention(*args, mesh=mesh, by=by, num_new=num_new), donate=()
    )
    for seed, (length, num_new) in enumerate(CHUNKS[2:4]):
        args, num_new = tokens(length, seed), jnp.asarray(num_new, jnp.int32)
        out, cache = step(*args, cache, num_new=num_new)
        found, host = step(*args, host, num_new=num_new)
        np.testing.assert_array_equal(np.asarray(found), np.asarray(out))
        assert kinds(host) == {"pinned_host"}
    assert_same(host, cache)
    back = host.select([1, 0, 3, 2])
    assert kinds(back) == {"pinned_host"}
    assert_same(back, cache.select([1, 0, 3, 2]))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_a_layer_on_a_mesh(kind):
    mesh = jax.make_mesh((2,), ("model",), axis_types=(kind,))
    layer = kvattn.layers.GroupedQueryAttention(
        num_heads=N, in_features=16, num_kv_heads=K, head_dim=H, mesh=mesh, rngs=nnx.Rngs(0)
    )
    cache = layer.make_cache(2, 16, memory_kind="pinned_host")
    assert kinds(cache) == {"pinned_host"} and len(cache.keys["data"].sharding.device_set) == 2
    y, cache = jax.jit(lambda x, cache: layer(x, cache=cache))(jnp.ones((2, 3, 16)), cache)
    expected, _ = layer(jnp.ones((2, 3, 16)), cache=layer.make_cache(2, 16))
    np.testing.assert_allclose(np.asarray(y), np.asarray(expected), rtol=1e-6)
    assert kinds(cache) == {"pinned_host"} and cache.lengths.tolist() == [3, 3]
