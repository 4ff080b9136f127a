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
from kvattn.attend.step import Stepped
from kvattn.attend.tokens import NewTokens, PerHead
from kvattn.cache import Cache
from kvattn.cache import status as bits
from kvattn.errors import RangeError, ShardingError
from kvattn.sharding.scheme import DeviceStep
from kvattn.sharding.split import MeshAxes


def with_own_pages(step: DeviceStep, axes: MeshAxes) -> DeviceStep:
    """The step of a device on the rows and pages that the mesh axes `axes` give it; None: those are not split."""

    def call(new: NewTokens, per_head: PerHead, cache: Cache) -> Stepped:
        if axes is None or cache.page_table is None:
            return step(new, per_head, cache)
        first = jax.lax.axis_index(axes) * cache.num_pages
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
    """The step on a pool that is the whole one from page `first` on.

    Rows whose tokens need a page outside [allowed[0], allowed[1]) are marked, and take no new ones.
    """
    table = cache.page_table
    assert table is not None
    bad = cache.pages_outside(new.num_new, *allowed).any(axis=1)
    own = cache.replace(status=bits.mark(cache.status, bad, bits.BAD_PAGE), page_table=table - first)
    out, own = step(dataclasses.replace(new, num_new=jnp.where(bad, 0, new.num_new)), per_head, own)
    return out, own.replace(page_table=table)


def check_pool(cache: Cache, shards: int, axes: MeshAxes) -> None:
    """Raises `ShardingError` where the pool of a paged cache does not divide."""
    if cache.num_pages % shards:
        raise ShardingError(
            f"{cache.num_pages} pages do not divide over {shards} devices (mesh axes {axes!r}): create the pool with "
            f"num_pages={-(-cache.num_pages // shards) * shards}."
        )


def check_tables(cache: Cache, num_new: Int32[Array, " B"], shards: int) -> None:
    """Raises `RangeError` for tables that can be seen to name pages of another device than the row's.

    Args:
        cache: any cache.
        num_new: tokens to be appended.
        shards: parts that rows and pages are split into.
    """
    table = cache.page_table
    if table is None or shards == 1 or not _checks.is_concrete(table, cache.lengths, num_new):
        return
    pages, rows = cache.num_pages // shards, cache.batch_size // shards
    first = np.arange(cache.batch_size) // rows * pages
    outside = np.asarray(cache.pages_outside(num_new, first[:, None], first[:, None] + pages))
    if outside.any():
        row, column = np.argwhere(outside)[0].tolist()
        raise RangeError(
            f"row {row} lies on device {row // rows} of {shards}, which has the pages {first[row]} to "
            f"{first[row] + pages - 1}; its page_table names page {int(np.asarray(table)[row, column])}: "
            "give rows pages of their own device."
        )
