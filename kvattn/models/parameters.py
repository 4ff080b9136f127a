"""The parameters of a decoder by their names, such as ``layers.0.attention.query.kernel``."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from kvattn.errors import DTypeError


def name_of(keys: tuple[Any, ...]) -> str:
    """The name of a parameter by its path."""
    return ".".join(map(str, keys))


def parameters_of(model: nnx.Module) -> dict[str, Any]:
    """The parameters by name."""
    return {name_of(keys): leaf.get_value() for keys, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def floating(dtype: Any) -> Any:
    """A dtype that parameters can have.

    Raises:
        DTypeError: it is none.
    """
    try:
        found = jnp.dtype(dtype)
    except TypeError as error:
        raise DTypeError(f"dtype must be floating, such as jnp.bfloat16, got {dtype!r}.") from error
    if not jnp.issubdtype(found, jnp.floating):
        raise DTypeError(f"dtype must be floating, got {found}.")
    return found
