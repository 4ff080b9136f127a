"""The calls of JAX's deprecated decode kernels: change the import, keep the code.

===========================================================  ==========================================
``jax.experimental.pallas.ops.gpu.decode_attention.mqa``      `kvattn.pallas.compat.mqa`
``jax.experimental.pallas.ops.gpu.decode_attention.gqa``      `kvattn.pallas.compat.gqa`
``jax.experimental.pallas.ops.gpu.paged_attention``           `kvattn.pallas.compat.gpu_paged_attention`
``jax.experimental.pallas.ops.tpu.paged_attention``           `kvattn.pallas.compat.tpu_paged_attention`
===========================================================  ==========================================

`kvattn.pallas.decode_attention` answers them. Arguments that tune the old kernels (blocks, splits, warps, grids,
debugging) are taken and mean nothing. What differs: a row of length 0 gives 0 instead of garbage, and a page that does
not exist is an error, or an empty row under jit.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Int32, Shaped

from kvattn import _checks
from kvattn._typing import Array
from kvattn.attend.tokens import folded
from kvattn.errors import ShapeError, UnsupportedError
from kvattn.pallas.on_arrays import decode_attention, paged_decode_attention

__all__ = ["gpu_paged_attention", "gqa", "mqa", "tpu_paged_attention"]


def mqa(
    q: Array,
    k: Array,
    v: Array,
    start_idx: ArrayLike | None = None,
    kv_seq_len: ArrayLike | None = None,
    sm_scale: ArrayLike | None = None,
    block_h: int = 16,
    block_k: int = 256,
    k_splits: int = 16,
    num_warps: int | None = None,
    num_stages: int = 2,
    grid: tuple[int, ...] | None = None,
    interpret: bool = False,
    debug: bool = False,
    return_residuals: bool = False,
    normalize_output: bool = True,
) -> Any:
    """Multi-query attention of one token.

    Args:
        q: [B, N, H].
        k: [B, S, H].
        v: [B, S, H].
        start_idx: int32 [B] or scalar: slots before it are not attended to. None: 0.
        kv_seq_len: int32 [B] or scalar: nor those from it on. None: S.
        sm_scale: factor of the scores. None: 1/sqrt(H).
        block_h: ignored, as are the seven arguments below.
        block_k: see block_h.
        k_splits: see block_h.
        num_warps: see block_h.
        num_stages: see block_h.
        grid: see block_h.
        interpret: see block_h.
        debug: see block_h.
        return_residuals: also returns (l, m), float32 [B, N]: the softmax sum relative to the maximum, and the maximum.
        normalize_output: False: the output is not divided by l.

    Returns:
        [B, N, H] in q's dtype; with `return_residuals` that and (l, m).
    """
    del block_h, block_k, k_splits, num_warps, num_stages, grid, interpret, debug
    q, k, v = _floats(q, k, v)
    return _contiguous(
        q,
        k[:, None],
        v[:, None],
        start_idx=start_idx,
        kv_seq_len=kv_seq_len,
        sm_scale=sm_scale,
        return_residuals=return_residuals,
        normalize_output=normalize_output,
    )


def gqa(
    q: Array,
    k: Array,
    v: Array,
    start_idx: ArrayLike | None = None,
    kv_seq_len: ArrayLike | None = None,
    sm_scale: ArrayLike | None = None,
    block_h: int = 16,
    block_k: int = 128,
    k_splits: int = 16,
    num_warps: int | None = None,
    num_stages: int = 2,
    grid: tuple[int, ...] | None = None,
    interpret: bool = False,
    debug: bool = False,
    return_residuals: bool = False,
    normalize_output: bool = True,
) -> Any:
    """Grouped-query attention of one token; as `mqa`, but for k and v [B, S, K, H].

    As in the original, an output that is not normalised comes with residuals only.

    They are transposed to [B, K, S, H] first, as in the original: keep a cache of that shape and call
    `kvattn.pallas.decode_attention` to save that.
    """
    del block_h, block_k, k_splits, num_warps, num_stages, grid, interpret, debug
    if not normalize_output and not return_residuals:
        raise UnsupportedError(
            "an output that is not normalised means nothing without residuals: return_residuals=True."
        )
    q, k, v = _floats(q, k, v)
    if k.ndim != 4 or v.ndim != 4:
        raise ShapeError(f"k and v must be [B, S, K, H], got {k.shape} and {v.shape}.")
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    return _contiguous(
        q,
        k,
        v,
        start_idx=start_idx,
        kv_seq_len=kv_seq_len,
        sm_scale=sm_scale,
        return_residuals=return_residuals,
        normalize_output=normalize_output,
    )


def gpu_paged_attention(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    block_tables: ArrayLike,
    lengths: ArrayLike | Sequence[int] | None,
    k_scales_pages: Array | None = None,
    v_scales_pages: Array | None = None,
    *,
    block_h: int = 16,
    pages_per_compute_block: int = 8,
    k_splits: int = 16,
    num_warps: int = 8,
    num_stages: int = 2,
    interpret: bool = False,
    debug: bool = False,
    mask_value: float = 0.0,
    attn_logits_soft_cap: float | None = None,
) -> Array:
    """Paged attention of one token; scores are not scaled: scale the query.

    Args:
        q: [B, N, H].
        k_pages: [K, P, R, H].
        v_pages: [K, P, R, H].
        block_tables: int32 [B, W].
        lengths: int32 [B]. None: W R each.
        k_scales_pages: [K, P, R], with pages of int8 or float8_e4m3fn.
        v_scales_pages: likewise.
        block_h: ignored, as are the seven arguments below.
        pages_per_compute_block: see block_h.
        k_splits: see block_h.
        num_warps: see block_h.
        num_stages: see block_h.
        interpret: see block_h.
        debug: see block_h.
        mask_value: see block_h.
        attn_logits_soft_cap: scores become cap * tanh(scores / cap).

    Returns:
        [B, N, H] in q's dtype.
    """
    del block_h, pages_per_compute_block, k_splits, num_warps, num_stages, interpret, debug, mask_value
    return _paged(
        q,
        (k_pages, k_scales_pages),
        (v_pages, v_scales_pages),
        lengths,
        ("block_tables", block_tables),
        attn_logits_soft_cap,
    )


def tpu_paged_attention(
    q: Array,
    k_pages: Any,
    v_pages: Any,
    lengths: ArrayLike | Sequence[int],
    page_indices: ArrayLike,
    *,
    mask_value: float = 0.0,
    attn_logits_soft_cap: float | None = None,
    pages_per_compute_block: int | None = None,
    megacore_mode: str | None = None,
    inline_seq_dim: bool = True,
) -> Array:
    """Paged attention of one token; scores are not scaled: scale the query.

    Args:
        q: [B, N, H].
        k_pages: [K, P, R, H], or JAX's `QuantizedTensor` of them: (weight int8, scales [K, P, R, 1]), where a number is
            weight * scale / 127.5.
        v_pages: likewise.
        lengths: int32 [B].
        page_indices: int32 [B, W].
        mask_value: ignored.
        attn_logits_soft_cap: scores become cap * tanh(scores / cap).
        pages_per_compute_block: ignored, as are the two arguments below.
        megacore_mode: see pages_per_compute_block.
        inline_seq_dim: see pages_per_compute_block.

    Returns:
        [B, N, H] in q's dtype.
    """
    del mask_value, pages_per_compute_block, megacore_mode, inline_seq_dim
    table = ("page_indices", page_indices)
    return _paged(q, _parts(k_pages), _parts(v_pages), lengths, table, attn_logits_soft_cap)


def _parts(pages: Any) -> tuple[Shaped[Array, "K P R H"], Float[Array, "K P R"] | None]:
    """The numbers of pages, and their scales if JAX quantised them."""
    if not hasattr(pages, "weight"):
        return pages, None
    # JAX multiplies by 127.5 and rounds; the scale it keeps is the largest magnitude.
    return pages.weight, pages.scales[..., 0].astype(jnp.float32) / 127.5


def _paged(
    q: Any,
    k: tuple[Any, Any],
    v: tuple[Any, Any],
    lengths: Any,
    table: tuple[str, Any],
    softcap: float | None,
) -> Float[Array, "B N H"]:
    """k and v are pages and their scales or None, the table comes with its name."""
    q, (name, pages) = _checks.query("q", q), table
    pages = _checks.integers(name, pages)
    room = pages.shape[1] * np.shape(k[0])[2] if (pages.ndim, np.ndim(k[0])) == (2, 4) else 0
    lengths = np.full(q.shape[:1], room) if lengths is None else _checks.int32("lengths", lengths)
    k_scales, v_scales = (
        None if x is None else _checks.floating(n, x).astype(jnp.float32)
        for n, x in (("k_scales_pages", k[1]), ("v_scales_pages", v[1]))
    )
    return paged_decode_attention(
        q,
        k[0],
        v[0],
        lengths.clip(max=room),
        pages,
        k_scales=k_scales,
        v_scales=v_scales,
        scale=1.0,
        softcap=softcap,
    )


def _floats(*arrays: object) -> tuple[Float[Array, "..."], ...]:
    """q, k and v as arrays of floats."""
    return tuple(_checks.floating(n, x) for n, x in zip("qkv", arrays, strict=True))


def _contiguous(
    q: Float[Array, "B N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    *,
    start_idx: ArrayLike | None,
    kv_seq_len: ArrayLike | None,
    sm_scale: ArrayLike | None,
    return_residuals: bool,
    normalize_output: bool,
) -> Any:
    """What `mqa` and `gqa` return; `start_idx` and `kv_seq_len` are [B], or []."""
    _checks.finite_scale(sm_scale)
    q, scale = folded(q, sm_scale)
    # Before jit, which would wrap what int32 does not hold.
    start, length = _per_row("start_idx", start_idx, q), _per_row("kv_seq_len", kv_seq_len, q)
    return _decode(q, k, v, start, length, scale=scale, residuals=return_residuals, normalize=normalize_output)


def _per_row(name: str, x: Any, q: Float[Array, "B N H"]) -> Int32[Array, " B"] | None:
    """One number per row, from that or from one for all; None stays None."""
    if x is None:
        return None
    x = _checks.int32(name, x)
    if x.shape not in ((), q.shape[:1]):
        raise ShapeError(f"{name} must be one number or have shape {q.shape[:1]}, got {x.shape}.")
    return jnp.broadcast_to(x, q.shape[:1])


@functools.partial(jax.jit, static_argnames=("scale", "residuals", "normalize"))
def _decode(
    q: Float[Array, "B N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    start: Int32[Array, " B"] | None,
    length: Int32[Array, " B"] | None,
    *,
    scale: float | None,
    residuals: bool,
    normalize: bool,
) -> Any:
    """Attention, and what the old kernels return beside it."""
    batch, slots = q.shape[0], k.shape[2]
    lengths = jnp.full((batch,), slots, jnp.int32) if length is None else jnp.clip(length, 0, slots)
    starts = start
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = decode_attention(q, k, v, lengths, starts=starts, scale=factor, return_lse=True)
    if normalize and not residuals:
        return out
    grouped = q.reshape(batch, k.shape[1], -1, q.shape[-1])
    scores = jnp.einsum("bkgh,bksh->bkgs", grouped, k.astype(q.dtype), preferred_element_type=jnp.float32) * factor
    slot = jnp.arange(slots, dtype=jnp.int32)[None]
    seen = (slot < lengths[:, None]) & (slot >= (0 if starts is None else starts[:, None]))
    top = jnp.max(jnp.where(seen[:, None, None], scores, -jnp.inf), axis=-1).reshape(lse.shape)
    total = jnp.where(jnp.isneginf(top), 0.0, jnp.exp(lse - top))
    if not normalize:
        out = (out.astype(jnp.float32) * total[..., None]).astype(q.dtype)
    return (out, (total, top)) if residuals else out
