"""Which tokens are kept. One file per policy; none knows a cache class, a codec or a mesh."""

from kvattn.masks import EMPTY
from kvattn.policies.base import NOWHERE, Context, Policy
from kvattn.policies.registry import register, registered

# isort: off
# In the order they are listed in.
from kvattn.policies.full import Full
from kvattn.policies.window import OrderedWindow, SlidingWindow
from kvattn.policies.chunked import Chunked
from kvattn.policies.streaming import StreamingLLM
from kvattn.policies.h2o import H2O
from kvattn.policies.scissorhands import Scissorhands
from kvattn.policies.fastgen import FastGen
# isort: on

__all__ = [
    "ALL", "EMPTY", "H2O", "NOWHERE", "Chunked", "Context", "FastGen", "Full", "OrderedWindow", "Policy", 
    "Scissorhands", "SlidingWindow", "StreamingLLM", "register", "registered",
]  # fmt: skip

ALL = tuple(entry.kind for entry in registered())
"""The package's own policies; `registered` tells a user's too."""
