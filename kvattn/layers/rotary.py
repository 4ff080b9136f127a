"""What positions do to queries and keys with any number of batch axes: they turn, and queries grow."""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from kvattn._typing import Array
from kvattn.attend.full import flatten
from kvattn.errors import ShapeError
from kvattn.positions import RoPE, Temperature


def rotate(rope: RoPE | None, x: Array, positions: ArrayLike | None) -> Array:
    """Turns queries or keys [..., T, heads, H] to their positions, int [..., T] or [T]; 0, 1, 2, ... if None.

    Raises:
        ShapeError: positions of another shape.
    """
    if rope is None:
        return x
    positions, batch = _positions(x, positions), x.shape[:-3]
    if positions.ndim > 1:
        positions = flatten(positions, batch, 1)
    return rope(flatten(x, batch, 3), positions).reshape(x.shape)


def warm(temperature: Temperature | None, query: Array, positions: ArrayLike | None) -> Array:
    """Queries [..., T, N, H] times the factor of their positions, int [..., T] or [T]; 0, 1, 2, ... if None.

    Raises:
        ShapeError: positions of another shape.
    """
    return query if temperature is None else temperature.warmed(query, _positions(query, positions))


def _positions(x: Float[Array, "*B T N H"], positions: ArrayLike | None) -> Int[Array, "..."]:
    """Those that were given, [..., T] or [T], or 0, 1, ... T - 1."""
    batch, length = x.shape[:-3], x.shape[-3]
    positions = jnp.arange(length, dtype=jnp.int32) if positions is None else jnp.asarray(positions)
    if positions.shape not in ((length,), (*batch, length)):
        raise ShapeError(f"input_positions must be {(*batch, length)} or {(length,)}, got {positions.shape}.")
    return positions
