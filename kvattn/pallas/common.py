"""What the decode kernels have in common around themselves: what none of them takes, and how a call is folded.

The new tokens of a row and the query heads of a group are the M = G T rows, or columns, of one matrix.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Float32, Int32, Shaped

from kvattn._typing import Array, Encoded
from kvattn.attend.request import Request
from kvattn.cache.view import View
from kvattn.codecs import Format
from kvattn.masks import EMPTY

MOST_TOKENS = 8


def refusal(request: Request) -> str | None:
    """Why no decode kernel takes the request, on whatever device; None: one may."""
    view = request.view
    if request.query.shape[1] > MOST_TOKENS and not request.of_several:
        return f"it takes up to {MOST_TOKENS} new tokens, here are {request.query.shape[1]}"
    if request.key_rope is not None:
        return "it does not rotate keys while it reads them"
    if request.relative_bias is not None:
        return "it has no relative bias"
    if request.mask.chunk is not None:
        return "it does not cut positions into chunks"
    if view.codec.format is None:
        return f"it does not read {view.codec}"
    if jnp.dtype(jnp.float64) in (request.query.dtype, *(x.dtype for x in arrays(view))):
        return "it has no float64"
    if view.page_table is not None and view.page_table.ndim == 3:
        return "it follows one page table for all heads, here each key/value head has its own"
    if view.page_table is None and (view.layout.num_blocks != 1 or view.layout.transposed_keys):
        return "the cache lies in blocks, as CPUs like it; make it with Layout(capacity, capacity, False)"
    return None


def arrays(view: View) -> list[Shaped[Array, "..."]]:
    """Those of the cache, keys first."""
    return [*view.keys.values(), *view.values.values()]


def tokens_beside(view: View, store: Encoded) -> int:
    """How many tokens of a page lie side by side in the rows of keys or values (`kvattn.cache.pages`)."""
    return view.page_size // store["data"].shape[-2] if view.page_table is not None else 1


def format_of(view: View) -> Format:
    """How to read the arrays of a view that `refusal` has nothing against."""
    found = view.codec.format
    assert found is not None
    return found


def storage(view: View) -> str:
    """How a cache lies, as tables of sizes name it."""
    codec: Any = view.keys["data"].dtype if format_of(view).is_plain else view.codec
    pages = f"pages of {view.page_size}" if view.page_table is not None else "contiguous"
    return f"{codec} {view.key_head_dim}/{view.value_head_dim} {pages}"


def slot_positions(request: Request, slots: int) -> Int32[Array, "B K1 {slots}"]:
    """The position in each slot, in order; EMPTY where no query of the row may look.

    So kernels need not tell slots that a window has left, or tokens to come, from empty ones: the values of all are
    zeroed.
    """
    positions = request.view.layout.from_blocks(request.view.positions[..., None], False)[..., 0]
    if request.mask.is_bounded or request.mask.causal:
        positions = jnp.where(request.reached(positions), positions, EMPTY)
    return jnp.pad(positions, ((0, 0), (0, 0), (0, slots - positions.shape[2])), constant_values=EMPTY)


def query_positions(request: Request) -> Int32[Array, "B M"]:
    """Those of the rows of the matrix."""
    batch, length, heads, _ = request.query.shape
    group = heads // request.view.num_kv_heads
    return jnp.broadcast_to(request.positions[:, None], (batch, group, length)).reshape(batch, group * length)


def query_slopes(request: Request) -> Float32[Array, "K M"] | None:
    """ALiBi's slopes of the rows of the matrix; None: the call has none."""
    if request.alibi_slopes is None:
        return None
    slopes = request.alibi_slopes.astype(jnp.float32).reshape(request.view.num_kv_heads, -1)
    return jnp.repeat(slopes, request.query.shape[1], axis=1)
