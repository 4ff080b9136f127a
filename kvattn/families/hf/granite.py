"""Granite: Llama with a multiplier each for embedding, scores, residual and logits."""

from kvattn.families import params
from kvattn.families.defaults import usual
from kvattn.families.family import Family
from kvattn.families.fields import Fields
from kvattn.families.hf import llama
from kvattn.families.registry import register
from kvattn.families.rules import Blueprint


def _blueprint(fields: Fields) -> Blueprint:
    bias = fields.flag("attention_bias")
    return llama.blueprint(
        fields,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=fields.flag("mlp_bias"),
        embedding_scale=fields.positive("embedding_multiplier"),
        attention_scale=fields.positive("attention_multiplier"),
        residual_scale=fields.positive("residual_multiplier"),
        logit_scale=1 / fields.positive("logits_scaling"),
    )


GRANITE = Family(
    model_type="granite",
    defaults=llama.DEFAULTS | usual(vocab=32000, dim=4096, mlp=11008, layers=32, heads=32, length=2048) | {
        "num_key_value_heads": None, "attention_bias": False, "mlp_bias": False, "embedding_multiplier": 1.0,
        "attention_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0,
    },
    blueprint=_blueprint,
    params=params.gated,
)  # fmt: skip
register(GRANITE)
