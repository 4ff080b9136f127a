"""What the command's words mean: counts, bytes, policies, codecs. Each is refused by its name."""

import inspect
import re

import typer
from typer.models import OptionInfo

from kvattn._registry import Registry
from kvattn.codecs import Codec
from kvattn.codecs.registry import CODECS
from kvattn.errors import ConfigError, DTypeError, RangeError, UnknownNameError
from kvattn.memory.dtypes import name_of
from kvattn.policies import Policy
from kvattn.policies.registry import POLICIES

DTYPES = ("bfloat16", "float16", "float32")
"""What a cache without a codec is stored in."""

_BYTES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_BYTES |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def option(metavar: str, help: str) -> OptionInfo:
    """An option of a command: what to write after its name, and what it does."""
    return typer.Option(metavar=metavar, help=help)


def count(name: str, text: str | None, least: int = 1) -> int | None:
    """An int; underscores and commas may divide its digits.

    Raises:
        DTypeError: no int.
        RangeError: below `least`.
    """
    if text is None:
        return None
    plain = text.strip().replace(",", "_")
    if not re.fullmatch(r"[+-]?\d+(_\d+)*", plain):
        raise DTypeError(f"--{name} must be an int >= {least}, got {text!r}.")
    value = int(plain)
    if value < least:
        raise RangeError(f"--{name} must be >= {least}, got {value}.")
    return value


def required(name: str, text: str, least: int = 1) -> int:
    """`count` of an option that has a default."""
    value = count(name, text, least)
    assert value is not None  # text is not None
    return value


def number(name: str, text: str | None) -> float | None:
    """A finite number.

    Raises:
        DTypeError: no number.
    """
    if text is None:
        return None
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", text.strip(), re.IGNORECASE):
        raise DTypeError(f"--{name} must be a finite number, got {text!r}.")
    return float(text)


def num_bytes(name: str, text: str) -> int:
    """Bytes: an int, or a number with a unit (kB, MB, GB, TB, KiB, MiB, GiB, TiB).

    Raises:
        DTypeError: neither.
    """
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([a-zA-Z]*)", text.strip())
    if match is None or match[2].lower() not in _BYTES:
        raise DTypeError(f"--{name} must be bytes such as 2GB or 512MiB, got {text!r}.")
    return int(float(match[1]) * _BYTES[match[2].lower()])


def policy(text: str | None) -> Policy | None:
    """A policy from `name` or `name:a,b` or `name(a, b)`; arguments as its class takes them.

    Raises:
        UnknownNameError: no such policy.
        ConfigError, DTypeError, RangeError: arguments it does not take.
    """
    return None if text is None else _made("policy", text, POLICIES, "h2o:512,512, streaming:4,1020")


def codec(text: str | None) -> tuple[Codec | None, str | None]:
    """A codec likewise, or a dtype: then (None, its name).

    Raises:
        UnknownNameError: neither.
        ConfigError, DTypeError, RangeError: arguments it does not take.
    """
    if text is None:
        return None, None
    try:
        name = name_of("codec", text)
    except (ConfigError, DTypeError):
        name = None
    if name in DTYPES:
        return None, name
    return _made("codec", text, CODECS, "int4:64, kivi:2,32,128"), None


def _made[T](what: str, text: str, known: Registry[T], example: str) -> T:
    match = re.fullmatch(r"\s*([A-Za-z][\w-]*)\s*(?:[:=](.*)|\((.*)\))?\s*", text)
    entry = known.find(match[1]) if match else None
    if match is None or entry is None or entry.name in DTYPES:
        names = ", ".join(name for each in known.registered() for name in each.names)
        raise UnknownNameError(f"unknown {what} {text!r}; the known ones are {names} (with arguments: {example}).")
    kind = entry.kind
    positional: list[int | float | str] = []
    named: dict[str, int | float | str] = {}
    for word in (match[2] or match[3] or "").split(","):
        if word.strip():
            key, equals, value = word.partition("=")
            if equals:
                named[key.strip()] = _value(what, text, value)
            else:
                positional.append(_value(what, text, word))
    try:
        inspect.signature(kind).bind(*positional, **named)
    except TypeError as error:
        takes = inspect.signature(kind).parameters.values()
        arguments = ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in takes)
        raise ConfigError(f"--{what} {text}: {error}; {kind.__name__} takes ({arguments}).") from error
    return kind(*positional, **named)


def _value(what: str, text: str, word: str) -> int | float | str:
    word = word.strip()
    if re.fullmatch(r"[+-]?\d+", word):
        return int(word)
    if re.fullmatch(r"[+-]?(\d+\.\d*|\.\d+)", word):
        return float(word)
    if word.strip("'\"") in ("cache", "original"):  # positions_in
        return word.strip("'\"")
    raise DTypeError(f"--{what} {text}: {word!r} is no number.")
