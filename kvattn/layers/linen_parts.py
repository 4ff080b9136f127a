"""Parts of the Linen layers: their inputs, their sub-modules, Flax's cache collection, foreign attention functions."""

import warnings
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Float

from kvattn._typing import AnyArray, Array
from kvattn.attend import full
from kvattn.errors import ConfigError
from kvattn.layers import decode, gates, masking, norms, originals, placement, projections
from kvattn.layers.attention_fn import Attention, accepted_arguments
from kvattn.layers.settings import AttentionSettings

Einsum = Callable[..., Array]
Initializer = Callable[..., Array]


def key_value_inputs(
    inputs_q: AnyArray, inputs_k: AnyArray | None, inputs_v: AnyArray | None, inputs_kv: AnyArray | None
) -> tuple[AnyArray, AnyArray]:
    """The inputs [..., S, D] of keys and values, filled in from what was given, with Flax's warnings.

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
    if inputs_k is not None and inputs_v is not None and inputs_v.shape[-1] == inputs_v.shape[-2]:
        warnings.warn(
            f"You are passing an array of shape {inputs_v.shape} to the `inputs_v` arg, when you may have intended to "
            "pass it to the `mask` arg. As of Flax version 0.7.4, the function signature of "
            "MultiHeadDotProductAttention's `__call__` method has changed to `__call__(inputs_q, inputs_k=None, "
            "inputs_v=None, *, inputs_kv=None, mask=None, deterministic=None)`. Use the kwarg `mask` instead.",
            DeprecationWarning,
            stacklevel=3,
        )
    return projections.filled_in(inputs_q, inputs_k, inputs_v)[1:]


class Projections:
    """The sub-modules of a layer, made inside its compact call under Flax's names."""

    def __init__(self, layer: nn.Module, settings: AttentionSettings):
        self.layer, self.settings = layer, settings
        self.common = {
            "dtype": settings.dtype,
            "param_dtype": settings.param_dtype,
            "precision": settings.precision,
            "parent": layer,
        }

    def queries(self, inputs: AnyArray) -> Array:
        """[..., T, D] -> [..., T, N, H]."""
        layer, settings = self.layer, self.settings
        features = settings.num_heads, settings.head_dims[0]
        return self._norm("query_ln", self._heads("query", inputs, features, layer.kernel_init, layer.bias_init))

    def keys_and_values(self, inputs_k: AnyArray, inputs_v: AnyArray) -> tuple[Array, Array]:
        """[..., S, D'] twice -> [..., S, K, H] and [..., S, K, Hv]."""
        layer, num_kv_heads = self.layer, self.settings.num_kv_heads
        inits = layer.kv_kernel_init or layer.kernel_init, layer.kv_bias_init or layer.bias_init
        size, value_size = self.settings.head_dims
        key = value = self._heads("key", inputs_k, (num_kv_heads, size), *inits)
        if not self.settings.values_from_keys:
            value = self._heads("value", inputs_v, (num_kv_heads, value_size), *inits)
        value = norms.rms(value, self.settings.qk_norm_epsilon) if self.settings.value_norm else value
        return self._norm("key_ln", key), value

    def relative_bias(self) -> Float[Array, "buckets N"] | None:
        """The number of each bucket of distances and head, where the layer has buckets."""
        layer, buckets = self.layer, self.settings.relative_buckets
        if buckets is None:
            return None
        shape = (buckets.num_buckets, self.settings.num_heads)
        table = nn.meta.unbox(layer.param("relative_bias", nn.initializers.zeros, shape, layer.param_dtype))
        return jnp.asarray(table)

    def out(self, x: Array, inputs: AnyArray) -> Array:
        """Projects heads [..., T, N, Hv] to features, as many as those of `inputs` unless the layer says otherwise.

        They pass the gate that the inputs [..., T, D] set, where the layer has one.
        """
        layer, settings = self.layer, self.settings
        if settings.output_gate is not None:
            shape = gates.gate_shape(settings.output_gate, settings.num_heads, settings.head_dims[1])
            x = gates.gated(x, self._projected("gate", inputs, shape, layer.kernel_init, layer.bias_init))
        return nn.DenseGeneral(
            features=inputs.shape[-1] if layer.out_features is None else layer.out_features,
            axis=(-2, -1),
            use_bias=self.settings.use_out_bias,
            kernel_init=layer.out_kernel_init or layer.kernel_init,
            bias_init=layer.out_bias_init or layer.bias_init,
            dot_general=layer.out_dot_general or dot_general,
            dot_general_cls=layer.out_dot_general_cls,
            name="out",
            **self.common,
        )(x)

    def _heads(
        self, name: str, inputs: AnyArray, features: tuple[int, int], kernel_init: Initializer, bias_init: Initializer
    ) -> Array:
        """Projects [..., T, D] to heads [..., T, *features], which are clipped."""
        x = self._projected(name, inputs, features, kernel_init, bias_init)
        return projections.clipped(x, self.settings.qkv_clip)

    def _projected(
        self,
        name: str,
        inputs: AnyArray,
        features: tuple[int, ...],
        kernel_init: Initializer,
        bias_init: Initializer,
    ) -> Array:
        """Projects [..., T, D] to [..., T, *features]."""
        return nn.DenseGeneral(
            features=features,
            axis=-1,
            use_bias=self.settings.use_bias,
            kernel_init=kernel_init,
            bias_init=bias_init,
            dot_general=self.layer.qkv_dot_general or dot_general,
            dot_general_cls=self.layer.qkv_dot_general_cls,
            name=name,
            **self.common,
        )(inputs)

    def _norm(self, name: str, x: Array) -> Array:
        """Normalises the heads of [..., T, heads, H], where the layer has a norm."""
        settings = self.settings
        if settings.qk_norm is None:
            return x
        if settings.qk_norm_heads != "shared":
            heads, epsilon = settings.qk_norm_heads, settings.qk_norm_epsilon
            norm = HeadsNorm(settings.qk_norm, heads, epsilon, settings.param_dtype, name=name, parent=self.layer)
            return norm(x)
        options = {"epsilon": settings.qk_norm_epsilon, "dtype": settings.dtype, "param_dtype": settings.param_dtype}
        if settings.qk_norm == "layer":
            return nn.LayerNorm(use_bias=False, name=name, parent=self.layer, **options)(x)
        return nn.RMSNorm(name=name, parent=self.layer, **options)(x)


