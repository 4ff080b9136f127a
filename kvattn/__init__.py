"""Attention with a key/value cache that is small, fast and correct, for Flax on TPU, GPU and CPU.

`import kvattn` needs JAX only. `kvattn.layers`, `kvattn.models`, `kvattn.generate` and `kvattn.score` bring Flax in on
first use; ``from kvattn import *``, which takes all there is, does so at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

from kvattn import cache as cache
from kvattn import codecs as codecs
from kvattn import errors as errors
from kvattn import pallas as pallas
from kvattn import policies as policies
from kvattn import positions as positions
from kvattn import sharding as sharding
from kvattn.attend.full import dot_product_attention as dot_product_attention
from kvattn.attend.state import merge_states as merge_states
from kvattn.cache import KVCache as KVCache
from kvattn.cache import PagedKVCache as PagedKVCache
from kvattn.cache.donation import jit as jit
from kvattn.codecs import KIVI as KIVI
from kvattn.codecs import Float8 as Float8
from kvattn.codecs import Int4 as Int4
from kvattn.codecs import Int8 as Int8
from kvattn.policies import H2O as H2O
from kvattn.policies import Chunked as Chunked
from kvattn.policies import FastGen as FastGen
from kvattn.policies import Full as Full
from kvattn.policies import Scissorhands as Scissorhands
from kvattn.policies import SlidingWindow as SlidingWindow
from kvattn.policies import StreamingLLM as StreamingLLM
from kvattn.positions import RelativeBuckets as RelativeBuckets
from kvattn.positions import RoPE as RoPE
from kvattn.positions import Temperature as Temperature
from kvattn.positions import alibi_slopes as alibi_slopes
from kvattn.sharding.explicit import cached_attention as cached_attention

if TYPE_CHECKING:
    from kvattn import adapters as adapters
    from kvattn import layers as layers
    from kvattn import memory as memory
    from kvattn import models as models
    from kvattn import serving as serving
    from kvattn import testing as testing
    from kvattn.models import generate as generate
    from kvattn.models import score as score

__all__ = [
    "H2O",
    "KIVI",
    "Chunked",
    "FastGen",
    "Float8",
    "Full",
    "Int4",
    "Int8",
    "KVCache",
    "PagedKVCache",
    "RoPE",
    "Scissorhands",
    "SlidingWindow",
    "StreamingLLM",
    "adapters",
    "alibi_slopes",
    "cache",
    "cached_attention",
    "codecs",
    "dot_product_attention",
    "errors",
    "generate",
    "jit",
    "layers",
    "memory",
    "merge_states",
    "models",
    "pallas",
    "policies",
    "positions",
    "score",
    "serving",
    "sharding",
    "testing",
]

__version__ = "0.2.0"

_ON_FIRST_USE = ("adapters", "layers", "memory", "models", "serving", "testing")


def __getattr__(name: str) -> Any:
    if name in _ON_FIRST_USE:
        return importlib.import_module(f"kvattn.{name}")
    if name in ("generate", "score"):
        return getattr(importlib.import_module("kvattn.models"), name)
    raise AttributeError(f"module 'kvattn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({name for name in globals() if name.startswith("__")} | {*__all__})
