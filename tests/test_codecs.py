"""Codecs against what the papers say, written a second time in NumPy, and attention over what they store."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import variants
from codec_cases import (
    FLOAT32,
    KIVI,
    TOKENWISE,
    B,
    H,
    bound,
    kivi_replay,
    over_decoded,
    step_of,
    there_and_back,
)
from oracles import assert_same_bits

import kvattn
from kvattn import errors
from kvattn.codecs import base, grouped, plain, scaled
from kvattn.codecs import float8 as float8_file
from kvattn.codecs import int8 as int8_file

POLICIES = tuple(policy for policy in variants.POLICIES.values() if not policy.in_order)

name = lambda x: variants.name(x) if not isinstance(x, int) else str(x)
each_codec = pytest.mark.parametrize("codec", (*TOKENWISE, KIVI), ids=name)
each_tokenwise = pytest.mark.parametrize("codec", TOKENWISE, ids=name)


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def worst(x):
    """NaN in the dtype of an array: of packed scales and minima too, which are read from the bits of integers."""
    return jnp.full_like(x, jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).max)


# Numbers --------------------------------------------------------------------------------------------------------------


@each_tokenwise
@pytest.mark.parametrize("size", (1, 5, 16, 80, 96, 112))
def test_round_trip(codec, size):
    x = normal(3, 4, size)
    assert (np.abs(there_and_back(codec, x) - x) <= bound(codec, x)).all()


@each_tokenwise
@pytest.mark.parametrize("largest", (0.0, 1e-40, 1e-30, 1e-5, 2e-4, 0.3, 1e4, 1e5, FLOAT32.max))
def test_any_magnitude_stays_finite_and_within_the_bound(codec, largest):
    x = np.random.default_rng(0).uniform(-1, 1, (4, H)) * largest
    x[1] = largest  # constant
    x[2] = np.linspace(0, 1e-3, H)
    x[2, 3] = largest  # one outlier
    x[3] = -largest / 2 + np.abs(x[3]) / 4
    x = x.astype(np.float32)
    back = there_and_back(codec, x)
    assert np.isfinite(back).all()
    assert (np.abs(back - x) <= bound(codec, x)).all()


@each_tokenwise
def test_zeros_and_even_steps_are_exact(codec):
    x = np.zeros((3, H), np.float32)
    x[1] = 3.0
    x[2] = (
        np.tile([0, 15, 1, 14, 2, 13, 3, 12], 2)
        if isinstance(codec, kvattn.Int4)
        else np.where(np.arange(H) % 2, 2.0, -2.0)
    )
    encoded = codec.encode(jnp.asarray(x))
    exact = isinstance(codec, kvattn.Int4)
    np.testing.assert_allclose(there_and_back(codec, x), x, rtol=0 if exact else 1e-6, atol=0 if not exact else 4e-3)
    assert (there_and_back(codec, x)[0] == 0).all()
    if not exact:
        assert np.isfinite(np.asarray(encoded["scale"])).all() and (np.asarray(encoded["scale"]) > 0).all()


def test_int4_keeps_constant_groups_that_16_bits_can_hold():
    x = np.stack([np.full(H, c, np.float32) for c in (0.5, -3.0, 2.0**-30, 1.5 * 2.0**100, -1e-3)])
    back = there_and_back(kvattn.Int4(8), x)
    assert (back[:4] == x[:4]).all()
    assert np.abs(back[4] / -1e-3 - 1).max() < 2e-5


def test_int4_narrow_groups_far_from_zero():
    """FlexGen's reciprocal scale overflows below a range of 2.3e-4."""
    x = (np.linspace(0, 2e-4, H) + 1e-4).astype(np.float32)[None]
    assert np.abs(there_and_back(kvattn.Int4(H), x) - x).max() <= 2e-4 / 15 / 2 * 1.02


def test_int8_is_symmetric_and_rounds_half_to_even():
    x = np.array([[127.0, -127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5]], np.float32)
    encoded = kvattn.Int8().encode(jnp.asarray(x))
    assert np.asarray(encoded["scale"]).item() == 1
    assert np.asarray(encoded["data"])[0].tolist() == [127, -127, 0, 2, 2, 0, -2, 126]


