"""Fetching the pages of a tile on TPUs while the tile before it is worked on.

The grid of Pallas fetches its blocks alone, but spends some fifty instructions on each in every step; with a block for
every page of keys and values that was more than attention itself. Here a page costs a copy of each array and no more,
and one that holds nothing costs none.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


@dataclasses.dataclass(frozen=True)
class Fetcher:
    """Two buffers for each array of a pool, which tiles fill in turn.

    Attributes:
        arrays: (pool [K, P, ...] in HBM, buffers [2, heads, parts, ...] in VMEM) of each, by name.
        arrived: counts what was copied, for each of the two.
        pages: int32 [tiles * parts] in scalar memory, where each part of a tile lies; negative: it holds nothing.
        whole: int32 [tiles], 1 where every part holds something.
        parts: pages per tile.
        first_head: of those that this core works on.
    """

    arrays: dict[str, tuple[Any, Any]]
    arrived: Any
    pages: Any
    whole: Any
    parts: int
    first_head: Any

    def start(self, tile: Any) -> None:
        """Begins to copy a tile; its buffers must have been read."""

        @pl.when(self.whole[tile] == 1)
        def _():
            for part in range(self.parts):
                self._each(tile, part, "start")

        self._some(tile, "start")

    def wait(self, tile: Any) -> None:
        """Waits until a tile is there."""
        which = tile % 2

        @pl.when(self.whole[tile] == 1)
        def _():
            for _, buffers in self.arrays.values():
                # It waits for as many bytes as these are, whatever brought them.
                pltpu.make_async_copy(buffers.at[which], buffers.at[which], self.arrived.at[which]).wait()

        self._some(tile, "wait")

    def held(self, tile: Any, name: str) -> list[Any]:
        """The parts of a tile, [heads, 1, ...] each."""
        buffers = self.arrays[name][1]
        return [buffers.at[tile % 2, :, pl.ds(part, 1)] for part in range(self.parts)]

    def _some(self, tile: Any, what: str) -> None:
        """Those parts of a tile that hold something, if not all do."""

        @pl.when(self.whole[tile] == 0)
        def _():
            @pl.loop(0, self.parts)
            def _(part):
                @pl.when(self.pages[tile * self.parts + part] >= 0)
                def _():
                    self._each(tile, part, what)

    def _each(self, tile: Any, part: Any, what: str) -> None:
        page, which = self.pages[tile * self.parts + part], tile % 2
        for pool, buffers in self.arrays.values():
            heads = pl.ds(self.first_head, buffers.shape[1])
            source, target = pool.at[heads, pl.ds(page, 1)], buffers.at[which, :, pl.ds(part, 1)]
            getattr(pltpu.make_async_copy(source, target, self.arrived.at[which]), what)()
