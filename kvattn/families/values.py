"""The values that fields of `DecoderConfig` may have, and the form they are brought to."""

import math
import numbers
from collections.abc import Callable

from kvattn import _checks
from kvattn.errors import ConfigError, DTypeError, KVAttnError, RangeError
from kvattn.families.per_layer import LATENT
from kvattn.families.settings import Value
from kvattn.positions import Temperature

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu")
MAX_LAYERS = 10_000
"""More than any model has: what per layer is listed would not end."""
FLAGS = (
    "final_norm", "gated", "layer_scale", "mlp_bias", "norm_bias", "out_bias", "parallel", "qk_norm", "qkv_bias",
    "residual_after_norm", "embedding_norm", "expert_bias", "experts_beside", "rope_interleaved", "router_float32",
    "router_scales", "shared_expert_gate", "shared_norm", "sinks", "tie_embeddings", "value_norm",
)  # fmt: skip
POSITIVE = (
    "rope_theta", "local_rope_theta", "qkv_clip", "embedding_scale", "residual_scale", "logit_scale", "expert_alpha",
    "expert_limit", "expert_scale",
)  # fmt: skip
SIZES = {
    "embedding_dim": 1, "num_experts": 0, "experts_per_token": 0, "max_positions": 1, "expert_dim": 1,
    "shared_expert_dim": 1, "expert_groups": 1, "groups_per_token": 1, "group_best": 1, "rotary_dim": 2,
    "per_layer_dim": 1, "q_lora_rank": 1, **dict.fromkeys(LATENT, 1),
}  # fmt: skip
"""Sizes, and the least that each may be."""
MAY_BE_NONE = (
    "local_rope_theta", "qkv_clip", "embedding_scale", "residual_scale", "logit_scale", "embedding_dim",
    "max_positions", "expert_dim", "shared_expert_dim", "rotary_dim", "per_layer_dim", "output_gate", "q_lora_rank",
    *LATENT,
)  # fmt: skip
CHOICES = {
    "positions": ("rope", "alibi", "learned"),
    "norm": ("rms", "layer"),
    "norm_position": ("pre", "post", "sandwich", "output"),
    "activation": ACTIVATIONS,
    "qk_norm_heads": ("shared", "own", "joint", "unscaled"),
    "output_gate": ("elementwise", "headwise"),
    "expert_kind": ("gpt_oss", "gated"),
    "expert_shares": ("chosen", "all"),
    "expert_scores": ("softmax", "sigmoid"),
    "expert_weighs": ("output", "input"),
}


def number(name: str, value: Value, check: Callable[[str, object], object]) -> int | float:
    """A checked number as Python has it: an int stays one."""
    check(name, value)
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def each[T](name: str, value: object, count: int, of: str, check: Callable[[str, object], T]) -> T | tuple[T, ...]:
    """One entry for all, or `count` of them, each checked."""
    if not isinstance(value, tuple | list):
        return check(name, value)
    if len(value) != count:
        raise ConfigError(f"{name} has {len(value)} entries for {count} {of}.")
    return tuple(check(name, entry) for entry in value)


def alike[T](value: T | tuple[T, ...]) -> T | tuple[T, ...]:
    """One entry for all layers, where all are equal."""
    return value[0] if isinstance(value, tuple) and len(set(value)) == 1 else value


def least_one(name: str, value: object) -> int:
    """A size."""
    return _checks.integer(name, value, 1)


def number_of(name: str, layer: object) -> int:
    """The number of a layer."""
    return _checks.integer(name, layer, 0)


def flags_of_layers(name: str, value: object, num_layers: int) -> tuple[bool, ...] | None:
    """Which layers have something; None where nothing is said."""
    if value is None:
        return None
    if not isinstance(value, tuple | list) or not all(isinstance(entry, bool) for entry in value):
        raise DTypeError(f"{name} must be a tuple of bools, one per layer, got {value!r}.")
    if len(value) != num_layers:
        raise ConfigError(f"{name} has {len(value)} entries for {num_layers} layers.")
    return tuple(value)


def window(name: str, window: object) -> int | None:
    """A window or chunk, or none."""
    return None if window is None else _checks.integer(name, window, 1, RangeError)


def floor_and_scale(given: object) -> tuple[float, float] | None:
    """Those of a temperature, or none."""
    if given is None:
        return None
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise DTypeError(f"temperature must be two numbers, floor and scale, got {given!r}.")
    try:
        checked = Temperature(*given)
    except KVAttnError as error:
        raise type(error)(f"temperature: {error}") from error
    return checked.floor, checked.scale


def scale(name: str, scale: object) -> int | float | None:
    """A scale of scores, or none."""
    return None if scale is None else number(name, scale, lambda n, x: _checks.finite_scale(_checks.real(n, x), n))


def slope(name: str, slope: object) -> float:
    """A slope of ALiBi."""
    found = _checks.real(name, slope)
    if not math.isfinite(found):
        raise RangeError(f"{name} must be finite, got {slope}.")
    return found
