"""GPT-2, GPT-BigCode (StarCoder) and OPT: learned positions, layer norms, biases everywhere."""

from collections.abc import Callable

from kvattn.families import params, rules
from kvattn.families.config import DecoderConfig
from kvattn.families.defaults import usual
from kvattn.families.family import Family, Sizes
from kvattn.families.fields import Fields
from kvattn.families.registry import register
from kvattn.families.settings import Settings, Value

_BUFFERS = (r"\.attn\.(masked_)?bias$",)
"""Masks that older files carry."""
_PARTS = {
    "embed": "transformer.wte",
    "positions": "transformer.wpe",
    "layers": "transformer.h",
    "norm": "transformer.ln_f",
}
_BLOCK = {
    "attention_norm": "ln_1",
    "attention": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}


def _gpt2(fields: Fields) -> rules.Blueprint:
    """Weights are [in, out]."""
    config = _config(fields, by_layer=fields.flag("scale_attn_by_inverse_layer_idx"))
    return rules.blueprint(config, _PARTS, _BLOCK, transposed=False, buffers=_BUFFERS)


def _bigcode(fields: Fields) -> rules.Blueprint:
    fields.only("inference_runner", 0)
    fields.only("validate_runner_input", True, False)
    fields.only("pre_allocate_kv_cache", False)
    config = _config(fields, kv_heads=_bigcode_kv_heads)
    return rules.blueprint(config, _PARTS, _BLOCK, grouped=True, buffers=_BUFFERS)


def _bigcode_kv_heads(f: Settings, heads: int) -> int:
    f.passed("num_key_value_heads")
    return 1 if f.flag("multi_query") else heads


def _config(
    fields: Fields, *, kv_heads: Callable[[Fields, int], int] | None = None, by_layer: bool = False
) -> DecoderConfig:
    features = fields.size("n_embd")
    heads, layers = fields.heads(features, "n_head"), fields.layers("n_layer")
    fields.only("add_cross_attention", False)
    scale = (features // heads) ** -0.5 if fields.flag("scale_attn_weights") else 1.0
    return DecoderConfig(
        vocab_size=fields.size("vocab_size"),
        model_dim=features,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads if kv_heads is None else kv_heads(fields, heads),
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


def _gpt2_params(f: Sizes) -> int:
    d = f.size("model_dim")
    layer = params.plain_layer(f, f.size("mlp_dim", 4 * d), bias=True, norms=4)
    return params.embeddings(f) + f.size("positions") * d + f.num_layers * layer + 2 * d


NAMES = {
    "n_embd": ("hidden_size",),
    "n_layer": ("num_hidden_layers",),
    "n_head": ("num_attention_heads",),
    "n_positions": ("max_position_embeddings",),
}
_DEFAULTS: dict[str, Value] = {
    "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None,
    "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
    "add_cross_attention": False, "tie_word_embeddings": True,
}  # fmt: skip
GPT2 = Family(
    model_type="gpt2",
    defaults=_DEFAULTS | {"scale_attn_by_inverse_layer_idx": False},
    aliases=NAMES,
    blueprint=_gpt2,
    params=_gpt2_params,
)
BIGCODE = Family(
    model_type="gpt_bigcode",
    defaults=_DEFAULTS | {
        "activation_function": "gelu_pytorch_tanh", "multi_query": True, "inference_runner": None,
        "validate_runner_input": None, "pre_allocate_kv_cache": None,
    },
    aliases=NAMES,
    blueprint=_bigcode,
    kv_heads=_bigcode_kv_heads,
    params=_gpt2_params,
)  # fmt: skip


def _opt(fields: Fields) -> rules.Blueprint:
    """The smallest but one, 350m, has its norms after the residual and embeddings of another size."""
    features, pre = fields.size("hidden_size"), fields.flag("do_layer_norm_before")
    width = fields.size("word_embed_proj_dim", null=features)
    bias = fields.flag("enable_bias")
    fields.only("layer_norm_elementwise_affine", True)
    removed = fields.flag("_remove_final_layer_norm")  # without norms before there is none to remove
    most = fields.size("max_position_embeddings")
    config = DecoderConfig(
        vocab_size=fields.size("vocab_size"),
        model_dim=features,
        num_layers=fields.layers("num_hidden_layers"),
        num_heads=fields.heads(features, "num_attention_heads"),
        mlp_dim=fields.size("ffn_dim"),
        positions="learned",
        max_positions=most,
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
    # The first two rows belong to no position.
    rows = rules.Layout((most, features), ((0,), (1,)), {0: range(2, most + 2)})
    positions = rules.tensor("model.decoder.embed_positions.weight", (most + 2, features), "positions.embedding", rows)
    projections = {"embed_in": "model.decoder.project_in", "embed_out": "model.decoder.project_out"}
    parts = {
        "embed": "model.decoder.embed_tokens",
        "positions": lambda *_: iter([positions]),
        **({} if config.embedding_dim is None else projections),
        "layers": "model.decoder.layers",
        **({"norm": "model.decoder.final_layer_norm"} if config.final_norm else {}),
    }
    block = {
        "attention_norm": "self_attn_layer_norm",
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.out": "self_attn.out_proj",
        "mlp_norm": "final_layer_norm",
        "mlp.up": "fc1",
        "mlp.down": "fc2",
    }
    return rules.blueprint(config, parts, block)


def _opt_params(f: Sizes) -> int:
    d, biased, affine = f.size("model_dim"), f.flag("enable_bias"), f.flag("layer_norm_elementwise_affine")
    narrow = f.size("word_embed_proj_dim", d)
    layer = params.plain_layer(f, f.size("mlp_dim"), bias=biased, norms=4 * affine)
    last = f.flag("do_layer_norm_before") and not f.flag("_remove_final_layer_norm")
    copies = 1 if f.flag("tie_word_embeddings") else 2
    tables = copies * f.size("vocab") * narrow + (f.size("positions") + 2) * d
    projections = 2 * narrow * d if narrow != d else 0
    return tables + projections + f.num_layers * layer + (2 * d * affine if last else 0)


OPT = Family(
    model_type="opt",
    defaults=usual(vocab=50272, dim=768, layers=12, heads=12, length=2048, tied=True) | {
        "ffn_dim": 3072, "do_layer_norm_before": True, "_remove_final_layer_norm": False, "word_embed_proj_dim": None,
        "activation_function": "relu", "enable_bias": True, "layer_norm_elementwise_affine": True,
    },
    blueprint=_opt,
    params=_opt_params,
)  # fmt: skip
register(GPT2, BIGCODE, OPT)
