"""Sticky status bits: what a jitted step could only record, row by row."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Bool, Int32

from kvattn._typing import Array
from kvattn.errors import CapacityError, KVAttnError, RangeError, UnsupportedError

OVERFLOW = 1
"""An append did not fit; it was dropped whole."""
BAD_COUNT = 2
"""A count (`num_new`, tokens to trim) or a row number was out of range; the row was left as it was."""
LOST = 4
"""A trim, or another layer's queries, needed tokens that the policy had already let go; the row was left as it was."""
NONFINITE = 8
"""A token was stored that a codec cannot encode, NaN or infinity (it reads as NaN), or that is too large for the
cache's dtype (it reads as infinite); or one that is NaN came to a policy that goes by attention, for which such
attention counts as the least."""

BAD_PAGE = 16
"""A page table names a page that does not exist for a token of the row; nothing was done."""
BAD_SPAN = 32
"""Pages were to be read together that the row's table does not name, or that are not full; it read by itself."""

_ERRORS: dict[int, tuple[type[KVAttnError], str]] = {
    OVERFLOW: (CapacityError, "an append did not fit and was dropped: make the cache larger"),
    BAD_COUNT: (RangeError, "num_new, a number of tokens to trim, or a row number was out of range; nothing was done"),
    LOST: (
        UnsupportedError,
        "a trim, or a layer that reads another's cache, reached back to tokens that the policy or the codec no longer "
        "keeps; nothing was done",
    ),
    NONFINITE: (
        RangeError,
        "queries, keys or values that are NaN or infinite were given to a codec, which cannot encode them, or to a "
        "policy, which cannot score by them, or keys or values too large for the dtype of the cache",
    ),
    BAD_PAGE: (RangeError, "the page table names a page that is not in the pool; nothing was done"),
    BAD_SPAN: (
        RangeError,
        "pages were to be read together that their tables do not name alike, or that are not full, so the rows read by "
        "themselves: make shared from the tables that are given with it",
    ),
}


def mark(status: Int32[Array, " B"], rows: Bool[Array, " B"], bit: int) -> Int32[Array, " B"]:
    """Sets `bit` where `rows` holds."""
    return jnp.where(rows, status | bit, status)


def _on_every_device(status: Int32[ArrayLike, " B"]) -> Int32[np.ndarray, " B"]:
    """The bits that any device has set: by heads, each knows of its own only."""
    if not isinstance(status, jax.Array):
        return np.asarray(status)
    bits = np.zeros(status.shape, np.int32)
    for shard in status.addressable_shards:
        bits[shard.index] |= np.asarray(shard.data)
    if status.is_fully_addressable:
        return bits
    from jax.experimental import multihost_utils

    return np.bitwise_or.reduce(np.asarray(multihost_utils.process_allgather(bits)), axis=0)


def raise_for(status: Int32[ArrayLike, " B"]) -> None:
    """Raises the typed error of the lowest bit that is set in any row."""
    status = _on_every_device(status)
    for bit, (error, text) in _ERRORS.items():
        rows = np.nonzero(status & bit)[0]
        if rows.size:
            raise error(f"rows {rows.tolist()}: {text}.")
