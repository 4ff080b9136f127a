"""Model families: one description of each, which both the loader and the planner read.

A `Family` says what the fields of its config.json are called and mean, which layers keep keys and values, how its
parameters are counted and, if it can be loaded, how its tensors are named and which `DecoderConfig` it becomes.
Nothing here needs Flax.
"""

from kvattn.families.config import DecoderConfig
from kvattn.families.family import Estimate, Experts, Family, Sizes
from kvattn.families.fields import Fields
from kvattn.families.registry import FAMILIES, register
from kvattn.families.rules import Blueprint, Layout, Rule
from kvattn.families.settings import Settings, Value

# isort: split
from kvattn.families import hf  # it registers its families

__all__ = [
    "FAMILIES", "Blueprint", "DecoderConfig", "Estimate", "Experts", "Family", "Fields", "Layout", "Rule",
    "Settings", "Sizes", "Value", "hf", "register",
]  # fmt: skip
