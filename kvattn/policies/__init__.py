"""Which tokens are kept. One file per policy; none knows a cache class, a codec or a mesh."""

from kvattn.masks import EMPTY as EMPTY
from kvattn.policies.base import NOWHERE as NOWHERE
from kvattn.policies.base import Context as Context
from kvattn.policies.base import Policy as Policy
from kvattn.policies.registry import register as register
from kvattn.policies.registry import registered as registered

# isort: off
# In the order they are listed in.
from kvattn.policies.full import Full as Full
from kvattn.policies.window import SlidingWindow as SlidingWindow
from kvattn.policies.streaming import StreamingLLM as StreamingLLM
from kvattn.policies.h2o import H2O as H2O
from kvattn.policies.scissorhands import Scissorhands as Scissorhands
from kvattn.policies.fastgen import FastGen as FastGen
# isort: on

__all__ = [
    "ALL",
    "EMPTY",
    "H2O",
    "NOWHERE",
    "Context",
    "FastGen",
    "Full",
    "Policy",
    "Scissorhands",
    "SlidingWindow",
    "StreamingLLM",
    "register",
    "registered",
]

ALL = tuple(entry.kind for entry in registered())
"""The package's own policies; `registered` tells a user's too."""
