"""Fields of a config.json that change nothing that a forward pass computes, by the reason why.

The loader and the planner pass over them. What is not here, and is not read, is refused or said.
"""

import re
from collections.abc import Mapping

FILES = frozenset({
    # What the file is, who wrote it, which tokens have a meaning, labels of a classifier that is not there.
    "_commit_hash", "_from_auto", "_name_or_path", "_num_labels", "architectures", "auto_map", "bos_token_id",
    "cls_token_id", "custom_pipelines", "decoder_start_token_id", "dtype", "eos_token_id", "eot_token_id",
    "finetuning_task", "id2label", "init_config", "is_llama_config", "label2id", "language", "license",
    "mask_token_id", "model_max_length", "model_type", "n_special", "name", "num_labels", "pad_token", "pad_token_id",
    "predict_special_tokens", "prefix", "problem_type", "sep_token_id", "summary_activation", "summary_first_dropout",
    "summary_proj_to_labels", "summary_type", "summary_use_proj", "task_specific_params", "tokenizer_class",
    "tokenizer_name", "torch_dtype", "transformers.js_config", "transformers_version", "unk_token_id",
    "unsloth_fixed", "unsloth_version",
})  # fmt: skip
"""About the file."""

GENERATION = frozenset({
    "assistant_confidence_threshold", "assistant_early_exit", "assistant_ensemble_weight", "assistant_lookbehind",
    "bad_words_ids", "begin_suppress_tokens", "cache_config", "cache_implementation", "compile_config", "constraints",
    "continuous_batching_config", "disable_compile", "diversity_penalty", "do_sample", "dola_layers",
    "early_stopping", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "epsilon_cutoff", "eta_cutoff",
    "exponential_decay_length_penalty", "force_words_ids", "forced_bos_token_id", "forced_decoder_ids",
    "forced_eos_token_id", "guidance_scale", "is_assistant", "keys_to_ignore_at_inference", "length_penalty",
    "low_memory", "max_cache_len", "max_length", "max_matching_ngram_size", "max_new_tokens", "max_time",
    "min_length", "min_new_tokens", "min_p", "no_repeat_ngram_size", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "num_beam_groups", "num_beams", "num_logits_to_keep", "num_return_sequences",
    "output_attentions", "output_hidden_states", "output_logits", "output_past", "output_router_logits",
    "output_scores", "penalty_alpha", "prefill_chunk_size", "prompt_lookup_num_tokens", "remove_invalid_values",
    "renormalize_logits", "repetition_penalty", "return_dict", "return_dict_in_generate", "sequence_bias",
    "speculation_type", "stop_strings", "suppress_tokens", "target_lookbehind", "temperature", "token_healing",
    "top_h", "top_k", "top_p", "typical_p", "use_cache", "use_mtp", "use_return_dict", "watermarking_config",
})  # fmt: skip
"""About what is done with the logits: transformers' GenerationConfig, and what is returned besides."""

TRAINING = frozenset({
    "activation_dropout", "attention_dropout", "attention_dropout_prob", "attention_probs_dropout_prob", "attn_pdrop",
    "aux_loss_alpha",
    "classifier_dropout", "dropout", "emb_pdrop", "embd_pdrop", "embedding_dropout", "fc_dropout", "ffn_dropout",
    "gradient_checkpointing", "hidden_dropout", "hidden_dropout_prob", "init_device", "init_method", "init_std",
    "initializer_range", "layerdrop", "loss_type", "mlp_pdrop", "neftune_noise_alpha", "rescale_prenorm_residual",
    "resid_pdrop", "residual_dropout", "router_aux_loss_coef", "router_jitter_noise", "router_z_loss_coef", "seq_aux",
    "tf_legacy_loss", "training_dtype", "z_loss_coefficient",
})  # fmt: skip
"""About training: dropout, losses, first values."""

RUNTIME = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal",
    "_experts_implementation", "_flash_attn_2_enabled", "attention_softmax_in_fp32", "attn_impl",
    "attn_implementation", "base_model_pp_plan", "base_model_tp_plan", "bias_dropout_fusion", "device_map", "ep_size",
    "fc_type", "flash_attn", "initial_context_length", "masked_softmax_fusion", "max_batch_size", "max_seq_length",
    "max_sequence_length", "n_ctx", "offset_alibi", "pad_key_length", "pretraining_tp", "reorder_and_upcast_attn",
    "scale_attention_softmax_in_fp32", "seq_length", "skip_bias_add", "skip_bias_add_qkv", "slow_but_exact",
    "torchscript", "tp_plan", "use_bfloat16", "use_flash_attention", "use_flash_attention_2", "use_flash_attn",
    "use_mambapy", "use_memory_efficient_attention", "verbose",
})  # fmt: skip
"""About how the same numbers are computed: kernels, fusion, precision of intermediate results, buffers."""

HARMLESS = FILES | GENERATION | TRAINING | RUNTIME

HARMLESS_VALUES: Mapping[str, tuple[object, ...]] = {
    "activation": ("swiglu",),  # a note in files of Llama's kind, whose MLP it is
    "add_cross_attention": (False,),
    "chunk_size_feed_forward": (0,),
    "cross_attention_hidden_size": (),
    "full_attn_mod": (1,),
    "interpolate_factor": (1,),
    "is_causal": (True,),
    "is_decoder": (True, False),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "rope_interleaved": (False,),
    "tie_encoder_decoder": (False,),
    "use_embedding_sharing": (True, False),  # a note of what tie_word_embeddings says
}
"""Fields of every config that change nothing with these values, or null, and something with others."""


def is_harmless(name: str, value: object) -> bool:
    """Whether a field with this value is known to change nothing, whatever the family.

    Args:
        name: of the field.
        value: what the file says. None, False, 0 and what is empty switch nothing on.
    """
    if name in HARMLESS or value is None:
        return True
    known = HARMLESS_VALUES.get(name, (False, 0, [], {}, ""))
    return any(value == harmless and isinstance(value, bool) == isinstance(harmless, bool) for harmless in known)


def may_matter(name: str, value: object) -> bool:
    """Whether a setting may change what a layer keeps: its name speaks of layers, heads, windows or states."""
    return _SUSPECT.search(name) is not None and not _NO_SIZE.search(name) and not is_harmless(name, value)


_SUSPECT = re.compile(
    "attn|attention|block|cache|chunk|cla_|compress|conv|cross|delta|encoder|group|head|hybrid|interval|key|kv|latent|"
    "layer|linear|local|lora|mamba|memory|mixer|pattern|period|query|recurr|rnn|shar|skip|slid|sparse|ssm|state|"
    "stride|swa|value|window|yoco"
)
"""What the names of settings about layers, heads, windows and states hold."""

_NO_SIZE = re.compile(
    "_act$|activation|attn_(alpha|beta)_factor|bias|clip|_dt_|dtype|eps|expert|flash|gate$|implementation|init|kernels$|"
    "lm_head|log_max|log_min|max_window_layers|moe|mtp|multiplier|n_group$|neg_eigval|nextn|norm|parallel|per_layer_input|position|"
    "query_pre_attn_scalar|residual|rope|scal(e|ing)|sequence_id|softcap|temperature|topk_group"
)
"""And what those of them hold that change numbers or weights, but not how much a layer keeps."""
