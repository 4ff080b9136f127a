"""Layers that share page tables: the accounting of groups, and models, layers and meshes on pages of every policy."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sharding_cases
import variants
from flax import nnx
from jax.sharding import AxisType
from oracles import assert_same_bits

import kvattn
from kvattn import errors, sharding
from kvattn.cache import groups_of, pages_at_once, waste, with_tables
from kvattn.layers import GroupedQueryAttention, linen
from kvattn.models import Decoder, DecoderConfig
from kvattn.policies import OrderedWindow

MIB = 1 << 20


def layers_of(*windows, page_size=1, num_kv_heads=8, head_dim=64, length=4096):
    """Shapes of one bfloat16 cache per layer."""

    def make(window):
        policy = kvattn.Full() if window is None else OrderedWindow(window)
        columns, sizes = -(-length // page_size), {"batch_size": 1, "policy": policy}
        return kvattn.PagedKVCache.create(8, page_size, num_kv_heads, head_dim, max_pages=columns, **sizes)

    one = {window: jax.eval_shape(functools.partial(make, window)) for window in set(windows)}
    return tuple(one[window] for window in windows)


# Accounting -----------------------------------------------------------------------------------------------------------


@pytest.mark.wrong_types  # shapes of caches instead of caches
@pytest.mark.parametrize(("length", "every", "own"), [(4096, 192, 102), (8192, 384, 198), (16384, 768, 390)])
def test_gpt_oss_20b(length, every, own):
    """MiB of a sequence in sglang #30091: 24 layers, every other one with a window of 128; pages of 128 tokens."""
    groups = groups_of(layers_of(*(128, None) * 12, page_size=128, length=length))
    assert [group.layers for group in groups] == [tuple(range(0, 24, 2)), tuple(range(1, 24, 2))]
    assert sum(group.nbytes(length) for group in groups) == own * MIB
    assert 24 * groups[1].pages(length) * groups[1].page_bytes == every * MIB
    assert waste(groups, length) == pytest.approx(1 - own / every)


def test_the_waste_of_one_block_size():
    """What vLLM #11382 counts: a table for all layers, where half, or three quarters of them, have a window."""
    gemma_2 = groups_of(layers_of(*(4096, None) * 21, length=8192))
    assert waste(gemma_2, 8192) == 0.25
    ministral_8b = groups_of(layers_of(*(None, 32768, 32768, 32768) * 9, length=131072))
    assert waste(ministral_8b, 131072) == 0.5625
    # mllama: 43 tokens of text in 32 layers, 6193 of an image in the 8 that attend to it.
    (every,) = groups_of(layers_of(*(None,) * 40, length=6236))
    text, image = (dataclasses.replace(every, layers=tuple(range(*ends))) for ends in ((0, 32), (32, 40)))
    assert waste((text, image), 6236, (43, 6193)) == pytest.approx(0.796, abs=5e-4)
    with pytest.raises(errors.ShapeError, match="2 groups, got 1"):
        waste((text, image), 6236, (43,))


