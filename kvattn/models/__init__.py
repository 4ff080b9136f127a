"""A compact decoder for text, its checkpoints, and generation through the caches."""

from kvattn.models.checkpoint import load, save
from kvattn.models.config import DecoderConfig
from kvattn.models.decoder import Decoder
from kvattn.models.generate import generate

__all__ = ["Decoder", "DecoderConfig", "generate", "load", "save"]
