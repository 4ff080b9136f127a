"""What pages hold: taken out of the caches of a model, and put back."""

from collections.abc import Iterator, Mapping

import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int32, Shaped

from kvattn._typing import Array
from kvattn.cache import PagedKVCache, groups_of
from kvattn.cache.axes import axis_of
from kvattn.cache.placed import placed, shardings_of

Caches = tuple[PagedKVCache, ...]
Pages = tuple[Int32[Array, " M"], ...]
"""Pages of every group of layers, as many of each."""


def specs(cache: Caches) -> dict[str, tuple[str, tuple[int, ...], str, int]]:
    """The arrays that pages hold, by name: axes in words, shape of one page, dtype and group."""
    found = {}
    for g, group in enumerate(groups_of(cache)):
        layer = cache[group.layers[0]]
        for role, name, axis in _pooled(layer):
            x, words = getattr(layer, role)[name], getattr(layer.axes, role)[name].split()
            shape = (len(group.layers), *x.shape[:axis], *x.shape[axis + 1 :])
            axes = " ".join(["layers", *words[:axis], *words[axis + 1 :]])
            found[f"{g}.{role}.{name}"] = axes, shape, str(x.dtype), g
    return found


def taken(cache: Caches, pages: Pages, mesh: Mesh | AbstractMesh | None) -> dict[str, Shaped[Array, "M L ..."]]:
    """What pages hold, whole on every device of the mesh: by name, L the layers of the group."""
    whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return placed(_taken, (whole,) * len(specs(cache)), cache, pages)


def put_back(cache: Caches, pages: Pages, arrays: Mapping[str, Shaped[Array, "M L ..."]]) -> Caches:
    """Puts back what `taken` gave; negative pages: nothing."""
    return placed(_put_back, shardings_of(cache), cache, pages, arrays)


def _taken(cache: Caches, pages: Pages) -> dict[str, Shaped[Array, "M L ..."]]:
    found = {}
    for g, (group, which) in enumerate(zip(groups_of(cache), pages, strict=True)):
        for role, name, axis in _pooled(cache[group.layers[0]]):
            layers = [getattr(cache[i], role)[name] for i in group.layers]
            each = [jnp.moveaxis(jnp.take(x, which, axis=axis, mode="clip"), axis, 0) for x in layers]
            found[f"{g}.{role}.{name}"] = jnp.stack(each, axis=1)
    return found


def _put_back(cache: Caches, pages: Pages, arrays: Mapping[str, Shaped[Array, "M L ..."]]) -> Caches:
    found = list(cache)
    for g, (group, which) in enumerate(zip(groups_of(cache), pages, strict=True)):
        into = jnp.where(which < 0, group.num_pages, which)
        for n, i in enumerate(group.layers):
            changed = {"keys": dict(cache[i].keys), "values": dict(cache[i].values)}
            for role, name, axis in _pooled(cache[i]):
                new = jnp.moveaxis(arrays[f"{g}.{role}.{name}"][:, n], 0, axis)
                at = (slice(None),) * axis + (into,)
                changed[role][name] = changed[role][name].at[at].set(new, mode="drop")
            found[i] = found[i].replace(**changed)
    return tuple(found)


def _pooled(cache: PagedKVCache) -> Iterator[tuple[str, str, int]]:
    """The arrays of a cache that have pages: keys or values, their name, and which axis the pages are."""
    for role in ("keys", "values"):
        for name, axes in getattr(cache.axes, role).items():
            if (axis := axis_of("pages", axes)) is not None:
                yield role, name, axis
