"""A pool of blocks that lie on several hosts: a `BlockPool` that takes them as a `Ledger` does.

Sequences share blocks here, and prefixes keep them, so loans are counted block by block: a block is owed by the home of
the sequence that took it until nobody holds it.
"""

from collections.abc import Hashable, Sequence

from kvattn.errors import BlockStateError, ConfigError
from kvattn.serving import checks, digests
from kvattn.serving.blocks import BlockPool
from kvattn.serving.counts import Counts
from kvattn.serving.lending import Lending


class _Counts(Counts):
    """Counted blocks of several hosts.

    Attributes:
        lending: who has which.
        home: of the sequence that takes blocks next.
        digest: of all that was taken.
    """

    __slots__ = ("digest", "home", "lending")

    def __init__(self, num_blocks: int, block_size: int, lending: Lending):
        super().__init__(num_blocks, block_size)
        self.free = []  # those of `lending` are
        self.lending = lending
        self.home = 0
        self.digest = digests.NOTHING_DONE

    def next_free(self, count: int) -> list[int]:
        return self.lending.planned(self.home, count)

    @property
    def num_free(self) -> int:
        return sum(map(len, self.lending.free.values()))

    def all_free(self) -> list[int]:
        return [block for blocks in self.lending.free.values() for block in blocks]

    def come_free(self, block: int) -> None:
        self.lending.give_back(block)

    def leave_free(self, blocks: list[int]) -> None:
        self.lending.take(self.home, blocks)
        self.digest = digests.after(self.digest, self.home, tuple(blocks))

    def moved(self, source: int, target: int) -> None:
        """A block's contents, and all that is counted of it, are another's now."""
        self.refs[source], self.refs[target] = 0, self.refs[source]
        if (tokens := self.partial.pop(source, None)) is not None:
            self.partial[target] = tokens
        self.digest = digests.after(self.digest, source, target)


class HostedPool(BlockPool):
    """Gives the blocks of several hosts to sequences, those of a sequence's home first.

    A new sequence is at home where most blocks are free, and a fork where its parent is. A home that has none left
    borrows from whoever has most free, down to the last block: all hosts decode all sequences together, so it is the
    pool's watermark that stays free for those that grow, wherever they are at home.

    Args:
        num_blocks: blocks of all hosts; host h has the num_blocks / num_hosts from h * num_blocks / num_hosts on.
        block_size: tokens per block.
        num_hosts: hosts.
        watermark: see `BlockPool`; of all blocks.

    Raises:
        ConfigError: blocks that do not divide over the hosts; else as `BlockPool`.
    """

    def __init__(self, num_blocks: int, block_size: int, *, num_hosts: int, watermark: float = 0.01):
        self.num_hosts = checks.integer("num_hosts", num_hosts, 1, ConfigError)
        if checks.integer("num_blocks", num_blocks, 1, ConfigError) % num_hosts:
            raise ConfigError(f"{num_blocks} blocks do not divide over {num_hosts} hosts: give a multiple.")
        self._lending = Lending(num_hosts, num_blocks // num_hosts, 0.0)
        self._homes: dict[Hashable, int] = {}
        super().__init__(num_blocks, block_size, watermark=watermark)

    # What it holds.

    @property
    def free_by_host(self) -> list[int]:
        """Free blocks of every host."""
        return [len(self._lending.free[host]) for host in range(self.num_hosts)]

    @property
    def loans(self) -> dict[tuple[int, int], int]:
        """Blocks that are lent, by (creditor, debtor); pairs without any are left out."""
        return self._lending.pairs()

    def home(self, seq: Hashable) -> int:
        """The host whose blocks a sequence takes first."""
        self._sequence(seq)
        return self._homes[seq]

    def digest(self) -> bytes:
        """A digest of all the blocks that were taken: equal where the same calls were made."""
        return self._hosted.digest

    # What happens to sequences.

    def allocate(self, seq: Hashable, num_tokens: int, *, prefix: Sequence[int] = (), forgotten: int = 0) -> None:
        """See `BlockPool.allocate`."""
        home = self._hosted.home = self._lending.richest()
        super().allocate(seq, num_tokens, prefix=prefix, forgotten=forgotten)
        self._homes[seq] = home

    def append(self, seq: Hashable, num_tokens: int = 1) -> list[tuple[int, int]]:
        """See `BlockPool.append`."""
        self._hosted.home = self._homes[seq] if seq in self else 0
        return super().append(seq, num_tokens)

    def fork(self, parent: Hashable, child: Hashable) -> None:
        """See `BlockPool.fork`."""
        super().fork(parent, child)
        self._homes[child] = self._homes[parent]

    def free(self, seq: Hashable) -> None:
        """See `BlockPool.free`."""
        super().free(seq)
        del self._homes[seq]

    def repay(self, limit: int) -> list[tuple[int, int]]:
        """Moves borrowed blocks home, where a home has free blocks again; the oldest loans first.

        Blocks that one sequence alone holds are moved; others stay where they are until nobody holds them.

        Args:
            limit: the most blocks that move.

        Returns:
            Pages (source, target) to copy on the device before anything is written, in order.

        Raises:
            RangeError, DTypeError: a negative limit, no int.
        """
        limit = checks.integer("limit", limit, 0)
        lending, refs, moves = self._lending, self._counts.refs, []
        if not limit or not lending.able():
            return moves
        tables = {block: state for state in self._sequences.values() for block in state.table[state.forgotten :]}
        while len(moves) < limit:
            movable = (
                (number, block)
                for debtor in lending.able()
                for block, number in lending.owed[debtor].items()
                if refs[block] == 1 and block in tables
            )
            _, source = min(movable, default=(0, None))
            if source is None:
                break
            target, state = lending.repay(source), tables.pop(source)
            table = state.table
            table[table.index(source)] = target
            state.has_changed = True
            self._hosted.moved(source, target)
            moves.append((source, target))
        return moves

    # Proof.

    def check(self) -> None:
        """See `BlockPool.check`; and that every loan is one."""
        super().check()
        lending = self._lending
        if any(lending.host_of(block) != host for host, blocks in lending.free.items() for block in blocks):
            raise BlockStateError(f"a free block is said to be of another host: {lending.free}.")
        if self._homes.keys() != self._sequences.keys():
            raise BlockStateError(f"sequences {self.sequences} are known, {list(self._homes)} have homes.")
        noted = {block: debtor for debtor, owed in lending.owed.items() for block in owed}
        if noted != lending.debtors:
            raise BlockStateError(f"loans are {lending.debtors}, hosts owe {noted}.")
        for block, debtor in noted.items():
            if not self._counts.refs[block] or lending.host_of(block) == debtor:
                raise BlockStateError(f"block {block} is said to be lent to host {debtor}.")

    # Below.

    @property
    def _hosted(self) -> _Counts:
        assert isinstance(self._counts, _Counts)
        return self._counts

    def _make_counts(self) -> Counts:
        return _Counts(self.num_blocks, self.block_size, self._lending)
