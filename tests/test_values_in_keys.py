"""Caches whose values are the first numbers of their keys, stored once (latent attention)."""

import functools

import jax
import jax.numpy as jnp
import latent_oracle as oracle
import numpy as np
import pytest
from jax.sharding import AxisType

import kvattn
from kvattn import errors, sharding
from kvattn.attend import api
from kvattn.attend.request import Request
from kvattn.cache import Layout
from kvattn.masks import Mask
from kvattn.memory import ModelSpec, bytes_per_token, cache_bytes
from kvattn.pallas.interpreter import interpret

B, N, H, HV, CAPACITY = 4, 4, 12, 8, 16
ROPE = kvattn.RoPE(H, rotary_begin=HV)
PAIRS = kvattn.RoPE(H, rotary_begin=HV, interleaved=True)
CODECS = {"int8": kvattn.Int8(), "float8": kvattn.Float8(), "int4": kvattn.Int4(4)}
CHUNKS = ([5, 0, 3, 5], [1, 1, 0, 1], [2, 5, 5, 1], [1, 1, 1, 1])
"""How many tokens come to each row: two prompts of five, ragged, and single tokens."""


def make(in_keys=True, policy=None, codec=None, dtype=jnp.float32, batch=B, **settings):
    if policy is None or isinstance(policy, kvattn.FastGen):
        settings.setdefault("capacity", CAPACITY)
    return kvattn.KVCache.create(
        batch, 1, H, value_head_dim=HV, values_in_keys=in_keys, policy=policy, codec=codec, dtype=dtype, **settings
    )


def tokens(seed, length, batch=B):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(batch, length, n, H)).astype(np.float32) for n in (N, 1)]


@functools.cache
def step(implementation="xla", rope=ROPE, padding="right", in_keys=True):
    """One compiled step per setting; with `in_keys` False values of their own are given."""

    def call(query, key, cache, num_new):
        value = None if in_keys else key[..., :HV]
        settings = {"rope": rope, "padding": padding, "implementation": implementation}
        return kvattn.cached_attention(query, key, value, cache, num_new=num_new, **settings)

    return kvattn.jit(call)


def feed(cache, step, chunks=CHUNKS, padding="right"):
    """The outputs of each row's tokens, what came to it, and the cache."""
    outs, came = [[] for _ in range(B)], [[] for _ in range(B)]
    for seed, num_new in enumerate(chunks):
        length = 1 if max(num_new) == 1 else 5
        query, key = tokens(seed, length)
        if padding == "poison":  # what no token is must not matter
            pads = np.arange(length)[None] >= np.asarray(num_new)[:, None]
            query, key = (np.where(pads[..., None, None], np.nan, x) for x in (query, key))
        out, cache = step(query, key, cache, jnp.asarray(num_new, jnp.int32))
        for b, count in enumerate(num_new):
            real = slice(length - count, length) if padding == "left" else slice(0, count)
            outs[b] += list(np.asarray(out)[b, real])
            came[b] += [(query[b, t], key[b, t, 0]) for t in range(length)[real]]
    return outs, came, cache


def poisoned(cache):
    """NaN in every number that it stores."""
    nan = lambda x: jnp.full_like(x, jnp.nan) if jnp.issubdtype(x.dtype, jnp.floating) else x
    return cache.replace(keys=jax.tree.map(nan, cache.keys))


def expected(came, keeps=None, num_sinks=0, in_cache=False, interleaved=False, keys=None):
    """The oracle's outputs of one row; `keys`: what is read of them, where that is not what came."""
    out = []
    for t, (query, _) in enumerate(came):
        seen, places = oracle.kept_places(t, keeps, num_sinks)
        read = [came[s][1] if keys is None else keys[s] for s in seen]
        places = places if in_cache else seen
        out.append(oracle.attend(query, read, places, places[-1], HV, interleaved=interleaved))
    return out


def check(outs, came, tolerance=2e-6, **rules):
    assert sum(map(len, outs)) == sum(map(sum, CHUNKS))
    for found, row in zip(outs, came, strict=True):
        for a, b in zip(found, expected(row, **rules), strict=True):
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


