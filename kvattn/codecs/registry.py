"""The codecs that are known by name."""

from kvattn._registry import Registry
from kvattn.codecs.base import Codec

CODECS = Registry("codec", Codec)
register, registered = CODECS.register, CODECS.registered
