"""`kvattn.pallas.decode_attention` and `paged_decode_attention`: one decode step over plain arrays.

For callers who keep caches of their own. They are wrapped in views, so every implementation can read them.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from kvattn import _checks
from kvattn._typing import Array
from kvattn.attend import api
from kvattn.attend.state import add_sinks
from kvattn.cache import Layout, View
from kvattn.cache.paged import block_layout
from kvattn.cache.view import block_positions
from kvattn.codecs import Codec, Float8, Int8, Plain
from kvattn.errors import ConfigError, DTypeError, RangeError, ShapeError
from kvattn.masks import EMPTY, Mask
from kvattn.request import Request


def decode_attention(
    q: Array,
    k: Array,
    v: Array,
    lengths: Any,
    *,
    starts: Any = None,
    k_scales: Array | None = None,
    v_scales: Array | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
    alibi_slopes: Array | None = None,
    return_lse: bool = False,
    implementation: api.Implementation = None,
) -> Any:
    """Attention of one new token per row over the first `lengths` slots.

    Args:
        q: float [B, N, H].
        k: [B, K, S, H], N a multiple of K; query head n reads head n // (N // K). bfloat16, float16, float32; int8 or
            float8_e4m3fn with scales.
        v: [B, K, S, Hv], likewise.
        lengths: int32 [B] or [B, K], each in [0, S]. What lies behind is not read.
        starts: int32 [B]: nor what lies before. None: 0.
        k_scales: float32 [B, K, S]: number = data * scale.
        v_scales: float32 [B, K, S].
        scale: factor of the scores. None: 1/sqrt(H).
        window: the last `window` of those slots only.
        softcap: scores become softcap * tanh(scores / softcap).
        sinks: float [N], a logit per head that joins the softmax sum only.
        alibi_slopes: float [N]: adds slope * (slot - (length - 1)) to the scores.
        return_lse: whether to return the log-sum-exp too.
        implementation: as in `kvattn.cached_attention`.

    Returns:
        out [B, N, Hv] in q's dtype; with `return_lse` also float32 [B, N] (natural logarithm, sinks included). A row of
        length 0 gives 0 and -inf.

    Raises:
        ShapeError, DTypeError, ConfigError: arguments that do not fit.
        RangeError: a length outside [0, S]. Under jit such a row counts as empty.
        UnsupportedError: the named implementation cannot do this.
    """
    q = _query(q)
    k, v = jnp.asarray(k), jnp.asarray(v)
    if k.ndim != 4 or v.ndim != 4 or k.shape[:3] != v.shape[:3] or k.shape[0] != q.shape[0]:
        raise ShapeError(
            f"k and v must be [B, K, S, H] and [B, K, S, Hv] with B = {q.shape[0]}, got {k.shape} and {v.shape}."
        )
    batch, heads, slots, features = k.shape
    codec = _codec(k, v, k_scales, v_scales, k.shape[:3])
    layout = Layout(slots, max(slots, 1), False)
    positions = _positions(lengths, batch, heads, slots)
    if starts is not None:
        before = jnp.arange(slots, dtype=jnp.int32)[None] < _starts(starts, batch)
        positions = jnp.where(before[:, None], EMPTY, positions)
    view = View(
        keys={"data": k[None], **({} if k_scales is None else {"scale": k_scales[None, :, :, None]})},
        values={"data": v[None], **({} if v_scales is None else {"scale": v_scales[None, :, :, None]})},
        positions=block_positions(layout, positions),
        counts=jnp.full((batch,), slots, jnp.int32),
        layout=layout,
        codec=codec,
        key_head_dim=features,
        value_head_dim=v.shape[3],
    )
    return _attend(q, view, scale, window, softcap, sinks, alibi_slopes, return_lse, implementation)


def paged_decode_attention(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    lengths: Any,
    page_table: Any,
    *,
    k_scales: Array | None = None,
    v_scales: Array | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
    alibi_slopes: Array | None = None,
    return_lse: bool = False,
    implementation: api.Implementation = None,
) -> Any:
    """Attention of one new token per row over the pages that a table names.

    Args:
        q: float [B, N, H].
        k_pages: [K, P, R, H]; dtypes as in `decode_attention`.
        v_pages: [K, P, R, Hv].
        lengths: int32 [B] or [B, K], each in [0, W R].
        page_table: int32 [B, W]: token p of row b lies in row p % R of page page_table[b, p // R]. Entries past the
            length mean nothing.
        k_scales: float32 [K, P, R].
        v_scales: float32 [K, P, R].
        scale: as in `decode_attention`, and so the rest.
        window: likewise.
        softcap: likewise.
        sinks: likewise.
        alibi_slopes: likewise.
        return_lse: likewise.
        implementation: likewise.

    Returns:
        as `decode_attention`.

    Raises:
        ShapeError, DTypeError, ConfigError, UnsupportedError: as `decode_attention`.
        RangeError: a length outside [0, W R], a page outside [0, P) that is read. Under jit such a row is empty.
    """
    q = _query(q)
    k_pages, v_pages = jnp.asarray(k_pages), jnp.asarray(v_pages)
    if k_pages.ndim != 4 or v_pages.ndim != 4 or k_pages.shape[:3] != v_pages.shape[:3]:
        raise ShapeError(
            f"k_pages and v_pages must be [K, P, R, H] and [K, P, R, Hv], got {k_pages.shape} and {v_pages.shape}."
        )
    table = page_table if hasattr(page_table, "dtype") else np.asarray(page_table)
    if not jnp.issubdtype(table.dtype, jnp.integer):
        raise DTypeError(f"page_table must hold integers, got {table.dtype}.")
    if table.ndim != 2 or table.shape[0] != q.shape[0]:
        raise ShapeError(f"page_table must be [B, W] with B = {q.shape[0]}, got {table.shape}.")
    table = jnp.asarray(table.astype(jnp.int32))
    heads, num_pages, size, features = k_pages.shape
    batch, width = table.shape
    codec = _codec(k_pages, v_pages, k_scales, v_scales, k_pages.shape[:3])
    positions = _positions(lengths, batch, heads, width * size)
    used = jnp.any(positions.reshape(*positions.shape[:2], width, size) >= 0, axis=(1, 3))
    unknown = used & ((table < 0) | (table >= num_pages))
    if _checks.is_concrete(unknown) and np.any(unknown):
        row, column = np.argwhere(np.asarray(unknown))[0].tolist()
        raise RangeError(
            f"page_table names page {int(table[row, column])} for the tokens from {column * size} on of row {row}; "
            f"there are pages 0 to {num_pages - 1}."
        )
    positions = jnp.where(jnp.any(unknown, axis=1)[:, None, None], EMPTY, positions)
    layout = block_layout(size, width)
    view = View(
        keys={"data": k_pages, **({} if k_scales is None else {"scale": k_scales[:, :, None]})},
        values={"data": v_pages, **({} if v_scales is None else {"scale": v_scales[:, :, None]})},
        positions=block_positions(layout, positions),
        counts=jnp.full((batch,), width * size, jnp.int32),
        layout=layout,
        codec=codec,
        key_head_dim=features,
        value_head_dim=v_pages.shape[3],
        page_table=table,
        page_size=size,
    )
    return _attend(q, view, scale, window, softcap, sinks, alibi_slopes, return_lse, implementation)


def _query(q: Array) -> Array:
    q = _checks.floating("q", q)
    if q.ndim != 3:
        raise ShapeError(f"q must be [B, N, H], got {q.shape}.")
    return q


def _codec(k: Array, v: Array, k_scales: Any, v_scales: Any, shape: tuple[int, ...]) -> Codec:
    """How to read the arrays, from their dtype."""
    if k.dtype != v.dtype:
        raise DTypeError(f"k and v must have one dtype, got {k.dtype} and {v.dtype}.")
    coded = {jnp.dtype(jnp.int8): Int8(), jnp.dtype(jnp.float8_e4m3fn): Float8()}.get(k.dtype)
    for name, scales in (("k_scales", k_scales), ("v_scales", v_scales)):
        if (scales is None) != (coded is None):
            what = "needs" if scales is None else "takes no"
            raise ConfigError(f"{k.dtype} {what} {name}.")
        if scales is not None and (scales.shape != shape or scales.dtype != jnp.float32):
            raise ShapeError(f"{name} must be float32 {shape}, got {scales.dtype} {scales.shape}.")
    if coded is not None:
        return coded
    if k.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64):
        raise DTypeError(f"k and v must be floating, int8 or float8_e4m3fn, got {k.dtype}.")
    return Plain(jnp.dtype(k.dtype))


def _positions(lengths: Any, batch: int, heads: int, slots: int) -> Array:
    """int32 [B, 1 or K, S]: slots counted so that the last one of every row and head is S - 1; EMPTY behind it.

    Heads of different lengths can then be attended to from one position.
    """
    lengths = lengths if hasattr(lengths, "dtype") else np.asarray(lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise DTypeError(f"lengths must hold integers, got {lengths.dtype}.")
    if lengths.shape not in ((batch,), (batch, heads)):
        raise ShapeError(f"lengths must be [B] or [B, K] = {(batch, heads)}, got {lengths.shape}.")
    bad = (lengths < 0) | (lengths > slots)
    if _checks.is_concrete(bad) and np.any(bad):
        raise RangeError(f"lengths must lie in [0, {slots}], got {np.asarray(lengths).tolist()}.")
    lengths = jnp.where(bad, 0, jnp.asarray(lengths)).astype(jnp.int32).reshape(batch, -1, 1)
    slot = jnp.arange(slots, dtype=jnp.int32)[None, None]
    return jnp.where(slot < lengths, slot + slots - lengths, EMPTY)


def _starts(starts: Any, batch: int) -> Array:
    """int32 [B, 1]."""
    starts = starts if hasattr(starts, "dtype") else np.asarray(starts)
    if not jnp.issubdtype(starts.dtype, jnp.integer):
        raise DTypeError(f"starts must hold integers, got {starts.dtype}.")
    if starts.shape != (batch,):
        raise ShapeError(f"starts must be [B] = ({batch},), got {starts.shape}.")
    return jnp.asarray(starts).astype(jnp.int32)[:, None]


def _attend(q, view: View, scale, window, softcap, sinks, slopes, return_lse: bool, implementation) -> Any:
    _checks.head_counts(q.shape[1], view.num_kv_heads)
    if q.shape[2] != view.key_head_dim:
        raise ShapeError(f"q has head dim {q.shape[2]}, k {view.key_head_dim}.")
    _checks.finite_scale(scale)
    _checks.positive_softcap(softcap)
    mask = Mask(window=_checks.window(window))
    sinks, slopes = (_checks.per_head(n, x, q.shape[1]) for n, x in (("sinks", sinks), ("alibi_slopes", slopes)))
    here = jnp.full((q.shape[0], 1), view.layout.num_slots - 1, jnp.int32)
    scale = 1 / math.sqrt(q.shape[2]) if scale is None else float(scale)
    request = Request(q[:, None], here, view, slopes, mask=mask, scale=scale, softcap=softcap)
    out, lse, _ = api.attend(request, implementation)
    if sinks is not None:
        out, lse = add_sinks(out, lse, sinks)
    out = out[:, 0].astype(q.dtype)
    return (out, lse[:, 0]) if return_lse else out
