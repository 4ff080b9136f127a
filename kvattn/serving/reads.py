"""What the rows of an engine read together, step after step."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from kvattn.serving.jobs import Job
from kvattn.serving.sharing import SharedLevel, shared_prefixes, sharing_shapes
from kvattn.serving.texts import Text

Shared = tuple[tuple[SharedLevel, ...] | None, ...]
"""Of every group of layers what its rows read together; None: each row reads for itself."""


class SharedReads:
    """Looks for shared pages where others go than in the last step.

    Only in layers without a window: what others see moves on with every page.

    Args:
        page_size: R.
        num_rows: B.
        windows: of the groups of layers.
        can_share: whether pages can be shared at all.
    """

    def __init__(self, page_size: int, num_rows: int, windows: Sequence[int | None], *, can_share: bool):
        self._page_size = page_size
        self._num_rows = num_rows
        self._windows = tuple(windows)
        self._can_share = can_share and num_rows > 1
        self._last: tuple[list[Text], Shared | None] = [], None

    def of(self, steps: Sequence[tuple[Job, Text]], tables: Sequence[Int32[np.ndarray, "B W"]]) -> Shared | None:
        """What the rows of a step had better read together.

        Args:
            steps: who goes.
            tables: of all rows, for every group.
        """
        if not self._can_share or len(steps) < 2:
            self.forget()
            return None
        who = [text for _, text in steps]
        if who != self._last[0]:
            lengths = np.zeros((self._num_rows,), np.int64)
            for job, text in steps:
                lengths[text.row] = len(job.prompt) + text.num_drawn - 2
            found = tuple(
                shared_prefixes(table, lengths, self._page_size) if window is None else None
                for window, table in zip(self._windows, tables, strict=True)
            )
            self._last = who, found if any(levels is not None for levels in found) else None
        return self._last[1]

    def forget(self) -> None:
        """There was a step in between: who is here again may have other pages."""
        self._last = [], None

    def nothing(self) -> Shared:
        """Levels without members, of the shapes that `of` gives."""
        if not self._can_share:
            return ()
        levels = tuple(
            SharedLevel(np.full(shape, -1, np.int32), *np.zeros((2, shape[0]), np.int32))
            for shape in sharing_shapes(self._num_rows)
        )
        return tuple(levels if window is None else None for window in self._windows)
