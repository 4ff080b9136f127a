"""What is stored, and where: device pytrees without attention maths and without meshes."""

from kvattn.cache.base import Cache as Cache
from kvattn.cache.groups import Group as Group
from kvattn.cache.groups import groups_of as groups_of
from kvattn.cache.groups import pages_at_once as pages_at_once
from kvattn.cache.groups import waste as waste
from kvattn.cache.groups import with_tables as with_tables
from kvattn.cache.host import HostLayout as HostLayout
from kvattn.cache.kv_cache import KVCache as KVCache
from kvattn.cache.layout import Layout as Layout
from kvattn.cache.paged import PagedKVCache as PagedKVCache
from kvattn.cache.view import View as View

__all__ = [
    "Cache",
    "Group",
    "HostLayout",
    "KVCache",
    "Layout",
    "PagedKVCache",
    "View",
    "groups_of",
    "pages_at_once",
    "waste",
    "with_tables",
]
