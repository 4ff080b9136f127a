"""The memory manager: who holds which page, which pages hold which text, where they go, how large a pool must be."""

from kvattn.cache import with_tables as with_tables
from kvattn.serving.blocks import BlockPool as BlockPool
from kvattn.serving.disk import DiskTier as DiskTier
from kvattn.serving.groups import GroupedPool as GroupedPool
from kvattn.serving.groups import LayerGroup as LayerGroup
from kvattn.serving.kinds import ArraySpec as ArraySpec
from kvattn.serving.kinds import Kind as Kind
from kvattn.serving.radix import Match as Match
from kvattn.serving.radix import RadixTree as RadixTree
from kvattn.serving.records import PageName as PageName
from kvattn.serving.records import Record as Record
from kvattn.serving.records import page_names as page_names
from kvattn.serving.replay import Replay as Replay
from kvattn.serving.replay import knee as knee
from kvattn.serving.replay import replay as replay
from kvattn.serving.stack import Tiers as Tiers
from kvattn.serving.tiers import HostTier as HostTier
from kvattn.serving.tiers import Tier as Tier
from kvattn.serving.tiers import TierCounters as TierCounters
from kvattn.serving.trace import TraceRequest as TraceRequest
from kvattn.serving.trace import read_trace as read_trace
from kvattn.serving.usage import Usage as Usage

__all__ = [
    "ArraySpec",
    "BlockPool",
    "DiskTier",
    "GroupedPool",
    "HostTier",
    "Kind",
    "LayerGroup",
    "Match",
    "PageName",
    "RadixTree",
    "Record",
    "Replay",
    "Tier",
    "TierCounters",
    "Tiers",
    "TraceRequest",
    "Usage",
    "knee",
    "page_names",
    "read_trace",
    "replay",
    "with_tables",
]
