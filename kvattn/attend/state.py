"""Partial attention and its merge.

Attention over a set of tokens is summed up by its output and the logarithm of its softmax
denominator. Two such summaries of disjoint sets merge into the summary of their union: split-KV,
shared prefixes, a ring and the chunk that comes after it, and sequences spread over devices are all
this one operation.
"""

import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Float

from kvattn._typing import Array
from kvattn.codecs.base import wider
from kvattn.errors import ShapeError


def merge_states(
    out_a: ArrayLike, lse_a: ArrayLike, out_b: ArrayLike, lse_b: ArrayLike
) -> tuple[Float[Array, "*shape H"], Float[Array, "*shape"]]:
    """Merges the attention over two disjoint sets of tokens into that over their union.

    ``lse = log(exp(lse_a) + exp(lse_b))``, ``out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b``. Associative
    and commutative up to rounding. A side with lse = -inf attended to nothing: it changes nothing, whatever its
    out holds.

    Args:
        out_a: float [..., H].
        lse_a: float [...], natural logarithm; -inf for "nothing".
        out_b: float [..., H].
        lse_b: float [...].

    Returns:
        out in the wider dtype of both, and lse, float32 or wider. Both empty: 0 and -inf.

    Raises:
        ShapeError: shapes that do not belong together.
    """
    out_a, lse_a, out_b, lse_b = (jnp.asarray(x) for x in (out_a, lse_a, out_b, lse_b))
    if out_a.shape != out_b.shape or lse_a.shape != lse_b.shape or out_a.shape[:-1] != lse_a.shape:
        raise ShapeError(
            "expected out [..., H] and lse [...] of equal leading shape, got "
            f"{out_a.shape}, {lse_a.shape} and {out_b.shape}, {lse_b.shape}."
        )
    dtype = wider(out_a.dtype, out_b.dtype)
    acc = wider(lse_a.dtype, lse_b.dtype, dtype, jnp.float32)
    lse_a, lse_b = lse_a.astype(acc), lse_b.astype(acc)
    top = jnp.maximum(lse_a, lse_b)
    # The maximum of two empty sides is -inf, and -inf - -inf is NaN: subtract something finite instead.
    top = jnp.where(jnp.isneginf(top), 0, top)
    weight_a, weight_b = jnp.exp(lse_a - top), jnp.exp(lse_b - top)
    total = weight_a + weight_b
    share = 1 / jnp.where(total == 0, 1, total)
    out = _weighted(out_a, weight_a * share, acc) + _weighted(out_b, weight_b * share, acc)
    lse = jnp.where(total == 0, -jnp.inf, jnp.log(jnp.where(total == 0, 1, total)) + top)
    return out.astype(dtype), lse


def _weighted(
    out: Float[Array, "*shape H"], weight: Float[Array, "*shape"], acc: DTypeLike
) -> Float[Array, "*shape H"]:
    weight = weight[..., None]
    # Selected before the product too: what an empty side holds, NaN, would reach the derivative of its weight.
    return jnp.where(weight == 0, 0, out.astype(acc)) * weight


def add_sinks(
    out: Float[Array, "B T N H"], lse: Float[Array, "B T N"], sinks: Float[Array, " N"]
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Lets a learned logit per head join the softmax sum (gpt-oss): it takes its share and adds no value.

    Args:
        out: without the sinks.
        lse: likewise.
        sinks: the logits.

    Returns:
        out and lse with the sink. A row that attends to nothing stays 0 and -inf.
    """
    sinks = sinks.astype(lse.dtype)[None, None, :]
    with_sink = jnp.logaddexp(jnp.where(jnp.isneginf(lse), 0, lse), sinks)
    share = jnp.where(jnp.isneginf(lse), 0, jnp.exp(lse - with_sink))
    return out * share[..., None].astype(out.dtype), jnp.where(jnp.isneginf(lse), lse, with_sink)
