"""gpt-oss: learned sinks, a window in every second layer, yarn, experts; as floats or in MXFP4."""

from collections.abc import Iterator

import numpy as np

from kvattn.models.config import DecoderConfig
from kvattn.models.hf import rules
from kvattn.models.hf.fields import Fields
from kvattn.models.hf.llama import BUFFERS, sizes
from kvattn.models.hf.rules import Family, Layout, Rule, Shape

# The sixteen values of a 4-bit float with two bits of exponent and one of fraction.
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
BLOCK = 32
"""How many numbers of MXFP4 share a scale."""


def gpt_oss(fields: Fields) -> Family:
    """gpt-oss 20B and 120B."""
    layers = fields.layers("num_hidden_layers")
    packed = _is_packed(fields)
    bias = fields.flag("attention_bias")
    fields.only("hidden_act", "silu")
    config = DecoderConfig(
        **sizes(fields),
        **fields.rope(),
        windows=fields.windows(layers, fields.get("sliding_window"), [i % 2 == 0 for i in range(layers)]),
        tie_embeddings=fields.flag("tie_word_embeddings"),
        qkv_bias=bias,
        out_bias=bias,
        sinks=True,
        num_experts=fields.size("num_local_experts"),
        experts_per_token=fields.size("num_experts_per_tok"),
        expert_alpha=fields.number("swiglu_alpha"),
        expert_limit=fields.number("swiglu_limit"),
    )
    return Family(config, tuple(_rules(config, packed)), ("model.",), (*BUFFERS, *rules.tied(config)))


def _is_packed(fields: Fields) -> bool:
    """Whether the experts are stored in MXFP4."""
    quantization = fields.get("quantization_config")
    if quantization is None:
        return False
    kind = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if kind != "mxfp4":
        raise rules.unsupported(fields.source, "quantization_config.quant_method", kind, "'mxfp4'")
    return True


def _rules(config: DecoderConfig, packed: bool) -> Iterator[Rule]:
    features = config.model_dim
    experts, hidden = config.num_experts, config.mlp_dim
    yield rules.embedding("model.embed_tokens.weight", config)

    def kernels(theirs: str, into: int, out: int, makes: dict[str, range]) -> Rule:
        """A matrix per expert [E, in, out], of which every name takes some of the outputs."""
        axes = ((0,), (2,), (1,)) if packed else ((0,), (1,), (2,))
        layouts = {n: Layout((experts, into, len(taken)), axes, {2: taken}) for n, taken in makes.items()}
        if not packed:
            return Rule({theirs: (experts, into, out)}, layouts)
        blocks: Shape = (experts, out, into // BLOCK, BLOCK // 2)
        sources = {f"{theirs}_blocks": blocks, f"{theirs}_scales": blocks[:3]}
        return Rule(sources, layouts, from_mxfp4, BLOCK, stored=("U8",))

    def biases(theirs: str, out: int, makes: dict[str, range]) -> Rule:
        axes = ((0,), (1,))
        return Rule({theirs: (experts, out)}, {n: Layout((experts, len(s)), axes, {1: s}) for n, s in makes.items()})

    def block(layer: int, ours: str) -> Iterator[Rule]:
        theirs = f"model.layers.{layer}"
        yield from rules.norm(f"{theirs}.input_layernorm", f"{ours}.attention_norm", features)
        yield from rules.separate(f"{theirs}.self_attn", f"{ours}.attention", config)
        yield rules.tensor(f"{theirs}.self_attn.sinks", (config.num_heads,), f"{ours}.attention.sinks")
        yield from rules.norm(f"{theirs}.post_attention_layernorm", f"{ours}.mlp_norm", features)
        yield from rules.linear(f"{theirs}.mlp.router", f"{ours}.mlp.router", (features,), (experts,), True)
        # Gate and up alternate.
        each = {"gate": range(0, 2 * hidden, 2), "up": range(1, 2 * hidden, 2)}
        whole = {"down": range(features)}
        for name, into, out, parts in (
            ("gate_up_proj", features, 2 * hidden, each),
            ("down_proj", hidden, features, whole),
        ):
            experts_of = f"{theirs}.mlp.experts.{name}"
            yield kernels(experts_of, into, out, {f"{ours}.mlp.{n}": s for n, s in parts.items()})
            yield biases(f"{experts_of}_bias", out, {f"{ours}.mlp.{n}_bias": s for n, s in parts.items()})

    yield from rules.per_layer(config, block)
    yield from rules.norm("model.norm", "norm", features)
    yield from rules.head(config)


def from_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Numbers of the OCP microscaling format MXFP4 as float32.

    Args:
        blocks: uint8 [..., G, 16], two numbers a byte, the first in the lower half.
        scales: uint8 [..., G], the exponent of each block's scale, plus 127.

    Returns:
        [..., G * 32].
    """
    pairs = np.stack([_E2M1[blocks & 15], _E2M1[blocks >> 4]], axis=-1)
    numbers = pairs.reshape(*blocks.shape[:-1], BLOCK)
    return np.ldexp(numbers, scales[..., None].astype(np.int32) - 127).reshape(*blocks.shape[:-2], -1)
