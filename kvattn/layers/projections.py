"""From inputs to heads and back: what a layer is given, and how it uses its projections and norms."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Num

from kvattn._typing import AnyArray, Array
from kvattn.errors import ConfigError, DTypeError, ShapeError
from kvattn.layers import placement
from kvattn.layers.placement import GateMetadata, HeadMetadata, Metadata
from kvattn.layers.settings import AttentionSettings

Sharding = NamedSharding | PartitionSpec | None


def filled_in(
    inputs_q: AnyArray, inputs_k: AnyArray | None, inputs_v: AnyArray | None
) -> tuple[AnyArray, AnyArray, AnyArray]:
    """The inputs [..., T, D] of queries, keys and values. Keys left out are those of queries, values those of keys.

    Raises:
        ConfigError: values without keys.
    """
    if inputs_k is None:
        if inputs_v is not None:
            raise ConfigError(
                "`inputs_k` cannot be None if `inputs_v` is not None. To have both `inputs_k` and `inputs_v` be "
                "the same value, pass in the value to `inputs_k` and leave `inputs_v` as None."
            )
        inputs_k = inputs_q
    return inputs_q, inputs_k, inputs_k if inputs_v is None else inputs_v


def checked_inputs(
    inputs_q: AnyArray,
    inputs_k: AnyArray | None,
    inputs_v: AnyArray | None,
    in_features: int,
    in_kv_features: int | None,
) -> tuple[Array, Array, Array]:
    """The inputs [..., length, D] of queries, keys and values, of these features; None: keys and values of any shape.

    Raises:
        ConfigError: values without keys.
        DTypeError: no arrays of numbers.
        ShapeError: other shapes.
    """
    inputs_q, inputs_k, inputs_v = filled_in(inputs_q, inputs_k, inputs_v)
    for name, x, wanted in (
        ("inputs_q", inputs_q, in_features),
        ("inputs_k", inputs_k, in_kv_features),
        ("inputs_v", inputs_v, in_kv_features),
    ):
        if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.number):
            raise DTypeError(f"{name} must be an array of numbers, got {getattr(x, 'dtype', type(x).__name__)}.")
        if wanted is not None and (x.ndim < 2 or x.shape[-1] != wanted):
            raise ShapeError(
                f"Incompatible input dimension, got {x.shape[-1] if x.ndim else ()} but module expects {wanted}: "
                f"{name} must be [..., length, {wanted}], its shape is {x.shape}."
            )
    return jnp.asarray(inputs_q), jnp.asarray(inputs_k), jnp.asarray(inputs_v)


def clipped(x: Array, limit: float | None) -> Array:
    """`x` [...] within [-limit, limit]; as it is if None."""
    return x if limit is None else jnp.clip(x, -limit, limit)


def to_heads(
    projection: nnx.LinearGeneral,
    inputs: Num[Array, "*B T D"],
    *,
    norm: Callable[[Array], Array] | None = None,
    clip: float | None,
    sharding: Sharding = None,
) -> Num[Array, "*B T heads size"]:
    """Projects features [..., T, D] to heads, which are clipped, then normalised."""
    x = clipped(projected(projection, inputs, sharding), clip)
    return x if norm is None else norm(x)


def projected(projection: nnx.LinearGeneral, inputs: Num[Array, "*B T D"], sharding: Sharding = None) -> Array:
    """Projects features [..., T, D] by a kernel [D, *out], to [..., T, *out]."""
    kernel = projection.kernel[...]
    inputs = placement.typed(inputs, kernel)
    if sharding is None:
        sharding = placement.product_spec(inputs, kernel, 1)
    return projection(inputs, out_sharding=sharding)


def from_heads(out: nnx.LinearGeneral, x: Num[Array, "*B T N Hv"], sharding: Sharding = None) -> Array:
    """Projects heads back to features [..., T, out_features]."""
    if sharding is None:
        sharding = placement.product_spec(x, out.kernel[...], 2)
    return out(x, out_sharding=sharding)


def metadata(
    settings: AttentionSettings,
    *,
    kernel: Metadata,
    bias: Metadata,
    kv: Metadata | None,
    kv_bias: Metadata | None,
    out: Metadata | None,
    out_bias: Metadata | None,
) -> HeadMetadata:
    """The metadata of each parameter: what was given for it or for its kind, else its split over the layer's mesh."""
    if settings.mesh is None:
        return HeadMetadata(
            query=kernel,
            query_bias=bias,
            kv=kernel if kv is None else kv,
            kv_bias=bias if kv_bias is None else kv_bias,
            out=out or kernel,
            out_bias=out_bias or bias,
            sinks={},
            relative_bias={},
            gates={"elementwise": GateMetadata(kernel, bias), "headwise": GateMetadata({}, {})},
        )
    num_heads, num_kv_heads, size = settings.num_heads, settings.num_kv_heads, settings.head_dims[0]
    split = placement.head_metadata(settings.mesh, settings.axis, num_heads, num_kv_heads, size)
    return HeadMetadata(
        query=kernel or split.query,
        query_bias=bias or split.query_bias,
        kv=kv or kernel or split.kv,
        kv_bias=kv_bias or bias or split.kv_bias,
        out=out or split.out,
        out_bias=out_bias or split.out_bias,
        sinks=split.sinks,
        relative_bias=split.relative_bias,
        gates=split.gates,
    )
