"""Argument checks shared by the public functions. Each names the argument, the value and the remedy."""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Int32

from kvattn.errors import ConfigError, DTypeError, KVAttnError, RangeError, ShapeError, StaleCacheError

INT32_MAX = 2**31 - 1
FLOAT32_MAX = float(np.finfo(np.float32).max)
FLOAT32_TINY = float(np.finfo(np.float32).tiny)


def is_concrete(*arrays: object) -> bool:
    """True when every array holds values that can be looked at now (no tracer among them)."""
    return not any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves(arrays))


def on_host(x: ArrayLike) -> np.ndarray:
    """The numbers of an array [...]; if it is split over the devices of several processes, all must ask for it."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def integer(name: str, value: object, minimum: int, error: type[KVAttnError] = ConfigError) -> int:
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


def positive(name: str, value: object, error: type[KVAttnError] = ConfigError) -> float:
    """Checks a finite number above 0."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise DTypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}.")
    number = _number(name, value)
    if not (math.isfinite(number) and number > 0):
        raise error(f"{name} must be finite and > 0, got {value}.")
    return number


def non_negative(name: str, value: object) -> float:
    """Checks a finite number, 0 or more."""
    number = real(name, value)
    if not 0 <= number < math.inf:
        raise RangeError(f"{name} must be finite and >= 0, got {value}.")
    return number


def flag(name: str, value: Any) -> bool:
    """Checks a static bool; 0 and 1 are bools too."""
    if isinstance(value, jax.core.Tracer):
        raise ConfigError(f"{name} must be known when the program is traced: pass a Python bool.")
    is_bool = isinstance(value, bool | np.bool_)
    is_bool |= getattr(value, "dtype", None) == jnp.bool_ and np.shape(value) == ()
    if is_bool or (isinstance(value, numbers.Integral) and value in (0, 1)):
        return bool(value)
    raise DTypeError(f"{name} must be True or False, got {value!r} of type {type(value).__name__}.")


def function(name: str, value: object) -> None:
    """Checks something that will be called."""
    if not callable(value):
        raise DTypeError(f"{name} must be a function, got {value!r} of type {type(value).__name__}.")


def inexact(name: str, dtype: Any, *, complex: bool = True, bits: int = 0) -> np.dtype:
    """Turns what NumPy and JAX take for a dtype ("float32", jnp.float32, ...) into one.

    Args:
        name: of the argument.
        dtype: to be checked.
        complex: whether a complex dtype will do.
        bits: the least bits a float may have.
    """
    wanted = "a floating or complex dtype" if complex else "a floating dtype"
    try:
        array = hasattr(dtype, "__array__") and not isinstance(dtype, type)
        found = None if dtype is None or array else jnp.dtype(dtype)
    except (TypeError, ValueError) as error:
        raise DTypeError(f"{name} must be {wanted} such as jnp.float32, got {dtype!r}.") from error
    if found is None or not jnp.issubdtype(found, jnp.inexact if complex else jnp.floating):
        hint = ": fewer bits are a codec's business" if bits and found is not None else ""
        raise DTypeError(f"{name} must be {wanted} such as jnp.float32, got {dtype!r}{hint}.")
    if jnp.issubdtype(found, jnp.floating) and jnp.finfo(found).bits < bits:
        raise DTypeError(f"{name} must have {bits} bits or more, got {found}: fewer are a codec's business.")
    return found


def head_counts(num_heads: int, num_kv_heads: int) -> None:
    """Checks that query heads divide into blocks, one per key/value head."""
    integer("num_heads", num_heads, 1)
    integer("num_kv_heads", num_kv_heads, 1)
    if num_heads % num_kv_heads:
        raise ConfigError(
            f"num_heads ({num_heads}) must be divisible by num_kv_heads ({num_kv_heads}): "
            "query head n reads key/value head n // (num_heads // num_kv_heads)."
        )


