"""`Chunked`: a query sees the tokens of its own chunk of positions (Llama 4's local layers)."""

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
class Chunked(Policy):
    """Keeps the tokens of the last chunk of positions; a query attends to those of its own, itself included.

    The query of position t sees the positions from size * (t // size) to t, as in layers of Llama 4 that have an
    ``attention_chunk_size``. The token of position t lies in slot t mod size, so a chunk takes the slots of the one
    before it. The cache holds `size` slots, or fewer when a capacity below that says that no sequence gets longer: then
    appending past the capacity is an error.

    Args:
        size: positions of a chunk; >= 1.
    """

    size: int

    def __post_init__(self):
        _checks.integer("size", self.size, 1, RangeError)

    def mask(self) -> Mask:
        """Causal, within the chunk."""
        return Mask(chunk=self._counted)

    def num_slots(self, capacity: int | None) -> int:
        """C: the size, or the capacity where that is smaller."""
        return slots_for(self, self.size, capacity)

    def most_tokens(self, num_slots: int) -> int | None:
        """Any number, unless the cache was made smaller than a chunk."""
        return num_slots if num_slots < self.size else None

    def place(self, state: State, step: Context) -> Int32[Array, "B T"]:
        """Slot t mod size, for the tokens of the last one's chunk."""
        stays = (step.positions >= 0) & (step.positions >= self._start(step.last)[:, None])
        return jnp.where(stays, step.positions % self._counted, NOWHERE)

    def positions(self, state: State, lengths: Lengths, num_slots: int) -> Int32[Array, "B C"]:
        """Those of the last token's chunk, in order."""
        last = lengths[:, None] - 1
        position = self._start(last) + jnp.arange(num_slots, dtype=jnp.int32)[None]
        return jnp.where(position <= last, position, EMPTY)

    def can_read(self, state: State, step: Context, mask: Mask) -> Rows:
        """Within one chunk of positions."""
        return super().can_read(state, step, mask) | (mask.first_seen(step.lengths) >= self._start(step.last))

    def can_trim(self, state: State, lengths: Lengths, num_tokens: Lengths, num_slots: int) -> Rows:
        """Within the last token's chunk, or all: those before it are gone."""
        left = lengths - num_tokens
        return (num_tokens == 0) | (left == 0) | (self._start(left - 1) == self._start(lengths - 1))

    def _start(self, position: Int32[Array, "..."]) -> Int32[Array, "..."]:
        """The first position of a position's chunk; of -1, the last of an empty sequence, 0."""
        position = jnp.maximum(position, 0)
        return position - position % self._counted

    @property
    def _counted(self) -> int:
        """The size, as far as int32 counts positions."""
        return min(self.size, _checks.INT32_MAX)


# No lever: a model that was not trained in chunks loses all that came before where a chunk begins.
register(Chunked, "chunked", examples=[Chunked(5)])
