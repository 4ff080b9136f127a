"""Where pages go that the device has no room for: what every such place does, and host memory as one.

Whatever is wrong with a record, it is counted and reads as "not there", and is computed anew.
"""

import dataclasses
from collections import OrderedDict
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from kvattn.errors import ConfigError
from kvattn.serving import checks
from kvattn.serving.records import PageName, Record, checked_key


@dataclasses.dataclass(slots=True)
class TierCounters:
    """What happened to the records of a tier, each a page.

    Attributes:
        hits: were asked for, and given.
        misses: were asked for, and not given, for whatever reason.
        stored: came in.
        evicted: had to leave, because others came.
        damaged: were not what they should be: dropped.
        refused: were of another version, model, dtype or page size: dropped.
        failed: could not be written or read (no room, I/O error, too slow): dropped.
    """

    hits: int = 0
    misses: int = 0
    stored: int = 0
    evicted: int = 0
    damaged: int = 0
    refused: int = 0
    failed: int = 0


@runtime_checkable
class Tier(Protocol):
    """What a stack of tiers is made of.

    `get` and `put` raise nothing that storage does: what fails is counted, and lost.

    Attributes:
        max_bytes: that it may hold.
        counters: what happened.
        passes_on: whether `put` gives back what leaves. Where not, it is gone, so no tier can follow.
    """

    max_bytes: int
    counters: TierCounters
    passes_on: bool

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        ...

    def get(self, name: PageName) -> Record | None:
        """The record of a page, verified, which counts as used now; None: it is not there."""
        ...

    def put(self, record: Record) -> list[Record]:
        """Takes a record in, which counts as used now. Gives what has to leave, the one used longest ago first.

        A record larger than the tier is given back itself. One that is there stays as it is, unless it lacks arrays of
        a group with a window that the new one has.
        """
        ...

    def __contains__(self, key: bytes) -> bool:
        """Whether there is a record of that key, as far as is known without reading it."""
        ...

    def touch(self, key: bytes) -> None:
        """A record counts as used now, if it is there."""
        ...

    def remove(self, key: bytes) -> None:
        """Drops a record, if it is there."""
        ...

    def records(self) -> list[Record]:
        """All of them, the one used longest ago first; nothing where `passes_on` is false."""
        ...

    def flush(self) -> None:
        """Waits until all that was put is where it belongs."""
        ...

    def close(self) -> None:
        """Flushes, and lets go of files. Records stay where they are."""
        ...


class LeastRecent:
    """Keys with sizes, the one used longest ago first."""

    def __init__(self, max_bytes: int):
        self.max_bytes = checks.integer("max_bytes", max_bytes, 1, ConfigError)
        self.nbytes = 0
        self._sizes: OrderedDict[bytes, int] = OrderedDict()

    def __contains__(self, key: bytes) -> bool:
        return key in self._sizes

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._sizes)

    def holds(self, key: bytes, size: int) -> bool:
        """Whether a key is there, with that size or more."""
        return self._sizes.get(key, -1) >= size

    def touch(self, key: bytes) -> None:
        """A key is used now, if it is there."""
        if key in self._sizes:
            self._sizes.move_to_end(key)

    def add(self, key: bytes, size: int) -> list[bytes]:
        """Takes a new key; gives those that have to leave, itself if it never fits."""
        if size > self.max_bytes:
            return [key]
        self._sizes[key] = size
        self.nbytes += size
        gone = []
        while self.nbytes > self.max_bytes:
            oldest = next(iter(self._sizes))
            self.remove(oldest)
            gone.append(oldest)
        return gone

    def remove(self, key: bytes) -> None:
        """Drops a key, if it is there."""
        self.nbytes -= self._sizes.pop(key, 0)


class HostTier:
    """Records in host memory, those used longest ago leave first. It outlives an engine, not the process.

    Args:
        max_bytes: of arrays, tokens and keys.

    Raises:
        ConfigError, DTypeError: fewer than one byte, no int.
    """

    passes_on = True

    def __init__(self, max_bytes: int):
        self._recent = LeastRecent(max_bytes)
        self._records: dict[bytes, Record] = {}
        self.max_bytes = self._recent.max_bytes
        self.counters = TierCounters()

    def __repr__(self) -> str:
        return f"HostTier({len(self._records)} records, {self.nbytes} of {self.max_bytes} bytes)"

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        return self._recent.nbytes

    def __contains__(self, key: bytes) -> bool:
        return checked_key(key) in self._records

    def get(self, name: PageName) -> Record | None:
        """See `Tier.get`. Names are compared, so keys that collide are a miss."""
        record = self._records.get(name.key)
        if record is None or record.name != name:
            self.counters.misses += 1
            return None
        self._recent.touch(name.key)
        self.counters.hits += 1
        return record

    def put(self, record: Record) -> list[Record]:
        """See `Tier.put`."""
        key = record.name.key
        if self._recent.holds(key, record.nbytes):  # records of one name differ in which groups they have
            self._recent.touch(key)
            return []
        if record.nbytes > self.max_bytes:
            return [record]
        self.remove(key)
        self._records[key] = record
        gone = [self._records.pop(each) for each in self._recent.add(key, record.nbytes)]
        self.counters.stored += 1
        self.counters.evicted += len(gone)
        return gone

    def touch(self, key: bytes) -> None:
        """A record counts as used now, if it is there."""
        self._recent.touch(checked_key(key))

    def remove(self, key: bytes) -> None:
        """Drops a record, if it is there."""
        self._records.pop(checked_key(key), None)
        self._recent.remove(key)

    def records(self) -> list[Record]:
        """All of them, the one used longest ago first."""
        return [self._records[key] for key in self._recent]

    def flush(self) -> None:
        """Nothing: what was put is here."""

    def close(self) -> None:
        """Nothing: records stay."""
