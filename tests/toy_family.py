"""A family of one's own in one file, outside the package: a Llama that calls its tensors and its width otherwise."""

from kvattn.families import Blueprint, DecoderConfig, Family, Fields, params, rules
from kvattn.families.defaults import ROPE, usual
from kvattn.families.hf import llama

PARTS = {"embed": "net.tokens", "layers": "net.blocks", "norm": "net.last_norm"}
BLOCK = {
    "attention_norm": "norm_a",
    "attention.query": "mix.q",
    "attention.key": "mix.k",
    "attention.value": "mix.v",
    "attention.out": "mix.o",
    "mlp_norm": "norm_b",
    "mlp.gate": "gate",
    "mlp.up": "up",
    "mlp.down": "down",
}


def blueprint(fields: Fields) -> Blueprint:
    config = DecoderConfig(
        **llama.sizes(fields),
        **fields.rope(),
        activation=fields.activation("hidden_act"),
        tie_embeddings=fields.flag("tie_word_embeddings"),
    )
    return rules.blueprint(config, PARTS, BLOCK)


TOY = Family(
    model_type="toy",
    defaults=ROPE
    | usual(vocab=100, dim=64, mlp=96, layers=2, heads=4, kv_heads=2, length=512)
    | {"head_dim": None, "hidden_act": "silu", "rms_norm_eps": 1e-6},
    aliases={"hidden_size": ("width",)},
    blueprint=blueprint,
    params=params.gated,
)
