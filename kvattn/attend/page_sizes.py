"""Tokens of a page where nobody says how many."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kvattn import _target
from kvattn.attend import registry
from kvattn.attend.request import Request
from kvattn.cache import PagedKVCache
from kvattn.masks import Mask

SIZES = (16, 32, 64, 128, 256)
"""From the smallest on, with which the last page of a sequence wastes least."""


def smallest(pool: Callable[[int], PagedKVCache], num_heads: int, dtype: DTypeLike, platform: str | None = None) -> int:
    """The smallest of `SIZES` that every kernel takes that is made for the platform.

    A kernel that takes none of them, as of heads of a size that it does not know, does not count; nor does a platform
    without kernels ask for anything.

    Args:
        pool: makes the cache with pages of a size; nothing is allocated.
        num_heads: N.
        dtype: of the queries.
        platform: what the cache is made for. None: what programs are made for here.
    """
    with _target.aimed_at(platform):
        kernels = [registry.named(name) for name in registry.made_for()]
        taking = {size: sum(_takes(kernel, pool, size, num_heads, dtype) for kernel in kernels) for size in SIZES}
    return max(SIZES, key=lambda size: taking[size])  # the first of several


def _takes(
    kernel: registry.Implementation,
    pool: Callable[[int], PagedKVCache],
    size: int,
    num_heads: int,
    dtype: DTypeLike,
) -> bool:
    reasons = []

    def ask() -> None:
        cache = pool(size)
        if cache.values_in_keys and not kernel.reads_values_in_keys:
            reasons.append("values in keys")
            return
        query = jnp.zeros((cache.batch_size, 1, num_heads, cache.key_head_dim), dtype)
        request = Request(query, cache.lengths[:, None], cache.view(), None, mask=Mask(), scale=1.0)
        reasons.append(kernel.load().unsupported(request))

    jax.eval_shape(ask)
    return reasons[0] is None
