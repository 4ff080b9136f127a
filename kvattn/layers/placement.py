"""Where the results of a layer's matrix products lie on a mesh of Explicit axes.

In an Explicit mesh JAX refuses a product that contracts a split axis unless the call says how the
result is split. The answer is nearly always the same (the batch as the input has it, the features
as the kernel has them), so the layers work it out where the caller says nothing. On one device, or
in an Auto mesh, every function here returns None.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from kvattn._typing import Array
from kvattn.errors import ShardingError


def explicit_spec(x: Any) -> PartitionSpec | None:
    """How `x` is split over Explicit mesh axes, one entry per axis of `x`; None outside such a mesh."""
    sharding = jax.typeof(x).sharding
    if sharding.mesh.empty or not sharding.mesh.are_all_axes_explicit:
        return None
    return PartitionSpec(*sharding.spec, *(None,) * (x.ndim - len(sharding.spec)))


def product_spec(inputs: Array, kernel: Array, num_contracted: int) -> PartitionSpec | None:
    """How ``inputs [..., *in] @ kernel [*in, *out]`` should be split; None when JAX infers it alone."""
    left, right = explicit_spec(inputs), explicit_spec(kernel)
    if left is None or right is None:
        return None
    batch, features = tuple(left[: inputs.ndim - num_contracted]), tuple(right[num_contracted:])
    taken = {name for entry in batch for name in _names(entry)}
    clash = any(name in taken for entry in features for name in _names(entry))
    contracted = tuple(left[inputs.ndim - num_contracted :]) + tuple(right[:num_contracted])
    if not clash and not any(entry is not None for entry in contracted):
        return None
    return PartitionSpec(*batch, *(None if taken.intersection(_names(entry)) else entry for entry in features))


def beside(query: Array, key: Array, value: Array) -> tuple[Array, Array]:
    """Splits key and value [B, S, K, H] over an Explicit mesh as the query [B, T, N, H] is: rows and heads alike.

    Heads that do not divide are repeated until they do; each device then holds the heads its queries read. One
    key/value head for 32 query heads on 4 devices becomes 4.
    """
    spec = explicit_spec(query)
    if spec is None:
        return key, value
    shards = math.prod(jax.typeof(query).sharding.mesh.shape[name] for name in _names(spec[2]))
    repeats = math.lcm(key.shape[2], shards) // key.shape[2]

    def moved(x: Array) -> Array:
        own = explicit_spec(x)
        if own is None:
            return x
        if repeats > 1:
            x = jnp.repeat(jax.reshard(x, PartitionSpec(spec[0], own[1], None, own[3])), repeats, axis=2)
        return jax.reshard(x, PartitionSpec(spec[0], own[1], spec[2], own[3]))

    return moved(key), moved(value)


def head_axis(kernel: Array) -> Any:
    """The mesh axis over which a key kernel [D, K, H] splits its heads, for the cache to follow; None if whole."""
    spec = explicit_spec(kernel)
    if spec is None and isinstance(kernel, jax.Array) and not isinstance(kernel, Tracer):
        sharding = kernel.sharding
        spec = sharding.spec if isinstance(sharding, NamedSharding) else None
    return spec[-2] if spec is not None and len(spec) == kernel.ndim else None


def cache_metadata(given: Any, kernel: Array, rank: int) -> dict[str, Any]:
    """The `nnx.Cache` metadata that splits a cache [..., L, K, H] as `given`, or as the key kernel splits its heads."""
    mesh = None
    if isinstance(given, NamedSharding):
        given, mesh = given.spec, given.mesh
    if given is None:
        axis = head_axis(kernel)
        if axis is None:
            return {}
        given = PartitionSpec(*(None,) * (rank - 2), axis, None)
    if len(given) > rank:
        raise ShardingError(f"cache_sharding {given} has more entries than the cache has axes ({rank}).")
    if jax.sharding.get_abstract_mesh().empty:
        if mesh is None and not isinstance(kernel, Tracer) and isinstance(kernel.sharding, NamedSharding):
            mesh = kernel.sharding.mesh
        if mesh is None:
            raise ShardingError(
                f"cache_sharding {given} names the axes of no mesh: call inside jax.set_mesh(mesh), "
                "or give a jax.NamedSharding."
            )
        return {"out_sharding": given, "mesh": mesh}
    return {"out_sharding": given}


def like(x: Array, reference: Array) -> Array:
    """Moves `x` to the split of `reference` (same rank); does nothing outside an Explicit mesh."""
    spec = explicit_spec(reference)
    if spec is None or spec == explicit_spec(x):
        return x
    return jax.reshard(x, spec)


def _names(entry: Any) -> tuple[str, ...]:
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)
