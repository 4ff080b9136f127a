"""The matrix unit that every GPU since Ampere has (`mma`, 16 x 8 x 16), where `gpu_tile` would ask for `wgmma`.

Operands are read into registers first: 64 rows of the left one at a time, 16 for each warp, all of the right one by
every warp. Accumulators lie in registers as those of `wgmma` do, so scores and outputs are the same to everybody else.
"""

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from kvattn._typing import Array
from kvattn.pallas.gpu_spec import F32, Spec

ROWS, SIDE = plgpu.Layout.MMA_LHS, plgpu.Layout.MMA_RHS


def left(matrix: Any, dtype: DTypeLike) -> Array:
    """A left operand in registers: a matrix [M, F] in shared memory, of numbers or of codes that become `dtype`."""
    return plgpu.load(matrix, layout=ROWS(dtype), optimized=False)


def summed(spec: Spec, shape: tuple[int, int], pairs: list[tuple[Any, Any]]) -> Array:
    """The sum of products, float32 [M, N], in the order of `pairs`.

    JAX's interpreter has no `mma`: a plain product stands in there.

    Args:
        spec: the sizes.
        shape: (M, N), M a multiple of 64, N of 8.
        pairs: left operands [M, F], in shared memory or from `left`, and right ones [F, N] in shared memory.
    """
    total = plgpu.layout_cast(jnp.zeros(shape, F32), plgpu.Layout.WGMMA)
    for a, b in pairs:
        dtype = b.dtype
        for first in range(0, b.shape[0], spec.cut):
            count = min(spec.cut, b.shape[0] - first)
            some = pl.ds(first, count)
            x = a[:, first : first + count] if isinstance(a, jax.Array) else left(a.at[:, some], dtype)
            y = plgpu.load(b.at[some], layout=SIDE(dtype), optimized=False)
            if spec.interpreted:
                total = total + lax.dot_general(x, y, (((1,), (0,)), ((), ())), preferred_element_type=F32)
            else:
                total = plgpu.mma(total, x, y)
    return total


def widened(codes: Array, dtype: DTypeLike) -> Array:
    """int8 as bfloat16, or eight-bit floats as float16, by their bits: conversions are slow, or not there at all.

    To seven bits of a number from 0 to 127, set as digits of 128, comes the sign as 128 or 256 to be taken off. The
    exponent of float16 is a bit longer than that of float8_e4m3fn, and counts from eight less. NaN becomes a number:
    where a token has one, so has its scale.
    """
    bits = lax.bitcast_convert_type(codes, jnp.uint8).astype(jnp.uint16)
    if dtype == jnp.bfloat16:
        number, sign = (
            lax.bitcast_convert_type(bits & jnp.uint16(m) | jnp.uint16(0x4300), dtype) for m in (0x7F, 0x80)
        )
        return number - sign
    found = (bits & jnp.uint16(0x80)) << jnp.uint16(8) | (bits & jnp.uint16(0x7F)) << jnp.uint16(7)
    return lax.bitcast_convert_type(found, jnp.float16) * jnp.float16(256)


def nibbles(codes: Array, dtype: DTypeLike) -> tuple[Array, Array]:
    """The low and the high four bits of bytes uint8 as bfloat16, as `widened` does it."""
    bits = codes.astype(jnp.uint16)
    base = jnp.uint16(0x4300)
    both = (bits & jnp.uint16(0x0F) | base, bits >> jnp.uint16(4) | base)
    low, high = (lax.bitcast_convert_type(x, dtype) - jnp.asarray(128, dtype) for x in both)
    return low, high
