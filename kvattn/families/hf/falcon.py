"""Falcon: 7B (one key/value head, one norm), 40B (groups, two norms), 11B (groups, one norm), RW (ALiBi)."""

from kvattn.families import params, rules
from kvattn.families.config import DecoderConfig
from kvattn.families.defaults import ROPE, usual
from kvattn.families.family import Family, Sizes
from kvattn.families.fields import Fields
from kvattn.families.registry import register
from kvattn.families.rules import Blueprint
from kvattn.families.settings import Settings, Value
from kvattn.positions import alibi_slopes


def _kv_heads(f: Settings, heads: int) -> int:
    grouped, multi_query = f.flag("new_decoder_architecture"), f.flag("multi_query")
    groups = f.size("num_kv_heads", heads)
    return groups if grouped else 1 if multi_query else heads


def _blueprint(fields: Fields) -> Blueprint:
    features = fields.size("hidden_size")
    heads = fields.heads(features, "num_attention_heads")
    newer, parallel = fields.flag("new_decoder_architecture"), fields.flag("parallel_attn")
    alibi, bias, kv_heads = fields.flag("alibi"), fields.flag("bias"), _kv_heads(fields, heads)
    # The newer architecture is parallel whatever parallel_attn says, and would have no norm of its own for it.
    if newer:
        fields.only("parallel_attn", True, why="new_decoder_architecture has parallel blocks")
    norms = fields.size("num_ln_in_parallel_attn", null=2 if newer else 1)
    if norms not in (1, 2) or (norms == 2 and not newer and parallel):
        raise fields.unsupported("num_ln_in_parallel_attn", norms, "1, or 2 with new_decoder_architecture")
    fields.passed("ff_factor")  # a note of what ffn_hidden_size says
    scale = (features // heads) ** -0.5
    config = DecoderConfig(
        vocab_size=fields.size("vocab_size"),
        model_dim=features,
        num_layers=fields.layers("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        mlp_dim=fields.size("ffn_hidden_size", null=4 * features),
        norm="layer",
        norm_bias=True,
        norm_epsilon=fields.number("layer_norm_epsilon"),
        activation=fields.activation("activation"),
        gated=False,
        parallel=parallel,
        shared_norm=parallel and norms == 1,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        tie_embeddings=fields.flag("tie_word_embeddings"),
        positions="alibi" if alibi else "rope",
        # The bias is added before the scores are scaled.
        alibi_slopes=tuple((alibi_slopes(heads) * scale).tolist()) if alibi else None,
        **(_no_rope(fields) if alibi else fields.rope()),
    )
    two = parallel and norms == 2
    parts = {"embed": "transformer.word_embeddings", "layers": "transformer.h", "norm": "transformer.ln_f"}
    block = {
        "attention_norm": "ln_attn" if two else "input_layernorm",
        **({} if config.shared_norm else {"mlp_norm": "ln_mlp" if two else "post_attention_layernorm"}),
        "attention": "self_attention.query_key_value",
        "attention.out": "self_attention.dense",
        "mlp.up": "mlp.dense_h_to_4h",
        "mlp.down": "mlp.dense_4h_to_h",
    }
    return rules.blueprint(config, parts, block, grouped=True)


def _no_rope(fields: Fields) -> dict[str, Value]:
    fields.rope()
    return {}


def _params(f: Sizes) -> int:
    d, bias = f.size("model_dim"), f.flag("bias")
    if f.flag("new_decoder_architecture"):
        norms = 2 if f.get("num_ln_in_parallel_attn", 2) == 2 else 1
    else:
        norms = 1 if f.flag("parallel_attn") else 2
    layer = params.plain_layer(f, f.size("mlp_dim", 4 * d), bias=bias, norms=2 * norms)
    return params.embeddings(f) + f.num_layers * layer + 2 * d


FALCON = Family(
    model_type="falcon",
    defaults=ROPE | usual(vocab=65024, dim=4544, layers=32, heads=71, length=2048, tied=True) | {
        "num_ln_in_parallel_attn": None, "layer_norm_epsilon": 1e-5, "num_kv_heads": None, "alibi": False,
        "new_decoder_architecture": False, "multi_query": True, "parallel_attn": True, "bias": False,
        "ffn_hidden_size": None, "activation": "gelu",
    },
    aliases={
        "hidden_size": ("n_embed",), "num_hidden_layers": ("n_layer",), "num_attention_heads": ("n_head",),
        "num_kv_heads": ("n_head_kv",),
    },
    nullable=frozenset({"alibi", "new_decoder_architecture", "multi_query", "parallel_attn", "bias"}),
    formerly={"RefinedWeb": {"new_decoder_architecture": True}, "RefinedWebModel": {}},
    blueprint=_blueprint,
    kv_heads=_kv_heads,
    params=_params,
)  # fmt: skip
register(FALCON)
