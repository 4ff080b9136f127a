"""The tensors of experts as families store them: three matrices for each, or all in one tensor."""

from collections.abc import Callable, Iterator, Sequence

from kvattn.families import rules
from kvattn.families.config import DecoderConfig

Rules = Callable[[str, str], Iterator[rules.Rule]]
"""Makes the rules of a part of a layer, by what it is called in the files and here."""


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


def fused(theirs: str, ours: str, config: DecoderConfig, *, transposed: bool = False) -> Iterator[rules.Rule]:
    """The experts of one layer where all of them lie in one tensor, gates before ups.

    Args:
        theirs: what the experts are called in the files.
        ours: what the MLP is called here.
        config: of the decoder.
        transposed: kernels are [out, in].
    """
    features, experts, hidden = config.model_dim, config.num_experts, config.expert_dim or 0
    axes = ((0,), (2,), (1,)) if transposed else ((0,), (1,), (2,))
    stored = lambda *shape: (shape[0], shape[2], shape[1]) if transposed else shape
    parts = {"gate": range(hidden), "up": range(hidden, 2 * hidden)}
    kernels = {f"{ours}.{n}": rules.Layout((experts, features, hidden), axes, {2: part}) for n, part in parts.items()}
    yield rules.Rule({f"{theirs}.gate_up_proj": stored(experts, features, 2 * hidden)}, kernels)
    down = rules.Layout((experts, hidden, features), axes)
    yield rules.tensor(f"{theirs}.down_proj", stored(experts, hidden, features), f"{ours}.down", down)


def dense(theirs: str, ours: str, config: DecoderConfig, hidden: int) -> Iterator[rules.Rule]:
    """A gated MLP under the names of Llama, as layers without experts have it, and experts that serve every token.

    It has biases where `DecoderConfig.mlp_bias` says so.
    """
    for name, into, out in (
        ("gate", config.model_dim, hidden), ("up", config.model_dim, hidden), ("down", hidden, config.model_dim),
    ):  # fmt: skip
        yield from rules.linear(f"{theirs}.{name}_proj", f"{ours}.{name}", (into,), (out,), config.mlp_bias)


def where_there_are(config: DecoderConfig, name: str, experts: Rules) -> Rules:
    """The MLP of a layer: `experts` where it has some, else as `dense`.

    Args:
        config: of the decoder.
        name: what the MLP of a layer is called in the files.
        experts: makes the rules of a layer's experts.
    """

    def mlp(theirs: str, ours: str) -> Iterator[rules.Rule]:
        theirs, layer = f"{theirs}.{name}", int(ours.split(".")[1])
        if config.has_experts(layer):
            yield from experts(theirs, ours)
        else:
            yield from dense(theirs, ours, config, config.layer_mlp_dims[layer])

    return mlp
