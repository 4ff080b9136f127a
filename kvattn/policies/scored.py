"""What policies share that keep tokens by the attention they receive, other ones in every key/value head.

Slots hold any position and are freed one by one. In shapes, S = C + T: the slots, and the new tokens behind them.
"""

import dataclasses
import typing
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int32, Shaped

from kvattn import _checks
from kvattn._trees import Tree
from kvattn._typing import Array, Lengths, Rows
from kvattn.errors import ConfigError
from kvattn.masks import EMPTY
from kvattn.policies.base import NOWHERE, Context, Policy, taken


@typing.no_type_check
@dataclasses.dataclass(frozen=True, eq=False)
class ScoredState(Tree):
    """Base of the states: which token lies in which slot of every key/value head.

    Attributes:
        positions: int32 [B, K, C], EMPTY where free.
        cache_positions: int32 [B, K, C], how many kept tokens come before; None where that is not needed.
    """

    positions: Array
    cache_positions: Array | None

    def replace[S: ScoredState](self: S, **changes: Array | None) -> S:
        """The state with other arrays [B, K, ...]."""
        return dataclasses.replace(self, **changes)


class ScoredPolicy(Policy):
    """Base of the policies whose state is a `ScoredState`.

    They say how such a state begins (`init`), and what leaves after one new token (`observe`) and after several
    (`absorb`). Scores and the like are theirs.
    """

    needs_mass: ClassVar[bool] = True
    per_head: ClassVar[bool] = True

    def cache_positions(self, state: ScoredState) -> Int32[Array, "B K C"] | None:
        """As remembered."""
        return state.cache_positions

    def positions(self, state: ScoredState, lengths: Lengths, num_slots: int) -> Int32[Array, "B K C"]:
        """As remembered."""
        return state.positions

    def place(self, state: ScoredState, step: Context) -> Int32[Array, "B K 1"]:
        """A free slot."""
        return first_free(state.positions, step.num_new)

    def needed(self, state: ScoredState, step: Context) -> Bool[Array, "B K C"]:
        """The slots taken, and as many of the first free ones as tokens come."""
        free = state.positions < 0
        if step.num_tokens == 1:
            return ~free | taken(self.place(state, step), step.num_slots)
        return ~free | (jnp.cumsum(free, axis=-1, dtype=jnp.int32) <= step.num_new[:, None, None])

    def enter[S: ScoredState](self, state: S, slots: Int32[Array, "B K 1"], step: Context) -> S:
        """The new token has its position, and stands behind all others."""
        return state.replace(
            positions=put(state.positions, slots, step.lengths[:, None]),
            cache_positions=None if state.cache_positions is None else enter_last(state.cache_positions, slots),
        )

    def can_trim(self, state: ScoredState, lengths: Lengths, num_tokens: Lengths, num_slots: int) -> Rows:
        """Only by nothing: what attention has left behind cannot be taken back."""
        return num_tokens == 0


class BudgetPolicy(ScoredPolicy):
    """Base of those that keep at most `budget` tokens, as many in every head: these can stand in the cache's order."""

    budget: int
    positions_in: str

    budget_terms: ClassVar[str] = "budget"
    """How the budget follows from the settings."""

    def num_slots(self, capacity: int | None) -> int:
        """C: the budget and one slot for the token that comes."""
        if capacity is not None and _checks.integer("capacity", capacity, 1) < self.budget + 1:
            raise ConfigError(
                f"{self} holds {self.budget_terms} + 1 = {self.budget + 1} tokens while it attends, got capacity "
                f"{capacity}: leave capacity None, or make the budget smaller."
            )
        return self.budget + 1

    def free(
        self, batch_size: int, num_kv_heads: int, num_slots: int
    ) -> tuple[Int32[Array, "B K C"], Int32[Array, "B K C"] | None]:
        """Positions, and positions in the cache where they count, of slots that are all free."""
        free = jnp.full((batch_size, num_kv_heads, num_slots), EMPTY, jnp.int32)
        return free, jnp.copy(free) if self.positions_in == "cache" else None

    def fits(self, state: ScoredState, step: Context) -> Rows:
        """Always."""
        return step.num_new >= 0


