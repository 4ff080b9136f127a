"""Gemma 2 and Gemma 3 (text): norms before and after, scaled embeddings, windows in most layers."""

import math
from collections.abc import Iterator
from typing import Any

from kvattn.models.config import DecoderConfig
from kvattn.models.hf import rules
from kvattn.models.hf.fields import Fields
from kvattn.models.hf.llama import BUFFERS, sizes
from kvattn.models.hf.rules import Family, Rule


def gemma2(fields: Fields) -> Family:
    """Gemma 2: every second layer has a window, scores and logits are capped."""
    layers = fields.size("num_hidden_layers")
    return _family(
        fields,
        **fields.rope(),
        windows=fields.windows(layers, fields.get("sliding_window", default=4096), [i % 2 == 0 for i in range(layers)]),
        softcap=fields.number("attn_logit_softcapping"),
    )


def gemma3(fields: Fields) -> Family:
    """Gemma 3's text model: five layers with a window for one without, each kind with its own frequencies."""
    layers = fields.size("num_hidden_layers")
    every = fields.size("sliding_window_pattern", "_sliding_window_pattern", default=6)
    windows = fields.windows(
        layers, fields.get("sliding_window", default=4096), [bool((i + 1) % every) for i in range(layers)]
    )
    fields.only("attn_logit_softcapping", why="Gemma 3 has none")
    return _family(fields, **_ropes(fields), windows=windows, qk_norm=True)


def _ropes(fields: Fields) -> dict[str, Any]:
    """Frequencies of both kinds of layers, from either form that transformers has written."""
    kinds = fields.get("rope_parameters")
    if not (isinstance(kinds, dict) and "full_attention" in kinds):
        return fields.rope(1e6) | {"local_rope_theta": fields.number("rope_local_base_freq", default=10000.0)}
    inner = Fields({"rope_parameters": kinds["full_attention"]}, fields.source).rope(1e6)
    local = Fields({"rope_parameters": kinds.get("sliding_attention")}, fields.source).rope()
    if local["rope_scaling"] is not None:
        raise rules.unsupported(
            fields.source, "rope_parameters of sliding_attention", local["rope_scaling"], "no scaling"
        )
    fields.get("max_position_embeddings")
    return inner | {"local_rope_theta": local["rope_theta"]}


def _family(fields: Fields, **rest: Any) -> Family:
    bias = fields.flag("attention_bias", False)
    fields.only("use_bidirectional_attention", False, why="a decoder is causal")
    fields.get("max_position_embeddings")
    features = fields.size("hidden_size")
    config = DecoderConfig(
        **sizes(fields, 256),
        activation=fields.activation("hidden_activation", "hidden_act", default="gelu_pytorch_tanh"),
        attention_scale=fields.number("query_pre_attn_scalar", default=256) ** -0.5,
        logit_softcap=fields.number("final_logit_softcapping"),
        tie_embeddings=fields.flag("tie_word_embeddings", True),
        embedding_scale=math.sqrt(features),
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
    yield from rules.head("lm_head.weight", config)
