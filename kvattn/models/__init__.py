"""A compact decoder for text, its checkpoints, and generation through the caches."""

from kvattn.families import FAMILIES, Blueprint, DecoderConfig, Family, register
from kvattn.models.checkpoint import load, save
from kvattn.models.convert import convert_to_gqa
from kvattn.models.decoder import Decoder
from kvattn.models.generate import generate
from kvattn.models.pretrained import describe, from_pretrained
from kvattn.models.score import score
from kvattn.models.text import TextStream, continuation
from kvattn.models.tokenizer import load_tokenizer

__all__ = [
    "FAMILIES", "Blueprint", "Decoder", "DecoderConfig", "Family", "TextStream", "continuation", "convert_to_gqa",
    "describe", "from_pretrained", "generate", "load", "load_tokenizer", "register", "save", "score",
]  # fmt: skip
