"""In how many bits tokens are stored. One file per codec; none knows slots, policies or meshes."""

from kvattn.codecs.base import Codec as Codec
from kvattn.codecs.float8 import Float8 as Float8
from kvattn.codecs.format import Format as Format
from kvattn.codecs.int4 import Int4 as Int4
from kvattn.codecs.int8 import Int8 as Int8
from kvattn.codecs.kivi import KIVI as KIVI
from kvattn.codecs.plain import Plain as Plain

__all__ = [
    "ALL",
    "KIVI",
    "Codec",
    "Float8",
    "Format",
    "Int4",
    "Int8",
    "Plain",
]

ALL = (Plain, Int8, Float8, Int4, KIVI)
"""Every codec, for the shared test suite."""
