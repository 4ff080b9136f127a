"""`Scissorhands`: drop what was unimportant most often (Liu et al., arXiv:2305.17118)."""

import dataclasses
import typing
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int32, UInt8

from kvattn import _checks, _manual
from kvattn._trees import portable
from kvattn._typing import Array
from kvattn.errors import RangeError
from kvattn.masks import EMPTY
from kvattn.policies import scored
from kvattn.policies.base import Context
from kvattn.policies.registry import register


@typing.no_type_check
@portable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Record(scored.ScoredState):
    """Which token lies in which slot, and when it was unimportant.

    Attributes:
        low: uint8 [B, K, history / 8, C]: bit t % history is set if the query of position t gave the token less than
            its even share. A step writes one byte of every slot: they lie together.
    """

    low: Array


@dataclasses.dataclass(frozen=True)
class Scissorhands(scored.BudgetPolicy):
    """Counts, for each kept token, by how many of the last `history` queries it was found unimportant.

    A query finds a token unimportant if it gives it less than 1/n of its attention, n being the tokens it attends to.
    When more than `budget` tokens are kept, the `drop` tokens that were unimportant most often leave at once, the
    `num_recent` last ones excepted; among equal counts the lowest position leaves first. So between budget + 1 - drop
    and budget tokens are kept. Several new tokens attend densely, to what was kept and to each other; if they take the
    cache past its budget it shrinks to budget + 1 - drop.

    This is the variant that records importance while it generates (one bit per query and slot), not the one that
    recomputes the attention of the last queries; the two are the same while ``history <= drop``. The paper's
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

    measures_sums: ClassVar[bool] = False

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

    def init(self, batch_size: int, num_kv_heads: int, num_slots: int) -> Record:
        """All slots free."""
        low = jnp.zeros((batch_size, num_kv_heads, -(-self.history // 8), num_slots), jnp.uint8)
        return Record(*self.free(batch_size, num_kv_heads, num_slots), low)

    def enter(self, state: Record, slots: Int32[Array, "B K 1"], step: Context) -> Record:
        """The new token starts with a clean record."""
        b, k = (jnp.arange(n, dtype=jnp.int32) for n in slots.shape[:2])
        slot = jnp.where(slots < 0, step.num_slots, slots)[..., 0]  # past the end: dropped
        low = state.low.at[b[:, None], k[None], :, slot].set(jnp.uint8(0), mode="drop")
        return super().enter(state, slots, step).replace(low=low)

    def observe(
        self, state: Record, slots: Int32[Array, "B K 1"], mass: Float[Array, "B K C"], step: Context
    ) -> Record:
        """Records one query; when the budget is exceeded, drops (the only sort, once per `drop` steps)."""
        came = (step.num_new > 0)[:, None, None]
        there = state.positions >= 0
        count = jnp.sum(there, axis=-1, keepdims=True)
        unimportant = there & ~(mass * count.astype(mass.dtype) >= 1)  # NaN counts as unimportant
        index = step.lengths % self.history
        byte, bit = index // 8, (jnp.int32(1) << (index % 8)).astype(jnp.uint8)[:, None, None]
        rows = jnp.arange(step.lengths.shape[0], dtype=jnp.int32)
        old = state.low[rows, :, byte]
        new = (old & ~bit) | jnp.where(unimportant, bit, jnp.uint8(0))
        low = state.low.at[rows, :, byte].set(jnp.where(came, new, old))
        over = count > self.budget

        def shrink(positions: Array, before: Array | None) -> tuple[Array, Array | None]:
            """Positions [B, K, C], and those in the cache, of the tokens that stay."""
            keep = self._survivors(positions, low, step)
            positions = jnp.where(over & ~keep, EMPTY, positions)
            return positions, None if before is None else scored.cache_positions(positions)

        held = state.positions, state.cache_positions
        positions, before = _manual.cond(jnp.any(over), shrink, lambda *same: same, *held)
        return Record(positions, before, low)

    def measure(
        self,
        state: Record,
        probs: Float[Array, "B K T R"],
        q_positions: Int32[Array, "B T"],
        kv_positions: Int32[Array, "B #K R"],
        step: Context,
    ) -> UInt8[Array, "B K R Y"]:
        """The bits of the last `history` new queries, packed: Y = history / 8."""
        before = jnp.sum(state.positions >= 0, axis=-1)[:, :, None, None]
        count = before + (q_positions - step.lengths[:, None] + 1)[:, None, :, None]
        q, kv = q_positions[:, None, :, None], kv_positions[:, :, None, :]
        unimportant = (kv >= 0) & (kv <= q) & ~(probs * count.astype(probs.dtype) >= 1)
        bits = self._bits(q_positions, step)
        # Different queries have different bits, so the sums are exact and cannot carry.
        packed = jnp.einsum("bktr,bty->bkry", unimportant.astype(jnp.float32), bits.astype(jnp.float32))
        return packed.astype(jnp.uint8)

    def absorb(
        self, state: Record, kept: UInt8[Array, "B K C Y"], new: UInt8[Array, "B K T Y"], step: Context
    ) -> tuple[Record, Int32[Array, "B K T"]]:
        """Adds the records; shrinks the cache if it is over its budget."""
        over_written = jnp.sum(self._bits(step.positions, step), axis=1, dtype=jnp.uint8)[:, None, None]
        low = jnp.concatenate([self._record(state.low.swapaxes(2, 3), over_written, kept), new], axis=2)
        positions = scored.joined(state.positions, step)
        there = positions >= 0
        keep = self._survivors(positions, low.swapaxes(2, 3), step)
        keep = jnp.where(jnp.sum(there, axis=-1, keepdims=True) > self.budget, keep, there)
        settled, slots = scored.settle(keep, step.num_slots)
        positions = settled(positions, EMPTY)
        before = None if state.cache_positions is None else scored.cache_positions(positions)
        return Record(positions, before, settled(low, jnp.uint8(0)).swapaxes(2, 3)), slots

    def _survivors(
        self, positions: Int32[Array, "B K S"], low: UInt8[Array, "B K Y S"], step: Context
    ) -> Bool[Array, "B K S"]:
        """The budget + 1 - drop tokens that stay."""
        there = positions >= 0
        protected = there & (positions > (step.last - self.num_protected)[:, None, None])
        unimportant = self._counts(low)
        left = self.budget + 1 - self.num_dropped - jnp.sum(protected, axis=-1, keepdims=True)
        scores = -unimportant.astype(jnp.float32)
        return protected | scored.best(scores, positions, there & ~protected, left)

    def _bits(self, positions: Int32[Array, "B T"], step: Context) -> UInt8[Array, "B T Y"]:
        """The one bit of each query, none for those that are not among the last `history`."""
        remembered = (positions >= 0) & (positions > (step.last - self.history)[:, None])
        index = jnp.where(remembered, positions % self.history, 0)[..., None]
        byte = jnp.arange(-(-self.history // 8), dtype=jnp.int32)[None, None]
        bit = jnp.where(byte == index // 8, jnp.int32(1) << (index % 8), 0)
        return jnp.where(remembered[..., None], bit, 0).astype(jnp.uint8)

    @staticmethod
    def _counts(low: UInt8[Array, "B K Y S"]) -> Int32[Array, "B K S"]:
        """The bits of every record. Byte by byte: a sum over all would widen the records first."""

        def bits(byte: Int32[Array, ""] | int) -> Int32[Array, "B K S"]:
            return jax.lax.population_count(jax.lax.dynamic_index_in_dim(low, byte, 2, keepdims=False)).astype(
                jnp.int32
            )

        return _manual.fori_loop(1, low.shape[2], lambda byte, count: count + bits(byte), bits(0), unroll=5)

    @staticmethod
    def _record(low: Array, over_written: Array, new: Array) -> Array:
        """Records uint8 [B, K, S, Y] without the bits of queries that are forgotten, and with new ones."""
        return (low & ~over_written) | new.astype(jnp.uint8)


def _levers(length: int) -> list[tuple[str, Scissorhands]]:
    fifth = 2 * max(length // 10, 1)
    return [(f"Scissorhands({fifth}): 20 %", Scissorhands(fifth))]


register(Scissorhands, "scissorhands", levers=_levers, examples=[Scissorhands(7, 2, 8)])
