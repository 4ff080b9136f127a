"""Attention of a layer over sequences it is given whole: training, encoders, and a step of Flax's decode protocol.

`attend` takes any number of batch axes and returns the weights on request. It has two ways to compute,
with one meaning: float32 scores and softmax, scores masked by select with a large finite number. The
fused one is `kvattn.dot_product_attention`; the explicit one is taken where weights are changed on
their way (dropout), where Linen's einsum overrides ask for it, for complex numbers, and for values of
another size than the keys. Asking for the weights computes them beside the output and never changes it.
"""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from kvattn._typing import Array
from kvattn.attend.full import IMPLEMENTATIONS, dot_product_attention
from kvattn.errors import DTypeError, ShapeError
from kvattn.layers import placement, settings


def attend(
    query: Array,
    key: Array,
    value: Array,
    *,
    bias: Array | None = None,
    mask: Array | None = None,
    is_causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
    alibi_slopes: Array | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    broadcast_dropout: bool = True,
    precision: Any = None,
    einsums: tuple[Callable[..., Array], Callable[..., Array]] | None = None,
    return_weights: bool = False,
    implementation: Any = None,
) -> tuple[Array, Array | None]:
    """Attends `query` to `key` and `value`.

    Args:
        query: [..., T, N, H] with any number of batch axes; all three of one dtype.
        key: [..., S, K, H]. Query head n reads head n // (N // K).
        value: [..., S, K, Hv].
        bias: added to the scores, broadcastable to [..., N, T, S].
        mask: bool, True where attending is allowed, broadcastable to [..., N, T, S].
        is_causal: query t sees the keys 0 to t.
        window: query t sees the keys t - window + 1 to t; implies `is_causal`.
        scale: multiplies the scores; 1/√H if None.
        softcap: scores become ``softcap * tanh(score / softcap)``.
        sinks: float[N], a logit per head that joins the softmax sum only.
        alibi_slopes: float32[N], adds ``slope * (s - t)`` to the scores.
        dropout_rate: the share of weights set to zero; none without `dropout_rng`.
        dropout_rng: a PRNG key.
        broadcast_dropout: one dropout mask for all batch rows and heads.
        precision: precision of the matrix products.
        einsums: what computes the scores and the output instead of `jnp.einsum`.
        return_weights: also return the weights before dropout, float32 [..., N, T, S].
        implementation: as in `kvattn.dot_product_attention`.

    Returns:
        The output [..., T, N, Hv] and the weights or None.

    Raises:
        ShapeError: shapes that do not fit.
        DTypeError: a bias of bools.
    """
    check_shapes(query, key, value)
    if bias is not None and jnp.asarray(bias).dtype == jnp.bool_:
        raise DTypeError("bias is added to the scores, got bools: pass them as mask.")
    batch = query.shape[:-3]
    dropout_shape = (*batch, query.shape[-2], query.shape[-3], key.shape[-3])
    q, k, v = (flatten(x, batch, 3) for x in (query, key, value))
    k, v = placement.beside(q, k, v)
    bias, mask = (None if x is None else flatten_scores(x, batch) for x in (bias, mask))
    is_causal = is_causal or window is not None
    rules = {"scale": scale, "softcap": softcap, "sinks": sinks, "alibi_slopes": alibi_slopes}
    dropped = dropout_rng if dropout_rate > 0.0 else None
    explicit = dropped is not None or einsums is not None or jnp.iscomplexobj(q) or v.shape[-1] != q.shape[-1]

    weights: Any = None
    out: Any
    if explicit or return_weights:
        weights = attention_weights(
            q, k, bias, mask, is_causal=is_causal, window=window, precision=precision, einsum=einsums and einsums[0],
            **rules,
        )  # fmt: skip
    if explicit:
        used = weights.astype(q.dtype)
        if dropped is not None:
            shape = (1,) * (len(dropout_shape) - 2) + dropout_shape[-2:] if broadcast_dropout else dropout_shape
            kept = jax.random.bernoulli(dropped, 1.0 - dropout_rate, shape)
            kept = kept.reshape(1, 1, *shape[-2:]) if broadcast_dropout else kept.reshape(used.shape)
            used = used * (kept.astype(used.dtype) / jnp.asarray(1.0 - dropout_rate, used.dtype))
        out = weighted_values(used, v, precision=precision, einsum=einsums and einsums[1])
    else:
        local = None if window is None else (window - 1, 0)
        with matmul_precision(precision):
            out = dot_product_attention(
                q,
                k,
                v,
                bias,
                mask,
                is_causal=is_causal,
                local_window_size=local,
                implementation=for_full_sequences(implementation),
                **rules,
            )
    out = out.reshape(*batch, *out.shape[1:])
    return out, None if weights is None or not return_weights else weights.reshape(dropout_shape)


