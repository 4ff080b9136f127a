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

from kvattn._typing import Array
from kvattn.pallas.gpu_spec import F32, Spec

ROWS, SIDE = plgpu.Layout.MMA_LHS, plgpu.Layout.MMA_RHS


def summed(spec: Spec, shape: tuple[int, int], pairs: list[tuple[Any, Any]]) -> Array:
    """The sum of products, float32 [M, N], in the order of `pairs`.

    JAX's interpreter has no `mma`: a plain product stands in there.

    Args:
        spec: the sizes.
        shape: (M, N), M a multiple of 64, N of 8.
        pairs: left operands [M, F], in shared memory or in registers as `ROWS`, and right ones [F, N] in shared
            memory.
    """
    total = plgpu.layout_cast(jnp.zeros(shape, F32), plgpu.Layout.WGMMA)
    for a, b in pairs:
        for first in range(0, b.shape[0], spec.cut):
            some = pl.ds(first, min(spec.cut, b.shape[0] - first))
            if isinstance(a, jax.Array):
                x = a[:, first : first + spec.cut]
            else:
                x = plgpu.load(a.at[:, some], layout=ROWS(b.dtype), optimized=False)
            y = plgpu.load(b.at[some], layout=SIDE(b.dtype), optimized=False)
            if spec.interpreted:
                total = total + lax.dot_general(x, y, (((1,), (0,)), ((), ())), preferred_element_type=F32)
            else:
                total = plgpu.mma(total, x, y)
    return total
