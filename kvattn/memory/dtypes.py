"""Bits per number of the types that weights and caches are counted in."""

from fractions import Fraction

import numpy as np
from jax.typing import DTypeLike

from kvattn import _checks
from kvattn.errors import ConfigError, DTypeError

BITS: dict[str, Fraction] = {
    "float64": Fraction(64),
    "float32": Fraction(32),
    "bfloat16": Fraction(16),
    "float16": Fraction(16),
    "float8_e4m3fn": Fraction(8),
    "float8_e5m2": Fraction(8),
    "int8": Fraction(8),
    "uint8": Fraction(8),
    "mxfp4": Fraction(17, 4),  # 32 numbers of 4 bits share an exponent of 8
    "int4": Fraction(4),
    "uint4": Fraction(4),
    "float4_e2m1fn": Fraction(4),
    "int3": Fraction(3),
    "int2": Fraction(2),
    "uint2": Fraction(2),
}
"""Bits per number. Scales are not counted, but for mxfp4, which is nothing without them."""

ALIASES = {
    "f64": "float64",
    "fp64": "float64",
    "f32": "float32",
    "fp32": "float32",
    "f16": "float16",
    "fp16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "fp8": "float8_e4m3fn",
    "float8": "float8_e4m3fn",
}


def name_of(what: str, dtype: DTypeLike | None) -> str:
    """The name of a type in `BITS`.

    Args:
        what: the argument's name, for messages.
        dtype: a name, a NumPy or JAX dtype, or a scalar type such as ``jnp.bfloat16``.

    Raises:
        ConfigError: a type that is not known, all known ones listed.
        DTypeError: no type at all.
    """
    if isinstance(dtype, str):
        name = ALIASES.get(dtype.lower(), dtype.lower())
    else:
        try:
            name = np.dtype(dtype).name
        except TypeError as error:
            raise DTypeError(f"{what} must be a dtype or its name, got {dtype!r}.") from error
        if dtype is None or name == "object":  # NumPy takes None for float64
            raise DTypeError(f"{what} must be a dtype or its name, got {dtype!r}.")
    if name not in BITS:
        raise ConfigError(f"unknown {what} {dtype!r}; the known ones are {', '.join(BITS)}.")
    return name


def num_bytes(count: int, dtype: DTypeLike | None, what: str = "dtype") -> int:
    """Bytes of `count` numbers lying densely, rounded up to whole bytes."""
    _checks.integer("count", count, 0)
    bits = count * BITS[name_of(what, dtype)]
    return int(-(-bits // 8))
