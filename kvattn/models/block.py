"""A layer of a decoder: attention and an MLP, each with its norms, and what else a family adds to them."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from kvattn._typing import Array
from kvattn.cache import Cache
from kvattn.errors import UnsupportedError
from kvattn.families.config import DecoderConfig
from kvattn.layers import GroupedQueryAttention, MultiHeadLatentAttention
from kvattn.layers import dot_product_attention as default_attention
from kvattn.layers.attention_fn import Attention
from kvattn.models.experts import Experts
from kvattn.models.parts import MLP, Norm, OwnEmbedding
from kvattn.models.placement import Split

KV = tuple[Array, Array]
"""Keys [B, T, K, H] and values of the tokens of a call, before rotation."""


class Block(nnx.Module):
    """Attention and MLP, each with its norms, added to what came in."""

    def __init__(self, config: DecoderConfig, layer: int, attention_fn: Attention, split: Split, **options: Any):
        def norm(wanted: bool = True) -> Any:
            return Norm(config, split, param_dtype=options["param_dtype"]) if wanted else nnx.data(None)

        comes_first, comes_last = config.norm_position != "output", config.norm_position in ("sandwich", "output")
        self.norm_position = config.norm_position
        self.parallel = config.parallel
        self.residual_after_norm = config.residual_after_norm
        self.residual_scale = config.residual_scale
        sources = config.layer_sources
        self.is_read = sources.count(layer) > 1
        self.attention_norm = norm(comes_first)
        self.attention: Any = attention_of(config, layer, attention_fn, split, **options)
        self.attention_post_norm = norm(comes_last)
        self.mlp_norm = norm(comes_first and not config.shared_norm)
        self.mlp = (Experts if config.has_experts(layer) else MLP)(
            config, split, config.layer_mlp_dims[layer], **options
        )
        self.mlp_post_norm = norm(comes_last)
        size = config.per_layer_dim
        self.own_embedding = nnx.data(None) if size is None else OwnEmbedding(config, split, size, **options)
        ones = jnp.ones((1,), options["param_dtype"])
        self.scale = nnx.Param(ones, **split.along((1,), None)) if config.layer_scale else nnx.data(None)

    def __call__(
        self,
        x: Array,
        cache: Cache | None,
        num_new: ArrayLike | None,
        tokens: Array,
        positions: Array | None = None,
        *,
        kv: KV | None = None,
        append: bool = True,
        embedded: Array | None = None,
    ) -> tuple[Array, Cache | None, KV | None]:
        """[B, T, D] and this layer's cache -> the same, and the keys and values where other layers want them.

        `tokens` [B, T] are for policies that look at them, `positions` [B, T] for RoPE where there is no cache (None:
        0, 1, 2, ...), `kv` and `append` are the attention's, `embedded` [B, T, size] is this layer's own embedding.
        """
        inner = self._before(self.attention_norm, x)
        if self.is_read:
            kv = self.attention.keys_and_values(inner)
        given = {} if kv is None else {"kv": kv}
        if cache is None:
            y = self.attention(inner, is_causal=True, input_positions=positions, **given)
        else:
            y, cache = self.attention(inner, cache=cache, num_new=num_new, token_ids=tokens, append=append, **given)
        if self.parallel:
            x = x + self._scaled(y + self.mlp(inner if self.mlp_norm is None else self.mlp_norm(x)))
        else:
            x = self._added(x, inner, y, self.attention_norm, self.attention_post_norm)
            inner = self._before(self.mlp_norm, x)
            y = self.mlp(inner, x) if isinstance(self.mlp, Experts) else self.mlp(inner)
            x = self._added(x, inner, y, self.mlp_norm, self.mlp_post_norm)
        if self.own_embedding is not None and embedded is not None:
            x = x + self.own_embedding(x, embedded)
        if self.scale is not None:
            x = x * self.scale[...].astype(x.dtype)[None, None]
        return x, cache, kv if self.is_read else None

    def _before(self, norm: Norm | None, x: Array) -> Array:
        """What attention or MLP is given, [B, T, D]."""
        return x if norm is None or self.norm_position == "post" else norm(x)

    def _added(self, x: Array, inner: Array, y: Array, norm: Norm | None, post_norm: Norm | None) -> Array:
        """What attention or MLP made of `inner`, added to the residual, all [B, T, D]."""
        if post_norm is not None:
            y = post_norm(y)
        x = (inner if self.residual_after_norm else x) + self._scaled(y)
        return norm(x) if norm is not None and self.norm_position == "post" else x

    def _scaled(self, y: Array) -> Array:
        """What is added, [B, T, D], as large as the model wants it."""
        return y if self.residual_scale is None else y * jnp.asarray(self.residual_scale, y.dtype)


def attention_of(
    config: DecoderConfig, layer: int, attention_fn: Attention, split: Split, **options: Any
) -> GroupedQueryAttention | MultiHeadLatentAttention:
    """What one block attends with.

    Raises:
        UnsupportedError: latent attention with an `attention_fn`.
    """
    options |= {
        "rope": config.rope_of(layer),
        "window": config.layer_windows[layer],
        "scale": config.layer_scales[layer],
        "softcap": config.softcap,
        "mesh": split.mesh,
        "by": split.by,
        "axis": split.axis,
    }
    if config.is_latent:
        if attention_fn is not default_attention:
            raise UnsupportedError(
                "attention_fn is for attention with keys and values of every head; latent attention (kv_lora_rank) has "
                "its own: leave attention_fn out."
            )
        return MultiHeadLatentAttention(
            config.num_heads,
            config.model_dim,
            kv_lora_rank=config.kv_lora_rank or 0,
            q_lora_rank=config.q_lora_rank,
            qk_nope_head_dim=config.qk_nope_head_dim or 0,
            qk_rope_head_dim=config.qk_rope_head_dim or 0,
            v_head_dim=config.v_head_dim or 0,
            norm_epsilon=config.latent_norm_epsilon,
            use_bias=config.qkv_bias,
            **options,
        )
    is_owner = config.layer_sources[layer] == layer
    return GroupedQueryAttention(
        config.num_heads,
        config.model_dim,
        num_kv_heads=config.layer_kv_heads[layer],
        head_dim=config.layer_head_dims[layer],
        chunk=config.layer_chunks[layer],
        temperature=config.temperature_of(layer),
        output_gate=config.output_gate,
        alibi=False if config.positions != "alibi" else config.alibi_slopes or True,
        sinks=config.sinks,
        qk_norm=config.norm if config.has_qk_norm(layer) else None,
        qk_norm_heads=config.qk_norm_heads,
        qk_norm_epsilon=config.norm_epsilon,
        qkv_clip=config.qkv_clip,
        shares_kv=not is_owner,
        values_from_keys=is_owner and config.layer_values_from_keys[layer],
        value_norm=is_owner and config.value_norm,
        attention_fn=attention_fn,
        use_bias=config.qkv_bias,
        use_out_bias=config.out_bias,
        **options,
    )