def kernel_of(projection: nn.DenseGeneral, inputs: Array) -> Array:
    """The kernel of a projection of inputs [..., D], made inside a compact call; they are looked at when it is new."""
    if not projection.has_variable("params", "kernel"):
        projection(inputs)
    return nn.meta.unbox(projection.get_variable("params", "kernel"))


class Sowing:
    """A Linen layer as what keeps attention weights (`kvattn.layers.attention_fn.Sows`), in "intermediates"."""

    def __init__(self, layer: nn.Module):
        self.layer = layer

    def sow(self, kind: object, name: str, value: Array) -> None:
        """Keeps `value` [..., N, T, S]."""
        del kind
        self.layer.sow("intermediates", name, value)


def dropout_rng(layer: Any, deterministic: bool | None, rng: Array | None) -> Array | None:
    """A key [] for the dropout of a layer, or None where nothing is dropped."""
    if layer.dropout_rate == 0.0 or nn.merge_param("deterministic", layer.deterministic, deterministic):
        return None
    return layer.make_rng("dropout") if rng is None else rng


class HeadsNorm(nn.Module):
    """The Linen twin of `kvattn.layers.norms.HeadsNorm`."""

    kind: str
    heads: str
    epsilon: float
    param_dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x: Float[Array, "*BT heads H"]) -> Float[Array, "*BT heads H"]:
        """Normalises queries or keys."""
        scale = None
        if self.heads != "unscaled":
            scale = self.param("scale", nn.initializers.ones_init(), x.shape[-2:], self.param_dtype)
        return norms.normalized(x, scale, kind=self.kind, joint=self.heads == "joint", epsilon=self.epsilon)


