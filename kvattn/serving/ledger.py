"""Who holds whose blocks, over many hosts: one cache of all of them, without JAX.

The managers of DistKV-LLM (Lin et al., arXiv:2401.02669), which ask each other by messages, as one replicated state
machine: every process keeps a `Ledger` and makes the same calls, so every process knows all tables, and none needs to
ask. Whether they did make the same calls is what `Ledger.digest` is compared for (`kvattn.serving.Agreement`).
"""

from collections import Counter
from collections.abc import Iterator

from kvattn.errors import (
    BlockStateError,
    ConfigError,
    DuplicateSequenceError,
    OutOfBlocksError,
    RangeError,
    UnknownSequenceError,
)
from kvattn.serving import checks, digests
from kvattn.serving.digests import Plain
from kvattn.serving.lending import Lending

Moves = list[tuple[int, int]]
"""Blocks (source, target) whose contents move; they apply in order: a target may be the source of an earlier one."""


class _Account:
    """One sequence: where it is at home, and its blocks in order."""

    __slots__ = ("home", "table")

    def __init__(self, home: int, table: list[int]):
        self.home = home
        self.table = table


class Ledger:
    """Gives the blocks of all hosts to sequences, those of a sequence's home first, and keeps account of loans.

    When its home has no free block, a sequence borrows one block at a time from the host with most free ones (of
    several, the lowest number). A host lends only what it has beyond its watermark; its own sequences may use all. So
    sums alone decide what fits: a sequence can have free(home) + Σ max(free(other) - reserve, 0) blocks.

    Block numbers are global: host h has the `blocks_per_host` numbers from h * `blocks_per_host` on. These are the
    pages of shard h of a pool that is split over a mesh axis. A call that raises has changed nothing.

    Args:
        num_hosts: hosts, numbered from 0.
        blocks_per_host: blocks of each.
        watermark: share of its blocks that a host does not lend, in [0, 1): floor(watermark * blocks_per_host) blocks.

    Sequences are named by ints, strings, bytes, None, or tuples of them: names are part of the digest.

    Raises:
        ConfigError: fewer than one host or block, or another watermark.
        DTypeError: sizes that are no ints.

    >>> ledger = Ledger(num_hosts=2, blocks_per_host=4, watermark=0.25)
    >>> ledger.allocate("a", 6, home=0)  # four of its own, two of host 1
    >>> ledger.allocate("b", 1, home=1)
    >>> ledger.table("a"), ledger.table("b"), ledger.loans
    ([0, 1, 2, 3, 4, 5], [6], {(1, 0): 2})
    >>> ledger.room(home=0), ledger.room(home=1)  # the last free block of host 1 is for its own
    (0, 1)
    """

    def __init__(self, num_hosts: int, blocks_per_host: int, *, watermark: float = 0.05):
        self._lending = Lending(num_hosts, blocks_per_host, watermark)
        self._accounts: dict[Plain, _Account] = {}
        self._borrowers: dict[int, _Account] = {}
        made = ("ledger", len(self._lending.free), self.blocks_per_host, self.watermark.hex())
        self._digest = digests.after(digests.NOTHING_DONE, *made)

    def __repr__(self) -> str:
        return (
            f"Ledger(hosts {self.hosts} of {self.blocks_per_host} blocks, {self.num_free} free, "
            f"{sum(self.loans.values())} lent, {len(self._accounts)} sequences)"
        )

    def __contains__(self, seq: object) -> bool:
        return digests.plain("seq", seq) in self._accounts

    # What it holds.

    @property
    def blocks_per_host(self) -> int:
        """Blocks of each host."""
        return self._lending.blocks_per_host

    @property
    def watermark(self) -> float:
        """Share of its blocks that a host does not lend."""
        return self._lending.watermark

    @property
    def hosts(self) -> list[int]:
        """The numbers of the hosts that are there, in order."""
        return sorted(self._lending.free)

    @property
    def num_hosts(self) -> int:
        """How many hosts are there."""
        return len(self._lending.free)

    @property
    def num_free(self) -> int:
        """Free blocks of all hosts."""
        return sum(map(len, self._lending.free.values()))

    @property
    def sequences(self) -> list[Plain]:
        """The sequences it knows, oldest first."""
        return list(self._accounts)

    @property
    def loans(self) -> dict[tuple[int, int], int]:
        """Blocks that are lent, by (creditor, debtor); pairs without any are left out."""
        return self._lending.pairs()

    def free_blocks(self, host: int) -> int:
        """Free blocks of a host.

        Raises:
            RangeError: no such host.
        """
        return len(self._lending.free[self._host("host", host)])

    def room(self, home: int) -> int:
        """How many blocks a sequence of that home can have now.

        Raises:
            RangeError: no such host.
        """
        return self._lending.room(self._host("home", home))

    def table(self, seq: Plain) -> list[int]:
        """The blocks of a sequence, in order."""
        return list(self._account(seq).table)

    def home(self, seq: Plain) -> int:
        """The host whose blocks a sequence takes first."""
        return self._account(seq).home

    # What happens to sequences.

    def allocate(self, seq: Plain, num_blocks: int, *, home: int) -> None:
        """Begins a sequence, with so many blocks.

        Args:
            seq: its name.
            num_blocks: that it takes at once, 0 or more.
            home: the host whose blocks it takes first, now and later.

        Raises:
            DuplicateSequenceError: the name is taken.
            OutOfBlocksError: `room` is less.
            RangeError: no such host, a negative count.
            DTypeError: a name that cannot be written out, numbers that are no ints.
        """
        name = digests.plain("seq", seq)
        if name in self._accounts:
            raise DuplicateSequenceError(f"sequence {seq!r} is known already: free it first, or append to it.")
        account = _Account(self._host("home", home), [])
        self._extend(name, account, checks.integer("num_blocks", num_blocks, 0), "allocate")
        self._accounts[name] = account

    def append(self, seq: Plain, num_blocks: int = 1) -> None:
        """Gives a sequence more blocks.

        Args:
            seq: a sequence.
            num_blocks: how many, 0 or more.

        Raises:
            UnknownSequenceError: no such sequence.
            OutOfBlocksError: `room` is less.
            RangeError, DTypeError: a negative count, no int.
        """
        name = digests.plain("seq", seq)
        self._extend(name, self._account(name), checks.integer("num_blocks", num_blocks, 0), "append")

    def free(self, seq: Plain) -> None:
        """Ends a sequence. Its blocks are free, and what it borrowed is given back.

        Raises:
            UnknownSequenceError: no such sequence, or freed already.
        """
        name = digests.plain("seq", seq)
        account = self._account(name)
        del self._accounts[name]
        for block in account.table:
            self._borrowers.pop(block, None)
        for block in reversed(account.table):  # so that they are taken again in the same order
            self._lending.give_back(block)
        self._note("free", name)

    def repay(self, limit: int) -> Moves:
        """Moves borrowed blocks home, where a home has free blocks again; the oldest loans first.

        Args:
            limit: the most blocks that move. What is left is for the next call.

        Returns:
            The moves (source, target), in the order in which their contents are to be copied. None are left that could
            be made if there are fewer than `limit`.

        Raises:
            RangeError, DTypeError: a negative limit, no int.
        """
        limit = checks.integer("limit", limit, 0)
        lending, moves = self._lending, []
        while len(moves) < limit and (able := lending.able()):
            _, source = min(
                (number, block) for debtor in able for block, number in [next(iter(lending.owed[debtor].items()))]
            )
            target, table = lending.repay(source), self._borrowers.pop(source).table
            table[table.index(source)] = target
            moves.append((source, target))
        self._note("repay", limit, tuple(moves))
        return moves

    # What happens to hosts.

    def add_host(self) -> int:
        """A host comes, with all its blocks free.

        Returns:
            Its number: the lowest that no host has, so one that left and comes again has its number and blocks back.
        """
        host = next(number for number in range(len(self._lending.free) + 1) if number not in self._lending.free)
        self._lending.come(host)
        self._note("add_host", host)
        return host

    def remove_host(self, host: int) -> Moves:
        """A host leaves; everything on it moves to the others first.

        Sequences that were at home there get as their home the host with most free blocks, the oldest sequence first.
        Each block then moves as if it were taken anew: to its sequence's home, or to who lends.

        Args:
            host: its number.

        Returns:
            The moves (source, target), in order.

        Raises:
            OutOfBlocksError: the others have no room for what lies there.
            ConfigError: it is the only host.
            RangeError, DTypeError: no such host, no int.
        """
        host = self._host("host", host)
        if self.num_hosts == 1:
            raise ConfigError(f"host {host} is the only one: a ledger has one host or more.")
        after = self._lending.copy()
        del after.free[host]
        moves: Moves = []
        changed: list[tuple[_Account, int, list[int]]] = []
        for name, account in self._accounts.items():
            home, table = account.home, list(account.table)
            if home == host:
                home = after.richest()
                for block in table:
                    after.settle(block)
                    if after.host_of(block) not in (home, host):
                        after.owe(home, block)
            for column, block in enumerate(table):
                if after.host_of(block) != host:
                    continue
                if not after.room(home):
                    raise OutOfBlocksError(
                        f"host {host} cannot leave: sequence {name!r} has blocks there that no other host has room for "
                        f"(each keeps {after.reserve} for its own). Nothing was changed: free a sequence first."
                    )
                after.settle(block)
                target = after.planned(home, 1)
                after.take(home, target)
                table[column] = target[0]
                moves.append((block, target[0]))
            changed.append((account, home, table))
        del after.owed[host]
        for account, home, table in changed:
            account.home, account.table = home, table
        self._lending = after
        self._borrowers = {block: account for account, block in self._borrowed()}
        self._note("remove_host", host, tuple(moves))
        return moves

    # Proof.

    def digest(self) -> bytes:
        """A digest (SHA-256) of all that was done, with what came of it.

        Equal where the same calls were made in the same order, in every process and version of Python; else, with all
        certainty, another one. Calls that raised and calls that only ask are no part of it.
        """
        return self._digest

    def check(self) -> None:
        """Counts everything anew.

        Raises:
            BlockStateError: tables, free blocks and loans contradict each other. That is a fault of kvattn.
        """
        lending = self._lending
        named = Counter(block for account in self._accounts.values() for block in account.table)
        if named and max(named.values()) > 1:
            raise BlockStateError(
                f"blocks {[b for b, n in named.items() if n > 1]} are in two tables, or twice in one."
            )
        named.update(block for blocks in lending.free.values() for block in blocks)
        size = lending.blocks_per_host
        if dict(named) != {host * size + i: 1 for host in lending.free for i in range(size)}:
            raise BlockStateError(f"of the blocks of hosts {self.hosts} not each is in one table, or free once.")
        if any(lending.host_of(block) != host for host, blocks in lending.free.items() for block in blocks):
            raise BlockStateError(f"a free block is said to be of another host: {lending.free}.")
        if lending.owed.keys() != lending.free.keys():
            raise BlockStateError(f"hosts {self.hosts} are there, {sorted(lending.owed)} have loans.")
        borrowed = sorted((account.home, block) for account, block in self._borrowed())
        noted = sorted((debtor, block) for debtor, owed in lending.owed.items() for block in owed)
        if borrowed != noted or noted != sorted((debtor, block) for block, debtor in lending.debtors.items()):
            raise BlockStateError(f"sequences borrow {borrowed} (home, block), loans are {noted}.")
        if self._borrowers != {block: account for account, block in self._borrowed()}:
            raise BlockStateError("a borrowed block is said to be of another sequence.")
        if any(list(owed.values()) != sorted(owed.values()) for owed in lending.owed.values()):
            raise BlockStateError(f"loans are not in the order in which they were made: {lending.owed}.")

    # Below.

    def _host(self, name: str, host: int) -> int:
        number = checks.integer(name, host, 0)
        if number not in self._lending.free:
            raise RangeError(f"{name} must be one of the hosts {self.hosts}, got {number}.")
        return number

    def _account(self, seq: Plain) -> _Account:
        account = self._accounts.get(digests.plain("seq", seq))
        if account is None:
            raise UnknownSequenceError(
                f"sequence {seq!r} is not known here: it was never allocated, or is freed already."
            )
        return account

    def _borrowed(self) -> Iterator[tuple[_Account, int]]:
        """The blocks that lie on another host than their sequence's home, looked for in all tables."""
        for account in self._accounts.values():
            for block in account.table:
                if self._lending.host_of(block) != account.home:
                    yield account, block

    def _extend(self, name: Plain, account: _Account, count: int, what: str) -> None:
        lending, home = self._lending, account.home
        if count > len(lending.free[home]) and count > (room := lending.room(home)):
            own = len(lending.free[home])
            raise OutOfBlocksError(
                f"{count} block{'s' * (count > 1)} for sequence {name!r} at home on host {home}: {room} can be had, "
                f"{own} there and {room - own} that others lend (each keeps {lending.reserve} of its "
                f"{self.blocks_per_host} for its own). Nothing was taken: free a sequence, or wait."
            )
        blocks = lending.planned(home, count)
        lending.take(home, blocks)
        account.table += blocks
        for block in blocks:
            if lending.host_of(block) != home:
                self._borrowers[block] = account
        self._note(what, name, home, count, tuple(blocks))

    def _note(self, what: str, *done: Plain) -> None:
        self._digest = digests.after(self._digest, what, *done)