@pytest.mark.wrong_types  # policies are asked on the host
@pytest.mark.parametrize("page_size", [1, 3, 8, 16])
@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("window", [1, 5, 8, 17])
def test_pages_at_once_are_those_that_the_rule_needs(window, chunk, page_size):
    """Counted step by step from what the policy says it needs, at every length."""
    policy, length = OrderedWindow(window), 40
    most = 0
    for seen in range(0, length, chunk):
        step = kvattn.policies.Context(np.int32([seen]), np.int32([chunk]), 1, 64)
        slots = [s for s in range(64) if seen - window < s < seen + chunk and s < length and s >= 0]
        needed = np.asarray(policy.needed((), step))[0]
        assert set(np.nonzero(needed)[0]) <= set(slots)
        most = max(most, len({s // page_size for s in slots}))
    assert most <= pages_at_once(policy, page_size, length, chunk) <= most + (chunk > 1)
    assert pages_at_once(kvattn.SlidingWindow(window), page_size, length) == -(-min(length, window) // page_size)
    assert pages_at_once(kvattn.H2O(4, 3), page_size, length) == -(-8 // page_size)
    assert pages_at_once(kvattn.H2O(4, 3), page_size, 5) == -(-5 // page_size)  # no more than it fills
    assert pages_at_once(kvattn.Full(), page_size, length) == -(-length // page_size)


@pytest.mark.wrong_types
def test_groups_of_every_kind():
    """By policy, codec and shape; heads with tables of their own by themselves; arrays without pages do not count."""
    make = functools.partial(kvattn.PagedKVCache.create, 4, 8, batch_size=2, max_pages=3)
    fastgen, kivi = {"policy": kvattn.FastGen()}, {"codec": kvattn.KIVI(2, 4, 8)}
    caches = [make(2, 8), make(2, 8, **fastgen), make(2, 8), make(2, 8, **fastgen), make(4, 8), make(2, 8, **kivi)]
    groups = groups_of(caches)
    assert [group.layers for group in groups] == [(0, 2), (1,), (3,), (4,), (5,)]
    assert groups[0].page_bytes == 2 * 2 * 8 * 8 * 2 and groups[3].page_bytes == 2 * groups[0].page_bytes
    pools = [x for n, x in (*caches[5].keys.items(), *caches[5].values.items()) if n != "residual"]
    assert groups[4].page_bytes * 4 == sum(x.nbytes for x in pools)
    assert hash(groups[0]) != hash(groups[1])
    with pytest.raises(errors.DTypeError, match="layer 1 is a KVCache"):
        groups_of([caches[0], kvattn.KVCache.create(1, 2, 8, capacity=8)])


# Models ---------------------------------------------------------------------------------------------------------------

B, LENGTH, WINDOW = 2, 14, 5
CONFIG = DecoderConfig(
    vocab_size=17, model_dim=16, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=16,
    windows=(WINDOW, None, WINDOW, None),
)  # fmt: skip


@functools.cache
def model():
    return Decoder(CONFIG, rngs=nnx.Rngs(0))


@functools.cache
def stepped():
    graph, params = nnx.split(model())
    traces = []

    @functools.partial(kvattn.jit, donate="caches")
    def step(caches, tokens, num_new):
        traces.append(tokens.shape)
        return nnx.merge(graph, params)(tokens, caches, num_new)

    return step, traces


@functools.cache
def plain():
    """The model under jit, compiled quickly."""
    graph, params = nnx.split(model())
    call = lambda tokens, caches=None: nnx.merge(graph, params)(tokens, caches)
    return jax.jit(call, compiler_options={"xla_backend_optimization_level": 0})


def free_pages(groups, seed=0):
    """A list of free pages for each group, in no order."""
    return [np.random.default_rng(seed + i).permutation(group.num_pages).tolist() for i, group in enumerate(groups)]


def test_window_groups_give_pages_back():
    """A pool too small for all tokens of the windowed layers serves them: logits as without pages, one program."""
    page_size, longest = 2, 24
    few = B * (pages_at_once(OrderedWindow(WINDOW), page_size, longest) + 1)
    full = B * -(-longest // page_size)
    caches = model().make_paged_cache((few, full) * 2, page_size, batch_size=B, max_length=longest)
    groups = groups_of(caches)
    assert [(g.layers, g.policy, g.num_pages) for g in groups] == [
        ((0, 2), OrderedWindow(WINDOW), few),
        ((1, 3), kvattn.Full(), full),
    ]
    assert few < full // 2 and sum(g.nbytes(longest) for g in groups) < 0.7 * 2 * groups[1].nbytes(longest)
    flat = model().make_cache(B, longest)
    free = free_pages(groups)
    tables = [np.full((B, g.max_pages), -1, np.int32) for g in groups]
    (step, traces), seen = stepped(), np.zeros(B, int)
    for i in range(longest):
        for group, table, pages in zip(groups, tables, free, strict=True):
            for b in range(B):
                window = group.policy.mask().window
                gone = 0 if window is None else max(0, seen[b] - window + 1) // page_size
                for column in range(gone):
                    if table[b, column] >= 0:
                        pages.append(table[b, column])
                        table[b, column] = -1
                if table[b, seen[b] // page_size] < 0:
                    table[b, seen[b] // page_size] = pages.pop()
        caches = with_tables(caches, tables, seen)
        tokens = jax.random.randint(jax.random.key(i), (B, 1), 0, 17)
        logits, caches = step(caches, tokens, jnp.ones((B,), jnp.int32))
        other, flat = plain()(tokens, flat)
        np.testing.assert_allclose(logits, other, atol=2e-5)
        seen += 1
    assert len(traces) == 1, "other tables were another program"
    assert [cache.check().lengths.tolist() for cache in caches] == [[longest] * B] * 4


def test_one_table_for_all():
    caches = model().make_paged_cache(8, 4, batch_size=B, max_length=16)
    table = np.random.default_rng(0).permutation(8).reshape(B, 4)
    tokens = jax.random.randint(jax.random.key(0), (B, LENGTH), 0, 17)
    logits, after = plain()(tokens, with_tables(caches, table, [0] * B))
    np.testing.assert_allclose(logits, plain()(tokens)[0], atol=2e-5)
    pointers = [
        cache.page_table.unsafe_buffer_pointer() for cache in with_tables(after, jnp.asarray(table), [LENGTH] * B)
    ]
    assert len(set(pointers)) == 4, "caches that are donated share an array"
    assert with_tables(after, [table, table], [3, 3])[2].lengths.tolist() == [3, 3]
    with pytest.raises(errors.ShapeError, match="2 groups, got 3 tables"):
        with_tables(caches, [table] * 3, [0] * B)
    with pytest.raises(errors.RangeError, match="page 8"):
        with_tables(caches, [table, table + 1], [16, 16])


def test_what_devices_measured_of_their_pages_adds_up():
    """By sequence a slot is on one device; the others have 0 for it, and all go by the same."""
    from kvattn.sharding.sequence import Share

    sizes = {"batch_size": 1, "max_pages": 2, "policy": kvattn.H2O(4, 3), "dtype": jnp.float32}
    cache = kvattn.PagedKVCache.create(8, 4, 1, 2, **sizes)
    measured = np.zeros((8, 1, 1, 8), np.float32)
    measured[np.arange(8), 0, 0, ::-1] = np.arange(8)
    call = lambda x: Share("model", 8).all_slots(cache, x[0])[None]
    mesh, spec = sharding_cases.mesh_of("auto"), jax.P("model")
    whole = jax.jit(jax.shard_map(call, mesh=mesh, in_specs=spec, out_specs=spec))(measured)
    for x in np.asarray(whole):
        assert_same_bits(x, measured.sum(0), "what every device goes by")


@pytest.mark.slow
@pytest.mark.parametrize("policy", [kvattn.H2O(3, 2), kvattn.FastGen(0.7)])
def test_models_and_layers_take_policies_in_pages(policy):
    options = {"policy": policy, "codec": kvattn.Int8()}
    caches = model().make_paged_cache(12, 4, batch_size=B, max_length=16, **options)
    flat = model().make_cache(B, variants.capacity_of(policy, 16), **options)
    groups = groups_of(caches)
    assert [group.layers for group in groups] == ([(0,), (1,), (2,), (3,)] if policy.is_uneven else [(0, 1, 2, 3)])
    tables = [np.arange(B * g.max_pages).reshape(B, g.max_pages) for g in groups]
    caches = with_tables(caches, tables, [0] * B)
    tokens = jax.random.randint(jax.random.key(0), (B, LENGTH), 0, 17)
    for cut in (slice(0, LENGTH - 1), slice(LENGTH - 1, LENGTH)):
        logits, caches = plain()(tokens[:, cut], caches)
        other, flat = plain()(tokens[:, cut], flat)
        np.testing.assert_allclose(logits, other, atol=2e-5)
    for cache, alike in zip(caches, flat, strict=True):
        assert_same_bits(cache.kept, alike.kept, "tokens kept")


def test_what_layers_make():
    """Their own policy and codec where none is given; a window in order; pages as the codec wants them; Linen alike."""
    settings = {"num_kv_heads": 2, "head_dim": 8}
    layer = lambda **more: GroupedQueryAttention(4, 16, **settings, **more, rngs=nnx.Rngs(0))
    twin = lambda **more: linen.GroupedQueryAttention(4, **settings, **more)
    sizes = {"batch_size": 3, "max_length": 40}
    for made in (layer, twin):
        cache = made(window=5).make_paged_cache(9, **sizes)
        assert (cache.policy, cache.page_size, cache.max_pages) == (OrderedWindow(5), 16, 3)
        cache = made(policy=kvattn.H2O(3, 2), codec=kvattn.Int8()).make_paged_cache(9, 4, **sizes)
        assert (cache.policy, cache.codec, cache.max_pages) == (kvattn.H2O(3, 2), kvattn.Int8(), 2)
        assert made().make_paged_cache(9, **sizes, codec=kvattn.KIVI(2, 4, 8)).page_size == 8
        ring = made(window=5).make_paged_cache(9, 2, **sizes, policy=kvattn.SlidingWindow(5), dtype=jnp.bfloat16)
        assert (ring.max_pages, ring.dtype, ring.batch_size, ring.num_pages) == (3, jnp.bfloat16, 3, 9)
        with pytest.raises(errors.ConfigError, match="max_length"):
            made().make_paged_cache(9, batch_size=3, max_length=0)


# Meshes ---------------------------------------------------------------------------------------------------------------


def on_a_mesh(by, policy, num_kv_heads, shape, kind="auto"):
    """A schedule of `sharding_cases` over pages on a mesh, against one device without pages."""
    rows, heads, size, page_size = sharding_cases.B, num_kv_heads, sharding_cases.H, 4
    capacity = variants.capacity_of(policy, 24)
    columns = -(-policy.num_slots(capacity) // page_size)
    shards = 8 if by == "batch" else shape[0] if len(shape) > 1 else 1
    each = -(-rows * columns // 8) * 8 // shards
    table = [
        np.random.default_rng(i).permutation(each)[: rows // shards * columns].reshape(-1, columns) + i * each
        for i in range(shards)
    ]
    settings = {"batch_size": rows, "max_pages": columns, "policy": policy, "dtype": jnp.float32}
    cache = kvattn.PagedKVCache.create(each * shards, page_size, heads, size, **settings)
    cache = cache.with_tables(np.concatenate(table), [0] * rows)
    mesh = sharding_cases.mesh_of(kind, shape)
    single = jax.jit(
        lambda q, k, v, cache, n: kvattn.cached_attention(q, k, v, cache, num_new=n, rope=sharding_cases.ROPE)
    )
    flat = kvattn.KVCache.create(rows, heads, size, capacity=capacity, policy=policy, dtype=jnp.float32)
    expected, flat = sharding_cases.walk(single, flat, heads, 2)
    with jax.set_mesh(mesh) if kind == "explicit" else contextlib.nullcontext():
        cache = sharding.shard_cache(cache, mesh, by=by)
        outs, cache = sharding_cases.walk(sharding_cases.sharded_step(mesh, by), cache, heads, 2)
    for a, b in zip(expected, outs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    kept = np.asarray(cache.kept)
    if kept.ndim == 2:
        kept = kept[:, :: kept.shape[1] // heads]
    np.testing.assert_array_equal(kept, flat.kept)


MESHES = [
    ("sequence", kvattn.H2O(6, 3), 2, (8,)),
    ("sequence", kvattn.Scissorhands(9, 2, 8), 2, (2, 4)),
    ("sequence", kvattn.FastGen(0.6), 2, (8,)),
    ("sequence", kvattn.SlidingWindow(7), 1, (8,)),
    ("sequence", OrderedWindow(7), 1, (8,)),
    ("heads", kvattn.H2O(6, 3), 8, (8,)),
    ("heads", kvattn.FastGen(0.6), 8, (8,)),
    ("heads", kvattn.FastGen(0.6), 2, (2, 4)),
    ("heads", kvattn.StreamingLLM(2, 6), 2, (8,)),
    ("batch", kvattn.FastGen(0.6), 1, (8,)),
    ("batch", kvattn.SlidingWindow(7), 2, (2, 4)),
    ("replicated", kvattn.H2O(6, 3), 1, (2, 4)),
]


@pytest.mark.parametrize(
    ("by", "policy", "heads", "shape"),
    [pytest.param(*case, marks=pytest.mark.slow) for case in MESHES],
)
def test_meshes(by, policy, heads, shape):
    on_a_mesh(by, policy, heads, shape)


@pytest.mark.slow
@pytest.mark.parametrize(("by", "policy", "heads", "shape"), [MESHES[2], MESHES[6], MESHES[9]])
def test_explicit_meshes(by, policy, heads, shape):
    on_a_mesh(by, policy, heads, shape, "explicit")


def test_on_a_mesh_heads_have_their_own_strips():
    mesh = sharding_cases.mesh_of("auto")
    sizes = {"batch_size": 8, "max_pages": 1, "policy": kvattn.FastGen(), "dtype": jnp.float32}
    cache = kvattn.PagedKVCache.create(8, 4, 8, sharding_cases.H, **sizes)
    table = np.broadcast_to(np.arange(8)[:, None, None], (8, 8, 1)).copy()
    new = tuple(map(jnp.asarray, sharding_cases.tokens(1, 1, 8)))
    table[3, 2] = 8 + 8 * 2 + 3  # the same strip, by its number among all
    with pytest.raises(errors.RangeError, match=r"row 3 .* own strips"):
        step = functools.partial(sharding.cached_attention, mesh=mesh, by="heads")
        step(*new, sharding.shard_cache(cache.with_tables(table, [0] * 8), mesh, by="heads"))
    compiled = jax.jit(step, compiler_options={"xla_backend_optimization_level": 0})
    out, after = compiled(*new, sharding.shard_cache(cache.with_tables(table, [0] * 8), mesh, by="heads"))
    assert (np.asarray(out)[3] == 0).reshape(16, -1).all(axis=1).any()
    with pytest.raises(errors.RangeError, match=r"rows \[3\].*page"):
        after.check()


def test_models_on_a_mesh_make_their_pools_there():
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    split = Decoder(CONFIG, mesh=mesh, by="heads", rngs=nnx.Rngs(0))
    caches = split.make_paged_cache(8, 4, batch_size=B, max_length=16)
    pool = caches[0].keys["data"]
    assert pool.sharding.shard_shape(pool.shape) == (1, *pool.shape[1:])
    before = caches[0].page_table.sharding
    assert with_tables(caches, np.arange(8).reshape(B, 4), [0] * B)[0].page_table.sharding == before
