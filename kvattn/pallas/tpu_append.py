"""Writing one token per sequence into a cache on TPUs, in place.

XLA's scatter wants other layouts than attention, and so copies the whole cache back and forth around a single token.
Here the registers that hold a slot are fetched, changed and put back.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Int32, Shaped

from kvattn import _manual
from kvattn._typing import Array
from kvattn.cache.layout import Layout
from kvattn.cache.pages import Pages, Store
from kvattn.codecs.blocks import Blocks, Stored
from kvattn.pallas import tpu_read
from kvattn.pallas.interpreter import interpreted
from kvattn.pallas.tpu_decode import INTERPRETER, params

ROWS = (32, 16, 8)
"""Tokens fetched with one, where features fill the lanes: as many as the narrowest type has in a register, or fewer."""


@dataclasses.dataclass(frozen=True)
class InPlace:
    """A `Layout` or `Pages` that writes single tokens by a kernel where it can, and is the same otherwise."""

    store: Store

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def write(
        self, array: Stored, slots: Int32[Array, "B *K T"], x: Shaped[Array, "B K T F"], transposed: bool
    ) -> Stored:
        """As `Layout.write` and `Pages.write`."""
        last = transposed or tpu_read.tokens_last(array.shape[-1])
        if not _takes(self.store, array, x, transposed, by_head=slots.ndim == 3):
            return self.store.write(array, slots, x, transposed)

        def kernel(array: Stored, x: Shaped[Array, "B K T F"]) -> Stored:
            turned = last and not transposed
            lying = array.swapaxes(-1, -2) if turned else array
            token = (x.swapaxes(-1, -2) if last else x).astype(array.dtype)
            if isinstance(self.store, Pages):
                new = _in_pages(self.store, lying, slots, token, last)
            else:
                new = _in_rows(lying, slots, token, last)
            return new.swapaxes(-1, -2) if turned else new

        if not jnp.issubdtype(array.dtype, jnp.inexact):
            return kernel(array, x)
        kernel = jax.custom_jvp(kernel)
        # It is linear in both.
        kernel.defjvp(
            lambda primals, tangents: (
                kernel(*primals),
                self.store.write(tangents[0], slots, tangents[1], transposed),
            )
        )
        return kernel(array, x)


# What `__getattr__` hands on, `isinstance` does not see.
Blocks.register(InPlace)  # pyright: ignore[reportAttributeAccessIssue]


def _takes(store: Store, array: Stored, x: Shaped[Array, "B K T F"], transposed: bool, by_head: bool) -> bool:
    """Whether it is one token, and the array lies as a kernel wants it."""
    if x.shape[2] != 1 or jnp.dtype(array.dtype) in (jnp.dtype(jnp.float16), jnp.dtype(jnp.float64)):
        return False
    if isinstance(store, Layout) and store.num_blocks != 1:
        return False
    if isinstance(store, Pages) and (store.is_by_head or by_head):
        return False  # a block of a pool is one page of all heads
    tokens, features = (array.shape[-1], array.shape[-2]) if transposed else (array.shape[-2], array.shape[-1])
    if not transposed and not tpu_read.tokens_last(features):
        return tokens % ROWS[-1] == 0
    return tokens % tpu_read.LANES == 0 and (transposed or features % tpu_read.SUBLANES == 0)


def _in_rows(array: Array, slots: Array, x: Array, last: bool) -> Array:
    """A contiguous array [1, B, K, R, F], or [1, B, K, F, R] if last."""
    _, batch, heads, *tail = array.shape
    slots = slots.reshape(batch, -1)  # [B, 1 or K]
    steps, each = slots.size, heads // slots.shape[1]
    at = slots.reshape(-1)
    size, block = _block(tail, last)
    tile = jnp.maximum(at, 0) // size
    x = x.reshape(steps, each, *x.shape[2:])
    row = jnp.arange(steps, dtype=jnp.int32) // slots.shape[1]
    head = jnp.arange(steps, dtype=jnp.int32) % slots.shape[1]
    place = lambda i, row, head, tile, at: (0, row[i], head[i], *((0, tile[i]) if last else (tile[i], 0)))
    scalars = (row, head, tile, jnp.where(at >= 0, at % size, -1))
    return _run(array, x, scalars, pl.BlockSpec((1, 1, each, *block), place), last)


def _in_pages(store: Pages, array: Array, slots: Array, x: Array, last: bool) -> Array:
    """A pool [K, P, R, F], or [K, P, F, R] if last."""
    heads, pages, *tail = array.shape
    at = slots[:, 0]
    column = jnp.clip(at // store.page_size, 0, store.table.shape[1] - 1)
    page = jnp.take_along_axis(store.table, column[:, None], axis=1)[:, 0]
    real = (at >= 0) & (at < store.num_slots) & (page >= 0) & (page < pages)
    size, block = _block(tail, last)
    # A row that writes nothing must not put back what another row is about to change: it stays where the last row that
    # writes was, or the first one will be.
    steps = jnp.arange(at.shape[0], dtype=jnp.int32)
    latest = jax.lax.cummax(jnp.where(real, steps, -1))
    stand = jnp.where(latest >= 0, latest, jnp.argmax(real).astype(jnp.int32))
    page, at = jnp.clip(page, 0, pages - 1), jnp.where(real, at % store.page_size, -1)
    # Where tokens lie side by side, those on the right are counted behind a whole block.
    beside = 1 if last else tail[1] // x.shape[-1]
    row, side = (at % tail[0], at // tail[0]) if beside > 1 else (at, 0)
    tile = jnp.maximum(row, 0) // size
    x = x if beside == 1 else jnp.concatenate([x] * beside, axis=-1)
    place = lambda i, page, head, tile, at: (head[i], page[i], *((0, tile[i]) if last else (tile[i], 0)))
    scalars = (page[stand], jnp.zeros_like(steps), tile[stand], jnp.where(at >= 0, row % size + side * size, -1))
    return _run(array, x, scalars, pl.BlockSpec((heads, 1, *block), place), last, beside)


def _block(tail: list[int], last: bool) -> tuple[int, tuple[int, int]]:
    """Tokens per block, and its shape, of an array [..., R, F], or [..., F, R] if last."""
    if last:
        return tpu_read.LANES, (tail[0], tpu_read.LANES)
    size = next(n for n in ROWS if tail[0] % n == 0)
    return size, (size, tail[1])


def _run(
    array: Stored,
    x: Shaped[Array, "steps K _ _"],
    scalars: tuple[Int32[Array, " steps"], ...],
    spec: pl.BlockSpec,
    last: bool,
    beside: int = 1,
) -> Array:
    """Puts token i of x ([K, 1, F], or [K, F, 1] if last) into the block that the scalars name; one side of it."""
    array = _manual.like(array, scalars, x)
    shape: Any = _manual.result(array.shape, array.dtype, array)
    if not interpreted("tpu"):
        # Otherwise XLA moves what fits there into VMEM as a whole, and back again.
        shape = pltpu.MemorySpace.HBM.like(array)
        array = pltpu.with_memory_space_constraint(array, pltpu.MemorySpace.HBM)
    block: Any = spec.block_shape
    return pl.pallas_call(
        functools.partial(_body, axis=-1 if last else -2, beside=beside),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(x.shape[0],),
            in_specs=[pl.BlockSpec((1, *x.shape[1:]), lambda i, *_: (i, 0, 0, 0)), spec],
            out_specs=spec,
        ),
        out_shape=shape,
        input_output_aliases={len(scalars) + 1: 0},
        compiler_params=params(4 * math.prod(block) * array.dtype.itemsize, ("arbitrary",)),
        interpret=INTERPRETER if interpreted("tpu") else False,
        name="kvattn_tpu_append",
    )(*scalars, x, array)


def _body(major, minor, tile, at, x, old, new, *, axis, beside):
    """One token: scalars int32 [steps]; x [1, K, 1, F] or [1, K, F, 1]; blocks [1, 1, K, R, F] or [K, 1, R, F]."""
    i = pl.program_id(0)
    before = jnp.maximum(i - 1, 0)
    moved = (major[i] != major[before]) | (minor[i] != minor[before]) | (tile[i] != tile[before])

    @pl.when((i == 0) | moved)
    def _():
        new[...] = old[...]

    @pl.when(at[i] >= 0)
    def _():
        block = new[...]
        # Registers select among 32-bit numbers on every TPU.
        wide = jnp.float32 if jnp.issubdtype(block.dtype, jnp.floating) else jnp.int32
        number = jax.lax.broadcasted_iota(jnp.int32, block.shape, block.ndim + axis)
        if beside > 1:
            column = jax.lax.broadcasted_iota(jnp.int32, block.shape, block.ndim - 1)
            number += column // (block.shape[-1] // beside) * block.shape[-2]
        here = number == at[i]
        token = x[...][None] if block.ndim == 5 else x[0][:, None]
        new[...] = jnp.where(here, token.astype(wide), block.astype(wide)).astype(block.dtype)
