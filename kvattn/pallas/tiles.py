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
    row, tile, whole = _listed(needed, filled)
    return Plan(jnp.sum(needed, dtype=jnp.int32)[None], row, tile, whole, needed)


def _listed(
    needed: Bool[Array, "B tiles"], filled: Bool[Array, "B tiles"]
) -> tuple[Int32[Array, " entries"], Int32[Array, " entries"], Int32[Array, " entries"]]:
    """Row, tile and whether it is filled, of what is needed, in order; what follows means nothing.

    By counting and comparing, which is what vector units do. `jnp.nonzero` would scatter and look up one number after
    the other; here whole rows are looked up.
    """
    batch, tiles = needed.shape
    up_to = jnp.cumsum(needed, axis=1, dtype=jnp.int32)  # needed ones up to each tile, itself included
    ends = jnp.cumsum(up_to[:, -1])
    entry = jnp.arange(batch * tiles, dtype=jnp.int32)
    row = jnp.minimum(jnp.sum(ends[None] <= entry[:, None], axis=1, dtype=jnp.int32), batch - 1)
    before = ends - up_to[:, -1]
    of_row = jnp.take(jnp.concatenate([up_to, filled.astype(jnp.int32), before[:, None]], axis=1), row, axis=0)
    number = (entry - of_row[:, -1])[:, None]  # among those of the row
    tile = jnp.minimum(jnp.sum(of_row[:, :tiles] <= number, axis=1, dtype=jnp.int32), tiles - 1)
    here = tile[:, None] == jnp.arange(tiles, dtype=jnp.int32)[None]
    return row, tile, jnp.sum(jnp.where(here, of_row[:, tiles : 2 * tiles], 0), axis=1)


def pages_of(
    chosen: Plan, table: Int32[Array, "B W"], holds: Bool[Array, "B parts_of_all"], num_pages: int
) -> Int32[Array, "entries parts"]:
    """The page of each part of a tile, -1 for one that holds nothing: that is not to be fetched.

    Args:
        chosen: the tiles.
        table: of the cache.
        holds: of every page of every tile, whether it holds something.
        num_pages: P; an entry of the table beyond it, which no intact cache has, is read as page 0.
    """
    batch, tiles = chosen.needed.shape
    fill = ((0, 0), (0, max(holds.shape[1] - table.shape[1], 0)))
    table = jnp.pad(table, fill, constant_values=-1)[:, : holds.shape[1]]
    page = jnp.where(holds, jnp.where((table >= 0) & (table < num_pages), table, 0), -1)
    # A tile's pages are looked up together: number by number it takes longer than attention does.
    return jnp.take(page.reshape(batch * tiles, -1), chosen.row * tiles + chosen.tile, axis=0)


def parts_of(chosen: Plan, holds: Bool[Array, "B parts_of_all"]) -> Int32[Array, " entries"]:
    """Which parts of a tile hold something: bit p for part p.

    Args:
        chosen: the tiles.
        holds: of every part of every tile, whether it holds something.
    """
    batch, tiles = chosen.needed.shape
    cut = holds.reshape(batch * tiles, -1).astype(jnp.int32)
    bits = jnp.sum(cut << jnp.arange(cut.shape[1], dtype=jnp.int32)[None], axis=1)
    return jnp.take(bits, chosen.row * tiles + chosen.tile)
