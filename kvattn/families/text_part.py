"""The text part of a model that also takes images: a config within a config, and what is told around it."""

import re
from collections.abc import Mapping

from kvattn.families.harmless import HARMLESS
from kvattn.families.registry import FAMILIES
from kvattn.families.settings import Value

_KEYS = ("text_config", "llm_config", "language_config", "thinker_config")
"""Where such a model has its text part, which may be one within another."""
_AROUND = ("is_encoder_decoder", "quantization_config")
"""What is told around it and holds for it too."""
_OF_OTHERS = re.compile(r"vision|image|video|audio|multimodal|projector|spatial_merge|mm_tokens|(bo|eo)[ia]_token")
"""Fields around it that are about the other parts."""
_UNTIED = ("llama4",)
"""Whose embeddings are not tied where nothing is said around the text part."""
OTHER_TENSORS = r"(^|\.)(vision_tower|vision_model|visual|multi_modal_projector|audio_tower|embed_vision|embed_audio)\."
"""Tensors of the other parts."""


def text_part(config: Mapping[str, Value]) -> Mapping[str, Value]:
    """The settings of the decoder of a model that also takes images, or speaks; of any other model all settings."""
    outer, inner = config.get("model_type"), _inner(config)
    if inner is None or not isinstance(outer, str):
        return config
    around = {name: config.get(name) for name in _AROUND}
    around["model_type"] = next((kind for kind, x in FAMILIES.items() if outer in x.text_part_of), outer)
    return text_part(around | {name: value for name, value in inner.items() if name not in around or value})


def to_load(config: Mapping[str, Value]) -> Mapping[str, Value]:
    """The same for a reader that passes over nothing: with the fields around it that may matter to it.

    Whether embeddings are tied is said around it, as in transformers; where nothing is, it goes by the kind of model.
    """
    text = text_part(config)
    if text is config:
        return config
    rest = {
        name: value
        for name, value in config.items()
        if name not in (*_KEYS, *_AROUND, *HARMLESS, *text) and not _OF_OTHERS.search(name)
    }
    tied = config.get("tie_word_embeddings", config.get("model_type") not in _UNTIED)
    return {**rest, **text, "tie_word_embeddings": tied}


def _inner(config: Mapping[str, Value]) -> Mapping[str, Value] | None:
    return next((config[key] for key in _KEYS if isinstance(config.get(key), Mapping)), None)
