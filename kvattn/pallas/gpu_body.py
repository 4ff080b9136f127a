"""The body of `"mosaic_gpu"`: one warpgroup that fetches, one that computes."""

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kvattn._typing import Array
from kvattn.codecs import Codec, Float8, Int4
from kvattn.codecs.grouped import segments, unpack_pair
from kvattn.masks import Mask
from kvattn.pallas.shares import Counts
from kvattn.pallas.tuning import GpuConfig

WGMMA = plgpu.Layout.WGMMA
COLUMNS = WGMMA.reduce(0)
"""Vectors over the columns M of a matrix."""
TOKENS = WGMMA.reduce(1)
"""Vectors over its rows."""
F32 = jnp.float32
FLOAT16_UNIT = 2.0**14
"""What 1 is brought to before it becomes float16: its small parts then stay clear of subnormal numbers."""


@dataclasses.dataclass(frozen=True)
class Stream:
    """One array of the cache that tiles are fetched of.

    Attributes:
        name: "k_data", "v_scale" and the like.
        shape: [B, K, S, F], or [B, K, F, S] with tokens last; pages: [K, P, R, F] or [K, P, F, R].
        dtype: of the numbers.
        tokens_last: which.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Any
    tokens_last: bool

    @property
    def features(self) -> int:
        """F."""
        return self.shape[-2] if self.tokens_last else self.shape[-1]


@dataclasses.dataclass(frozen=True)
class Spec:
    """All that is known when the kernel is compiled.

    Attributes:
        batch: B.
        heads: how often each row is walked along: K times `chunks`.
        chunks: into how many the columns of a key/value head are cut.
        cols: columns of a chunk, a multiple of 8.
        per_head_positions: whether heads keep different tokens.
        key_features: H.
        value_features: Hv.
        streams: the arrays of the cache.
        codec: how they are read.
        wide: dtype of the products.
        parts: of how many numbers of `wide` one of float32 consists.
        factor: whether scores are multiplied by a factor per column.
        mask: who attends to whom.
        scale: of the scores.
        softcap: of the scores.
        alibi: whether there are slopes.
        slots: of a row, whole tiles.
        page_size: 0 for a contiguous cache.
        want_scores: whether scores are wanted too.
        config: sizes to be tuned.
        programs: how many share the work.
        interpreted: whether JAX's interpreter runs it.
    """

    batch: int
    heads: int
    chunks: int
    cols: int
    per_head_positions: bool
    key_features: int
    value_features: int
    streams: tuple[Stream, ...]
    codec: Codec
    wide: Any
    parts: int
    factor: bool
    mask: Mask
    scale: float
    softcap: float | None
    alibi: bool
    slots: int
    page_size: int
    want_scores: bool
    config: GpuConfig
    programs: int
    interpreted: bool

    @property
    def padded(self) -> int:
        """Hv rounded up to what the long side of a product takes."""
        return -(-self.value_features // 64) * 64

    @property
    def decoded(self) -> bool:
        """Whether tiles are not yet what the matrix unit takes."""
        return self.streams[0].dtype != self.wide

    @property
    def lanes(self) -> int:
        """Columns of vectors over them in shared memory: copies begin at multiples of 128 bytes there."""
        return -(-self.cols // 32) * 32

    @property
    def repacked(self) -> bool:
        """Whether values are written to shared memory once more: decoded, or padded to the long side of a product."""
        return self.decoded or self.padded != self.value_features

    @property
    def pages(self) -> int:
        """Pages that make up a tile, or 1."""
        return max(1, self.config.tile // self.page_size) if self.page_size else 1

    @property
    def query_step(self) -> int:
        """Channels of the query in shared memory that a product may begin at."""
        return self._step(self.key_features, 2)

    def stream_step(self, stream: Stream) -> int:
        """Numbers of a tile in shared memory that can be addressed; 0: any, in memory that is not swizzled."""
        features = self.key_features if stream.name == "k_data" else self.value_features
        return self._step(features, jnp.dtype(stream.dtype).itemsize)

    def _step(self, features: int, size: int) -> int:
        """The most numbers of `size` bytes, in 128, 64 or 32 of them, that divide all that is addressed."""
        cuts = [features]
        if isinstance(self.codec, Int4):
            cuts = [x for run in byte_runs(features, self.codec.group_size) for x in run] + [-(-features // 2)]
        return next((s // size for s in (128, 64, 32) if all(c * size % s == 0 for c in cuts)), 0)


def byte_runs(features: int, group_size: int) -> list[tuple[int, int]]:
    """Runs of bytes of an Int4 token in which neither nibble changes its group."""
    width = -(-features // 2)
    cuts = {c % width for _, _, first, end in segments(features, 4, group_size) for c in (first, end)}
    return list(itertools.pairwise(sorted({0, width} | cuts)))


accumulator: Any = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]


def store(ref: Any, x: Array) -> None:
    """Writes registers to memory of the device."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, x, optimized=False)
    else:
        ref[...] = x


