"""LFM2: short convolutions in most layers, attention in some."""

from kvattn.errors import ConfigError
from kvattn.families.defaults import usual
from kvattn.families.family import Estimate, Family, Sizes
from kvattn.families.kinds import Kind
from kvattn.families.layers import attending, full
from kvattn.families.params import mlp, mlp_size
from kvattn.families.registry import register


def _lfm2(f: Sizes, num_layers: int) -> list[Kind]:
    layers = full if f.get("full_attn_idxs") is None else attending("full_attn_idxs")
    return layers(f, num_layers)


def _lfm2_mlp(f: Sizes) -> int:
    hidden = mlp_size(f)
    if f.get("block_auto_adjust_ff_dim"):
        hidden = int(2 * hidden / 3 * f.get("block_ffn_dim_multiplier", 1.0))
        unit = f.size("block_multiple_of")
        hidden = -(-hidden // unit) * unit
    return mlp(f, hidden=hidden)


def _convolution(f: Sizes) -> int:
    """Three gates, a short convolution, a projection."""
    d = f.size("model_dim")
    return 4 * d * d + f.size("conv_L_cache") * d


def _lfm2_moe(f: Sizes, num_layers: int) -> list[Kind]:
    raise ConfigError(f"layer_types must list the {num_layers} layers of lfm2_moe.")


LFM2 = Family(
    model_type="lfm2",
    defaults=usual(vocab=65536, dim=2560, mlp=12288, layers=32, heads=32, kv_heads=8, length=128000, tied=True) | {
        "block_dim": None, "block_use_swiglu": None, "block_use_xavier_init": None, "conv_dim": None,
        "conv_dim_out": None, "conv_use_xavier_init": None, "num_heads": None, "conv_bias": False, "conv_L_cache": 3,
        "block_multiple_of": 256, "block_auto_adjust_ff_dim": True, "layer_types": None, "full_attn_idxs": None,
        "block_ffn_dim_multiplier": 1.0,
    },
    aliases={"intermediate_size": ("block_ff_dim",), "tie_word_embeddings": ("tie_embedding",)},
    layers=_lfm2,
    estimate=Estimate(mlp=_lfm2_mlp, mixer=_convolution),
)  # fmt: skip
LFM2_MOE = Family(
    model_type="lfm2_moe",
    defaults=usual(vocab=65536, dim=2048, mlp=7168, layers=32, heads=32, kv_heads=8, length=128000, tied=True) | {
        "moe_intermediate_size": 1792, "conv_bias": False, "conv_L_cache": 3, "num_dense_layers": 2,
        "num_experts_per_tok": 4, "num_experts": 32, "layer_types": None,
    },
    aliases={"tie_word_embeddings": ("tie_embedding",)},
    layers=_lfm2_moe,
    estimate=Estimate(mixer=_convolution),
)  # fmt: skip
register(LFM2, LFM2_MOE)
