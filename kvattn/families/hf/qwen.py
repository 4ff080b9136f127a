"""Qwen: the first, 2, 2.5 and 3, without experts."""

from kvattn.families import layers, params
from kvattn.families.defaults import usual
from kvattn.families.family import Estimate, Family
from kvattn.families.fields import Fields
from kvattn.families.hf import llama
from kvattn.families.registry import register
from kvattn.families.rules import Blueprint

_windows = layers.windowed_from("max_window_layers", "use_sliding_window")


def _qwen2(fields: Fields) -> Blueprint:
    return _blueprint(fields, qkv_bias=True)


def _qwen3(fields: Fields) -> Blueprint:
    bias = fields.flag("attention_bias")
    return _blueprint(fields, qk_norm=True, qkv_bias=bias, out_bias=bias)


def _blueprint(fields: Fields, **rest: bool) -> Blueprint:
    num_layers = fields.layers("num_hidden_layers")
    fields.size("max_window_layers", least=0)  # checked, even where there is no window
    windows = fields.windows(_windows(fields, num_layers), used=fields.flag("use_sliding_window"))
    return llama.blueprint(fields, windows=windows, **rest)


_SIZES = llama.DEFAULTS | usual(vocab=151936, dim=4096, mlp=22016, layers=32, heads=32, kv_heads=32, length=32768)
_WINDOWS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}
_KV_HEADS = frozenset({"num_key_value_heads"})

QWEN2 = Family(
    model_type="qwen2",
    defaults=_SIZES | _WINDOWS,
    nullable=_KV_HEADS,
    blueprint=_qwen2,
    layers=_windows,
    params=lambda f: params.gated(f, qkv_bias=True),
)
QWEN3 = Family(
    model_type="qwen3",
    defaults=_SIZES | _WINDOWS | {"head_dim": 128, "attention_bias": False},
    nullable=_KV_HEADS,
    blueprint=_qwen3,
    layers=_windows,
    params=lambda f: params.gated(f, qk_norms=True),
)
QWEN = Family(
    model_type="qwen",
    defaults={"kv_channels": 128, "use_logn_attn": True, "attn_dropout_prob": 0.0},
    estimate=Estimate(mlp=params.half_mlp),
)
_VISION = [
    Family(
        model_type=kind,
        defaults={"num_key_value_heads": 32, "use_sliding_window": False, "max_window_layers": 80},
        nullable=_KV_HEADS,
        layers=_windows,
    )
    for kind in ("qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text")
]
QWEN3_VL = Family(
    model_type="qwen3_vl_text", defaults={"num_key_value_heads": 32, "head_dim": 128}, text_part_of=("qwen3_vl",)
)
register(QWEN, QWEN2, QWEN3, QWEN3_VL, *_VISION)
