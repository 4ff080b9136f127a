"""Rows of caches over one pool: some are taken out, go on by themselves, and come back."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Int32, Shaped

from kvattn._typing import Array
from kvattn.cache.axes import axis_of
from kvattn.cache.paged import PagedKVCache
from kvattn.cache.placed import placed, shardings_of

Caches = tuple[PagedKVCache, ...]


def with_rows(caches: Sequence[PagedKVCache], part: Sequence[PagedKVCache], source: Int32[Array, " B"]) -> Caches:
    """The caches of a model with some rows, and the pool, of others. For use inside jit.

    Args:
        caches: one per layer, of B rows.
        part: as many, of M rows over the same pools (`PagedKVCache.select`), which have gone on since.
        source: which row of `part` each row is now; negative: the one that it was.
    """
    caches = tuple(caches)
    return placed(_all_joined, shardings_of(caches), caches, tuple(part), source)


def _all_joined(caches: Caches, part: Caches, source: Int32[Array, " B"]) -> Caches:
    return tuple(_joined(cache, other, source) for cache, other in zip(caches, part, strict=True))


def _joined(cache: PagedKVCache, part: PagedKVCache, source: Int32[Array, " B"]) -> PagedKVCache:
    def one(old: Shaped[Array, "..."], new: Shaped[Array, "..."], axes: str) -> Shaped[Array, "..."]:
        axis = axis_of("rows", axes)
        if axis is None:
            return new
        moved = (source >= 0).reshape((-1,) + (1,) * (old.ndim - 1 - axis))
        return jnp.where(moved, jnp.take(new, jnp.maximum(source, 0), axis=axis), old)

    return jax.tree.map(one, cache, part, cache.axes)
