"""Falcon: 7B (one key/value head, one norm), 40B (groups, two norms), 11B (groups, one norm), RW (ALiBi)."""

from collections.abc import Iterator

import kvattn.positions
from kvattn.models.config import DecoderConfig
from kvattn.models.hf import rules
from kvattn.models.hf.fields import Fields
from kvattn.models.hf.rules import Family, Rule


def falcon(fields: Fields) -> Family:
    """Any of them, by its flags."""
    features = fields.size("hidden_size")
    heads = fields.heads(features, "num_attention_heads")
    newer, parallel = fields.flag("new_decoder_architecture"), fields.flag("parallel_attn")
    multi_query, alibi = fields.flag("multi_query"), fields.flag("alibi")
    bias, groups = fields.flag("bias"), fields.size("num_kv_heads", null=heads)
    # The newer architecture is parallel whatever parallel_attn says, and would have no norm of its own for it.
    if newer:
        fields.only("parallel_attn", True, why="new_decoder_architecture has parallel blocks")
    norms = fields.size("num_ln_in_parallel_attn", null=2 if newer else 1)
    if norms not in (1, 2) or (norms == 2 and not newer and parallel):
        raise rules.unsupported(
            fields.source, "num_ln_in_parallel_attn", norms, "1, or 2 with new_decoder_architecture"
        )
    fields.passed("ff_factor")  # a note of what ffn_hidden_size says
    scale = (features // heads) ** -0.5
    config = DecoderConfig(
        vocab_size=fields.size("vocab_size"),
        model_dim=features,
        num_layers=fields.layers("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=groups if newer else 1 if multi_query else heads,
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
        alibi_slopes=tuple((kvattn.positions.alibi_slopes(heads) * scale).tolist()) if alibi else None,
        **(_no_rope(fields) if alibi else fields.rope()),
    )
    return Family(config, tuple(_rules(config)), ("transformer.",), rules.tied(config))


def _no_rope(fields: Fields) -> dict:
    fields.rope()
    return {}


def _rules(config: DecoderConfig) -> Iterator[Rule]:
    def norm(theirs: str, ours: str) -> Iterator[Rule]:
        return rules.norm(theirs, ours, config.model_dim, bias=True)

    yield rules.embedding("transformer.word_embeddings.weight", config)

    def block(layer: int, ours: str) -> Iterator[Rule]:
        theirs = f"transformer.h.{layer}"
        two = config.parallel and not config.shared_norm
        yield from norm(f"{theirs}.{'ln_attn' if two else 'input_layernorm'}", f"{ours}.attention_norm")
        if not config.shared_norm:
            yield from norm(f"{theirs}.{'ln_mlp' if two else 'post_attention_layernorm'}", f"{ours}.mlp_norm")
        yield from rules.fused(
            f"{theirs}.self_attention.query_key_value", f"{ours}.attention", config, grouped=True, bias=config.qkv_bias
        )
        yield from rules.output(f"{theirs}.self_attention.dense", f"{ours}.attention", config)
        names = {"up": "dense_h_to_4h", "down": "dense_4h_to_h"}
        yield from rules.mlp(f"{theirs}.mlp", f"{ours}.mlp", config, names)

    yield from rules.per_layer(config, block)
    yield from norm("transformer.ln_f", "norm")
    yield from rules.head(config)
