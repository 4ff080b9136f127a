"""Work for a fixed number of programs: each takes an equal share of all tiles that hold something.

Tiles are counted head by head, row by row, and cut into runs of one length, so one long row fills the chip as well as
many short ones, and neither capacity nor padding costs anything. All of it is found out on the device: no plan on the
host, nothing compiled anew for other lengths.

A segment is what a program reads of one row and head; segments are numbered head * B + row. As both its segments and
the programs follow one another, segment + program never comes twice: it is where the partial state of a program for a
segment lies.
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Int32

from kvattn._typing import Array
from kvattn.attend.request import Request
from kvattn.masks import Mask
from kvattn.pallas.tiles import near_and_filled

LANES = 128
"""Threads of a warpgroup: vectors over rows are padded to whole multiples."""


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Which tiles of each row to read: those before `hole` and `count - hole` from `after` on.

    A window and sinks, or a ring, leave one hole; where there are more, those after the first are read as well.

    Attributes:
        count: tiles; `rows` is B rounded up to `LANES`, or nothing for a single row.
        hole: the first tile that is not needed.
        after: the next one that is.
        run: the first tile whose every slot holds a token, for every head,
        run_end: and the next one of which this is not true.
    """

    count: Int32[Array, "*rows"]
    hole: Int32[Array, "*rows"]
    after: Int32[Array, "*rows"]
    run: Int32[Array, "*rows"]
    run_end: Int32[Array, "*rows"]

    def arrays(self) -> dict[str, Int32[Array, " rows"]]:
        """All five, by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def survey(request: Request, positions: Int32[Array, "B K1 S"], tile: int) -> Rows:
    """Looks for the tiles of `tile` slots that hold what some query can reach.

    Args:
        request: the call.
        positions: S a multiple of `tile`, -1 for empty slots.
        tile: slots per tile.
    """
    near, whole = (jnp.pad(x, ((0, -x.shape[0] % LANES), (0, 0))) for x in near_and_filled(request, positions, tile))
    tiles = near.shape[1]
    # Each number by one reduction of its own, so that XLA makes one kernel of all five.
    t = jnp.arange(tiles, dtype=jnp.int32)[None]
    before = lambda x: jnp.pad(x[:, :-1], ((0, 0), (1, 0)))
    first = lambda condition: jnp.min(jnp.where(condition, t, tiles), axis=1)
    end = jnp.max(jnp.where(near, t + 1, 0), axis=1)
    hole = jnp.minimum(first(~near), end)
    after = jnp.minimum(first((t > 0) & near & ~before(near)), end)
    return Rows(hole + end - after, hole, after, first(whole), first(~whole & before(whole)))


def in_order(
    mask: Mask, tile: int, count: Int32[Array, "*rows"], first: Int32[Array, "*rows"], last: Int32[Array, "*rows"]
) -> Rows:
    """`survey` without looking: of rows whose slot s holds the token of position s. Inside kernels, too.

    Args:
        mask: who attends to whom.
        tile: slots per tile.
        count: slots that hold a token.
        first: the lowest position of a query,
        last: and the highest; both -1 if there is none.
    """
    end = jnp.where(last >= 0, count, 0)
    if mask.causal:
        end = jnp.minimum(end, last + 1)
    if mask.end is not None:
        end = jnp.minimum(end, mask.end)
    nothing = end * 0  # `zeros_like` cannot be lowered in a kernel under an Explicit mesh
    begin = nothing + mask.begin
    if mask.reach is not None:
        begin = jnp.maximum(begin, first - (mask.reach - 1))
    hole, near = nothing, begin
    if mask.window is not None:
        near = jnp.maximum(begin, first - (mask.window - 1))
        if mask.num_sinks:
            sinks = jnp.minimum(end, mask.num_sinks)
            hole = jnp.where(begin < sinks, lax.div(sinks + (tile - 1), tile), 0)
    whole_end = lax.div(end, tile)
    end = jnp.maximum(jnp.where(near < end, lax.div(end + (tile - 1), tile), 0), hole)
    after = jnp.minimum(jnp.maximum(lax.div(near, tile), hole), end)
    return Rows(hole + end - after, hole, after, lax.div(near + (tile - 1), tile), whole_end)


def alike(
    mask: Mask, low: Int32[Array, ""], high: Int32[Array, ""], first: Int32[Array, ""], last: Int32[Array, ""]
) -> Bool[Array, ""]:
    """Whether all queries from position `first` to `last` may attend to the same of the keys from `low` to `high`.

    False where that takes a closer look.
    """
    found = (high <= first) | (not mask.causal)
    if mask.window is not None:
        found &= (low > last - mask.window) | (high < mask.num_sinks)
    if mask.reach is not None:
        found &= low > last - mask.reach
    return found


def reckoned(
    mask: Mask,
    tile: int,
    ring: int,
    count: Int32[Array, "*rows"],
    first: Int32[Array, "*rows"],
    last: Int32[Array, "*rows"],
) -> Rows:
    """`in_order`, or `turned` if there is a ring, which one query reads."""
    return turned(mask, tile, ring, count, last) if ring else in_order(mask, tile, count, first, last)


def position_in_ring(slot: Int32[Array, "*slots"], ring: int, count: Int32[Array, ""]) -> Int32[Array, "*slots"]:
    """The last position below `count` that is `slot` modulo `ring`; negative where there is none."""
    turn = lax.rem(count, jnp.int32(ring))
    return jnp.where(slot < ring, slot + (count - turn) - jnp.where(slot < turn, 0, ring), -1)


def turned(mask: Mask, tile: int, ring: int, count: Int32[Array, "*rows"], at: Int32[Array, "*rows"]) -> Rows:
    """`survey` without looking: of rows whose slot s holds the last position below `count` that is s modulo `ring`.

    Args:
        mask: who attends to whom; of what it may say only causality and a window.
        tile: slots per tile.
        ring: slots.
        count: tokens seen.
        at: the position of the only query, -1 if there is none.
    """
    last = jnp.minimum(count - 1, at) if mask.causal else jnp.where(at >= 0, count - 1, at)
    first = jnp.maximum(count - ring, 0)
    if mask.window is not None:
        first = jnp.maximum(first, at - (mask.window - 1))
    number = jnp.maximum(last - first + 1, 0)
    # Their slots: from `begin` to before `begin + number`, and what is past the last slot goes on at the first.
    begin = lax.rem(jnp.maximum(first, 0), ring)
    end = jnp.where(number > 0, begin + number, begin)
    wraps, rest = end > ring, jnp.maximum(end - ring, 0)
    up = lambda n: lax.div(n + (tile - 1), tile)
    hole, begin_tile = jnp.where(wraps, up(rest), 0), lax.div(begin, tile)
    behind = jnp.where(number > 0, up(jnp.minimum(end, ring)), begin_tile)
    after = jnp.minimum(jnp.maximum(begin_tile, hole), behind)
    # The longer run of whole tiles, where there are two.
    whole, whole_end = up(begin), lax.div(jnp.minimum(end, ring), tile)
    front = wraps & (lax.div(rest, tile) >= whole_end - whole)
    every = number == ring
    run = jnp.where(front | every, 0, whole)
    run_end = jnp.where(every, lax.div(end * 0 + ring, tile), jnp.where(front, lax.div(rest, tile), whole_end))
    return Rows(hole + behind - after, hole, after, run, run_end)


class Counts:
    """Inside a kernel: how the tiles are shared out, from a vector of counts.

    Its sums use scratch memory that warpgroups have in common, so one warpgroup only may ask.
    """

    def __init__(
        self,
        count: Int32[Array, " rows"],
        index: Int32[Array, " rows"],
        batch: int,
        heads: int,
        programs: int,
        least: int = 1,
    ):
        """Looks at all rows.

        Args:
            count: tiles of each.
            index: 0, 1, 2, ...
            batch: B.
            heads: how often every row is walked along.
            programs: among how many tiles are shared out.
            least: how many a program takes at least, as long as there are any.
        """
        self.count, self.index, self.batch = count, index, batch
        self.total = jnp.sum(count)
        self.work = self.total * heads
        self.share = lax.max(lax.div(self.work + (programs - 1), programs), least)

    def before(self, row: Int32[Array, ""]) -> Int32[Array, ""]:
        """Tiles of the rows before this one."""
        return jnp.sum(jnp.where(self.index < row, self.count, 0))

    def locate(self, item: Int32[Array, ""]) -> tuple[Int32[Array, ""], Int32[Array, ""]]:
        """Segment and tile in it of tile `item`."""
        total = lax.max(self.total, 1)
        head, rest = lax.div(item, total), lax.rem(item, total)
        row = jnp.int32(0)
        # The last row with no more than `rest` tiles before it, bit by bit: empty rows are passed over.
        for bit in reversed(range((self.batch - 1).bit_length())):
            there = row + (1 << bit)
            fits = (there < self.batch) & (self.before(there) <= rest)
            row = jnp.where(fits, there, row)
        return head * self.batch + row, rest - self.before(row)

    def of_program(
        self, program: Int32[Array, ""]
    ) -> tuple[Int32[Array, ""], Int32[Array, ""], Int32[Array, ""], Int32[Array, ""]]:
        """First segment and tile in it, last segment and end in it; the first behind the last if there is no work."""
        low = program * self.share
        high = lax.min(low + self.share, self.work)
        segment, start = self.locate(lax.min(low, lax.max(self.work - 1, 0)))
        last, stop = self.locate(lax.max(high - 1, 0))
        return jnp.where(low < high, segment, last + 1), start, last, stop + 1
