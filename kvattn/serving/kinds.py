"""What records a model can use: the arrays of a page, and all that keys and values depend on besides the tokens."""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Mapping
from types import MappingProxyType

import ml_dtypes
import numpy as np

from kvattn.errors import ConfigError, DTypeError, ShapeError
from kvattn.serving import checks

FORMAT = 1
"""Version of what is hashed and written. Records of another one are not found, and refused if they are met."""

_NUMPY = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
_NUMPY += ("float16", "float32", "float64")
_OTHER = ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "float8_e4m3fnuz", "float8_e5m2fnuz")
_OTHER += ("int4", "uint4")
DTYPES = MappingProxyType({n: np.dtype(n) for n in _NUMPY} | {n: np.dtype(getattr(ml_dtypes, n)) for n in _OTHER})
"""Of arrays in a record, by name."""


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """An array that a page has.

    Attributes:
        axes: what its axes are, in words: "layers heads offsets features". They are part of the record, because sizes
            alone cannot tell two layouts apart where they are equal.
        shape: one size per word.
        dtype: one of NumPy or `ml_dtypes`, by name.
        group: of layers that share page tables. A record has all arrays of a group, or none.

    Raises:
        ConfigError: an axis named twice, an unknown dtype.
        ShapeError: another number of sizes than of axes.
        DTypeError, RangeError: sizes that are no ints, or negative.
    """

    axes: str
    shape: tuple[int, ...]
    dtype: str
    group: int = 0

    def __post_init__(self):
        words = self.axes.split()
        if len(set(words)) != len(words):
            raise ConfigError(f"axes must name every axis once, got {self.axes!r}.")
        if len(words) != len(self.shape):
            raise ShapeError(f"shape must have a size for each of the axes {self.axes!r}, got {self.shape}.")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")
        object.__setattr__(self, "shape", tuple(checks.integer("shape", size, 0) for size in self.shape))
        checks.integer("group", self.group, 0)

    @property
    def nbytes(self) -> int:
        """Bytes of the array; numbers of 4 bits take one each, as NumPy stores them."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclasses.dataclass(frozen=True)
class Kind:
    """What must be equal for a record to be of use to a model. What differs is never found, and refused if it is met.

    Attributes:
        model: stands for config and weights: a digest of both.
        dtype: of the cache.
        codec: its `repr`.
        policy: its `repr`.
        page_size: tokens per page.
        arrays: what a page has, by name.
        windows: of each group of layers, as `RadixTree` takes them.

    Raises:
        ConfigError: a page size below 1, no group, an array of a group that is not there.
        DTypeError: no strings, no ints.
    """

    model: str
    dtype: str
    codec: str
    policy: str
    page_size: int
    arrays: Mapping[str, ArraySpec] = dataclasses.field(hash=False)
    windows: tuple[int | None, ...] = (None,)

    def __post_init__(self):
        for field in ("model", "dtype", "codec", "policy"):
            if not isinstance(getattr(self, field), str):
                raise DTypeError(f"{field} must be a string, got {getattr(self, field)!r}.")
        checks.integer("page_size", self.page_size, 1, ConfigError)
        windows = tuple(None if w is None else checks.integer("windows", w, 1) for w in self.windows)
        if not windows or any(spec.group >= len(windows) for spec in self.arrays.values()):
            raise ConfigError(f"windows must be one per group of layers, got {windows} for {dict(self.arrays)}.")
        object.__setattr__(self, "windows", windows)
        object.__setattr__(self, "arrays", MappingProxyType(dict(sorted(self.arrays.items()))))

    @property
    def settings(self) -> dict[str, object]:
        """All but the arrays, as they are written into a record."""
        names = ("model", "dtype", "codec", "policy", "page_size")
        return {"format": FORMAT, **{n: getattr(self, n) for n in names}, "windows": list(self.windows)}

    @functools.cached_property
    def digest(self) -> bytes:
        """Stands for all of it, and the format."""
        arrays = [repr((name, *dataclasses.astuple(spec))) for name, spec in self.arrays.items()]
        return hashlib.sha256(parts(*map(text_bytes, [*map(repr, self.settings.items()), *arrays]))).digest()


def parts(*each: bytes) -> bytes:
    """Bytes that no other parts give: each comes with its length."""
    return b"".join(len(part).to_bytes(8, "little") + part for part in each)


def text_bytes(text: str) -> bytes:
    """A string as bytes, whatever it holds."""
    return text.encode("utf-8", "surrogatepass")
