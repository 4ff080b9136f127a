"""What a tier stores: the keys and values of one page of tokens, under a name that stands for all tokens before it.

The key of a page is a hash of the key of the page before it and of the page's own tokens, so it stands for a whole
prefix, and pages are found one by one along a prompt. A key alone is never believed: the name it was made of is stored
with the arrays and compared (CVE-2025-46570 and its like: hashes that collide, parts that are joined).
"""

import dataclasses
import functools
import hashlib
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
from jaxtyping import Integer, Shaped

from kvattn.errors import ConfigError, DTypeError, ShapeError
from kvattn.serving import checks
from kvattn.serving.kinds import DTYPES, ArraySpec, Kind, parts, text_bytes

DOMAIN = b"kvattn page"
KEY_BYTES = hashlib.sha256().digest_size

Namespace = str | tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class PageName:
    """What a page is found by.

    Attributes:
        kind: of record.
        namespace: what keys and values depend on besides kind and tokens (tenant, adapter, salt), or whose they are:
            a string or a tuple of strings. Nothing is ever found across namespaces.
        parent: key of the page before; empty at the start of a text.
        tokens: of the page: `page_size` of them, or none.
        key: stands for all of it, and so for the prefix up to the page's end.

    Raises:
        ShapeError: a page that is not full. Its other slots may hold what another sequence left there.
        DTypeError, RangeError, ConfigError: a namespace that is no string, tokens that are no ints or that int32 does
            not hold, a parent that is no key.
    """

    kind: Kind
    namespace: Namespace
    parent: bytes
    tokens: tuple[int, ...]
    key: bytes = dataclasses.field(init=False)

    def __post_init__(self):
        checks.namespace(self.namespace)
        if self.parent != b"":
            checked_key(self.parent)
        text = checks.tokens("tokens", self.tokens)
        if len(self.tokens) not in (0, self.kind.page_size):
            raise ShapeError(
                f"a record holds a full page of {self.kind.page_size} tokens, or none, got {len(self.tokens)}: compute "
                "the tokens after the last full page anew."
            )
        object.__setattr__(self, "tokens", tuple(array("i", text)))
        object.__setattr__(self, "key", page_key(self.kind, self.namespace, self.parent, text))

    def __repr__(self) -> str:  # namespaces may be secrets, tokens are somebody's text
        return f"PageName({self.key.hex()[:16]}…, {len(self.tokens)} tokens)"


def page_names(
    kind: Kind,
    namespace: Namespace,
    tokens: Iterable[int] | Integer[np.ndarray, " S"],
    *,
    known: Sequence[PageName] = (),
) -> list[PageName]:
    """The names of a text's full pages, in order.

    Args:
        kind: of record.
        namespace: see `PageName`.
        tokens: ids, or an array [S] of them. Those after the last full page are passed over.
        known: names of its first pages, if they were asked for before: these are not hashed again.

    Raises:
        DTypeError, RangeError: tokens that are no ints or that int32 does not hold, a namespace that is no string.
        ConfigError: `known` names of another text.
    """
    text, size = checks.tokens("tokens", tokens), kind.page_size
    ids = array("i", text)
    pages = [tuple(ids[start : start + size]) for start in range(0, len(ids) - size + 1, size)]
    names = list(known)
    if (
        any(n.kind != kind or n.namespace != namespace for n in names)
        or [n.tokens for n in names] != pages[: len(names)]
    ):
        raise ConfigError(f"known must name the first pages of this text, got {names}.")
    checks.namespace(namespace)
    parent, size = names[-1].key if names else b"", size * checks.TOKEN_BYTES
    for i, page in enumerate(pages[len(names) :], len(names)):
        key = page_key(kind, namespace, parent, text[i * size : (i + 1) * size])
        name = object.__new__(PageName)  # what its constructor checks is known: this is done for every page of a prompt
        name.__dict__.update(kind=kind, namespace=namespace, parent=parent, tokens=page, key=key)
        names.append(name)
        parent = key
    return names