def first_free(positions: Int32[Array, "B K C"], num_new: Int32[Array, " B"]) -> Int32[Array, "B K 1"]:
    """The first free slot where a token comes (`num_new` > 0), else NOWHERE."""
    free = positions < 0
    slot = jnp.argmax(free, axis=-1).astype(jnp.int32)
    ok = jnp.any(free, axis=-1) & (num_new > 0)[:, None]
    return jnp.where(ok, slot, NOWHERE)[..., None]


def put(
    values: Shaped[Array, "B K C"], slots: Int32[Array, "B K 1"], new: Shaped[Array, "#B #K"]
) -> Shaped[Array, "B K C"]:
    """The values with new ones in these slots; negative slots are left alone."""
    index = jnp.arange(values.shape[-1], dtype=jnp.int32)[None, None]
    return jnp.where(index == slots, new[..., None].astype(values.dtype), values)


def added(
    scores: Float[Array, "B K C"], mass: Float[Array, "B K C"], there: Bool[Array, "B K C"], step: Context
) -> Float[Array, "B K C"]:
    """The scores with the attention that one new token gave, where it came."""
    return jnp.where(there & (step.num_new > 0)[:, None, None], scores + mass, scores)


def joined(positions: Int32[Array, "B K C"], step: Context) -> Int32[Array, "B K S"]:
    """The positions in the slots, and behind them those of the new tokens."""
    new = jnp.broadcast_to(step.positions[:, None], (*positions.shape[:2], step.num_tokens))
    return jnp.concatenate([positions, new], axis=-1)


def cache_positions(positions: Int32[Array, "B K C"]) -> Int32[Array, "B K C"]:
    """How many kept tokens come before each one, EMPTY where free. Sorts: not for decode steps."""
    there = positions >= 0
    order = jnp.argsort(jnp.where(there, positions, jnp.iinfo(jnp.int32).max), axis=-1)
    return jnp.where(there, jnp.argsort(order, axis=-1).astype(jnp.int32), EMPTY)


def enter_last(before: Int32[Array, "B K C"], slots: Int32[Array, "B K 1"]) -> Int32[Array, "B K C"]:
    """`cache_positions` once a new token lies in its slot: it stands behind all others."""
    return put(before, slots, jnp.max(before, axis=-1) + 1)


def close_up(before: Int32[Array, "B K C"], leaves: Bool[Array, "B K C"]) -> Int32[Array, "B K C"]:
    """`cache_positions` once the token of at most one slot per head has left."""
    last = jnp.iinfo(jnp.int32).max
    gap = jnp.min(jnp.where(leaves, before, last), axis=-1, keepdims=True)
    return jnp.where(leaves, EMPTY, jnp.where(before > gap, before - 1, before))


def lowest(
    scores: Float[Array, "B K C"], positions: Int32[Array, "B K C"], candidates: Bool[Array, "B K C"]
) -> Bool[Array, "B K C"]:
    """The candidate of lowest score, of equal ones that of lowest position. One, if there is any."""
    return candidates & (positions == first(scores, positions, candidates)[1])


