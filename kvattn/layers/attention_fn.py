"""The `attention_fn` of the layers: Flax's calling convention over `kvattn.attend.full`, and what foreign ones get."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
from flax import nnx
from flax.nnx.nn import dtypes
from jax.typing import ArrayLike, DTypeLike

from kvattn._typing import Array
from kvattn.attend import full
from kvattn.errors import ConfigError
from kvattn.layers import arguments, masking, originals, placement
from kvattn.layers.settings import AttentionSettings
from kvattn.positions import RoPE

Attention = Callable[..., Array]


@runtime_checkable
class Sows(Protocol):
    """What keeps attention weights [..., N, T, S]: an NNX module, or what stands for one."""

    def sow(self, variable_type: Any, name: str, value: Any, /) -> Any:
        """Keeps a value."""
        ...


def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
    module: Sows | None = None,
    promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
    is_causal: bool = False,
    *,
    window: int | None = None,
    scale: float | Array | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
    alibi_slopes: Array | None = None,
    implementation: str | Sequence[str] | None = None,
) -> Array:
    """Attention with the call of `flax.nnx.dot_product_attention`, which it can stand in for, and additions.

    Scores and softmax are float32 with or without dropout, and `module` (which receives the weights)
    changes nothing in the output.

    Args:
        query: [..., T, N, H] with any number of batch axes.
        key: [..., S, K, H], K dividing N.
        value: [..., S, K, Hv].
        bias: added to the scores, broadcastable to [..., N, T, S].
        mask: True or nonzero where attending is allowed, broadcastable to [..., N, T, S]. Numbers to be added are
            `bias`: a negative entry is an error, and in `jax.jit` makes its row of the batch NaN.
        broadcast_dropout: one dropout mask for all batch rows and heads.
        dropout_rng: a PRNG key; needed where `dropout_rate` > 0 and not `deterministic`.
        dropout_rate: the share of weights set to zero.
        deterministic: no dropout.
        dtype: the dtype to compute in; that of the inputs if None.
        precision: precision of the matrix products.
        module: sows the weights [..., N, T, S] as `nnx.Intermediate` "attention_weights".
        promote_dtype: brings the inputs to `dtype`.
        is_causal: query t sees the keys 0 to t.
        window: query t sees the keys t - window + 1 to t.
        scale: multiplies the scores; 1/√H if None.
        softcap: caps the scores.
        sinks: float[N], a logit per head that joins the softmax sum only.
        alibi_slopes: float32[N].
        implementation: as in `kvattn.dot_product_attention`.

    Returns:
        [..., T, N, Hv].

    Raises:
        ShapeError: shapes that do not fit each other.
        RangeError: a dropout rate outside [0, 1); a mask with a negative entry, where that can be seen.
        DTypeError: a mask that holds neither bools nor numbers; a bias of bools.
        ConfigError: dropout without a key.

    Example:
        >>> import jax.numpy as jnp
        >>> from kvattn.layers import dot_product_attention
        >>> q, k = jnp.ones((2, 5, 8, 16)), jnp.ones((2, 7, 2, 16))
        >>> dot_product_attention(q, k, k).shape
        (2, 5, 8, 16)
    """
    arguments.dropout_rate(dropout_rate)
    dropping = dropout_rate > 0.0 and not deterministic
    if dropping and dropout_rng is None:
        raise ConfigError("dropout_rng is required when dropout_rate > 0 and deterministic=False.")
    query, key, value = promote_dtype((query, key, value), dtype=dtype)
    mask, spoiled = masking.as_bool(mask, query.ndim)
    key, value = placement.beside(query, key, value)
    out, weights = full.attend(
        query,
        key,
        value,
        bias=bias,
        mask=mask,
        is_causal=is_causal,
        window=window,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        dropout_rate=dropout_rate,
        dropout_rng=dropout_rng if dropping else None,
        broadcast_dropout=broadcast_dropout,
        precision=precision,
        return_weights=module is not None,
        implementation=implementation,
    )
    if module is not None and weights is not None:
        module.sow(nnx.Intermediate, "attention_weights", weights.astype(query.dtype))
    return masking.spoil(out, spoiled)


def resolve(settings: AttentionSettings, attention_fn: Attention) -> tuple[AttentionSettings, Attention]:
    """The attention function of an NNX layer, and the settings with the rotary embedding that was inside it.

    Flax's own function becomes this module's, and so does `kvattn.dot_product_attention`, which means the same.
    `functools.partial(nnx.dot_product_attention_with_rope, rope=...)`, which would turn cached keys again at every
    step, is taken apart: its rotation joins the settings.
    """
    if attention_fn is originals.nnx_attention or attention_fn is full.dot_product_attention:
        return settings, dot_product_attention
    rope, attention_fn = _without_rope(attention_fn, settings.head_dims[0])
    if rope is not None and settings.rope is None:
        settings = dataclasses.replace(settings, rope=rope)
    return settings, attention_fn


@functools.lru_cache(maxsize=256)
def _without_rope(attention_fn: Attention, head_dim: int) -> tuple[RoPE | None, Attention]:
    with_rope = originals.attention_with_rope
    if isinstance(attention_fn, functools.partial) and attention_fn.func is with_rope and not attention_fn.args:
        keywords = dict(attention_fn.keywords)
        rope = keywords.pop("rope", None)
        if rope is not None:
            plain = functools.partial(dot_product_attention, **keywords) if keywords else dot_product_attention
            return RoPE(head_dim, theta=rope.theta), plain
    return None, attention_fn


def call(
    attention_fn: Attention,
    settings: AttentionSettings,
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: ArrayLike | None,
    bias: Array | None = None,
    is_causal: bool = False,
    input_positions: ArrayLike | None = None,
    sinks: Array | None,
    dropout_rng: Array | None,
    module: Sows | None,
) -> Array:
    """Calls a resolved `attention_fn` with Flax's arguments, and those additions that are set.

    Queries are [..., T, N, H], keys [..., S, K, H], values [..., S, K, Hv], the output is [..., T, N, Hv].

    A window becomes part of the mask where the function does not say that it takes one.
    """
    additions = {
        "bias": bias,
        "window": settings.window,
        "scale": settings.scale,
        "softcap": settings.softcap,
        "alibi_slopes": settings.slopes,
        "sinks": sinks,
        "input_positions": None if attention_fn is dot_product_attention else input_positions,
    }
    spoiled = None
    if settings.window is not None and not takes(attention_fn, "window"):
        additions["window"] = None
        mask, spoiled = masking.with_window(mask, query, key, settings.window)
    x = attention_fn(
        query,
        key,
        value,
        mask=mask,
        dropout_rng=dropout_rng,
        dropout_rate=settings.dropout_rate,
        broadcast_dropout=settings.broadcast_dropout,
        deterministic=dropout_rng is None,
        dtype=settings.dtype,
        precision=settings.precision,
        module=module,
        is_causal=is_causal,
        **{name: value for name, value in additions.items() if value is not None},
    )
    return masking.spoil(x, spoiled)


def dropout_key(
    settings: AttentionSettings, deterministic: bool | None, rngs: nnx.Rngs | nnx.RngStream | None
) -> Array | None:
    """A key [] for the dropout of an NNX layer, or None where nothing is dropped.

    Raises:
        ConfigError: nothing says whether to drop, or where to draw from.
    """
    if settings.dropout_rate == 0.0:
        return None
    if deterministic is None:
        raise ConfigError(
            "No `deterministic` argument was provided to MultiHeadAttention as either a __call__ argument, "
            "class attribute, or nnx.flag."
        )
    if deterministic:
        return None
    if rngs is None:
        raise ConfigError(
            "'rngs' must be provided to __call__ method if MultiHeadAttention instance is defined with keep_rngs=False."
        )
    return rngs.dropout() if isinstance(rngs, nnx.Rngs) else rngs()


@functools.lru_cache(maxsize=256)
def accepted_arguments(attention_fn: Attention) -> frozenset[str] | None:
    """The keyword arguments a function takes; None if it takes any."""
    parameters = inspect.signature(attention_fn).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters)


def check_additions(settings: AttentionSettings, attention_fn: Attention, sinks: bool) -> None:
    """Checks that a foreign `attention_fn` can be given what an NNX layer adds to Flax's.

    Raises:
        ConfigError: it has no argument for an addition that is set. (A window needs none: it becomes a mask.)
    """
    settings, attention_fn = resolve(settings, attention_fn)
    known = accepted_arguments(attention_fn)
    needed = [name for name in ("scale", "softcap", "alibi_slopes") if getattr(settings, name) is not None]
    needed += ["sinks"] if sinks else []
    missing = [] if known is None else [name for name in needed if name not in known]
    if missing:
        raise ConfigError(
            f"attention_fn has no argument {missing[0]!r}, which this layer needs: leave attention_fn out, "
            f"or give it the arguments {', '.join(missing)}."
        )


def takes(attention_fn: Attention, name: str) -> bool:
    """True where a function says that it takes the keyword argument `name`."""
    known = accepted_arguments(attention_fn)
    return known is not None and name in known
