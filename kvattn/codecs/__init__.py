"""In how many bits tokens are stored. One file per codec; none knows slots, policies or meshes."""

from kvattn.codecs.base import Codec as Codec
from kvattn.codecs.format import Format as Format
from kvattn.codecs.registry import register as register
from kvattn.codecs.registry import registered as registered

# isort: off
# In the order they are listed in.
from kvattn.codecs.plain import Plain as Plain
from kvattn.codecs.int8 import Int8 as Int8
from kvattn.codecs.float8 import Float8 as Float8
from kvattn.codecs.int4 import Int4 as Int4
from kvattn.codecs.kivi import KIVI as KIVI
# isort: on

__all__ = [
    "ALL",
    "KIVI",
    "Codec",
    "Float8",
    "Format",
    "Int4",
    "Int8",
    "Plain",
    "register",
    "registered",
]

ALL = tuple(entry.kind for entry in registered())
"""The package's own codecs; `registered` tells a user's too."""
