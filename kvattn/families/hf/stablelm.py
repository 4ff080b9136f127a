"""StableLM: layer norms, a quarter of each head turned; 12B has parallel blocks and a norm for every head."""

from kvattn.families import params, rules
from kvattn.families.config import DecoderConfig
from kvattn.families.defaults import ROPE, usual
from kvattn.families.family import Family, Sizes
from kvattn.families.fields import Fields
from kvattn.families.hf import llama
from kvattn.families.registry import register


def _blueprint(fields: Fields) -> rules.Blueprint:
    parallel, features = fields.flag("use_parallel_residual"), fields.size("hidden_size")
    heads = fields.heads(features, "num_attention_heads")
    config = DecoderConfig(
        vocab_size=fields.size("vocab_size"),
        model_dim=features,
        num_layers=fields.layers("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=fields.size("num_key_value_heads"),
        mlp_dim=fields.size("intermediate_size"),
        **fields.rope(features // heads),
        norm="layer",
        norm_bias=True,
        norm_epsilon=fields.number("layer_norm_eps"),
        parallel=parallel,
        shared_norm=parallel,
        qk_norm=fields.flag("qk_layernorm"),
        qk_norm_heads="own",
        qkv_bias=fields.flag("use_qkv_bias"),
        activation=fields.activation("hidden_act"),
        tie_embeddings=fields.flag("tie_word_embeddings"),
    )
    norms = {"attention.query_ln": "self_attn.q_layernorm.norms", "attention.key_ln": "self_attn.k_layernorm.norms"}
    block = {
        "attention_norm": "input_layernorm",
        **llama.ATTENTION,
        **(norms if config.qk_norm else {}),
        **({} if parallel else {"mlp_norm": "post_attention_layernorm"}),
        **llama.MLP,
    }
    return rules.blueprint(config, llama.PARTS, block, buffers=llama.BUFFERS)


def _params(f: Sizes) -> int:
    of_heads = (f.size("heads") + f.kv_heads) * f.head_dim if f.flag("qk_layernorm") else 0
    norms = 2 if f.flag("use_parallel_residual") else 4
    return params.gated(f, norms=norms, qkv_bias=f.flag("use_qkv_bias"), more=of_heads) + f.size("model_dim")


STABLELM = Family(
    model_type="stablelm",
    defaults=ROPE | usual(vocab=50304, dim=2560, mlp=6912, layers=32, heads=32, kv_heads=32, length=4096) | {
        "hidden_act": "silu", "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.25, "use_qkv_bias": False,
        "qk_layernorm": False, "use_parallel_residual": False,
    },
    blueprint=_blueprint,
    params=_params,
)  # fmt: skip
register(STABLELM)
