"""The two products of `"mosaic_gpu"` over one tile: keys times queries, values times probabilities."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from kvattn._typing import Array
from kvattn.pallas import gpu_mma
from kvattn.pallas.gpu_fragments import BYTES, CHEAPEST, eight_bit_floats, nibbles, operand
from kvattn.pallas.gpu_spec import F32, THREADS, Spec, byte_runs

WGMMA = plgpu.Layout.WGMMA
COLUMNS = WGMMA.reduce(0)
"""Vectors over the columns M of a matrix."""
TOKENS = WGMMA.reduce(1)
"""Vectors over its rows."""
MIDDLE = 8
"""Of four-bit codes. About 0 they make smaller products, with smaller errors, than all of one sign."""
FLOAT16_EXPONENT = 14
FLOAT16_UNIT = 2.0**FLOAT16_EXPONENT
"""What 1 is brought to before it becomes float16: its small parts then stay clear of subnormal numbers."""

LEAST_SCALE = 2.0**-96
"""Of values: smaller ones are brought to numbers that float16 rounds coarsely, so that none becomes infinite."""

accumulator: Any = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]


def store(ref: Any, x: Array) -> None:
    """Writes registers [...] to memory of the device."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, x, optimized=False)
    else:
        ref[...] = x


def spread(vector: Array, shape: tuple[int, ...], axis: int | tuple[()] = 1) -> Array:
    """A vector [M] over `axis` as a matrix [T, M], or [T] with `axis` 0; a number with `axis` ()."""
    return lax.broadcast_in_dim(vector, shape, [axis] if isinstance(axis, int) else axis)


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
    query = shared["query"].at[0 if spec.prepares else at_slot]
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
    left = gpu_mma.ROWS(spec.wide) if spec.unit == "mma" else WGMMA
    if not spec.format.is_grouped:
        total: Any = 0.0
        for first, count in runs(spec.key_features, spec.key_run):
            total = total + product(widened(spec, keys, first, count, left), first, count)
        return total * spread(load("k_scale", 0), shape, 0)
    total = 0.0
    # What is too much comes off exactly here, where it is multiplied by sums of the query, not by rounded weights.
    bias = CHEAPEST if spec.parts == 1 else -MIDDLE
    pair = pairs(spec, shared, slot, "k", -bias)
    for run in planes(spec, keys, spec.key_features, bias, left):
        part = product(run.codes, run.start, run.count)
        scale, minimum = pair(run.group)
        sums = shared["sums"].at[run.number, pl.ds(0, spec.cols)]
        sums = plgpu.load(sums, layout=COLUMNS, optimized=False)
        total = total + part * spread(scale, shape, 0) + spread(sums, shape) * spread(minimum, shape, 0)
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


def tokens_as_rows(spec: Spec, ref: Any) -> Any:
    """A matrix that lies as `gpu_spec.by_tokens` says, with tokens as its rows."""
    return ref if spec.unit == "mma" else ref.T


def runs(features: int, most: int) -> list[tuple[int, int]]:
    """Channels as (first, count) of tokens that are decoded at a time: more than `most` do not stay in registers."""
    return [(first, min(most, features - first)) for first in range(0, features, most)]


class Plane(NamedTuple):
    """Some channels of four-bit tokens, which share scale and minimum.

    Attributes:
        number: among those of a token.
        codes: in 16 bits [T, count], permuted as `gpu_fragments` has it.
        group: their group.
        start: the first channel.
        bias: what was added to them.
    """

    number: int
    codes: Array
    group: int
    start: int
    bias: int

    @property
    def count(self) -> int:
        """Of channels."""
        return self.codes.shape[1]


