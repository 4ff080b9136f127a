"""The Linen twin of `kvattn.layers.MultiHeadLatentAttention`."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.linear import default_kernel_init
from jax.sharding import AbstractMesh, Mesh
from jax.typing import ArrayLike, DTypeLike

from kvattn._typing import AnyArray, Array
from kvattn.cache import Cache, KVCache, PagedKVCache
from kvattn.codecs import Codec
from kvattn.errors import ConfigError
from kvattn.layers import attention_fn as attention
from kvattn.layers import caching, latent, linen_parts
from kvattn.layers.attention_fn import dot_product_attention
from kvattn.layers.settings import AttentionSettings
from kvattn.policies import Policy
from kvattn.positions import RoPE

Initializer = Callable[..., Array]


class MultiHeadLatentAttention(nn.Module, kw_only=True):
    """Multi-head latent attention (MLA; DeepSeek-V2, arXiv:2405.04434): a cache of C + R numbers a token for N heads.

    Fields, parameters and calls are those of `kvattn.layers.MultiHeadLatentAttention` and mean the same, but for these:

    Attributes:
        mesh: devices that `make_cache` and calls with a cache split the cache over, as `kvattn.sharding` does.
            (Parameters lie as their initialisers say: `flax.linen.with_partitioning`.)
        up_kernel_init: of ``key_up``, ``value_up`` and ``query`` (``query_up``), whose kernels have heads, where it
            differs from `kernel_init` (its partitioning, say).

    Raises:
        ConfigError: a rope for heads of another size than R; sizes below 1.
        RangeError: a window, scale, soft cap, epsilon or dropout rate outside its range.
        DTypeError: a field of the wrong type.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import kvattn
        >>> from kvattn.layers.linen import MultiHeadLatentAttention
        >>> layer = MultiHeadLatentAttention(
        ...     num_heads=8, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
        ...     rope=kvattn.RoPE(8))
        >>> x = jnp.ones((1, 10, 64))
        >>> variables = layer.init(jax.random.key(0), x)
        >>> y, cache = layer.apply(variables, x, cache=layer.make_cache(1, capacity=16))
        >>> y.shape, cache.lengths.tolist()
        ((1, 10, 64), [10])
    """

    num_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    rope: RoPE | None = None
    out_features: int | Sequence[int] | None = None
    use_bias: bool = False
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: jax.lax.PrecisionLike = None
    kernel_init: Initializer = default_kernel_init
    up_kernel_init: Initializer | None = None
    out_kernel_init: Initializer | None = None
    norm_epsilon: float = 1e-6
    dropout_rate: float = 0.0
    broadcast_dropout: bool = True
    deterministic: bool | None = None
    window: int | None = None
    scale: float | None = None
    softcap: float | None = None
    policy: Policy | None = None
    codec: Codec | None = None
    implementation: str | Sequence[str] | None = None
    mesh: Mesh | AbstractMesh | None = None
    by: str = "auto"
    axis: str = "model"

    def __post_init__(self):
        super().__post_init__()
        self._settings()

    @nn.compact
    def __call__(
        self,
        inputs: AnyArray,
        *,
        mask: ArrayLike | None = None,
        deterministic: bool | None = None,
        dropout_rng: Array | None = None,
        sow_weights: bool = False,
        is_causal: bool = False,
        input_positions: ArrayLike | None = None,
        cache: Cache | None = None,
        num_new: ArrayLike | Sequence[int] | None = None,
        padding: str = "right",
        token_ids: ArrayLike | None = None,
        append: bool = True,
    ) -> Any:
        """Attends `inputs` to themselves, or to what a cache holds and to themselves.

        Arguments mean what they mean in the call of `kvattn.layers.MultiHeadLatentAttention`. `dropout_rng` is a key
        for dropout, None the stream "dropout". `sow_weights` sows the weights [..., N, T, S] as "attention_weights" in
        "intermediates".

        Returns:
            [..., T, out_features]; with `cache` also the new cache.

        Raises:
            ShapeError: inputs that do not fit the cache.
            ConfigError: arguments that contradict each other; a cache that has values of its own.
            CapacityError: tokens that do not fit into the cache. Inside `jax.jit` they are dropped, their rows are
                zeros, and ``cache.check()`` raises.
        """
        settings, sizes = self._settings()
        inputs = jnp.asarray(inputs)
        own = caching.projects(settings, cache=cache, append=append, kv=None, inputs_k=None, decode=False)
        heads = functools.partial(self._project, use_bias=False, kernel_init=self.up_kernel_init or self.kernel_init)
        if sizes.query_latent is None:
            query = heads("query", (self.num_heads, sizes.query))(inputs)
        else:
            down = self._project("query_down", sizes.query_latent)(inputs)
            query = heads("query_up", (self.num_heads, sizes.query))(latent.normed(self._norm("query_norm"), down))
        down = self._project("kv_down", sizes.cached)(inputs)
        shared, down = down[..., sizes.latent :], latent.normed(self._norm("kv_norm"), down[..., : sizes.latent])
        key_up = heads("key_up", (self.num_heads, sizes.plain))
        value_up = heads("value_up", (self.num_heads, sizes.value))
        features = inputs.shape[-1] if self.out_features is None else self.out_features
        out = self._project("out", features, axis=(-2, -1), kernel_init=self.out_kernel_init or self.kernel_init)

        if cache is not None:
            latent.check_cache(cache)
            is_random = self.dropout_rate > 0 and (self.deterministic is False or deterministic is False)
            caching.check_call(
                settings, cache, inputs,
                mask=mask, input_positions=input_positions, sow_weights=sow_weights, dropout=is_random,
            )  # fmt: skip
            query, key = latent.absorbed(settings, sizes, query, down, shared, linen_parts.kernel_of(key_up, down))
            x, cache = caching.cached_attention(
                settings, query, key if own else None, None, cache,
                sinks=None, num_new=num_new, padding=padding, token_ids=token_ids,
            )  # fmt: skip
            return out(latent.to_values(settings, x, linen_parts.kernel_of(value_up, down))), cache

        if num_new is not None or token_ids is not None:
            raise ConfigError("num_new and token_ids belong to cache=; without a cache use mask for padding.")
        value = value_up(down)
        query, key = latent.to_heads(settings, sizes, query, key_up(down), shared, input_positions)
        x = attention.call(
            dot_product_attention, latent.materialised(settings, sizes), query, key, value,
            mask=mask, is_causal=is_causal, sinks=None,
            dropout_rng=linen_parts.dropout_rng(self, deterministic, dropout_rng),
            module=linen_parts.Sowing(self) if sow_weights else None,
        )  # fmt: skip
        return out(x)

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
        """An empty cache for ``y, cache = layer.apply(variables, x, cache=cache)``: C + R numbers a token.

        Arguments and errors are those of `kvattn.layers.MultiHeadLatentAttention`'s.
        """
        choices = {"policy": policy, "codec": codec, "dtype": dtype, "memory_kind": memory_kind}
        choices["platform"] = platform
        return caching.create(self._settings()[0], batch_size, capacity=capacity, **choices)

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
        """An empty pool of pages for ``y, cache = layer.apply(variables, x, cache=cache)``; tables come from the host.

        Arguments and errors are those of `kvattn.layers.MultiHeadLatentAttention`'s.
        """
        choices = {"policy": policy, "codec": codec, "dtype": dtype, "platform": platform}
        return caching.create_paged(
            self._settings()[0], num_pages, page_size, batch_size=batch_size, max_length=max_length, **choices
        )

    def _settings(self) -> tuple[AttentionSettings, latent.LatentSizes]:
        """The fields, checked."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.init}
        sizes = latent.LatentSizes.checked(given)
        return latent.checked(given, sizes), sizes

    def _project(self, name: str, features: Any, **options: Any) -> nn.DenseGeneral:
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype, "precision": self.precision}
        given = {"axis": -1, "use_bias": bool(self.use_bias), "kernel_init": self.kernel_init}
        options = {**given, "dot_general": linen_parts.dot_general, **options}
        return nn.DenseGeneral(features, name=name, **settings, **options)

    def _norm(self, name: str) -> nn.RMSNorm:
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return nn.RMSNorm(epsilon=self.norm_epsilon, name=name, **options)
