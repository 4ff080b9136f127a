"""The step under an Explicit mesh: each device does its own rows and heads.

Rows and key/value heads do not depend on each other, so a step whose arrays are split by them needs
no communication at all. Explicit sharding refuses the scatter and the loop of the step all the same;
`jax.shard_map` over exactly the axes that the arguments are split by says what is meant. Arrays on
Auto meshes need nothing: there the compiler splits the step.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from kvattn._typing import Array
from kvattn.cache import Cache, PagedKVCache
from kvattn.errors import ShardingError


def by_shard[C: Cache](
    step: Callable[..., tuple[Array, C]],
    query: Array,
    key: Array | None,
    value: Array | None,
    cache: C,
    given: Array,
    bad_count: Array,
    sinks: Array | None,
    alibi_slopes: Array | None,
    token_ids: Array | None,
) -> tuple[Array, C]:
    """Runs `step` on these arguments, once per shard where they lie on an Explicit mesh.

    Rows split as those of `query`, heads as those of `key` and `query`. The cache is brought to that placement,
    so one that was created without sharding takes it on at the first step.

    Raises:
        ShardingError: query heads are split and the key/value heads cannot be.
    """
    args = (query, key, value, cache, given, bad_count, sinks, alibi_slopes, token_ids)
    leaf, row_axis, head_axis = next(iter(cache.keys.values())), 1, 2
    if isinstance(cache, PagedKVCache):
        row_axis, head_axis = None, 0
    mesh, rows, q_heads = _placement(query, 0, 2)
    if mesh is None:
        mesh, rows, _ = _placement(leaf, row_axis, head_axis)
        if mesh is None:
            return step(*args)
    kv_heads = _axes(leaf, head_axis) if key is None else _axes(key, 2)
    shards = _size(mesh, q_heads)
    num_kv_heads = cache.num_kv_heads
    if q_heads != kv_heads and num_kv_heads > 1:
        if num_kv_heads % shards:
            raise ShardingError(
                f"the {query.shape[2]} query heads are split over {shards} devices (axes {q_heads}), which the "
                f"{num_kv_heads} key/value heads do not divide into: split the rows of the batch instead, or "
                "replicate the query heads."
            )
        kv_heads = q_heads
    if num_kv_heads == 1:
        kv_heads = None

    tokens = P(rows, None, kv_heads, None)
    if isinstance(cache, PagedKVCache) and rows is not None:
        raise ShardingError(
            f"the rows of the queries are split over {rows}, but the sequences of a PagedKVCache share one pool: "
            "split by heads, or give every device pages of its own (kvattn.sharding.cached_attention)."
        )
    cache_specs = specs_of(cache, rows, kv_heads)
    q_spec = P(rows, None, q_heads, None)
    specs = (
        q_spec,
        None if key is None else tokens,
        None if value is None else tokens,
        cache_specs,
        P(rows),
        P(rows),
        None if sinks is None else P(q_heads),
        None if alibi_slopes is None else P(q_heads),
        None if token_ids is None else P(rows),
    )
    args = jax.tree.map(lambda x, spec: jax.reshard(x, jax.NamedSharding(mesh, spec)), args, specs)
    # Unchecked: NaN in one head marks the rows of its device only (`kvattn.cache.status`), with no word to the others.
    mapped = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=(q_spec, cache_specs), check_vma=False)
    return mapped(*args)


def specs_of(cache: Cache, rows: Any, kv_heads: Any, slots: Any = None, pages: Any = None) -> Any:
    """The cache's tree of placements.

    Args:
        cache: any cache.
        rows: mesh axes (None, a name, several) that split the sequences.
        kv_heads: those that split the key/value heads.
        slots: those that split the slots of a block of a `KVCache`.
        pages: those that split the pool of a `PagedKVCache`.
    """
    specs: Any = jax.tree.map(lambda _: P(rows), cache)
    if isinstance(cache, PagedKVCache):
        store = lambda tree: {n: P(None, rows, kv_heads) if n == "residual" else P(kv_heads, pages) for n in tree}
        return dataclasses.replace(specs, keys=store(cache.keys), values=store(cache.values))

    def blocks(role: Any, name: str) -> P:
        last = cache.codec.transposed(cache.store, role, name)
        return P(None, rows, kv_heads, None, slots) if last else P(None, rows, kv_heads, slots, None)

    state = lambda x: P(rows, kv_heads) if cache.policy.per_head and x.ndim > 1 else P(rows)
    return dataclasses.replace(
        specs,
        keys={n: blocks("keys", n) for n in cache.keys},
        values={n: blocks("values", n) for n in cache.values},
        state=jax.tree.map(state, cache.state),
    )


def _placement(x: Array, row_axis: int | None, head_axis: int) -> tuple[Any, Any, Any]:
    """The Explicit mesh of an array and the axes its rows and heads are split by; (None, ...) if there is none."""
    sharding = jax.typeof(x).sharding
    mesh = sharding.mesh
    if mesh.empty or not mesh.are_all_axes_explicit or all(axes is None for axes in sharding.spec):
        return None, None, None
    return mesh, _axes(x, row_axis), _axes(x, head_axis)


def _axes(x: Array, axis: int | None) -> Any:
    spec = jax.typeof(x).sharding.spec
    return None if axis is None or axis >= len(spec) else spec[axis]


def _size(mesh: Any, axes: Any) -> int:
    size = 1
    for axis in (axes,) if isinstance(axes, str) else axes or ():
        size *= mesh.shape[axis]
    return size
