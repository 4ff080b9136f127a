"""GPT-NeoX, Pythia, Dolly, RedPajama: parallel blocks, fused weights, a quarter of each head turned."""

from kvattn.families import params, rules
from kvattn.families.config import DecoderConfig
from kvattn.families.defaults import ROPE, usual
from kvattn.families.family import Family, Sizes
from kvattn.families.fields import Fields
from kvattn.families.registry import register


def _blueprint(fields: Fields) -> rules.Blueprint:
    features, bias = fields.size("hidden_size"), fields.flag("attention_bias")
    heads = fields.heads(features, "num_attention_heads")
    config = DecoderConfig(
        vocab_size=fields.size("vocab_size"),
        model_dim=features,
        num_layers=fields.layers("num_hidden_layers"),
        num_heads=heads,
        mlp_dim=fields.size("intermediate_size"),
        **fields.rope(features // heads),
        norm="layer",
        norm_bias=True,
        norm_epsilon=fields.number("layer_norm_eps"),
        parallel=fields.flag("use_parallel_residual"),
        activation=fields.activation("hidden_act"),
        gated=False,
        mlp_bias=True,
        qkv_bias=bias,
        out_bias=bias,
        tie_embeddings=fields.flag("tie_word_embeddings"),
    )
    parts = {"embed": "gpt_neox.embed_in", "layers": "gpt_neox.layers", "norm": "gpt_neox.final_layer_norm"}
    block = {
        "attention_norm": "input_layernorm",
        "attention": "attention.query_key_value",
        "attention.out": "attention.dense",
        "mlp_norm": "post_attention_layernorm",
        "mlp.up": "mlp.dense_h_to_4h",
        "mlp.down": "mlp.dense_4h_to_h",
    }
    return rules.blueprint(config, parts, block, grouped=True, buffers=_BUFFERS, renamed={"embed_out": "lm_head"})


def _params(f: Sizes) -> int:
    d, bias = f.size("model_dim"), f.flag("attention_bias")
    layer = params.plain_layer(f, f.size("mlp_dim"), bias=bias, mlp_bias=True, norms=4)
    return params.embeddings(f) + f.num_layers * layer + 2 * d


_BUFFERS = (r"\.attention\.(masked_)?bias$", r"rotary_emb\.inv_freq$")
"""Masks and frequencies that older files carry."""
GPT_NEOX = Family(
    model_type="gpt_neox",
    defaults=ROPE | usual(vocab=50432, dim=6144, mlp=24576, layers=44, heads=64, length=2048) | {
        "attention_bias": True, "hidden_act": "gelu", "layer_norm_eps": 1e-5, "use_parallel_residual": True,
        "partial_rotary_factor": 0.25,
    },
    aliases={"rope_theta": ("rotary_emb_base",), "partial_rotary_factor": ("rotary_pct",)},
    blueprint=_blueprint,
    params=_params,
)  # fmt: skip
register(GPT_NEOX)
