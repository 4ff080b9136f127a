"""Flax's decode protocol: a cache of L slots in the module, one index for all rows.

The names, shapes and growth of the three variables are Flax's (`cached_key`, `cached_value` [..., L, K, H]
and `cache_index`, an int32 scalar), so state and checkpoints move both ways. What differs is what
happens at the edges: T >= 1 tokens come at once, causal among themselves, and tokens that do not fit
are refused whole. `cache_index` counts the tokens offered; beyond L it says that some were refused,
and stays so.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax

from kvattn import _checks
from kvattn._typing import Array
from kvattn.errors import CapacityError, ShapeError
from kvattn.layers import full, masking, placement


@dataclasses.dataclass(frozen=True)
class Step:
    """A cache with T more tokens, and what to attend with.

    Attributes:
        cached_key: [..., L, K, H], to be stored.
        cached_value: [..., L, K, Hv], to be stored.
        index: int32 (), tokens offered so far, these included; to be stored.
        query: [..., T, N, H], at its positions.
        key: as `cached_key`, in the dtype of the query, zero where no token lies.
        value: as `cached_value`, likewise.
        mask: bool, broadcastable to [..., N, T, L].
        bias: ALiBi's, broadcastable to [..., N, T, L], or None.
        fits: bool (): the tokens were taken. If not, the output of this step means nothing.
        spoiled: rows of the batch whose mask is none (`kvattn.layers.masking`), or None.
    """

    cached_key: Array
    cached_value: Array
    index: Array
    query: Array
    key: Array
    value: Array
    mask: Array
    bias: Array | None
    fits: Array
    spoiled: Array | None


def extend(
    cached_key: Array,
    cached_value: Array,
    index: Array,
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: Array | None = None,
    rope: Any = None,
    input_positions: Array | None = None,
    window: int | None = None,
    alibi_slopes: Array | None = None,
) -> Step:
    """Writes T tokens behind the first `index` ones, rotated to their positions and cast to the cache's dtype.

    Args:
        cached_key: [..., L, K, H].
        cached_value: [..., L, K, Hv].
        index: int32 ().
        query: [..., T, N, H].
        key: [..., T, K, H].
        value: [..., T, K, Hv].
        mask: the caller's, broadcastable to [..., N, T, L].
        rope: rotates queries and keys.
        input_positions: int [..., T] or [T], what `rope` uses instead of index, index + 1, ...
        window: a token sees the last `window` ones only, its own included.
        alibi_slopes: float32[N].

    Raises:
        ShapeError: keys or a mask that do not fit the cache.
        DTypeError, RangeError: a mask that is none, as in `kvattn.layers.masking.as_bool`.
        CapacityError: tokens that do not fit, where that can be seen. Inside `jax.jit` they are dropped:
            the cache stays as it is, and `index` passes L.
    """
    *batch, length, num_kv_heads, head_dim = cached_key.shape
    num_tokens = key.shape[-3] if key.ndim >= 3 else 1
    expected = (*batch, num_tokens, num_kv_heads, head_dim)
    for name, x, wanted in (
        ("key", key, expected),
        ("value", value, (*expected[:-1], cached_value.shape[-1])),
        ("query", query, (*expected[:-2], query.shape[-2], head_dim)),
    ):
        if x.shape != wanted:
            raise ShapeError(
                f"Autoregressive cache shape error, expected {name} shape {wanted} instead got {x.shape}. The cache "
                f"was made for inputs of shape {(*batch, length)} + (features,)."
            )
    refuse_overflow(index, num_tokens, length)
    mask, spoiled = masking.as_bool(mask, query.ndim)
    fits = index <= length - num_tokens
    start = jnp.minimum(index, length - num_tokens)
    taken = positions(index, num_tokens)
    rotate_at = taken if input_positions is None else input_positions
    query, key = full.rotate(rope, query, rotate_at), full.rotate(rope, key, rotate_at)
    cached_key, cached_value = _write(cached_key, key, start, fits), _write(cached_value, value, start, fits)

    behind = jnp.arange(length, dtype=jnp.int32)[None, :] - taken[:, None]
    visible = (behind <= 0) if window is None else (behind <= 0) & (behind > -window)
    bias = None
    if alibi_slopes is not None:
        bias = alibi_slopes[:, None, None] * behind.astype(alibi_slopes.dtype)[None]
        bias = bias.reshape((1,) * (query.ndim - 3) + bias.shape)
    index = index + num_tokens
    return Step(
        cached_key,
        cached_value,
        index,
        query,
        readable(cached_key, index).astype(query.dtype),
        readable(cached_value, index).astype(query.dtype),
        combined(mask, visible, query.ndim),
        bias,
        fits,
        spoiled,
    )


def positions(index: Array, num_tokens: int) -> Array:
    """int32 [T]: the positions of the next T tokens."""
    return index.astype(jnp.int32) + jnp.arange(num_tokens, dtype=jnp.int32)


def refuse_overflow(index: Array, num_tokens: int, length: int) -> None:
    """Raises where it can be seen that `num_tokens` more do not fit into a cache of `length`.

    Raises:
        CapacityError: nothing was written.
    """
    held = int(index) if _checks.is_concrete(index) and index.ndim == 0 else 0
    if held + num_tokens > length:
        raise CapacityError(
            f"the cache has {length} slots and was offered {held} tokens: {num_tokens} more do not fit. Nothing was "
            "written. Call init_cache with a longer shape, or use layer(x, cache=layer.make_cache(...)) with a "
            "policy that lets tokens go."
        )


def readable(cached: Array, index: Array) -> Array:
    """`cached` with zeros in the slots that hold no token: what lies there must not reach a product."""
    filled = jnp.arange(cached.shape[-3], dtype=jnp.int32) < index
    return jnp.where(filled.reshape((1,) * (cached.ndim - 3) + (-1, 1, 1)), cached, 0)


def combined(mask: Array | None, visible: Array, rank: int) -> Array:
    """The caller's mask, bool, broadcastable to [..., N, T, L], and the cache's [T, L], as one of rank `rank`.

    Raises:
        ShapeError: a mask that does not broadcast to the cache's length.
    """
    visible = visible.reshape((1,) * (rank - 2) + visible.shape)
    if mask is None:
        return visible
    if mask.ndim > rank:
        raise ShapeError(f"a mask of rank {mask.ndim} does not fit scores of rank {rank}, mask shape {mask.shape}.")
    mask = mask.reshape((1,) * (rank - mask.ndim) + mask.shape)
    if any(own not in (1, size) for own, size in zip(mask.shape[-2:], visible.shape[-2:], strict=True)):
        raise ShapeError(
            f"in decode a mask covers the new tokens and the whole cache, [..., {visible.shape[-2]} or 1, "
            f"{visible.shape[-1]} or 1], got {mask.shape}."
        )
    return mask & visible


def _write(cached: Array, new: Array, start: Array, fits: Array) -> Array:
    """Puts `new` at `start` of the length axis where it fits, else leaves `cached` as it is."""
    axis = cached.ndim - 3
    old = lax.dynamic_slice_in_dim(cached, start, new.shape[-3], axis)
    new = placement.like(new.astype(cached.dtype), old)
    return lax.dynamic_update_slice_in_dim(cached, jnp.where(fits, new, old), start, axis)
