"""Parameters of the layers of a config.json that keep a state instead of keys and values, without norms and biases."""

from collections.abc import Callable, Mapping

from kvattn.errors import ConfigError
from kvattn.memory.hf_fields import Fields


def mixer_params(f: Fields) -> int:
    """Parameters of one such layer.

    Raises:
        ConfigError: they are not known for the family.
    """
    if f.kind not in MIXERS:
        raise ConfigError(
            f"layers without keys and values of model_type {f.kind!r} cannot be counted: give num_params."
        )
    return MIXERS[f.kind](f)


def _delta(f: Fields) -> int:
    """A gated delta net: queries, keys, values and a gate, a convolution over the first three, two numbers per head."""
    d, value_heads = f.size("model_dim"), f.size("linear_num_value_heads")
    keys = f.size("linear_num_key_heads") * f.size("linear_key_head_dim")
    values = value_heads * f.size("linear_value_head_dim")
    convolved = f.size("linear_conv_kernel_dim") * (2 * keys + values)
    return d * (2 * keys + 2 * values + 2 * value_heads) + convolved + values * d


def _mamba(f: Fields) -> int:
    """Mamba 1 (Jamba)."""
    d, state = f.size("model_dim"), f.size("mamba_d_state")
    wide, rank = f.size("mamba_expand") * d, f.get("mamba_dt_rank")
    rank = -(-d // 16) if rank == "auto" else f.size("mamba_dt_rank")
    return 3 * d * wide + wide * (f.size("mamba_d_conv") + 2 * rank + 3 * state)


def _mamba2(f: Fields) -> int:
    """Mamba 2 under the names of Bamba and its relatives."""
    d, heads = f.size("model_dim"), f.size("mamba_n_heads")
    wide = f.size("mamba_d_ssm", f.size("mamba_expand") * d) if f.reads("mamba_d_ssm") else f.size("mamba_expand") * d
    return _second(d, wide, heads, f.size("mamba_n_groups") * f.size("mamba_d_state"), f.size("mamba_d_conv"))


def _nemotron_h(f: Fields) -> int:
    heads = f.size("mamba_num_heads")
    wide, states = heads * f.size("mamba_head_dim"), f.size("n_groups") * f.size("ssm_state_size")
    return _second(f.size("model_dim"), wide, heads, states, f.size("conv_kernel"))


def _second(d: int, wide: int, heads: int, states: int, kernel: int) -> int:
    return d * (2 * wide + 2 * states + heads) + kernel * (wide + 2 * states) + wide * d


def _convolution(f: Fields) -> int:
    """LFM2: three gates, a short convolution, a projection."""
    d = f.size("model_dim")
    return 4 * d * d + f.size("conv_L_cache") * d


def _recurrent(f: Fields) -> int:
    """Griffin: two projections into the recurrence and one out of it, a convolution, gates by blocks."""
    d, heads = f.size("model_dim"), f.size("heads")
    wide = f.size("lru_width", d)
    return 3 * d * wide + f.size("conv1d_width") * wide + 2 * wide * wide // heads


def _lightning(f: Fields) -> int:
    """MiniMax: queries, keys and values of all heads, an output and its gate."""
    return 5 * f.size("model_dim") * f.size("heads") * f.head_dim


MIXERS: Mapping[str, Callable[[Fields], int]] = {
    "bamba": _mamba2,
    "falcon_h1": _mamba2,
    "granitemoehybrid": _mamba2,
    "jamba": _mamba,
    "lfm2": _convolution,
    "lfm2_moe": _convolution,
    "minimax": _lightning,
    "minimax_m1": _lightning,
    "minimax_text_01": _lightning,
    "nemotron_h": _nemotron_h,
    "olmo_hybrid": _delta,
    "qwen3_5_moe_text": _delta,
    "qwen3_5_text": _delta,
    "qwen3_next": _delta,
    "recurrent_gemma": _recurrent,
}
"""By model_type."""
