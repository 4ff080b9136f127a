"""Gates of what attention puts out (Gated Attention, https://arxiv.org/abs/2505.06708).

What each head has mixed is multiplied by the sigmoid of a projection of the layer's input, number by number
("elementwise") or head by head ("headwise"), before it is projected back to features.
"""

import jax
from jaxtyping import Float

from kvattn._typing import Array
from kvattn.layers import placement


def gate_shape(kind: str, num_heads: int, value_head_dim: int) -> tuple[int, ...]:
    """What the gate's projection puts out for a token."""
    return (num_heads, value_head_dim) if kind == "elementwise" else (num_heads,)


def gated(
    x: Float[Array, "*B T N Hv"], gate: Float[Array, "*B T N Hv"] | Float[Array, "*B T N"]
) -> Float[Array, "*B T N Hv"]:
    """What attention put out, through its gate.

    Args:
        x: of each head.
        gate: of each number or each head, before the sigmoid.
    """
    if gate.ndim < x.ndim:
        gate = gate[..., None]
    return x * jax.nn.sigmoid(placement.like_batch(gate, x)).astype(x.dtype)
