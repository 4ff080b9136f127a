"""What brings tiles into shared memory: copies that run while the same warpgroup computes."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kvattn._typing import Array
from kvattn.pallas.gpu_spec import Spec
from kvattn.pallas.gpu_walk import Walk, tile_of

WARPS = 4
"""Of a warpgroup."""


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cursor:
    """The tile that is to be fetched next; all int32 [].

    Attributes:
        segment: of which segment, past the last one if there is no more.
        first: the first tile of the segment that the program reads,
        tile: this one,
        end: and the one after the last.
        hole: tiles before what need not be read,
        after: and the next tile that is to be.
        slot: where in the ring of tiles it goes.
        query_slot: where in their ring the queries of the segment are.
        pages: those of the tile, asked for one tile ahead: reading the table takes as long as a tile.
    """

    segment: Array
    first: Array
    tile: Array
    end: Array
    hole: Array
    after: Array
    slot: Array
    query_slot: Array
    pages: tuple[Array, ...]


class Fetcher:
    """Keeps the rings of tiles and of queries full.

    A tile goes where the one was that is not needed any more, so whoever calls has read that. Both rings have as many
    slots: no more segments than tiles are under way.
    """

    def __init__(self, spec: Spec, memory: Mapping[str, Any], shared: Mapping[str, Any], walk: Walk):
        self.spec, self.memory, self.shared, self.walk = spec, memory, shared, walk

    def filled(self) -> Cursor:
        """Fetches as many tiles as the ring holds."""
        zero = jnp.int32(0)
        cursor = self._into(self.walk.start, zero, zero)
        return lax.fori_loop(0, self.spec.config.stages, lambda _, cursor: self.fetched(cursor), cursor)

    def wait_for_queries(self, slot: Array) -> None:
        """Until the queries in this slot of their ring, int32 [], are there."""
        plgpu.barrier_wait(self.shared["query_full"].at[slot])

    def wait_for_tile(self, cursor: Cursor) -> None:
        """Until the tile is there in whose place the one at the cursor will go."""
        plgpu.barrier_wait(self.shared["full"].at[cursor.slot])

    def vectors(self, cursor: Cursor) -> list[Array]:
        """Of the tile at the cursor, what goes by way of registers and is asked for before it can be put down."""
        del cursor
        return []

    def fetched(self, cursor: Cursor, vectors: list[Array] | None = None) -> Cursor:
        """Fetches the tile at the cursor, if there is one, of which `vectors` may be here already, and moves on."""
        there = cursor.segment <= self.walk.last
        vectors = self.vectors(cursor) if vectors is None else vectors
        pl.when(there & (cursor.tile == cursor.first))(lambda: self._copy_queries(cursor))
        pl.when(there)(lambda: self._copy_tile(cursor, vectors))
        slot = following(cursor.slot, self.spec.config.stages)
        ahead = cursor.tile + 1

        def same():
            """The next tile of the segment."""
            pages = self._pages(cursor.segment, ahead, cursor.hole, cursor.after)
            return dataclasses.replace(cursor, tile=ahead, slot=slot, pages=pages)

        def other():
            """The first one of the next segment."""
            segment = self.walk.after(cursor.segment)
            return self._into(segment, slot, following(cursor.query_slot, self.spec.config.stages))

        return lax.cond(ahead < cursor.end, same, other)

    def _into(self, segment: Array, slot: Array, query_slot: Array) -> Cursor:
        """At the first tile of a segment."""
        here = self.walk.at(segment)
        hole, after = here.rows.hole, here.rows.after
        pages = self._pages(segment, here.first, hole, after)
        return Cursor(segment, here.first, here.first, here.end, hole, after, slot, query_slot, pages)

    def _pages(self, segment: Array, tile: Array, hole: Array, after: Array) -> tuple[Array, ...]:
        """The pages of a tile; all int32 []."""
        spec, size = self.spec, self.spec.page_size
        if not size:
            return ()
        table, number = self.memory["table"], spec.streams[0].shape[1]
        row, _ = self.walk.row_and_head(segment)
        start = tile_of(tile, hole, after) * spec.config.tile
        columns = (lax.min(lax.div(start + n * size, size), table.shape[1] - 1) for n in range(spec.pages))
        # Positions of slots whose page is unknown are empty; whatever page is read for them is not looked at.
        return tuple(lax.clamp(0, table[row, column], number - 1) for column in columns)

    def _copy_queries(self, cursor: Cursor) -> None:
        """Fetches the queries of the segment, and what belongs to them."""
        spec, memory, shared, copy = self.spec, self.memory, self.shared, plgpu.copy_gmem_to_smem
        (row, head), slot = self.walk.row_and_head(cursor.segment), cursor.query_slot
        full = shared["query_full"].at[slot]
        target = shared["raw"].at[slot] if spec.prepares else shared["query"].at[slot, 0]
        if spec.as_it_lies:
            copy(memory["query"].at[pl.ds(spec.first_query(row, head), spec.cols)], target, full)
        else:
            copy(memory["query"].at[row, head], target, full)
        if not spec.is_single:
            copy(memory["at"].at[row, lax.rem(head, spec.chunks)], shared["at"].at[slot], full)
        if spec.alibi:
            copy(memory["slopes"].at[head], shared["slopes"].at[slot], full)

    def _copy_tile(self, cursor: Cursor, vectors: list[Array]) -> None:
        """Fetches the tile, but for `vectors`."""
        del vectors
        spec, memory, shared, copy = self.spec, self.memory, self.shared, plgpu.copy_gmem_to_smem
        (row, head), tile, size = self.walk.row_and_head(cursor.segment), spec.config.tile, spec.page_size
        kv_head = lax.div(head, spec.chunks)
        start = tile_of(cursor.tile, cursor.hole, cursor.after) * tile
        full = shared["full"].at[cursor.slot]
        if not spec.in_order:
            which = kv_head if spec.per_head_positions else 0
            copy(memory["positions"].at[row, which, pl.ds(start, tile)], shared["positions"].at[cursor.slot], full)
        copies = []
        for stream in spec.streams:
            source, target = memory[stream.name], shared[stream.name].at[cursor.slot]
            for n in range(spec.pages):
                part = min(tile, size) if size else tile
                if not size:
                    source_n, rows = source.at[row, kv_head], pl.ds(start, tile)
                else:
                    source_n, rows = source.at[kv_head, cursor.pages[n]], pl.ds(lax.rem(start, size), part)
                    if size <= tile:
                        rows = pl.ds(0, part)
                into = pl.ds(n * part, part)
                if stream.tokens_last:
                    copies.append((source_n.at[:, rows], target.at[:, into]))
                else:
                    copies.append((source_n.at[rows], target.at[into]))
        if len(copies) > len(("keys", "values")):
            self._by_warps(copies, full)
        else:
            for source, target in copies:
                copy(source, target, full)

    @staticmethod
    def _by_warps(copies: list[tuple[Any, Any]], full: Any) -> None:
        """Makes many copies, of which each warp begins its share.

        All threads wait for each other before and after, once. They would before each copy otherwise, and every warp
        would reckon with all of them.
        """

        def begin() -> None:
            warp = lax.axis_index("warp")
            for number in range(WARPS):

                @pl.when(warp == number)
                def _(share: list[tuple[Any, Any]] = copies[number::WARPS]) -> None:
                    for source, target in share:
                        plgpu.copy_gmem_to_smem(source, target, full)

        by_warp: Any = pl.kernel(begin, mesh=plgpu.WarpMesh(axis_name="warp"))
        by_warp()


def following(slot: Array, count: int) -> Array:
    """The slot after this one of a ring; int32 []."""
    return jnp.where(slot + 1 == count, 0, slot + 1)
