"""Files config.json as they are published with the weights, by hand and whole: every field that they have.

With each the number of its parameters; of a model of text and images, of its text part.
"""

_HF = {"transformers_version": "4.40.0", "torch_dtype": "bfloat16", "use_cache": True, "initializer_range": 0.02}

GEMMA = _HF | {
    "architectures": ["GemmaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 2,
    "eos_token_id": 1, "head_dim": 256, "hidden_act": "gelu", "hidden_activation": None, "hidden_size": 3072,
    "intermediate_size": 24576, "max_position_embeddings": 8192, "model_type": "gemma", "num_attention_heads": 16,
    "num_hidden_layers": 28, "num_key_value_heads": 16, "pad_token_id": 0, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 10000.0, "vocab_size": 256000,
}  # fmt: skip
PHI3 = _HF | {
    "_name_or_path": "Phi-3-mini-4k-instruct", "architectures": ["Phi3ForCausalLM"], "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    "bos_token_id": 1, "embd_pdrop": 0.0, "eos_token_id": 32000, "hidden_act": "silu", "hidden_size": 3072,
    "intermediate_size": 8192, "max_position_embeddings": 4096, "model_type": "phi3", "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 32, "original_max_position_embeddings": 4096,
    "pad_token_id": 32000, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0,
    "sliding_window": 2047, "tie_word_embeddings": False, "attention_bias": False, "vocab_size": 32064,
}  # fmt: skip
_FACTORS = {"long_factor": [1.0 + i for i in range(48)], "short_factor": [1.0 + i / 50 for i in range(48)]}
OLMO2 = _HF | {
    "architectures": ["Olmo2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "eos_token_id": 100257,
    "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 4096,
    "model_type": "olmo2", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
    "pad_token_id": 100277, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 500000,
    "tie_word_embeddings": False, "vocab_size": 100352,
}  # fmt: skip
GRANITE = _HF | {
    "architectures": ["GraniteForCausalLM"], "attention_bias": False, "attention_dropout": 0.1,
    "attention_multiplier": 0.0078125, "bos_token_id": 0, "embedding_multiplier": 12.0, "eos_token_id": 0,
    "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 12800, "logits_scaling": 16.0,
    "max_position_embeddings": 4096, "mlp_bias": False, "model_type": "granite", "num_attention_heads": 32,
    "num_hidden_layers": 40, "num_key_value_heads": 8, "pad_token_id": 0, "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "vocab_size": 49155,
}  # fmt: skip
SMOLLM3 = _HF | {
    "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": 128012, "pad_token_id": 128004, "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 11008, "layer_types": ["full_attention"] * 36, "max_position_embeddings": 65536,
    "max_window_layers": 28, "mlp_bias": False, "model_type": "smollm3", "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9, "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 4,
    "pretraining_tp": 2, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 5000000.0, "sliding_window": None,
    "use_sliding_window": False, "vocab_size": 128256,
}  # fmt: skip
STABLELM = _HF | {
    "architectures": ["StableLmForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "silu",
    "hidden_size": 2560, "intermediate_size": 6912, "max_position_embeddings": 4096, "model_type": "stablelm",
    "layer_norm_eps": 1e-05, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
    "partial_rotary_factor": 0.25, "rope_theta": 10000, "tie_word_embeddings": False, "use_qkv_bias": False,
    "vocab_size": 50304,
}  # fmt: skip
STARCODER2 = _HF | {
    "architectures": ["Starcoder2ForCausalLM"], "attention_dropout": 0.1, "bos_token_id": 0, "embedding_dropout": 0.1,
    "eos_token_id": 0, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 3072, "intermediate_size": 12288,
    "max_position_embeddings": 16384, "mlp_type": "default", "model_type": "starcoder2", "norm_epsilon": 1e-05,
    "norm_type": "layer_norm", "num_attention_heads": 24, "num_hidden_layers": 30, "num_key_value_heads": 2,
    "residual_dropout": 0.1, "rope_theta": 999999.4420358813, "sliding_window": 4096, "use_bias": True,
    "vocab_size": 49152,
}  # fmt: skip
PYTHIA = {
    "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 16384, "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048, "model_type": "gpt_neox", "num_attention_heads": 32, "num_hidden_layers": 32,
    "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False, "torch_dtype": "float16",
    "transformers_version": "4.24.0", "use_cache": True, "use_parallel_residual": True, "vocab_size": 50432,
}  # fmt: skip
GLM4 = _HF | {
    "architectures": ["Glm4ForCausalLM"], "attention_bias": True, "attention_dropout": 0.0,
    "eos_token_id": [151329, 151336, 151338], "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 13696, "max_position_embeddings": 32768, "model_type": "glm4", "num_attention_heads": 32,
    "num_hidden_layers": 40, "num_key_value_heads": 2, "pad_token_id": 151329, "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "tie_word_embeddings": False, "vocab_size": 151552,
}  # fmt: skip
COHERE2 = _HF | {
    "architectures": ["Cohere2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 5,
    "cache_implementation": "hybrid", "eos_token_id": 255001, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 14336, "layer_norm_eps": 1e-05, "layer_switch": 4, "logit_scale": 0.25,
    "max_position_embeddings": 8192, "model_type": "cohere2", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "order_of_interleaved_layers": "local_attn_first", "pad_token_id": 0,
    "position_embedding_type": "rope_gptj", "rope_scaling": None, "rope_theta": 50000, "rotary_pct": 1.0,
    "sliding_window": 4096, "sliding_window_pattern": 4, "use_embedding_sharing": True, "use_gated_activation": True,
    "use_parallel_block": True, "use_parallel_embedding": False, "use_qk_norm": False, "vocab_size": 256000,
}  # fmt: skip
MIXTRAL = _HF | {
    "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768,
    "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False, "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False,
    "vocab_size": 32000,
}  # fmt: skip
QWEN2_MOE = _HF | {
    "architectures": ["Qwen2MoeForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "decoder_sparse_step": 1, "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 5632, "max_position_embeddings": 8192, "max_window_layers": 21, "model_type": "qwen2_moe",
    "moe_intermediate_size": 1408, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 60,
    "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 16, "output_router_logits": False,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 5632, "sliding_window": 32768, "tie_word_embeddings": False,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN3_MOE = _HF | {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
    "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": True,
    "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
    "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
GEMMA3 = {
    "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000,
    "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
    "vision_config": {
        "hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "model_type": "siglip_vision_model",
        "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False,
    },
}  # fmt: skip
LLAMA4 = {
    "architectures": ["Llama4ForConditionalGeneration"], "boi_token_index": 200080, "eoi_token_index": 200081,
    "image_token_index": 200092, "model_type": "llama4", "torch_dtype": "bfloat16",
    "text_config": {
        "attention_bias": False, "attention_chunk_size": 8192, "attention_dropout": 0.0, "attn_scale": 0.1,
        "attn_temperature_tuning": 4, "bos_token_id": 200000, "eos_token_id": [200001, 200007, 200008],
        "floor_scale": 8192, "for_llm_compressor": False, "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120,
        "initializer_range": 0.02, "interleave_moe_layer_step": 1, "intermediate_size": 8192,
        "intermediate_size_mlp": 16384, "max_position_embeddings": 10485760, "model_type": "llama4_text",
        "no_rope_layers": [], "num_attention_heads": 40, "num_experts_per_tok": 1, "num_hidden_layers": 48,
        "num_key_value_heads": 8, "num_local_experts": 16, "output_router_logits": False, "pad_token_id": 200018,
        "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0,
        "rope_scaling": {
            "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "torch_dtype": "bfloat16", "use_cache": True, "use_qk_norm": True, "vocab_size": 202048,
    },
    "transformers_version": "4.51.0.dev0",
    "vision_config": {
        "attention_dropout": 0.0, "hidden_act": "gelu", "hidden_size": 1408, "image_size": 336,
        "initializer_range": 0.02, "intermediate_size": 5632, "model_type": "llama4_vision_model", "norm_eps": 1e-05,
        "multi_modal_projector_bias": False, "num_attention_heads": 16, "num_channels": 3, "num_hidden_layers": 34,
        "patch_size": 14, "pixel_shuffle_ratio": 0.5, "projector_dropout": 0.0, "projector_input_dim": 4096,
        "projector_output_dim": 4096, "rope_theta": 10000, "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default", "vision_output_dim": 4096,
    },
}  # fmt: skip
MAVERICK = LLAMA4 | {
    "text_config": LLAMA4["text_config"] | {
        "attn_temperature_tuning": False, "interleave_moe_layer_step": 2, "max_position_embeddings": 1048576,
        "num_local_experts": 128, "rope_scaling": None, "use_qk_norm": False,
    },
}  # fmt: skip
_GEMMA4_ROPE = {
    "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
    "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
}
GEMMA4_E2B = {
    "architectures": ["Gemma4ForConditionalGeneration"], "audio_token_id": 258881, "boa_token_id": 256000,
    "boi_token_id": 255999, "eoa_token_id": 258883, "eoi_token_id": 258882, "eos_token_id": [1, 106],
    "image_token_id": 258880, "video_token_id": 258884, "model_type": "gemma4", "tie_word_embeddings": True,
    "text_config": {
        "attention_bias": False, "attention_dropout": 0.0, "attention_k_eq_v": False, "bos_token_id": 2,
        "dtype": "bfloat16", "enable_moe_block": False, "eos_token_id": 1, "final_logit_softcapping": 30.0,
        "global_head_dim": 512, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1536,
        "hidden_size_per_layer_input": 256, "intermediate_size": 6144,
        "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7, "max_position_embeddings": 131072,
        "model_type": "gemma4_text", "num_attention_heads": 8, "num_global_key_value_heads": None,
        "num_hidden_layers": 35, "num_key_value_heads": 1, "num_kv_shared_layers": 20, "pad_token_id": 0,
        "rms_norm_eps": 1e-06, "rope_parameters": _GEMMA4_ROPE, "sliding_window": 512, "tie_word_embeddings": True,
        "use_cache": True, "use_double_wide_mlp": True, "vocab_size": 262144, "vocab_size_per_layer_input": 262144,
    },
}  # fmt: skip
_OF_31B = {
    "attention_k_eq_v": True, "hidden_size": 5376, "hidden_size_per_layer_input": 0, "intermediate_size": 21504,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 10, "max_position_embeddings": 262144,
    "num_attention_heads": 32, "num_global_key_value_heads": 4, "num_hidden_layers": 60, "num_key_value_heads": 16,
    "num_kv_shared_layers": 0, "sliding_window": 1024, "use_double_wide_mlp": False,
}  # fmt: skip
MISTRAL3 = {
    "architectures": ["Mistral3ForConditionalGeneration"], "image_token_index": 10, "model_type": "mistral3",
    "multimodal_projector_bias": False, "projector_hidden_act": "gelu", "spatial_merge_size": 2,
    "text_config": {
        "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120,
        "initializer_range": 0.02, "intermediate_size": 32768, "max_position_embeddings": 131072,
        "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 1000000000.0, "sliding_window": None, "use_cache": True,
        "vocab_size": 131072,
    },
    "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0", "tie_word_embeddings": False,
    "vision_config": {
        "attention_dropout": 0.0, "head_dim": 64, "hidden_act": "gelu", "hidden_size": 1024, "image_size": 1540,
        "initializer_range": 0.02, "intermediate_size": 4096, "model_type": "pixtral", "num_attention_heads": 16,
        "num_channels": 3, "num_hidden_layers": 24, "patch_size": 14, "rope_theta": 10000.0,
    },
    "vision_feature_layer": -1,
}  # fmt: skip
_YARN = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 4096, "type": "yarn"}
DEEPSEEK_V2_LITE = _HF | {
    "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM"}, "aux_loss_alpha": 0.001,
    "bos_token_id": 100000, "eos_token_id": 100001, "first_k_dense_replace": 1, "hidden_act": "silu",
    "hidden_size": 2048, "intermediate_size": 10944, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "model_type": "deepseek_v2", "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1,
    "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16,
    "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16, "pretraining_tp": 1,
    "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_scaling": _YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}, "rope_theta": 10000,
    "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": True, "tie_word_embeddings": False,
    "topk_group": 1, "topk_method": "greedy", "v_head_dim": 128, "vocab_size": 102400,
}  # fmt: skip
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
DEEPSEEK_V3 = _HF | {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}, "bos_token_id": 0,
    "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
    "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
    "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "pretraining_tp": 1, "q_lora_rank": 1536,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "quantization_config": FP8, "rms_norm_eps": 1e-06,
    "rope_scaling": _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, "rope_theta": 10000, "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc",
    "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip
MOONLIGHT = {name: x for name, x in DEEPSEEK_V3.items() if name not in ("quantization_config", "rope_scaling")} | {
    "aux_loss_alpha": 0.001, "bos_token_id": 163584, "eos_token_id": 163585, "first_k_dense_replace": 1,
    "hidden_size": 2048, "intermediate_size": 11264, "max_position_embeddings": 8192, "moe_intermediate_size": 1408,
    "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "num_attention_heads": 16, "num_experts_per_tok": 6,
    "num_hidden_layers": 27, "num_key_value_heads": 16, "num_nextn_predict_layers": 0, "q_lora_rank": None,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 50000.0, "routed_scaling_factor": 2.446,
    "seq_aux": True, "topk_group": 1, "vocab_size": 163840,
}  # fmt: skip
KIMI_K2 = DEEPSEEK_V3 | {
    "aux_loss_alpha": 0.001, "bos_token_id": 163584, "eos_token_id": 163585, "first_k_dense_replace": 1,
    "max_position_embeddings": 131072, "model_type": "kimi_k2", "n_group": 1, "n_routed_experts": 384,
    "num_attention_heads": 64, "num_key_value_heads": 64, "num_nextn_predict_layers": 0,
    "rope_scaling": _YARN | {"beta_fast": 1.0, "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    "rope_theta": 50000.0, "routed_scaling_factor": 2.827, "seq_aux": True, "topk_group": 1, "vocab_size": 163840,
}  # fmt: skip
_MINICPM3_FACTORS = [1.0 + i / 5000 for i in range(16)]
MINICPM3 = {
    "architectures": ["MiniCPM3ForCausalLM"], "bos_token_id": 1, "dim_model_base": 256, "eos_token_id": [2, 73440],
    "hidden_act": "silu", "hidden_size": 2560, "initializer_range": 0.1, "intermediate_size": 6400,
    "kv_lora_rank": 256, "max_position_embeddings": 32768, "model_type": "minicpm3", "num_attention_heads": 40,
    "num_hidden_layers": 62, "num_key_value_heads": 40, "q_lora_rank": 768, "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32, "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "long_factor": _MINICPM3_FACTORS, "original_max_position_embeddings": 32768, "short_factor": _MINICPM3_FACTORS,
        "type": "longrope",
    },
    "scale_depth": 1.4, "scale_emb": 12, "torch_dtype": "bfloat16", "transformers_version": "4.41.0",
    "use_cache": True, "vocab_size": 73448,
}  # fmt: skip

PUBLISHED = {
    "gemma-7b": (GEMMA, 8_537_680_896),
    "gemma-2b": (
        GEMMA | {"hidden_size": 2048, "intermediate_size": 16384, "num_attention_heads": 8, "num_hidden_layers": 18,
                 "num_key_value_heads": 1}, 2_506_172_416,
    ),
    "phi-3-mini-4k": (PHI3, 3_821_079_552),
    "phi-3-mini-128k": (
        PHI3 | {"max_position_embeddings": 131072, "sliding_window": 262144, "rope_scaling": _FACTORS | {"type": "su"}},
        3_821_079_552,
    ),
    "phi-3-medium-128k": (
        PHI3 | {"hidden_size": 5120, "intermediate_size": 17920, "max_position_embeddings": 131072,
                "num_attention_heads": 40, "num_hidden_layers": 40, "num_key_value_heads": 10,
                "rope_scaling": {name: x + [1.0] * 16 for name, x in _FACTORS.items()} | {"type": "longrope"},
                "sliding_window": 131072}, 13_960_238_080,
    ),
    "phi-4": (
        PHI3 | {"hidden_size": 5120, "intermediate_size": 17920, "max_position_embeddings": 16384,
                "num_attention_heads": 40, "num_hidden_layers": 40, "num_key_value_heads": 10,
                "original_max_position_embeddings": 16384, "rope_theta": 250000, "sliding_window": None,
                "vocab_size": 100352}, 14_659_507_200,
    ),
    "phi-4-mini": (
        PHI3 | {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False,
                "max_position_embeddings": 131072, "num_attention_heads": 24, "num_key_value_heads": 8,
                "partial_rotary_factor": 0.75, "rope_scaling": _FACTORS | {"type": "longrope"},
                "sliding_window": 262144, "tie_word_embeddings": True, "vocab_size": 200064}, 3_836_021_760,
    ),
    "llama-4-scout": (LLAMA4, 107_769_861_120),
    "llama-4-maverick": (MAVERICK, 400_711_848_960),
    "olmo-2-7b": (OLMO2, 7_298_617_344),
    "olmo-2-13b": (
        OLMO2 | {"hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40, "num_hidden_layers": 40,
                 "num_key_value_heads": 40}, 13_716_198_400,
    ),
    "granite-3.0-8b": (GRANITE, 8_170_848_256),
    "smollm3-3b": (SMOLLM3, 3_075_098_624),
    "stablelm-3b": (STABLELM, 2_795_443_200),
    "stablelm-2-1.6b": (
        STABLELM | {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "use_qkv_bias": True,
                    "rope_scaling": None, "vocab_size": 100352}, 1_644_515_328,
    ),
    "stablelm-2-12b": (
        STABLELM | {"hidden_dropout": 0.0, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
                    "num_key_value_heads": 8, "qk_layernorm": True, "use_parallel_residual": True,
                    "vocab_size": 100352}, 12_143_185_920,
    ),
    "starcoder2-3b": (STARCODER2, 3_030_371_328),
    "starcoder2-7b": (
        STARCODER2 | {"hidden_size": 4608, "intermediate_size": 18432, "num_attention_heads": 36,
                      "num_hidden_layers": 32, "num_key_value_heads": 4, "rope_theta": 1000000}, 7_173_923_840,
    ),
    "starcoder2-15b": (
        STARCODER2 | {"hidden_size": 6144, "intermediate_size": 24576, "num_attention_heads": 48,
                      "num_hidden_layers": 40, "num_key_value_heads": 4, "rope_theta": 100000,
                      "tie_word_embeddings": False}, 15_957_889_024,
    ),
    "pythia-6.9b": (PYTHIA, 6_857_302_016),
    "pythia-1.4b": (
        PYTHIA | {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16, "num_hidden_layers": 24,
                  "vocab_size": 50304}, 1_414_647_808,
    ),
    "gpt-neox-20b": (
        PYTHIA | {"attention_probs_dropout_prob": 0, "hidden_act": "gelu_fast", "hidden_dropout_prob": 0,
                  "hidden_size": 6144, "intermediate_size": 24576, "num_attention_heads": 64,
                  "num_hidden_layers": 44}, 20_554_567_680,
    ),
    "glm-4-9b": (GLM4, 9_400_279_040),
    "glm-4-32b": (
        GLM4 | {"attention_bias": False, "hidden_size": 6144, "intermediate_size": 23040, "num_attention_heads": 48,
                "num_hidden_layers": 61}, 32_566_081_536,
    ),
    "command-r7b": (COHERE2, 8_028_033_024),
    "command-a": (
        COHERE2 | {"hidden_size": 12288, "intermediate_size": 36864, "max_position_embeddings": 131072,
                   "num_attention_heads": 96, "num_hidden_layers": 64}, 111_057_580_032,
    ),
    "mixtral-8x7b": (MIXTRAL, 46_702_792_704),
    "mixtral-8x22b": (
        MIXTRAL | {"hidden_size": 6144, "intermediate_size": 16384, "max_position_embeddings": 65536,
                   "num_attention_heads": 48, "num_hidden_layers": 56, "router_jitter_noise": 0.0,
                   "vocab_size": 32768}, 140_630_071_296,
    ),
    "qwen1.5-moe-a2.7b": (QWEN2_MOE, 14_315_784_192),
    "qwen2-57b-a14b": (
        QWEN2_MOE | {"hidden_size": 3584, "intermediate_size": 18944, "max_position_embeddings": 131072,
                     "max_window_layers": 28, "moe_intermediate_size": 2560, "num_attention_heads": 28,
                     "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 28, "num_key_value_heads": 4,
                     "shared_expert_intermediate_size": 20480, "sliding_window": 65536}, 57_408_658_944,
    ),
    "qwen3-30b-a3b": (QWEN3_MOE, 30_532_122_624),
    "qwen3-235b-a22b": (
        QWEN3_MOE | {"hidden_size": 4096, "intermediate_size": 12288, "max_window_layers": 94,
                     "moe_intermediate_size": 1536, "num_attention_heads": 64, "num_hidden_layers": 94},
        235_093_634_560,
    ),
    "deepseek-v2-lite": (DEEPSEEK_V2_LITE, 15_706_484_224),
    "deepseek-v2": (
        DEEPSEEK_V2_LITE | {"hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536,
                            "n_group": 8, "n_routed_experts": 160, "num_attention_heads": 128,
                            "num_hidden_layers": 60, "num_key_value_heads": 128, "q_lora_rank": 1536,
                            "routed_scaling_factor": 16.0, "topk_group": 3, "topk_method": "group_limited_greedy"},
        235_741_434_880,
    ),
    "deepseek-v3": (DEEPSEEK_V3, 671_026_419_200),
    "moonlight-16b-a3b": (MOONLIGHT, 15_960_110_208),
    "kimi-k2": (KIMI_K2, 1_026_408_232_448),
    "minicpm3-4b": (MINICPM3, 4_073_875_968),
    "gemma-3-4b": (GEMMA3, 3_880_263_168),
    "gemma-4-e2b": (GEMMA4_E2B, 4_628_569_344),
    "gemma-4-31b": (GEMMA4_E2B | {"text_config": GEMMA4_E2B["text_config"] | _OF_31B}, 30_697_345_280),
    "mistral-small-3.1": (MISTRAL3, 23_572_403_200),
}  # fmt: skip
"""The config, and the parameters that transformers 5.24 builds of it (without what sees)."""
