"""Latent attention (MLA) in a config.json: its sizes, its tensors as DeepSeek names them, and its parameters."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from kvattn.families import rules
from kvattn.families.config import DecoderConfig
from kvattn.families.family import Sizes
from kvattn.families.fields import MAX_HEADS, Fields
from kvattn.families.settings import Value

DEFAULTS: dict[str, Value] = {"num_key_value_heads": None, "head_dim": None, "qk_head_dim": None}
"""Fields that files have and that say nothing new."""


def sizes(fields: Fields, value_dim: int | None = None) -> dict[str, Value]:
    """The sizes of a decoder with latent attention, as arguments of `DecoderConfig`.

    Args:
        fields: of the file.
        value_dim: what v_head_dim is where it is null.

    Raises:
        ConfigError: sizes that are no sizes.
        UnsupportedError: heads of keys that are fewer than those of queries.
    """
    heads = fields.size("num_attention_heads", most=MAX_HEADS)
    plain, rotary = fields.size("qk_nope_head_dim"), fields.size("qk_rope_head_dim")
    fields.only("num_key_value_heads", heads, why="every head has a key of its own, made from the latent")
    fields.only("head_dim", rotary, plain + rotary)
    fields.only("qk_head_dim", plain + rotary)
    bias, rank = fields.flag("attention_bias"), fields.get("q_lora_rank")
    return {
        "vocab_size": fields.size("vocab_size"),
        "model_dim": fields.size("hidden_size"),
        "num_layers": fields.layers("num_hidden_layers"),
        "num_heads": heads,
        "mlp_dim": fields.size("intermediate_size"),
        "norm_epsilon": fields.number("rms_norm_eps"),
        "kv_lora_rank": fields.size("kv_lora_rank"),
        "q_lora_rank": None if rank is None else fields.size("q_lora_rank"),
        "qk_nope_head_dim": plain,
        "qk_rope_head_dim": rotary,
        "v_head_dim": fields.size("v_head_dim", null=value_dim),
        "qkv_bias": bias,
        "out_bias": bias,
    }


def scale(sizes: Mapping[str, Value], rope: Mapping[str, Value]) -> float | None:
    """What multiplies scores; None: 1/√(P + R).

    Where frequencies are stretched, scores are larger by the square of yarn's magnitude for ``mscale_all_dim``, which
    DeepSeek puts here and not into cosines and sines.

    Args:
        sizes: what `sizes` returned.
        rope: what `Fields.rope` returned.
    """
    scaling = rope["rope_scaling"]
    weight = scaling.get("mscale_all_dim") if isinstance(scaling, Mapping) else None
    if not weight or scaling["factor"] <= 1:
        return None
    magnitude = 0.1 * weight * math.log(scaling["factor"]) + 1.0
    return magnitude**2 / math.sqrt(sizes["qk_nope_head_dim"] + sizes["qk_rope_head_dim"])


def attention(config: DecoderConfig) -> Callable[[str, str], Iterator[rules.Rule]]:
    """Makes the rules for the attention of a layer, as a part of `kvattn.families.rules.blueprint`."""
    heads, rank, plain = config.num_heads, config.kv_lora_rank or 0, config.qk_nope_head_dim or 0
    rotary, value = config.qk_rope_head_dim or 0, config.v_head_dim or 0
    features, query = (config.model_dim,), (heads, plain + rotary)

    def part(theirs: str, ours: str) -> Iterator[rules.Rule]:
        theirs = f"{theirs}.self_attn"
        if config.q_lora_rank is None:
            yield from rules.linear(f"{theirs}.q_proj", f"{ours}.query", features, query, False)
        else:
            low = (config.q_lora_rank,)
            yield from rules.linear(f"{theirs}.q_a_proj", f"{ours}.query_down", features, low, config.qkv_bias)
            yield from rules.norm(f"{theirs}.q_a_layernorm", f"{ours}.query_norm", *low)
            yield from rules.linear(f"{theirs}.q_b_proj", f"{ours}.query_up", low, query, False)
        down = f"{theirs}.kv_a_proj_with_mqa", f"{ours}.kv_down"
        yield from rules.linear(*down, features, (rank + rotary,), config.qkv_bias)
        yield from rules.norm(f"{theirs}.kv_a_layernorm", f"{ours}.kv_norm", rank)
        made = {
            f"{ours}.{name}.kernel": rules.Layout(
                (rank, heads, len(taken)), ((1, 2), (0,)), {2: taken}, {2: plain + value}
            )
            for name, taken in (("key_up", range(plain)), ("value_up", range(plain, plain + value)))
        }
        yield rules.Rule({f"{theirs}.kv_b_proj.weight": (heads * (plain + value), rank)}, made)
        yield from rules.linear(f"{theirs}.o_proj", f"{ours}.out", (heads, value), features, config.out_bias)

    return part


def cached(f: Sizes) -> int:
    """C + R: what is cached of a token, one key for all heads."""
    return rank(f) + f.size("qk_rope_head_dim")


def rank(f: Sizes) -> int:
    """C: as many of them are the value."""
    return f.size("kv_lora_rank")


def one_head(f: Sizes, heads: int) -> int:
    """K."""
    del f, heads
    return 1


def params(f: Sizes) -> int:
    """Parameters of the attention of one layer."""
    d, heads, rank = f.size("model_dim"), f.size("heads"), f.size("kv_lora_rank")
    plain, rotary, value = f.size("qk_nope_head_dim"), f.size("qk_rope_head_dim"), value_dim(f)
    bias, low = f.flag("attention_bias"), f.get("q_lora_rank")
    queries = heads * (plain + rotary)
    total = d * queries
    if low is not None:
        low = f.size("q_lora_rank")
        total = low * (d + 1 + queries) + bias * low
    total += (d + bias) * (rank + rotary) + rank + rank * heads * (plain + value)
    return total + heads * value * d + bias * d


def value_dim(f: Sizes) -> int:
    """Hv; D / N where the file has null."""
    return f.size("v_head_dim", f.size("model_dim") // f.size("heads"))


ONE_KEY: Mapping[str, Any] = {"kv_heads": one_head, "head_dim": cached, "values_in_keys": rank}
"""What a `Family` says of a cache of one key per token, whose first numbers are its value."""
