"""A mesh, and which of its axes split rows, and what else."""

import dataclasses
import math

import jax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree, Shaped

from kvattn._typing import Array
from kvattn.cache import Cache
from kvattn.cache.host import MEMORY_KIND, is_on_host
from kvattn.errors import ShardingError

MeshAxes = str | tuple[str, ...] | None
"""The mesh axes that split an axis of an array: none, one, or several."""


@dataclasses.dataclass(frozen=True)
class Split:
    """How a cache is split over devices. Hashable.

    Attributes:
        mesh: of Explicit or Auto axes.
        axis: the axis that splits heads, rows or slots.
        data: the axis that splits rows besides; None: there is none.
    """

    mesh: Mesh | AbstractMesh
    axis: str
    data: str | None

    @property
    def size(self) -> int:
        """n, devices along the axis."""
        return self.mesh.shape[self.axis]

    @property
    def num_data(self) -> int:
        """Devices along the data axis."""
        return 1 if self.data is None else self.mesh.shape[self.data]

    @property
    def rows(self) -> str | tuple[str, str]:
        """The axes that split rows both ways."""
        return self.axis if self.data is None else (self.data, self.axis)

    @property
    def is_explicit(self) -> bool:
        """Whether arrays carry their placement in their types."""
        return AxisType.Explicit in self.mesh.axis_types

    @property
    def own_axes(self) -> frozenset[str]:
        """The axes of the mesh that no `jax.shard_map` around has."""
        return frozenset(self.mesh.axis_names) - set(self.mesh.manual_axes)

    def check_rows(self, batch_size: int, shards: int, advice: str) -> None:
        """Raises `ShardingError` where the rows do not divide."""
        if batch_size % shards:
            axes = self.rows if shards > self.num_data else self.data
            raise ShardingError(f"{batch_size} rows do not divide over {shards} devices (mesh axes {axes!r}): {advice}")

    def named(self, spec: PartitionSpec, ndim: int) -> NamedSharding:
        """The sharding of an array, written as compiled steps write that of their results.

        Equal shardings in other words are others to the cache of compiled programs: the second step would be looked up,
        or traced, again. Explicit axes: an entry for every axis. Auto: none at the end that is None, and no mesh axis
        of one device.
        """
        entries = [*spec, *[None] * (ndim - len(spec))]
        if not self.is_explicit:
            split = [tuple(n for n in names(entry) if self.mesh.shape[n] > 1) for entry in entries]
            entries = [axes[0] if len(axes) == 1 else axes or None for axes in split]
            while entries and entries[-1] is None:
                entries.pop()
        return NamedSharding(self.mesh, PartitionSpec(*entries))

    def put[T](self, tree: T, specs: PyTree) -> T:
        """The tree with every leaf where its spec says."""

        def one(x: Shaped[Array, "*shape"], spec: PartitionSpec) -> Shaped[Array, "*shape"]:
            sharding = self.named(spec, x.ndim)
            if is_on_host(x):
                sharding = sharding.with_memory_kind(MEMORY_KIND)
            if not isinstance(x, Tracer):
                return jax.device_put(x, sharding)
            return jax.reshard(x, sharding) if self.is_explicit else jax.lax.with_sharding_constraint(x, sharding)

        return jax.tree.map(one, tree, specs)

    def check_mesh(self, what: str, tree: PyTree) -> None:
        """Raises `ShardingError` for arrays that are known to be split over another mesh."""
        for leaf in jax.tree.leaves(tree):
            other = _mesh_of(leaf)
            if other is not None and not self._is(other):
                raise ShardingError(
                    f"{what} lies on {_described(other)}, not on {_described(self.mesh)}: call "
                    "kvattn.sharding.shard_cache(cache, mesh) with the mesh of the step, or pass the cache's."
                )

    def _is(self, other: Mesh | AbstractMesh) -> bool:
        if isinstance(other, Mesh) and isinstance(self.mesh, Mesh):
            return other == self.mesh
        return _alike(other, self.mesh)


def split_over(mesh: object, axis: str, data_axis: str | None) -> Split:
    """Checks a mesh and the names of its axes.

    Raises:
        ShardingError: an axis that the mesh does not have, axes of several types, a call inside `jax.shard_map`.
    """
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise ShardingError(f"mesh must be a jax.sharding.Mesh such as jax.make_mesh returns, got {mesh!r}.")
    if axis not in mesh.axis_names:
        raise ShardingError(
            f"the mesh has no axis {axis!r}; it has {', '.join(map(repr, mesh.axis_names))}: name one of them as axis."
        )
    mesh = _here(mesh)
    if axis == data_axis:
        data_axis = None
    if axis in mesh.manual_axes or axis in jax.sharding.get_abstract_mesh().manual_axes:
        raise ShardingError(
            f"the axis {axis!r} is jax.shard_map's here: call kvattn.cached_attention on each device's part instead."
        )
    if len(set(mesh.axis_types) - {AxisType.Manual}) > 1:
        raise ShardingError(f"the axes of the mesh are of types {mesh.axis_types}: make all Explicit, or all Auto.")
    return Split(mesh, axis, data_axis if data_axis in mesh.axis_names and data_axis not in mesh.manual_axes else None)


def _here(mesh: Mesh | AbstractMesh) -> Mesh | AbstractMesh:
    """The mesh as it is inside a `jax.shard_map` over some of its axes, which arrays there have in their types."""
    context = jax.sharding.get_abstract_mesh()
    return context if context.manual_axes and _alike(context, mesh) else mesh


def specs_of[C: Cache](cache: C, **mesh_axes: MeshAxes) -> C:
    """The cache's tree of placements.

    Args:
        cache: any cache, or its shapes.
        **mesh_axes: by the names of the cache's own axes (`kvattn.cache.axes`) the axes of the mesh that split them.
    """
    return jax.tree.map(lambda axes: PartitionSpec(*map(mesh_axes.get, axes.split())), cache.axes)


def names(entry: MeshAxes) -> tuple[str, ...]:
    """The mesh axes that an entry of a spec names."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def _alike(one: Mesh | AbstractMesh, other: Mesh | AbstractMesh) -> bool:
    return one.axis_names == other.axis_names and one.axis_sizes == other.axis_sizes


def _mesh_of(x: object) -> Mesh | AbstractMesh | None:
    """The mesh of several devices an array is known to lie on."""
    sharding = jax.typeof(x).sharding if isinstance(x, Tracer) else getattr(x, "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    return None if mesh is None or mesh.empty or math.prod(mesh.axis_sizes) == 1 else mesh


def _described(mesh: Mesh | AbstractMesh) -> str:
    axes = ", ".join(f"{name}: {size}" for name, size in zip(mesh.axis_names, mesh.axis_sizes, strict=True))
    return f"the mesh ({axes})"
