"""`StreamingLLM`: the first tokens and the last ones (Xiao et al., arXiv:2309.17453)."""

import dataclasses

import jax.numpy as jnp

from kvattn import _checks
from kvattn._typing import Array, Rows
from kvattn.errors import RangeError
from kvattn.masks import EMPTY, Mask
from kvattn.policies.base import NOWHERE, Policy, State


@dataclasses.dataclass(frozen=True)
class StreamingLLM(Policy):
    """Keeps the first `num_sinks` tokens and the last `window`; attends to nothing else.

    A query sees at most num_sinks + window tokens, its own included: the oldest token of the window leaves before the
    new one is attended to. Slot t for t < num_sinks, then a ring.

    Positions are those in the cache, as in the paper: once tokens have left, a sink is seen from the distance it has in
    the cache, not in the text. Keys stay rotated at their true positions and the query is rotated twice, which is the
    same by the relativity of RoPE; distances for ALiBi follow. ``positions_in="original"`` takes true positions.

    It does not extend the context: what has left the cache is gone.

    Args:
        num_sinks: first tokens kept, >= 0.
        window: last tokens kept, the query's own included, >= 1.
        positions_in: "cache" or "original".
    """

    num_sinks: int = 4
    window: int = 1020
    positions_in: str = dataclasses.field(default="cache", kw_only=True)

    def __post_init__(self):
        _checks.integer("num_sinks", self.num_sinks, 0)
        _checks.integer("window", self.window, 1, RangeError)
        _checks.one_of("positions_in", self.positions_in, ("cache", "original"))

    def mask(self) -> Mask:
        """Causal, the window and the sinks."""
        return Mask(window=self.window, num_sinks=self.num_sinks)

    def num_slots(self, capacity: int | None) -> int:
        """C: num_sinks + window, or the capacity where that is smaller."""
        full = self.num_sinks + self.window
        return full if capacity is None else min(_checks.integer("capacity", capacity, 1), full)

    def sink_positions(self, positions: Array) -> tuple[int, Array] | None:
        """To the sinks a query is at most at the end of the cache."""
        if self.positions_in == "original" or self.num_sinks == 0:
            return None
        return self.num_sinks, jnp.minimum(positions, self.num_sinks + self.window - 1)

    def fits(self, state: State, lengths: Array, num_new: Array, num_slots: int) -> Rows:
        """Always, unless the cache was made smaller than sinks and window."""
        if num_slots < self.num_sinks + self.window:
            return super().fits(state, lengths, num_new, num_slots)
        return num_new >= 0

    def place(self, state: State, lengths: Array, num_new: Array, num_tokens: int, num_slots: int) -> Array:
        """Sinks in their slots, the others in a ring behind them; of a long chunk only the last ones stay."""
        del state, num_slots
        t = jnp.arange(num_tokens, dtype=jnp.int32)[None]
        position = lengths[:, None] + t
        recent = t >= num_new[:, None] - self.window
        slot = jnp.where(position < self.num_sinks, position, self._ring_slot(position))
        return jnp.where((t < num_new[:, None]) & (recent | (position < self.num_sinks)), slot, NOWHERE)

    def positions(self, state: State, lengths: Array, num_slots: int) -> Array:
        """Position s in slot s < num_sinks; behind them the last position that maps to the slot."""
        del state
        slot = jnp.arange(num_slots, dtype=jnp.int32)[None]
        last = lengths[:, None] - 1
        in_ring = last - (last - slot) % self.window
        position = jnp.where(slot < self.num_sinks, jnp.where(slot <= last, slot, EMPTY), in_ring)
        return jnp.where(position >= jnp.minimum(slot, self.num_sinks), position, EMPTY)

    def can_trim(self, state: State, lengths: Array, num_tokens: Array, num_slots: int) -> Rows:
        """Only while nothing was overwritten."""
        del state
        return (lengths <= num_slots) | (num_tokens == 0)

    def _ring_slot(self, position: Array) -> Array:
        return self.num_sinks + (position - self.num_sinks) % self.window
