"""Which rows read which pages together, so that what sequences share is read once for all of them.

A *span* is a run of columns in which the tables of several rows, its members, name the same pages. Spans are read level
by level: a row is a member of one span of each level at most, and its spans follow one another from its first column
on, such as a system prompt and few-shot prompts behind it. What a row does not share it reads by itself, and the parts
are merged (Hydragen, arXiv:2402.05099; FlashInfer's cascade).

All of it is data: who shares what may change from step to step within the same shapes, and nothing is compiled anew.
Which spans are worth it is decided on the host (`kvattn.serving.shared_prefixes`).
"""

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int32

from kvattn import _checks
from kvattn._trees import portable
from kvattn._typing import Array
from kvattn.cache.placed import placed, shardings_of
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


def fitting(
    levels: Levels,
    table: Int32[Array, "B columns"],
    needed: Bool[Array, "B columns"],
    full: Int32[Array, " B"],
) -> tuple[Levels, Bool[Array, " B"]]:
    """The levels without the spans that contradict the tables, and the rows that do.

    Args:
        levels: what rows are to read together.
        table: the pages of each row.
        needed: its entries whose pages hold a token that may be attended to; others need not be equal.
        full: how many of each row's pages are full.

    Raises:
        RangeError: a span that can be seen to contradict them.
    """
    fields = len(jax.tree.leaves(levels))
    where = (*(None,) * fields, *shardings_of(table), *(None,) * len(levels))
    fit, bad, wrong = placed(_fitting, where, levels, table, needed, full)
    for i, (level, by_reason) in enumerate(zip(levels, wrong, strict=True)):
        if _checks.is_concrete(by_reason) and np.any(by_reason):
            reason, span, member = np.argwhere(np.asarray(by_reason))[0].tolist()
            members, begin, end = (np.asarray(x) for x in (level.members, level.begin, level.end))
            raise RangeError(
                f"span {span} of shared[{i}] has row {members[span, member]} read the columns {begin[span]} to "
                f"{end[span] - 1} of row {members[span, 0]}'s table, but {_REASONS[reason]}. Make it from the tables "
                "and lengths that are given (kvattn.serving.shared_prefixes)."
            )
    return fit, bad


_REASONS = (
    "there is no such row",
    "there are no such columns",
    "members come first in a span, and -1 behind them",
    "a row is a member of one span of a level at most",
    "the spans of a row follow one another from its first column on",
    "not all of these pages are full of its tokens",
    "its own table names other pages there",
)


@jax.jit
def _fitting(
    levels: Levels, table: Int32[Array, "B columns"], needed: Bool[Array, "B columns"], full: Int32[Array, " B"]
) -> tuple[Levels, Bool[Array, " B"], list[Bool[Array, "reasons spans members"]]]:
    """`fitting`, and of each level whom which of `_REASONS` is true of."""
    batch, columns = table.shape
    bad, begun, column = jnp.zeros((batch,), bool), jnp.zeros_like(full), jnp.arange(columns, dtype=jnp.int32)[None]
    fit, wrong = [], []
    for level in levels:
        members, begin, end = level.members, level.begin[:, None], level.end[:, None]
        there = (members >= 0) & (members < batch)
        at = jnp.where(there, members, 0)
        numbers = lambda where, members=members: jnp.where(where, members, batch)  # past the last: dropped
        times = jnp.zeros((batch,), jnp.int32).at[numbers(there)].add(1, mode="drop")
        inside = (column >= begin) & (column < end)
        other = needed[at] & (table[at] != table[at[:, :1]])
        by_reason = (
            (begin < 0) | (end <= begin) | (end > columns),
            members[:, :1] == NOBODY,
            times[at] > 1,
            begin != begun[at],
            end > full[at],
            jnp.any(other & inside[:, None], axis=2),
        )
        by_reason = jnp.stack([(members != NOBODY) & ~there, *(there & x for x in by_reason)])
        misfit = jnp.any(by_reason, axis=0)
        bad = bad.at[numbers(there & misfit)].set(True, mode="drop")
        stays = ~jnp.any(misfit, axis=1, keepdims=True)
        begun = begun.at[numbers(there & stays)].set(jnp.broadcast_to(end, members.shape), mode="drop")
        fit.append(dataclasses.replace(level, members=jnp.where(stays, members, NOBODY)))
        wrong.append(by_reason)
    return tuple(fit), bad, wrong


def cleared(levels: Levels | None) -> Levels | None:
    """Levels of the same shapes without members."""
    if levels is None:
        return None
    return tuple(dataclasses.replace(x, members=jnp.full_like(x.members, NOBODY)) for x in levels)
