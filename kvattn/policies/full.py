"""`Full`: keep every token."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Int32

from kvattn._typing import Array, Lengths
from kvattn.policies.base import Policy, State
from kvattn.policies.registry import register


@dataclasses.dataclass(frozen=True)
class Full(Policy):
    """Keeps every token, in the order it came: slot s holds the token of position s.

    A cache under this policy needs a capacity. Appending past it drops the whole chunk of that row
    and is an error (`CapacityError`).
    """

    in_order: ClassVar[bool] = True

    def kept(self, state: State, lengths: Lengths, num_slots: int) -> Int32[Array, " B"]:
        """Tokens kept, all that were seen."""
        return jnp.asarray(lengths)


register(Full, "full", examples=[Full()])
