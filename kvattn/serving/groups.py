"""Block pools of a model whose layers see differently far: one pool, and one table, per group of layers.

Layers of equal window and shape form a group. A group without a window keeps every token; one with a window gives
blocks back as they fall out of it, which one table for all layers could not. Blocks have the same number of tokens in
all groups, and their own number of bytes: no common multiple is needed, and a page of a prefix is the same tokens in
each.
"""

import dataclasses
import functools
from collections.abc import Hashable, Sequence
from typing import Literal

from kvattn import _paging
from kvattn.errors import ConfigError, OutOfBlocksError, ShapeError
from kvattn.serving import checks
from kvattn.serving.blocks import BlockPool
from kvattn.serving.counts import NO_BLOCK
from kvattn.serving.hosted import HostedPool
from kvattn.serving.usage import Usage

Blocks = Sequence[int | tuple[int, ...]]
"""Of every page of tokens the block, or one block per group (-1: none): `Match.pages`."""


@dataclasses.dataclass(frozen=True)
class LayerGroup:
    """Layers that share a table.

    Attributes:
        num_blocks: blocks of the group's pool.
        window: how many tokens a query sees, its own included; None: all.
        bytes_per_token: keys and values of one token in all layers of the group.
        slots: under policies that use slots again: no sequence has blocks for more tokens than this. None: it takes
            blocks as long as it grows.
    """

    num_blocks: int
    window: int | None = None
    bytes_per_token: int = 0
    slots: int | None = None

    def __post_init__(self):
        checks.integer("num_blocks", self.num_blocks, 1, ConfigError)
        checks.integer("bytes_per_token", self.bytes_per_token, 0, ConfigError)
        for name in ("window", "slots"):
            if (value := getattr(self, name)) is not None:
                checks.integer(name, value, 1)

    def stored(self, length: int) -> int:
        """Tokens that have slots once a sequence has so many."""
        return length if self.slots is None else min(length, self.slots)

    def blocks_at_once(self, length: int, chunk: int, block_size: int) -> int:
        """The most blocks that a sequence has at once while it grows to `length` tokens, `chunk` at a time."""
        return _paging.pages_at_once(length, block_size, slots=self.slots, window=self.window, chunk=chunk)

    def unseen(self, length: int) -> int:
        """Tokens, from the start, that no query after `length` tokens sees."""
        return 0 if self.window is None else max(length - self.window + 1, 0)