# RoPE -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_that_begins_behind(interleaved):
    """It turns the rest as a smaller one does, and what comes before and after not at all."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 5, 2, 14)).astype(np.float32)
    rope = kvattn.RoPE(14, rotary_begin=4, rotary_dim=6, interleaved=interleaved)
    y, position = np.asarray(rope(x, jnp.arange(7, 12))), np.arange(7, 12)
    np.testing.assert_array_equal(y[..., :4], x[..., :4])
    np.testing.assert_array_equal(y[..., 10:], x[..., 10:])
    for t, p in enumerate(position):
        alone = oracle.turned(x[:, t, :, 4:10], p, interleaved=interleaved)
        np.testing.assert_allclose(y[:, t, :, 4:10], alone, rtol=1e-5, atol=1e-5)
    assert kvattn.RoPE(576, rotary_begin=512).num_pairs == 32
    assert (kvattn.RoPE(576, rotary_begin=512).inv_freq == kvattn.RoPE(64).inv_freq).all()


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("error", "words", "settings"),
    [
        (errors.ConfigError, "rotary_begin", {"rotary_begin": 16}),
        (errors.ConfigError, "even and between 2 and head_dim - rotary_begin \\(16 - 9\\), got 7", {"rotary_begin": 9}),
        (errors.ConfigError, "got 8", {"rotary_begin": 10, "rotary_dim": 8}),
        (errors.ConfigError, "rotary_begin", {"rotary_begin": -2}),
        (errors.DTypeError, "rotary_begin", {"rotary_begin": 2.0}),
    ],
)
def test_where_rope_cannot_begin(error, words, settings):
    with pytest.raises(error, match=words):
        kvattn.RoPE(16, **settings)


# The step -------------------------------------------------------------------------------------------------------------


POLICIES = {
    "full": (None, {}),
    "window": (kvattn.SlidingWindow(4), {"keeps": 4}),
    "streaming": (kvattn.StreamingLLM(2, 3), {"keeps": 3, "num_sinks": 2, "in_cache": True}),
}


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("name", POLICIES)
def test_ragged_histories(name, implementation):
    """As the list of tokens has it, whatever lies in the memory that holds none and in pads."""
    policy, rules = POLICIES[name]
    outs, came, cache = feed(poisoned(make(policy=policy)), step(implementation), padding="poison")
    check(outs, came, **rules)
    assert not np.asarray(cache.check().status).any()


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("name", [*POLICIES, "pages"])
def test_attended_sets(name, padding):
    """Zero queries, and keys whose first numbers say which token it is: the output is 1/n on those attended to."""
    policy, rules = POLICIES.get(name, POLICIES["full"])
    sizes = {"value_head_dim": CAPACITY, "values_in_keys": True, "dtype": jnp.float32}
    if name == "pages":
        cache = kvattn.PagedKVCache.create(16, 4, 1, CAPACITY + 4, batch_size=B, max_pages=4, **sizes)
        cache = cache.with_tables(np.random.default_rng(0).permutation(16).reshape(B, 4), [0] * B)
    else:
        capacity = {"capacity": CAPACITY} if policy is None else {}
        cache = kvattn.KVCache.create(B, 1, CAPACITY + 4, policy=policy, **capacity, **sizes)
    call = jax.jit(functools.partial(kvattn.cached_attention, padding=padding), donate_argnames="cache")
    lengths = [0] * B
    for num_new in CHUNKS:
        length = 1 if max(num_new) == 1 else 5
        first = [0 if padding == "right" else length - count for count in num_new]
        key, want = np.zeros((B, length, 1, CAPACITY + 4), np.float32), np.zeros((B, length, N, CAPACITY))
        for b, count in enumerate(num_new):
            for i in range(count):
                key[b, first[b] + i, 0, lengths[b]] = 1
                seen, _ = oracle.kept_places(lengths[b], rules.get("keeps"), rules.get("num_sinks", 0))
                want[b, first[b] + i][:, seen] = 1 / len(seen)
                lengths[b] += 1
        query = jnp.zeros((B, length, N, CAPACITY + 4))
        out, cache = call(query, key, None, cache, num_new=jnp.asarray(num_new, jnp.int32))
        np.testing.assert_array_equal(np.asarray(out) != 0, want != 0)
        np.testing.assert_allclose(out, want, atol=1e-6)


def test_left_padding_and_pairs():
    outs, came, _ = feed(make(), step(rope=PAIRS, padding="left"), padding="left")
    check(outs, came, interleaved=True)


OTHERS = {
    "h2o": kvattn.H2O(3, 2),
    "h2o in the cache": kvattn.H2O(3, 2, positions_in="cache"),
    "scissorhands": kvattn.Scissorhands(5, 2, 8),
    "fastgen": kvattn.FastGen(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_policies_that_go_by_attention(name):
    """They keep what they keep where values are stored besides, and the outputs are the same."""
    policy = OTHERS[name]
    outs, _, cache = feed(poisoned(make(policy=policy)), step())
    others, _, other = feed(make(in_keys=False, policy=policy), step(in_keys=False))
    np.testing.assert_allclose(np.concatenate(outs), np.concatenate(others), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(cache.positions), np.asarray(other.positions))
    assert np.asarray(cache.kept).max() < 8 or name == "fastgen"


@pytest.mark.parametrize("name", CODECS)
def test_codecs(name):
    """A token has one scale, or one set of them: what is read of its value is what is read of its key."""
    outs, came, cache = feed(make(codec=CODECS[name]), step(rope=None))
    keys, values = (np.asarray(x)[:, 0] for x in cache.dense())
    np.testing.assert_array_equal(values, keys[..., :HV])
    for b in range(B):
        read = keys[b, : len(came[b])]
        assert 0 < np.abs(read - np.stack([key for _, key in came[b]])).max() < 0.4
        for t, found in enumerate(outs[b]):
            truth = np.stack(
                [oracle.softmax(read[: t + 1] @ q / np.sqrt(H)) @ read[: t + 1, :HV] for q in came[b][t][0]]
            )
            np.testing.assert_allclose(found, truth, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("codec", [None, "int8"])
def test_pages(codec):
    """Pages anywhere in a pool of NaN, and rows that are taken back, copied and chosen, as in a contiguous cache."""
    codec = CODECS.get(codec)
    table = np.random.default_rng(0).permutation(4 * B).reshape(B, 4)
    sizes = {"batch_size": B, "max_pages": 4, "value_head_dim": HV, "dtype": jnp.float32}
    paged = kvattn.PagedKVCache.create(4 * B + 3, 4, 1, H, codec=codec, values_in_keys=True, **sizes)
    assert paged.values_in_keys and paged.nbytes < kvattn.PagedKVCache.create(4 * B + 3, 4, 1, H, **sizes).nbytes
    paged = poisoned(paged).with_tables(table, [0] * B)
    found = []
    for cache in (paged, make(codec=codec)):
        cache = feed(cache, step())[2].trim(jnp.asarray([1, 2, 0, 3])).select([2, 0, 3, 1])
        if cache.page_table is not None:  # a copy of the page that the first row's tokens begin in
            cache = cache.copy_pages([int(table[2, 0])], [4 * B])
            cache = cache.with_tables(np.stack([[4 * B, *table[2, 1:]], *table[[0, 3, 1]]]), cache.lengths)
        query, key = tokens(9, 1)
        out, cache = step()(query, key, cache, jnp.ones((B,), jnp.int32))
        found.append((np.asarray(out), cache.lengths.tolist()))
    (out, lengths), (other, other_lengths) = found
    np.testing.assert_allclose(out, other, rtol=1e-6, atol=1e-6)
    assert lengths == other_lengths


def test_pools_that_differ_in_it_are_groups_of_their_own():
    """Equal in all sizes otherwise; pages of one have half the bytes."""
    sizes = {"batch_size": 1, "max_pages": 2, "dtype": jnp.float32}
    pools = [kvattn.PagedKVCache.create(2, 4, 1, H, values_in_keys=inside, **sizes) for inside in (True, False, True)]
    groups = kvattn.cache.groups_of(pools)
    assert [group.layers for group in groups] == [(0, 2), (1,)]
    assert [group.page_bytes for group in groups] == [4 * H * 4, 2 * 4 * H * 4]


def test_a_layout_that_is_read_twice():
    """Keys that are values too lie as values do."""
    assert not make().layout.transposed_keys and make(in_keys=False).layout.transposed_keys
    assert not make(memory_kind="pinned_host").layout.transposed_keys


def test_gradients():
    """Of the queries and keys of a prompt: those of attention by its formula, both uses of a key together."""
    query, key = (jnp.asarray(x) for x in tokens(1, 5))
    weight = jnp.asarray(np.random.default_rng(5).normal(size=(B, 5, N, HV)), jnp.float32)

    def by_cache(query, key):
        return jnp.sum(kvattn.cached_attention(query, key, None, make(), rope=ROPE)[0] * weight)

    def by_formula(query, key):
        at = jnp.arange(5, dtype=jnp.int32)
        scores = jnp.einsum("btnh,bskh->bnts", ROPE(query, at), ROPE(key, at)) / np.float32(np.sqrt(H))
        probs = jax.nn.softmax(jnp.where((at[:, None] >= at[None])[None, None], scores, -jnp.inf))
        return jnp.sum(jnp.einsum("bnts,bsh->btnh", probs, key[:, :, 0, :HV]) * weight)

    found = jax.jit(jax.grad(by_cache, (0, 1)))(query, key)
    for a, b in zip(found, jax.jit(jax.grad(by_formula, (0, 1)))(query, key), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-5, atol=2e-5)


def test_gradients_pass_straight_through_codes():
    """To the key of a token that was encoded, from its score and from its value."""
    query, key = (jnp.asarray(x) for x in tokens(1, 1))

    def call(key):
        return kvattn.cached_attention(query, key, None, make(codec=kvattn.Int8()))[0]

    # Alone it is its own output: one to one on the value, nothing on what lies behind it.
    found = jax.grad(lambda key: jnp.sum(call(key)))(key)
    np.testing.assert_allclose(np.asarray(found[..., :HV]), N, rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(found[..., HV:]), 0)


# Bytes ----------------------------------------------------------------------------------------------------------------


SIZES = {"bfloat16": (None, 1152), "int8": (kvattn.Int8(), 576 + 4), "float8": (kvattn.Float8(), 576 + 4)}
SIZES["int4"] = (kvattn.Int4(), 288 + 9 * 4)


@pytest.mark.parametrize("name", SIZES)
def test_bytes_of_a_token(name):
    """576 numbers, scales once; the planner says the same, of contiguous caches and of pages."""
    codec, token = SIZES[name]
    model = ModelSpec(
        name="mla", num_layers=1, num_heads=128, num_kv_heads=1, head_dim=576, value_head_dim=512, values_in_keys=True,
        num_params=1,
    )  # fmt: skip
    sizes = {"value_head_dim": 512, "values_in_keys": True, "codec": codec}
    cache = jax.eval_shape(lambda: kvattn.KVCache.create(3, 1, 576, capacity=256, **sizes))
    assert cache.nbytes == 3 * (256 * token + 8) == cache_bytes(model, 3, 256, codec=codec, backend="cpu")
    pages = {"batch_size": 3, "max_pages": 16}
    paged = jax.eval_shape(lambda: kvattn.PagedKVCache.create(48, 16, 1, 576, **pages, **sizes))
    planned = cache_bytes(model, 3, 256, codec=codec, page_size=16)
    assert paged.nbytes == 3 * (256 * token + 4 * 16 + 8) == planned
    if codec is None:
        assert bytes_per_token(1, 1, 576, value_head_dim=512, values_in_keys=True) == token


@pytest.mark.parametrize("codec", [None, kvattn.Int8()], ids=str)
@pytest.mark.parametrize("paged", [False, True])
def test_a_decode_step_works_in_place(codec, paged):
    """All of the cache is aliased; what is needed besides is a few blocks, however long the cache is."""
    sizes = {"value_head_dim": 512, "values_in_keys": True, "codec": codec}

    def make():
        if paged:
            return kvattn.PagedKVCache.create(2 * 256, 16, 1, 576, batch_size=2, max_pages=256, **sizes)
        return kvattn.KVCache.create(2, 1, 576, capacity=4096, **sizes)

    cache = jax.eval_shape(make)
    query, key = (jax.ShapeDtypeStruct((2, 1, n, 576), jnp.bfloat16) for n in (16, 1))
    rope = kvattn.RoPE(576, rotary_begin=512)
    append = kvattn.jit(lambda q, k, cache: kvattn.cached_attention(q, k, None, cache, rope=rope))
    program = append.lower(query, key, cache).compile()
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= cache.nbytes
    assert memory.temp_size_in_bytes < 0.25 * cache.nbytes
    if paged:  # a page that is read as keys and as values is gathered once
        results = [line.partition("gather(")[0] for line in program.as_text().splitlines() if " gather(" in line]
        assert sum("576]" in result for result in results) == 1


# Placement ------------------------------------------------------------------------------------------------------------


@functools.cache
def mesh_of(kind):
    return jax.make_mesh((4,), ("model",), axis_types=(getattr(AxisType, kind),))


@functools.cache
def on_one_device():
    return feed(make(), step())[0]


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("by", ["batch", "sequence", "replicated"])
def test_on_a_mesh(by, kind):
    mesh = mesh_of(kind)
    call = kvattn.jit(
        lambda query, key, cache, num_new: sharding.cached_attention(
            query, key, None, cache, mesh=mesh, by=by, num_new=num_new, rope=ROPE
        )
    )
    cache = sharding.shard_cache(make(), mesh, by=by)
    outs, _, cache = feed(cache, call)
    np.testing.assert_allclose(np.concatenate(outs), np.concatenate(on_one_device()), rtol=2e-6, atol=2e-6)
    if by != "replicated":
        whole = make(capacity=64)
        assert sharding.bytes_per_device(whole, mesh, by=by) < 0.3 * whole.nbytes


def test_one_head_is_not_split():
    with pytest.raises(errors.ShardingError, match=r"One key/value head \(MQA\) cannot be split"):
        sharding.shard_cache(make(), mesh_of("Auto"), by="heads")


def test_in_the_hosts_memory():
    """A block is brought once, and read as keys and as values."""
    outs, came, cache = feed(make(memory_kind="pinned_host"), step())
    assert cache.memory_kind == "pinned_host"
    check(outs, came)


# What is refused ------------------------------------------------------------------------------------------------------


def test_kernels_refuse_by_name_and_xla_reads():
    query, key = tokens(0, 1)
    cache = kvattn.cached_attention(query, key, None, make())[1]
    request = Request(jnp.asarray(query), jnp.zeros((B, 1), jnp.int32), cache.view(), None, mask=Mask(), scale=1.0)
    with interpret():
        for name in ("mosaic_gpu", "mosaic_tpu"):
            with pytest.raises(errors.UnsupportedError, match=f"{name}.*first numbers of their keys.*xla"):
                kvattn.cached_attention(query, key, None, cache, implementation=name)
            assert api.choose(request, (name, "xla"))[0] == "xla"
        assert api.choose(request)[0] == "xla"


def call(cache, value=None, key=True, **settings):
    query, keys = tokens(0, 2)
    value = value if value is None else np.zeros((B, 2, 1, HV), np.float32)
    return kvattn.cached_attention(query, keys if key else None, value, cache, **settings)


PAGES = {"batch_size": 1, "max_pages": 2, "values_in_keys": True}
REFUSED = {
    "a value": (errors.ConfigError, "first 8 numbers of its keys.*value=None", lambda: call(make(), value=True)),
    "no key, nor tokens": (errors.RangeError, "last tokens of the cache", lambda: call(make(), key=False)),
    "no value": (errors.ConfigError, "value alone for a cache", lambda: call(make(in_keys=False))),
    "rope": (errors.ConfigError, r"first 8 are its value.*RoPE\(12, rotary_begin=8\)",
             lambda: call(make(), rope=kvattn.RoPE(H))),
    "shape": (errors.ShapeError, "key must be", lambda: kvattn.cached_attention(
        np.zeros((B, 1, N, H), np.float32), np.zeros((B, 1, 2, H), np.float32), None, make())),
    "longer values": (errors.ConfigError, r"value_head_dim \(9\).*at most head_dim \(8\)",
                      lambda: kvattn.KVCache.create(1, 1, 8, capacity=4, value_head_dim=9, values_in_keys=True)),
    "longer values in pages": (errors.ConfigError, "at most head_dim",
                               lambda: kvattn.PagedKVCache.create(2, 4, 1, 8, value_head_dim=9, **PAGES)),
    "kivi": (errors.UnsupportedError, "KIVI.*differently.*Int8", lambda: make(codec=kvattn.KIVI(2, 4, 8))),
    "kivi in pages": (errors.UnsupportedError, "KIVI.*differently.*Int8",
                      lambda: kvattn.PagedKVCache.create(2, 8, 1, H, codec=kvattn.KIVI(2, 4, 8), **PAGES)),
    "no bool": (errors.DTypeError, "values_in_keys must be True or False",
                lambda: kvattn.KVCache.create(1, 1, 8, capacity=4, values_in_keys="yes")),
    "a plan of kivi": (errors.UnsupportedError, "KIVI.*differently", lambda: cache_bytes(
        ModelSpec(name="m", num_layers=1, num_heads=2, num_kv_heads=1, head_dim=32, value_head_dim=16, num_params=1,
                  values_in_keys=True), 1, 64, codec=kvattn.KIVI(2, 4, 8))),
    "a spec of longer values": (errors.ConfigError, r"value_head_dim \(33\) must be at most head_dim \(32\)",
        lambda: ModelSpec(name="m", num_layers=1, num_heads=2, num_kv_heads=1, head_dim=32, value_head_dim=33,
                          num_params=1, values_in_keys=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    error, words, make = REFUSED[name]
    with pytest.raises(error, match=words):
        make()


def test_blocks_of_any_layout():
    """Keys that lie transposed are read as values too."""
    codec, layout = kvattn.Int8(), Layout(CAPACITY, 4, True)
    outs, others = (feed(cache, step(rope=None))[0] for cache in (make(codec=codec, layout=layout), make(codec=codec)))
    np.testing.assert_allclose(np.concatenate(outs), np.concatenate(others), rtol=2e-6, atol=2e-6)
