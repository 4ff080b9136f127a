"""What a policy is: which tokens a cache keeps, and in which slots.

A policy is a frozen dataclass of settings plus pure functions over positions. It never sees keys,
values, a cache class, a codec or a mesh, so one policy works with every storage. What it has to
remember between steps is its state, a pytree that the cache carries along.

One step of the cache asks, in this order::

    fits                     may these tokens be appended at all?
    place, enter, observe    one new token: its slot, before it attends; then what it attended to: score, evict
    measure, absorb          several new tokens: what they attended to; then score, evict, and their slots

What it is told of the step is a `Context`.
"""

import dataclasses
import math
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Int32, PyTree

from kvattn import _checks
from kvattn._typing import Array, Lengths, Rows
from kvattn.errors import ConfigError
from kvattn.masks import EMPTY, Mask

NOWHERE = -1
"""The slot of a token that is not kept."""

State = PyTree
"""What a policy remembers: a tree of arrays that it alone knows."""

Measured = PyTree
"""What `Policy.measure` returns: a tree of arrays."""


@dataclasses.dataclass(frozen=True, eq=False)
class Context:
    """What a policy is told of a step.

    Attributes:
        lengths: tokens seen before the step.
        num_new: real tokens among the T that come.
        num_tokens: T, pads included.
        num_slots: C.
        token_ids: which tokens come; None where the caller did not say.
    """

    lengths: Int32[Array, " B"]
    num_new: Int32[Array, " B"]
    num_tokens: int
    num_slots: int
    token_ids: Int32[Array, "B T"] | None = None

    @property
    def positions(self) -> Int32[Array, "B T"]:
        """The positions of the new tokens, EMPTY for pads."""
        t = jnp.arange(self.num_tokens, dtype=jnp.int32)[None]
        return jnp.where(t < self.num_new[:, None], self.lengths[:, None] + t, EMPTY)

    @property
    def last(self) -> Int32[Array, " B"]:
        """The position of the last token once the new ones are in; -1 in a row without tokens."""
        return self.lengths + self.num_new - 1


