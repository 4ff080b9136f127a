"""The parameters of a decoder by their names, such as ``layers.0.attention.query.kernel``."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Shaped

from kvattn._typing import Array
from kvattn.errors import DTypeError


def name_of(keys: tuple[object, ...]) -> str:
    """The name of a parameter by its path."""
    return ".".join(map(str, keys))


def parameters_of(model: nnx.Module) -> dict[str, Any]:
    """The parameters by name; of a model from `nnx.eval_shape`, their shapes and dtypes."""
    return {name_of(keys): leaf.get_value() for keys, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def filled[M: nnx.Module](model: M, parameters: Mapping[str, Shaped[Array, "..."]]) -> M:
    """A model, perhaps one from `nnx.eval_shape`, with these parameters in place of its own."""
    graph, state = nnx.split(model)
    flat = [(keys, leaf.replace(parameters[name_of(keys)])) for keys, leaf in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def floating(dtype: DTypeLike) -> np.dtype:
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
