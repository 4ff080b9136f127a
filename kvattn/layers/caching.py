"""The cache as an argument and result of a layer: what the NNX and the Linen layers share.

A layer hands in anything that has the attributes of `Caching`; nothing here knows about Flax.
"""

from typing import Any, Protocol

import jax.numpy as jnp

from kvattn._typing import Array
from kvattn.attend.step import cached_attention
from kvattn.cache import Cache, KVCache
from kvattn.errors import ConfigError, ShapeError
from kvattn.layers import settings
from kvattn.policies import SlidingWindow


class Caching(Protocol):
    """The settings a cached call reads."""

    window: int | None
    rope: Any
    scale: float | None
    softcap: float | None
    policy: Any
    codec: Any
    implementation: Any
    dtype: Any
    param_dtype: Any


def create(
    layer: Caching,
    batch_size: int,
    num_kv_heads: int,
    head_dim: int,
    value_head_dim: int,
    *,
    capacity: int | None,
    policy: Any,
    codec: Any,
    dtype: Any,
) -> KVCache:
    """An empty cache for `layer`, whose own settings fill in what is None."""
    policy = layer.policy if policy is None else policy
    if policy is None and layer.window is not None:
        policy = SlidingWindow(layer.window)
    return KVCache.create(
        batch_size,
        num_kv_heads,
        head_dim,
        capacity=capacity,
        policy=policy,
        codec=layer.codec if codec is None else codec,
        dtype=storage_dtype(layer, dtype),
        value_head_dim=value_head_dim,
    )


def storage_dtype(layer: Caching, dtype: Any = None) -> Any:
    """The dtype of a cache: the one given, else the layer's, else that of its parameters."""
    return next(given for given in (dtype, layer.dtype, layer.param_dtype) if given is not None)


def attend(
    layer: Caching,
    query: Array,
    key: Array | None,
    value: Array | None,
    cache: Cache,
    *,
    num_new: Any,
    padding: str,
    token_ids: Any,
    sinks: Array | None,
    alibi_slopes: tuple[float, ...] | None,
    rope: Any,
) -> tuple[Array, Cache]:
    """One step of `layer` with the cache: `kvattn.cached_attention` with the layer's settings."""
    return cached_attention(
        query,
        key,
        value,
        cache,
        num_new=num_new,
        padding=padding,
        rope=rope,
        window=layer.window,
        scale=layer.scale,
        softcap=layer.softcap,
        sinks=None if sinks is None else sinks.astype(jnp.float32),
        alibi_slopes=settings.slopes_array(alibi_slopes),
        token_ids=token_ids,
        implementation=layer.implementation,
    )


def check_call(inputs_q: Array, **refused: Any) -> None:
    """Checks a call with `cache=`: one batch axis, and nothing that the cache decides itself.

    Raises:
        ShapeError: inputs that are not [B, T, D].
        ConfigError: an argument that has no meaning beside a cache.
    """
    for name, value in refused.items():
        if value is not None and value is not False:
            raise ConfigError(f"{name} cannot be combined with cache=: {_REASONS[name]}.")
    if inputs_q.ndim != 3:
        raise ShapeError(f"with a cache inputs_q must be [B, T, D], one row per sequence, got {inputs_q.shape}.")


def check_cross(layer: Caching, alibi_slopes: Any, rope: Any) -> None:
    """Checks that a layer can attend to an encoder's tokens, which share no order with the queries.

    Raises:
        ConfigError: it has a window, rotary positions or ALiBi.
    """
    for name, value in (("window", layer.window), ("rope", rope), ("alibi", alibi_slopes)):
        if value is not None:
            raise ConfigError(
                f"cross-attention in decode cannot have {name}: it goes by positions, and the tokens of an encoder "
                "share none with the queries. Leave it out of this layer."
            )


def is_cross(layer: Caching, inputs_q: Any, inputs_k: Any, alibi_slopes: Any, rope: Any) -> bool:
    """Whether a call of Flax's decode protocol brings an encoder's tokens instead of new ones of its own sequence.

    Keys of another length than the queries can only be an encoder's. One token with one key is appended, as in Flax.

    Raises:
        ConfigError: several keys for as many queries, which may be either; or an encoder where positions matter.
    """
    if inputs_k is None or inputs_k is inputs_q or not (hasattr(inputs_k, "shape") and hasattr(inputs_q, "shape")):
        return False
    num_tokens = inputs_q.shape[-2]
    if inputs_k.shape[-2] != num_tokens:
        check_cross(layer, alibi_slopes, rope)
        return True
    if num_tokens > 1:
        raise ConfigError(
            f"with decode=True, inputs_k of the same length as inputs_q ({num_tokens} tokens) may be new tokens or "
            "those of an encoder. For new tokens pass inputs_q only; for an encoder's pass decode=False, or "
            "cache=layer.make_cross_cache(encoder_out)."
        )
    return False


_REASONS = {
    "mask": "who attends to whom follows from positions, num_new and the policy",
    "input_positions": "positions are counted by the cache (cache.lengths)",
    "decode": "decode=True is Flax's cache in the module; use one of the two",
    "sow_weights": "the weights over a cache are not computed",
    "dropout": "a cached step is deterministic; pass deterministic=True",
    "attention_fn": "the cache is attended by kvattn.cached_attention, not by a function of yours",
    "inputs_k": "this cache is static, it already holds the keys of the encoder",
}
