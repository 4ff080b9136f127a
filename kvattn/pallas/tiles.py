"""Which tiles of a cache a decode step has to read: the plan that a kernel walks along, made on the device.

A tile is a run of slots of one row. Only tiles that hold a token which some query of the row can reach are listed, so a
step costs what the tokens cost: neither the capacity nor the longest row counts, and nothing is compiled anew for other
lengths.
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int32

from kvattn import _manual
from kvattn._typing import Array
from kvattn.attend.request import Request


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """The tiles to read, row by row.

    Attributes:
        count: how many there are; every row has one at least.
        row: the row of each; what follows the first `count` of B * tiles entries means nothing.
        tile: which tile of its row.
        whole: 1 if every slot of the tile holds a token, for every head.
        needed: the same as a table.
    """

    count: Int32[Array, "1"]
    row: Int32[Array, " entries"]
    tile: Int32[Array, " entries"]
    whole: Int32[Array, " entries"]
    needed: Bool[Array, "B tiles"]


def near_and_filled(
    request: Request, positions: Int32[Array, "B K1 S"], rows: int
) -> tuple[Bool[Array, "B tiles"], Bool[Array, "B tiles"]]:
    """Of every tile, whether it holds a token that some query of the row can reach, and whether each slot holds one.

    Args:
        request: the call.
        positions: S a multiple of `rows`, -1 for empty slots.
        rows: slots per tile.

    Returns:
        both; filled means for every head.
    """
    batch, heads, slots = positions.shape
    cut = lambda x: x.reshape(batch, heads, slots // rows, rows)
    near = jnp.any(cut(request.reached(positions)), axis=(1, 3))
    return near, jnp.all(cut(positions >= 0), axis=(1, 3))


def plan(request: Request, positions: Int32[Array, "B K1 S"], rows: int) -> Plan:
    """Lists the tiles of `rows` slots.

    Args:
        request: the call.
        positions: S a multiple of `rows`, -1 for empty slots.
        rows: slots per tile.
    """
    near, filled = near_and_filled(request, positions, rows)
    # A row that reaches nothing still has its output written.
    first = jnp.arange(near.shape[1], dtype=jnp.int32)[None] == 0
    needed = near | (first & ~jnp.any(near, axis=1, keepdims=True))
    flat = jnp.nonzero(needed.reshape(-1), size=needed.size, fill_value=0)[0].astype(jnp.int32)
    row, tile = flat // needed.shape[1], flat % needed.shape[1]
    whole = filled.reshape(-1)[flat].astype(jnp.int32)
    return Plan(jnp.sum(needed, dtype=jnp.int32)[None], row, tile, whole, needed)


def pages_of(
    chosen: Plan, table: Int32[Array, "B W"], per_tile: int, num_pages: int
) -> Int32[Array, "entries per_tile"]:
    """The page to fetch for each part of a tile.

    A part that holds nothing repeats the page its buffer has already, which costs no copy.

    Args:
        chosen: the tiles.
        table: of the cache.
        per_tile: pages per tile.
        num_pages: P; what the table says beyond it is not followed.
    """
    width = table.shape[1]
    column = chosen.tile[:, None] * per_tile + jnp.arange(per_tile, dtype=jnp.int32)[None]
    page = table[chosen.row[:, None], jnp.minimum(column, width - 1)]
    there = (column < width) & (page >= 0) & (page < num_pages)

    def keep(
        last: Int32[Array, " parts"], now: tuple[Int32[Array, " parts"], Bool[Array, " parts"]]
    ) -> tuple[Int32[Array, " parts"], Int32[Array, " parts"]]:
        page, there = now
        page = jnp.where(there, page, last)
        return page, page

    return _manual.scan(keep, jnp.zeros((per_tile,), jnp.int32), (page, there))[1]
