"""`Scissorhands`: drop what was unimportant most often (Liu et al., arXiv:2305.17118)."""

import dataclasses
import typing
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from kvattn import _checks, _manual
from kvattn._trees import Tree, portable
from kvattn._typing import Array, Rows
from kvattn.errors import ConfigError, RangeError
from kvattn.masks import EMPTY
from kvattn.policies import scored
from kvattn.policies.base import Policy, State


@typing.no_type_check
@portable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Record(Tree):
    """Which token lies in which slot, and when it was unimportant.

    Attributes:
        positions: int32 [B, K, C], EMPTY where free.
        low: uint8 [B, K, history / 8, C]: bit t % history is set if the query of position t gave the token less than
            its even share. A step writes one byte of every slot: they lie together.
        places: int32 [B, K, C], how many kept tokens come before; None where that is not needed.
    """

    positions: Array
    low: Array
    places: Array | None = None


@dataclasses.dataclass(frozen=True)
class Scissorhands(Policy):
    """Counts, for each kept token, by how many of the last `history` queries it was found unimportant.

    A query finds a token unimportant if it gives it less than 1/n of its attention, n being the tokens it attends to.
    When more than `budget` tokens are kept, the `drop` tokens that were unimportant most often leave at once, the
    `num_recent` last ones excepted; of equal counts the lowest position leaves first. So between budget + 1 - drop and
    budget tokens are kept. Several new tokens attend densely, to what was kept and to each other; if they take the
    cache past its budget it shrinks to budget + 1 - drop.

    This is the variant that records importance while it generates (one bit per query and slot), not the one that
    computes the attention of the last queries again; the two are the same while ``history <= drop``. The paper's
    printed algorithm contradicts its own comments; this follows the comments. Attention is averaged over the query
    heads of a group.

    Args:
        budget: tokens kept, >= 1.
        num_recent: last tokens that never leave; at most budget + 1 - drop of them are protected.
        history: queries looked back at, >= 1.
        drop: tokens dropped at once, 1 <= drop <= budget. None: half the budget.
        positions_in: "original", or "cache": the n kept tokens stand at 0 ... n - 1, as in `H2O`.
    """

    budget: int
    num_recent: int = 10
    history: int = 400
    drop: int | None = None
    positions_in: str = dataclasses.field(default="original", kw_only=True)

    needs_mass: ClassVar[bool] = True
    measures_sums: ClassVar[bool] = False
    per_head: ClassVar[bool] = True

    def __post_init__(self):
        _checks.integer("budget", self.budget, 1, RangeError)
        _checks.integer("num_recent", self.num_recent, 0, RangeError)
        _checks.integer("history", self.history, 1, RangeError)
        _checks.one_of("positions_in", self.positions_in, ("original", "cache"))
        if self.drop is not None:
            _checks.integer("drop", self.drop, 1, RangeError)
            if self.drop > self.budget:
                raise RangeError(f"drop must be <= budget ({self.budget}), got {self.drop}.")

    @property
    def num_dropped(self) -> int:
        """Tokens dropped at once."""
        return max(self.budget // 2, 1) if self.drop is None else self.drop

    @property
    def num_protected(self) -> int:
        """Last tokens that never leave."""
        return min(self.num_recent, self.budget + 1 - self.num_dropped)

    def num_slots(self, capacity: int | None) -> int:
        """C: the budget and one slot for the token that comes."""
        if capacity is not None and _checks.integer("capacity", capacity, 1) < self.budget + 1:
            raise ConfigError(
                f"{self} holds budget + 1 = {self.budget + 1} tokens while it attends, got capacity {capacity}: leave "
                "capacity None, or make the budget smaller."
            )
        return self.budget + 1

    def init(self, batch_size: int, num_kv_heads: int, num_slots: int) -> State:
        """All slots free."""
        shape = (batch_size, num_kv_heads, num_slots)
        free = jnp.full(shape, EMPTY, jnp.int32)
        places = jnp.copy(free) if self.positions_in == "cache" else None
        return Record(free, jnp.zeros((*shape[:2], -(-self.history // 8), num_slots), jnp.uint8), places)

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
        """A free slot."""
        del lengths, num_tokens, num_slots
        return scored.first_free(state.positions, num_new)

    def enter(self, state: State, slots: Array, lengths: Array, num_new: Array) -> State:
        """The new token starts with a clean record."""
        del num_new
        b, k = (jnp.arange(n, dtype=jnp.int32) for n in slots.shape[:2])
        slot = jnp.where(slots < 0, state.low.shape[-1], slots)[..., 0]  # past the end: dropped
        low = state.low.at[b[:, None], k[None], :, slot].set(jnp.uint8(0), mode="drop")
        places = None if state.places is None else scored.enter_last(state.places, slots)
        return Record(scored.enter(state.positions, slots, lengths[:, None]), low, places)

    def observe(self, state, slots, lengths, num_new, num_slots, mass: Any, token_ids) -> State:
        """Records one query; when the budget is exceeded, drops (the only sort, once per `drop` steps)."""
        del slots, token_ids, num_slots
        came = (num_new > 0)[:, None, None]
        taken = state.positions >= 0
        count = jnp.sum(taken, axis=-1, keepdims=True)
        unimportant = taken & ~(mass * count.astype(mass.dtype) >= 1)  # NaN counts as unimportant
        index = lengths % self.history
        byte, bit = index // 8, (jnp.int32(1) << (index % 8)).astype(jnp.uint8)[:, None, None]
        rows = jnp.arange(lengths.shape[0], dtype=jnp.int32)
        old = state.low[rows, :, byte]
        new = (old & ~bit) | jnp.where(unimportant, bit, jnp.uint8(0))
        low = state.low.at[rows, :, byte].set(jnp.where(came, new, old))
        over = count > self.budget

        def shrink(positions: Array, places: Array | None) -> tuple[Array, Array | None]:
            keep = self._survivors(positions, low, lengths + num_new - 1)
            positions = jnp.where(over & ~keep, EMPTY, positions)
            return positions, None if places is None else scored.places(positions)

        positions, places = _manual.cond(jnp.any(over), shrink, lambda *same: same, state.positions, state.places)
        return Record(positions, low, places)

    def measure(self, state, probs, q_positions, kv_positions, lengths, num_new):
        """The bits of the last `history` new queries, packed."""
        before = jnp.sum(state.positions >= 0, axis=-1)[:, :, None, None]
        count = before + (q_positions - lengths[:, None] + 1)[:, None, :, None]
        q, kv = q_positions[:, None, :, None], kv_positions[:, :, None, :]
        unimportant = (kv >= 0) & (kv <= q) & ~(probs * count.astype(probs.dtype) >= 1)
        remembered = (q_positions >= 0) & (q_positions >= (lengths + num_new - self.history)[:, None])
        bits = jnp.where(remembered[..., None], self._bits(q_positions), jnp.uint8(0))
        # Different queries have different bits, so the sums are exact and cannot carry.
        packed = jnp.einsum("bktr,bty->bkry", unimportant.astype(jnp.float32), bits.astype(jnp.float32))
        return packed.astype(jnp.uint8)

    def absorb(self, state, lengths, num_new, num_tokens, num_slots, kept, new, token_ids):
        """Adds the records; shrinks the cache if it is over its budget."""
        del token_ids
        chunk = scored.chunk_positions(lengths, num_new, num_tokens)
        remembered = (chunk >= 0) & (chunk >= (lengths + num_new - self.history)[:, None])
        bits = jnp.where(remembered[..., None], self._bits(chunk), jnp.uint8(0))
        over_written = jnp.sum(bits, axis=1, dtype=jnp.uint8)[:, None, None]
        low = self._record(state.low.swapaxes(2, 3), over_written, kept)
        here = jnp.broadcast_to(chunk[:, None], new.shape[:3])
        positions = jnp.concatenate([state.positions, here], axis=-1)
        records = jnp.concatenate([low, new], axis=2).swapaxes(2, 3)
        keep = self._survivors(positions, records, lengths + num_new - 1)
        there = positions >= 0
        keep = jnp.where(jnp.sum(there, axis=-1, keepdims=True) > self.budget, keep, there)
        move, where = scored.settle(keep[..., :num_slots], keep[..., num_slots:])
        positions = move(state.positions, here, EMPTY)
        places = None if state.places is None else scored.places(positions)
        return Record(positions, move(low, new, jnp.uint8(0)).swapaxes(2, 3), places), where

    def can_trim(self, state: State, lengths: Array, num_tokens: Array, num_slots: int) -> Rows:
        """Only by nothing: records cannot be taken back."""
        del state, num_slots, lengths
        return num_tokens == 0

    def _survivors(self, positions: Array, low: Array, last: Array) -> Array:
        """bool of positions' shape: the budget + 1 - drop tokens that stay."""
        there = positions >= 0
        protected = there & (positions > (last - self.num_protected)[:, None, None])
        unimportant = self._counts(low)
        left = self.budget + 1 - self.num_dropped - jnp.sum(protected, axis=-1, keepdims=True)
        scores = -unimportant.astype(jnp.float32)
        return protected | scored.best(scores, positions, there & ~protected, left)

    def _bits(self, positions: Array) -> Array:
        """uint8 [..., history / 8]: the one bit of the query at a position."""
        index = jnp.where(positions >= 0, positions % self.history, 0)[..., None]
        byte = jnp.arange(-(-self.history // 8), dtype=jnp.int32).reshape((1,) * positions.ndim + (-1,))
        bit = jnp.where(byte == index // 8, jnp.int32(1) << (index % 8), 0)
        return jnp.where(positions[..., None] >= 0, bit, 0).astype(jnp.uint8)

    @staticmethod
    def _counts(low: Array) -> Array:
        """int32 [B, K, S]: the bits of every record. Byte by byte: a sum over all would widen the records first."""

        def bits(byte):
            return jax.lax.population_count(jax.lax.dynamic_index_in_dim(low, byte, 2, keepdims=False)).astype(
                jnp.int32
            )

        return _manual.fori_loop(1, low.shape[2], lambda byte, count: count + bits(byte), bits(0), unroll=5)

    @staticmethod
    def _record(low: Array, over_written: Array, new: Array) -> Array:
        return (low & ~over_written) | new.astype(jnp.uint8)
