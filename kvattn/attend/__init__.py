"""How a cache is read: one entry, one argument list for every implementation."""

from kvattn.attend.api import attend as attend
from kvattn.attend.api import choose as choose
from kvattn.attend.registry import Implementation as Implementation
from kvattn.attend.registry import Tuning as Tuning
from kvattn.attend.registry import names as names
from kvattn.attend.registry import register as register
from kvattn.attend.registry import unregister as unregister
from kvattn.attend.request import Request as Request
from kvattn.attend.state import merge_states as merge_states

__all__ = [
    "Implementation",
    "Request",
    "Tuning",
    "attend",
    "choose",
    "merge_states",
    "names",
    "register",
    "unregister",
]
