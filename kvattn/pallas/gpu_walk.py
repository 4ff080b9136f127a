"""The way of a program of `"mosaic_gpu"` from segment to segment, tile to tile."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kvattn._typing import Array
from kvattn.pallas.gpu_spec import Spec
from kvattn.pallas.shares import LANES, Counts, Rows, reckoned

LOADS_AT_ONCE = 32
"""Numbers of rows that are asked for before the first is needed."""


def rows_at(spec: Spec, memory: Mapping[str, Any], row: Array) -> Rows:
    """What to read of a row int32 []."""
    if spec.in_order:
        return reckoned(spec.mask, spec.config.tile, spec.ring, memory["counts"][row], *asked(spec, memory, row))
    return Rows(*(memory[field.name][row] for field in dataclasses.fields(Rows)))


def asked(spec: Spec, memory: Mapping[str, Any], row: Array) -> tuple[Array, Array]:
    """The lowest and the highest position of the queries of a row; all int32 []. -1 if there is none."""
    at = memory["at"]
    if spec.is_single:
        return at[row], at[row]
    return at[row, spec.chunks, 0], at[row, spec.chunks, 1]


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
    """

    number: Array
    row: Array
    head: Array
    first: Array
    end: Array
    rows: Rows

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
        return tile_of(j, self.rows.hole, self.rows.after)


def tile_of(j: Array, hole: Array, after: Array) -> Array:
    """Which tile of a row the j-th of those that are to be read is; all int32 []."""
    return jnp.where(j < hole, j, after + j - hole)


class Walk:
    """The way of a program: its segments that have tiles, in their order.

    Attributes:
        start: the first one, behind `last` if there is no work; int32 [].
        last: the last one.
    """

    def __init__(self, spec: Spec, memory: Mapping[str, Any], bounds: tuple[Array, Array, Array, Array]):
        self.spec, self.memory = spec, memory
        self.start, self._first_tile, self.last, self._end_tile = bounds

    def at(self, segment: Array) -> Segment:
        """What the program reads of a segment int32 []; past the last one anything, of memory that is there."""
        row, head = self.row_and_head(segment)
        rows = rows_at(self.spec, self.memory, row)
        first = jnp.where(segment == self.start, self._first_tile, 0)
        end = jnp.where(segment == self.last, self._end_tile, rows.count)
        return Segment(segment, row, head, first, end, rows)

    def row_and_head(self, segment: Array) -> tuple[Array, Array]:
        """Of a segment; all int32 []."""
        return lax.rem(segment, self.spec.batch), lax.div(segment, self.spec.batch)

    def after(self, segment: Array) -> Array:
        """The next segment that has tiles, or one behind the last; all int32 []."""

        def is_empty(segment):
            """Whether to go on; segment int32 []."""
            here = self.at(segment)
            return (segment <= self.last) & (here.end <= here.first)

        return lax.while_loop(is_empty, lambda segment: segment + 1, segment + 1)


def share_out(spec: Spec, memory: Mapping[str, Any], program: Array) -> Walk:
    """Finds the work of a program, int32 []."""
    shape = (-(-spec.batch // LANES) * LANES,)
    layout = plgpu.Layout.WG_STRIDED(shape, vec_size=1)
    index = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)
    if spec.in_order:
        nothing = plgpu.layout_cast(jnp.full(shape, 0, jnp.int32), layout)
        of_rows = lambda read: gathered(read, spec.batch, index, nothing)
        held = of_rows(lambda row: memory["counts"][row])
        last = of_rows(lambda row: asked(spec, memory, row)[1])
        first = last if spec.is_single else of_rows(lambda row: asked(spec, memory, row)[0])
        count = reckoned(spec.mask, spec.config.tile, spec.ring, held, first, last).count
    else:
        count = plgpu.load(memory["count"], layout=layout, optimized=False)
    counts = Counts(count, index, spec.batch, spec.heads, spec.programs, spec.config.least_tiles)
    return Walk(spec, memory, counts.of_program(program))


def gathered(read: Callable[[Array], Array], count: int, index: Array, vector: Array) -> Array:
    """`vector` int32 [rows] with what is to be read, int32 [], of the first `count` rows in it.

    A load of whole vectors would need an array of whole vectors, which a kernel of its own would have to make.
    """

    def some(i, vector):
        """Some of them; all are asked for before the first is waited for."""
        at = [i * LOADS_AT_ONCE + n for n in range(min(LOADS_AT_ONCE, count))]
        loaded = [read(lax.min(n, count - 1)) for n in at]
        for n, number in zip(at, loaded, strict=True):
            vector = jnp.where(index == n, number, vector)
        return vector

    if count <= LOADS_AT_ONCE:
        return some(0, vector)
    # What is behind the last number repeats it, where the index says that there is no row.
    filled = lax.fori_loop(0, -(-count // LOADS_AT_ONCE), some, vector)
    return jnp.where(index < count, filled, vector)
