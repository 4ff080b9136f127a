"""What `"mosaic_gpu"` reads of the queries: the new tokens of a row and the query heads of a group, as columns."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int32, Shaped

from kvattn._typing import Array
from kvattn.attend.request import Request, grouped
from kvattn.pallas import common
from kvattn.pallas.gpu_spec import Spec
from kvattn.pallas.gpu_tile import FLOAT16_UNIT

FLOAT16_EXPONENT = int(math.log2(FLOAT16_UNIT))


def queries(request: Request, spec: Spec) -> dict[str, Array]:
    """The "query" and, each if there is one, "factor", "slopes" and "sums", as `gpu_body.decode` takes them."""
    if spec.as_it_lies:
        return {"query": request.query.reshape(spec.batch * spec.query_heads, -1)}
    query, factor = _split(columns(grouped(request.query, request.view.num_kv_heads), spec, 0), spec)
    found = {"query": query}
    if factor is not None:
        found["factor"] = _vectors(factor, spec)
    if (slopes := common.query_slopes(request)) is not None:
        found["slopes"] = _vectors(_cut(slopes[..., None], spec, 0).reshape(spec.heads, spec.cols), spec)
    if spec.format.is_grouped:
        found["sums"] = _vectors(_sums(query, spec), spec)
    return found


def columns(x: Shaped[Array, "B K G T F"], spec: Spec, fill: float) -> Shaped[Array, "B heads cols F"]:
    """The columns of every head, and `fill` behind the last."""
    batch, heads, group, length, features = x.shape
    cut = _cut(x.reshape(batch, heads, group * length, features), spec, fill)
    return cut.reshape(batch, spec.heads, spec.cols, features)


def position_columns(request: Request, spec: Spec) -> Int32[Array, "B chunks lanes"]:
    """The positions of the queries, column by column."""
    return _vectors(_cut(common.query_positions(request)[..., None], spec, -1)[..., 0], spec)


def _cut(x: Shaped[Array, "*lead M F"], spec: Spec, fill: float) -> Shaped[Array, "*lead chunks cols F"]:
    """The columns cut into chunks."""
    *lead, count, features = x.shape
    padding = [*((0, 0) for _ in lead), (0, spec.chunks * spec.cols - count), (0, 0)]
    return jnp.pad(x, padding, constant_values=fill).reshape(*lead, spec.chunks, spec.cols, features)


def _vectors(x: Shaped[Array, "*lead cols"], spec: Spec) -> Shaped[Array, "*lead lanes"]:
    """Vectors over columns, as long as a copy needs them."""
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, spec.lanes - spec.cols),))


def _split(
    query: Float[Array, "B heads cols H"], spec: Spec
) -> tuple[Float[Array, "parts B heads cols H"], Float32[Array, "B heads cols"] | None]:
    """Parts that sum up to the query, and, if there is one, the factor taken out of it."""
    factor, wide = None, spec.wide
    if spec.factor:
        # float16 has neither the range of bfloat16 nor of float32. A power of two changes no digit.
        largest = jnp.max(jnp.abs(query.astype(jnp.float32)), axis=-1)
        exponent = jnp.clip(jnp.frexp(largest)[1] - FLOAT16_EXPONENT, -126, 127)
        factor = jnp.ldexp(jnp.float32(1), jnp.where(jnp.isfinite(largest) & (largest > 0), exponent, 0))
        query = query.astype(jnp.float32) / factor[..., None]
    if spec.parts == 1:
        return query.astype(wide)[None], factor
    rest, found = query.astype(jnp.float32), []
    for _ in range(spec.parts):
        # `reduce_precision` is never optimised away, two casts in a row may be.
        info = jnp.finfo(wide)
        piece = jax.lax.reduce_precision(rest, info.nexp, info.nmant)
        found.append(piece.astype(wide))
        rest = rest - piece
    return jnp.stack(found), factor


def _sums(query: Float[Array, "parts B heads cols H"], spec: Spec) -> Float32[Array, "B heads groups cols"]:
    """Sums of the query over the groups of channels, to go with the minima."""
    size = spec.format.group_size
    total = jnp.sum(query.astype(jnp.float32), axis=0)
    groups = math.ceil(spec.key_features / size)
    total = jnp.pad(total, ((0, 0), (0, 0), (0, 0), (0, groups * size - spec.key_features)))
    return jnp.sum(total.reshape(*total.shape[:3], groups, size), axis=-1).swapaxes(2, 3)
