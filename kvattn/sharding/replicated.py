"""The whole cache on every device, the query heads split: what a prompt wants where there is one key/value head.

A chunk's queries are large and its cache is not. So Pope et al. (arXiv:2211.05102) attend to prompts by heads and
decode by batch; `kvattn.sharding.shard_cache(cache, mesh, by="batch")` is the switch between the two.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from kvattn._typing import Array
from kvattn.attend.explicit import specs_of
from kvattn.attend.step import Step
from kvattn.cache import Cache
from kvattn.errors import ShardingError
from kvattn.sharding import heads, pages
from kvattn.sharding.place import Place


def check(place: Place, cache: Cache, num_heads: int | None) -> None:
    """Raises `ShardingError` for several key/value heads, and where rows do not divide."""
    if cache.num_kv_heads > 1:
        raise ShardingError(
            f'by="replicated" is for one key/value head, this cache has {cache.num_kv_heads}: use by="heads", which '
            "copies no more of them than the devices need."
        )
    if cache.policy.needs_mass and num_heads is not None and num_heads % place.size:
        raise ShardingError(
            f"{num_heads} query heads do not divide over {place.size} devices, and {cache.policy} goes by the mean of "
            'all: use by="batch", or as many query heads as divide.'
        )
    place.check_rows(cache.batch_size, place.num_data, "make the batch a multiple.")
    pages.check_pool(cache, place.num_data, place.data)


def arrange(place: Place, cache: Cache) -> Cache:
    """The cache as it is."""
    del place
    return cache


def cache_specs(place: Place, cache: Cache) -> Any:
    """The cache's tree of placements."""
    return specs_of(cache, place.data, None, pages=place.data)


def token_specs(place: Place) -> tuple[Any, Any, Any, Any]:
    """The placements of queries and outputs, of keys and values, of one number per row, of one per query head."""
    return P(place.data, None, place.axis, None), P(place.data), P(place.data), P(place.axis)


def is_checked(cache: Cache) -> bool:
    """As by heads: not."""
    return heads.is_checked(cache)


def local(place: Place, step: Step, num_heads: int, copies: int) -> Any:
    """What each device does: its query heads against the one key/value head."""
    step = heads.local(place, step, num_heads, copies)

    def call(*args: Any) -> tuple[Array, Cache]:
        out, cache = step(*args)
        here = out.shape[2]
        head = jax.lax.axis_index(place.axis) * here + jnp.arange(here, dtype=jnp.int32)
        return jnp.where((head < num_heads)[None, None, :, None], out, 0), cache

    return call
