"""The parameters of a decoder by their names, such as ``layers.0.attention.query.kernel``."""

from typing import Any

from flax import nnx


def name_of(keys: tuple[Any, ...]) -> str:
    """The name of a parameter by its path."""
    return ".".join(map(str, keys))


def parameters_of(model: nnx.Module) -> dict[str, Any]:
    """The parameters by name."""
    return {name_of(keys): leaf.get_value() for keys, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}
