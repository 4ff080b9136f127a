"""SmolLM3: Llama with every fourth layer without rotary positions; those may have a window."""

from kvattn.families import layers, params
from kvattn.families.defaults import usual
from kvattn.families.family import Family
from kvattn.families.fields import Fields
from kvattn.families.hf import llama
from kvattn.families.kinds import FULL, WINDOW, Kind
from kvattn.families.registry import register
from kvattn.families.rules import Blueprint
from kvattn.families.settings import Settings


def _layers(f: Settings, num_layers: int) -> list[Kind]:
    used = f.flag("use_sliding_window") and f.get("sliding_window") is not None
    return [FULL if turned or not used else WINDOW for turned in layers.turned(f, num_layers)]


def _blueprint(fields: Fields) -> Blueprint:
    num_layers, bias = fields.layers("num_hidden_layers"), fields.flag("attention_bias")
    fields.passed("max_window_layers")  # a note: nothing goes by it
    return llama.blueprint(
        fields,
        windows=fields.windows(_layers(fields, num_layers), used=fields.flag("use_sliding_window")),
        rope_layers=tuple(layers.turned(fields, num_layers)),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=fields.flag("mlp_bias"),
    )


SMOLLM3 = Family(
    model_type="smollm3",
    defaults=llama.DEFAULTS
    | usual(vocab=128256, dim=2048, mlp=11008, layers=36, heads=16, kv_heads=4, length=32768, tied=True) | {
        "rope_theta": 2000000.0, "use_sliding_window": False, "sliding_window": None, "max_window_layers": None,
        "layer_types": None, "no_rope_layers": None, "no_rope_layer_interval": 4, "attention_bias": False,
        "mlp_bias": False,
    },
    nullable=frozenset({"num_key_value_heads"}),
    blueprint=_blueprint,
    layers=_layers,
    params=params.gated,
)  # fmt: skip
register(SMOLLM3)
