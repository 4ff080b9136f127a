"""gpt-oss: learned sinks, a window in every second layer, yarn, experts; as floats or in MXFP4."""

from collections.abc import Iterator

import numpy as np

from kvattn.families import layers, params, rules
from kvattn.families.config import DecoderConfig
from kvattn.families.defaults import ROPE, usual
from kvattn.families.family import Experts, Family, Sizes
from kvattn.families.fields import Fields
from kvattn.families.hf import llama
from kvattn.families.registry import register

# The sixteen values of a 4-bit float with two bits of exponent and one of fraction.
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
BLOCK = 32
"""How many numbers of MXFP4 share a scale."""

_layers = layers.windowed_but(at=1, period=2)


def _blueprint(fields: Fields) -> rules.Blueprint:
    num_layers = fields.layers("num_hidden_layers")
    packed = _is_packed(fields)
    bias = fields.flag("attention_bias")
    fields.only("hidden_act", "silu")
    config = DecoderConfig(
        **llama.sizes(fields),
        **fields.rope(),
        windows=fields.windows(_layers(fields, num_layers)),
        tie_embeddings=fields.flag("tie_word_embeddings"),
        qkv_bias=bias,
        out_bias=bias,
        sinks=True,
        num_experts=fields.size("num_local_experts"),
        experts_per_token=fields.size("num_experts_per_tok"),
        expert_alpha=fields.number("swiglu_alpha"),
        expert_limit=fields.number("swiglu_limit"),
    )
    block = {
        "attention_norm": "input_layernorm",
        **llama.ATTENTION,
        "attention.sinks": "self_attn.sinks",
        "mlp_norm": "post_attention_layernorm",
        "mlp.router": "mlp.router",
        "mlp": lambda theirs, ours: _experts(f"{theirs}.mlp.experts", ours, config, packed),
    }
    return rules.blueprint(config, llama.PARTS, block, buffers=llama.BUFFERS)


def _is_packed(fields: Fields) -> bool:
    """Whether the experts are stored in MXFP4."""
    quantization = fields.get("quantization_config")
    if quantization is None:
        return False
    kind = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if kind != "mxfp4":
        raise fields.unsupported("quantization_config.quant_method", kind, "'mxfp4'")
    return True


def _experts(theirs: str, ours: str, config: DecoderConfig, packed: bool) -> Iterator[rules.Rule]:
    """Every matrix [E, in, out] and its bias [E, out]. Of the first, gate and up take every other output."""
    experts, features, hidden = config.num_experts, config.model_dim, config.layer_mlp_dims[0]
    each = {"gate": range(0, 2 * hidden, 2), "up": range(1, 2 * hidden, 2)}
    for name, into, out, parts in (
        ("gate_up_proj", features, 2 * hidden, each),
        ("down_proj", hidden, features, {"down": range(features)}),
    ):
        axes = ((0,), (2,), (1,)) if packed else ((0,), (1,), (2,))
        kernels = {
            f"{ours}.{n}": rules.Layout((experts, into, len(taken)), axes, {2: taken}) for n, taken in parts.items()
        }
        if packed:
            blocks = (experts, out, into // BLOCK, BLOCK // 2)
            stored = {f"{theirs}.{name}_blocks": blocks, f"{theirs}.{name}_scales": blocks[:3]}
            yield rules.Rule(stored, kernels, from_mxfp4, BLOCK, stored=("U8",))
        else:
            yield rules.Rule({f"{theirs}.{name}": (experts, into, out)}, kernels)
        biases = {
            f"{ours}.{n}_bias": rules.Layout((experts, len(taken)), ((0,), (1,)), {1: taken})
            for n, taken in parts.items()
        }
        yield rules.Rule({f"{theirs}.{name}_bias": (experts, out)}, biases)


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


def _params(f: Sizes) -> int:
    d, hidden, experts = f.size("model_dim"), f.size("mlp_dim"), f.size("experts")
    mlp = experts * (3 * d * hidden + 2 * hidden + d) + d * experts + experts
    sinks = f.size("heads")
    layer = params.attention(f, qkv_bias=True, out_bias=True) + sinks + mlp + 2 * d
    return params.embeddings(f) + f.num_layers * layer + d


GPT_OSS = Family(
    model_type="gpt_oss",
    defaults=ROPE | usual(vocab=201088, dim=2880, mlp=2880, layers=36, heads=64, kv_heads=8, length=131072) | {
        "head_dim": 64, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 150000.0, "attention_bias": True,
        "rope_parameters": {
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "sliding_window": 128, "layer_types": None, "num_local_experts": 128, "num_experts_per_tok": 4,
        "swiglu_alpha": 1.702, "swiglu_limit": 7.0,
    },
    aliases={"num_local_experts": ("num_experts",), "num_experts_per_tok": ("experts_per_token",)},
    nullable=frozenset({"rope_parameters"}),
    blueprint=_blueprint,
    is_quantized=True,
    layers=_layers,
    params=_params,
    experts=Experts(biases=lambda f: 2 * f.size("mlp_dim") + f.size("model_dim")),
)  # fmt: skip
register(GPT_OSS)
