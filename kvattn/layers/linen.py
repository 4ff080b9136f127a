"""Linen attention layers: drop-in for those of `flax.linen`, with groups, windows, rotary positions and caches.

The twins of the NNX layers, under Flax's Linen names. Parameters, their initialisation and the decode
protocol (the collection `cache`) are Flax's. What this module adds to Flax's has the same meaning as in
`kvattn.layers.MultiHeadAttention`.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jax.sharding import AbstractMesh, Mesh
from jax.typing import ArrayLike, DTypeLike

from kvattn import _checks
from kvattn._typing import AnyArray, Array
from kvattn.attend import full
from kvattn.cache import Cache, KVCache, PagedKVCache
from kvattn.codecs import Codec
from kvattn.errors import ConfigError, ShapeError
from kvattn.layers import biases, caching, linen_parts, masking, placement
from kvattn.layers.linen_latent import MultiHeadLatentAttention
from kvattn.layers.rotary import rotate, warm
from kvattn.layers.settings import AttentionSettings
from kvattn.policies import Policy
from kvattn.positions import RelativeBuckets, RoPE, Temperature

__all__ = [
    "GroupedQueryAttention",
    "MultiHeadAttention",
    "MultiHeadDotProductAttention",
    "MultiHeadLatentAttention",
    "MultiQueryAttention",
    "SelfAttention",
    "SlidingWindowAttention",
]


class _Encode:
    """Stands in for a cache that is to be made from an encoder's output."""

    def __init__(self, lengths: Any, platform: str | None):
        self.lengths, self.platform = lengths, platform


class _Project:
    """Stands in for a cache where keys and values are wanted as they are."""


