"""The memory manager: who holds which page, which pages hold which text, how large a pool must be; and the engine.

What an engine is made of (`Engine`, `Request`, `Stats`) computes, and so needs Flax: it is loaded when it is asked for.
The rest needs no JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

from kvattn.cache import with_tables as with_tables
from kvattn.serving.agreement import Agreement as Agreement
from kvattn.serving.blocks import BlockPool as BlockPool
from kvattn.serving.disk import DiskTier as DiskTier
from kvattn.serving.groups import GroupedPool as GroupedPool
from kvattn.serving.groups import LayerGroup as LayerGroup
from kvattn.serving.hosts import Hosts as Hosts
from kvattn.serving.kinds import ArraySpec as ArraySpec
from kvattn.serving.kinds import Kind as Kind
from kvattn.serving.ledger import Ledger as Ledger
from kvattn.serving.radix import Match as Match
from kvattn.serving.radix import RadixTree as RadixTree
from kvattn.serving.records import PageName as PageName
from kvattn.serving.records import Record as Record
from kvattn.serving.records import page_names as page_names
from kvattn.serving.replay import Replay as Replay
from kvattn.serving.replay import knee as knee
from kvattn.serving.replay import replay as replay
from kvattn.serving.sharing import SharedLevel as SharedLevel
from kvattn.serving.sharing import shared_prefixes as shared_prefixes
from kvattn.serving.sharing import sharing_shapes as sharing_shapes
from kvattn.serving.sharing import tokens_read as tokens_read
from kvattn.serving.stack import Tiers as Tiers
from kvattn.serving.tiers import HostTier as HostTier
from kvattn.serving.tiers import Tier as Tier
from kvattn.serving.tiers import TierCounters as TierCounters
from kvattn.serving.trace import TraceRequest as TraceRequest
from kvattn.serving.trace import read_trace as read_trace
from kvattn.serving.usage import Usage as Usage

if TYPE_CHECKING:
    from kvattn.serving.engine import Engine as Engine
    from kvattn.serving.request import Request as Request
    from kvattn.serving.stats import Stats as Stats

__all__ = [
    "Agreement",
    "ArraySpec",
    "BlockPool",
    "DiskTier",
    "Engine",
    "GroupedPool",
    "HostTier",
    "Hosts",
    "Kind",
    "LayerGroup",
    "Ledger",
    "Match",
    "PageName",
    "RadixTree",
    "Record",
    "Replay",
    "Request",
    "SharedLevel",
    "Stats",
    "Tier",
    "TierCounters",
    "Tiers",
    "TraceRequest",
    "Usage",
    "knee",
    "page_names",
    "read_trace",
    "replay",
    "shared_prefixes",
    "sharing_shapes",
    "tokens_read",
    "with_tables",
]

_ON_FIRST_USE = {"Engine": "engine", "Stats": "stats", "Request": "request"}


def __getattr__(name: str) -> Any:
    if name in _ON_FIRST_USE:
        return getattr(importlib.import_module(f"kvattn.serving.{_ON_FIRST_USE[name]}"), name)
    raise AttributeError(f"module 'kvattn.serving' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
