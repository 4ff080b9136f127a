"""Records to store, and system calls that fail, for the tests of tiers. Also run by processes that are killed."""

import errno
import fcntl
import functools
import hashlib
import json
import os
import pathlib
import random

import ml_dtypes
import numpy as np

from kvattn.serving import ArraySpec, Kind, Record, encoding, files, page_names

PAGE = 4
KEYS = ArraySpec("layers heads offsets features", (2, 2, PAGE, 3), "bfloat16")
SCALES = ArraySpec("layers heads offsets", (2, 2, PAGE), "float32")
WINDOW = ArraySpec("layers heads offsets features", (1, 2, PAGE, 2), "float8_e4m3fn", group=1)


def kind(**changes):
    """Two groups of layers, of which one has a window."""
    arrays = {"keys": KEYS, "scales": SCALES, "window": WINDOW}
    settings = {"model": "a model", "dtype": "bfloat16", "codec": "Plain()", "policy": "Full()", "page_size": PAGE}
    return Kind(**{**settings, "arrays": arrays, "windows": (None, 6), **changes})


def sized_kind(nbytes):
    """A page of so many bytes."""
    return kind(arrays={"data": ArraySpec("bytes", (nbytes,), "uint8")}, windows=(None,))


def record(name, groups=(0, 1)):
    """A record whose numbers, any bits, follow from its key."""
    rng = np.random.default_rng(list(name.key))
    arrays = {}
    for array, spec in name.kind.arrays.items():
        if spec.group in groups and name.tokens:
            arrays[array] = rng.integers(0, 256, spec.nbytes, np.uint8).view(dtype_of(spec)).reshape(spec.shape)
    return Record(name, arrays)


def dtype_of(spec):
    return np.dtype(getattr(ml_dtypes, spec.dtype, spec.dtype))


def records(count, kind=None, namespace="", start=0):
    """Those of one text."""
    kind = kind or DEFAULT
    return [record(name) for name in page_names(kind, namespace, range(start, start + count * kind.page_size))]


DEFAULT = kind()


def same(a, b):
    """Whether two records are equal in every bit."""
    content = lambda r: {n: (x.dtype, x.shape, x.tobytes()) for n, x in r.arrays.items()}
    return a.name == b.name and content(a) == content(b)


def right(found, wanted):
    """Whether a record is absent or the one that was asked for."""
    return found is None or same(found, wanted)


def sealed(table, data, version=encoding.FORMAT):
    """A record's bytes with a checksum that is right, whatever they say."""
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    content = encoding.HEADER.pack(encoding.MAGIC, version, len(text), len(data)) + text + data
    return content + hashlib.sha256(content).digest()


def parts(content):
    """Table and data of a record's bytes."""
    _, _, size, _ = encoding.HEADER.unpack_from(content)
    start = encoding.HEADER.size + size
    return json.loads(content[encoding.HEADER.size : start]), content[start:-32]


def path_of(folder, name):
    return pathlib.Path(folder) / f"{name.key.hex()}.kv"


CALLS = ("mkdir", "open", "fstat", "scandir", "unlink", "write", "fsync", "rename", "close", "readv", "flock")


class System:
    """Stands for `os` and `fcntl` in `kvattn.serving.files`; what happens at a call is said by `at`.

    Args:
        at: called with the number of the call, from 0, its name and the call itself, a `partial`; gives its result.
    """

    def __init__(self, at=lambda number, name, call: call()):
        self.at = at
        self.log = []

    def __getattr__(self, name):
        value = getattr(fcntl if name in ("flock", "LOCK_EX", "LOCK_NB") else os, name)
        if name not in CALLS:
            return value

        def call(*args, **options):
            self.log.append(name)
            return self.at(len(self.log) - 1, name, functools.partial(value, *args, **options))

        return call

    def __enter__(self):
        files.os = files.fcntl = self
        return self

    def __exit__(self, *_):
        files.os, files.fcntl = os, fcntl


def failing(name=None, code=errno.EIO, number=None, done=False):
    """A system of which calls of a name, or the one of a number, fail; `done`: after they did what they should."""

    def at(at_number, at_name, call):
        if at_name == name or at_number == number:
            if done or at_name == "close":
                result = call()
                if at_name == "open":
                    os.close(result)
                elif at_name == "scandir":
                    result.close()
            raise OSError(code, os.strerror(code))
        return call()

    return System(at)


def half(call):
    """Does a write or a read by half; any other call as it is."""
    if call.func not in (os.write, os.readv):
        return call()
    fd, data = call.args
    return call.func(fd, data[: -(-len(data) // 2)] if call.func is os.write else [data[0][: -(-len(data[0]) // 2)]])


def damaged(content, rng):
    """Bytes with a bit flipped, a piece cut off, put in, zeroed or moved."""
    at, length = rng.randrange(len(content)), rng.randrange(1, 64)
    what = rng.choice(["flip", "flip", "flip", "cut", "insert", "zero", "swap", "replace"])
    if what == "flip":
        changed = bytearray(content)
        for _ in range(rng.choice([1, 1, 1, 2, 8])):
            changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if what == "cut":
        return content[:at]
    if what == "insert":
        return content[:at] + rng.randbytes(length) + content[at:]
    if what == "zero":
        return content[:at] + bytes(len(content[at : at + length])) + content[at + length :]
    if what == "swap":
        return content[at:] + content[:at]
    return rng.randbytes(len(content))


def chance(*what):
    return random.Random(" ".join(map(str, what)))
