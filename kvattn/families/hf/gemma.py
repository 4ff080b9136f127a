"""Gemma: scaled embeddings; from the second on norms before and after, and windows in most layers."""

import math

from kvattn.errors import ConfigError
from kvattn.families import layers, params, rules
from kvattn.families.config import DecoderConfig
from kvattn.families.defaults import ROPE, usual
from kvattn.families.family import Estimate, Family, Sizes
from kvattn.families.fields import Fields
from kvattn.families.hf import llama
from kvattn.families.kinds import NONE, WINDOW, Kind, every
from kvattn.families.registry import register
from kvattn.families.settings import Value

_every_second = layers.windowed_but(at=1, period=2)


def _gemma(fields: Fields) -> rules.Blueprint:
    """Files of the first release say "gelu" and mean the tanh approximation."""
    bias = fields.flag("attention_bias")
    fields.only("use_bidirectional_attention", False, why="a decoder is causal")
    fields.only("hidden_activation", "gelu_pytorch_tanh")  # transformers goes by hidden_act
    activation = fields.activation("hidden_act")
    config = DecoderConfig(
        **llama.sizes(fields),
        **fields.rope(),
        activation="gelu_tanh" if fields.get("hidden_act") == "gelu" else activation,
        embedding_scale=math.sqrt(fields.size("hidden_size")),
        qkv_bias=bias,
        out_bias=bias,
        tie_embeddings=fields.flag("tie_word_embeddings"),
    )
    block = {
        "attention_norm": "input_layernorm", **llama.ATTENTION, "mlp_norm": "post_attention_layernorm", **llama.MLP,
    }  # fmt: skip
    return rules.blueprint(config, llama.PARTS, block, plus_one=True, buffers=llama.BUFFERS)


def _gemma2(fields: Fields) -> rules.Blueprint:
    num_layers = fields.layers("num_hidden_layers")
    return _blueprint(
        fields,
        **fields.rope(),
        windows=fields.windows(_every_second(fields, num_layers)),
        softcap=fields.number_or_none("attn_logit_softcapping"),
    )


def _gemma3(fields: Fields) -> rules.Blueprint:
    """Each kind of layer has its own frequencies."""
    num_layers = fields.layers("num_hidden_layers")
    fields.passed("_sliding_window_pattern")  # a note of what layer_types says
    windows = fields.windows(every(fields.size("sliding_window_pattern"), num_layers, WINDOW))
    fields.only("attn_logit_softcapping", why="Gemma 3 has none")
    return _blueprint(fields, **_ropes(fields), windows=windows, qk_norm=True)


def _ropes(fields: Fields) -> dict[str, Value]:
    """Frequencies of both kinds of layers, from either form that transformers has written."""
    kinds, older = fields.mapping("rope_parameters") or {}, fields.mapping("rope_scaling") or {}
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown:
        # transformers passes over them.
        raise fields.unsupported(
            "rope_parameters", dict(kinds), "one dict for full_attention and one for sliding_attention"
        )
    fields.passed("original_max_position_embeddings")
    whole, local = ({} if kinds.get(kind) is None else kinds[kind] for kind in ("full_attention", "sliding_attention"))
    for name, given in (("full_attention", whole), ("sliding_attention", local)):
        if not isinstance(given, dict):
            raise ConfigError(f"{fields.source}: rope_parameters of {name} must be an object, got {given!r}.")
    if {**whole, **older}.get("truncate", True) is not True:
        raise fields.unsupported("truncate in rope_parameters of full_attention", False, "true")
    inner = fields.scaled({**whole, **older}, fields.get("rope_theta"), None)
    outer = fields.scaled(local, fields.get("rope_local_base_freq"), None)
    if outer["rope_scaling"] is not None:
        raise fields.unsupported("rope_parameters of sliding_attention", outer["rope_scaling"], "no scaling")
    return inner | {"local_rope_theta": outer["rope_theta"]}


def _blueprint(fields: Fields, **rest: Value) -> rules.Blueprint:
    bias = fields.flag("attention_bias")
    fields.only("use_bidirectional_attention", False, why="a decoder is causal")
    fields.passed("hidden_act")  # the activation is hidden_activation, even where only the other is given
    config = DecoderConfig(
        **llama.sizes(fields),
        activation=fields.activation("hidden_activation"),
        attention_scale=fields.positive("query_pre_attn_scalar") ** -0.5,
        logit_softcap=fields.number_or_none("final_logit_softcapping"),
        tie_embeddings=fields.flag("tie_word_embeddings"),
        embedding_scale=math.sqrt(fields.size("hidden_size")),
        norm_position="sandwich",
        qkv_bias=bias,
        out_bias=bias,
        **rest,
    )
    block = {
        "attention_norm": "input_layernorm",
        **llama.ATTENTION,
        **(llama.QK_NORMS if config.qk_norm else {}),
        "attention_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        **llama.MLP,
        "mlp_post_norm": "post_feedforward_layernorm",
    }
    return rules.blueprint(config, llama.PARTS, block, plus_one=True, buffers=llama.BUFFERS)


