"""`Int8`: one scale per token and key/value head."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Float32, Integer, Shaped

from kvattn import _target
from kvattn._typing import Array, Encoded
from kvattn.codecs.base import Codec, not_finite
from kvattn.codecs.format import Format
from kvattn.codecs.registry import register
from kvattn.codecs.scaled import factors, mix_scaled, reciprocal, scale_for

TOP = 127
"""Codes are symmetric: -127 ... 127. (With 127.5 the largest value would round to 128 and wrap or clip.)"""

INTEGER_ROWS = 32
"""Up to so many query rows per key/value head CPUs take the product of integers; for more of them one widening of the
keys is shared by enough rows to pay."""


@dataclasses.dataclass(frozen=True)
class Int8(Codec):
    """Eight bits per number: x is round(x / scale), with scale = max|x| / 127 of its token and head, in float32.

    8 + 32/H bits per number. The error is at most scale/2. Scales are multiplied into scores and probabilities; the
    cache is never widened. Tokens of zeros are exact.

    Derivatives pass straight through to the keys and values of the call; those of earlier calls are constants.
    """

    token_minor: ClassVar[tuple[str, ...]] = ("scale",)

    @property
    def format(self) -> Format:
        """A scale per token and head."""
        return Format(jnp.dtype(jnp.int8), is_scaled=True)

    def encode(self, x: Float[Array, "*shape H"]) -> dict[str, Shaped[Array, "*shape _"]]:
        """data int8 [..., H] and scale float32 [..., 1]."""
        x = jax.lax.stop_gradient(x.astype(jnp.float32))  # through the scale alone they would be wrong
        scale = scale_for(x, TOP)
        codes = jnp.clip(jnp.round(x * reciprocal(scale)), -TOP, TOP)
        return {"data": codes.astype(jnp.int8), "scale": scale}

    def decode(self, encoded: Encoded, head_dim: int, dtype: DTypeLike) -> Float[Array, "... H"]:
        """data * scale."""
        del head_dim
        return (encoded["data"].astype(jnp.float32) * encoded["scale"]).astype(dtype)

    def unfit(self, x: Float[Array, "*shape H"], dtype: DTypeLike) -> Bool[Array, "*shape"]:
        """Tokens that are not finite."""
        del dtype
        return not_finite(x)

    def scores(self, query: Float[Array, "B K M H"], keys: Encoded, transposed: bool) -> Float[Array, "B K M R"]:
        """(query . data) * scale. On CPUs few queries are turned into integers too."""
        spec = "bkmh,bkhr->bkmr" if transposed else "bkmh,bkrh->bkmr"
        integer = _target.platform() == "cpu" and query.shape[2] <= INTEGER_ROWS and query.dtype != jnp.float64
        product = integer_product if integer else factors
        return product(spec, query, keys["data"]) * keys["scale"]

    def mix(
        self, probs: Float[Array, "B K M R"], values: Encoded, filled: Bool[Array, "B #K R"]
    ) -> Float[Array, "B K M F"]:
        """(probs * scale) . data."""
        return mix_scaled(probs, values, filled)


def integer_product(
    spec: str, rows: Float[Array, "B K M F"], codes: Integer[Array, "B K _ _"]
) -> Float32[Array, "B K M _"]:
    """An einsum of rows with int8 codes by products of integers.

    Each row is written as scale * (a + b / 254 + c / 254^2) with a, b and c in -127 ... 127, as exact as float32, and
    all three go through one product. Reading the codes is what takes time, so the second and third cost little (one
    alone would be as coarse as the codes).
    """
    count = rows.shape[2]
    rows = rows.astype(jnp.float32)
    scale = scale_for(rows, TOP)
    rest, digits = rows / scale, []
    for _ in range(3):
        digits.append(jnp.clip(jnp.round(rest), -TOP, TOP))
        rest = (rest - digits[-1]) * 254
    digits = jnp.concatenate(digits, axis=2).astype(jnp.int8)
    sums = jnp.einsum(spec, digits, codes, preferred_element_type=jnp.int32).astype(jnp.float32)
    a, b, c = (sums[:, :, i * count : (i + 1) * count] for i in range(3))
    return (a + (b + c * jnp.float32(1 / 254)) * jnp.float32(1 / 254)) * scale


register(Int8, "int8", levers=lambda length: [("Int8()", Int8())], examples=[Int8()])
