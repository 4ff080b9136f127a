"""Flax attention layers. NNX here; the Linen twins are in `kvattn.layers.linen`, which loads on first use."""

import importlib
from typing import TYPE_CHECKING, Any

from kvattn.layers.attention import MultiHeadAttention
from kvattn.layers.attention_fn import dot_product_attention
from kvattn.layers.functional import stateless
from kvattn.layers.latent_attention import MultiHeadLatentAttention
from kvattn.layers.variants import GroupedQueryAttention, MultiQueryAttention, SlidingWindowAttention

if TYPE_CHECKING:
    from kvattn.layers import linen

__all__ = [
    "GroupedQueryAttention",
    "MultiHeadAttention",
    "MultiHeadLatentAttention",
    "MultiQueryAttention",
    "SlidingWindowAttention",
    "dot_product_attention",
    "linen",
    "stateless",
]


def __getattr__(name: str) -> Any:
    if name == "linen":
        return importlib.import_module("kvattn.layers.linen")
    raise AttributeError(f"module 'kvattn.layers' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
