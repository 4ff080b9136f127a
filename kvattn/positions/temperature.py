"""Queries that grow with their position, so that attention over many tokens does not flatten."""

import dataclasses

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from kvattn import _checks
from kvattn._typing import Array
from kvattn.errors import RangeError


@dataclasses.dataclass(frozen=True)
class Temperature:
    r"""Llama 4's temperature: the query at position p is multiplied by a factor that grows with it.

    .. math:: 1 + \text{scale} \cdot \ln(1 + \lfloor (p + 1) / \text{floor} \rfloor)

    Llama 4 has it in layers without RoPE, after Scalable-Softmax (https://arxiv.org/abs/2501.19399). Frozen and
    hashable. Positions are true ones, whatever the policy of a cache.

    Args:
        floor: positions of a step of the factor: the first ``floor - 1`` tokens are multiplied by 1.
        scale: how fast it grows.

    Raises:
        RangeError: a floor below 1, a negative scale.
        DTypeError: no numbers.

    Example:
        >>> [f"{x:.3f}" for x in Temperature(floor=2, scale=1.0)(jnp.arange(4)).tolist()]
        ['1.000', '1.693', '1.693', '2.099']
    """

    floor: float = 8192
    scale: float = 0.1

    def __post_init__(self) -> None:
        for name, check in (("floor", _checks.positive), ("scale", _checks.non_negative)):
            object.__setattr__(self, name, float(check(name, getattr(self, name))))
        if self.floor < 1:
            raise RangeError(f"floor must be at least 1, got {self.floor}.")

    def __call__(self, positions: Int[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
        """The factor float32 of a query at each position."""
        steps = jnp.floor((jnp.asarray(positions).astype(jnp.float32) + 1) / self.floor)
        return jnp.log1p(jnp.maximum(steps, 0)) * self.scale + 1

    def warmed(self, query: Float[Array, "*BT N H"], positions: Int[Array, "*shape"]) -> Float[Array, "*BT N H"]:
        """Queries at these positions, of each row or of all, multiplied in float32 at least."""
        wide = jnp.float64 if query.dtype == jnp.float64 else jnp.float32
        factor = self(positions).astype(wide)
        factor = factor.reshape((1,) * (query.ndim - 2 - factor.ndim) + (*factor.shape, 1, 1))
        return (query.astype(wide) * factor).astype(query.dtype)
