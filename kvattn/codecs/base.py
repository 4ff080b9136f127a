"""What a codec is: how one token's keys and values are stored, and how they are read.

A codec turns arrays [..., H] into named arrays [..., F] that share the leading axes, and reads them
back as the two products attention needs: scores from encoded keys, and mixtures of encoded values.
Scales can thus be folded into scores and probabilities instead of widening the cache. A codec
knows neither slots nor policies nor meshes.
"""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp

from kvattn._typing import Array, Encoded


@dataclasses.dataclass(frozen=True)
class Codec:
    """Base of the codecs. Frozen and hashable: a static part of the cache.

    The cache lays out each named array in blocks. Arrays named in `token_minor` (scales) lie with
    tokens along the last axis, the data of the keys too where the backend likes that; `scores` and
    `mix` are told by `transposed`.
    """

    token_minor: ClassVar[tuple[str, ...]] = ()

    def encode(self, x: Array) -> dict[str, Array]:
        """Encodes tokens [..., H] into named arrays [..., F]."""
        raise NotImplementedError

    def decode(self, encoded: Encoded, head_dim: int, dtype: Any) -> Array:
        """Decodes named arrays [..., F] into [..., H] of `dtype`."""
        raise NotImplementedError

    def scores(self, query: Array, keys: Encoded, transposed: bool) -> Array:
        """query [B, K, M, H] times encoded keys of one block: float32 (or wider) [B, K, M, R]."""
        raise NotImplementedError

    def mix(self, probs: Array, values: Encoded, filled: Array) -> Array:
        """probs [B, K, M, R] times encoded values of one block: [B, K, M, H], float32 or wider.

        `filled` bool [B, 1 or K, R] tells the slots that hold a token. What lies in the others, NaN
        included, must not reach the result.
        """
        raise NotImplementedError


def accumulator(*dtypes: Any) -> Any:
    """The dtype sums are kept in: float32, or float64 where an operand is float64."""
    return jnp.result_type(jnp.float32, *(d for d in dtypes if jnp.dtype(d) == jnp.float64))
