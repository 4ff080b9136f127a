"""The formula of attention over full sequences in plain JAX: whole, or in blocks of queries."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Bool, Float, Int, Num, Shaped

from kvattn._typing import Array
from kvattn.attend.full.call import Call

LOWEST = -0.7 * float(jnp.finfo(jnp.float32).max)
"""What masked scores are in `jax.nn`: a row without any key becomes an even average. Real scores may be lower."""


Block = tuple[
    Int[Array, ""],
    Num[Array, "B size N H"],
    Float[Array, "#B #N #size #S"] | None,
    Bool[Array, "#B #N #size #S"] | None,
]
"""Where a block of queries begins, and what `Call` has of it: queries, bias and mask."""


# jit: without one, every call outside of one would trace and compile its blocks again.
@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def attend(
    call: Call, with_lse: bool, exact: bool, limits: tuple[int, int]
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"] | None]:
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
    if exact:
        call = call.cast(wide(dtype))
    if call.kv_lengths is not None and call.has_extras:
        # Padding may hold NaN, and 0 * NaN would bring it back, into outputs and gradients alike.
        live = jnp.arange(call.key.shape[1])[None, :, None, None] < call.kv_lengths[:, None, None, None]
        call = call.replace(**{n: jnp.where(live, getattr(call, n), 0) for n in ("key", "value")})
    rows = functools.partial(_rows, precision=lax.Precision.HIGHEST if exact else None)

    batch, num_queries, num_heads, _ = call.query.shape
    if call.num_scores <= max_scores or num_queries == 1:
        out, lse = rows(call, jnp.int32(0))
    else:
        span = _span(call, num_queries)
        size = max(min(block_scores // max(batch * num_heads * span, 1), num_queries), 8)
        span = _span(call, size)
        count = -(-num_queries // size)

        def blocks(array: Shaped[Array, "*whole"] | None, axis: int) -> Shaped[Array, "count *cut"] | None:
            """The query axis cut into blocks, these in front; what has none stays out."""
            if array is None or array.shape[axis] == 1:
                return None
            padding = [(0, 0)] * array.ndim
            padding[axis] = (0, count * size - num_queries)
            array = jnp.pad(array, padding)
            return jnp.moveaxis(array.reshape(*array.shape[:axis], count, size, *array.shape[axis + 1 :]), axis, 0)

        def block(xs: Block) -> tuple[Float[Array, "B size N H"], Float[Array, "B size N"]]:
            start, query, bias, mask = xs
            bias, mask = call.bias if bias is None else bias, call.mask if mask is None else mask
            return rows(call.replace(query=query, bias=bias, mask=mask), start, span=span)

        # checkpoint: the backward pass computes a block's scores again instead of keeping all of them.
        starts = jnp.arange(count, dtype=jnp.int32) * size
        xs = (starts, blocks(call.query, 1), blocks(call.bias, 2), blocks(call.mask, 2))
        out, lse = (
            jnp.moveaxis(a, 0, 1).reshape(batch, count * size, *a.shape[3:])[:, :num_queries]
            for a in lax.map(jax.checkpoint(block), xs)
        )
    return out.astype(dtype), lax.stop_gradient(lse).astype(dtype) if with_lse else None


def wide(dtype: np.dtype) -> np.dtype:
    """What scores of inputs of `dtype` are computed in: float32 at least."""
    is_wide = dtype == jnp.float64 or jnp.issubdtype(dtype, jnp.complexfloating)
    return jnp.dtype(dtype if is_wide else jnp.float32)


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
    call: Call, start: Int[Array, ""], *, precision: lax.Precision | None, span: int | None = None
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Output and logsumexp of the query rows in `call`, which begin at `start`; they see at most `span` keys."""
    num_queries, num_keys, first = call.query.shape[1], call.key.shape[1], jnp.int32(0)
    if span is not None and span < num_keys and call.window is not None:
        first = jnp.clip(start - min(call.window[0], num_keys), 0, num_keys - span)
        near = lambda x, axis: lax.dynamic_slice_in_dim(x, first, span, axis)
        call = call.replace(
            key=near(call.key, 1),
            value=near(call.value, 1),
            bias=call.bias if call.bias is None or call.bias.shape[3] == 1 else near(call.bias, 3),
            mask=call.mask if call.mask is None or call.mask.shape[3] == 1 else near(call.mask, 3),
        )
    t = start + jnp.arange(num_queries, dtype=jnp.int32)
    s = first + jnp.arange(call.key.shape[1], dtype=jnp.int32)
    weights, lse = softmax(call, products(call, precision), t, s)
    out = weighted_values(weights, call.value, precision)
    if call.query_lengths is not None:
        out = jnp.where(t[None, :, None, None] < call.query_lengths[:, None, None, None], out, 0)
    batch, _, num_heads, _ = call.query.shape
    return out, lse.reshape(batch, num_heads, num_queries).swapaxes(1, 2)


