"""Argument checks of the host side, which needs no JAX. Each names the argument, the value and the remedy."""

from array import array
from collections.abc import Hashable, Iterable
from numbers import Integral
from typing import Any

from kvattn.errors import ConfigError, DTypeError, KVAttnError, RangeError

TOKEN_BYTES = array("i").itemsize
"""Bytes of a token id: int32."""


def integer(name: str, value: object, minimum: int, error: type[KVAttnError] = RangeError) -> int:
    """Checks an integer; bools and floats are refused."""
    if type(value) is int and value >= minimum:  # nearly always
        return value
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise DTypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}.")
    if value < minimum:
        raise error(f"{name} must be >= {minimum}, got {value}.")
    return int(value)


def watermark(value: object) -> float:
    """Checks a share of blocks that is kept free, in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ConfigError(f"watermark must lie in [0, 1), got {value!r}.")
    return value


def hashable(name: str, value: object) -> Hashable:
    """Checks something that can be looked up."""
    try:
        hash(value)
    except TypeError as error:
        raise DTypeError(
            f"{name} must be hashable (a string, a number, a tuple of them), got {value!r} of type "
            f"{type(value).__name__}."
        ) from error
    return value


def namespace(value: object) -> str | tuple[str, ...]:
    """Checks what keeps texts of different owners apart."""
    if isinstance(value, str) or (isinstance(value, tuple) and all(isinstance(x, str) for x in value)):
        return value
    raise DTypeError(
        f"namespace must be a string or a tuple of strings, got {value!r}: parts that are joined to one string may "
        "collide."
    )


def tokens(name: str, values: Any) -> bytes:
    """Token ids as the bytes of int32, so that two texts are equal if and only if their bytes are.

    Args:
        name: of the argument.
        values: ints, or an array [S] of integers.

    Raises:
        DTypeError: bools, floats, anything but whole numbers.
        RangeError: a number that int32 does not hold.
    """
    dtype = getattr(values, "dtype", None)
    if dtype is not None:
        if not str(dtype).startswith(("int", "uint")) or getattr(values, "ndim", 1) != 1:
            raise DTypeError(f"{name} must be a vector of integers, got {dtype} of shape {values.shape}.")
        if str(dtype) == "int32":  # nearly always, and many times faster
            return values.tobytes()
        ids: list[int] = values.tolist()
    else:
        ids = _ints(name, values)
    try:
        return array("i", ids).tobytes()
    except OverflowError as error:
        wrong = next(i for i in ids if not -(2**31) <= i < 2**31)
        raise RangeError(f"{name} must fit in int32, got {wrong}.") from error


def _ints(name: str, values: Iterable[Any]) -> list[int]:
    try:
        ids = list(values)
    except TypeError as error:
        raise DTypeError(f"{name} must be a sequence of ints, got {values!r}.") from error
    if set(map(type, ids)) <= {int}:
        return ids
    for i, each in enumerate(ids):
        if isinstance(each, bool) or not isinstance(each, Integral):
            raise DTypeError(f"{name} must be ints, got {each!r} of type {type(each).__name__} at {i}.")
    return [int(each) for each in ids]
