"""`kvattn.pallas.decode_attention` and `paged_decode_attention` against NumPy in float64.

Scales of keys and values differ, and so do head dims, lengths of heads and starts of rows.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvattn
import kvattn.pallas

B, N, K, S, H, HV, R = 3, 4, 2, 12, 8, 16, 4
LENGTHS = np.array([[12, 3], [0, 8], [5, 12]])
STARTS = np.array([2, 0, 4])
SINKS = np.array([0.5, -1.0, 0.0, 2.0], np.float32)
SLOPES = np.array([0.5, 0.25, 0.125, 0.0625], np.float32)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def expected(q, k, v, lengths, starts=(0, 0, 0), scale=None, window=None, softcap=None, sinks=None, alibi_slopes=None):
    """One query after the other, over the slots from `starts` to `lengths`."""
    out, lse = np.zeros((B, N, v.shape[-1])), np.full((B, N), -np.inf)
    for b, n in np.ndindex(B, N):
        length = lengths[b, n // (N // K)]
        first = max(starts[b], 0 if window is None else length - window)
        seen = np.arange(first, length)
        if not seen.size:
            continue
        scores = k[b, n // (N // K), seen] @ q[b, n] * (1 / np.sqrt(q.shape[-1]) if scale is None else scale)
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        if alibi_slopes is not None:
            scores = scores + alibi_slopes[n] * (seen - (length - 1))
        weights = np.exp(scores)
        total = weights.sum() + (0 if sinks is None else np.exp(sinks[n]))
        out[b, n], lse[b, n] = weights @ v[b, n // (N // K), seen] / total, np.log(total)
    return out, lse


def stored(dtype):
    """Keys and values as they are given, and as numbers: those of the keys have eight times the scale."""
    q, k, v = normal(B, N, H), normal(B, K, S, H, seed=1) * 2, normal(B, K, S, HV, seed=2)
    if dtype == "float32":
        return q, k, v, {}, k, v
    codec = kvattn.Int8() if dtype == "int8" else None
    given, wide, scales = [], [], {}
    for name, x in (("k_scales", k), ("v_scales", v)):
        scale = np.abs(normal(B, K, S, seed=len(given) + 5)) * (0.01 if name == "k_scales" else 0.08) + 0.001
        codes = np.clip(np.round(x / scale[..., None]), -127, 127)
        codes = jnp.asarray(codes, jnp.int8) if codec else jnp.asarray(codes, jnp.float32).astype(jnp.float8_e4m3fn)
        given.append(codes)
        wide.append(np.asarray(codes.astype(jnp.float32), np.float64) * scale[..., None])
        scales[name] = jnp.asarray(scale)
    return q, *given, scales, *wide


def pools(x):
    """[B, K, S, F] as pages [K, P, R, F] of the table below; [B, K, S] likewise."""
    paged = np.zeros((K, B * S // R, R, *x.shape[3:]), np.float32)
    for b, column in np.ndindex(B, S // R):
        paged[:, TABLE[b, column]] = np.asarray(jnp.asarray(x).astype(jnp.float32))[
            :, :, column * R : (column + 1) * R
        ][b]
    return jnp.asarray(paged).astype(x.dtype)


TABLE = np.random.default_rng(3).permutation(B * S // R).reshape(B, S // R)


@functools.cache
def call(paged, **rules):
    function = kvattn.pallas.paged_decode_attention if paged else kvattn.pallas.decode_attention
    return jax.jit(functools.partial(function, return_lse=True, **rules))


@pytest.mark.parametrize(
    ("dtype", "implementation"), [("float32", "xla"), ("int8", "xla"), ("float8", "xla"), ("int8", "reference")]
)
def test_plain(dtype, implementation):
    """Default scale, the lengths of every head; contiguous and in pages."""
    q, k, v, scales, *wide = stored(dtype)
    for paged in (False, True):
        given = (q, pools(k), pools(v), LENGTHS, TABLE) if paged else (q, k, v, LENGTHS)
        own = {name: pools(x) for name, x in scales.items()} if paged else scales
        results = call(paged, implementation=implementation)(*given, **own)
        for got, want in zip(results, expected(q, *wide, LENGTHS), strict=True):
            np.testing.assert_allclose(got, want, atol=2e-5 if dtype == "float32" else 2e-4)


def test_rules():
    """Starts, window, cap, sinks and slopes of contiguous arrays; the same of pages, which have no starts."""
    q, k, v, *_ = stored("float32")
    rules = {"scale": 0.7, "window": 6, "softcap": 1.5}
    arrays = {"sinks": SINKS, "alibi_slopes": SLOPES}
    want = expected(q, k, v, LENGTHS, STARTS, **rules, **arrays)
    got = call(False, implementation="reference", **rules)(q, k, v, LENGTHS, starts=STARTS, **arrays)
    assert np.isneginf(want[1]).sum() == 2  # a row that sees nothing has no sink either
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    got = call(True, implementation="reference", **rules)(q, pools(k), pools(v), LENGTHS, TABLE, **arrays)
    for a, b in zip(got, expected(q, k, v, LENGTHS, **rules, **arrays), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    same = kvattn.pallas.decode_attention(jnp.asarray(q, jnp.bfloat16), k, v, LENGTHS[:, 0], implementation="reference")
    assert same.dtype == jnp.bfloat16 and same.shape == (B, N, HV)


def test_a_page_that_is_not_there_under_jit():
    """Its row is empty, the others are what they are; behind the last token a table may say anything."""
    q, k, v, *_ = stored("float32")
    good = call(True, implementation="reference")(q, pools(k), pools(v), LENGTHS, TABLE)
    for page in (-1, B * S // R, 2**30):
        table = TABLE.copy()
        table[0, 2] = table[1, 2] = page  # row 1 has no token there
        for got, same in zip(
            call(True, implementation="reference")(q, pools(k), pools(v), LENGTHS, table), good, strict=True
        ):
            np.testing.assert_array_equal(got[1:], same[1:])
            np.testing.assert_array_equal(got[0], -np.inf if got.ndim == 2 else 0)
