"""Experts of a config.json: how many layers have them, and what one of them weighs."""

from typing import Any

from kvattn import _checks
from kvattn.errors import ConfigError
from kvattn.memory.hf_fields import Fields
from kvattn.memory.hf_layers import nemotron_blocks


def sparse_layers(f: Fields) -> int:
    """Layers that have experts.

    Raises:
        ConfigError, DTypeError: settings that cannot be.
    """
    if not f.num_experts:
        return 0
    if f.kind == "nemotron_h":
        return nemotron_blocks(f).count("moe")
    return sum(_is_sparse(f, i) for i in range(f.num_layers))


def _is_sparse(f: Fields, layer: int) -> bool:
    """Whether a layer's MLP is one of experts."""
    if (kinds := f.list_of("mlp_layer_types", f.num_layers)) is not None:
        return kinds[layer] == "sparse"
    if f.kind == "llama4_text":
        if (chosen := f.get("moe_layers")) is not None:
            return layer in _numbers("moe_layers", chosen)
        return (layer + 1) % f.size("interleave_moe_layer_step") == 0
    if f.kind == "jamba":
        period, offset = f.size("expert_layer_period"), f.size("expert_layer_offset", least=0)
        return layer % period == offset
    if f.kind == "ernie4_5_moe":
        last = f.get("moe_layer_end_index")
        last = f.num_layers - 1 if last == -1 else _checks.integer("moe_layer_end_index", last, 0)
        within = f.count("moe_layer_start_index") <= layer <= last
        return within and (layer + 1) % f.size("moe_layer_interval") == 0
    if layer in _numbers("mlp_only_layers", f.get("mlp_only_layers", ())):
        return False
    step, every = f.size("decoder_sparse_step", 1, least=0), f.size("moe_layer_freq", 1)
    if step == 0:  # transformers: none
        return False
    return layer >= f.count("dense_layers") and (layer + 1) % step == 0 and layer % every == 0


def _numbers(name: str, value: Any) -> list[int]:
    """A list of layers.

    Raises:
        ConfigError: it is something else.
    """
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{name} must be a list of layers, got {value!r}.")
    return [_checks.integer(name, layer, 0) for layer in value]


def expert_weights(f: Fields) -> int:
    """Numbers in the matrices of one expert of one layer."""
    d = f.size("model_dim")
    if f.kind == "nemotron_h":
        return 2 * f.size("moe_latent_size", d) * f.size("moe_intermediate_size")
    return 3 * d * f.size("moe_intermediate_size", f.size("mlp_dim", 0, least=0), least=0)


def expert_params(f: Fields) -> int:
    """Parameters of one expert of one layer, biases included."""
    biases = 2 * f.size("mlp_dim") + f.size("model_dim") if f.kind == "gpt_oss" else 0
    return expert_weights(f) + biases


def shared_params(f: Fields) -> int:
    """Parameters of what every token goes through beside the experts, of one layer."""
    d = f.size("model_dim")
    if f.kind == "llama4_text":
        return expert_weights(f)
    if f.kind == "nemotron_h":
        latent = f.get("moe_latent_size")
        outer = 0 if latent is None else 2 * d * f.size("moe_latent_size")
        return f.count("n_shared_experts") * 2 * d * f.size("moe_shared_expert_intermediate_size") + outer
    total = f.count("shared_experts") * expert_weights(f)
    for name in ("shared_expert_intermediate_size", "shared_intermediate_size"):
        total += 3 * d * f.count(name)
    return total
