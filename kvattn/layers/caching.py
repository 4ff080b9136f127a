"""The cache as an argument and result of a layer: what the NNX and the Linen layers share. Nothing here knows Flax."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Float

from kvattn import _checks, _target, sharding
from kvattn._typing import AnyArray, Array
from kvattn.attend import page_sizes
from kvattn.cache import Cache, KVCache, PagedKVCache
from kvattn.cache.groups import most_slots
from kvattn.codecs import Codec
from kvattn.errors import ConfigError, DTypeError, ShapeError
from kvattn.layers import placement
from kvattn.layers.settings import AttentionSettings
from kvattn.policies import Chunked, Full, OrderedWindow, Policy, SlidingWindow
from kvattn.sharding import explicit


def create(
    settings: AttentionSettings,
    batch_size: int,
    *,
    capacity: int | None,
    policy: Policy | None,
    codec: Codec | None,
    dtype: DTypeLike | None,
    memory_kind: str | None = None,
    platform: str | None = None,
) -> KVCache:
    """An empty cache for a layer, whose settings fill in what is None."""
    check_owner(settings)
    batch_size = _checks.integer("batch_size", batch_size, 0)
    head_dim, value_head_dim = settings.head_dims
    policy = _policy(settings, policy, SlidingWindow, Chunked)

    def empty() -> KVCache:
        return KVCache.create(
            batch_size,
            settings.num_kv_heads,
            head_dim,
            capacity=capacity,
            policy=policy,
            codec=settings.codec if codec is None else codec,
            dtype=settings.storage_dtype if dtype is None else dtype,
            value_head_dim=value_head_dim,
            values_in_keys=settings.values_in_keys,
            memory_kind=memory_kind,
            platform=platform,
        )

    return _placed(settings, empty, batch_size)


def create_paged(
    settings: AttentionSettings,
    num_pages: int,
    page_size: int | None,
    *,
    batch_size: int,
    max_length: int,
    policy: Policy | None,
    codec: Codec | None,
    dtype: DTypeLike | None,
    platform: str | None = None,
) -> PagedKVCache:
    """An empty pool for a layer, with tables that name no page. What is None the settings fill in, or a rule."""
    check_owner(settings)
    batch_size = _checks.integer("batch_size", batch_size, 0)
    _checks.integer("max_length", max_length, 1)
    head_dim, value_head_dim = settings.head_dims
    policy = _policy(settings, policy, OrderedWindow, OrderedWindow) or Full()  # a chunk lies within such a window
    codec = settings.codec if codec is None else codec
    slots = most_slots(policy, max_length)

    def pool(page_size: int) -> PagedKVCache:
        return PagedKVCache.create(
            num_pages,
            page_size,
            settings.num_kv_heads,
            head_dim,
            batch_size=batch_size,
            max_pages=-(-slots // _checks.integer("page_size", page_size, 1)),
            policy=policy,
            codec=codec,
            dtype=settings.storage_dtype if dtype is None else dtype,
            value_head_dim=value_head_dim,
            values_in_keys=settings.values_in_keys,
            platform=platform,
        )

    if page_size is None:
        page_size = codec.rows if codec is not None else None
    if page_size is None:
        with _target.aimed_at(settings.mesh):
            page_size = page_sizes.smallest(pool, settings.num_heads, settings.storage_dtype, platform)
    return _placed(settings, lambda: pool(page_size), batch_size)


def _policy(
    settings: AttentionSettings,
    policy: Policy | None,
    window: Callable[[int], Policy],
    chunk: Callable[[int], Policy],
) -> Policy | None:
    """The policy asked for, or the layer's, or what keeps its window or chunk, whichever is smaller."""
    policy = settings.policy if policy is None else policy
    if policy is not None:
        return policy
    limits = ((size, kept) for size, kept in ((settings.window, window), (settings.chunk, chunk)) if size is not None)
    size, kept = min(limits, key=lambda limit: limit[0], default=(0, None))
    return None if kept is None else kept(size)


def _placed[C: Cache](settings: AttentionSettings, empty: Callable[[], C], batch_size: int) -> C:
    """What `empty` makes, on the layer's mesh if it has one."""
    if settings.mesh is None:
        return empty()
    on = {"mesh": settings.mesh, "by": _scheme(settings, settings.num_kv_heads, batch_size), "axis": settings.axis}

    def arranged() -> C:
        with _target.aimed_at(settings.mesh):
            return sharding.arrange(empty(), **on)

    # Compiled, so that no device ever holds more than its part.
    return jax.jit(arranged, out_shardings=sharding.cache_sharding(jax.eval_shape(arranged), **on))()


