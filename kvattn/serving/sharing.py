"""Which rows of a batch had better read their pages together, found from page tables alone.

A span is a run of full pages that the tables of several rows, its members, name in the same columns. Read by each, it
costs as many reads as there are members; read together, one (Hydragen, arXiv:2402.05099). `PagedKVCache.with_tables`
takes what is found here, level by level: a system prompt that all rows share, and behind it what some of them share.

A compiled step has room for a fixed number of spans and members, level by level: the *shapes*. What does not fit in
them is read row by row.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int32

from kvattn.errors import ConfigError, DTypeError, RangeError, ShapeError
from kvattn.serving import checks
from kvattn.serving.counts import NO_BLOCK

Shapes = Sequence[tuple[int, int]]
"""Of each level (spans, members of each)."""

FEWEST = 512
"""Reads of one row, in tokens, that a level takes the time of: where it saves fewer it is left out."""
EMPTY_SEAT = 8
"""So many members that a span has room for and has not cost as much as reading it: products are taken of them too."""


class SharedLevel(NamedTuple):
    """Spans that are read in one go, as arrays of a fixed shape.

    Attributes:
        members: row numbers, -1 where there is none; first the one whose table is that of the span.
        begin: the first column of each span,
        end: and the one after the last; both 0 where nobody is a member.
    """

    members: Int32[np.ndarray, "spans members"]
    begin: Int32[np.ndarray, " spans"]
    end: Int32[np.ndarray, " spans"]


def sharing_shapes(batch_size: int) -> tuple[tuple[int, int], ...]:
    """The shapes that `shared_prefixes` fills if it is given none: a span of all rows, and behind it spans of four.

    A level has as many seats as there are rows, so it never takes more products than the rows by themselves. More
    members than a span has room for take several, which read the same pages once each.

    Args:
        batch_size: B.
    """
    checks.integer("batch_size", batch_size, 0)
    few = 4 if batch_size >= 8 else 2
    every = (1, max(batch_size, 1))
    return (every,) if batch_size < 2 * few else (every, (batch_size // few, few))


def shared_prefixes(
    tables: Int[np.ndarray, "B W"],
    lengths: Int[np.ndarray, " B"] | Sequence[int],
    page_size: int,
    *,
    window: int | None = None,
    shapes: Shapes | None = None,
    fewest: int = FEWEST,
) -> tuple[SharedLevel, ...] | None:
    """Finds what rows should read together, for `PagedKVCache.with_tables`. A fraction of a millisecond.

    Rows share what their tables name alike from the first column on, as far as each of them has filled it. Of k rows
    that share s tokens, n spans save (k - n) s reads; seats that stay empty cost s / 8 each. Levels are filled one
    after the other, the largest saving first, and one that saves fewer than `fewest` reads is left empty.

    Args:
        tables: the pages of each row. Leading entries of -1 are those that a window has left: pages that other rows
            still have there.
        lengths: tokens of each row, before the step.
        page_size: R.
        window: of the layers whose tables they are: tokens that it has left count for nothing. None: they have none.
        shapes: of each level how many spans it has, and how many members each. None: `sharing_shapes`.
        fewest: tokens. 0: whatever can be shared.

    Returns:
        the levels, in exactly these shapes; None where nothing is worth it, which is the step without.

    Raises:
        ShapeError: tables and lengths that do not belong together.
        DTypeError: no integers.
        RangeError: a negative length, more tokens than the columns hold, a page size, window or shape below 1.
        ConfigError: no shapes.
    """
    tables, counts = _checked(tables, lengths, page_size)
    shapes = sharing_shapes(len(tables)) if shapes is None else _shapes(shapes)
    fewest = checks.integer("fewest", fewest, 0)
    seen = counts + 1 - (counts + 1 if window is None else checks.integer("window", window, 1))
    full, unseen = counts // page_size, np.maximum(seen, 0) // page_size
    if tables.size == 0:
        return None
    keys, gone = _keys(tables, full)
    tree = _Tree(keys, np.maximum(unseen, gone))
    best: tuple[int, list[list[_Seated]]] = (0, [])
    # An early level may take what a later one has better seats for; the last one takes from nobody.
    for used in itertools.product((True, False), repeat=len(shapes) - 1):
        levels = tree.filled(shapes, (*used, True), -(-fewest // page_size))
        saved = sum(seated.saved for level in levels for seated in level)
        best = max(best, (saved, levels), key=lambda found: found[0])
    if not best[0]:
        return None
    left = gone.tolist()
    return tuple(_arrays(shape, level, left) for shape, level in zip(shapes, best[1], strict=True))


def tokens_read(
    lengths: Int[np.ndarray, " B"] | Sequence[int], page_size: int, shared: Iterable[SharedLevel] | None
) -> int:
    """How many tokens a step reads, times the bytes of one in all layers what it costs. Windows are not looked at.

    Args:
        lengths: tokens of each row.
        page_size: R.
        shared: what rows read together; None: nothing.
    """
    own, spans = np.array(lengths, np.int64), 0
    for members, begin, end in shared or ():
        there = members >= 0
        spans += int(np.sum((end - begin)[there.any(axis=1)])) * page_size
        columns = np.broadcast_to((end - begin)[:, None], members.shape)
        np.subtract.at(own, members[there], columns[there] * page_size)
    return int(own.sum()) + spans


def _checked(
    tables: Int[np.ndarray, "B W"], lengths: Int[np.ndarray, " B"] | Sequence[int], page_size: int
) -> tuple[Int[np.ndarray, "B W"], Int[np.ndarray, " B"]]:
    """Tables and lengths as arrays that belong together."""
    tables, counts = np.asarray(tables), np.asarray(lengths)
    checks.integer("page_size", page_size, 1)
    for name, x in (("tables", tables), ("lengths", counts)):
        if x.dtype.kind not in "iu" and x.size:
            raise DTypeError(f"{name} must hold integers, got {x.dtype}.")
    if tables.ndim != 2 or counts.shape != tables.shape[:1]:
        raise ShapeError(f"tables and lengths must be [B, W] and [B], got {tables.shape} and {counts.shape}.")
    most = tables.shape[1] * page_size
    if counts.size and (counts.min() < 0 or counts.max() > most):
        raise RangeError(f"lengths must lie in [0, {most}], what the tables have room for, got {counts.tolist()}.")
    return tables, counts


def _shapes(shapes: Shapes) -> Shapes:
    if not shapes:
        raise ConfigError("shapes is empty: name a level, (spans, members) such as (1, 16), or leave it out.")
    return [(checks.integer("spans", n, 1), checks.integer("members", m, 1)) for n, m in shapes]


def _keys(
    tables: Int[np.ndarray, "B W"], full: Int[np.ndarray, " B"]
) -> tuple[Int[np.ndarray, "B W1"], Int[np.ndarray, " B"]]:
    """Tables in which equal entries mean a shared page, with a column more in which none is; and what each has left."""
    batch, width = tables.shape
    column, row = np.arange(width + 1)[None], np.arange(batch)[:, None]
    nothing = -2 - row
    keys = np.empty((batch, width + 1), tables.dtype)
    keys[:, :width] = tables
    np.copyto(keys, nothing, where=column >= full[:, None], casting="unsafe")
    if not (keys[:, 0] == NO_BLOCK).any():
        return keys, np.zeros(batch, np.int64)
    left = keys == NO_BLOCK
    gone = np.argmin(left, axis=1)
    # What a window has left of a row is what the row has there that still has it, if both go on with the same page.
    keys = np.where(column < gone[:, None], nothing, keys)
    for b in np.argsort(gone, kind="stable").tolist():
        g = gone[b]
        if g and (same := np.nonzero((gone < g) & (keys[:, g] == keys[b, g]))[0]).size:
            keys[b, :g] = keys[same[np.argmin(gone[same])], :g]
        elif g and (same := np.nonzero((gone == g) & (keys[:, g] == keys[b, g]))[0]).size:
            keys[b, :g] = keys[same[0], :g]
    return keys, gone


class _Seated(NamedTuple):
    """Rows that take one or several spans together.

    Attributes:
        rows: their numbers.
        begin: the first column,
        end: and the one after the last.
        saved: columns that need not be read.
    """

    rows: list[int]
    begin: int
    end: int
    saved: int


class _Tree:
    """The prefixes that two rows or more share, each within those that it goes on from.

    Rows are sorted so that those of a prefix are neighbours: [first, last) of `order`. Prefixes are in order of
    `first`, the shorter before those within it.
    """

    def __init__(self, keys: Int[np.ndarray, "B W1"], unseen: Int[np.ndarray, " B"]):
        order = sorted(range(len(keys)), key=[key.tobytes() for key in keys].__getitem__)
        ordered = keys[order]
        common = np.argmax(ordered[1:] != ordered[:-1], axis=1).tolist()
        found, stack = [], []
        for i, depth in enumerate([*common, 0], 1):
            first = i - 1
            while stack and stack[-1][0] > depth:
                deep, first = stack.pop()
                found.append((first, -i, deep))
            if depth > (stack[-1][0] if stack else 0):
                stack.append((depth, first))
        self.order = order
        self.prefixes = [(first, -last, depth) for first, last, depth in sorted(found)]
        left = unseen[order].tolist() if unseen.any() else [0] * len(order)
        self.unseen = [max(left[first:last]) for first, last, _ in self.prefixes]

    def filled(self, shapes: Shapes, used: Sequence[bool], fewest: int) -> list[list[_Seated]]:
        """The rows that take each level's spans.

        Args:
            shapes: of the levels.
            used: which of them to fill.
            fewest: columns that a level has to save.
        """
        begun, open_to = [0] * len(self.prefixes), [True] * len(self.prefixes)
        levels = []
        for (spans, members), use in zip(shapes, used, strict=True):
            level = self._level(spans, members, begun, open_to) if use else []
            if level and sum(seated.saved for _, seated in level) >= max(fewest, 1):
                for i, seated in level:
                    self._close(i, seated, begun, open_to)
            else:
                level = []
            levels.append([seated for _, seated in level])
        return levels

    def _level(self, spans: int, members: int, begun: list[int], open_to: list[bool]) -> list[tuple[int, _Seated]]:
        """Prefixes to read, the largest saving first, as long as there are spans, and their rows."""
        found = []
        for i, (first, last, depth) in enumerate(self.prefixes):
            length = depth - max(begun[i], self.unseen[i])
            if open_to[i] and length > 0:
                found.append((_saved(last - first, -(-(last - first) // members), members, length), i))
        found.sort(key=lambda saving: -saving[0])
        taken: list[tuple[int, _Seated]] = []
        intervals: list[tuple[int, int]] = []
        for saved, i in found:
            first, last, depth = self.prefixes[i]
            if saved <= 0 or spans == 0:
                break
            if any(first < b and a < last for a, b in intervals):
                continue
            count = min(last - first, spans * members)
            needed = -(-count // members)
            if count < last - first:
                saved = _saved(count, needed, members, depth - max(begun[i], self.unseen[i]))
            if saved > 0:
                spans -= needed
                intervals.append((first, last))
                taken.append((i, _Seated(self.order[first : first + count], begun[i], depth, saved)))
        return taken

    def _close(self, i: int, seated: _Seated, begun: list[int], open_to: list[bool]) -> None:
        """Has what is within a prefix begin behind it from the next level on; what it is within is done with."""
        first, last, depth = self.prefixes[i]
        for j, (a, b, _) in enumerate(self.prefixes):
            if first <= a and b <= last and j >= i:
                begun[j] = depth
                open_to[j] = open_to[j] and len(seated.rows) == last - first
            elif a < last and first < b:
                open_to[j] = False


def _saved(rows: int, spans: int, members: int, length: int) -> int:
    """Columns that need not be read if so many rows read `length` of them in so many spans."""
    return (rows - spans) * length - (spans * members - rows) * length // EMPTY_SEAT


def _arrays(shape: tuple[int, int], level: list[_Seated], gone: list[int]) -> SharedLevel:
    """A level in its shape. A span's first member is one that still has all that any of them has."""
    spans, members = shape
    seats, begin, end = [], [], []
    for seated in level:
        rows = sorted(seated.rows, key=lambda row: (gone[row], row))
        for start in range(0, len(rows), members):
            some = rows[start : start + members]
            seats.append(some + [-1] * (members - len(some)))
            begin.append(seated.begin)
            end.append(seated.end)
    rest = spans - len(seats)
    seats += [[-1] * members] * rest
    return SharedLevel(*(np.array(x, np.int32) for x in (seats, begin + [0] * rest, end + [0] * rest)))
