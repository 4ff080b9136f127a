"""Attention over full sequences, for training, prefill and encoders: `dot_product_attention`.

The exact mirror of `jax.nn.dot_product_attention`, and three extras: a soft cap on the scores, sinks,
ALiBi. No cache here. Notation: B batch, T query length, S key/value length, N query heads, K
key/value heads, G = N // K, H head dim; query head n reads key/value head n // G.

A plain call goes to `jax.nn`. What `jax.nn` cannot do (the extras, or scores too many to hold) is
computed here, in blocks of queries, so a prompt of 32k tokens needs no T x S array, nor do gradients.
"""

import dataclasses
import functools
import math
import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from kvattn.errors import ConfigError, DTypeError, RangeError, ShapeError, UnsupportedError

__all__ = ["IMPLEMENTATIONS", "dot_product_attention"]

IMPLEMENTATIONS = ("reference", "xla", "cudnn")

_DECODE_KERNELS = ("mosaic_gpu", "mosaic_tpu")
_MAX_SCORES = 2**22
"""Scores per head (T * S) from which queries are taken in blocks."""
_BLOCK_SCORES = 2**25
"""Scores, over all rows and heads, that one block may hold: 128 MiB in float32."""


class _MirrorDTypeError(DTypeError, ValueError):
    """A dtype that does not fit. `jax.nn` raises ValueError for it, kvattn DTypeError: this is both."""


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: Any = None,
    is_causal: bool = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: int | tuple[int, int] | None = None,
    softcap: float | None = None,
    sinks: Any = None,
    alibi_slopes: Any = None,
    implementation: str | Sequence[str] | None = None,
    return_residual: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    r"""Scaled dot product attention, as `jax.nn.dot_product_attention`, plus softcap, sinks and ALiBi.

    .. math:: \mathrm{softmax}\big(c \tanh(q k^T \mathrm{scale} / c) + \mathrm{bias}
              + m_n (s - t)\big) v

    with the sum of the softmax taken over the keys and the head's sink. Without the three extras it
    is `jax.nn`'s function in every respect, also where the rest of kvattn differs from it: causality
    and windows are aligned at the top left (query t against key s by index, also when T != S), a
    window counts neighbours, and a row that may attend to nothing gives the mean of all values. With
    any extra, such a row gives output 0 and logsumexp -inf (or its sink), as everywhere in kvattn, and
    keys past `key_value_seq_lengths` are never read.

    Args:
        query: float[B, T, N, H] or [T, N, H].
        key: float[B, S, K, H] or [S, K, H]; N must be a multiple of K.
        value: as `key`.
        bias: added to the scores; broadcasts to [B, N, T, S].
        mask: bool, True where a query may attend to a key; broadcasts to [B, N, T, S].
        scale: what the scores are multiplied by; 1/sqrt(H) unless given.
        is_causal: query t attends to keys s <= t.
        query_seq_lengths: int32[B]. Rows past it give 0.
        key_value_seq_lengths: int32[B]. Keys past it are not attended to.
        local_window_size: (left, right), or one int for both: query t attends to
            t - left <= s <= t + right.
        softcap: c above: bounds the scores to (-c, c), before bias and mask (Gemma 2).
        sinks: float[N], a logit per head that joins the softmax sum and has no value (gpt-oss).
        alibi_slopes: float[N], m above (`kvattn.alibi_slopes`); t and s are the indices.
        implementation: ``"reference"`` (float32, highest precision), ``"xla"``, ``"cudnn"`` (GPU, no
            extras), a sequence of these (the first that supports the call), or None, which is "xla".
        return_residual: also return the logsumexp of the scores (the sink's included), natural log,
            without gradient.

    Returns:
        An array like `query`; with `return_residual` also an array ``[B, T, N]`` or ``[T, N]`` of the
        same dtype. Softmax is float32 (float64 for float64 with ``"reference"`` or an extra).

    Raises:
        ShapeError: shapes that do not fit.
        DTypeError: dtypes that do not fit, or are not floating (also a ValueError, as in `jax.nn`).
        RangeError: scale not finite, softcap not finite or not positive, a negative window; and, where
            values can be looked at, a length outside [0, T] or [0, S] and a bias of +inf (in `jax.jit`
            it gives NaN).
        ConfigError: an unknown implementation, a traced value where a static one belongs.
        UnsupportedError: the implementation named cannot do this call here.

    Example:
        >>> q = k = v = jnp.ones((1, 5, 4, 8))
        >>> dot_product_attention(q, k, v, is_causal=True, softcap=30.0).shape
        (1, 5, 4, 8)
    """
    names = _names(implementation)
    query, key, value = (_floats(n, a) for n, a in (("query", query), ("key", key), ("value", value)))
    if query.ndim not in (3, 4) or not query.ndim == key.ndim == value.ndim:
        raise ShapeError(
            "query, key and value must all be [B, length, heads, H] or all [length, heads, H], got "
            f"{query.shape}, {key.shape} and {value.shape}."
        )
    batched = query.ndim == 4
    if not batched:
        query, key, value = query[None], key[None], value[None]
    call = _Call(
        query=query,
        key=key,
        value=value,
        bias=_broadcastable("bias", bias, query, key),
        mask=_broadcastable("mask", mask, query, key),
        scale=_scale(scale, query.shape[-1]),
        query_lengths=_lengths("query_seq_lengths", query_seq_lengths, query.shape[0], query.shape[1]),
        kv_lengths=_lengths("key_value_seq_lengths", key_value_seq_lengths, query.shape[0], key.shape[1]),
        sinks=_per_head("sinks", sinks, query.shape[2]),
        slopes=_per_head("alibi_slopes", alibi_slopes, query.shape[2]),
        is_causal=_static_bool("is_causal", is_causal),
        window=_window(local_window_size),
        softcap=_softcap(softcap),
    )
    _check_shapes(call)

    out, lse = _first_that_can(names, call, _static_bool("return_residual", return_residual))
    if not batched:
        out, lse = out[0], None if lse is None else lse[0]
    return out if lse is None else (out, lse)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Call:
    """The checked arguments of one call, with a batch axis."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    bias: jax.Array | None  # 4 axes, each 1 or that of [B, N, T, S]
    mask: jax.Array | None
    scale: Any
    query_lengths: jax.Array | None
    kv_lengths: jax.Array | None
    sinks: jax.Array | None
    slopes: jax.Array | None
    is_causal: bool = dataclasses.field(metadata={"static": True})
    window: tuple[int, int] | None = dataclasses.field(metadata={"static": True})
    softcap: float | None = dataclasses.field(metadata={"static": True})

    def cast(self, dtype: Any) -> "_Call":
        """The same with queries, keys and values of another dtype."""
        return self.replace(**{n: getattr(self, n).astype(dtype) for n in ("query", "key", "value")})

    def replace(self, **changes: Any) -> "_Call":
        return dataclasses.replace(self, **changes)

    @property
    def has_extras(self) -> bool:
        return not (self.softcap is None and self.sinks is None and self.slopes is None)

    @property
    def num_scores(self) -> int:
        """Per head."""
        return self.query.shape[1] * self.key.shape[1]


# Who computes -------------------------------------------------------------------------------------


def _names(implementation: Any) -> tuple[str, ...]:
    if implementation is None:
        # cuDNN would be faster on GPUs, but what it takes is only known when it compiles.
        return ("xla",)
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    for name in names:
        if name not in IMPLEMENTATIONS + _DECODE_KERNELS:
            raise ConfigError(
                f"unknown implementation {name!r}; the known ones are {', '.join(map(repr, IMPLEMENTATIONS))}."
            )
    if not names:
        raise ConfigError("implementation is an empty sequence: name one, or pass None for the best that works.")
    return names


def _first_that_can(names: tuple[str, ...], call: _Call, with_lse: bool) -> tuple[jax.Array, jax.Array | None]:
    reasons = []
    for name in names:
        try:
            return _run(name, call, with_lse)
        except UnsupportedError as error:
            if len(names) == 1:
                raise
            reasons.append(f"{name}: {error}")
    raise UnsupportedError("no implementation of those named can do this call. " + " ".join(reasons))


def _run(name: str, call: _Call, with_lse: bool) -> tuple[jax.Array, jax.Array | None]:
    if name in _DECODE_KERNELS:
        raise UnsupportedError(
            f"{name!r} is a decode kernel, one query token against a cache: use cached_attention, "
            f"or one of {', '.join(map(repr, IMPLEMENTATIONS))} here."
        )
    if name == "cudnn":
        return _cudnn(call, with_lse)
    if call.query.size == 0 or call.key.shape[1] == 0:
        out = jnp.zeros_like(call.query)
        return out, jnp.full(out.shape[:-1], -jnp.inf, out.dtype) if with_lse else None
    limits = (_MAX_SCORES, _BLOCK_SCORES)
    if name == "reference":
        return _own(call, with_lse, True, limits)
    # XLA has float16 products with float32 sums on GPUs only; elsewhere jax.nn raises for float16.
    dtype = call.query.dtype
    if dtype == jnp.float16 and jax.default_backend() != "gpu":
        call = call.cast(jnp.float32)
    by_jax_nn = not call.has_extras and call.num_scores <= _MAX_SCORES and _differentiable_by_jax_nn(call.query.dtype)
    out, lse = _jax_nn(call, with_lse, "xla") if by_jax_nn else _own(call, with_lse, False, limits)
    return out.astype(dtype), None if lse is None else lse.astype(dtype)


def _differentiable_by_jax_nn(dtype: Any) -> bool:
    """Gradients of `jax.nn` multiply 16-bit with 32-bit floats, which fails to compile under strict promotion."""
    try:
        jnp.promote_types(dtype, jnp.float32)
    except ValueError:
        return dtype == jnp.float64
    return True


def _cudnn(call: _Call, with_lse: bool) -> tuple[jax.Array, jax.Array | None]:
    extras = [n for n in ("softcap", "sinks", "slopes") if getattr(call, n) is not None]
    if extras:
        raise UnsupportedError(f"cuDNN attention has no {extras[0]}: use implementation='xla'.")
    if jax.default_backend() != "gpu":
        raise UnsupportedError(f"cuDNN needs a GPU; JAX runs on {jax.default_backend()!r}: use implementation='xla'.")
    if call.query.dtype not in (jnp.float16, jnp.bfloat16):
        raise UnsupportedError(f"cuDNN attention takes float16 and bfloat16, got {call.query.dtype}.")
    if call.query.size == 0 or call.key.shape[1] == 0:
        raise UnsupportedError("cuDNN attention takes no empty arrays.")
    try:
        return _jax_nn(call, with_lse, "cudnn")
    except (NotImplementedError, RuntimeError) as error:
        raise UnsupportedError(f"cuDNN cannot do this call: {error}") from error


def _jax_nn(call: _Call, with_lse: bool, implementation: Any) -> tuple[jax.Array, jax.Array | None]:
    # jax.nn mixes dtypes and ranks on purpose; a caller's strict settings are about the caller's code.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        result: Any = jax.nn.dot_product_attention(
            call.query,
            call.key,
            call.value,
            call.bias,
            call.mask,
            scale=call.scale,
            is_causal=call.is_causal,
            query_seq_lengths=call.query_lengths,
            key_value_seq_lengths=call.kv_lengths,
            local_window_size=call.window,
            implementation=implementation,
            return_residual=with_lse,
        )
    return result if with_lse else (result, None)


# The computation ----------------------------------------------------------------------------------


# jit: without one, every call outside of one would trace and compile its blocks again.
@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _own(call: _Call, with_lse: bool, exact: bool, limits: tuple[int, int]) -> tuple[jax.Array, jax.Array | None]:
    """All of the above in plain JAX; `exact` computes everything in float32 at the highest precision.

    `limits` are `_MAX_SCORES` and `_BLOCK_SCORES`.
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
    if call.num_scores <= max_scores:
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


