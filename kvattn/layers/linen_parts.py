"""Parts of the Linen layers: their inputs, their sub-modules, Flax's cache collection, foreign attention functions."""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from kvattn._typing import Array
from kvattn.errors import ConfigError
from kvattn.layers import decode, full, masking, placement, settings


def key_value_inputs(inputs_q: Array, inputs_k: Any, inputs_v: Any, inputs_kv: Any) -> tuple[Array, Array]:
    """The inputs of keys and values, filled in from what was given, with Flax's warnings.

    Raises:
        ConfigError: inputs that exclude each other.
    """
    if inputs_kv is not None:
        if inputs_k is not None or inputs_v is not None:
            raise ConfigError(
                "If either `inputs_k` or `inputs_v` is not None, `inputs_kv` must be None. If `inputs_kv` is not "
                "None, both `inputs_k` and `inputs_v` must be None. `inputs_kv` is deprecated: use the other two."
            )
        warnings.warn(
            "The inputs_kv arg will be deprecated soon. Use inputs_k and inputs_v instead.",
            DeprecationWarning,
            stacklevel=3,
        )
        return inputs_kv, inputs_kv
    if inputs_k is None:
        if inputs_v is not None:
            raise ConfigError(
                "`inputs_k` cannot be None if `inputs_v` is not None. To have both `inputs_k` and `inputs_v` be the "
                "same value, pass in the value to `inputs_k` and leave `inputs_v` as None."
            )
        return inputs_q, inputs_q
    if inputs_v is None:
        return inputs_k, inputs_k
    if inputs_v.shape[-1] == inputs_v.shape[-2]:
        warnings.warn(
            f"You are passing an array of shape {inputs_v.shape} to the `inputs_v` arg, when you may have intended to "
            "pass it to the `mask` arg. As of Flax version 0.7.4, the function signature of "
            "MultiHeadDotProductAttention's `__call__` method has changed to `__call__(inputs_q, inputs_k=None, "
            "inputs_v=None, *, inputs_kv=None, mask=None, deterministic=None)`. Use the kwarg `mask` instead.",
            DeprecationWarning,
            stacklevel=3,
        )
    return inputs_k, inputs_v


class Projections:
    """The sub-modules of a layer, made inside its compact call under Flax's names."""

    def __init__(self, layer: Any):
        self.layer = layer

    def heads(self, name: str, inputs: Array, size: int) -> Array:
        """Projects [..., T, D] to heads [..., T, heads, size] by the sub-module `name`."""
        layer = self.layer
        is_query = name == "query"
        x = nn.DenseGeneral(
            features=(layer.num_heads if is_query else layer._num_kv_heads, size),
            axis=-1,
            kernel_init=layer.kernel_init if is_query else layer.kv_kernel_init or layer.kernel_init,
            bias_init=layer.bias_init if is_query else layer.kv_bias_init or layer.bias_init,
            dot_general=layer.qkv_dot_general or dot_general,
            dot_general_cls=layer.qkv_dot_general_cls,
            name=name,
            parent=layer,
            **self._shared(),
        )(inputs)
        return settings.clipped(x, layer.qkv_clip)

    def out(self, x: Array, in_features: int) -> Array:
        """Projects heads [..., T, N, Hv] to features, as many as the input's unless the layer says otherwise."""
        layer = self.layer
        return nn.DenseGeneral(
            features=in_features if layer.out_features is None else layer.out_features,
            axis=(-2, -1),
            kernel_init=layer.out_kernel_init or layer.kernel_init,
            bias_init=layer.out_bias_init or layer.bias_init,
            dot_general=layer.out_dot_general or dot_general,
            dot_general_cls=layer.out_dot_general_cls,
            name="out",
            parent=layer,
            **self._shared() | ({} if layer.use_out_bias is None else {"use_bias": layer.use_out_bias}),
        )(x)

    def norm(self, name: str, x: Array) -> Array:
        """Normalises each head, where the layer has a norm."""
        layer = self.layer
        kind = settings.qk_norm(layer.qk_norm, layer.normalize_qk)
        if kind is None:
            return x
        more: dict[str, Any] = {"use_bias": False} if kind == "layer" else {}
        module: Any = nn.LayerNorm if kind == "layer" else nn.RMSNorm
        return module(
            name=name,
            parent=layer,
            epsilon=layer.qk_norm_epsilon,
            dtype=layer.dtype,
            param_dtype=layer.param_dtype,
            **more,
        )(x)

    def _shared(self) -> dict[str, Any]:
        layer = self.layer
        return {
            "dtype": layer.dtype,
            "param_dtype": layer.param_dtype,
            "use_bias": layer.use_bias,
            "precision": layer.precision,
        }


