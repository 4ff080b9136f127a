"""Query heads that were added so that they divide over devices."""

from typing import Any

import jax.numpy as jnp

from kvattn._typing import Array
from kvattn.cache import Cache


def filled_up(args: tuple[Any, ...], num_heads: int) -> tuple[Any, ...]:
    """The arguments of a step with so many query heads, zeros behind those that are given."""
    query, *middle, sinks, slopes, token_ids = args
    return _filled(query, 2, num_heads), *middle, _filled(sinks, 0, num_heads), _filled(slopes, 0, num_heads), token_ids


def real_heads(step: Any, num_heads: int) -> Any:
    """The step on the first `num_heads` heads; out is 0 for the others."""

    def call(query, key, value, cache: Cache, given, bad_count, sinks, slopes, token_ids) -> tuple[Array, Cache]:
        count = query.shape[2]
        sinks, slopes = (None if x is None else x[:num_heads] for x in (sinks, slopes))
        query = query[:, :, :num_heads]
        out, cache = step(query, key, value, cache, given, bad_count, sinks, slopes, token_ids)
        return _filled(out, 2, count), cache

    return call


def _filled(x: Any, axis: int, count: int) -> Any:
    if x is None or x.shape[axis] >= count:
        return x
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, count - x.shape[axis])
    return jnp.pad(x, padding)
