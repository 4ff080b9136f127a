"""The two products of `"mosaic_gpu"` over one tile: keys times queries, values times probabilities."""

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from kvattn._typing import Array
from kvattn.codecs.grouped import unpack_pair
from kvattn.pallas import gpu_mma
from kvattn.pallas.gpu_spec import F32, Spec, byte_runs

WGMMA = plgpu.Layout.WGMMA
COLUMNS = WGMMA.reduce(0)
"""Vectors over the columns M of a matrix."""
TOKENS = WGMMA.reduce(1)
"""Vectors over its rows."""
FLOAT16_UNIT = 2.0**14
"""What 1 is brought to before it becomes float16: its small parts then stay clear of subnormal numbers."""

accumulator: Any = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]


def store(ref: Any, x: Array) -> None:
    """Writes registers [...] to memory of the device."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, x, optimized=False)
    else:
        ref[...] = x


def spread(vector: Array, shape: tuple[int, ...], axis: int = 1) -> Array:
    """A vector [M] over `axis` as a matrix [T, M], or [T] with `axis` 0."""
    return lax.broadcast_in_dim(vector, shape, [axis])


def tanh(x: Array) -> Array:
    """As exact as float32 [...]: the GPU's own has 11 bits, and 1 - 2 / (exp(2x) + 1) loses those of small x."""
    square = x * x
    series = 1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    return jnp.where(square < 0.04, x * series, 1.0 - 2.0 / (jnp.exp(x + x) + 1.0))


def split(x: Array, dtype: DTypeLike, parts: int) -> list[Array]:
    """Numbers of `dtype` that sum up to those of x, float32 [...]."""
    found = []
    for n in range(parts):
        piece = x.astype(dtype)
        found.append(piece)
        if n + 1 < parts:
            x = x - piece.astype(F32)
    return found


def smallest_first(parts: int) -> range:
    """The parts of float32 numbers in the order of their products.

    The matrix unit cuts what it adds off to the digits of the largest sum so far, so what is small has to come first:
    the other way round an H200 was off by two to ten times as much.
    """
    return range(parts - 1, -1, -1)


def products(spec: Spec, shared: dict[str, Any], slot: Array, at_slot: Array) -> Array:
    """Keys times queries, float32 [T, M] of tile and columns, scales of the keys included."""
    shape = (spec.config.tile, spec.cols)
    keys = shared["k_data"].at[slot]
    query = shared["query"].at[at_slot]
    load = lambda name, group: plgpu.load(shared[name].at[slot, group], layout=TOKENS, optimized=False)

    def product(left, first, count):
        """float32 [T, M]: numbers [T, count] times the query's from channel `first` on."""
        if spec.decoded and spec.interpreted and spec.unit == "wgmma":
            # The matrix unit takes its first operand from registers, the interpreter does not.
            shared["keys"].at[:, pl.ds(first, count)][...] = left
            left = shared["keys"].at[:, pl.ds(first, count)]
        return summed(spec, shape, [(left, query.at[n, :, pl.ds(first, count)].T) for n in smallest_first(spec.parts)])

    if not spec.decoded:
        return product(keys, 0, spec.key_features)
    if not spec.format.is_grouped:
        total: Any = 0.0
        for first, count in runs(spec.key_features, spec.key_run):
            codes = plgpu.load(keys.at[:, pl.ds(first, count)], layout=left_layout(spec), optimized=False)
            total = total + product(widened(spec, codes), first, count)
        return total * spread(load("k_scale", 0), shape, 0)
    groups: dict[int, Any] = {}
    for left, group, start, unit in planes(spec, keys, spec.key_features, left_layout(spec)):
        part = product(left, start, left.shape[1]) * unit
        groups[group] = part if group not in groups else groups[group] + part
    total = 0.0
    for group, part in groups.items():
        scale, minimum = unpack_pair(load("k_scale", group), load("k_minimum", group))
        sums = shared["sums"].at[at_slot, group, pl.ds(0, spec.cols)]
        sums = plgpu.load(sums, layout=COLUMNS, optimized=False)
        part = part * spread(scale, shape, 0) + spread(sums, shape) * spread(minimum, shape, 0)
        total = total + part
    return total


def summed(spec: Spec, shape: tuple[int, int], pairs: list[tuple[Any, Any]]) -> Array:
    """The sum of products of left and right operands, float32 of `shape`, in that order."""
    if spec.unit == "mma":
        return gpu_mma.summed(spec, shape, pairs)

    def accumulate(acc):
        """Into float32 of `shape`."""
        for left, right in pairs:
            plgpu.wgmma(acc, left, right)
        return acc[...]

    return pl.run_scoped(accumulate, accumulator(shape, F32))


def by_tokens(spec: Spec, ref: Any) -> Any:
    """A matrix of probabilities or of values that were written once more, with tokens as its rows.

    `wgmma` reads what lies the other way round, and Hopper can write it so.
    """
    return ref if spec.unit == "mma" else ref.T


def left_layout(spec: Spec) -> Any:
    """How registers hold what becomes the left operand of a product."""
    return gpu_mma.ROWS(spec.wide) if spec.unit == "mma" else WGMMA


def runs(features: int, most: int = 128) -> list[tuple[int, int]]:
    """Channels as (first, count) of eight-bit tokens that are decoded at a time: more do not stay in registers."""
    return [(first, min(most, features - first)) for first in range(0, features, most)]