def pairs(
    spec: Spec, shared: dict[str, Any], slot: Array, role: str, zero: int
) -> Callable[[int], tuple[Array, Array]]:
    """What gives, of each group of "k" or "v", scale and the number of code `zero` [T] (`unpacked`).

    Four threads share a token. Where there are tokens and groups enough for all threads, each pair is unpacked by one.
    """
    names = [f"{role}_{name}" for name in ("scale", "minimum")]
    if not spec.unpacks_once:
        load = lambda name, group: plgpu.load(shared[name].at[slot, group], layout=TOKENS, optimized=False)
        return lambda group: unpacked(load(names[0], group), load(names[1], group), zero)
    buffer = shared[f"{role}_pair"]
    layout = plgpu.Layout.WG_STRIDED(buffer.shape[1:], vec_size=math.prod(buffer.shape[1:]) // THREADS)
    scale, minimum = (plgpu.load(shared[name].at[slot], layout=layout, optimized=False) for name in names)
    for n, x in enumerate(unpacked(scale, minimum, zero)):
        store(buffer.at[n], x)
    read = lambda n, group: plgpu.load(buffer.at[n, group], layout=TOKENS, optimized=False)
    return lambda group: (read(0, group), read(1, group))


def unpacked(scale: Array, minimum: Array, zero: int) -> tuple[Array, Array]:
    """Scale and the number of code `zero` [T], from what `kvattn.codecs.grouped.pack_pair` makes of scale and minimum.

    The GPU's own conversions are exact for every float16.
    """
    wide = scale >= jnp.uint16(0x8000)

    def read(bits):
        """float32 [T] of uint16 [T]."""
        coarse, fine = (lax.bitcast_convert_type(bits, d).astype(F32) for d in (jnp.bfloat16, jnp.float16))
        return jnp.where(wide, coarse, fine)

    step = read(scale & jnp.uint16(0x7FFF))
    return step, read(minimum) + step * float(zero)


def widened(spec: Spec, tile: Any, first: int, count: int, layout: Any = WGMMA) -> Array:
    """Eight-bit channels of a tile [T, F] in 16 bits [T, count], permuted as `gpu_fragments` has it."""
    codes = plgpu.load(tile.at[:, pl.ds(first, count)], layout=BYTES, optimized=False)
    if spec.by_threads and codes.dtype == jnp.float8_e4m3fn:
        return eight_bit_floats(codes, spec.interpreted, layout)
    return operand(codes, spec.wide, spec.interpreted, layout)


def planes(spec: Spec, tile: Any, features: int, bias: int = -MIDDLE, layout: Any = WGMMA) -> list[Plane]:
    """The numbers of four-bit tokens int8 [T, F], plus `bias`."""
    found, width, size = [], -(-features // 2), spec.format.group_size
    for first, end in byte_runs(features, size):
        codes = plgpu.load(tile.at[:, pl.ds(first, end - first)], layout=BYTES, optimized=False)
        for start, high in ((first, False), (first + width, True)):
            wide = nibbles(codes, high, bias, spec.interpreted, layout)
            found.append(Plane(len(found), wide, start // size, start, bias))
    return found


def scaled(spec: Spec, probs: Array, factors: Array, allowed: Array) -> Array:
    """Probabilities [T, cols] times factors [T], which are 0 in empty slots, and NaN for what a codec cannot hold."""
    product = probs * spread(factors, probs.shape, 0)
    # What a query may not attend to is not its business; the only one of its row may attend to all that is not empty.
    return product if spec.is_single else jnp.where(allowed, product, 0.0)


def mix_groups(
    spec: Spec, shared: dict[str, Any], slot: Array, probs: Array, allowed: Array, filled: Array
) -> tuple[list[Array], list[Array]]:
    """Values times probabilities where they are added up group by group.

    Args:
        spec: the sizes.
        shared: the program's shared memory.
        slot: of the tile, int32 [].
        probs: float32 [T, cols].
        allowed: which column may attend to which slot, bool [T, cols].
        filled: which slots any of them may attend to, bool [T].

    Returns:
        what each of `spec.outputs` adds up, float32 [count, cols]; and probabilities times minima of each, float32
        [T, cols].
    """
    values, mixed, low = shared["v_data"].at[slot], [], []
    pair, found = pairs(spec, shared, slot, "v", MIDDLE), planes(spec, values, spec.value_features)
    for i, run in enumerate(found):
        # Codes are finite whatever lies in empty slots.
        scale, minimum = (jnp.where(filled, x, 0.0) for x in pair(run.group))
        low.append(scaled(spec, probs, minimum, allowed))
        for n, piece in enumerate(split(scaled(spec, probs, scale, allowed), spec.wide, spec.parts)):
            tokens_as_rows(spec, shared["probs"].at[i * spec.parts + n])[...] = piece
        tokens_as_rows(spec, shared["values"].at[0]).at[:, pl.ds(run.start, run.count)][...] = run.codes
    if spec.unit == "wgmma":
        plgpu.commit_smem()
    for i, run in enumerate(found):
        lefts = [tokens_as_rows(spec, shared["values"].at[0]).at[:, pl.ds(run.start, run.count)].T]
        mixed.append(weighted(spec, lefts, shared["probs"], i * spec.parts, run.count))
    return mixed, low


def put(spec: Spec, shared: dict[str, Any], slot: Array, probs: Array, allowed: Array, filled: Array) -> Array | float:
    """Writes probabilities, times scales of values if there are any, to shared memory, for `mix`.

    Args:
        spec: the sizes.
        shared: the program's shared memory.
        slot: of the tile, int32 [].
        probs: float32 [T, cols].
        allowed: which column may attend to which slot, bool [T, cols].
        filled: which slots any of them may attend to, bool [T].

    Returns:
        what to multiply products by: float32 [Hv padded, cols], or a number.
    """
    back: Any = 1.0
    if spec.decoded and not spec.format.is_grouped:
        scale = plgpu.load(shared["v_scale"].at[slot, 0], layout=TOKENS, optimized=False)
        scale = jnp.where(filled, scale, 0.0)
        if spec.parts == 1:
            # float16 holds neither large nor small scales: the largest of the tile becomes 1.
            known = scale if spec.is_single else jnp.where(scale == scale, scale, 0.0)
            back = jnp.maximum(jnp.max(known, axis=0), LEAST_SCALE)
            probs = scaled(spec, probs, scale * (1.0 / back), allowed)
        else:
            # What is to be as exact as float32 wants more: the largest number of each column becomes 1.
            probs = scaled(spec, probs, scale, allowed)
            largest = jnp.max(probs, axis=0)
            largest = jnp.where(largest == 0.0, 1.0, largest)
            probs, back = probs / spread(largest, probs.shape), spread(largest, (spec.padded, spec.cols))
    if spec.wide == jnp.float16:
        # ... and now 2^14, far from the numbers that float16 rounds coarsely.
        probs, back = probs * FLOAT16_UNIT, back * (1 / FLOAT16_UNIT)
    for n, piece in enumerate(split(probs, spec.wide, spec.parts)):
        tokens_as_rows(spec, shared["probs"].at[n])[...] = piece
    return back


def mix(spec: Spec, shared: dict[str, Any], slot: Array, back: Array | float, filled: Array, whole: Array) -> Array:
    """Values times probabilities that `put` wrote, float32 [Hv padded, cols].

    Args:
        spec: the sizes.
        shared: the program's shared memory.
        slot: of the tile, int32 [].
        back: what `put` returned.
        filled: bool [T], which slots any column may attend to; the others may hold NaN.
        whole: whether all are, bool [].
    """
    values = shared["v_data"].at[slot]
    if spec.repacked:
        repack(spec, shared, slot, filled, whole)
        lefts = [tokens_as_rows(spec, shared["values"].at[n]).T for n in range(shared["values"].shape[0])]
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
    mixed = weighted(spec, lefts, shared["probs"], 0, spec.padded)
    return mixed if isinstance(back, float) and back == 1.0 else mixed * back


def weighted(spec: Spec, lefts: list[Any], probs: Any, first: int, count: int) -> Array:
    """Values, in parts that sum up, times probabilities, whose parts begin at `first`; float32 [count, cols]."""
    pairs = [
        (left, tokens_as_rows(spec, probs.at[first + both - m]))
        for both in smallest_first(spec.parts)
        for m, left in enumerate(lefts[: both + 1])
    ]
    return summed(spec, (count, spec.cols), pairs)


def repack(spec: Spec, shared: dict[str, Any], slot: Array, filled: Array, whole: Array) -> None:
    """Writes a tile of values once more, channel by channel, in 16 bits; nothing there that is not finite.

    `filled` is bool [T], `whole` a scalar.
    """
    values, target = shared["v_data"].at[slot], shared["values"]

    def rewrite(masked: bool) -> None:
        for first, count in runs(spec.value_features, spec.value_run):
            part = values.at[:, pl.ds(first, count)]
            if spec.decoded:
                codes = widened(spec, values, first, count)
            else:
                codes = plgpu.load(part, layout=WGMMA, optimized=False)
            if masked:
                codes = jnp.where(spread(filled, codes.shape, 0), codes, jnp.zeros((), codes.dtype))
            tokens_as_rows(spec, target.at[0]).at[:, pl.ds(first, count)][...] = codes

    if jnp.issubdtype(values.dtype, jnp.integer) and not spec.format.is_grouped:
        rewrite(False)  # integers are finite, and the scales of empty slots are 0
    elif not spec.format.is_grouped:
        pl.when(whole)(lambda: rewrite(False))
        pl.when(jnp.logical_not(whole))(lambda: rewrite(True))
    else:
        pair = pairs(spec, shared, slot, "v", MIDDLE)
        for run in planes(spec, values, spec.value_features):
            both = pair(run.group)
            scale, minimum = (jnp.where(filled, x, 0.0) for x in both)
            numbers = run.codes.astype(F32)
            numbers = numbers * spread(scale, numbers.shape, 0) + spread(minimum, numbers.shape, 0)
            for n, piece in enumerate(split(numbers, spec.wide, spec.parts)):
                tokens_as_rows(spec, target.at[n]).at[:, pl.ds(run.start, run.count)][...] = piece
