"""Records in files, which outlive the process."""

import errno
import os
import threading
from concurrent.futures import Future
from types import TracebackType

from kvattn.errors import (
    CacheCorruptionError,
    CacheVersionError,
    ConfigError,
    DTypeError,
    OffloadError,
    UnsupportedError,
)
from kvattn.serving import checks, encoding
from kvattn.serving.records import PageName, Record, checked_key
from kvattn.serving.tiers import LeastRecent, TierCounters
from kvattn.serving.workers import Timed, Worker


class DiskTier:
    """Records in files of one directory, those used longest ago leave first. A new one finds what is there.

    `put` writes nothing itself: a thread does, one record after the other. What waits for it is found, from memory, so
    what is found does not depend on how fast the disk is; a process that ends waits for it too. `get` waits for the
    disk, but not longer than `deadline`.

    A file is a record with a checksum, of mode 0600, that is there whole or not at all (`kvattn.serving.files`).
    Processes may share a directory: each counts the bytes it knows of, and finds what others wrote when it starts; a
    file that another one removed is a miss.

    Args:
        path: of the directory; made, with mode 0700, if it is not there.
        max_bytes: of files. What is there at the start and does not fit is removed.
        deadline: seconds. A record that is not read in that time is lost. So is one that finds `queue_bytes` waiting
            for so long, and what comes after it, until there is room.
        queue_bytes: that may wait to be written; one record may exceed it.

    Raises:
        ConfigError: a path with "..", a symbolic link, a directory that everybody may write to, other sizes.
        DTypeError: sizes that are no numbers.
        OffloadError: the directory cannot be made, opened or read.
        UnsupportedError: the system is not POSIX.
    """

    passes_on = False

    def __init__(
        self, path: str | os.PathLike[str], max_bytes: int, *, deadline: float = 5.0, queue_bytes: int = 2**28
    ):
        if os.name != "posix":
            raise UnsupportedError(f"a DiskTier needs a POSIX system, this is {os.name!r}: use a HostTier.")
        from kvattn.serving.files import Directory  # elsewhere it could not be imported

        self._recent = LeastRecent(max_bytes)
        self.max_bytes = self._recent.max_bytes
        if isinstance(deadline, bool) or not isinstance(deadline, int | float):
            raise DTypeError(f"deadline must be a number of seconds, got {deadline!r}.")
        if not 0 < deadline < threading.TIMEOUT_MAX:
            raise ConfigError(f"deadline must be positive and finite, got {deadline}.")
        self.deadline = deadline
        self.queue_bytes = checks.integer("queue_bytes", queue_bytes, 1, ConfigError)
        self.counters = TierCounters()
        self._directory = Directory(path)
        self._waiting: dict[bytes, list[Record]] = {}  # put, and not written yet
        self._queued, self._is_stuck = 0, False
        self._changed = threading.Condition()
        self._writer = Worker[None]("kvattn-disk-writer", daemon=False)
        self._reader = Timed[bytearray | None]("kvattn-disk-reader", f"a read from {self._directory.path}")
        self._is_closed = False
        try:
            for key, size in self._directory.entries():
                self._delete(self._recent.add(key, size))
        except OffloadError:
            self._directory.close()
            raise

    def __repr__(self) -> str:
        return f"DiskTier({self._directory.path}, {self.nbytes} of {self.max_bytes} bytes)"

    def __enter__(self) -> "DiskTier":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def nbytes(self) -> int:
        """Bytes of the files, those included that are waiting to be written."""
        return self._recent.nbytes

    def __contains__(self, key: bytes) -> bool:
        with self._changed:
            return checked_key(key) in self._recent

    # Reading.

    def get(self, name: PageName) -> Record | None:
        """See `Tier.get`. A record that cannot be read, or is not what it should be, is counted and dropped."""
        self._check_open()
        record, wrong = None, ""
        if name.key in self:
            try:
                record = self.read(name)
                wrong = "" if record is not None else "gone"  # another process has removed it
            except CacheVersionError:
                wrong = "refused"
            except CacheCorruptionError:
                wrong = "damaged"
            except OffloadError as error:
                wrong = "failed" if error.errno != errno.EBUSY else "not tried"
        if wrong not in ("", "not tried"):
            self.remove(name.key)
        with self._changed:
            self.counters.hits += record is not None
            self.counters.misses += record is None
            self.counters.refused += wrong == "refused"
            self.counters.damaged += wrong == "damaged"
            self.counters.failed += wrong in ("failed", "not tried")
        self.touch(name.key)
        return record

    def read(self, name: PageName) -> Record | None:
        """The record of a page, verified; None: there is none. Nothing is counted or dropped.

        Raises:
            CacheVersionError: its file is of another version, model, dtype, codec, policy, page size or layout.
            CacheCorruptionError: its file is damaged, or of another text or namespace.
            OffloadError: it cannot be read, with `errno`. ETIMEDOUT: not before the deadline; EBUSY: not tried, since
                the read of another one still stalls.
        """
        self._check_open()
        with self._changed:
            waiting = self._waiting.get(name.key)
        if waiting is not None:
            if waiting[0].name != name:
                raise CacheCorruptionError(f"the record of {name!r} is of another page.")
            return waiting[0]
        head, check = encoding.HEADER.size, encoding.check_lengths
        content = self._reader.call(lambda: self._directory.read(name.key, self.max_bytes, head, check), self.deadline)
        return None if content is None else encoding.decode(content, name)

    # Writing.

    def put(self, record: Record) -> list[Record]:
        """See `Tier.put`. Nothing is ever given back but a record larger than the tier: what leaves is deleted.

        It waits only while `queue_bytes` wait for the disk, and not longer than `deadline`; then the record is lost.
        """
        self._check_open()
        key, size = record.name.key, encoding.encoded_size(record)
        with self._changed:
            if self._recent.holds(key, size):
                self._recent.touch(key)
                return []
        if size > self.max_bytes:
            return [record]
        if self._queue(record, size) is None:
            with self._changed:
                self.counters.failed += 1
        return []

    def write(self, record: Record) -> None:
        """Stores a record and waits until it is on the disk.

        Raises:
            OffloadError: it cannot be written, with `errno`; then it is not there. EFBIG: it is larger than the tier;
                ETIMEDOUT: `queue_bytes` waited before it until the deadline.
        """
        self._check_open()
        size = encoding.encoded_size(record)
        if size > self.max_bytes:
            raise OffloadError(errno.EFBIG, f"a record of {size} bytes is larger than max_bytes, {self.max_bytes}")
        if (future := self._queue(record, size)) is None:
            raise OffloadError(errno.ETIMEDOUT, f"too much is waiting to be written to {self._directory.path}")
        future.result()

    def _queue(self, record: Record, size: int) -> Future[None] | None:
        """Takes up a record, which is found from now on, and has it written; None: too much waits for that."""
        key, entry = record.name.key, [record]
        has_room = lambda: not self._queued or self._queued + size <= self.queue_bytes
        with self._changed:
            self._is_stuck = not self._changed.wait_for(has_room, 0 if self._is_stuck else self.deadline)
            if self._is_stuck:  # the next ones do not wait, until there is room
                return None
            if key in self._recent:
                self.remove(key)
            self._queued += size
            gone = self._recent.add(key, size)
            self._waiting[key] = entry
            self.counters.stored += 1
            self.counters.evicted += len(gone)
            self._delete(gone)
            return self._writer.submit(lambda: self._write(entry, size))

    def _write(self, entry: list[Record], size: int) -> None:
        """What the writer does with a record, unless that has left meanwhile: even one put again is another list."""
        (record,) = entry
        key = record.name.key
        is_wanted = lambda: self._waiting.get(key) is entry
        try:
            if is_wanted():
                self._directory.write(key, encoding.encode(record))
        except BaseException:
            with self._changed:
                self.counters.failed += 1
                if is_wanted():
                    self._recent.remove(key)
            raise
        finally:
            with self._changed:
                if is_wanted():
                    del self._waiting[key]
                self._queued -= size
                self._changed.notify_all()

    def touch(self, key: bytes) -> None:
        """A record counts as used now, if it is there."""
        with self._changed:
            self._recent.touch(checked_key(key))

    def remove(self, key: bytes) -> None:
        """Drops a record, if it is there; its file goes when what was put before is written."""
        with self._changed:
            self._recent.remove(checked_key(key))
            self._delete([key])

    def _delete(self, keys: list[bytes]) -> None:
        """Has the files of keys removed that are no longer known; in turn, as they may be put again."""
        for key in keys:
            self._waiting.pop(key, None)
            self._writer.submit(lambda key=key: self._directory.remove(key))

    def records(self) -> list[Record]:
        """Nothing: no tier is below this one."""
        return []

    def flush(self) -> None:
        """Waits until all that was put is written, or failed; as long as that takes."""
        self._writer.submit(lambda: None).result()

    def close(self) -> None:
        """Flushes, and lets go of the directory. Records stay; the tier cannot be used again. May be repeated."""
        if not self._is_closed:
            self.flush()
            self._is_closed = True
            self._directory.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise OffloadError(errno.EBADF, f"the tier of {self._directory.path} is closed: make a new one")
