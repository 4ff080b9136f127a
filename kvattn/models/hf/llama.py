"""Llama, Mistral, Qwen2 and Qwen3: RMS norms, rotary positions, SwiGLU."""

from collections.abc import Iterator
from typing import Any

from kvattn.models.config import DecoderConfig
from kvattn.models.hf import rules
from kvattn.models.hf.fields import MAX_HEADS, Fields
from kvattn.models.hf.rules import Family, Rule

BUFFERS = (r"rotary_emb\.inv_freq$",)


def llama(fields: Fields) -> Family:
    """Llama 1 to 3, and what shares its model_type."""
    bias = fields.flag("attention_bias")
    return _family(fields, qkv_bias=bias, out_bias=bias, mlp_bias=fields.flag("mlp_bias"))


def mistral(fields: Fields) -> Family:
    """Mistral: a window in every layer, where there is one."""
    window = fields.get("sliding_window")
    layers = fields.layers("num_hidden_layers")
    return _family(fields, windows=fields.windows(layers, window, [window is not None] * layers))


def qwen2(fields: Fields) -> Family:
    """Qwen2 and 2.5: biases of queries, keys and values."""
    return _family(fields, qkv_bias=True, windows=_qwen_windows(fields))


def qwen3(fields: Fields) -> Family:
    """Qwen3: norms of queries and keys."""
    bias = fields.flag("attention_bias")
    return _family(fields, qk_norm=True, qkv_bias=bias, out_bias=bias, windows=_qwen_windows(fields))


def _qwen_windows(fields: Fields) -> Any:
    layers, window = fields.layers("num_hidden_layers"), fields.get("sliding_window")
    first = fields.size("max_window_layers", least=0)
    used = fields.flag("use_sliding_window") and window is not None
    return fields.windows(layers, window if used else None, [used and i >= first for i in range(layers)])


def sizes(fields: Fields) -> dict[str, Any]:
    """The sizes by the names that most families give them."""
    heads, size = fields.size("num_attention_heads", most=MAX_HEADS), fields.get("head_dim")
    return {
        "vocab_size": fields.size("vocab_size"),
        "model_dim": fields.size("hidden_size"),
        "num_layers": fields.layers("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": fields.size("num_key_value_heads", null=heads),
        "head_dim": None if size is None else fields.size("head_dim"),
        "mlp_dim": fields.size("intermediate_size"),
        "norm_epsilon": fields.number("rms_norm_eps"),
    }


def _family(fields: Fields, **rest: Any) -> Family:
    config = DecoderConfig(
        **sizes(fields),
        **fields.rope(),
        activation=fields.activation("hidden_act"),
        tie_embeddings=fields.flag("tie_word_embeddings"),
        **rest,
    )
    return Family(config, tuple(_rules(config)), ("model.",), (*BUFFERS, *rules.tied(config)))


def _rules(config: DecoderConfig) -> Iterator[Rule]:
    features = config.model_dim
    yield rules.embedding("model.embed_tokens.weight", config)

    def block(layer: int, ours: str) -> Iterator[Rule]:
        theirs = f"model.layers.{layer}"
        yield from rules.norm(f"{theirs}.input_layernorm", f"{ours}.attention_norm", features)
        yield from rules.separate(f"{theirs}.self_attn", f"{ours}.attention", config)
        if config.qk_norm:
            for name, norm in (("q_norm", "query_ln"), ("k_norm", "key_ln")):
                yield from rules.norm(f"{theirs}.self_attn.{name}", f"{ours}.attention.{norm}", rules.width(config))
        yield from rules.norm(f"{theirs}.post_attention_layernorm", f"{ours}.mlp_norm", features)
        names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
        yield from rules.mlp(f"{theirs}.mlp", f"{ours}.mlp", config, names)

    yield from rules.per_layer(config, block)
    yield from rules.norm("model.norm", "norm", features)
    yield from rules.head(config)
