"""Verbs that pick rows or pages of a cache on a mesh, whose result lies where the cache lay.

Arrays of Explicit axes refuse to be gathered along a split axis unless the call says how the result is split; of Auto
axes the compiler would put the result anywhere.
"""

import functools
import math
from collections.abc import Callable

import jax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree, Shaped

from kvattn import _checks
from kvattn._typing import Array
from kvattn.cache.host import MEMORY_KIND, is_on_host

Shardings = tuple[NamedSharding | None, ...]
"""One for every array of a tree; None: on no mesh, or on Auto axes where nobody can see it."""


def shardings_of(tree: PyTree) -> Shardings:
    """How the arrays of a tree are known to lie."""
    return tuple(_sharding_of(x) for x in jax.tree.leaves(tree))


def _sharding_of(x: object) -> NamedSharding | None:
    sharding = jax.typeof(x).sharding if isinstance(x, Tracer) else getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.empty:
        return None
    mesh = sharding.mesh
    if not mesh.are_all_axes_explicit and (isinstance(x, Tracer) or not mesh.are_all_axes_auto or mesh.size == 1):
        return None
    return sharding.with_memory_kind(MEMORY_KIND) if is_on_host(x) else sharding


def placed[T](call: Callable[..., T], shardings: Shardings, *args: PyTree) -> T:
    """``call(*args)``, its results split as `shardings` say, along the axes that still divide.

    Args:
        call: a function of a module, not one made on the spot: what is compiled for it is kept.
        shardings: of the arrays of its result.
        args: trees of arrays.
    """
    return _run(call, shardings, args) if any(shardings) else call(*args)


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _run(call: Callable[..., PyTree], shardings: Shardings, args: tuple[PyTree, ...]) -> PyTree:
    shapes = jax.eval_shape(call, *jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args))
    leaves, tree = jax.tree.flatten(shapes)
    mesh = next(sharding.mesh for sharding in shardings if sharding is not None)
    specs = [_dividing(x.shape, sharding) for x, sharding in zip(leaves, shardings, strict=True)]
    kinds = [None if sharding is None else sharding.memory_kind for sharding in shardings]
    where = [NamedSharding(mesh, spec, memory_kind=kind) for spec, kind in zip(specs, kinds, strict=True)]
    where = jax.tree.unflatten(tree, where)
    if mesh.are_all_axes_explicit:
        return jax.sharding.auto_axes(call, out_sharding=where)(*args)
    return jax.lax.with_sharding_constraint(call(*args), where)


def _dividing(shape: tuple[int, ...], sharding: NamedSharding | None) -> PartitionSpec:
    """The spec without the mesh axes that an array of this shape does not divide over."""
    if sharding is None:
        return PartitionSpec()

    def parts(entry: str | tuple[str, ...] | None) -> int:
        names = entry if isinstance(entry, tuple) else () if entry is None else (entry,)
        return math.prod(sharding.mesh.shape[name] for name in names)

    return PartitionSpec(*(e if n % parts(e) == 0 else None for n, e in zip(shape, sharding.spec, strict=False)))


def where_it_lay(old: Shaped[Array, "..."], new: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """The new array where the old one lay on a mesh, so that the next step is the program that is compiled."""
    there = _checks.is_concrete(old, new) and isinstance(getattr(old, "sharding", None), NamedSharding)
    return jax.device_put(new, old.sharding) if there else new


def beside(other: Shaped[Array, "..."], new: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """The new array whole on every device of the mesh on which another one lies."""
    sharding = getattr(other, "sharding", None) if _checks.is_concrete(other, new) else None
    return (
        jax.device_put(new, NamedSharding(sharding.mesh, PartitionSpec()))
        if isinstance(sharding, NamedSharding)
        else new
    )
