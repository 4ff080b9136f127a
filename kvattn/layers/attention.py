"""NNX attention layers: drop-in for `flax.nnx.MultiHeadAttention`, with groups, windows, rotary positions and caches.

One class does the work; `GroupedQueryAttention`, `MultiQueryAttention` and `SlidingWindowAttention`
only fix its arguments. Parameters, their order of creation and the decode protocol are Flax's, so
checkpoints move both ways and equal seeds give equal parameters.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.nnx.nn.linear import default_kernel_init
from flax.typing import PrecisionLike
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Float

from kvattn._typing import AnyArray, Array
from kvattn.cache import Cache, KVCache
from kvattn.codecs import Codec
from kvattn.errors import ConfigError, ShapeError
from kvattn.layers import attention_fn as attention
from kvattn.layers import biases, caching, gates, masking, norms, placement, projections
from kvattn.layers.attention_fn import Attention, dot_product_attention
from kvattn.layers.flax_cache import FlaxCache
from kvattn.layers.makes_caches import MakesCaches
from kvattn.layers.norms import HeadsNorm, rms
from kvattn.layers.originals import NNXAttention
from kvattn.layers.placement import Metadata
from kvattn.layers.projections import Sharding
from kvattn.layers.rotary import rotate, warm
from kvattn.layers.settings import AttentionSettings
from kvattn.policies import Policy
from kvattn.positions import RelativeBuckets, RoPE, Temperature

EMPTY: Metadata = MappingProxyType({})
ZEROS = nnx.initializers.zeros_init()
NormOfHeads = nnx.LayerNorm | nnx.RMSNorm | HeadsNorm | None

Initializer = Callable[..., Array]


class MultiHeadAttention(MakesCaches, FlaxCache, NNXAttention):
    """Multi-head attention with N query heads and K key/value heads (K = N unless `num_kv_heads` is given).

    Takes every argument of `flax.nnx.MultiHeadAttention`, in its order, and holds the same parameters:
    ``query/kernel [D, N, H]``, ``key/kernel`` and ``value/kernel [D, K, H]``, ``out/kernel [N, H, D]``, their
    biases, and ``query_ln/scale``, ``key_ln/scale [H]`` with `normalize_qk`. Below are the additions.

    Args:
        num_heads: N.
        in_features: D of the queries.
        qkv_features: N * H; `in_features` if None.
        out_features: D of the output, or the sizes of several output axes; `in_features` if None.
        num_kv_heads: K; must divide N.
        in_kv_features: D of the keys and values, for cross-attention.
        head_dim: H, where it is not qkv_features / N.
        value_head_dim: the size of a value head, where it is not H.
        window: a query sees the last `window` tokens, its own included. Implies causality.
        chunk: a query sees its own chunk of so many positions only: those from chunk * (t // chunk) to its own, t.
        rope: a `kvattn.RoPE`, applied to queries and keys at their true positions.
        relative_buckets: T5's relative positions, `kvattn.RelativeBuckets`: a learned number per head and bucket of
            distances joins the scores: the parameter ``relative_bias [num_buckets, N]``, zero at first.
        temperature: a `kvattn.Temperature`: queries are multiplied by a factor of their true positions.
        output_gate: what attention puts out is multiplied by the sigmoid of a projection of the layer's input, before
            the output projection: "elementwise", by the parameter ``gate/kernel [D, N, H]``, or "headwise", by
            ``gate/kernel [D, N]`` (https://arxiv.org/abs/2505.06708). It has a bias where the queries have one.
        alibi: True for the usual ALiBi slopes, or N slopes.
        scale: multiplies the scores; 1/√H if None.
        softcap: caps the scores by ``softcap * tanh(score / softcap)``.
        sinks: a learned logit per head that joins the softmax sum: the parameter ``sinks [N]``, zero at first.
        qk_norm: "layer" (Flax's `normalize_qk`) or "rms", over each head of queries and keys.
        qk_norm_heads: "shared": heads share one scale [H]; "own": each has its own, [heads, H]; "joint": the norm is
            taken over all heads of a token together, and its scale is [heads, H]; "unscaled": there is no scale.
        qk_norm_epsilon: the epsilon of that norm.
        qkv_clip: queries, keys and values are clipped to [-qkv_clip, qkv_clip] as they are projected.
        shares_kv: the layer has no keys and values of its own, so no projections (nor norm) for them: it attends to
            those of another layer, ``layer(x, cache=cache, append=False)``, and keeps none.
        values_from_keys: there is no projection to values: they are the keys, before their norm.
        value_norm: values are divided by the root of the mean of their squares, head by head.
        use_out_bias: whether the output projection has a bias; as `use_bias` if None.
        kv_metadata: metadata of the key and value kernels, where it differs from `kernel_metadata`.
        kv_bias_metadata: the same for their biases.
        cache_sharding: how Flax's cache [..., L, K, H] is split over a mesh; as the key kernel if None.
        policy: which tokens `make_cache` keeps by default.
        codec: in how many bits `make_cache` keeps them by default.
        implementation: who reads the cache, as in `kvattn.cached_attention`.
        mesh: devices to split the layer over. Parameters without metadata of their own are split by heads over `axis`
            (key/value heads that do not divide lie on every device); `make_cache` and calls with a cache go by
            `kvattn.sharding`.
        by: how caches are split: "heads", "batch", "sequence", "replicated", or "auto", as `kvattn.sharding.choose`
            says.
        axis: the mesh axis for all of this.

    Attributes:
        settings: all of the above that is no parameter, in one frozen object. Each is an attribute too
            (``layer.window``), which can be assigned.

    Raises:
        ConfigError: head counts that do not divide, contradicting sizes.
        ShardingError: a mesh without the axis.
        RangeError: a window, scale, soft cap, clip or dropout rate outside its range.
        DTypeError: a setting of the wrong type.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from kvattn.layers import MultiHeadAttention
        >>> layer = MultiHeadAttention(num_heads=8, in_features=64, num_kv_heads=2, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((1, 10, 64)), is_causal=True).shape
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
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        broadcast_dropout: bool = True,
        dropout_rate: float = 0.0,
        deterministic: bool | None = None,
        precision: PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        out_kernel_init: Initializer | None = None,
        bias_init: Initializer = ZEROS,
        out_bias_init: Initializer | None = None,
        use_bias: bool = True,
        attention_fn: Attention = dot_product_attention,
        decode: bool | None = None,
        normalize_qk: bool = False,
        qkv_promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        out_promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        ln_promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        qkv_dot_general: Callable[..., Array] | None = None,
        out_dot_general: Callable[..., Array] | None = None,
        qkv_dot_general_cls: Any = None,
        out_dot_general_cls: Any = None,
        rngs: nnx.Rngs,
        keep_rngs: bool = True,
        kernel_metadata: Metadata = EMPTY,
        out_kernel_metadata: Metadata = EMPTY,
        bias_metadata: Metadata = EMPTY,
        out_bias_metadata: Metadata = EMPTY,
        query_ln_scale_metadata: Metadata = EMPTY,
        key_ln_scale_metadata: Metadata = EMPTY,
        head_dim: int | None = None,
        value_head_dim: int | None = None,
        window: int | None = None,
        chunk: int | None = None,
        rope: RoPE | None = None,
        relative_buckets: RelativeBuckets | None = None,
        temperature: Temperature | None = None,
        output_gate: str | None = None,
        alibi: bool | Sequence[float] = False,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: bool = False,
        qk_norm: str | None = None,
        qk_norm_heads: str = "shared",
        qk_norm_epsilon: float = 1e-6,
        qkv_clip: float | None = None,
        shares_kv: bool = False,
        values_from_keys: bool = False,
        value_norm: bool = False,
        use_out_bias: bool | None = None,
        kv_metadata: Metadata | None = None,
        kv_bias_metadata: Metadata | None = None,
        cache_sharding: NamedSharding | PartitionSpec | Sequence[Any] | None = None,
        policy: Policy | None = None,
        codec: Codec | None = None,
        implementation: str | Sequence[str] | None = None,
        mesh: Mesh | AbstractMesh | None = None,
        by: str = "auto",
        axis: str = "model",
    ):
        self.settings = settings = AttentionSettings.checked(locals(), in_features)
        num_heads, num_kv_heads = settings.num_heads, settings.num_kv_heads
        head_dim, value_head_dim = settings.head_dims
        self.in_features = in_features
        self.in_kv_features = in_features if in_kv_features is None else in_kv_features
        self.out_features = in_features if out_features is None else out_features
        self.deterministic, self.decode, self.attention_fn = deterministic, decode, attention_fn
        self.normalize_qk = settings.qk_norm is not None
        self.qkv_promote_dtype, self.out_promote_dtype = qkv_promote_dtype, out_promote_dtype
        self.ln_promote_dtype = ln_promote_dtype
        self.qkv_dot_general, self.out_dot_general = qkv_dot_general, out_dot_general
        self.qkv_dot_general_cls, self.out_dot_general_cls = qkv_dot_general_cls, out_dot_general_cls
        attention.check_additions(settings, attention_fn, sinks)

        metadata = projections.metadata(
            settings,
            kernel=kernel_metadata,
            bias=bias_metadata,
            kv=kv_metadata,
            kv_bias=kv_bias_metadata,
            out=out_kernel_metadata,
            out_bias=out_bias_metadata,
        )
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        to_heads = functools.partial(
            nnx.LinearGeneral,
            use_bias=settings.use_bias,
            kernel_init=kernel_init,
            bias_init=bias_init,
            precision=precision,
            promote_dtype=qkv_promote_dtype,
            dot_general=qkv_dot_general,
            dot_general_cls=qkv_dot_general_cls,
            **common,
        )
        kv_to_heads = functools.partial(
            to_heads, self.in_kv_features, kernel_metadata=metadata.kv, bias_metadata=metadata.kv_bias
        )

        norm = functools.partial(norms.of_heads, settings, promote_dtype=ln_promote_dtype, rngs=rngs)

        # The order of these draws is Flax's: equal seeds give equal parameters.
        self.query = to_heads(
            in_features, (num_heads, head_dim), kernel_metadata=metadata.query, bias_metadata=metadata.query_bias
        )
        without = settings.shares_kv, settings.shares_kv or settings.values_from_keys
        self.key: Any = nnx.data(None) if without[0] else kv_to_heads((num_kv_heads, head_dim))
        self.value: Any = nnx.data(None) if without[1] else kv_to_heads((num_kv_heads, value_head_dim))
        self.query_ln: NormOfHeads = norm(num_heads, metadata=query_ln_scale_metadata)
        self.key_ln: NormOfHeads = nnx.data(None)
        if not without[0]:
            self.key_ln = norm(num_kv_heads, metadata=key_ln_scale_metadata)
        self.out = nnx.LinearGeneral(
            (num_heads, value_head_dim),
            self.out_features,
            axis=(-2, -1),
            use_bias=settings.use_out_bias,
            kernel_init=out_kernel_init or kernel_init,
            bias_init=out_bias_init or bias_init,
            precision=precision,
            promote_dtype=out_promote_dtype,
            dot_general=out_dot_general,
            dot_general_cls=out_dot_general_cls,
            kernel_metadata=metadata.out,
            bias_metadata=metadata.out_bias,
            **common,
        )
        self.sinks = nnx.Param(jnp.zeros((num_heads,), param_dtype), **metadata.sinks) if sinks else nnx.data(None)
        self.relative_bias: nnx.Param[Array] | None = nnx.data(None)
        if relative_buckets is not None:
            table = jnp.zeros((relative_buckets.num_buckets, num_heads), param_dtype)
            self.relative_bias = nnx.Param(table, **metadata.relative_bias)
        self.gate: nnx.LinearGeneral | None = nnx.data(None)
        if output_gate is not None:
            shape, kind = gates.gate_shape(output_gate, num_heads, value_head_dim), metadata.gates[output_gate]
            self.gate = to_heads(in_features, shape, kernel_metadata=kind.kernel, bias_metadata=kind.bias)
        self.rngs = rngs.dropout.fork() if keep_rngs and settings.dropout_rate > 0 else None
        self._without_cache()
        if mesh is not None:
            placement.put(self, mesh)

    def __call__(
        self,
        inputs_q: AnyArray,
        inputs_k: AnyArray | None = None,
        inputs_v: AnyArray | None = None,
        *,
        mask: ArrayLike | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        sow_weights: bool = False,
        decode: bool | None = None,
        is_causal: bool = False,
        out_sharding: Sharding = None,
        qkv_sharding: Sharding = None,
        input_positions: ArrayLike | None = None,
        cache: Cache | None = None,
        num_new: ArrayLike | Sequence[int] | None = None,
        padding: str = "right",
        token_ids: ArrayLike | None = None,
        append: bool = True,
        kv: tuple[Array, Array] | None = None,
    ) -> Any:
        """Attends `inputs_q` to `inputs_k` and `inputs_v`, or to what a cache holds and to themselves.

        Args:
            inputs_q: [..., T, D], any number of batch axes; [B, T, D] with `cache`.
            inputs_k: [..., S, D]; `inputs_q` if None (self-attention).
            inputs_v: [..., S, D]; `inputs_k` if None.
            mask: True or nonzero where attending is allowed, broadcastable to [..., N, T, S] (S the cache's length in
                decode). A negative entry is an error, and in `jax.jit` makes its row of the batch NaN: numbers to be
                added to the scores are no mask.
            deterministic: no dropout. The call's value wins over the constructor's.
            rngs: where dropout draws from, instead of the layer's own stream.
            sow_weights: keep the weights [..., N, T, S] as `nnx.Intermediate` "attention_weights"; the output stays
                the same.
            decode: append to Flax's cache (see `init_cache`); T may be more than 1. The call's value wins over the
                constructor's; None in both means False.
            is_causal: query t sees the keys 0 to t. With a cache and in decode this holds anyway.
            out_sharding: how the output is split over an Explicit mesh; worked out if None.
            qkv_sharding: the same for queries, keys and values.
            input_positions: int [..., T] or [T]: the positions of `rope` and `temperature`, instead of the tokens' own.
            cache: a `kvattn.KVCache` (from `make_cache` or `make_cross_cache`) or a `kvattn.PagedKVCache`, which the
                new tokens are added to.
            num_new: int32 [B], how many of the T tokens of each row are real; with `cache` only.
            padding: on which side the others lie, "right" or "left".
            token_ids: int32 [B, T], for policies that look at tokens.
            append: False: nothing is added to the cache. Without `kv` it is that of another layer after its step, and
                the queries are those of the tokens that came last, as in `kvattn.cached_attention`.
            kv: keys [..., T, K, H] and values of the tokens, as `keys_and_values` of this layer or another returns
                them, in place of this layer's own. With ``append=False`` the cache is that of the other layer *before*
                its step: so what its queries attend to is attended to, whatever a policy lets go.

        Returns:
            [..., T, out_features]; with `cache` also the new cache.

        Raises:
            ShapeError: inputs that do not fit the layer, the cache or each other.
            ConfigError: arguments that contradict each other; decode before `init_cache`.
            CapacityError: tokens that do not fit into the cache. Inside `jax.jit` they are dropped, their rows are
                zeros, and `check_cache` or ``cache.check()`` raises.
        """
        settings, attention_fn = attention.resolve(self.settings, self.attention_fn)
        deterministic = self.deterministic if deterministic is None else deterministic
        decode_now = bool(self.decode if decode is None else decode)
        own = caching.projects(settings, cache=cache, append=append, kv=kv, inputs_k=inputs_k, decode=decode_now)
        if cache is not None:
            kv_features = self.in_kv_features if own else None
            x_q, x_k, x_v = projections.checked_inputs(inputs_q, inputs_k, inputs_v, self.in_features, kv_features)
            caching.check_call(
                settings,
                cache,
                x_q,
                mask=mask,
                input_positions=input_positions,
                decode=decode,
                sow_weights=sow_weights,
                dropout=settings.dropout_rate > 0 and deterministic is False,
                attention_fn=attention_fn is not dot_product_attention,
                inputs_k=cache.is_static and inputs_k is not None,
            )
            query = self._queries(x_q, qkv_sharding)
            key, value = self._keys_and_values(x_k, x_v, qkv_sharding) if own else kv or (None, None)
            x, cache = caching.cached_attention(
                settings, query, key, value, cache,
                sinks=self._sinks, relative_bias=self._relative_bias,
                num_new=num_new, padding=padding, token_ids=token_ids, append=append,
            )  # fmt: skip
            return self._outputs(x, x_q, out_sharding), cache

        if num_new is not None or token_ids is not None:
            raise ConfigError("num_new and token_ids belong to cache=; without a cache use mask for padding.")
        cross = decode_now and caching.is_cross(settings, inputs_q, inputs_k)
        kv_features = self.in_kv_features if own else None
        x_q, x_k, x_v = projections.checked_inputs(inputs_q, inputs_k, inputs_v, self.in_features, kv_features)
        query = self._queries(x_q, qkv_sharding)
        key, value = self._keys_and_values(x_k, x_v, qkv_sharding) if kv is None else kv
        attend = functools.partial(
            attention.call,
            attention_fn,
            sinks=self._sinks,
            dropout_rng=attention.dropout_key(settings, deterministic, self.rngs if rngs is None else rngs),
            module=self if sow_weights else None,
        )
        if decode_now and not cross:
            step = self._append(settings, query, key, value, mask, input_positions)
            settings = dataclasses.replace(
                settings, window=None, chunk=None, alibi_slopes=None
            )  # they are in mask and bias
            x = attend(settings, step.query, step.key, step.value, mask=step.mask, bias=step.bias)
            y = self._outputs(masking.spoil(x, step.spoiled), x_q, out_sharding)
            return jnp.where(step.fits, y, 0)
        bias = None
        if not cross:
            if settings.mesh is not None:
                query, key, value = (placement.whole_heads(x) for x in (query, key, value))
            query, key = (rotate(settings.rope, x, input_positions) for x in (query, key))
            query = warm(settings.temperature, query, input_positions)
            bias = biases.of_full(settings, self._relative_bias, query, key)
        x = attend(
            settings, query, key, value, mask=mask, bias=bias, is_causal=is_causal, input_positions=input_positions
        )
        return self._outputs(x, x_q, out_sharding)

    def keys_and_values(self, inputs_k: AnyArray, inputs_v: AnyArray | None = None) -> tuple[Array, Array]:
        """The keys [..., S, K, H] and values of inputs [..., S, D], before rotation: `kv` of a call of any layer.

        Raises:
            ConfigError: the layer has none.
            ShapeError, DTypeError: inputs that do not fit.
        """
        caching.check_owner(self.settings)
        features = self.in_kv_features
        _, x_k, x_v = projections.checked_inputs(inputs_k, inputs_k, inputs_v, features, features)
        return self._keys_and_values(x_k, x_v, None)

    def make_cross_cache(
        self, encoder_out: AnyArray, lengths: ArrayLike | None = None, *, platform: str | None = None
    ) -> KVCache:
        """Projects an encoder's output once, for ``y, cache = layer(x, cache=cross_cache)``.

        Args:
            encoder_out: [B, S, in_kv_features].
            lengths: int32 [B], how many of the S tokens are real; all if None.
            platform: what the cache is made for, as in `kvattn.KVCache.create`.

        Raises:
            ConfigError: the layer has a window, rope or ALiBi, which need positions the two sides do not share.
            ShapeError: `encoder_out` is not [B, S, in_kv_features].
        """
        settings, _ = attention.resolve(self.settings, self.attention_fn)
        caching.check_owner(settings)
        caching.check_cross(settings)
        if getattr(encoder_out, "ndim", None) != 3 or encoder_out.shape[-1] != self.in_kv_features:
            shape = getattr(encoder_out, "shape", None)
            raise ShapeError(f"encoder_out must be [B, S, {self.in_kv_features}], got shape {shape}.")
        encoder_out = jnp.asarray(encoder_out)
        keys_and_values = self._keys_and_values(encoder_out, encoder_out, None)
        return KVCache.from_encoder(*keys_and_values, lengths, platform=platform)

    # Parts of a call.

    def _queries(self, inputs: Array, sharding: Sharding) -> Array:
        """[..., T, D] -> [..., T, N, H]."""
        return projections.to_heads(self.query, inputs, norm=self.query_ln, clip=self.qkv_clip, sharding=sharding)

    def _keys_and_values(self, inputs_k: Array, inputs_v: Array, sharding: Sharding) -> tuple[Array, Array]:
        """[..., S, D'] twice -> [..., S, K, H] and [..., S, K, Hv]."""
        key = value = projections.to_heads(self.key, inputs_k, clip=self.qkv_clip, sharding=sharding)
        if not self.values_from_keys:
            value = projections.to_heads(self.value, inputs_v, clip=self.qkv_clip, sharding=sharding)
        key = key if self.key_ln is None else self.key_ln(key)
        return key, rms(value, self.settings.qk_norm_epsilon) if self.value_norm else value

    def _outputs(self, x: Array, inputs: Array, sharding: Sharding) -> Array:
        """What each head mixed, [..., T, N, Hv], through the gate that `inputs` [..., T, D] set, to features."""
        if self.gate is not None:
            x = gates.gated(x, projections.projected(self.gate, inputs))
        return projections.from_heads(self.out, x, sharding)

    @property
    def _sinks(self) -> Float[Array, " N"] | None:
        return None if self.sinks is None else self.sinks[...]

    @property
    def _relative_bias(self) -> Float[Array, "buckets N"] | None:
        return None if self.relative_bias is None else self.relative_bias[...]