def test_float8_saturates():
    x = jnp.asarray([[448.0, -448.0, 1.0, 0.0]], jnp.float32)
    encoded = kvattn.Float8().encode(x)
    largest = np.asarray(float8_file.widen(encoded["data"]))[0, :2]
    assert largest.tolist() == [448, -448]
    for top in np.random.default_rng(0).uniform(1e-6, 1e6, 200).astype(np.float32):
        assert np.abs(float8_file.widen(kvattn.Float8().encode(jnp.full((1, 2), top))["data"])).max() == 448


def test_float8_bits_are_widened_exactly():
    bits = np.arange(256, dtype=np.uint8)
    real = (bits & 0x7F) != 0x7F
    expected = np.asarray(jax.lax.bitcast_convert_type(jnp.asarray(bits), jnp.float8_e4m3fn).astype(jnp.float32))
    assert_same_bits(np.asarray(float8_file.widen(jnp.asarray(bits)))[real], expected[real])


def test_float16_bits_are_widened_exactly():
    """All of them, infinities and NaN included."""
    bits = np.arange(2**16, dtype=np.uint16).view(np.float16)
    np.testing.assert_array_equal(plain.widen_float16(jnp.asarray(bits)), bits.astype(np.float32))


def test_unused_float8_is_not_read_whatever_its_bits():
    """Where it is a type of its own, as on accelerators, NaN is NaN."""
    data = jnp.full((1, 1, 3, 4), jnp.nan, jnp.float8_e4m3fn).at[:, :, 0].set(2)
    values = {"data": data.astype(jnp.float32), "scale": jnp.asarray([[[[1.0, jnp.nan, jnp.inf]]]])}
    probs, filled = jnp.asarray([[[[0.5, 0, 0]]]], jnp.float32), jnp.asarray([[[True, False, False]]])
    np.testing.assert_array_equal(scaled.mix_scaled(probs, values, filled), np.ones((1, 1, 1, 4)))


