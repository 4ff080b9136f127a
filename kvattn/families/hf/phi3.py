"""Phi-3 and Phi-4: fused weights, a part of each head turned, longrope."""

from kvattn.families import layers, params, rules
from kvattn.families.config import DecoderConfig
from kvattn.families.defaults import usual
from kvattn.families.family import Family
from kvattn.families.fields import Fields
from kvattn.families.hf import llama
from kvattn.families.registry import register


def _blueprint(fields: Fields) -> rules.Blueprint:
    sizes = llama.sizes(fields)
    # "su" is what longrope was called first, and "yarn" in files of this family means it too.
    rope = fields.rope(llama.head_dim(sizes), {"su": "longrope", "yarn": "longrope"})
    scaling = rope["rope_scaling"] or {}
    kind = scaling.get("rope_type") or scaling.get("type")
    if kind not in (None, "default", "longrope"):
        raise fields.unsupported("rope_type", kind, "'default' or 'longrope'")
    config = DecoderConfig(
        **sizes,
        **rope,
        windows=fields.windows(layers.windowed(fields, sizes["num_layers"])),
        activation=fields.activation("hidden_act"),
        tie_embeddings=fields.flag("tie_word_embeddings"),
    )
    block = {
        "attention_norm": "input_layernorm",
        "attention": "self_attn.qkv_proj",
        "attention.out": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "mlp": lambda theirs, ours: rules.gate_and_up(
            f"{theirs}.mlp.gate_up_proj", ours, config.model_dim, config.layer_mlp_dims[0]
        ),
        "mlp.down": "mlp.down_proj",
    }
    return rules.blueprint(config, llama.PARTS, block, buffers=llama.BUFFERS)


PHI3 = Family(
    model_type="phi3",
    defaults=llama.DEFAULTS | usual(vocab=32064, dim=3072, mlp=8192, layers=32, heads=32, length=4096) | {
        "num_key_value_heads": None, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "sliding_window": None, "layer_types": None,
    },
    blueprint=_blueprint,
    layers=layers.windowed,
    params=params.gated,
)  # fmt: skip
register(PHI3)
