"""Llama 4: layers with rotary positions keep their chunk only."""

from kvattn.families import layers, params
from kvattn.families.defaults import usual
from kvattn.families.experts import expert_weights, layer_numbers
from kvattn.families.family import Estimate, Experts, Family, Sizes
from kvattn.families.kinds import CHUNK, FULL, Kind
from kvattn.families.registry import register


def _llama4(f: Sizes, num_layers: int) -> list[Kind]:
    local = CHUNK if f.get("attention_chunk_size") is not None else FULL
    return [local if turned else FULL for turned in layers.turned(f, num_layers)]


def _is_sparse(f: Sizes, layer: int) -> bool:
    if (chosen := f.get("moe_layers")) is not None:
        return layer in layer_numbers("moe_layers", chosen)
    return (layer + 1) % f.size("interleave_moe_layer_step") == 0


LLAMA4 = Family(
    model_type="llama4_text",
    defaults=usual(vocab=202048, dim=5120, mlp=8192, layers=48, heads=40, kv_heads=8, length=131072) | {
        "intermediate_size_mlp": 16384, "head_dim": 128, "num_experts_per_tok": 1, "num_local_experts": 16,
        "interleave_moe_layer_step": 1, "attention_chunk_size": 8192, "layer_types": None, "attention_bias": False,
        "no_rope_layers": None, "no_rope_layer_interval": 4, "moe_layers": None,
    },
    text_part_of=("llama4",),
    layers=_llama4,
    estimate=Estimate(mlp=lambda f: params.mlp(f, hidden=f.size("intermediate_size_mlp"))),
    experts=Experts(is_sparse=_is_sparse, shared=expert_weights),
)  # fmt: skip
register(LLAMA4)
