"""Codes and scales widened as TPUs do it fast: by arithmetic on bits, or as a type that their instructions know."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import BFloat16, Bool, Float, Float32, Int4, Int32, Shaped, UInt16, UInt32

from kvattn._typing import Array

OFFSET = 16
"""`nibbles` gives codes with this added: that costs one operation for two numbers, a conversion several for one."""
CENTRE = 8
"""`signed` gives codes less this."""

_SIXTEEN = 0x41804180
"""Two bfloat16 of 16.0; a code is added by writing it into the upper four of the seven bits behind the leading one."""
_CODES = 0x00780078


@dataclasses.dataclass(frozen=True)
class Native:
    """What a device has instructions for.

    Attributes:
        int4: making bfloat16 of four bits: TPUs from the sixth on.
        float8: making bfloat16 of float8_e4m3fn: TPUs from the seventh on.
    """

    int4: bool = False
    float8: bool = False

    @classmethod
    def of(cls, device_kind: str | None) -> "Native":
        """That of a device; the least if it is not known."""
        kind = device_kind or ""
        return cls(kind.startswith(("TPU v6", "TPU7")), kind.startswith("TPU7"))


def signed(words: UInt32[Array, "W R"]) -> Int4[Array, "8*W R"]:
    """Code - 8, from words of four bytes each, eight codes: row 2 f + p is of half p of byte f."""
    return pltpu.bitcast(words ^ jnp.uint32(0x88888888), jnp.int4)


def nibbles(words: UInt32[Array, "W R"], plane: int, odd: int) -> BFloat16[Array, "2*W R"]:
    """16 + code, from words of four bytes each, eight codes.

    Args:
        words: rows 4w ... 4w + 3 of bytes, the first lowest.
        plane: which half of each byte.
        odd: 0: of rows 0, 2, 4, ...; 1: of rows 1, 3, 5, ....
    """
    at = 4 * plane + 8 * odd
    codes = words << jnp.uint32(3) if at == 0 else words >> jnp.uint32(at - 3)
    return pltpu.bitcast((codes & jnp.uint32(_CODES)) | jnp.uint32(_SIXTEEN), jnp.bfloat16)


FLOAT8_UNIT = 16
"""What numbers of `float8` are to be multiplied by."""


def float8(codes: Shaped[Array, "R F"]) -> Float[Array, "R F"]:
    """float8_e4m3fn, or their bits in uint8, as sixteenths in float8_e4m3b11fnuz, exactly. R is a multiple of 4.

    TPUs before the seventh have one instruction for four rows of the latter and some forty for the former. Their bits
    mean the same but for that factor, and for two: -0 of the former is NaN in the latter, so it becomes 0 here; and
    NaN, which no finite token is encoded to, reads as +-30.
    """
    words = pltpu.bitcast(codes, jnp.uint32)
    magnitudes = jnp.uint32(0x7F7F7F7F)
    # Adding carries a one into the sign of every byte whose magnitude is not 0; elsewhere the sign is cleared.
    words = words & (((words & magnitudes) + magnitudes) | magnitudes)
    return pltpu.bitcast(words, jnp.float8_e4m3b11fnuz)


def pair(
    scale: UInt16[Array, "groups R"], minimum: UInt16[Array, "groups R"]
) -> tuple[Float32[Array, "groups R"], Float32[Array, "groups R"]]:
    """Scale and minimum as `codecs.grouped.unpack_pair` reads them where they are finite."""
    scale, minimum = scale.astype(jnp.int32), minimum.astype(jnp.int32)
    coarse = scale >= 0x8000
    low = jax.lax.bitcast_convert_type(_magnitude(minimum, coarse), jnp.int32) | ((minimum & 0x8000) << 16)
    return _magnitude(scale, coarse), jax.lax.bitcast_convert_type(low, jnp.float32)


def _magnitude(bits: Int32[Array, "groups R"], coarse: Bool[Array, "groups R"]) -> Float32[Array, "groups R"]:
    """The number of the lower 15 of the bits of a bfloat16 (coarse) or a finite float16, without their sign."""
    bits = bits & 0x7FFF
    # Exponents are biased by 15 in float16 and by 127 in float32. Exponent 0 (subnormals) has no leading one: read with
    # one, as x = 2^-15 (1 + m/1024), the number is 2 x - 2^-14, which above 2^-14 is more than x.
    fine = jax.lax.bitcast_convert_type((bits << 13) + (112 << 23), jnp.float32)
    fine = fine + jnp.minimum(fine - jnp.float32(2.0**-14), 0)
    return jnp.where(coarse, jax.lax.bitcast_convert_type(bits << 16, jnp.float32), fine)
