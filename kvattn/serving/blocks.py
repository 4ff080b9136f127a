"""Who holds which block of a pool: the host side of `kvattn.PagedKVCache`, without JAX.

The bookkeeping of PagedAttention (Kwon et al., arXiv:2309.06180): a block is the room for `block_size` tokens of one
sequence, counted by references, and copied before somebody writes to one that others hold. Nothing here touches keys or
values: tables and copies go to the device as numbers. A block of the pool is a page of the cache.
"""

import math
from array import array
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int32

from kvattn.errors import (
    BlockStateError,
    ConfigError,
    DuplicateSequenceError,
    OutOfBlocksError,
    RangeError,
    UnknownSequenceError,
)
from kvattn.serving import checks
from kvattn.serving.counts import NO_BLOCK, Counts
from kvattn.serving.usage import Usage

NOTHING = array("i", [NO_BLOCK])
"""A table of one block that is none."""


class _Sequence:
    """One sequence: its blocks in order, how many tokens lie in them, how many blocks at the start are forgotten.

    And whether its blocks are others than when `BlockPool.take_changed` was called last.
    """

    __slots__ = ("forgotten", "has_changed", "length", "table")

    def __init__(self, table: array[int], length: int, forgotten: int):
        self.table = table
        self.length = length
        self.forgotten = forgotten
        self.has_changed = True


