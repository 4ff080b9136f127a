"""ALiBi: scores that fall with distance, instead of rotated keys."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from kvattn import _checks


def alibi_slopes(num_heads: int) -> Float32[jax.Array, " N"]:
    """ALiBi's slope of each head.

    For N a power of two, head n has ``2 ** (-8 * (n + 1) / N)``. Otherwise the slopes of the power of
    two below N are followed by every second slope of the power above (as in the paper's code and BLOOM).

    The score of a query and a key gets ``slope * (key_position - query_position)``: 0 for the token
    itself, ever more negative for the past. (https://arxiv.org/abs/2108.12409.)

    Args:
        num_heads: N, the number of query heads.

    Raises:
        ConfigError: N < 1.
        DTypeError: N is no int.

    Example:
        >>> alibi_slopes(4).tolist()
        [0.25, 0.0625, 0.015625, 0.00390625]
    """
    num_heads = _checks.integer("num_heads", num_heads, 1)
    power = 1 << (num_heads.bit_length() - 1)

    def of_power(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

    slopes = of_power(power) + of_power(2 * power)[0::2][: num_heads - power]
    return jnp.asarray(np.array(slopes, np.float32))
