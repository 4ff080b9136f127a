"""`SlidingWindow`: keep the last tokens in a ring (Mistral 7B, arXiv:2310.06825)."""

import dataclasses

import jax.numpy as jnp

from kvattn import _checks
from kvattn._typing import Array, Rows
from kvattn.errors import ConfigError, RangeError
from kvattn.masks import EMPTY, Mask
from kvattn.policies.base import NOWHERE, Policy, State


def slots_for(policy: Policy, wanted: int, capacity: int | None) -> int:
    """The slots a policy wants, or the capacity where that is smaller."""
    if capacity is not None:
        return min(_checks.integer("capacity", capacity, 1), wanted)
    if wanted > _checks.INT32_MAX:
        raise ConfigError(f"{policy} would hold {wanted} tokens, more than int32 counts: give the cache a capacity.")
    return wanted


@dataclasses.dataclass(frozen=True)
class SlidingWindow(Policy):
    """Keeps and attends the last `window` tokens, the query's own included.

    The token of position t lies in slot t mod C. The cache holds `window` slots, or fewer when a
    capacity below the window says that no sequence gets longer than that: such a ring never turns,
    and appending past the capacity is an error.

    Args:
        window: tokens a query attends to, its own included; >= 1.
    """

    window: int

    def __post_init__(self):
        _checks.integer("window", self.window, 1, RangeError)

    def mask(self) -> Mask:
        """Causal, within the window."""
        return Mask(window=min(self.window, _checks.INT32_MAX))  # no sequence is longer

    def num_slots(self, capacity: int | None) -> int:
        """C: the window, or the capacity where that is smaller."""
        return slots_for(self, self.window, capacity)

    def fits(self, state: State, lengths: Array, num_new: Array, num_slots: int) -> Rows:
        """Always, unless the ring was made smaller than the window."""
        if num_slots < self.window:
            return super().fits(state, lengths, num_new, num_slots)
        return num_new >= 0

    def place(self, state: State, lengths: Array, num_new: Array, num_tokens: int, num_slots: int) -> Array:
        """Slot t mod C; of a chunk longer than the ring only the last C tokens are kept."""
        del state
        t = jnp.arange(num_tokens, dtype=jnp.int32)[None]
        stays = (t < num_new[:, None]) & (t >= num_new[:, None] - num_slots)
        return jnp.where(stays, (lengths[:, None] + t) % num_slots, NOWHERE)

    def positions(self, state: State, lengths: Array, num_slots: int) -> Array:
        """Slot s holds the last position below `lengths` that equals s modulo C."""
        del state
        slot = jnp.arange(num_slots, dtype=jnp.int32)[None]
        last = lengths[:, None] - 1
        position = last - (last - slot) % num_slots
        return jnp.where(position >= 0, position, EMPTY)

    def kept(self, state: State, lengths: Array, num_slots: int) -> Array:
        """int32 [B]: min(tokens seen, C)."""
        del state
        return jnp.minimum(lengths, num_slots)

    def can_trim(self, state: State, lengths: Array, num_tokens: Array, num_slots: int) -> Rows:
        """Only while nothing was overwritten: a ring that has turned has lost the older tokens."""
        del state
        return (lengths <= num_slots) | (num_tokens == 0)
