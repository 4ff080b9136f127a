"""The arguments of `kvattn.cached_attention`, checked once and brought to the form that a step takes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int32

from kvattn import _checks
from kvattn._typing import Array
from kvattn.attend import api, step
from kvattn.attend.rules import Rules
from kvattn.attend.step import Step
from kvattn.attend.together import FEW_TOKENS
from kvattn.attend.tokens import NewTokens, PerHead, Told
from kvattn.cache import Cache
from kvattn.errors import ConfigError, DTypeError, RangeError, ShapeError, UnsupportedError
from kvattn.masks import Mask
from kvattn.policies import Context
from kvattn.positions import RoPE, Temperature


def prepared[C: Cache](
    query: object,
    key: object,
    value: object,
    cache: C,
    *,
    num_new: object,
    padding: str,
    rope: RoPE | None,
    window: int | None,
    chunk: int | None,
    scale: ArrayLike | None,
    softcap: float | None,
    sinks: object,
    alibi_slopes: object,
    relative_bias: object,
    temperature: Temperature | None,
    token_ids: object,
    append: object,
    implementation: api.Implementation,
    num_heads: int | None = None,
) -> tuple[Step, NewTokens, PerHead, C]:
    """Checks the arguments of `kvattn.cached_attention`, query [B, T, N, H] and so on, and raises what it raises.

    Args:
        query: this and all that follow as there.
        key: see there.
        value: see there.
        cache: see there.
        num_new: see there.
        padding: see there.
        rope: see there.
        window: see there.
        chunk: see there.
        scale: see there.
        softcap: see there.
        sinks: see there.
        alibi_slopes: see there.
        relative_bias: see there.
        temperature: see there.
        token_ids: see there.
        append: see there.
        implementation: see there.
        num_heads: N, where `query` has heads behind those that fill it up. None: all are real.

    Returns:
        the step, and what to call it with.
    """
    if rope is not None and not isinstance(rope, RoPE):
        raise DTypeError(f"rope must be a kvattn.RoPE or None, got {rope!r}.")
    if temperature is not None and not isinstance(temperature, Temperature):
        raise DTypeError(f"temperature must be a kvattn.Temperature or None, got {temperature!r}.")
    cache = usable(cache)
    query = _checks.query("query", query)
    if query.ndim != 4:
        raise ShapeError(f"query must be [B, T, N, H], got shape {query.shape}.")
    batch, length, _, head_dim = query.shape
    heads = query.shape[2] if num_heads is None else num_heads
    if batch != cache.batch_size:
        raise ShapeError(f"query has {batch} rows, the cache {cache.batch_size}.")
    _checks.head_counts(heads, cache.num_kv_heads)
    if head_dim != cache.key_head_dim:
        raise ShapeError(f"query has head dim {head_dim}, the keys of the cache {cache.key_head_dim}.")
    moves = cache.policy.cache_positions(cache.state) is not None
    query, rules = Rules.checked(
        query,
        mask=cache.policy.mask(),
        window=window,
        chunk=chunk,
        scale=scale,
        softcap=softcap,
        key_rope=rope if moves else None,
        temperature=temperature,
    )
    if rope is not None and cache.values_in_keys and rope.rotary_begin < cache.value_head_dim:
        raise ConfigError(
            f"rope turns the numbers of a key from {rope.rotary_begin} on, but in this cache the first "
            f"{cache.value_head_dim} are its value (values_in_keys=True): give kvattn.RoPE({head_dim}, "
            f"rotary_begin={cache.value_head_dim})."
        )
    per_head = PerHead(
        _checks.per_head("sinks", sinks, heads),
        _checks.per_head("alibi_slopes", alibi_slopes, heads, finite=True),
        _checks.by_distance("relative_bias", relative_bias, heads),
    )
    _checks.one_of("padding", padding, ("right", "left"))
    _check_true_positions(cache, window=window, chunk=chunk)
    if token_ids is not None:
        token_ids = _token_ids(token_ids, query)
    _checks.flag("append", append)
    told = Told(None if num_new is None else _counts(num_new, batch, length), cache.status)
    num_new, bad_count = _real_tokens(num_new, batch, length)
    refused = jnp.zeros_like(bad_count)
    if cache.is_static:
        if key is not None or value is not None:
            raise ConfigError("a static cache holds the encoder's keys and values: pass key=None and value=None.")
        if any(x is not None for x in (rope, window, chunk, relative_bias, temperature)):
            raise ConfigError(
                "a static cache has no order in common with the queries: no rope, window, chunk, relative_bias or "
                "temperature."
            )
        run = step.cross
    elif key is None and value is None:
        refused, more = _lost(cache, num_new, length, rules.mask)
        bad_count |= more
        num_new = jnp.where(refused | more, 0, num_new)
        run = step.read
    else:
        key, value = _keys_and_values(key, value, query, cache)
        comes_first = step.append if _may_come_first(cache, length) else step.chunk
        run = comes_first if append else step.beside
    if length == 0 or batch == 0:
        run = step.nothing
    new = NewTokens(query, key, value, num_new, refused, bad_count, token_ids, stays=bool(append))
    if not cache.is_static:
        writes = key is not None and new.stays
        cache, bad = cache.vouched(step.needing_pages(new, cache), rules.mask, writes=writes)
        new = dataclasses.replace(new, num_new=jnp.where(bad, 0, num_new))
    if key is not None:
        fits = _fits(cache, new.num_new, length)
        cache.refuse_overflow(fits, new.num_new)
        new = dataclasses.replace(new, num_new=jnp.where(fits, new.num_new, 0), refused=~fits)
    if run is step.append:
        new = dataclasses.replace(new, told=told)
    return Step(run, rules, rope, padding, implementation), new, per_head, cache


def _check_true_positions(cache: Cache, **limits: int | None) -> None:
    """Raises UnsupportedError where a window or chunk, which go by true positions, meets a policy that does not."""
    for name, limit in limits.items():
        if limit is not None and cache.policy.cache_positions(cache.state) is not None:
            raise UnsupportedError(
                f"{name}= goes by true positions, {cache.policy} by those in the cache: leave {name} out, or use "
                'positions_in="original".'
            )
    has_sinks = cache.policy.sink_positions(jnp.zeros((1, 1), jnp.int32)) is not None
    if limits["chunk"] is not None and has_sinks:
        raise UnsupportedError(
            f"chunk= goes by true positions, and the first tokens of {cache.policy} are seen from others: leave chunk "
            'out, or use positions_in="original".'
        )


def usable[C: Cache](cache: C) -> C:
    """A cache with its arrays on the device; raises what `Cache.usable` does, and DTypeError for what is no cache."""
    if not isinstance(cache, Cache):
        raise DTypeError(
            f"cache must be a KVCache or a PagedKVCache, got {type(cache).__name__}: KVCache.create makes an empty one."
        )
    return cache.usable()


def _fits(cache: Cache, num_new: Int32[Array, " B"], length: int) -> Bool[Array, " B"]:
    """Which rows can take their tokens; lengths are int32 and must not wrap."""
    room = cache.lengths <= _checks.INT32_MAX - num_new
    return room & cache.policy.fits(cache.state, _context(cache, num_new, length))


def _may_come_first(cache: Cache, length: int) -> bool:
    """Whether the new tokens may take their slots before they attend: one by one, or nothing is lost by that."""
    policy = cache.policy
    keeps_all = policy.in_order and policy.mask() == Mask() and not jax.tree.leaves(cache.state)
    few = length <= FEW_TOKENS and not policy.needs_mass
    return length == 1 or (few and keeps_all and cache.codec.rows is None)


def _context(cache: Cache, num_new: Int32[Array, " B"], length: int) -> Context:
    return Context(cache.lengths, num_new, length, cache.num_slots)


def _real_tokens(num_new: object, batch: int, length: int) -> tuple[Int32[Array, " B"], Bool[Array, " B"]]:
    """How many of the T tokens of each row are real, and which rows give an impossible number."""
    given = _counts(length if num_new is None else num_new, batch, length)
    bad = (given < 0) | (given > length)
    return jnp.where(bad, 0, given), bad


def _counts(num_new: object, batch: int, length: int) -> Int32[Array, " B"]:
    return _checks.counts("num_new", num_new, batch, 0, length)


def _keys_and_values(
    key: object, value: object, query: Float[Array, "B T N H"], cache: Cache
) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K Hv"] | None]:
    """Those of the new tokens."""
    if cache.values_in_keys and (key is None or value is not None):
        raise ConfigError(
            f"the values of this cache are the first {cache.value_head_dim} numbers of its keys (values_in_keys=True): "
            "pass the keys, and value=None."
        )
    if key is None or (value is None and not cache.values_in_keys):
        raise ConfigError(
            "key and value go together: both None are for a static cache (KVCache.from_encoder) and for the queries "
            "of tokens that another layer appended last; value alone for a cache with values_in_keys=True."
        )

    def checked(name: str, x: object, features: int) -> Float[Array, "B T K _"]:
        x, expected = _checks.floating(name, x), (*query.shape[:2], cache.num_kv_heads, features)
        if x.shape != expected:
            raise ShapeError(f"{name} must be [B, T, K, H] = {expected} for this query and cache, got {x.shape}.")
        return x

    key = checked("key", key, cache.key_head_dim)
    return key, None if value is None else checked("value", value, cache.value_head_dim)


def _lost(
    cache: Cache, num_new: Int32[Array, " B"], length: int, mask: Mask
) -> tuple[Bool[Array, " B"], Bool[Array, " B"]]:
    """Of queries of tokens that another layer appended last: rows that have lost what some of them attend to.

    And rows that never had so many tokens.
    """
    more = num_new > cache.lengths
    if _checks.is_concrete(more) and np.any(more):
        raise RangeError(
            f"without keys and values the queries are those of the last tokens of the cache, whose rows have "
            f"{_checks.on_host(cache.lengths).tolist()}; num_new says {_checks.on_host(num_new).tolist()}. The layer "
            "that owns the cache appends them first."
        )
    num_new = jnp.where(more, 0, num_new)
    came = Context(cache.lengths - num_new, num_new, length, cache.num_slots)
    lost = ~cache.policy.can_read(cache.state, came, mask) & (num_new > 0)
    if _checks.is_concrete(lost) and np.any(lost):
        raise UnsupportedError(
            f"{cache.policy} has let go of tokens that the first of {length} queries attend to: rows "
            f"{np.nonzero(_checks.on_host(lost))[0].tolist()}. Read after every single token; or keep more (Full, or a "
            "window that is longer than the layer's by the tokens of a chunk); or pass the keys and values of the "
            "chunk with the cache as it was before them, and append=False."
        )
    return lost, more


def _token_ids(token_ids: object, query: Float[Array, "B T N H"]) -> Int32[Array, "B T"]:
    ids = _checks.int32("token_ids", token_ids)
    if ids.shape != query.shape[:2]:
        raise ShapeError(f"token_ids must be [B, T] = {query.shape[:2]}, got {ids.shape}.")
    return jnp.asarray(ids)
