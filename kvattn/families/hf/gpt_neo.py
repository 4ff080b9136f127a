"""GPT-Neo, GPT-J and CodeGen."""

from kvattn.errors import ConfigError
from kvattn.families import params
from kvattn.families.defaults import usual
from kvattn.families.family import Estimate, Family, Sizes
from kvattn.families.hf import gpt2
from kvattn.families.kinds import FULL, WINDOW, Kind
from kvattn.families.registry import register


def _gpt_neo(f: Sizes, num_layers: int) -> list[Kind]:
    """A list of patterns and how often each is repeated."""
    groups = f.get("attention_types")
    try:
        named = [kind for pattern, times in groups for kind in pattern * times]
    except (TypeError, ValueError) as error:
        raise ConfigError(f'attention_types must be such as [[["global", "local"], 12]], got {groups!r}.') from error
    known: dict[str, Kind] = {"global": FULL, "local": WINDOW}
    if len(named) != num_layers or any(not isinstance(kind, str) or kind not in known for kind in named):
        raise ConfigError(f"attention_types must say global or local for each of {num_layers} layers, got {groups!r}.")
    return [known[kind] for kind in named]


_ESTIMATE = Estimate(mlp=params.two_matrices)
GPT_NEO = Family(
    model_type="gpt_neo",
    defaults=usual(vocab=50257, dim=2048, layers=24, heads=16, length=2048, tied=True) | {
        "intermediate_size": None, "attention_types": [[["global", "local"], 12]], "attention_layers": None,
        "sliding_window": 256,
    },
    aliases={
        "num_hidden_layers": ("num_layers",), "num_attention_heads": ("num_heads",), "sliding_window": ("window_size",),
    },
    layers=_gpt_neo,
    estimate=_ESTIMATE,
)  # fmt: skip
GPTJ = Family(model_type="gptj", aliases=gpt2.NAMES, estimate=_ESTIMATE)
CODEGEN = Family(model_type="codegen", aliases=gpt2.NAMES, estimate=_ESTIMATE)
register(GPT_NEO, GPTJ, CODEGEN)