def planes(spec: Spec, tile: Any, features: int, layout: Any) -> list[tuple[Array, int, int, float]]:
    """The numbers of four-bit tokens uint8 [T, F]: (numbers [T, run], group, first channel, what to multiply by).

    Hopper does not shift registers in eight bits, so the high nibbles stay where they are.
    """
    found, width = [], -(-features // 2)
    for first, end in byte_runs(features, spec.format.group_size):
        some = tile.at[:, pl.ds(first, end - first)]
        if spec.unit == "mma":
            low, high = gpu_mma.nibbles(plgpu.load(some, layout=layout, optimized=False), spec.wide)
            unit = 1.0
        else:
            codes = plgpu.load(some, layout=plgpu.Layout.WGMMA_UPCAST_2X, optimized=False)
            low, high = (
                plgpu.layout_cast((codes & jnp.uint8(mask)).astype(spec.wide), layout) for mask in (0x0F, 0xF0)
            )
            unit = 1 / 16
        found.append((low, first // spec.format.group_size, first, 1.0))
        found.append((high, (first + width) // spec.format.group_size, first + width, unit))
    return found


def widened(spec: Spec, codes: Array) -> Array:
    """Numbers in the dtype of products."""
    by_bits = spec.decoded and spec.by_threads
    return gpu_mma.widened(codes, spec.wide) if by_bits else codes.astype(spec.wide)


def mix(spec: Spec, shared: dict[str, Any], slot: Array, probs: Array, kv_at: Array, whole: Array) -> Array:
    """Values times probabilities, float32 [Hv padded, cols]."""
    shape = probs.shape
    values, back = shared["v_data"].at[slot], 1.0
    filled = kv_at >= 0
    if spec.decoded and not spec.format.is_grouped:
        scale = plgpu.load(shared["v_scale"].at[slot, 0], layout=TOKENS, optimized=False)
        probs = probs * spread(jnp.where(filled, scale, 0.0), shape, 0)
        if spec.wide == jnp.float16:
            # float16 holds neither large nor small scales: the largest number of a column becomes 1.
            largest = jnp.max(probs, axis=0)
            largest = jnp.where(largest == 0.0, 1.0, largest)
            probs, back = probs / spread(largest, shape), spread(largest, (spec.padded, spec.cols))
    if spec.wide == jnp.float16:
        # ... and now 2^14, far from the numbers that float16 rounds coarsely.
        probs, back = probs * FLOAT16_UNIT, back * (1 / FLOAT16_UNIT)
    for n, piece in enumerate(split(probs, spec.wide, spec.parts)):
        by_tokens(spec, shared["probs"].at[n])[...] = piece
    if spec.repacked:
        repack(spec, shared, slot, filled, whole)
        lefts = [by_tokens(spec, shared["values"].at[n]).T for n in range(shared["values"].shape[0])]
    else:

        @pl.when(jnp.logical_not(whole))
        def _():
            for first, count in runs(spec.value_features, spec.value_run if spec.unit == "mma" else 256):
                some = values.at[:, pl.ds(first, count)]
                loaded = plgpu.load(some, layout=WGMMA, optimized=False)
                some[...] = jnp.where(spread(filled, loaded.shape, 0), loaded, jnp.zeros((), loaded.dtype))

        lefts = [values.T]
    if spec.unit == "wgmma":
        plgpu.commit_smem()
    pairs = [
        (left, by_tokens(spec, shared["probs"].at[both - m]))
        for both in smallest_first(spec.parts)
        for m, left in enumerate(lefts[: both + 1])
    ]
    mixed = summed(spec, (spec.padded, spec.cols), pairs)
    return mixed if isinstance(back, float) and back == 1.0 else mixed * back


def repack(spec: Spec, shared: dict[str, Any], slot: Array, filled: Array, whole: Array) -> None:
    """Writes a tile of values once more, channel by channel, in 16 bits; nothing there that is not finite.

    `filled` is bool [T], `whole` a scalar.
    """
    values, target = shared["v_data"].at[slot], shared["values"]

    def channels(n: int, first: int, count: int) -> Any:
        """Where some of part n go, [T, count]."""
        some = pl.ds(first, count)
        return target.at[n, :, some] if spec.unit == "mma" else target.at[n, some].T

    def rewrite(masked: bool) -> None:
        for first, count in runs(spec.value_features, spec.value_run):
            codes = plgpu.load(values.at[:, pl.ds(first, count)], layout=WGMMA, optimized=False)
            codes = widened(spec, codes)
            if masked:
                codes = jnp.where(spread(filled, codes.shape, 0), codes, jnp.zeros((), codes.dtype))
            channels(0, first, count)[...] = codes

    if jnp.issubdtype(values.dtype, jnp.integer) and not spec.format.is_grouped:
        rewrite(False)  # integers are finite, and the scales of empty slots are 0
    elif not spec.format.is_grouped:
        pl.when(whole)(lambda: rewrite(False))
        pl.when(jnp.logical_not(whole))(lambda: rewrite(True))
    else:
        load = lambda name, group: plgpu.load(shared[name].at[slot, group], layout=TOKENS, optimized=False)
        for plane, group, start, unit in planes(spec, values, spec.value_features, WGMMA):
            scale, minimum = (
                jnp.where(filled, x, 0.0) for x in unpack_pair(load("v_scale", group), load("v_minimum", group))
            )
            numbers = plane.astype(F32) * spread(scale * unit, plane.shape, 0) + spread(minimum, plane.shape, 0)
            for n, piece in enumerate(split(numbers, spec.wide, spec.parts)):
                channels(n, start, plane.shape[1])[...] = piece
