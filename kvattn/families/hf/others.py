"""Families that are planned only, and differ from the usual by a handful of defaults."""

from kvattn import _checks
from kvattn.families.family import Estimate, Experts, Family, Sizes
from kvattn.families.hf import bloom
from kvattn.families.kinds import Kind
from kvattn.families.layers import PATTERNS, full, windowed, windowed_but, windowed_by_pattern, windowed_from
from kvattn.families.params import two_matrices
from kvattn.families.registry import register
from kvattn.families.settings import Value

_TIED = {"tie_word_embeddings": True}
_SHARING = {"use_cla": False, "cla_share_factor": 1}

_ALIKE: dict[str, dict[str, Value]] = {
    "aria_text": {},
    "baichuan": {},
    "cohere": _TIED,
    "deepseek": {},
    "diffllama": {},
    "flex_olmo": {},
    "glm": {"num_key_value_heads": 2, "head_dim": 128},
    "glm4_moe": {"num_key_value_heads": 8, "first_k_dense_replace": 1},
    "granitemoe": {},
    "granitemoeshared": {"shared_intermediate_size": 0},
    "helium": {"num_key_value_heads": 20, "head_dim": 128},
    "hunyuan": _SHARING,
    "hunyuan_v1_dense": _SHARING,
    "hunyuan_v1_moe": _SHARING,
    "internlm": {},
    "internlm2": {},
    "olmo": {},
    "olmoe": {},
}
"""Every layer keeps keys and values; the MLP is Llama's."""

_PLAIN_MLP: dict[str, dict[str, Value]] = {
    "apertus": {},
    "arcee": {},
    "biogpt": _TIED,
    "jais2": {"head_dim": 128},
    "nanochat": {"num_key_value_heads": 6},
    "nemotron": {"head_dim": 128},
    "persimmon": {},
    "phi": {},
}
"""The same with an MLP of two matrices."""

_AS_MANY_AS_QUERIES: dict[str, dict[str, Value]] = {
    "bitnet": {"num_key_value_heads": 5},
    "ernie4_5": {"num_key_value_heads": 2, "head_dim": 128} | _TIED,
    "exaone": {"num_key_value_heads": 8},
    "internlm3": {"num_key_value_heads": 2},
    "seed_oss": {"num_key_value_heads": 8, "head_dim": 128},
}
"""The same as the first; null key/value heads are as many as query heads."""

_WINDOWED: dict[str, dict[str, Value]] = {
    "ministral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "ministral3": {"num_key_value_heads": 8, "head_dim": 128, "sliding_window": None},
    "phimoe": {"num_key_value_heads": 8, "sliding_window": None},
}
"""All layers have the window, where there is one."""


def _exaone4(f: Sizes, num_layers: int) -> list[Kind]:
    if f.get("sliding_window") is None:
        f.passed(*PATTERNS)
        return full(f, num_layers)
    return windowed_by_pattern(4)(f, num_layers)


def _ernie_is_sparse(f: Sizes, layer: int) -> bool:
    last = f.get("moe_layer_end_index")
    last = f.num_layers - 1 if last == -1 else _checks.integer("moe_layer_end_index", last, 0)
    within = f.count("moe_layer_start_index") <= layer <= last
    return within and (layer + 1) % f.size("moe_layer_interval") == 0


_TWO = Estimate(mlp=two_matrices)
_KV_HEADS = frozenset({"num_key_value_heads"})

AFMOE = Family(
    model_type="afmoe",
    defaults={"head_dim": 128, "sliding_window": 1024, "global_attn_every_n_layers": 4},
    layers=windowed_by_pattern(4),
)
CWM = Family(
    model_type="cwm",
    defaults={"num_key_value_heads": 8, "head_dim": 128, "sliding_window": 8192},
    layers=windowed_but(at=0, period=4),
)
DBRX = Family(
    model_type="dbrx",
    defaults={
        "d_model": 2048, "n_heads": 16, "n_layers": 24, "max_seq_len": 2048, "vocab_size": 32000,
        "tie_word_embeddings": False, "num_key_value_heads": 1, "mlp_dim": 3584, "num_experts": 4,
        "num_experts_per_tok": 1,
    },
    aliases=bloom.NAMES | {
        "max_seq_len": ("max_position_embeddings",), "num_key_value_heads": ("attn_config.kv_n_heads",),
        "mlp_dim": ("ffn_config.ffn_hidden_size",), "num_experts": ("ffn_config.moe_num_experts",),
        "num_experts_per_tok": ("ffn_config.moe_top_k",),
    },
)  # fmt: skip
DOTS1 = Family(
    model_type="dots1",
    defaults={"sliding_window": 4096, "max_window_layers": 62, "first_k_dense_replace": 0},
    layers=windowed_from("max_window_layers"),
)
ERNIE = Family(
    model_type="ernie4_5_moe",
    defaults=_TIED | {
        "num_key_value_heads": 4, "moe_layer_interval": 1, "moe_layer_start_index": 1, "moe_layer_end_index": -1,
    },
    experts=Experts(is_sparse=_ernie_is_sparse),
)  # fmt: skip
EXAONE4 = Family(
    model_type="exaone4",
    defaults={"sliding_window": 4096, "sliding_window_pattern": 4},
    nullable=frozenset({"sliding_window_pattern"}),
    layers=_exaone4,
)
OLMO3 = Family(model_type="olmo3", defaults={"sliding_window": 4096}, layers=windowed_by_pattern(4))

register(AFMOE, CWM, EXAONE4, OLMO3)
register(DBRX, DOTS1, ERNIE)  # with experts
register(*(Family(model_type=kind, defaults=defaults) for kind, defaults in _ALIKE.items()))
register(*(Family(model_type=kind, defaults=defaults, estimate=_TWO) for kind, defaults in _PLAIN_MLP.items()))
register(*(Family(model_type=kind, defaults=x, nullable=_KV_HEADS) for kind, x in _AS_MANY_AS_QUERIES.items()))
register(*(Family(model_type=kind, defaults=defaults, layers=windowed) for kind, defaults in _WINDOWED.items()))
# Their MLP is known, and not which layers keep keys and values.
_UNCERTAIN = ("gpt_neox_japanese", "openai-gpt", "xglm")
register(*(Family(model_type=kind, estimate=_TWO, is_certain=False) for kind in _UNCERTAIN))
