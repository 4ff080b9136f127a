"""`"reference"`: the definition of correct, one dense einsum in float32 (float64 for float64)."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int32

from kvattn import _manual
from kvattn._typing import Array
from kvattn.attend.registry import Result
from kvattn.attend.request import Request, adjust, grouped, rotated, ungrouped
from kvattn.cache.view import View
from kvattn.codecs.base import accumulator

HIGHEST = jax.lax.Precision.HIGHEST


def unsupported(request: Request) -> str | None:
    """Why this implementation cannot take the request; None: it can."""
    del request
    return None


def dense(
    view: View, dtype: DTypeLike
) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S Hv"], Int32[Array, "B K1 S"]]:
    """Decodes a view: keys, values and positions (of one head or all)."""
    positions = view.layout.from_blocks(view.positions[..., None], False)[..., 0]
    keys, values = view.dense(dtype)
    if view.codec.rounds:
        slots, key, value = view.fresh or (None, None, None)
        keys = _past_codes(keys, view.codec.as_they_came(view.keys, view.counts), slots, key)
        if view.values_in_keys:
            return keys, keys[..., : view.value_head_dim], positions
        values = _past_codes(values, view.codec.as_they_came(view.values, view.counts), slots, value)
    return keys, values, positions


def _past_codes(
    decoded: Float[Array, "B K C H"],
    kept: tuple[tuple[Int32[Array, "B M"], Float[Array, "B K M H"]], ...],
    slots: Int32[Array, "B *K T"] | None,
    new: Float[Array, "B T K H"] | None,
) -> Float[Array, "B K C H"]:
    """Decoded tokens with derivatives that go straight to the tokens they were made from.

    Args:
        decoded: read from codes.
        kept: `Codec.as_they_came`.
        slots: of the new tokens.
        new: those tokens.
    """
    sources = list(kept)
    if slots is not None and new is not None:
        sources.append((slots, new.swapaxes(1, 2)))
    b = jnp.arange(decoded.shape[0], dtype=jnp.int32)[:, None, None]
    k = jnp.arange(decoded.shape[1], dtype=jnp.int32)[None, :, None]
    for where, tokens in sources:
        where = where[:, None] if where.ndim == 2 else where
        where = jnp.where(where < 0, decoded.shape[2], where)  # past the end: dropped
        rows, tokens = decoded.at[b, k, where].get(mode="clip"), tokens.astype(decoded.dtype)
        rows, tokens = _manual.like(rows, tokens), _manual.like(tokens, rows)
        decoded = decoded.at[b, k, where].set(_straight_through(rows, tokens), mode="drop")
    return decoded


def _mixed(
    probs: Float[Array, "B K G T S"], values: Float[Array, "B K S Hv"], allowed: Bool[Array, "B K1 1 T S"]
) -> Float[Array, "B K G T Hv"]:
    """The mixtures of values; of several queries each gets only what it may attend to.

    A query that may not attend to a value has weight 0 for it, but 0 * NaN is NaN: numbers that are not finite are left
    out of the product and added where `allowed` lets them.
    """
    product = lambda weights, x: jnp.einsum("bkgts,bksh->bkgth", weights, x, precision=HIGHEST)
    if probs.shape[3] == 1:
        return product(probs, values)
    finite = jnp.isfinite(values)
    out = product(probs, jnp.where(finite, values, 0))

    def rest() -> Float[Array, "B K G T Hv"]:
        seen = jnp.broadcast_to(allowed, (*probs.shape[:2], 1, *probs.shape[3:])).astype(values.dtype)
        met = lambda where: product(seen, where.astype(values.dtype)) > 0
        found = jnp.where(met(jnp.isposinf(values)), jnp.inf, 0) + jnp.where(met(jnp.isneginf(values)), -jnp.inf, 0)
        found = jnp.where(met(jnp.isnan(values)), jnp.nan, found).astype(out.dtype)
        return jnp.broadcast_to(found, out.shape)

    return out + jax.lax.stop_gradient(_manual.cond(jnp.all(finite), lambda: jnp.zeros_like(out), rest))


Pair = tuple[Float[Array, "*shape"], Float[Array, "*shape"]]


@jax.custom_jvp
def _straight_through(coded: Float[Array, "*shape"], exact: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """What was read, with the derivative of what was written (Bengio et al., arXiv:1308.3432)."""
    del exact
    return coded


@_straight_through.defjvp
def _(primals: Pair, tangents: Pair) -> Pair:
    return primals[0], tangents[1]


def attend(request: Request) -> Result:
    """Attention by its formula. See `Request` for the meaning of arguments and results."""
    query = request.query
    acc = accumulator(query.dtype, *(x.dtype for x in request.view.keys.values()))
    keys, values, kv_positions = dense(request.view, acc)
    # What nobody attends to is selected away before the products too: its NaN would reach outputs and derivatives.
    reached = request.reached(kv_positions)[..., None]
    keys, values = jnp.where(reached, keys, 0), jnp.where(reached, values, 0)
    if request.key_rope is not None:
        keys = rotated(keys, request, kv_positions)
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
    out = _mixed(probs, values, allowed)
    lse = jnp.where(empty, -jnp.inf, jnp.log(jnp.where(empty, 1, total)) + top)[..., 0]
    mass = jnp.sum(jnp.mean(probs, axis=2), axis=2).astype(jnp.float32) if request.want_mass else None
    return ungrouped(out), ungrouped(lse), mass
