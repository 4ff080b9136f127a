"""MiniCPM3: latent attention in a dense model; embedding, residual and logits each have a multiplier."""

import math

from kvattn.families import latent, params, rules
from kvattn.families.config import DecoderConfig
from kvattn.families.defaults import ROPE, usual
from kvattn.families.family import Family, Sizes
from kvattn.families.fields import Fields
from kvattn.families.hf import llama
from kvattn.families.registry import register


def _blueprint(fields: Fields) -> rules.Blueprint:
    features, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    sizes, rope = latent.sizes(fields, value_dim=features // heads), fields.rope()
    depth, base = fields.get("scale_depth"), fields.get("dim_model_base")
    config = DecoderConfig(
        **sizes,
        **rope,
        attention_scale=latent.scale(sizes, rope),
        activation=fields.activation("hidden_act"),
        mlp_bias=fields.flag("mlp_bias"),
        embedding_scale=fields.positive("scale_emb"),
        residual_scale=None if depth is None else fields.positive("scale_depth") / math.sqrt(sizes["num_layers"]),
        logit_scale=None if base is None else fields.positive("dim_model_base") / features,
        tie_embeddings=fields.flag("tie_word_embeddings"),
    )
    block = {
        "attention_norm": "input_layernorm",
        "attention": latent.attention(config),
        "mlp_norm": "post_attention_layernorm",
        **llama.MLP,
    }
    return rules.blueprint(config, llama.PARTS, block, buffers=llama.BUFFERS)


def _params(f: Sizes) -> int:
    d, mlp = f.size("model_dim"), params.gated_mlp(f, f.size("mlp_dim"))
    return params.embeddings(f) + d + f.num_layers * (latent.params(f) + 2 * d + mlp)


MINICPM3 = Family(
    model_type="minicpm3",
    defaults=ROPE | latent.DEFAULTS
    | usual(vocab=73448, dim=2560, mlp=6400, layers=62, heads=40, length=32768, tied=True) | {
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "attention_bias": False, "mlp_bias": False, "kv_lora_rank": 256,
        "q_lora_rank": 768, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": None, "scale_emb": 12,
        "scale_depth": 1.4, "dim_model_base": 256,
    },
    nullable=frozenset({"q_lora_rank", "scale_depth", "dim_model_base"}),
    blueprint=_blueprint,
    **latent.ONE_KEY,
    params=_params,
)  # fmt: skip
register(MINICPM3)
