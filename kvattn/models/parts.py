"""What a decoder's block is made of beside its attention: norms, the MLP, experts."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kvattn._typing import Array
from kvattn.families.config import DecoderConfig
from kvattn.layers.placement import explicit_spec, on_mesh_of, product_spec
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

    def __init__(self, config: DecoderConfig, split: Split, **options: Any):
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
        self.gate = linear(config.model_dim, config.mlp_dim, 1) if config.gated else nnx.data(None)
        self.up = linear(config.model_dim, config.mlp_dim, 1)
        self.down = linear(config.mlp_dim, config.model_dim, 0)

    def __call__(self, x: Array) -> Array:
        """[..., D] -> [..., D]."""
        activation = ACTIVATIONS[self.activation]
        up = dense(self.up, x)
        return dense(self.down, activation(up) if self.gate is None else activation(dense(self.gate, x)) * up)


class Experts(nnx.Module):
    """A router that gives each token to its best experts, weighted by the softmax of their scores (as in gpt-oss).

    The tokens are sorted by expert and multiplied group by group (`jax.lax.ragged_dot`), so only what a token was
    given to is computed.
    """

    def __init__(
        self, config: DecoderConfig, split: Split, *, dtype: DTypeLike | None, param_dtype: DTypeLike, rngs: nnx.Rngs
    ):
        experts, model_dim, mlp_dim = config.num_experts, config.model_dim, config.mlp_dim
        self.per_token = config.experts_per_token
        self.alpha, self.limit = config.expert_alpha, config.expert_limit
        self.dtype = dtype
        self.router = nnx.Linear(
            model_dim,
            experts,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
            kernel_metadata=split.along((model_dim, experts), None),
            bias_metadata=split.along((experts,), None),
        )
        draw = nnx.initializers.lecun_normal(in_axis=-2, out_axis=-1, batch_axis=0)

        # Split within each expert, so that a token may choose any of them.
        def kernel(size_in: int, size_out: int, hidden: int) -> nnx.Param:
            shape = (experts, size_in, size_out)
            return nnx.Param(draw(rngs.params(), shape, param_dtype), **split.along(shape, hidden))

        def bias(size: int, hidden: int | None) -> nnx.Param:
            return nnx.Param(jnp.zeros((experts, size), param_dtype), **split.along((experts, size), hidden))

        self.gate, self.up = kernel(model_dim, mlp_dim, 2), kernel(model_dim, mlp_dim, 2)
        self.down = kernel(mlp_dim, model_dim, 1)
        self.gate_bias, self.up_bias, self.down_bias = bias(mlp_dim, 1), bias(mlp_dim, 1), bias(model_dim, None)

    def __call__(self, x: Array) -> Array:
        """[B, T, D] -> [B, T, D]."""
        kernels = [p[...] for p in (self.gate, self.up, self.down, self.gate_bias, self.up_bias, self.down_bias)]
        scores = self.router(x)
        # What a sorted token is split like, no type can say: on an Explicit mesh that is left to the compiler.
        spec = explicit_spec(x)
        apply: Any = (
            self._apply if spec is None else jax.sharding.auto_axes(self._apply, out_sharding=on_mesh_of(x, *spec))
        )
        return apply(x, scores, *kernels)

    def _apply(self, x: Array, scores: Array, *parameters: Array) -> Array:
        """[B, T, D] -> [B, T, D], by scores [B, T, E], kernels [E, D, F] or [E, F, D], and biases [E, F] or [E, D]."""
        gate, up, down, gate_bias, up_bias, down_bias = parameters
        batch, length, features = x.shape
        tokens = x.reshape(batch * length, features)
        scores, chosen = jax.lax.top_k(scores.reshape(batch * length, -1), self.per_token)
        shares = jax.nn.softmax(scores.astype(jnp.float32), axis=-1)

        order = jnp.argsort(chosen.ravel(), stable=True)
        expert = chosen.ravel()[order]
        sizes = jnp.sum(jax.nn.one_hot(expert, gate.shape[0], dtype=jnp.int32), axis=0)
        given = tokens[order // self.per_token]

        def project(x: Array, kernel: Array, bias: Array) -> Array:
            """Rows of x [..., D], each by its expert's kernel [E, D, F] -> [..., F]."""
            return jax.lax.ragged_dot(x, kernel.astype(x.dtype), sizes) + bias.astype(x.dtype)[expert]

        gated = jnp.minimum(project(given, gate, gate_bias), self.limit)
        linear = jnp.clip(project(given, up, up_bias), -self.limit, self.limit)
        hidden = (linear + 1) * gated * jax.nn.sigmoid(self.alpha * gated)
        out = project(hidden, down, down_bias) * shares.ravel()[order].astype(x.dtype)[:, None]
        # Back to the order of the tokens, where the sum of each is always taken in the same order.
        back = jnp.zeros_like(order).at[order].set(jnp.arange(order.shape[0], dtype=order.dtype))
        return jnp.sum(out[back].reshape(batch, length, self.per_token, features), axis=2)
