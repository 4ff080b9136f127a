"""Experts: MLPs of which each token is given to a few, and only those that are chosen are read."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Float, Int32

from kvattn._typing import Array
from kvattn.families.config import DecoderConfig
from kvattn.layers.norms import rms
from kvattn.layers.placement import explicit_spec, on_mesh_of
from kvattn.models.parts import ACTIVATIONS, MLP, Norm, dense
from kvattn.models.placement import Split

BLOCK_ROWS = 128
"""Most tokens of one expert that are multiplied together. More would be padded more, fewer read the experts oftener."""


class Experts(nnx.Module):
    """A router that gives each token to its best experts, weighted by the softmax of their scores.

    With `DecoderConfig.experts_beside` it holds the layer's MLP too, which serves every token.

    Tokens lie sorted by expert, in blocks of one expert each, and a block reads the kernels of its expert: for few
    tokens those of the chosen experts and no others; for many, each expert once for every `BLOCK_ROWS` tokens.
    """

    def __init__(
        self,
        config: DecoderConfig,
        split: Split,
        mlp_dim: int | None = None,
        *,
        dtype: DTypeLike | None,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        experts, model_dim = config.num_experts, config.model_dim
        mlp_dim = config.layer_mlp_dims[0] if mlp_dim is None else mlp_dim
        hidden, with_bias = config.expert_dim or mlp_dim, config.expert_kind == "gpt_oss"
        self.config = config
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}

        def whole(size: int, use_bias: bool) -> nnx.Linear:
            metadata = {"kernel_metadata": split.along((model_dim, size), None)}
            if use_bias:
                metadata["bias_metadata"] = split.along((size,), None)
            return nnx.Linear(model_dim, size, use_bias=use_bias, **metadata, **options)

        self.router = whole(experts, with_bias)
        draw = nnx.initializers.lecun_normal(in_axis=-2, out_axis=-1, batch_axis=0)

        # Split within each expert, so that a token may choose any of them.
        def kernel(size_in: int, size_out: int, axis: int) -> nnx.Param:
            shape = (experts, size_in, size_out)
            return nnx.Param(draw(rngs.params(), shape, param_dtype), **split.along(shape, axis))

        def bias(size: int, axis: int | None) -> Any:
            if not with_bias:
                return nnx.data(None)
            return nnx.Param(jnp.zeros((experts, size), param_dtype), **split.along((experts, size), axis))

        self.gate, self.up = kernel(model_dim, hidden, 2), kernel(model_dim, hidden, 2)
        self.down = kernel(hidden, model_dim, 1)
        self.gate_bias, self.up_bias, self.down_bias = bias(hidden, 1), bias(hidden, 1), bias(model_dim, None)
        shared = config.shared_expert_dim
        self.shared = nnx.data(None) if shared is None else MLP(config, split, shared, **options)
        self.shared_gate = whole(1, False) if config.shared_expert_gate else nnx.data(None)

        def scale(size: int) -> Any:
            if not config.router_scales:
                return nnx.data(None)
            return nnx.Param(jnp.ones((size,), param_dtype), **split.along((size,), None))

        def norm() -> Any:
            return Norm(config, split, param_dtype=param_dtype) if config.experts_beside else nnx.data(None)

        self.router_scale, self.expert_scale = scale(model_dim), scale(experts)
        self.beside = MLP(config, split, mlp_dim, **options) if config.experts_beside else nnx.data(None)
        self.beside_norm, self.experts_norm, self.experts_post_norm = norm(), norm(), norm()

    def __call__(self, x: Array, before: Array | None = None) -> Array:
        """[B, T, D] -> [B, T, D]; `before` [B, T, D] is what came into the norm before, where the MLP is beside."""
        if self.beside is None or before is None:
            return self._of_experts(x, x)
        return self.beside_norm(self.beside(x)) + self.experts_post_norm(
            self._of_experts(self.experts_norm(before), before)
        )

    def _of_experts(self, x: Array, seen: Array) -> Array:
        """What experts make of `x` [B, T, D], chosen by what the router makes of `seen` [B, T, D]."""
        if self.router_scale is not None:
            factor = self.router_scale[...].astype(seen.dtype) * jnp.asarray(self.config.model_dim**-0.5, seen.dtype)
            seen = rms(seen, self.config.norm_epsilon) * factor[None, None]
        parameters = (self.gate, self.up, self.down, self.gate_bias, self.up_bias, self.down_bias)
        given = tuple(p[...] for p in parameters if p is not None)
        if self.expert_scale is not None:
            given = (self.expert_scale[...], *given)
        scores = self.router(seen)
        # What a sorted token is split like, no type can say: on an Explicit mesh that is left to the compiler.
        spec = explicit_spec(x)
        apply: Any = (
            self._apply if spec is None else jax.sharding.auto_axes(self._apply, out_sharding=on_mesh_of(x, *spec))
        )
        y = apply(x, scores, *given)
        return y if self.shared is None else y + self._of_all(self.shared, x)

    def _of_all(self, shared: MLP, x: Array) -> Array:
        """What the MLP that serves every token makes of [B, T, D]."""
        y = shared(x)
        return y if self.shared_gate is None else y * jax.nn.sigmoid(dense(self.shared_gate, x))

    def _apply(self, x: Array, scores: Array, *given: Array) -> Array:
        """[B, T, D] -> [B, T, D], by scores [B, T, E].

        And a scale [E] where experts have one, kernels [E, D, F] or [E, F, D], and biases [E, F] or [E, D].
        """
        batch, length, features = x.shape
        scale, parameters = None, given
        if self.expert_scale is not None:
            scale, *parameters = given
        tokens, per_token = x.reshape(batch * length, features), self.config.experts_per_token
        shares, chosen = self._chosen(scores.reshape(batch * length, scores.shape[-1]))
        if scale is not None:
            shares = shares * scale.astype(jnp.float32)[chosen]
        blocks = _Blocks(chosen.ravel(), scores.shape[-1], per_token)
        out = jax.lax.map(lambda block: self._expert(*block, *parameters), (blocks.gathered(tokens), blocks.expert))
        # The sum of a token is always taken in the order of its choices.
        out = blocks.scattered(out).reshape(*chosen.shape, features) * shares.astype(x.dtype)[:, :, None]
        return jnp.sum(out, axis=1).reshape(x.shape)

    def _chosen(self, scores: Float[Array, "tokens E"]) -> tuple[Float[Array, "tokens k"], Int32[Array, "tokens k"]]:
        """The weights of each token's experts, and which these are."""
        if self.config.expert_shares == "all":
            scores = jax.nn.softmax(scores.astype(jnp.float32), axis=-1)
        best, chosen = jax.lax.top_k(scores, self.config.experts_per_token)
        return (best if self.config.expert_shares == "all" else jax.nn.softmax(best.astype(jnp.float32))), chosen

    def _expert(self, x: Array, expert: Array, *parameters: Array) -> Array:
        """Tokens [R, D] of one expert -> [R, D]."""
        gate, up, down, *biases = (
            jax.lax.dynamic_index_in_dim(p, expert, keepdims=False).astype(x.dtype) for p in parameters
        )
        config = self.config
        if config.expert_kind == "gated":
            return (ACTIVATIONS[config.activation](x @ gate) * (x @ up)) @ down
        gate_bias, up_bias, down_bias = biases
        gated = jnp.minimum(x @ gate + gate_bias[None], config.expert_limit)
        linear = jnp.clip(x @ up + up_bias[None], -config.expert_limit, config.expert_limit)
        hidden = (linear + 1) * gated * jax.nn.sigmoid(config.expert_alpha * gated)
        return hidden @ down + down_bias[None]


