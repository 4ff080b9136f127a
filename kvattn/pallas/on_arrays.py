"""`kvattn.pallas.decode_attention` and `paged_decode_attention`: one decode step over plain arrays.

For callers who keep caches of their own. They are wrapped in views, so every implementation can read them.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Bool, Float, Float32, Int32, Shaped

from kvattn import _checks
from kvattn._typing import Array, Encoded
from kvattn.attend import api
from kvattn.attend.rules import Rules
from kvattn.attend.state import add_sinks
from kvattn.attend.tokens import PerHead
from kvattn.cache import Layout, View
from kvattn.cache.pages import block_layout
from kvattn.cache.view import block_positions
from kvattn.codecs import Codec, Float8, Int8, Plain
from kvattn.codecs.base import Role, accumulator
from kvattn.codecs.blocks import Blocks
from kvattn.errors import ConfigError, DTypeError, RangeError, ShapeError
from kvattn.masks import EMPTY, Mask


def decode_attention(
    q: Float[ArrayLike, "B N H"],
    k: Shaped[ArrayLike, "B K S H"],
    v: Shaped[ArrayLike, "B K S Hv"],
    lengths: ArrayLike | Sequence[int],
    *,
    starts: ArrayLike | Sequence[int] | None = None,
    k_scales: Float[ArrayLike, "B K S"] | None = None,
    v_scales: Float[ArrayLike, "B K S"] | None = None,
    scale: ArrayLike | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[ArrayLike, " N"] | None = None,
    alibi_slopes: Float[ArrayLike, " N"] | None = None,
    return_lse: bool = False,
    implementation: api.Implementation = None,
) -> Any:
    """Attention of one new token per row over the first `lengths` slots.

    Args:
        q: float [B, N, H].
        k: [B, K, S, H], N a multiple of K; query head n reads head n // (N // K). bfloat16, float16, float32; int8 or
            float8_e4m3fn with scales.
        v: [B, K, S, Hv], likewise, of the same dtype or another.
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
    k, v = _stored("k", k), _stored("v", v)
    if k.ndim != 4 or v.ndim != 4 or k.shape[:3] != v.shape[:3] or k.shape[0] != q.shape[0]:
        raise ShapeError(
            f"k and v must be [B, K, S, H] and [B, K, S, Hv] with B = {q.shape[0]}, got {k.shape} and {v.shape}."
        )
    batch, heads, slots, features = k.shape
    codec, k_scales, v_scales = _codecs(k, v, k_scales, v_scales)
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
    return _attend(
        q,
        view,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        return_lse=return_lse,
        implementation=implementation,
    )


def paged_decode_attention(
    q: Float[ArrayLike, "B N H"],
    k_pages: Shaped[ArrayLike, "K P R H"],
    v_pages: Shaped[ArrayLike, "K P R Hv"],
    lengths: ArrayLike | Sequence[int],
    page_table: ArrayLike | Sequence[Sequence[int]],
    *,
    k_scales: Float[ArrayLike, "K P R"] | None = None,
    v_scales: Float[ArrayLike, "K P R"] | None = None,
    scale: ArrayLike | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[ArrayLike, " N"] | None = None,
    alibi_slopes: Float[ArrayLike, " N"] | None = None,
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
    k_pages, v_pages = _stored("k_pages", k_pages), _stored("v_pages", v_pages)
    if k_pages.ndim != 4 or v_pages.ndim != 4 or k_pages.shape[:3] != v_pages.shape[:3]:
        raise ShapeError(
            f"k_pages and v_pages must be [K, P, R, H] and [K, P, R, Hv], got {k_pages.shape} and {v_pages.shape}."
        )
    table = _checks.integers("page_table", page_table)
    if table.ndim != 2 or table.shape[0] != q.shape[0]:
        raise ShapeError(f"page_table must be [B, W] with B = {q.shape[0]}, got {table.shape}.")
    heads, num_pages, size, features = k_pages.shape
    batch, width = table.shape
    codec, k_scales, v_scales = _codecs(k_pages, v_pages, k_scales, v_scales)
    positions = _positions(lengths, batch, heads, width * size)
    used = jnp.any(positions.reshape(*positions.shape[:2], width, size) >= 0, axis=(1, 3))
    # Looked at before the cast to int32, which would wrap what does not fit. What is not read may be anything.
    unknown = used & ((table < 0) | (table >= num_pages))
    if _checks.is_concrete(unknown) and np.any(unknown):
        row, column = np.argwhere(np.asarray(unknown))[0].tolist()
        raise RangeError(
            f"page_table names page {int(table[row, column])} for the tokens from {column * size} on of row {row}; "
            f"there are pages 0 to {num_pages - 1}."
        )
    positions = jnp.where(jnp.any(unknown, axis=1)[:, None, None], EMPTY, positions)
    table = jnp.asarray(table.astype(jnp.int32))
    layout = block_layout(max(size, 1), width)
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
    return _attend(
        q,
        view,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        return_lse=return_lse,
        implementation=implementation,
    )


def _query(q: Shaped[ArrayLike, "..."]) -> Float[Array, "B N H"]:
    q = _checks.query("q", q)
    if q.ndim != 3:
        raise ShapeError(f"q must be [B, N, H], got {q.shape}.")
    return q


def _stored(name: str, x: Any) -> Shaped[Array, "..."]:
    try:
        return jnp.asarray(x)
    except Exception as error:
        raise DTypeError(f"{name} must be an array of numbers, got {x!r}.") from error


@dataclasses.dataclass(frozen=True)
class _Pair(Codec):
    """Keys stored in one way and values in another."""

    of_keys: Codec
    of_values: Codec

    def scores(self, query: Float[Array, "B K M H"], keys: Encoded, transposed: bool) -> Float[Array, "B K M R"]:
        return self.of_keys.scores(query, keys, transposed)

    def mix(
        self, probs: Float[Array, "B K M R"], values: Encoded, filled: Bool[Array, "B #K R"]
    ) -> Float[Array, "B K M F"]:
        return self.of_values.mix(probs, values, filled)

    def transposed(self, layout: Blocks, role: Role, name: str) -> bool:
        return self._of(role).transposed(layout, role, name)

    def dense(
        self,
        store: Encoded,
        layout: Blocks,
        role: Role,
        head_dim: int,
        counts: Int32[Array, "B *K"],
        dtype: DTypeLike,
    ) -> Float[Array, "B K C H"]:
        return self._of(role).dense(store, layout, role, head_dim, counts, dtype)

    def _of(self, role: Role) -> Codec:
        return self.of_keys if role == "keys" else self.of_values


def _codecs(
    k: Shaped[Array, "*store H"], v: Shaped[Array, "*store Hv"], k_scales: object, v_scales: object
) -> tuple[Codec, Float32[Array, "*store"] | None, Float32[Array, "*store"] | None]:
    """How to read the arrays, from their dtypes, and the scales."""
    of_keys, k_scales = _codec("k", k, k_scales)
    of_values, v_scales = _codec("v", v, v_scales)
    return of_keys if of_keys == of_values else _Pair(of_keys, of_values), k_scales, v_scales


def _codec(name: str, x: Shaped[Array, "*store H"], scales: Any) -> tuple[Codec, Float32[Array, "*store"] | None]:
    coded = {jnp.dtype(jnp.int8): Int8(), jnp.dtype(jnp.float8_e4m3fn): Float8()}.get(x.dtype)
    if (scales is None) != (coded is None):
        what = "needs" if scales is None else "takes no"
        raise ConfigError(f"{x.dtype} {what} {name}_scales.")
    if coded is None:
        if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64):
            raise DTypeError(f"k and v must be floating, int8 or float8_e4m3fn, got {x.dtype} for {name}.")
        return Plain(jnp.dtype(x.dtype)), None
    try:
        scales = jnp.asarray(scales if hasattr(scales, "dtype") else np.asarray(scales, np.float32))
    except Exception as error:
        raise DTypeError(f"{name}_scales must be an array of floats, got {scales!r}.") from error
    if scales.shape != x.shape[:3] or scales.dtype != jnp.float32:
        raise ShapeError(f"{name}_scales must be float32 {x.shape[:3]}, got {scales.dtype} {scales.shape}.")
    return coded, scales