def dot_general(lhs: Array, rhs: Array, dimension_numbers: Any, **options: Any) -> Array:
    """`jax.lax.dot_general` that says how its result is split where an Explicit mesh needs to be told."""
    lhs = placement.typed(lhs, rhs)
    spec = placement.product_spec(lhs, rhs, len(dimension_numbers[0][0]))
    if spec is not None:
        options["out_sharding"] = spec
    return lax.dot_general(lhs, rhs, dimension_numbers, **options)


def decode_step(
    layer: Any, query: Array, key: Array, value: Array, mask: Any, input_positions: Any, slopes: Any
) -> decode.Step | None:
    """Adds tokens to the collection `cache`; None in the call that creates it."""
    exists = layer.has_variable("cache", "cached_key")
    cached_key = layer.variable("cache", "cached_key", _empty(layer, key))
    cached_value = layer.variable("cache", "cached_value", _empty(layer, value))
    index = layer.variable("cache", "cache_index", lambda: jnp.zeros((), jnp.int32))
    if not exists:
        return None
    step = decode.extend(
        cached_key.value,
        cached_value.value,
        index.value,
        query,
        key,
        value,
        mask=mask,
        rope=layer.rope,
        input_positions=input_positions,
        window=layer.window,
        alibi_slopes=settings.slopes_array(slopes),
    )
    cached_key.value, cached_value.value, index.value = step.cached_key, step.cached_value, step.index
    return step


def einsums(layer: Any) -> tuple[Callable[..., Array], Callable[..., Array]] | None:
    """The einsums that replace `jnp.einsum` for scores and output (quantised ones, say), or None.

    Raises:
        ConfigError: only one of the two, or a precision beside them.
    """
    classes = layer.qk_attn_weights_einsum_cls, layer.attn_weights_value_einsum_cls
    if not any(classes):
        return None
    if not all(classes):
        raise ConfigError("qk_attn_weights_einsum and attn_weights_value_einsum must be specified together.")
    if layer.precision is not None:
        raise ConfigError(
            "precision/einsum_dot_general and qk_attn_weights_einsum/attn_weights_value_einsum are mutually "
            "exclusive. Please specify only one of them."
        )
    return classes[0](), classes[1]()


def call_foreign(
    attention_fn: Callable[..., Array], query: Array, key: Array, value: Array, given: dict, rules: dict
) -> Array:
    """Calls an `attention_fn` of the user with those of Flax's arguments that it takes, and the additions that are set.

    Raises:
        ConfigError: it has no argument for an addition that is set. (Causality and windows become a mask.)
    """
    parameters = inspect.signature(attention_fn).parameters.values()
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    names = {p.name for p in parameters}
    rules = dict(rules)
    window, is_causal = rules.pop("window", None), rules.pop("is_causal", False)
    spoiled = None
    if window is not None or is_causal:
        near = full.window_mask(query.shape[-3], key.shape[-3], window)
        mask, spoiled = masking.as_bool(given["mask"], query.ndim)
        given["mask"] = decode.combined(mask, near, query.ndim)
    for name, value_of in rules.items():
        if value_of is None:
            continue
        if not takes_any and name not in names:
            raise ConfigError(f"attention_fn has no argument {name!r}, which this layer needs: leave attention_fn out.")
        given[name] = value_of
    taken = {n: v for n, v in given.items() if takes_any or n in names or n == "module"}
    return masking.spoil(attention_fn(query, key, value, **taken), spoiled)


def _empty(layer: Any, like: Array) -> Callable[[], Any]:
    """Makes an empty cache in the shape, dtype and placement of the keys or values of a whole sequence."""

    def zeros() -> Array:
        return jnp.zeros(like.shape, like.dtype, out_sharding=placement.explicit_spec(like))

    return zeros if layer.cache_sharding is None else nn.with_partitioning(zeros, tuple(layer.cache_sharding))
