"""Model families: one description of each, which both the loader and the planner read.

A `Family` says what the fields of its config.json are called and mean, which layers keep keys and values, how its
parameters are counted and, if it can be loaded, how its tensors are named and which `DecoderConfig` it becomes.
Nothing here needs Flax.
"""

from kvattn.families.config import DecoderConfig as DecoderConfig
from kvattn.families.family import Estimate as Estimate
from kvattn.families.family import Experts as Experts
from kvattn.families.family import Family as Family
from kvattn.families.family import Sizes as Sizes
from kvattn.families.fields import Fields as Fields
from kvattn.families.registry import FAMILIES as FAMILIES
from kvattn.families.registry import register as register
from kvattn.families.rules import Blueprint as Blueprint
from kvattn.families.rules import Layout as Layout
from kvattn.families.rules import Rule as Rule
from kvattn.families.settings import Settings as Settings
from kvattn.families.settings import Value as Value

# isort: split
from kvattn.families import hf as hf  # it registers its families

__all__ = [
    "FAMILIES", "Blueprint", "DecoderConfig", "Estimate", "Experts", "Family", "Fields", "Layout", "Rule", "Settings",
    "Sizes", "Value", "hf", "register",
]  # fmt: skip
