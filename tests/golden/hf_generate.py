"""Makes ``hf/``: tiny random checkpoints of every family and what `transformers` computes with them, in float32.

Run by hand in an environment of its own (Python 3.11, ``torch==2.13.0``, ``transformers``, ``numpy``); the project
itself needs none of them:

    python tests/golden/hf_generate.py

Every parameter is drawn anew and wide, norms and biases too, so that each one matters. Prompts are longer than every
window. ``golden.npz`` of a family holds

    prompts      int32 [B, T], right-padded with token 0
    lengths      int32 [B]
    logits       float32 [B, T, V], rubbish at pads
    greedy       int32 [B, G], what follows each prompt
    margins      float32 [B, G], by how much the chosen token's logit leads
"""

import json
import pathlib
import sys

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).parent / "hf"
VOCAB, LENGTHS, GENERATED = 96, (23, 9, 16), 8
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ENDS = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}

FAMILIES = {
    "llama2": ("Llama", {**SIZES, "intermediate_size": 48, "max_position_embeddings": 64}),
    "llama3": (
        "Llama",
        {
            **SIZES,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "max_position_embeddings": 64,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
                "rope_theta": 500000.0,
            },
            "tie_word_embeddings": True,
        },
    ),
    "mistral": (
        "Mistral",
        {**SIZES, "num_key_value_heads": 2, "intermediate_size": 48, "sliding_window": 5, "head_dim": 16},
    ),
    "qwen2": ("Qwen2", {**SIZES, "num_key_value_heads": 2, "intermediate_size": 48}),
    "qwen3": ("Qwen3", {**SIZES, "num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 24}),
    "gemma2": (
        "Gemma2",
        {
            **SIZES,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "head_dim": 24,
            "sliding_window": 5,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 7.0,
            "attn_implementation": "eager",
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            **SIZES,
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "head_dim": 24,
            "sliding_window": 5,
            "query_pre_attn_scalar": 20,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
    "falcon7b": (
        "Falcon",
        {**SIZES, "multi_query": True, "parallel_attn": True, "new_decoder_architecture": False, "bias": False},
    ),
    "falcon40b": (
        "Falcon",
        {
            **SIZES,
            "num_kv_heads": 2,
            "multi_query": True,
            "parallel_attn": True,
            "new_decoder_architecture": True,
            "bias": False,
        },
    ),
    "opt": (
        "OPT",
        {
            **SIZES,
            "ffn_dim": 48,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
            "do_layer_norm_before": True,
        },
    ),
    "mpt": (
        "Mpt",
        {"vocab_size": VOCAB, "d_model": 32, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 64},
    ),
    "bloom": ("Bloom", {"vocab_size": VOCAB, "hidden_size": 48, "n_layer": 2, "n_head": 6}),
    "gpt_bigcode": (
        "GPTBigCode",
        {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "multi_query": True},
    ),
    "gpt2": ("GPT2", {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt_oss": (
        "GptOss",
        {
            **SIZES,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "intermediate_size": 48,
            "sliding_window": 5,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "max_position_embeddings": 256,
            "rope_theta": 150000.0,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 8.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "original_max_position_embeddings": 32,
                "truncate": False,
                "rope_theta": 150000.0,
            },
        },
    ),
}

# What else the flags of a family can say, in smaller models.
SMALL = {**SIZES, "hidden_size": 16, "intermediate_size": 24, "num_key_value_heads": 2}
TINY = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}
VARIANTS = {
    "llama_biases": ("Llama", {**SMALL, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu", "head_dim": 6}),
    "llama_yarn": (
        "Llama",
        {
            **SMALL,
            "head_dim": 8,
            "max_position_embeddings": 64,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0},
        },
    ),
    "mistral_full": ("Mistral", {**SMALL, "sliding_window": None, "tie_word_embeddings": True}),
    "qwen2_window": (
        "Qwen2",
        {**SMALL, "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "gemma3_scaled": (
        "Gemma3",
        {
            **SMALL,
            "head_dim": 8,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
            "final_logit_softcapping": 9.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "falcon_rw": (
        "Falcon",
        {
            **SIZES,
            "hidden_size": 16,
            "alibi": True,
            "multi_query": False,
            "parallel_attn": False,
            "bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "falcon11b": (
        "Falcon",
        {
            **SIZES,
            "hidden_size": 16,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            "num_ln_in_parallel_attn": 1,
            "ffn_hidden_size": 24,
        },
    ),
    "opt350m": (
        "OPT",
        {
            **SIZES,
            "hidden_size": 16,
            "ffn_dim": 24,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 12,
            "do_layer_norm_before": False,
        },
    ),
    "mpt_clip": (
        "Mpt",
        {
            "vocab_size": VOCAB,
            "d_model": 24,
            "n_heads": 6,
            "n_layers": 2,
            "max_seq_len": 64,
            "attn_config": {"clip_qkv": 0.8, "softmax_scale": 0.7, "model_type": ""},
        },
    ),
    "bloom_post": (
        "Bloom",
        {
            "vocab_size": VOCAB,
            "hidden_size": 16,
            "n_layer": 2,
            "n_head": 4,
            "apply_residual_connection_post_layernorm": True,
        },
    ),
    "gpt_bigcode_mha": ("GPTBigCode", {**TINY, "multi_query": False, "scale_attn_weights": False, "n_inner": 24}),
    "gpt2_scaled": (
        "GPT2",
        {**TINY, "scale_attn_by_inverse_layer_idx": True, "activation_function": "relu", "tie_word_embeddings": False},
    ),
}

PARTLY = {**SMALL, "hidden_size": 32, "num_attention_heads": 4}
"""Heads of 8, of which a part turns."""
MOE = {**SMALL, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
SIGLIP = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
SIGLIP |= {"image_size": 8, "patch_size": 4}
PIXTRAL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 8}
PIXTRAL |= {"image_size": 8, "patch_size": 4}
FOURTH = {
    **SMALL,
    "head_dim": 8,
    "global_head_dim": 16,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": VOCAB,
}
"""Gemma 4 without all that can be left out."""
LATENT = {**SIZES, "intermediate_size": 24, "num_key_value_heads": 4, "kv_lora_rank": 10, "qk_nope_head_dim": 6}
LATENT |= {"qk_rope_head_dim": 4, "v_head_dim": 7, "q_lora_rank": 9}
ROUTED = {**LATENT, "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 12}
MSCALE = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "rope_theta": 1000.0}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.3], "long_factor": [1.0, 2.5, 6.0]}

# Families that came later, with the flags that are usual; then with the others.
LATER = {
    "gemma": ("Gemma", {**SMALL, "head_dim": 8}),
    "phi3": ("Phi3", {**SMALL, "sliding_window": 5}),
    "olmo2": ("Olmo2", SMALL),
    "granite": (
        "Granite",
        {
            **SMALL,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.6,
            "logits_scaling": 2.5,
            "tie_word_embeddings": True,
        },
    ),
    "smollm3": ("SmolLM3", {**SMALL, "num_hidden_layers": 3, "no_rope_layer_interval": 2}),
    "stablelm": ("StableLm", PARTLY),
    "starcoder2": ("Starcoder2", {**SMALL, "sliding_window": 5}),
    "gpt_neox": ("GPTNeoX", {**SIZES, "intermediate_size": 24, "max_position_embeddings": 64}),
    "glm4": ("Glm4", {**SMALL, "head_dim": 8}),
    "cohere2": (
        "Cohere2",
        {
            **SMALL,
            "num_hidden_layers": 3,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "logit_scale": 0.4,
        },
    ),
    "mixtral": ("Mixtral", {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2Moe", {**MOE, "shared_expert_intermediate_size": 20}),
    "qwen3_moe": ("Qwen3Moe", {**MOE, "head_dim": 8, "norm_topk_prob": True}),
    "gemma3_images": (
        "Gemma3",
        {
            "text_config": {
                **SMALL,
                "head_dim": 8,
                "sliding_window": 5,
                "layer_types": ["sliding_attention", "full_attention"],
                "query_pre_attn_scalar": 20,
            },
            "vision_config": SIGLIP,
            "mm_tokens_per_image": 4,
        },
    ),
    "mistral3_images": (
        "Mistral3",
        {
            "text_config": {"model_type": "mistral", **SMALL, "sliding_window": None, "head_dim": 6},
            "vision_config": {"model_type": "pixtral", **PIXTRAL},
            "tie_word_embeddings": False,
        },
    ),
    # No latent of queries, experts chosen by their scores alone; yarn that scales scores too.
    "deepseek_v2": (
        "DeepseekV2",
        {
            **ROUTED,
            "num_hidden_layers": 3,
            "q_lora_rank": None,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "max_position_embeddings": 128,
            "rope_scaling": {**MSCALE, "mscale": 0.7, "mscale_all_dim": 0.9},
        },
    ),
    # Groups whose best experts count as pairs, a bias that chooses; neighbours turn together.
    "deepseek_v3": (
        "DeepseekV3",
        {
            **ROUTED,
            "num_hidden_layers": 3,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 4,
            "topk_group": 2,
            "max_position_embeddings": 128,
            "rope_scaling": {**MSCALE, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "minicpm3": (
        "MiniCPM3",
        {
            **LATENT,
            "scale_emb": 3,
            "scale_depth": 1.1,
            "dim_model_base": 12,
            "max_position_embeddings": 256,
            "rope_scaling": {
                "rope_type": "longrope",
                "short_factor": [1.0, 1.3],
                "long_factor": [1.0, 5.0],
                "original_max_position_embeddings": 64,
                "rope_theta": 1000.0,
            },
        },
    ),
    "gemma_biases": ("Gemma", {**SMALL, "head_dim": 8, "attention_bias": True, "tie_word_embeddings": False}),
    "phi3_short": (
        "Phi3",
        {
            **PARTLY,
            "max_position_embeddings": 256,
            "original_max_position_embeddings": 64,
            "rope_parameters": {**LONGROPE, "partial_rotary_factor": 0.75, "rope_theta": 1000.0},
            "tie_word_embeddings": True,
        },
    ),
    "phi3_long": (
        "Phi3",
        {
            **PARTLY,
            "max_position_embeddings": 256,
            "original_max_position_embeddings": 12,
            "rope_parameters": {**LONGROPE, "partial_rotary_factor": 0.75, "rope_theta": 1000.0},
        },
    ),
    "olmo2_biases": ("Olmo2", {**SMALL, "attention_bias": True, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "granite_biases": (
        "Granite",
        {**SMALL, "attention_bias": True, "mlp_bias": True, "residual_multiplier": 0.7, "attention_multiplier": 0.5},
    ),
    "smollm3_window": (
        "SmolLM3",
        {
            **SMALL,
            "use_sliding_window": True,
            "sliding_window": 4,
            "no_rope_layers": [0, 1],
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "stablelm_parallel": (
        "StableLm",
        {
            **PARTLY,
            "use_parallel_residual": True,
            "qk_layernorm": True,
            "use_qkv_bias": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            "tie_word_embeddings": True,
        },
    ),
    "starcoder2_plain": (
        "Starcoder2",
        {**SMALL, "use_bias": False, "tie_word_embeddings": False, "hidden_act": "silu"},
    ),
    "gpt_neox_serial": (
        "GPTNeoX",
        {
            **SIZES,
            "hidden_size": 16,
            "intermediate_size": 24,
            "max_position_embeddings": 64,
            "use_parallel_residual": False,
            "attention_bias": False,
            "hidden_act": "gelu_fast",
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
            "tie_word_embeddings": True,
        },
    ),
    "glm4_plain": (
        "Glm4",
        {
            **SMALL,
            "head_dim": 8,
            "attention_bias": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
            "tie_word_embeddings": True,
        },
    ),
    "cohere2_biases": (
        "Cohere2",
        {
            **SMALL,
            "sliding_window": 4,
            "layer_types": ["full_attention", "sliding_attention"],
            "attention_bias": True,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0},
        },
    ),
    "mixtral_window": (
        "Mixtral",
        {
            **SMALL,
            "head_dim": 6,
            "sliding_window": 4,
            "num_local_experts": 3,
            "num_experts_per_tok": 1,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2_moe_mixed": (
        "Qwen2Moe",
        {
            **MOE,
            "num_hidden_layers": 3,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
            "qkv_bias": False,
            "shared_expert_intermediate_size": 20,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 2,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3_moe_mixed": (
        "Qwen3Moe",
        {
            **MOE,
            "num_experts_per_tok": 3,
            "head_dim": 8,
            "decoder_sparse_step": 2,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 4,
            "tie_word_embeddings": True,
        },
    ),
    "gemma4": (
        "Gemma4",
        {
            **FOURTH,
            "num_hidden_layers": 5,
            "layer_types": [f"{kind}_attention" for kind in ("sliding", "full", "full", "sliding", "full")],
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "hidden_size_per_layer_input": 12,
            "final_logit_softcapping": 9.0,
        },
    ),
    "gemma4_experts": (
        "Gemma4",
        {
            **FOURTH,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 12,
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "gemma4_plain": (
        "Gemma4",
        {
            **FOURTH,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "gemma4_images": (
        "Gemma4",
        {
            "text_config": {
                **FOURTH,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
                "num_hidden_layers": 4,
                "num_kv_shared_layers": 2,
                "hidden_size_per_layer_input": 4,
            },
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "position_embedding_size": 16,
                "patch_size": 4,
            },
        },
    ),
    "deepseek_v2_groups": (
        "DeepseekV2",
        {
            **ROUTED,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.7,
            "attention_bias": True,
            "mlp_bias": True,
            "first_k_dense_replace": 1,
            "tie_word_embeddings": True,
        },
    ),
    "deepseek_v3_halves": (
        "DeepseekV3",
        {
            **ROUTED,
            "q_lora_rank": None,
            "rope_interleave": False,
            "attention_bias": True,
            "norm_topk_prob": False,
            "routed_scaling_factor": 0.8,
            "n_shared_experts": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 0,
            "hidden_act": "gelu",
            "tie_word_embeddings": True,
        },
    ),
    "minicpm3_plain": (
        "MiniCPM3",
        {
            **LATENT,
            "q_lora_rank": None,
            "v_head_dim": None,
            "scale_emb": 1.5,
            "scale_depth": None,
            "dim_model_base": None,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": False,
        },
    ),
}

LLAMA4 = {
    **SMALL, "head_dim": 8, "intermediate_size": 20, "intermediate_size_mlp": 28, "num_local_experts": 3,
    "attention_chunk_size": 5, "floor_scale": 4, "attn_scale": 0.7,
}  # fmt: skip
LATEST = {
    "llama4": ("Llama4", {**LLAMA4, "num_hidden_layers": 3, "no_rope_layer_interval": 2, "moe_layers": [0, 2]}),
    "llama4_images": (
        "Llama4",
        {
            "text_config": LLAMA4,
            "vision_config": {
                "hidden_size": 8,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 8,
                "patch_size": 4,
                "vision_output_dim": 8,
                "projector_input_dim": 8,
                "projector_output_dim": 8,
            },
        },
    ),
    "llama4_plain": (
        "Llama4",
        {
            **LLAMA4,
            "no_rope_layers": [0, 1],
            "attention_chunk_size": None,
            "use_qk_norm": False,
            "attn_temperature_tuning": False,
            "attention_bias": True,
            "num_experts_per_tok": 2,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
            "tie_word_embeddings": True,
        },
    ),
}


def model_of(kind: str, settings: dict, seed: int):
    """A model whose every parameter is drawn."""
    with_images = "vision_config" in settings
    prefix = f"{kind}Text" if kind in ("Gemma3", "Gemma4", "Llama4") and not with_images else kind
    config = getattr(transformers, f"{prefix}Config")(**({} if with_images else ENDS), **settings)
    head = "ForConditionalGeneration" if with_images else "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    model = getattr(transformers, kind + head)(config).eval().float()
    # Where the embedding is the head too, a large one would say its own token again, whatever the layers do.
    tied = getattr(model.config, "tie_word_embeddings", False)
    generator = torch.Generator().manual_seed(seed)
    drawn = dict(model.named_parameters())
    drawn |= {name: x for name, x in model.named_buffers() if name.endswith("e_score_correction_bias")}
    with torch.no_grad():
        for name, x in model.named_buffers():
            if name.endswith("layer_scalar"):
                x.copy_(x + 0.3 * torch.randn(x.shape, generator=generator))
        for name, x in drawn.items():
            noise = torch.randn(x.shape, generator=generator)
            if x.ndim == 1 and "weight" in name:  # norms
                x.copy_(x + 0.3 * noise)
            elif x.ndim == 1:
                x.copy_(0.3 * noise)
            elif x.ndim > 3:  # patches of images
                x.copy_(0.1 * noise)
            elif "embed" in name or "wte" in name or "wpe" in name:
                x.copy_((0.2 if tied else 0.7) * noise)
            else:
                x.copy_(noise * 1.5 / x.shape[-1] ** 0.5)
    return model


@torch.no_grad()
def golden(model, seed: int) -> dict[str, np.ndarray]:
    """Logits of whole prompts, each row alone, and greedy continuations by whole passes: no cache of theirs."""
    rng = np.random.default_rng(seed)
    prompts = np.zeros((len(LENGTHS), max(LENGTHS)), np.int32)
    logits = np.zeros((*prompts.shape, VOCAB), np.float32)
    greedy, margins = (np.zeros((len(LENGTHS), GENERATED), t) for t in (np.int32, np.float32))
    for row, length in enumerate(LENGTHS):
        prompts[row, :length] = rng.integers(2, VOCAB, length)
        tokens = prompts[row, :length].tolist()
        # transformers 5.24 cannot run this one whole on text alone.
        speaks = model.language_model if type(model).__name__ == "Llama4ForConditionalGeneration" else model
        run = lambda tokens, speaks=speaks: speaks(torch.tensor([tokens]), use_cache=False).logits[0].numpy()
        logits[row, :length] = run(tokens)
        for step in range(GENERATED):
            last = run(tokens)[-1]
            best = np.argsort(last)[::-1]
            greedy[row, step], margins[row, step] = best[0], last[best[0]] - last[best[1]]
            tokens.append(int(best[0]))
    return {
        "prompts": prompts,
        "lengths": np.array(LENGTHS, np.int32),
        "logits": logits,
        "greedy": greedy,
        "margins": margins,
    }


def main() -> None:
    """Writes all families, or those named; ``versions.json`` says what made each."""
    versions = HERE / "versions.json"
    made = json.loads(versions.read_text()) if versions.exists() else {}
    for number, (name, (kind, settings)) in enumerate({**FAMILIES, **VARIANTS, **LATER, **LATEST}.items()):
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        model = model_of(kind, settings, number)
        folder = HERE / name
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder, safe_serialization=True)
        (folder / "generation_config.json").unlink(missing_ok=True)
        numbers = golden(model, number)
        np.savez_compressed(folder / "golden.npz", **numbers)
        size = sum(f.stat().st_size for f in folder.iterdir())
        spread, margin = numbers["logits"].std(), numbers["margins"].min()
        print(f"{name}: {size / 1024:.0f} KiB, logits' deviation {spread:.2f}, least margin {margin:.3f}")
        made[name] = f"torch {torch.__version__}, transformers {transformers.__version__}"
    versions.write_text(json.dumps(dict(sorted(made.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
