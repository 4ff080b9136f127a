"""Work for a fixed number of programs: each takes an equal share of all tiles that hold something.

Items are numbered head by head, row by row, tile by tile, and cut into runs of one length, so one long row fills the
chip as well as many short ones, and neither capacity nor padding costs anything. All of it is made on the device from
the positions: no plan on the host, nothing compiled anew for other lengths.
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp

from kvattn._typing import Array
from kvattn.request import Request


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shares:
    """Who reads what. A segment is what one program reads of one row and head; they are numbered head * B + row.

    Of a row, the tiles before `hole` and those from `after` on are read: a window and sinks leave one hole.

    Attributes:
        rows: int32 [B, 5]: hole, after, count of tiles, first and end of a run of tiles whose every slot holds a token.
        programs: int32 [C, 4]: first segment and first tile in it, last segment and end in it. A program without work
            has its first segment behind its last.
        parts: int32 [heads, B, 2]: the first program of a segment, and how many follow one another.
    """

    rows: Array
    programs: Array
    parts: Array


def share_out(request: Request, positions: Array, tile: int, heads: int, programs: int) -> Shares:
    """Shares out the tiles of `tile` slots.

    Args:
        request: the call.
        positions: int32 [B, 1 or K, S], S a multiple of `tile`, -1 for empty slots.
        tile: slots per tile.
        heads: how often every row is walked along.
        programs: C.
    """
    batch, kv_heads, slots = positions.shape
    tiles = slots // tile
    cut = lambda x: x.reshape(batch, kv_heads, tiles, tile)
    near = jnp.any(cut(request.mask.reachable(request.positions, positions)), axis=(1, 3))
    whole = jnp.all(cut(positions >= 0), axis=(1, 3))
    t = jnp.arange(tiles, dtype=jnp.int32)[None]
    first = lambda condition: jnp.min(jnp.where(condition, t, tiles), axis=1, keepdims=True)
    end = jnp.max(jnp.where(near, t + 1, 0), axis=1, keepdims=True)
    hole = jnp.minimum(first(~near), end)
    after = jnp.minimum(first(near & (t >= hole)), end)
    count = hole + end - after
    run = first(whole)
    rows = jnp.concatenate([hole, after, count, run, first(~whole & (t >= run))], axis=1)

    # Sums over pairs of rows: XLA makes one small kernel of them, of a cumulative sum several.
    b = jnp.arange(batch, dtype=jnp.int32)
    before = jnp.sum(jnp.where(b[:, None] > b[None], count[:, 0][None], 0), axis=1, dtype=jnp.int32)
    total = jnp.sum(count, dtype=jnp.int32)
    work = total * heads
    share = jnp.maximum(-(-work // programs), 1)

    def locate(item: Array) -> tuple[Array, Array]:
        head, rest = item // jnp.maximum(total, 1), item % jnp.maximum(total, 1)
        row = jnp.sum((before + count[:, 0])[None] <= rest[:, None], axis=1, dtype=jnp.int32)
        row = jnp.minimum(row, batch - 1)
        here = jnp.sum(jnp.where(b[None] == row[:, None], before[None], 0), axis=1, dtype=jnp.int32)
        return head * batch + row, rest - here

    low = jnp.arange(programs, dtype=jnp.int32) * share
    high = jnp.minimum(low + share, work)
    (segment, start), (last, stop) = locate(low), locate(jnp.maximum(high - 1, 0))
    idle = low >= high
    segment, last = jnp.where(idle, 1, segment), jnp.where(idle, 0, last)
    who = jnp.stack([segment, start, last, stop + 1], axis=1)

    begin = jnp.arange(heads, dtype=jnp.int32)[:, None] * total + before[None]
    lowest = begin // share
    length = jnp.where(count[:, 0] > 0, (begin + count[:, 0] - 1) // share - lowest + 1, 0)
    return Shares(rows, who, jnp.stack([lowest, length], axis=2))
