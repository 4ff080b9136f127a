"""The memory manager: who holds which page, which pages hold which text, and how large a pool must be."""

from kvattn.cache import with_tables as with_tables
from kvattn.serving.blocks import BlockPool as BlockPool
from kvattn.serving.groups import GroupedPool as GroupedPool
from kvattn.serving.groups import LayerGroup as LayerGroup
from kvattn.serving.radix import Match as Match
from kvattn.serving.radix import RadixTree as RadixTree
from kvattn.serving.replay import Replay as Replay
from kvattn.serving.replay import knee as knee
from kvattn.serving.replay import replay as replay
from kvattn.serving.sharing import SharedLevel as SharedLevel
from kvattn.serving.sharing import shared_prefixes as shared_prefixes
from kvattn.serving.sharing import sharing_shapes as sharing_shapes
from kvattn.serving.sharing import tokens_read as tokens_read
from kvattn.serving.trace import TraceRequest as TraceRequest
from kvattn.serving.trace import read_trace as read_trace
from kvattn.serving.usage import Usage as Usage

__all__ = [
    "BlockPool",
    "GroupedPool",
    "LayerGroup",
    "Match",
    "RadixTree",
    "Replay",
    "SharedLevel",
    "TraceRequest",
    "Usage",
    "knee",
    "read_trace",
    "replay",
    "shared_prefixes",
    "sharing_shapes",
    "tokens_read",
    "with_tables",
]
