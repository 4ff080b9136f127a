"""Groups of numbers that share a scale and a minimum, in 2, 4 or 8 bits, several to a byte.

A group's numbers are minimum + scale * code with code = 0 ... 2^bits - 1. Groups lie along the last axis; the last one
may be short. Scale and minimum take 16 bits each (`pack_pair`).

A byte of F = ceil(H / (8 / bits)) holds the numbers j, j + F, j + 2F, ... of a token, low bits first, so that unpacking
gives runs of neighbours (planes) and needs no interleaving.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float, Float32, UInt8, UInt16

from kvattn._typing import Array
from kvattn.codecs.plain import widen_float16
from kvattn.codecs.scaled import factors

LARGE, SMALL = 2.0**15, 2.0**-12
"""Groups whose largest number lies between these keep scale and minimum in float16, others in bfloat16."""

_SIGN = 0x8000
_NAN = 0x7FFF


def num_groups(features: int, size: int) -> int:
    """Groups of `size`, the last one possibly short."""
    return -(-features // size)


def quantise(
    x: Float[Array, "*shape F"], bits: int, size: int
) -> tuple[UInt8[Array, "*shape F"], UInt16[Array, "*shape groups"], UInt16[Array, "*shape groups"]]:
    """Codes in groups of `size` along the last axis.

    Returns:
        codes; scale and minimum, as `unpack_pair` reads them.
    """
    features, count = x.shape[-1], num_groups(x.shape[-1], size)
    x = x.astype(jnp.float32)
    # Filled up with a number of the last group itself, which changes neither its minimum nor its maximum.
    padding = [(0, 0)] * (x.ndim - 1) + [(0, count * size - features)]
    groups = jnp.pad(x, padding, mode="edge").reshape(*x.shape[:-1], count, size)
    top = 2**bits - 1
    # Asked for by itself: on CPUs XLA's smallest and largest numbers may pass over NaN.
    finite = jnp.all(jnp.isfinite(groups), axis=-1)
    low = jnp.where(finite, jnp.min(groups, axis=-1), np.float32(np.nan))
    scale, minimum = pack_pair(low, jnp.max(groups, axis=-1), top)
    step, low = steps(scale, minimum)
    codes = codes_of(groups, step[..., None], low[..., None], top).astype(jnp.uint8)
    return codes.reshape(*x.shape[:-1], count * size)[..., :features], scale, minimum


def steps(
    scale: UInt16[Array, "*groups"], minimum: UInt16[Array, "*groups"]
) -> tuple[Float32[Array, "*groups"], Float32[Array, "*groups"]]:
    """What `codes_of` divides by and subtracts; in kernels too."""
    step, low = unpack_pair(scale, minimum)
    return jnp.where(step == 0, np.float32(1), step), low


def codes_of(
    x: Float32[Array, "*#shape"], step: Float32[Array, "*#shape"], low: Float32[Array, "*#shape"], top: int
) -> Float32[Array, "*shape"]:
    """Codes, as whole numbers; in kernels too."""
    # Halved, so that the distance between the largest and the smallest float32 does not overflow.
    codes = (x * np.float32(0.5) - low * np.float32(0.5)) / (step * np.float32(0.5))
    return jnp.clip(jnp.round(codes), 0, top)


def dequantise(
    codes: UInt8[Array, "*shape F"],
    scale: UInt16[Array, "*shape groups"],
    minimum: UInt16[Array, "*shape groups"],
    size: int,
) -> Float32[Array, "*shape F"]:
    """The numbers of codes and the packed scales and minima of their groups."""
    step, low = (jnp.repeat(x, size, axis=-1)[..., : codes.shape[-1]] for x in unpack_pair(scale, minimum))
    half = low * 0.5 + codes.astype(jnp.float32) * (step * 0.5)
    limit = np.finfo(np.float32).max / 2
    return jnp.clip(half, -limit, limit) * 2


def pack_pair(
    low: Float32[Array, "*groups"], high: Float32[Array, "*groups"], top: int
) -> tuple[UInt16[Array, "*groups"], UInt16[Array, "*groups"]]:
    """Scale and minimum of groups that span [low, high], 16 bits each.

    The minimum is rounded down and the scale up, so that minimum ... minimum + top * scale covers the group and the
    error stays within half a scale. Both are float16, which is finer, or bfloat16 where float16 could overflow or
    underflow; a scale has no sign, so its sign bit tells which. Groups that are not finite give NaN.

    Args:
        low: the smallest number of each group.
        high: the largest.
        top: the largest code.

    Returns:
        scale and minimum.
    """
    largest = jnp.maximum(jnp.abs(low), jnp.abs(high))
    wide = (largest > LARGE) | ((largest < SMALL) & (largest > 0))

    def pair(dtype: DTypeLike) -> tuple[UInt16[Array, "*groups"], UInt16[Array, "*groups"]]:
        minimum = _round(low, dtype, -1)
        step = (high * 0.5 - _widen(minimum) * 0.5) * np.float32(2 / top)
        return _bits(_round(jnp.maximum(step, 0), dtype, 1)), _bits(minimum)

    coarse, fine = pair(jnp.bfloat16), pair(jnp.float16)
    scale = jnp.where(wide, coarse[0] | jnp.uint16(_SIGN), fine[0])
    minimum = jnp.where(wide, coarse[1], fine[1])
    finite = largest <= np.finfo(np.float32).max
    return jnp.where(finite, scale, jnp.uint16(_NAN)), jnp.where(finite, minimum, jnp.uint16(_NAN))


def pair_once(
    scale: UInt16[Array, "*groups"], minimum: UInt16[Array, "*groups"]
) -> tuple[Float32[Array, "*groups"], Float32[Array, "*groups"]]:
    """`unpack_pair`, computed once: left to itself XLA repeats it for every use and every query (CPU: 36 ms for 10)."""
    return jax.lax.optimization_barrier(unpack_pair(scale, minimum))


def unpack_pair(
    scale: UInt16[Array, "*groups"], minimum: UInt16[Array, "*groups"]
) -> tuple[Float32[Array, "*groups"], Float32[Array, "*groups"]]:
    """Scale and minimum as `pack_pair` was given them, but rounded; in kernels too."""
    wide = scale >= jnp.uint16(_SIGN)

    def read(bits: UInt16[Array, "*groups"]) -> Float32[Array, "*groups"]:
        coarse, fine = (jax.lax.bitcast_convert_type(bits, d) for d in (jnp.bfloat16, jnp.float16))
        return jnp.where(wide, _widen(coarse), _widen(fine))

    return read(scale & jnp.uint16(_SIGN - 1)), read(minimum)


def _bits(x: Float[Array, "*shape"]) -> UInt16[Array, "*shape"]:
    return jax.lax.bitcast_convert_type(x, jnp.uint16)


def _widen(x: Float[Array, "*shape"]) -> Float32[Array, "*shape"]:
    return widen_float16(x).astype(jnp.float32)


def _round(x: Float32[Array, "*shape"], dtype: DTypeLike, direction: int) -> Float[Array, "*shape"]:
    """x in a 16-bit dtype, rounded up (+1) or down (-1)."""
    near = x.astype(dtype)
    # A number one step (2^-10 or 2^-7 of it) away, before rounding to the nearest.
    unit = np.float32(2.0**-11 if dtype == jnp.float16 else 2.0**-8)
    tiny = np.float32(2.0**-25 if dtype == jnp.float16 else np.finfo(np.float32).tiny)
    away = (x + direction * (jnp.abs(x) * unit + tiny)).astype(dtype)
    off = _widen(near) < x if direction > 0 else _widen(near) > x
    limit = jnp.finfo(dtype).max
    return jnp.clip(jnp.where(off, away, near), -limit, limit)


def pack(codes: UInt8[Array, "*shape H"], bits: int) -> UInt8[Array, "*shape F"]:
    """Numbers below 2^bits to bytes; missing numbers of the last plane are 0."""
    per_byte = 8 // bits
    size = -(-codes.shape[-1] // per_byte)
    padding = [(0, 0)] * (codes.ndim - 1) + [(0, size * per_byte - codes.shape[-1])]
    planes = jnp.pad(codes, padding).reshape(*codes.shape[:-1], per_byte, size)
    # The planes have no bit in common, so their sum is their union.
    shift = jnp.arange(per_byte, dtype=jnp.uint8).reshape((1,) * (planes.ndim - 2) + (-1, 1)) * jnp.uint8(bits)
    return jnp.sum(planes << shift, axis=-2, dtype=jnp.uint8)


def unpack(data: Array, bits: int, axis: int = -1) -> Array:
    """uint8 [..., F] to uint8 [..., (8 / bits) * F], the inverse of `pack` up to the filling."""
    return jnp.concatenate([plane(data, bits, p) for p in range(8 // bits)], axis=axis)


def plane(data: UInt8[Array, "*shape"], bits: int, index: int) -> UInt8[Array, "*shape"]:
    """The numbers that plane `index` of the bytes holds."""
    return (data >> jnp.uint8(index * bits)) & jnp.uint8(2**bits - 1)


def segments(features: int, bits: int, size: int) -> list[tuple[int, int, int, int]]:
    """The runs of neighbours that lie in one plane and one group: (plane, group, first, end), in order."""
    width = -(-features // (8 // bits))
    cuts = sorted({*range(0, features, width), *range(0, features, size), features})
    return [(a // width, a // size, a, b) for a, b in itertools.pairwise(cuts)]


def scores(
    query: Float[Array, "B K M H"],
    data: UInt8[Array, "B K _ _"],
    scale: UInt16[Array, "B K groups R"],
    minimum: UInt16[Array, "B K groups R"],
    bits: int,
    size: int,
    transposed: bool,
) -> Float[Array, "B K M R"]:
    """Queries times packed keys, groups along H: scale * (query . codes) + minimum * sum(query).

    Args:
        query: the rows.
        data: the bytes, [B, K, R, F], or [B, K, F, R] if transposed.
        scale: of the groups.
        minimum: likewise.
        bits: per number.
        size: of a group.
        transposed: how `data` lies.

    Returns:
        [B, K, M, R], float32 or wider.
    """
    spec, axis = ("bkmh,bkhr->bkmr", -2) if transposed else ("bkmh,bkrh->bkmr", -1)
    step, low = pair_once(scale, minimum)
    width = data.shape[axis]
    total: Any = 0
    for index, group, first, end in segments(query.shape[-1], bits, size):
        part = jax.lax.slice_in_dim(data, first - index * width, end - index * width, axis=axis)
        rows = query[..., first:end]
        product = factors(spec, rows, plane(part, bits, index))
        mean = jnp.sum(rows.astype(product.dtype), axis=-1, keepdims=True)
        total = total + product * step[:, :, group, None] + mean * low[:, :, group, None]
    return total


def mix(
    probs: Float[Array, "B K M R"],
    data: UInt8[Array, "B K R F"],
    scale: UInt16[Array, "B K groups R"],
    minimum: UInt16[Array, "B K groups R"],
    bits: int,
    size: int,
) -> Float[Array, "B K M _"]:
    """Probabilities times packed values, groups along H: (probs * scale) . codes + probs . minimum.

    Args:
        probs: 0 for slots that are not read.
        data: the bytes.
        scale: finite (0) in slots that are not read.
        minimum: likewise.
        bits: per number.
        size: of a group.

    Returns:
        [B, K, M, (8 / bits) * F], float32 or wider.
    """
    step, low = pair_once(scale, minimum)
    width = data.shape[-1]
    offsets = factors("bkmr,bkgr->bkmg", probs, low)
    parts = []
    last = step.shape[-2] - 1
    for index, group, first, end in segments(width * (8 // bits), bits, size):
        group = min(group, last)  # filling behind H may look like one more group
        codes = plane(data[..., first - index * width : end - index * width], bits, index)
        weights = probs * step[:, :, group, None]
        parts.append(factors("bkmr,bkrh->bkmh", weights, codes) + offsets[..., group, None])
    return jnp.concatenate(parts, axis=-1)
