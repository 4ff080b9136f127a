"""Flax's own attention, bound once and from where it is defined.

People put kvattn in Flax's place by assignment (``nnx.MultiHeadAttention = kvattn.layers.MultiHeadAttention``). What
the layers mean by Flax's must stay Flax's then, so they take it from here and never look it up by its public name.
"""

from flax.linen.attention import dot_product_attention as linen_attention
from flax.nnx.nn import attention as _nnx_attention
from flax.nnx.nn.attention import MultiHeadAttention as NNXAttention
from flax.nnx.nn.attention import dot_product_attention as nnx_attention

__all__ = ["NNXAttention", "attention_with_rope", "linen_attention", "nnx_attention"]

attention_with_rope = getattr(_nnx_attention, "dot_product_attention_with_rope", None)
"""None where this Flax has none yet."""
