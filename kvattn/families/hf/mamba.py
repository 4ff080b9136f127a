"""Hybrids of attention and Mamba: Jamba, Bamba, Falcon-H1, Granite 4, Zamba 2, Nemotron-H."""

from kvattn.errors import ConfigError
from kvattn.families import params
from kvattn.families.defaults import usual
from kvattn.families.family import Estimate, Experts, Family, Sizes
from kvattn.families.kinds import NONE, Kind, every
from kvattn.families.layers import attending, full
from kvattn.families.registry import register


def _jamba(f: Sizes, num_layers: int) -> list[Kind]:
    period, offset = f.size("attn_layer_period"), f.size("attn_layer_offset", least=0)
    return every(period, num_layers, NONE, at=offset)


def _jamba_is_sparse(f: Sizes, layer: int) -> bool:
    period, offset = f.size("expert_layer_period"), f.size("expert_layer_offset", least=0)
    return layer % period == offset


def _mamba(f: Sizes) -> int:
    """Mamba 1."""
    d, state = f.size("model_dim"), f.size("mamba_d_state")
    wide, rank = f.size("mamba_expand") * d, f.get("mamba_dt_rank")
    rank = -(-d // 16) if rank == "auto" else f.size("mamba_dt_rank")
    return 3 * d * wide + wide * (f.size("mamba_d_conv") + 2 * rank + 3 * state)


JAMBA = Family(
    model_type="jamba",
    defaults=usual(vocab=65536, dim=4096, mlp=14336, layers=32, heads=32, kv_heads=8, length=262144) | {
        "num_experts_per_tok": 2, "num_experts": 16, "expert_layer_period": 2, "expert_layer_offset": 1,
        "attn_layer_period": 8, "attn_layer_offset": 4, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": 256,
        "mamba_conv_bias": True, "mamba_proj_bias": False, "mamba_d_state": 16,
    },
    aliases={"num_experts": ("num_local_experts",)},
    layers=_jamba,
    estimate=Estimate(mixer=_mamba),
    experts=Experts(is_sparse=_jamba_is_sparse),
)  # fmt: skip


def _mamba2(f: Sizes) -> int:
    """Mamba 2 under the names of Bamba and its relatives."""
    d, heads = f.size("model_dim"), f.size("mamba_n_heads")
    wide = f.size("mamba_d_ssm", f.size("mamba_expand") * d) if f.reads("mamba_d_ssm") else f.size("mamba_expand") * d
    return _second(d, wide, heads, f.size("mamba_n_groups") * f.size("mamba_d_state"), f.size("mamba_d_conv"))


def _second(d: int, wide: int, heads: int, states: int, kernel: int) -> int:
    return d * (2 * wide + 2 * states + heads) + kernel * (wide + 2 * states) + wide * d


def _granite(f: Sizes, num_layers: int) -> list[Kind]:
    del f
    return [NONE] * num_layers


_MAMBA2 = {
    "attention_bias": False, "mamba_n_heads": 128, "mamba_n_groups": 1, "mamba_d_head": 64, "mamba_d_conv": 4,
    "mamba_expand": 2, "mamba_chunk_size": 256, "mamba_conv_bias": True, "mamba_proj_bias": False, "mamba_d_state": 256,
}  # fmt: skip
_BAMBA = _MAMBA2 | {"mlp_bias": False, "attn_layer_indices": None}
BAMBA = Family(
    model_type="bamba",
    defaults=usual(vocab=128000, dim=4096, mlp=14336, layers=32, heads=32, kv_heads=8, length=262144)
    | _BAMBA
    | {"attn_rotary_emb": None, "layer_types": None},
    aliases={"layer_types": ("layers_block_type",)},
    nullable=frozenset({"num_key_value_heads"}),
    layers=attending("attn_layer_indices"),
    estimate=Estimate(mixer=_mamba2),
)
FALCON_H1 = Family(
    model_type="falcon_h1",
    defaults=usual(vocab=128000, dim=4096, mlp=14336, layers=32, heads=32, kv_heads=8, length=8192)
    | _BAMBA
    | {"mamba_use_mlp": None, "mamba_d_ssm": 1024, "mamba_d_head": 8},
    nullable=frozenset({"num_key_value_heads", "mamba_d_ssm"}),
    layers=full,
    has_states=True,
    estimate=Estimate(mixer=_mamba2),
)
GRANITE = Family(
    model_type="granitemoehybrid",
    defaults=usual(vocab=32000, dim=4096, mlp=11008, layers=32, heads=32, kv_heads=32, length=2048)
    | _MAMBA2
    | {"num_local_experts": 8, "num_experts_per_tok": 2, "shared_intermediate_size": 1024, "layer_types": None},
    aliases={"layer_types": ("layers_block_type",)},
    layers=_granite,
    estimate=Estimate(mlp=lambda f: params.mlp(f, hidden=f.size("shared_intermediate_size")), mixer=_mamba2),
)


def _zamba2_head_dim(f: Sizes) -> int:
    return f.size("attention_head_dim", 2 * f.size("model_dim") // f.size("heads"))


def _uncountable(f: Sizes) -> int:
    raise ConfigError("layers that share their weights cannot be counted: give num_params.")


ZAMBA2 = Family(
    model_type="zamba2",
    defaults=usual(vocab=32000, dim=2560, mlp=10240, layers=54, heads=32, kv_heads=32, length=4096, tied=True) | {
        "use_shared_mlp_adapter": None, "use_shared_block_adapter": None, "state_size": None, "layers_block_type": None,
        "mamba_d_conv": 4, "mamba_expand": 2, "mamba_ngroups": 1, "n_mamba_heads": 8, "use_conv_bias": True,
        "chunk_size": 256, "num_mem_blocks": 1, "adapter_rank": 128, "mamba_d_state": 64, "attention_head_dim": None,
        "attention_hidden_size": None, "kv_channels": None, "mamba_headdim": None, "num_query_groups": None,
        "hybrid_layer_ids": None,
    },
    aliases={"layers_block_type": ("layer_types",), "attention_head_dim": ("head_dim",)},
    layers=attending("hybrid_layer_ids"),
    head_dim=_zamba2_head_dim,
    params=_uncountable,
    estimate=Estimate(mixer=_uncountable),
)  # fmt: skip

_LETTERS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}


def _nemotron_blocks(f: Sizes) -> list[str]:
    """What each layer is. The letters say how many there are.

    Raises:
        ConfigError: other letters, or not as many as layers.
    """
    letters, listed = f.get("hybrid_override_pattern"), f.get("layers_block_type")
    if listed is not None:
        length = len(listed) if isinstance(listed, list | tuple) else 1
        return f.list_of("layers_block_type", f.size("num_hidden_layers", length)) or []
    if not isinstance(letters, str) or not letters or any(letter not in _LETTERS for letter in letters):
        raise ConfigError(f"hybrid_override_pattern must be a text of {', '.join(_LETTERS)}, got {letters!r}.")
    if f.size("num_hidden_layers", len(letters)) != len(letters):
        raise ConfigError(
            f"num_hidden_layers is {f.get('num_hidden_layers')}, but hybrid_override_pattern has {len(letters)} "
            "letters: keep one."
        )
    return [_LETTERS[letter] for letter in letters]


def _nemotron_mixer(f: Sizes) -> int:
    heads = f.size("mamba_num_heads")
    wide, states = heads * f.size("mamba_head_dim"), f.size("n_groups") * f.size("ssm_state_size")
    return _second(f.size("model_dim"), wide, heads, states, f.size("conv_kernel"))


def _nemotron_expert(f: Sizes) -> int:
    return 2 * f.size("moe_latent_size", f.size("model_dim")) * f.size("moe_intermediate_size")


def _nemotron_shared(f: Sizes) -> int:
    d = f.size("model_dim")
    outer = 0 if f.get("moe_latent_size") is None else 2 * d * f.size("moe_latent_size")
    return f.count("n_shared_experts") * 2 * d * f.size("moe_shared_expert_intermediate_size") + outer


NEMOTRON_H = Family(
    model_type="nemotron_h",
    defaults=usual(vocab=131072, dim=4096, mlp=21504, heads=32, kv_heads=8, length=4096) | {
        "num_hidden_layers": None, "hybrid_override_pattern": None, "layers_block_type": None, "head_dim": 128,
        "attention_bias": False, "sliding_window": None, "mlp_bias": False, "mamba_num_heads": 128,
        "mamba_head_dim": 64, "n_groups": 8, "conv_kernel": 4, "expand": 2, "use_conv_bias": True, "chunk_size": 128,
        "mamba_proj_bias": False, "n_shared_experts": 1, "moe_intermediate_size": 7688,
        "moe_shared_expert_intermediate_size": 7688, "moe_latent_size": None, "num_experts_per_tok": 2,
        "use_bias": False, "ssm_state_size": 128, "n_routed_experts": 8,
    },
    aliases={
        "layers_block_type": ("layer_types",), "n_routed_experts": ("num_local_experts",),
        "head_dim": ("attention_head_dim",), "n_groups": ("mamba_n_groups",), "conv_kernel": ("mamba_d_conv",),
        "expand": ("mamba_expand",),
    },
    blocks=_nemotron_blocks,
    estimate=Estimate(mlp=params.two_matrices, mixer=_nemotron_mixer),
    experts=Experts(weights=_nemotron_expert, shared=_nemotron_shared),
)  # fmt: skip
register(JAMBA, BAMBA, FALCON_H1, GRANITE, ZAMBA2, NEMOTRON_H)