class GroupedPool:
    """A `BlockPool` for each group of layers, that move together: a call is made of all of them, or changes nothing.

    Args:
        groups: of layers.
        block_size: tokens per block, in all of them.
        watermark: see `BlockPool`.
        num_hosts: hosts on which the blocks of every group lie (`kvattn.serving.hosted`); None: they lie together.

    Raises:
        ConfigError: no groups, sizes below 1; else as `HostedPool`.

    >>> full, window = LayerGroup(num_blocks=8), LayerGroup(num_blocks=3, window=4)
    >>> pool = GroupedPool([full, window], block_size=2)
    >>> pool.allocate("a", 4)
    >>> for _ in range(3):
    ...     copies = pool.append("a")
    >>> pool.tables("a")
    ([0, 1, 2, 3], [-1, 1, 2, 0])
    """

    def __init__(
        self, groups: Sequence[LayerGroup], block_size: int, *, watermark: float = 0.01, num_hosts: int | None = None
    ):
        self.groups = tuple(groups)
        if not self.groups:
            raise ConfigError("groups must name one group of layers or more, got none.")
        make = BlockPool if num_hosts is None else functools.partial(HostedPool, num_hosts=num_hosts)
        self.pools: tuple[BlockPool, ...] = tuple(
            make(group.num_blocks, block_size, watermark=watermark) for group in self.groups
        )
        self.block_size = self.pools[0].block_size

    def __repr__(self) -> str:
        return f"GroupedPool({', '.join(map(repr, self.pools))})"

    def __contains__(self, seq: Hashable) -> bool:
        return seq in self.pools[0]

    # What it holds.

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Of the groups, as `RadixTree` takes them."""
        return tuple(group.window for group in self.groups)

    def tables(self, seq: Hashable) -> tuple[list[int], ...]:
        """A sequence's table in every group; see `BlockPool.table`."""
        return tuple(pool.table(seq) for pool in self.pools)

    def pages(self, seq: Hashable, count: int | None = None) -> Blocks:
        """A sequence's tables page by page, as `RadixTree.insert` takes them; the first so many."""
        tables = tuple(table[:count] for table in self.tables(seq))
        if len(tables) == 1:
            return tables[0]
        if len({len(table) for table in tables}) > 1:
            raise ShapeError(f"sequence {seq!r} has other tokens in every group: its tables have no pages in common.")
        return [*zip(*tables, strict=True)]

    def length(self, seq: Hashable) -> int | tuple[int, ...]:
        """Tokens of a sequence; one number per group where they are not the same."""
        lengths = tuple(pool.length(seq) for pool in self.pools)
        return lengths[0] if len(set(lengths)) == 1 else lengths

    def usage(self) -> tuple[Usage, ...]:
        """See `BlockPool.usage`, of every group."""
        return tuple(pool.usage() for pool in self.pools)

    @property
    def used_bytes(self) -> int:
        """Bytes of the blocks that are taken now."""
        return self._bytes([pool.num_blocks - pool.num_free for pool in self.pools])

    @property
    def peak_bytes(self) -> int:
        """Bytes of the most blocks that every group has had."""
        return self._bytes([usage.peak_blocks for usage in self.usage()])

    def one_table_bytes(self, num_tokens: int) -> int:
        """What so many tokens would take if all layers shared one table, and so kept every token."""
        blocks = -(-checks.integer("num_tokens", num_tokens, 0) // self.block_size)
        return self._bytes([blocks] * len(self.groups))

    # What happens to sequences.

    def can_allocate(self, num_tokens: int | Sequence[int], *, prefix: Blocks = ()) -> Literal["now", "later", "never"]:
        """See `BlockPool.can_allocate`: the least of what the groups say."""
        shares = zip(self.pools, self._stored(num_tokens), self._split(prefix), strict=True)
        answers = [
            pool.can_allocate(count, prefix=blocks, forgotten=forgotten) for pool, count, (blocks, forgotten) in shares
        ]
        return "never" if "never" in answers else "later" if "later" in answers else "now"

    def allocate(self, seq: Hashable, num_tokens: int | Sequence[int], *, prefix: Blocks = ()) -> None:
        """See `BlockPool.allocate`.

        Args:
            seq: its name.
            num_tokens: of the prompt; one number per group where they hold other tokens (images and text).
            prefix: `Match.pages` of a `RadixTree` with the windows of these groups.
        """
        shares = [*zip(self.pools, self._stored(num_tokens), self._split(prefix), strict=True)]
        for pool, count, (blocks, forgotten) in shares:
            pool.allocatable(seq, count, prefix=blocks, forgotten=forgotten)
        for pool, count, (blocks, forgotten) in shares:
            pool.allocate(seq, count, prefix=blocks, forgotten=forgotten)

    def append(
        self, seq: Hashable, num_tokens: int | Sequence[int] = 1, *, seen: int | None = None
    ) -> tuple[tuple[tuple[int, int], ...], ...]:
        """See `BlockPool.append`; before it, blocks that have fallen out of a window go.

        Args:
            seq: a sequence.
            num_tokens: how many are written next; one number per group where they differ.
            seen: tokens that are in it for good, by which windows move. None: all so far; fewer, where room was taken
                for tokens that did not come.

        Returns:
            The pages to copy first, of every group.
        """
        counts = self._growth(seq, num_tokens)
        for group, pool, count in zip(self.groups, self.pools, counts, strict=True):
            gain, cost = pool.forget_gain(seq, self._unseen(group, pool, seq, seen)), pool.append_cost(seq, count)
            if cost > gain + pool.num_free:
                raise OutOfBlocksError(
                    f"{count} more tokens of sequence {seq!r} need {cost} blocks in the group with window "
                    f"{group.window}, {gain + pool.num_free} of {pool.num_blocks} are free. Nothing was taken."
                )
        for group, pool in zip(self.groups, self.pools, strict=True):
            pool.forget(seq, self._unseen(group, pool, seq, seen))
        return tuple(tuple(pool.append(seq, count)) for pool, count in zip(self.pools, counts, strict=True))

    def append_needs(self, seq: Hashable, num_tokens: int | Sequence[int] = 1, *, seen: int | None = None) -> list[int]:
        """Blocks of every group that `append` would take from the free ones, less those it would give back."""
        return [
            pool.append_cost(seq, count) - pool.forget_gain(seq, self._unseen(group, pool, seq, seen))
            for group, pool, count in zip(self.groups, self.pools, self._growth(seq, num_tokens), strict=True)
        ]

    def fork(self, parent: Hashable, child: Hashable) -> None:
        """See `BlockPool.fork`."""
        for pool in self.pools:  # all know the same sequences, so the first raises or none
            pool.fork(parent, child)

    def free(self, seq: Hashable) -> None:
        """See `BlockPool.free`."""
        for pool in self.pools:
            pool.free(seq)

    def hold(self, blocks: Blocks) -> None:
        """See `BlockPool.hold`; of every group, as `RadixTree.adopt` gives them."""
        shares = self._of_groups(blocks)
        for pool, each in zip(self.pools, shares, strict=True):
            pool.holdable(each)
        for pool, each in zip(self.pools, shares, strict=True):
            pool.hold(each)

    def release(self, blocks: Blocks) -> None:
        """See `BlockPool.release`; of every group, as `RadixTree.evict` gives them."""
        shares = self._of_groups(blocks)
        for pool, each in zip(self.pools, shares, strict=True):
            pool.releasable(each)
        for pool, each in zip(self.pools, shares, strict=True):
            pool.release(each)

    def repay(self, limit: int) -> tuple[list[tuple[int, int]], ...]:
        """See `HostedPool.repay`, of every group; nothing where blocks lie together."""
        return tuple(pool.repay(limit) if isinstance(pool, HostedPool) else [] for pool in self.pools)

    def digest(self) -> bytes:
        """See `HostedPool.digest`, of all groups."""
        return b"".join(pool.digest() for pool in self.pools if isinstance(pool, HostedPool))

    def check(self) -> None:
        """See `BlockPool.check`."""
        for pool in self.pools:
            pool.check()

    # Below.

    def _bytes(self, blocks: Sequence[int]) -> int:
        sizes = (group.bytes_per_token * self.block_size for group in self.groups)
        return sum(count * size for count, size in zip(blocks, sizes, strict=True))

    def _counts(self, num_tokens: int | Sequence[int]) -> list[int]:
        if not isinstance(num_tokens, Sequence):
            return [num_tokens] * len(self.pools)
        if len(num_tokens) != len(self.pools):
            raise ShapeError(f"num_tokens must be one number, or {len(self.pools)}, one per group, got {num_tokens}.")
        return list(num_tokens)

    @staticmethod
    def _unseen(group: LayerGroup, pool: BlockPool, seq: Hashable, seen: int | None) -> int:
        """Tokens of a sequence that no query sees any more."""
        return group.unseen(pool.length(seq) if seen is None else min(seen, pool.length(seq)))

    def _stored(self, num_tokens: int | Sequence[int]) -> list[int]:
        """Tokens of a new sequence that have slots, in every group."""
        return [group.stored(n) for group, n in zip(self.groups, self._counts(num_tokens), strict=True)]

    def _growth(self, seq: Hashable, num_tokens: int | Sequence[int]) -> list[int]:
        """Tokens that take new slots when so many more come, in every group."""
        shares = zip(self.groups, self.pools, self._counts(num_tokens), strict=True)
        return [
            n if group.slots is None else group.stored(pool.length(seq) + n) - pool.length(seq)
            for group, pool, n in shares
        ]

    def _of_groups(self, blocks: Blocks) -> list[list[int]]:
        """The blocks of every group, without -1."""
        return [[block for block in column if block != NO_BLOCK] for column in self._columns(blocks)]

    def _columns(self, blocks: Blocks) -> list[list[int]]:
        rows = [row if isinstance(row, tuple) else (row,) for row in blocks]
        if any(len(row) != len(self.pools) for row in rows):
            raise ShapeError(f"blocks must be of {len(self.pools)} groups, one each, got {list(blocks)}.")
        return [[row[group] for row in rows] for group in range(len(self.pools))]

    def _split(self, prefix: Blocks) -> list[tuple[list[int], int]]:
        """Of every group the blocks of a prefix, and how many tokens before them have none."""
        shares = []
        for column in self._columns(prefix):
            first = next((i for i, block in enumerate(column) if block != NO_BLOCK), len(column))
            shares.append((column[first:], first * self.block_size))
        return shares
