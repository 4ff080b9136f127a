"""Where the parameters of a decoder lie on a mesh: by heads, and by the hidden size of the MLP."""

from typing import Any

from jax.sharding import NamedSharding, PartitionSpec, Sharding

from kvattn.errors import ShardingError
from kvattn.models.checkpoint import parameters_of

AXIS = "model"

# Which axis of a parameter is split, by the end of its name: heads, and the MLP's hidden size. Experts [E, in, out] are
# split within each expert, so that a token may choose any of them.
_SPLIT = {
    "attention.query.kernel": 1, "attention.key.kernel": 1, "attention.value.kernel": 1, "attention.out.kernel": 0,
    "attention.query.bias": 0, "attention.key.bias": 0, "attention.value.bias": 0, "attention.sinks": 0,
    "mlp.gate.kernel": 1, "mlp.up.kernel": 1, "mlp.down.kernel": 0, "mlp.gate.bias": 0, "mlp.up.bias": 0,
    "mlp.gate": 2, "mlp.up": 2, "mlp.down": 1, "mlp.gate_bias": 1, "mlp.up_bias": 1,
}  # fmt: skip


def shardings(model: Any, mesh: Any) -> dict[str, Sharding | None]:
    """The sharding of each parameter by its name; None for each where there is no mesh.

    Args:
        model: a decoder, of arrays or of their shapes.
        mesh: a `jax.sharding.Mesh`, or None.

    Raises:
        ShardingError: `mesh` is no mesh.
    """
    parameters = parameters_of(model)
    if mesh is None:
        return dict.fromkeys(parameters)
    names = getattr(mesh, "axis_names", ())
    if not names:
        raise ShardingError(f"mesh must be a jax.sharding.Mesh with at least one axis, got {mesh!r}.")
    axis = AXIS if AXIS in names else names[-1]
    return {name: NamedSharding(mesh, _spec(name, x.shape, axis, mesh.shape[axis])) for name, x in parameters.items()}


def _spec(name: str, shape: tuple[int, ...], axis: str, parts: int) -> PartitionSpec:
    split = next((place for end, place in _SPLIT.items() if name.endswith(f".{end}")), None)
    if split is None or shape[split] % parts:
        return PartitionSpec()
    return PartitionSpec(*(axis if i == split else None for i in range(len(shape))))
