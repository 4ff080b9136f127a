"""What is stored, and where: device pytrees without attention maths and without meshes."""

from kvattn.cache.base import Cache as Cache
from kvattn.cache.kv_cache import KVCache as KVCache
from kvattn.cache.layout import Layout as Layout
from kvattn.cache.paged import PagedKVCache as PagedKVCache
from kvattn.cache.view import View as View

__all__ = [
    "Cache",
    "KVCache",
    "Layout",
    "PagedKVCache",
    "View",
]
