"""The way of pages from the device into the tiers below it, and back."""

from typing import Any

from kvattn.serving.below import Below
from kvattn.serving.counts import NO_BLOCK
from kvattn.serving.device import AT_ONCE, Device
from kvattn.serving.prefixes import PrefixPool
from kvattn.serving.records import PageName, Record


class Sinking:
    """Pages on their way down.

    Args:
        below: where they go.
        device: where they are.
    """

    def __init__(self, below: Below, device: Device):
        self.below = below
        self._device = device
        self._under_way: list[tuple[list[PageName], list[tuple[int, ...]], list[dict[str, Any]]]] = []

    def read(self) -> None:
        """Reads pages of prefixes that have left, before others write to them."""
        for names, pages in self.below.take():
            rows = [page if isinstance(page, tuple) else (page,) for page in pages]
            self._under_way.append((names, rows, self._device.fetch([*zip(*rows, strict=True)])))

    def store(self) -> None:
        """Gives the tiers what has been read."""
        under_way, self._under_way = self._under_way, []
        for names, rows, parts in under_way:
            pages = [
                {n: x[i] for n, x in part.items()} for part in map(self._device.on_host, parts) for i in range(AT_ONCE)
            ]
            records = []
            for name, row, arrays in zip(names, rows, pages, strict=False):
                specs = name.kind.arrays
                there = {n: x for n, x in arrays.items() if row[specs[n].group] != NO_BLOCK}
                records.append(Record(name, there))
            self.below.tiers.store(records)

    def save(self, pool: PrefixPool) -> None:
        """Copies every prefix that is on the device, and waits until the tiers have it."""
        assert pool.tree is not None
        for text in pool.tree.leaves():
            self.below.leaves(text)
        self.read()
        self.store()
        self.below.tiers.flush()

    def forget(self) -> None:
        """Nothing is on its way any more: what the device held is lost."""
        self.below.take()
        self._under_way.clear()
