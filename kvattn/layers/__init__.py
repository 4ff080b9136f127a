"""Flax attention layers. NNX here; the Linen twins are in `kvattn.layers.linen`."""

from kvattn.layers.attention import (
    GroupedQueryAttention,
    MultiHeadAttention,
    MultiQueryAttention,
    SlidingWindowAttention,
)
from kvattn.layers.attention_fn import dot_product_attention

__all__ = [
    "GroupedQueryAttention",
    "MultiHeadAttention",
    "MultiQueryAttention",
    "SlidingWindowAttention",
    "dot_product_attention",
]
