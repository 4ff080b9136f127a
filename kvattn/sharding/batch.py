"""By batch (Pope et al., arXiv:2211.05102): each device has all the heads of some rows.

What decoding with one key/value head, or few, needs: the cache is read once, by n devices together. Projections stay
split by heads, so one all-to-all brings the queries to their rows and another brings the outputs back. The new keys and
values of a single head are on every device already; each takes its rows.
"""

from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from kvattn._typing import Array
from kvattn.attend.explicit import specs_of
from kvattn.attend.step import Step
from kvattn.cache import Cache
from kvattn.sharding import filling, pages
from kvattn.sharding.place import Place


def check(place: Place, cache: Cache, num_heads: int | None) -> None:
    """Raises `ShardingError` where the rows do not divide."""
    del num_heads
    place.check_rows(
        cache.batch_size,
        place.num_data * place.size,
        'make the batch a multiple (empty rows cost little), or use by="sequence", which splits the slots.',
    )
    pages.check_pool(cache, place.num_data * place.size, place.rows)


def arrange(place: Place, cache: Cache) -> Cache:
    """The cache as it is."""
    del place
    return cache


def cache_specs(place: Place, cache: Cache) -> Any:
    """The cache's tree of placements."""
    return specs_of(cache, place.rows, None, pages=place.rows)


def token_specs(place: Place) -> tuple[Any, Any, Any, Any]:
    """The placements of queries and outputs, of keys and values, of one number per row, of one per query head."""
    return P(place.data, None, place.axis, None), P(place.rows), P(place.rows), P()


def split_within(place: Place) -> Any:
    """The placement of queries and outputs whose heads do not divide: some features of every head."""
    return P(place.data, None, None, place.axis)


def is_checked(cache: Cache) -> bool:
    """Whether JAX can check that devices agree on what they share."""
    del cache
    return True


def local(place: Place, step: Step, num_heads: int, copies: int, within: bool = False) -> Any:
    """What each device does: exchange some heads of all rows for all heads of its rows, attend, and back.

    Or, `within`, some features of all heads.
    """
    del copies
    split = 3 if within else 2
    step = filling.real_heads(pages.with_own_pages(step, place.rows), num_heads)

    def call(query: Array, *rest: Any) -> tuple[Array, Cache]:
        query = jax.lax.all_to_all(query, place.axis, split_axis=0, concat_axis=split, tiled=True)
        out, cache = step(query, *rest)
        return jax.lax.all_to_all(out, place.axis, split_axis=split, concat_axis=0, tiled=True), cache

    return call
