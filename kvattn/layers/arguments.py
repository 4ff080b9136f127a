"""What each argument of a layer must be, alone. Those that depend on others are checked in `kvattn.layers.settings`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from kvattn import _checks
from kvattn.attend import full, registry
from kvattn.codecs import Codec
from kvattn.errors import ConfigError, DTypeError, RangeError
from kvattn.layers import placement
from kvattn.policies import Policy
from kvattn.positions import RelativeBuckets, Temperature
from kvattn.sharding import scheme as schemes

GATES = ("elementwise", "headwise")
"""What `output_gate` may be."""

HEADS = ("shared", "own", "joint", "unscaled")
"""What `qk_norm_heads` may be."""


def check(given: Mapping[str, Any]) -> None:
    """Checks what a layer is made with, each argument alone; names without a check are left out.

    Args:
        given: arguments of an NNX layer, or fields of a Linen layer, by name.

    Raises:
        DTypeError, ConfigError, RangeError, ShapeError, ShardingError: naming the argument.
    """
    check_each(given)
    if given["bias_init"] is None and (given["use_bias"] or given["use_out_bias"]):
        _checks.function("bias_init", None)
    if given["mesh"] is not None:
        placement.axis_size(given["mesh"], given["axis"])


def check_each(given: Mapping[str, Any]) -> None:
    """`check`, where no argument depends on another."""
    for name, value in given.items():
        if name in _CHECKS and not (value is None and name in _MAY_BE_NONE):
            _CHECKS[name](name, value)


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


def scheme(by: str) -> str:
    """Checks how caches are to be split over a mesh.

    Raises:
        ConfigError: an unknown way.
    """
    _checks.one_of("by", by, (*schemes.names(), "auto"))
    return by


# One argument each --------------------------------------------------------------------------------


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
        _checks.one_of(name, one, tuple(dict.fromkeys((*registry.names(), *full.IMPLEMENTATIONS))))
    if not names:
        raise ConfigError(f"{name} is an empty sequence: name one, or pass None for the best that works.")


def _rope(name: str, value: Any) -> None:
    if not callable(value):
        raise DTypeError(f"{name} must be a kvattn.RoPE, got {value!r} of type {type(value).__name__}.")


def _one_of_kind(kind: type) -> "Check":
    def check(name: str, value: Any) -> None:
        if not isinstance(value, kind):
            raise DTypeError(f"{name} must be a kvattn.{kind.__name__}, got {value!r} of type {type(value).__name__}.")

    return check


def _axis(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise DTypeError(f"{name} must be the name of a mesh axis, got {value!r} of type {type(value).__name__}.")


Check = Callable[[str, Any], object]

_NEEDED: dict[str, Check] = {
    **dict.fromkeys(("num_heads", "in_features"), _size),
    **dict.fromkeys(("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), _size),
    **dict.fromkeys(("broadcast_dropout", "use_bias", "normalize_qk", "force_fp32_for_softmax"), _checks.flag),
    **dict.fromkeys(("keep_rngs", "sinks", "shares_kv", "values_from_keys", "value_norm"), _checks.flag),
    **dict.fromkeys(("kernel_init", "attention_fn"), _checks.function),
    **dict.fromkeys(("qkv_promote_dtype", "out_promote_dtype", "ln_promote_dtype"), _checks.function),
    **dict.fromkeys(("kernel_metadata", "bias_metadata"), _metadata),
    **dict.fromkeys(("query_ln_scale_metadata", "key_ln_scale_metadata"), _metadata),
    "dropout_rate": lambda _, rate: dropout_rate(rate),
    "rngs": _rngs,
    "qk_norm_heads": lambda name, heads: _checks.one_of(name, heads, HEADS),
    **dict.fromkeys(("qk_norm_epsilon", "norm_epsilon"), _checks.non_negative),
    "by": lambda _, by: scheme(by),
    "axis": _axis,
}
_MAY_BE_NONE: dict[str, Check] = {
    **dict.fromkeys(("qkv_features", "num_kv_heads", "in_kv_features", "head_dim", "value_head_dim"), _size),
    "q_lora_rank": _size,
    **dict.fromkeys(("deterministic", "decode", "use_out_bias"), _checks.flag),
    **dict.fromkeys(("out_kernel_init", "bias_init", "out_bias_init"), _checks.function),
    **dict.fromkeys(("kv_kernel_init", "kv_bias_init", "up_kernel_init"), _checks.function),
    **dict.fromkeys(("qkv_dot_general", "out_dot_general"), _checks.function),
    **dict.fromkeys(("qkv_dot_general_cls", "out_dot_general_cls"), _checks.function),
    **dict.fromkeys(("qk_attn_weights_einsum_cls", "attn_weights_value_einsum_cls"), _checks.function),
    **dict.fromkeys(("out_kernel_metadata", "out_bias_metadata", "kv_metadata", "kv_bias_metadata"), _metadata),
    "out_features": _sizes,
    "dtype": _compute_dtype,
    "param_dtype": _checks.inexact,
    "precision": _precision,
    "window": lambda _, window: _checks.window(window),
    "chunk": lambda _, chunk: _checks.window(chunk, "chunk"),
    "rope": _rope,
    "relative_buckets": _one_of_kind(RelativeBuckets),
    "temperature": _one_of_kind(Temperature),
    "output_gate": lambda name, gate: _checks.one_of(name, gate, GATES),
    "scale": lambda _, scale: _checks.finite_scale(scale),
    "softcap": lambda _, softcap: _checks.positive_softcap(softcap),
    "qkv_clip": lambda name, limit: _checks.positive(name, limit, RangeError),
    "cache_sharding": _cache_sharding,
    "policy": _policy,
    "codec": _codec,
    "implementation": _implementation,
}
_CHECKS = _NEEDED | _MAY_BE_NONE
