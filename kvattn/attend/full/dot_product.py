"""`dot_product_attention`, the exact mirror of `jax.nn.dot_product_attention`, and who computes it.

It has three extras: a soft cap on the scores, sinks, ALiBi. Notation: B batch, T query length, S key/value length, N
query heads, K key/value heads, G = N // K, H head dim; query head n reads key/value head n // G.

A plain call goes to `jax.nn`. What `jax.nn` cannot do (the extras, or scores too many to hold) is
computed here, in blocks of queries, so a prompt of 32k tokens needs no T x S array, nor do gradients.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from kvattn import _target
from kvattn._typing import Array
from kvattn.attend import registry
from kvattn.attend.full import rows
from kvattn.attend.full.call import Call, checked, static_bool, window_sides
from kvattn.errors import ConfigError, UnsupportedError

__all__ = ["IMPLEMENTATIONS", "dot_product_attention"]

IMPLEMENTATIONS = ("reference", "xla", "cudnn")

_JAX_NN: Callable[..., Any] = jax.nn.dot_product_attention
"""Bound now: people assign the function of this module to that name."""
_MAX_SCORES = 2**22
"""Scores per head (T * S) from which queries are taken in blocks."""
_BLOCK_SCORES = 2**25
"""Scores, over all rows and heads, that one block may hold: 128 MiB in float32."""


def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    softcap: float | None = None,
    sinks: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    implementation: str | Sequence[str] | None = None,
    return_residual: bool = False,
) -> Array | tuple[Array, Array]:
    r"""Scaled dot product attention, as `jax.nn.dot_product_attention`, plus softcap, sinks and ALiBi.

    .. math:: \mathrm{softmax}\left(c \tanh(q k^T \mathrm{scale} / c) + \mathrm{bias}
              + m_n (s - t)\right) v

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
        RangeError: scale not finite in float32, softcap neither, or not positive, a negative window; and,
            where values can be looked at, a length outside [0, T] or [0, S], sinks of NaN or +inf,
            slopes that are not finite, and a bias of +inf (in `jax.jit` it gives NaN).
        ConfigError: an unknown implementation, a traced value where a static one belongs.
        UnsupportedError: the implementation named cannot do this call here.

    Example:
        >>> q = k = v = jnp.ones((1, 5, 4, 8))
        >>> dot_product_attention(q, k, v, is_causal=True, softcap=30.0).shape
        (1, 5, 4, 8)
    """
    given: dict[str, Any] = {
        "query": query,
        "key": key,
        "value": value,
        "bias": bias,
        "mask": mask,
        "scale": scale,
        "query_lengths": query_seq_lengths,
        "kv_lengths": key_value_seq_lengths,
        "sinks": sinks,
        "slopes": alibi_slopes,
        "is_causal": is_causal,
        "window": window_sides(local_window_size),
        "softcap": softcap,
    }
    out, lse = first_that_can(implementation, Call(**given), static_bool("return_residual", return_residual))
    if np.ndim(query) == 3:
        out, lse = out[0], None if lse is None else lse[0]
    return out if lse is None else (out, lse)


Computed = tuple[Float[Array, "B T N H"], Float[Array, "B T N"] | None]
"""Output and, if wanted, logsumexp."""

# Who computes -------------------------------------------------------------------------------------


def _names(implementation: str | Sequence[str] | None) -> tuple[str, ...]:
    if implementation is None:
        # cuDNN would be faster on GPUs, but what it takes is only known when it compiles.
        return ("xla",)
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    for name in names:
        if name not in (*IMPLEMENTATIONS, *registry.names()):
            raise ConfigError(
                f"unknown implementation {name!r}; the known ones are {', '.join(map(repr, IMPLEMENTATIONS))}."
            )
    if not names:
        raise ConfigError("implementation is an empty sequence: name one, or pass None for the best that works.")
    return names


def first_that_can(implementation: str | Sequence[str] | None, call: Call, with_lse: bool) -> Computed:
    """Checks a call and lets the first implementation named that can do it compute.

    Raises:
        UnsupportedError: none of them can.
        KVAttnError: for arguments that do not fit, as `dot_product_attention` says.
    """
    names, call, reasons = _names(implementation), checked(call), []
    for name in names:
        try:
            return _run(name, call, with_lse)
        except UnsupportedError as error:
            if len(names) == 1:
                raise
            reasons.append(f"{name}: {error}")
    raise UnsupportedError("no implementation of those named can do this call. " + " ".join(reasons))


def _run(name: str, call: Call, with_lse: bool) -> Computed:
    if name not in IMPLEMENTATIONS:
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
        return rows.attend(call, with_lse, True, limits)
    # XLA has float16 products with float32 sums on GPUs only; elsewhere jax.nn raises for float16.
    dtype = call.query.dtype
    if dtype == jnp.float16 and _target.family(_target.platform()) != "gpu":
        call = call.cast(jnp.float32)
    by_jax_nn = not call.has_extras and call.num_scores <= _MAX_SCORES and _differentiable_by_jax_nn(call.query.dtype)
    out, lse = _jax_nn(call, with_lse, "xla") if by_jax_nn else rows.attend(call, with_lse, False, limits)
    return out.astype(dtype), None if lse is None else lse.astype(dtype)


def _differentiable_by_jax_nn(dtype: np.dtype) -> bool:
    """Gradients of `jax.nn` multiply 16-bit with 32-bit floats, which fails to compile under strict promotion."""
    try:
        jnp.promote_types(dtype, jnp.float32)
    except ValueError:
        return dtype == jnp.float64
    return True


def _cudnn(call: Call, with_lse: bool) -> Computed:
    extras = [n for n in ("softcap", "sinks", "slopes") if getattr(call, n) is not None]
    if extras:
        raise UnsupportedError(f"cuDNN attention has no {extras[0]}: use implementation='xla'.")
    if (platform := _target.platform()) != "cuda":
        raise UnsupportedError(f"cuDNN needs a GPU; JAX runs on {platform!r}: use implementation='xla'.")
    if call.query.dtype not in (jnp.float16, jnp.bfloat16):
        raise UnsupportedError(f"cuDNN attention takes float16 and bfloat16, got {call.query.dtype}.")
    if call.query.size == 0 or call.key.shape[1] == 0:
        raise UnsupportedError("cuDNN attention takes no empty arrays.")
    try:
        return _jax_nn(call, with_lse, "cudnn")
    except (NotImplementedError, RuntimeError) as error:
        raise UnsupportedError(f"cuDNN cannot do this call: {error}") from error


def _jax_nn(call: Call, with_lse: bool, implementation: str) -> Computed:
    # jax.nn mixes dtypes and ranks on purpose; a caller's strict settings are about the caller's code.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        result = _JAX_NN(
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
