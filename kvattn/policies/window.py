"""`SlidingWindow`: keep the last tokens in a ring (Mistral 7B, arXiv:2310.06825)."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Int, Int32

from kvattn import _checks
from kvattn._typing import Array, Lengths, Rows
from kvattn.errors import ConfigError, RangeError
from kvattn.masks import EMPTY, Mask
from kvattn.policies.base import NOWHERE, Context, Policy, State
from kvattn.policies.registry import register


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

    turns: ClassVar[bool] = True

    def __post_init__(self):
        _checks.integer("window", self.window, 1, RangeError)

    def mask(self) -> Mask:
        """Causal, within the window."""
        return Mask(window=min(self.window, _checks.INT32_MAX))  # no sequence is longer

    def num_slots(self, capacity: int | None) -> int:
        """C: the window, or the capacity where that is smaller."""
        return slots_for(self, self.window, capacity)

    def most_tokens(self, num_slots: int) -> int | None:
        """Any number, unless the ring was made smaller than the window."""
        return num_slots if num_slots < self.window else None

    def place(self, state: State, step: Context) -> Int32[Array, "B T"]:
        """Slot t mod C; of a chunk longer than the ring only the last C tokens are kept."""
        stays = (step.positions >= 0) & (step.positions > (step.last - step.num_slots)[:, None])
        return jnp.where(stays, step.positions % step.num_slots, NOWHERE)

    def positions(self, state: State, lengths: Lengths, num_slots: int) -> Int32[Array, "B C"]:
        """Slot s holds the last position below `lengths` that equals s modulo C."""
        slot = jnp.arange(num_slots, dtype=jnp.int32)[None]
        last = lengths[:, None] - 1
        position = last - (last - slot) % num_slots
        return jnp.where(position >= 0, position, EMPTY)

    def kept(self, state: State, lengths: Lengths, num_slots: int) -> Int32[Array, " B"]:
        """min(tokens seen, C)."""
        return jnp.minimum(lengths, num_slots)

    def can_read(self, state: State, step: Context, mask: Mask) -> Rows:
        """As long as the ring has room for the tokens before the first one that it sees."""
        return super().can_read(state, step, mask) | (mask.first_seen(step.lengths) > step.last - step.num_slots)

    def can_trim(self, state: State, lengths: Lengths, num_tokens: Lengths, num_slots: int) -> Rows:
        """Only while nothing was overwritten: a ring that has turned has lost the older tokens."""
        return (lengths <= num_slots) | (num_tokens == 0)


@dataclasses.dataclass(frozen=True)
class OrderedWindow(Policy):
    """`SlidingWindow` whose slots are not used again: the token of position t lies in slot t for ever.

    For pages: those that the window has left go back to the pool one by one, and sequences may share those of a prefix,
    which a ring would overwrite. So every token of a chunk is stored, also one that the last of them does not see: a
    prefix that ends there needs it. A contiguous cache has nothing to give back; there it is a `Full` that reads less.

    Args:
        window: tokens a query attends to, its own included; >= 1.
    """

    window: int

    in_order: ClassVar[bool] = True

    def __post_init__(self):
        _checks.integer("window", self.window, 1, RangeError)

    def mask(self) -> Mask:
        """Causal, within the window."""
        return Mask(window=self._counted)

    def first_needed(self, lengths: Int[Array, "*B"]) -> Int[Array, "*B"]:
        """The first that the next token sees: with it they are a window."""
        return jnp.maximum(lengths - (self._counted - 1), 0)

    def positions(self, state: State, lengths: Lengths, num_slots: int) -> Int32[Array, "B C"]:
        """The last `window` tokens, each in its slot."""
        slot = jnp.arange(num_slots, dtype=jnp.int32)[None]
        last = lengths[:, None] - 1
        return jnp.where((slot <= last) & (slot > last - self._counted), slot, EMPTY)

    def held(self, state: State, lengths: Lengths, num_slots: int) -> Int32[Array, "B C"]:
        """All tokens; of those that the window has left, the pages may be another's by now."""
        return super().positions(state, lengths, num_slots)

    @property
    def _counted(self) -> int:
        """The window, as far as int32 counts positions."""
        return min(self.window, _checks.INT32_MAX)


def _levers(length: int) -> list[tuple[str, SlidingWindow]]:
    window = 4096 if length > 4096 else max(length // 4, 1)
    return [(f"SlidingWindow({window})", SlidingWindow(window))]


register(SlidingWindow, "window", aliases=["slidingwindow"], levers=_levers, examples=[SlidingWindow(6)])