def cached_attention[C: Cache](
    settings: AttentionSettings,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"] | None,
    value: Float[Array, "B T K Hv"] | None,
    cache: C,
    *,
    sinks: Float[Array, " N"] | None,
    relative_bias: Float[Array, "buckets N"] | None = None,
    num_new: ArrayLike | Sequence[int] | None,
    padding: str,
    token_ids: ArrayLike | None,
    append: bool = True,
) -> tuple[Float[Array, "B T N _"], C]:
    """`kvattn.cached_attention` by the settings of a layer, on its mesh if it has one.

    Args:
        settings: of the layer.
        query: of the new tokens.
        key: None where the cache is static or has the tokens already, as `value`.
        value: None also where values are in the keys.
        cache: what came before.
        sinks: a logit per head that joins the softmax sum.
        relative_bias: a number per bucket of distances and head.
        num_new: int32 [B], how many of the T tokens of each row are real; None: all.
        padding: on which side the others lie, "right" or "left".
        token_ids: int32 [B, T], for policies that look at tokens.
        append: False: the tokens are not added to the cache.

    Returns:
        The attention of the new tokens, and the cache with them.
    """
    buckets, table = settings.relative_buckets, relative_bias
    rules = {
        "num_new": num_new,
        "padding": padding,
        "rope": settings.rope,
        "window": settings.window,
        "chunk": settings.chunk,
        "scale": settings.scale,
        "softcap": settings.softcap,
        "sinks": None if sinks is None else sinks.astype(jnp.float32),
        "alibi_slopes": settings.slopes,
        "relative_bias": None if buckets is None or table is None else buckets.by_distance(table.astype(jnp.float32)),
        "temperature": settings.temperature,
        "token_ids": token_ids,
        "append": append,
        "implementation": settings.implementation,
    }
    if settings.mesh is None:
        return explicit.cached_attention(query, key, value, cache, **rules)
    if key is not None and value is not None:
        # Else the compiler, which may choose on Auto axes, gathers the kernels instead of a token's keys and values.
        key, value = (placement.by_heads(x, settings.mesh, settings.axis) for x in (key, value))
    by = _scheme(settings, cache.num_kv_heads if key is None else key.shape[2], cache.batch_size)
    on = {"mesh": settings.mesh, "by": by, "axis": settings.axis}
    return sharding.cached_attention(query, key, value, cache, **on, **rules)


def _scheme(settings: AttentionSettings, num_kv_heads: int, batch_size: int) -> str:
    """How the caches of a layer with a mesh are split."""
    if settings.mesh is None or settings.by != "auto":
        return settings.by
    parts = placement.axis_size(settings.mesh, settings.axis)
    rows = batch_size // dict(settings.mesh.shape).get("data", 1) if settings.axis != "data" else batch_size
    return sharding.choose(settings.num_heads, num_kv_heads, rows, parts)


def check_call(settings: AttentionSettings, cache: Cache, inputs_q: AnyArray, **refused: object) -> None:
    """Checks a call with `cache=`: one batch axis, and nothing that the cache decides itself.

    Raises:
        ShapeError: inputs that are not [B, T, D].
        ConfigError: an argument that has no meaning beside a cache, or an encoder's cache where positions matter.
    """
    for name, value in refused.items():
        if value is not None and value is not False:
            raise ConfigError(f"{name} cannot be combined with cache=: {_REASONS[name]}.")
    if inputs_q.ndim != 3:
        raise ShapeError(f"with a cache inputs_q must be [B, T, D], one row per sequence, got {inputs_q.shape}.")
    if cache.is_static:
        check_cross(settings)


def projects(
    settings: AttentionSettings, *, cache: Cache | None, append: object, kv: object, inputs_k: object, decode: bool
) -> bool:
    """Whether a call makes keys and values of its inputs; else they are `kv`, or in the cache.

    Raises:
        ConfigError: arguments that exclude each other; a layer that has no keys and values and is given none.
        DTypeError: an `append` that is no bool, a `kv` that is no pair.
    """
    _checks.flag("append", append)
    if kv is not None:
        if not isinstance(kv, tuple | list) or len(kv) != 2:
            raise DTypeError(f"kv must be a pair of keys and values, got {type(kv).__name__}.")
        for name, excluded in (
            ("inputs_k", inputs_k is not None),
            ("a static cache", cache is not None and cache.is_static),
            ("decode=True", cache is None and decode),
        ):
            if excluded:
                raise ConfigError(f"kv are the keys and values of the tokens themselves: leave {name} out.")
        return False
    if cache is not None and cache.is_static:
        return False
    if cache is None and not append:
        raise ConfigError("append=False belongs to cache=: it says that nothing is added to it.")
    if not append and inputs_k is not None:
        raise ConfigError("append=False reads the last tokens of the cache: leave inputs_k out.")
    if append and settings.shares_kv:
        raise ConfigError(
            "shares_kv=True: this layer has no keys and values of its own. Pass the cache of the layer that has, after "
            "its step, and append=False; or kv, what keys_and_values of that layer returns."
        )
    return bool(append)


def check_owner(settings: AttentionSettings) -> None:
    """Checks that a layer has keys and values to keep.

    Raises:
        ConfigError: it has not.
    """
    if settings.shares_kv:
        raise ConfigError("shares_kv=True: this layer keeps no keys and values; make the cache of the layer that does.")


def check_cross(settings: AttentionSettings) -> None:
    """Checks that a layer can attend to an encoder's tokens, which share no order with the queries.

    Raises:
        ConfigError: it has a window, a chunk, rotary positions, ALiBi, a relative bias or a temperature.
    """
    for name, value in (
        ("window", settings.window),
        ("chunk", settings.chunk),
        ("rope", settings.rope),
        ("alibi", settings.alibi_slopes),
        ("relative_buckets", settings.relative_buckets),
        ("temperature", settings.temperature),
    ):
        if value is not None:
            raise ConfigError(
                f"cross-attention in decode cannot have {name}: it goes by positions, and the tokens of an encoder "
                "share none with the queries. Leave it out of this layer."
            )


def is_cross(settings: AttentionSettings, inputs_q: AnyArray, inputs_k: AnyArray | None) -> bool:
    """Whether a call of Flax's decode protocol brings an encoder's tokens instead of new ones of its own sequence.

    Inputs are [..., T, D]. Keys of another length than the queries can only be an encoder's. One token with one key is
    appended, as in Flax.

    Raises:
        ConfigError: several keys for as many queries, which may be either; or an encoder where positions matter.
    """
    if inputs_k is None or inputs_k is inputs_q or not (hasattr(inputs_k, "shape") and hasattr(inputs_q, "shape")):
        return False
    num_tokens = inputs_q.shape[-2]
    if inputs_k.shape[-2] != num_tokens:
        check_cross(settings)
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
