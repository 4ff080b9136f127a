"""`StreamingLLM`: the first tokens and the last ones (Xiao et al., arXiv:2309.17453)."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Int32

from kvattn import _checks
from kvattn._typing import Array, Lengths, Rows
from kvattn.errors import RangeError
from kvattn.masks import EMPTY, Mask
from kvattn.policies.base import NOWHERE, Context, Policy, State
from kvattn.policies.registry import register
from kvattn.policies.window import slots_for


@dataclasses.dataclass(frozen=True)
class StreamingLLM(Policy):
    """Keeps the first `num_sinks` tokens and the last `window`; attends to nothing else.

    A query sees at most num_sinks + window tokens, its own included: the oldest token of the window leaves before the
    new one is attended to. Slot t for t < num_sinks, then a ring.

    Positions are those in the cache, as in the paper: once tokens have left, a sink is seen from the distance it has in
    the cache, not in the text. Keys stay rotated at their true positions and the query is rotated twice, which is the
    same because RoPE is relative; distances for ALiBi follow. ``positions_in="original"`` takes true positions.

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
        num_sinks, window = self._counted
        return Mask(window=window, num_sinks=num_sinks)

    def num_slots(self, capacity: int | None) -> int:
        """C: num_sinks + window, or the capacity where that is smaller."""
        return slots_for(self, self.num_sinks + self.window, capacity)

    def sink_positions(self, positions: Int32[Array, "B T"]) -> tuple[int, Int32[Array, "B T"]] | None:
        """To the sinks a query is at most at the end of the cache."""
        if self.positions_in == "original" or self.num_sinks == 0:
            return None
        num_sinks, window = self._counted
        return num_sinks, jnp.minimum(positions, num_sinks + window - 1)

    def most_tokens(self, num_slots: int) -> int | None:
        """Any number, unless the cache was made smaller than sinks and window."""
        return num_slots if num_slots < self.num_sinks + self.window else None

    def place(self, state: State, step: Context) -> Int32[Array, "B T"]:
        """Sinks in their slots, the others in a ring behind them; of a long chunk only the last ones stay."""
        num_sinks, window = self._counted
        position = step.positions
        stays = (position < num_sinks) | (position > (step.last - window)[:, None])
        slot = jnp.where(position < num_sinks, position, num_sinks + (position - num_sinks) % window)
        return jnp.where((position >= 0) & stays, slot, NOWHERE)

    def positions(self, state: State, lengths: Lengths, num_slots: int) -> Int32[Array, "B C"]:
        """Position s in slot s < num_sinks; behind them the last position that maps to the slot."""
        num_sinks, window = self._counted
        slot = jnp.arange(num_slots, dtype=jnp.int32)[None]
        last = lengths[:, None] - 1
        in_ring = last - (last - slot) % window
        position = jnp.where(slot < num_sinks, jnp.where(slot <= last, slot, EMPTY), in_ring)
        return jnp.where(position >= jnp.minimum(slot, num_sinks), position, EMPTY)

    def can_read(self, state: State, step: Context, mask: Mask) -> Rows:
        """As long as the ring has room for the tokens before the first one that it sees."""
        num_sinks, window = self._counted
        first = jnp.maximum(mask.first_seen(step.lengths), num_sinks)
        return super().can_read(state, step, mask) | (first > step.last - window)

    def can_trim(self, state: State, lengths: Lengths, num_tokens: Lengths, num_slots: int) -> Rows:
        """Only while nothing was overwritten."""
        return (lengths <= num_slots) | (num_tokens == 0)

    @property
    def _counted(self) -> tuple[int, int]:
        """Sinks and window as far as int32 counts positions: together they cover every sequence just the same."""
        num_sinks = min(self.num_sinks, _checks.INT32_MAX - 1)
        return num_sinks, min(self.window, _checks.INT32_MAX - num_sinks)


def _levers(length: int) -> list[tuple[str, StreamingLLM]]:
    window = (1024 if length > 1024 else max(length // 4, 8)) - 4
    return [(f"StreamingLLM(4, {window})", StreamingLLM(4, window))]


register(StreamingLLM, "streaming", aliases=["streamingllm"], levers=_levers, examples=[StreamingLLM(2, 6)])
