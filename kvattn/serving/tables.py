"""The page tables of the rows of a batch, kept as the device takes them."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from kvattn.serving.counts import NO_BLOCK
from kvattn.serving.prefixes import PrefixPool
from kvattn.serving.texts import Text

Tables = tuple[Int32[np.ndarray, "B W"], ...]
"""Of every group of layers the page tables of all rows."""


def nobodys(num_rows: int, widths: Sequence[int]) -> Tables:
    """Tables of so many rows that nobody has.

    Args:
        num_rows: B.
        widths: columns, of every group.
    """
    return tuple(np.full((num_rows, width), NO_BLOCK, np.int32) for width in widths)


def padded(tables: Sequence[Int32[np.ndarray, "M W"]], num_rows: int) -> Tables:
    """Tables of `num_rows` rows, the first of which are given."""
    found = nobodys(num_rows, [table.shape[1] for table in tables])
    for table, some in zip(found, tables, strict=True):
        table[: len(some)] = some
    return found


class RowTables:
    """The tables of all rows. From one tick to the next most are what they were, and only the others are made anew.

    Args:
        pool: of pages. What has changed in it is told once, so nobody else may ask.
        num_rows: B.
        widths: columns, of every group.
    """

    def __init__(self, pool: PrefixPool, num_rows: int, widths: Sequence[int]):
        self._pool = pool
        self._widths = tuple(widths)
        self._texts: list[Text | None] = [None] * num_rows
        self._tables = nobodys(num_rows, widths)

    def of(self, texts: Sequence[Text]) -> Tables:
        """The tables of all rows. They are not written to again: programs that are under way still read them.

        Args:
            texts: those that have rows.
        """
        now: list[Text | None] = [None] * len(self._texts)
        for text in texts:
            now[text.row] = text
        changed = self._pool.take_changed()
        rows = [row for row, text in enumerate(now) if text is not self._texts[row] or text in changed]
        if rows:
            taken = [(row, text) for row in rows if (text := now[row]) is not None]
            fresh = self._pool.tables([text for _, text in taken], self._widths)
            tables = tuple(np.array(table) for table in self._tables)
            for table, some in zip(tables, fresh, strict=True):
                table[rows] = NO_BLOCK
                if taken:
                    table[[row for row, _ in taken]] = some
            self._texts, self._tables = now, tables
        return self._tables
