"""MiniMax: linear ("lightning") attention in most layers, softmax in some; M2 has softmax in all."""

from kvattn.errors import ConfigError
from kvattn.families.defaults import usual
from kvattn.families.family import Estimate, Family, Sizes
from kvattn.families.kinds import FULL, NONE, Kind, every
from kvattn.families.registry import register


def _listed(f: Sizes, num_layers: int) -> list[Kind] | None:
    listed = f.list_of("attn_type_list", num_layers)
    if listed is None:
        return None
    if any(x not in (0, 1) for x in listed):
        raise ConfigError(f"attn_type_list must hold 0 (linear) and 1 (softmax), got {listed!r}.")
    return [FULL if x else NONE for x in listed]


def _minimax(f: Sizes, num_layers: int) -> list[Kind]:
    return _listed(f, num_layers) or every(2, num_layers, NONE, at=0)


def _first(f: Sizes, num_layers: int) -> list[Kind]:
    kinds = _listed(f, num_layers)
    if kinds is None:
        raise ConfigError(
            f"attn_type_list must say which of the {num_layers} layers of {f.family.model_type} have softmax."
        )
    return kinds


def _second(f: Sizes, num_layers: int) -> list[Kind]:
    return _listed(f, num_layers) or [FULL] * num_layers


def _lightning(f: Sizes) -> int:
    """Queries, keys and values of all heads, an output and its gate."""
    return 5 * f.size("model_dim") * f.size("heads") * f.head_dim


_ESTIMATE = Estimate(mixer=_lightning)
MINIMAX = Family(
    model_type="minimax",
    defaults=usual(vocab=32000, dim=4096, mlp=14336, layers=32, heads=32, kv_heads=8, length=131072) | {
        "head_dim": None, "sliding_window": None, "num_experts_per_tok": 2, "num_local_experts": 8, "layer_types": None,
        "block_size": 256, "attn_type_list": None,
    },
    layers=_minimax,
    estimate=_ESTIMATE,
)  # fmt: skip
TEXT_01 = Family(model_type="minimax_text_01", defaults={"attn_type_list": None}, layers=_first, estimate=_ESTIMATE)
M1 = Family(model_type="minimax_m1", defaults={"attn_type_list": None}, layers=_first, estimate=_ESTIMATE)
M2 = Family(
    model_type="minimax_m2",
    defaults={"num_key_value_heads": 8, "head_dim": 128, "attn_type_list": None, "mtp_transformer_layers": 1},
    layers=_second,
)
register(MINIMAX, TEXT_01, M1, M2)
