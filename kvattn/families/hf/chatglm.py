"""ChatGLM: groups of query heads by a flag; the first one, of 6B, has neither them nor a gate."""

from kvattn.families import params
from kvattn.families.family import Estimate, Family, Sizes
from kvattn.families.registry import register


def _kv_heads(f: Sizes, heads: int) -> int:
    groups = f.size("multi_query_group_num", 1)
    # A file that names groups and not the flag means them; a flag that is off is taken at its word.
    means_groups = groups > 1 and not f.says("multi_query_attention")
    return groups if means_groups or f.flag("multi_query_attention") else heads


def _is_first(f: Sizes) -> bool:
    """It also has one table for both ends, where the later ones have two."""
    return f.get("inner_hidden_size") is not None


CHATGLM = Family(
    model_type="chatglm",
    defaults={
        "num_layers": 28, "num_attention_heads": 32, "hidden_size": 4096, "ffn_hidden_size": 13696,
        "inner_hidden_size": None, "padded_vocab_size": 65024, "kv_channels": 128, "multi_query_attention": False,
        "multi_query_group_num": 1, "seq_length": 2048,
    },
    aliases={
        "num_layers": ("num_hidden_layers",), "ffn_hidden_size": ("intermediate_size",),
        "padded_vocab_size": ("vocab_size",), "kv_channels": ("head_dim",),
    },
    kv_heads=_kv_heads,
    estimate=Estimate(mlp=lambda f: params.mlp(f, 2 if _is_first(f) else 3), tied=_is_first),
)  # fmt: skip
register(CHATGLM)
