"""BLOOM and MPT: ALiBi, layer norms, no gate."""

from kvattn.errors import ConfigError
from kvattn.families import params, rules
from kvattn.families.config import DecoderConfig
from kvattn.families.family import Family, Sizes
from kvattn.families.fields import Fields
from kvattn.families.registry import register
from kvattn.families.rules import Blueprint
from kvattn.families.settings import Format


def _bloom(fields: Fields) -> Blueprint:
    features = fields.size("hidden_size")
    if fields.size("pretraining_tp") > 1 and fields.flag("slow_but_exact"):
        # transformers then leaves out the biases of two projections.
        raise fields.unsupported("slow_but_exact", True, "false where pretraining_tp is above 1")
    config = DecoderConfig(
        vocab_size=fields.size("vocab_size"),
        model_dim=features,
        num_layers=fields.layers("n_layer"),
        num_heads=fields.heads(features, "n_head"),
        mlp_dim=4 * features,
        positions="alibi",
        norm="layer",
        norm_bias=True,
        norm_epsilon=fields.number("layer_norm_epsilon"),
        residual_after_norm=fields.flag("apply_residual_connection_post_layernorm"),
        activation="gelu_tanh",
        gated=False,
        mlp_bias=True,
        qkv_bias=True,
        out_bias=True,
        embedding_norm=True,
        tie_embeddings=fields.flag("tie_word_embeddings"),
    )
    parts = {
        "embed": "transformer.word_embeddings",
        "embed_norm": "transformer.word_embeddings_layernorm",
        "layers": "transformer.h",
        "norm": "transformer.ln_f",
    }
    block = {
        "attention_norm": "input_layernorm",
        "attention": "self_attention.query_key_value",
        "attention.out": "self_attention.dense",
        "mlp_norm": "post_attention_layernorm",
        "mlp.up": "mlp.dense_h_to_4h",
        "mlp.down": "mlp.dense_4h_to_h",
    }
    return rules.blueprint(config, parts, block, grouped=True)


def _bloom_params(f: Sizes) -> int:
    d = f.size("model_dim")
    layer = params.plain_layer(f, 4 * d, bias=True, norms=4)
    return params.embeddings(f) + 2 * d + f.num_layers * layer + 2 * d


BLOOM = Family(
    model_type="bloom",
    defaults={
        "vocab_size": 250880, "hidden_size": 64, "n_layer": 2, "n_head": 8, "layer_norm_epsilon": 1e-5,
        "apply_residual_connection_post_layernorm": False, "pretraining_tp": 1, "slow_but_exact": False,
        "tie_word_embeddings": True,
    },
    aliases={"hidden_size": ("n_embed",), "n_layer": ("num_hidden_layers",), "n_head": ("num_attention_heads",)},
    blueprint=_bloom,
    params=_bloom_params,
)  # fmt: skip


def _mpt(fields: Fields) -> Blueprint:
    """As transformers has it: no biases anywhere."""
    attention = Fields(fields.mapping("attn_config") or {}, f"{fields.source}, attn_config", _ATTENTION, _IGNORED)
    attention.only("attn_type", "multihead_attention")
    attention.only("alibi", True, why="learned positions are not supported for MPT")
    attention.only("prefix_lm", False, why="a decoder is causal")
    attention.only("qk_ln", False)
    attention.only("attn_uses_sequence_id", False)
    scale, clip = attention.number_or_none("softmax_scale"), attention.number_or_none("clip_qkv")
    # The authors' code goes by it, transformers does not: other values would mean two different models.
    attention.only("alibi_bias_max", 8)
    attention.finish()
    fields.only("no_bias", True)
    fields.only("embedding_fraction", 1.0, 1)
    fields.only("logit_scale")
    fields.only("norm_type", "low_precision_layernorm", "layernorm")
    # In transformers the MLP is four times as wide whatever expansion_ratio says, and with ALiBi there are no learned
    # positions whatever learned_pos_emb says; a file that has them otherwise does not fit these tensors.
    fields.passed("expansion_ratio", "learned_pos_emb", "max_seq_len")
    features = fields.size("d_model")
    config = DecoderConfig(
        vocab_size=fields.size("vocab_size"),
        model_dim=features,
        num_layers=fields.layers("n_layers"),
        num_heads=fields.heads(features, "n_heads"),
        mlp_dim=4 * features,
        positions="alibi",
        norm="layer",
        norm_epsilon=fields.number("layer_norm_epsilon"),
        activation="gelu",
        gated=False,
        attention_scale=scale,
        qkv_clip=clip or None,
        tie_embeddings=fields.flag("tie_word_embeddings"),
    )
    parts = {"embed": "transformer.wte", "layers": "transformer.blocks", "norm": "transformer.norm_f"}
    block = {
        "attention_norm": "norm_1",
        "attention": "attn.Wqkv",
        "attention.out": "attn.out_proj",
        "mlp_norm": "norm_2",
        "mlp.up": "ffn.up_proj",
        "mlp.down": "ffn.down_proj",
    }
    return rules.blueprint(config, parts, block)


def _mpt_kv_heads(f: Sizes, heads: int) -> int:
    kinds = {"multihead_attention": heads, "multiquery_attention": 1}
    groups, kind = f.size("attn_config.kv_n_heads", heads), f.get("attn_config.attn_type")
    return kinds.get(kind, groups)


def _mpt_params(f: Sizes) -> int:
    d = f.size("model_dim")
    if not f.flag("no_bias"):
        raise ConfigError("mpt with biases: give num_params yourself.")
    return params.embeddings(f) + f.num_layers * params.plain_layer(f, 4 * d, bias=False, norms=2) + d


NAMES = {"d_model": ("hidden_size",), "n_layers": ("num_hidden_layers",), "n_heads": ("num_attention_heads",)}
MPT = Family(
    model_type="mpt",
    defaults={
        "vocab_size": 50368, "d_model": 2048, "n_heads": 16, "n_layers": 24, "layer_norm_epsilon": 1e-5,
        "attn_config": None, "logit_scale": None, "no_bias": True, "embedding_fraction": 1.0,
        "norm_type": "low_precision_layernorm", "tie_word_embeddings": True,
    },
    aliases=NAMES,
    blueprint=_mpt,
    kv_heads=_mpt_kv_heads,
    params=_mpt_params,
)  # fmt: skip
_ATTENTION = Format(
    model_type="mpt",
    defaults={
        "attn_type": "multihead_attention", "alibi": True, "prefix_lm": False, "qk_ln": False,
        "attn_uses_sequence_id": False, "softmax_scale": None, "clip_qkv": None, "alibi_bias_max": 8,
    },
)  # fmt: skip
"""What is in its attn_config."""
_IGNORED = (
    "rope_theta", "rope_impl", "rope_dail_config", "rope_hf_config", "tie_word_embeddings", "kv_n_heads",
)  # fmt: skip
"""A config within a config carries the defaults of every config."""
register(BLOOM, MPT)
