"""Positions: rotary embeddings (RoPE) with their long-context scalings, and ALiBi's slopes.

Notation as everywhere: B batch, T tokens, N heads, H head dim. A position is an int32: how many
tokens of the sequence came before. Nothing here knows about caches, masks or layers.
"""

from kvattn.positions.alibi import alibi_slopes
from kvattn.positions.phases import PHASE_ERROR
from kvattn.positions.rope import RoPE

__all__ = ["PHASE_ERROR", "RoPE", "alibi_slopes"]
