"""`Full`: keep every token."""

import dataclasses

import jax.numpy as jnp

from kvattn._typing import Array
from kvattn.policies.base import Policy, State


@dataclasses.dataclass(frozen=True)
class Full(Policy):
    """Keeps every token, in the order it came: slot s holds the token of position s.

    A cache under this policy needs a capacity. Appending past it drops the whole chunk of that row
    and is an error (`CapacityError`).
    """

    def kept(self, state: State, lengths: Array, num_slots: int) -> Array:
        """int32 [B]: tokens kept, all that were seen."""
        del state, num_slots
        return jnp.asarray(lengths)
