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
import numpy as np
from jaxtyping import Float32, Int32

from kvattn import _checks, _manual
from kvattn._checks import FLOAT32_MAX, FLOAT32_TINY
from kvattn._typing import Array, Rows
from kvattn.errors import ConfigError, DTypeError, RangeError

HostOrDevice = Array | np.ndarray
"""What programs are given [...]: the host makes it, the device hands it on."""

_MAX_SEED = 2**32 - 1
"""JAX takes the lower 32 bits of a seed: larger ones would silently be the same as smaller ones."""


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampler:
    """How the next token of every row is chosen: one number per row, or none for one sequence alone.

    All are traced: one program serves whatever mixture of rows. What no row asks for is not computed.

    Attributes:
        temperature: float32 [B]; 0 takes the most probable token.
        top_k: int32 [B], how many most probable tokens may be drawn, at most.
        top_p: float32 [B], in (0, 1], the probability of the nucleus. 1: all.
        seed: uint32 [B], of the draws.
        stream: uint32 [B], which of the seed's draws: rows of one seed that differ in it draw independently.
    """

    temperature: HostOrDevice
    top_k: HostOrDevice
    top_p: HostOrDevice
    seed: HostOrDevice
    stream: HostOrDevice

    @classmethod
    def create(
        cls, vocab_size: int, *, temperature: float, top_k: int | None, top_p: float | None, seed: int, stream: int = 0
    ) -> "Sampler":
        """Of one sequence. Checks the settings of `kvattn.generate`, whose meaning and errors are told there."""
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
        if temperature == 0 and (top_k is not None or top_p is not None):
            raise ConfigError(
                "top_k and top_p say what may be drawn, but at temperature 0 nothing is drawn: give a temperature "
                f"> 0 (1.0 for the model's own probabilities), or leave them out; got {top_k=}, {top_p=}."
            )
        return cls(
            np.array(temperature, np.float32),
            np.array(vocab_size if top_k is None else top_k, np.int32),
            np.array(1 if top_p is None else max(top_p, FLOAT32_TINY), np.float32),
            np.array(seed, np.uint32),
            np.array(stream, np.uint32),
        )

    def repeated(self, batch_size: int) -> "Sampler":
        """For B rows: those of one sequence, each row with a stream of its own, from this one's on."""
        rows = jax.tree.map(lambda x: np.full((batch_size,), x), self)
        return dataclasses.replace(rows, stream=rows.stream + np.arange(batch_size, dtype=np.uint32))


def choose(
    sampler: Sampler, logits: Float32[Array, "B V"], num_drawn: Int32[Array, " B"]
) -> tuple[Int32[Array, " B"], Rows]:
    """One token per row.

    Args:
        sampler: what to go by.
        logits: -inf for tokens that are never chosen.
        num_drawn: how many tokens every row drew before. A draw depends on the row's seed and stream, this, and the
            row's logits.

    Returns:
        the tokens; and False where logits are no distribution (NaN, +inf, or all of them -inf) and the token means
        nothing.
    """
    best = jnp.max(logits, axis=-1, keepdims=True)
    most_probable = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    draws = sampler.temperature > 0
    token = _manual.cond(
        jnp.any(draws),
        lambda *given: jnp.where(draws, _drawn(*given), most_probable),
        lambda *given: most_probable,
        *(sampler, logits, best, num_drawn),
    )
    return token, jnp.isfinite(best[:, 0])


def log_probability(logits: Float32[Array, "*B V"], token: Int32[Array, "*B"]) -> Float32[Array, "*B"]:
    """Of one token by the logits themselves, whatever is drawn; NaN where they are no distribution."""
    best = jnp.max(logits, axis=-1)
    total = jnp.sum(jnp.exp(logits - best[..., None]), axis=-1)
    own = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
    return jnp.where(jnp.isfinite(best), own - best - jnp.log(total), jnp.nan)


def _drawn(
    sampler: Sampler, logits: Float32[Array, "B V"], best: Float32[Array, "B 1"], num_drawn: Int32[Array, " B"]
) -> Int32[Array, " B"]:
    """A draw of every row from what its filters leave; rows at temperature 0 draw at 1."""
    draws = sampler.temperature > 0
    # Relative to the best one nothing overflows, however low the temperature.
    scores = (logits - best) / jnp.where(draws, sampler.temperature, 1.0)[:, None]
    top_k, top_p = sampler.top_k[:, None], sampler.top_p[:, None]

    def most_probable(scores: Array) -> Array:
        """By the logits: at high temperatures scores [B, V] are rounded together. Temperature changes no order."""
        keep = best_reaching(logits, jnp.ones_like(logits), top_k.astype(jnp.float32))
        return jnp.where(keep, scores, -jnp.inf)

    def nucleus(scores: Array) -> Array:
        """Of scores [B, V]; where all is left not even a rounding error makes a difference."""
        keep = best_reaching(scores, jax.nn.softmax(scores, axis=-1), top_p)
        return jnp.where(keep | (top_p == 1), scores, -jnp.inf)

    same = lambda scores: scores
    scores = _manual.cond(jnp.any(draws & (sampler.top_k < logits.shape[1])), most_probable, same, scores)
    scores = _manual.cond(jnp.any(draws & (sampler.top_p < 1)), nucleus, same, scores)

    def one(seed: HostOrDevice, stream: HostOrDevice, number: Array, scores: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), number)
        return jax.random.categorical(key, scores)

    return jax.vmap(one)(sampler.seed, sampler.stream, num_drawn, scores).astype(jnp.int32)


def best_reaching(scores: Array, weights: Array, target: HostOrDevice) -> Array:
    """The smallest set of best scores whose weights add up to `target`; all, if no set does.

    Equal scores are taken in order, lower indices first. The lowest score taken is found bit by bit, in 32 passes:
    for the nucleus of 131072 tokens about six times faster on a CPU than sorting them.

    Args:
        scores: float32 [B, V], no NaN.
        weights: float32 [B, V], >= 0, the same for equal scores.
        target: float32 [] or [B, 1], > 0.

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
