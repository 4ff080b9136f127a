"""What an NNX attention layer does with caches: those handed to it (`ArgumentCache`), and Flax's own (`ModuleCache`).

Mix-ins of `kvattn.layers.MultiHeadAttention`, whose attributes they use.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from kvattn import _checks
from kvattn._typing import Array
from kvattn.cache import Cache, KVCache
from kvattn.errors import ConfigError, DTypeError, ShapeError
from kvattn.layers import caching, placement, settings
from kvattn.layers import decode as decode_protocol
from kvattn.layers.attention_fn import dot_product_attention, resolve


class LayerParts:
    """What the mix-ins below need from the layer they are part of."""

    num_kv_heads: int
    in_features: int
    in_kv_features: int
    head_dim: int
    value_head_dim: int
    dtype: Any
    param_dtype: Any
    dropout_rate: float
    attention_fn: Any
    window: int | None
    rope: Any
    alibi_slopes: tuple[float, ...] | None
    scale: float | None
    softcap: float | None
    cache_sharding: Any
    policy: Any
    codec: Any
    implementation: Any
    mesh: Any
    by: str
    axis: str
    num_heads: int
    query: Any
    key: Any
    value: Any
    query_ln: Any
    key_ln: Any
    sinks: Any
    _inputs: Any
    _project: Any
    _output: Any
    _rope: Any


class ArgumentCache(LayerParts):
    """``y, cache = layer(x, cache=cache)``: the cache is an argument and a result."""

    def make_cache(
        self, batch_size: int, capacity: int | None = None, *, policy: Any = None, codec: Any = None, dtype: Any = None
    ) -> KVCache:
        """An empty cache for ``y, cache = layer(x, cache=cache)``.

        Args:
            batch_size: B, sequences.
            capacity: most tokens to keep of a sequence; policies that bound it themselves need none.
            policy: which tokens are kept; the layer's own if None, or `kvattn.SlidingWindow` of its window.
            codec: in how many bits; the layer's own if None.
            dtype: of what is stored without a codec; the layer's own if None.

        Raises:
            ConfigError: no capacity where one is needed.

        Example:
            >>> import jax.numpy as jnp
            >>> from flax import nnx
            >>> from kvattn.layers import MultiQueryAttention
            >>> layer = MultiQueryAttention(num_heads=4, in_features=32, rngs=nnx.Rngs(0))
            >>> cache = layer.make_cache(2, capacity=16)
            >>> y, cache = layer(jnp.ones((2, 5, 32)), cache=cache)
            >>> y, cache = layer(jnp.ones((2, 1, 32)), cache=cache)
            >>> y.shape, cache.lengths.tolist()
            ((2, 1, 32), [6, 6])
        """
        return caching.create(
            self,
            batch_size,
            self.num_kv_heads,
            self.head_dim,
            self.value_head_dim,
            capacity=capacity,
            policy=policy,
            codec=codec,
            dtype=dtype,
        )

    def make_cross_cache(self, encoder_out: Array, lengths: Any = None) -> KVCache:
        """Projects an encoder's output once, for ``y, cache = layer(x, cache=cross_cache)``.

        Args:
            encoder_out: [B, S, in_kv_features].
            lengths: int32 [B], how many of the S tokens are real; all if None.

        Raises:
            ConfigError: the layer has a window, rope or ALiBi, which need positions the two sides do not share.
            ShapeError: `encoder_out` is not [B, S, in_kv_features].
        """
        caching.check_cross(self, self.alibi_slopes, self._rope())
        if getattr(encoder_out, "ndim", None) != 3 or encoder_out.shape[-1] != self.in_kv_features:
            shape = getattr(encoder_out, "shape", None)
            raise ShapeError(f"encoder_out must be [B, S, {self.in_kv_features}], got shape {shape}.")
        key = self._project(self.key, jnp.asarray(encoder_out), None, self.key_ln)
        value = self._project(self.value, jnp.asarray(encoder_out), None)
        return KVCache.from_encoder(key, value, lengths)

    def _call_with_cache(
        self,
        inputs_q: Any,
        inputs_k: Any,
        inputs_v: Any,
        cache: Cache,
        num_new: Any,
        padding: str,
        token_ids: Any,
        qkv_sharding: Any,
        out_sharding: Any,
        **refused: Any,
    ) -> tuple[Array, Cache]:
        foreign = resolve(self.attention_fn, self.head_dim)[1] is not dot_product_attention
        refused |= {"attention_fn": foreign, "inputs_k": cache.is_static and inputs_k is not None}
        inputs = self._inputs(inputs_q, inputs_k, inputs_v, keys=not cache.is_static)
        caching.check_call(inputs[0], **refused)
        query = self._project(self.query, inputs[0], qkv_sharding, self.query_ln)
        key = value = None
        if cache.is_static:
            caching.check_cross(self, self.alibi_slopes, self._rope())
        else:
            key = self._project(self.key, inputs[1], qkv_sharding, self.key_ln)
            value = self._project(self.value, inputs[2], qkv_sharding)
        x, cache = caching.attend(
            self,
            query,
            key,
            value,
            cache,
            num_new=num_new,
            padding=padding,
            token_ids=token_ids,
            sinks=None if self.sinks is None else self.sinks[...],
            alibi_slopes=self.alibi_slopes,
            rope=self._rope(),
        )
        return self._output(x, out_sharding), cache


class ModuleCache(LayerParts):
    """``layer(x, decode=True)``: Flax's protocol, the cache is three variables of the module."""

    def init_cache(self, input_shape: Sequence[int], dtype: Any = None) -> None:
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
        if not isinstance(input_shape, Sequence) or isinstance(input_shape, str):
            raise DTypeError(f"input_shape must be a shape (..., L, D), got {input_shape!r}: pass inputs.shape.")
        if len(input_shape) < 2:
            raise ShapeError(f"input_shape must be (..., L, D), got {input_shape}: L tokens are room for L tokens.")
        *batch, length, _ = (_checks.integer("input_shape", size, 0) for size in input_shape)
        dtype = _checks.inexact("dtype", caching.storage_dtype(self, dtype))
        sharding = placement.cache_metadata(self.cache_sharding, self.key.kernel[...], len(batch) + 3)

        def empty(size: int) -> Any:
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
        if self.cached_key is not None:
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

    def _append(self, query: Array, key: Array, value: Array, mask: Any, input_positions: Any) -> decode_protocol.Step:
        """Adds tokens to Flax's cache."""
        if self.cached_key is None or self.cached_value is None or self.cache_index is None:
            raise ConfigError("Autoregressive cache not initialized, call ``init_cache`` first.")
        index = self.cache_index[...]
        step = decode_protocol.extend(
            self.cached_key[...],
            self.cached_value[...],
            index,
            query,
            key,
            value,
            mask=mask,
            rope=self._rope(),
            input_positions=input_positions,
            window=self.window,
            alibi_slopes=settings.slopes_array(self.alibi_slopes),
        )
        self.cached_key[...], self.cached_value[...], self.cache_index[...] = (
            step.cached_key,
            step.cached_value,
            step.index,
        )
        return step
