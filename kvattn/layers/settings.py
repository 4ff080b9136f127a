"""The settings that the NNX and the Linen layers share, checked once and brought to one form."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from kvattn import _checks, positions
from kvattn.attend import registry
from kvattn.attend.full import IMPLEMENTATIONS
from kvattn.codecs import Codec
from kvattn.errors import ConfigError, DTypeError, RangeError, ShapeError
from kvattn.layers import placement
from kvattn.policies import Policy
from kvattn.sharding import scheme as schemes


def check(given: Mapping[str, Any]) -> None:
    """Checks what a layer is made with, each argument alone; those that have no check here are left out.

    Args:
        given: arguments of an NNX layer, or fields of a Linen layer, by name.

    Raises:
        DTypeError, ConfigError, RangeError, ShapeError, ShardingError: naming the argument.
    """
    for name, value in given.items():
        if name in _CHECKS and not (value is None and name in _MAY_BE_NONE):
            _CHECKS[name](name, value)
    if given["bias_init"] is None and (given["use_bias"] or given["use_out_bias"]):
        _checks.function("bias_init", None)
    if given["mesh"] is not None:
        placement.axis_size(given["mesh"], given["axis"])


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
    if given is not None:
        given = _checks.integer("qkv_features", given, 1)
    if size is None:
        return default if given is None else given
    _checks.integer("head_dim", size, 1)
    if given is not None and given != num_heads * size:
        raise ConfigError(
            f"qkv_features ({given}) must be num_heads * head_dim = {num_heads} * {size} = {num_heads * size}: "
            "give one of the two."
        )
    return num_heads * size


def dropout_rate(rate: Any) -> float:
    """Checks a dropout rate; False is 0, as in Flax.

    Raises:
        RangeError: outside [0, 1).
        DTypeError: not a number.
        ConfigError: traced.
    """
    number = float(rate) if isinstance(rate, bool | np.bool_) else _checks.real("dropout_rate", rate)
    if not 0.0 <= number < 1.0:
        raise RangeError(f"dropout_rate must be in the range [0, 1), got {rate!r}.")
    return number


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
    if alibi is None or (isinstance(alibi, bool | np.bool_) and not alibi):
        return None
    if isinstance(alibi, bool | np.bool_):
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


def clipped(x: jax.Array, limit: float | None) -> jax.Array:
    """`x` within [-limit, limit]; as it is if None."""
    return x if limit is None else jnp.clip(x, -float(limit), float(limit))


def finite_rope(rope: Any, size: int) -> None:
    """Checks that a rotary embedding fits heads of `size`.

    Raises:
        ConfigError: it was made for another head dim.
        DTypeError: it cannot be called.
    """
    if rope is None:
        return
    _rope("rope", rope)
    made_for = getattr(rope, "head_dim", size)
    if made_for != size:
        raise ConfigError(f"rope was made for head_dim {made_for}, but the heads of this layer have {size}.")


def scheme(by: str) -> str:
    """Checks how caches are to be split over a mesh.

    Raises:
        ConfigError: an unknown way.
    """
    _checks.one_of("by", by, (*schemes.names(), "auto"))
    return by


def slopes_array(slopes: tuple[float, ...] | None) -> Any:
    """The slopes as float32[N], or None."""
    return None if slopes is None else jnp.asarray(slopes, jnp.float32)


def default_scale(scale: float | None, size: int) -> float:
    """The softmax scale: 1/√H unless given."""
    return 1.0 / math.sqrt(size) if scale is None else scale


# Each argument alone ------------------------------------------------------------------------------


def _size(name: str, value: Any) -> None:
    if _checks.integer(name, value, 1) > _checks.INT32_MAX:
        raise RangeError(f"{name} must be at most {_checks.INT32_MAX}, got {value}.")


def _sizes(name: str, value: Any) -> None:
    """One size, or several, as Flax's projections take them."""
    sizes = value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    for size in sizes:
        _size(name, size)
    if not sizes:
        raise ConfigError(f"{name} is an empty sequence: give one size or more.")


def _compute_dtype(name: str, value: Any) -> None:
    _checks.inexact(name, value, bits=16)


def _precision(name: str, value: Any) -> None:
    one = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    try:
        jax.eval_shape(lambda x: jax.lax.dot(x, x, precision=value), one)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{name} must be a jax.lax.Precision, a name such as 'highest', or two of them, got {value!r}."
        ) from error


def _rngs(name: str, value: Any) -> None:
    if not callable(getattr(value, "params", None)):
        raise DTypeError(
            f"{name} must be a flax.nnx.Rngs with a stream for parameters, got {value!r}: pass nnx.Rngs(0)."
        )


