"""`H2O`: heavy hitters and recent tokens (Zhang et al., arXiv:2306.14048)."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from kvattn import _checks
from kvattn._typing import Array, Rows
from kvattn.errors import ConfigError, RangeError
from kvattn.policies import scored
from kvattn.policies.base import Policy, State


@dataclasses.dataclass(frozen=True)
class H2O(Policy):
    """Keeps the `num_recent` last tokens and the `num_heavy` older ones that received most attention so far.

    One new token: it is appended and attends to all that is kept, num_heavy + num_recent + 1 tokens at most; every
    kept token's score grows by the attention it received (its own included); then the one of lowest score leaves, the
    recent ones excepted. Of equal scores the lowest position leaves. Several new tokens attend densely, to what was
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

    needs_mass: ClassVar[bool] = True
    per_head: ClassVar[bool] = True

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

    def num_slots(self, capacity: int | None) -> int:
        """C: the budget and one slot for the token that comes."""
        if capacity is not None and _checks.integer("capacity", capacity, 1) < self.budget + 1:
            raise ConfigError(
                f"{self} holds num_heavy + num_recent + 1 = {self.budget + 1} tokens while it attends, got capacity "
                f"{capacity}: leave capacity None, or make the budget smaller."
            )
        return self.budget + 1

    def init(self, batch_size: int, num_kv_heads: int, num_slots: int) -> State:
        """All slots free."""
        return scored.Slots.empty(batch_size, num_kv_heads, num_slots, places=self.positions_in == "cache")

    def places(self, state: State) -> Array | None:
        """As remembered."""
        return state.places

    def fits(self, state: State, lengths: Array, num_new: Array, num_slots: int) -> Rows:
        """Always."""
        del state, lengths, num_slots
        return num_new >= 0

    def positions(self, state: State, lengths: Array, num_slots: int) -> Array:
        """As remembered."""
        del lengths, num_slots
        return state.positions

    def place(self, state: State, lengths: Array, num_new: Array, num_tokens: int, num_slots: int) -> Array:
        """The free slot."""
        del lengths, num_tokens, num_slots
        return scored.first_free(state.positions, num_new)

    def enter(self, state: State, slots: Array, lengths: Array, num_new: Array) -> State:
        """The new token starts without a score."""
        del num_new
        return scored.Slots(
            scored.enter(state.positions, slots, lengths[:, None]),
            scored.enter(state.scores, slots, jnp.zeros_like(lengths, jnp.float32)[:, None]),
            None if state.places is None else scored.enter_last(state.places, slots),
        )

    def observe(self, state, slots, lengths, num_new, num_slots, mass, token_ids) -> State:
        """Adds the attention received; evicts one token if all slots are taken."""
        del slots, token_ids, num_slots
        taken = state.positions >= 0
        scores = jnp.where(taken & (num_new > 0)[:, None, None], state.scores + mass, state.scores)
        full = jnp.all(taken, axis=-1, keepdims=True)
        old = state.positions <= (lengths + num_new - 1 - self.num_recent)[:, None, None]
        leaves = scored.lowest(scores, state.positions, taken & old) & full
        return scored.Slots(
            jnp.where(leaves, -1, state.positions),
            jnp.where(leaves, 0, scores),
            None if state.places is None else scored.close_up(state.places, leaves),
        )

    def absorb(self, state, lengths, num_new, num_tokens, num_slots, kept, new, token_ids):
        """Adds the attention received; keeps the recent tokens and the best of the others."""
        del token_ids
        chunk = scored.chunk_positions(lengths, num_new, num_tokens)
        scores = jnp.concatenate([state.scores + kept, new], axis=-1)
        here = jnp.broadcast_to(chunk[:, None], new.shape)
        positions = jnp.concatenate([state.positions, here], axis=-1)
        there = positions >= 0
        recent = there & (positions > (lengths + num_new - 1 - self.num_recent)[:, None, None])
        stay = recent | scored.best(scores, positions, there & ~recent, self.num_heavy)
        # While the budget is not used up nobody leaves.
        few = jnp.sum(there, axis=-1, keepdims=True) <= self.budget
        stay = jnp.where(few, there, stay)
        move, where = scored.settle(stay[..., :num_slots], stay[..., num_slots:])
        positions = move(state.positions, here, -1)
        places = None if state.places is None else scored.places(positions)
        return scored.Slots(positions, move(scores[..., :num_slots], new, 0), places), where

    def can_trim(self, state: State, lengths: Array, num_tokens: Array, num_slots: int) -> Rows:
        """Only by nothing: scores cannot be taken back."""
        del state, num_slots, lengths
        return num_tokens == 0
