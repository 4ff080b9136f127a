"""What layers need of attention over full sequences beyond `jax.nn`'s call: batch axes, weights, dropout, einsums."""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Num, Shaped

from kvattn._typing import Array
from kvattn.attend.full import rows
from kvattn.attend.full.call import Call, softmax_scale, window_sides
from kvattn.attend.full.dot_product import IMPLEMENTATIONS, first_that_can
from kvattn.errors import DTypeError, ShapeError

Einsum = Callable[..., Array]


def attend(
    query: Array,
    key: Array,
    value: Array,
    *,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    is_causal: bool = False,
    window: int | None = None,
    scale: float | Array | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
    alibi_slopes: Array | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    broadcast_dropout: bool = True,
    precision: jax.lax.PrecisionLike = None,
    einsums: tuple[Einsum, Einsum] | None = None,
    return_weights: bool = False,
    implementation: str | Sequence[str] | None = None,
) -> tuple[Num[Array, "*B T N Hv"], Num[Array, "*B N T S"] | None]:
    """Attends `query` [..., T, N, H] to `key` [..., S, K, H] and `value` [..., S, K, Hv]; any number of batch axes.

    Scores and softmax are float32, masked scores a large negative number. A plain call is `dot_product_attention`. The
    weights are an array of their own where something changes them on their way (dropout, einsums), for complex numbers,
    and for values of another size than the keys. Asking for the weights computes them beside the output and never
    changes it.

    `bias` and `mask` (bools) broadcast to [..., N, T, S]. A `window` implies `is_causal`: query t sees the keys
    t - window + 1 to t. Sinks and slopes are float[N]. Nothing is dropped without `dropout_rng`; the draws are Flax's.
    `einsums` compute the scores and the output instead of `jnp.einsum`. `implementation` is that of
    `kvattn.cached_attention`; kernels that read caches only are passed over.

    Returns:
        The output [..., T, N, Hv], and on request the weights before dropout [..., N, T, S], float32 or wider.

    Raises:
        ShapeError: shapes that do not fit.
        DTypeError: a bias of bools.
    """
    check_shapes(query, key, value)
    if bias is not None and jnp.asarray(bias).dtype == jnp.bool_:
        raise DTypeError("bias is added to the scores, got bools: pass them as mask.")
    batch = query.shape[:-3]
    query, key, value = (flatten(x, batch, 3) for x in (query, key, value))
    bias, mask = (None if x is None else _flatten_scores(x, batch) for x in (bias, mask))
    call = Call(
        query=query,
        key=key,
        value=value,
        bias=bias,
        mask=mask,
        scale=softmax_scale(scale, query.shape[-1]),
        query_lengths=None,
        kv_lengths=None,
        sinks=sinks,
        slopes=alibi_slopes,
        is_causal=is_causal or window is not None,
        window=None if window is None else window_sides((window - 1, 0)),
        softcap=softcap,
    )
    if dropout_rate == 0.0:
        dropout_rng = None
    other_size = value.shape[-1] != query.shape[-1]
    explicit = dropout_rng is not None or einsums is not None or jnp.iscomplexobj(query) or other_size
    weights = _weights(call, precision, einsums and einsums[0]) if explicit or return_weights else None
    if weights is not None and explicit:
        used = weights.astype(query.dtype)
        if dropout_rng is not None:
            used = _dropped(used, dropout_rng, dropout_rate, broadcast_dropout)
        out = _output(call, used, precision, einsums and einsums[1])
    else:
        with _matmul_precision(precision):
            out, _ = first_that_can(_for_full_sequences(implementation), call, False)
    out = out.reshape(*batch, *out.shape[1:])
    return out, weights.reshape(*batch, *weights.shape[1:]) if weights is not None and return_weights else None


# Explicit weights ---------------------------------------------------------------------------------


def _weights(call: Call, precision: jax.lax.PrecisionLike, einsum: Einsum | None) -> Num[Array, "B N T S"]:
    """The softmax weights, float32 or wider."""
    batch, num_queries, num_heads, _ = call.query.shape
    num_keys, num_kv_heads = call.key.shape[1:3]
    if einsum is None:
        scores = rows.products(call, precision)
    else:
        query = call.query * jnp.asarray(call.scale, call.query.dtype)
        flat = einsum("...qhd,...khd->...hqk", query, jnp.repeat(call.key, num_heads // num_kv_heads, axis=2))
        scores = rows.by_group(flat.astype(rows.wide(flat.dtype)), num_kv_heads)
    t, s = (jnp.arange(length, dtype=jnp.int32) for length in (num_queries, num_keys))
    weights, _ = rows.softmax(call, scores, t, s)
    return weights.reshape(batch, num_heads, num_queries, num_keys)


def _dropped(
    weights: Num[Array, "B N T S"], rng: Shaped[Array, "*key"], rate: float, broadcast: bool
) -> Num[Array, "B N T S"]:
    """Some weights set to zero, the others scaled so that the mean stays; the draws are Flax's."""
    shape = (1, 1, *weights.shape[2:]) if broadcast else weights.shape
    kept = jax.random.bernoulli(rng, 1.0 - rate, shape).astype(weights.dtype)
    return weights * (kept / jnp.asarray(1.0 - rate, weights.dtype))


def _output(
    call: Call, weights: Num[Array, "B N T S"], precision: jax.lax.PrecisionLike, einsum: Einsum | None
) -> Num[Array, "B T N Hv"]:
    num_kv_heads = call.value.shape[2]
    if einsum is not None:
        return einsum(
            "...hqk,...khd->...qhd", weights, jnp.repeat(call.value, weights.shape[1] // num_kv_heads, axis=2)
        )
    out = rows.weighted_values(rows.by_group(weights, num_kv_heads), call.value, precision)
    return out.astype(call.query.dtype)


def _matmul_precision(precision: jax.lax.PrecisionLike) -> contextlib.AbstractContextManager[object]:
    """Sets the precision of the matrix products inside; a pair (one per operand) counts by its first."""
    first: Any = precision[0] if isinstance(precision, tuple | list) else precision
    if first is None:
        return contextlib.nullcontext()
    if isinstance(first, jax.lax.Precision):
        return jax.default_matmul_precision(first.name.lower())
    return jax.default_matmul_precision(first.name if isinstance(first, jax.lax.DotAlgorithmPreset) else first)


def _for_full_sequences(implementation: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """Those implementations that compute full sequences; None where only decode kernels are named."""
    names = (implementation,) if isinstance(implementation, str) else implementation or ()
    return tuple(name for name in names if name in IMPLEMENTATIONS) or None


# Shapes -------------------------------------------------------------------------------------------


def check_shapes(query: Num[Array, "..."], key: Num[Array, "..."], value: Num[Array, "..."]) -> None:
    """Checks that they are [..., T, N, H], [..., S, K, H] and [..., S, K, Hv], naming the shapes that are not."""
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


def flatten(x: Shaped[Array, "*whole"], batch: tuple[int, ...], kept: int) -> Shaped[Array, "B *kept"]:
    """Merges the batch axes into one and leaves the last `kept`."""
    return x if len(batch) == 1 else x.reshape(math.prod(batch), *x.shape[x.ndim - kept :])


def _flatten_scores(x: ArrayLike, batch: tuple[int, ...]) -> Shaped[Array, "#B #N #T #S"]:
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
