"""Digests of what was done: equal in every process and every version of Python that did the same.

`hash` is another one in every process, and `pickle` and `repr` may change with a version, so values are written out
here: numbers, texts, bytes, None, and tuples of them.
"""

import hashlib
from numbers import Integral
from typing import Any

from kvattn.errors import DTypeError

Plain = int | str | bytes | None | tuple[Any, ...]
"""What can be written out; in tuples the same."""

NOTHING_DONE = bytes(32)
"""The digest before anything was done."""


def plain(name: str, value: object) -> Plain:
    """A value that can be written out, in the one form that all values equal to it have.

    Raises:
        DTypeError: anything but numbers, texts, bytes, None and tuples of them.
    """
    if type(value) is int or type(value) is str:  # nearly always
        return value
    if value is None:
        return None
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, bytes):
        return bytes(value)
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, tuple):
        return tuple(plain(name, part) for part in value)
    raise DTypeError(
        f"{name} must be an int, a string, bytes, None or a tuple of them, which every process can write out alike, "
        f"got {value!r} of type {type(value).__name__}."
    )


def written(value: Plain) -> bytes:
    """A value written out; no two values are written alike, and none is the beginning of another."""
    if isinstance(value, int):
        return b"i%x;" % value
    if isinstance(value, str):
        text = value.encode("utf-8", "surrogatepass")
        return b"s%x:" % len(text) + text
    if isinstance(value, bytes):
        return b"b%x:" % len(value) + value
    if value is None:
        return b"n"
    return b"t%x:" % len(value) + b"".join(map(written, value))


def after(digest: bytes, *done: Plain) -> bytes:
    """The digest after something more was done."""
    return hashlib.sha256(digest + written(done)).digest()
