"""Whether a step would write to a page that something else holds: what can be seen outside jit, on the host."""

import numpy as np
from jaxtyping import Bool, Int

from kvattn.errors import BlockStateError, RangeError

Columns = Bool[np.ndarray, "B *K columns"]


def refuse_shared(pages: Int[np.ndarray, "B *K columns"], written: Columns, seen: Columns, page_size: int) -> None:
    """Refuses steps whose new tokens would go to a page that another column of a table writes to, or reads.

    Args:
        pages: which page each entry of the tables is: equal numbers, one page.
        written: the entries that new tokens go to.
        seen: those whose tokens are still attended to.
        page_size: R.

    Raises:
        RangeError: a page that two rows would write to, or one row twice.
        BlockStateError: a page that is written to and read through another entry.
    """
    writer: dict[int, tuple[int, ...]] = {}
    for entry in map(tuple, np.argwhere(written).tolist()):
        page = int(pages[entry])
        before = writer.setdefault(page, entry)
        if before[:-1] != entry[:-1]:
            raise RangeError(
                f"{_two(before, entry)} would both write to page {page}: copy it for one of them first (copy_pages)."
            )
        if before != entry:
            raise RangeError(
                f"{_row(entry)} names page {page} in columns {before[-1]} and {entry[-1]} and would write to both: "
                "give each a page of its own."
            )
    for entry in map(tuple, np.argwhere(seen & ~written & np.isin(pages, list(writer))).tolist()):
        page = int(pages[entry])
        raise BlockStateError(
            f"{_row(writer[page])} would write to page {page}, where {_row(entry)} reads its tokens from slot "
            f"{entry[-1] * page_size} on. Nothing was written. Copy the page first (copy_pages), and name the copy in "
            f"the table of {_row(writer[page])}."
        )


def _row(entry: tuple[int, ...]) -> str:
    return f"row {entry[0]}" if len(entry) == 2 else f"row {entry[0]}, head {entry[1]}"


def _two(one: tuple[int, ...], other: tuple[int, ...]) -> str:
    if len(one) == 2:
        return f"rows {one[0]} and {other[0]}"
    return f"{_row(one)} and {_row(other)}"
