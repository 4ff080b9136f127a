"""Rows that read pages together (`kvattn.cache.shared`), as caches of fewer rows over the same pool.

Attention of a level is that of a cache whose rows are spans: their pages are a table of their own, and the queries of
the members come one after the other. What is left of a row is a cache of shorter rows. So every implementation attends
to either as to any other cache. Tokens are counted from the first that is in such a cache: masks and ALiBi go by
distances, which stay.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Float, Int32, Shaped

from kvattn._typing import AnyArray, Array
from kvattn.attend.part import Part
from kvattn.cache import Cache, View
from kvattn.masks import EMPTY

FEW_TOKENS = 8
"""New tokens of a row up to which a step is bound by what it reads."""

MOST_SLOTS = 512
"""Slots that `"xla"` gathers at once, of all spans: there are many queries for each, so larger products pay."""


@dataclasses.dataclass(frozen=True, eq=False)
class Spans:
    """The spans of a level.

    Attributes:
        members: row numbers; past the last row for none.
        first: the token that each span begins with.
        cache: a row for each span.
        batch: B.
    """

    members: Int32[Array, "spans members"]
    first: Int32[Array, " spans"]
    cache: Cache
    batch: int

    def view(self, part: Part) -> View:
        """Their pages."""
        return part.view(self.cache).in_blocks_of(MOST_SLOTS // self.first.shape[0])

    def queries(self, query: Shaped[Array, "B T N H"]) -> Shaped[Array, "spans Q N H"]:
        """Those of the members, one member's T after the other's."""
        taken = jnp.take(query, self.members, axis=0, mode="clip")
        return taken.reshape(taken.shape[0], -1, *taken.shape[3:])

    def positions(self, positions: Int32[Array, "B T"]) -> Int32[Array, "spans Q"]:
        """Those of the queries, as they are counted here; EMPTY for pads and nobody."""
        taken = jnp.take(positions, self.members, axis=0, mode="clip")
        is_real = (self.members < self.batch)[..., None] & (taken >= 0)
        return jnp.where(is_real, taken - self.first[:, None, None], EMPTY).reshape(taken.shape[0], -1)

    def by_row(
        self, out: Float[Array, "spans Q N Hv"], lse: Float[Array, "spans Q N"]
    ) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
        """What the queries found, row by row; rows that are no members found nothing."""
        count = self.members.size
        place = jnp.full((self.batch,), count, jnp.int32)
        place = place.at[self.members.reshape(-1)].set(jnp.arange(count, dtype=jnp.int32), mode="drop")
        rows = lambda x: jnp.take(x.reshape(count, -1, *x.shape[2:]), place, axis=0, mode="clip")
        return rows(out), jnp.where((place < count)[:, None, None], rows(lse), -jnp.inf)


@dataclasses.dataclass(frozen=True, eq=False)
class Parted:
    """What rows of a cache read together, and what each reads by itself.

    Attributes:
        own: what is left of each row.
        first: the token that this begins with. None: nothing is shared.
        levels: what is shared.
    """

    own: Cache
    first: Int32[Array, " B"] | None = None
    levels: tuple[Spans, ...] = ()

    def positions(self, positions: Int32[Array, "B T"]) -> Int32[Array, "B T"]:
        """As they are counted in `own`; EMPTY for pads."""
        return positions if self.first is None else jnp.where(positions < 0, EMPTY, positions - self.first[:, None])

    def slots(self, slots: Int32[Array, "B *K T"]) -> Int32[Array, "B *K T"]:
        """Likewise; negative: none. A cache that shares has its slots in order, those of all heads."""
        return slots if self.first is None else slots - self.first[:, None]


def parted(cache: Cache, length: int, num_new: Int32[AnyArray, " B"] | None = None) -> Parted:
    """Parts a cache by its levels. Rows that one does not fit, as they were trimmed since, read by themselves.

    Args:
        cache: before the step.
        length: T; of steps of many tokens nothing is shared.
        num_new: tokens that were written and that `lengths` does not count. None: there are none.
    """
    after = cache if num_new is None else cache.replace(lengths=cache.lengths + num_new)
    if cache.shared is None or length > FEW_TOKENS:
        return Parted(after)
    table, size, batch = cache.page_table, cache.page_size, cache.batch_size
    assert table is not None  # a cache that shares has pages
    full, first, levels = cache.lengths // size, jnp.zeros_like(cache.lengths), []
    for level in cache.shared:
        begin, end = level.begin[:, None], level.end[:, None]
        at = jnp.clip(level.members, 0, batch - 1)
        joins = (level.members >= 0) & (first[at] == begin) & (begin < end) & (end <= full[at])
        members = jnp.where(joins, level.members, batch)
        pages = _columns(jnp.take(table, at[:, 0], axis=0), level.begin, level.end)
        tokens = (level.end - level.begin) * size
        spans = cache.replace(page_table=pages, lengths=tokens, shared=None)
        levels.append(Spans(members, level.begin * size, spans, batch))
        first = first.at[members].set(jnp.broadcast_to(end, members.shape), mode="drop")
    own = _columns(table, first, jnp.full_like(first, table.shape[1]))
    first = first * size
    return Parted(after.replace(page_table=own, lengths=after.lengths - first, shared=None), first, tuple(levels))


def _columns(
    table: Int32[Array, "n columns"], begin: Int32[Array, " n"], end: Int32[Array, " n"]
) -> Int32[Array, "n columns"]:
    """The columns [begin, end) of each row, moved to its front."""
    column = begin[:, None] + jnp.arange(table.shape[1], dtype=jnp.int32)[None]
    return jnp.where(column < end[:, None], jnp.take_along_axis(table, column, axis=1, mode="clip"), -1)
