"""Fetching a tile of the cache on TPUs while the tile before it is worked on.

The grid of Pallas fetches its blocks alone, but spends some twenty instructions on each in every step: too many where
each page of keys and values is one. Here a part of a tile (a page, or `PIECE` tokens of a contiguous cache) costs a
copy of each array, three instructions, and one that holds nothing costs none.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

PIECE = 128
"""Tokens of a contiguous cache that are copied together: a register's width of what lies along the lanes."""
MOST_PIECES = 31
"""Of a tile: one bit of an int32 each."""


@dataclasses.dataclass(frozen=True)
class Order:
    """How an array lies.

    Attributes:
        tokens_last: with its tokens along the lanes.
        pages_beside: how many pages of a pool share a row, one beside the other: [n, P / pages_beside, ...].
    """

    tokens_last: bool = False
    pages_beside: int = 1


@dataclasses.dataclass(frozen=True)
class Pages:
    """Parts that are pages of pools [n, P, ...], n heads for example; buffers are [parts, n / cores, ...].

    Attributes:
        pages: int32 [tiles * parts] in scalar memory, where each part of a tile lies; negative: it holds nothing.
        parts: pages per tile.
        core: which core this is.
    """

    pages: Any
    parts: int
    core: Any

    def holds(self, tile: Any, part: Any) -> Any:
        """Whether there is anything in a part."""
        return self.pages[tile * self.parts + part] >= 0

    def whole(self, array: Any, buffer: Any, tile: Any, order: Order) -> list[tuple[Any, Any]]:
        """From where to where a tile is copied of which each part holds something."""
        return [self.some(array, buffer, tile, part, order) for part in range(self.parts)]

    def some(self, array: Any, buffer: Any, tile: Any, part: Any, order: Order) -> tuple[Any, Any]:
        """From where to where a part is copied, with the pages beside it."""
        target = buffer.at[part]
        mine = pl.ds(self.core * target.shape[0], target.shape[0])
        return array.at[mine, self.pages[tile * self.parts + part] // order.pages_beside], target

    def held(self, buffer: Any) -> list[Any]:
        """What lies in a buffer, part by part: [heads, ...]."""
        return [buffer.at[part] for part in range(self.parts)]

    def places(self, tile: Any, order: Order) -> tuple[Any, ...]:
        """Which of the pages in its row each part is; empty if it is alone there."""
        if order.pages_beside == 1:
            return ()
        return tuple(self.pages[tile * self.parts + part] % order.pages_beside for part in range(self.parts))


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Parts that follow each other in the rows of arrays [1, B, K, S, F], or [1, B, K, F, S]; buffers lie likewise.

    Attributes:
        row, number: int32 [tiles] in scalar memory: the row of each tile, and which of its row it is.
        has: int32 [tiles] in scalar memory: bit p is 1 if part p holds something.
        parts: pieces per tile, `MOST_PIECES` at most.
        core: which core this is; each has a part of the heads.
    """

    row: Any
    number: Any
    has: Any
    parts: int
    core: Any

    def holds(self, tile: Any, part: Any) -> Any:
        """Whether there is anything in a part."""
        return (self.has[tile] >> part) & 1 == 1

    def whole(self, array: Any, buffer: Any, tile: Any, order: Order) -> list[tuple[Any, Any]]:
        """From where to where a tile is copied of which each part holds something."""
        return [self._copy(array, buffer, tile, 0, self.parts, order)]

    def some(self, array: Any, buffer: Any, tile: Any, part: Any, order: Order) -> tuple[Any, Any]:
        """From where to where a part is copied."""
        return self._copy(array, buffer, tile, part, 1, order)

    def held(self, buffer: Any) -> list[Any]:
        """What lies in a buffer: [heads, ...], all parts together."""
        return [buffer]

    def places(self, tile: Any, order: Order) -> tuple[Any, ...]:
        """As `Pages.places`."""
        del tile, order
        return ()

    def _copy(self, array: Any, buffer: Any, tile: Any, part: Any, parts: int, order: Order) -> tuple[Any, Any]:
        def tokens(part: Any) -> tuple[Any, ...]:
            found = pl.ds(pl.multiple_of(part * PIECE, PIECE), parts * PIECE)
            return (slice(None), found) if order.tokens_last else (found,)

        source = array.at[0, self.row[tile], pl.ds(self.core * buffer.shape[0], buffer.shape[0])]
        return source.at[:, *tokens(self.number[tile] * self.parts + part)], buffer.at[:, *tokens(part)]


@dataclasses.dataclass(frozen=True)
class Fetcher:
    """Two buffers for each array of the cache, which tiles fill in turn.

    Attributes:
        parts: what a tile is made of.
        arrays: of each array, by name, what it is in HBM, its buffers [2, ...] in VMEM, and how it lies.
        arrived: counts what was copied, for each of the two.
        whole: int32 [tiles], 1 where every part holds something.
    """

    parts: Pages | Pieces
    arrays: dict[str, tuple[Any, Any, Order]]
    arrived: Any
    whole: Any

    def start(self, tile: Any) -> None:
        """Begins to copy a tile; what was in its buffers must have been read."""

        @pl.when(self.whole[tile] == 1)
        def _():
            for array, buffers, order in self.arrays.values():
                for source, target in self.parts.whole(array, buffers.at[tile % 2], tile, order):
                    self._copy(source, target, tile).start()

        self._some(tile, lambda copy: copy.start())

    def wait(self, tile: Any) -> None:
        """Waits until a tile is there."""

        @pl.when(self.whole[tile] == 1)
        def _():
            for _, buffers, _ in self.arrays.values():
                # It waits for as many bytes as these are, whatever brought them.
                self._copy(buffers.at[tile % 2], buffers.at[tile % 2], tile).wait()

        self._some(tile, lambda copy: copy.wait())

    def held(self, tile: Any, role: str) -> dict[str, list[Any]]:
        """What lies in the buffers of the keys or the values, by array: some [heads, ...], one behind the other."""
        return {
            name.split()[1]: self.parts.held(buffers.at[tile % 2])
            for name, (_, buffers, _) in self.arrays.items()
            if name.startswith(f"{role} ")
        }

    def places(self, tile: Any, role: str) -> tuple[Any, ...]:
        """Which of the pages in its row each part of the scales is; empty if it is alone there, or there are none."""
        scales = self.arrays.get(f"{role} scale")
        return () if scales is None else self.parts.places(tile, scales[2])

    def _some(self, tile: Any, what: Callable[[Any], None]) -> None:
        """Does it with the copies of those parts that hold something, if not all do."""

        @pl.when(self.whole[tile] == 0)
        def _():
            @pl.loop(0, self.parts.parts)
            def _(part):
                @pl.when(self.parts.holds(tile, part))
                def _():
                    for array, buffers, order in self.arrays.values():
                        ends = self.parts.some(array, buffers.at[tile % 2], tile, part, order)
                        what(self._copy(*ends, tile))

    def _copy(self, source: Any, target: Any, tile: Any) -> Any:
        return pltpu.make_async_copy(source, target, self.arrived.at[tile % 2])
