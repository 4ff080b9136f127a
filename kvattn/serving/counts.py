"""The blocks of a pool: which are free, how often each is held, how many tokens lie in it."""

from collections import Counter
from collections.abc import Iterable

from kvattn.errors import BlockStateError, RangeError
from kvattn.serving import checks

NO_BLOCK = -1
"""What a table shows where a sequence has no block: forgotten, or past its end. No cache reads it as a page."""


class Counts:
    """Counted blocks.

    Args:
        num_blocks: blocks of the pool.
        block_size: tokens per block.

    Attributes:
        free: blocks nobody holds; the next to be taken is the last.
        refs: how many hold each block: tables that name it, and `hold`.
        held: the part of them that is of `hold`.
        partial: tokens in the blocks in use that are not full.
        peak: the most blocks that were taken at once.
    """

    __slots__ = ("block_size", "free", "held", "num_blocks", "partial", "peak", "refs")

    def __init__(self, num_blocks: int, block_size: int):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.free = list(range(num_blocks - 1, -1, -1))
        self.refs = [0] * num_blocks
        self.held = [0] * num_blocks
        self.partial: dict[int, int] = {}
        self.peak = 0

    def number(self, block: int) -> int:
        """Checks the number of a block."""
        number = checks.integer("block", block, NO_BLOCK)
        if number == NO_BLOCK:
            raise BlockStateError(f"{NO_BLOCK} stands for no block: it can be neither held nor freed.")
        if number >= self.num_blocks:
            raise RangeError(f"block must lie in [0, {self.num_blocks}), got {number}.")
        return number

    def fill(self, block: int) -> int:
        """Tokens in a block in use."""
        return self.partial.get(block, self.block_size)

    def filled(self, block: int, tokens: int) -> None:
        """A block that was not full holds so many tokens now."""
        if tokens < self.block_size:
            self.partial[block] = tokens
        else:
            del self.partial[block]

    def next_free(self, count: int) -> list[int]:
        """The blocks that would be taken next; they stay free."""
        return self.free[: -count - 1 : -1] if count else []

    def take(self, blocks: list[int], length: int) -> None:
        """Takes the next free blocks; the last of them ends at `length` tokens of its sequence."""
        if not blocks:
            return
        refs = self.refs
        self.leave_free(blocks)
        for block in blocks:
            refs[block] = 1
        if tail := length % self.block_size:
            self.partial[blocks[-1]] = tail
        if (taken := self.num_blocks - self.num_free) > self.peak:
            self.peak = taken

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self.free)

    def all_free(self) -> list[int]:
        """The blocks that nobody holds."""
        return self.free

    def come_free(self, block: int) -> None:
        """A block that nobody holds any more."""
        self.free.append(block)

    def leave_free(self, blocks: list[int]) -> None:
        """The next free blocks are free no more."""
        del self.free[-len(blocks) :]

    def let_go(self, blocks: Iterable[int]) -> None:
        """One reference less of each; those that have none left are free."""
        for block in blocks:
            self.refs[block] -= 1
            if not self.refs[block]:
                self.partial.pop(block, None)
                self.come_free(block)

    def hold(self, blocks: list[int]) -> None:
        """One reference more of each, which is no table's; see `holdable`."""
        for block in blocks:
            self.refs[block] += 1
            self.held[block] += 1

    def holdable(self, blocks: Iterable[int]) -> list[int]:
        """Checks blocks that are to be held."""
        found = [self.number(block) for block in blocks]
        for block in found:
            if not self.refs[block]:
                raise BlockStateError(f"block {block} is free: only blocks in use can be held. Nothing was changed.")
        return found

    def release(self, blocks: list[int]) -> None:
        """Takes `hold` back; see `releasable`."""
        for block in blocks:
            self.held[block] -= 1
        self.let_go(blocks)

    def releasable(self, blocks: Iterable[int]) -> list[int]:
        """Checks blocks that are to be released."""
        found = [self.number(block) for block in blocks]
        for block, times in Counter(found).items():
            if times > self.held[block]:
                raise BlockStateError(
                    f"block {block} is to be released {times} times and is held {self.held[block]} times: what "
                    "sequences name is given back by free. Nothing was changed."
                )
        return found

    def check(self, named: Counter[int]) -> None:
        """Counts everything anew.

        Args:
            named: how many tables name each block.

        Raises:
            BlockStateError: something contradicts something else.
        """
        for block, (refs, held) in enumerate(zip(self.refs, self.held, strict=True)):
            if refs != named[block] + held or held < 0:
                raise BlockStateError(
                    f"block {block} counts {refs} references: {named[block]} tables name it, it is held {held} times."
                )
        for block, tokens in self.partial.items():
            if not self.refs[block] or not 0 < tokens < self.block_size:
                raise BlockStateError(f"block {block} counts {tokens} tokens of {self.block_size}.")
        if sorted(self.all_free()) != [block for block, refs in enumerate(self.refs) if not refs]:
            raise BlockStateError(f"blocks {sorted(self.all_free())} are said to be free, and others are not in use.")
