"""The checked arguments of `kvattn.dot_product_attention`."""

import dataclasses
import math
import numbers
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Bool, Float, Int, Int32, Num, Shaped

from kvattn import _checks
from kvattn._typing import Array
from kvattn.errors import ConfigError, DTypeError, RangeError, ShapeError


class _MirrorDTypeError(DTypeError, ValueError):
    """A dtype that does not fit. `jax.nn` raises ValueError for it, kvattn DTypeError: this is both."""


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of one call: as they were given, or as `checked` returns them, with a batch axis.

    Attributes:
        query: the queries.
        key: query head n attends to key head n // (N // K).
        value: their heads may have a size of their own for `kvattn.attend.full.attend` only.
        bias: added to the scores.
        mask: who may attend to whom.
        scale: multiplies the scores.
        query_lengths: rows past it give 0.
        kv_lengths: keys past it are not attended to.
        sinks: a logit per head that joins the softmax sum.
        slopes: those of ALiBi.
        is_causal: query t attends to keys s <= t.
        window: neighbours left and right that a query attends to.
        softcap: bounds the scores.
    """

    query: Num[Array, "B T N H"]
    key: Num[Array, "B S K H"]
    value: Num[Array, "B S K Hv"]
    bias: Float[Array, "#B #N #T #S"] | None
    mask: Bool[Array, "#B #N #T #S"] | None
    scale: float | Float[Array, ""]
    query_lengths: Int[Array, " B"] | None
    kv_lengths: Int[Array, " B"] | None
    sinks: Float[Array, " N"] | None
    slopes: Float[Array, " N"] | None
    is_causal: bool = dataclasses.field(metadata={"static": True})
    window: tuple[int, int] | None = dataclasses.field(metadata={"static": True})
    softcap: float | None = dataclasses.field(metadata={"static": True})

    def cast(self, dtype: DTypeLike) -> "Call":
        """The same with queries, keys and values of another dtype."""
        return self.replace(**{n: getattr(self, n).astype(dtype) for n in ("query", "key", "value")})

    def replace(self, **changes: Any) -> "Call":
        """The same with other arguments."""
        return dataclasses.replace(self, **changes)

    @property
    def has_extras(self) -> bool:
        """Whether there is anything that `jax.nn` does not have."""
        return not (self.softcap is None and self.sinks is None and self.slopes is None)

    @property
    def num_scores(self) -> int:
        """Per head."""
        return self.query.shape[1] * self.key.shape[1]


def checked(call: Call) -> Call:
    """The arguments of `kvattn.dot_product_attention`, all checked, with a batch axis if they have none.

    Raises:
        ShapeError, DTypeError, RangeError, ConfigError: as listed there.
    """
    query, key, value = (_mirrored(_checks.floating, n, getattr(call, n)) for n in ("query", "key", "value"))
    if query.ndim not in (3, 4) or not query.ndim == key.ndim == value.ndim:
        raise ShapeError(
            "query, key and value must all be [B, length, heads, H] or all [length, heads, H], got "
            f"{query.shape}, {key.shape} and {value.shape}."
        )
    if query.ndim == 3:
        query, key, value = query[None], key[None], value[None]
    call = Call(
        query=query,
        key=key,
        value=value,
        bias=_broadcastable("bias", call.bias, query, key),
        mask=_broadcastable("mask", call.mask, query, key),
        scale=softmax_scale(call.scale, query.shape[-1]),
        query_lengths=_lengths("query_seq_lengths", call.query_lengths, query.shape[0], query.shape[1]),
        kv_lengths=_lengths("key_value_seq_lengths", call.kv_lengths, query.shape[0], key.shape[1]),
        sinks=_checks.per_head("sinks", call.sinks, query.shape[2]),
        slopes=_checks.per_head("alibi_slopes", call.slopes, query.shape[2], finite=True),
        is_causal=static_bool("is_causal", call.is_causal),
        window=window_sides(call.window),
        softcap=_checks.positive_softcap(call.softcap),
    )
    _check_shapes(call)
    return call


def static_bool(name: str, value: object) -> bool:
    """Checks a bool that must be known when the program is traced."""
    if isinstance(value, Tracer):
        raise ConfigError(f"{name} must be known when the program is traced: pass a Python bool.")
    if not isinstance(value, bool | np.bool_):
        raise DTypeError(f"{name} must be a bool, got {value!r}.")
    return bool(value)


def softmax_scale[T](scale: T | None, head_dim: int) -> T | float:
    """What the scores are multiplied by: 1/√H unless given."""
    if scale is None:
        return 1.0 / math.sqrt(max(head_dim, 1))
    _mirrored(_checks.finite_scale, scale)
    return scale


def window_sides(window: Any) -> tuple[int, int] | None:
    """The neighbours on each side that a query sees, from one int or (left, right)."""
    if window is None:
        return None
    sides = tuple(window) if isinstance(window, tuple | list) else (window, window)
    if len(sides) != 2:
        raise ConfigError(f"local_window_size must be one int or (left, right), got {window!r}.")
    for side in sides:
        if isinstance(side, Tracer):
            raise ConfigError("local_window_size must be known when the program is traced: pass Python ints.")
        if isinstance(side, bool | np.bool_) or not isinstance(side, numbers.Integral):
            raise DTypeError(f"local_window_size must be ints, got {window!r}.")
        if side < 0:
            raise RangeError(f"local_window_size counts neighbours and must be >= 0, got {window!r}.")
    # No index difference exceeds int32, and sums of indices and window must not overflow it.
    return min(int(sides[0]), 2**30), min(int(sides[1]), 2**30)


def _mirrored[T](check: Callable[..., T], *arguments: object) -> T:
    """What a check of all kvattn returns; a dtype that does not fit is `jax.nn`'s error as well."""
    try:
        return check(*arguments)
    except DTypeError as error:
        raise _MirrorDTypeError(str(error)) from error


