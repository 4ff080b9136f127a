"""A pool of pages split over devices: shard d of the axis has the pages from d P / n on.

Tables go on naming the pages of the whole pool. Where rows are split, a row's pages must lie where the row does: the
host allocates them from that device's part.
"""

from typing import Any

import jax
import numpy as np

from kvattn import _checks
from kvattn._typing import Array
from kvattn.cache import Cache, PagedKVCache
from kvattn.cache import status as bits
from kvattn.errors import RangeError, ShardingError


def with_own_pages(step: Any, axes: Any) -> Any:
    """The step of a device on the rows and pages that the mesh axes `axes` give it; None: those are not split."""

    def call(query, key, value, cache: Cache, given, *rest) -> tuple[Array, Cache]:
        if axes is None or not isinstance(cache, PagedKVCache):
            return step(query, key, value, cache, given, *rest)
        first = jax.lax.axis_index(axes) * cache.num_pages
        own, given = vouched(cache, given, first, cache.num_pages)
        out, own = step(query, key, value, own.replace(page_table=own.page_table - first), given, *rest)
        return out, own.replace(page_table=cache.page_table)

    return call


def vouched(cache: PagedKVCache, given: Array, first: Any, count: int) -> tuple[PagedKVCache, Array]:
    """Marks rows whose tokens need pages outside [first, first + count), and gives them no new ones."""
    bad = cache.pages_outside(given, first, first + count).any(axis=1)
    return cache.replace(status=bits.mark(cache.status, bad, bits.BAD_PAGE)), jax.numpy.where(bad, 0, given)


def check_pool(cache: Cache, shards: int, axes: Any) -> None:
    """Raises `ShardingError` where the pool of a paged cache does not divide."""
    if isinstance(cache, PagedKVCache) and cache.num_pages % shards:
        raise ShardingError(
            f"{cache.num_pages} pages do not divide over {shards} devices (mesh axes {axes!r}): create the pool with "
            f"num_pages={-(-cache.num_pages // shards) * shards}."
        )


def check_tables(cache: Cache, given: Array, shards: int) -> None:
    """Raises `RangeError` for tables that can be seen to name pages of another device than the row's.

    Args:
        cache: any cache.
        given: int32 [B], tokens to be appended.
        shards: parts that rows and pages are split into.
    """
    if not isinstance(cache, PagedKVCache) or shards == 1:
        return
    if not _checks.is_concrete(cache.page_table, cache.lengths, given):
        return
    pages, rows = cache.num_pages // shards, cache.batch_size // shards
    first = np.arange(cache.batch_size) // rows * pages
    outside = np.asarray(cache.pages_outside(given, first[:, None], first[:, None] + pages))
    if outside.any():
        row, column = np.argwhere(outside)[0].tolist()
        raise RangeError(
            f"row {row} lies on device {row // rows} of {shards}, which has the pages {first[row]} to "
            f"{first[row] + pages - 1}; its page_table names page {int(np.asarray(cache.page_table)[row, column])}: "
            "give rows pages of their own device."
        )
