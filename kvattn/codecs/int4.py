"""`Int4`: four bits, a scale and a minimum per group of channels (FlexGen, arXiv:2303.06865)."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Shaped

from kvattn import _checks
from kvattn._typing import Array, Encoded
from kvattn.codecs import grouped
from kvattn.codecs.base import Codec, not_finite
from kvattn.codecs.format import Format
from kvattn.codecs.registry import register

BITS = 4


@dataclasses.dataclass(frozen=True)
class Int4(Codec):
    """Four bits per number: minimum + scale * code, for each `group_size` neighbouring channels of a token and head.

    4 + 32/group_size bits per number: 4.5 for groups of 64. The error is at most scale/2. Any head dim works: a last
    group may be short, an odd number of channels wastes half a byte. Unlike FlexGen's, groups of equal or nearly equal
    numbers stay finite, and scales are not stored as their reciprocals.

    Scales and minima are multiplied into scores and probabilities; the cache is never widened.

    Derivatives pass straight through to the keys and values of the call; those of earlier calls are constants.

    Args:
        group_size: channels that share a scale, >= 1.
    """

    group_size: int = 64

    token_minor: ClassVar[tuple[str, ...]] = ("scale", "minimum")

    def __post_init__(self):
        _checks.integer("group_size", self.group_size, 1)

    @property
    def format(self) -> Format:
        """A scale and a minimum per group."""
        return Format(jnp.dtype(jnp.uint8), group_size=self.group_size)

    def encode(self, x: Float[Array, "*shape H"]) -> dict[str, Shaped[Array, "*shape _"]]:
        """data uint8 [..., ceil(H/2)], scale and minimum uint16 [..., groups] (`grouped.pack_pair`)."""
        codes, scale, minimum = grouped.quantise(x, BITS, self.group_size)
        return {"data": grouped.pack(codes, BITS), "scale": scale, "minimum": minimum}

    def decode(self, encoded: Encoded, head_dim: int, dtype: DTypeLike) -> Float[Array, "... H"]:
        """Minimum + scale * code."""
        codes = grouped.unpack(encoded["data"], BITS)[..., :head_dim]
        return grouped.dequantise(codes, encoded["scale"], encoded["minimum"], self.group_size).astype(dtype)

    def unfit(self, x: Float[Array, "*shape H"], dtype: DTypeLike) -> Bool[Array, "*shape"]:
        """Tokens that are not finite."""
        del dtype
        return not_finite(x)

    def scores(self, query: Float[Array, "B K M H"], keys: Encoded, transposed: bool) -> Float[Array, "B K M R"]:
        """Per group: scale * (query . codes) + minimum * sum(query)."""
        return grouped.scores(query, keys["data"], keys["scale"], keys["minimum"], BITS, self.group_size, transposed)

    def mix(
        self, probs: Float[Array, "B K M R"], values: Encoded, filled: Bool[Array, "B #K R"]
    ) -> Float[Array, "B K M F"]:
        """Per group: (probs * scale) . codes + probs . minimum."""
        scale, minimum = (jnp.where(filled[:, :, None], values[n], jnp.uint16(0)) for n in ("scale", "minimum"))
        return grouped.mix(probs, values["data"], scale, minimum, BITS, self.group_size)


register(Int4, "int4", levers=lambda length: [("Int4()", Int4())], examples=[Int4(group_size=4)])
