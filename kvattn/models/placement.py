"""Where the parameters of a decoder lie on a mesh: by heads, and by the hidden size of the MLP."""

import dataclasses
from typing import TypedDict

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import PyTree, Shaped

from kvattn._typing import Array
from kvattn.layers.arguments import scheme
from kvattn.layers.placement import axis_size, explicit_spec
from kvattn.models.parameters import name_of
from kvattn.sharding.split import split_over


class Metadata(TypedDict, total=False):
    """What Flax keeps beside a parameter: where it lies."""

    out_sharding: PartitionSpec
    mesh: Mesh | AbstractMesh


@dataclasses.dataclass(frozen=True)
class Split:
    """A mesh, and which of its axes splits a decoder.

    Attributes:
        mesh: a `jax.sharding.Mesh`; None: one device.
        by: how caches are split, as in `kvattn.layers.MultiHeadAttention`.
        axis: the mesh axis.
    """

    mesh: Mesh | AbstractMesh | None = None
    by: str = "auto"
    axis: str = "model"

    def __post_init__(self) -> None:
        scheme(self.by)
        if self.mesh is not None:
            axis_size(self.mesh, self.axis)

    def rows(self, x: Shaped[Array, "B ..."], cached: bool) -> Shaped[Array, "B ..."]:
        """`x` on the mesh, if its axes are Explicit: with a cache over "data" as its rows are, else as it was.

        Whatever the current mesh is, its type then names this one, which the transposes of products go by.
        """
        if self.mesh is None or not self.mesh.are_all_axes_explicit:
            return x
        spec = explicit_spec(x)
        rows = None if spec is None else spec[0]
        if cached and self.axis != "data" and x.shape[0] % dict(self.mesh.shape).get("data", x.shape[0] + 1) == 0:
            rows = "data"
        return jax.reshard(x, NamedSharding(self.mesh, PartitionSpec(rows)))

    def whole(self, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """`x` on every device of the mesh: what a host reads must be whole in each of several processes."""
        if self.mesh is None:
            return x
        sharding = NamedSharding(self.mesh, PartitionSpec())
        if self.mesh.are_all_axes_explicit:
            return jax.reshard(x, sharding)
        return jax.lax.with_sharding_constraint(x, sharding)

    def place(self, tree: PyTree) -> PyTree:
        """Arrays of the host on every device of the mesh, with the sharding that `whole` gives."""
        if self.mesh is None:
            return jax.tree.map(jnp.asarray, tree)
        place = split_over(self.mesh, self.axis, None)
        return jax.tree.map(lambda x: jax.device_put(x, place.named(PartitionSpec(), x.ndim)), tree)

    def along(self, shape: tuple[int, ...], place: int | None) -> Metadata:
        """The metadata of a parameter that is split along one of its axes, where that divides; None: whole."""
        if self.mesh is None:
            return {}
        if place is None or shape[place] % axis_size(self.mesh, self.axis):
            return {"out_sharding": PartitionSpec(), "mesh": self.mesh}
        entries = (self.axis if i == place else None for i in range(len(shape)))
        return {"out_sharding": PartitionSpec(*entries), "mesh": self.mesh}


def shardings(model: nnx.Module, mesh: Mesh | AbstractMesh | None) -> dict[str, Sharding | None]:
    """The sharding of each parameter by its name, as its metadata says; None for each where there is no mesh."""
    places: dict[str, Sharding | None] = {}
    for keys, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        spec = leaf.get_metadata().get("out_sharding", PartitionSpec())
        places[name_of(keys)] = None if mesh is None else NamedSharding(mesh, spec)
    return places