def _check_shapes(call: Call) -> None:
    query, key, value = call.query, call.key, call.value
    for name, array in (("key", key), ("value", value)):
        if array.dtype != query.dtype:
            raise _MirrorDTypeError(
                f"{name} must have query's dtype {query.dtype}, got {array.dtype}: cast one of them."
            )
    if value.shape != key.shape:
        raise ShapeError(f"value must have key's shape {key.shape}, got {value.shape}.")
    if (query.shape[0], query.shape[3]) != (key.shape[0], key.shape[3]):
        raise ShapeError(f"query and key must agree in B and H, got {query.shape} and {key.shape}.")
    if query.shape[3] == 0 or key.shape[2] == 0 or query.shape[2] % key.shape[2]:
        raise ShapeError(
            f"the number of query heads must be a multiple of the key/value heads, got {query.shape[2]} and "
            f"{key.shape[2]} (query {query.shape}, key {key.shape})."
        )


def _broadcastable(
    name: str, array: Any, query: Float[Array, "B T N H"], key: Float[Array, "B S K H"]
) -> Shaped[Array, "#B #N #T #S"] | None:
    """A bias or mask with four axes."""
    if array is None:
        return None
    array = jnp.asarray(array)
    if name == "mask" and array.dtype != jnp.bool_:
        raise _MirrorDTypeError(f"mask must be bool, got {array.dtype}: pass numbers to be added as bias.")
    if name == "bias" and not jnp.issubdtype(array.dtype, jnp.floating):
        raise _MirrorDTypeError(f"bias must have a real floating dtype, got {array.dtype}: pass bools as mask.")
    scores = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
    if array.ndim > 4 or any(a not in (1, b) for a, b in zip(array.shape[::-1], scores[::-1], strict=False)):
        raise ShapeError(f"{name} must broadcast to [B, N, T, S] = {scores}, got {array.shape}.")
    if name == "bias" and not isinstance(array, Tracer) and _has_infinity(array):
        raise RangeError("bias holds +inf, which makes the softmax NaN: use a large finite number.")
    return array.reshape((1,) * (4 - array.ndim) + array.shape)


def _has_infinity(bias: Float[Array, "..."]) -> bool:
    """Whether +inf is in a bias; a constant may be looked at inside jit too."""
    with jax.ensure_compile_time_eval():
        return bool(jnp.any(bias == jnp.inf))


def _lengths(
    name: str, lengths: Shaped[ArrayLike, "..."] | None, batch: int, longest: int
) -> Int32[Array, " B"] | None:
    if lengths is None:
        return None
    lengths = jnp.asarray(lengths)
    if lengths.dtype != jnp.int32:
        raise _MirrorDTypeError(f"{name} must be int32, got {lengths.dtype}.")
    if lengths.shape != (batch,):
        raise ShapeError(f"{name} must have shape ({batch},), one length per row, got {lengths.shape}.")
    if not isinstance(lengths, Tracer):
        bad = [v for v in np.asarray(lengths).tolist() if not 0 <= v <= longest]
        if bad:
            raise RangeError(f"{name} must lie in [0, {longest}], got {bad[0]}.")
    return lengths