def _positions(lengths: Any, batch: int, heads: int, slots: int) -> Int32[Array, "B K1 S"]:
    """Slots counted so that the last one of every row and head is S - 1; EMPTY behind it.

    Heads of different lengths can then be attended to from one position.
    """
    lengths = _checks.integers("lengths", lengths)
    if lengths.shape not in ((batch,), (batch, heads)):
        raise ShapeError(f"lengths must be [B] or [B, K] = {(batch, heads)}, got {lengths.shape}.")
    bad = (lengths < 0) | (lengths > slots)
    if _checks.is_concrete(bad) and np.any(bad):
        raise RangeError(f"lengths must lie in [0, {slots}], got {np.asarray(lengths).tolist()}.")
    lengths = jnp.where(bad, 0, jnp.asarray(lengths)).astype(jnp.int32).reshape(batch, lengths.size // max(batch, 1), 1)
    slot = jnp.arange(slots, dtype=jnp.int32)[None, None]
    return jnp.where(slot < lengths, slot + slots - lengths, EMPTY)


def _starts(starts: Any, batch: int) -> Int32[Array, "B 1"]:
    """The first slot of each row."""
    starts = _checks.int32("starts", starts)
    if starts.shape != (batch,):
        raise ShapeError(f"starts must be [B] = ({batch},), got {starts.shape}.")
    return jnp.asarray(starts)[:, None]


def _attend(
    q: Float[Array, "B N H"],
    view: View,
    *,
    scale: ArrayLike | None,
    window: object,
    softcap: object,
    sinks: object,
    alibi_slopes: object,
    return_lse: bool,
    implementation: api.Implementation,
) -> Any:
    """Attention [B, N, Hv] of one token per row to a view whose last slot is where the queries stand."""
    batch, heads, head_dim = q.shape
    _checks.head_counts(heads, view.num_kv_heads)
    if head_dim != view.key_head_dim or not head_dim:
        raise ShapeError(f"q has head dim {head_dim}, k {view.key_head_dim}: they must agree and be at least 1.")
    query, rules = Rules.checked(q[:, None], mask=Mask(), window=window, scale=scale, softcap=softcap)
    sinks = _checks.per_head("sinks", sinks, heads)
    slopes = _checks.per_head("alibi_slopes", alibi_slopes, heads, finite=True)
    if not view.value_head_dim:
        raise ShapeError("v has head dim 0: it must be at least 1.")
    if 0 in (batch, view.layout.num_slots, *view.keys["data"].shape):
        api.candidates(implementation)
        out = jnp.zeros((batch, heads, view.value_head_dim), q.dtype)
        return (out, jnp.full((batch, heads), -jnp.inf, accumulator(q.dtype))) if return_lse else out
    here = jnp.full((batch, 1), view.layout.num_slots - 1, jnp.int32)
    out, lse, _ = api.attend(rules.request(query, here, view, PerHead(slopes=slopes)), implementation)
    if sinks is not None:
        out, lse = add_sinks(out, lse, sinks)
    out = out[:, 0].astype(q.dtype)
    return (out, lse[:, 0]) if return_lse else out
