"""Where the parameters of a decoder lie on a mesh: by heads, and by the hidden size of the MLP."""

import dataclasses
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from kvattn.layers.placement import axis_size, explicit_spec
from kvattn.models.parameters import name_of


@dataclasses.dataclass(frozen=True)
class Split:
    """A mesh, and which of its axes splits a decoder.

    Attributes:
        mesh: a `jax.sharding.Mesh`; None: one device.
        by: how caches are split, as in `kvattn.layers.MultiHeadAttention`.
        axis: the mesh axis.
    """

    mesh: Any = None
    by: str = "auto"
    axis: str = "model"

    def __post_init__(self) -> None:
        if self.mesh is not None:
            axis_size(self.mesh, self.axis)

    @property
    def of_layer(self) -> dict[str, Any]:
        """The arguments of an attention layer."""
        return {"mesh": self.mesh, "by": self.by, "axis": self.axis}

    def rows(self, x: jax.Array) -> jax.Array:
        """[B, ...] on an Explicit mesh with rows split over its axis "data", as those of caches are."""
        if self.mesh is None or explicit_spec(x) is None or "data" not in self.mesh.axis_names or self.axis == "data":
            return x
        return x if x.shape[0] % self.mesh.shape["data"] else jax.reshard(x, NamedSharding(self.mesh, PartitionSpec("data")))

    def along(self, shape: tuple[int, ...], place: int | None) -> dict[str, Any]:
        """The metadata of a parameter that is split along one of its axes, where that divides; None: whole."""
        if self.mesh is None:
            return {}
        if place is None or shape[place] % axis_size(self.mesh, self.axis):
            return {"out_sharding": PartitionSpec(), "mesh": self.mesh}
        entries = (self.axis if i == place else None for i in range(len(shape)))
        return {"out_sharding": PartitionSpec(*entries), "mesh": self.mesh}


def shardings(model: nnx.Module, mesh: Any) -> dict[str, Sharding | None]:
    """The sharding of each parameter by its name, as its metadata says; None for each where there is no mesh."""
    places: dict[str, Sharding | None] = {}
    for keys, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        spec = leaf.get_metadata().get("out_sharding", PartitionSpec())
        places[name_of(keys)] = None if mesh is None else NamedSharding(mesh, spec)
    return places
