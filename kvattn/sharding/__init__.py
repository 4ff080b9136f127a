"""Which device holds which part of a cache, and the step over it: by heads, by batch, by sequence, by layers."""

from kvattn.sharding.attention import cached_attention as cached_attention
from kvattn.sharding.cache import arrange as arrange
from kvattn.sharding.cache import bytes_per_device as bytes_per_device
from kvattn.sharding.cache import cache_sharding as cache_sharding
from kvattn.sharding.cache import shard_cache as shard_cache
from kvattn.sharding.choose import Explanation as Explanation
from kvattn.sharding.choose import choose as choose
from kvattn.sharding.choose import explain as explain
from kvattn.sharding.pipeline import layer_caches as layer_caches
from kvattn.sharding.pipeline import pipeline as pipeline
from kvattn.sharding.programs import Collective as Collective
from kvattn.sharding.programs import collectives as collectives
from kvattn.sharding.scheme import Scheme as Scheme
from kvattn.sharding.scheme import TokenSpecs as TokenSpecs
from kvattn.sharding.scheme import names as names
from kvattn.sharding.scheme import register as register
from kvattn.sharding.scheme import unregister as unregister
from kvattn.sharding.split import Split as Split
from kvattn.sharding.split import specs_of as specs_of

__all__ = [
    "Collective",
    "Explanation",
    "Scheme",
    "Split",
    "TokenSpecs",
    "arrange",
    "bytes_per_device",
    "cache_sharding",
    "cached_attention",
    "choose",
    "collectives",
    "explain",
    "layer_caches",
    "names",
    "pipeline",
    "register",
    "shard_cache",
    "specs_of",
    "unregister",
]