def _span(call: _Call, num_queries: int) -> int:
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
    call: _Call,
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
        # Finite, as in jax.nn: a row without any key becomes an even average there.
        scores = jnp.where(allowed, scores, jnp.asarray(-0.7 * float(jnp.finfo(jnp.float32).max), wide))

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


def _allowed(call: _Call, t: jax.Array, s: jax.Array) -> jax.Array | None:
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


# Checks -------------------------------------------------------------------------------------------


def _floats(name: str, array: Any) -> jax.Array:
    dtype = getattr(array, "dtype", None)
    if dtype is None:
        try:
            array = np.asarray(array)
        except Exception as error:
            raise _MirrorDTypeError(f"{name} must be an array of floats, got {type(array).__name__}.") from error
        dtype = array.dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        raise _MirrorDTypeError(f"{name} must have a real floating dtype, got {dtype}.")
    return jnp.asarray(array)


def _check_shapes(call: _Call) -> None:
    query, key, value = call.query, call.key, call.value
    for name, array in (("key", key), ("value", value)):
        if array.dtype != query.dtype:
            raise _MirrorDTypeError(
                f"{name} must have query's dtype {query.dtype}, got {array.dtype}: cast one of them."
            )
    if value.shape != key.shape:
        raise ShapeError(f"value must have key's shape {key.shape}, got {value.shape}.")
    if (query.shape[0], query.shape[3]) != (key.shape[0], key.shape[3]):
        raise ShapeError(f"query and key must agree in B and H, got {query.shape} and {key.shape}.")
    if query.shape[3] == 0 or key.shape[2] == 0 or query.shape[2] % key.shape[2]:
        raise ShapeError(
            f"the number of query heads must be a multiple of the key/value heads, got {query.shape[2]} and "
            f"{key.shape[2]} (query {query.shape}, key {key.shape})."
        )


