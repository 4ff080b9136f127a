"""What a policy is: which tokens a cache keeps, and in which slots.

A policy is a frozen dataclass of settings plus pure functions over positions. It never sees keys,
values, a cache class, a codec or a mesh, so one policy works with every storage. What it has to
remember between steps is its state, a pytree that the cache carries along.

One step of the cache asks, in this order::

    fits      may these tokens be appended at all?
    place     in which slots do they go?            (one new token: before attending)
    absorb    the same, knowing the attention mass  (several new tokens: after attending)
    observe   look at the attention mass, evict
"""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp

from kvattn import _checks
from kvattn._typing import Array, Rows
from kvattn.errors import ConfigError
from kvattn.masks import Mask

NOWHERE = -1
"""The slot of a token that is not kept."""

State = Any


@dataclasses.dataclass(frozen=True)
class Policy:
    """Base of the policies. Subclasses override what differs from keeping everything.

    In every method: `lengths` int32 [B] are the tokens seen so far, `num_new` int32 [B] the real
    tokens among the `num_tokens` that come, `num_slots` is C.
    """

    needs_mass: ClassVar[bool] = False
    """Whether `absorb` and `observe` want the attention each slot received."""

    per_head: ClassVar[bool] = False
    """Whether key/value heads keep different tokens: slots and positions then carry a K axis."""

    def mask(self) -> Mask:
        """The rule a query of this policy attends by."""
        return Mask()

    def num_slots(self, capacity: int | None) -> int:
        """C, the slots a cache of `capacity` tokens needs under this policy."""
        if capacity is None:
            raise ConfigError(f"{type(self).__name__} keeps every token: give the cache a capacity.")
        return _checks.integer("capacity", capacity, 1)

    def init(self, batch_size: int, num_kv_heads: int, num_slots: int) -> State:
        """The state of an empty cache; its arrays have B as their first axis."""
        del batch_size, num_kv_heads, num_slots
        return ()

    def fits(self, state: State, lengths: Array, num_new: Array, num_slots: int) -> Rows:
        """bool [B]: whether the tokens can be appended without losing one that is still needed."""
        del state
        return lengths + num_new <= num_slots

    def place(self, state: State, lengths: Array, num_new: Array, num_tokens: int, num_slots: int) -> Array:
        """int32 [B, T] (or [B, K, T]): the slot of each new token, NOWHERE for those not kept."""
        del state, num_slots
        t = jnp.arange(num_tokens, dtype=jnp.int32)[None]
        return jnp.where(t < num_new[:, None], lengths[:, None] + t, NOWHERE)

    def absorb(
        self,
        state: State,
        lengths: Array,
        num_new: Array,
        num_tokens: int,
        num_slots: int,
        kept_mass: Array | None,
        new_mass: Array | None,
    ) -> tuple[State, Array]:
        """`place` for several tokens at once, after attending; may evict.

        Args:
            state: the state before the tokens came.
            lengths: int32 [B].
            num_new: int32 [B].
            num_tokens: T.
            num_slots: C.
            kept_mass: float32 [B, K, C], attention the kept tokens received from the new queries, or None.
            new_mass: float32 [B, K, T], attention the new tokens received, or None.

        Returns:
            the new state and the slots, as `place`.
        """
        del kept_mass, new_mass
        return state, self.place(state, lengths, num_new, num_tokens, num_slots)

    def observe(self, state: State, lengths: Array, num_new: Array, num_slots: int, mass: Array | None) -> State:
        """After one new token: `mass` float32 [B, K, C] is the attention each slot received from it."""
        del lengths, num_new, num_slots, mass
        return state

    def positions(self, state: State, lengths: Array, num_slots: int) -> Array:
        """int32 [B, C] (or [B, K, C]): the position of the token each slot holds, EMPTY if none."""
        del state
        slot = jnp.arange(num_slots, dtype=jnp.int32)[None]
        return jnp.where(slot < lengths[:, None], slot, -1)

    def kept(self, state: State, lengths: Array, num_slots: int) -> Array:
        """int32 [B] (or [B, K]): tokens kept."""
        return jnp.sum(self.positions(state, lengths, num_slots) >= 0, axis=-1, dtype=jnp.int32)

    def can_trim(self, state: State, lengths: Array, num_tokens: Array, num_slots: int) -> Rows:
        """bool [B]: whether the last `num_tokens` can be taken back as if they had never come."""
        del state, num_slots
        return jnp.ones_like(lengths, bool) & (num_tokens >= 0)

    def trim(self, state: State, lengths: Array, num_tokens: Array, num_slots: int) -> State:
        """The state after the last `num_tokens` are taken back."""
        del lengths, num_tokens, num_slots
        return state
