"""HuggingFace's ``config.json`` as a `ModelSpec`."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvattn import _checks
from kvattn.errors import ConfigError, DTypeError, MissingFileError, UnsupportedError
from kvattn.memory.hf_defaults import DEFAULTS, PLANNED
from kvattn.memory.hf_params import COUNTERS, Fields, estimate, expert_params
from kvattn.memory.specs import ModelSpec, Window

_EVERY: Mapping[str, tuple[int, int]] = {
    # (period, which): layers whose number is `which` modulo `period` see everything, the others a window.
    "gemma2": (2, 1),
    "gpt_oss": (2, 1),
    "gemma3_text": (6, 5),
    "cohere2": (4, 3),
}
_ALL_WINDOWED = ("mistral", "mixtral", "phi3", "starcoder2")
_LATENT = ("deepseek_v2", "deepseek_v3", "minicpm3", "kimi_k2")


def from_config(
    config: Mapping[str, Any] | str | os.PathLike[str], *, name: str | None = None, num_params: int | None = None
) -> ModelSpec:
    """A model by its HuggingFace settings.

    Args:
        config: the settings; or the file, or the checkpoint folder that holds a ``config.json``. Of a model of text and
            images the text part counts.
        name: what to call it. None: the name the config has, or the folder.
        num_params: parameters. None: counted, for the families of `kvattn.memory.hf_params.COUNTERS`; estimated for
            others, which the spec and every plan with it say.

    Returns:
        layers, heads, windows layer by layer and parameters.

    Raises:
        MissingFileError: no such file.
        ConfigError: settings that are no such config, or that parameters cannot be estimated from.
        UnsupportedError: layers whose cache is not one of keys and values per head: latent (MLA), linear, recurrent,
            chunked, or an encoder's.

    Example:
        >>> from kvattn.memory import from_config
        >>> spec = from_config({"model_type": "llama", "num_hidden_layers": 80, "num_attention_heads": 64,
        ...     "num_key_value_heads": 8, "hidden_size": 8192, "intermediate_size": 28672, "vocab_size": 32000})
        >>> spec.num_params, spec.head_dim
        (68976648192, 128)
    """
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
    outer_name = config.get("_name_or_path")
    config = _text_part(config)
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise ConfigError(f"{where} has no model_type: it is no HuggingFace config.")
    fields = Fields(config, DEFAULTS.get(kind) or PLANNED.get(kind) or {})
    _refuse(config, kind)

    estimated = num_params is None and kind not in COUNTERS
    if num_params is None:
        num_params = COUNTERS.get(kind, estimate)(fields)
    moe: dict[str, Any] = {}
    if each := expert_params(fields):
        chosen = fields.size("experts_per_token")
        idle = (fields.num_experts - chosen) * each
        moe = {"num_experts": fields.num_experts, "experts_per_token": chosen, "num_active_params": num_params - idle}
    return ModelSpec(
        name=str(name or outer_name or kind),
        num_layers=fields.size("layers"),
        num_heads=fields.size("heads"),
        num_kv_heads=fields.kv_heads,
        head_dim=fields.head_dim,
        num_params=num_params,
        window=_windows(fields, kind),
        model_dim=fields.size("model_dim"),
        max_length=next((n for n in map(fields.get, Fields.NAMES["positions"]) if n), None),
        source="config.json",
        is_estimate=estimated,
        **moe,
    )


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The decoder of a model that also takes images."""
    inner = next((config[key] for key in ("text_config", "llm_config") if isinstance(config.get(key), Mapping)), None)
    if inner is None or "model_type" not in config:
        return config
    if inner.get("model_type") is None and config["model_type"] == "gemma3":
        return {**inner, "model_type": "gemma3_text"}
    return inner


def _refuse(config: Mapping[str, Any], kind: str) -> None:
    if config.get("is_encoder_decoder"):
        raise UnsupportedError(f"model_type {kind!r} has an encoder and a decoder: plan its decoder with a ModelSpec.")
    if kind in _LATENT or config.get("kv_lora_rank"):
        raise UnsupportedError(
            f"model_type {kind!r} caches latent vectors (MLA), not keys and values per head: this library has no such "
            "cache."
        )
    other = sorted(set(map(str, config.get("layer_types") or ())) - {"full_attention", "sliding_attention"})
    if other or any(
        key in config for key in ("ssm_cfg", "mamba_d_state", "attn_layer_period", "block_types", "conv_L_cache")
    ):
        raise UnsupportedError(
            f"model_type {kind!r} has layers without a cache of keys and values ({', '.join(other) or 'state space'}): "
            "plan those that have one with a ModelSpec."
        )


def _windows(fields: Fields, kind: str) -> Window:
    """None, one window, or one entry per layer."""
    layers, window = fields.size("layers"), fields.get("sliding_window")
    if not window or fields.get("use_sliding_window") is False:
        return None
    _checks.window(window)
    types = fields.get("layer_types")
    if types is not None:
        if not isinstance(types, list | tuple) or len(types) != layers:
            raise ConfigError(f"layer_types must have {layers} entries, one per layer, got {types!r}.")
        windowed = [x == "sliding_attention" for x in types]
    elif kind in _EVERY:
        period, which = _EVERY[kind]
        period = fields.get("sliding_window_pattern") or fields.get("_sliding_window_pattern") or period
        if isinstance(period, bool) or not isinstance(period, int) or period < 1:
            raise DTypeError(f"sliding_window_pattern must be an int >= 1, got {period!r}.")
        which = period - 1 if kind in ("gemma3_text", "cohere2") else which
        windowed = [i % period != which for i in range(layers)]
    elif kind.startswith("qwen"):
        if not fields.get("use_sliding_window", False):
            return None
        first = fields.get("max_window_layers", 28)
        windowed = [i >= first for i in range(layers)]
    elif kind in _ALL_WINDOWED:
        return window
    else:
        raise ConfigError(f"which layers of model_type {kind!r} have the window of {window}? Give it layer_types.")
    if all(windowed):
        return window
    return tuple(window if x else None for x in windowed) if any(windowed) else None
