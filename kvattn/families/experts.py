"""Experts of a config.json: how many layers have them, and what one of them weighs."""

from kvattn import _checks
from kvattn.errors import ConfigError
from kvattn.families.family import Sizes
from kvattn.families.settings import Value


def sparse_layers(f: Sizes) -> int:
    """Layers that have experts.

    Raises:
        ConfigError, DTypeError: settings that cannot be.
    """
    if not f.num_experts:
        return 0
    if f.family.blocks is not None:
        return f.family.blocks(f).count("moe")
    if (kinds := f.list_of("mlp_layer_types", f.num_layers)) is not None:
        return kinds.count("sparse")
    is_sparse = f.family.experts.is_sparse or _is_sparse
    return sum(is_sparse(f, i) for i in range(f.num_layers))


def _is_sparse(f: Sizes, layer: int) -> bool:
    if layer in layer_numbers("mlp_only_layers", f.get("mlp_only_layers", ())):
        return False
    step, every = f.size("decoder_sparse_step", 1, least=0), f.size("moe_layer_freq", 1)
    if step == 0:  # transformers: none
        return False
    return layer >= f.count("dense_layers") and (layer + 1) % step == 0 and layer % every == 0


def layer_numbers(name: str, value: Value) -> list[int]:
    """A list of layers.

    Raises:
        ConfigError: it is something else.
    """
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{name} must be a list of layers, got {value!r}.")
    return [_checks.integer(name, layer, 0) for layer in value]


def expert_weights(f: Sizes) -> int:
    """Numbers in the matrices of one expert of one layer."""
    if f.family.experts.weights is not None:
        return f.family.experts.weights(f)
    return 3 * f.size("model_dim") * f.size("moe_intermediate_size", f.count("mlp_dim"), least=0)


def expert_params(f: Sizes) -> int:
    """Parameters of one expert of one layer, biases included."""
    biases = f.family.experts.biases
    return expert_weights(f) + (0 if biases is None else biases(f))


def shared_params(f: Sizes) -> int:
    """Parameters of what every token goes through beside the experts, of one layer."""
    if f.family.experts.shared is not None:
        return f.family.experts.shared(f)
    total = f.count("shared_experts") * expert_weights(f)
    for name in ("shared_expert_intermediate_size", "shared_intermediate_size"):
        total += 3 * f.size("model_dim") * f.count(name)
    return total
