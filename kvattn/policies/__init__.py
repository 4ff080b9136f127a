"""Which tokens are kept. One file per policy; none knows a cache class, a codec or a mesh."""

from kvattn.policies.base import NOWHERE as NOWHERE
from kvattn.policies.base import Context as Context
from kvattn.policies.base import Policy as Policy
from kvattn.policies.fastgen import FastGen as FastGen
from kvattn.policies.full import Full as Full
from kvattn.policies.h2o import H2O as H2O
from kvattn.policies.scissorhands import Scissorhands as Scissorhands
from kvattn.policies.streaming import StreamingLLM as StreamingLLM
from kvattn.policies.window import SlidingWindow as SlidingWindow

__all__ = [
    "ALL",
    "H2O",
    "NOWHERE",
    "Context",
    "FastGen",
    "Full",
    "Policy",
    "Scissorhands",
    "SlidingWindow",
    "StreamingLLM",
]

ALL = (Full, SlidingWindow, StreamingLLM, H2O, Scissorhands, FastGen)
"""Every policy, for the shared test suite."""
