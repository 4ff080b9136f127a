"""`H2O`: heavy hitters and recent tokens (Zhang et al., arXiv:2306.14048)."""

import dataclasses
import typing
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int32

from kvattn import _checks
from kvattn._trees import portable
from kvattn._typing import Array
from kvattn.errors import RangeError
from kvattn.masks import EMPTY
from kvattn.policies import scored
from kvattn.policies.base import Context
from kvattn.policies.registry import register


@typing.no_type_check
@portable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Scores(scored.ScoredState):
    """Which token lies in which slot, and its score.

    Attributes:
        scores: float32 [B, K, C], attention received so far.
    """

    scores: Array


@dataclasses.dataclass(frozen=True)
class H2O(scored.BudgetPolicy):
    """Keeps the `num_recent` last tokens and the `num_heavy` older ones that received most attention so far.

    One new token: it is appended and attends to all that is kept, num_heavy + num_recent + 1 tokens at most; every
    kept token's score grows by the attention it received (its own included); then the one of lowest score leaves, the
    recent ones excepted. Among equal scores the lowest position leaves. Several new tokens attend densely, to what was
    kept and to each other, their attention is added up, and the best of all stay.

    Scores are float32 sums of probabilities, taken over the query heads of the group, per key/value head. Per layer and
    head, as in the authors' code; unlike there, rows of a batch do not share their scores.

    Positions are true ones, as in the authors' `H2OLlamaAttention`; with ``positions_in="cache"`` those in the cache,
    as in their `H2OLlamaAttention_streaming`: the n kept tokens stand at 0 ... n - 1. Keys are then stored as they come
    and rotated whenever they are read, which costs time.

    Args:
        num_heavy: heavy hitters kept, >= 0.
        num_recent: recent tokens kept, >= 0; at least one of both.
        positions_in: "original" or "cache".
    """

    num_heavy: int
    num_recent: int
    positions_in: str = dataclasses.field(default="original", kw_only=True)

    budget_terms: ClassVar[str] = "num_heavy + num_recent"

    def __post_init__(self):
        _checks.integer("num_heavy", self.num_heavy, 0, RangeError)
        _checks.integer("num_recent", self.num_recent, 0, RangeError)
        _checks.one_of("positions_in", self.positions_in, ("original", "cache"))
        if self.budget < 1:
            raise RangeError("H2O must keep something: num_heavy + num_recent must be >= 1, got 0.")

    @property
    def budget(self) -> int:
        """Tokens kept between two steps."""
        return self.num_heavy + self.num_recent

    def init(self, batch_size: int, num_kv_heads: int, num_slots: int) -> Scores:
        """All slots free."""
        shape = (batch_size, num_kv_heads, num_slots)
        return Scores(*self.free(*shape), jnp.zeros(shape, jnp.float32))

    def enter(self, state: Scores, slots: Int32[Array, "B K 1"], step: Context) -> Scores:
        """The new token starts without a score."""
        return super().enter(state, slots, step).replace(scores=scored.put(state.scores, slots, jnp.zeros((1, 1))))

    def observe(
        self, state: Scores, slots: Int32[Array, "B K 1"], mass: Float[Array, "B K C"], step: Context
    ) -> Scores:
        """Adds the attention received; evicts one token if all slots are taken."""
        there = state.positions >= 0
        scores = scored.added(state.scores, mass, there, step)
        full = jnp.all(there, axis=-1, keepdims=True)
        old = state.positions <= (step.last - self.num_recent)[:, None, None]
        leaves = scored.lowest(scores, state.positions, there & old) & full
        before = state.cache_positions
        return Scores(
            jnp.where(leaves, EMPTY, state.positions),
            None if before is None else scored.close_up(before, leaves),
            jnp.where(leaves, 0, scores),
        )

    def absorb(
        self, state: Scores, kept: Float[Array, "B K C"], new: Float[Array, "B K T"], step: Context
    ) -> tuple[Scores, Int32[Array, "B K T"]]:
        """Adds the attention received; keeps the recent tokens and the best of the others."""
        scores = jnp.concatenate([state.scores + kept, new], axis=-1)
        positions = scored.joined(state.positions, step)
        there = positions >= 0
        recent = there & (positions > (step.last - self.num_recent)[:, None, None])
        stay = recent | scored.best(scores, positions, there & ~recent, self.num_heavy)
        # While the budget is not used up nobody leaves.
        few = jnp.sum(there, axis=-1, keepdims=True) <= self.budget
        settled, slots = scored.settle(jnp.where(few, there, stay), step.num_slots)
        positions = settled(positions, EMPTY)
        before = None if state.cache_positions is None else scored.cache_positions(positions)
        return Scores(positions, before, settled(scores, 0)), slots


def _levers(length: int) -> list[tuple[str, H2O]]:
    tenth = max(length // 10, 1)
    return [(f"H2O({tenth}, {tenth}): 20 %", H2O(tenth, tenth))]


register(H2O, "h2o", levers=_levers, examples=[H2O(4, 3), H2O(4, 3, positions_in="cache")])
