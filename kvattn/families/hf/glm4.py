"""GLM-4 (0414): half of each head turned by pairs of neighbours, norms before and after, gate and up in one matrix."""

from kvattn.families import params, rules
from kvattn.families.config import DecoderConfig
from kvattn.families.defaults import usual
from kvattn.families.family import Family
from kvattn.families.fields import Fields
from kvattn.families.hf import llama
from kvattn.families.registry import register


def _blueprint(fields: Fields) -> rules.Blueprint:
    sizes = llama.sizes(fields)
    config = DecoderConfig(
        **sizes,
        **fields.rope(llama.head_dim(sizes)),
        rope_interleaved=True,
        norm_position="sandwich",
        qkv_bias=fields.flag("attention_bias"),
        activation=fields.activation("hidden_act"),
        tie_embeddings=fields.flag("tie_word_embeddings"),
    )
    block = {
        "attention_norm": "input_layernorm",
        **llama.ATTENTION,
        "attention_post_norm": "post_self_attn_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "mlp": lambda theirs, ours: rules.gate_and_up(
            f"{theirs}.mlp.gate_up_proj", ours, config.model_dim, config.layer_mlp_dims[0]
        ),
        "mlp.down": "mlp.down_proj",
        "mlp_post_norm": "post_mlp_layernorm",
    }
    return rules.blueprint(config, llama.PARTS, block, buffers=llama.BUFFERS)


GLM4 = Family(
    model_type="glm4",
    defaults=llama.DEFAULTS
    | usual(vocab=151552, dim=4096, mlp=13696, layers=40, heads=32, kv_heads=2, length=131072) | {
        "head_dim": 128, "rms_norm_eps": 0.00000015625, "partial_rotary_factor": 0.5, "attention_bias": True,
    },
    blueprint=_blueprint,
    params=lambda f: params.gated(f, norms=4, out_bias=False),
)  # fmt: skip
register(GLM4)
