"""kvattn's caches under the models, layers and samplers of other libraries, by the hooks that these have."""

from kvattn.adapters import bonsai as bonsai
from kvattn.adapters import flax as flax
from kvattn.adapters import keras_hub as keras_hub
from kvattn.adapters import tunix as tunix

__all__ = ["bonsai", "flax", "keras_hub", "tunix"]
