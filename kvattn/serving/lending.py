"""Blocks of several hosts: which are free, and which are lent to whom. What `Ledger` decides by.

The rules are those of DistKV-LLM (Lin et al., arXiv:2401.02669) without its messages: a sequence takes the blocks of
its home first, then one block at a time from the host that has most free. Whoever is told the same does the same.
"""

import math
from collections import OrderedDict
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
        owed: of each host the blocks that its sequences borrow, in the order in which they were borrowed.
        reserve: blocks that a host does not lend: floor(watermark * blocks_per_host).

    Raises:
        ConfigError: fewer than one host or block, or another watermark.
        DTypeError: sizes that are no ints.
    """

    __slots__ = ("_loans_made", "blocks_per_host", "free", "owed", "reserve", "watermark")

    def __init__(self, num_hosts: int, blocks_per_host: int, watermark: float):
        num_hosts = checks.integer("num_hosts", num_hosts, 1, ConfigError)
        self.blocks_per_host = checks.integer("blocks_per_host", blocks_per_host, 1, ConfigError)
        if isinstance(watermark, bool) or not isinstance(watermark, int | float) or not 0 <= watermark < 1:
            raise ConfigError(f"watermark must lie in [0, 1), got {watermark!r}.")
        self.watermark = float(watermark)
        self.reserve = math.floor(self.watermark * self.blocks_per_host)
        self.free: dict[int, list[int]] = {}
        self.owed: dict[int, OrderedDict[int, int]] = {}
        self._loans_made = 0
        for host in range(num_hosts):
            self.come(host)

    def copy(self) -> Self:
        """Another one in the same state."""
        new = object.__new__(type(self))
        new.blocks_per_host, new.reserve, new.watermark = self.blocks_per_host, self.reserve, self.watermark
        new.free = {host: list(blocks) for host, blocks in self.free.items()}
        new.owed = {host: OrderedDict(blocks) for host, blocks in self.owed.items()}
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

    def take(self, home: int, count: int) -> list[int]:
        """Takes so many blocks, of which there must be `room`; those that others lend are owed from now on."""
        own = self.free[home]
        kept = min(count, len(own))
        taken = own[: -kept - 1 : -1] if kept else []
        del own[len(own) - kept :]
        for _ in range(count - kept):
            block = self.free[self.richest()].pop()
            self.owe(home, block)
            taken.append(block)
        return taken

    def owe(self, debtor: int, block: int) -> None:
        """Notes a loan, as the newest."""
        self._loans_made += 1
        self.owed[debtor][block] = self._loans_made

    def give_back(self, home: int, blocks: list[int]) -> None:
        """Frees blocks of sequences of that home, the last first, so that they are taken again in the same order."""
        for block in reversed(blocks):
            self.owed[home].pop(block, None)
            self.free[self.host_of(block)].append(block)

    def repay_oldest(self) -> tuple[int, int] | None:
        """Moves the oldest loan whose debtor has a free block of its own: (source, target). None: there is none."""
        able = [(next(iter(owed.values())), debtor) for debtor, owed in self.owed.items() if owed and self.free[debtor]]
        if not able:
            return None
        _, debtor = min(able)
        source, _ = self.owed[debtor].popitem(last=False)
        self.free[self.host_of(source)].append(source)
        return source, self.free[debtor].pop()
