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
from kvattn.layers import placement
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

    def __init__(
        self, config: DecoderConfig, split: Split, size: int | None = None, *, param_dtype: DTypeLike = jnp.float32
    ):
        shape = (config.model_dim if size is None else size,)
        whole = split.along(shape, None)
        self.epsilon = config.norm_epsilon
        self.centred = config.norm == "layer"
        self.scale = nnx.Param(jnp.ones(shape, param_dtype), **whole)
        self.bias = nnx.Param(jnp.zeros(shape, param_dtype), **whole) if config.norm_bias else nnx.data(None)

    def __call__(self, x: Array) -> Array:
        """[B, T, ..., D] -> the same."""
        wide = x.astype(jnp.float32)
        if self.centred:
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        factor = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        ones = (1,) * (x.ndim - 1)
        y = wide * factor * self.scale[...].astype(jnp.float32).reshape(*ones, -1)
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32).reshape(*ones, -1)
        return y.astype(x.dtype)


def dense(linear: nnx.Linear, x: Array) -> Array:
    """``linear(x)`` of [..., D], on an Explicit mesh split as its kernel says."""
    return linear(x, out_sharding=product_spec(x, linear.kernel[...], 1))


class MLP(nnx.Module):
    """``down(activation(gate(x)) * up(x))``, or without gate ``down(activation(up(x)))``."""

    def __init__(self, config: DecoderConfig, split: Split, mlp_dim: int, **options: Any):
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


class OwnEmbedding(nnx.Module):
    """What a layer adds of its own embedding of the tokens: ``norm(out(activation(gate(x)) * embedded))``."""

    def __init__(self, config: DecoderConfig, split: Split, size: int, **options: Any):
        whole = {"use_bias": False, "kernel_metadata": split.along((), None), **options}
        self.activation = config.activation
        self.gate = nnx.Linear(config.model_dim, size, **whole)
        self.out = nnx.Linear(size, config.model_dim, **whole)
        self.norm = Norm(config, split, param_dtype=options["param_dtype"])

    def __call__(self, x: Array, embedded: Array) -> Array:
        """[B, T, D] and what is embedded [B, T, size] -> [B, T, D]."""
        gate = ACTIVATIONS[self.activation](dense(self.gate, x))
        return self.norm(dense(self.out, gate * embedded.astype(gate.dtype)))


class OwnEmbeddings(nnx.Module):
    """The embeddings that layers have of their own: of a token, and projected from what it is embedded as."""

    def __init__(self, config: DecoderConfig, split: Split, size: int, **options: Any):
        whole, width = split.along((), None), config.num_layers * size
        self.num_layers, self.size = config.num_layers, size
        normal = nnx.initializers.normal(0.02)
        self.table = nnx.Embed(config.vocab_size, width, embedding_init=normal, embedding_metadata=whole, **options)
        self.projection = nnx.Linear(config.model_dim, width, use_bias=False, kernel_metadata=whole, **options)
        self.norm = Norm(config, split, size, param_dtype=options["param_dtype"])
        self.model_dim = config.model_dim

    def __call__(self, tokens: Array, x: Array) -> Array:
        """Tokens [B, T] and their first embedding [B, T, D] -> [B, T, layers, size]."""
        shape = (*tokens.shape, self.num_layers, self.size)
        projected = dense(self.projection, x) * jnp.asarray(self.model_dim**-0.5, x.dtype)
        of_token = self.table(tokens) * jnp.asarray(self.size**0.5, x.dtype)
        projected, of_token = (placement.like_rows(y, x).reshape(shape) for y in (projected, of_token))
        return (self.norm(projected) + of_token) * jnp.asarray(2**-0.5, x.dtype)
