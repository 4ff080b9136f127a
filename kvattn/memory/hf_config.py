"""HuggingFace's ``config.json`` as a `ModelSpec`."""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from kvattn.errors import ConfigError, MissingFileError, UnsupportedError
from kvattn.families.experts import expert_params, expert_weights, sparse_layers
from kvattn.families.family import NAMES, Family, Sizes
from kvattn.families.layers import kinds_of, layers_of
from kvattn.families.params import embeddings, params_of
from kvattn.families.registry import FAMILIES, find
from kvattn.families.settings import Value
from kvattn.families.text_part import text_part
from kvattn.memory.hf_quantized import in_blocks, quantized
from kvattn.memory.specs import ModelSpec

_ENCODERS = re.compile(
    r"bert|electra|(^|_|-)(deit|beit|swin|clip|siglip2?|detr|u?m?t5|bart|esm|xlm|xlnet|roformer)($|_|-|v\d)|vit($|_|-|s$)|"
    r"whisper|wav2vec|wavlm|hubert|pegasus|marian|m2m_100|blenderbot|prophetnet|longformer|big_?bird|deberta|dinov\d|"
    r"funnel|fnet|layoutlm|mpnet|nystromformer|perceiver|canine|data2vec|convnext|resnet|encoder|seamless|speech|mae$|"
    r"segformer|^(led|luke|reformer|splinter|tapas|ernie|ernie_m|xmod|git|musicgen|trocr|mvp|plbart|mbart|longt5|rag|"
    r"switch_transformers|udop|pix2struct|bark|dpt|hiera|yolos|vilt|timesformer|audio-spectrogram-transformer)$"
)
"""Families that are encoders, or have one."""

_LATENT = frozenset({
    "axk1", "bailing_hybrid", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "kimi_linear", "longcat_flash",
    "sarvam_mla", "youtu",
})  # fmt: skip
"""Families that cache latent vectors and are not known here."""

_STATE = frozenset({
    "falcon_mamba", "mamba", "mamba2", "retnet", "rwkv", "rwkv5", "rwkv6", "rwkv7", "xlstm",
})  # fmt: skip
"""Families without any attention."""


def from_config(
    config: Mapping[str, Value] | str | os.PathLike[str], *, name: str | None = None, num_params: int | None = None
) -> ModelSpec:
    """A model by its HuggingFace settings.

    Of a family that is known here, the spec says exactly which layers keep keys and values, and a setting that is not
    understood is named in its `notes`. Of any other, all layers are taken to keep them, the spec says that its cache is
    an estimate, and a setting that may mean something else is refused.

    Args:
        config: the settings; or the file, or the checkpoint folder that holds a ``config.json``. Of a model of text and
            images the text part counts.
        name: what to call it. None: the name the config has, or the folder.
        num_params: parameters. None: counted, for the families of `kvattn.families` that say how; estimated
            for others, which the spec and every plan with it say.

    Returns:
        layers, heads, windows and sharing layer by layer, parameters, and what they are quantised to.

    Raises:
        MissingFileError: no such file.
        ConfigError: settings that are no such config or contradict each other, or that parameters cannot be estimated
            from.
        UnsupportedError: a cache that is not known: latent (MLA) of an unknown family, a state alone, an encoder's; or
            settings of an unknown family that may mean such a thing.

    Example:
        >>> from kvattn.memory import from_config
        >>> spec = from_config({"model_type": "llama", "num_hidden_layers": 80, "num_attention_heads": 64,
        ...     "num_key_value_heads": 8, "hidden_size": 8192, "intermediate_size": 28672, "vocab_size": 32000})
        >>> spec.num_params, spec.head_dim
        (68976648192, 128)
    """
    config, where, name = _settings(config, name)
    outer_name = config.get("_name_or_path")
    config = text_part(config)
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise ConfigError(f"{where} has no model_type: it is no HuggingFace config.")
    family, said = find(kind) or (Family(model_type=kind, is_certain=False), {})
    _refuse(config, family)
    f = Sizes({**said, **config}, family)

    model_dim = f.size("model_dim")
    windows, sources = layers_of(f)
    heads = [] if family.heads is None else family.heads(f, kinds_of(f))
    weights, notes = _weights(f, num_params, config)
    spec = ModelSpec(
        name=str(name or outer_name or kind),
        num_layers=len(windows),
        num_heads=f.size("heads"),
        num_kv_heads=f.kv_heads,
        head_dim=f.head_dim,
        value_head_dim=None if family.values_in_keys is None else family.values_in_keys(f),
        values_in_keys=family.values_in_keys is not None,
        window=windows[0] if len(set(windows)) == 1 else tuple(windows),
        kv_source=None if sources == list(range(len(sources))) else tuple(sources),
        layer_heads=tuple(heads) if len(set(heads)) > 1 else None,
        model_dim=model_dim,
        max_length=next((n for n in map(f.get, NAMES["positions"]) if n), None),
        source="config.json",
        **weights,
    )
    doubts = _doubts(f, spec)
    return dataclasses.replace(spec, cache_is_estimate=bool(doubts), notes=(*doubts, *_states(f, spec), *notes))


