"""`Plain`: tokens stored as they are, in float32, bfloat16, float16 (or float64 under x64)."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Shaped

from kvattn import _checks, _target
from kvattn._typing import Array, Encoded
from kvattn.codecs.base import Codec, accumulator, wider
from kvattn.codecs.format import Format
from kvattn.codecs.registry import register


@dataclasses.dataclass(frozen=True)
class Plain(Codec):
    """Stores values in `dtype`.

    The two products take both operands in the wider of query and cache dtype and accumulate in
    float32 at least.

    Args:
        dtype: float32, bfloat16, float16 or float64, or its name.
    """

    dtype: DTypeLike = jnp.dtype(jnp.bfloat16)

    rounds: ClassVar[bool] = False

    def __post_init__(self):
        object.__setattr__(self, "dtype", _checks.inexact("dtype", self.dtype, complex=False, bits=16))

    @property
    def format(self) -> Format:
        """Data alone."""
        return Format()

    def encode(self, x: Float[Array, "*shape H"]) -> dict[str, Shaped[Array, "*shape _"]]:
        """Casts to the storage dtype."""
        return {"data": x.astype(self.dtype)}

    def decode(self, encoded: Encoded, head_dim: int, dtype: DTypeLike) -> Float[Array, "... H"]:
        """Casts back."""
        del head_dim
        return encoded["data"].astype(dtype)

    def unfit(self, x: Float[Array, "*shape H"], dtype: DTypeLike) -> Bool[Array, "*shape"] | None:
        """Tokens with finite numbers that are infinite in the storage dtype."""
        del dtype
        if jnp.finfo(x.dtype).max <= jnp.finfo(self.dtype).max:
            return None
        return jnp.any(jnp.isfinite(x) & ~jnp.isfinite(x.astype(self.dtype)), axis=-1)

    def refusal(self, dtype: DTypeLike) -> str:
        """They are too large."""
        del dtype
        return f"beyond {float(jnp.finfo(self.dtype).max):.6g}, the largest number of the cache's {self.dtype}"

    def scores(self, query: Float[Array, "B K M H"], keys: Encoded, transposed: bool) -> Float[Array, "B K M R"]:
        """One matrix product."""
        return product("bkmh,bkhr->bkmr" if transposed else "bkmh,bkrh->bkmr", query, keys["data"])

    def mix(
        self, probs: Float[Array, "B K M R"], values: Encoded, filled: Bool[Array, "B #K R"]
    ) -> Float[Array, "B K M F"]:
        """One matrix product; the probabilities are rounded to the storage dtype first."""
        data = jnp.where(filled[..., None], values["data"], 0)
        narrow = jnp.finfo(data.dtype).bits < 32
        return product("bkmr,bkrh->bkmh", probs.astype(data.dtype) if narrow else probs, data)


def product(spec: str, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """An einsum of the wider dtype of both, accumulated in float32 or wider."""
    acc = accumulator(a.dtype, b.dtype)
    if jnp.float16 in (a.dtype, b.dtype) and _target.platform() == "cpu":
        # XLA has no float16 product on CPUs, and its conversion there goes one number at a time.
        a, b = widen_float16(a), widen_float16(b)
    wide = wider(a.dtype, b.dtype)
    return jnp.einsum(spec, a.astype(wide), b.astype(wide), preferred_element_type=acc)


def widen_float16(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """float16 to float32 by integer arithmetic, exact for every value; other dtypes pass."""
    if x.dtype != jnp.float16:
        return x
    bits = jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32)
    sign = (bits & jnp.uint32(0x8000)) << 16
    magnitude = bits & jnp.uint32(0x7FFF)
    exponent = magnitude >> 10
    # Exponents are biased by 15 in float16 and by 127 in float32; 31 marks inf and NaN, 0 subnormals.
    normal = (magnitude << 13) + jnp.uint32((127 - 15) << 23)
    special = (magnitude << 13) | jnp.uint32(0x7F800000)
    widened = jax.lax.bitcast_convert_type(sign | jnp.where(exponent == 31, special, normal), jnp.float32)
    tiny = magnitude.astype(jnp.int32).astype(jnp.float32) * jnp.float32(2.0**-24)
    return jnp.where(exponent == 0, jnp.where(sign == 0, tiny, -tiny), widened)


register(
    Plain,
    "bfloat16",
    aliases=["float16", "float32"],  # on the command line a dtype
    examples=[Plain("float32"), Plain("bfloat16"), Plain("float16")],
)
