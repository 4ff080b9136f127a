"""The columns of a segment: queries as the matrix unit takes them, and what becomes of their scores."""

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kvattn._typing import Array
from kvattn.masks import EMPTY
from kvattn.pallas.gpu_fragments import QUERIES, permuted_queries
from kvattn.pallas.gpu_spec import F32, Spec
from kvattn.pallas.gpu_tile import COLUMNS, FLOAT16_EXPONENT, TOKENS, split, spread, tanh
from kvattn.pallas.gpu_walk import asked
from kvattn.pallas.shares import alike, position_in_ring


def prepare(spec: Spec, shared: dict[str, Any], slot: Array) -> None:
    """Writes the queries in `slot` once more: split, scaled, with channels permuted; and their sums over groups."""
    raw = shared["raw"].at[slot]
    numbers = plgpu.load(raw, layout=QUERIES, optimized=False)
    if spec.factor:
        # float16 has neither the range of bfloat16 nor of float32. A power of two changes no digit.
        numbers = numbers.astype(F32)
        factor = power_of_two(jnp.max(jnp.abs(numbers), axis=1))
        shared["factor"].at[pl.ds(0, spec.cols)][...] = factor
        numbers = numbers * spread(1.0 / factor, numbers.shape, 0)
    pieces = [numbers.astype(spec.wide)] if spec.parts == 1 else split(numbers.astype(F32), spec.wide, spec.parts)
    for n, piece in enumerate(pieces):
        shared["query"].at[0, n][...] = permuted_queries(piece, spec.interpreted) if spec.decoded else piece
    if spec.format.is_grouped:
        for n, (first, count) in enumerate(spec.key_runs):
            part = plgpu.load(raw.at[:, pl.ds(first, count)], layout=QUERIES, optimized=False)
            shared["sums"].at[n, pl.ds(0, spec.cols)][...] = jnp.sum(part.astype(F32), axis=1)
    if spec.unit == "wgmma":
        plgpu.commit_smem()


def power_of_two(largest: Array) -> Array:
    """What to divide numbers by, the largest of which are float32 [M], so that float16 holds them; 1 for none."""
    exponent = lax.bitcast_convert_type(largest, jnp.int32) >> 23
    wanted = jnp.clip(exponent - (FLOAT16_EXPONENT - 1), 1, 253)
    usual = (largest > 0.0) & (exponent < 255)
    return jnp.where(usual, lax.bitcast_convert_type(wanted << 23, F32), 1.0)


class Columns:
    """What is known of the columns of a segment, vectors [M], and what it does to scores."""

    def __init__(self, spec: Spec, memory: dict[str, Any], shared: dict[str, Any], row: Array, slot: Array):
        self.spec, self.shared, self.slot = spec, shared, slot
        self.at = memory["at"][row] if spec.is_single else self._load("at")
        if spec.in_order or not spec.is_single:
            self.first, self.last = asked(spec, memory, row)
        if spec.in_order:
            self.end = jnp.where(self.last >= 0, memory["counts"][row], 0)
        self.slopes = self._load("slopes") if spec.alibi else None
        self.factor = self._read(shared["factor"]) if spec.factor else None

    def _load(self, name: str) -> Array:
        """[M]."""
        return self._read(self.shared[name].at[self.slot])

    def _read(self, vector: Any) -> Array:
        """[M] of a reference to [lanes]."""
        return plgpu.load(vector.at[pl.ds(0, self.spec.cols)], layout=COLUMNS, optimized=False)

    def positions_of(self, t: Array, slot: Array) -> Array:
        """The positions int32 [T] in tile t, which is in `slot` of the ring; EMPTY where no query may look."""
        spec = self.spec
        if not spec.in_order:
            return plgpu.load(self.shared["positions"].at[slot], layout=TOKENS, optimized=False)
        tile = spec.config.tile
        kv_at = plgpu.broadcasted_iota(jnp.int32, (tile,), 0, layout=TOKENS) + t * tile
        if spec.ring:
            kv_at = position_in_ring(kv_at, spec.ring, self.end)
        there = (kv_at < self.end) & spec.mask.between(kv_at, self.first, self.last)
        return jnp.where(there, kv_at, EMPTY)

    def are_apart(self, t: Array, kv_at: Array) -> Array:
        """Whether some queries may attend to slots of tile t that others may not, or may seem to; bool []."""
        if self.spec.in_order:
            low, high = t * self.spec.config.tile, lax.min((t + 1) * self.spec.config.tile, self.end) - 1
        else:
            high = jnp.max(kv_at, axis=0)
            low = jnp.min(jnp.where(kv_at >= 0, kv_at, high), axis=0)
        return jnp.logical_not(alike(self.spec.mask, low, high, self.first, self.last))

    def adjusted(self, scores: Array, kv_at: Array) -> tuple[Array, Array]:
        """Scale, soft cap, ALiBi and mask of scores [T, M], the positions of whose slots are int32 [T].

        Returns:
            these, and who may attend to what, bool [T, M].
        """
        spec, shape = self.spec, scores.shape
        if self.factor is not None:
            scores = scores * spread(self.factor * spec.scale, shape)
        else:
            scores = scores * spec.scale
        if spec.softcap is not None:
            scores = tanh(scores * (1 / spec.softcap)) * spec.softcap
        if spec.is_single:
            distance = lambda: spread((kv_at - self.at).astype(F32), shape, 0)
            seen = kv_at >= 0
            if not spec.in_order:  # else that is said already
                seen &= (self.at >= 0) & spec.mask.between(kv_at, self.at, self.at)
            allowed = spread(seen, shape, 0)
        else:
            kv, at = spread(kv_at, shape, 0), spread(self.at, shape)
            distance = lambda: (kv - at).astype(F32)
            allowed = (at >= 0) & spec.mask.between(kv, at, at)
        if self.slopes is not None:
            scores = scores + spread(self.slopes, shape) * distance()
        # Masked by selecting, never by adding: what lies in an unused slot may be NaN.
        return jnp.where(allowed, scores, -jnp.inf), allowed