def _metadata(name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise DTypeError(f"{name} must be a dict, got {value!r} of type {type(value).__name__}.")


def _cache_sharding(name: str, value: Any) -> None:
    if not isinstance(value, NamedSharding | PartitionSpec | tuple | list):
        raise DTypeError(
            f"{name} must be a jax.sharding.PartitionSpec, a NamedSharding or a tuple of axis names, got {value!r}."
        )


def _policy(name: str, value: Any) -> None:
    if not isinstance(value, Policy):
        raise ConfigError(f"{name} must be a policy such as kvattn.Full(), got {value!r}.")


def _codec(name: str, value: Any) -> None:
    if not isinstance(value, Codec):
        raise ConfigError(f"{name} must be a codec such as kvattn.Int8(), got {value!r}.")


def _implementation(name: str, value: Any) -> None:
    names = value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    for one in names:
        _checks.one_of(name, one, tuple(dict.fromkeys((*registry.names(), *IMPLEMENTATIONS))))
    if not names:
        raise ConfigError(f"{name} is an empty sequence: name one, or pass None for the best that works.")


def _rope(name: str, value: Any) -> None:
    if not callable(value):
        raise DTypeError(f"{name} must be a kvattn.RoPE, got {value!r} of type {type(value).__name__}.")


def _axis(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise DTypeError(f"{name} must be the name of a mesh axis, got {value!r} of type {type(value).__name__}.")


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "num_heads": _size,
    "in_features": _size,
    "qkv_features": _size,
    "out_features": _sizes,
    "num_kv_heads": _size,
    "in_kv_features": _size,
    "head_dim": _size,
    "value_head_dim": _size,
    "dtype": _compute_dtype,
    "param_dtype": _checks.inexact,
    "broadcast_dropout": _checks.flag,
    "dropout_rate": lambda _, rate: dropout_rate(rate),
    "deterministic": _checks.flag,
    "precision": _precision,
    "kernel_init": _checks.function,
    "out_kernel_init": _checks.function,
    "bias_init": _checks.function,
    "out_bias_init": _checks.function,
    "kv_kernel_init": _checks.function,
    "kv_bias_init": _checks.function,
    "use_bias": _checks.flag,
    "use_out_bias": _checks.flag,
    "attention_fn": _checks.function,
    "decode": _checks.flag,
    "normalize_qk": _checks.flag,
    "force_fp32_for_softmax": _checks.flag,
    "qkv_promote_dtype": _checks.function,
    "out_promote_dtype": _checks.function,
    "ln_promote_dtype": _checks.function,
    "qkv_dot_general": _checks.function,
    "out_dot_general": _checks.function,
    "qkv_dot_general_cls": _checks.function,
    "out_dot_general_cls": _checks.function,
    "qk_attn_weights_einsum_cls": _checks.function,
    "attn_weights_value_einsum_cls": _checks.function,
    "rngs": _rngs,
    "keep_rngs": _checks.flag,
    "kernel_metadata": _metadata,
    "out_kernel_metadata": _metadata,
    "bias_metadata": _metadata,
    "out_bias_metadata": _metadata,
    "query_ln_scale_metadata": _metadata,
    "key_ln_scale_metadata": _metadata,
    "kv_metadata": _metadata,
    "kv_bias_metadata": _metadata,
    "window": lambda _, window: _checks.window(window),
    "rope": _rope,
    "scale": lambda _, scale: _checks.finite_scale(scale),
    "softcap": lambda _, softcap: _checks.positive_softcap(softcap),
    "sinks": _checks.flag,
    "qk_norm_epsilon": _checks.non_negative,
    "qkv_clip": lambda name, limit: _checks.positive(name, limit, RangeError),
    "cache_sharding": _cache_sharding,
    "policy": _policy,
    "codec": _codec,
    "implementation": _implementation,
    "by": lambda _, by: scheme(by),
    "axis": _axis,
}
"""What each argument must be. Those that depend on others (alibi, qk_norm, mesh) are checked where both are known."""

_MAY_BE_NONE = frozenset(_CHECKS) - {
    *("num_heads", "in_features", "broadcast_dropout", "dropout_rate", "kernel_init", "use_bias", "attention_fn"),
    *("normalize_qk", "force_fp32_for_softmax", "qkv_promote_dtype", "out_promote_dtype", "ln_promote_dtype", "rngs"),
    *("keep_rngs", "kernel_metadata", "bias_metadata", "query_ln_scale_metadata", "key_ln_scale_metadata", "sinks"),
    *("qk_norm_epsilon", "by", "axis"),
}
