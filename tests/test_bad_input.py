"""Bad input and edge cases, one table: what is passed, and the error (type and message) or the defined result.

Rows are numbered as in bad_inputs.txt. Windows, eviction and codecs, 61-69 and 105-118, are in test_smaller_caches.py,
pages, 10 and 70-80, in test_paged.py, pools of blocks and prefixes, 81-103, in test_serving_bad_input.py.
"""

import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import suites
from bad_input_table import LIST, Table, create, run, step
from oracles import TokenLists, assert_accurate, assert_lse, assert_same_bits, attend_token
from suites import CAPACITY, CHUNK, HV, POLICIES, STEPS, B, K, N, by_id, make_cache, tokens

import kvattn
from kvattn import errors
from kvattn.masks import Mask

FULL, FULL3, RING = by_id(POLICIES, "full", "full-window3", "ring5")


TABLE = Table()
bad, defined = TABLE.bad, TABLE.defined


def layer(name="MultiHeadAttention", **settings):
    from flax import nnx

    settings = {"num_heads": 4, "in_features": 16, **settings}
    return getattr(kvattn.layers, name)(**settings, rngs=nnx.Rngs(0))


def mirror(**settings):
    arrays = [settings.pop(name, ones(1, 3, 2, 8)) for name in ("query", "key", "value")]
    return kvattn.dot_product_attention(*arrays, **settings)


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


def decode(*arrays, **settings):
    """`decode_attention` of one token over 4 slots, with some arguments replaced."""
    given = (*arrays, *(ones(2, 2, 8), ones(2, 1, 4, 8), ones(2, 1, 4, 8), [4, 2])[len(arrays) :])
    return kvattn.pallas.decode_attention(*given, **settings)


def paged(*arrays, **settings):
    """`paged_decode_attention` of one token over two pages of two slots each."""
    given = (*arrays, *(ones(2, 2, 8), ones(1, 4, 2, 8), ones(1, 4, 2, 8), [4, 2], [[3, 0], [1, 9]])[len(arrays) :])
    return kvattn.pallas.paged_decode_attention(*given, **settings)


def mirror_scale(**settings):
    """The mirror, whose dtype errors are ValueError as well where jax.nn raises something."""
    return _as_dtype_error(lambda: mirror(**settings)) if "scale" in settings else mirror(**settings)


CALLS = {"step": step, "decode": decode, "paged": paged, "mirror": mirror_scale}


# Config ---------------------------------------------------------------------------------------------------------------

bad(1, "query heads that do not divide", errors.ConfigError, "16", "5")(
    lambda: step(ones(2, 1, 16, 8), ones(2, 1, 5, 8), ones(2, 1, 5, 8), create(num_kv_heads=5))
)
bad(1, "layer heads that do not divide", errors.ConfigError, "16", "5")(lambda: layer(num_heads=16, num_kv_heads=5))
for count in (0, -2):
    bad(2, f"num_kv_heads={count}", errors.ConfigError, "num_kv_heads", str(count))(
        lambda count=count: create(num_kv_heads=count)
    )
    bad(2, f"layer num_kv_heads={count}", errors.ConfigError, "num_kv_heads", str(count))(
        lambda count=count: layer(num_kv_heads=count)
    )
    bad(3, f"head_dim={count}", errors.ConfigError, "head_dim", str(count))(lambda count=count: create(head_dim=count))
    bad(3, f"RoPE({count})", errors.ConfigError, "head_dim", str(count))(lambda count=count: kvattn.RoPE(count))
    bad(3, f"layer head_dim={count}", errors.ConfigError, "head_dim", str(count))(
        lambda count=count: layer(head_dim=count)
    )
    bad(9, f"capacity={count}", errors.ConfigError, "capacity", str(count))(lambda count=count: create(capacity=count))
bad(3, "head_dim=3.5", errors.DTypeError, "head_dim", "3.5")(lambda: create(head_dim=3.5))
bad(3, "RoPE(3.5)", errors.DTypeError, "head_dim", "3.5")(lambda: kvattn.RoPE(3.5))
bad(3, "RoPE(3)", errors.ConfigError, "3")(lambda: kvattn.RoPE(3))
bad(3, "value_head_dim=0", errors.ConfigError, "value_head_dim", "0")(lambda: create(value_head_dim=0))
bad(3, "batch_size=-1", errors.ConfigError, "batch_size", "-1")(lambda: create(batch_size=-1))
for window in (0, -1):
    for what, call in (
        ("SlidingWindow", kvattn.SlidingWindow),
        ("window of a call", lambda w: step(window=w)),
        ("window of a layer", lambda w: layer("SlidingWindowAttention", window=w)),
        ("window of a mask", lambda w: Mask(window=w)),
    ):
        bad(4, f"{what} {window}", errors.RangeError, "window must be >= 1", str(window))(
            lambda call=call, window=window: call(window)
        )


@defined(5, "a window larger than the capacity is full causal attention")
def _():
    new = tokens(1, CHUNK)
    plain, _ = STEPS(*new, make_cache(FULL), implementation="xla")
    wide, _ = STEPS(*new, make_cache(FULL), implementation="xla", window=99)
    assert_same_bits(plain, wide, "outputs")
    assert np.asarray(kvattn.SlidingWindow(10).num_slots(4)) == 4


@defined(5, "a window that int32 does not hold")
def _():
    cache = step()[1]
    for window in (2**31 - 1, 2**31, np.uint64(2**63)):
        for call in (lambda **k: step(cache=cache, **k)[0], decode, paged):
            for implementation in suites.IMPLEMENTATIONS:
                plain = call(implementation=implementation)
                assert_same_bits(call(window=window, implementation=implementation), plain, "outputs")


