"""What is known of a call of `"mosaic_gpu"` when it is compiled, and the shared memory that follows from it."""

import dataclasses
import itertools
import math
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from kvattn._typing import Array
from kvattn.codecs import Format
from kvattn.codecs.grouped import segments
from kvattn.masks import Mask
from kvattn.pallas.tuning import GpuConfig

F32 = jnp.float32
THREADS = 128
"""Of a program."""
MOST_REGISTERS = 48
"""That operands of `mma` take at a time."""
SIZES = (128, 64, 32)
"""Bytes of a row that can lie together in shared memory that is swizzled."""


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
    dtype: np.dtype
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
        length: T.
        query_heads: N.
        heads: how often each row is walked along: K times `chunks`.
        chunks: into how many the columns of a key/value head are cut.
        cols: columns of a chunk, a multiple of 8.
        per_head_positions: whether heads keep different tokens.
        key_features: H.
        value_features: Hv.
        streams: the arrays of the cache.
        format: how they are read.
        wide: dtype of the products.
        parts: of how many numbers of `wide` one of float32 consists.
        factor: whether scores are multiplied by a factor per column.
        mask: who attends to whom.
        scale: of the scores.
        softcap: of the scores.
        alibi: whether there are slopes.
        slots: of a row, whole tiles.
        page_size: 0 for a contiguous cache.
        in_order: whether slot s holds the token of position s: then positions are reckoned, not read.
        ring: the slots of a ring, in whose slot s the last position lies that is s modulo them: then `in_order` says
            that positions are reckoned likewise. Only for T = 1. 0: it is none.
        as_it_lies: whether queries are read as they lie, [B N, H], with what is next to a group as columns that
            nobody asks for. Only for T = 1.
        raw: dtype of the queries.
        want_scores: whether scores are wanted too.
        config: sizes to be tuned.
        programs: how many share the work.
        unit: the matrix unit, "wgmma" or "mma".
        looks: whether values that are not finite are looked for, so as to hide them from queries that may not attend to
            them (`gpu_unseen`).
        by_threads: whether threads fetch tiles (`gpu_threads`), not the copy engine that GPUs have since Hopper.
        interpreted: whether JAX's interpreter runs it.
    """

    batch: int
    length: int
    query_heads: int
    heads: int
    chunks: int
    cols: int
    per_head_positions: bool
    key_features: int
    value_features: int
    streams: tuple[Stream, ...]
    format: Format
    wide: np.dtype
    parts: int
    factor: bool
    mask: Mask
    scale: float
    softcap: float | None
    alibi: bool
    slots: int
    page_size: int
    in_order: bool
    ring: int
    as_it_lies: bool
    raw: np.dtype
    want_scores: bool
    config: GpuConfig
    programs: int
    unit: str
    looks: bool
    by_threads: bool
    interpreted: bool

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.query_heads // (self.heads // self.chunks)

    @property
    def is_single(self) -> bool:
        """Whether all columns of a row have one position."""
        return self.length == 1

    @property
    def hides(self) -> bool:
        """Whether no query gets anything of values that are not finite and that only others of its row may see.

        Integers are finite; what is not is their scale, which is multiplied into the probabilities of those who may see
        it. Codes of floats may be NaN themselves.
        """
        by_scale = self.format.is_scaled and jnp.issubdtype(self.stream("v_data").dtype, jnp.integer)
        return self.is_single or self.looks or by_scale or self.by_group

    @property
    def may_look(self) -> bool:
        """Whether `looks` may be set: where it is of use, and registers hold what it takes."""
        fits = self.parts == 1 and self.cols * self.padded <= 32 * 128 and not self.by_threads
        return fits and not (self.is_single or self.decoded)

    @property
    def prepares(self) -> bool:
        """Whether queries are written to shared memory once more: split, scaled, with channels permuted."""
        return self.decoded or self.raw != self.wide or self.parts > 1 or (self.as_it_lies and not self.is_aligned)

    @property
    def is_aligned(self) -> bool:
        """Whether eights of queries, as they lie one after the other, hold whole groups or only one."""
        whole = 8 % self.group == 0 or self.chunks * self.cols == self.group
        return whole and self.batch * self.query_heads % 8 == 0

    def first_query(self, row: Array, head: Array) -> Array:
        """Of queries as they lie [B N, H], the one that is column 0 of a segment; all int32 []."""
        kv_head, chunk = lax.div(head, self.chunks), lax.rem(head, self.chunks)
        first = row * self.query_heads + kv_head * self.group + chunk * self.cols
        if self.prepares:
            return lax.min(first, self.batch * self.query_heads - self.cols)
        # Where the matrix unit reads what was copied, a copy begins at a multiple of 8, so the columns of a smaller
        # group may begin with those of others.
        return lax.div(first, 8) * 8

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
    def unpacks_once(self) -> bool:
        """Whether each scale and minimum of four-bit tokens is unpacked by one thread, for all that need it."""
        groups = {s.features for s in self.streams if s.name.endswith("_scale")}
        return self.format.is_grouped and all(n * self.config.tile % THREADS == 0 for n in groups)

    @property
    def by_group(self) -> bool:
        """Whether values are added up group by group: scales go into probabilities, minima into sums."""
        return self.format.is_grouped and all(
            (end - first) % 64 == 0 for first, end in byte_runs(self.value_features, self.format.group_size)
        )

    @property
    def outputs(self) -> list[tuple[int, int]]:
        """The channels that are added up together, as (first, count)."""
        return plane_runs(self.value_features, self.format.group_size) if self.by_group else [(0, self.padded)]

    @property
    def key_runs(self) -> list[tuple[int, int]]:
        """Channels of keys of four bits that are read together, as (first, count)."""
        return plane_runs(self.key_features, self.format.group_size)

    @property
    def pages(self) -> int:
        """Pages that make up a tile, or 1."""
        return max(1, self.config.tile // self.page_size) if self.page_size else 1

    @property
    def tile_rows(self) -> int:
        """Slots of a tile that are copied at once: a page, a tile, or what threads can copy without leaving the row."""
        tile = self.config.tile
        if self.page_size:
            return min(tile, self.page_size)
        return math.gcd(tile, self.streams[0].shape[2]) if self.by_threads else tile

    @property
    def cut(self) -> int:
        """Features of both operands of `mma`, a multiple of 16, that are in registers at a time."""
        if self.unit == "wgmma":
            return 128
        registers = max(self.config.tile, self.padded) // 16 + self.cols // 4  # of 16 features
        return next((count for count in (64, 32) if count // 16 * registers <= MOST_REGISTERS), 16)

    @property
    def key_run(self) -> int:
        """Channels of keys that are decoded at a time."""
        return self.cut if self.unit == "mma" and self.stream_step(self.streams[0]) else 128

    @property
    def value_run(self) -> int:
        """Channels of values that are masked or decoded at a time: few, so that two programs have the registers."""
        step = self.stream_step(self.stream("v_data"))
        return step * max(1, 32 // step) if self.unit == "mma" and step else 128

    @property
    def query_step(self) -> int:
        """Channels of the query in shared memory that a product may begin at."""
        return self._step(self.key_features, 2, self._sizes(2))

    def _sizes(self, size: int) -> tuple[int, ...]:
        """Those of `SIZES` that products of numbers of `size` bytes can be cut at."""
        return tuple(s for s in SIZES if self.unit == "wgmma" or s <= self.cut * size)

    @property
    def value_step(self) -> int:
        """Channels of values that were written once more which a run may begin at."""
        return self._step(self.value_features, 2)

    def stream(self, name: str) -> Stream:
        """The one of this name."""
        return next(stream for stream in self.streams if stream.name == name)

    def stream_step(self, stream: Stream) -> int:
        """Numbers of a tile in shared memory that can be addressed; 0: any, in memory that is not swizzled."""
        features = self.key_features if stream.name == "k_data" else self.value_features
        size = jnp.dtype(stream.dtype).itemsize
        sizes = self._sizes(size) if stream.name == "k_data" else SIZES[self.unit == "mma" :]
        if self.by_threads:
            sizes = tuple(s for s in sizes if s in copied(self.tile_rows, stream.features * size))
        return self._step(features, size, sizes)

    def _step(self, features: int, size: int, sizes: tuple[int, ...] = SIZES) -> int:
        """The most numbers of `size` bytes, in one of `sizes` of them, that divide all that is addressed."""
        cuts = [features]
        if self.format.is_grouped:
            cuts = [x for run in byte_runs(features, self.format.group_size) for x in run] + [-(-features // 2)]
        return next((s // size for s in sizes if all(c * size % s == 0 for c in cuts)), 0)


def copied(rows: int, width: int) -> tuple[int, ...]:
    """Which of `SIZES` the threads of a warpgroup can copy [rows, width bytes] in.

    Each of the four warps takes a whole number of blocks of 8 rows and so many bytes.
    """
    down = rows // 8
    across = {size: width // size for size in SIZES if width % size == 0}
    return tuple(s for s, n in across.items() if down % 4 == 0 or n % 4 == 0 or (down % 2 == 0 and n % 2 == 0))


def byte_runs(features: int, group_size: int) -> list[tuple[int, int]]:
    """Runs of bytes of an Int4 token in which neither nibble changes its group."""
    width = -(-features // 2)
    cuts = {c % width for _, _, first, end in segments(features, 4, group_size) for c in (first, end)}
    return list(itertools.pairwise(sorted({0, width} | cuts)))


def plane_runs(features: int, group_size: int) -> list[tuple[int, int]]:
    """The channels of these runs, low nibbles and high ones in turn, as (first, count)."""
    width = -(-features // 2)
    return [(first + high, end - first) for first, end in byte_runs(features, group_size) for high in (0, width)]


def scratch(spec: Spec) -> dict[str, Any]:
    """What a program has in shared memory."""
    tile, stages, cols, parts = spec.config.tile, spec.config.stages, spec.cols, spec.parts
    found: dict[str, Any] = {}
    for stream in spec.streams:
        if stream.tokens_last:
            found[stream.name] = plgpu.SMEM((stages, stream.features, tile), stream.dtype)
        else:
            found[stream.name] = swizzled((stages, tile, stream.features), stream.dtype, spec.stream_step(stream))
    copies = 1 if spec.by_threads else sum(spec.pages for _ in spec.streams) + (not spec.in_order)
    vectors = (not spec.is_single) + spec.alibi
    found |= {
        "query": swizzled((1 if spec.prepares else stages, parts, cols, spec.key_features), spec.wide, spec.query_step),
        "probs": by_tokens(spec, parts * len(spec.outputs), cols),
        "full": plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        "query_full": plgpu.Barrier(num_arrivals=1 + vectors, num_barriers=stages),
    }
    if spec.prepares:
        found["raw"] = plgpu.SMEM((stages, cols, spec.key_features), spec.raw)
    if spec.looks:
        found["seen"] = by_tokens(spec, 1, cols)
        if not spec.repacked:
            stream = spec.stream("v_data")
            found["kinds"] = swizzled((tile, stream.features), stream.dtype, spec.stream_step(stream))
    if spec.repacked:
        count = parts if spec.format.is_grouped and not spec.by_group else 1
        found["values"] = by_tokens(spec, count, spec.padded)
    if spec.decoded and spec.interpreted and spec.unit == "wgmma":
        found["keys"] = swizzled((tile, spec.key_features), spec.wide, spec.query_step)
    if not spec.in_order:
        found["positions"] = plgpu.SMEM((stages, tile), jnp.int32)
    if not spec.is_single:
        found["at"] = plgpu.SMEM((stages, spec.lanes), jnp.int32)
    if spec.factor:
        found["factor"] = plgpu.SMEM((spec.lanes,), F32)
    if spec.alibi:
        found["slopes"] = plgpu.SMEM((stages, spec.lanes), F32)
    if spec.unpacks_once:
        for stream in spec.streams:
            if stream.name.endswith("_scale"):
                shape = (2, stream.features, tile)
                found[stream.name.replace("_scale", "_pair")] = plgpu.SMEM(shape, F32)
    if spec.format.is_grouped:
        found["sums"] = plgpu.SMEM((len(spec.key_runs), spec.lanes), F32)
    return found


def by_tokens(spec: Spec, count: int, columns: int) -> Any:
    """Shared memory for matrices of probabilities or of values that are written once more.

    `wgmma` reads tokens as columns, and Hopper can write a transposed matrix. `mma` reads them as rows.
    """
    tile = spec.config.tile
    if spec.unit == "wgmma":
        return swizzled((count, columns, tile), spec.wide, 64)
    if columns != spec.padded:
        return plgpu.SMEM((count, tile, columns), spec.wide)
    return swizzled((count, tile, columns), spec.wide, spec.value_step)


def shared_bytes(spec: Spec) -> int:
    """Shared memory of a program, barriers and sums across warps included."""
    buffers = [x for x in scratch(spec).values() if not isinstance(x, plgpu.Barrier)]
    # Each begins at a multiple of 1024.
    return 3072 + sum(-(-math.prod(x.shape) * jnp.dtype(x.dtype).itemsize // 1024) * 1024 for x in buffers)


def swizzled(shape: tuple[int, ...], dtype: DTypeLike, step: int) -> Any:
    """Shared memory that the matrix unit reads; its last axis may be cut at multiples of `step`."""
    if not step:
        return plgpu.SMEM(shape, dtype)
    swizzle = step * jnp.dtype(dtype).itemsize
    tiling: Any = plgpu.TilingTransform
    swizzling: Any = plgpu.SwizzleTransform
    return plgpu.SMEM(shape, dtype, transforms=(tiling((8, step)), swizzling(swizzle)))
