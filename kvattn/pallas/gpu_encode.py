"""One token of all heads, encoded in shared memory to the bits that its codec gives.

The heads are the rows of a tile: the matrix unit's layout adds up, or looks for the largest number of a row, among four
neighbouring threads.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from kvattn._typing import Array
from kvattn.codecs import Format, float8, grouped, int4, int8
from kvattn.codecs.scaled import reciprocal, scale_of
from kvattn.pallas.gpu_spec import byte_runs
from kvattn.pallas.gpu_tile import TOKENS, WGMMA, spread, store

TILE = 64
"""Rows of a tile: most heads."""
COLUMNS_AT_ONCE = 8
"""Features that the layout of a tile does not divide."""
MOST = np.finfo(np.float32).max


def uneven_cuts(form: Format, *features: int) -> list[int]:
    """Where groups or nibbles of tokens of so many features are cut that registers do not divide at."""
    cuts = {c for f in features for run in byte_runs(f, form.group_size) for c in run}
    return sorted(c for c in cuts if c % COLUMNS_AT_ONCE)


def is_known(form: Format) -> bool:
    """Whether tokens can be encoded here."""
    return form.is_plain or form.is_grouped or (form.is_scaled and form.dtype in (jnp.int8, jnp.float8_e4m3fn))


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
        return grouped.num_groups(self.features, self.form.group_size) if self.form.is_grouped else 1

    @property
    def width(self) -> int:
        """Numbers of "data" of a token."""
        return -(-self.features // 2) if self.form.is_grouped else self.features

    def scratch(self) -> dict[str, Any]:
        """Shared memory: "new" is where the tokens arrive."""
        if self.form.is_plain:
            return {"new": plgpu.SMEM((self.heads, self.features), self.given)}
        return {
            "new": plgpu.SMEM((TILE, self.features), self.given),
            "data": plgpu.SMEM((TILE, self.width), self.stored["data"]),
            **{name: plgpu.SMEM((self.groups, TILE), self.stored[name]) for name in self.small},
        }


def encoded(codes: Codes, shared: Mapping[str, Any]) -> Array:
    """Encodes the tokens that have arrived. Returns whether one of them cannot be stored, bool []."""
    if codes.form.is_plain:
        return jnp.bool_(False)
    if codes.form.is_grouped:
        return _nibbles(codes, shared)
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
    return _is_unfit(codes, largest)


def _is_unfit(codes: Codes, largest: Array) -> Array:
    """Whether one of the first heads has no finite largest number, bool [], of float32 [TILE]."""
    head = plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=TOKENS)
    unfit = jnp.where(largest <= MOST, 0, jnp.where(head < codes.heads, 1, 0))
    return jnp.max(unfit) > 0


def _nibbles(codes: Codes, shared: Mapping[str, Any]) -> Array:
    """`grouped.quantise` and `grouped.pack`, group by group and then byte by byte."""
    size = codes.form.group_size
    of_group, largest = [], []
    for group in range(codes.groups):
        x = _channels(shared, group * size, min(size, codes.features - group * size))
        finite = jnp.max(jnp.where(jnp.abs(x) <= MOST, jnp.abs(x), np.float32(np.inf)), axis=1)
        low = jnp.where(finite <= MOST, jnp.min(x, axis=1), np.float32(np.nan))
        scale, minimum = grouped.pack_pair(low, jnp.max(x, axis=1), 2**int4.BITS - 1)
        store(shared["scale"].at[group], scale)
        store(shared["minimum"].at[group], minimum)
        of_group.append(grouped.steps(scale, minimum))
        largest.append(finite)

    def numbers(first: int, count: int) -> Array:
        step, low = of_group[first // size]
        x = _channels(shared, first, count)
        found = grouped.codes_of(x, spread(step, x.shape, 0), spread(low, x.shape, 0), 2**int4.BITS - 1)
        return found.astype(jnp.int32)  # one by one, as NaN is to be 0

    for first, end in byte_runs(codes.features, size):
        byte = numbers(first, end - first) + numbers(first + codes.width, end - first) * 2**int4.BITS
        store(shared["data"].at[:, pl.ds(first, end - first)], byte.astype(jnp.uint8))
    return _is_unfit(codes, functools.reduce(jnp.maximum, largest))


def _channels(shared: Mapping[str, Any], first: int, count: int) -> Array:
    """Some channels of the tokens, float32 [TILE, count]."""
    return plgpu.load(shared["new"].at[:, pl.ds(first, count)], layout=WGMMA, optimized=False).astype(jnp.float32)
