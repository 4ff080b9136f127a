"""Argument checks shared by the public functions. Each names the argument, the value and the remedy."""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from kvattn.errors import ConfigError, DTypeError, KVAttnError, RangeError, ShapeError, StaleCacheError

INT32_MAX = 2**31 - 1
FLOAT32_MAX = float(np.finfo(np.float32).max)
FLOAT32_TINY = float(np.finfo(np.float32).tiny)


def is_concrete(*arrays: Any) -> bool:
    """True when every array holds values that can be looked at now (no tracer among them)."""
    return not any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves(arrays))


def on_host(x: Any) -> np.ndarray:
    """An array's numbers. One that is split over the devices of several processes is gathered: all must ask for it."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def integer(name: str, value: Any, minimum: int, error: type[KVAttnError] = ConfigError) -> int:
    """Checks a static integer setting; bools, floats and traced values are refused."""
    if isinstance(value, jax.core.Tracer):
        raise ConfigError(f"{name} must be known when the program is traced, got a traced value: pass a Python int.")
    if isinstance(value, bool | np.bool_):
        raise DTypeError(f"{name} must be an int, got the bool {value}.")
    if not isinstance(value, numbers.Integral):
        raise DTypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}.")
    if value < minimum:
        raise error(f"{name} must be >= {minimum}, got {value}.")
    return int(value)


def positive(name: str, value: Any, error: type[KVAttnError] = ConfigError) -> float:
    """Checks a finite number above 0."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise DTypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}.")
    number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise error(f"{name} must be finite and > 0, got {value}.")
    return number


def head_counts(num_heads: Any, num_kv_heads: Any) -> None:
    """Checks that query heads divide into blocks, one per key/value head."""
    integer("num_heads", num_heads, 1)
    integer("num_kv_heads", num_kv_heads, 1)
    if num_heads % num_kv_heads:
        raise ConfigError(
            f"num_heads ({num_heads}) must be divisible by num_kv_heads ({num_kv_heads}): "
            "query head n reads key/value head n // (num_heads // num_kv_heads)."
        )


def finite_scale(scale: Any) -> None:
    """Checks a softmax scale. Zero is allowed: a uniform average."""
    if isinstance(scale, jax.core.Tracer):
        return
    if scale is not None and not abs(float(scale)) <= FLOAT32_MAX:
        raise RangeError(f"scale must be finite in float32, got {scale}.")


def positive_softcap(softcap: Any) -> None:
    """Checks a soft cap on the scores."""
    if softcap is None:
        return
    if isinstance(softcap, jax.core.Tracer):
        raise ConfigError("softcap must be known when the program is traced: pass a Python float.")
    if not FLOAT32_TINY <= float(softcap) <= FLOAT32_MAX:
        raise RangeError(
            f"softcap must be finite and > 0 (normal in float32), got {softcap}; leave it None for no cap."
        )


def window(value: Any) -> int | None:
    """Checks a window; None is no window."""
    if value is None:
        return None
    return integer("window", value, 1, RangeError)


def floating(name: str, array: Any) -> jax.Array:
    """Turns `array` into a JAX array of a real floating dtype, or says why not."""
    dtype = getattr(array, "dtype", None)
    if dtype is None:
        try:
            array = np.asarray(array)
        except Exception as error:
            raise DTypeError(f"{name} must be an array of floats, got {type(array).__name__}.") from error
        dtype = array.dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        raise DTypeError(f"{name} must have a real floating dtype, got {dtype}.")
    return jnp.asarray(array)


def counts(name: str, array: Any, batch_size: int, low: int, high: int | None) -> jax.Array:
    """Turns `array` into int32[B]; values that can be seen are checked against [low, high]."""
    dtype = getattr(array, "dtype", None)
    if isinstance(array, bool) or (dtype is not None and not jnp.issubdtype(dtype, jnp.integer)):
        raise DTypeError(f"{name} must hold integers, got {dtype or type(array).__name__}.")
    if is_concrete(array):
        # Looked at before the cast to int32, which would wrap what does not fit.
        values = np.asarray(array)
        if not np.issubdtype(values.dtype, np.integer):
            raise DTypeError(f"{name} must hold integers, got {values.dtype}.")
        if values.shape not in ((), (batch_size,)):
            raise ShapeError(f"{name} must have shape ({batch_size},), one value per row, got {values.shape}.")
        top = INT32_MAX if high is None else high
        bad = values[(values < low) | (values > top)] if values.ndim else values[None][(values < low) | (values > top)]
        if bad.size:
            raise RangeError(f"{name} must lie in [{low}, {top}], got {bad.ravel()[0]}.")
        return jnp.broadcast_to(jnp.asarray(values.astype(np.int32)), (batch_size,))
    if array.shape not in ((), (batch_size,)):
        raise ShapeError(f"{name} must have shape ({batch_size},), one value per row, got {array.shape}.")
    return jnp.broadcast_to(array.astype(jnp.int32), (batch_size,))


def not_donated(what: str, tree: Any) -> None:
    """Raises `StaleCacheError` if a buffer of `tree` was given away by donation."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.is_deleted():
            raise StaleCacheError(
                f"{what} was donated to an earlier step, which returned the new one: use the cache that step returned."
            )


def one_of(name: str, value: Any, known: Sequence[str]) -> None:
    """Checks a name against the known ones."""
    if value not in known:
        raise ConfigError(f"unknown {name} {value!r}; the known ones are {', '.join(map(repr, known))}.")


def per_head(name: str, x: Any, num_heads: int) -> jax.Array | None:
    """Checks one value per query head; None stays None."""
    if x is None:
        return None
    if isinstance(x, bool):
        raise DTypeError(f"{name} must be an array [N], got the bool {x}.")
    x = floating(name, x)
    if x.shape != (num_heads,):
        raise ShapeError(f"{name} must have shape ({num_heads},), one value per query head, got {x.shape}.")
    if is_concrete(x) and np.any(np.isnan(np.asarray(x))):  # NumPy: a constant may be looked at inside jit too
        raise RangeError(f"{name} must not hold NaN.")
    return x
