"""Fetching where no engine copies: the threads of a warpgroup ask for 16 bytes each (`cp.async`), as before Hopper.

Keys and values go to shared memory on their own and are waited for in the order in which they were asked for. What is
too small for that, positions, scales and queries, goes by way of registers.
"""

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import lax
from jax.experimental import pallas as pl

from kvattn._typing import Array
from kvattn.pallas import gpu_mma
from kvattn.pallas.gpu_fetch import Cursor, Fetcher
from kvattn.pallas.gpu_fragments import QUERIES
from kvattn.pallas.gpu_spec import Spec, Stream, copied
from kvattn.pallas.gpu_tile import COLUMNS, TOKENS
from kvattn.pallas.gpu_walk import tile_of


class ThreadFetcher(Fetcher):
    """A `Fetcher` that needs neither barriers in memory nor an engine that works by them."""

    def wait_for_queries(self, slot: Array) -> None:
        """Nothing to wait for: threads have written them."""

    def wait_for_tile(self, cursor: Cursor) -> None:
        """As long as there is more to fetch the ring is full, so all but one of its tiles may still be on their way."""
        more = cursor.segment <= self.walk.last
        if not self.spec.interpreted:  # where copies are done at once
            behind = (self.spec.config.stages - 1) * copies(self.spec)
            pl.when(more)(lambda: plgpu.wait_gmem_to_smem(behind))
            pl.when(~more)(lambda: plgpu.wait_gmem_to_smem(0))
        # Every thread has what it asked for itself; now all have all.
        full = self.shared["full"].at[cursor.slot]
        plgpu.barrier_arrive(full)
        plgpu.barrier_wait(full)

    def vectors(self, cursor: Cursor) -> list[Array]:
        """Positions and scales. Past the last tile those of any."""
        loaded = self._vectors(cursor)
        return [plgpu.load(source, layout=_layout(source), optimized=False) for source, _ in loaded]

    def _copy_queries(self, cursor: Cursor) -> None:
        """Brings the queries of the segment, and what belongs to them."""
        spec, memory, shared = self.spec, self.memory, self.shared
        (row, head), slot = self.walk.row_and_head(cursor.segment), cursor.query_slot
        if spec.as_it_lies:
            queries = memory["query"].at[pl.ds(spec.first_query(row, head), spec.cols)]
        else:
            queries = memory["query"].at[row, head]
        pairs: list[tuple[Any, Any, Any]]
        if spec.prepares:
            pairs = [(queries, shared["raw"].at[slot], QUERIES)]
        else:
            pairs = [(queries.T, shared["query"].at[slot, 0].T, gpu_mma.SIDE(spec.wide))]
        some = pl.ds(0, spec.cols)
        if not spec.is_single:
            at = memory["at"].at[row, lax.rem(head, spec.chunks), some]
            pairs.append((at, shared["at"].at[slot, some], COLUMNS))
        if spec.alibi:
            pairs.append((memory["slopes"].at[head, some], shared["slopes"].at[slot, some], COLUMNS))
        # All are asked for before the first is waited for.
        loaded = [plgpu.load(source, layout=layout, optimized=False) for source, _, layout in pairs]
        for (_, into, _), numbers in zip(pairs, loaded, strict=True):
            into[...] = numbers

    def _copy_tile(self, cursor: Cursor, vectors: list[Array]) -> None:
        """Asks for keys and values of the tile, and puts the vectors down."""
        spec, rows = self.spec, self.spec.tile_rows
        for stream in spec.streams:
            if not stream.tokens_last:
                for n in range(pieces(spec)):
                    array, first = self._piece(cursor, stream, n)
                    into = self.shared[stream.name].at[cursor.slot, pl.ds(n * rows, rows)]
                    _copy(spec, array.at[pl.ds(first, rows)], into)
        for (_, into), numbers in zip(self._vectors(cursor), vectors, strict=True):
            into[...] = numbers

    def _vectors(self, cursor: Cursor) -> list[tuple[Any, Any]]:
        """Positions and scales of the tile: where they come from, and where they go."""
        spec, rows = self.spec, self.spec.tile_rows
        found = []
        if not spec.in_order:
            row, head = self._row_and_head(cursor)
            which = head if spec.per_head_positions else 0
            source = self.memory["positions"].at[row, which, pl.ds(self._start(cursor), spec.config.tile)]
            found.append((source, self.shared["positions"].at[cursor.slot]))
        for stream in spec.streams:
            if stream.tokens_last:
                for n in range(pieces(spec)):
                    array, first = self._piece(cursor, stream, n)
                    for f in range(stream.features):
                        into = self.shared[stream.name].at[cursor.slot, f, pl.ds(n * rows, rows)]
                        found.append((array.at[f, pl.ds(first, rows)], into))
        return found

    def _piece(self, cursor: Cursor, stream: Stream, n: int) -> tuple[Any, Array]:
        """Where piece n of the tile is: in [S, F] or [F, S], and its first slot there, int32 []."""
        spec, rows, array = self.spec, self.spec.tile_rows, self.memory[stream.name]
        row, head = self._row_and_head(cursor)
        start = self._start(cursor)
        if spec.page_size:
            # No constant: Mosaic slices a reference by values.
            inside = lax.rem(start, spec.page_size) if spec.page_size > rows else start * 0
            return array.at[head, cursor.pages[n]], inside
        # The last tile may be longer than the cache; what is read twice has no position there.
        last = stream.shape[3 if stream.tokens_last else 2] - rows
        return array.at[row, head], pl.multiple_of(lax.min(start + n * rows, last), 8)

    def _start(self, cursor: Cursor) -> Array:
        """The first slot of the tile, int32 []; of one past the last tile any other."""
        tile = self.spec.config.tile
        return lax.min(tile_of(cursor.tile, cursor.hole, cursor.after) * tile, self.spec.slots - tile)

    def _row_and_head(self, cursor: Cursor) -> tuple[Array, Array]:
        """Row and key/value head of the tile; all int32 []."""
        row, head = self.walk.row_and_head(lax.min(cursor.segment, self.walk.last))
        return row, lax.div(head, self.spec.chunks)


def pieces(spec: Spec) -> int:
    """Into how many copies a tile is cut."""
    return spec.config.tile // spec.tile_rows


def copies(spec: Spec) -> int:
    """How many copies are asked for per tile, each of which is waited for on its own."""
    return pieces(spec) * sum(not stream.tokens_last for stream in spec.streams)


def refusal(spec: Spec) -> str | None:
    """Why threads cannot copy the tiles of a cache; None: they can."""
    for stream in spec.streams:
        width = stream.features * stream.dtype.itemsize
        # What cannot be swizzled is copied as it lies, at least four bytes to each of 128 threads.
        whole = spec.tile_rows % 32 == 0 and spec.tile_rows * width % 512 == 0
        if stream.tokens_last or copied(spec.tile_rows, width) or whole:
            continue
        where = f"pages of {spec.page_size}" if spec.page_size else f"caches of {stream.shape[2]} slots"
        return (
            f"without a copy engine (before Hopper) its threads cannot share rows of {width} bytes in "
            f"{where} evenly; take a multiple of 32 slots"
        )
    return None


def _layout(vector: Any) -> Any:
    """How registers hold a vector over slots: the fewest of them."""
    return TOKENS if vector.shape[0] % 64 == 0 else COLUMNS


def _copy(spec: Spec, source: Any, target: Any) -> None:
    """Asks for rows [R, F]."""
    if spec.interpreted:  # where only the engine copies
        target[...] = source[...]
    else:
        plgpu.copy_gmem_to_smem(source, target, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)
