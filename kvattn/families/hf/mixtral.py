"""Mixtral: Mistral with experts."""

from collections.abc import Iterator

from kvattn.families import layers, moe, params, rules
from kvattn.families.config import DecoderConfig
from kvattn.families.family import Family
from kvattn.families.fields import Fields
from kvattn.families.hf import llama
from kvattn.families.registry import register


def _blueprint(fields: Fields) -> rules.Blueprint:
    sizes = llama.sizes(fields)
    config = DecoderConfig(
        **sizes,
        **fields.rope(),
        windows=fields.windows(layers.windowed(fields, sizes["num_layers"])),
        activation=fields.activation("hidden_act"),
        num_experts=fields.size("num_local_experts"),
        experts_per_token=fields.size("num_experts_per_tok"),
        expert_kind="gated",
        tie_embeddings=fields.flag("tie_word_embeddings"),
    )

    def experts(theirs: str, ours: str) -> Iterator[rules.Rule]:
        return moe.routed(f"{theirs}.block_sparse_moe", ours, config, ("w1", "w3", "w2"))

    block = {
        "attention_norm": "input_layernorm",
        **llama.ATTENTION,
        "mlp_norm": "post_attention_layernorm",
        "mlp": experts,
    }
    return rules.blueprint(config, llama.PARTS, block, buffers=llama.BUFFERS)


MIXTRAL = Family(
    model_type="mixtral",
    defaults=llama.DEFAULTS | llama.SIZES_7B | {
        "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None, "layer_types": None, "num_experts_per_tok": 2,
        "num_local_experts": 8,
    },
    aliases={"num_local_experts": ("num_experts",)},
    nullable=frozenset({"num_key_value_heads"}),
    blueprint=_blueprint,
    layers=layers.windowed,
    params=params.gated,
)  # fmt: skip
register(MIXTRAL)
