"""Pools whose sequences leave their pages behind, as prefixes for those that come after them.

A `GroupedPool` and a `RadixTree` over the same pages, moved together. Prefixes that nobody reads are evicted when
blocks are wanted, and only then.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from kvattn.errors import BlockStateError, OutOfBlocksError
from kvattn.serving.below import Below
from kvattn.serving.counts import NO_BLOCK
from kvattn.serving.groups import GroupedPool, LayerGroup
from kvattn.serving.radix import Match, RadixTree
from kvattn.serving.records import Record

Copies = tuple[list[tuple[int, int]], ...]
"""Pages (source, target) to copy, of every group."""

NO_COPIES: Copies = ()

Tokens = Int32[np.ndarray, " S"]


class Restored(NamedTuple):
    """Pages that were below.

    Attributes:
        tables: of every group the pages that take them in.
        records: what they hold.
    """

    tables: list[list[int]]
    records: list[Record]


class PrefixPool:
    """Gives pages to sequences that are read in chunks and then grow token by token.

    A prompt gets its pages when it is let in, however it is read: of groups with a window those that it holds at once,
    which are taken as it goes and promised until then. So no two prompts wait for each other's pages.

    Args:
        groups: of layers.
        block_size: tokens per block.
        chunk: prompts are appended up to the next multiple of so many tokens at a time.
        is_shareable: whether the pages of a sequence can be read by others: its tokens lie in order and nothing about
            them is kept elsewhere. If not, a fork copies its pages.
        keeps_prefixes: whether pages stay when their sequence has ended. Only where they are shareable.
        watermark: see `BlockPool`.
        num_hosts: see `GroupedPool`.
        below: where pages of prefixes go when they leave, and come back from.

    Attributes:
        evictions: pages of prefixes that had to leave.
        stamp: another one whenever `known` may give another number.
    """

    def __init__(
        self,
        groups: Sequence[LayerGroup],
        block_size: int,
        *,
        chunk: int,
        is_shareable: bool = True,
        keeps_prefixes: bool = True,
        watermark: float = 0.01,
        num_hosts: int | None = None,
        below: Below | None = None,
    ):
        self.pool = GroupedPool(groups, block_size, watermark=watermark, num_hosts=num_hosts)
        self.is_shareable = is_shareable
        self.tree = RadixTree(block_size, windows=self.pool.windows) if is_shareable and keeps_prefixes else None
        self.below = below if self.tree is not None else None
        self.evictions = 0
        self.stamp = 0
        self._restored: list[Restored] = []
        self._chunk = chunk
        self._reserves = [int(watermark * group.num_blocks) for group in groups]
        self._promised = [0] * len(groups)
        self._promises: dict[Hashable, list[int]] = {}
        self._matches: dict[Hashable, Match] = {}
        self._spaces: dict[Hashable, Hashable] = {}
        self._plain = len(groups) == 1 and groups[0].window is None and groups[0].slots is None

    def __contains__(self, seq: Hashable) -> bool:
        return seq in self._spaces

    # What it holds.

    @property
    def num_sequences(self) -> int:
        """Sequences that live."""
        return len(self._spaces)

    @property
    def used_pages(self) -> int:
        """Pages that sequences hold, of all groups."""
        return sum(usage.used_blocks for usage in self.pool.usage())

    @property
    def cached_pages(self) -> int:
        """Pages that the tree holds, of all groups."""
        return 0 if self.tree is None else sum(self.tree.count(g) for g in range(len(self.pool.pools)))

    def known(self, tokens: Tokens, namespace: Hashable) -> int:
        """How many tokens of a prompt need not be computed; nothing counts as used."""
        return 0 if self.tree is None else self.tree.peek(tokens[:-1], namespace)

    def fits_alone(self, num_tokens: int, num_sequences: int = 1, shared: int = 0) -> bool:
        """Whether sequences of so many tokens fit if there is nothing else.

        Args:
            num_tokens: of each.
            num_sequences: that must be there at once.
            shared: tokens that they have in common.
        """
        size, several = self.pool.block_size, num_sequences - 1
        for group in self.pool.groups:
            most = group.blocks_at_once(num_tokens, self._chunk, size)
            common = shared // size if self.is_shareable and group.window is None else 0
            if most + several * (most - common) > group.num_blocks:
                return False
        return True

    def tables(self, seqs: Sequence[Hashable], widths: Sequence[int]) -> list[Int32[np.ndarray, "M W"]]:
        """The tables of some sequences in every group."""
        return [pool.page_table(seqs, width) for pool, width in zip(self.pool.pools, widths, strict=True)]

    def take_changed(self) -> set[Hashable]:
        """See `BlockPool.take_changed`, of any group."""
        return set().union(*(pool.take_changed() for pool in self.pool.pools))

    def length(self, seq: Hashable) -> int:
        """Tokens that a sequence has room for."""
        return self.pool.pools[0].length(seq)

    # What happens to sequences.

    def open(self, seq: Hashable, tokens: Tokens, namespace: Hashable, *, alone: bool = False) -> int | None:
        """Lets a sequence in whose `tokens` are computed next.

        Args:
            seq: its name.
            tokens: of its prompt.
            namespace: see `RadixTree`.
            alone: whether nobody else is there who could need the watermark's blocks.

        Returns:
            How many of the tokens lie in pages already, less than all; None: there is no room now.
        """
        match = None if self.tree is None else self.tree.match(tokens[:-1], namespace)
        start = 0 if match is None else match.length
        if match is not None:
            assert self.tree is not None
            self.tree.lock(match)
        pages = [] if match is None else match.pages
        names = [] if self.below is None else self.below.find(tokens[:-1], namespace, start)
        found = start + len(names) * self.pool.block_size
        counts = [self._at_first(group, found, len(tokens)) for group in self.pool.groups]
        own = [self._own(group, start, len(tokens)) for group in self.pool.groups]
        needs = [max(pair) for pair in zip(own, self._fresh(start, counts), strict=True)]
        reserves = [0] * len(needs) if alone else self._reserves
        if not self._make_room([n + r for n, r in zip(needs, reserves, strict=True)]):
            if match is not None:
                assert self.tree is not None
                self.tree.unlock(match)
            return None
        records: list[Record] = []
        if self.below is not None and names:
            records = self.below.load(names)
            found = start + len(records) * self.pool.block_size
            counts = [self._at_first(group, found, len(tokens)) for group in self.pool.groups]
        self.pool.allocate(seq, counts, prefix=pages)
        self._spaces[seq] = namespace
        if match is not None:
            self._matches[seq] = match
        free = [pool.num_free for pool in self.pool.pools]
        if records:
            for group, pool in zip(self.pool.groups, self.pool.pools, strict=True):
                pool.forget(seq, group.unseen(found))  # which records need not have
        held = [
            a - pool.num_free + b for a, pool, b in zip(free, self.pool.pools, self._fresh(start, counts), strict=True)
        ]
        self._promise(seq, [a - b for a, b in zip(needs, held, strict=True)])
        if records:
            first = start // self.pool.block_size
            tables = [table[first : first + len(records)] for table in self.pool.tables(seq)]
            self._restored.append(Restored(tables, records))
        return found

    def take_restored(self) -> list[Restored]:
        """Pages that came back from below since it was asked last, before their sequences are read."""
        restored, self._restored = self._restored, []
        return restored

    def reach(self, seq: Hashable, num_tokens: int) -> None:
        """Takes the pages for the first so many tokens of its prompt; they were promised."""
        counts = [
            0 if group.window is None else max(num_tokens - pool.length(seq), 0)
            for group, pool in zip(self.pool.groups, self.pool.pools, strict=True)
        ]
        if not any(counts):
            return
        had = [pool.num_free for pool in self.pool.pools]
        self.pool.append(seq, counts)
        # What falls out of a window and was its own is its own again when it needs more.
        taken = [before - pool.num_free for before, pool in zip(had, self.pool.pools, strict=True)]
        promised = self._promises.get(seq, [0] * len(taken))
        self._promise(seq, [p - t for p, t in zip(promised, taken, strict=True)])

    def keep(self, seq: Hashable, tokens: Tokens) -> None:
        """Leaves the pages of a sequence's first tokens, which lie in them, to others; it goes on reading them."""
        self._promise(seq, None)
        if self.tree is None:
            return
        self.stamp += 1
        space = self._spaces[seq]
        full = len(tokens) // self.pool.block_size
        self.pool.hold(self.tree.adopt(tokens, self.pool.pages(seq, full), space))
        match = self.tree.match(tokens, space)
        self.tree.lock(match)
        if (old := self._matches.pop(seq, None)) is not None:
            self.tree.unlock(old)
        self._matches[seq] = match

    def grow(self, seq: Hashable, num_tokens: int = 1, *, seen: int | None = None) -> Copies | None:
        """Makes room for a sequence's next tokens.

        Args:
            seq: which.
            num_tokens: how many.
            seen: see `GroupedPool.append`.

        Returns:
            The pages to copy first, of every group; `NO_COPIES`; None: there is no room, and nothing has changed.
        """
        if self._plain:  # nearly always there is room in its last page
            (pool,) = self.pool.pools
            try:
                copies = pool.append(seq, num_tokens)
            except OutOfBlocksError:
                if not self._make_room([pool.append_cost(seq, num_tokens)]):
                    return None
                copies = pool.append(seq, num_tokens)
            return (copies,) if copies else NO_COPIES
        needs = self.pool.append_needs(seq, num_tokens, seen=seen)
        if any(need > 0 for need in needs) and not self._make_room(needs):
            return None
        copies = self.pool.append(seq, num_tokens, seen=seen)
        return tuple(map(list, copies)) if any(copies) else NO_COPIES

    def fork(self, parent: Hashable, child: Hashable) -> Copies | None:
        """A second sequence with the same tokens: the pages to copy first. None: there is no room for it."""
        if self.is_shareable:
            self.pool.fork(parent, child)
            copies = NO_COPIES
        else:
            lengths = [pool.length(parent) for pool in self.pool.pools]
            needs = [-(-length // self.pool.block_size) for length in lengths]
            if not self._make_room(needs):
                return None
            self.pool.allocate(child, lengths)
            pairs = zip(self.pool.tables(parent), self.pool.tables(child), strict=True)
            copies = tuple([*zip(a, b, strict=True)] for a, b in pairs)
        self._spaces[child] = self._spaces[parent]
        if self.tree is not None and parent in self._matches:
            self._matches[child] = self._matches[parent]
            self.tree.lock(self._matches[child])
        return copies

    def close(self, seq: Hashable) -> None:
        """Ends a sequence. What it left to others stays as long as there is room."""
        self.pool.free(seq)
        del self._spaces[seq]
        self._promise(seq, None)
        if (match := self._matches.pop(seq, None)) is not None:
            assert self.tree is not None
            self.tree.unlock(match)

    def forget_prefixes(self) -> None:
        """Evicts every prefix, also those that sequences read: these hold their pages themselves."""
        if self.tree is None:
            return
        for match in self._matches.values():
            self.tree.unlock(match)
        self._matches.clear()
        for group in range(len(self.pool.pools)):
            self._evict(group, self.tree.count(group))

    def check(self) -> None:
        """Counts everything anew; see `BlockPool.check`.

        Raises:
            BlockStateError: pool, tree and what is known of sequences contradict each other.
        """
        self.pool.check()
        sequences = set(self.pool.pools[0].sequences)
        if sequences != set(self._spaces):
            raise BlockStateError(f"the pool knows sequences {sequences}, here are {set(self._spaces)}.")
        promised = [sum(column) for column in zip(*self._promises.values(), strict=True)] or [0] * len(self._promised)
        if promised != self._promised:
            raise BlockStateError(f"{self._promised} blocks are said to be promised, sequences wait for {promised}.")
        if self.tree is None:
            return
        self.tree.check()
        for group, pool in enumerate(self.pool.pools):
            if pool.num_held != self.tree.count(group):
                raise BlockStateError(
                    f"{pool.num_held} blocks of group {group} are held, the tree has {self.tree.count(group)}."
                )

    # Below.

    def _at_first(self, group: LayerGroup, start: int, length: int) -> int:
        """Tokens whose pages a prompt takes when it is let in."""
        return length if group.window is None else min(length, (start // self._chunk + 1) * self._chunk)

    def _own(self, group: LayerGroup, start: int, length: int) -> int:
        """The most blocks that are its own while a prompt is read from `start` on."""
        size = self.pool.block_size
        blocks = -(-group.stored(length) // size) - start // size
        return min(blocks, group.blocks_at_once(length, self._chunk, size)) if group.window is not None else blocks

    def _fresh(self, start: int, counts: Sequence[int]) -> list[int]:
        """Blocks that a prompt takes when it is let in, so many tokens of every group."""
        size = self.pool.block_size
        return [-(-g.stored(n) // size) - start // size for g, n in zip(self.pool.groups, counts, strict=True)]

    def _promise(self, seq: Hashable, promises: list[int] | None) -> None:
        """Says what a sequence may still take."""
        for sign, given in ((-1, self._promises.pop(seq, None)), (1, promises)):
            if given is not None:
                self._promised = [a + sign * b for a, b in zip(self._promised, given, strict=True)]
        if promises is not None and any(promises):
            self._promises[seq] = promises

    def _make_room(self, needs: Sequence[int]) -> bool:
        """Sees that so many blocks of every group are free beyond those promised; whether they are."""
        pools = self.pool.pools
        short = [n + p - pool.num_free for n, p, pool in zip(needs, self._promised, pools, strict=True)]
        if max(short) <= 0:
            return True
        if self.tree is None or any(s > 0 and s > self.tree.evictable(g) for g, s in enumerate(short)):
            return False
        for group, (need, promised) in enumerate(zip(needs, self._promised, strict=True)):
            while (missing := need + promised - pools[group].num_free) > 0:
                if not self._evict(group, missing):
                    return False
        return True

    def _evict(self, group: int, count: int) -> bool:
        """Evicts so many pages of a group; whether there were any."""
        assert self.tree is not None
        gone = self.tree.evict(count, group=group, told=None if self.below is None else self.below.leaves)
        self.stamp += 1
        self.pool.release(gone)
        self.evictions += sum(page != NO_BLOCK for row in gone for page in (row if isinstance(row, tuple) else (row,)))
        return bool(gone)
