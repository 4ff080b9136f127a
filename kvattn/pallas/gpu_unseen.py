"""Values that are not finite, where some queries of a row may attend to them and others may not (`"mosaic_gpu"`).

The weight of a value that a query may not attend to is 0, and 0 times NaN is NaN. With one new token such values are
zeroed. With several a tile may hold a value that is for some of them only: there a product of its own says which
outputs it reaches, and the product of values and probabilities goes without it.
"""

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kvattn._typing import Array
from kvattn.pallas.gpu_spec import F32, Spec
from kvattn.pallas.gpu_tile import WGMMA, runs, spread, summed, tokens_as_rows

COUNTED = 256
"""More than the slots of a tile. NaN counts as 1, infinity as 256, minus infinity as 256^2, all divided by 256: sums of
these tell how many of each there are, and 16 bits hold all three."""


def added(
    spec: Spec, shared: dict[str, Any], slot: Array, acc: Array, allowed: Array, filled: Array, apart: Array
) -> Array:
    """`acc` and what the values in `slot` of the ring that are not finite add to it; they are 0 afterwards.

    Args:
        spec: the sizes, of values that are multiplied as they lie.
        shared: the program's shared memory.
        slot: int32 [].
        acc: outputs so far, float32 [Hv padded, cols].
        allowed: bool [T, cols], which column may attend to which slot.
        filled: bool [T], to which any column may.
        apart: bool [], whether there are slots that some columns may attend to and others may not.
    """
    values = shared["v_data"].at[slot]
    kinds = tokens_as_rows(spec, shared["values"].at[0]) if spec.repacked else shared["kinds"]
    seen, step = tokens_as_rows(spec, shared["seen"].at[0]), spec.stream_step(spec.stream("v_data"))
    parts = runs(spec.value_features, max(step, 32))
    load = lambda first, count: plgpu.load(values.at[:, pl.ds(first, count)], layout=WGMMA, optimized=False)

    def rounds():
        """1 if there are any that some column may attend to, else 0."""
        found, weight = jnp.float32(0), jnp.where(filled, 1.0, 0.0)
        for first, count in parts:
            x = load(first, count)
            bad = jnp.where(jnp.abs(x.astype(F32)) < jnp.inf, 0.0, spread(weight, x.shape, 0))
            found = jnp.maximum(found, jnp.max(jnp.max(bad, axis=1), axis=0))
        return jnp.where(found > 0.0, 1, 0)

    def once(_, acc):
        """Adds them."""
        for first, count in parts:
            x = load(first, count)
            wide, nothing = x.astype(F32), jnp.zeros((), x.dtype)
            kind = jnp.where(wide == jnp.inf, 1.0, jnp.where(wide == -jnp.inf, float(COUNTED), 1 / COUNTED))
            is_finite = jnp.abs(wide) < jnp.inf
            kinds.at[:, pl.ds(first, count)][...] = jnp.where(is_finite, nothing, kind.astype(x.dtype))
            values.at[:, pl.ds(first, count)][...] = jnp.where(is_finite, x, nothing)
        seen[...] = jnp.where(allowed, 1.0, 0.0).astype(spec.wide)
        if spec.unit == "wgmma":
            plgpu.commit_smem()
        reached = summed(spec, acc.shape, [(kinds.T, seen)])
        counts = (reached * float(COUNTED)).astype(jnp.int32)
        for number, what in ((counts & (COUNTED - 1), jnp.nan), ((counts >> 8) & (COUNTED - 1), jnp.inf)):
            acc = acc + jnp.where(number > 0, what, 0.0)
        return acc + jnp.where(counts >> 16 > 0, -jnp.inf, 0.0)

    return lax.fori_loop(0, lax.cond(apart, rounds, lambda: jnp.int32(0)), once, acc)