def finite_scale(scale: object, name: str = "scale") -> None:
    """Checks a softmax scale; traced ones too, as far as that goes. Zero is allowed: a uniform average."""
    if scale is None:
        return
    if isinstance(scale, jax.core.Tracer):
        _scalar(name, scale)
    elif not abs(_number(name, scale)) <= FLOAT32_MAX:
        raise RangeError(f"{name} must be finite in float32, got {scale}.")


def positive_softcap(softcap: object, name: str = "softcap") -> float | None:
    """Checks a soft cap on the scores."""
    if softcap is None:
        return None
    if isinstance(softcap, jax.core.Tracer):
        raise ConfigError(f"{name} must be known when the program is traced: pass a Python float.")
    number = _number(name, softcap)
    if not FLOAT32_TINY <= number <= FLOAT32_MAX:
        raise RangeError(f"{name} must be finite and > 0 (normal in float32), got {softcap}; leave it None for no cap.")
    return number


def real(name: str, value: object) -> float:
    """A real number that is known now, as a Python float; bools are refused."""
    if isinstance(value, jax.core.Tracer):
        raise ConfigError(f"{name} must be known when the program is traced: pass a Python number.")
    if isinstance(value, bool | np.bool_):
        raise DTypeError(f"{name} must be a number, got the bool {value}.")
    return _number(name, value)


def _number(name: str, value: Any) -> float:
    """A real number, also one in an array without axes, as a Python float."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:  # an int of hundreds of digits
            return math.inf
    try:
        array = value if hasattr(value, "dtype") and not isinstance(value, type) else np.asarray(value)
    except Exception as error:
        raise DTypeError(f"{name} must be a number, got {value!r}.") from error
    _scalar(name, array)
    return float(array)


def _scalar(name: str, value: Any) -> None:
    """Checks that an array is one real number."""
    if not (jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)):
        raise DTypeError(f"{name} must be a number, got {value!r} of dtype {value.dtype}.")
    if value.shape != ():
        raise ShapeError(f"{name} must be a single number, got an array of shape {value.shape}.")


def window(value: object, name: str = "window") -> int | None:
    """Checks a window; None is no window. One that no int32 holds is beyond every position all the same."""
    if value is None:
        return None
    return min(integer(name, value, 1, RangeError), INT32_MAX)


def floating(name: str, array: Any) -> Float[jax.Array, "..."]:
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


def query(name: str, array: Any) -> Float[jax.Array, "..."]:
    """Turns `array` into a JAX array of a floating dtype that can be multiplied with others, or says why not."""
    array = floating(name, array)
    if array.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64):
        raise DTypeError(f"{name} must be float32, bfloat16, float16 or float64, got {array.dtype}: cast it.")
    return array


def integers(name: str, array: Any) -> Any:
    """Turns `array` [...] into one of integers, NumPy's or JAX's, of 32 bits or more.

    Wider ones stay as wide, as does uint32: cast to int32, what does not fit would wrap, so look at the values first.
    """
    if not hasattr(array, "dtype"):
        given = array
        try:
            array = np.asarray(array)
        except Exception as error:
            raise DTypeError(f"{name} must be an array of integers, got {given!r}.") from error
        if array.size == 0:
            array = array.astype(np.int32)
        if array.dtype.kind in "fO" and all(type(x) is int for x in np.asarray(given, object).flat):
            raise RangeError(f"{name} must fit in int32, got {given!r}.")
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise DTypeError(f"{name} must hold integers, got {array.dtype}.")
    narrow = array.dtype != jnp.uint32 and jnp.iinfo(array.dtype).bits <= 32
    return array.astype(jnp.int32) if narrow else array


def int32(name: str, array: Any) -> Any:
    """Turns `array` [...] into int32; values that can be seen must fit, others become the nearest that does."""
    array = integers(name, array)
    if array.dtype == jnp.int32:
        return array
    if not is_concrete(array):
        return jnp.clip(array, max(jnp.iinfo(array.dtype).min, -INT32_MAX), INT32_MAX).astype(jnp.int32)
    values = np.asarray(array)
    bad = values[(values < -INT32_MAX) | (values > INT32_MAX)]
    if bad.size:
        raise RangeError(f"{name} must fit in int32, got {bad[0]}.")
    return values.astype(np.int32)


def counts(name: str, array: Any, batch_size: int, low: int, high: int | None) -> Int32[jax.Array, " B"]:
    """Turns `array` into one of a number per row; values that can be seen are checked against [low, high]."""
    if isinstance(array, bool):
        raise DTypeError(f"{name} must hold integers, got bool.")
    array = integers(name, array)
    if is_concrete(array):
        # Looked at before the cast to int32, which would wrap what does not fit.
        values = np.asarray(array)
        if values.shape not in ((), (batch_size,)):
            raise ShapeError(f"{name} must have shape ({batch_size},), one value per row, got {values.shape}.")
        top = INT32_MAX if high is None else high
        bad = values[(values < low) | (values > top)] if values.ndim else values[None][(values < low) | (values > top)]
        if bad.size:
            raise RangeError(f"{name} must lie in [{low}, {top}], got {bad.ravel()[0]}.")
        return jnp.broadcast_to(jnp.asarray(values.astype(np.int32)), (batch_size,))
    if array.shape not in ((), (batch_size,)):
        raise ShapeError(f"{name} must have shape ({batch_size},), one value per row, got {array.shape}.")
    return jnp.broadcast_to(int32(name, array), (batch_size,))


def not_donated(what: str, tree: object) -> None:
    """Raises `StaleCacheError` if a buffer of `tree` was given away by donation."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.is_deleted():
            raise StaleCacheError(
                f"{what} was donated to an earlier step, which returned the new one: use the cache that step returned."
            )


