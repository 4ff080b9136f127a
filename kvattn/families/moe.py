"""The tensors of experts as families store them: three matrices for each, or all in one tensor."""

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


def fused(theirs: str, ours: str, config: DecoderConfig, hidden: int) -> Iterator[rules.Rule]:
    """The router and the experts of one layer as Llama 4 stores them: all experts in one tensor, gates before ups.

    Args:
        theirs: what the MLP of the layer is called in the files.
        ours: what it is called here.
        config: of the decoder.
        hidden: the hidden size of an expert.
    """
    features, experts = config.model_dim, config.num_experts
    yield from rules.linear(f"{theirs}.router", f"{ours}.router", (features,), (experts,), False)
    axes, into = ((0,), (1,), (2,)), (experts, features, 2 * hidden)
    parts = {"gate": range(hidden), "up": range(hidden, 2 * hidden)}
    kernels = {f"{ours}.{n}": rules.Layout((experts, features, hidden), axes, {2: part}) for n, part in parts.items()}
    yield rules.Rule({f"{theirs}.experts.gate_up_proj": into}, kernels)
    yield rules.tensor(f"{theirs}.experts.down_proj", (experts, hidden, features), f"{ours}.down")


def dense(theirs: str, ours: str, config: DecoderConfig, hidden: int) -> Iterator[rules.Rule]:
    """A gated MLP under the names of Llama, as layers without experts have it, and experts that serve every token.

    It has biases where `DecoderConfig.mlp_bias` says so.
    """
    for name, into, out in (
        ("gate", config.model_dim, hidden), ("up", config.model_dim, hidden), ("down", hidden, config.model_dim),
    ):  # fmt: skip
        yield from rules.linear(f"{theirs}.{name}_proj", f"{ours}.{name}", (into,), (out,), config.mlp_bias)


def layer_of(ours: str) -> int:
    """The layer that a part belongs to, by our name for it."""
    return int(ours.split(".")[1])
