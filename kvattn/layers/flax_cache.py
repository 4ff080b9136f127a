"""Flax's decode cache in an NNX layer: the protocol of `init_cache` and ``decode=True``."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from kvattn import _checks
from kvattn._typing import Array
from kvattn.errors import ConfigError, DTypeError
from kvattn.layers import caching, placement
from kvattn.layers import decode as decode_protocol
from kvattn.layers.settings import AttentionSettings, HasSettings


class FlaxCache(HasSettings):
    """The cache that Flax keeps in a layer, and what makes, fills and checks it."""

    in_features: int
    deterministic: bool | None
    decode: bool | None
    key: Any
    cached_key: nnx.Cache[Array] | None
    cached_value: nnx.Cache[Array] | None
    cache_index: nnx.Cache[Array] | None
    relative_bias: nnx.Param[Array] | None

    def _without_cache(self) -> None:
        """As a layer begins."""
        self.cached_key = nnx.data(None)
        self.cached_value = nnx.data(None)
        self.cache_index = nnx.data(None)

    def init_cache(self, input_shape: Sequence[int], dtype: DTypeLike | None = None) -> None:
        """Makes Flax's cache [..., L, K, H] for ``decode=True``, empty.

        Args:
            input_shape: [..., L, D], as of the whole sequence: L tokens are room for L tokens.
            dtype: of what is stored; keys and values are cast to it. The layer's own if None.

        Raises:
            ShapeError, DTypeError, ConfigError: an `input_shape` that is no shape of two axes or more.
            DTypeError: a dtype that is neither floating nor complex.

        Example:
            >>> import jax.numpy as jnp
            >>> from flax import nnx
            >>> from kvattn.layers import MultiHeadAttention
            >>> layer = MultiHeadAttention(num_heads=2, in_features=8, decode=True, rngs=nnx.Rngs(0))
            >>> layer.init_cache((1, 16, 8))
            >>> layer(jnp.ones((1, 3, 8))).shape, int(layer.cache_index[...])
            ((1, 3, 8), 3)
        """
        caching.check_owner(self.settings)
        *batch, length, _ = decode_protocol.checked_shape(input_shape)
        dtype = _checks.inexact("dtype", self.settings.storage_dtype if dtype is None else dtype)
        sharding = placement.cache_metadata(self.cache_sharding, self.key.kernel[...], len(batch) + 3)

        def empty(size: int) -> nnx.Cache[Array]:  # [..., L, K, size]
            shape = (*batch, length, self.num_kv_heads, size)
            return nnx.Cache(jnp.zeros(shape, dtype), **sharding)

        self.cached_key = empty(self.head_dim)
        self.cached_value = empty(self.value_head_dim)
        self.cache_index = nnx.Cache(jnp.zeros((), jnp.int32))

    def check_cache(self) -> None:
        """Raises what a jitted decode step could only record in `cache_index`.

        Raises:
            CapacityError: tokens were offered that did not fit. They were dropped, the cache holds those before them.
        """
        if self.cached_key is not None and self.cache_index is not None:
            decode_protocol.refuse_overflow(self.cache_index[...], 0, self.cached_key.shape[-3])

    def set_view(
        self,
        deterministic: bool | None = None,
        decode: bool | None = None,
        batch_size: int | Sequence[int] | None = None,
        max_length: int | None = None,
    ) -> None:
        """What `nnx.view` sets.

        Args:
            deterministic: if True, dropout is off.
            decode: if True, calls append to Flax's cache.
            batch_size: with `max_length`, makes an empty cache for so many rows (or batch axes).
            max_length: how many tokens that cache holds.

        Raises:
            DTypeError: one of `batch_size` and `max_length` is missing.
        """
        if deterministic is not None:
            self.deterministic = deterministic
        if decode is not None:
            self.decode = decode
        if decode and (batch_size is not None or max_length is not None):
            if batch_size is None:
                raise DTypeError("'batch_size' must be provided when initializing cache.")
            if max_length is None:
                raise DTypeError("'max_length' must be provided when initializing cache.")
            batch = batch_size if isinstance(batch_size, Sequence) else (batch_size,)
            batch = tuple(_checks.integer("batch_size", size, 0) for size in batch)
            self.init_cache((*batch, _checks.integer("max_length", max_length, 1), self.in_features))

    def _append(
        self,
        settings: AttentionSettings,
        query: Array,
        key: Array,
        value: Array,
        mask: ArrayLike | None,
        input_positions: ArrayLike | None,
    ) -> decode_protocol.Step:
        """Adds tokens [..., T, heads, H] to Flax's cache."""
        if self.cached_key is None or self.cached_value is None or self.cache_index is None:
            raise ConfigError("Autoregressive cache not initialized, call ``init_cache`` first.")
        cached = decode_protocol.Cached(self.cached_key[...], self.cached_value[...], self.cache_index[...])
        step = decode_protocol.extend(
            settings, cached, query, key, value,
            mask=mask, input_positions=input_positions,
            relative_bias=None if self.relative_bias is None else self.relative_bias[...],
        )  # fmt: skip
        self.cached_key[...], self.cached_value[...], self.cache_index[...] = step.cached
        return step
