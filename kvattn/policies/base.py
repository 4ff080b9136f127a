"""What a policy is: which tokens a cache keeps, and in which slots.

A policy is a frozen dataclass of settings plus pure functions over positions. It never sees keys,
values, a cache class, a codec or a mesh, so one policy works with every storage. What it has to
remember between steps is its state, a pytree that the cache carries along.

One step of the cache asks, in this order::

    fits             may these tokens be appended at all?
    place, observe   one new token: its slot, before attending; then what it attended to: score, evict
    measure, absorb  several new tokens: what they attended to; then score, evict, and their slots
"""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp

from kvattn import _checks
from kvattn._typing import Array, Rows
from kvattn.errors import ConfigError
from kvattn.masks import EMPTY, Mask

NOWHERE = -1
"""The slot of a token that is not kept."""

State = Any


@dataclasses.dataclass(frozen=True)
class Policy:
    """Base of the policies. Subclasses override what differs from keeping everything.

    In every method: `lengths` int32 [B] are the tokens seen so far, `num_new` int32 [B] the real
    tokens among the T that come, `num_slots` is C, `token_ids` int32 [B, T] or None.
    """

    needs_mass: ClassVar[bool] = False
    """Whether `absorb` and `observe` want the attention that slots received."""

    measures_sums: ClassVar[bool] = True
    """Whether `measure` adds attention up: of several heads it may then be taken one by one, and averaged."""

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
        """The state of an empty cache; its arrays have B as their first axis, then K where heads differ."""
        del batch_size, num_kv_heads, num_slots
        return ()

    def sink_positions(self, positions: Array) -> tuple[int, Array] | None:
        """For policies whose first tokens are seen from another distance than their true one.

        Args:
            positions: int32 [B, T], the true positions of the queries.

        Returns:
            None, or (n, positions): to the first n tokens of the sequence the query is at these positions.
        """
        del positions
        return None

    def places(self, state: State) -> Array | None:
        """For policies whose tokens are all seen from where they stand in the cache.

        Returns:
            None; or int32 [B, K, C]: how many kept tokens come before that of each slot, EMPTY where there is none.
            All heads of a row keep equally many.
        """
        del state
        return None

    def fits(self, state: State, lengths: Array, num_new: Array, num_slots: int) -> Rows:
        """bool [B]: whether the tokens can be appended without losing one that is still needed."""
        del state
        return lengths + num_new <= num_slots

    def place(self, state: State, lengths: Array, num_new: Array, num_tokens: int, num_slots: int) -> Array:
        """int32 [B, T] (or [B, K, T]): the slot of each new token, NOWHERE for those not kept."""
        del state, num_slots
        t = jnp.arange(num_tokens, dtype=jnp.int32)[None]
        return jnp.where(t < num_new[:, None], lengths[:, None] + t, NOWHERE)

    def enter(self, state: State, slots: Array, lengths: Array, num_new: Array) -> State:
        """The state once one new token (T = 1) lies in its slot, before it is attended to."""
        del slots, lengths, num_new
        return state

    def observe(
        self,
        state: State,
        slots: Array,
        lengths: Array,
        num_new: Array,
        num_slots: int,
        mass: Array | None,
        token_ids: Array | None,
    ) -> State:
        """After one new token (T = 1) was written and attended; may evict.

        Args:
            state: as `enter` left it.
            slots: where the token went, as `place` said.
            lengths: int32 [B], without it.
            num_new: int32 [B], 0 or 1.
            num_slots: C.
            mass: float32 [B, K, C], the mean attention each slot received over the query heads of its group; None
                unless `needs_mass`.
            token_ids: int32 [B, 1] or None.
        """
        del slots, lengths, num_new, num_slots, mass, token_ids
        return state

    def measure(
        self,
        state: State,
        probs: Array,
        q_positions: Array,
        kv_positions: Array,
        lengths: Array,
        num_new: Array,
    ) -> Any:
        """What `absorb` wants to know of the attention of several new tokens; only if `needs_mass`.

        Called for blocks of queries and slots; results of query blocks are added up.

        Args:
            state: before the tokens came.
            probs: float32 [B, K, T, R], probabilities, mean over the query heads of the group; 0 for pads.
            q_positions: int32 [B, T], EMPTY for pads.
            kv_positions: int32 [B, 1 or K, R].
            lengths: int32 [B], before the new tokens.
            num_new: int32 [B].

        Returns:
            a tree of arrays [B, K, R, ...].
        """
        del state, q_positions, kv_positions, lengths, num_new
        return jnp.sum(probs, axis=2)

    def absorb(
        self,
        state: State,
        lengths: Array,
        num_new: Array,
        num_tokens: int,
        num_slots: int,
        kept: Any,
        new: Any,
        token_ids: Array | None,
    ) -> tuple[State, Array]:
        """`place` and `observe` for several tokens at once, after they attended; may evict.

        Args:
            state: before the tokens came.
            lengths: int32 [B], without them.
            num_new: int32 [B].
            num_tokens: T.
            num_slots: C.
            kept: `measure` of the slots, [B, K, C, ...]; None unless `needs_mass`.
            new: `measure` of the new tokens, [B, K, T, ...]; None unless `needs_mass`.
            token_ids: int32 [B, T] or None.

        Returns:
            the new state, and the slots as `place`.
        """
        del kept, new, token_ids
        return state, self.place(state, lengths, num_new, num_tokens, num_slots)

    def positions(self, state: State, lengths: Array, num_slots: int) -> Array:
        """int32 [B, C] (or [B, K, C]): the position of the token each slot holds, EMPTY if none."""
        del state
        slot = jnp.arange(num_slots, dtype=jnp.int32)[None]
        return jnp.where(slot < lengths[:, None], slot, EMPTY)

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
