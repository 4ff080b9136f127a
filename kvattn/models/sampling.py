"""How the next token is chosen from its logits: the most probable one, or a draw from those that filters leave.

Filters are applied in the order of `transformers`: temperature, then `top_k`, then `top_p`. They differ from it where
logits tie: of equal ones those of lower id stay, so that exactly `top_k` stay and `top_k=1` is the greedy choice.
"""

import dataclasses
import math
import numbers
import typing

import jax
import jax.numpy as jnp

from kvattn import _checks, _manual
from kvattn._checks import FLOAT32_MAX, FLOAT32_TINY
from kvattn._typing import Array
from kvattn.errors import ConfigError, DTypeError, RangeError

_MAX_SEED = 2**32 - 1
"""JAX takes the lower 32 bits of a seed: larger ones would silently be the same as smaller ones."""


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampler:
    """What a choice goes by. All are traced, so other values need no other program; None leaves a part of it out.

    Attributes:
        key: of all draws. None, as the rest: the most probable token is taken.
        temperature: float32 [], > 0.
        top_k: float32 [], a whole number of tokens. None: all.
        top_p: float32 [], in (0, 1). None: all.
    """

    key: Array | None = None
    temperature: Array | None = None
    top_k: Array | None = None
    top_p: Array | None = None

    @classmethod
    def create(
        cls, vocab_size: int, *, temperature: float, top_k: int | None, top_p: float | None, seed: int
    ) -> "Sampler":
        """Checks the settings of `kvattn.generate`, whose meaning and errors are told there."""
        if _checks.integer("seed", seed, 0, RangeError) > _MAX_SEED:
            raise RangeError(f"seed must lie in [0, 2**32), got {seed}.")
        _number("temperature", temperature)
        if not (temperature == 0 or FLOAT32_TINY <= temperature <= FLOAT32_MAX):
            raise RangeError(
                f"temperature must be 0, or finite and at least {FLOAT32_TINY:.1e} (normal in float32), got "
                f"{temperature}."
            )
        if top_k is not None and not 1 <= _checks.integer("top_k", top_k, 1, RangeError) <= vocab_size:
            raise RangeError(f"top_k must lie in [1, {vocab_size}], the size of the vocabulary, got {top_k}.")
        if top_p is not None:
            _number("top_p", top_p)
            if not 0 < top_p <= 1:
                raise RangeError(
                    f"top_p must lie in (0, 1], got {top_p}. For the most probable token leave it out and give "
                    "temperature=0."
                )
        if temperature == 0:
            if top_k is not None or top_p is not None:
                raise ConfigError(
                    "top_k and top_p say what may be drawn, but at temperature 0 nothing is drawn: give a temperature "
                    f"> 0 (1.0 for the model's own probabilities), or leave them out; got {top_k=}, {top_p=}."
                )
            return cls()
        # What would leave every token is left out: not even a rounding error may make a difference.
        top_k = None if top_k == vocab_size else top_k
        top_p = None if top_p is None or jnp.float32(top_p) == 1 else top_p
        scalar = lambda x: None if x is None else jnp.asarray(float(x), jnp.float32)
        return cls(jax.random.key(seed), scalar(temperature), scalar(top_k), scalar(top_p))


def choose(sampler: Sampler, logits: Array, num_drawn: Array) -> tuple[Array, Array]:
    """One token per row.

    Args:
        sampler: what to go by.
        logits: float32 [B, V]; -inf for tokens that are never chosen.
        num_drawn: int32 [], how many tokens every row drew before. A draw depends on the key, the row's number, this,
            and the row's logits.

    Returns:
        int32 [B], the tokens; and bool [B], False where logits are no distribution (NaN, +inf, or all of them -inf)
        and the token means nothing.
    """
    best = jnp.max(logits, axis=-1, keepdims=True)
    sound = jnp.isfinite(best[:, 0])
    key, temperature = sampler.key, sampler.temperature
    if key is None or temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), sound
    # Relative to the best one nothing overflows, however low the temperature.
    scores = (logits - best) / temperature
    if sampler.top_k is not None:
        # By the logits: at high temperatures scores are rounded together. Temperature changes no order.
        keep = best_reaching(logits, jnp.ones_like(logits), sampler.top_k)
        scores = jnp.where(keep, scores, -jnp.inf)
    if sampler.top_p is not None:
        keep = best_reaching(scores, jax.nn.softmax(scores, axis=-1), sampler.top_p)
        scores = jnp.where(keep, scores, -jnp.inf)
    rows = jnp.arange(logits.shape[0], dtype=jnp.int32)
    keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row), num_drawn))(rows)
    return jax.vmap(jax.random.categorical)(keys, scores).astype(jnp.int32), sound


def best_reaching(scores: Array, weights: Array, target: Array) -> Array:
    """The smallest set of best scores whose weights add up to `target`; all, if no set does.

    Equal scores are taken in order, lower indices first. The lowest score taken is found bit by bit, in 32 passes:
    for the nucleus of 131072 tokens about six times faster on a CPU than sorting them.

    Args:
        scores: float32 [B, V], no NaN.
        weights: float32 [B, V], >= 0, the same for equal scores.
        target: float32 [], > 0.

    Returns:
        bool [B, V].
    """
    # Positive floats are ordered as their bits are, negative ones the other way round; -0 is 0.
    bits = jax.lax.bitcast_convert_type(jnp.where(scores == 0, 0.0, scores), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    order = jnp.where(bits < sign, bits | sign, ~bits)
    # Every best token weighs more than this.
    target = jnp.maximum(target, FLOAT32_TINY)

    def weight(taken: Array) -> Array:
        """Of tokens [B, V] that are taken: [B, 1]."""
        return jnp.sum(jnp.where(taken, weights, 0), axis=-1, keepdims=True)

    def refine(i: Array, lowest: Array) -> Array:
        """The i-th bit of uint32 [B, 1], from the top."""
        higher = lowest | (sign >> i)
        return jnp.where(weight(order >= higher) >= target, higher, lowest)

    lowest = jnp.zeros((scores.shape[0], 1), jnp.uint32)
    lowest = _manual.fori_loop(jnp.uint32(0), jnp.uint32(32), refine, lowest)
    above, tied = order > lowest, order == lowest
    tied_before = jnp.cumsum(tied, axis=-1, dtype=jnp.float32) - 1
    return above | (tied & (weight(above) + tied_before * weights < target))


def _number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise DTypeError(f"{name} must be a number, got {value!r}.")
    if not math.isfinite(value):
        raise RangeError(f"{name} must be finite, got {value}.")
