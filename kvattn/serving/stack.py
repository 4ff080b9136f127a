"""Tiers one below the other, as an engine uses them.

Records come in at the top, what is used longest ago sinks, what is hit rises: as in Mooncake (Qin et al.,
arXiv:2407.00079), HiCache and LMCache.
"""

from collections.abc import Iterable, Sequence
from types import TracebackType

from kvattn.errors import ConfigError, DTypeError
from kvattn.serving.records import PageName, Record
from kvattn.serving.tiers import Tier


class Tiers:
    """Tiers one below the other, as an engine uses them.

    Args:
        tiers: the fastest first.

    Raises:
        DTypeError: something that is no tier.
        ConfigError: a tier twice, or one below a tier that does not pass on what leaves it.
    """

    def __init__(self, tiers: Sequence[Tier]):
        self.tiers = tuple(tiers)
        for tier in self.tiers:
            if not isinstance(tier, Tier):
                raise DTypeError(f"tiers must be HostTier, DiskTier or the like, got {tier!r}.")
        if len(set(map(id, self.tiers))) != len(self.tiers):
            raise ConfigError(f"tiers must be different objects, got {self.tiers}.")
        if any(not tier.passes_on for tier in self.tiers[:-1]):
            raise ConfigError(f"what leaves a DiskTier is deleted, so it must be the last of tiers, got {self.tiers}.")

    def __enter__(self) -> "Tiers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __contains__(self, key: bytes) -> bool:
        """Whether some tier has a record of that key, as far as is known without reading it."""
        return any(key in tier for tier in self.tiers)

    def find(self, names: Iterable[PageName]) -> int:
        """How many of these pages are there, from the first given up to the first that is missing.

        It reads nothing: `load` may give fewer.
        """
        count = 0
        for name in names:
            if name.key not in self:
                break
            count += 1
        return count

    def load(self, names: Iterable[PageName]) -> list[Record]:
        """The records of these pages, up to the first that is missing; they rise to the top.

        Args:
            names: of pages that follow each other, and follow a hit, or start a text.

        Returns:
            As many as can be used: after the last one, every group with a window has what the next query sees. Records
            before that may lack such a group's arrays.
        """
        found: list[Record] = []
        for name in names:
            record = next((record for tier in self.tiers if (record := tier.get(name)) is not None), None)
            if record is None:
                break
            found.append(record)
        self.store(found)
        self.touch([record.name for record in found])
        return usable(found)

    def store(self, records: Iterable[Record]) -> None:
        """Takes in records of pages that follow each other, the first one first.

        What is there already is not copied: look with ``name.key in tiers`` what has to be read from the device. (With
        windows it may lack groups: see `Tier.put`.)
        """
        for record in reversed(list(records)):  # as `touch`
            self._put(record, 0)

    def touch(self, names: Sequence[PageName]) -> None:
        """Pages that follow each other count as used now, wherever they are: for hits on the device.

        The first counts as used last, so that the end of a text leaves before its start, without which it is of no use.
        """
        for name in reversed(names):
            for tier in self.tiers:
                tier.touch(name.key)

    def flush(self) -> None:
        """Copies what is in upper tiers only to the lowest, as far as it fits, and waits until it is there."""
        for level, tier in enumerate(self.tiers[:-1]):
            for record in tier.records():
                self._put(record, level + 1)
        for tier in self.tiers:
            tier.flush()

    def close(self) -> None:
        """Flushes, and closes every tier."""
        self.flush()
        for tier in self.tiers:
            tier.close()

    def _put(self, record: Record, level: int) -> None:
        """Puts a record into a tier, and what has to leave that into the next."""
        sinking = [record]
        for tier in self.tiers[level:]:
            sinking = [gone for each in sinking for gone in tier.put(each)]


def usable(records: list[Record]) -> list[Record]:
    """The longest start after which each group with a window has the last window - 1 tokens."""
    if not records:
        return []
    kind, good = records[0].name.kind, 0
    needs = [0 if window is None else -(-(window - 1) // kind.page_size) for window in kind.windows]
    runs = list(needs)  # what is before the first record was a hit itself, or is nothing
    for i, record in enumerate(records):
        runs = [
            min(run + 1, need) if record.has(g) else 0 for g, (run, need) in enumerate(zip(runs, needs, strict=True))
        ]
        if runs == needs:
            good = i + 1
    return records[:good]
