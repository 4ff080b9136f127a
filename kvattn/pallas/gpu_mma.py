"""The matrix unit that every GPU since Ampere has (`mma`, 16 x 8 x 16), where `gpu_tile` would ask for `wgmma`.

Operands are read into registers first: 64 rows of the left one at a time, 16 for each warp, all of the right one by
every warp. Accumulators lie in registers as those of `wgmma` do, so scores and outputs are the same to everybody else.
"""

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from kvattn._typing import Array
from kvattn.pallas.gpu_spec import F32

ROWS, SIDE = plgpu.Layout.MMA_LHS, plgpu.Layout.MMA_RHS


def left(matrix: Any, dtype: DTypeLike) -> Array:
    """A left operand in registers: a matrix [M, F] in shared memory, of numbers or of codes that become `dtype`."""
    return plgpu.load(matrix, layout=ROWS(dtype), optimized=False)


def summed(shape: tuple[int, int], pairs: list[tuple[Any, Any]], *, interpreted: bool) -> Array:
    """The sum of products, float32 [M, N], in the order of `pairs`.

    Args:
        shape: (M, N), M a multiple of 64, N of 8.
        pairs: left operands [M, F], in shared memory or from `left`, and right ones [F, N] in shared memory.
        interpreted: whether JAX's interpreter runs it, which has no `mma`: a plain product stands in.
    """
    total = plgpu.layout_cast(jnp.zeros(shape, F32), plgpu.Layout.WGMMA)
    for a, b in pairs:
        dtype = b.dtype
        a = a if isinstance(a, jax.Array) else left(a, dtype)
        b = plgpu.load(b, layout=SIDE(dtype), optimized=False)
        if interpreted:
            total = total + lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=F32)
        else:
            total = plgpu.mma(total, a, b)
    return total
