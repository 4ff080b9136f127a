"""Norms of queries and keys other than Flax's: with a scale for every head, over all heads together, or without one."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Float

from kvattn._typing import Array
from kvattn.layers import placement
from kvattn.layers.placement import Metadata
from kvattn.layers.settings import AttentionSettings


def normalized(
    x: Float[Array, "*BT heads H"], scale: Float[Array, "heads H"] | None, *, kind: str, joint: bool, epsilon: float
) -> Float[Array, "*BT heads H"]:
    """``x / rms(x) * scale``, or ``(x - mean(x)) / std(x) * scale``, in float32 at least.

    Args:
        x: queries or keys.
        scale: a number for each of theirs; None: 1.
        kind: "rms", or "layer" which subtracts the mean.
        joint: the mean is that of all heads of a token, not of one.
        epsilon: added to the mean square.
    """
    axes = (-2, -1) if joint else (-1,)
    wide = x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
    if kind == "layer":
        wide = wide - jnp.mean(wide, axis=axes, keepdims=True)
    factor = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=axes, keepdims=True) + epsilon)
    wide = wide * factor
    if scale is not None:
        scale = scale.astype(wide.dtype).reshape((1,) * (x.ndim - 2) + scale.shape)
        wide = wide * placement.like_batch(scale, wide)
    return wide.astype(x.dtype)


def rms(x: Float[Array, "*BT heads H"], epsilon: float) -> Float[Array, "*BT heads H"]:
    """Every head divided by the root of the mean of its squares, in float32 at least."""
    return normalized(x, None, kind="rms", joint=False, epsilon=epsilon)


class HeadsNorm(nnx.Module):
    """`normalized` with a parameter ``scale [heads, H]``, ones at first; without, where heads are "unscaled"."""

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        kind: str,
        heads: str,
        epsilon: float,
        param_dtype: DTypeLike,
        scale_metadata: Metadata,
    ):
        self.kind, self.joint, self.epsilon = kind, heads == "joint", epsilon
        metadata: dict[str, Any] = dict(scale_metadata)
        ones = lambda: nnx.Param(jnp.ones((num_heads, head_dim), param_dtype), **metadata)
        self.scale: nnx.Param[Array] | None = nnx.data(None) if heads == "unscaled" else ones()

    def __call__(self, x: Float[Array, "*BT heads H"]) -> Float[Array, "*BT heads H"]:
        """Normalises queries or keys."""
        scale = None if self.scale is None else self.scale[...]
        return normalized(x, scale, kind=self.kind, joint=self.joint, epsilon=self.epsilon)


def of_heads(
    settings: AttentionSettings,
    num_heads: int,
    *,
    promote_dtype: Callable[..., Any],
    metadata: Metadata,
    rngs: nnx.Rngs,
) -> Any:
    """The norm of the queries or keys of an NNX layer, as its settings say; what Flax calls none where it has none.

    Args:
        settings: of the layer.
        num_heads: N or K.
        promote_dtype: as Flax's norms take it.
        metadata: of the scale.
        rngs: of the layer.
    """
    if settings.qk_norm is None:
        return nnx.data(None)
    head_dim, param_dtype = settings.head_dims[0], settings.param_dtype or jnp.float32
    if settings.qk_norm_heads != "shared":
        return HeadsNorm(
            num_heads,
            head_dim,
            kind=settings.qk_norm,
            heads=settings.qk_norm_heads,
            epsilon=settings.qk_norm_epsilon,
            param_dtype=param_dtype,
            scale_metadata=metadata,
        )
    kind = nnx.RMSNorm if settings.qk_norm == "rms" else functools.partial(nnx.LayerNorm, use_bias=False)
    return kind(
        head_dim,
        epsilon=settings.qk_norm_epsilon,
        dtype=settings.dtype,
        param_dtype=param_dtype,
        promote_dtype=promote_dtype,
        scale_metadata=metadata,
        rngs=rngs,
    )
