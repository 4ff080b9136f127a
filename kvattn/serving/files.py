"""A directory of files that are there whole or not at all. All system calls of a disk tier are here.

A file is written under a name of its own, brought to the disk and renamed, so nobody sees half of one, and what a dead
process left is cleared away by the next. Paths are taken once, when the directory is opened; after that files are
named relative to it, and no symbolic link is followed.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

from kvattn.errors import CacheCorruptionError, ConfigError, OffloadError

SUFFIX = ".kv"
TEMPORARY = "tmp-"
NAME = re.compile(r"[0-9a-f]{64}\.kv")

READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # not blocking: somebody may have put a pipe there
CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Directory:
    """A directory of the user's own, with files named by keys.

    Args:
        path: is made, for the user alone, if it is not there; the directory it is in must be.

    Raises:
        ConfigError: a path with "..", a symbolic link, something else than a directory, one that everybody may write
            to: files in it could be anybody's.
        OffloadError: it can be neither made nor opened.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        if ".." in self.path.parts:
            raise ConfigError(f"path must not contain '..', got {str(self.path)!r}: give the directory itself.")
        with self._reported("opened"):
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.path, 0o700)
            try:
                self._fd = os.open(self.path, DIRECTORY)
            except OSError as error:
                if error.errno in (errno.ELOOP, errno.ENOTDIR):
                    raise ConfigError(f"path must be a directory, no symbolic link or file, got {self.path}.") from None
                raise
            self.close = weakref.finalize(self, _close, self._fd)
            try:
                mode = os.fstat(self._fd).st_mode
            except OSError:
                self.close()  # not when the error, which holds this object, has been collected
                raise
        if mode & stat.S_IWOTH:
            self.close()
            raise ConfigError(f"everybody may write to {self.path}, mode {stat.S_IMODE(mode):o}: take it away (0700).")

    def entries(self) -> list[tuple[bytes, int]]:
        """Key and size of every file, the one written longest ago first. Clears away what dead processes left.

        Raises:
            OffloadError: the directory cannot be read.
        """
        found = []
        with self._reported("listed"), os.scandir(self._fd) as entries:
            for entry in entries:
                if not entry.is_file(follow_symlinks=False):
                    continue
                if entry.name.startswith(TEMPORARY):
                    self._clear(entry.name)
                elif NAME.fullmatch(entry.name):
                    with contextlib.suppress(FileNotFoundError):
                        status = entry.stat(follow_symlinks=False)
                        found.append((status.st_mtime_ns, entry.name, status.st_size))
        return [(bytes.fromhex(name.removesuffix(SUFFIX)), size) for _, name, size in sorted(found)]

    def write(self, key: bytes, content: bytes) -> None:
        """Writes a file; whoever looks sees the old one, if there was one, or all of this.

        Raises:
            OffloadError: with `errno`; then there is no file.
        """
        name, temporary = _file(key), f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}"
        with self._reported("written", key):
            fd, left = os.open(temporary, CREATE, 0o600, dir_fd=self._fd), [temporary]
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)  # a sign of life, see `_clear`
                rest = memoryview(content)
                while rest:
                    count = os.write(fd, rest)
                    if not count:
                        raise OSError(errno.EIO, "nothing was written")
                    rest = rest[count:]
                os.fsync(fd)
                left.append(name)
                os.rename(temporary, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
                os.fsync(self._fd)
                closing, fd = fd, -1
                os.close(closing)  # some file systems say only now that there is no room
            except BaseException:
                for each in left:
                    with contextlib.suppress(OSError):
                        os.unlink(each, dir_fd=self._fd)
                if fd >= 0:
                    with contextlib.suppress(OSError):
                        os.close(fd)
                raise

    def read(self, key: bytes, limit: int, head: int, check: Callable[[bytes, int], object]) -> bytearray | None:
        """All of a file; None: there is none.

        Args:
            key: of the file.
            limit: the most bytes that it may have.
            head: bytes that `check` wants.
            check: called with the first bytes and the size of the file, before room is made for the rest.

        Raises:
            OffloadError: with `errno`.
            CacheCorruptionError: more than `limit` bytes, or fewer than its size said; what `check` raises.
        """
        with self._reported("read", key):
            try:
                fd = os.open(_file(key), READ, dir_fd=self._fd)
            except FileNotFoundError:
                return None
            try:
                status = os.fstat(fd)
                if not stat.S_ISREG(status.st_mode):
                    raise OSError(errno.EINVAL, "it is no regular file")
                if status.st_size > limit:
                    raise CacheCorruptionError(f"a record has {status.st_size} bytes, more than the {limit} allowed.")
                first = _filled(fd, bytearray(min(head, status.st_size)), 0)
                check(bytes(first), status.st_size)
                content = bytearray(status.st_size)
                content[: len(first)] = first
                return _filled(fd, content, len(first))
            finally:
                with contextlib.suppress(OSError):
                    os.close(fd)

    def remove(self, key: bytes) -> None:
        """Removes a file; one that is gone already is none.

        Raises:
            OffloadError: with `errno`.
        """
        with self._reported("removed", key), contextlib.suppress(FileNotFoundError):
            os.unlink(_file(key), dir_fd=self._fd)

    def _clear(self, name: str) -> None:
        """Removes an unfinished file unless its writer lives: that one holds a lock, which dies with it."""
        try:
            fd = os.open(name, READ, dir_fd=self._fd)
        except OSError:
            return  # it was finished, or somebody else has cleared it away
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(name, dir_fd=self._fd)
        except OSError:
            pass
        finally:
            with contextlib.suppress(OSError):
                os.close(fd)

    @contextlib.contextmanager
    def _reported(self, what: str, key: bytes | None = None) -> Iterator[None]:
        """Gives errors of the system the library's type, and says what they were about."""
        try:
            yield
        except OffloadError:
            raise
        except OSError as error:
            about = f"{self.path} could not be {what}" if key is None else f"{_file(key)} in {self.path} not {what}"
            raise OffloadError(error.errno, f"{about}: {error.strerror}") from error


def _file(key: bytes) -> str:
    return key.hex() + SUFFIX


def _filled(fd: int, content: bytearray, start: int) -> bytearray:
    """Reads into `content`, from `start` to its end."""
    view = memoryview(content)
    while start < len(content):
        count = os.readv(fd, [view[start:]])
        if not count:
            raise CacheCorruptionError(f"a record ends after {start} bytes of {len(content)}: it was cut.")
        start += count
    return content


def _close(fd: int) -> None:
    with contextlib.suppress(OSError):
        os.close(fd)