class _Blocks:
    """Where each choice of a token lies among blocks of R rows, every one of which belongs to one expert.

    There are as many blocks as could be needed. Those that are not belong to the last expert that was chosen, so that
    no other is read.

    Args:
        chosen: the expert of each choice, a token's choices one after the other.
        num_experts: E.
        per_token: choices of a token.
    """

    def __init__(self, chosen: Int32[Array, " choices"], num_experts: int, per_token: int):
        choices = chosen.shape[0]
        self.per_token, tokens = per_token, choices // per_token
        self.rows = max(min(tokens, BLOCK_ROWS), 1)
        # An expert is chosen by every token at most once.
        self.count = min(num_experts, choices) + (choices // self.rows if tokens > self.rows else 0)
        sizes = jnp.sum(jax.nn.one_hot(chosen, num_experts, dtype=jnp.int32), axis=0)
        blocks = -(-sizes // self.rows)
        ends = jnp.cumsum(blocks)
        order = jnp.argsort(chosen, stable=True)
        expert = chosen[order]
        rank = jnp.arange(choices, dtype=jnp.int32) - (jnp.cumsum(sizes) - sizes)[expert]
        place = (ends - blocks)[expert] * self.rows + rank
        self.place = jnp.zeros((choices,), jnp.int32).at[order].set(place)
        last = jnp.max(jnp.where(sizes > 0, jnp.arange(num_experts, dtype=jnp.int32), 0), initial=0)
        block = jnp.arange(self.count, dtype=jnp.int32)
        self.expert: Int32[Array, " blocks"] = jnp.minimum(jnp.searchsorted(ends, block, side="right"), last)

    def gathered(self, tokens: Float[Array, "tokens D"]) -> Float[Array, "blocks R D"]:
        """The tokens of each block, zeros where it has none."""
        nobody = tokens.shape[0]
        source = jnp.full((self.count * self.rows,), nobody, jnp.int32)
        source = source.at[self.place].set(jnp.arange(self.place.shape[0], dtype=jnp.int32) // self.per_token)
        found = jnp.take(tokens, source, axis=0, mode="fill", fill_value=0)
        return found.reshape(self.count, self.rows, tokens.shape[1])

    def scattered(self, out: Float[Array, "blocks R D"]) -> Float[Array, "choices D"]:
        """What the blocks made of each choice."""
        return out.reshape(self.count * self.rows, out.shape[2])[self.place]
