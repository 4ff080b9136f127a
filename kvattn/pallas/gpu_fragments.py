"""Codes on their way into the matrix unit of `"mosaic_gpu"`: which thread holds which channel.

The matrix unit wants two neighbours from a thread, and the two that are eight further on. Of eight-bit numbers a thread
loads four neighbours at a time, and exchanging them would cost more than widening them. So channels change places
within their sixteen instead (`operand`), queries do the same (`permuted_queries`), and outputs go back (`restored`):
which place a register stands for is all that changes, no instruction is spent.

Channel 16 j + 4 c + 2 b + e is at 16 j + 8 b + 2 c + e.
"""

from collections.abc import Callable
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.typing import DTypeLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from kvattn._typing import Array

WGMMA, BYTES = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA_8BIT
QUERIES = plgpu.Layout.TILED(
    plgpu.Tiling(((8, 16), (4,))), warp_dims=(plgpu.Replicated(4),), lane_dims=(-3, -2), vector_dim=-1
)
"""Of columns [M, H]: four neighbours to a thread; every warp has them all."""
PERMUTED = plgpu.Layout.TILED(
    plgpu.Tiling(((8, 16), (8, 8), (2,))), warp_dims=(plgpu.Replicated(4),), lane_dims=(-3, -2), vector_dim=-1
)
CHEAPEST = 128
"""What four-bit codes have too much as they are widened."""
RESTORED = plgpu.Layout.TILED(
    plgpu.Tiling(((64, 8), (16, 8), (4, 8), (2, 8), (2,), (1,))),
    warp_dims=(-10,),
    lane_dims=(-8, -4, -3),
    vector_dim=-1,
)


def operand(codes: Array, wide: DTypeLike, interpreted: bool, target: Any = WGMMA) -> Array:
    """Eight-bit numbers [T, F], loaded as `BYTES`, in 16 bits as a matrix unit takes them: as `target`, permuted."""
    if interpreted or codes.dtype != jnp.int8 or wide != jnp.float16:
        codes = codes.astype(wide)
        return _permuted(codes) if interpreted else _cut(codes, BYTES, target, _places(target))
    # Shifted by 128 they are the last bits of float16 numbers from 1024 on.
    return _widened(codes, jnp.float16, "xor.b32 word, $1, 0x80808080;", 0x64, 0x6480, target)


def eight_bit_floats(codes: Array, interpreted: bool, target: Any = WGMMA) -> Array:
    """`operand` of float8_e4m3fn by its bits: GPUs before 8.9 have no conversion.

    The exponent of float16 is a bit longer, and counts from eight less. NaN becomes a number: where a token has one, so
    has its scale.
    """
    if interpreted:
        return operand(codes, jnp.float16, interpreted, target)
    asms = [
        f"""
        {{
        .reg .b32 number, sign, shifted, small, both, factor;
        prmt.b32 number, $1, 0, {taken:#x};
        and.b32 sign, number, 0x80008000;
        shr.b32 shifted, number, 1;
        and.b32 small, shifted, 0x3f803f80;
        or.b32 both, small, sign;
        mov.b32 factor, 0x5c005c00;
        mul.f16x2 $0, both, factor;
        }}
        """
        for taken in (0x1404, 0x3424)
    ]
    widen = lambda register: _carried_out(register, asms, jnp.float16)
    return _relabelled(codes, jnp.float16, BYTES, target, widen, _places(target))


def nibbles(codes: Array, high: bool, bias: int, interpreted: bool, target: Any = WGMMA) -> Array:
    """The low or the high four bits of int8 [T, F], plus `bias`, in bfloat16 as `operand` has eight.

    A bias of `CHEAPEST` costs least. Such numbers are as exact, but what they add up to is less so.
    """
    if interpreted:
        codes = lax.bitcast_convert_type(codes, jnp.uint8)
        return _permuted((codes >> 4 if high else codes & 0x0F).astype(jnp.bfloat16) + jnp.bfloat16(bias))
    shift = "shr.b32 shifted, $1, 4;\n" if high else "mov.b32 shifted, $1;\n"
    # They are the last bits of bfloat16 numbers from 128 on.
    taken = None if bias == CHEAPEST else 0x4300 - bias
    return _widened(codes, jnp.bfloat16, f"{shift}and.b32 word, shifted, 0x0f0f0f0f;", 0x43, taken, target)


def permuted_queries(x: Array, interpreted: bool) -> Array:
    """Columns of 16 bits [M, H], as `QUERIES`, with channels permuted as those of `operand`."""
    if interpreted:
        return _permuted(x)
    return _cut(x, QUERIES, PERMUTED, lambda i, j, *_: [(i, j, 0, b, 0, 0, 0) for b in (0, 1)])


