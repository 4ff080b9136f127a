"""How a cache is read: one entry, one argument list for every implementation."""

from kvattn.attend.state import merge_states as merge_states
from kvattn.attend.step import cached_attention as cached_attention
