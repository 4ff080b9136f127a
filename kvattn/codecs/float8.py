"""`Float8`: e4m3 with one scale per token and key/value head."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int32, Shaped

from kvattn import _target
from kvattn._typing import Array, Encoded
from kvattn.codecs.base import Codec, Role, not_finite
from kvattn.codecs.blocks import Blocks
from kvattn.codecs.format import Format
from kvattn.codecs.registry import register
from kvattn.codecs.scaled import factors, mix_scaled, reciprocal, scale_for

TOP = 448
"""The largest finite float8_e4m3fn. A cast of more than 464 gives NaN, so values are clipped first."""


@dataclasses.dataclass(frozen=True)
class Float8(Codec):
    """Eight bits per number: x is float8_e4m3fn(x / scale), scale = max|x| / 448 of its token and head, in float32.

    8 + 32/H bits per number. The error of a number is at most 2^-4 of it, or scale / 1024 for tiny ones: small
    numbers beside large ones fare better than with `Int8`, the large ones worse.

    Derivatives pass straight through to the keys and values of the call; those of earlier calls are constants.
    """

    token_minor: ClassVar[tuple[str, ...]] = ("scale",)

    @property
    def format(self) -> Format:
        """A scale per token and head."""
        return Format(jnp.dtype(jnp.float8_e4m3fn), is_scaled=True)

    def encode(self, x: Float[Array, "*shape H"]) -> dict[str, Shaped[Array, "*shape _"]]:
        """data float8_e4m3fn [..., H] (on CPUs its bits in uint8) and scale float32 [..., 1]."""
        x = jax.lax.stop_gradient(x.astype(jnp.float32))  # through the scale alone they would be wrong
        scale = scale_for(x, TOP)
        data = jnp.clip(x * reciprocal(scale), -TOP, TOP).astype(jnp.float8_e4m3fn)
        # XLA on CPUs moves and converts float8 by way of float16, the whole cache at every step.
        narrow = jax.lax.bitcast_convert_type(data, jnp.uint8) if _target.platform() == "cpu" else data
        return {"data": narrow, "scale": scale}

    def write(
        self, store: Encoded, layout: Blocks, role: Role, slots: Int32[Array, "B *K T"], x: Float[Array, "B K T H"]
    ) -> Encoded:
        """As `Codec.write`; into a cache that was made for another platform, too, where the bits have another type."""
        encoded, stored = self.encode(x), store["data"].dtype
        if encoded["data"].dtype != stored:
            encoded["data"] = jax.lax.bitcast_convert_type(encoded["data"], stored)
        return {n: layout.write(old, slots, encoded[n], self.transposed(layout, role, n)) for n, old in store.items()}

    def decode(self, encoded: Encoded, head_dim: int, dtype: DTypeLike) -> Float[Array, "... H"]:
        """data * scale."""
        del head_dim
        return (widen(encoded["data"]) * encoded["scale"]).astype(dtype)

    def unfit(self, x: Float[Array, "*shape H"], dtype: DTypeLike) -> Bool[Array, "*shape"]:
        """Tokens that are not finite."""
        del dtype
        return not_finite(x)

    def scores(self, query: Float[Array, "B K M H"], keys: Encoded, transposed: bool) -> Float[Array, "B K M R"]:
        """(query . data) * scale."""
        spec = "bkmh,bkhr->bkmr" if transposed else "bkmh,bkrh->bkmr"
        return factors(spec, query, widen(keys["data"])) * keys["scale"]

    def mix(
        self, probs: Float[Array, "B K M R"], values: Encoded, filled: Bool[Array, "B #K R"]
    ) -> Float[Array, "B K M F"]:
        """(probs * scale) . data."""
        return mix_scaled(probs, {**values, "data": widen(values["data"])}, filled)


def widen(x: Shaped[Array, "*shape"]) -> Float[Array, "*shape"]:
    """float8_e4m3fn to float32; its bits in uint8 by integer arithmetic.

    Exact for every value. NaN, which no finite token is encoded to, reads as +-480 from bits.
    """
    if x.dtype != jnp.uint8:
        return x.astype(jnp.float32)
    bits = x.astype(jnp.uint32)
    magnitude = bits & jnp.uint32(0x7F)
    # Exponents are biased by 7 here and by 127 in float32. Exponent 0 (subnormals) has no leading one: it is read
    # with one, as 2^-6 (1 + m/8), which is then taken off again.
    tiny = magnitude < 8
    exponent = jnp.where(tiny, jnp.uint32(121 << 23), jnp.uint32(120 << 23))
    value = jax.lax.bitcast_convert_type((magnitude << 20) + exponent, jnp.float32)
    value = value - jnp.where(tiny, jnp.float32(2.0**-6), jnp.float32(0))
    sign = (bits & jnp.uint32(0x80)) << 24
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(value, jnp.uint32) | sign, jnp.float32)


register(Float8, "float8", aliases=["fp8"], levers=lambda length: [("Float8()", Float8())], examples=[Float8()])
