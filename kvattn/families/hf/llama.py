"""Llama and Mistral: RMS norms, rotary positions, SwiGLU. Most families are described by how they differ."""

from collections.abc import Mapping

from kvattn.families import layers, params, rules
from kvattn.families.config import DecoderConfig
from kvattn.families.defaults import ROPE, usual
from kvattn.families.family import Family
from kvattn.families.fields import MAX_HEADS, Fields
from kvattn.families.registry import register
from kvattn.families.rules import Blueprint
from kvattn.families.settings import Value

BUFFERS = (r"rotary_emb\.inv_freq$",)
PARTS = {"embed": "model.embed_tokens", "layers": "model.layers", "norm": "model.norm"}
"""What is there once, by our names."""
ATTENTION = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
}
QK_NORMS = {"attention.query_ln": "self_attn.q_norm", "attention.key_ln": "self_attn.k_norm"}
MLP = {"mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj"}
DEFAULTS: dict[str, Value] = ROPE | {"head_dim": None, "hidden_act": "silu", "rms_norm_eps": 1e-6}
"""Of Llama, Mistral and Qwen."""


def sizes(fields: Fields, epsilon: str = "rms_norm_eps") -> dict[str, Value]:
    """The sizes by the names that most families give them; `epsilon` is what the norms' is called."""
    heads, size = fields.size("num_attention_heads", most=MAX_HEADS), fields.get("head_dim")
    return {
        "vocab_size": fields.size("vocab_size"),
        "model_dim": fields.size("hidden_size"),
        "num_layers": fields.layers("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": fields.size("num_key_value_heads", null=heads),
        "head_dim": None if size is None else fields.size("head_dim"),
        "mlp_dim": fields.size("intermediate_size"),
        "norm_epsilon": fields.number(epsilon),
    }


def head_dim(sizes: Mapping[str, Value]) -> int:
    """H, by what `sizes` returned."""
    return sizes["head_dim"] or sizes["model_dim"] // sizes["num_heads"]


def blueprint(fields: Fields, **rest: Value) -> Blueprint:
    """A decoder of Llama's kind; `rest` are arguments of `DecoderConfig` that differ."""
    config = DecoderConfig(
        **sizes(fields),
        **fields.rope(),
        activation=fields.activation("hidden_act"),
        tie_embeddings=fields.flag("tie_word_embeddings"),
        **rest,
    )
    block = {
        "attention_norm": "input_layernorm",
        **ATTENTION,
        **(QK_NORMS if config.qk_norm else {}),
        "mlp_norm": "post_attention_layernorm",
        **MLP,
    }
    return rules.blueprint(config, PARTS, block, buffers=BUFFERS)


def _llama(fields: Fields) -> Blueprint:
    bias = fields.flag("attention_bias")
    return blueprint(fields, qkv_bias=bias, out_bias=bias, mlp_bias=fields.flag("mlp_bias"))


def _mistral(fields: Fields) -> Blueprint:
    return blueprint(fields, windows=fields.windows(layers.windowed(fields, fields.layers("num_hidden_layers"))))


LLAMA = Family(
    model_type="llama",
    defaults=DEFAULTS
    | usual(vocab=32000, dim=4096, mlp=11008, layers=32, heads=32, length=2048)
    | {"num_key_value_heads": None, "attention_bias": False, "mlp_bias": False},
    text_part_of=("llava",),
    blueprint=_llama,
    params=params.gated,
)
SIZES_7B = usual(vocab=32000, dim=4096, mlp=14336, layers=32, heads=32, kv_heads=8, length=131072)
MISTRAL = Family(
    model_type="mistral",
    defaults=DEFAULTS | SIZES_7B | {"sliding_window": 4096, "layer_types": None},
    text_part_of=("mistral3",),
    blueprint=_mistral,
    layers=layers.windowed,
    params=params.gated,
)
register(LLAMA, MISTRAL)
