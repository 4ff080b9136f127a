"""BLOOM and MPT: ALiBi, layer norms, no gate."""

from collections.abc import Iterator
from typing import Any

from kvattn.memory.hf_defaults import MPT_ATTENTION
from kvattn.models.config import DecoderConfig
from kvattn.models.hf import rules
from kvattn.models.hf.fields import Fields
from kvattn.models.hf.rules import Family, Rule


def bloom(fields: Fields) -> Family:
    """BLOOM and BLOOMZ."""
    features = fields.size("hidden_size")
    if fields.size("pretraining_tp") > 1 and fields.flag("slow_but_exact"):
        # transformers then leaves out the biases of two projections.
        raise rules.unsupported(fields.source, "slow_but_exact", True, "false where pretraining_tp is above 1")
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
    return Family(config, tuple(_bloom(config)), ("transformer.",), rules.tied(config))


def mpt(fields: Fields) -> Family:
    """MPT, as transformers has it: no biases anywhere."""
    given = fields.mapping("attn_config") or {}
    attention = Fields(given, f"{fields.source}, attn_config", MPT_IGNORED, defaults=MPT_ATTENTION)
    attention.only("attn_type", "multihead_attention")
    attention.only("alibi", True, why="learned positions are not supported for MPT")
    attention.only("prefix_lm", False, why="a decoder is causal")
    attention.only("qk_ln", False)
    attention.only("attn_uses_sequence_id", False)
    scale, clip = attention.number("softmax_scale"), attention.number("clip_qkv")
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
    return Family(config, tuple(_mpt(config)), ("transformer.",), rules.tied(config))


# A config within a config carries the defaults of every config.
MPT_IGNORED = (
    "rope_theta", "rope_impl", "rope_dail_config", "rope_hf_config", "tie_word_embeddings", "kv_n_heads",
)  # fmt: skip


def _bloom(config: DecoderConfig) -> Iterator[Rule]:
    def norm(theirs: str, ours: str) -> Iterator[Rule]:
        return rules.norm(theirs, ours, config.model_dim, bias=True)

    yield rules.embedding("transformer.word_embeddings.weight", config)
    yield from norm("transformer.word_embeddings_layernorm", "embed_norm")

    def block(layer: int, ours: str) -> Iterator[Rule]:
        theirs = f"transformer.h.{layer}"
        yield from norm(f"{theirs}.input_layernorm", f"{ours}.attention_norm")
        yield from rules.fused(
            f"{theirs}.self_attention.query_key_value", f"{ours}.attention", config, grouped=True, bias=True
        )
        yield from rules.output(f"{theirs}.self_attention.dense", f"{ours}.attention", config)
        yield from norm(f"{theirs}.post_attention_layernorm", f"{ours}.mlp_norm")
        names = {"up": "dense_h_to_4h", "down": "dense_4h_to_h"}
        yield from rules.mlp(f"{theirs}.mlp", f"{ours}.mlp", config, names)

    yield from rules.per_layer(config, block)
    yield from norm("transformer.ln_f", "norm")
    yield from rules.head(config)


def _mpt(config: DecoderConfig) -> Iterator[Rule]:
    yield rules.embedding("transformer.wte.weight", config)

    def block(layer: int, ours: str) -> Iterator[Any]:
        theirs = f"transformer.blocks.{layer}"
        yield from rules.norm(f"{theirs}.norm_1", f"{ours}.attention_norm", config.model_dim)
        yield from rules.fused(f"{theirs}.attn.Wqkv", f"{ours}.attention", config, grouped=False, bias=False)
        yield from rules.output(f"{theirs}.attn.out_proj", f"{ours}.attention", config)
        yield from rules.norm(f"{theirs}.norm_2", f"{ours}.mlp_norm", config.model_dim)
        yield from rules.mlp(f"{theirs}.ffn", f"{ours}.mlp", config, {"up": "up_proj", "down": "down_proj"})

    yield from rules.per_layer(config, block)
    yield from rules.norm("transformer.norm_f", "norm", config.model_dim)
    yield from rules.head(config)
