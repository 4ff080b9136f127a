"""Positions: rotary embeddings (RoPE) with their long-context scalings, ALiBi's slopes, T5's buckets, temperatures.

Notation as everywhere: B batch, T tokens, N heads, H head dim. A position is an int32: how many
tokens of the sequence came before. Nothing here knows about caches, masks or layers.
"""

from kvattn.positions.alibi import alibi_slopes
from kvattn.positions.phases import PHASE_ERROR
from kvattn.positions.relative import RelativeBuckets
from kvattn.positions.rope import RoPE
from kvattn.positions.temperature import Temperature

__all__ = ["PHASE_ERROR", "RelativeBuckets", "RoPE", "Temperature", "alibi_slopes"]
