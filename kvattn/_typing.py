"""The notation, used everywhere in kvattn.

====  =====================================================================
B     batch: rows, one sequence each
T     query length: the new tokens of a call
S     key/value length: the slots or tokens that are read
N     query heads
K     key/value heads (K = N is MHA, K = 1 is MQA, between them GQA)
G     query heads per key/value head, N // K. Query head n reads head n // G
H     head dim (of queries and keys; values may have their own)
D     model features
C     slots a cache holds
P     pages of a pool
R     rows (tokens) of a page or block
====  =====================================================================

Activations are ``[B, T, N, H]``. Caches lay out their arrays as `kvattn.cache.layout` says.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

Array = jax.Array
AnyArray = jax.Array | np.ndarray
"""Where a function takes NumPy's arrays too."""

Queries = Float[Array, "B T N H"]
Keys = Float[Array, "B T K H"]
Values = Float[Array, "B T K Hv"]
Outputs = Float[Array, "B T N Hv"]
Lengths = Int[Array, " B"]
Rows = Bool[Array, " B"]
Positions = Int[Array, "B T"]

Encoded = Mapping[str, Any]
"""What a codec stores for keys or for values: named arrays that share their leading axes."""
