"""The usual kinds of attention: `MultiHeadAttention` with one argument required or fixed."""

from collections.abc import Sequence
from typing import Any

from kvattn import _checks
from kvattn.errors import ConfigError
from kvattn.layers.attention import MultiHeadAttention


class GroupedQueryAttention(MultiHeadAttention):
    """`MultiHeadAttention` with fewer key/value heads than query heads: `num_kv_heads` is required.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from kvattn.layers import GroupedQueryAttention
        >>> layer = GroupedQueryAttention(num_heads=8, in_features=64, num_kv_heads=2, rngs=nnx.Rngs(0))
        >>> layer.key.kernel.shape
        (64, 2, 8)
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | Sequence[int] | None = None,
        num_kv_heads: int | None = None,
        in_kv_features: int | None = None,
        **options: Any,
    ):
        if num_kv_heads is None:
            raise ConfigError("GroupedQueryAttention needs num_kv_heads, the number of key/value heads.")
        super().__init__(num_heads, in_features, qkv_features, out_features, num_kv_heads, in_kv_features, **options)


class MultiQueryAttention(MultiHeadAttention):
    """`MultiHeadAttention` with one key/value head, shared by all query heads.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from kvattn.layers import MultiQueryAttention
        >>> layer = MultiQueryAttention(num_heads=8, in_features=64, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((1, 10, 64)), is_causal=True).shape
        (1, 10, 64)
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | Sequence[int] | None = None,
        num_kv_heads: int = 1,
        in_kv_features: int | None = None,
        **options: Any,
    ):
        if _checks.integer("num_kv_heads", num_kv_heads, 1) != 1:
            raise ConfigError(f"MultiQueryAttention has one key/value head, got num_kv_heads={num_kv_heads}.")
        super().__init__(num_heads, in_features, qkv_features, out_features, 1, in_kv_features, **options)


class SlidingWindowAttention(MultiHeadAttention):
    """`MultiHeadAttention` whose queries see the last `window` tokens, their own included.

    Its caches keep those tokens only (`kvattn.SlidingWindow`) unless another policy is given.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from kvattn.layers import SlidingWindowAttention
        >>> layer = SlidingWindowAttention(num_heads=8, in_features=64, window=4, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((1, 10, 64))).shape
        (1, 10, 64)
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | Sequence[int] | None = None,
        num_kv_heads: int | None = None,
        in_kv_features: int | None = None,
        *,
        window: int,
        **options: Any,
    ):
        if window is None:
            raise ConfigError("SlidingWindowAttention needs a window: how many tokens a query sees, its own included.")
        super().__init__(
            num_heads, in_features, qkv_features, out_features, num_kv_heads, in_kv_features, window=window, **options
        )
