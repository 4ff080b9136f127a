"""Writes rope.json: frequencies, attention factors and rotated vectors from HuggingFace transformers.

Needs torch and transformers, which kvattn and its tests do not:

    python -m venv /tmp/hf && /tmp/hf/bin/pip install torch transformers
    /tmp/hf/bin/python tests/golden/rope_generate.py
"""

import json
import pathlib

import torch
import transformers
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

FACTORS = {
    "short_factor": [1.0, 1.02, 1.05, 1.1, 1.2, 1.3, 1.5, 2.0],
    "long_factor": [1.0, 1.3, 2.0, 3.0, 5.0, 8.0, 13.0, 21.0],
    "original_max_position_embeddings": 32,
}
# name -> (head_dim, theta, max_position_embeddings of the config, tokens, rope dict)
CASES = {
    "default": (16, 10000.0, 2048, 5, {"rope_type": "default"}),
    "linear": (16, 10000.0, 2048, 5, {"rope_type": "linear", "factor": 4.0}),
    "dynamic_short": (16, 10000.0, 32, 32, {"rope_type": "dynamic", "factor": 2.0}),
    "dynamic_long": (16, 10000.0, 32, 100, {"rope_type": "dynamic", "factor": 2.0}),
    "dynamic_far": (64, 10000.0, 32, 1000, {"rope_type": "dynamic", "factor": 8.0}),
    "yarn": (64, 10000.0, 8192, 5, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}),
    "yarn_all": (
        64,
        150000.0,
        131072,
        5,
        {
            "rope_type": "yarn",
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 24.0,
            "beta_slow": 2.0,
            "truncate": False,
            "mscale": 0.707,
            "mscale_all_dim": 1.0,
        },
    ),
    "yarn_attention_factor": (
        32,
        1000000.0,
        131072,
        5,
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "attention_factor": 0.8},
    ),
    # Both ends of the correction range lie outside the pairs there are.
    "yarn_clamped": (16, 3.0, 600, 5, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 150}),
    "llama3": (
        128,
        500000.0,
        131072,
        5,
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "llama3_32": (
        64,
        500000.0,
        131072,
        5,
        {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    # A divisor for each pair; the length of the config decides how large cosines are.
    "longrope_short": (16, 10000.0, 128, 32, {"rope_type": "longrope", **FACTORS}),
    "longrope_long": (16, 10000.0, 128, 33, {"rope_type": "longrope", **FACTORS}),
    "longrope_attention": (16, 5000.0, 128, 40, {"rope_type": "longrope", "attention_factor": 1.3, **FACTORS}),
    "longrope_factor": (16, 10000.0, 64, 5, {"rope_type": "longrope", "factor": 4.0, **FACTORS}),
}


def rounded(tensor: torch.Tensor) -> list[float]:
    return [float(f"{v:.9g}") for v in tensor.flatten().tolist()]


def main() -> None:
    out = {}
    for name, (head_dim, theta, max_positions, tokens, rope) in CASES.items():
        config = LlamaConfig(
            hidden_size=2 * head_dim,
            num_attention_heads=2,
            head_dim=head_dim,
            max_position_embeddings=max_positions,
            rope_parameters={"rope_theta": theta, **rope},
        )
        embedding = LlamaRotaryEmbedding(config)
        # Every entry of a head differs, so a wrong pairing shows. [B, N, T, H], as transformers has it.
        x = torch.sin(torch.arange(2 * tokens * head_dim, dtype=torch.float32)).reshape(1, 2, tokens, head_dim)
        cos, sin = embedding(x, torch.arange(tokens)[None])
        turned, _ = apply_rotary_pos_emb(x, x, cos, sin)
        out[name] = {
            "head_dim": head_dim,
            "theta": theta,
            "max_position_embeddings": max_positions,
            "tokens": tokens,
            "scaling": rope,
            "inv_freq": rounded(embedding.inv_freq),
            "attention_factor": float(embedding.attention_scaling),
            "last_token": rounded(turned[0, :, -1]),  # [N, H]
        }
    path = pathlib.Path(__file__).with_name("rope.json")
    path.write_text(json.dumps({"transformers": transformers.__version__, "cases": out}, indent=1) + "\n")
    print(f"{path}: {len(out)} cases from transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