def dot_general(lhs: Array, rhs: Array, dimension_numbers: Any, **options: Any) -> Array:
    """`jax.lax.dot_general` of [..., *in] and [*in, *out] that says how its result is split on an Explicit mesh."""
    lhs = placement.typed(lhs, rhs)
    spec = placement.product_spec(lhs, rhs, len(dimension_numbers[0][0]))
    if spec is not None:
        options["out_sharding"] = spec
    return lax.dot_general(lhs, rhs, dimension_numbers, **options)


def decode_step(
    layer: nn.Module,
    settings: AttentionSettings,
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: ArrayLike | None,
    input_positions: ArrayLike | None,
    relative_bias: Float[Array, "buckets N"] | None,
) -> decode.Step | None:
    """Adds tokens [..., T, K, H] to the collection `cache`; None in the call that creates it."""
    exists = layer.has_variable("cache", "cached_key")
    variables = (
        layer.variable("cache", "cached_key", _empty(layer, key)),
        layer.variable("cache", "cached_value", _empty(layer, value)),
        layer.variable("cache", "cache_index", lambda: jnp.zeros((), jnp.int32)),
    )
    if not exists:
        return None
    cached = decode.Cached(*(variable.value for variable in variables))
    step = decode.extend(
        settings, cached, query, key, value,
        mask=mask, input_positions=input_positions, relative_bias=relative_bias,
    )  # fmt: skip
    for variable, new in zip(variables, step.cached, strict=True):
        variable.value = new
    return step


def einsums(layer: nn.Module) -> tuple[Einsum, Einsum] | None:
    """The einsums that replace `jnp.einsum` for scores and output (quantised ones, say), or None.

    Raises:
        ConfigError: only one of the two, or a precision beside them.
    """
    scores, values = layer.qk_attn_weights_einsum_cls, layer.attn_weights_value_einsum_cls
    if scores is None and values is None:
        return None
    if scores is None or values is None:
        raise ConfigError("qk_attn_weights_einsum and attn_weights_value_einsum must be specified together.")
    if layer.precision is not None:
        raise ConfigError(
            "precision/einsum_dot_general and qk_attn_weights_einsum/attn_weights_value_einsum are mutually "
            "exclusive. Please specify only one of them."
        )
    return scores(), values()


def is_own(attention_fn: Attention) -> bool:
    """Whether kvattn attends: where a layer is given Flax's default, or `kvattn.dot_product_attention`."""
    return attention_fn is originals.linen_attention or attention_fn is full.dot_product_attention


def call_foreign(
    attention_fn: Attention,
    query: Array,
    key: Array,
    value: Array,
    *,
    is_causal: bool,
    window: int | None,
    chunk: int | None,
    flax: dict[str, Any],
    additions: dict[str, Any],
) -> Array:
    """Calls an `attention_fn` of the user on [..., T, N, H] with those of Flax's arguments that it takes.

    The additions that are set come along.

    Raises:
        ConfigError: it has no argument for an addition that is set. (Causality, windows and chunks become a mask.)
    """
    known = accepted_arguments(attention_fn)
    takes = lambda name: known is None or name in known
    spoiled = None
    if window is not None or chunk is not None or is_causal:
        flax["mask"], spoiled = masking.with_limits(flax["mask"], query, key, window, chunk)
    set_ = {name: value for name, value in additions.items() if value is not None}
    for name in set_:
        if not takes(name):
            raise ConfigError(f"attention_fn has no argument {name!r}, which this layer needs: leave attention_fn out.")
    given = {name: value for name, value in flax.items() if takes(name) or name == "module"}
    return masking.spoil(attention_fn(query, key, value, **given, **set_), spoiled)


def _empty(layer: nn.Module, like: Array) -> Callable[[], Any]:
    """Makes an empty cache [..., L, K, H] as the keys or values of a whole sequence are shaped, typed and placed."""

    def zeros() -> Array:  # [..., L, K, H]
        return jnp.zeros(like.shape, like.dtype, out_sharding=placement.explicit_spec(like))

    names = layer.cache_sharding
    return zeros if names is None else nn.with_partitioning(zeros, tuple(names))