class MultiHeadDotProductAttention(nn.MultiHeadDotProductAttention, kw_only=True):
    """Multi-head attention with N query heads and K key/value heads (K = N unless `num_kv_heads` is given).

    Has every field of `flax.linen.MultiHeadDotProductAttention` in its order. Scores and softmax are always
    float32; with `force_fp32_for_softmax` so is what they make of narrower values, and as in Flax the output where
    `dtype` is None. The additions are those of `kvattn.layers.MultiHeadAttention`, and mean the same, but for these:

    Attributes:
        kv_kernel_init: of the key and value kernels, where it differs from `kernel_init` (its partitioning, say).
        kv_bias_init: the same for their biases.
        cache_sharding: names of mesh axes, one per axis of Flax's cache [..., L, K, H].
        mesh: devices that `make_cache` and calls with a cache split the cache over, as `kvattn.sharding` does.
            (Parameters lie as their initialisers say: `flax.linen.with_partitioning`.)

    Raises:
        ConfigError: head counts that do not divide, contradicting sizes.
        RangeError: a window, scale, soft cap or dropout rate outside its range.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from kvattn.layers.linen import MultiHeadDotProductAttention
        >>> layer = MultiHeadDotProductAttention(num_heads=8, num_kv_heads=2)
        >>> x = jnp.ones((1, 10, 64))
        >>> variables = layer.init(jax.random.key(0), x)
        >>> layer.apply(variables, x, is_causal=True).shape
        (1, 10, 64)
        >>> cache = layer.make_cache(1, capacity=16, in_features=64)
        >>> y, cache = layer.apply(variables, x, cache=cache)
        >>> cache.lengths.tolist()
        [10]
    """

    num_kv_heads: int | None = None
    head_dim: int | None = None
    value_head_dim: int | None = None
    window: int | None = None
    chunk: int | None = None
    rope: RoPE | None = None
    relative_buckets: RelativeBuckets | None = None
    temperature: Temperature | None = None
    output_gate: str | None = None
    alibi: bool | Sequence[float] = False
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False
    qk_norm: str | None = None
    qk_norm_heads: str = "shared"
    qk_norm_epsilon: float = 1e-6
    qkv_clip: float | None = None
    shares_kv: bool = False
    values_from_keys: bool = False
    value_norm: bool = False
    use_out_bias: bool | None = None
    kv_kernel_init: Callable[..., Array] | None = None
    kv_bias_init: Callable[..., Array] | None = None
    cache_sharding: Sequence[Any] | None = None
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
        inputs_q: AnyArray,
        inputs_k: AnyArray | None = None,
        inputs_v: AnyArray | None = None,
        *,
        inputs_kv: AnyArray | None = None,
        mask: ArrayLike | None = None,
        deterministic: bool | None = None,
        dropout_rng: Array | None = None,
        sow_weights: bool = False,
        is_causal: bool = False,
        input_positions: ArrayLike | None = None,
        cache: Cache | _Encode | _Project | None = None,
        num_new: ArrayLike | Sequence[int] | None = None,
        padding: str = "right",
        token_ids: ArrayLike | None = None,
        append: bool = True,
        kv: tuple[Array, Array] | None = None,
    ) -> Any:
        """Attends `inputs_q` to `inputs_k` and `inputs_v`, or to what a cache holds and to themselves.

        Arguments mean what they mean in the call of `kvattn.layers.MultiHeadAttention`. Those that are Linen's alone:
        `inputs_kv` (deprecated) is both `inputs_k` and `inputs_v`; `dropout_rng` is a key for dropout, None the stream
        "dropout". `deterministic` is given here or as a field, not both. `sow_weights` sows the weights [..., N, T, S]
        as "attention_weights" in "intermediates"; the output stays the same.

        Returns:
            [..., T, out_features]; with `cache` also the new cache.

        Raises:
            ShapeError: inputs that do not fit the cache or each other.
            ConfigError: arguments that contradict each other.
            CapacityError: tokens that do not fit into the cache. Inside `jax.jit` they are dropped and their rows are
                zeros; `cache_index` beyond the cache's length, or ``cache.check()``, tells.
        """
        if isinstance(cache, _Encode):
            project = linen_parts.Projections(self, self._settings_of_encoder(inputs_q))
            keys_and_values = project.keys_and_values(inputs_q, inputs_q)
            return KVCache.from_encoder(*keys_and_values, cache.lengths, platform=cache.platform)
        settings = self._settings(inputs_q.shape[-1])
        project = linen_parts.Projections(self, settings)
        if isinstance(cache, _Project):
            return project.keys_and_values(*linen_parts.key_value_inputs(inputs_q, inputs_k, inputs_v, None))
        key_given = inputs_k is not None or inputs_kv is not None
        is_cross = cache is None and self._is_cross(settings, inputs_q, inputs_k if inputs_kv is None else inputs_kv)
        own = caching.projects(
            settings, cache=cache, append=append, kv=kv, inputs_k=True if key_given else None, decode=bool(self.decode)
        )
        inputs_k, inputs_v = linen_parts.key_value_inputs(inputs_q, inputs_k, inputs_v, inputs_kv)
        sinks = self.param("sinks", nn.initializers.zeros, (self.num_heads,), self.param_dtype) if self.sinks else None
        relative_bias = project.relative_bias()

        if cache is not None:
            caching.check_call(
                settings,
                cache,
                inputs_q,
                mask=mask,
                input_positions=input_positions,
                sow_weights=sow_weights,
                attention_fn=not linen_parts.is_own(self.attention_fn),
                inputs_k=cache.is_static and key_given,
                dropout=self.dropout_rate > 0 and (self.deterministic is False or deterministic is False),
            )
            query = project.queries(inputs_q)
            key, value = project.keys_and_values(inputs_k, inputs_v) if own else kv or (None, None)
            x, cache = caching.cached_attention(
                settings, query, key, value, cache,
                sinks=sinks, relative_bias=relative_bias,
                num_new=num_new, padding=padding, token_ids=token_ids, append=append,
            )  # fmt: skip
            return project.out(self._forced(x), inputs_q), cache

        if num_new is not None or token_ids is not None:
            raise ConfigError("num_new and token_ids belong to cache=; without a cache use mask for padding.")
        # Linen draws parameters by name, so the order of these calls does not matter.
        query = project.queries(inputs_q)
        key, value = project.keys_and_values(inputs_k, inputs_v) if kv is None else kv
        attend = functools.partial(
            self._attend,
            sinks=sinks,
            dropout_rng=linen_parts.dropout_rng(self, deterministic, dropout_rng),
            sow_weights=sow_weights,
        )
        if self.decode and not is_cross:
            where = {"mask": mask, "input_positions": input_positions, "relative_bias": relative_bias}
            step = linen_parts.decode_step(self, settings, query, key, value, **where)
            if step is not None:
                settings = dataclasses.replace(
                    settings, window=None, chunk=None, alibi_slopes=None
                )  # they are in mask and bias
                x = attend(settings, step.query, step.key, step.value, mask=step.mask, bias=step.bias)
                return jnp.where(step.fits, project.out(masking.spoil(x, step.spoiled), inputs_q), 0)
        bias = None
        if not is_cross:
            query, key = (rotate(self.rope, x, input_positions) for x in (query, key))
            query = warm(self.temperature, query, input_positions)
            bias = biases.of_full(settings, relative_bias, query, key)
        x = attend(settings, query, key, value, mask=mask, bias=bias, is_causal=is_causal)
        return project.out(x, inputs_q)

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
        in_features: int | None = None,
    ) -> KVCache:
        """An empty cache for ``y, cache = layer.apply(variables, x, cache=cache)``.

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
            in_features: D, needed where neither `qkv_features` nor `head_dim` is set.

        Raises:
            ConfigError: no capacity where one is needed, or an unknown head dim.
        """
        if in_features is not None:
            _checks.integer("in_features", in_features, 1)
        choices = {"policy": policy, "codec": codec, "dtype": dtype, "memory_kind": memory_kind}
        choices["platform"] = platform
        return caching.create(self._settings(in_features), batch_size, capacity=capacity, **choices)

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
        in_features: int | None = None,
    ) -> PagedKVCache:
        """An empty pool of pages for ``y, cache = layer.apply(variables, x, cache=cache)``; tables come from the host.

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
            in_features: D, needed where neither `qkv_features` nor `head_dim` is set.

        Raises:
            As `kvattn.PagedKVCache.create`.
        """
        if in_features is not None:
            _checks.integer("in_features", in_features, 1)
        return caching.create_paged(
            self._settings(in_features),
            num_pages,
            page_size,
            batch_size=batch_size,
            max_length=max_length,
            policy=policy,
            codec=codec,
            dtype=dtype,
            platform=platform,
        )

    def keys_and_values(self, inputs_k: AnyArray, inputs_v: AnyArray | None = None) -> tuple[Array, Array]:
        """Keys [..., S, K, H] and values before rotation: ``layer.apply(variables, x, method="keys_and_values")``.

        Arguments and errors are those of `kvattn.layers.MultiHeadAttention`'s.
        """
        caching.check_owner(self._settings())
        return self(inputs_k, inputs_k, inputs_v, cache=_Project())

    def make_cross_cache(
        self, encoder_out: AnyArray, lengths: ArrayLike | None = None, *, platform: str | None = None
    ) -> KVCache:
        """Projects an encoder's output once: ``layer.apply(variables, encoder_out, method="make_cross_cache")``.

        Args:
            encoder_out: [B, S, D'].
            lengths: int32 [B], how many of the S tokens are real; all if None.
            platform: what the cache is made for, as in `kvattn.KVCache.create`.

        Returns:
            A cache for ``layer.apply(variables, x, cache=cache)``.

        Raises:
            ConfigError: the layer has a window, rope or ALiBi, which need positions the two sides do not share.
            ShapeError: `encoder_out` is not [B, S, D'].
        """
        caching.check_owner(self._settings())
        caching.check_cross(self._settings())
        if getattr(encoder_out, "ndim", None) != 3:
            raise ShapeError(f"encoder_out must be [B, S, D], got shape {getattr(encoder_out, 'shape', None)}.")
        return self(encoder_out, cache=_Encode(lengths, platform))

    def _settings(self, in_features: int | None = None) -> AttentionSettings:
        """The fields, checked; with the size of a head that inputs of `in_features` give it."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.init}
        return AttentionSettings.checked(given, in_features)

    def _settings_of_encoder(self, encoder_out: AnyArray) -> AttentionSettings:
        """An encoder's features [..., S, D] say nothing about the size of a head: there the parameters do."""
        settings = self._settings()
        if settings.head_dim is None and self.has_variable("params", "key"):
            size = nn.meta.unbox(self.get_variable("params", "key"))["kernel"].shape[-1]
            return dataclasses.replace(settings, head_dim=size, value_head_dim=self.value_head_dim or size)
        return self._settings(encoder_out.shape[-1])

    def _is_cross(self, settings: AttentionSettings, inputs_q: AnyArray, inputs_k: AnyArray | None) -> bool:
        """Whether this decode call brings an encoder's tokens [..., S, D]; a call that creates the cache is none."""
        if not self.decode or not self.has_variable("cache", "cached_key"):
            return False
        return caching.is_cross(settings, inputs_q, inputs_k)

    def _attend(
        self,
        settings: AttentionSettings,
        query: Array,
        key: Array,
        value: Array,
        *,
        mask: ArrayLike | None,
        bias: Array | None = None,
        is_causal: bool = False,
        sinks: Array | None,
        dropout_rng: Array | None,
        sow_weights: bool,
    ) -> Array:
        """Attends to [..., S, K, H] with `attention_fn`, or with kvattn's own where that is Flax's default."""
        einsums = linen_parts.einsums(self)
        rules = {
            "bias": bias,
            "scale": settings.scale,
            "softcap": settings.softcap,
            "sinks": sinks,
            "alibi_slopes": settings.slopes,
        }
        if not linen_parts.is_own(self.attention_fn):
            scores, values = einsums or (None, None)
            flax = {
                "mask": mask,
                "dropout_rng": dropout_rng,
                "dropout_rate": settings.dropout_rate,
                "broadcast_dropout": settings.broadcast_dropout,
                "deterministic": dropout_rng is None,
                "dtype": settings.dtype,
                "precision": settings.precision,
                "force_fp32_for_softmax": self.force_fp32_for_softmax,
                "qk_attn_weights_einsum": scores,
                "attn_weights_value_einsum": values,
            }
            flax |= {"module": self} if sow_weights else {}
            return linen_parts.call_foreign(
                self.attention_fn, query, key, value,
                is_causal=is_causal, window=settings.window, chunk=settings.chunk, flax=flax, additions=rules,
            )  # fmt: skip
        query, key, value = promote_dtype(query, key, value, dtype=self.dtype)
        window = settings.window
        if settings.chunk is None:
            mask, spoiled = masking.as_bool(mask, query.ndim)
        else:
            mask, spoiled = masking.with_limits(mask, query, key, window, settings.chunk)
            window = None
        x, weights = full.attend(
            *map(self._forced, (query, *placement.beside(query, key, value))),
            mask=mask,
            is_causal=is_causal,
            window=window,
            dropout_rate=settings.dropout_rate,
            dropout_rng=dropout_rng,
            broadcast_dropout=settings.broadcast_dropout,
            precision=settings.precision,
            einsums=einsums,
            return_weights=sow_weights,
            implementation=settings.implementation,
            **rules,
        )
        if weights is not None:
            weights = weights if self.force_fp32_for_softmax else weights.astype(query.dtype)
            self.sow("intermediates", "attention_weights", weights)
        return masking.spoil(x, spoiled)

    def _forced(self, x: Array) -> Array:
        """`x` [...], as wide as Flax's weights are with `force_fp32_for_softmax`."""
        narrow = self.force_fp32_for_softmax and x.dtype in (jnp.bfloat16, jnp.float16)
        return x.astype(jnp.float32) if narrow else x