def _griffin(f: Sizes, num_layers: int) -> list[Kind]:
    blocks = f.get("block_types")
    known: dict[str, Kind] = {"recurrent": NONE, "attention": WINDOW}
    if not isinstance(blocks, list | tuple) or not blocks or any(block not in known for block in blocks):
        raise ConfigError(f"block_types must list recurrent and attention, got {blocks!r}.")
    return [known[blocks[i % len(blocks)]] for i in range(num_layers)]


def _recurrence(f: Sizes) -> int:
    """Two projections into it and one out of it, a convolution, gates by blocks."""
    d, heads = f.size("model_dim"), f.size("heads")
    wide = f.size("lru_width", d)
    return 3 * d * wide + f.size("conv1d_width") * wide + 2 * wide * wide // heads


_DEFAULTS: dict[str, Value] = ROPE | usual(
    vocab=256000, dim=2304, mlp=9216, layers=26, heads=8, kv_heads=4, length=8192, tied=True
) | {
    "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "attention_bias": False,
    "query_pre_attn_scalar": 256, "sliding_window": 4096, "layer_types": None, "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0, "use_bidirectional_attention": None,
}  # fmt: skip
GEMMA2 = Family(
    model_type="gemma2",
    defaults=_DEFAULTS,
    aliases={"sliding_window": ("sliding_window_size",)},  # its files have both
    nullable=frozenset({"final_logit_softcapping", "attn_logit_softcapping"}),
    blueprint=_gemma2,
    layers=_every_second,
    params=lambda f: params.gated(f, norms=4),
)
GEMMA3 = Family(
    model_type="gemma3_text",
    defaults=_DEFAULTS | {
        "vocab_size": 262208, "max_position_embeddings": 131072, "rope_theta": 1e6, "rope_local_base_freq": 10000.0,
        "sliding_window_pattern": 6, "final_logit_softcapping": None, "attn_logit_softcapping": None,
        "use_bidirectional_attention": False,
    },
    nullable=frozenset({"use_bidirectional_attention"}),
    text_part_of=("gemma3",),
    blueprint=_gemma3,
    layers=layers.windowed_by_pattern(6),
    params=lambda f: params.gated(f, norms=4, qk_norms=True),
)  # fmt: skip
GEMMA = Family(
    model_type="gemma",
    defaults=llama.DEFAULTS
    | usual(vocab=256000, dim=3072, mlp=24576, layers=28, heads=16, kv_heads=16, length=8192, tied=True) | {
        "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": None, "attention_bias": False,
        "use_bidirectional_attention": None,
    },
    nullable=frozenset({"num_key_value_heads"}),
    blueprint=_gemma,
    params=params.gated,
)  # fmt: skip
GEMMA3N = Family(
    model_type="gemma3n_text",
    defaults=usual(vocab=262400, dim=2048, layers=35, heads=8, kv_heads=2, length=32768, tied=True) | {
        "intermediate_size": None, "head_dim": 256, "attention_bias": False, "sliding_window": 512, "layer_types": None,
        "vocab_size_per_layer_input": 262144, "num_kv_shared_layers": 15, "hidden_size_per_layer_input": 256,
    },
    text_part_of=("gemma3n",),
    layers=layers.windowed_by_pattern(5),
)  # fmt: skip
VAULT = Family(
    model_type="vaultgemma",
    defaults={"num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096, "tie_word_embeddings": True},
    layers=_every_second,
)
RECURRENT = Family(
    model_type="recurrent_gemma",
    defaults=usual(vocab=256000, dim=2560, mlp=7680, layers=26, heads=10, kv_heads=10, tied=True) | {
        "_block_types": None, "block_types": ["recurrent", "recurrent", "attention"], "lru_width": 2560,
        "conv1d_width": 4, "attention_bias": False, "sliding_window": 2048,
    },
    aliases={"sliding_window": ("attention_window_size",)},
    nullable=frozenset({"num_key_value_heads"}),
    layers=_griffin,
    estimate=Estimate(mlp=params.half_mlp, mixer=_recurrence),
)  # fmt: skip
register(GEMMA, GEMMA2, GEMMA3, GEMMA3N, VAULT, RECURRENT)
