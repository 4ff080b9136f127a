"""NNX attention layers: drop-in for `flax.nnx.MultiHeadAttention`, with groups, windows, rotary positions and caches.

One class does the work; `GroupedQueryAttention`, `MultiQueryAttention` and `SlidingWindowAttention`
only fix its arguments. Parameters, their order of creation and the decode protocol are Flax's, so
checkpoints move both ways and equal seeds give equal parameters.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.nnx.nn.linear import default_kernel_init
from jax.sharding import PartitionSpec

from kvattn import _checks
from kvattn._typing import Array
from kvattn.cache import Cache
from kvattn.errors import ConfigError, DTypeError, ShapeError
from kvattn.layers import caching, full, masking, placement, settings
from kvattn.layers import decode as decode_protocol
from kvattn.layers.attention_fn import check_additions, dot_product_attention, resolve, takes
from kvattn.layers.module_caches import ArgumentCache, ModuleCache
from kvattn.layers.originals import NNXAttention

EMPTY: Mapping[str, Any] = MappingProxyType({})
ZEROS = nnx.initializers.zeros_init()


class MultiHeadAttention(ArgumentCache, ModuleCache, NNXAttention):
    """Multi-head attention with N query heads and K key/value heads (K = N unless `num_kv_heads` is given).

    Takes every argument of `flax.nnx.MultiHeadAttention`, in its order, and holds the same parameters:
    ``query/kernel [D, N, H]``, ``key/kernel`` and ``value/kernel [D, K, H]``, ``out/kernel [N, H, D]``, their
    biases, and ``query_ln/scale``, ``key_ln/scale [H]`` with `normalize_qk`. Below are the additions.

    Args:
        num_heads: N.
        in_features: D of the queries.
        qkv_features: N * H; `in_features` if None.
        out_features: D of the output; `in_features` if None.
        num_kv_heads: K; must divide N.
        in_kv_features: D of the keys and values, for cross-attention.
        head_dim: H, where it is not qkv_features / N.
        value_head_dim: the size of a value head, where it is not H.
        window: a query sees the last `window` tokens, its own included. Implies causality.
        rope: a `kvattn.RoPE`, applied to queries and keys at their true positions.
        alibi: True for the usual ALiBi slopes, or N slopes.
        scale: multiplies the scores; 1/√H if None.
        softcap: caps the scores by ``softcap * tanh(score / softcap)``.
        sinks: a learned logit per head that joins the softmax sum: the parameter ``sinks [N]``, zero at first.
        qk_norm: "layer" (Flax's `normalize_qk`) or "rms", over each head of queries and keys.
        qk_norm_epsilon: the epsilon of that norm.
        qkv_clip: queries, keys and values are clipped to [-qkv_clip, qkv_clip] as they are projected.
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
        out_features: int | None = None,
        num_kv_heads: int | None = None,
        in_kv_features: int | None = None,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        broadcast_dropout: bool = True,
        dropout_rate: float = 0.0,
        deterministic: bool | None = None,
        precision: Any = None,
        kernel_init: Callable[..., Any] = default_kernel_init,
        out_kernel_init: Callable[..., Any] | None = None,
        bias_init: Callable[..., Any] = ZEROS,
        out_bias_init: Callable[..., Any] | None = None,
        use_bias: bool = True,
        attention_fn: Callable[..., Array] = dot_product_attention,
        decode: bool | None = None,
        normalize_qk: bool = False,
        qkv_promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        out_promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        ln_promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        qkv_dot_general: Any = None,
        out_dot_general: Any = None,
        qkv_dot_general_cls: Any = None,
        out_dot_general_cls: Any = None,
        rngs: nnx.Rngs,
        keep_rngs: bool = True,
        kernel_metadata: Mapping[str, Any] = EMPTY,
        out_kernel_metadata: Mapping[str, Any] = EMPTY,
        bias_metadata: Mapping[str, Any] = EMPTY,
        out_bias_metadata: Mapping[str, Any] = EMPTY,
        query_ln_scale_metadata: Mapping[str, Any] = EMPTY,
        key_ln_scale_metadata: Mapping[str, Any] = EMPTY,
        head_dim: int | None = None,
        value_head_dim: int | None = None,
        window: int | None = None,
        rope: Any = None,
        alibi: bool | Sequence[float] = False,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: bool = False,
        qk_norm: str | None = None,
        qk_norm_epsilon: float = 1e-6,
        qkv_clip: float | None = None,
        use_out_bias: bool | None = None,
        kv_metadata: Mapping[str, Any] | None = None,
        kv_bias_metadata: Mapping[str, Any] | None = None,
        cache_sharding: Any = None,
        policy: Any = None,
        codec: Any = None,
        implementation: Any = None,
        mesh: Any = None,
        by: str = "auto",
        axis: str = "model",
    ):
        settings.check(locals())
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _checks.head_counts(num_heads, num_kv_heads)
        self.num_heads = num_heads
        self.in_features = in_features
        self.qkv_features = settings.qkv_features(num_heads, qkv_features, in_features, head_dim)
        self.out_features = in_features if out_features is None else out_features
        self.in_kv_features = in_features if in_kv_features is None else in_kv_features
        self.num_kv_heads = num_kv_heads
        self.head_dim = settings.head_dim(num_heads, self.qkv_features, head_dim)
        self.value_head_dim = self.head_dim if value_head_dim is None else value_head_dim
        settings.finite_rope(rope, self.head_dim)

        self.dtype = dtype
        self.param_dtype = param_dtype
        self.broadcast_dropout = broadcast_dropout
        self.dropout_rate = settings.dropout_rate(dropout_rate)
        self.deterministic = deterministic
        self.precision = precision
        self.use_bias = use_bias
        self.attention_fn = attention_fn
        self.decode = decode
        self.qk_norm = settings.qk_norm(qk_norm, normalize_qk)
        self.normalize_qk = self.qk_norm is not None
        self.qkv_promote_dtype = qkv_promote_dtype
        self.out_promote_dtype = out_promote_dtype
        self.ln_promote_dtype = ln_promote_dtype
        self.qkv_dot_general = qkv_dot_general
        self.out_dot_general = out_dot_general
        self.qkv_dot_general_cls = qkv_dot_general_cls
        self.out_dot_general_cls = out_dot_general_cls

        self.window = window
        self.rope = rope
        self.alibi_slopes = settings.alibi_slopes(alibi, num_heads)
        self.scale = scale
        self.softcap = softcap
        self.qkv_clip = qkv_clip
        self.cache_sharding = cache_sharding
        self.policy = policy
        self.codec = codec
        self.implementation = implementation
        self.mesh, self.by, self.axis = mesh, by, axis
        check_additions(
            attention_fn,
            self.head_dim,
            scale=scale,
            softcap=softcap,
            alibi_slopes=self.alibi_slopes,
            sinks=sinks or None,
        )

        def projection(in_features: int, heads: int, size: int, kernel_metadata: Any, bias_metadata: Any) -> Any:
            return nnx.LinearGeneral(
                in_features,
                (heads, size),
                use_bias=use_bias,
                dtype=dtype,
                param_dtype=param_dtype,
                kernel_init=kernel_init,
                bias_init=bias_init,
                precision=precision,
                promote_dtype=qkv_promote_dtype,
                dot_general=qkv_dot_general,
                dot_general_cls=qkv_dot_general_cls,
                rngs=rngs,
                kernel_metadata=kernel_metadata,
                bias_metadata=bias_metadata,
            )

        def head_norm(metadata: Mapping[str, Any]) -> Any:
            if self.qk_norm is None:
                return nnx.data(None)
            kind = nnx.RMSNorm if self.qk_norm == "rms" else _layer_norm_without_bias
            return kind(
                self.head_dim,
                epsilon=qk_norm_epsilon,
                dtype=dtype,
                param_dtype=param_dtype,
                promote_dtype=ln_promote_dtype,
                rngs=rngs,
                scale_metadata=metadata,
            )

        sinks_metadata: Mapping[str, Any] = EMPTY
        if mesh is not None:
            split = placement.head_metadata(mesh, axis, num_heads, num_kv_heads, self.head_dim)
            kv_metadata = kv_metadata or kernel_metadata or split.kv
            kv_bias_metadata = kv_bias_metadata or bias_metadata or split.kv_bias
            kernel_metadata, bias_metadata = kernel_metadata or split.query, bias_metadata or split.query_bias
            out_kernel_metadata = out_kernel_metadata or split.out
            out_bias_metadata = out_bias_metadata or {"out_sharding": PartitionSpec(), "mesh": mesh}
            sinks_metadata = split.sinks
        # The order of these draws is Flax's: equal seeds give equal parameters.
        for_kv = kernel_metadata if kv_metadata is None else kv_metadata
        for_kv_bias = bias_metadata if kv_bias_metadata is None else kv_bias_metadata
        self.query = projection(in_features, num_heads, self.head_dim, kernel_metadata, bias_metadata)
        self.key = projection(self.in_kv_features, num_kv_heads, self.head_dim, for_kv, for_kv_bias)
        self.value = projection(self.in_kv_features, num_kv_heads, self.value_head_dim, for_kv, for_kv_bias)
        self.query_ln = head_norm(query_ln_scale_metadata)
        self.key_ln = head_norm(key_ln_scale_metadata)
        self.out = nnx.LinearGeneral(
            (num_heads, self.value_head_dim),
            self.out_features,
            axis=(-2, -1),
            use_bias=use_bias if use_out_bias is None else use_out_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=out_kernel_init or kernel_init,
            bias_init=out_bias_init or bias_init,
            precision=precision,
            promote_dtype=out_promote_dtype,
            dot_general=out_dot_general,
            dot_general_cls=out_dot_general_cls,
            rngs=rngs,
            kernel_metadata=out_kernel_metadata or kernel_metadata,
            bias_metadata=out_bias_metadata or bias_metadata,
        )
        self.sinks = nnx.Param(jnp.zeros((num_heads,), param_dtype), **sinks_metadata) if sinks else nnx.data(None)
        self.rngs = rngs.dropout.fork() if keep_rngs and self.dropout_rate > 0 else None
        self.cached_key = nnx.data(None)
        self.cached_value = nnx.data(None)
        self.cache_index = nnx.data(None)
        if mesh is not None:
            placement.put(self, mesh)

    def __call__(
        self,
        inputs_q: Array,
        inputs_k: Array | None = None,
        inputs_v: Array | None = None,
        *,
        mask: Array | None = None,
        deterministic: bool | None = None,
        rngs: Any = None,
        sow_weights: bool = False,
        decode: bool | None = None,
        is_causal: bool = False,
        out_sharding: Any = None,
        qkv_sharding: Any = None,
        input_positions: Array | None = None,
        cache: Cache | None = None,
        num_new: Any = None,
        padding: str = "right",
        token_ids: Array | None = None,
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
            input_positions: int [..., T] or [T]: the positions `rope` uses, instead of the tokens' own.
            cache: a `kvattn.KVCache` (from `make_cache` or `make_cross_cache`) or a `kvattn.PagedKVCache`, which the
                new tokens are added to.
            num_new: int32 [B], how many of the T tokens of each row are real; with `cache` only.
            padding: on which side the others lie, "right" or "left".
            token_ids: int32 [B, T], for policies that look at tokens.

        Returns:
            [..., T, out_features]; with `cache` also the new cache.

        Raises:
            ShapeError: inputs that do not fit the layer, the cache or each other.
            ConfigError: arguments that contradict each other; decode before `init_cache`.
            CapacityError: tokens that do not fit into the cache. Inside `jax.jit` they are dropped, their rows are
                zeros, and `check_cache` or ``cache.check()`` raises.
        """
        if cache is not None:
            return self._call_with_cache(
                inputs_q,
                inputs_k,
                inputs_v,
                cache,
                num_new,
                padding,
                token_ids,
                qkv_sharding,
                out_sharding,
                mask=mask,
                input_positions=input_positions,
                decode=decode,
                sow_weights=sow_weights,
                dropout=self.dropout_rate > 0 and first_given(deterministic, self.deterministic) is False,
            )
        if num_new is not None or token_ids is not None:
            raise ConfigError("num_new and token_ids belong to cache=; without a cache use mask for padding.")
        decode = bool(first_given(decode, self.decode))
        cross = decode and caching.is_cross(self, inputs_q, inputs_k, self.alibi_slopes, self._rope())
        query_given, key_given, value_given = self._inputs(inputs_q, inputs_k, inputs_v)
        query = self._project(self.query, query_given, qkv_sharding, self.query_ln)
        key = self._project(self.key, key_given, qkv_sharding, self.key_ln)
        value = self._project(self.value, value_given, qkv_sharding)
        dropout_rng = self._dropout_rng(deterministic, rngs)
        fits, window, bias, spoiled = None, self.window, None, None
        if decode and not cross:
            step = self._append(query, key, value, mask, input_positions)
            query, key, value, mask, bias, fits = step.query, step.key, step.value, step.mask, step.bias, step.fits
            spoiled = step.spoiled
            window, is_causal, input_positions = None, False, None
        elif not cross:
            if self.mesh is not None:
                query, key, value = (placement.whole_heads(x) for x in (query, key, value))
            query, key = (full.rotate(self._rope(), x, input_positions) for x in (query, key))
        x = self._attend(
            query,
            key,
            value,
            mask=mask,
            dropout_rng=dropout_rng,
            sow_weights=sow_weights,
            is_causal=is_causal,
            window=window,
            bias=bias,
            input_positions=input_positions,
        )
        y = self._output(masking.spoil(x, spoiled), out_sharding)
        return y if fits is None else jnp.where(fits, y, 0)

    # Parts of a call.

    def _rope(self) -> Any:
        """The rotary embedding of this layer, its own or that of its `attention_fn`."""
        return self.rope or resolve(self.attention_fn, self.head_dim)[0]

    def _inputs(self, inputs_q: Any, inputs_k: Any, inputs_v: Any, keys: bool = True) -> tuple[Array, Array, Array]:
        """Fills in the inputs that were left out, and checks those that are used: without `keys` the queries only."""
        if inputs_k is None:
            if inputs_v is not None:
                raise ConfigError(
                    "`inputs_k` cannot be None if `inputs_v` is not None. To have both `inputs_k` and `inputs_v` be "
                    "the same value, pass in the value to `inputs_k` and leave `inputs_v` as None."
                )
            inputs_k = inputs_q
        if inputs_v is None:
            inputs_v = inputs_k
        for name, x in (("inputs_q", inputs_q), ("inputs_k", inputs_k), ("inputs_v", inputs_v)):
            if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.number):
                raise DTypeError(f"{name} must be an array of numbers, got {getattr(x, 'dtype', type(x).__name__)}.")
            if name != "inputs_q" and not keys:
                continue
            wanted = self.in_features if name == "inputs_q" else self.in_kv_features
            if x.ndim < 2 or x.shape[-1] != wanted:
                raise ShapeError(
                    f"Incompatible input dimension, got {x.shape[-1] if x.ndim else ()} but module expects {wanted}: "
                    f"{name} must be [..., length, {wanted}], its shape is {x.shape}."
                )
        return jnp.asarray(inputs_q), jnp.asarray(inputs_k), jnp.asarray(inputs_v)

    def _project(self, projection: Any, inputs: Array, sharding: Any, norm: Any = None) -> Array:
        """Projects to heads [..., T, heads, size], clipped if the layer says so, normalised where `norm` is given."""
        kernel = projection.kernel[...]
        inputs = placement.typed(inputs, kernel)
        if sharding is None:
            sharding = placement.product_spec(inputs, kernel, 1)
        x = settings.clipped(projection(inputs, out_sharding=sharding), self.qkv_clip)
        return x if norm is None else norm(x)

    def _output(self, x: Array, sharding: Any) -> Array:
        """Projects heads back to features."""
        if sharding is None:
            sharding = placement.product_spec(x, self.out.kernel[...], 2)
        return self.out(x, out_sharding=sharding)

    def _dropout_rng(self, deterministic: bool | None, rngs: Any) -> Array | None:
        """A key for dropout, or None where nothing is dropped."""
        if self.dropout_rate == 0.0:
            return None
        deterministic = first_given(deterministic, self.deterministic)
        if deterministic is None:
            raise ConfigError(
                "No `deterministic` argument was provided to MultiHeadAttention as either a __call__ argument, "
                "class attribute, or nnx.flag."
            )
        if deterministic:
            return None
        rngs = self.rngs if rngs is None else rngs.dropout if isinstance(rngs, nnx.Rngs) else rngs
        if rngs is None:
            raise ConfigError(
                "'rngs' must be provided to __call__ method if MultiHeadAttention instance is defined with "
                "keep_rngs=False."
            )
        return rngs()

    def _attend(
        self,
        query: Array,
        key: Array,
        value: Array,
        *,
        mask: Array | None,
        dropout_rng: Array | None,
        sow_weights: bool,
        is_causal: bool,
        window: int | None,
        bias: Array | None = None,
        input_positions: Array | None = None,
    ) -> Array:
        """Calls `attention_fn` with Flax's arguments, and those additions that are set."""
        _, attention_fn = resolve(self.attention_fn, self.head_dim)
        slopes = None if bias is not None else settings.slopes_array(self.alibi_slopes)
        additions = {
            "bias": bias,
            "window": window,
            "scale": self.scale,
            "softcap": self.softcap,
            "alibi_slopes": slopes,
            "sinks": None if self.sinks is None else self.sinks[...],
            "input_positions": None if attention_fn is dot_product_attention else input_positions,
        }
        spoiled = None
        if window is not None and not takes(attention_fn, "window"):
            additions["window"] = None
            near = full.window_mask(query.shape[-3], key.shape[-3], window)
            mask, spoiled = masking.as_bool(mask, query.ndim)
            mask = decode_protocol.combined(mask, near, query.ndim)
        x = attention_fn(
            query,
            key,
            value,
            mask=mask,
            dropout_rng=dropout_rng,
            dropout_rate=self.dropout_rate,
            broadcast_dropout=self.broadcast_dropout,
            deterministic=dropout_rng is None,
            dtype=self.dtype,
            precision=self.precision,
            module=self if sow_weights else None,
            is_causal=is_causal,
            **{name: value for name, value in additions.items() if value is not None},
        )
        return masking.spoil(x, spoiled)


def _layer_norm_without_bias(num_features: int, **options: Any) -> nnx.LayerNorm:
    return nnx.LayerNorm(num_features, use_bias=False, **options)


def first_given(*values: Any) -> Any:
    """The first value that is not None, or None."""
    return next((value for value in values if value is not None), None)
