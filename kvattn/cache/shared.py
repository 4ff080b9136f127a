"""Which rows read which pages together, so that what sequences share is read once for all of them.

A *span* is a run of columns in which the tables of several rows, its members, name the same pages. Spans are read level
by level: a row is a member of one span of each level at most, and its spans follow one another from its first column on,
such as a system prompt and few-shot prompts behind it. What a row does not share it reads by itself, and the parts are
merged (Hydragen, arXiv:2402.05099; FlashInfer's cascade).

All of it is data: who shares what may change from step to step within the same shapes, and nothing is compiled anew.
Which spans are worth it is decided on the host (`kvattn.serving.shared_prefixes`).
"""

import dataclasses
import typing
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int32

from kvattn import _checks
from kvattn._trees import portable
from kvattn._typing import Array
from kvattn.errors import RangeError, ShapeError

NOBODY = -1
"""Where a span has no further member."""


@typing.no_type_check
@portable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Level:
    """Spans that are read in one go.

    Attributes:
        members: row numbers, `NOBODY` where there is none. Its first member's table is that of a span.
        begin: the first column of each span,
        end: and the one after the last.
    """

    members: Int32[Array, "spans members"]
    begin: Int32[Array, " spans"]
    end: Int32[Array, " spans"]


Levels = tuple[Level, ...]


@dataclasses.dataclass(frozen=True)
class Rows:
    """What is known of the rows that a plan is made for.

    Attributes:
        table: their pages.
        lengths: their tokens.
        needed: the entries of the table whose pages hold a token that may be attended to; others mean nothing.
        page_size: R.
    """

    table: Int32[Array, "B columns"]
    lengths: Int32[Array, " B"]
    needed: Bool[Array, "B columns"]
    page_size: int


def levels_of(shared: Any) -> Levels:
    """The levels that were given, as int32.

    Raises:
        ShapeError: something else than levels (members [spans, members], begin [spans], end [spans]).
        DTypeError: not integers.
        RangeError: beyond int32.
    """
    if not isinstance(shared, Sequence):
        raise ShapeError(f"shared must be a sequence of levels (members, begin, end), got {type(shared).__name__}.")
    found = []
    for i, level in enumerate(shared):
        parts = (level.members, level.begin, level.end) if isinstance(level, Level) else level
        if not isinstance(parts, Sequence) or len(parts) != 3:
            raise ShapeError(f"shared[{i}] must be (members, begin, end), got {level!r}.")
        members, begin, end = (
            jnp.asarray(_checks.int32(f"{name} of shared[{i}]", x))
            for name, x in zip(("members", "begin", "end"), parts, strict=True)
        )
        if members.ndim != 2 or 0 in members.shape or begin.shape != end.shape or begin.shape != members.shape[:1]:
            raise ShapeError(
                f"shared[{i}] must be members [spans, members], begin [spans] and end [spans], each at least 1, got "
                f"{members.shape}, {begin.shape} and {end.shape}."
            )
        found.append(Level(members, begin, end))
    return tuple(found)


def fitting(levels: Levels, rows: Rows) -> tuple[Levels, Bool[Array, " B"]]:
    """The levels without the spans that contradict the tables, and the rows that do.

    Raises:
        RangeError: a span that can be seen to contradict them.
    """
    bad, begun = jnp.zeros_like(rows.lengths, bool), jnp.zeros_like(rows.lengths)
    found = []
    for i, level in enumerate(levels):
        wrong = jnp.zeros_like(level.members, bool)
        for misfit, why in _misfits(level, rows, begun):
            if _checks.is_concrete(misfit) and np.any(misfit):
                span, member = np.argwhere(np.asarray(misfit))[0].tolist()
                row, columns = int(level.members[span, member]), (int(level.begin[span]), int(level.end[span]))
                raise RangeError(
                    f"span {span} of shared[{i}] has row {row} read the columns {columns[0]} to {columns[1] - 1} of row "
                    f"{int(level.members[span, 0])}'s table, but {why}. Make it from the tables and lengths that are "
                    "given (kvattn.serving.shared_prefixes)."
                )
            wrong |= misfit
        bad = bad.at[_known(level.members, wrong, len(bad))].set(True, mode="drop")
        stays = ~jnp.any(wrong, axis=1, keepdims=True)
        level = dataclasses.replace(level, members=jnp.where(stays, level.members, NOBODY))
        end = jnp.broadcast_to(level.end[:, None], level.members.shape)
        begun = begun.at[_known(level.members, stays, len(begun))].set(end, mode="drop")
        found.append(level)
    return tuple(found), bad


def _known(
    members: Int32[Array, "spans members"], where: Bool[Array, "spans #members"], batch: int
) -> Int32[Array, "spans members"]:
    """The row numbers where a condition holds; past the last row, to be dropped, for others and for nobody."""
    return jnp.where(where & (members >= 0) & (members < batch), members, batch)


def _misfits(
    level: Level, rows: Rows, begun: Int32[Array, " B"]
) -> Iterator[tuple[Bool[Array, "spans members"], str]]:
    """What may be wrong with a level: members of which it is true, and words for it.

    Args:
        level: to be looked at.
        rows: what it is for.
        begun: the column at which the next span of each row has to begin.
    """
    batch, columns = rows.table.shape
    begin, end = level.begin[:, None], level.end[:, None]
    there = level.members != NOBODY
    unknown = there & ((level.members < 0) | (level.members >= batch))
    yield unknown, f"rows lie in [0, {batch})"
    there &= ~unknown
    yield there & ((begin < 0) | (end <= begin) | (end > columns)), f"columns lie in [0, {columns})"
    yield there & (level.members[:, :1] == NOBODY), "a span's members come first, and those it has not behind them"
    at = jnp.where(there, level.members, 0)
    times = jnp.zeros((batch,), jnp.int32).at[_known(level.members, there, batch)].add(1, mode="drop")
    yield there & (times[at] > 1), "a row is a member of one span of a level at most"
    yield there & (begin != begun[at]), "the spans of a row follow one another from its first column on"
    yield there & (end > rows.lengths[at] // rows.page_size), "not all of these pages are full of its tokens"
    column = jnp.arange(columns, dtype=jnp.int32)[None]
    inside = (column >= begin) & (column < end)
    other = rows.needed[at] & (rows.table[at] != rows.table[at[:, :1]])
    yield there & jnp.any(other & inside[:, None], axis=2), "its own table names other pages there"


def cleared(levels: Levels | None) -> Levels | None:
    """Levels of the same shapes without members."""
    if levels is None:
        return None
    return tuple(dataclasses.replace(x, members=jnp.full_like(x.members, NOBODY)) for x in levels)
