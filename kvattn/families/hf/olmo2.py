"""OLMo 2: norms of what attention and MLP return, and of all heads of queries and keys together."""

from kvattn.families import params, rules
from kvattn.families.config import DecoderConfig
from kvattn.families.defaults import usual
from kvattn.families.family import Family, Sizes
from kvattn.families.fields import Fields
from kvattn.families.hf import llama
from kvattn.families.registry import register


def _blueprint(fields: Fields) -> rules.Blueprint:
    bias = fields.flag("attention_bias")
    config = DecoderConfig(
        **llama.sizes(fields),
        **fields.rope(),
        norm_position="output",
        qk_norm=True,
        qk_norm_heads="joint",
        qkv_bias=bias,
        out_bias=bias,
        activation=fields.activation("hidden_act"),
        tie_embeddings=fields.flag("tie_word_embeddings"),
    )
    block = {
        **llama.ATTENTION,
        **llama.QK_NORMS,
        "attention_post_norm": "post_attention_layernorm",
        **llama.MLP,
        "mlp_post_norm": "post_feedforward_layernorm",
    }
    return rules.blueprint(config, llama.PARTS, block, buffers=llama.BUFFERS)


def _params(f: Sizes) -> int:
    return params.gated(f, more=(f.size("heads") + f.kv_heads) * f.head_dim)


OLMO2 = Family(
    model_type="olmo2",
    defaults=llama.DEFAULTS | usual(vocab=50304, dim=4096, mlp=11008, layers=32, heads=32, length=2048) | {
        "num_key_value_heads": None, "attention_bias": False, "rms_norm_eps": 1e-5,
    },
    blueprint=_blueprint,
    params=_params,
)  # fmt: skip
register(OLMO2)
