"""Gemma 2 and Gemma 3 (text): norms before and after, scaled embeddings, windows in most layers."""

import math
from collections.abc import Iterator
from typing import Any

from kvattn.errors import ConfigError
from kvattn.models.config import DecoderConfig
from kvattn.models.hf import rules
from kvattn.models.hf.fields import Fields
from kvattn.models.hf.llama import BUFFERS, sizes
from kvattn.models.hf.rules import Family, Rule


def gemma2(fields: Fields) -> Family:
    """Gemma 2: every second layer has a window, scores and logits are capped."""
    layers = fields.layers("num_hidden_layers")
    return _family(
        fields,
        **fields.rope(),
        windows=fields.windows(layers, fields.get("sliding_window"), [i % 2 == 0 for i in range(layers)]),
        softcap=fields.number("attn_logit_softcapping"),
    )


def gemma3(fields: Fields) -> Family:
    """Gemma 3's text model: five layers with a window for one without, each kind with its own frequencies."""
    layers = fields.layers("num_hidden_layers")
    every = fields.size("sliding_window_pattern")
    fields.passed("_sliding_window_pattern")  # a note of what layer_types says
    windows = fields.windows(layers, fields.get("sliding_window"), [bool((i + 1) % every) for i in range(layers)])
    fields.only("attn_logit_softcapping", why="Gemma 3 has none")
    return _family(fields, **_ropes(fields), windows=windows, qk_norm=True)


def _ropes(fields: Fields) -> dict[str, Any]:
    """Frequencies of both kinds of layers, from either form that transformers has written."""
    kinds, older = fields.mapping("rope_parameters") or {}, fields.mapping("rope_scaling") or {}
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown:
        # transformers passes over them.
        raise rules.unsupported(
            fields.source, "rope_parameters", dict(kinds), "one dict for full_attention and one for sliding_attention"
        )
    fields.passed("original_max_position_embeddings")
    whole, local = ({} if kinds.get(kind) is None else kinds[kind] for kind in ("full_attention", "sliding_attention"))
    for name, given in (("full_attention", whole), ("sliding_attention", local)):
        if not isinstance(given, dict):
            raise ConfigError(f"{fields.source}: rope_parameters of {name} must be an object, got {given!r}.")
    if {**whole, **older}.get("truncate", True) is not True:
        raise rules.unsupported(fields.source, "truncate in rope_parameters of full_attention", False, "true")
    inner = fields.scaled({**whole, **older}, fields.get("rope_theta"), None)
    outer = fields.scaled(local, fields.get("rope_local_base_freq"), None)
    if outer["rope_scaling"] is not None:
        raise rules.unsupported(
            fields.source, "rope_parameters of sliding_attention", outer["rope_scaling"], "no scaling"
        )
    return inner | {"local_rope_theta": outer["rope_theta"]}


def _family(fields: Fields, **rest: Any) -> Family:
    bias = fields.flag("attention_bias")
    fields.only("use_bidirectional_attention", False, why="a decoder is causal")
    fields.passed("hidden_act")  # the activation is hidden_activation, even where only the other is given
    config = DecoderConfig(
        **sizes(fields),
        activation=fields.activation("hidden_activation"),
        attention_scale=fields.positive("query_pre_attn_scalar") ** -0.5,
        logit_softcap=fields.number("final_logit_softcapping"),
        tie_embeddings=fields.flag("tie_word_embeddings"),
        embedding_scale=math.sqrt(fields.size("hidden_size")),
        norm_position="sandwich",
        qkv_bias=bias,
        out_bias=bias,
        **rest,
    )
    return Family(config, tuple(_rules(config)), ("model.",), (*BUFFERS, *rules.tied(config)))


def _rules(config: DecoderConfig) -> Iterator[Rule]:
    def norm(theirs: str, ours: str, size: int = config.model_dim) -> Iterator[Rule]:
        return rules.norm(theirs, ours, size, plus_one=True)

    yield rules.embedding("model.embed_tokens.weight", config)

    def block(layer: int, ours: str) -> Iterator[Rule]:
        theirs = f"model.layers.{layer}"
        yield from norm(f"{theirs}.input_layernorm", f"{ours}.attention_norm")
        yield from rules.separate(f"{theirs}.self_attn", f"{ours}.attention", config)
        if config.qk_norm:
            for name, ours_name in (("q_norm", "query_ln"), ("k_norm", "key_ln")):
                yield from norm(f"{theirs}.self_attn.{name}", f"{ours}.attention.{ours_name}", rules.width(config))
        yield from norm(f"{theirs}.post_attention_layernorm", f"{ours}.attention_post_norm")
        yield from norm(f"{theirs}.pre_feedforward_layernorm", f"{ours}.mlp_norm")
        names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
        yield from rules.mlp(f"{theirs}.mlp", f"{ours}.mlp", config, names)
        yield from norm(f"{theirs}.post_feedforward_layernorm", f"{ours}.mlp_post_norm")

    yield from rules.per_layer(config, block)
    yield from norm("model.norm", "norm")
    yield from rules.head(config)
