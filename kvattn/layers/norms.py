"""Norms of queries and keys whose scale has an entry for every head: each head by itself, or all of them together."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Float

from kvattn._typing import Array
from kvattn.layers import placement
from kvattn.layers.placement import Metadata

HEADS = ("shared", "own", "joint")
"""What `qk_norm_heads` may be."""


def normalized(
    x: Float[Array, "*BT heads H"], scale: Float[Array, "heads H"], *, kind: str, joint: bool, epsilon: float
) -> Float[Array, "*BT heads H"]:
    """``x / rms(x) * scale``, or ``(x - mean(x)) / std(x) * scale``, in float32 at least.

    Args:
        x: queries or keys.
        scale: a number for each of theirs.
        kind: "rms", or "layer" which subtracts the mean.
        joint: the mean is that of all heads of a token, not of one.
        epsilon: added to the mean square.
    """
    axes = (-2, -1) if joint else (-1,)
    wide = x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
    if kind == "layer":
        wide = wide - jnp.mean(wide, axis=axes, keepdims=True)
    factor = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=axes, keepdims=True) + epsilon)
    scale = scale.astype(wide.dtype).reshape((1,) * (x.ndim - 2) + scale.shape)
    return (wide * factor * placement.like_batch(scale, wide)).astype(x.dtype)


def rms(x: Float[Array, "*BT heads H"], epsilon: float) -> Float[Array, "*BT heads H"]:
    """Every head divided by the root of the mean of its squares, in float32 at least."""
    wide = x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)).astype(x.dtype)


class HeadsNorm(nnx.Module):
    """`normalized` with a parameter ``scale [heads, H]``, ones at first."""

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        kind: str,
        joint: bool,
        epsilon: float,
        param_dtype: DTypeLike,
        scale_metadata: Metadata,
    ):
        self.kind, self.joint, self.epsilon = kind, joint, epsilon
        metadata: dict[str, Any] = dict(scale_metadata)
        self.scale = nnx.Param(jnp.ones((num_heads, head_dim), param_dtype), **metadata)

    def __call__(self, x: Float[Array, "*BT heads H"]) -> Float[Array, "*BT heads H"]:
        """Normalises queries or keys."""
        return normalized(x, self.scale[...], kind=self.kind, joint=self.joint, epsilon=self.epsilon)
