"""Merges the partial states that programs left behind, one block per query."""

from collections.abc import Mapping
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from kvattn import _manual
from kvattn._typing import Array
from kvattn.pallas.gpu_spec import F32, Spec
from kvattn.pallas.gpu_tile import TOKENS, spread, store
from kvattn.pallas.gpu_walk import rows_at

AT_ONCE = 4
"""States fetched at a time: their loads overlap."""


def merge(
    spec: Spec, interpret: Any, arrays: Mapping[str, Array], states: Mapping[str, Array], dtype: DTypeLike = F32
) -> tuple[Array, Array]:
    """Merges states.

    Args:
        spec: the sizes.
        interpret: of `plgpu.kernel`.
        arrays: those of `Rows`, or "counts" and "at", as `gpu_body.decode` has them.
        states: "out", "top", "total", "first" and "last" as it returns them.
        dtype: of out.

    Returns:
        out [B, T, N, Hv] and lse float32 [B, T, N]; 0 and -inf where there was nothing.
    """
    named = {**arrays, **states}
    shape = (spec.batch, spec.length, spec.query_heads)
    # Registers hold whole multiples of 64 features. Of fewer the copy engine writes what there is; without it XLA cuts.
    by_copy = spec.padded != spec.value_features and not spec.by_threads
    features = spec.value_features if by_copy else spec.padded

    def kvattn_gpu_merge(*refs, line=None):
        """One query: refs of `arrays`, `states`, and the results; [Hv padded] in shared memory if it is copied."""
        memory = dict(zip((*named, "merged", "lse"), refs, strict=True))
        row, t, n = query_of(spec, lax.axis_index("query"))
        segment, column = column_of(spec, row, t, n)
        # Of a segment without tiles nobody wrote anything.
        some = rows_at(spec, memory, row).count > 0
        first = jnp.where(some, memory["first"][segment], 0)
        count = jnp.where(some, memory["last"][segment] - first + 1, 0)

        def step(i, carry):
            """Some more states into maximum [], sum [] and output [Hv padded]."""
            m, l, acc = carry
            loaded = []
            for k in range(AT_ONCE):
                index = i * AT_ONCE + k
                state = segment + first + lax.min(index, count - 1)
                # Past the last state the last one is loaded again, and weighs nothing, infinite as it may be.
                is_one = index < count
                top = memory["top"][state, column] + jnp.where(is_one, 0.0, -jnp.inf)
                out = plgpu.load(memory["out"].at[state, column], layout=TOKENS, optimized=False)
                out = jnp.where(spread(is_one, out.shape, ()), out, 0.0)
                loaded.append((top, memory["total"][state, column], out))
            new = m
            for top, _, _ in loaded:
                new = jnp.maximum(new, top)
            shift = jnp.where(new == -jnp.inf, 0.0, new)
            keep = jnp.exp(m - shift)
            l, acc = l * keep, acc * keep
            for top, total, out in loaded:
                weight = jnp.exp(top - shift)
                l, acc = l + total * weight, acc + out * weight
            return new, l, acc

        zeros = plgpu.layout_cast(jnp.zeros((spec.padded,), F32), TOKENS)
        rounds = lax.div(count + (AT_ONCE - 1), AT_ONCE)
        m, l, acc = lax.fori_loop(0, rounds, step, (jnp.float32(-jnp.inf), jnp.float32(0), zeros))
        empty = l == 0.0
        safe = jnp.where(empty, 1.0, l)
        # Of a query that may attend to nothing what others of its row attend to may be NaN.
        out = jnp.where(spread(empty, acc.shape, ()), 0.0, acc / safe).astype(dtype)
        target = memory["merged"].at[row, t, n]
        if line is None:
            store(target, out)
        else:
            line[...] = out
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(line.at[pl.ds(0, features)], target)
            plgpu.wait_smem_to_gmem(0)
        memory["lse"][row, t, n] = jnp.where(empty, -jnp.inf, jnp.log(safe) + m)

    merge_all = plgpu.kernel(
        kvattn_gpu_merge,
        out_type=(_manual.result((*shape, features), dtype, named), _manual.result(shape, F32, named)),
        scratch_types={"line": plgpu.SMEM((spec.padded,), dtype)} if by_copy else {},
        grid=(spec.batch * spec.length * spec.query_heads,),
        grid_names=("query",),
        interpret=interpret,
    )
    out, lse = merge_all(*named.values())
    return out[..., : spec.value_features], lse


def query_of(spec: Spec, i: Array) -> tuple[Array, Array, Array]:
    """Row, new token and head of query i of [B, T, N]; all int32 []."""
    rest, n = lax.div(i, spec.query_heads), lax.rem(i, spec.query_heads)
    return lax.div(rest, spec.length), lax.rem(rest, spec.length), n


def column_of(spec: Spec, row: Array, t: Array, n: Array) -> tuple[Array, Array]:
    """The segment of a query, and its column there; all int32 []."""
    kv_head, in_group = lax.div(n, spec.group), lax.rem(n, spec.group)
    column = in_group * spec.length + t
    chunk = lax.div(column, spec.cols)
    head = kv_head * spec.chunks + chunk
    column = column - chunk * spec.cols
    if spec.as_it_lies:
        column = row * spec.query_heads + n - spec.first_query(row, head)
    return head * spec.batch + row, column
