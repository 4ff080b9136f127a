"""Attention over full sequences, for training, prefill and encoders. No cache here.

`dot_product_attention` mirrors `jax.nn`'s function. `attend` is what layers need beyond it: any number of batch axes,
the weights on request, dropout and einsum overrides. Both share one formula, in `kvattn.attend.full.rows`.
"""

from kvattn.attend.full.dot_product import IMPLEMENTATIONS, dot_product_attention
from kvattn.attend.full.general import attend, check_shapes, flatten

__all__ = ["IMPLEMENTATIONS", "attend", "check_shapes", "dot_product_attention", "flatten"]