def products(call: Call, precision: jax.lax.PrecisionLike) -> Num[Array, "B K G T S"]:
    """Queries times keys, scaled."""
    batch, num_queries, num_heads, head_dim = call.query.shape
    num_kv_heads, dtype = call.key.shape[2], wide(call.query.dtype)
    query = call.query.reshape(batch, num_queries, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", query, call.key, precision=precision, preferred_element_type=dtype)
    return scores * jnp.asarray(call.scale, dtype)


def softmax(
    call: Call, scores: Num[Array, "B K G T S"], t: Int[Array, " T"], s: Int[Array, " S"]
) -> tuple[Num[Array, "B K G T S"], Num[Array, "B K G T"]]:
    """The weights of scaled products, and their logsumexp: soft cap, bias, ALiBi, mask and sinks are done here.

    Args:
        call: the rules; its bias and mask are those of these scores.
        scores: as `products` gives them.
        t: the index of each query in its sequence.
        s: the index of each key.
    """
    grouped = lambda x: by_group(x, scores.shape[1])
    if call.softcap is not None:
        scores = jnp.tanh(scores / call.softcap) * call.softcap
    if call.bias is not None:
        scores = scores + grouped(call.bias).astype(scores.dtype)
    if call.slopes is not None:
        ahead = (s[None, :] - t[:, None]).astype(scores.dtype)
        scores = scores + grouped(call.slopes.astype(scores.dtype)[None, :, None, None] * ahead[None, None])

    allowed = _allowed(call, t[:, None], s[None, :])
    if call.mask is not None:
        allowed = grouped(call.mask) if allowed is None else allowed & grouped(call.mask)
    if allowed is not None:
        scores = jnp.where(allowed, scores, jnp.asarray(-jnp.inf if call.has_extras else LOWEST, scores.dtype))

    sinks = None
    top = jnp.max(scores, axis=-1, keepdims=True, initial=-jnp.inf)  # of no keys at all too
    if call.sinks is not None:
        sinks = grouped(call.sinks.astype(scores.dtype)[None, :, None, None])
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
    return weights, jnp.where(nothing, -jnp.inf, top + jnp.log(total))[..., 0]


def weighted_values(
    weights: Num[Array, "B K G T S"], value: Num[Array, "B S K Hv"], precision: jax.lax.PrecisionLike
) -> Num[Array, "B T N Hv"]:
    """The output, float32 or wider."""
    out = jnp.einsum(
        "BKGTS,BSKH->BTKGH",
        weights.astype(value.dtype),
        value,
        precision=precision,
        preferred_element_type=wide(value.dtype),
    )
    batch, num_queries, num_kv_heads, group, size = out.shape
    return out.reshape(batch, num_queries, num_kv_heads * group, size)


def by_group(x: Shaped[Array, "B N T S"], num_kv_heads: int) -> Shaped[Array, "B _ _ T S"]:
    """[B, N, T, S] as [B, K, G, T, S]; axes of 1 stay."""
    heads = (1, 1) if x.shape[1] == 1 else (num_kv_heads, x.shape[1] // num_kv_heads)
    return x.reshape(x.shape[0], *heads, *x.shape[2:])


def _allowed(call: Call, t: Int[Array, "T 1"], s: Int[Array, "1 S"]) -> Bool[Array, "_ 1 1 #T #S"] | None:
    """Who may attend to whom by index and length; None: everyone."""
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
