"""Flax's own attention layers with kvattn's attention in them, by their ``attention_fn``.

That gives them grouped-query attention without copies of keys, windows, soft caps and sinks, in training and over
Flax's own decode cache. For kvattn's caches take the layers of `kvattn.layers`, which have Flax's parameters.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.nnx.nn import dtypes
from jax.typing import ArrayLike
from jaxtyping import Bool, Float

from kvattn import _checks
from kvattn._typing import Array
from kvattn.errors import RangeError
from kvattn.layers import attention_fn as fn
from kvattn.layers import masking


def attention_fn(
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    alibi_slopes: Float[Array, " N"] | None = None,
    implementation: str | Sequence[str] | None = None,
) -> Callable[..., Array]:
    """The ``attention_fn`` of `flax.nnx.MultiHeadAttention` and `flax.linen.MultiHeadDotProductAttention`.

    Args:
        window: a query sees the last so many tokens of those that it may see at all, its own included. That holds over
            Flax's decode cache too, where the mask alone says at which place the query is.
        scale: multiplies the scores; 1/√H if None.
        softcap: caps the scores.
        sinks: float[N], a logit per head that joins the softmax sum only.
        alibi_slopes: float32[N], by places from the front: not over a decode cache.
        implementation: as in `kvattn.dot_product_attention`.

    Returns:
        A function with the call of `flax.nnx.dot_product_attention`.

    Raises:
        RangeError: a window below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from kvattn.adapters import flax as kvflax
        >>> layer = nnx.MultiHeadAttention(
        ...     4, 32, decode=False, attention_fn=kvflax.attention_fn(window=8, softcap=30.0), rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((1, 10, 32)), is_causal=True).shape
        (1, 10, 32)
    """
    rules = {
        "scale": scale,
        "softcap": softcap,
        "sinks": sinks,
        "alibi_slopes": alibi_slopes,
        "implementation": implementation,
    }
    if window is not None:
        window = _checks.integer("window", window, 1, RangeError)
    return functools.partial(_attend, window=window, rules=rules)


def _attend(
    query: Float[Array, "... T N H"],
    key: Float[Array, "... S K H"],
    value: Float[Array, "... S K Hv"],
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: jax.lax.PrecisionLike = None,
    module: Any = None,
    promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
    is_causal: bool = False,
    *,
    window: int | None,
    rules: dict[str, Any],
    force_fp32_for_softmax: bool = True,
    qk_attn_weights_einsum: Any = None,
    attn_weights_value_einsum: Any = None,
) -> Float[Array, "... T N Hv"]:
    """Flax's call: queries [..., T, N, H], keys [..., S, K, H], values [..., S, K, Hv]."""
    if window is not None and mask is not None:
        allowed, spoiled = masking.as_bool(mask, query.ndim)
        assert allowed is not None
        square = query.shape[-3], key.shape[-3]
        lead = (1,) * (query.ndim - allowed.ndim) + allowed.shape[:-2]
        allowed = jnp.broadcast_to(jnp.atleast_2d(allowed), (*lead, *square)[-query.ndim :])
        if is_causal:
            allowed = allowed & jnp.broadcast_to(jnp.tril(jnp.ones(square, bool)), allowed.shape)
        mask, window, is_causal = _last(allowed, window), None, False
    else:
        spoiled = None
    out = fn.dot_product_attention(
        query,
        key,
        value,
        bias=bias,
        mask=mask,
        broadcast_dropout=broadcast_dropout,
        dropout_rng=dropout_rng,
        dropout_rate=dropout_rate,
        deterministic=deterministic,
        dtype=dtype,
        precision=precision,
        module=module,
        promote_dtype=promote_dtype,
        is_causal=is_causal,
        window=window,
        **rules,
    )
    return masking.spoil(out, spoiled)


def _last(allowed: Bool[Array, "... S"], window: int) -> Bool[Array, "... S"]:
    """Of the keys [..., S] that a query may see, the last ones."""
    behind = jnp.cumsum(allowed[..., ::-1], axis=-1, dtype=jnp.int32)[..., ::-1]
    return allowed & (behind <= window)