def check_shapes(query: Array, key: Array, value: Array) -> None:
    """Checks that queries, keys and values belong together, naming the shapes that do not."""
    if not query.ndim == key.ndim == value.ndim or query.ndim < 3:
        raise ShapeError(f"q, k, v must have same rank, but got {query.ndim}, {key.ndim}, {value.ndim}.")
    if not query.shape[:-3] == key.shape[:-3] == value.shape[:-3]:
        raise ShapeError(f"q, k, v batch dims must match, but got shapes {query.shape}, {key.shape}, {value.shape}.")
    if key.shape[-3] != value.shape[-3]:
        raise ShapeError(f"k, v lengths must match, but got {key.shape[-3]} and {value.shape[-3]}.")
    if query.shape[-1] != key.shape[-1]:
        raise ShapeError(f"q, k depths must match, but got {query.shape[-1]} and {key.shape[-1]}.")
    if key.shape[-2] != value.shape[-2]:
        raise ShapeError(f"k, v heads must match, but got {key.shape[-2]} and {value.shape[-2]}.")
    if query.shape[-2] % key.shape[-2]:
        raise ShapeError(
            f"the number of query heads ({query.shape[-2]}) must be a multiple of key/value heads ({key.shape[-2]})."
        )


def rotate(rope: Any, x: Array, positions: Any) -> Array:
    """Turns queries or keys [..., T, heads, H] to their positions, int [..., T] or [T]; 0, 1, 2, ... if None.

    Raises:
        ShapeError: positions of another shape.
    """
    if rope is None:
        return x
    batch, length = x.shape[:-3], x.shape[-3]
    positions = jnp.arange(length, dtype=jnp.int32) if positions is None else jnp.asarray(positions)
    if positions.shape not in ((length,), (*batch, length)):
        raise ShapeError(f"input_positions must be {(*batch, length)} or {(length,)}, got {positions.shape}.")
    if positions.ndim > 1:
        positions = flatten(positions, batch, 1)
    return rope(flatten(x, batch, 3), positions).reshape(x.shape)


def attention_weights(
    query: Array,
    key: Array,
    bias: Array | None,
    mask: Array | None,
    *,
    is_causal: bool,
    window: int | None,
    scale: float | None,
    softcap: float | None,
    sinks: Array | None,
    alibi_slopes: Array | None,
    precision: Any = None,
    einsum: Callable[..., Array] | None = None,
) -> Array:
    """The softmax weights [B, N, T, S], float32 (complex64 for complex input), of q [B,T,N,H] and k [B,S,K,H]."""
    length, num_heads, size = query.shape[1:]
    num_keys, num_kv_heads = key.shape[1:3]
    factor = settings.default_scale(scale, size)
    if einsum is not None:
        key = jnp.repeat(key, num_heads // num_kv_heads, axis=2)
        scores = einsum("...qhd,...khd->...hqk", query * jnp.asarray(factor, query.dtype), key)
        scores = scores.astype(_wide(scores.dtype))
    else:
        wide = _wide(query.dtype)
        blocks = rearrange(query, "b t (k g) h -> b t k g h", k=num_kv_heads)
        scores = jnp.einsum("btkgh,bskh->bkgts", blocks, key, precision=precision, preferred_element_type=wide)
        scores = scores.reshape(scores.shape[0], num_heads, length, num_keys) * jnp.asarray(factor, wide)
    if softcap is not None:
        scores = jnp.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias.astype(scores.dtype)
    if alibi_slopes is not None:
        ahead = (jnp.arange(num_keys)[None, :] - jnp.arange(length)[:, None]).astype(scores.dtype)
        scores = scores + alibi_slopes.astype(scores.dtype)[None, :, None, None] * ahead[None, None]
    if is_causal:
        near = window_mask(length, num_keys, window)[None, None]
        mask = near if mask is None else mask & near
    if mask is not None:
        lowest = -0.7 * float(jnp.finfo(jnp.float32).max)
        scores = jnp.where(mask, scores, jnp.asarray(lowest, scores.dtype))
    if sinks is not None:
        sink = sinks.astype(scores.dtype)[None, :, None, None]
        top = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sink)
        weights = jnp.exp(scores - jax.lax.stop_gradient(top))
        return weights / (jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sink - jax.lax.stop_gradient(top)))
    weights = jax.nn.softmax(scores, axis=-1)
    if mask is not None and (softcap is not None or alibi_slopes is not None):
        return jnp.where(mask, weights, 0)  # a row that sees nothing gives 0, as kvattn.dot_product_attention has it
    return weights


