"""The body of `"mosaic_gpu"`: one warpgroup that fetches, one that computes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kvattn import _manual
from kvattn._typing import Array
from kvattn.pallas.gpu_spec import F32, Spec, scratch
from kvattn.pallas.gpu_tile import COLUMNS, TOKENS, WGMMA, mix, products, spread, store, tanh
from kvattn.pallas.shares import Counts


def decode(spec: Spec, interpret: Any, arrays: Mapping[str, Array]) -> Sequence[Array]:
    """Partial states, and scores if wanted.

    Args:
        spec: the sizes.
        interpret: of `plgpu.kernel`.
        arrays: what the kernel reads, by name: those of `Rows`; "query" [parts, B, heads, cols, H]; "at" int32
            [B, chunks, lanes], its positions; "positions" int32 [B, 1 or K, S]; the `Stream`s of the cache; and, each
            if there is one, "table" int32 [B, W], "factor" [B, heads, lanes], "slopes" [heads, lanes], "sums"
            [B, heads, groups, lanes].

    Returns:
        outputs times their sums float32 [states, Hv padded, cols], maxima and sums float32 [states, cols]; with
        `want_scores` scores float32 [B, heads, S, cols], of which only the tiles that were read are written.
    """
    states = spec.heads * spec.batch + spec.programs
    result = lambda *shape: _manual.result(shape, F32, arrays)
    results = {
        "out": result(states, spec.padded, spec.cols),
        "top": result(states, spec.cols),
        "total": result(states, spec.cols),
    }
    if spec.want_scores:
        results["scores"] = result(spec.batch, spec.heads, spec.slots, spec.cols)

    def kvattn_gpu_decode(*refs, **shared):
        """Refs of `arrays` and results, [...] as above, and `scratch` by name."""
        memory = dict(zip((*arrays, *results), refs, strict=True))
        program, role = lax.axis_index("program"), lax.axis_index("role")
        pl.when(role == 1)(lambda: fetch(spec, memory, shared))
        pl.when(role == 0)(lambda: compute(spec, memory, shared, program))

    return plgpu.kernel(
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


class Walk:
    """The way of a program from segment to segment, tile to tile, the same for both warpgroups."""

    def __init__(self, spec: Spec, memory: dict[str, Any], shared: dict[str, Any]):
        self.spec, self.memory = spec, memory
        self.first, self.start, self.last, self.stop = (shared["share"][i] for i in range(4))

    def each(self, visit: Callable[..., None]) -> tuple[Array, Array]:
        """Calls visit(segment, row, head, first, end, tile_of, tiles so far, segments so far) for each with tiles.

        All are int32 [], but for `tile_of`, a function of one.

        Returns:
            tiles and segments visited.
        """
        batch = self.spec.batch

        def step(segment, carry):
            """One segment; all are int32 []."""
            tiles, visited = carry
            row, head = lax.rem(segment, batch), lax.div(segment, batch)
            hole, after, count = (self.memory[name][row] for name in ("hole", "after", "count"))
            first = jnp.where(segment == self.first, self.start, 0)
            end = jnp.where(segment == self.last, self.stop, count)
            tile_of = lambda j: jnp.where(j < hole, j, after + j - hole)
            some = end > first
            pl.when(some)(lambda: visit(segment, row, head, first, end, tile_of, tiles, visited))
            return tiles + lax.max(end - first, 0), visited + some.astype(jnp.int32)

        return lax.fori_loop(self.first, self.last + 1, step, (jnp.int32(0), jnp.int32(0)))


def share_out(spec: Spec, memory: dict[str, Any], shared: dict[str, Any], program: Array) -> None:
    """Finds the work of this program, int32 []."""
    shape = memory["count"].shape
    layout = plgpu.Layout.WG_STRIDED(shape, vec_size=1)
    counts = Counts(
        plgpu.load(memory["count"], layout=layout, optimized=False),
        plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout),
        spec.batch,
        spec.heads,
        spec.programs,
    )
    for i, number in enumerate(counts.of_program(program)):
        shared["share"][i] = number
    plgpu.barrier_arrive(shared["shared_out"])


def fetch(spec: Spec, memory: dict[str, Any], shared: dict[str, Any]) -> None:
    """Keeps the ring of tiles, and that of queries, full."""
    plgpu.barrier_wait(shared["shared_out"])
    walk = Walk(spec, memory, shared)
    tile, stages, size = spec.config.tile, spec.config.stages, spec.page_size
    copy = plgpu.copy_gmem_to_smem

    def segment(_, row, head, first, end, tile_of, tiles, visited):
        """Fetches a segment; see `Walk.each` for its numbers, int32 []."""
        slot = lax.rem(visited, 2)
        pl.when(visited >= 2)(lambda: plgpu.barrier_wait(shared["query_free"].at[slot]))
        full = shared["query_full"].at[slot]
        # Part by part: a copy has five dimensions at most, and a tiled matrix has four.
        for n in range(spec.parts):
            copy(memory["query"].at[n, row, head], shared["query"].at[slot, n], full)
        copy(memory["at"].at[row, lax.rem(head, spec.chunks)], shared["at"].at[slot], full)
        for name in ("factor", "sums"):
            if name in memory:
                copy(memory[name].at[row, head], shared[name].at[slot], full)
        if spec.alibi:
            copy(memory["slopes"].at[head], shared["slopes"].at[slot], full)
        kv_head = lax.div(head, spec.chunks)

        def pages(j):
            """The pages int32 [] of tile j, asked for one tile ahead: reading the table takes as long as a tile."""
            if not size:
                return ()
            table, number = memory["table"], spec.streams[0].shape[1]
            start = tile_of(j) * tile
            columns = (lax.min(lax.div(start + n * size, size), table.shape[1] - 1) for n in range(spec.pages))
            # Positions of slots whose page is unknown are empty; whatever page is read for them is not looked at.
            return tuple(lax.clamp(0, table[row, column], number - 1) for column in columns)

        def step(j, here):
            """Fetches tile j int32 [] from its pages `here`; gives those of the next one."""
            ahead = pages(lax.min(j + 1, end - 1))
            i = tiles + j - first
            slot = lax.rem(i, stages)
            start = tile_of(j) * tile
            pl.when(i >= stages)(lambda: plgpu.barrier_wait(shared["free"].at[slot]))
            full = shared["full"].at[slot]
            which = kv_head if spec.per_head_positions else 0
            copy(memory["positions"].at[row, which, pl.ds(start, tile)], shared["positions"].at[slot], full)
            for stream in spec.streams:
                source, target = memory[stream.name], shared[stream.name].at[slot]
                for n in range(spec.pages):
                    part = min(tile, size) if size else tile
                    if not size:
                        source_n, rows = source.at[row, kv_head], pl.ds(start, tile)
                    else:
                        source_n, rows = source.at[kv_head, here[n]], pl.ds(lax.rem(start, size), part)
                        if size <= tile:
                            rows = pl.ds(0, part)
                    into = pl.ds(n * part, part)
                    if stream.tokens_last:
                        copy(source_n.at[:, rows], target.at[:, into], full)
                    else:
                        copy(source_n.at[rows], target.at[into], full)
            return ahead

        lax.fori_loop(first, end, step, pages(first))

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

    def segment(segment, row, head, first, end, tile_of, tiles, visited):
        """Attends to a segment; see `Walk.each` for its numbers, int32 []."""
        run, run_end = memory["run"][row], memory["run_end"][row]
        at_slot = lax.rem(visited, 2)
        plgpu.barrier_wait(shared["query_full"].at[at_slot])
        columns = Columns(spec, shared, at_slot)

        def step(j, carry):
            """One more tile into maximum [M], sums [T, M] and output [H, M]."""
            # Sums stay spread over the rows of a tile: adding up across threads once per segment is enough.
            top, total, acc = carry
            t = tile_of(j)
            slot = lax.rem(tiles + j - first, stages)
            plgpu.barrier_wait(shared["full"].at[slot])
            kv_at = plgpu.load(shared["positions"].at[slot], layout=TOKENS, optimized=False)
            scores = columns.adjusted(products(spec, shared, slot, at_slot), kv_at)
            if spec.want_scores:
                store(memory["scores"].at[row, head, pl.ds(t * tile, tile)], scores)
            new = jnp.maximum(top, jnp.max(scores, axis=0))
            shift = jnp.where(new == -jnp.inf, 0.0, new)
            keep = jnp.exp(top - shift)
            probs = jnp.exp(scores - spread(shift, scores.shape))
            total = total * spread(keep, total.shape) + probs
            whole = (t >= run) & (t < run_end)
            mixed = mix(spec, shared, slot, probs, kv_at, whole)
            plgpu.barrier_arrive(shared["free"].at[slot])
            return new, total, acc * spread(keep, acc.shape) + mixed

        start = (
            constant((cols,), COLUMNS, -jnp.inf),
            constant((tile, cols), WGMMA, 0.0),
            constant((spec.padded, cols), WGMMA, 0.0),
        )
        top, total, acc = lax.fori_loop(first, end, step, start)
        plgpu.barrier_arrive(shared["query_free"].at[at_slot])
        state = segment + program
        store(memory["out"].at[state], acc)
        store(memory["top"].at[state], top)
        store(memory["total"].at[state], jnp.sum(total, axis=0))

    walk.each(segment)


class Columns:
    """What is known of the columns of a segment, vectors [M], and what it does to scores."""

    def __init__(self, spec: Spec, shared: dict[str, Any], slot: Array):
        self.spec, self.shared, self.slot = spec, shared, slot
        self.at = self._load("at")
        self.slopes = self._load("slopes") if spec.alibi else None
        self.factor = self._load("factor") if spec.factor else None

    def _load(self, name: str) -> Array:
        """[M]."""
        vector = self.shared[name].at[self.slot, pl.ds(0, self.spec.cols)]
        return plgpu.load(vector, layout=COLUMNS, optimized=False)

    def adjusted(self, scores: Array, kv_at: Array) -> Array:
        """Scale, soft cap, ALiBi and mask of scores [T, M], the positions of whose slots are int32 [T]."""
        spec, shape = self.spec, scores.shape
        if self.factor is not None:
            scores = scores * spread(self.factor * spec.scale, shape)
        else:
            scores = scores * spec.scale
        if spec.softcap is not None:
            scores = tanh(scores * (1 / spec.softcap)) * spec.softcap
        kv, at = spread(kv_at, shape, 0), spread(self.at, shape)
        if self.slopes is not None:
            scores = scores + spread(self.slopes, shape) * (kv - at).astype(F32)
        allowed = (at >= 0) & spec.mask.between(kv, at, at)
        # Masked by selecting, never by adding: what lies in an unused slot may be NaN.
        return jnp.where(allowed, scores, -jnp.inf)
