"""Flax attention layers. NNX here; the Linen twins are in `kvattn.layers.linen`."""

from kvattn.layers.attention import MultiHeadAttention
from kvattn.layers.attention_fn import dot_product_attention
from kvattn.layers.functional import stateless
from kvattn.layers.variants import GroupedQueryAttention, MultiQueryAttention, SlidingWindowAttention

__all__ = [
    "GroupedQueryAttention",
    "MultiHeadAttention",
    "MultiQueryAttention",
    "SlidingWindowAttention",
    "dot_product_attention",
    "stateless",
]
