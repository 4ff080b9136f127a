"""Flax's decode protocol: a cache of L slots in the module, one index for all rows.

The names, shapes and growth of the three variables are Flax's (`cached_key`, `cached_value` [..., L, K, H]
and `cache_index`, an int32 scalar), so state and checkpoints move both ways. What differs is what
happens at the edges: T >= 1 tokens come at once, causal among themselves, and tokens that do not fit
are refused whole. `cache_index` counts the tokens offered; beyond L it says that some were refused,
and stays so.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Float, Int, Int32, Num

from kvattn import _checks
from kvattn._typing import Array
from kvattn.errors import CapacityError, DTypeError, ShapeError
from kvattn.layers import biases, masking, placement
from kvattn.layers.rotary import rotate, warm
from kvattn.layers.settings import AttentionSettings


class Cached(NamedTuple):
    """The three variables.

    Attributes:
        key: [..., L, K, H].
        value: [..., L, K, Hv].
        index: int32 (), tokens offered so far.
    """

    key: Array
    value: Array
    index: Array


class Step(NamedTuple):
    """A cache with T more tokens, and what to attend with.

    Attributes:
        cached: to be stored.
        query: [..., T, N, H], at its positions.
        key: the cached keys in the dtype of the query, zero where no token lies.
        value: the cached values, likewise.
        mask: bool, broadcastable to [..., N, T, L].
        bias: of ALiBi and of distances, broadcastable to [..., N, T, L], or None.
        fits: bool (): the tokens were taken. If not, the output of this step means nothing.
        spoiled: rows of the batch whose mask is none (`kvattn.layers.masking`), or None.
    """

    cached: Cached
    query: Array
    key: Array
    value: Array
    mask: Array
    bias: Array | None
    fits: Array
    spoiled: Array | None


def extend(
    settings: AttentionSettings,
    cached: Cached,
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: ArrayLike | None,
    input_positions: ArrayLike | None,
    relative_bias: Float[Array, "buckets N"] | None,
) -> Step:
    """Writes T tokens behind the first `index` ones, rotated to their positions and cast to the cache's dtype.

    Args:
        settings: of the layer, whose rope, window and ALiBi hold here too.
        cached: what came before.
        query: [..., T, N, H].
        key: [..., T, K, H].
        value: [..., T, K, Hv].
        mask: the caller's, broadcastable to [..., N, T, L].
        input_positions: int [..., T] or [T], what rope and temperature use instead of index, index + 1, ...
        relative_bias: a number per bucket of distances and head; None: there are no buckets.

    Raises:
        ShapeError: keys or a mask that do not fit the cache.
        DTypeError, RangeError: a mask that is none, as in `kvattn.layers.masking.as_bool`.
        CapacityError: tokens that do not fit, where that can be seen. Inside `jax.jit` they are dropped:
            the cache stays as it is, and `index` passes L.
    """
    cached_key, cached_value, index = cached
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
    query, key = rotate(settings.rope, query, rotate_at), rotate(settings.rope, key, rotate_at)
    query = warm(settings.temperature, query, rotate_at)
    cached_key, cached_value = _write(cached_key, key, start, fits), _write(cached_value, value, start, fits)

    slots = jnp.arange(length, dtype=jnp.int32)
    bias = biases.of_all(settings, relative_bias, taken[:, None] - slots[None, :], query.ndim)
    index = index + num_tokens
    return Step(
        cached=Cached(cached_key, cached_value, index),
        query=query,
        key=readable(cached_key, index).astype(query.dtype),
        value=readable(cached_value, index).astype(query.dtype),
        mask=masking.combined(mask, masking.visible(taken, slots, settings.window, settings.chunk), query.ndim),
        bias=bias,
        fits=fits,
        spoiled=spoiled,
    )


def checked_shape(input_shape: Sequence[int]) -> list[int]:
    """Checks the shape (..., L, D) that a cache is made for.

    Raises:
        ShapeError, DTypeError, ConfigError: it is no shape of two axes or more.
    """
    if not isinstance(input_shape, Sequence) or isinstance(input_shape, str):
        raise DTypeError(f"input_shape must be a shape (..., L, D), got {input_shape!r}: pass inputs.shape.")
    if len(input_shape) < 2:
        raise ShapeError(f"input_shape must be (..., L, D), got {input_shape}: L tokens are room for L tokens.")
    return [_checks.integer("input_shape", size, 0) for size in input_shape]


def positions(index: Int[Array, ""], num_tokens: int) -> Int[Array, " T"]:
    """The positions of the next T tokens."""
    return index.astype(jnp.int32) + jnp.arange(num_tokens, dtype=jnp.int32)


def refuse_overflow(index: Int32[Array, ""], num_tokens: int, length: int) -> None:
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


def readable(cached: Num[Array, "*B L K H"], index: Int32[Array, ""]) -> Num[Array, "*B L K H"]:
    """`cached` with zeros in the slots that hold no token: what lies there must not reach a product."""
    filled = jnp.arange(cached.shape[-3], dtype=jnp.int32) < index
    return jnp.where(filled.reshape((1,) * (cached.ndim - 3) + (-1, 1, 1)), cached, 0)


def _write(cached: Array, new: Array, start: Array, fits: Array) -> Array:
    """Puts `new` [..., T, K, H] at `start` of the length axis where it fits, else leaves `cached` as it is."""
    axis = cached.ndim - 3
    old = lax.dynamic_slice_in_dim(cached, start, new.shape[-3], axis)
    new = placement.like(new.astype(cached.dtype), old)
    return lax.dynamic_update_slice_in_dim(cached, jnp.where(fits, new, old), start, axis)
