"""`kvattn.pallas.compat` against the formulas of JAX's deprecated kernels, in float64."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvattn
from kvattn import errors
from kvattn.pallas.compat import gpu_paged_attention, gqa, mqa, tpu_paged_attention

B, N, K, S, H, R, W = 3, 8, 2, 40, 16, 8, 5


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def expected(q, k, v, start, length, scale, cap=None):
    """k, v [B, S, K, H]: normalised output, sum relative to the maximum, maximum."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out, total, top = np.zeros(q.shape), np.zeros(q.shape[:2]), np.zeros(q.shape[:2])
    for b in range(len(q)):
        for n in range(q.shape[1]):
            kv, seen = n // (q.shape[1] // k.shape[2]), slice(start[b], length[b])
            scores = k[b, seen, kv] @ q[b, n] * scale
            scores = scores if cap is None else cap * np.tanh(scores / cap)
            top[b, n] = scores.max()
            weights = np.exp(scores - top[b, n])
            total[b, n] = weights.sum()
            out[b, n] = weights @ v[b, seen, kv] / total[b, n]
    return out, total, top


@pytest.mark.parametrize("name", ["mqa", "gqa"])
def test_contiguous(name):
    heads = 1 if name == "mqa" else K
    q, k, v = normal(B, N, H), normal(B, S, heads, H, seed=1), normal(B, S, heads, H, seed=2)
    call = mqa if name == "mqa" else gqa
    given = (q, k[:, :, 0], v[:, :, 0]) if name == "mqa" else (q, k, v)
    start, length = np.array([0, 3, 7]), np.array([S, 20, 8])
    out, total, top = expected(q, k, v, start, length, 0.25)
    np.testing.assert_allclose(call(*given, start, length, block_k=32, k_splits=2), out, atol=2e-6)
    got, (l, m) = call(*given, start, length, return_residuals=True)
    for a, b in ((got, out), (l, total), (m, top)):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)
    raw, _ = call(*given, start, length, return_residuals=True, normalize_output=False)
    np.testing.assert_allclose(raw, out * total[..., None], rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(call(*given), expected(q, k, v, [0] * B, [S] * B, 0.25)[0], atol=2e-6)
    np.testing.assert_allclose(call(*given, 2, 30, 0.5), expected(q, k, v, [2] * B, [30] * B, 0.5)[0], atol=2e-6)
    if name == "mqa":
        alone = mqa(*given, start, length, normalize_output=False)
        np.testing.assert_array_equal(alone, raw)
    else:
        with pytest.raises(errors.UnsupportedError, match="return_residuals"):
            gqa(*given, normalize_output=False)
    scaled = jax.jit(lambda scale: call(*given, start, length, scale))(0.5)
    np.testing.assert_allclose(scaled, expected(q, k, v, start, length, 0.5)[0], atol=2e-6)


def test_pages():
    q, pools = normal(B, N, H), [normal(K, B * W, R, H, seed=s) for s in (1, 2)]
    table = np.random.default_rng(0).permutation(B * W).reshape(B, W).astype(np.int32)
    lengths = jnp.asarray([S, 17, 1], jnp.int32)
    dense = [np.moveaxis(np.asarray(p)[:, table].reshape(K, B, S, H), 0, 2) for p in pools]
    for cap in (None, 3.0):
        out = expected(q, *dense, [0] * B, lengths, 1.0, cap)[0]
        got = gpu_paged_attention(q, *pools, table, lengths, attn_logits_soft_cap=cap, k_splits=1)
        np.testing.assert_allclose(got, out, atol=5e-6)
        got = tpu_paged_attention(q, *pools, lengths, table, attn_logits_soft_cap=cap, pages_per_compute_block=1)
        np.testing.assert_allclose(got, out, atol=5e-6)
    np.testing.assert_allclose(
        gpu_paged_attention(q, *pools, table, None), expected(q, *dense, [0] * B, [S] * B, 1.0)[0], atol=5e-6
    )
    codes = [jnp.round(p * 30).astype(jnp.int8) for p in pools]
    scales = [jnp.abs(normal(K, B * W, R, seed=s)) / 30 for s in (5, 6)]
    wide = [np.asarray(c, np.float32) * np.asarray(s)[..., None] for c, s in zip(codes, scales, strict=True)]
    dense = [np.moveaxis(p[:, table].reshape(K, B, S, H), 0, 2) for p in wide]
    out = expected(q, *dense, [0] * B, lengths, 1.0)[0]
    got = gpu_paged_attention(q, *codes, table, lengths, *scales)
    np.testing.assert_allclose(got, out, atol=5e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from jax.experimental.pallas.ops.tpu.paged_attention.quantization_utils import QuantizedTensor
    quantised = [QuantizedTensor(c, s[..., None] * 127.5) for c, s in zip(codes, scales, strict=True)]
    np.testing.assert_allclose(tpu_paged_attention(q, *quantised, lengths, table), out, atol=5e-6)
    with pytest.raises(errors.RangeError, match="page 15"):
        gpu_paged_attention(q, *pools, np.full((B, W), B * W), lengths)


@pytest.mark.parametrize("dtypes", [("int8", "float32"), ("float32", "int8"), ("bfloat16", "float16")], ids="-".join)
def test_pages_of_two_dtypes(dtypes):
    """JAX's GPU kernel takes keys and values of different dtypes, scales for either alone."""
    q, table = normal(B, N, H), np.random.default_rng(0).permutation(B * W).reshape(B, W).astype(np.int32)
    lengths, scales, wide = np.asarray([S, 17, 1]), [], []
    pools = [normal(K, B * W, R, H, seed=s) for s in (1, 2)]
    for i, dtype in enumerate(dtypes):
        scale = jnp.abs(normal(K, B * W, R, seed=i + 5)) / 30 if dtype == "int8" else None
        pools[i] = (jnp.round(pools[i] * 30) if dtype == "int8" else pools[i]).astype(dtype)
        scales.append(scale)
        wide.append(np.asarray(pools[i], np.float64) * (1 if scale is None else np.asarray(scale)[..., None]))
    dense = [np.moveaxis(p[:, table].reshape(K, B, S, H), 0, 2) for p in wide]
    out = expected(q, *dense, [0] * B, lengths, 1.0)[0]
    atol = 2e-2 if dtypes[1] == "float16" else 5e-6
    np.testing.assert_allclose(gpu_paged_attention(q, *pools, table, lengths, *scales), out, atol=atol)
    rules = {"k_scales": scales[0], "v_scales": scales[1], "scale": 1.0, "implementation": "reference"}
    attend = lambda q: kvattn.pallas.paged_decode_attention(q, *pools, lengths, table, **rules)
    np.testing.assert_allclose(attend(q), out, atol=5e-6)
    total = lambda call: jax.grad(lambda q: jnp.sum(call(q) ** 2))(q)
    slope = total(lambda q: gpu_paged_attention(q, *pools, table, lengths, *scales))
    np.testing.assert_allclose(slope, total(attend), atol=20 * atol)


def test_integers_are_not_wrapped():
    q, k = normal(B, N, H), normal(B, S, K, H, seed=1)
    pool, table = normal(K, B * W, R, H, seed=2), np.zeros((B, W), np.int64)
    for call in (
        lambda x: gqa(q, k, k, x),
        lambda x: gqa(q, k, k, None, x),
        lambda x: mqa(q, k[:, :, 0], k[:, :, 0], x),
        lambda x: mqa(q, k[:, :, 0], k[:, :, 0], None, x),
        lambda x: gpu_paged_attention(q, pool, pool, table, x),
        lambda x: tpu_paged_attention(q, pool, pool, x, table),
        lambda x: gpu_paged_attention(q, pool, pool, table + x[:, None], [1] * B),
        lambda x: tpu_paged_attention(q, pool, pool, [1] * B, table + x[:, None]),
    ):
        assert np.isfinite(call(np.asarray([1, 2, 3]))).all()
        for wraps in (2**32 + 1, 1 - 2**32):
            with pytest.raises(errors.RangeError, match=str(wraps)):
                call(np.asarray([wraps, 2, 3]))
    for call in (
        lambda: gqa(q, k, k, np.ones((2, 2), int)),
        lambda: gqa(q, k[:, :, 0], k),
        lambda: gpu_paged_attention(q, pool, pool, table[0], None),
    ):
        with pytest.raises(errors.ShapeError):
            call()


def test_names():
    assert set(dir(kvattn.pallas.compat)) >= {"mqa", "gqa", "gpu_paged_attention", "tpu_paged_attention"}
    with pytest.raises(AttributeError, match="mha"):
        _ = kvattn.pallas.compat.mha
