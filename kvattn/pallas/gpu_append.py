"""Appending one token per row on Hopper GPUs, in place, with all that changes besides: one block for each row.

The block reads the length of its row, and of pages the row of the table, concludes what `kvattn.attend.prepare` would
(`admitted`), encodes the token and copies it to its slot; then it writes length, status, and what attention has to know
of the row. A row that gets no token is left as it was.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from kvattn import _checks, _manual
from kvattn._typing import Array
from kvattn.attend.at_once import Appended
from kvattn.attend.tokens import NewTokens
from kvattn.cache import Cache
from kvattn.cache import status as bits
from kvattn.cache.pages import Pages
from kvattn.masks import EMPTY
from kvattn.pallas import gpu_decode, gpu_ways
from kvattn.pallas.gpu_encode import COLUMNS_AT_ONCE, TILE, Codes, encoded, is_known, uneven_cuts
from kvattn.pallas.interpreter import interpreted

LANES = 128
"""Entries of a table that are looked at together."""
BYTES = 16
"""Of a copy, or a multiple."""
MOST_FEATURES = 256
ROWS_AT_ONCE = 8
"""Heads of codes whose channels are looked at in parts."""
TABLE = plgpu.Layout.TILED(
    plgpu.Tiling(((8,), (1,))), warp_dims=(plgpu.Replicated(4),), lane_dims=(-2, plgpu.Replicated(4)), vector_dim=-1
)
"""Of the entries of a small table, one at a time: a row of the table may begin at any of them."""


@dataclasses.dataclass(frozen=True)
class Spec:
    """All that is known when the kernel is compiled.

    Attributes:
        slots: C.
        turns: whether slots are taken again, as in a ring.
        most: tokens that a row may have. None: any number.
        first_needed: the first slot that the next token sees, from tokens seen.
        batch: B.
        heads: K.
        columns: W, entries of the table for a row; 0: there are no pages.
        page_size: R.
        pages: P.
        codes: how each role's tokens are stored, of "k" and "v".
        counted: whether the caller says how many tokens are real.
    """

    slots: int
    turns: bool
    most: int | None
    first_needed: Callable[[Array], Array]
    batch: int
    heads: int
    columns: int
    page_size: int
    pages: int
    codes: Mapping[str, Codes]
    counted: bool


def unsupported(new: NewTokens, cache: Cache) -> str | None:
    """Why this kernel cannot append to the cache; None: it can."""
    if (reason := gpu_decode.device_refusal()) is not None:
        return reason
    if gpu_ways.by_threads():
        return "it copies by an engine that GPUs have since Hopper (compute capability 9.0)"
    if _manual.is_typed():
        return "kernels write in place nothing whose type names mesh axes"
    if cache.values_in_keys or new.value is None:
        return "it writes values of their own"
    form, store = cache.codec.format, cache.store
    if form is None or not is_known(form):
        return f"it does not encode {cache.codec}"
    if form.is_grouped and (cuts := uneven_cuts(form, cache.key_head_dim, cache.value_head_dim)):
        return f"groups of {form.group_size} channels are cut at {cuts}, no multiples of {COLUMNS_AT_ONCE}"
    if form.is_grouped and cache.num_kv_heads % ROWS_AT_ONCE:
        # What arrives for fewer lies in tiles of fewer rows, whose second half Mosaic looks for where the copy engine
        # has not put it.
        return f"it encodes {cache.codec} of key/value heads by eights, here are {cache.num_kv_heads}"
    for x, array in ((new.key, cache.keys["data"]), (new.value, cache.values["data"])):
        assert x is not None
        if form.is_plain and (x.dtype != array.dtype or jnp.dtype(x.dtype).itemsize != 2):
            return f"it copies tokens of 16 bits as they come, here are {x.dtype} for a cache of {array.dtype}"
        if jnp.dtype(x.dtype).itemsize > 4:
            return "it has no float64"
        if x.shape[2] > TILE:
            return f"it takes up to {TILE} key/value heads, here are {x.shape[2]}"
        if x.shape[3] > MOST_FEATURES or any(n * jnp.dtype(d).itemsize % BYTES for n, d in _lines(x, array)):
            return f"tokens of {x.shape[3]} features are no whole copies of {BYTES} bytes, or too long"
    if isinstance(store, Pages):
        beside = any(store.page_size != x["data"].shape[-2] for x in (cache.keys, cache.values))
        return "tokens lie side by side in the pages" if beside else None
    if store.num_blocks != 1 or store.transposed_keys:
        return "the cache lies in blocks"
    return None


def _lines(x: Array, array: Array) -> list[tuple[int, DTypeLike]]:
    """What is copied at a time: of tokens [B, 1, K, F], and of an array of the cache."""
    return [(x.shape[3], x.dtype), (array.shape[-1], array.dtype)]


def append(new: NewTokens, cache: Cache) -> Appended:
    """Appends; see `kvattn.attend.at_once.Appender`."""
    spec = _spec(new, cache)
    assert new.told is not None and new.key is not None and new.value is not None
    table = {} if cache.page_table is None else {"table": cache.page_table.reshape(-1)}
    counted = {} if new.told.num_new is None else {"num_new": new.told.num_new}
    stored = {f"{role}_{name}": x for role, store in _stores(cache) for name, x in store.items()}
    # Of a contiguous cache without the axis of blocks, of which there is one.
    shapes = {name: x.shape for name, x in stored.items()}
    stored = {name: x if x.ndim == 4 else x.reshape(x.shape[1:]) for name, x in stored.items()}
    reads = {"k_new": new.key[:, 0], "v_new": new.value[:, 0], **table, **counted}
    changes = {"lengths": cache.lengths, "status": new.told.status, **stored}
    changed, positions, counts = _run(spec, reads, changes)
    arrays = {name: changed[name].reshape(shape) for name, shape in shapes.items()}
    keys, values = ({name: arrays[f"{role}_{name}"] for name in store} for role, store in _stores(cache))
    return Appended(keys, values, changed["lengths"], changed["status"], positions, counts)


def _stores(cache: Cache) -> list[tuple[str, Mapping[str, Array]]]:
    return [("k", cache.keys), ("v", cache.values)]


def _spec(new: NewTokens, cache: Cache) -> Spec:
    store, form = cache.store, cache.codec.format
    assert form is not None and new.told is not None and new.key is not None and new.value is not None
    codes = {
        role: Codes(form, x.shape[2], x.shape[3], jnp.dtype(x.dtype), {n: jnp.dtype(a.dtype) for n, a in of.items()})
        for (role, of), x in zip(_stores(cache), (new.key, new.value), strict=True)
    }
    paged = isinstance(store, Pages)
    return Spec(
        slots=cache.num_slots,
        turns=cache.policy.turns,
        most=cache.policy.most_tokens(cache.num_slots),
        first_needed=cache.policy.first_needed,
        batch=cache.batch_size,
        heads=cache.num_kv_heads,
        columns=store.columns if paged else 0,
        page_size=store.page_size if paged else 0,
        pages=store.num_pages if paged else 0,
        codes=codes,
        counted=new.told.num_new is not None,
    )


def _run(spec: Spec, reads: Mapping[str, Array], changes: Mapping[str, Array]) -> tuple[dict[str, Array], Array, Array]:
    """The kernel.

    Args:
        spec: the sizes.
        reads: "k_new" and "v_new" [B, K, F], and, if there are any, "table" int32 [B W] and "num_new" int32 [B].
        changes: "lengths" and "status" int32 [B], and the arrays of the cache.

    Returns:
        `changes` after it, and positions and counts int32 [B].
    """

    def kvattn_gpu_append(*refs, **shared):
        """One row: refs of `reads`, `changes`, and the results."""
        memory = dict(zip((*reads, *changes, "positions", "counts"), refs, strict=True))
        _append_row(spec, memory, shared, lax.axis_index("row"))

    vector = jax.ShapeDtypeStruct((spec.batch,), jnp.int32)
    kernel = plgpu.kernel(
        kvattn_gpu_append,
        out_type=(vector, vector),
        scratch_types=_scratch(spec),
        grid=(spec.batch,),
        grid_names=("row",),
        interpret=gpu_decode.INTERPRETER if interpreted("cuda") else None,
    )
    nothing = jnp.zeros((spec.batch,), jnp.int32)

    def in_place(refs):
        """Refs of `reads`, `changes` and the results."""
        positions, counts = refs[-2:]
        positions[...], counts[...] = kernel(*refs[:-2])

    *arrays, positions, counts = pl.run_state(in_place)((*reads.values(), *changes.values(), nothing, nothing))
    return dict(zip(changes, arrays[len(reads) :], strict=True)), positions, counts


def _scratch(spec: Spec) -> dict[str, Any]:
    """What a block has in shared memory."""
    found: dict[str, Any] = {"arrived": plgpu.Barrier(num_arrivals=len(spec.codes))}
    for role, codes in spec.codes.items():
        found |= {f"{role}_{name}": x for name, x in codes.scratch().items()}
    return found


def _append_row(spec: Spec, memory: Mapping[str, Any], shared: Mapping[str, Any], row: Array) -> None:
    """Appends to a row int32 []."""
    for role in spec.codes:
        # Behind these heads a tile holds what nobody asks for.
        plgpu.copy_gmem_to_smem(
            memory[f"{role}_new"].at[row], shared[f"{role}_new"].at[pl.ds(0, spec.heads)], shared["arrived"]
        )
    length, status = memory["lengths"][row], memory["status"][row]
    given = memory["num_new"][row] if spec.counted else jnp.int32(1)
    table = memory.get("table")
    outside = lambda first, end: _outside(spec, table, row, first, end) if spec.columns else jnp.bool_(False)
    one = admitted(spec, length, given, outside)
    plgpu.barrier_wait(shared["arrived"])
    unfit = jnp.bool_(False)
    for role, codes in spec.codes.items():
        of_role = {name.removeprefix(f"{role}_"): x for name, x in shared.items() if name.startswith(f"{role}_")}
        unfit |= encoded(codes, of_role)
    plgpu.commit_smem()

    @pl.when(one.real)
    def _():
        slot = one.slot
        page, inside = row, slot
        if spec.columns:
            column, inside = lax.div(slot, spec.page_size), lax.rem(slot, spec.page_size)
            page = lax.clamp(0, memory["table"][row * spec.columns + column], spec.pages - 1)
        for role, codes in spec.codes.items():
            place = lambda name, role=role: (
                memory[f"{role}_{name}"].at[:, page] if spec.columns else memory[f"{role}_{name}"].at[page]
            )
            source = shared[f"{role}_{codes.data}"].at[pl.ds(0, spec.heads)]
            plgpu.copy_smem_to_gmem(source, place("data").at[:, inside])
            for name in codes.small:
                target, values = place(name), shared[f"{role}_{name}"]
                for head in range(spec.heads):
                    for group in range(codes.groups):
                        target[head, group, inside] = values[group, head]

    memory["lengths"][row] = one.length
    memory["status"][row] = jnp.where(one.real & unfit, one.bits(status) | bits.NONFINITE, one.bits(status))
    memory["positions"][row] = jnp.where(one.real, length, EMPTY)
    memory["counts"][row] = lax.min(one.length, jnp.int32(spec.slots))
    plgpu.wait_smem_to_gmem(0)


@dataclasses.dataclass(frozen=True)
class Admitted:
    """What becomes of a row.

    Attributes:
        real: whether it gets its token, bool [].
        slot: which it gets, int32 []; of others one that they might.
        length: tokens seen then, int32 [].
        marks: bits of `kvattn.cache.status` and whether they are set, bool [].
    """

    real: Array
    slot: Array
    length: Array
    marks: Mapping[int, Array]

    def bits(self, status: Array) -> Array:
        """The status int32 [] with them."""
        for bit, is_set in self.marks.items():
            status = jnp.where(is_set, status | bit, status)
        return status


def admitted(spec: Spec, length: Array, given: Array, outside: Any) -> Admitted:
    """What `kvattn.attend.prepare` and a policy that goes by length say of one token; in kernels too.

    Args:
        spec: the sizes.
        length: tokens seen, int32 [].
        given: how many are real, int32 [].
        outside: says whether a column between two int32 [] of the row's table names no page of the pool.
    """
    slots = spec.slots
    bad_count = (given < 0) | (given > 1)
    count = jnp.where(bad_count, 0, given)
    unknown = jnp.bool_(False)
    if spec.columns:
        end = jnp.where(length >= slots, slots, length + count)
        first = length * 0 if spec.turns else spec.first_needed(length)
        end_column = lax.div(end + (spec.page_size - 1), spec.page_size)
        unknown = (first < end) & outside(lax.div(first, spec.page_size), end_column)
        count = jnp.where(unknown, 0, count)
    fits = length <= _checks.INT32_MAX - count
    if spec.most is not None:
        fits &= length <= spec.most - count
    count = jnp.where(fits, count, 0)
    slot = lax.rem(length, jnp.int32(slots)) if spec.turns else lax.min(length, jnp.int32(slots - 1))
    marks = {bits.BAD_PAGE: unknown, bits.OVERFLOW: jnp.logical_not(fits), bits.BAD_COUNT: bad_count}
    return Admitted(count > 0, slot, length + count, marks)


def _outside(spec: Spec, table: Any, row: Array, first: Array, end: Array) -> Array:
    """Whether a column of [first, end) names no page of the pool, bool []; columns and row are int32 []."""
    start, count = row * spec.columns, spec.batch * spec.columns
    wrong = lambda page, column: (column >= first) & (column < end) & ((page < 0) | (page >= spec.pages))
    size = LANES if count >= LANES else count // 8 * 8
    if not size:
        found = jnp.bool_(False)
        for column in range(spec.columns):
            found |= wrong(table[start + column], jnp.int32(column))
        return found
    layout = plgpu.Layout.WG_STRIDED((size,), vec_size=1) if size == LANES else TABLE
    lane = plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=layout)
    nothing = plgpu.layout_cast(jnp.full((size,), 0, jnp.int32), layout)

    def some(i, found):
        """Some columns more. The last entries of the table are looked at again rather than what is behind them."""
        begin = lax.min(start + i * size, count - size)
        pages = plgpu.load(table.at[pl.ds(begin, size)], layout=layout, optimized=False)
        return jnp.where(wrong(pages, lane + (begin - start)), 1, found)

    return jnp.max(lax.fori_loop(lax.div(first, size), lax.div(end + (size - 1), size), some, nothing)) > 0
