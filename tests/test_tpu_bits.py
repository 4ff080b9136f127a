"""Codes and scales as the TPU kernel widens them, every one there is: in JAX's TPU interpreter, against NumPy."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kvattn.codecs import grouped
from kvattn.pallas import tpu_bits


def run(kernel, shapes, *inputs):
    """Results of a kernel that is given whole arrays."""
    out = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return [np.asarray(x) for x in pl.pallas_call(kernel, out_shape=out, interpret=pltpu.InterpretParams())(*inputs)]


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.uint8], ids=str)
def test_every_float8(dtype):
    """Also -0, which is NaN in the type that they are read as; and NaN, which becomes a number."""
    bits = np.arange(256, dtype=np.uint8)
    codes = np.broadcast_to(bits[:, None], (256, 128))

    def kernel(codes, out):
        out[...] = tpu_bits.float8(codes[...]).astype(jnp.float32) * tpu_bits.FLOAT8_UNIT

    (out,) = run(kernel, [(256, 128)], jax.lax.bitcast_convert_type(jnp.asarray(codes), dtype))
    expected = bits.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    expected[[0x7F, 0xFF]] = 480, -480
    np.testing.assert_array_equal(out, np.broadcast_to(expected[:, None], out.shape))


def test_every_code_of_four_bits():
    """Which row is of which half of which byte, both ways."""
    codes = np.random.default_rng(0).permutation(np.arange(8 * 128 * 2) % 16).reshape(2, 8, 128).astype(np.uint8)

    def kernel(codes, signed, *nibbles):
        words = pltpu.bitcast(codes[...], jnp.uint32)
        signed[...] = tpu_bits.signed(words).astype(jnp.float32)
        for out, (plane, odd) in zip(nibbles, ((0, 0), (0, 1), (1, 0), (1, 1)), strict=True):
            out[...] = tpu_bits.nibbles(words, plane, odd).astype(jnp.float32)

    signed, *nibbles = run(kernel, [(16, 128), *[(4, 128)] * 4], jnp.asarray(codes[0] | codes[1] << 4))
    np.testing.assert_array_equal(signed, codes.swapaxes(0, 1).reshape(16, 128).astype(np.float32) - tpu_bits.CENTRE)
    for out, (plane, odd) in zip(nibbles, ((0, 0), (0, 1), (1, 0), (1, 1)), strict=True):
        np.testing.assert_array_equal(out, codes[plane, odd::2].astype(np.float32) + tpu_bits.OFFSET)


@pytest.mark.parametrize("coarse", [False, True])
def test_every_scale_and_minimum(coarse):
    """Subnormal float16 too; not infinity and NaN, which no stored token has."""
    limit = 0x7F80 if coarse else 0x7C00
    magnitudes = np.arange(limit, dtype=np.uint16)
    magnitudes = np.resize(magnitudes[(magnitudes == 0) | (magnitudes >= 0x80)] if coarse else magnitudes, (8, 4096))
    scale = jnp.asarray(magnitudes | (0x8000 if coarse else 0))
    minimum = jnp.asarray(magnitudes | (np.arange(4096, dtype=np.uint16)[None] % 2 << 15))

    def kernel(scale, minimum, step, low):
        step[...], low[...] = tpu_bits.pair(scale[...], minimum[...])

    for got, expected in zip(
        run(kernel, [(8, 4096)] * 2, scale, minimum), grouped.unpack_pair(scale, minimum), strict=True
    ):
        np.testing.assert_array_equal(got, expected)


def test_what_devices_have():
    for kind, int4, float8 in (
        ("TPU7x", True, True),
        ("TPU v6 lite", True, False),
        ("TPU v5 lite", False, False),
        ("TPU v4", False, False),
        (None, False, False),
    ):
        assert tpu_bits.Native.of(kind) == tpu_bits.Native(int4, float8)
