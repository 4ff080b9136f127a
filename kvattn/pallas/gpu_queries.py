"""What `"mosaic_gpu"` reads of the queries: the new tokens of a row and the query heads of a group, as columns."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Int32, Shaped

from kvattn._typing import Array
from kvattn.attend.request import Request, grouped
from kvattn.masks import EMPTY
from kvattn.pallas import common
from kvattn.pallas.gpu_spec import Spec


def queries(request: Request, spec: Spec) -> dict[str, Array]:
    """The "query" and, if there are any, "slopes", as `gpu_body.decode` takes them."""
    if spec.as_it_lies:
        found = {"query": request.query.reshape(spec.batch * spec.query_heads, -1)}
    else:
        found = {"query": columns(grouped(request.query, request.view.num_kv_heads), spec, 0)}
    if (slopes := common.query_slopes(request)) is not None:
        found["slopes"] = _vectors(_cut(slopes[..., None], spec, 0).reshape(spec.heads, spec.cols), spec)
    return found


def columns(x: Shaped[Array, "B K G T F"], spec: Spec, fill: float) -> Shaped[Array, "B heads cols F"]:
    """The columns of every head, and `fill` behind the last."""
    batch, heads, group, length, features = x.shape
    cut = _cut(x.reshape(batch, heads, group * length, features), spec, fill)
    return cut.reshape(batch, spec.heads, spec.cols, features)


def position_columns(request: Request, spec: Spec) -> Int32[Array, "B chunks_and_1 lanes"]:
    """The positions of the queries, column by column; behind them the lowest and the highest, -1 where is none.

    One array, made by one kernel.
    """
    columns = _vectors(_cut(common.query_positions(request)[..., None], spec, -1)[..., 0], spec)
    # Of unsigned numbers those below 0 are the largest.
    unsigned = jax.lax.bitcast_convert_type(request.positions, jnp.uint32)
    first = jax.lax.bitcast_convert_type(_of_all(jnp.minimum, unsigned), jnp.int32)
    first, last = (jnp.maximum(x, EMPTY)[:, None] for x in (first, _of_all(jnp.maximum, request.positions)))
    lane = jnp.arange(spec.lanes, dtype=jnp.int32)[None]
    both = jnp.where(lane == 0, first, jnp.where(lane == 1, last, 0))
    return jnp.concatenate([columns, both[:, None]], axis=1)


def _of_all(choose: Any, x: Shaped[Array, "B T"]) -> Shaped[Array, " B"]:
    """The lowest or highest of each row; of a few by comparing, which needs no kernel of its own."""
    if x.shape[1] > common.MOST_TOKENS:
        return choose.reduce(x, axis=1)
    return functools.reduce(choose, [x[:, t] for t in range(x.shape[1])])


def _cut(x: Shaped[Array, "*lead M F"], spec: Spec, fill: float) -> Shaped[Array, "*lead chunks cols F"]:
    """The columns cut into chunks."""
    *lead, count, features = x.shape
    padding = [*((0, 0) for _ in lead), (0, spec.chunks * spec.cols - count), (0, 0)]
    return jnp.pad(x, padding, constant_values=fill).reshape(*lead, spec.chunks, spec.cols, features)


def _vectors(x: Shaped[Array, "*lead cols"], spec: Spec) -> Shaped[Array, "*lead lanes"]:
    """Vectors over columns, as long as a copy needs them."""
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, spec.lanes - spec.cols),))
