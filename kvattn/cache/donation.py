"""`jax.jit` for steps that update caches: donates them, and says so when one is used again."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import PyTree

from kvattn import _checks
from kvattn.cache.base import Cache
from kvattn.errors import StaleCacheError

_JAX_JIT = jax.jit
"""Bound now: people may assign `jit` to that name."""


def jit(step: Callable[..., Any], *, donate: str | tuple[str, ...] = "cache", **options: Any) -> Callable[..., Any]:
    """Compiles a step that takes and returns caches; the caches it takes are donated and updated in place.

    ``jax.jit(step, donate_argnames=donate)`` with readable errors: nothing is checked, and nothing is slower, until a
    call fails.

    Args:
        step: any function; the arguments named by `donate` are caches, or trees of caches.
        donate: names of the arguments to donate.
        **options: further arguments of `jax.jit`.

    Returns:
        the compiled step.

    Raises:
        StaleCacheError: (by the step) a cache was donated to an earlier call, or is given twice to one.

    >>> import jax.numpy as jnp, kvattn
    >>> cache = kvattn.KVCache.create(1, 2, 8, capacity=16, dtype=jnp.float32)
    >>> x = jnp.ones((1, 1, 2, 8))
    >>> step = kvattn.jit(kvattn.cached_attention)
    >>> out, cache = step(x, x, x, cache)
    >>> int(cache.lengths[0])
    1
    """
    compiled = _JAX_JIT(step, donate_argnames=donate, **options)
    name = getattr(step, "__name__", "the step")

    @functools.wraps(step)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return compiled(*args, **kwargs)
        except (RuntimeError, ValueError) as error:
            _explain(name, (args, kwargs), error)
            raise

    for method in ("lower", "trace", "eval_shape", "clear_cache"):  # what `jax.stages.Wrapped` has: `jax.export` asks
        setattr(call, method, getattr(compiled, method))
    return call


def _explain(name: str, arguments: PyTree, error: Exception) -> None:
    """Raises `StaleCacheError` if a cache among the arguments explains the failure."""
    seen: set[int] = set()
    for cache in jax.tree.leaves(arguments, is_leaf=lambda x: isinstance(x, Cache)):
        if not isinstance(cache, Cache):
            continue
        for leaf in jax.tree.leaves(cache):
            if not isinstance(leaf, jax.Array) or not _checks.is_concrete(leaf):
                continue
            if id(leaf) in seen:
                raise StaleCacheError(
                    f"the same cache was given twice to {name}, which donates it: give each argument its own."
                ) from error
            seen.add(id(leaf))
            if leaf.is_deleted():
                raise StaleCacheError(
                    f"a cache given to {name} was donated to an earlier step: use the cache which that step returned."
                ) from error
