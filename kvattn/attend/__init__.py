"""How a cache is read: one entry, one argument list for every implementation."""

from kvattn.attend.state import merge_states as merge_states
from kvattn.attend.step import cached_attention as cached_attention

__all__ = [
    "cached_attention",
    "merge_states",
]
