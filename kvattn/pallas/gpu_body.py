"""The body of `"mosaic_gpu"`: one warpgroup that fetches, one that computes."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kvattn import _manual
from kvattn._typing import Array
from kvattn.masks import EMPTY
from kvattn.pallas import gpu_threads
from kvattn.pallas.gpu_spec import F32, Spec, scratch
from kvattn.pallas.gpu_tile import COLUMNS, TOKENS, WGMMA, mix, products, spread, store, tanh
from kvattn.pallas.shares import LANES, Counts, Rows, in_order

LOADS_AT_ONCE = 32
"""Numbers of rows that are asked for before the first is needed."""


def decode(spec: Spec, interpret: Any, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Partial states, and scores if wanted.

    Args:
        spec: the sizes.
        interpret: of `plgpu.kernel`.
        arrays: what the kernel reads, by name: "at", the positions of the queries, int32 [B], or [B, chunks, lanes] for
            T > 1; "counts" int32 [B], tokens of each row, if `in_order`, else the arrays of `Rows` and "positions"
            int32 [B, 1 or K, S]; "query" [parts, B, heads, cols, H], or [B N, H] if `as_it_lies`; the `Stream`s of the
            cache; and, each if there is one, "table" int32 [B, W], "factor" [B, heads, lanes], "slopes"
            [heads, lanes], "sums" [B, heads, groups, lanes].

    Returns:
        "out", outputs times their sums, float32 [states, cols, Hv padded]; "top" and "total", maxima and sums, float32
        [states, cols]; "first" and "last" int32 [segments], the programs that read a segment, where any did; with
        `want_scores` "scores" float32 [B, heads, S, cols], of which only the tiles that were read are written.
    """
    segments = spec.heads * spec.batch
    states = segments + spec.programs
    result = lambda *shape, dtype=F32: _manual.result(shape, dtype, arrays)
    results = {
        "out": result(states, spec.cols, spec.padded),
        "top": result(states, spec.cols),
        "total": result(states, spec.cols),
        "first": result(segments, dtype=jnp.int32),
        "last": result(segments, dtype=jnp.int32),
    }
    if spec.want_scores:
        results["scores"] = result(spec.batch, spec.heads, spec.slots, spec.cols)

    def kvattn_gpu_decode(*refs, **shared):
        """Refs of `arrays` and results, [...] as above, and `scratch` by name."""
        memory = dict(zip((*arrays, *results), refs, strict=True))
        program, role = lax.axis_index("program"), lax.axis_index("role")
        pl.when(role == 1)(lambda: fetch(spec, memory, shared))
        pl.when(role == 0)(lambda: compute(spec, memory, shared, program))

    found = plgpu.kernel(
        kvattn_gpu_decode,
        out_type=tuple(results.values()),
        scratch_types=scratch(spec),
        grid=(spec.programs,),
        grid_names=("program",),
        num_threads=2,
        thread_name="role",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(*arrays.values())
    return dict(zip(results, found, strict=True))


def rows_at(spec: Spec, memory: Mapping[str, Any], row: Array) -> Rows:
    """What to read of a row int32 []."""
    if spec.in_order:
        return in_order(spec.mask, spec.config.tile, memory["counts"][row], memory["at"][row])
    return Rows(*(memory[field.name][row] for field in dataclasses.fields(Rows)))


@dataclasses.dataclass(frozen=True)
class Segment:
    """What a program reads of one row and head. Numbers are int32 [].

    Attributes:
        number: head * B + row.
        row: its row.
        head: its head.
        first: the first tile, counted among those that are to be read,
        end: and the one after the last.
        rows: what there is to read.
        tiles: how many tiles the program has read before.
        visited: how many segments.
    """

    number: Array
    row: Array
    head: Array
    first: Array
    end: Array
    rows: Rows
    tiles: Array
    visited: Array

    @property
    def is_first(self) -> Array:
        """Whether no program before this one reads of the row and head."""
        return self.first == 0

    @property
    def is_last(self) -> Array:
        """Whether no program after it does."""
        return self.end == self.rows.count

    def tile(self, j: Array) -> Array:
        """Which tile of the row tile j is."""
        return jnp.where(j < self.rows.hole, j, self.rows.after + j - self.rows.hole)


class Walk:
    """The way of a program from segment to segment, tile to tile, the same for both warpgroups."""

    def __init__(self, spec: Spec, memory: dict[str, Any], shared: dict[str, Any]):
        self.spec, self.memory = spec, memory
        self.first, self.start, self.last, self.stop = (shared["share"][i] for i in range(4))

    def each(self, visit: Callable[[Segment], None]) -> tuple[Array, Array]:
        """Calls `visit` for each segment with tiles.

        Returns:
            tiles and segments visited, int32 [].
        """
        batch = self.spec.batch

        def step(segment, carry):
            """One segment; all are int32 []."""
            tiles, visited = carry
            row, head = lax.rem(segment, batch), lax.div(segment, batch)
            rows = rows_at(self.spec, self.memory, row)
            first = jnp.where(segment == self.first, self.start, 0)
            end = jnp.where(segment == self.last, self.stop, rows.count)
            some = end > first
            pl.when(some)(lambda: visit(Segment(segment, row, head, first, end, rows, tiles, visited)))
            return tiles + lax.max(end - first, 0), visited + some.astype(jnp.int32)

        return lax.fori_loop(self.first, self.last + 1, step, (jnp.int32(0), jnp.int32(0)))


def share_out(spec: Spec, memory: dict[str, Any], shared: dict[str, Any], program: Array) -> None:
    """Finds the work of this program, int32 []."""
    shape = (-(-spec.batch // LANES) * LANES,)
    layout = plgpu.Layout.WG_STRIDED(shape, vec_size=1)
    index = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)
    if spec.in_order:
        nothing = plgpu.layout_cast(jnp.full(shape, 0, jnp.int32), layout)
        held = gathered(memory["counts"], spec.batch, index, nothing)
        count = in_order(spec.mask, spec.config.tile, held, gathered(memory["at"], spec.batch, index, nothing)).count
    else:
        count = plgpu.load(memory["count"], layout=layout, optimized=False)
    counts = Counts(count, index, spec.batch, spec.heads, spec.programs)
    for i, number in enumerate(counts.of_program(program)):
        shared["share"][i] = number
    plgpu.barrier_arrive(shared["shared_out"])


def gathered(numbers: Any, count: int, index: Array, vector: Array) -> Array:
    """`vector` int32 [rows] with the first `count` of `numbers` int32 [count] in it.

    A load of whole vectors would need an array of whole vectors, which a kernel of its own would have to make.
    """

    def some(i, vector):
        """Some of them; all are asked for before the first is waited for."""
        at = [i * LOADS_AT_ONCE + n for n in range(min(LOADS_AT_ONCE, count))]
        loaded = [numbers[lax.min(n, count - 1)] for n in at]
        for n, number in zip(at, loaded, strict=True):
            vector = jnp.where(index == n, number, vector)
        return vector

    if count <= LOADS_AT_ONCE:
        return some(0, vector)
    # What is behind the last number repeats it, where the index says that there is no row.
    filled = lax.fori_loop(0, -(-count // LOADS_AT_ONCE), some, vector)
    return jnp.where(index < count, filled, vector)


def pages_of(spec: Spec, memory: dict[str, Any], here: Segment, j: Array) -> tuple[Array, ...]:
    """The pages int32 [] of tile j, asked for one tile ahead: reading the table takes as long as a tile."""
    size = spec.page_size
    if not size:
        return ()
    table, number = memory["table"], spec.streams[0].shape[1]
    start = here.tile(j) * spec.config.tile
    columns = (lax.min(lax.div(start + n * size, size), table.shape[1] - 1) for n in range(spec.pages))
    # Positions of slots whose page is unknown are empty; whatever page is read for them is not looked at.
    return tuple(lax.clamp(0, table[here.row, column], number - 1) for column in columns)


def fetch(spec: Spec, memory: dict[str, Any], shared: dict[str, Any]) -> None:
    """Keeps the ring of tiles, and that of queries, full."""
    plgpu.barrier_wait(shared["shared_out"])
    walk = Walk(spec, memory, shared)
    if spec.by_threads:
        gpu_threads.fetch(spec, memory, shared, walk, pages_of)
        return
    tile, stages, size = spec.config.tile, spec.config.stages, spec.page_size
    copy = plgpu.copy_gmem_to_smem

    def segment(here):
        """Fetches a segment."""
        row, head, slot = here.row, here.head, lax.rem(here.visited, 2)
        pl.when(here.visited >= 2)(lambda: plgpu.barrier_wait(shared["query_free"].at[slot]))
        full = shared["query_full"].at[slot]
        if spec.as_it_lies:
            queries = memory["query"].at[pl.ds(spec.first_query(row, head), spec.cols)]
            copy(queries, shared["query"].at[slot, 0], full)
        else:
            # Part by part: a copy has five dimensions at most, and a tiled matrix has four.
            for n in range(spec.parts):
                copy(memory["query"].at[n, row, head], shared["query"].at[slot, n], full)
        if not spec.is_single:
            copy(memory["at"].at[row, lax.rem(head, spec.chunks)], shared["at"].at[slot], full)
        for name in ("factor", "sums"):
            if name in memory:
                copy(memory[name].at[row, head], shared[name].at[slot], full)
        if spec.alibi:
            copy(memory["slopes"].at[head], shared["slopes"].at[slot], full)
        kv_head = lax.div(head, spec.chunks)

        def step(j, of_tile):
            """Fetches tile j int32 [] from its pages `of_tile`; gives those of the next one."""
            ahead = pages_of(spec, memory, here, lax.min(j + 1, here.end - 1))
            i = here.tiles + j - here.first
            slot = lax.rem(i, stages)
            start = here.tile(j) * tile
            pl.when(i >= stages)(lambda: plgpu.barrier_wait(shared["free"].at[slot]))
            full = shared["full"].at[slot]
            if not spec.in_order:
                which = kv_head if spec.per_head_positions else 0
                copy(memory["positions"].at[row, which, pl.ds(start, tile)], shared["positions"].at[slot], full)
            for stream in spec.streams:
                source, target = memory[stream.name], shared[stream.name].at[slot]
                for n in range(spec.pages):
                    part = min(tile, size) if size else tile
                    if not size:
                        source_n, rows = source.at[row, kv_head], pl.ds(start, tile)
                    else:
                        source_n, rows = source.at[kv_head, of_tile[n]], pl.ds(lax.rem(start, size), part)
                        if size <= tile:
                            rows = pl.ds(0, part)
                    into = pl.ds(n * part, part)
                    if stream.tokens_last:
                        copy(source_n.at[:, rows], target.at[:, into], full)
                    else:
                        copy(source_n.at[rows], target.at[into], full)
            return ahead

        lax.fori_loop(here.first, here.end, step, pages_of(spec, memory, here, here.first))

    tiles, visited = walk.each(segment)
    # Nobody may leave while somebody is still to report that a buffer is free.
    for name, number, count in (("free", tiles, stages), ("query_free", visited, 2)):
        for slot in range(count):
            pl.when(number > slot)(lambda name=name, slot=slot: plgpu.barrier_wait(shared[name].at[slot]))


def compute(spec: Spec, memory: dict[str, Any], shared: dict[str, Any], program: Array) -> None:
    """Attends, tile by tile, with a running maximum; `program` is int32 []."""
    share_out(spec, memory, shared, program)
    walk = Walk(spec, memory, shared)
    tile, stages, cols = spec.config.tile, spec.config.stages, spec.cols

    def constant(shape, layout, value):
        """float32 [...] of that shape."""
        return plgpu.layout_cast(jnp.full(shape, value, F32), layout)

    def segment(here):
        """Attends to a segment."""
        rows, at_slot = here.rows, 0 if spec.by_threads else lax.rem(here.visited, 2)
        if spec.by_threads:
            gpu_threads.bring_query(spec, memory, shared, here.row, here.head)
        else:
            plgpu.barrier_wait(shared["query_full"].at[at_slot])
        columns = Columns(spec, memory, shared, here.row, at_slot)

        def step(j, carry):
            """One more tile into maximum [M], sums [T, M] and output [H, M]."""
            # Sums stay spread over the rows of a tile: adding up across threads once per segment is enough.
            top, total, acc = carry
            t = here.tile(j)
            slot = lax.rem(here.tiles + j - here.first, stages)
            plgpu.barrier_wait(shared["full"].at[slot])
            kv_at = columns.positions_of(t, slot)
            scores = columns.adjusted(products(spec, shared, slot, at_slot), kv_at)
            if spec.want_scores:
                store(memory["scores"].at[here.row, here.head, pl.ds(t * tile, tile)], scores)
            new = jnp.maximum(top, jnp.max(scores, axis=0))
            shift = jnp.where(new == -jnp.inf, 0.0, new)
            keep = jnp.exp(top - shift)
            probs = jnp.exp(scores - spread(shift, scores.shape))
            total = total * spread(keep, total.shape) + probs
            whole = (t >= rows.run) & (t < rows.run_end)
            mixed = mix(spec, shared, slot, probs, kv_at, whole)
            if spec.unit == "mma" and not spec.by_threads:
                plgpu.commit_smem()  # what threads have read the copy engine may write over
            plgpu.barrier_arrive(shared["free"].at[slot])
            return new, total, acc * spread(keep, acc.shape) + mixed

        start = (
            constant((cols,), COLUMNS, -jnp.inf),
            constant((tile, cols), WGMMA, 0.0),
            constant((spec.padded, cols), WGMMA, 0.0),
        )
        top, total, acc = lax.fori_loop(here.first, here.end, step, start)
        if not spec.by_threads:
            plgpu.barrier_arrive(shared["query_free"].at[at_slot])
        state = here.number + program
        store(memory["out"].at[state].T, plgpu.layout_cast(acc, plgpu.Layout.WGMMA_TRANSPOSED))
        store(memory["top"].at[state], top)
        store(memory["total"].at[state], jnp.sum(total, axis=0))

        @pl.when(here.is_first)
        def _():
            memory["first"][here.number] = program

        @pl.when(here.is_last)
        def _():
            memory["last"][here.number] = program

    walk.each(segment)


class Columns:
    """What is known of the columns of a segment, vectors [M], and what it does to scores."""

    def __init__(self, spec: Spec, memory: dict[str, Any], shared: dict[str, Any], row: Array, slot: Array):
        self.spec, self.shared, self.slot = spec, shared, slot
        self.at = memory["at"][row] if spec.is_single else self._load("at")
        self.end = jnp.where(self.at >= 0, memory["counts"][row], 0) if spec.in_order else None
        self.slopes = self._load("slopes") if spec.alibi else None
        self.factor = self._load("factor") if spec.factor else None

    def _load(self, name: str) -> Array:
        """[M]."""
        vector = self.shared[name].at[self.slot, pl.ds(0, self.spec.cols)]
        return plgpu.load(vector, layout=COLUMNS, optimized=False)

    def positions_of(self, t: Array, slot: Array) -> Array:
        """The positions int32 [T] in tile t, which is in `slot` of the ring; EMPTY where no query may look."""
        spec = self.spec
        if self.end is None:
            return plgpu.load(self.shared["positions"].at[slot], layout=TOKENS, optimized=False)
        tile = spec.config.tile
        kv_at = plgpu.broadcasted_iota(jnp.int32, (tile,), 0, layout=TOKENS) + t * tile
        there = (kv_at < self.end) & spec.mask.between(kv_at, self.at, self.at)
        return jnp.where(there, kv_at, EMPTY)

    def adjusted(self, scores: Array, kv_at: Array) -> Array:
        """Scale, soft cap, ALiBi and mask of scores [T, M], the positions of whose slots are int32 [T]."""
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
        return jnp.where(allowed, scores, -jnp.inf)