def window_mask(length: int, num_keys: int, window: int | None) -> Array:
    """bool [T, S]: query t sees the keys up to t, the last `window` of them if given."""
    ahead = jnp.arange(num_keys)[None, :] - jnp.arange(length)[:, None]
    return ahead <= 0 if window is None else (ahead <= 0) & (ahead > -window)


def weighted_values(
    weights: Array, value: Array, *, precision: Any = None, einsum: Callable[..., Array] | None = None
) -> Array:
    """The output [B, T, N, Hv] of weights [B, N, T, S] and values [B, S, K, Hv]."""
    groups = weights.shape[1] // value.shape[2]
    if einsum is not None:
        return einsum("...hqk,...khd->...qhd", weights, jnp.repeat(value, groups, axis=2))
    split = rearrange(weights, "b (k g) t s -> b k g t s", g=groups)
    out = jnp.einsum("bkgts,bskh->btkgh", split, value, precision=precision)
    return rearrange(out, "b t k g h -> b t (k g) h")


def flatten(x: Array, batch: tuple[int, ...], kept: int) -> Array:
    """Merges the batch axes into one and leaves the last `kept`."""
    return x if len(batch) == 1 else x.reshape(math.prod(batch), *x.shape[x.ndim - kept :])


def flatten_scores(x: Array, batch: tuple[int, ...]) -> Array:
    """Brings a mask or bias, broadcastable to [*batch, N, T, S], to rank 4.

    Raises:
        ShapeError: its batch axes do not broadcast to `batch`.
    """
    x = jnp.asarray(x)
    rank = len(batch) + 3
    if x.ndim > rank:
        raise ShapeError(f"a mask or bias of rank {x.ndim} does not fit scores of rank {rank}, shape {x.shape}.")
    x = x.reshape((1,) * (rank - x.ndim) + x.shape)
    if any(own not in (1, size) for own, size in zip(x.shape, batch, strict=False)):
        raise ShapeError(f"the batch dims {x.shape[:-3]} of a mask or bias do not broadcast to {batch}.")
    if all(size == 1 for size in x.shape[:-3]):
        return x.reshape(1, *x.shape[-3:])
    return flatten(jnp.broadcast_to(x, (*batch, *x.shape[-3:])), batch, 3)


def for_full_sequences(implementation: Any) -> Any:
    """Those of a layer's implementations that compute full sequences; None where only decode kernels are named."""
    if implementation is None:
        return None
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    return tuple(name for name in names if name in IMPLEMENTATIONS) or None


def matmul_precision(precision: Any) -> contextlib.AbstractContextManager[Any]:
    """Sets the precision of the matrix products inside; a pair (one per operand) counts by its first."""
    if precision is None:
        return contextlib.nullcontext()
    if isinstance(precision, tuple | list):
        precision = precision[0]
    if isinstance(precision, jax.lax.Precision):
        precision = precision.name.lower()
    elif isinstance(precision, jax.lax.DotAlgorithmPreset):
        precision = precision.name
    return jax.default_matmul_precision(precision)


def _wide(dtype: Any) -> Any:
    """What scores of inputs of `dtype` are computed in: float32 at least."""
    return dtype if jnp.issubdtype(dtype, jnp.complexfloating) or dtype == jnp.float64 else jnp.dtype(jnp.float32)
