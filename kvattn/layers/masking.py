"""What a layer makes of its `mask`: bools, or an error, or NaN, but never the opposite of what was meant.

Flax takes masks of any dtype and casts them to bool: nonzero is "attend", and its mask functions return 0.0 and 1.0.
A mask made to be added to scores (0 to see, -1e9 or -inf to hide) comes out of that cast inverted. A negative entry
tells the two apart. Where it can be seen it is an error; in `jax.jit` the whole row of the batch becomes NaN, and so
do its gradients. Masks of bools, and any that can be looked at, cost nothing there.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Bool, Int

from kvattn import _checks
from kvattn._typing import Array
from kvattn.errors import DTypeError, RangeError, ShapeError
from kvattn.layers import placement
from kvattn.masks import Mask


def as_bool(mask: Any, rank: int) -> tuple[Bool[Array, "..."] | None, Bool[Array, "..."] | None]:
    """A mask as bools, and what says which rows it spoils.

    Args:
        mask: broadcastable to [..., N, T, S]; bools, or numbers that are 0 or positive.
        rank: how many axes [..., N, T, S] are.

    Returns:
        bools of the mask's shape, None if it is None; and for `spoil` bool [..., 1, 1, 1], with as many axes as the
        mask or all of `rank`, True for rows of the batch with a negative entry or NaN. None where there cannot be any.

    Raises:
        DTypeError: neither bools nor real numbers.
        RangeError: a negative entry or NaN, where that can be seen.
        ShapeError: more than `rank` axes.
    """
    if mask is None:
        return None, None
    if not hasattr(mask, "dtype"):
        try:
            mask = np.asarray(mask)
        except Exception as error:
            raise DTypeError(f"mask must be an array of bools, got {type(mask).__name__}.") from error
    if mask.dtype == jnp.bool_:
        return jnp.asarray(mask), None
    if not (jnp.issubdtype(mask.dtype, jnp.integer) or jnp.issubdtype(mask.dtype, jnp.floating)):
        raise DTypeError(f"mask must hold bools, True where attending is allowed, got {mask.dtype}.")
    if mask.ndim > rank:
        raise ShapeError(f"a mask of rank {mask.ndim} does not fit scores of rank {rank}, mask shape {mask.shape}.")
    if not jnp.issubdtype(mask.dtype, jnp.unsignedinteger):
        if not _checks.is_concrete(mask):
            not_batch = tuple(range(-min(mask.ndim, 3), 0))
            return mask.astype(jnp.bool_), jnp.any(~(mask >= 0), axis=not_batch, keepdims=True)
        values = _checks.on_host(mask)
        bad = values[~(values >= 0)]
        if bad.size:
            raise RangeError(
                "mask says where attending is allowed: True or nonzero is yes, False or 0 is no. It holds "
                f"{bad.ravel()[0]}, as a mask to be added to the scores does, and would be taken for its opposite: "
                "pass mask=additive >= 0 (bools), or numbers to add as bias= of kvattn.layers.dot_product_attention."
            )
    return jnp.asarray(mask).astype(jnp.bool_), None


def spoil(out: Array, spoiled: Array | None) -> Array:
    """NaN in the rows of `out` [..., T, N, H] that `as_bool` says; the others bit by bit as they are."""
    if spoiled is None:
        return out
    if spoiled.size == 1:
        spoiled = spoiled.reshape((1,) * out.ndim)
    else:
        spoiled = spoiled.reshape((1,) * (out.ndim - spoiled.ndim) + spoiled.shape)
        spoiled = placement.like_batch(spoiled, out)
    # A product, so that gradients are NaN too; the NaN from a root, so that `jax_debug_nans` finds none but the used.
    factor = jnp.sqrt(jnp.where(spoiled, jnp.float32(-1), jnp.float32(1)))
    return out * factor.astype(out.dtype)


def visible(
    queries: Int[Array, " T"], keys: Int[Array, " S"], window: int | None, chunk: int | None
) -> Bool[Array, "T S"]:
    """Which keys the queries see by their positions: those up to their own, within a window and a chunk if given."""
    return Mask(window=window, chunk=chunk).allowed(queries[None], keys[None, None])[0, 0]


def with_limits(
    mask: ArrayLike | None, query: Array, key: Array, window: int | None, chunk: int | None
) -> tuple[Bool[Array, "..."], Array | None]:
    """`as_bool` of a mask, causality, a window and a chunk of queries [..., T, N, H] and keys [..., S, K, H] in one."""
    allowed, spoiled = as_bool(mask, query.ndim)
    t, s = (jnp.arange(x.shape[-3], dtype=jnp.int32) for x in (query, key))
    return combined(allowed, visible(t, s, window, chunk), query.ndim), spoiled


def combined(mask: Array | None, seen: Bool[Array, "T S"], rank: int) -> Bool[Array, "..."]:
    """The caller's mask, bool, broadcastable to [..., N, T, S], and `seen`, as one of rank `rank`.

    Raises:
        ShapeError: a mask that does not broadcast to the length of the keys.
    """
    seen = seen.reshape((1,) * (rank - 2) + seen.shape)
    if mask is None:
        return seen
    if mask.ndim > rank:
        raise ShapeError(f"a mask of rank {mask.ndim} does not fit scores of rank {rank}, mask shape {mask.shape}.")
    mask = mask.reshape((1,) * (rank - mask.ndim) + mask.shape)
    if any(own not in (1, size) for own, size in zip(mask.shape[-2:], seen.shape[-2:], strict=True)):
        raise ShapeError(
            f"in decode a mask covers the new tokens and the whole cache, [..., {seen.shape[-2]} or 1, "
            f"{seen.shape[-1]} or 1], got {mask.shape}."
        )
    return mask & seen
