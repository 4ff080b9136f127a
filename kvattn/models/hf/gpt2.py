"""GPT-2, GPT-BigCode (StarCoder) and OPT: learned positions, layer norms, biases everywhere."""

from collections.abc import Iterator

from kvattn.models.config import DecoderConfig
from kvattn.models.hf import rules
from kvattn.models.hf.fields import Fields
from kvattn.models.hf.rules import Family, Layout, Rule

# Masks that older files carry.
BUFFERS = (r"\.attn\.(masked_)?bias$",)


def gpt2(fields: Fields) -> Family:
    """GPT-2: weights are [in, out]."""
    by_layer = fields.flag("scale_attn_by_inverse_layer_idx")
    config = _config(fields, kv_heads=None, by_layer=by_layer)
    return _family(config, transposed=False, grouped=False)


def gpt_bigcode(fields: Fields) -> Family:
    """GPT-BigCode: one key/value head, unless multi_query is off."""
    multi_query = fields.flag("multi_query")
    fields.passed("num_key_value_heads")
    fields.only("inference_runner", 0)
    fields.only("validate_runner_input", True, False)
    fields.only("pre_allocate_kv_cache", False)
    config = _config(fields, kv_heads=1 if multi_query else None, by_layer=False)
    return _family(config, transposed=True, grouped=True)


def opt(fields: Fields) -> Family:
    """OPT. The smallest but one, 350m, has its norms after the residual and embeddings of another size."""
    features, pre = fields.size("hidden_size"), fields.flag("do_layer_norm_before")
    width = fields.size("word_embed_proj_dim", null=features)
    bias = fields.flag("enable_bias")
    fields.only("layer_norm_elementwise_affine", True)
    removed = fields.flag("_remove_final_layer_norm")  # without norms before there is none to remove
    config = DecoderConfig(
        vocab_size=fields.size("vocab_size"),
        model_dim=features,
        num_layers=fields.layers("num_hidden_layers"),
        num_heads=fields.heads(features, "num_attention_heads"),
        mlp_dim=fields.size("ffn_dim"),
        positions="learned",
        max_positions=fields.size("max_position_embeddings"),
        norm="layer",
        norm_bias=True,
        norm_epsilon=1e-5,
        norm_position="pre" if pre else "post",
        final_norm=pre and not removed,
        activation=fields.activation("activation_function"),
        gated=False,
        mlp_bias=bias,
        qkv_bias=bias,
        out_bias=bias,
        embedding_dim=None if width == features else width,
        tie_embeddings=fields.flag("tie_word_embeddings"),
    )
    return Family(config, tuple(_opt(config)), ("model.",), rules.tied(config))


def _config(fields: Fields, *, kv_heads: int | None, by_layer: bool) -> DecoderConfig:
    features = fields.size("n_embd")
    heads, layers = fields.heads(features, "n_head"), fields.layers("n_layer")
    fields.only("add_cross_attention", False)
    scale = (features // heads) ** -0.5 if fields.flag("scale_attn_weights") else 1.0
    return DecoderConfig(
        vocab_size=fields.size("vocab_size"),
        model_dim=features,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        mlp_dim=fields.size("n_inner", null=4 * features),
        positions="learned",
        max_positions=fields.size("n_positions"),
        norm="layer",
        norm_bias=True,
        norm_epsilon=fields.number("layer_norm_epsilon"),
        activation=fields.activation("activation_function"),
        gated=False,
        mlp_bias=True,
        qkv_bias=True,
        out_bias=True,
        attention_scale=tuple(scale / (i + 1) for i in range(layers)) if by_layer else scale,
        tie_embeddings=fields.flag("tie_word_embeddings"),
    )


def _family(config: DecoderConfig, *, transposed: bool, grouped: bool) -> Family:
    def all_rules() -> Iterator[Rule]:
        def norm(theirs: str, ours: str) -> Iterator[Rule]:
            return rules.norm(theirs, ours, config.model_dim, bias=True)

        yield rules.embedding("transformer.wte.weight", config)
        positions = (config.max_positions or 0, config.model_dim)
        yield rules.tensor("transformer.wpe.weight", positions, "positions.embedding")

        def block(layer: int, ours: str) -> Iterator[Rule]:
            theirs = f"transformer.h.{layer}"
            yield from norm(f"{theirs}.ln_1", f"{ours}.attention_norm")
            yield from rules.fused(
                f"{theirs}.attn.c_attn", f"{ours}.attention", config, grouped=grouped, bias=True, transposed=transposed
            )
            yield from rules.output(f"{theirs}.attn.c_proj", f"{ours}.attention", config, transposed)
            yield from norm(f"{theirs}.ln_2", f"{ours}.mlp_norm")
            names = {"up": "c_fc", "down": "c_proj"}
            yield from rules.mlp(f"{theirs}.mlp", f"{ours}.mlp", config, names, transposed)

        yield from rules.per_layer(config, block)
        yield from norm("transformer.ln_f", "norm")
        yield from rules.head(config)

    return Family(config, tuple(all_rules()), ("transformer.",), (*BUFFERS, *rules.tied(config)))


def _opt(config: DecoderConfig) -> Iterator[Rule]:
    def norm(theirs: str, ours: str) -> Iterator[Rule]:
        return rules.norm(theirs, ours, config.model_dim, bias=True)

    yield rules.embedding("model.decoder.embed_tokens.weight", config)
    # The first two rows belong to no position.
    most = config.max_positions or 0
    rows = Layout((most, config.model_dim), ((0,), (1,)), {0: range(2, most + 2)})
    yield rules.tensor(
        "model.decoder.embed_positions.weight", (most + 2, config.model_dim), "positions.embedding", rows
    )
    if config.embedding_dim is not None:
        inner, outer = (config.embedding_dim,), (config.model_dim,)
        yield from rules.linear("model.decoder.project_in", "embed_in", inner, outer, False)
        yield from rules.linear("model.decoder.project_out", "embed_out", outer, inner, False)

    def block(layer: int, ours: str) -> Iterator[Rule]:
        theirs = f"model.decoder.layers.{layer}"
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        yield from norm(f"{theirs}.self_attn_layer_norm", f"{ours}.attention_norm")
        yield from rules.separate(f"{theirs}.self_attn", f"{ours}.attention", config, names=names)
        yield from norm(f"{theirs}.final_layer_norm", f"{ours}.mlp_norm")
        yield from rules.mlp(theirs, f"{ours}.mlp", config, {"up": "fc1", "down": "fc2"})

    yield from rules.per_layer(config, block)
    if config.final_norm:
        yield from norm("model.decoder.final_layer_norm", "norm")
    yield from rules.head(config)