def spread(vector: Array, shape: tuple[int, ...], axis: int = 1) -> Array:
    """A vector over `axis` as a matrix."""
    return lax.broadcast_in_dim(vector, shape, [axis])


def swizzled(shape: tuple[int, ...], dtype: Any, step: int) -> Any:
    """Shared memory that the matrix unit reads; its last axis may be cut at multiples of `step`."""
    if not step:
        return plgpu.SMEM(shape, dtype)
    swizzle = step * jnp.dtype(dtype).itemsize
    tiling: Any = plgpu.TilingTransform
    swizzling: Any = plgpu.SwizzleTransform
    return plgpu.SMEM(shape, dtype, transforms=(tiling((8, step)), swizzling(swizzle)))


def tanh(x: Array) -> Array:
    """As exact as float32: the GPU's own instruction has 11 bits, and 1 - 2 / (exp(2x) + 1) loses those of small x."""
    square = x * x
    series = 1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    return jnp.where(square < 0.04, x * series, 1.0 - 2.0 / (jnp.exp(x + x) + 1.0))


def split(x: Array, dtype: Any, parts: int) -> list[Array]:
    """Numbers of `dtype` that sum up to those of x."""
    found = []
    for n in range(parts):
        piece = x.astype(dtype)
        found.append(piece)
        if n + 1 < parts:
            x = x - piece.astype(F32)
    return found


def scratch(spec: Spec) -> dict[str, Any]:
    """What a program has in shared memory."""
    tile, stages, cols, parts = spec.config.tile, spec.config.stages, spec.cols, spec.parts
    found: dict[str, Any] = {}
    for stream in spec.streams:
        if stream.tokens_last:
            found[stream.name] = plgpu.SMEM((stages, stream.features, tile), stream.dtype)
        else:
            found[stream.name] = swizzled((stages, tile, stream.features), stream.dtype, spec.stream_step(stream))
    copies = sum(spec.pages for _ in spec.streams) + 1
    found |= {
        "positions": plgpu.SMEM((stages, tile), jnp.int32),
        "query": swizzled((2, parts, cols, spec.key_features), spec.wide, spec.query_step),
        "at": plgpu.SMEM((2, spec.lanes), jnp.int32),
        "probs": swizzled((parts, cols, tile), spec.wide, 64),
        "full": plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        "free": plgpu.Barrier(num_barriers=stages),
        "query_full": plgpu.Barrier(
            num_arrivals=2 + spec.factor + spec.alibi + isinstance(spec.codec, Int4), num_barriers=2
        ),
        "query_free": plgpu.Barrier(num_barriers=2),
        "share": plgpu.SMEM((4,), jnp.int32),
        "shared_out": plgpu.Barrier(),
    }
    if spec.repacked:
        count = parts if isinstance(spec.codec, Int4) else 1
        found["values"] = swizzled((count, spec.padded, tile), spec.wide, 64)
    if spec.decoded and spec.interpreted:
        found["keys"] = swizzled((tile, spec.key_features), spec.wide, spec.query_step)
    if spec.factor:
        found["factor"] = plgpu.SMEM((2, spec.lanes), F32)
    if spec.alibi:
        found["slopes"] = plgpu.SMEM((2, spec.lanes), F32)
    if isinstance(spec.codec, Int4):
        found["sums"] = plgpu.SMEM((2, spec.streams[1].features, spec.lanes), F32)
    return found


