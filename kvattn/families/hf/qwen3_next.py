"""Qwen3-Next, Qwen 3.5 and OLMo hybrid: a gated delta net in most layers, attention in some."""

from kvattn.families.defaults import usual
from kvattn.families.family import Estimate, Family, Sizes
from kvattn.families.kinds import FULL, NONE, Kind, every
from kvattn.families.registry import register


def _interval(f: Sizes, num_layers: int) -> list[Kind]:
    return every(f.size("full_attention_interval", 4), num_layers, NONE)


def _delta(f: Sizes) -> int:
    """A gated delta net: queries, keys, values and a gate, a convolution over the first three, two numbers per head."""
    d, value_heads = f.size("model_dim"), f.size("linear_num_value_heads")
    keys = f.size("linear_num_key_heads") * f.size("linear_key_head_dim")
    values = value_heads * f.size("linear_value_head_dim")
    convolved = f.size("linear_conv_kernel_dim") * (2 * keys + values)
    return d * (2 * keys + 2 * values + 2 * value_heads) + convolved + values * d


def _olmo(f: Sizes, num_layers: int) -> list[Kind]:
    kinds = every(4, num_layers, NONE)
    return kinds if FULL in kinds else [*kinds[:-1], FULL]


_DELTA = {
    "attention_bias": False, "layer_types": None, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
}  # fmt: skip
_QWEN = _DELTA | {"head_dim": 256, "full_attention_interval": 4}
_EXPERTS = {"moe_intermediate_size": 512, "shared_expert_intermediate_size": 512}
_ESTIMATE = Estimate(mixer=_delta, gated_attention=True)
QWEN3_NEXT = Family(
    model_type="qwen3_next",
    defaults=usual(vocab=151936, dim=2048, mlp=5632, layers=48, heads=16, kv_heads=2, length=32768)
    | _QWEN
    | _EXPERTS
    | {"num_experts_per_tok": 10, "num_experts": 512, "decoder_sparse_step": 1, "mlp_only_layers": []},
    layers=_interval,
    estimate=_ESTIMATE,
)
QWEN3_5 = Family(
    model_type="qwen3_5_text",
    defaults=usual(vocab=248320, dim=4096, mlp=12288, layers=32, heads=16, kv_heads=4, length=32768) | _QWEN,
    text_part_of=("qwen3_5",),
    layers=_interval,
    estimate=_ESTIMATE,
)
QWEN3_5_MOE = Family(
    model_type="qwen3_5_moe_text",
    defaults=usual(vocab=248320, dim=2048, layers=40, heads=16, kv_heads=2, length=32768)
    | _QWEN
    | _EXPERTS
    | {"num_experts_per_tok": 8, "num_experts": 256},
    text_part_of=("qwen3_5_moe",),
    layers=_interval,
    estimate=_ESTIMATE,
)
OLMO_HYBRID = Family(
    model_type="olmo_hybrid",
    defaults=usual(vocab=100352, dim=3840, mlp=11008, layers=32, heads=30, kv_heads=30, length=65536) | _DELTA | {
        "linear_num_key_heads": 30, "linear_num_value_heads": 30, "linear_key_head_dim": 96,
        "linear_value_head_dim": 192,
    },
    layers=_olmo,
    estimate=Estimate(mixer=_delta),
)  # fmt: skip
register(QWEN3_NEXT, QWEN3_5, QWEN3_5_MOE, OLMO_HYBRID)
