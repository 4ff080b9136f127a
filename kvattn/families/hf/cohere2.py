"""Command R7B and Command A: parallel blocks, layer norms without bias, RoPE only in layers with a window."""

from kvattn.families import layers, params, rules
from kvattn.families.config import DecoderConfig
from kvattn.families.defaults import ROPE, usual
from kvattn.families.family import Family
from kvattn.families.fields import Fields
from kvattn.families.hf import llama
from kvattn.families.kinds import WINDOW, every
from kvattn.families.registry import register

PATTERN = 4


def _blueprint(fields: Fields) -> rules.Blueprint:
    sizes, bias = llama.sizes(fields, epsilon="layer_norm_eps"), fields.flag("attention_bias")
    fields.passed("_sliding_window_pattern", "layer_switch")  # notes of what layer_types says
    fields.heads(sizes["model_dim"], "num_attention_heads")
    fields.passed("head_dim")  # whatever the file says, it is the hidden size by the heads
    # What published files say besides; transformers builds nothing else.
    fields.only("order_of_interleaved_layers", "local_attn_first")
    fields.only("position_embedding_type", "rope_gptj")
    fields.only("rotary_pct", 1.0, 1)
    fields.only("use_gated_activation", True)
    fields.only("use_parallel_block", True)
    windows = fields.windows(every(fields.size("sliding_window_pattern"), sizes["num_layers"], WINDOW))
    config = DecoderConfig(
        **sizes | {"head_dim": None},
        **fields.rope(),
        rope_interleaved=True,
        rope_layers=tuple(window is not None for window in windows or (None,) * sizes["num_layers"]),
        windows=windows,
        norm="layer",
        parallel=True,
        shared_norm=True,
        qkv_bias=bias,
        out_bias=bias,
        activation=fields.activation("hidden_act"),
        logit_scale=fields.positive("logit_scale"),
        tie_embeddings=fields.flag("tie_word_embeddings"),
    )
    block = {"attention_norm": "input_layernorm", **llama.ATTENTION, **llama.MLP}
    return rules.blueprint(config, llama.PARTS, block, buffers=llama.BUFFERS)


COHERE2 = Family(
    model_type="cohere2",
    defaults=ROPE | usual(vocab=256000, dim=8192, mlp=22528, layers=40, heads=64, length=8192, tied=True) | {
        "num_key_value_heads": None, "head_dim": None, "hidden_act": "silu", "layer_norm_eps": 1e-5,
        "attention_bias": False, "logit_scale": 0.0625, "sliding_window": 4096, "sliding_window_pattern": PATTERN,
        "layer_types": None, "layer_switch": None, "order_of_interleaved_layers": None, "position_embedding_type": None,
        "rotary_pct": None, "use_gated_activation": None, "use_parallel_block": None,
    },
    blueprint=_blueprint,
    layers=layers.windowed_by_pattern(PATTERN),
    head_dim=lambda f: f.size("model_dim") // f.size("heads"),
    params=lambda f: params.gated(f, norms=1),
)  # fmt: skip
register(COHERE2)
