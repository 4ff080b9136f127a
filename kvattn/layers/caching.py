"""The cache as an argument and result of a layer: what the NNX and the Linen layers share.

A layer hands in anything that has the attributes of `Caching`; nothing here knows about Flax.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp

from kvattn import _checks, sharding
from kvattn._typing import Array
from kvattn.cache import Cache, KVCache
from kvattn.errors import ConfigError, ShapeError
from kvattn.layers import placement, settings
from kvattn.policies import SlidingWindow
from kvattn.sharding.explicit import cached_attention


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
    mesh: Any
    by: str
    axis: str
    num_heads: int


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
    batch_size = _checks.integer("batch_size", batch_size, 0)
    policy = layer.policy if policy is None else policy
    if policy is None and layer.window is not None:
        policy = SlidingWindow(layer.window)

    def empty() -> KVCache:
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

    if layer.mesh is None:
        return empty()
    on = {"mesh": layer.mesh, "by": scheme(layer, batch_size, num_kv_heads), "axis": layer.axis}

    def arranged() -> KVCache:
        return sharding.arrange(empty(), **on)

    # Compiled, so that no device ever holds more than its part.
    return jax.jit(arranged, out_shardings=sharding.cache_sharding(jax.eval_shape(arranged), **on))()


def scheme(layer: Caching, batch_size: int, num_kv_heads: int) -> str:
    """How the caches of a layer with a mesh are split."""
    if layer.by != "auto":
        return layer.by
    parts = placement.axis_size(layer.mesh, layer.axis)
    rows = batch_size // dict(layer.mesh.shape).get("data", 1) if layer.axis != "data" else batch_size
    return sharding.choose(layer.num_heads, num_kv_heads, rows, parts)


def storage_dtype(layer: Caching, dtype: Any = None) -> Any:
    """The dtype of a cache: the one given, else the layer's, else that of its parameters."""
    return next((given for given in (dtype, layer.dtype, layer.param_dtype) if given is not None), jnp.float32)


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
    rules = {
        "num_new": num_new,
        "padding": padding,
        "rope": rope,
        "window": layer.window,
        "scale": layer.scale,
        "softcap": layer.softcap,
        "sinks": None if sinks is None else sinks.astype(jnp.float32),
        "alibi_slopes": settings.slopes_array(alibi_slopes),
        "token_ids": token_ids,
        "implementation": layer.implementation,
    }
    if layer.mesh is None:
        return cached_attention(query, key, value, cache, **rules)
    num_kv_heads = cache.num_kv_heads if key is None else key.shape[2]
    by = scheme(layer, cache.batch_size, num_kv_heads)
    if key is not None and value is not None:
        # Else the compiler, which may choose on Auto axes, gathers the kernels instead of a token's keys and values.
        key, value = (placement.by_heads(x, layer.mesh, layer.axis) for x in (key, value))
    return sharding.cached_attention(query, key, value, cache, mesh=layer.mesh, by=by, axis=layer.axis, **rules)


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
