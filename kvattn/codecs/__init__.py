"""In how many bits tokens are stored. One file per codec; none knows slots, policies or meshes."""

from kvattn.codecs.base import Codec as Codec
from kvattn.codecs.plain import Plain as Plain

ALL = (Plain,)
"""Every codec, for the shared test suite."""