@dataclasses.dataclass(frozen=True)
class Policy:
    """Base of the policies. Subclasses override what differs from keeping everything.

    `kvattn.policies.register` makes one known by its name.
    """

    needs_mass: ClassVar[bool] = False
    """Whether `absorb` and `observe` want the attention that slots received."""

    measures_sums: ClassVar[bool] = True
    """Whether `measure` adds attention up: of several heads it may then be taken one by one, and averaged."""

    per_head: ClassVar[bool] = False
    """Whether key/value heads keep different tokens: slots and positions then carry a K axis."""

    is_uneven: ClassVar[bool] = False
    """Whether key/value heads keep different numbers of tokens: in pages each head then has a table of its own."""

    in_order: ClassVar[bool] = False
    """Whether slot s holds the token of position s for ever. Inherited as long as nothing is placed anew."""

    turns: ClassVar[bool] = False
    """Whether slot s holds the last position that is s modulo C, as in a ring. Inherited likewise."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for name in ("in_order", "turns"):
            if name not in vars(cls) and {"place", "positions", "absorb"} & set(vars(cls)):
                setattr(cls, name, False)

    @property
    def goes_by_length(self) -> bool:
        """Whether a single token goes to slot n mod C, n the tokens seen before it, if `most_tokens` are not exceeded.

        And nothing else is asked or remembered, so that a kernel may do it without asking.
        """
        asked = ("fits", "enter", "observe", "needed", "sink_positions", "cache_positions")
        alone = all(getattr(type(self), name) is getattr(Policy, name) for name in asked)
        return alone and (self.in_order or self.turns) and not self.needs_mass

    def most_tokens(self, num_slots: int) -> int | None:
        """How many tokens a sequence may have in C slots. None: any number, as older ones make room."""
        return num_slots

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
        return ()

    def sink_positions(self, positions: Int32[Array, "B T"]) -> tuple[int, Int32[Array, "B T"]] | None:
        """For policies whose first tokens are seen from another distance than their true one.

        Args:
            positions: the true positions of the queries.

        Returns:
            None; or n, and the positions the queries have to the first n tokens of the sequence.
        """
        return None

    def cache_positions(self, state: State) -> Int32[Array, "B K C"] | None:
        """For policies whose tokens are all seen from where they stand in the cache.

        Returns:
            None; or how many kept tokens come before that of each slot, EMPTY where there is none. All heads of a row
            keep equally many.
        """
        return None

    def fits(self, state: State, step: Context) -> Rows:
        """Whether the tokens can be appended without losing one that is still needed."""
        most = self.most_tokens(step.num_slots)
        return step.num_new >= 0 if most is None else step.lengths + step.num_new <= most

    def place(self, state: State, step: Context) -> Int32[Array, "B *K T"]:
        """The slot of each new token, NOWHERE for those not kept.

        Slots fill up from the first one on: of n tokens seen none lies in slot n or behind.
        """
        return jnp.where(step.positions >= 0, step.positions, NOWHERE)

    def enter(self, state: State, slots: Int32[Array, "B *K 1"], step: Context) -> State:
        """The state once one new token (T = 1) lies in its slot, before it is attended to."""
        return state

    def observe(
        self, state: State, slots: Int32[Array, "B *K 1"], mass: Float[Array, "B K C"] | None, step: Context
    ) -> State:
        """After one new token (T = 1) was written and attended; may evict.

        Args:
            state: as `enter` left it.
            slots: where the token went, as `place` said.
            mass: float32, the mean attention each slot received over the query heads of its group; None unless
                `needs_mass`.
            step: without the token in `lengths`; `num_new` is 0 or 1.
        """
        return state

    def measure(
        self,
        state: State,
        probs: Float[Array, "B K T R"],
        q_positions: Int32[Array, "B T"],
        kv_positions: Int32[Array, "B #K R"],
        step: Context,
    ) -> Measured:
        """What `absorb` wants to know of the attention of several new tokens; only if `needs_mass`.

        Called for blocks of queries and slots; results of query blocks are added up.

        Args:
            state: before the tokens came.
            probs: float32, probabilities, mean over the query heads of the group; 0 for pads.
            q_positions: EMPTY for pads.
            kv_positions: EMPTY for empty slots and pads.
            step: the whole step, of which the queries may be a block.

        Returns:
            a tree of arrays [B, K, R, ...].
        """
        return jnp.sum(probs, axis=2)

    def absorb(
        self, state: State, kept: Measured, new: Measured, step: Context
    ) -> tuple[State, Int32[Array, "B *K T"]]:
        """`place` and `observe` for several tokens at once, after they attended; may evict.

        Args:
            state: before the tokens came.
            kept: `measure` of the slots, [B, K, C, ...]; None unless `needs_mass`.
            new: `measure` of the new tokens, [B, K, T, ...]; None unless `needs_mass`.
            step: without the tokens in `lengths`.

        Returns:
            the new state, and the slots as `place`.
        """
        return state, self.place(state, step)

    def needed(self, state: State, step: Context) -> Bool[Array, "B *K C"]:
        """The slots that hold tokens before the step, and those that its new tokens may take: they must have pages."""
        held = self.positions(state, step.lengths, step.num_slots) >= 0
        if self.in_order:  # the slot of a token is its position
            slot, first = jnp.arange(step.num_slots, dtype=jnp.int32)[None], step.lengths[:, None]
            held &= slot >= self.first_needed(step.lengths)[:, None]
            return held | ((slot >= first) & (slot < first + step.num_new[:, None]))
        return held | taken(self.place(state, step), step.num_slots)

    def first_needed(self, lengths: Int[Array, "*B"]) -> Int[Array, "*B"]:
        """The first slot whose token the next one sees, of policies that are `in_order`; in kernels too.

        Those whose `positions` leave out tokens, so that pages of these may be gone, say it here as well.
        """
        return lengths * 0  # `zeros_like` cannot be lowered in a kernel under an Explicit mesh

    def moved(self, state: State, order: Int32[Array, "B K C"]) -> State:
        """The state once slot s holds what slot ``order[..., s]`` held. Asked of policies that are `is_uneven`."""
        raise NotImplementedError(f"{type(self).__name__} is uneven, so it must say what its state is once slots moved")

    def positions(self, state: State, lengths: Lengths, num_slots: int) -> Int32[Array, "B *K C"]:
        """The position of the token each slot holds, EMPTY if none."""
        slot = jnp.arange(num_slots, dtype=jnp.int32)[None]
        return jnp.where(slot < lengths[:, None], slot, EMPTY)

    def held(self, state: State, lengths: Lengths, num_slots: int) -> Int32[Array, "B *K C"]:
        """`positions`, with those tokens that lie in their slots still though the last one does not see them."""
        return self.positions(state, lengths, num_slots)

    def can_read(self, state: State, step: Context, mask: Mask) -> Rows:
        """Whether all that tokens attend to is there still, once they have been appended and nothing has come since.

        So that another layer's queries of the same tokens can attend to it. To what a single token attends is what is
        kept, whatever that is.

        Args:
            state: after the tokens came.
            step: which came; `lengths` without them.
            mask: who may attend to whom.
        """
        if self.in_order:
            return jnp.ones_like(step.lengths, bool)
        lengths = step.last + 1
        lost = self.kept(state, lengths, step.num_slots) < lengths.reshape(-1, *(1,) * self.per_head)
        return (step.num_new <= 1) | ~(jnp.any(lost, axis=1) if self.per_head else lost)

    def kept(self, state: State, lengths: Lengths, num_slots: int) -> Int32[Array, "B *K"]:
        """Tokens kept."""
        return jnp.sum(self.positions(state, lengths, num_slots) >= 0, axis=-1, dtype=jnp.int32)

    def can_trim(self, state: State, lengths: Lengths, num_tokens: Lengths, num_slots: int) -> Rows:
        """Whether the last `num_tokens` can be taken back as if they had never come."""
        return jnp.ones_like(lengths, bool) & (num_tokens >= 0)

    def trim(self, state: State, lengths: Lengths, num_tokens: Lengths, num_slots: int) -> State:
        """The state after the last `num_tokens` are taken back."""
        return state


def taken(slots: Int32[Array, "B *K T"], num_slots: int) -> Bool[Array, "B *K C"]:
    """Which slots are among these; negative ones are none."""
    if slots.shape[-1] == 1:
        return jnp.arange(num_slots, dtype=jnp.int32).reshape((1,) * (slots.ndim - 1) + (-1,)) == slots
    flat = slots.reshape(math.prod(slots.shape[:-1]), slots.shape[-1])
    row = jnp.arange(flat.shape[0], dtype=jnp.int32)[:, None]
    flat = jnp.where(flat < 0, num_slots, flat)  # past the end: dropped
    found = jnp.zeros((flat.shape[0], num_slots), bool).at[row, flat].set(True, mode="drop")
    return found.reshape(*slots.shape[:-1], num_slots)