def shared_bytes(spec: Spec) -> int:
    """Shared memory of a program, barriers and sums across warps included."""
    buffers = [x for x in scratch(spec).values() if not isinstance(x, plgpu.Barrier)]
    # Each begins at a multiple of 1024.
    return 3072 + sum(-(-math.prod(x.shape) * jnp.dtype(x.dtype).itemsize // 1024) * 1024 for x in buffers)


def decode(spec: Spec, interpret: Any, *arrays: Array) -> list[Array]:
    """Partial states, and scores if wanted.

    Args:
        spec: the sizes.
        interpret: of `plgpu.kernel`.
        *arrays: those of `Rows`; query [parts, B, heads, cols, H]; its positions int32 [B, chunks, lanes];
            positions int32 [B, 1 or K, S]; the arrays of the cache; then, each if there is one, the page table, the
            factor [B, heads, lanes], the slopes [heads, lanes], the sums [B, heads, groups, lanes].

    Returns:
        outputs times their sums float32 [states, Hv padded, cols], maxima and sums float32 [states, cols]; with
        `want_scores` scores float32 [B, heads, S, cols], of which only the tiles that were read are written.
    """
    states = spec.heads * spec.batch + spec.programs
    out_type = [
        jax.ShapeDtypeStruct((states, spec.padded, spec.cols), F32),
        jax.ShapeDtypeStruct((states, spec.cols), F32),
        jax.ShapeDtypeStruct((states, spec.cols), F32),
    ]
    if spec.want_scores:
        out_type.append(jax.ShapeDtypeStruct((spec.batch, spec.heads, spec.slots, spec.cols), F32))

    def kvattn_gpu_decode(*refs, **shared):
        names = [
            "count",
            "hole",
            "after",
            "run",
            "run_end",
            "query",
            "at",
            "positions",
            *(s.name for s in spec.streams),
        ]
        optional = (spec.page_size > 0, spec.factor, spec.alibi, isinstance(spec.codec, Int4))
        names += [n for n, there in zip(("table", "factor", "slopes", "sums"), optional, strict=True) if there]
        names += ["out", "top", "total", "scores"]
        memory = dict(zip(names, refs, strict=False))
        program, role = lax.axis_index("program"), lax.axis_index("role")
        pl.when(role == 1)(lambda: fetch(spec, memory, shared))
        pl.when(role == 0)(lambda: compute(spec, memory, shared, program))

    return plgpu.kernel(
        kvattn_gpu_decode,
        out_type=tuple(out_type),
        scratch_types=scratch(spec),
        grid=(spec.programs,),
        grid_names=("program",),
        num_threads=2,
        thread_name="role",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(*arrays)


class Walk:
    """The way of a program from segment to segment, tile to tile, the same for both warpgroups."""

    def __init__(self, spec: Spec, memory: dict[str, Any], shared: dict[str, Any]):
        self.spec, self.memory = spec, memory
        self.first, self.start, self.last, self.stop = (shared["share"][i] for i in range(4))

    def each(self, visit: Any) -> tuple[Array, Array]:
        """Calls visit(segment, row, head, first, end, tile_of, tiles so far, segments so far) for each with tiles.

        Returns:
            tiles and segments visited.
        """
        batch = self.spec.batch

        def step(segment, carry):
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
    """Finds the work of this program."""
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
        slot = lax.rem(visited, 2)
        pl.when(visited >= 2)(lambda: plgpu.barrier_wait(shared["query_free"].at[slot]))
        full = shared["query_full"].at[slot]
        copy(memory["query"].at[:, row, head], shared["query"].at[slot], full)
        copy(memory["at"].at[row, lax.rem(head, spec.chunks)], shared["at"].at[slot], full)
        for name in ("factor", "sums"):
            if name in memory:
                copy(memory[name].at[row, head], shared[name].at[slot], full)
        if spec.alibi:
            copy(memory["slopes"].at[head], shared["slopes"].at[slot], full)
        kv_head = lax.div(head, spec.chunks)

        def pages(j):
            """The pages of a tile, asked for one tile ahead: reading the table takes as long as a tile."""
            if not size:
                return ()
            table, number = memory["table"], spec.streams[0].shape[1]
            start = tile_of(j) * tile
            columns = (lax.min(lax.div(start + n * size, size), table.shape[1] - 1) for n in range(spec.pages))
            # Positions of slots whose page is unknown are empty; whatever page is read for them is not looked at.
            return tuple(lax.clamp(0, table[row, column], number - 1) for column in columns)

        def step(j, here):
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
    """Attends, tile by tile, with a running maximum."""
    share_out(spec, memory, shared, program)
    walk = Walk(spec, memory, shared)
    tile, stages, cols = spec.config.tile, spec.config.stages, spec.cols

    def constant(shape, layout, value):
        return plgpu.layout_cast(jnp.full(shape, value, F32), layout)

    def segment(segment, row, head, first, end, tile_of, tiles, visited):
        run, run_end = memory["run"][row], memory["run_end"][row]
        at_slot = lax.rem(visited, 2)
        plgpu.barrier_wait(shared["query_full"].at[at_slot])
        columns = Columns(spec, shared, at_slot)

        def step(j, carry):
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
            total = total * keep + jnp.sum(probs, axis=0)
            whole = (t >= run) & (t < run_end)
            mixed = mix(spec, shared, slot, probs, kv_at, whole)
            plgpu.barrier_arrive(shared["free"].at[slot])
            return new, total, acc * spread(keep, acc.shape) + mixed

        start = (
            constant((cols,), COLUMNS, -jnp.inf),
            constant((cols,), COLUMNS, 0.0),
            constant((spec.padded, cols), WGMMA, 0.0),
        )
        top, total, acc = lax.fori_loop(first, end, step, start)
        plgpu.barrier_arrive(shared["query_free"].at[at_slot])
        state = segment + program
        store(memory["out"].at[state], acc)
        store(memory["top"].at[state], top)
        store(memory["total"].at[state], total)

    walk.each(segment)


class Columns:
    """What is known of the columns of a segment, and what it does to scores."""

    def __init__(self, spec: Spec, shared: dict[str, Any], slot: Array):
        self.spec, self.shared, self.slot = spec, shared, slot
        self.at = self._load("at")
        self.slopes = self._load("slopes") if spec.alibi else None
        self.factor = self._load("factor") if spec.factor else None

    def _load(self, name: str) -> Array:
        vector = self.shared[name].at[self.slot, pl.ds(0, self.spec.cols)]
        return plgpu.load(vector, layout=COLUMNS, optimized=False)

    def adjusted(self, scores: Array, kv_at: Array) -> Array:
        """Scale, soft cap, ALiBi and mask."""
        spec, rule, shape = self.spec, self.spec.mask, scores.shape
        if self.factor is not None:
            scores = scores * spread(self.factor * spec.scale, shape)
        else:
            scores = scores * spec.scale
        if spec.softcap is not None:
            scores = tanh(scores * (1 / spec.softcap)) * spec.softcap
        kv, at = spread(kv_at, shape, 0), spread(self.at, shape)
        if self.slopes is not None:
            scores = scores + spread(self.slopes, shape) * (kv - at).astype(F32)
        allowed = (at >= 0) & (kv >= rule.begin)
        if rule.end is not None:
            allowed &= kv < rule.end
        if rule.causal:
            allowed &= kv <= at
        if rule.window is not None:
            near = kv > at - rule.window
            allowed &= near | (kv < rule.num_sinks) if rule.num_sinks else near
        # Masked by selecting, never by adding: what lies in an unused slot may be NaN.
        return jnp.where(allowed, scores, -jnp.inf)


def products(spec: Spec, shared: dict[str, Any], slot: Array, at_slot: Array) -> Array:
    """Keys times queries, float32 [tile, cols], scales of the keys included."""
    shape = (spec.config.tile, spec.cols)
    keys = shared["k_data"].at[slot]
    query = shared["query"].at[at_slot]
    load = lambda name, group: plgpu.load(shared[name].at[slot, group], layout=TOKENS, optimized=False)

    def product(left, first, count):
        if spec.decoded and spec.interpreted:
            # The matrix unit takes its first operand from registers, the interpreter does not.
            shared["keys"].at[:, pl.ds(first, count)][...] = left
            left = shared["keys"].at[:, pl.ds(first, count)]

        def accumulate(acc):
            for n in range(spec.parts):
                plgpu.wgmma(acc, left, query.at[n, :, pl.ds(first, count)].T)
            return acc[...]

        return pl.run_scoped(accumulate, accumulator(shape, F32))

    if not spec.decoded:
        return product(keys, 0, spec.key_features)
    if not isinstance(spec.codec, Int4):
        total: Any = 0.0
        for first, count in runs(spec.key_features):
            codes = plgpu.load(keys.at[:, pl.ds(first, count)], layout=plgpu.Layout.WGMMA_UPCAST_2X, optimized=False)
            codes = plgpu.layout_cast(codes.astype(spec.wide), WGMMA)
            total = total + product(codes, first, count)
        return total * spread(load("k_scale", 0), shape, 0)
    groups: dict[int, Any] = {}
    for plane, group, start, unit in planes(keys, spec.key_features, spec.codec.group_size):
        left = plgpu.layout_cast(plane.astype(spec.wide), WGMMA)
        part = product(left, start, plane.shape[1]) * unit
        groups[group] = part if group not in groups else groups[group] + part
    total = 0.0
    for group, part in groups.items():
        scale, minimum = unpack_pair(load("k_scale", group), load("k_minimum", group))
        sums = shared["sums"].at[at_slot, group, pl.ds(0, spec.cols)]
        sums = plgpu.load(sums, layout=COLUMNS, optimized=False)
        part = part * spread(scale, shape, 0) + spread(sums, shape) * spread(minimum, shape, 0)
        total = total + part
    return total


def runs(features: int) -> list[tuple[int, int]]:
    """Channels as (first, count) of eight-bit tokens that are decoded at a time: more do not stay in registers."""
    return [(first, min(128, features - first)) for first in range(0, features, 128)]


def planes(tile: Any, features: int, group_size: int) -> list[tuple[Array, int, int, float]]:
    """The numbers of four-bit tokens as (numbers, their group, their first channel, what to multiply them by).

    Registers are not shifted in eight bits, so the high nibbles stay where they are.
    """
    found, width = [], -(-features // 2)
    for first, end in byte_runs(features, group_size):
        codes = plgpu.load(tile.at[:, pl.ds(first, end - first)], layout=plgpu.Layout.WGMMA_UPCAST_2X, optimized=False)
        found.append((codes & jnp.uint8(0x0F), first // group_size, first, 1.0))
        found.append((codes & jnp.uint8(0xF0), (first + width) // group_size, first + width, 1 / 16))
    return found


def mix(spec: Spec, shared: dict[str, Any], slot: Array, probs: Array, kv_at: Array, whole: Array) -> Array:
    """Values times probabilities, float32 [Hv padded, cols]."""
    shape = probs.shape
    values, back = shared["v_data"].at[slot], 1.0
    filled = kv_at >= 0
    if spec.decoded and not isinstance(spec.codec, Int4):
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
        shared["probs"].at[n].T[...] = piece
    if spec.repacked:
        repack(spec, shared, slot, filled)
        lefts = [shared["values"].at[n] for n in range(shared["values"].shape[0])]
    else:

        @pl.when(jnp.logical_not(whole))
        def _():
            loaded = plgpu.load(values, layout=WGMMA, optimized=False)
            values[...] = jnp.where(spread(filled, loaded.shape, 0), loaded, jnp.zeros((), loaded.dtype))

        lefts = [values.T]
    plgpu.commit_smem()

    def accumulate(acc):
        for m, left in enumerate(lefts):
            for n in range(spec.parts - m):
                plgpu.wgmma(acc, left, shared["probs"].at[n].T)
        return acc[...]

    mixed = pl.run_scoped(accumulate, accumulator((spec.padded, spec.cols), F32))
    return mixed if isinstance(back, float) and back == 1.0 else mixed * back


def repack(spec: Spec, shared: dict[str, Any], slot: Array, filled: Array) -> None:
    """Writes a tile of values once more, channel by channel, in 16 bits; nothing there that is not finite."""
    values, target = shared["v_data"].at[slot], shared["values"]
    real = pl.ds(0, spec.value_features)
    if not spec.decoded:
        numbers = plgpu.load(values, layout=WGMMA, optimized=False)
        numbers = jnp.where(spread(filled, numbers.shape, 0), numbers, jnp.zeros((), numbers.dtype))
        target.at[0, real].T[...] = numbers
    elif not isinstance(spec.codec, Int4):
        for first, count in runs(spec.value_features):
            codes = plgpu.load(values.at[:, pl.ds(first, count)], layout=plgpu.Layout.WGMMA_UPCAST_2X, optimized=False)
            codes = plgpu.layout_cast(codes.astype(spec.wide), WGMMA)
            if isinstance(spec.codec, Float8):  # integers are finite, and their scales are 0
                codes = jnp.where(spread(filled, codes.shape, 0), codes, jnp.zeros((), codes.dtype))
            target.at[0, pl.ds(first, count)].T[...] = codes
    else:
        load = lambda name, group: plgpu.load(shared[name].at[slot, group], layout=TOKENS, optimized=False)
        for plane, group, start, unit in planes(values, spec.value_features, spec.codec.group_size):
            scale, minimum = (
                jnp.where(filled, x, 0.0) for x in unpack_pair(load("v_scale", group), load("v_minimum", group))
            )
            plane = plgpu.layout_cast(plane.astype(spec.wide), WGMMA).astype(F32)
            numbers = plane * spread(scale * unit, plane.shape, 0) + spread(minimum, plane.shape, 0)
            for n, piece in enumerate(split(numbers, spec.wide, spec.parts)):
                target.at[n, pl.ds(start, plane.shape[1])].T[...] = piece
