"""Fetching where no engine copies: the threads of a warpgroup ask for 16 bytes each (`cp.async`), as before Hopper.

Keys and values go to shared memory on their own and are waited for in the order in which they were asked for. What is
too small for that, positions, scales and queries, goes by way of registers.
"""

from collections.abc import Callable
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import lax
from jax.experimental import pallas as pl

from kvattn._typing import Array
from kvattn.pallas import gpu_mma
from kvattn.pallas.gpu_spec import Spec, Stream
from kvattn.pallas.gpu_tile import COLUMNS


def pieces_of(spec: Spec) -> int:
    """Into how many a tile is cut."""
    return spec.config.tile // spec.tile_rows


def copies(spec: Spec) -> int:
    """How many copies are asked for per tile, each of which is waited for on its own."""
    return sum(pieces_of(spec) for stream in spec.streams if not stream.tokens_last)


def fetch(spec: Spec, memory: dict[str, Any], shared: dict[str, Any], walk: Any, pages_of: Callable[..., Any]) -> None:
    """Keeps the ring of tiles full.

    Args:
        spec: the sizes.
        memory: arrays of the device by name.
        shared: buffers and barriers by name.
        walk: a `gpu_body.Walk`.
        pages_of: its pages of a tile, `gpu_body.pages_of`.
    """
    stages, behind = spec.config.stages, spec.config.stages - 1

    def landed(i: Array, after: int) -> None:
        """Says that tile i of the program is there, behind which `after` others were asked for."""
        wait(spec, after)
        plgpu.barrier_arrive(shared["full"].at[lax.rem(i, stages)])

    def segment(here: Any) -> None:
        """Fetches a segment."""
        kv_head = lax.div(here.head, spec.chunks)

        def step(j, pages):
            """Fetches tile j int32 [] from `pages`; gives those of the next one."""
            ahead = pages_of(spec, memory, here, lax.min(j + 1, here.end - 1))
            i = here.tiles + j - here.first
            slot = lax.rem(i, stages)
            pl.when(i >= stages)(lambda: plgpu.barrier_wait(shared["free"].at[slot]))
            fetch_tile(spec, memory, shared, (here.row, kv_head, here.tile(j) * spec.config.tile, pages), slot)
            pl.when(i >= behind)(lambda: landed(i - behind, behind))
            return ahead

        lax.fori_loop(here.first, here.end, step, pages_of(spec, memory, here, here.first))

    tiles, _ = walk.each(segment)
    for after in reversed(range(behind)):
        pl.when(tiles > after)(lambda after=after: landed(tiles - 1 - after, after))
    # Nobody may leave while somebody is still to report that a buffer is free.
    for slot in range(stages):
        pl.when(tiles > slot)(lambda slot=slot: plgpu.barrier_wait(shared["free"].at[slot]))


def fetch_tile(spec: Spec, memory: dict[str, Any], shared: dict[str, Any], where: Any, slot: Array) -> None:
    """Asks for the tile that `where` names and brings its small vectors.

    Args:
        spec: the sizes.
        memory: arrays of the device by name.
        shared: buffers by name.
        where: (row, key/value head, first slot, pages), int32 [] all of them.
        slot: of the ring.
    """
    row, head, start, pages = where
    tile, rows = spec.config.tile, spec.tile_rows

    def source(stream: Stream, n: int) -> tuple[Any, Any]:
        """Where piece n of a tile lies: [S, F] or [F, S], and its first row there."""
        array = memory[stream.name]
        if not spec.page_size:
            # The last tile may be longer than the cache; what is read twice has no position there.
            last = array.shape[3 if stream.tokens_last else 2] - rows
            return array.at[row, head], pl.multiple_of(lax.min(start + n * rows, last), 8)
        return array.at[head, pages[n]], lax.rem(start, spec.page_size) if spec.page_size > tile else 0

    for stream in spec.streams:
        if not stream.tokens_last:
            for n in range(pieces_of(spec)):
                array, first = source(stream, n)
                into = shared[stream.name].at[slot, pl.ds(n * rows, rows)]
                _copy(spec, array.at[pl.ds(first, rows)], into)
    vectors = []
    if not spec.in_order:
        which = head if spec.per_head_positions else 0
        vectors.append((memory["positions"].at[row, which, pl.ds(start, tile)], shared["positions"].at[slot]))
    for stream in spec.streams:
        if stream.tokens_last:
            for n in range(pieces_of(spec)):
                array, first = source(stream, n)
                for f in range(stream.features):
                    into = shared[stream.name].at[slot, f, pl.ds(n * rows, rows)]
                    vectors.append((array.at[f, pl.ds(first, rows)], into))
    # All are asked for before the first is waited for.
    loaded = [plgpu.load(vector, layout=COLUMNS, optimized=False) for vector, _ in vectors]
    for (_, into), numbers in zip(vectors, loaded, strict=True):
        into[...] = numbers


def _copy(spec: Spec, source: Any, target: Any) -> None:
    """Asks for rows [R, F]."""
    if spec.interpreted:  # where copies come by TMA only
        target[...] = source[...]
    else:
        plgpu.copy_gmem_to_smem(source, target, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)


def wait(spec: Spec, tiles: int) -> None:
    """Waits until no more than the last `tiles` tiles are on their way."""
    if not spec.interpreted:
        plgpu.wait_gmem_to_smem(tiles * copies(spec))


def bring_query(spec: Spec, memory: dict[str, Any], shared: dict[str, Any], row: Array, head: Array) -> None:
    """Brings the queries of a segment, and what is known of its columns, into the buffers of their names."""
    if spec.as_it_lies:
        queries = [memory["query"].at[pl.ds(spec.first_query(row, head), spec.cols)]]
    else:
        queries = [memory["query"].at[n, row, head] for n in range(spec.parts)]
    pairs = [(x.T, shared["query"].at[0, n].T, gpu_mma.SIDE(spec.wide)) for n, x in enumerate(queries)]
    some = pl.ds(0, spec.cols)
    if not spec.is_single:
        pairs.append((memory["at"].at[row, lax.rem(head, spec.chunks), some], shared["at"].at[0, some], COLUMNS))
    if spec.factor:
        pairs.append((memory["factor"].at[row, head, some], shared["factor"].at[0, some], COLUMNS))
    if spec.alibi:
        pairs.append((memory["slopes"].at[head, some], shared["slopes"].at[0, some], COLUMNS))
    if spec.format.is_grouped:
        for g in range(spec.streams[1].features):
            pairs.append((memory["sums"].at[row, head, g, some], shared["sums"].at[0, g, some], COLUMNS))
    loaded = [plgpu.load(source, layout=layout, optimized=False) for source, _, layout in pairs]
    for (_, into, _), numbers in zip(pairs, loaded, strict=True):
        into[...] = numbers
