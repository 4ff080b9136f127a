"""The tensors of experts as Mixtral, Qwen and their relatives store them: three matrices for each expert."""

from collections.abc import Iterator, Sequence

from kvattn.families import rules
from kvattn.families.config import DecoderConfig


def routed(theirs: str, ours: str, config: DecoderConfig, names: Sequence[str]) -> Iterator[rules.Rule]:
    """The router and the experts of one layer.

    Args:
        theirs: what the MLP of the layer is called in the files.
        ours: what it is called here.
        config: of the decoder.
        names: of an expert's gate, up and down projection.
    """
    features, hidden, experts = config.model_dim, config.expert_dim or config.layer_mlp_dims[0], config.num_experts
    yield from rules.linear(f"{theirs}.gate", f"{ours}.router", (features,), (experts,), False)
    for name, our, into, out in zip(
        names, ("gate", "up", "down"), (features, features, hidden), (hidden, hidden, features), strict=True
    ):
        sources = [f"{theirs}.experts.{i}.{name}.weight" for i in range(experts)]
        yield rules.stacked(sources, (out, into), f"{ours}.{our}", rules.Layout((into, out), ((1,), (0,))))


def dense(theirs: str, ours: str, config: DecoderConfig, hidden: int) -> Iterator[rules.Rule]:
    """A gated MLP under the names of Llama, as layers without experts have it, and experts that serve every token."""
    for name, into, out in (
        ("gate", config.model_dim, hidden), ("up", config.model_dim, hidden), ("down", hidden, config.model_dim),
    ):  # fmt: skip
        yield from rules.linear(f"{theirs}.{name}_proj", f"{ours}.{name}", (into,), (out,), False)


def layer_of(ours: str) -> int:
    """The layer that a part belongs to, by our name for it."""
    return int(ours.split(".")[1])
