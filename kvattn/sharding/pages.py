"""A pool of pages split over devices: shard d of the axis has the pages from d P / n on.

Tables go on naming the pages of the whole pool. Where rows are split, a row's pages must lie where the row does: the
host allocates them from that device's part. A cache without pages passes everything here as it is.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from kvattn import _checks
from kvattn._typing import Array
from kvattn.attend.step import Stepped, needing_pages
from kvattn.attend.tokens import NewTokens, PerHead
from kvattn.cache import Cache
from kvattn.cache import status as bits
from kvattn.errors import RangeError, ShardingError
from kvattn.policies import Context
from kvattn.sharding.scheme import DeviceStep
from kvattn.sharding.split import MeshAxes


def with_own_pages(step: DeviceStep, axes: MeshAxes) -> DeviceStep:
    """The step of a device on the rows and pages that the mesh axes `axes` give it; None: those are not split."""

    def call(new: NewTokens, per_head: PerHead, cache: Cache) -> Stepped:
        if cache.page_table is None or (axes is None and cache.page_table.ndim == 2):
            return step(new, per_head, cache)
        first = jnp.int32(0) if axes is None else jax.lax.axis_index(axes) * cache.num_pages
        return on_pages(step, new, per_head, cache, first, (first, first + cache.num_pages))

    return call


def on_pages(
    step: DeviceStep,
    new: NewTokens,
    per_head: PerHead,
    cache: Cache,
    first: Int32[Array, ""],
    allowed: tuple[Int32[Array, ""], Int32[Array, ""]],
) -> Stepped:
    """The step on a pool that is the whole one from page `first` on; heads use their own strips.

    Rows whose tokens need a page outside [allowed[0], allowed[1]) are marked, and take no new ones.
    """
    table = cache.page_table
    assert table is not None
    outside = cache.pages_outside(needing_pages(new, cache), *allowed)
    bad = outside.any(axis=tuple(range(1, outside.ndim)))
    here = (table >= first) & (table < first + cache.num_pages)
    own = cache.replace(
        status=bits.mark(cache.status, bad, bits.BAD_PAGE), page_table=jnp.where(here, table - first, -1)
    )
    out, own = step(dataclasses.replace(new, num_new=jnp.where(bad, 0, new.num_new)), per_head, own)
    return out, own.replace(page_table=table)


def check_pool(cache: Cache, shards: int, axes: MeshAxes) -> None:
    """Raises `ShardingError` where the pool of a paged cache does not divide."""
    if cache.num_pages % shards:
        raise ShardingError(
            f"{cache.num_pages} pages do not divide over {shards} devices (mesh axes {axes!r}): create the pool with "
            f"num_pages={-(-cache.num_pages // shards) * shards}."
        )


def check_tables(cache: Cache, step: Context, shards: int) -> None:
    """Raises `RangeError` for tables that can be seen to name pages of another device than the row's.

    Args:
        cache: any cache.
        step: what is to be appended.
        shards: parts that rows and pages are split into.
    """
    table = cache.page_table
    if table is None or (shards == 1 and table.ndim == 2):
        return
    if not _checks.is_concrete(table, step.lengths, step.num_new, *jax.tree.leaves(cache.state)):
        return
    pages, rows = cache.num_pages // shards, cache.batch_size // shards
    first = (np.arange(cache.batch_size) // rows * pages).reshape(-1, *(1,) * (table.ndim - 1))
    outside = np.asarray(cache.pages_outside(step, first, first + pages))
    if outside.any():
        entry = tuple(np.argwhere(outside)[0].tolist())
        row, start = entry[0], int(first[entry[0]].item())
        heads = " On a mesh every head uses its own strips of pages." if table.ndim == 3 else ""
        raise RangeError(
            f"row {row} lies on device {row // rows} of {shards}, which has the pages {start} to "
            f"{start + pages - 1}; its page_table names page {int(np.asarray(table)[entry])}: "
            f"give rows pages of their own device.{heads}"
        )
