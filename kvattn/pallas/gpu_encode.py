"""One token of all heads, encoded in shared memory to the bits that its codec gives.

The heads are the rows of a tile: the matrix unit's layout adds up, or looks for the largest number of a row, among four
neighbouring threads.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from kvattn._typing import Array
from kvattn.codecs import Format, float8, int8
from kvattn.codecs.scaled import reciprocal, scale_of
from kvattn.pallas.gpu_tile import TOKENS, WGMMA, spread, store

TILE = 64
"""Rows of a tile: most heads."""
MOST = np.finfo(np.float32).max


def is_known(form: Format) -> bool:
    """Whether tokens can be encoded here."""
    return form.is_plain or (form.is_scaled and form.dtype in (jnp.int8, jnp.float8_e4m3fn))


@dataclasses.dataclass(frozen=True)
class Codes:
    """How tokens of a role come, and how they are stored.

    Attributes:
        form: how the codec stores them.
        heads: K.
        features: of a token, F.
        given: dtype in which they come.
        stored: dtypes of the arrays, by name.
    """

    form: Format
    heads: int
    features: int
    given: np.dtype
    stored: Mapping[str, np.dtype]

    @property
    def data(self) -> str:
        """The name of what is copied to "data"."""
        return "new" if self.form.is_plain else "data"

    @property
    def small(self) -> tuple[str, ...]:
        """The arrays with a number or a few of each head."""
        return tuple(name for name in self.stored if name != "data")

    @property
    def groups(self) -> int:
        """How many of each there are."""
        return 1

    def scratch(self) -> dict[str, Any]:
        """Shared memory: "new" is where the tokens arrive."""
        if self.form.is_plain:
            return {"new": plgpu.SMEM((self.heads, self.features), self.given)}
        return {
            "new": plgpu.SMEM((TILE, self.features), self.given),
            "data": plgpu.SMEM((TILE, self.features), self.stored["data"]),
            **{name: plgpu.SMEM((self.groups, TILE), self.stored[name]) for name in self.small},
        }


def encoded(codes: Codes, shared: Mapping[str, Any]) -> Array:
    """Encodes the tokens that have arrived. Returns whether one of them cannot be stored, bool []."""
    if codes.form.is_plain:
        return jnp.bool_(False)
    x = plgpu.load(shared["new"], layout=WGMMA, optimized=False).astype(jnp.float32)
    # NaN is infinite here: not every maximum lets it through.
    size = jnp.abs(x)
    largest = jnp.max(jnp.where(size <= MOST, size, np.float32(np.inf)), axis=1)
    top = int8.TOP if codes.form.dtype == jnp.int8 else float8.TOP
    scale = scale_of(largest, top)
    numbers = x * spread(reciprocal(scale), x.shape, 0)
    numbers = jnp.clip(jnp.round(numbers) if codes.form.dtype == jnp.int8 else numbers, -top, top)
    numbers = numbers.astype(codes.form.dtype)
    if numbers.dtype != codes.stored["data"]:  # bits
        numbers = lax.bitcast_convert_type(numbers, codes.stored["data"])
    store(shared["data"], numbers)
    store(shared["scale"].at[0], scale)
    head = plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=TOKENS)
    unfit = jnp.where(largest <= MOST, 0, jnp.where(head < codes.heads, 1, 0))
    return jnp.max(unfit) > 0
