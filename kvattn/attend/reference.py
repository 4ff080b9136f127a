"""`"reference"`: the definition of correct, one dense einsum in float32 (float64 for float64)."""

import jax
import jax.numpy as jnp

from kvattn._typing import Array
from kvattn.cache.view import View
from kvattn.codecs.base import accumulator
from kvattn.request import Request, adjust, grouped, rotated, ungrouped

HIGHEST = jax.lax.Precision.HIGHEST


def unsupported(request: Request) -> str | None:
    """Why this implementation cannot take the request; None: it can."""
    del request
    return None


def dense(view: View, dtype) -> tuple[Array, Array, Array]:
    """Decodes a view: keys [B, K, S, H], values [B, K, S, Hv], positions [B, 1 or K, S]."""
    positions = view.layout.from_blocks(view.positions[..., None], False)[..., 0]
    return *view.dense(dtype), positions


def attend(request: Request) -> tuple[Array, Array, Array | None]:
    """Attention by its formula. See `Request` for the meaning of arguments and results."""
    query = request.query
    acc = accumulator(query.dtype, *(x.dtype for x in request.view.keys.values()))
    keys, values, kv_positions = dense(request.view, acc)
    # What nobody attends to is selected away before the products too: its NaN would reach outputs and derivatives.
    reached = request.reached(kv_positions)[..., None]
    keys, values = jnp.where(reached, keys, 0), jnp.where(reached, values, 0)
    if request.key_rope is not None:
        keys = rotated(keys, request.key_rope, kv_positions)
    query = grouped(query, request.view.num_kv_heads).astype(acc)
    scores = jnp.einsum("bkgth,bksh->bkgts", query, keys, precision=HIGHEST)
    scores = adjust(scores, request, request.positions, kv_positions)
    allowed = request.mask.allowed(request.positions, kv_positions)[:, :, None]
    # Masked by selecting, never by adding: what lies in an unused slot may be NaN.
    scores = jnp.where(allowed, scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    top = jax.lax.stop_gradient(jnp.where(jnp.isneginf(top), 0, top))
    weights = jnp.where(allowed, jnp.exp(scores - top), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    empty = total == 0
    probs = weights / jnp.where(empty, 1, total)
    out = jnp.einsum("bkgts,bksh->bkgth", probs, values, precision=HIGHEST)
    lse = jnp.where(empty, -jnp.inf, jnp.log(jnp.where(empty, 1, total)) + top)[..., 0]
    mass = jnp.sum(jnp.mean(probs, axis=2), axis=2).astype(jnp.float32) if request.want_mass else None
    return ungrouped(out), ungrouped(lse), mass
