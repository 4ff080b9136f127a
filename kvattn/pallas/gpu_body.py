"""The body of `"mosaic_gpu"`: a warpgroup that computes while its tiles are on their way."""

from collections.abc import Mapping
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kvattn import _manual
from kvattn._typing import Array
from kvattn.pallas import gpu_unseen
from kvattn.pallas.gpu_columns import Columns, prepare
from kvattn.pallas.gpu_fetch import Fetcher, following
from kvattn.pallas.gpu_fragments import restored
from kvattn.pallas.gpu_spec import F32, Spec, scratch
from kvattn.pallas.gpu_threads import ThreadFetcher
from kvattn.pallas.gpu_tile import COLUMNS, WGMMA, mix, mix_groups, products, put, spread, store
from kvattn.pallas.gpu_walk import share_out


def decode(spec: Spec, interpret: Any, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Partial states, and scores if wanted.

    Args:
        spec: the sizes.
        interpret: of `plgpu.kernel`.
        arrays: what the kernel reads, by name: "at", the positions of the queries, int32 [B], or for T > 1 [B, chunks
            + 1, lanes], the last with the lowest and the highest; "counts" int32 [B], tokens of each row, if
            `in_order`, else the arrays of `Rows` and "positions" int32 [B, 1 or K, S]; "query" [B, heads, cols, H], or
            [B N, H] if `as_it_lies`; the `Stream`s of the cache; and, each if there is one, "table" int32 [B, W],
            "slopes" [heads, lanes].

    Returns:
        "out", outputs times their sums, float32 [states, cols, Hv padded]; "top" and "total", maxima and sums, float32
        [states, cols]; "first" and "last" int32 [segments], the programs that read a segment, where any did; with
        `want_scores` "scores" float32 [B, heads, S, cols], of which only the tiles that were read are written.
    """
    segments = spec.heads * spec.batch
    states = segments + spec.programs
    result = lambda *shape, dtype=F32: _manual.result(shape, dtype, arrays)
    results = {
        "out": result(states, spec.cols, spec.padded),
        "top": result(states, spec.cols),
        "total": result(states, spec.cols),
        "first": result(segments, dtype=jnp.int32),
        "last": result(segments, dtype=jnp.int32),
    }
    if spec.want_scores:
        results["scores"] = result(spec.batch, spec.heads, spec.slots, spec.cols)

    def kvattn_gpu_decode(*refs, **shared):
        """Refs of `arrays` and results, [...] as above, and `scratch` by name."""
        memory = dict(zip((*arrays, *results), refs, strict=True))
        compute(spec, memory, shared, lax.axis_index("program"))

    found = plgpu.kernel(
        kvattn_gpu_decode,
        out_type=tuple(results.values()),
        scratch_types=scratch(spec),
        grid=(spec.programs,),
        grid_names=("program",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(*arrays.values())
    return dict(zip(results, found, strict=True))


def compute(spec: Spec, memory: dict[str, Any], shared: dict[str, Any], program: Array) -> None:
    """Attends, tile by tile, with a running maximum, while further tiles are on their way; `program` is int32 []."""
    walk = share_out(spec, memory, program)
    fetcher = (ThreadFetcher if spec.by_threads else Fetcher)(spec, memory, shared, walk)
    tile, cols = spec.config.tile, spec.cols

    def constant(shape, layout, value):
        """float32 [...] of that shape."""
        return plgpu.layout_cast(jnp.full(shape, value, F32), layout)

    def segment(carry):
        """Attends to a segment: its number and the slot of its queries, int32 [], and the cursor."""
        number, at_slot, cursor = carry
        here = walk.at(number)
        fetcher.wait_for_queries(at_slot)
        if spec.prepares:
            prepare(spec, shared, at_slot)
        columns = Columns(spec, memory, shared, here.row, at_slot)

        def step(j, carry):
            """One more tile into maximum [M], sums [T, M], outputs [H, M] and what is to be added to them [T, M]."""
            # Sums stay spread over the rows of a tile: adding up across threads once per segment is enough.
            top, total, acc, low, cursor = carry
            t = here.tile(j)
            # The ring is full, so the next tile will go where this one is.
            slot = cursor.slot
            vectors = fetcher.vectors(cursor)
            fetcher.wait_for_tile(cursor)
            kv_at = columns.positions_of(t, slot)
            scores, allowed = columns.adjusted(products(spec, shared, slot, at_slot), kv_at)
            if spec.want_scores:
                store(memory["scores"].at[here.row, here.head, pl.ds(t * tile, tile)], scores)
            new = jnp.maximum(top, jnp.max(scores, axis=0))
            shift = jnp.where(new == -jnp.inf, 0.0, new)
            keep = jnp.exp(top - shift)
            probs = jnp.exp(scores - spread(shift, scores.shape))
            total = total * spread(keep, total.shape) + probs
            whole = (t >= here.rows.run) & (t < here.rows.run_end)
            filled = kv_at >= 0
            if spec.by_group:
                mixed, more = mix_groups(spec, shared, slot, probs, allowed, filled)
                acc = [x * spread(keep, x.shape) + y for x, y in zip(acc, mixed, strict=True)]
                low = [x * spread(keep, x.shape) + y for x, y in zip(low, more, strict=True)]
            else:
                back = put(spec, shared, slot, probs, allowed, filled)
                if spec.looks:
                    kept = acc[0] * spread(keep, acc[0].shape)
                    kept = gpu_unseen.added(spec, shared, slot, kept, allowed, filled, columns.are_apart(t, kv_at))
                    acc = [kept + mix(spec, shared, slot, back, filled, whole)]
                else:
                    mixed = mix(spec, shared, slot, back, filled, whole)
                    acc = [acc[0] * spread(keep, mixed.shape) + mixed]
            if spec.unit == "mma" and not spec.by_threads:
                plgpu.commit_smem()  # what threads have read the copy engine may write over
            return new, total, acc, low, fetcher.fetched(cursor, vectors)

        start = (
            constant((cols,), COLUMNS, -jnp.inf),
            constant((tile, cols), WGMMA, 0.0),
            [constant((count, cols), WGMMA, 0.0) for _, count in spec.outputs],
            [constant((tile, cols), WGMMA, 0.0) for _ in spec.outputs if spec.by_group],
            cursor,
        )
        top, total, acc, low, cursor = lax.fori_loop(here.first, here.end, step, start)
        state = here.number + program
        if spec.by_group:
            acc = [x + spread(jnp.sum(y, axis=0), x.shape) for x, y in zip(acc, low, strict=True)]
        for (first, count), x in zip(spec.outputs, acc, strict=True):
            out = memory["out"].at[state, :, pl.ds(first, count)]
            if spec.decoded:
                store(out.T, restored(x, spec.interpreted))
            else:
                store(out.T, plgpu.layout_cast(x, plgpu.Layout.WGMMA_TRANSPOSED))
        store(memory["top"].at[state], top)
        store(memory["total"].at[state], jnp.sum(total, axis=0))

        @pl.when(here.is_first)
        def _():
            memory["first"][here.number] = program

        @pl.when(here.is_last)
        def _():
            memory["last"][here.number] = program

        return walk.after(number), following(at_slot, spec.config.stages), cursor

    lax.while_loop(lambda carry: carry[0] <= walk.last, segment, (walk.start, jnp.int32(0), fetcher.filled()))