@pytest.mark.parametrize("bits", (2, 4, 8))
def test_packing(bits):
    """Number j of a token lies in byte j % F, in the bits bits * (j // F) and up."""
    every = np.arange(256, dtype=np.uint8)
    assert_same_bits(grouped.pack(grouped.unpack(jnp.asarray(every), bits), bits), every)
    size, width = 13, -(-13 // (8 // bits))
    codes = np.random.default_rng(0).integers(0, 2**bits, size, dtype=np.uint8)
    expected = np.zeros(width, np.uint8)
    for j, code in enumerate(codes):
        expected[j % width] |= code << (bits * (j // width))
    assert_same_bits(grouped.pack(jnp.asarray(codes), bits), expected)
    assert_same_bits(grouped.unpack(jnp.asarray(expected), bits)[:size], codes)


def test_scales_and_minima_cover_the_group():
    rng = np.random.default_rng(0)
    ends = np.sort(rng.normal(size=(2000, 2)) * 10.0 ** rng.uniform(-30, 30, (2000, 1)), axis=1).astype(np.float32)
    scale, minimum = grouped.unpack_pair(*grouped.pack_pair(jnp.asarray(ends[:, 0]), jnp.asarray(ends[:, 1]), 15))
    scale, minimum = np.asarray(scale, np.float64), np.asarray(minimum, np.float64)
    span = ends[:, 1].astype(np.float64) - ends[:, 0]
    assert (minimum <= ends[:, 0]).all()
    assert (minimum + 15 * scale >= ends[:, 1] * (1 - 1e-6 * np.sign(ends[:, 1]))).all()
    assert (15 * scale <= span * 1.01 + np.abs(ends).max(1) * 2.0**-7).all()


@pytest.mark.parametrize("size", (H, 80, 13))
@pytest.mark.parametrize("transposed", (False, True))
@each_tokenwise
def test_products_are_those_of_the_decoded_tokens(codec, transposed, size):
    x, query = normal(B, 2, 5, size), normal(B, 2, 3, size, seed=1)
    encoded = codec.encode(jnp.asarray(x))
    decoded = there_and_back(codec, x)
    lie = {n: e.swapaxes(-1, -2) if transposed or n in codec.token_minor else e for n, e in encoded.items()}
    scores = codec.scores(jnp.asarray(query), lie, transposed)
    np.testing.assert_allclose(scores, np.einsum("bkmh,bkrh->bkmr", query, decoded), atol=3e-5)
    probs = np.abs(normal(B, 2, 3, 5, seed=2))
    filled = np.array([[[1, 1, 0, 1, 0]]] * B, bool)
    # What is not filled is the worst there is, in every array's own dtype.
    encoded = {n: jnp.where(jnp.asarray(filled)[..., None], e, worst(e)) for n, e in encoded.items()}
    lie = {n: e.swapaxes(-1, -2) if n in codec.token_minor else e for n, e in encoded.items()}
    mixed = codec.mix(jnp.asarray(np.where(filled[:, :, None], probs, 0)), lie, jnp.asarray(filled))
    expected = np.einsum("bkmr,bkrh->bkmh", np.where(filled[:, :, None], probs, 0), decoded)
    np.testing.assert_allclose(mixed[..., :size], expected, atol=2e-5)


def test_per_channel_keys_beat_per_token_keys():
    """At two bits, where a few channels are much larger: the reason for KIVI."""
    keys = normal(128, 64) * np.where(np.arange(64) % 16 == 0, 8, 1)
    keys = (keys + np.where(np.arange(64) % 16 == 0, 20, 0)).astype(np.float32)

    def error(x, size):
        codes, scale, minimum = grouped.quantise(jnp.asarray(x), 2, size)
        return np.linalg.norm(np.asarray(grouped.dequantise(codes, scale, minimum, size)) - x) / np.linalg.norm(x)

    assert error(keys.T, 32) < 0.7 * error(keys, 32) < 0.7 * error(keys, 64) * 1.01


# Attention ------------------------------------------------------------------------------------------------------------


def new_tokens(length, heads, kv_heads, seed, size=H):
    return tuple(
        jnp.asarray(normal(B, length, h, size, seed=seed + i)) for i, h in enumerate((heads, kv_heads, kv_heads))
    )


def cases():
    for codec in TOKENWISE:
        for policy in (kvattn.Full(), *POLICIES):
            yield codec, policy
    yield KIVI, kvattn.Full()


def combinations():
    """Every codec with every policy and head count; GQA with Full, and one with H2O, in the quick tier."""
    for codec, policy in cases():
        for kv_heads in (4, 2, 1):
            h2o = policy == POLICIES[2] and isinstance(codec, kvattn.Int8)
            quick = kv_heads == 2 and (isinstance(policy, kvattn.Full) or h2o)
            yield pytest.param(codec, policy, kv_heads, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("codec", "policy", "kv_heads"), list(combinations()), ids=name)
def test_attention_is_attention_over_the_decoded_cache(codec, policy, kv_heads):
    """MHA, GQA and MQA; and the reference says the same as the loop over blocks."""
    capacity = variants.capacity_of(policy, 24)
    cache = kvattn.KVCache.create(B, kv_heads, H, capacity=capacity, policy=policy, codec=codec, dtype=jnp.float32)
    evicts = policy.per_head  # after it attended
    for i, length in enumerate((11, 1, 1)):
        new = new_tokens(length, 4, kv_heads, 10 * i)
        out, after = step_of()(*new, cache)
        if length == 1 or i == 0:
            same, _ = step_of("reference")(*new, cache)
            np.testing.assert_allclose(out, same, atol=2e-6)
        if length == 1 and not evicts:
            np.testing.assert_allclose(out, over_decoded(np.asarray(new[0]), after), atol=2e-6)
        cache = after
    cache.check()


@each_codec
def test_tokens_are_those_that_were_given(codec):
    """Against the tokens themselves: the right keys with the right values, at the right scale."""
    cache = kvattn.KVCache.create(B, 2, H, capacity=24, codec=codec, dtype=jnp.float32)
    _, key, value = new_tokens(13, 4, 2, 0)
    value = value * 7  # scales of keys and values differ, so swapped ones show
    _, cache = step_of()(new_tokens(13, 4, 2, 5)[0], key, value, cache)
    for got, given in zip(cache.dense(), (key, value), strict=True):
        given = np.asarray(given.swapaxes(1, 2))
        error = np.linalg.norm(np.asarray(got)[:, :, :13] - given) / np.linalg.norm(given)
        assert error < (0.4 if codec is KIVI else 0.12)


@each_tokenwise
@pytest.mark.parametrize(
    "policy",
    (
        pytest.param(kvattn.Full(), marks=pytest.mark.slow),
        pytest.param(POLICIES[1], marks=pytest.mark.slow),
        POLICIES[0],
    ),
    ids=name,
)
def test_chunking_changes_nothing(codec, policy):
    new = new_tokens(13, 4, 2, 0)
    outs = []
    for chunks in ((13,), (1,) * 13, (5, 1, 7)):
        capacity = 24 if isinstance(policy, kvattn.Full) else None
        cache = kvattn.KVCache.create(B, 2, H, capacity=capacity, policy=policy, codec=codec, dtype=jnp.float32)
        parts, start = [], 0
        for length in chunks:
            out, cache = step_of()(*(x[:, start : start + length] for x in new), cache)
            parts.append(out)
            start += length
        outs.append((np.concatenate(parts, axis=1), cache))
    for out, cache in outs[1:]:
        np.testing.assert_allclose(out, outs[0][0], atol=2e-6)
        jax.tree.map(assert_same_bits, (cache.keys, cache.values), (outs[0][1].keys, outs[0][1].values))


@each_codec
def test_what_lies_in_unused_slots_never_matters(codec):
    cache = kvattn.KVCache.create(B, 2, H, capacity=24, codec=codec, dtype=jnp.float32)
    _, cache = step_of()(*new_tokens(11, 4, 2, 0), cache)

    dirty = jax.tree.map(worst, (cache.keys, cache.values))
    clean = kvattn.KVCache.create(B, 2, H, capacity=24, codec=codec, dtype=jnp.float32)
    dirty = dataclasses.replace(clean, keys=dirty[0], values=dirty[1])
    new = new_tokens(11, 4, 2, 0)
    lengths = jnp.asarray([11, 4], jnp.int32)
    for implementation in ("xla", "reference"):
        step = step_of(implementation)
        results = []
        for cache in (clean, dirty):
            out, cache = step(*new, cache, num_new=lengths)
            more, cache = step(*(x[:, :1] for x in new), cache)
            results.append((out, more))
        jax.tree.map(assert_same_bits, *results)
        assert np.isfinite(np.asarray(results[0][1])).all()


@each_codec
def test_derivatives_of_the_query(codec):
    cache = kvattn.KVCache.create(B, 2, H, capacity=24, codec=codec, dtype=jnp.float32)
    _, cache = step_of()(*new_tokens(11, 4, 2, 0), cache)
    query, key, value = new_tokens(1, 4, 2, 30)

    def loss(query, implementation):
        out, _ = kvattn.cached_attention(query, key, value, cache, implementation=implementation)
        return jnp.sum(out * out)

    got, expected = (jax.jit(jax.grad(loss), static_argnums=1)(query, i) for i in ("xla", "reference"))
    np.testing.assert_allclose(got, expected, atol=1e-5)
    step, at = 1e-2, (0, 0, 1, 3)
    slope = (loss(query.at[at].add(step), "reference") - loss(query.at[at].add(-step), "reference")) / (2 * step)
    assert abs(float(expected[at]) - float(slope)) < 2e-3


# KIVI -----------------------------------------------------------------------------------------------------------------


def coded(x, axis, size, bits):
    """Decoded numbers and half a scale of groups along an axis of [S, H], in float64 (scales exact)."""
    x = np.moveaxis(np.asarray(x, np.float64), axis, -1)
    groups = x.reshape(*x.shape[:-1], -1, size)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    scale = (high - low) / (2**bits - 1)
    back = low + scale * np.round((groups - low) / np.where(scale == 0, 1, scale))
    return tuple(np.moveaxis((y + 0 * groups).reshape(x.shape), -1, axis) for y in (back, scale))


@pytest.mark.parametrize(
    "codec",
    (KIVI, *(pytest.param(c, marks=pytest.mark.slow) for c in (kvattn.KIVI(4, 4, 4), kvattn.KIVI(2, 8, 16)))),
    ids=str,
)
def test_kivi_replay(codec):
    """After any chunks, ragged too, the cache holds what lists of tokens say: exact ones, and coded ones."""
    total = np.array([29, 18])
    key, value = (np.asarray(x) for x in new_tokens(29, 4, 2, 0)[1:])
    stores = []
    for chunks in (
        ((29, 18),),
        ((5, 5),) * 2 + ((1, 1),) + ((18, 7),),
        ((8, 8), (8, 0), (8, 8), (5, 2)),
        ((1, 1),) * 18 + ((11, 0),),
    ):
        cache = kvattn.KVCache.create(B, 2, H, capacity=32, codec=codec, dtype=jnp.float32)
        start = np.zeros(B, int)
        for chunk in chunks:
            length = max(chunk)
            index = np.clip(start[:, None] + np.arange(length), 0, 28)[:, :, None, None]
            new = [jnp.asarray(np.take_along_axis(x, index, axis=1)) for x in (key, value)]
            _, cache = step_of()(jnp.zeros((B, length, 4, H)), *new, cache, num_new=jnp.asarray(chunk, jnp.int32))
            start += chunk
        assert (start == total).all() and (np.asarray(cache.check().lengths) == total).all()
        stores.append([np.asarray(x) for x in cache.dense()])
    for b, n in enumerate(total):
        for got in stores[1:]:
            for x, y in zip(got, stores[0], strict=True):
                assert_same_bits(x[b, :, :n], y[b, :, :n])
        coded_keys, coded_values = kivi_replay(key[b, :n], value[b, :n], codec)
        assert len(coded_keys) == n - n % codec.residual and len(coded_values) == max(n - codec.residual, 0)
        for head in range(2):
            for got, given, which, axis in (
                (stores[0][0], key, coded_keys, 0),
                (stores[0][1], value, coded_values, 1),
            ):
                got, given = got[b, head, :n], given[b, :n, head]
                rest = sorted(set(range(n)) - set(which))
                assert_same_bits(got[rest], given[rest])
                expected, scale = coded(given[which], axis, codec.group_size, codec.bits)
                assert (np.abs(got[which] - given[which]) <= scale / 2 * 1.02 + 2e-3).all()
                assert np.mean(np.abs(got[which] - expected) < 0.05 * scale + 4e-3) > 0.9


def test_kivi_at_and_around_whole_residuals():
    """0 to 25 tokens, 0, 8, 16 and 24 among them, five at a time: coded, or bit for bit as they came.

    One row per length, written without attention; over memory that is NaN.
    """
    counts, size = np.arange(26), KIVI.residual
    key, value = normal(26, 25, 1, H), normal(26, 25, 1, H, seed=1) * 3
    cache = kvattn.KVCache.create(26, 1, H, capacity=32, codec=KIVI, dtype=jnp.float32)
    cache = dataclasses.replace(cache, keys=jax.tree.map(worst, cache.keys), values=jax.tree.map(worst, cache.values))

    @jax.jit
    def write(cache, key, value, num_new):
        t = jnp.arange(5, dtype=jnp.int32)[None]
        slots = jnp.where(t < num_new[:, None], cache.lengths[:, None] + t, -1)
        return cache.write(slots, key, value).replace(lengths=cache.lengths + num_new)

    for start in range(0, 25, 5):
        num_new = np.clip(counts - start, 0, 5).astype(np.int32)
        cache = write(cache, key[:, start : start + 5], value[:, start : start + 5], num_new)
    keys, values = (np.asarray(x)[:, 0] for x in jax.jit(lambda c: c.dense())(cache.check()))
    for n in counts:
        for got, given, count, axis in (
            (keys[n], key[n, :, 0], n - n % size, 0),
            (values[n], value[n, :, 0], max(n - size, 0), 1),
        ):
            assert_same_bits(got[count:n], given[count:n], f"the last of {n}")
            if not count:
                continue
            expected, scale = coded(given[:count], axis, KIVI.group_size, KIVI.bits)
            # Scales and minima of 16 bits: a number on the edge between two codes may take the other one.
            off = np.abs(got[:count] - expected)
            assert (off <= scale * 1.02 + 2e-2).all()
            assert np.mean(off < 0.02 * scale + 4e-3) > 0.9
            assert np.mean(got[:count] != given[:count]) > 0.9, f"of {n}, {count} are to be coded"


def kivi_block(rows_of_groups, seed):
    """One block of any bits, its last 4 tokens as they came, and its tokens; what is not to be read is NaN."""
    rng, size = np.random.default_rng(seed), KIVI.residual
    codes = rng.integers(0, 4, (B, 1, size, H))
    scale, minimum = rng.random((2, B, 1, *rows_of_groups)).astype(np.float16)  # no sign bit: they are float16
    residual = rng.normal(size=codes.shape).astype(np.float32)
    exact = np.arange(size) >= size - 4
    axis = rows_of_groups.index(min(rows_of_groups)) - 2
    each = lambda x: np.repeat(x.astype(np.float64), KIVI.group_size, axis).swapaxes(-1, -2)
    tokens = np.where(exact[:, None], residual, each(minimum) + each(scale) * codes)
    scale[..., scale.shape[-1] // 2 :] = np.nan
    residual[..., ~exact, :] = np.nan
    planes = codes.reshape(*codes.shape[:-1], 4, H // 4) << np.array([[0], [2], [4], [6]])
    pair = {"scale": scale.view(np.uint16), "minimum": minimum.view(np.uint16)}
    block = {"data": planes.sum(-2, dtype=np.uint8), **pair, "residual": residual, "exact": np.stack([exact] * B)}
    return jax.tree.map(jnp.asarray, block), tokens


def test_kivi_reads_codes_and_what_came_last():
    """Scores and mixtures of one block, decoded in NumPy."""
    (keys, key), (values, value) = kivi_block((H, 2), 0), kivi_block((4, KIVI.residual), 1)
    query, probs = normal(B, 1, 2, H), np.random.default_rng(2).random((B, 1, 2, KIVI.residual)).astype(np.float32)
    filled = np.arange(KIVI.residual) % 4 != 1
    probs *= filled
    scores, mixed = jax.jit(lambda q, k, p, v, f: (KIVI.scores(q, k, False), KIVI.mix(p, v, f)))(
        query, keys, probs, values, np.stack([filled[None]] * B)
    )
    np.testing.assert_allclose(scores, query @ key.swapaxes(-1, -2), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(mixed[..., :H], probs @ value, rtol=1e-5, atol=1e-5)


def test_kivi_reads_the_residual_where_nothing_is_encoded():
    """Of 9 tokens 8 keys and 1 value are encoded, of 3 none; a block says which of its tokens are read as they came."""
    cache = kvattn.KVCache.create(2, 1, H, capacity=16, codec=KIVI, dtype=jnp.float32)
    view = cache.replace(lengths=jnp.asarray([9, 3], jnp.int32)).view()
    blocks = [[read(jnp.int32(i))["exact"] for i in range(2)] for read in (view.key_block, view.value_block)]
    keys, values = (np.concatenate(b, axis=1) for b in blocks)
    assert [np.nonzero(row)[0].tolist() for row in keys] == [[8], [0, 1, 2]]
    assert [np.nonzero(row)[0].tolist() for row in values] == [[1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 2]]


def test_kivi_says_which_tokens_its_residual_holds():
    """Row r holds the last token whose position is r modulo the residual, if there is one."""
    size, counts = KIVI.residual, [0, 3, 8, 9, 23]
    residual = normal(1, len(counts), 1, size, H)
    ((positions, tokens),) = KIVI.as_they_came({"residual": jnp.asarray(residual)}, jnp.asarray(counts, jnp.int32))
    held = [[max([p for p in range(n) if p % size == row], default=-1) for row in range(size)] for n in counts]
    assert positions.tolist() == held
    assert_same_bits(tokens, residual[0])


def test_kivi_keeps_the_last_of_a_long_chunk():
    """As many as the residual holds, and one more: all but the first are there as they came."""
    x = normal(2, 1, KIVI.residual + 1, H)
    cache = kvattn.KVCache.create(2, 1, H, capacity=16, codec=KIVI, dtype=jnp.float32)
    slots = np.stack([np.r_[: KIVI.residual, -1], np.r_[: KIVI.residual + 1]]).astype(np.int32)
    written = jax.jit(lambda c, s, x: KIVI.write(c.values, c.store, "values", s, x))(cache, slots, x)
    ring = np.asarray(written["residual"])[0]
    assert_same_bits(ring[0], x[0, :, : KIVI.residual], "as many as it holds")
    assert_same_bits(ring[1], x[1][:, np.r_[KIVI.residual, 1 : KIVI.residual]], "one more")


@pytest.mark.slow
def test_kivi_of_a_large_residual_is_exact():
    cache = kvattn.KVCache.create(B, 2, H, capacity=24, codec=kvattn.KIVI(2, 4, 16), dtype=jnp.float32)
    plain = kvattn.KVCache.create(B, 2, H, capacity=24, dtype=jnp.float32)
    for i, length in enumerate((9, 1, 1, 4)):
        new = new_tokens(length, 4, 2, 10 * i)
        out, cache = step_of()(*new, cache)
        expected, plain = step_of()(*new, plain)
        np.testing.assert_allclose(out, expected, atol=1e-6)


def test_kivi_of_eight_bits_is_close():
    new = new_tokens(24, 4, 2, 0)
    caches = [
        kvattn.KVCache.create(B, 2, H, capacity=32, codec=c, dtype=jnp.float32) for c in (None, kvattn.KIVI(8, 4, 8))
    ]
    outs = []
    for cache in caches:
        _, cache = step_of()(*new, cache)
        outs.append(step_of()(*(x[:, :1] for x in new), cache)[0])
    np.testing.assert_allclose(*outs, atol=1e-2)
    assert np.abs(outs[0] - outs[1]).max() > 0


@pytest.mark.parametrize("policy", POLICIES, ids=name)
def test_kivi_refuses_policies_that_reuse_slots(policy):
    with pytest.raises(errors.UnsupportedError, match=rf"KIVI.*{type(policy).__name__}.*share their scales"):
        kvattn.KVCache.create(B, 2, H, capacity=24, policy=policy, codec=KIVI)


@pytest.mark.parametrize("settings", ({"bits": 3}, {"residual": 48}, {"residual": 16}, {"group_size": 0}))
def test_kivi_settings(settings):
    with pytest.raises(errors.ConfigError):
        kvattn.KIVI(**settings)


def test_kivi_trims_only_what_it_has_as_it_was():
    cache = kvattn.KVCache.create(B, 2, H, capacity=32, codec=KIVI, dtype=jnp.float32)
    _, cache = step_of()(*new_tokens(9, 4, 2, 0), cache, num_new=jnp.asarray([9, 6], jnp.int32))
    with pytest.raises(errors.UnsupportedError, match=r"rows \[0\]"):
        cache.trim(1)
    with pytest.raises(errors.UnsupportedError, match="codec"):
        jax.jit(lambda cache: cache.trim(1))(cache).check()
    trimmed = cache.trim(jnp.asarray([0, 2], jnp.int32))
    assert np.asarray(trimmed.lengths).tolist() == [9, 4]


def test_trim_asks_the_codec_too():
    """Of 8 and 9 tokens 8 are encoded: the last one cannot be taken back. Of 6 none is."""
    cache = kvattn.KVCache.create(3, 1, H, capacity=16, codec=KIVI).replace(lengths=jnp.asarray([9, 6, 8], jnp.int32))
    with pytest.raises(errors.UnsupportedError, match=r"rows \[0, 2\].*codec"):
        cache.trim(1)
    trimmed = jax.jit(lambda cache: cache.trim(1))(cache)
    assert np.asarray(trimmed.lengths).tolist() == [9, 5, 8]
    with pytest.raises(errors.UnsupportedError, match="codec"):
        trimmed.check()


# Bad values, sizes ----------------------------------------------------------------------------------------------------


@each_codec
@pytest.mark.parametrize("bad", (np.nan, np.inf, -np.inf))
def test_values_that_are_not_finite(codec, bad):
    query, key, value = new_tokens(1, 4, 2, 0)
    cache = kvattn.KVCache.create(B, 2, H, capacity=8, codec=codec, dtype=jnp.float32)
    broken = value.at[1, 0, 1, 3].set(bad)
    with pytest.raises(errors.RangeError, match=r"rows \[1\]"):
        kvattn.cached_attention(query, key, broken, cache)
    clean, _ = step_of()(query, key, value, cache)
    out, after = step_of()(query, key, broken, cache)
    assert np.asarray(after.status).tolist() == [0, 8]
    with pytest.raises(errors.RangeError, match=r"rows \[1\]"):
        after.check()
    assert_same_bits(out[0], clean[0])
    assert not np.isfinite(np.asarray(out)[1, 0, 2:]).all(), "a value that cannot be encoded became a number"
    # A pad is not encoded.
    out, after = step_of()(query, key, broken, cache, num_new=jnp.asarray([1, 0], jnp.int32))
    after.check()
    assert (np.asarray(out)[1] == 0).all()


@pytest.mark.parametrize("codec", (kvattn.Int8(), kvattn.Float8(), kvattn.Int4(32)), ids=name)
@pytest.mark.parametrize("bad", (np.nan, np.inf))
def test_not_finite_among_many_heads(codec, bad):
    """XLA's largest number of many rows passes over NaN on CPUs: what is stored, and its status, must not."""
    x = np.random.default_rng(0).normal(size=(9, 1, 8, 64)).astype(np.float32)
    x[2, 0, 1, 3] = bad
    for encode in (codec.encode, jax.jit(codec.encode)):
        decoded = np.asarray(codec.decode(encode(jnp.asarray(x)), 64, jnp.float32))
        assert not np.isfinite(decoded[2, 0, 1, 3])
        assert (
            np.isfinite(np.delete(decoded[2, 0], 1, axis=0)).all() and np.isfinite(np.delete(decoded, 2, axis=0)).all()
        )


@pytest.mark.parametrize(
    ("codec", "bits"),
    ((kvattn.Int8(), 8.25), (kvattn.Float8(), 8.25), (kvattn.Int4(), 4.5), (kvattn.KIVI(), 3.0)),
    ids=name,
)
def test_bits_per_number(codec, bits):
    """From `nbytes`, and equal to what the compiled program takes."""
    rows, capacity = 2, 1024
    cache = jax.eval_shape(lambda: kvattn.KVCache.create(rows, 2, 128, capacity=capacity, codec=codec))
    query, key = (jax.ShapeDtypeStruct((rows, 1, heads, 128), jnp.bfloat16) for heads in (4, 2))
    lowered = jax.jit(lambda q, k, v, c: kvattn.cached_attention(q, k, v, c), donate_argnums=3).lower(
        query, key, key, cache
    )
    memory = lowered.compile().memory_analysis()
    arguments = 2 * (rows * 4 * 128 + 2 * rows * 2 * 128)
    assert memory.argument_size_in_bytes == cache.nbytes + arguments
    assert memory.alias_size_in_bytes == cache.nbytes
    beside = rows * (4 + 4)  # lengths and status
    residual = sum(x.size * 2 for s in (cache.keys, cache.values) for n, x in s.items() if n == "residual")
    assert (cache.nbytes - beside - residual) * 8 / (2 * rows * 2 * capacity * 128) <= bits


# The tests above can fail ---------------------------------------------------------------------------------------------


def fails(test, *args):
    step_of.cache_clear()
    jax.clear_caches()
    try:
        test(*args)
    except AssertionError:
        return True
    finally:
        step_of.cache_clear()
        jax.clear_caches()
    return False


def test_caught_127_5(monkeypatch):
    monkeypatch.setattr(int8_file, "TOP", 127.5)
    assert fails(test_int8_is_symmetric_and_rounds_half_to_even)


def test_caught_swapped_scales(monkeypatch):
    block = base.Codec.block
    original = kvattn.KVCache.view

    def view(cache, *positions, **held):
        seen = original(cache, *positions)
        keys, values = dict(seen.keys), dict(seen.values)
        keys["scale"], values["scale"] = values["scale"], keys["scale"]
        return dataclasses.replace(seen, keys=keys, values=values)

    monkeypatch.setattr(kvattn.KVCache, "view", view)
    assert block is base.Codec.block
    assert fails(test_tokens_are_those_that_were_given, kvattn.Int8())


def test_caught_unclipped_float8(monkeypatch):
    monkeypatch.setattr(float8_file, "scale_for", lambda x, top: scaled.scale_for(x, 500.0))
    monkeypatch.setattr(float8_file, "TOP", 500.0)
    assert fails(test_float8_saturates)


def test_caught_dropped_minimum(monkeypatch):
    once = grouped.pair_once
    monkeypatch.setattr(grouped, "pair_once", lambda s, m: (once(s, m)[0], jnp.zeros_like(once(s, m)[1])))
    assert fails(test_attention_is_attention_over_the_decoded_cache, kvattn.Int4(8), kvattn.Full(), 2)


def test_caught_nibble_order(monkeypatch):
    plane = grouped.plane
    monkeypatch.setattr(grouped, "plane", lambda data, bits, index: plane(data, bits, 8 // bits - 1 - index))
    assert fails(test_packing, 4)
    assert fails(test_tokens_are_those_that_were_given, kvattn.Int4(8))


def test_caught_scale_of_unused_slots(monkeypatch):
    def mix(probs, values, filled):
        return scaled.factors("bkmr,bkrh->bkmh", probs * values["scale"], values["data"])

    monkeypatch.setattr(int8_file, "mix_scaled", mix)
    assert fails(test_what_lies_in_unused_slots_never_matters, kvattn.Int8())


@pytest.mark.slow
def test_caught_keys_flushed_late(monkeypatch):
    block = kvattn.KIVI.block

    def late(codec, store, role, i, counts):
        return block(codec, store, role, i, counts - 1 if role == "keys" else counts)

    monkeypatch.setattr(kvattn.KIVI, "block", late)
    assert fails(test_kivi_replay, KIVI)
