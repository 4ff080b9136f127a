"""The caches of an NNX layer: one class for all of them."""

from jax.typing import DTypeLike

from kvattn.cache import KVCache, PagedKVCache
from kvattn.codecs import Codec
from kvattn.layers import caching
from kvattn.layers.settings import HasSettings
from kvattn.policies import Policy


class MakesCaches(HasSettings):
    """Makes caches that fit a layer's settings; those of latent attention hold C + R numbers a token."""

    def make_cache(
        self,
        batch_size: int,
        capacity: int | None = None,
        *,
        policy: Policy | None = None,
        codec: Codec | None = None,
        dtype: DTypeLike | None = None,
        memory_kind: str | None = None,
        platform: str | None = None,
    ) -> KVCache:
        """An empty cache for ``y, cache = layer(x, cache=cache)``.

        Args:
            batch_size: B, sequences.
            capacity: most tokens to keep of a sequence; policies that bound it themselves need none.
            policy: which tokens are kept; the layer's own if None, or `kvattn.SlidingWindow` of its window,
                `kvattn.Chunked` of its chunk.
            codec: in how many bits; the layer's own if None.
            dtype: of what is stored without a codec; the layer's own if None.
            memory_kind: "pinned_host" for keys and values in the host's memory, as in `kvattn.KVCache.create`.
            platform: what the cache is made for, as in `kvattn.KVCache.create`. None: the layer's mesh, or where it
                is made.

        Raises:
            ConfigError: no capacity where one is needed.
            UnsupportedError: for latent attention, a codec that stores keys and values differently (KIVI).

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
        choices = {"policy": policy, "codec": codec, "dtype": dtype, "memory_kind": memory_kind}
        choices["platform"] = platform
        return caching.create(self.settings, batch_size, capacity=capacity, **choices)

    def make_paged_cache(
        self,
        num_pages: int,
        page_size: int | None = None,
        *,
        batch_size: int,
        max_length: int,
        policy: Policy | None = None,
        codec: Codec | None = None,
        dtype: DTypeLike | None = None,
        platform: str | None = None,
    ) -> PagedKVCache:
        """An empty pool of pages for ``y, cache = layer(x, cache=cache)``; tables come from the host.

        Args:
            num_pages: P, pages of the pool.
            page_size: R, tokens of a page. None: as many as the codec encodes together, else the smallest from 16 on
                that kernels take on the platform.
            batch_size: B, sequences of a step.
            max_length: most tokens of a sequence.
            policy: which tokens are kept; the layer's own if None, or `kvattn.policies.OrderedWindow` of its window,
                which gives pages back and lets sequences share those of a prefix.
            codec: in how many bits; the layer's own if None.
            dtype: of what is stored without a codec; the layer's own if None.
            platform: what the cache is made for, as in `kvattn.PagedKVCache.create`. None: the layer's mesh, or where
                it is made.

        Raises:
            As `kvattn.PagedKVCache.create`.
        """
        return caching.create_paged(
            self.settings,
            num_pages,
            page_size,
            batch_size=batch_size,
            max_length=max_length,
            policy=policy,
            codec=codec,
            dtype=dtype,
            platform=platform,
        )
