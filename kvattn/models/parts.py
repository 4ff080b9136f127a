"""What a decoder's block is made of beside its attention: norms and the MLP."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kvattn._typing import Array
from kvattn.families.config import DecoderConfig
from kvattn.layers.placement import product_spec
from kvattn.models.placement import Split

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
}
"""The functions that `DecoderConfig.activation` names."""


class Norm(nnx.Module):
    """``x / rms(x) * scale``, or ``(x - mean(x)) / std(x) * scale + bias``, in float32 whatever comes in."""

    def __init__(self, config: DecoderConfig, split: Split, *, param_dtype: DTypeLike = jnp.float32):
        shape, whole = (config.model_dim,), split.along((config.model_dim,), None)
        self.epsilon = config.norm_epsilon
        self.centred = config.norm == "layer"
        self.scale = nnx.Param(jnp.ones(shape, param_dtype), **whole)
        self.bias = nnx.Param(jnp.zeros(shape, param_dtype), **whole) if config.norm_bias else nnx.data(None)

    def __call__(self, x: Array) -> Array:
        """[B, T, D] -> [B, T, D]."""
        wide = x.astype(jnp.float32)
        if self.centred:
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        factor = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        y = wide * factor * self.scale[...].astype(jnp.float32)[None, None]
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)[None, None]
        return y.astype(x.dtype)


def dense(linear: nnx.Linear, x: Array) -> Array:
    """``linear(x)`` of [..., D], on an Explicit mesh split as its kernel says."""
    return linear(x, out_sharding=product_spec(x, linear.kernel[...], 1))


class MLP(nnx.Module):
    """``down(activation(gate(x)) * up(x))``, or without gate ``down(activation(up(x)))``."""

    def __init__(self, config: DecoderConfig, split: Split, size: int | None = None, **options: Any):
        mlp_dim = config.mlp_dim if size is None else size

        def linear(size_in: int, size_out: int, hidden: int) -> nnx.Linear:
            return nnx.Linear(
                size_in,
                size_out,
                use_bias=config.mlp_bias,
                kernel_metadata=split.along((size_in, size_out), hidden),
                bias_metadata=split.along((size_out,), None if hidden == 0 else 0),
                **options,
            )

        self.activation = config.activation
        self.gate = linear(config.model_dim, mlp_dim, 1) if config.gated else nnx.data(None)
        self.up = linear(config.model_dim, mlp_dim, 1)
        self.down = linear(mlp_dim, config.model_dim, 0)

    def __call__(self, x: Array) -> Array:
        """[..., D] -> [..., D]."""
        activation = ACTIVATIONS[self.activation]
        up = dense(self.up, x)
        return dense(self.down, activation(up) if self.gate is None else activation(dense(self.gate, x)) * up)
