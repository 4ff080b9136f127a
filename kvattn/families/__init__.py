"""What is known of each family of models, in one place: the loader and the planner both go by it.

A `Family` says what the fields of its config.json are called and mean, which layers keep keys and values, how its
parameters are counted, and, where it can be loaded, how its tensors are named and which `DecoderConfig` it becomes.
Needs no Flax.
"""

from kvattn.families import hf as hf
from kvattn.families.config import DecoderConfig as DecoderConfig
from kvattn.families.family import FAMILIES as FAMILIES
from kvattn.families.family import Estimate as Estimate
from kvattn.families.family import Experts as Experts
from kvattn.families.family import Family as Family
from kvattn.families.family import register as register
from kvattn.families.fields import Fields as Fields
from kvattn.families.rules import Blueprint as Blueprint
from kvattn.families.rules import Rule as Rule
from kvattn.families.sizes import Sizes as Sizes

__all__ = [
    "FAMILIES", "Blueprint", "DecoderConfig", "Estimate", "Experts", "Family", "Fields", "Rule", "Sizes", "hf",
    "register",
]  # fmt: skip
