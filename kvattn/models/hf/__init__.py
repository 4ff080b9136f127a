"""Checkpoints of HuggingFace's transformers: one table per family says which tensor becomes which parameter."""

from collections.abc import Callable

from kvattn.models.hf.bloom import bloom, mpt
from kvattn.models.hf.falcon import falcon
from kvattn.models.hf.fields import Fields
from kvattn.models.hf.gemma import gemma2, gemma3
from kvattn.models.hf.gpt2 import gpt2, gpt_bigcode, opt
from kvattn.models.hf.gpt_oss import gpt_oss
from kvattn.models.hf.llama import llama, mistral, qwen2, qwen3
from kvattn.models.hf.rules import Family, Index, Rule

FAMILIES: dict[str, Callable[[Fields], Family]] = {
    "bloom": bloom,
    "falcon": falcon,
    "gemma2": gemma2,
    "gemma3_text": gemma3,
    "gpt2": gpt2,
    "gpt_bigcode": gpt_bigcode,
    "gpt_oss": gpt_oss,
    "llama": llama,
    "mistral": mistral,
    "mpt": mpt,
    "opt": opt,
    "qwen2": qwen2,
    "qwen3": qwen3,
}
"""What each ``model_type`` is read by."""

__all__ = ["FAMILIES", "Family", "Fields", "Index", "Rule"]