def first(
    scores: Float[Array, "B K C"], positions: Int32[Array, "B K C"], candidates: Bool[Array, "B K C"]
) -> tuple[Float[Array, "B K 1"], Int32[Array, "B K 1"]]:
    """(score, position) of the `lowest` candidate; infinity and the largest int32 where there is none.

    Scores are compared with each other, never with a copy: computed twice, a sum of floats need not be the same.
    """
    # NaN counts as lowest: such a token must not stay for ever.
    score = jnp.where(jnp.isnan(scores), -jnp.inf, jax.lax.stop_gradient(scores))
    last = jnp.iinfo(positions.dtype).max
    score, position = jnp.where(candidates, score, jnp.inf), jnp.where(candidates, positions, last)
    ends = jnp.array(jnp.inf, score.dtype), jnp.array(last, position.dtype)
    # A sixteenth of the rest in every round: CPUs reduce few rows of many neighbours several times as fast as one row.
    while (lanes := score.shape[-1] // 16) > 1:
        rows = [x[..., : 16 * lanes].reshape(*x.shape[:-1], 16, lanes) for x in (score, position)]
        firsts = jax.lax.reduce(tuple(rows), ends, _earlier, (positions.ndim - 1,))
        score, position = (
            jnp.concatenate([x, rest[..., 16 * lanes :]], axis=-1)
            for x, rest in zip(firsts, (score, position), strict=True)
        )
    score, position = jax.lax.reduce((score, position), ends, _earlier, (positions.ndim - 1,))
    return score[..., None], position[..., None]


def above(
    scores: Float[Array, "B K C"],
    positions: Int32[Array, "B K C"],
    candidates: Bool[Array, "B K C"],
    score: Float[Array, "B K 1"],
    position: Int32[Array, "B K 1"],
) -> Int32[Array, "B K 1"]:
    """How many candidates go after (score, position), which `first` found."""
    score_of = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    later = (score_of > score) | ((score_of == score) & (positions > position))
    return jnp.sum(candidates & later & (positions != position), axis=-1, keepdims=True, dtype=jnp.int32)


def _earlier(one: tuple[Array, Array], other: tuple[Array, Array]) -> tuple[Array, Array]:
    """Of two (score, position), each [B, K, ...], the one that goes first."""
    goes = (one[0] < other[0]) | ((one[0] == other[0]) & (one[1] <= other[1]))
    return jnp.where(goes, one[0], other[0]), jnp.where(goes, one[1], other[1])


def best(
    scores: Float[Array, "B K S"],
    positions: Int32[Array, "B K S"],
    candidates: Bool[Array, "B K S"],
    count: Int32[Array, "B #K 1"] | int,
) -> Bool[Array, "B K S"]:
    """The `count` candidates of highest score; of equal ones the lowest position goes first.

    What is left if `lowest` is taken away again and again. Sorts: for prompts, not for decode steps.
    """
    score = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    order = jnp.lexsort((jnp.where(candidates, positions, EMPTY), jnp.where(candidates, score, -jnp.inf), candidates))
    rank = jnp.argsort(order, axis=-1)
    return candidates & (rank >= scores.shape[-1] - count)


def settle(keep: Bool[Array, "B K S"], num_slots: int) -> tuple[Callable[..., Array], Int32[Array, "B K T"]]:
    """Frees slots and gives them to new tokens, in order.

    Args:
        keep: which tokens stay, of those in the slots and of the new ones; of these no more than there are free slots.
        num_slots: C.

    Returns:
        settled: a function (values [B, K, S, ...], empty) that gives the same for the slots, [B, K, C, ...];
        where each new token goes, NOWHERE if it does not stay.
    """
    stays, enters = keep[..., :num_slots], keep[..., num_slots:]
    free_first = jnp.argsort(stays, axis=-1, stable=True).astype(jnp.int32)
    nth = jnp.cumsum(enters, axis=-1, dtype=jnp.int32) - 1
    slots = jnp.take_along_axis(free_first, jnp.clip(nth, 0, num_slots - 1), axis=-1)
    slots = jnp.where(enters, slots, NOWHERE)
    b = jnp.arange(keep.shape[0], dtype=jnp.int32)[:, None, None]
    k = jnp.arange(keep.shape[1], dtype=jnp.int32)[None, :, None]
    target = jnp.where(slots < 0, num_slots, slots)  # past the end: dropped

    def settled(values: Array, empty: Array | int) -> Array:
        """[B, K, S, ...] -> [B, K, C, ...]."""
        old = jnp.where(stays.reshape(stays.shape + (1,) * (values.ndim - 3)), values[:, :, :num_slots], empty)
        return old.at[b, k, target].set(values[:, :, num_slots:], mode="drop")

    return settled, slots
