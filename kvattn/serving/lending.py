"""Blocks of several hosts: which are free, and which are lent to whom. What `Ledger` decides by.

The rules are those of DistKV-LLM (Lin et al., arXiv:2401.02669) without its messages: a sequence takes the blocks of
its home first, then one block at a time from the host that has most free. Whoever is told the same does the same.
"""

import math
from collections import Counter, OrderedDict
from typing import Self

from kvattn.errors import ConfigError
from kvattn.serving import checks


class Lending:
    """Free blocks by host, and loans by debtor.

    Block numbers are global: host h has the `blocks_per_host` numbers from h * `blocks_per_host` on.

    Args:
        num_hosts: hosts at first, numbered from 0.
        blocks_per_host: blocks of each.
        watermark: share of its blocks that a host keeps from being lent, in [0, 1). Its own sequences may use all.

    Attributes:
        free: of each host its free blocks; the next to be taken is the last.
        owed: of each host the blocks that its sequences borrow, with the number of the loan: the oldest first.
        debtors: of each block that is lent the host that owes it.
        reserve: blocks that a host does not lend: floor(watermark * blocks_per_host).

    Raises:
        ConfigError: fewer than one host or block, or another watermark.
        DTypeError: sizes that are no ints.
    """

    __slots__ = ("_loans_made", "blocks_per_host", "debtors", "free", "owed", "reserve", "watermark")

    def __init__(self, num_hosts: int, blocks_per_host: int, watermark: float):
        num_hosts = checks.integer("num_hosts", num_hosts, 1, ConfigError)
        self.blocks_per_host = checks.integer("blocks_per_host", blocks_per_host, 1, ConfigError)
        self.watermark = float(checks.watermark(watermark))
        self.reserve = math.floor(self.watermark * self.blocks_per_host)
        self.free: dict[int, list[int]] = {}
        self.owed: dict[int, OrderedDict[int, int]] = {}
        self.debtors: dict[int, int] = {}
        self._loans_made = 0
        for host in range(num_hosts):
            self.come(host)

    def copy(self) -> Self:
        """Another one in the same state."""
        new = object.__new__(type(self))
        new.blocks_per_host, new.reserve, new.watermark = self.blocks_per_host, self.reserve, self.watermark
        new.free = {host: list(blocks) for host, blocks in self.free.items()}
        new.owed = {host: OrderedDict(blocks) for host, blocks in self.owed.items()}
        new.debtors = dict(self.debtors)
        new._loans_made = self._loans_made
        return new

    def come(self, host: int) -> None:
        """A host that was not there, with all its blocks free."""
        first = host * self.blocks_per_host
        self.free[host] = list(range(first + self.blocks_per_host - 1, first - 1, -1))
        self.owed[host] = OrderedDict()

    def host_of(self, block: int) -> int:
        """Where a block lies."""
        return block // self.blocks_per_host

    def richest(self) -> int:
        """The host that has most free blocks; of several the lowest number."""
        return min(self.free, key=lambda host: (-len(self.free[host]), host))

    def lendable(self, host: int) -> int:
        """How many blocks a host has to lend."""
        return max(len(self.free[host]) - self.reserve, 0)

    def room(self, home: int) -> int:
        """How many blocks a sequence of that home can have now, those of others included."""
        return len(self.free[home]) + sum(self.lendable(host) for host in self.free if host != home)

    def planned(self, home: int, count: int) -> list[int]:
        """The blocks that a sequence of that home takes next, of which there must be `room`; nothing is changed."""
        blocks = self.free[home][: -count - 1 : -1]
        if len(blocks) < count:
            left = {host: len(free) for host, free in self.free.items() if host != home}
            for _ in range(count - len(blocks)):
                host = min(left, key=lambda host: (-left[host], host))
                left[host] -= 1
                blocks.append(self.free[host][left[host]])
        return blocks

    def pairs(self) -> dict[tuple[int, int], int]:
        """How many blocks are lent, by (creditor, debtor)."""
        return dict(sorted(Counter((self.host_of(block), debtor) for block, debtor in self.debtors.items()).items()))

    def take(self, home: int, blocks: list[int]) -> None:
        """Takes what was `planned`; what others lend is owed from now on."""
        for block in blocks:
            host = self.host_of(block)
            self.free[host].pop()
            if host != home:
                self.owe(home, block)

    def owe(self, debtor: int, block: int) -> None:
        """Notes a loan, as the newest."""
        self._loans_made += 1
        self.owed[debtor][block] = self._loans_made
        self.debtors[block] = debtor

    def settle(self, block: int) -> None:
        """Ends a loan, if the block is lent."""
        debtor = self.debtors.pop(block, None)
        if debtor is not None:
            del self.owed[debtor][block]

    def give_back(self, block: int) -> None:
        """Frees a block."""
        self.settle(block)
        self.free[self.host_of(block)].append(block)

    def able(self) -> list[int]:
        """The hosts that owe blocks and have free ones."""
        return [debtor for debtor, owed in self.owed.items() if owed and self.free[debtor]]

    def repay(self, block: int) -> int:
        """Moves a lent block to the next free one of its debtor, of which there must be one: the target."""
        target = self.free[self.debtors[block]].pop()
        self.give_back(block)
        return target