class MultiHeadAttention(MultiHeadDotProductAttention):
    """`MultiHeadDotProductAttention` under a shorter name (which Linen also uses for its parameters)."""


class SelfAttention(MultiHeadDotProductAttention):
    """`MultiHeadDotProductAttention` of one input. Deprecated in Flax, and here."""

    @nn.compact
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        inputs_q: Array,
        mask: Array | None = None,
        deterministic: bool | None = None,
        dropout_rng: Array | None = None,
        sow_weights: bool = False,
        **additions: Any,
    ) -> Any:
        """As `MultiHeadDotProductAttention` with `inputs_q` [..., T, D] only."""
        warnings.warn(
            "SelfAttention will be deprecated soon. Use `MultiHeadDotProductAttention.__call__(inputs_q)` instead.",
            DeprecationWarning,
            stacklevel=2,
        )
        return super().__call__(
            inputs_q,
            mask=mask,
            deterministic=deterministic,
            dropout_rng=dropout_rng,
            sow_weights=sow_weights,
            **additions,
        )


class GroupedQueryAttention(MultiHeadDotProductAttention):
    """`MultiHeadDotProductAttention` with fewer key/value heads than query heads: `num_kv_heads` is required."""

    def __post_init__(self):
        if self.num_kv_heads is None:
            raise ConfigError("GroupedQueryAttention needs num_kv_heads, the number of key/value heads.")
        super().__post_init__()


class MultiQueryAttention(MultiHeadDotProductAttention, kw_only=True):
    """`MultiHeadDotProductAttention` with one key/value head, shared by all query heads."""

    num_kv_heads: int | None = 1

    def __post_init__(self):
        if _checks.integer("num_kv_heads", self.num_kv_heads, 1) != 1:
            raise ConfigError(f"MultiQueryAttention has one key/value head, got num_kv_heads={self.num_kv_heads}.")
        super().__post_init__()


class SlidingWindowAttention(MultiHeadDotProductAttention):
    """`MultiHeadDotProductAttention` whose queries see the last `window` tokens: `window` is required.

    Its caches keep those tokens only (`kvattn.SlidingWindow`) unless another policy is given.
    """

    def __post_init__(self):
        if self.window is None:
            raise ConfigError("SlidingWindowAttention needs a window: how many tokens a query sees, its own included.")
        super().__post_init__()