@defined(6, "a window of 1: each token attends to itself only")
def _():
    cache = make_cache(FULL)
    for length in (CHUNK, 1):
        query, key, value = tokens(length, length)
        out, cache = STEPS(query, key, value, cache, implementation="xla", window=1)
        assert_same_bits(out, np.repeat(value, N // K, axis=2), "outputs")


for cap in (0, -1.0, np.nan, np.inf, 1e39, 10**400):
    for what, call in {**CALLS, "layer": layer}.items():
        bad(7, f"{what} softcap={str(cap)[:7]}", errors.RangeError, "softcap", str(cap))(
            lambda call=call, cap=cap: call(softcap=cap)
        )
for scale in (np.nan, np.inf, -np.inf, 1e39, -(10**400)):
    for what, call in {**CALLS, "layer": layer}.items():
        bad(8, f"{what} scale={str(scale)[:7]}", errors.RangeError, "scale", str(scale))(
            lambda call=call, scale=scale: call(scale=scale)
        )
for what, call in CALLS.items():
    for name in ("scale", "softcap"):
        for value in ("a", True, np.bool_(True), 1j, object(), np.asarray("a"), [[1.0], [1.0, 2.0]]):
            bad(8, f"{what} {name}={str(value)[:7]} {type(value).__name__}", errors.DTypeError, name, "a number")(
                lambda call=call, name=name, value=value: call(**{name: value})
            )
        for value in ([0.5], np.ones(8), jnp.ones((1,))):
            bad(8, f"{what} {name} of shape {np.shape(value)} {type(value).__name__}", errors.ShapeError, name)(
                lambda call=call, name=name, value=value: call(**{name: value})
            )
    bad(8, f"{what} traced scale of 8", errors.ShapeError, "scale", "(8,)")(
        lambda call=call: jax.jit(lambda scale: call(scale=scale))(np.ones(8, np.float32))
    )
    bad(8, f"{what} traced scale of bool", errors.DTypeError, "scale", "bool")(
        lambda call=call: jax.jit(lambda scale: call(scale=scale))(True)
    )


@defined(8, "scales and soft caps of any number type, scales also traced")
def _():
    for call in CALLS.values():
        plain = jax.tree.leaves(call(scale=0.25))[0]
        for scale in (np.float32(0.25), np.asarray(0.25), jnp.asarray(0.25), jnp.bfloat16(0.25)):
            assert_same_bits(jax.tree.leaves(call(scale=scale))[0], plain, "outputs")
        again = jax.jit(lambda scale, call=call: jax.tree.leaves(call(scale=scale))[0])(0.25)
        assert np.abs(np.asarray(again) - np.asarray(plain)).max() < 1e-6
        capped = jax.tree.leaves(call(softcap=2.0))[0]
        for cap in (2, np.float32(2), jnp.asarray(2.0)):
            assert_same_bits(jax.tree.leaves(call(softcap=cap))[0], capped, "outputs")


@defined(8, "scale=0: a uniform average")
def _():
    query, key, value = tokens(1, CHUNK)
    out, _ = STEPS(query, key, value, make_cache(FULL), implementation="xla", scale=0.0)
    mean = np.cumsum(value, axis=1) / np.arange(1, CHUNK + 1, dtype=np.float32)[None, :, None, None]
    assert np.abs(np.asarray(out) - np.repeat(mean, N // K, axis=2)).max() < 1e-6


bad(9, "no capacity for Full", errors.ConfigError, "capacity", "Full")(lambda: create(capacity=None))
bad(9, "capacity=4.0", errors.DTypeError, "capacity", "4.0")(lambda: create(capacity=4.0))
bad(11, "an unknown implementation", errors.ConfigError, "'cuda'", "'reference'", "'xla'", "'mosaic_gpu'")(
    lambda: step(implementation="cuda")
)
bad(11, "an unknown implementation in a sequence", errors.ConfigError, "'cuda'", "'xla'")(
    lambda: step(implementation=("xla", "cuda"))
)
bad(11, "no implementation at all", errors.ConfigError, "implementation")(lambda: step(implementation=()))
bad(11, "an implementation that is no name", errors.ConfigError, "implementation", "3")(lambda: step(implementation=3))
bad(11, "an unknown padding", errors.ConfigError, "padding", "'middle'", "'left'", "'right'")(
    lambda: step(padding="middle")
)
bad(11, "a policy by name", errors.ConfigError, "policy", "'full'")(lambda: create(policy="full"))
bad(11, "a policy that is a class", errors.ConfigError, "policy", "SlidingWindow")(
    lambda: create(policy=kvattn.SlidingWindow)
)
bad(11, "a codec by name", errors.ConfigError, "codec", "'int8'")(lambda: create(codec="int8"))
bad(11, "an unknown implementation of the mirror", errors.ConfigError, "'flash'", "'xla'")(
    lambda: mirror(implementation="flash")
)
bad(11, "a rope by name", errors.DTypeError, "rope", "'x'")(lambda: step(rope="x"))
for cache in (None, {"keys": 1}):
    bad(11, f"a cache that is {type(cache).__name__}", errors.DTypeError, "cache", "KVCache", type(cache).__name__)(
        lambda cache=cache: kvattn.cached_attention(*(ones(2, 1, 2, 8),) * 3, cache)
    )
bad(12, "num_sinks=-1", errors.ConfigError, "num_sinks", "-1")(lambda: Mask(window=4, num_sinks=-1))
bad(12, "StreamingLLM num_sinks=-1", errors.ConfigError, "num_sinks", "-1")(
    lambda: kvattn.policies.StreamingLLM(num_sinks=-1, window=4)
)
for name, call in (
    ("capacity", lambda x: create(capacity=x)),
    ("num_kv_heads", lambda x: create(num_kv_heads=x)),
    ("window", kvattn.SlidingWindow),
    ("window", lambda x: step(window=x)),
    ("num_new", lambda x: step(num_new=x)),
    ("num_tokens", lambda x: create().trim(x)),
    ("sinks", lambda x: step(sinks=x)),
):
    for flag in (True, np.bool_(True)):
        bad(14, f"{name}={flag!r}", errors.DTypeError, name)(lambda call=call, flag=flag: call(flag))

# Shapes and dtypes ----------------------------------------------------------------------------------------------------

for number, what, arrays, got in (
    (16, "head dim of query", (ones(2, 1, 2, 7), None, None), "7"),
    (16, "head dim of key", (None, ones(2, 1, 2, 7), None), "(2, 1, 2, 7)"),
    (16, "head dim of value", (None, None, ones(2, 1, 2, 7)), "(2, 1, 2, 7)"),
    (16, "heads of key", (None, ones(2, 1, 1, 8), None), "(2, 1, 1, 8)"),
    (16, "heads of value", (None, None, ones(2, 1, 1, 8)), "(2, 1, 1, 8)"),
    (17, "length of key", (None, ones(2, 2, 2, 8), None), "(2, 2, 2, 8)"),
    (17, "length of value", (None, None, ones(2, 3, 2, 8)), "(2, 3, 2, 8)"),
    (17, "batch of key", (None, ones(1, 1, 2, 8), None), "(1, 1, 2, 8)"),
    (17, "batch of all", (ones(3, 1, 2, 8),) * 3, "3"),
    (17, "query of rank 3", (ones(2, 2, 8), None, None), "(2, 2, 8)"),
    (17, "value of rank 3", (None, None, ones(2, 2, 8)), "(2, 2, 8)"),
    (17, "query of rank 0", (np.float32(1), None, None), "()"),
):
    bad(number, what, errors.ShapeError, got)(lambda arrays=arrays: step(*arrays))
bad(16, "sinks for other heads", errors.ShapeError, "sinks", "(3,)")(lambda: step(sinks=ones(3)))
bad(16, "alibi_slopes for other heads", errors.ShapeError, "alibi_slopes", "(1,)")(lambda: step(alibi_slopes=ones(1)))
bad(16, "a rope for another head dim", errors.ShapeError, "6", "8")(lambda: step(rope=kvattn.RoPE(6)))
bad(16, "features of a layer's input", errors.ShapeError, "17", "16")(lambda: layer()(ones(1, 3, 17)))
bad(17, "mirror: value longer than key", errors.ShapeError, "value")(lambda: mirror(value=ones(1, 4, 2, 8)))
bad(17, "mirror: batch", errors.ShapeError, "query")(lambda: mirror(query=ones(2, 3, 2, 8)))
bad(17, "mirror: ranks", errors.ShapeError, "query")(lambda: mirror(query=ones(3, 2, 8)))
for dtype in (np.int32, bool, np.complex64):
    for i, name in enumerate(("query", "key", "value")):
        wrong = [None, None, None]
        wrong[i] = ones(2, 1, 2, 8, dtype=dtype)
        bad(18, f"{name} of {np.dtype(dtype)}", errors.DTypeError, name, str(np.dtype(dtype)))(
            lambda wrong=wrong: step(*wrong)
        )


for what, call, shape in (("step", step, (2, 1, 2, 8)), ("decode", decode, (2, 2, 8)), ("paged", paged, (2, 2, 8))):
    bad(18, f"{what}: a float8 query", errors.DTypeError, "float8_e4m3fn", "cast")(
        lambda call=call, shape=shape: call(jnp.ones(shape, jnp.float8_e4m3fn))
    )
for what, call in (("decode", decode), ("paged", paged)):
    bad(18, f"{what}: a text as k", errors.DTypeError, "k", "'key'")(lambda call=call: call(ones(2, 2, 8), "key"))
    bad(18, f"{what}: a ragged list as v", errors.DTypeError, "v")(
        lambda call=call: call(ones(2, 2, 8), ones(2, 1, 4, 8), [[1.0], [1.0, 2.0]])
    )
    bad(18, f"{what}: a text as k_scales", errors.DTypeError, "k_scales", "'x'")(
        lambda call=call: call(ones(2, 2, 8), *(ones(2, 1, 4, 8, dtype=np.int8),) * 2, k_scales="x", v_scales="x")
    )


@defined(18, "keys, values and scales as lists")
def _():
    for call, shape in ((paged, (1, 4, 2)), (decode, (2, 1, 4))):
        codes, scales = np.arange(64, dtype=np.int8).reshape(*shape, 8), ones(*shape) / 9
        plain = call(ones(2, 2, 8), codes, codes, k_scales=scales, v_scales=scales)
        again = call(ones(2, 2, 8), codes, codes, k_scales=scales.tolist(), v_scales=jnp.asarray(scales))
        assert_same_bits(again, plain, "outputs")
        assert_same_bits(call(ones(2, 2, 8).tolist()), call(), "outputs")


bad(18, "mirror: an integer query", errors.DTypeError, "query", "int32")(
    lambda: _as_dtype_error(lambda: mirror(query=ones(1, 3, 2, 8, dtype=np.int32)))
)
for dtype in (jnp.int8, jnp.bool_, jnp.complex64, "text", jnp.float8_e4m3fn):
    bad(18, f"a cache of {dtype}", errors.DTypeError, "dtype")(lambda dtype=dtype: create(dtype=dtype))


def mixed(query_dtype, cache_dtype):
    """Queries of one dtype over a cache of another: the output is the query's, the error that of the narrower."""
    narrow = min(query_dtype, cache_dtype, key=lambda d: jnp.finfo(d).bits)
    lists, low = TokenLists(2), TokenLists(2, dtype=np.dtype(narrow))
    cache = create(dtype=cache_dtype, capacity=8)
    for seed, length in ((1, 3), (2, 1)):
        new = tokens(seed, length, 2, 8, 2, 2, 8)
        new = [new[0].astype(query_dtype), new[1].astype(query_dtype), new[2].astype(query_dtype)]
        out, cache = STEPS(*new, cache)
        assert out.dtype == query_dtype and cache.keys["data"].dtype == cache_dtype
        ref, low_ref = lists.append(*new)[0], low.append(*new)[0]
        assert_accurate(np.asarray(out).astype(narrow), ref, low_ref)


for query_dtype, cache_dtype in ((jnp.bfloat16, jnp.float32), (jnp.float32, jnp.bfloat16), (jnp.bfloat16, jnp.float16)):
    defined(19, f"query {jnp.dtype(query_dtype)}, cache {jnp.dtype(cache_dtype)}")(
        lambda q=query_dtype, c=cache_dtype: mixed(np.dtype(q), np.dtype(c))
    )


@defined(20, "float64 input without x64 is float32")
def _():
    out, cache = step(*(ones(2, 1, 2, 8, dtype=np.float64) for _ in range(3)), create(dtype=np.float64))
    assert out.dtype == cache.keys["data"].dtype == cache.dtype == jnp.float32


@defined(20, "with x64 it stays float64")
def _():
    with jax.enable_x64(True):
        lists, cache = TokenLists(2), create(dtype=np.float64, capacity=8)
        for seed, length in ((1, 3), (2, 1)):
            new = [x.astype(np.float64) for x in tokens(seed, length, 2, 8, 2, 2, 8)]
            out, cache = kvattn.cached_attention(*new, cache, implementation="reference")
            assert out.dtype == np.float64 and cache.keys["data"].dtype == np.float64
            assert np.abs(np.asarray(out) - lists.append(*new)[0]).max() < 1e-14


@defined(21, "float16 scores beyond 65504")
def _():
    for implementation in suites.IMPLEMENTATIONS:
        suites.check_large_scores(suites.CODECS[2], implementation)


def any_head_dim(size, value_size):
    """Correct at any head dim, on the reference and the fast path."""
    # Many rows and heads: with few numbers the largest error is luck.
    shape = {"batch_size": 4, "num_heads": 8, "num_kv_heads": 4, "head_dim": size, "value_head_dim": value_size}
    for implementation in suites.IMPLEMENTATIONS:
        cache = kvattn.KVCache.create(4, 4, size, capacity=5, dtype=jnp.float32, value_head_dim=value_size)
        truth, low = TokenLists(4), TokenLists(4, dtype=np.float32)
        outs = []
        for seed, length in ((1, 4), (2, 1)):
            new = tokens(seed, length, **shape)
            out, cache = STEPS(*new, cache, implementation=implementation)
            outs.append((np.asarray(out), truth.append(*new)[0], low.append(*new)[0]))
        assert_accurate(*(np.concatenate(x, axis=1) for x in zip(*outs, strict=True)))


QUICK_DIMS = (1, 59)
for size in (1, 24, 40, 59, 80, 96, 111, 160, 192, 256, 512):
    defined(22, f"head_dim={size}")(lambda size=size: any_head_dim(size, size))
defined(23, "head_dim=192, value_head_dim=128")(lambda: any_head_dim(192, 128))


@defined(24, "no rows, no tokens, one head")
def _():
    for batch, length in ((0, 1), (0, 3), (2, 0), (0, 0)):
        cache = create(batch_size=batch, num_kv_heads=1, value_head_dim=5)
        new = ones(batch, length, 1, 8), ones(batch, length, 1, 8), ones(batch, length, 1, 5)
        out, after = kvattn.cached_attention(*new, cache)
        assert out.shape == (batch, length, 1, 5) and out.dtype == jnp.float32
        assert jax.tree.structure(after) == jax.tree.structure(cache)
        assert np.asarray(after.lengths).tolist() == [0] * batch
        assert after.positions.shape == (batch, 4) and after.kept.shape == (batch,)
    for call in (
        lambda: decode(ones(0, 2, 8), ones(0, 1, 4, 8), ones(0, 1, 4, 5), [], return_lse=True),
        lambda: paged(ones(0, 2, 8), ones(1, 4, 2, 8), ones(1, 4, 2, 5), [], np.zeros((0, 3), int), return_lse=True),
    ):
        for out, lse in (call(), jax.jit(call)()):
            assert out.shape == (0, 2, 5) and lse.shape == (0, 2) and out.dtype == lse.dtype == jnp.float32
    out, lse = mirror(query=ones(1, 0, 2, 8), return_residual=True)
    assert out.shape == (1, 0, 2, 8) and lse.shape == (1, 0, 2)


@defined(25, "no keys at all")
def _():
    cache = kvattn.KVCache.from_encoder(ones(2, 0, 2, 8), ones(2, 0, 2, 8))
    out, _ = kvattn.cached_attention(ones(2, 3, 2, 8), None, None, cache)
    assert_same_bits(out, np.zeros((2, 3, 2, 8), np.float32), "outputs")
    out, lse = suites.attend(ones(2, 3, 2, 8), cache, np.tile(np.arange(3), (2, 1)), "xla", Mask(causal=False))
    assert_same_bits(lse, np.full((2, 3, 2), -np.inf, np.float32), "logsumexp")
    nothing = {"return_lse": True, "sinks": ones(2)}
    for implementation in suites.IMPLEMENTATIONS:
        for out, lse in (
            decode(ones(2, 2, 8), ones(2, 1, 0, 8), ones(2, 1, 0, 5), [0, 0], **nothing, implementation=implementation),
            *(
                paged(ones(2, 2, 8), ones(*pool, 8), ones(*pool, 5), [0, 0], table, **nothing)
                for pool, table in (((1, 4, 2), [[], []]), ((1, 0, 2), [[0], [7]]), ((1, 4, 0), [[0], [7]]))
            ),
        ):
            assert_same_bits(out, np.zeros((2, 2, 5), np.float32), "outputs")
            assert_same_bits(lse, np.full((2, 2), -np.inf, np.float32), "logsumexp")
    out, lse = mirror(key=ones(1, 0, 2, 8), value=ones(1, 0, 2, 8), return_residual=True)
    assert not np.asarray(out).any() and np.isneginf(np.asarray(lse)).all()


@defined(26, "NumPy input, not contiguous, read-only")
def _():
    query, key, value = tokens(1, 1, 2, 8, 2, 2, 8)
    plain, _ = step(query, key, value)
    odd = [np.repeat(x, 2, axis=1)[:, ::2][:, :, ::-1][:, :, ::-1] for x in (query, key, value)]
    for x in odd:
        x.flags.writeable = False
    again, _ = step(*odd)
    assert_same_bits(plain, again, "outputs")


for name, call in (
    ("capacity", lambda x: create(capacity=x)),
    ("head_dim", lambda x: create(head_dim=x)),
    ("batch_size", lambda x: create(batch_size=x)),
    ("window", kvattn.SlidingWindow),
    ("window", lambda x: step(window=x)),
    ("softcap", lambda x: step(softcap=x)),
    ("head_dim", kvattn.RoPE),
):
    bad(27, f"a traced {name}", errors.ConfigError, name, "traced")(lambda call=call: jax.jit(call)(4))
bad(28, "a key of random numbers as query", errors.DTypeError, "query")(
    lambda: step(jax.random.split(jax.random.key(0), (2, 1, 2, 8)))
)
bad(28, "a text as query", errors.DTypeError, "query")(lambda: step("query"))
bad(28, "None as query", errors.DTypeError, "query")(
    lambda: kvattn.cached_attention(None, ones(2, 1, 2, 8), ones(2, 1, 2, 8), create())
)
bad(28, "a text as key", errors.DTypeError, "key")(lambda: step(None, "key"))

# Lengths and positions ------------------------------------------------------------------------------------------------


@defined(29, "a row of length 0 beside others")
def _():
    suites.check_empty_rows("xla")


@defined(30, "all rows of length 0")
def _():
    out, cache = STEPS(*tokens(1, CHUNK), make_cache(FULL), np.zeros(B), implementation="xla")
    assert_same_bits(out, np.zeros((B, CHUNK, N, HV), np.float32), "outputs")
    assert not np.asarray(cache.check().lengths).any() and not np.asarray(cache.kept).any()


@defined(31, "length equal to the capacity")
def _():
    cache, lists = make_cache(FULL), FULL.oracle()
    for seed, count in enumerate((7, 7, 7, 3)):
        new = tokens(seed, CHUNK)
        out, cache = STEPS(*new, cache, np.full(B, count), implementation="xla")
        assert np.abs(np.asarray(out) - lists.append(*new, [count] * B)[0]).max() < 2e-6
    assert np.asarray(cache.check().kept).tolist() == [CAPACITY] * B
    suites.check_contents(FULL, cache, lists)


defined(32, "one more token at capacity")(lambda: suites.check_overflow(FULL, "xla", length=1))
defined(33, "a chunk larger than what is free")(lambda: suites.check_overflow(FULL, "xla"))
bad(32, "one more token at capacity, eagerly", errors.CapacityError, "rows [0, 1]", "4", "1")(
    lambda: step(cache=dataclasses.replace(create(), lengths=jnp.full((2,), 4, jnp.int32)))
)
bad(34, "num_new above T", errors.RangeError, "num_new", "3")(lambda: step(num_new=[1, 3]))
bad(34, "mirror: lengths above S", errors.RangeError, "key_value_seq_lengths", "99")(
    lambda: mirror(key_value_seq_lengths=np.asarray([99], np.int32))
)
bad(34, "encoder lengths above S", errors.RangeError, "lengths", "4")(
    lambda: kvattn.KVCache.from_encoder(ones(1, 3, 2, 8), ones(1, 3, 2, 8), [4])
)
bad(35, "num_new below 0", errors.RangeError, "num_new", "-1")(lambda: step(num_new=[-1, 1]))
bad(35, "mirror: negative lengths", errors.RangeError, "query_seq_lengths", "-3")(
    lambda: mirror(query_seq_lengths=np.asarray([-3], np.int32))
)
bad(35, "encoder lengths below 0", errors.RangeError, "lengths", "-1")(
    lambda: kvattn.KVCache.from_encoder(ones(1, 3, 2, 8), ones(1, 3, 2, 8), [-1])
)


@defined(35, "num_new out of range under jit: nothing done, recorded")
def _():
    new = tokens(1, CHUNK)
    counts = np.asarray([7, 8, -1, 0, 2**31 - 1, 3])
    out, cache = STEPS(*new, make_cache(FULL), counts, implementation="xla")
    wrong = np.asarray([False, True, True, False, True, False])
    assert ((np.asarray(cache.status) != 0) == wrong).all() and not np.asarray(out)[wrong].any()
    assert np.asarray(cache.lengths).tolist() == [7, 0, 0, 0, 0, 3]
    with pytest.raises(errors.RangeError, match=r"rows \[1, 2, 4\]"):
        cache.check()


bad(36, "num_new of floats", errors.DTypeError, "num_new", "float")(lambda: step(num_new=np.ones(2)))
bad(36, "num_new a float", errors.DTypeError, "num_new", "float")(lambda: step(num_new=1.0))
bad(36, "traced num_new of floats", errors.DTypeError, "num_new", "float32")(
    lambda: jax.jit(lambda n: step(num_new=n)[0])(np.ones(2, np.float32))
)
bad(36, "num_new for other rows", errors.ShapeError, "num_new", "(3,)")(lambda: step(num_new=[1, 1, 1]))
bad(36, "num_new of rank 2", errors.ShapeError, "num_new", "(2, 1)")(lambda: step(num_new=[[1], [1]]))
bad(36, "num_new beyond int32", errors.RangeError, "num_new", str(2**32 + 1))(
    lambda: step(num_new=np.asarray([2**32 + 1, 1]))
)


@defined(36, "num_new of int64, uint8, a list, one for all rows")
def _():
    for num_new in (np.asarray([1, 1]), np.asarray([1, 1], np.uint8), [1, 1], 1, np.int64(1), jnp.int32(1)):
        _, cache = step(num_new=num_new)
        assert cache.lengths.dtype == jnp.int32 and np.asarray(cache.lengths).tolist() == [1, 1]


for what, call in (
    ("lengths", lambda x: decode(ones(2, 2, 8), ones(2, 1, 4, 8), ones(2, 1, 4, 8), x)),
    ("lengths", lambda x: paged(ones(2, 2, 8), ones(1, 4, 2, 8), ones(1, 4, 2, 8), x)),
    ("starts", lambda x: decode(starts=x)),
    ("num_new", lambda x: step(num_new=x)),
):
    for big in (2**32 + 1, -(2**32) + 1, 2**63, 2**70):
        bad(36, f"{call.__code__.co_firstlineno} {what}: {big}", errors.RangeError, what, str(big))(
            lambda call=call, big=big: call([big, 1])
        )
    for value in ([[1], [1, 2]], "ab", [1.0, 1.0], [True, False]):
        bad(36, f"{call.__code__.co_firstlineno} {what}: {value}", errors.DTypeError, what)(
            lambda call=call, value=value: call(value)
        )
for big in (2**32, -(2**32), 2**32 + 3, 2**63, 2**70):
    bad(74, f"a page table of {big}", errors.RangeError, "page_table", str(big))(
        lambda big=big: paged(*(ones(2, 2, 8), ones(1, 4, 2, 8), ones(1, 4, 2, 8), [4, 2]), [[3, big], [1, 0]])
    )
for value in ([[1], [1, 2]], "ab", [[1.0], [1.0]]):
    bad(74, f"a page table of {value}", errors.DTypeError, "page_table")(
        lambda value=value: paged(*(ones(2, 2, 8), ones(1, 4, 2, 8), ones(1, 4, 2, 8), [1, 1]), value)
    )


@defined(74, "a page table whose tail holds what int32 does not, with x64 also under jit")
def _():
    pool = np.arange(64, dtype=np.float32).reshape(1, 4, 2, 8)
    attend = lambda table: paged(ones(2, 2, 8), pool, pool, [4, 2], table)
    plain = attend(np.asarray([[3, 0], [1, 0]], np.uint8))
    for tail in (2**32 + 2, -(2**40), 2**63 - 1):
        assert_same_bits(attend(np.asarray([[3, 0], [1, tail]])), plain, "outputs")
    with jax.enable_x64(True):
        out = jax.jit(attend)(np.asarray([[3, 2**32], [1, 2**32]]))
        assert_same_bits(out, np.asarray(plain) * np.asarray([0, 1], np.float32)[:, None, None], "outputs")
        starts = np.asarray([2**32 + 1, -(2**32) + 1])
        out = jax.jit(lambda starts: decode(starts=starts))(starts)
        assert_same_bits(out, ones(2, 2, 8) * np.asarray([0, 1], np.float32)[:, None, None], "outputs")


@defined(37, "lengths around the ends of blocks")
def _():
    counts = np.asarray([1, suites.BLOCK - 1, suites.BLOCK, suites.BLOCK + 1, 2 * suites.BLOCK - 1, 2 * suites.BLOCK])
    for implementation in suites.IMPLEMENTATIONS:
        cache, lists = make_cache(FULL), FULL.oracle()
        for seed, count in enumerate((np.minimum(counts - 1, CHUNK), None)):
            new = tokens(seed, CHUNK if count is not None else 1)
            out, cache = STEPS(*new, cache, count, implementation=implementation)
            assert np.abs(np.asarray(out) - lists.append(*new, count)[0]).max() < 2e-6
        assert np.asarray(cache.lengths).tolist() == counts.tolist()


@defined(38, "34 queries, one key: 33 empty rows, then its value")
def _():
    query, key, value = tokens(1, 34, 1, 4, 2, 2, 8)
    cache = kvattn.KVCache.create(1, 2, 8, capacity=4, dtype=jnp.float32, value_head_dim=4)
    out, cache = STEPS(query, key, value, cache, [1], padding="left")
    assert_same_bits(np.asarray(out)[:, :33], np.zeros((1, 33, 2, 4), np.float32), "rows of pads")
    assert_same_bits(np.asarray(out)[:, 33], value[:, 33], "the last row")
    assert np.asarray(cache.lengths).tolist() == [1]


bad(40, "a position past max_positions", errors.RangeError, "max_positions", "8")(
    lambda: kvattn.RoPE(8, max_positions=8)(ones(1, 1, 2, 8), np.asarray([8]))
)
bad(40, "a negative position", errors.RangeError, "positions", "-1")(
    lambda: kvattn.RoPE(8)(ones(1, 1, 2, 8), np.asarray([-1]))
)
bad(40, "a step past max_positions", errors.RangeError, "max_positions", "2")(
    lambda: step(*(ones(2, 3, 2, 8) for _ in range(3)), rope=kvattn.RoPE(8, max_positions=2))
)


@defined(40, "pads past max_positions take no position")
def _():
    new = (ones(2, 3, 2, 8) for _ in range(3))
    _, cache = step(*new, num_new=[2, 1], rope=kvattn.RoPE(8, max_positions=2))
    assert np.asarray(cache.lengths).tolist() == [2, 1]


@defined(41, "positions of 10^6, 2^24 + 1, 2^31 - 1")
def _():
    rope = kvattn.RoPE(64)
    frequencies = np.longdouble(10000.0) ** (-np.arange(32, dtype=np.longdouble) / 32)
    for position in (10**6, 2**24 + 1, 2**31 - 1):
        cos, sin = rope.cos_sin(np.asarray([position], np.int32))
        phase = np.longdouble(position) * frequencies
        for got, exact in ((cos, np.cos(phase)), (sin, np.sin(phase))):
            got = np.asarray(got, np.float64).ravel()
            assert got.shape[0] in (32, 64)
            assert np.abs(got[:32] - exact.astype(np.float64)).max() < 2.0**-22 + 1e-9


bad(41, "a position beyond int32", errors.RangeError, str(2**31))(
    lambda: kvattn.RoPE(8)(ones(1, 1, 2, 8), np.asarray([2**31]))
)
defined(42, "rotation after eviction")(lambda: suites.check_true_positions(RING, "xla"))


@defined(43, "left padding of 0, 1, all but one, all")
def _():
    counts = np.asarray([7, 6, 1, 0, 3, 5])
    new = tokens(1, CHUNK)
    left = [x.copy() for x in new]
    for b, count in enumerate(counts):
        for x, y in zip(left, new, strict=True):
            x[b, CHUNK - count :] = y[b, :count]
    right, cache = STEPS(*new, make_cache(FULL), counts, implementation="xla")
    out, left_cache = STEPS(*left, make_cache(FULL), counts, implementation="xla", padding="left")
    for b, count in enumerate(counts):
        same = np.asarray(right)[b, :count], np.asarray(out)[b, CHUNK - count :]
        assert np.abs(same[0] - same[1]).max(initial=0) < 1e-6
        assert not np.asarray(out)[b, : CHUNK - count].any()
    assert_same_bits(cache.lengths, left_cache.lengths, "lengths")
    for a, b in zip(cache.dense(), left_cache.dense(), strict=True):
        assert_same_bits(a, b, "contents")


@defined(44, "two prompts to one sequence: the second is appended")
def _():
    cache, lists = make_cache(FULL), FULL.oracle()
    for seed in (1, 2):
        new = tokens(seed, CHUNK)
        out, cache = STEPS(*new, cache, implementation="xla")
        assert np.abs(np.asarray(out) - lists.append(*new)[0]).max() < 2e-6
    suites.check_contents(FULL, cache, lists)


@defined(45, "decoding before any prompt: the new token only")
def _():
    for case in (FULL, RING):
        query, key, value = tokens(1, 1)
        out, _ = STEPS(query, key, value, make_cache(case), implementation="xla")
        assert_same_bits(out, np.repeat(value, N // K, axis=2), "outputs")


@defined(46, "131,072 tokens")
def _():
    rng = np.random.default_rng(0)
    key, value = (rng.normal(size=(1, 131072, 1, 8)).astype(np.float32) for _ in range(2))
    query = rng.normal(size=(1, 1, 4, 8)).astype(np.float32)
    args = query[0, 0], list(key[0]), list(value[0])
    (truth, lse64), (low, _) = attend_token(*args), attend_token(*args, dtype=np.float32)
    cache = kvattn.KVCache.from_encoder(key, value)
    for implementation in suites.IMPLEMENTATIONS:
        out, _ = STEPS(query, None, None, cache, implementation=implementation)
        assert_accurate(np.asarray(out)[0, 0], truth, low)
        out, lse = suites.attend(query, cache, [[0]], implementation, Mask(causal=False), scale=8**-0.5)
        assert_lse(np.asarray(lse)[0, 0], lse64)


# Masks and numerics ---------------------------------------------------------------------------------------------------


@defined(47, "mirror: a mask without any True in a row, beside an extra")
def _():
    mask = np.ones((1, 1, 3, 3), bool)
    mask[..., 1, :] = False
    for implementation in ("reference", "xla"):
        out, lse = mirror(mask=mask, softcap=5.0, return_residual=True, implementation=implementation)
        assert not np.asarray(out)[:, 1].any() and np.isneginf(np.asarray(lse)[:, 1]).all()
        assert np.asarray(out)[:, [0, 2]].all() and np.isfinite(np.asarray(lse)[:, [0, 2]]).all()


@defined(48, "mirror: a bias of -inf for a whole row, beside an extra")
def _():
    bias = np.zeros((1, 1, 3, 3), np.float32)
    bias[..., 1, :] = -np.inf
    for implementation in ("reference", "xla"):
        out, lse = mirror(bias=bias, softcap=5.0, return_residual=True, implementation=implementation)
        assert not np.asarray(out)[:, 1].any() and np.isneginf(np.asarray(lse)[:, 1]).all()
        assert np.isfinite(np.asarray(out)).all()


bad(49, "mirror: a bias of +inf", errors.RangeError, "bias", "+inf")(
    lambda: mirror(bias=np.full((1, 1, 3, 3), np.inf, np.float32))
)


@defined(49, "NaN in a real query stays in its own row")
def _():
    for implementation in suites.IMPLEMENTATIONS:
        new = tokens(1, CHUNK)
        clean, _ = STEPS(*new, make_cache(FULL), implementation=implementation)
        new[0][2, 3, 1] = np.nan
        out, cache = STEPS(*new, make_cache(FULL), implementation=implementation)
        broken = np.isnan(np.asarray(out)).any(-1)
        assert np.argwhere(broken).tolist() == [[2, 3, 1]]
        keep = ~broken
        assert_same_bits(np.asarray(out)[keep], np.asarray(clean)[keep], "the other rows")
        cache.check()


@defined(49, "NaN in the key of a real token is not seen before it comes, or after it left the window")
def _():
    for implementation in suites.IMPLEMENTATIONS:
        new = [x.copy() for x in tokens(1, CHUNK)]
        clean, cache = STEPS(*new, make_cache(FULL), implementation=implementation, window=3)
        new[1][2, 3] = np.nan
        out, cache = STEPS(*new, make_cache(FULL), implementation=implementation, window=3)
        broken = np.isnan(np.asarray(out)).any(axis=(2, 3))
        assert np.argwhere(broken).tolist() == [[2, 3], [2, 4], [2, 5]], "rows that see the token"
        assert_same_bits(np.asarray(out)[~broken], np.asarray(clean)[~broken], "rows that do not")
        out, _ = STEPS(*tokens(2, 1), cache, implementation=implementation, window=3)
        assert np.isfinite(np.asarray(out)).all(), "a later token that does not see it"


for what, call in CALLS.items():
    for x in (np.nan, np.inf, -np.inf):
        bad(49, f"{what} alibi_slopes of {x}", errors.RangeError, "alibi_slopes", str(x))(
            lambda call=call, x=x: call(alibi_slopes=np.asarray([0, x], np.float32))
        )
        if x != -np.inf:
            bad(49, f"{what} sinks of {x}", errors.RangeError, "sinks", "NaN or +inf", str(x))(
                lambda call=call, x=x: call(sinks=[0, x])
            )


@defined(49, "a sink of -inf takes nothing")
def _():
    for call in CALLS.values():
        out, plain = (jax.tree.leaves(call(**k))[0] for k in ({"sinks": np.full(2, -np.inf, np.float32)}, {}))
        assert np.abs(np.asarray(out) - np.asarray(plain)).max() < 1e-6


bad(50, "mirror: a mask of ints", errors.DTypeError, "mask", "int")(
    lambda: _as_dtype_error(lambda: mirror(mask=np.ones((1, 1, 3, 3), np.int32)))
)
bad(51, "mirror: a mask that does not broadcast", errors.ShapeError, "mask", "(1, 1, 3, 4)")(
    lambda: mirror(mask=np.ones((1, 1, 3, 4), bool))
)
bad(51, "mirror: a bias that does not broadcast", errors.ShapeError, "bias", "(1, 3, 3, 3)")(
    lambda: mirror(bias=np.ones((1, 3, 3, 3), np.float32))
)


def _as_dtype_error(call):
    """The mirror's dtype errors are ValueError as well, as jax.nn's: a subclass of DTypeError."""
    try:
        return call()
    except errors.DTypeError as error:
        assert isinstance(error, ValueError)
        raise errors.DTypeError(str(error)) from error


def scores_table(scores, value, implementation):
    """Output and logsumexp of one query over keys whose scores are as given."""
    scores = np.asarray(scores, np.float32)
    key = np.zeros((1, len(scores), 1, 2), np.float32)
    key[0, :, 0, 0] = scores
    query = np.asarray([1, 0], np.float32).reshape(1, 1, 1, 2)
    cache = kvattn.KVCache.from_encoder(key, np.asarray(value, np.float32).reshape(1, len(scores), 1, -1))
    out, lse = suites.attend(query, cache, [[0]], implementation, Mask(causal=False))
    return np.asarray(out)[0, 0, 0], np.asarray(lse)[0, 0, 0]


SPREAD = np.asarray([[1.5, -2], [3, 4.25], [-5, 6], [7, 8]], np.float32)


@defined(52, "one key with a score of -524288")
def _():
    for implementation in suites.IMPLEMENTATIONS:
        out, lse = scores_table([-524288.0], SPREAD[:1], implementation)
        assert_same_bits(out, SPREAD[0], "output")
        assert lse == -524288.0


@defined(53, "scores of +3e38 and -3e38 together")
def _():
    for implementation in suites.IMPLEMENTATIONS:
        out, lse = scores_table([3e38, -3e38, 3e38, 0], SPREAD, implementation)
        assert np.isfinite(out).all() and np.isfinite(lse)
        assert np.abs(out - (SPREAD[0] + SPREAD[2]) / 2).max() < 1e-6


@defined(54, "one key ahead by 10^4")
def _():
    for implementation in suites.IMPLEMENTATIONS:
        out, lse = scores_table([0, 1e4, -3, 5], SPREAD, implementation)
        assert_same_bits(out, SPREAD[1], "output")
        assert lse == 1e4


@defined(55, "equal keys: the exact mean")
def _():
    for implementation in suites.IMPLEMENTATIONS:
        out, lse = scores_table([0.7] * 4, SPREAD, implementation)
        assert_same_bits(out, SPREAD.mean(axis=0), "output")
        assert abs(lse - (np.float32(0.7) + np.log(4))) < 1e-6


@defined(56, "anything at all in unused memory")
def _():
    suites.check_dirty_memory(FULL, "xla")
    suites.check_dirty_memory(RING, "xla", poisons=("nan", "-inf"))


@defined(56, "anything on the empty side of a merge, also for gradients")
def _():
    nothing, some = (jnp.full((2, 3), jnp.nan), jnp.full(2, -jnp.inf)), (jnp.ones((2, 3)) * 3, jnp.zeros(2))
    for a, b, expected in ((some, nothing, 3), (nothing, some, 3), (nothing, nothing, 0)):
        total = lambda *state: sum(jnp.sum(jnp.where(jnp.isneginf(x), 0, x)) for x in kvattn.merge_states(*state))
        out, lse = kvattn.merge_states(*a, *b)
        assert_same_bits(out, np.full((2, 3), expected, np.float32), "outputs")
        assert np.asarray(lse).tolist() == ([0, 0] if expected else [-np.inf] * 2)
        grads = jax.grad(total, argnums=(0, 1, 2, 3))(*a, *b)
        for side, (out_grad, lse_grad) in ((a, grads[:2]), (b, grads[2:])):
            share = 0 if side is nothing else 1
            assert_same_bits(out_grad, ones(2, 3) * np.float32(share), "gradients of out")
            assert_same_bits(lse_grad, ones(2) * np.float32(share), "gradients of lse")


@defined(57, "subnormal keys and values")
def _():
    for implementation in suites.IMPLEMENTATIONS:
        out, lse = scores_table([1e-40, -1e-41], np.asarray([[1e-40, 2e-40], [3e-40, 0]]), implementation)
        assert np.abs(out).max() <= 4e-40 and abs(lse - np.log(2)) < 1e-6


@defined(58, "softcap=1 and scores far beyond it")
def _():
    cache, truth, low = make_cache(FULL), *(FULL.oracle(softcap=1.0, dtype=d) for d in (np.float64, np.float32))
    query, key, value = tokens(1, CHUNK)
    new = query * 100, key, value
    out, cache = STEPS(*new, cache, implementation="xla", softcap=1.0)
    assert_accurate(out, truth.append(*new)[0], low.append(*new)[0])


defined(59, "segments no query has")(suites.check_mask_rule)
defined(60, "mask, causality, window and lengths together")(lambda: suites.check_mirror_probes("xla"))

# jit and donation -----------------------------------------------------------------------------------------------------


def donated():
    """A cache that a donating step has eaten."""
    cache = create()
    x = ones(2, 1, 2, 8)
    _donating(x, x, x, cache)
    return cache


_donating = kvattn.jit(lambda query, key, value, cache: kvattn.cached_attention(query, key, value, cache))
for what, call in (
    ("in a step", lambda c: _donating(*(ones(2, 1, 2, 8) for _ in range(3)), c)),
    ("in a step outside jit", lambda c: step(cache=c)),
    ("in check", lambda c: c.check()),
    ("in trim", lambda c: c.trim(1)),
    ("in select", lambda c: c.select([0])),
    ("in reset", lambda c: c.reset(np.asarray([True, False]))),
):
    bad(133, f"a donated cache {what}", errors.StaleCacheError, "donated")(lambda call=call: call(donated()))


@bad(134, "one cache given twice to a step", errors.StaleCacheError, "twice")
def _():
    cache = create()
    x = ones(2, 1, 2, 8)
    both = kvattn.jit(
        lambda query, a, b: [kvattn.cached_attention(query, query, query, c)[1] for c in (a, b)], donate=("a", "b")
    )
    both(x, cache, cache)


@defined(135, "a NumPy view alive during donation")
def _():
    _, cache = step()
    view = np.asarray(cache.keys["data"])
    before = view.copy()
    x = ones(2, 1, 2, 8)
    out, cache = _donating(x, x, x, cache)
    assert_same_bits(view, before, "the view")
    assert np.asarray(out).all() and np.asarray(cache.lengths).tolist() == [2, 2]


@defined(136, "counts of any int type lead to one trace")
def _():
    shapes = [jax.tree.map(jax.typeof, step(num_new=n)[1]) for n in (1, np.int64(1), np.int32(1), jnp.int32(1), None)]
    assert all(jax.tree.leaves(s) == jax.tree.leaves(shapes[0]) for s in shapes)
    assert not any(x.weak_type for x in jax.tree.leaves(shapes[0]))
    assert jax.tree.leaves(shapes[0]) == jax.tree.leaves(jax.tree.map(jax.typeof, create()))


@defined(137, "scan, vmap, eval_shape, tree_map keep the structure")
def _():
    # What they compute is in test_verbs.py.
    cache, x = create(), jnp.ones((2, 1, 2, 8))
    one = lambda c: kvattn.cached_attention(x, x, x, c)[1]
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), cache)
    for same in (
        jax.eval_shape(one, cache),
        jax.eval_shape(lambda c: jax.lax.scan(lambda c, _: (one(c), None), c, None, length=2)[0], cache),
        jax.eval_shape(jax.vmap(one), stacked),
        jax.tree.map(lambda a: a, cache),
    ):
        assert jax.tree.structure(same) == jax.tree.structure(cache)


@defined(138, "the gradient of a decode step is there")
def _():
    # Its value is in test_verbs.py.
    _, cache = step()
    new = [jnp.asarray(x) for x in tokens(1, 1, 2, 8, 2, 2, 8)]
    weights = jnp.arange(8, dtype=jnp.float32)
    total = lambda q, k, v: jnp.sum(kvattn.cached_attention(q, k, v, cache)[0] * weights[None, None, None])
    for grad in jax.grad(total, argnums=(0, 1, 2))(*new):
        assert np.isfinite(np.asarray(grad)).all() and np.asarray(grad).any(axis=(1, 2, 3)).all()


SLOW = {"131,072 tokens"}
SLOW |= {r.what for r in TABLE.rows if r.number in (22, 23) and r.what not in [f"head_dim={n}" for n in QUICK_DIMS]}


@pytest.mark.parametrize("row", TABLE.parameters(SLOW))
def test_bad_input(row):
    run(row)


def test_rows_covered():
    """Every row of the parts this file is about, but those named above or tested elsewhere."""
    assert TABLE.numbers() == {*range(1, 61), 74, *range(133, 139)} - {10, 13, 15, 39}


def test_every_listed_input_has_a_row():
    """In one of the tables, or a file that the list names."""
    elsewhere = {number: found[1] for number, text in LIST.items() if (found := re.search(r"\[(.*)\]", text))}
    assert all((pathlib.Path(__file__).parent / file).exists() for file in elsewhere.values())
    rows = {*range(1, 61), *range(61, 81), *range(81, 104), *range(105, 139), *range(146, 154)}
    rows -= {13, 15, 39}  # as their files assert
    assert set(LIST) == rows | set(elsewhere)
