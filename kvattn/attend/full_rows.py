"""Attention over full sequences in plain JAX: whole, or in blocks of queries."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kvattn.attend.full_call import Call


# jit: without one, every call outside of one would trace and compile its blocks again.
@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def attend(call: Call, with_lse: bool, exact: bool, limits: tuple[int, int]) -> tuple[jax.Array, jax.Array | None]:
    """Output, and with `with_lse` the logsumexp, in the query's dtype.

    Args:
        call: the arguments.
        with_lse: whether the logsumexp is wanted.
        exact: compute everything in float32 (float64 for float64) at the highest precision.
        limits: scores per head from which queries are taken in blocks; scores, over all rows and heads, that one
            block may hold.
    """
    max_scores, block_scores = limits
    dtype = call.query.dtype
    wide = jnp.dtype(jnp.float64) if dtype == jnp.float64 else jnp.dtype(jnp.float32)
    if exact:
        call = call.cast(wide)
    if call.kv_lengths is not None and call.has_extras:
        # Padding may hold NaN, and 0 * NaN would bring it back, into outputs and gradients alike.
        live = jnp.arange(call.key.shape[1])[None, :, None, None] < call.kv_lengths[:, None, None, None]
        call = call.replace(**{n: jnp.where(live, getattr(call, n), 0) for n in ("key", "value")})
    rows = functools.partial(_rows, call=call, wide=wide, precision=lax.Precision.HIGHEST if exact else None)

    batch, num_queries, num_heads, _ = call.query.shape
    if call.num_scores <= max_scores or num_queries == 1:
        out, lse = rows(jnp.int32(0), call.query, call.bias, call.mask)
    else:
        span = _span(call, num_queries)
        size = max(min(block_scores // max(batch * num_heads * span, 1), num_queries), 8)
        span = _span(call, size)
        count = -(-num_queries // size)

        def blocks(array: jax.Array | None, axis: int) -> jax.Array | None:
            """The query axis cut into blocks, in front: [count, ..., size, ...]; what has none stays out."""
            if array is None or array.shape[axis] == 1:
                return None
            padding = [(0, 0)] * array.ndim
            padding[axis] = (0, count * size - num_queries)
            array = jnp.pad(array, padding)
            return jnp.moveaxis(array.reshape(*array.shape[:axis], count, size, *array.shape[axis + 1 :]), axis, 0)

        def block(xs: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
            start, query, bias, mask = xs
            bias = call.bias if bias is None else bias
            return rows(start, query, bias, call.mask if mask is None else mask, span=span)

        # checkpoint: the backward pass computes a block's scores again instead of keeping all of them.
        starts = jnp.arange(count, dtype=jnp.int32) * size
        xs = (starts, blocks(call.query, 1), blocks(call.bias, 2), blocks(call.mask, 2))
        out, lse = (
            jnp.moveaxis(a, 0, 1).reshape(batch, count * size, *a.shape[3:])[:, :num_queries]
            for a in lax.map(jax.checkpoint(block), xs)
        )
    return out.astype(dtype), lax.stop_gradient(lse).astype(dtype) if with_lse else None


def _span(call: Call, num_queries: int) -> int:
    """How many neighbouring keys a block of queries can see at most.

    All of them where a row might see none: there `jax.nn` averages over every value.
    """
    num_keys = call.key.shape[1]
    never_empty = call.mask is None and call.bias is None and call.kv_lengths is None
    if call.window is None or not (call.has_extras or (never_empty and call.query.shape[1] <= num_keys)):
        return num_keys
    left, right = call.window
    return min(num_keys, num_queries + left + (0 if call.is_causal else right))


def _rows(
    start: jax.Array,
    query: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array | None,
    *,
    call: Call,
    wide: np.dtype,
    precision: Any,
    span: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, N, H] and logsumexp [B, T, N] of the query rows from `start` on."""
    batch, num_queries, num_heads, head_dim = query.shape
    num_keys, num_kv_heads = call.key.shape[1:3]
    key, value, first = call.key, call.value, jnp.int32(0)
    if span is not None and span < num_keys and call.window is not None:
        first = jnp.clip(start - min(call.window[0], num_keys), 0, num_keys - span)
        key, value = (lax.dynamic_slice_in_dim(a, first, span, axis=1) for a in (key, value))
        bias, mask = (
            a if a is None or a.shape[3] == 1 else lax.dynamic_slice_in_dim(a, first, span, axis=3)
            for a in (bias, mask)
        )
    t = (start + jnp.arange(num_queries, dtype=jnp.int32))[:, None]
    s = (first + jnp.arange(key.shape[1], dtype=jnp.int32))[None, :]

    def grouped(array: jax.Array) -> jax.Array:
        """[B, N, T, S] as [B, K, G, T, S], where axes of 1 stay."""
        heads = (1, 1) if array.shape[1] == 1 else (num_kv_heads, num_heads // num_kv_heads)
        return array.reshape(array.shape[0], *heads, *array.shape[2:])

    query = query.reshape(batch, num_queries, num_kv_heads, -1, head_dim)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", query, key, precision=precision, preferred_element_type=wide)
    scores = scores * jnp.asarray(call.scale, wide)
    if call.softcap is not None:
        scores = jnp.tanh(scores / call.softcap) * call.softcap
    if bias is not None:
        scores = scores + grouped(bias).astype(wide)
    if call.slopes is not None:
        scores = scores + grouped(call.slopes.astype(wide)[None, :, None, None] * (s - t)[None, None].astype(wide))

    allowed = _allowed(call, t, s)
    if mask is not None:
        allowed = grouped(mask) if allowed is None else allowed & grouped(mask)
    if allowed is not None:
        # Finite in jax.nn, where a row without any key becomes an even average; but real scores may be lower.
        masked = -jnp.inf if call.has_extras else -0.7 * float(jnp.finfo(jnp.float32).max)
        scores = jnp.where(allowed, scores, jnp.asarray(masked, wide))

    sinks = None
    top = jnp.max(scores, axis=-1, keepdims=True)
    if call.sinks is not None:
        sinks = grouped(call.sinks.astype(wide)[None, :, None, None])
        top = jnp.maximum(top, sinks)
    if call.has_extras:
        top = jnp.where(top == -jnp.inf, 0, top)
    top = lax.stop_gradient(top)
    weights = jnp.exp(scores - top)
    if call.has_extras and allowed is not None:
        weights = jnp.where(allowed, weights, 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sinks - top)
    nothing = (total == 0) & call.has_extras
    weights = weights / jnp.where(nothing, 1, total)
    lse = jnp.where(nothing, -jnp.inf, top + jnp.log(total))[..., 0]

    out = jnp.einsum(
        "BKGTS,BSKH->BTKGH", weights.astype(value.dtype), value, precision=precision, preferred_element_type=wide
    )
    if call.query_lengths is not None:
        out = jnp.where(t[None, :, :, None, None] < call.query_lengths[:, None, None, None, None], out, 0)
    out = out.reshape(batch, num_queries, num_heads, head_dim)
    return out, lse.reshape(batch, num_heads, num_queries).swapaxes(1, 2)


def _allowed(call: Call, t: jax.Array, s: jax.Array) -> jax.Array | None:
    """Who may attend to whom by index and length, bool[B or 1, 1, 1, T, S]; None: everyone."""
    parts = []
    if call.is_causal:
        parts.append((s <= t)[None])
    if call.window is not None:
        left, right = call.window
        parts.append(((t <= s + left) & (t >= s - right))[None])
    if call.query_lengths is not None:
        parts.append(t[None] < call.query_lengths[:, None, None])
    if call.kv_lengths is not None:
        parts.append(s[None] < call.kv_lengths[:, None, None])
    return functools.reduce(jnp.logical_and, parts)[:, None, None] if parts else None