def page_key(kind: Kind, namespace: Namespace, parent: bytes, text: bytes) -> bytes:
    """SHA-256 over kind, namespace, the key of the page before and the tokens as int32, each with its length."""
    if sys.byteorder == "big":
        text = np.frombuffer(text, np.int32).astype("<i4").tobytes()
    hashed = _start(kind.digest, namespace).copy()
    hashed.update(parts(parent, text))
    return hashed.digest()


def namespace_digest(namespace: Namespace) -> bytes:
    """Stands for a namespace where it is written down: it may be a secret."""
    return hashlib.sha256(parts(DOMAIN + b" namespace", _spelled(namespace))).digest()


def checked_key(key: object) -> bytes:
    """Checks a key, from which the names of files are made."""
    if not isinstance(key, bytes) or len(key) != KEY_BYTES:
        raise ConfigError(f"a key must be the {KEY_BYTES} bytes of `PageName.key`, got {key!r}.")
    return key


@functools.lru_cache(maxsize=256)
def _start(kind: bytes, namespace: Namespace):
    """A hash that has seen what all pages of a text have in common."""
    return hashlib.sha256(parts(DOMAIN, kind, _spelled(namespace)))


def _spelled(namespace: Namespace) -> bytes:
    """A namespace as bytes, of which no two are the same: ("a", "bc"), ("ab", "c"), "abc", ("abc",)."""
    if isinstance(namespace, str):
        return parts(b"string", text_bytes(namespace))
    return parts(b"tuple", *map(text_bytes, namespace))


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """A page as a tier stores it.

    Attributes:
        name: what it is found by.
        arrays: by name, as `Kind.arrays` has them; read-only, and the record's own: what the caller gave may change.
            Those of a group with a window may be absent.

    Raises:
        ConfigError: arrays that the kind has not, a group of which only some are there, or none although it has no
            window.
        ShapeError, DTypeError: an array of another shape or dtype.
    """

    name: PageName
    arrays: Mapping[str, Shaped[np.ndarray, "..."]]

    def __post_init__(self):
        specs, windows = self.name.kind.arrays, self.name.kind.windows
        owned = {name: _owned(name, self.arrays[name], specs.get(name)) for name in sorted(self.arrays)}
        object.__setattr__(self, "arrays", MappingProxyType(owned))
        for group, window in enumerate(windows):
            wanted = {name for name, spec in specs.items() if spec.group == group}
            missing = wanted - owned.keys()
            whole = window is None and self.name.tokens
            if missing and (whole or missing != wanted):
                raise ConfigError(f"group {group} with window {window} lacks its arrays {sorted(missing)}.")
        if owned and not self.name.tokens:
            raise ConfigError(f"a record without tokens has no arrays, got {sorted(owned)}.")

    def __repr__(self) -> str:
        return f"Record({self.name!r}, {self.nbytes} bytes)"

    @property
    def nbytes(self) -> int:
        """Bytes in memory: arrays, tokens and keys."""
        numbers = checks.TOKEN_BYTES * len(self.name.tokens) + len(self.name.parent) + KEY_BYTES
        return sum(each.nbytes for each in self.arrays.values()) + numbers

    def has(self, group: int) -> bool:
        """Whether the arrays of a group of layers are here."""
        return all(name in self.arrays for name, spec in self.name.kind.arrays.items() if spec.group == group)


def _owned(name: str, given: Shaped[np.ndarray, "..."], spec: ArraySpec | None) -> Shaped[np.ndarray, "..."]:
    """A read-only copy, unless it is one already: what `np.asarray` makes of a JAX array is the device's own memory."""
    if spec is None:
        raise ConfigError(f"arrays has {name!r}, which is not in the kind's arrays.")
    if not isinstance(given, np.ndarray):
        raise DTypeError(f"array {name!r} must be one of NumPy (`np.asarray`), got {type(given).__name__}.")
    if given.dtype != DTYPES[spec.dtype]:
        raise DTypeError(f"array {name!r} must have dtype {spec.dtype}, got {given.dtype}.")
    if given.shape != spec.shape:
        raise ShapeError(f"array {name!r} must have shape {spec.shape} ({spec.axes}), got {given.shape}.")
    if given.flags.owndata and given.flags.c_contiguous and not given.flags.writeable:
        return given
    copy = np.array(given, order="C")
    copy.flags.writeable = False
    return copy
