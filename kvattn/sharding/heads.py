"""By heads (Megatron-LM, arXiv:1909.08053): each device has some key/value heads and all their query heads.

Nothing is exchanged. Fewer key/value heads than devices are stored several times: `arrange` repeats each n / K times,
so that device d holds head d // (n / K), the one that its query heads read. (Policies that go by attention exchange it
then, one float32 per slot, between the copies of a head.)
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from kvattn._typing import Array
from kvattn.attend.explicit import specs_of
from kvattn.attend.step import Slots, Step
from kvattn.cache import Cache, PagedKVCache
from kvattn.errors import ShardingError
from kvattn.sharding.choose import against_heads
from kvattn.sharding.pages import check_pool, with_own_pages
from kvattn.sharding.place import Place


def check(place: Place, cache: Cache, num_heads: int | None) -> None:
    """Raises `ShardingError` where heads or rows do not divide; `num_heads` N, None: not known yet."""
    reason = against_heads(num_heads, cache.num_kv_heads, place.size)
    if reason is not None:
        raise ShardingError(
            f'by="heads" over mesh axis {place.axis!r}: {reason} Use by="batch", which splits the rows, or '
            'by="sequence", which splits the slots'
            + (' (by="replicated" is the whole cache on every device).' if cache.num_kv_heads == 1 else ".")
        )
    place.check_rows(cache.batch_size, place.num_data, "make the batch a multiple.")
    check_pool(cache, place.num_data, place.data)


def arrange(place: Place, cache: Cache) -> Cache:
    """The cache with as many key/value heads as devices, if it has fewer."""
    copies = place.size // cache.num_kv_heads
    return cache if copies <= 1 else repeated(cache, copies)


def repeated(cache: Cache, copies: int) -> Cache:
    """The cache with every key/value head `copies` times, neighbours."""
    return _heads(cache, lambda x, axis: jnp.repeat(x, copies, axis=axis))


def without_copies(cache: Cache, copies: int) -> Cache:
    """The cache with the first of every `copies` key/value heads."""

    def first(x: Array, axis: int) -> Array:
        return jax.lax.slice_in_dim(x, 0, x.shape[axis], stride=copies, axis=axis)

    return _heads(cache, first)


def _heads(cache: Cache, change: Any) -> Cache:
    """The cache with `change(array, axis)` done along every axis of key/value heads."""
    paged = isinstance(cache, PagedKVCache)
    store = lambda tree: {n: change(x, 0 if paged and n != "residual" else 2) for n, x in tree.items()}
    state = lambda x: change(x, 1) if cache.policy.per_head and x.ndim > 1 else x
    # Written out: `keys` and `values` are of a cache of either class.
    return cache.replace(keys=store(cache.keys), values=store(cache.values), state=jax.tree.map(state, cache.state))


def cache_specs(place: Place, cache: Cache) -> Any:
    """The cache's tree of placements."""
    return specs_of(cache, place.data, place.axis, pages=place.data)


def token_specs(place: Place) -> tuple[Any, Any, Any, Any]:
    """The placements of queries and outputs, of keys and values, of one number per row, of one per query head."""
    tokens = P(place.data, None, place.axis, None)
    return tokens, tokens, P(place.data), P(place.axis)


def is_checked(cache: Cache) -> bool:
    """Whether JAX can check that devices agree on what they share.

    They need not: NaN in one head marks the rows of its device only (`kvattn.cache.status`).
    """
    del cache
    return False


def local(place: Place, step: Step, num_heads: int, copies: int) -> Any:
    """What each device does: its part of everything fits together."""
    del num_heads
    step = step.over(SomeOfGroup(place.axis, place.size, copies)) if copies > 1 else step
    return with_own_pages(step, place.data)


@dataclasses.dataclass(frozen=True)
class SomeOfGroup(Slots):
    """All the slots, but some of the query heads that read them: `copies` neighbours along `axis` have a group.

    Policies that go by attention must decide alike wherever a key/value head is: they see the mean over the group, and
    only this is exchanged.
    """

    axis: str
    size: int
    copies: int

    def of_group(self, tree: Any) -> Any:
        """One float32 per slot and key/value head is averaged over the copies."""
        groups = [list(range(i, i + self.copies)) for i in range(0, self.size, self.copies)]
        return jax.tree.map(lambda x: jax.lax.psum(x, self.axis, axis_index_groups=groups) / self.copies, tree)
