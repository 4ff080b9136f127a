"""What a field is that a config.json leaves out: the defaults of transformers' config classes (5.23), by model_type.

The planner and `kvattn.models` both go by these. Older releases write only what differs from them. A field that is
there and null is another matter: it stays null where transformers accepts that, and is refused elsewhere.
"""

from collections.abc import Mapping
from typing import Any

_EVERY: dict[str, Any] = {"quantization_config": None}
_ROPE: dict[str, Any] = _EVERY | {
    "rope_parameters": None,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "partial_rotary_factor": None,
    "original_max_position_embeddings": None,
}
_LLAMA = _ROPE | {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
_MISTRAL = _ROPE | {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "sliding_window": 4096,
    "layer_types": None,
}
_QWEN2 = _ROPE | {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_GEMMA2 = _ROPE | {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
    "use_bidirectional_attention": None,
}
_GPT2 = _EVERY | {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}

_GPT2_NAMES: Mapping[str, tuple[str, ...]] = {
    "n_embd": ("hidden_size",),
    "n_layer": ("num_hidden_layers",),
    "n_head": ("num_attention_heads",),
    "n_positions": ("max_position_embeddings",),
}
_MPT_NAMES: Mapping[str, tuple[str, ...]] = {
    "d_model": ("hidden_size",),
    "n_layers": ("num_hidden_layers",),
    "n_heads": ("num_attention_heads",),
}

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _MISTRAL,
    "qwen2": _QWEN2,
    "qwen3": _QWEN2 | {"head_dim": 128, "attention_bias": False},
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2
    | {
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "rope_theta": 1e6,
        "rope_local_base_freq": 10000.0,
        "sliding_window_pattern": 6,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
        "use_bidirectional_attention": False,
    },
    "falcon": _ROPE
    | {
        "vocab_size": 65024,
        "hidden_size": 4544,
        "num_hidden_layers": 32,
        "num_attention_heads": 71,
        "num_ln_in_parallel_attn": None,
        "layer_norm_epsilon": 1e-5,
        "num_kv_heads": None,
        "alibi": False,
        "new_decoder_architecture": False,
        "multi_query": True,
        "parallel_attn": True,
        "bias": False,
        "max_position_embeddings": 2048,
        "ffn_hidden_size": None,
        "activation": "gelu",
        "tie_word_embeddings": True,
    },
    "opt": _EVERY
    | {
        "vocab_size": 50272,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "ffn_dim": 3072,
        "max_position_embeddings": 2048,
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "word_embed_proj_dim": None,
        "num_attention_heads": 12,
        "activation_function": "relu",
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "tie_word_embeddings": True,
    },
    "mpt": _EVERY
    | {
        "vocab_size": 50368,
        "d_model": 2048,
        "n_heads": 16,
        "n_layers": 24,
        "layer_norm_epsilon": 1e-5,
        "attn_config": None,
        "logit_scale": None,
        "no_bias": True,
        "embedding_fraction": 1.0,
        "norm_type": "low_precision_layernorm",
        "tie_word_embeddings": True,
    },
    "bloom": _EVERY
    | {
        "vocab_size": 250880,
        "hidden_size": 64,
        "n_layer": 2,
        "n_head": 8,
        "layer_norm_epsilon": 1e-5,
        "apply_residual_connection_post_layernorm": False,
        "pretraining_tp": 1,
        "slow_but_exact": False,
        "tie_word_embeddings": True,
    },
    "gpt2": _GPT2 | {"scale_attn_by_inverse_layer_idx": False},
    "gpt_bigcode": _GPT2
    | {
        "activation_function": "gelu_pytorch_tanh",
        "multi_query": True,
        "inference_runner": None,
        "validate_runner_input": None,
        "pre_allocate_kv_cache": None,
    },
    "gpt_oss": _ROPE
    | {
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "rope_theta": 150000.0,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "sliding_window": 128,
        "layer_types": None,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
    },
}
"""By model_type, every field that a family reads, and what it is where the file says nothing."""

ALIASES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "bloom": {"hidden_size": ("n_embed",), "n_layer": ("num_hidden_layers",), "n_head": ("num_attention_heads",)},
    "falcon": {
        "hidden_size": ("n_embed",),
        "num_hidden_layers": ("n_layer",),
        "num_attention_heads": ("n_head",),
        "num_kv_heads": ("n_head_kv",),
    },
    "gemma2": {"sliding_window": ("sliding_window_size",)},  # its files have both
    "gpt2": _GPT2_NAMES,
    "gpt_bigcode": _GPT2_NAMES,
    "gptj": _GPT2_NAMES,
    "gpt_neo": {
        "num_hidden_layers": ("num_layers",),
        "num_attention_heads": ("num_heads",),
        "sliding_window": ("window_size",),
    },
    "codegen": _GPT2_NAMES,
    "gpt_oss": {"num_local_experts": ("num_experts",), "num_experts_per_tok": ("experts_per_token",)},
    "mpt": _MPT_NAMES,
    "dbrx": _MPT_NAMES
    | {
        "max_seq_len": ("max_position_embeddings",),
        "num_key_value_heads": ("attn_config.kv_n_heads",),
        "mlp_dim": ("ffn_config.ffn_hidden_size",),
        "num_experts": ("ffn_config.moe_num_experts",),
        "num_experts_per_tok": ("ffn_config.moe_top_k",),
    },
    "qwen3_moe": {"num_experts": ("num_local_experts",)},
    "mixtral": {"num_local_experts": ("num_experts",)},
    "jamba": {"num_experts": ("num_local_experts",)},
    "nemotron_h": {
        "layers_block_type": ("layer_types",),
        "n_routed_experts": ("num_local_experts",),
        "head_dim": ("attention_head_dim",),
        "n_groups": ("mamba_n_groups",),
        "conv_kernel": ("mamba_d_conv",),
        "expand": ("mamba_expand",),
    },
    "granitemoehybrid": {"layer_types": ("layers_block_type",)},
    "bamba": {"layer_types": ("layers_block_type",)},
    "zamba2": {"layers_block_type": ("layer_types",), "attention_head_dim": ("head_dim",)},
    "lfm2": {"intermediate_size": ("block_ff_dim",), "tie_word_embeddings": ("tie_embedding",)},
    "lfm2_moe": {"tie_word_embeddings": ("tie_embedding",)},
    "recurrent_gemma": {"sliding_window": ("attention_window_size",)},
    "chatglm": {
        "num_layers": ("num_hidden_layers",),
        "ffn_hidden_size": ("intermediate_size",),
        "padded_vocab_size": ("vocab_size",),
        "kv_channels": ("head_dim",),
    },
}
"""By model_type, what a field is called besides: in transformers' attribute_map, or in files that were published."""

MPT_ATTENTION: Mapping[str, Any] = {
    "attn_type": "multihead_attention",
    "alibi": True,
    "prefix_lm": False,
    "qk_ln": False,
    "attn_uses_sequence_id": False,
    "softmax_scale": None,
    "clip_qkv": None,
    "alibi_bias_max": 8,
}
"""The same for the attn_config of MPT."""

NULLABLE: Mapping[str, frozenset[str]] = {
    "mistral": frozenset({"sliding_window"}),
    "qwen2": frozenset({"num_key_value_heads", "sliding_window"}),
    "qwen3": frozenset({"num_key_value_heads", "sliding_window"}),
    "gemma2": frozenset({"sliding_window", "final_logit_softcapping", "attn_logit_softcapping"}),
    "gemma3_text": frozenset({"sliding_window", "use_bidirectional_attention"}),
    "falcon": frozenset({"alibi", "new_decoder_architecture", "multi_query", "parallel_attn", "bias"}),
    "gpt_oss": frozenset({"sliding_window", "rope_parameters"}),
}
"""Which fields may be null though their default is something else."""
