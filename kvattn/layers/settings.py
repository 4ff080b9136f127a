"""The settings that the NNX and the Linen layers share, checked once and brought to one form."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvattn import _checks, positions
from kvattn.errors import ConfigError, DTypeError, RangeError, ShapeError
from kvattn.sharding.choose import KNOWN


def head_dim(num_heads: int, features: int, given: int | None) -> int:
    """The size H of one head: `given`, or `features // num_heads`.

    Raises:
        ConfigError: the features do not divide into heads, or contradict `given`.
    """
    if given is not None:
        return _checks.integer("head_dim", given, 1)
    if features % num_heads:
        raise ConfigError(
            f"Memory dimension ({features}) must be divisible by 'num_heads' heads ({num_heads}). "
            "Give head_dim to choose the size of a head freely."
        )
    return features // num_heads


def qkv_features(num_heads: int, given: int | None, default: int, size: int | None) -> int:
    """The width N * H of all query heads.

    Raises:
        ConfigError: `given` is not num_heads times the given head_dim `size`.
    """
    if size is None:
        return default if given is None else given
    _checks.integer("head_dim", size, 1)
    if given is not None and given != num_heads * size:
        raise ConfigError(
            f"qkv_features ({given}) must be num_heads * head_dim = {num_heads} * {size} = {num_heads * size}: "
            "give one of the two."
        )
    return num_heads * size


def dropout_rate(rate: float) -> float:
    """Checks a dropout rate.

    Raises:
        RangeError: outside [0, 1), or not a number.
    """
    if not 0.0 <= rate < 1.0:
        raise RangeError(f"dropout_rate must be in the range [0, 1), got {rate!r}.")
    return rate


def qk_norm(kind: str | None, normalize_qk: bool) -> str | None:
    """Which norm queries and keys pass: Flax's `normalize_qk` means "layer".

    Raises:
        ConfigError: an unknown kind, or `normalize_qk` with another kind than "layer".
    """
    if kind is None:
        return "layer" if normalize_qk else None
    _checks.one_of("qk_norm", kind, ("layer", "rms"))
    if normalize_qk and kind != "layer":
        raise ConfigError(f"normalize_qk=True means qk_norm='layer', but qk_norm is {kind!r}: leave normalize_qk out.")
    return kind


def alibi_slopes(alibi: bool | Sequence[float] | Any, num_heads: int) -> tuple[float, ...] | None:
    """The ALiBi slope of each query head as plain floats, or None.

    Raises:
        DTypeError: neither a bool nor numbers.
        ShapeError: not one slope per query head.
        RangeError: a slope that is not finite.
    """
    if alibi is None or alibi is False:
        return None
    if alibi is True:
        with jax.ensure_compile_time_eval():  # numbers, also where the layer is made inside a trace
            alibi = positions.alibi_slopes(num_heads)
    try:
        slopes = np.asarray(alibi, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise DTypeError(f"alibi must be a bool or {num_heads} slopes, got {alibi!r}.") from error
    if slopes.shape != (num_heads,):
        raise ShapeError(f"alibi needs one slope per query head, shape ({num_heads},), got {slopes.shape}.")
    if not np.isfinite(slopes).all():
        raise RangeError(f"alibi slopes must be finite, got {slopes.tolist()}.")
    return tuple(slopes.tolist())


def scores(scale: float | None, softcap: float | None, window: int | None) -> None:
    """Checks what shapes the scores.

    Raises:
        RangeError: a scale that is not finite, a soft cap that is not positive, a window below 1.
        DTypeError: a window that is not an int.
    """
    _checks.finite_scale(scale)
    _checks.positive_softcap(softcap)
    _checks.window(window)


def clip(limit: float | None) -> None:
    """Checks what projections are clipped to.

    Raises:
        DTypeError: no number.
        RangeError: not finite and > 0.
    """
    if limit is not None:
        _checks.positive("qkv_clip", limit, RangeError)


def clipped(x: jax.Array, limit: float | None) -> jax.Array:
    """`x` within [-limit, limit]; as it is if None."""
    return x if limit is None else jnp.clip(x, -limit, limit)


def finite_rope(rope: Any, size: int) -> None:
    """Checks that a rotary embedding fits heads of `size`.

    Raises:
        ConfigError: it was made for another head dim.
        DTypeError: it cannot be called.
    """
    if rope is None:
        return
    if not callable(rope):
        raise DTypeError(f"rope must be a kvattn.RoPE, got {rope!r} of type {type(rope).__name__}.")
    made_for = getattr(rope, "head_dim", size)
    if made_for != size:
        raise ConfigError(f"rope was made for head_dim {made_for}, but the heads of this layer have {size}.")


def scheme(by: str) -> str:
    """Checks how caches are to be split over a mesh.

    Raises:
        ConfigError: an unknown way.
    """
    _checks.one_of("by", by, (*KNOWN, "auto"))
    return by


def slopes_array(slopes: tuple[float, ...] | None) -> Any:
    """The slopes as float32[N], or None."""
    return None if slopes is None else jnp.asarray(slopes, jnp.float32)


def default_scale(scale: float | None, size: int) -> float:
    """The softmax scale: 1/√H unless given."""
    return 1.0 / math.sqrt(size) if scale is None else scale