def _broadcastable(name: str, array: Any, query: jax.Array, key: jax.Array) -> jax.Array | None:
    """A bias or mask with four axes, checked against [B, N, T, S]."""
    if array is None:
        return None
    array = jnp.asarray(array)
    if name == "mask" and array.dtype != jnp.bool_:
        raise _MirrorDTypeError(f"mask must be bool, got {array.dtype}: pass numbers to be added as bias.")
    if name == "bias" and not jnp.issubdtype(array.dtype, jnp.floating):
        raise _MirrorDTypeError(f"bias must have a real floating dtype, got {array.dtype}: pass bools as mask.")
    scores = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
    if array.ndim > 4 or any(a not in (1, b) for a, b in zip(array.shape[::-1], scores[::-1], strict=False)):
        raise ShapeError(f"{name} must broadcast to [B, N, T, S] = {scores}, got {array.shape}.")
    if name == "bias" and not isinstance(array, Tracer) and bool(jnp.any(array == jnp.inf)):
        raise RangeError("bias holds +inf, which makes the softmax NaN: use a large finite number.")
    return array.reshape((1,) * (4 - array.ndim) + array.shape)


def _lengths(name: str, lengths: Any, batch: int, longest: int) -> jax.Array | None:
    if lengths is None:
        return None
    lengths = jnp.asarray(lengths)
    if lengths.dtype != jnp.int32:
        raise _MirrorDTypeError(f"{name} must be int32, got {lengths.dtype}.")
    if lengths.shape != (batch,):
        raise ShapeError(f"{name} must have shape ({batch},), one length per row, got {lengths.shape}.")
    if not isinstance(lengths, Tracer):
        bad = [v for v in np.asarray(lengths).tolist() if not 0 <= v <= longest]
        if bad:
            raise RangeError(f"{name} must lie in [0, {longest}], got {bad[0]}.")
    return lengths


