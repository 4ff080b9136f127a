"""StarCoder 2: RoPE, a window in every layer, layer norms, biases everywhere and an MLP without a gate."""

from kvattn.families import layers, params, rules
from kvattn.families.config import DecoderConfig
from kvattn.families.defaults import ROPE, usual
from kvattn.families.family import Family, Sizes
from kvattn.families.fields import Fields
from kvattn.families.hf import llama
from kvattn.families.registry import register


def _blueprint(fields: Fields) -> rules.Blueprint:
    sizes, bias = llama.sizes(fields, epsilon="norm_epsilon"), fields.flag("use_bias")
    # What published files say besides; transformers builds nothing else.
    fields.only("mlp_type", "default")
    fields.only("norm_type", "layer_norm")
    config = DecoderConfig(
        **sizes,
        **fields.rope(),
        windows=fields.windows(layers.windowed(fields, sizes["num_layers"])),
        norm="layer",
        norm_bias=True,
        activation=fields.activation("hidden_act"),
        gated=False,
        mlp_bias=bias,
        qkv_bias=bias,
        out_bias=bias,
        tie_embeddings=fields.flag("tie_word_embeddings"),
    )
    block = {
        "attention_norm": "input_layernorm",
        **llama.ATTENTION,
        "mlp_norm": "post_attention_layernorm",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    }
    return rules.blueprint(config, llama.PARTS, block, buffers=llama.BUFFERS)


def _params(f: Sizes) -> int:
    d = f.size("model_dim")
    layer = params.plain_layer(f, f.size("mlp_dim"), bias=f.flag("use_bias"), norms=4)
    return params.embeddings(f) + f.num_layers * layer + 2 * d


STARCODER2 = Family(
    model_type="starcoder2",
    defaults=ROPE
    | usual(vocab=49152, dim=3072, mlp=12288, layers=30, heads=24, kv_heads=2, length=4096, tied=True) | {
        "head_dim": None, "hidden_act": "gelu_pytorch_tanh", "norm_epsilon": 1e-5, "use_bias": True,
        "sliding_window": None, "layer_types": None, "mlp_type": None, "norm_type": None,
    },
    blueprint=_blueprint,
    layers=layers.windowed,
    params=_params,
)  # fmt: skip
register(STARCODER2)
