"""The one step: append the new tokens, attend, keep what the policy keeps."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from kvattn import _checks
from kvattn._typing import Array
from kvattn.attend import api
from kvattn.attend.request import Request
from kvattn.attend.state import add_sinks, merge_states
from kvattn.cache import KVCache, Layout, View
from kvattn.cache.view import token_view
from kvattn.codecs import Plain
from kvattn.errors import ConfigError, DTypeError, RangeError, ShapeError
from kvattn.masks import EMPTY, Mask
from kvattn.positions import RoPE

CHUNK_ROWS = 128
"""Rows per block when a chunk of new tokens attends to itself."""


def cached_attention(
    query: Array,
    key: Array | None,
    value: Array | None,
    cache: KVCache,
    *,
    num_new: Any = None,
    padding: str = "right",
    rope: RoPE | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
    alibi_slopes: Array | None = None,
    token_ids: Array | None = None,
    implementation: api.Implementation = None,
) -> tuple[Array, KVCache]:
    """Appends T new tokens to a cache and attends: T = 1 is decoding, T > 1 a prompt or a chunk of one.

    Every new token attends to the tokens the cache keeps and to those of the chunk up to itself, at their true
    positions: `cache.lengths` and following. Cutting a sequence into other chunks changes nothing. Donate the cache
    (``jax.jit(..., donate_argnames="cache")``) and it is updated in place.

    Args:
        query: float [B, T, N, H].
        key: float [B, T, K, H], N a multiple of K; query head n reads head n // (N // K). None, with `value`, for a
            static cache (`KVCache.from_encoder`): nothing is appended, every query attends to all its tokens.
        value: float [B, T, K, Hv].
        cache: what was kept so far.
        num_new: int32 [B], how many of the T tokens are real. None: all.
        padding: where the other tokens lie, "right" (after the real ones) or "left". Pads are not appended, take no
            position, and come out as zeros.
        rope: rotates query and key at the positions the policy wants.
        window: attend to the last `window` tokens only, the query's own included; with a policy's window, the smaller.
        scale: factor of the scores. None: 1/sqrt(H).
        softcap: scores become softcap * tanh(scores / softcap).
        sinks: float [N], a learned logit per head that joins the softmax sum only.
        alibi_slopes: float [N]: adds slope * (key position - query position) to the scores.
        token_ids: int32 [B, T], for policies that look at tokens.
        implementation: "reference", "xla", "mosaic_gpu", "mosaic_tpu", a sequence of these to try in order, or None for
            the best that works.

    Returns:
        out [B, T, N, Hv] in query's dtype, and the new cache. Products are taken in the wider of query and cache dtype
        and accumulated in float32.

    Raises:
        ShapeError, DTypeError, RangeError, ConfigError: arguments that do not fit.
        CapacityError: the tokens of a row do not fit. Nothing is written. Under jit the row's whole chunk is dropped,
            its output is zeros, and `cache.check()` raises.
        UnsupportedError: the named implementation cannot do this.
        StaleCacheError: the cache was donated to an earlier step.
    """
    _checks.not_donated("the cache", cache)
    query = _checks.floating("query", query)
    if query.ndim != 4:
        raise ShapeError(f"query must be [B, T, N, H], got shape {query.shape}.")
    batch, length, num_heads, head_dim = query.shape
    if batch != cache.batch_size:
        raise ShapeError(f"query has {batch} rows, the cache {cache.batch_size}.")
    _checks.head_counts(num_heads, cache.num_kv_heads)
    if head_dim != cache.key_head_dim:
        raise ShapeError(f"query has head dim {head_dim}, the keys of the cache {cache.key_head_dim}.")
    _checks.finite_scale(scale)
    _checks.positive_softcap(softcap)
    sinks = _per_head("sinks", sinks, num_heads)
    alibi_slopes = _per_head("alibi_slopes", alibi_slopes, num_heads)
    _checks.one_of("padding", padding, ("right", "left"))
    mask = cache.policy.mask().narrowed(_checks.window(window))
    del token_ids  # no policy of this version looks at tokens

    if scale is not None and not _checks.is_concrete(scale):
        query, scale = query * jnp.asarray(scale, query.dtype), 1.0
    settings = {
        "alibi_slopes": alibi_slopes,
        "scale": 1 / math.sqrt(head_dim) if scale is None else float(scale),
        "softcap": softcap,
    }
    given = length if num_new is None else num_new
    if num_new is not None and not _checks.is_concrete(num_new):
        given = _checks.counts("num_new", num_new, batch, 0, length)
        bad_count = (given < 0) | (given > length)
        given = jnp.where(bad_count, 0, given)
    else:
        given = _checks.counts("num_new", given, batch, 0, length)
        bad_count = jnp.zeros((batch,), bool)

    if cache.is_static:
        return _attend_static(query, key, value, cache, given, padding, rope, window, settings, sinks, implementation)
    key, value = _new_tokens(key, value, query, cache)

    if padding == "left":
        query, key, value = (_shift_left(x, length - given) for x in (query, key, value))

    fits = cache.policy.fits(cache.state, cache.lengths, given, cache.num_slots)
    cache.refuse_overflow(fits, given)
    new = jnp.where(fits, given, 0)
    t = jnp.arange(length, dtype=jnp.int32)[None]
    true_positions = cache.lengths[:, None] + t
    positions = jnp.where(t < new[:, None], true_positions, EMPTY)
    if rope is not None:
        query, key = rope(query, true_positions), rope(key, true_positions)

    step = _decode if length == 1 else _chunk
    out, lse, cache = step(query, key, value, cache, positions, new, mask, settings, implementation)
    if sinks is not None:
        out, _ = add_sinks(out, lse, sinks)
    out = out.astype(query.dtype)
    if padding == "left":
        out = _shift_left(out, given - length)
    return out, cache.advance(new, ~fits, bad_count)


def _decode(query, key, value, cache: KVCache, positions, new, mask: Mask, settings, implementation):
    """One new token: write it, attend to all that is kept, let the policy look."""
    policy, slots = cache.policy, cache.num_slots
    cache = cache.write(policy.place(cache.state, cache.lengths, new, 1, slots), key, value)
    grown = dataclasses.replace(cache, lengths=cache.lengths + new)
    request = Request(query, positions, grown.view(), mask=mask, want_mass=policy.needs_mass, **settings)
    out, lse, mass = api.attend(request, implementation)
    state = policy.observe(cache.state, cache.lengths, new, slots, mass)
    return out, lse, dataclasses.replace(cache, state=state)


def _chunk(query, key, value, cache: KVCache, positions, new, mask: Mask, settings, implementation):
    """Several new tokens: attend to what is kept and to the chunk, and only then let them take slots.

    Writing first would overwrite what the first tokens of the chunk still attend to.
    """
    policy, slots, length = cache.policy, cache.num_slots, query.shape[1]
    if length == 0:
        shape = (*query.shape[:3], cache.value_head_dim)
        return jnp.zeros(shape, query.dtype), jnp.full(shape[:3], -jnp.inf), cache
    own = token_view(Plain(key.dtype), key, value, positions, _chunk_layout(length))
    want_mass = policy.needs_mass
    old = Request(query, positions, cache.view(), mask=mask, want_mass=want_mass, **settings)
    fresh = Request(query, positions, own, mask=mask, want_mass=want_mass, **settings)
    out_a, lse_a, _ = api.attend(old, implementation)
    out_b, lse_b, _ = api.attend(fresh, implementation)
    out, lse = merge_states(out_a, lse_a, out_b, lse_b)
    state, where = policy.absorb(cache.state, cache.lengths, new, length, slots, None, None)
    return out, lse, dataclasses.replace(cache.write(where, key, value), state=state)


def _attend_static(query, key, value, cache, given, padding, rope, window, settings, sinks, implementation):
    """Cross-attention: every real query attends to every token of the encoder."""
    if key is not None or value is not None:
        raise ConfigError("a static cache holds the encoder's keys and values already: pass key=None and value=None.")
    if rope is not None or window is not None:
        raise ConfigError("a static cache has no order in common with the queries: no rope and no window.")
    length = query.shape[1]
    t = jnp.arange(length, dtype=jnp.int32)[None]
    real = t < given[:, None] if padding == "right" else t >= length - given[:, None]
    positions = jnp.where(real, t, EMPTY)
    if length == 0:
        return jnp.zeros((*query.shape[:3], cache.value_head_dim), query.dtype), cache
    request = Request(query, positions, cache.view(), mask=Mask(causal=False), **settings)
    out, lse, _ = api.attend(request, implementation)
    if sinks is not None:
        out, _ = add_sinks(out, lse, sinks)
    return out.astype(query.dtype), cache


def _new_tokens(key, value, query, cache: KVCache) -> tuple[Array, Array]:
    if key is None or value is None:
        raise ConfigError("key and value are needed; only a static cache (KVCache.from_encoder) goes without.")
    key, value = _checks.floating("key", key), _checks.floating("value", value)
    batch, length = query.shape[:2]
    heads = cache.num_kv_heads
    for name, x, features in (("key", key, cache.key_head_dim), ("value", value, cache.value_head_dim)):
        expected = (batch, length, heads, features)
        if x.shape != expected:
            raise ShapeError(f"{name} must be [B, T, K, H] = {expected} for this query and cache, got {x.shape}.")
    return key, value


def _per_head(name: str, x: Any, num_heads: int) -> Array | None:
    if x is None:
        return None
    if isinstance(x, bool):
        raise DTypeError(f"{name} must be an array [N], got the bool {x}.")
    x = _checks.floating(name, x)
    if x.shape != (num_heads,):
        raise ShapeError(f"{name} must have shape ({num_heads},), one value per query head, got {x.shape}.")
    if _checks.is_concrete(x) and bool(jnp.any(jnp.isnan(x))):
        raise RangeError(f"{name} must not hold NaN.")
    return x


def _shift_left(x: Array, by: Array) -> Array:
    """Rotates each row of [B, T, ...] to the left by int32 [B] places."""
    length = x.shape[1]
    if length == 0:
        return x
    index = (jnp.arange(length, dtype=jnp.int32)[None] + by[:, None]) % length
    return jnp.take_along_axis(x, index.reshape(index.shape + (1,) * (x.ndim - 2)), axis=1)


def _chunk_layout(length: int) -> Layout:
    best = Layout.best(length)
    return dataclasses.replace(best, rows=min(best.rows, CHUNK_ROWS))