def _per_head(name: str, array: Any, num_heads: int) -> jax.Array | None:
    if array is None:
        return None
    array = _floats(name, array)
    if array.shape != (num_heads,):
        raise ShapeError(f"{name} must have shape ({num_heads},), one number per query head, got {array.shape}.")
    return array


def _scale(scale: Any, head_dim: int) -> Any:
    if scale is None:
        return 1.0 / math.sqrt(max(head_dim, 1))
    if not isinstance(scale, Tracer) and not math.isfinite(scale):
        raise RangeError(f"scale must be finite, got {scale}.")
    return scale


def _softcap(softcap: Any) -> float | None:
    if softcap is None:
        return None
    if isinstance(softcap, Tracer):
        raise ConfigError("softcap must be known when the program is traced: pass a Python float.")
    if isinstance(softcap, bool | np.bool_):
        raise DTypeError(f"softcap must be a number, got {softcap!r}.")
    if not (math.isfinite(softcap) and softcap > 0):
        raise RangeError(f"softcap must be finite and > 0, got {softcap}; leave it None for no cap.")
    return float(softcap)


def _static_bool(name: str, value: Any) -> bool:
    if isinstance(value, Tracer):
        raise ConfigError(f"{name} must be known when the program is traced: pass a Python bool.")
    if not isinstance(value, bool | np.bool_):
        raise DTypeError(f"{name} must be a bool, got {value!r}.")
    return bool(value)


def _window(window: Any) -> tuple[int, int] | None:
    if window is None:
        return None
    sides = tuple(window) if isinstance(window, tuple | list) else (window, window)
    if len(sides) != 2:
        raise ConfigError(f"local_window_size must be one int or (left, right), got {window!r}.")
    for side in sides:
        if isinstance(side, Tracer):
            raise ConfigError("local_window_size must be known when the program is traced: pass Python ints.")
        if isinstance(side, bool | np.bool_) or not isinstance(side, numbers.Integral):
            raise DTypeError(f"local_window_size must be ints, got {window!r}.")
        if side < 0:
            raise RangeError(f"local_window_size counts neighbours and must be >= 0, got {window!r}.")
    # No index difference exceeds int32, and sums of indices and window must not overflow it.
    return min(int(sides[0]), 2**30), min(int(sides[1]), 2**30)