def one_of(name: str, value: object, known: Sequence[str]) -> None:
    """Checks a name against the known ones."""
    if not isinstance(value, str) or value not in known:
        raise ConfigError(f"unknown {name} {value!r}; the known ones are {', '.join(map(repr, known))}.")


def per_head(name: str, x: Any, num_heads: int, *, finite: bool = False) -> Float[jax.Array, " N"] | None:
    """Checks one value per query head, neither NaN nor +inf, with `finite` not -inf either; None stays None."""
    if x is None:
        return None
    if isinstance(x, bool):
        raise DTypeError(f"{name} must be an array [N], got the bool {x}.")
    x = floating(name, x)
    if x.shape != (num_heads,):
        raise ShapeError(f"{name} must have shape ({num_heads},), one value per query head, got {x.shape}.")
    _check_values(name, x, finite)
    return x


def by_distance(name: str, x: Any, num_heads: int) -> Float[jax.Array, "N distances"] | None:
    """Checks finite values for each query head and each distance, 0 and more; None stays None."""
    if x is None:
        return None
    x = floating(name, x)
    if x.ndim != 2 or x.shape[0] != num_heads or x.shape[1] < 1:
        raise ShapeError(
            f"{name} must be [N, distances] = [{num_heads}, 1 or more], a number for each query head and distance, got "
            f"shape {x.shape}. kvattn.RelativeBuckets makes it of T5's table."
        )
    _check_values(name, x, finite=True)
    return x


def _check_values(name: str, x: Float[jax.Array, "..."], finite: bool) -> None:
    """Raises where numbers that can be seen are NaN or +inf, or with `finite` infinite at all."""
    if is_concrete(x):  # NumPy: a constant may be looked at inside jit too
        values = np.asarray(x).astype(np.float64)
        if finite and not np.all(np.isfinite(values)):
            raise RangeError(f"{name} must be finite, got {values.tolist()}.")
        if np.any(np.isnan(values) | (values == np.inf)):
            raise RangeError(f"{name} must not hold NaN or +inf, got {values.tolist()}.")