class BlockPool:
    """Gives blocks to sequences, and takes them back.

    A call that raises has changed nothing. The pool decides by its own state alone, so hosts that make the same calls
    hold the same tables. It is not made for several threads at once.

    Args:
        num_blocks: blocks of the pool, numbered from 0: `num_pages` of the cache.
        block_size: tokens per block: `page_size` of the cache.
        watermark: share of the blocks that `can_allocate` leaves free for sequences that grow, in [0, 1).

    Raises:
        ConfigError: fewer than one block or token, or another watermark.
        DTypeError: sizes that are no ints.

    >>> pool = BlockPool(num_blocks=8, block_size=4)
    >>> pool.allocate("a", num_tokens=7)
    >>> pool.fork("a", "b")
    >>> pool.append("b")  # the half-full last block is shared: it is copied first
    [(1, 2)]
    >>> pool.table("a"), pool.table("b")
    ([0, 1], [0, 2])
    """

    def __init__(self, num_blocks: int, block_size: int, *, watermark: float = 0.01):
        self.num_blocks = checks.integer("num_blocks", num_blocks, 1, ConfigError)
        self.block_size = checks.integer("block_size", block_size, 1, ConfigError)
        self.watermark = checks.watermark(watermark)
        self._reserve = math.floor(watermark * self.num_blocks)
        self._counts = self._make_counts()
        self._sequences: dict[Hashable, _Sequence] = {}

    def __repr__(self) -> str:
        return (
            f"BlockPool({self.num_blocks} blocks of {self.block_size}, {self.num_free} free, "
            f"{len(self._sequences)} sequences)"
        )

    def __contains__(self, seq: Hashable) -> bool:
        return checks.hashable("seq", seq) in self._sequences

    # What it holds.

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return self._counts.num_free

    @property
    def num_held(self) -> int:
        """References that are no sequence's: those of `hold`."""
        return sum(self._counts.held)

    @property
    def sequences(self) -> list[Hashable]:
        """The sequences it knows, oldest first."""
        return list(self._sequences)

    def table(self, seq: Hashable) -> list[int]:
        """The blocks of a sequence, in order; `NO_BLOCK` (-1) where they are forgotten."""
        return self._sequence(seq).table.tolist()

    def length(self, seq: Hashable) -> int:
        """Tokens of a sequence, the forgotten ones included."""
        return self._sequence(seq).length

    def ref_count(self, block: int) -> int:
        """How many hold a block: sequences that name it, and `hold`; 0 where it is free."""
        return self._counts.refs[self._counts.number(block)]

    def page_table(self, seqs: Sequence[Hashable], width: int | None = None) -> Int32[np.ndarray, "B W"]:
        """The tables of a batch as a cache takes them, filled up with -1.

        Args:
            seqs: one sequence per row; the same one may be given twice.
            width: columns. None: as many as the longest table has, but at least one.

        Raises:
            UnknownSequenceError: a sequence that is not known.
            RangeError: a table that is wider.
        """
        tables = [self._sequence(seq).table for seq in seqs]
        most = max((len(table) for table in tables), default=0)
        width = max(most, 1) if width is None else checks.integer("width", width, 1)
        if most > width:
            raise RangeError(f"width must be >= {most}, the blocks of the longest sequence given, got {width}.")
        rows = [table.tobytes() for table in tables]
        size = width * NOTHING.itemsize
        rest = (NOTHING * width).tobytes()
        filled = bytearray().join([part for row in rows for part in (row, rest[: size - len(row)])])
        return np.frombuffer(filled, np.int32).reshape(len(rows), width)

    def usage(self) -> Usage:
        """What is used, shared, held and wasted now."""
        entries = Counter(b for s in self._sequences.values() for b in s.table[s.forgotten :])
        free = self.num_free
        return Usage(
            num_blocks=self.num_blocks,
            free_blocks=free,
            used_blocks=len(entries),
            held_blocks=self.num_blocks - free - len(entries),
            table_entries=entries.total(),
            tokens=sum(map(self._counts.fill, entries)),
            block_size=self.block_size,
            peak_blocks=self._counts.peak,
        )

    def take_changed(self) -> set[Hashable]:
        """The sequences that live whose tables are new, or others than when this was asked last."""
        changed = {seq for seq, state in self._sequences.items() if state.has_changed}
        for seq in changed:
            self._sequences[seq].has_changed = False
        return changed

    # What may come.

    def can_allocate(
        self, num_tokens: int, *, prefix: Sequence[int] = (), forgotten: int = 0
    ) -> Literal["now", "later", "never"]:
        """Whether a prompt should be let in, given what sequences that run may still need.

        Args:
            num_tokens: tokens of the prompt.
            prefix: blocks that hold its first tokens already; see `allocate`.
            forgotten: see `allocate`.

        Returns:
            "now": floor(watermark * num_blocks) blocks or more stay free; "later": they would if nothing else were
            allocated; "never": not even then, so refuse it.

        Raises:
            DTypeError, RangeError, BlockStateError: what `allocate` would not take either.
        """
        table, new = self._planned(num_tokens, prefix, forgotten)
        if self.num_free - new >= self._reserve:
            return "now"
        held = len(table) + new - table.count(NO_BLOCK)
        return "later" if self.num_blocks - held >= self._reserve else "never"

    def append_cost(self, seq: Hashable, num_tokens: int = 1) -> int:
        """Blocks that `append` would take from the free ones, copies included."""
        state = self._sequence(seq)
        count = checks.integer("num_tokens", num_tokens, 0)
        shared = count > 0 and state.length % self.block_size > 0 and self._counts.refs[state.table[-1]] > 1
        return self._blocks(state.length + count) - len(state.table) + shared

    def forget_gain(self, seq: Hashable, num_tokens: int) -> int:
        """Blocks that `forget` would give back to the free ones: those nobody else holds."""
        state, end = self._forgettable(seq, num_tokens)
        return sum(self._counts.refs[b] == 1 for b in state.table[state.forgotten : end])

    # What happens to sequences.

    def allocate(self, seq: Hashable, num_tokens: int, *, prefix: Sequence[int] = (), forgotten: int = 0) -> None:
        """Begins a sequence. It may take the last block: `can_allocate` says whether it should.

        Args:
            seq: its name, anything hashable.
            num_tokens: tokens that it has room for at once: the whole prompt, so that two prompts that are computed
                in chunks do not wait for each other's blocks.
            prefix: full blocks that hold its first tokens already: shared, not copied.
            forgotten: tokens before those of `prefix` that no query will see, a multiple of `block_size`. They take no
                blocks; the table shows -1. For pools of layers with a window.

        Raises:
            DuplicateSequenceError: the name is taken.
            OutOfBlocksError: too few free blocks.
            BlockStateError: a prefix block that is free, not full, or given twice.
            RangeError: a prefix longer than `num_tokens`, a block that is not in the pool, a negative count.
            DTypeError: a name that is not hashable, counts that are no ints.
        """
        table, new = self.allocatable(seq, num_tokens, prefix=prefix, forgotten=forgotten)
        first, length, counts = table.count(NO_BLOCK) if table else 0, int(num_tokens), self._counts
        fresh = counts.next_free(new)
        self._sequences[seq] = _Sequence(table, length, first)  # a hash that raises changes nothing
        for block in table[first:]:
            counts.refs[block] += 1
        table.extend(fresh)
        counts.take(fresh, length)

    def allocatable(
        self, seq: Hashable, num_tokens: int, *, prefix: Sequence[int] = (), forgotten: int = 0
    ) -> tuple[array[int], int]:
        """The table that `allocate` would begin with, and how many blocks it would take; raises what it would."""
        try:
            is_known = seq in self._sequences
        except TypeError:
            checks.hashable("seq", seq)
            raise
        if is_known:
            raise DuplicateSequenceError(f"sequence {seq!r} is known already: free it first, or append to it.")
        table, new = self._planned(num_tokens, prefix, forgotten)
        if new > self.num_free:
            raise self._out_of_blocks(f"{num_tokens} tokens for sequence {seq!r} need {new} blocks")
        return table, new

    def append(self, seq: Hashable, num_tokens: int = 1) -> list[tuple[int, int]]:
        """Makes room for a sequence's next tokens.

        Args:
            seq: a sequence.
            num_tokens: how many are written next.

        Returns:
            Pages (source, target) to copy on the device before anything is written: the last block, if it has room and
            somebody else holds it. At most one; `kvattn.PagedKVCache.copy_pages` takes many at once.

        Raises:
            UnknownSequenceError: no such sequence.
            OutOfBlocksError: too few free blocks.
            RangeError, DTypeError: a negative count, no int.
        """
        state = self._sequence(seq)
        if type(num_tokens) is not int or num_tokens < 0:
            num_tokens = checks.integer("num_tokens", num_tokens, 0)
        table, length, counts = state.table, state.length + num_tokens, self._counts
        tail = state.length % self.block_size
        missing = -(-length // self.block_size) - len(table)
        copied = tail and num_tokens and counts.refs[table[-1]] > 1
        if not (missing or copied):  # nearly always, so nothing else is looked at
            if tail:
                counts.filled(table[-1], tail + num_tokens)
            state.length = length
            return []
        if missing + bool(copied) > self.num_free:
            raise self._out_of_blocks(
                f"{num_tokens} more tokens of sequence {seq!r} need {missing + bool(copied)} blocks"
            )
        state.has_changed = True
        copies = []
        if copied:
            source, (target,) = table[-1], counts.next_free(1)
            counts.take([target], tail)
            counts.refs[source] -= 1
            table[-1] = target
            copies.append((source, target))
        if tail:
            counts.filled(table[-1], min(tail + num_tokens, self.block_size))
        if missing:
            fresh = counts.next_free(missing)
            table.extend(fresh)
            counts.take(fresh, length)
        state.length = length
        return copies

    def fork(self, parent: Hashable, child: Hashable) -> None:
        """A second sequence with the same tokens, which shares all blocks: samples of one prompt, beams.

        Raises:
            UnknownSequenceError: no such parent.
            DuplicateSequenceError: the child's name is taken.
            DTypeError: a name that is not hashable.
        """
        state = self._sequence(parent)
        if checks.hashable("child", child) in self._sequences:
            raise DuplicateSequenceError(
                f"sequence {child!r} is known already: free it first, or fork to another name."
            )
        self._sequences[child] = _Sequence(state.table[:], state.length, state.forgotten)
        for block in state.table[state.forgotten :]:
            self._counts.refs[block] += 1

    def free(self, seq: Hashable) -> None:
        """Ends a sequence. Blocks that nobody else holds are free at once; others when the last lets go.

        Raises:
            UnknownSequenceError: no such sequence, or freed already.
            DTypeError: a name that is not hashable.
        """
        state = self._sequences.pop(checks.hashable("seq", seq), None)
        if state is None:
            raise self._unknown(seq)
        self._counts.let_go(reversed(state.table[state.forgotten :]))

    def forget(self, seq: Hashable, num_tokens: int) -> None:
        """A sequence's first tokens are out of every window: blocks that hold nothing else go.

        `length` stays, and so do the table's columns, which show -1. May be repeated: tokens count from the start.

        Args:
            seq: a sequence.
            num_tokens: tokens from its start; floor(num_tokens / block_size) blocks go.

        Raises:
            UnknownSequenceError: no such sequence.
            RangeError: more tokens than it has, a negative count.
            DTypeError: no int.
        """
        state, end = self._forgettable(seq, num_tokens)
        if end > state.forgotten:
            gone = state.table[state.forgotten : end]
            state.table[state.forgotten : end] = NOTHING * len(gone)
            state.forgotten = end
            state.has_changed = True
            self._counts.let_go(gone)

    # References that are no sequence's.

    def hold(self, blocks: Iterable[int]) -> None:
        """Keeps blocks from being free or written to until `release`: prefixes that are kept, copies in flight.

        Args:
            blocks: of the pool, in use; one given twice is held twice.

        Raises:
            BlockStateError: a block that is free.
            RangeError, DTypeError: a block that is not in the pool, no int.
        """
        self._counts.hold(self.holdable(blocks))

    def holdable(self, blocks: Iterable[int]) -> list[int]:
        """The blocks, if `hold` would take them; raises what it would."""
        return self._counts.holdable(blocks)

    def release(self, blocks: Iterable[int]) -> None:
        """Ends what `hold` began.

        Raises:
            BlockStateError: a block that is held less often than it is given.
            RangeError, DTypeError: a block that is not in the pool, no int.
        """
        self._counts.release(self.releasable(blocks))

    def releasable(self, blocks: Iterable[int]) -> list[int]:
        """The blocks, if `release` would take them; raises what it would."""
        return self._counts.releasable(blocks)

    # Proof.

    def check(self) -> None:
        """Counts everything anew.

        Raises:
            BlockStateError: counts, free blocks, tables and lengths contradict each other. That is a fault of kvattn.
        """
        self._counts.check(Counter(b for s in self._sequences.values() for b in s.table[s.forgotten :]))
        for seq, state in self._sequences.items():
            blocks = state.table[state.forgotten :]
            if (
                len(state.table) != self._blocks(state.length)
                or state.table[: state.forgotten] != NOTHING * state.forgotten
                or len(set(blocks)) != len(blocks)
                or not all(0 <= block < self.num_blocks for block in blocks)
            ):
                raise BlockStateError(
                    f"the table of sequence {seq!r} ({state.length} tokens) is {state.table.tolist()}."
                )
            for column, block in enumerate(blocks, state.forgotten):
                fill = self._counts.fill(block)
                if fill != min(state.length - column * self.block_size, self.block_size):
                    raise BlockStateError(
                        f"block {block}, column {column} of sequence {seq!r} ({state.length} tokens), counts {fill}."
                    )

    # Below.

    def _make_counts(self) -> Counts:
        return Counts(self.num_blocks, self.block_size)

    def _sequence(self, seq: Hashable) -> _Sequence:
        try:
            return self._sequences[seq]
        except TypeError:
            checks.hashable("seq", seq)
            raise
        except KeyError:
            raise self._unknown(seq) from None

    def _unknown(self, seq: Hashable) -> UnknownSequenceError:
        return UnknownSequenceError(f"sequence {seq!r} is not known here: it was never allocated, or is freed already.")

    def _out_of_blocks(self, what: str) -> OutOfBlocksError:
        return OutOfBlocksError(
            f"{what}, {self.num_free} of {self.num_blocks} are free. Nothing was taken: free a sequence, or evict "
            "prefixes that nobody reads."
        )

    def _blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _planned(self, num_tokens: int, prefix: Sequence[int], forgotten: int) -> tuple[array[int], int]:
        """The table so far of a sequence to come, and how many blocks it needs besides."""
        count = checks.integer("num_tokens", num_tokens, 0)
        if not (forgotten or len(prefix)):  # nearly always
            return array("i"), -(-count // self.block_size)
        first, rest = divmod(checks.integer("forgotten", forgotten, 0), self.block_size)
        if rest:
            raise RangeError(f"forgotten must be a multiple of block_size ({self.block_size}), got {forgotten}.")
        blocks = [self._counts.number(block) for block in prefix]
        if (first + len(blocks)) * self.block_size > count:
            raise RangeError(
                f"prefix and what is forgotten hold {(first + len(blocks)) * self.block_size} tokens, num_tokens is "
                f"{count}: a prefix is no longer than its sequence."
            )
        for block in blocks:
            is_used, tokens = self._counts.refs[block] > 0, self._counts.fill(block)
            if not is_used or tokens < self.block_size:
                state = f"holds {tokens} of {self.block_size} tokens" if is_used else "is free"
                raise BlockStateError(f"block {block} of the prefix {state}: only full blocks in use can be shared.")
        if len(set(blocks)) != len(blocks):
            raise BlockStateError(f"prefix names a block twice: {blocks}.")
        table = NOTHING * first
        table.extend(blocks)
        return table, self._blocks(count) - len(table)

    def _forgettable(self, seq: Hashable, num_tokens: int) -> tuple[_Sequence, int]:
        """A sequence, and the column before which its blocks would go."""
        state = self._sequence(seq)
        count = checks.integer("num_tokens", num_tokens, 0)
        if count > state.length:
            raise RangeError(f"num_tokens must be <= {state.length}, the length of sequence {seq!r}, got {count}.")
        return state, count // self.block_size