def _settings(
    config: Mapping[str, Value] | str | os.PathLike[str], name: str | None
) -> tuple[Mapping[str, Value], str, str | None]:
    """The settings, where they are from, and what the model is called by that."""
    where = "the config"
    if isinstance(config, str | os.PathLike):
        path = Path(config)
        path = path / "config.json" if path.is_dir() else path
        where, name = str(path), name or (path.parent.name if path.name == "config.json" else path.stem) or None
        if not path.is_file():
            raise MissingFileError(f"{path} is not there: give a config.json, or the folder that has one.")
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{path} is no JSON: {error}.") from error
    if not isinstance(config, Mapping):
        raise ConfigError(f"{where} must be an object of settings, got {type(config).__name__}.")
    return config, where, name


def _refuse(config: Mapping[str, Value], family: Family) -> None:
    """Refuses what has no cache of keys and values per head and token."""
    kind, is_known = family.model_type, family.model_type in FAMILIES
    if config.get("is_encoder_decoder"):
        raise UnsupportedError(f"model_type {kind!r} has an encoder and a decoder: plan its decoder with a ModelSpec.")
    if not is_known and _ENCODERS.search(kind):
        raise UnsupportedError(
            f"model_type {kind!r} is an encoder, or has one: it keeps no keys and values as it goes. Plan a decoder "
            "with a ModelSpec."
        )
    if family.values_in_keys is None and (kind in _LATENT - FAMILIES.keys() or config.get("kv_lora_rank")):
        raise UnsupportedError(
            f"model_type {kind!r} caches latent vectors (MLA) in a way that is not known here: plan it with a "
            "ModelSpec, of one key/value head with values_in_keys."
        )
    if not is_known and kind in _STATE:
        raise UnsupportedError(
            f"model_type {kind!r} has no layer with keys and values, only a state of constant size: there is no cache "
            "to plan."
        )
    if not is_known and kind.startswith("gemma4"):
        raise UnsupportedError(
            f"model_type {kind!r} is no text model that is known here: plan it with a ModelSpec, whose layer_heads say "
            "what layers without a window have."
        )


def _weights(f: Sizes, num_params: int | None, config: Mapping[str, Value]) -> tuple[dict[str, Value], list[str]]:
    """What a `ModelSpec` has on parameters, and what should be said of them."""
    estimated, given = num_params is None and f.family.params is None, num_params is not None
    num_params = params_of(f) if num_params is None else num_params
    found: dict[str, Value] = {"num_params": num_params, "is_estimate": estimated}
    notes: list[str] = []
    sparse = sparse_layers(f)
    if sparse and (weights := sparse * f.num_experts * expert_weights(f)):
        if given and weights > num_params:
            notes.append(
                f"num_params ({num_params}) is less than the experts of config.json ({weights}): planned as if dense"
            )
        else:
            chosen = f.size("experts_per_token")
            idle = sparse * (f.num_experts - chosen) * expert_params(f)
            found |= {"num_experts": f.num_experts, "experts_per_token": chosen, "num_expert_weights": weights}
            found["num_active_params"] = num_params - idle
    dtype, note = quantized(f.get("quantization_config") or f.get("quantization"))
    if dtype is not None:
        whole = num_params - embeddings(f) if dtype != "mxfp4" else found.get("num_expert_weights", num_params)
        found |= {"weight_dtype": dtype, "num_quantized_params": whole if whole > 0 else None}
        scales = "" if dtype == "mxfp4" else "; scales are not counted"
        if (blocks := in_blocks(config, f.family)) is not None:
            numbers, nbytes = blocks
            if numbers <= num_params:
                found |= {"num_quantized_params": numbers, "num_scale_bytes": nbytes}
                scales = f", with {nbytes:,} bytes of scales"
        notes.append(f"weights are in {dtype}, as its quantization_config says, unless weight_dtype is given{scales}")
    return found, notes + [note] * bool(note)


def _doubts(f: Sizes, spec: ModelSpec) -> list[str]:
    """What is not certain of the cache.

    Raises:
        UnsupportedError: settings of an unknown family that may mean another cache.
    """
    unread, kind = f.unread(), f.family.model_type
    if f.family.is_certain:
        return [f"config.json has settings that are not understood and may change the cache: {unread}"] * bool(unread)
    if unread:
        raise UnsupportedError(
            f"model_type {kind!r} is not known here, and it has settings that may mean layers without a cache of "
            f"keys and values of their own, or of another size: {unread}. Plan it with a ModelSpec, which says what "
            "each layer keeps."
        )
    return [
        f"model_type {kind!r} is not known here: all {spec.num_layers} layers are taken to keep keys and values of "
        f"{spec.num_kv_heads} heads of {spec.head_dim}"
    ]


def _states(f: Sizes, spec: ModelSpec) -> list[str]:
    """What hybrids keep besides, in words."""
    states = spec.layer_sources.count(None)
    if f.family.has_states:
        return ["every layer keeps a state of constant size besides, which is not counted"]
    if not states:
        return []
    return [
        f"{states} of {spec.num_layers} layers keep no keys and values; their states of constant size are not counted"
    ]
