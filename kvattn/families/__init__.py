"""Model families: one description of each, which both the loader and the planner read.

A `Family` says what the fields of its config.json are called and mean, which layers keep keys and values, how its
parameters are counted and, if it can be loaded, how its tensors are named and which `DecoderConfig` it becomes.
Nothing here needs Flax.
"""

from kvattn.families.config import DecoderConfig as DecoderConfig
from kvattn.families.family import FAMILIES as FAMILIES
from kvattn.families.family import Estimate as Estimate
from kvattn.families.family import Experts as Experts
from kvattn.families.family import Family as Family
from kvattn.families.family import Value as Value
from kvattn.families.family import register as register
from kvattn.families.fields import Fields as Fields
from kvattn.families.rules import Blueprint as Blueprint
from kvattn.families.rules import Layout as Layout
from kvattn.families.rules import Rule as Rule
from kvattn.families.settings import Settings as Settings
from kvattn.families.sizes import Sizes as Sizes

# isort: split
from kvattn.families import hf as hf  # it imports the names above

__all__ = [
    "FAMILIES", "Blueprint", "DecoderConfig", "Estimate", "Experts", "Family", "Fields", "Layout", "Rule", "Settings",
    "Sizes", "Value", "hf", "register",
]  # fmt: skip
