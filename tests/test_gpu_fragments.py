"""Which thread holds what on its way into the matrix unit: the lines of the GPU kernel that no interpreter runs.

Registers are lists of numbers here, and the few instructions of the assembler are carried out one by one.
"""

import functools
import itertools
import re

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.mosaic import gpu as mgpu

from kvattn.pallas import gpu_fragments
from kvattn.pallas.gpu_fragments import BYTES, PERMUTED, QUERIES, RESTORED, WGMMA

pytestmark = pytest.mark.wrong_types  # stand-ins for the kernel's own values
WARPS, LANES = 4, 32


def held(layout, x):
    """{(warp, lane): registers, each a vector} of a matrix, by the definition of Mosaic's tiled layouts."""
    layout = layout.to_mgpu()
    for tile in layout.tiling.tiles:
        lead, rest = x.shape[: x.ndim - len(tile)], x.shape[x.ndim - len(tile) :]
        x = x.reshape(*lead, *itertools.chain(*((n // t, t) for n, t in zip(rest, tile, strict=True))))
        first = range(len(lead), x.ndim, 2)
        x = x.transpose(*range(len(lead)), *first, *(i + 1 for i in first))
    found = {}
    for warp, lane in itertools.product(range(WARPS), range(LANES)):
        at = [slice(None)] * x.ndim
        for number, dims in ((warp, layout.warp_dims), (lane, layout.lane_dims)):
            for dim in reversed(dims):
                size = dim.times if isinstance(dim, mgpu.fragmented_array.Replicated) else x.shape[dim]
                number, this = divmod(number, size)
                if not isinstance(dim, mgpu.fragmented_array.Replicated):
                    at[dim] = slice(this, this + 1)
            assert number == 0
        mine = x[tuple(at)]
        registers = np.empty((*mine.shape[:-1], 1), dtype=object)
        for place in np.ndindex(mine.shape[:-1]):
            registers[(*place, 0)] = mine[place]
        found[warp, lane] = registers
    return found


def test_layouts_are_read_as_mosaic_reads_them():
    """What the matrix unit wants of a thread, as NVIDIA has it: two neighbours of a row, those of the row eight on."""
    x = np.arange(64 * 16).reshape(64, 16)
    for (warp, lane), registers in held(WGMMA, x).items():
        row, column = 16 * warp + lane // 4, lane % 4 * 2
        expected = [[x[row + 8 * i, column + 8 * j :][:2] for i in (0, 1)] for j in (0, 1)]
        np.testing.assert_array_equal(np.stack([*registers.ravel()]).reshape(2, 2, 2), expected)
        assert registers.shape == WGMMA.to_mgpu().registers_shape(x.shape)
    for (warp, lane), registers in held(BYTES, x).items():
        expected = [x[16 * warp + lane // 4 + 8 * i, lane % 4 * 4 :][:4] for i in (0, 1)]
        np.testing.assert_array_equal(np.stack([*registers.ravel()]), expected)


def relabelled(monkeypatch, call, x, layout, target):
    """The matrix that a function of `gpu_fragments` makes of a matrix x, thread by thread."""
    shown = []

    def inline(arg_types, return_type):
        assert arg_types == (layout,) and return_type.layout == target
        assert return_type.shape == x.shape

        def decorated(f):
            def run(_):
                places = held(target, np.arange(x.size).reshape(x.shape))
                result = np.full(x.size, -1, dtype=return_type.dtype)
                for thread, registers in held(layout, x).items():
                    fragments = type("Fragments", (), {"registers": registers, "layout": layout.to_mgpu()})
                    new = f(None, fragments)
                    assert new.shape == places[thread].shape
                    for place, register in np.ndenumerate(new):
                        result[places[thread][place]] = register
                shown.append(result.reshape(x.shape))

            return run

        return decorated

    with monkeypatch.context() as patch:
        patch.setattr(plgpu, "inline_mgpu", inline)
        patch.setattr(mgpu, "FragmentedArray", lambda _registers, **_: _registers)
        patch.setattr(gpu_fragments, "_halves", lambda register: np.split(register, 2))
        patch.setattr(gpu_fragments, "_carried_out", carried_out)
        call(jnp.asarray(x))
    (result,) = shown
    return result


def carried_out(register, asms, dtype):
    """Vectors of two numbers, each by an assembler's text from a register of four bytes."""
    (word,) = np.ascontiguousarray(register).view(np.uint32)
    return [np.array([ptx(asm, int(word))], np.uint32).view(jnp.dtype(dtype)) for asm in asms]


def ptx(text, word):
    """What a text makes of a word, for the instructions that we use."""
    named = {"$1": word}
    value = lambda name: named[name] if name in named else int(name, 0)
    for line in re.findall(r"^\s*([a-z][\w.]* .*);", text, re.MULTILINE):
        operation, rest = line.split(" ", 1)
        target, *names = (part.strip() for part in rest.split(","))
        a = [value(name) for name in names]
        match operation.split(".")[0]:
            case "and":
                named[target] = a[0] & a[1]
            case "or":
                named[target] = a[0] | a[1]
            case "xor":
                named[target] = a[0] ^ a[1]
            case "shr":
                named[target] = a[0] >> a[1]
            case "mov":
                named[target] = a[0]
            case "prmt":
                both = (a[0] | a[1] << 32).to_bytes(8, "little")
                named[target] = int.from_bytes(bytes(both[a[2] >> 4 * i & 7] for i in range(4)), "little")
            case "sub" | "mul" | "fma" as name:
                kind = {"f16x2": np.float16, "bf16x2": ml_dtypes.bfloat16}[operation.split(".")[-1]]
                x, y, *z = (np.array([n], np.uint32).view(kind) for n in a)
                (named[target],) = (x - y if name == "sub" else sum(z, x * y)).view(np.uint32)
            case _:
                raise AssertionError(line)
    return int(named["$0"])


@pytest.mark.parametrize("features", [64, 112, 128])
@pytest.mark.parametrize("target", [WGMMA, plgpu.Layout.MMA_LHS(jnp.float16)], ids=["wgmma", "mma"])
def test_operands(features, target, monkeypatch):
    """Every byte there is, at every place: widened exactly, permuted as queries and outputs are."""
    rng = np.random.default_rng(0)
    x = np.concatenate([np.arange(256), rng.integers(0, 256, 64 * features - 256)]).astype(np.uint8).view(np.int8)
    x = x.reshape(64, features)
    ways = [lambda x, there: gpu_fragments.operand(x, jnp.float16, there, target)]
    biases = itertools.product((False, True), (gpu_fragments.CHEAPEST, -8))
    ways += [lambda x, there, h=h, b=b: gpu_fragments.nibbles(x, h, b, there, target) for h, b in biases]
    for way in ways:
        found = relabelled(monkeypatch, functools.partial(way, there=False), x, BYTES, target)
        np.testing.assert_array_equal(found.astype(np.float32), np.asarray(way(jnp.asarray(x), True), np.float32))
    wide = rng.normal(size=(64, features)).astype(ml_dtypes.float8_e4m3fn)
    found = relabelled(
        monkeypatch, lambda _: gpu_fragments.operand(jnp.asarray(wide), jnp.float16, False), wide.astype(np.float16),
        BYTES, WGMMA,
    )  # fmt: skip
    expected = gpu_fragments.operand(jnp.asarray(wide), jnp.float16, True)
    np.testing.assert_array_equal(found, np.asarray(expected))


@pytest.mark.parametrize("target", [WGMMA, plgpu.Layout.MMA_LHS(jnp.float16)], ids=["wgmma", "mma"])
def test_eight_bit_floats(target, monkeypatch):
    """Every float8_e4m3fn but NaN, by its bits."""
    codes = np.tile(np.arange(256, dtype=np.uint8), 16).reshape(64, 64)
    x = np.where(codes & 0x7F == 0x7F, 0, codes).astype(np.uint8).view(ml_dtypes.float8_e4m3fn)
    way = lambda there: lambda x: gpu_fragments.eight_bit_floats(x, there, target)
    found = relabelled(monkeypatch, way(False), x, BYTES, target)
    np.testing.assert_array_equal(found, np.asarray(way(True)(jnp.asarray(x))))


@pytest.mark.parametrize("columns", [8, 72])
def test_queries_and_outputs(columns, monkeypatch):
    """Queries are permuted as keys are, outputs of permuted values come back in their order."""
    x = np.arange(columns * 128, dtype=np.float32).reshape(columns, 128).astype(np.float16)
    call = lambda interpreted: lambda x: gpu_fragments.permuted_queries(x, interpreted)
    found = relabelled(monkeypatch, call(False), x, QUERIES, PERMUTED)
    expected = call(True)(jnp.asarray(x))
    np.testing.assert_array_equal(found, np.asarray(expected))
    values = np.arange(128 * columns, dtype=np.float32).reshape(columns, 128)
    permuted = np.asarray(gpu_fragments.permuted_queries(jnp.asarray(values), True)).T
    back = lambda interpreted: lambda x: gpu_fragments.restored(x, interpreted)
    np.testing.assert_array_equal(back(True)(jnp.asarray(permuted)), values.T)
    np.testing.assert_array_equal(relabelled(monkeypatch, back(False), permuted, WGMMA, RESTORED), values.T)


def test_products_do_not_depend_on_the_order_of_channels():
    """What all of this is for: keys times queries, and values times probabilities, are those of channels in order."""
    rng = np.random.default_rng(0)
    keys, values, queries, probs = (
        rng.integers(-9, 9, s).astype(np.int8) for s in ((64, 48), (64, 48), (8, 48), (64, 8))
    )
    wide = lambda x: gpu_fragments.operand(jnp.asarray(x), jnp.float16, True).astype(jnp.float32)
    asked = gpu_fragments.permuted_queries(jnp.asarray(queries, jnp.float32), True)
    np.testing.assert_array_equal(wide(keys) @ asked.T, keys.astype(np.float32) @ queries.T)
    out = gpu_fragments.restored(wide(values).T @ jnp.asarray(probs, jnp.float32), True)
    np.testing.assert_array_equal(out, values.T.astype(np.float32) @ probs)