def restored(x: Array, interpreted: bool) -> Array:
    """Outputs float32 [H, M] of permuted channels, `WGMMA`, in the order of channels."""
    if interpreted:
        return x.reshape(-1, 2, 4, 2, x.shape[1]).swapaxes(1, 2).reshape(x.shape)
    return _cut(x, WGMMA, RESTORED, lambda i, j, w, _, b, *rest: [(i, j, 0, 0, 0, 0, b, 0, 0, 0, n, 0) for n in (0, 1)])


def _permuted(x: Array) -> Array:
    """[N, F], in so many words."""
    return x.reshape(x.shape[0], -1, 4, 2, 2).swapaxes(2, 3).reshape(x.shape)


def _places(target: Any) -> Callable[..., list[tuple[int, ...]]]:
    """Where the halves of the register at a place of `BYTES` are in `target`, `WGMMA` or the left operand of `mma`."""
    if target == WGMMA:
        return lambda i, j, *rest: [(i, 2 * j + b, *rest) for b in (0, 1)]
    return lambda i, j, w, _, *rest: [(i, j, w, b, *rest) for b in (0, 1)]


def _cut(x: Array, layout: Any, target: Any, places: Callable[..., list[tuple[int, ...]]]) -> Array:
    """The same registers, cut in two, which are said to hold something else.

    Args:
        x: as `layout`.
        layout: of the registers as they are.
        target: what they become.
        places: of the two halves of the register at a place.
    """
    return _relabelled(x, x.dtype, layout, target, lambda register: _halves(register), places)


def _widened(codes: Array, wide: DTypeLike, ready: str, high: int, bias: int | None, target: Any) -> Array:
    """Bytes below a high one, less a bias if there is one: the GPU has no such conversion, the compiler's is long.

    Args:
        codes: int8 [T, F], as `BYTES`.
        wide: the 16-bit dtype.
        ready: makes "word", four bytes without sign, of four codes.
        high: the high byte of the numbers that they are the low bytes of.
        bias: the bits of the number to be taken from those.
        target: the layout of the result.
    """
    less = "mov.b32 $0, number;"
    if bias is not None and jnp.dtype(wide) == jnp.bfloat16:  # before Hopper that comes off products only
        less = (
            f"mov.b32 one, 0x3f803f80;\nmov.b32 bias, {(bias | 0x8000) * 0x00010001:#x};\n"
            f"fma.rn.bf16x2 $0, number, one, bias;"
        )
    elif bias is not None:
        less = f"mov.b32 bias, {bias * 0x00010001:#x};\nsub.f16x2 $0, number, bias;"
    asms = [
        f"""
        {{
        .reg .b32 shifted, word, number, one, bias;
        {ready}
        prmt.b32 number, word, {high * 0x01010101:#x}, {taken:#x};
        {less}
        }}
        """
        for taken in (0x4140, 0x4342)
    ]
    widen = lambda register: _carried_out(register, asms, wide)
    return _relabelled(codes, wide, BYTES, target, widen, _places(target))


def _halves(register: Any) -> list[Any]:
    """Of a vector."""
    half = ir.VectorType(register.type).shape[0] // 2
    return [mgpu.utils.vector_slice(register, slice(half * n, half * (n + 1))) for n in (0, 1)]


def _carried_out(register: Any, asms: list[str], dtype: DTypeLike) -> list[Any]:
    """Vectors of two numbers, each by an assembler's text from a register of four bytes."""
    i32, element = ir.IntegerType.get_signless(32), mgpu.utils.dtype_to_ir_type(jnp.dtype(dtype))
    word = mgpu.utils.bitcast(register, i32)
    pairs = (llvm.inline_asm(i32, [word], asm, "=r,r") for asm in asms)
    return [mgpu.utils.bitcast(pair, ir.VectorType.get((2,), element)) for pair in pairs]


def _relabelled(
    x: Array,
    dtype: DTypeLike,
    layout: Any,
    target: Any,
    halves: Callable[[Any], list[Any]],
    places: Callable[..., list[tuple[int, ...]]],
) -> Array:
    """Two registers for each one of x, as `target` has them in `places`; of another dtype if `halves` changes it."""

    def relabel(_, fragments):
        """Of `mgpu.FragmentedArray`."""
        wanted = target.to_mgpu()
        new = np.empty(wanted.registers_shape(x.shape), dtype=object)
        for place, register in np.ndenumerate(fragments.registers):
            for there, half in zip(places(*place), halves(register), strict=True):
                new[there] = half
        return mgpu.FragmentedArray(_registers=new, _layout=wanted, _is_signed=None)

    result = plgpu.ShapeDtypeStruct(x.shape, jnp.dtype(dtype), layout=target)
    inlined: Any = plgpu.inline_mgpu(arg_types=(layout,), return_type=result)
    return inlined(relabel)(x)
