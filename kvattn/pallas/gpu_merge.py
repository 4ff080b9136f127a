"""Merges the partial states that programs left behind, one block per row and head."""

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kvattn import _manual
from kvattn._typing import Array
from kvattn.pallas.gpu_tile import COLUMNS, WGMMA, spread, store
from kvattn.pallas.shares import Counts

AT_ONCE = 4
"""States fetched at a time: their loads overlap."""


def merge(
    partial: Array, top: Array, total: Array, count: Array, batch: int, programs: int, interpret: Any
) -> tuple[Array, Array]:
    """Merges states.

    Args:
        partial: float32 [states, H, cols], outputs times their sums.
        top: float32 [states, cols], maxima of the scores.
        total: float32 [states, cols], sums of exp(score - maximum).
        count: int32 [B'], tiles of every row (`Rows`).
        batch: B.
        programs: how many shared out the tiles.
        interpret: of `plgpu.kernel`.

    Returns:
        out float32 [heads * B, H, cols] and lse float32 [heads * B, cols]; 0 and -inf where there was nothing.
    """
    segments = partial.shape[0] - programs
    _, features, cols = partial.shape

    def kvattn_gpu_merge(states, tops, totals, counts, out, lse):
        """One segment: refs of [states, H, M], [states, M], [states, M], [B'], [segments, H, M], [segments, M]."""
        s = lax.axis_index("segment")
        layout = plgpu.Layout.WG_STRIDED(counts.shape, vec_size=1)
        index = plgpu.broadcasted_iota(jnp.int32, counts.shape, 0, layout=layout)
        tiles = plgpu.load(counts, layout=layout, optimized=False)
        shares = Counts(tiles, index, batch, segments // batch, programs)
        first, count = shares.of_segment(lax.rem(s, batch), lax.div(s, batch))
        flat = lambda value: plgpu.layout_cast(jnp.full((cols,), value, jnp.float32), COLUMNS)

        def step(i, carry):
            """Some more states into maximum [M], sum [M] and output [H, M]."""
            m, l, acc = carry
            loaded = []
            for n in range(AT_ONCE):
                index = i * AT_ONCE + n
                slot = s + first + lax.min(index, count - 1)
                load = lambda ref, layout, slot=slot: plgpu.load(ref.at[slot], layout=layout, optimized=False)
                # Past the last state the last one is loaded again, and weighs nothing.
                here = load(tops, COLUMNS) + jnp.where(index < count, 0.0, -jnp.inf)
                loaded.append((here, load(totals, COLUMNS), load(states, WGMMA)))
            new = m
            for here, _, _ in loaded:
                new = jnp.maximum(new, here)
            shift = jnp.where(new == -jnp.inf, 0.0, new)
            keep = jnp.exp(m - shift)
            l, acc = l * keep, acc * spread(keep, acc.shape)
            for here, sums, state in loaded:
                weight = jnp.exp(here - shift)
                l = l + sums * weight
                acc = acc + state * spread(weight, acc.shape)
            return new, l, acc

        zeros = plgpu.layout_cast(jnp.zeros((features, cols), jnp.float32), WGMMA)
        rounds = lax.div(count + (AT_ONCE - 1), AT_ONCE)
        m, l, acc = lax.fori_loop(0, rounds, step, (flat(-jnp.inf), flat(0.0), zeros))
        empty = l == 0.0
        safe = jnp.where(empty, 1.0, l)
        store(out.at[s], acc / spread(safe, acc.shape))
        store(lse.at[s], jnp.where(empty, -jnp.inf, jnp.log(safe) + m))

    kernel = plgpu.kernel(
        kvattn_gpu_merge,
        out_type=(
            _manual.result((segments, features, cols), jnp.float32, (partial, top, total, count)),
            _manual.result((segments, cols), jnp.float32, (partial, top, total, count)),
        ),
        grid=(segments,),
        grid_names=("segment",),
        interpret=interpret,
    )
    return kernel(partial, top, total, count)
