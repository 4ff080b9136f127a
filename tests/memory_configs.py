"""Published configurations, as config.json has them, and published parameter counts: what the planner is held to."""

import published_configs


def gated(kind, layers, heads, kv_heads, dim, mlp, vocab, **more):
    return {
        "model_type": kind,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": dim,
        "intermediate_size": mlp,
        "vocab_size": vocab,
    } | more


def sized(kind, layers, heads, kv_heads, dim, **more):
    sizes = {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return {"model_type": kind, "hidden_size": dim} | sizes | more


def opt(layers, heads, dim):
    sizes = {"num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": dim, "ffn_dim": 4 * dim}
    return {"model_type": "opt", "vocab_size": 50272, "word_embed_proj_dim": dim} | sizes


def gemma3(**inner):
    """Image and text models leave what is the default out of their text part."""
    return {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "sliding_window": 1024} | inner}


TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
WHOLE = {"sliding_window": None}

CONFIGS = {
    "llama-2-7b": gated("llama", 32, 32, 32, 4096, 11008, 32000),
    "llama-2-13b": gated("llama", 40, 40, 40, 5120, 13824, 32000),
    "llama-2-70b": gated("llama", 80, 64, 8, 8192, 28672, 32000),
    "llama-3-8b": gated("llama", 32, 32, 8, 4096, 14336, 128256),
    "llama-3-70b": gated("llama", 80, 64, 8, 8192, 28672, 128256),
    "llama-3.1-405b": gated("llama", 126, 128, 8, 16384, 53248, 128256),
    "llama-3.2-1b": gated("llama", 16, 32, 8, 2048, 8192, 128256, head_dim=64, **TIED),
    "llama-3.2-3b": gated("llama", 28, 24, 8, 3072, 8192, 128256, head_dim=128, **TIED),
    "mistral-7b-v0.1": gated("mistral", 32, 32, 8, 4096, 14336, 32000, sliding_window=4096),
    "mistral-7b-v0.3": gated("mistral", 32, 32, 8, 4096, 14336, 32768, **WHOLE),
    "mistral-nemo-12b": gated("mistral", 40, 32, 8, 5120, 14336, 131072, head_dim=128, **WHOLE),
    "mixtral-8x7b": gated("mixtral", 32, 32, 8, 4096, 14336, 32000, num_local_experts=8, num_experts_per_tok=2),
    "mixtral-8x22b": gated("mixtral", 56, 48, 8, 6144, 16384, 32768, num_local_experts=8, num_experts_per_tok=2),
    "qwen2.5-7b": gated("qwen2", 28, 28, 4, 3584, 18944, 152064, use_sliding_window=False, sliding_window=131072),
    "qwen2.5-32b": gated("qwen2", 64, 40, 8, 5120, 27648, 152064),
    "qwen2.5-72b": gated("qwen2", 80, 64, 8, 8192, 29568, 152064),
    "qwen3-0.6b": gated("qwen3", 28, 16, 8, 1024, 3072, 151936, head_dim=128, **TIED),
    "qwen3-8b": gated("qwen3", 36, 32, 8, 4096, 12288, 151936, head_dim=128, **UNTIED),
    "qwen3-32b": gated("qwen3", 64, 64, 8, 5120, 25600, 151936, head_dim=128, **UNTIED),
    "qwen3-30b-a3b": gated(
        "qwen3_moe", 48, 32, 4, 2048, 6144, 151936, head_dim=128, moe_intermediate_size=768, num_experts=128,
        num_experts_per_tok=8, **UNTIED,
    ),
    "qwen3-235b-a22b": gated(
        "qwen3_moe", 94, 64, 4, 4096, 12288, 151936, head_dim=128, moe_intermediate_size=1536, num_experts=128,
        num_experts_per_tok=8, **UNTIED,
    ),
    "gemma-2-2b": gated("gemma2", 26, 8, 4, 2304, 9216, 256000, head_dim=256, sliding_window=4096),
    "gemma-2-9b": gated("gemma2", 42, 16, 8, 3584, 14336, 256000, head_dim=256, sliding_window=4096),
    "gemma-2-27b": gated("gemma2", 46, 32, 16, 4608, 36864, 256000, head_dim=128, sliding_window=4096),
    "gemma-3-1b": gated(
        "gemma3_text", 26, 4, 1, 1152, 6912, 262144, head_dim=256, sliding_window=512, sliding_window_pattern=6
    ),
    "gemma-3-4b": gemma3(num_hidden_layers=34, hidden_size=2560, intermediate_size=10240),
    "gemma-3-12b": gemma3(
        num_hidden_layers=48, hidden_size=3840, intermediate_size=15360, num_attention_heads=16, num_key_value_heads=8
    ),
    "gemma-3-27b": gemma3(
        num_hidden_layers=62, hidden_size=5376, intermediate_size=21504, num_attention_heads=32,
        num_key_value_heads=16, head_dim=128,
    ),
    "gpt-oss-20b": gated(
        "gpt_oss", 24, 64, 8, 2880, 2880, 201088, head_dim=64, sliding_window=128, num_local_experts=32,
        num_experts_per_tok=4, **UNTIED,
    ),
    "gpt-oss-120b": gated(
        "gpt_oss", 36, 64, 8, 2880, 2880, 201088, head_dim=64, sliding_window=128, num_local_experts=128,
        num_experts_per_tok=4, **UNTIED,
    ),
    "falcon-7b": {"model_type": "falcon", "bias": False, "multi_query": True, "parallel_attn": True},
    "falcon-40b": {
        "model_type": "falcon", "num_hidden_layers": 60, "num_attention_heads": 128, "num_kv_heads": 8,
        "hidden_size": 8192, "new_decoder_architecture": True, "bias": False,
    },
    "falcon-180b": {
        "model_type": "falcon", "num_hidden_layers": 80, "num_attention_heads": 232, "num_kv_heads": 8,
        "hidden_size": 14848, "new_decoder_architecture": True, "bias": False,
    },
    "starcoder": {
        "model_type": "gpt_bigcode", "n_layer": 40, "n_head": 48, "n_embd": 6144, "n_inner": 24576,
        "n_positions": 8192, "vocab_size": 49152, "multi_query": True,
    },
    "gpt2": {"model_type": "gpt2"},
    "gpt2-xl": {"model_type": "gpt2", "n_layer": 48, "n_head": 25, "n_embd": 1600},
    "pythia-6.9b": {
        "model_type": "gpt_neox", "num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096,
        "intermediate_size": 16384, "vocab_size": 50432, "max_position_embeddings": 2048,
    },
    "mpt-7b": {"model_type": "mpt", "n_layers": 32, "n_heads": 32, "d_model": 4096, "vocab_size": 50432},
    "mpt-30b": {"model_type": "mpt", "n_layers": 48, "n_heads": 64, "d_model": 7168, "vocab_size": 50432},
    "bloom-176b": {"model_type": "bloom", "n_layer": 70, "n_head": 112, "hidden_size": 14336, "vocab_size": 250880},
    "opt-125m": opt(12, 12, 768),
    "opt-1.3b": opt(24, 32, 2048),
    "opt-2.7b": opt(32, 32, 2560),
    "opt-6.7b": opt(32, 32, 4096),
    "opt-13b": opt(40, 40, 5120),
    "opt-30b": opt(48, 56, 7168),
    "opt-66b": opt(64, 72, 9216),
    "opt-175b": opt(96, 96, 12288),
    "qwen2.5-0.5b": gated("qwen2", 24, 14, 2, 896, 4864, 151936, **TIED),
    "qwen2.5-1.5b": gated("qwen2", 28, 12, 2, 1536, 8960, 151936, **TIED),
    "qwen2.5-3b": gated("qwen2", 36, 16, 2, 2048, 11008, 151936, **TIED),
    "qwen2.5-14b": gated("qwen2", 48, 40, 8, 5120, 13824, 152064),
    "qwen3-1.7b": gated("qwen3", 28, 16, 8, 2048, 6144, 151936, head_dim=128, **TIED),
    "qwen3-4b": gated("qwen3", 36, 32, 8, 2560, 9728, 151936, head_dim=128, **TIED),
    "qwen3-14b": gated("qwen3", 40, 40, 8, 5120, 17408, 151936, head_dim=128, **UNTIED),
}  # fmt: skip


def unquantised(config):
    """The table has models as they are before their weights are rounded."""
    return {name: value for name, value in config.items() if name != "quantization_config"}


CONFIGS |= {
    name: unquantised(config) for name, (config, _) in published_configs.PUBLISHED.items() if name not in CONFIGS
}

# What the model pages and papers say, to the digit where weights are published. The counters never saw these.
PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "mistral-nemo-12b": 12_247_782_400,
    "mixtral-8x7b": 46_702_792_704,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-1b": 999_885_952,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "starcoder": 15_517_456_384,
    "bloom-176b": 176_247_271_424,
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "pythia-6.9b": 6_857_302_016,
    "mpt-7b": 6_649_286_656,
    "opt-125m": 125_239_296,
    "opt-1.3b": 1_315_758_080,
    "opt-6.7b": 6_658_473_984,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-14b": 14_770_033_664,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-14b": 14_768_307_200,
}
PUBLISHED |= {name: count for name, (_, count) in published_configs.PUBLISHED.items()}

ESTIMATED = {
    "cohere": (gated("cohere", 40, 64, 64, 8192, 22528, 256000, **TIED), 34_980_831_232),
    "glm": (gated("glm", 40, 32, 2, 4096, 13696, 151552, head_dim=128, **UNTIED), 9_399_951_360),
    "gptj": ({"model_type": "gptj", "n_layer": 28, "n_head": 16, "n_embd": 4096, "vocab_size": 50400}, 6_050_882_784),
    "phi": (gated("phi", 24, 32, 32, 2048, 8192, 51200, **UNTIED), 1_418_270_720),
    "phimoe": (
        gated("phimoe", 32, 32, 8, 4096, 6400, 32064, num_local_experts=16, num_experts_per_tok=2), 41_872_793_600
    ),
    "glm4_moe": (
        gated("glm4_moe", 46, 96, 8, 4096, 10944, 151552, n_routed_experts=128, num_experts_per_tok=8,
              moe_intermediate_size=1408, n_shared_experts=1, first_k_dense_replace=1), 103_481_200_640
    ),
    "hunyuan_v1_moe": (  # as A13B has them: lists, and one expert for every token
        gated("hunyuan_v1_moe", 32, 32, 8, 4096, 3072, 128167, head_dim=128, num_experts=64, moe_topk=[8] * 32,
              num_shared_expert=[1] * 32, moe_intermediate_size=[3072] * 32, **TIED), 80_393_183_232
    ),
    "gpt_neo": (
        {"model_type": "gpt_neo", "num_layers": 24, "num_heads": 16, "hidden_size": 2048, "window_size": 256},
        1_311_000_000,
    ),
    "chatglm, the first": (
        {"model_type": "chatglm", "num_layers": 28, "num_attention_heads": 32, "hidden_size": 4096,
         "inner_hidden_size": 16384, "vocab_size": 130528}, 6_173_286_400
    ),
    "ernie4_5_moe": (
        gated("ernie4_5_moe", 28, 20, 4, 2560, 12288, 103424, moe_num_experts=64, moe_k=6, moe_num_shared_experts=2,
              moe_intermediate_size=1536, moe_layer_start_index=1, **TIED), 21_825_437_888
    ),
}  # fmt: skip
"""Families without a counter: transformers 5.23's sizes of them, and the parameters of what it builds."""

EXACT = {
    "olmo2": (gated("olmo2", 32, 32, 32, 4096, 11008, 50304, **UNTIED), 6_888_624_128),
    "smollm3": (gated("smollm3", 36, 16, 4, 2048, 11008, 128256, **TIED), 3_075_098_624),
    "stablelm": (gated("stablelm", 32, 32, 32, 2560, 6912, 50304, **UNTIED), 2_795_443_200),
    "starcoder2": (gated("starcoder2", 30, 24, 2, 3072, 12288, 49152, **TIED), 3_030_371_328),
    "qwen2_moe": (
        gated(
            "qwen2_moe",
            24,
            16,
            16,
            2048,
            5632,
            151936,
            num_experts=60,
            num_experts_per_tok=4,
            moe_intermediate_size=1408,
            shared_expert_intermediate_size=5632,
        ),
        14_315_784_192,
    ),
    "qwen2_moe, some dense": (
        sized("qwen2_moe", 24, 16, 16, 2048, decoder_sparse_step=2, mlp_only_layers=[1]),
        7_566_573_568,
    ),
}
"""Families with one: likewise."""

ACTIVE = {"phimoe": 6.6e9, "qwen2_moe": 2.7e9}
"""As published, to two digits."""


def nested(kind, **inner):
    return {"model_type": kind, "text_config": {"model_type": f"{kind}_text"} | inner}


NEMOTRON_8B = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
GRANITE = ["mamba"] * 5 + ["attention"] + ["mamba"] * 4
LFM = ["conv", "conv", "full_attention", "conv", "conv", "full_attention", "conv", "conv", "full_attention", "conv",
       "full_attention", "conv", "full_attention", "conv", "full_attention", "conv"]  # fmt: skip
LLAMA4 = {"head_dim": 128, "hidden_size": 5120, "num_attention_heads": 40, "num_key_value_heads": 8}
LLAMA4 |= {"num_hidden_layers": 48, "intermediate_size": 8192, "intermediate_size_mlp": 16384, "vocab_size": 202048}
DBRX = {
    "model_type": "dbrx",
    "d_model": 6144,
    "n_heads": 48,
    "n_layers": 40,
    "max_seq_len": 32768,
    "vocab_size": 100352,
}
DBRX |= {"attn_config": {"kv_n_heads": 8, "clip_qkv": 8, "rope_theta": 500000}}
DBRX |= {"ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4, "moe_loss_weight": 0.05}}
CHATGLM = {"model_type": "chatglm", "num_layers": 28, "num_attention_heads": 32, "hidden_size": 4096}
CHATGLM |= {"kv_channels": 128, "multi_query_attention": True, "multi_query_group_num": 2}

KEPT = {
    # One layer in four has keys and values; the others a gated delta net.
    "qwen3_next": (
        sized("qwen3_next", 48, 16, 2, 2048, full_attention_interval=4, head_dim=256, vocab_size=151936), 48, 12, 24_576
    ),
    "qwen3_next, without the interval": (sized("qwen3_next", 48, 16, 2, 2048, head_dim=256), 48, 12, 24_576),
    "qwen3_next, listed": (
        sized("qwen3_next", 4, 16, 2, 2048, head_dim=256,
              layer_types=["linear_attention", "full_attention", "linear_attention", "linear_attention"]),
        4, 1, 2_048,
    ),
    "qwen3_5": (nested("qwen3_5", num_hidden_layers=24, num_key_value_heads=2, head_dim=256), 24, 6, 12_288),
    # Letters: M Mamba, * attention, - an MLP, E experts.
    "nemotron_h": (
        sized("nemotron_h", 52, 32, 8, 4096, head_dim=128, hybrid_override_pattern="M-M*" * 13), 52, 13, 53_248
    ),
    "nemotron_h, published": (
        sized("nemotron_h", 52, 32, 8, 4096, attention_head_dim=128, hybrid_override_pattern=NEMOTRON_8B), 52, 4, 16_384
    ),
    "jamba": (sized("jamba", 32, 32, 8, 4096, attn_layer_period=8, attn_layer_offset=4), 32, 4, 16_384),
    "bamba": (sized("bamba", 32, 32, 8, 4096, attn_layer_indices=[9, 18, 27], mamba_d_state=128), 32, 3, 12_288),
    "zamba2": (sized("zamba2", 54, 32, 32, 2560, hybrid_layer_ids=[6, 12, 18]), 54, 3, 61_440),
    "zamba2, listed": (
        sized("zamba2", 4, 32, 32, 2560, layers_block_type=["mamba", "hybrid", "mamba", "hybrid"]), 4, 2, 40_960
    ),
    # Attention and Mamba side by side in every layer.
    "falcon_h1": (sized("falcon_h1", 36, 8, 2, 2048, head_dim=128, mamba_d_ssm=3072), 36, 36, 36_864),
    "granitemoehybrid": (sized("granitemoehybrid", 40, 12, 4, 1536, layer_types=GRANITE * 4), 40, 4, 8_192),
    "lfm2": (sized("lfm2", 16, 32, 8, 2048, layer_types=LFM, conv_L_cache=3), 16, 6, 12_288),
    "lfm2, by numbers": (sized("lfm2", 16, 32, 8, 2048, full_attn_idxs=[2, 5, 8, 10, 12, 14]), 16, 6, 12_288),
    "recurrent_gemma": (
        sized("recurrent_gemma", 26, 10, 1, 2560, block_types=["recurrent", "recurrent", "attention"],
              attention_window_size=2048, lru_width=2560), 26, 8, 8_192,
    ),
    "minimax": (
        sized("minimax_text_01", 80, 64, 8, 6144, head_dim=128, attn_type_list=([0] * 7 + [1]) * 10), 80, 10, 40_960
    ),
    "olmo_hybrid": (sized("olmo_hybrid", 32, 30, 30, 3840), 32, 8, 122_880),
    # The last layers share the cache of an earlier one.
    "gemma3n": (nested("gemma3n", num_hidden_layers=35, num_kv_shared_layers=15), 35, 20, 40_960),
    "gemma3n, all its own": (nested("gemma3n", num_hidden_layers=30, num_kv_shared_layers=0), 30, 30, 61_440),
    "hunyuan": (sized("hunyuan", 64, 80, 8, 6400, head_dim=128, use_cla=True, cla_share_factor=2), 64, 32, 131_072),
    # Every layer, under a name of the family's own.
    "chatglm": (CHATGLM, 28, 28, 28_672),
    "chatglm, groups without the flag": (
        {"model_type": "chatglm", "multi_query_group_num": 2, "num_layers": 28, "num_attention_heads": 32,
         "hidden_size": 4096}, 28, 28, 28_672,
    ),
    "chatglm, one head for each query": (CHATGLM | {"multi_query_attention": False}, 28, 28, 458_752),
    "dbrx": (DBRX, 40, 40, 163_840),
    "falcon": (
        {"model_type": "falcon", "n_head_kv": 8, "n_head": 128, "n_layer": 60, "hidden_size": 8192,
         "new_decoder_architecture": True}, 60, 60, 122_880,
    ),
    "falcon, as first published": (
        {"model_type": "RefinedWeb", "n_head_kv": 8, "n_head": 128, "n_layer": 60, "hidden_size": 8192}, 60, 60, 122_880
    ),
    "bloom": ({"model_type": "bloom", "n_embed": 1024, "n_layer": 24, "num_attention_heads": 16}, 24, 24, 98_304),
    "mpt, one head": (
        {"model_type": "mpt", "n_layers": 4, "n_heads": 8, "d_model": 512,
         "attn_config": {"attn_type": "multiquery_attention"}}, 4, 4, 1_024,
    ),
    "gpt_neo": (
        {"model_type": "gpt_neo", "num_layers": 24, "num_heads": 16, "attention_types": [[["global", "local"], 12]],
         "attention_layers": ["global", "local"] * 12, "window_size": 256}, 24, 24, 196_608,
    ),
    "exaone4, letters": (
        sized("exaone4", 8, 40, 8, 5120, sliding_window=4096, sliding_window_pattern="LLLG"), 8, 8, 32_768
    ),
    "exaone4, no window": (
        sized("exaone4", 30, 32, 8, 2048, sliding_window=None, sliding_window_pattern=None), 30, 30, 61_440
    ),
    "cohere2, by its newer name": (
        sized("cohere2", 8, 8, 8, 512, sliding_window=9, _sliding_window_pattern=2), 8, 8, 16_384
    ),
    "a text part in a text part": (
        {"model_type": "qwen2_5_omni", "thinker_config": {"text_config":
         sized("qwen2", 28, 28, 4, 3584)}}, 28, 28, 57_344,
    ),
    "a text part called language": (
        {"model_type": "multi_modality", "language_config": sized("llama", 30, 32, 32, 4096)}, 30, 30, 491_520
    ),
    # Llama 4: three layers in four keep their chunk of 8192 at most.
    "llama4": (nested("llama4", **LLAMA4), 48, 48, 196_608),
    # null is no default.
    "qwen2, null": (sized("qwen2", 80, 64, None, 8192), 80, 80, 2_621_440),
    "mixtral, null": (sized("mixtral", 32, 32, 8, 4096, head_dim=None, sliding_window=None), 32, 32, 131_072),
    "falcon, null": ({"model_type": "falcon", "num_kv_heads": None, "new_decoder_architecture": True}, 32, 32, 581_632),
}  # fmt: skip
"""Settings; layers, layers that keep keys and values, and 2 * those * K * H * 2 bytes, by hand."""

LLAMA4_MOE = LLAMA4 | {"num_experts_per_tok": 1}
COUNTED = {
    # As the model pages have them: all parameters and active ones, in billions.
    "llama-4-maverick": (nested("llama4", **LLAMA4_MOE, num_local_experts=128, interleave_moe_layer_step=2), 400, 17),
    "llama-4-maverick, listed": (
        nested("llama4", **LLAMA4_MOE, num_local_experts=128, moe_layers=list(range(1, 48, 2))), 400, 17
    ),
    "llama-4-scout": (nested("llama4", **LLAMA4_MOE, num_local_experts=16), 109, 17),
    "dbrx": (DBRX, 132, 36),
    "qwen3-next-80b-a3b": (sized("qwen3_next", 48, 16, 2, 2048, head_dim=256), 80, 3.9),
    "nemotron-h-8b": (
        sized("nemotron_h", 52, 32, 8, 4096, hybrid_override_pattern=NEMOTRON_8B, vocab_size=131072), 8.1, 8.1
    ),
    "jamba": (sized("jamba", 32, 32, 8, 4096, expert_layer_period=2, expert_layer_offset=1), 52, 12),
    "minimax-text-01": (
        sized("minimax_text_01", 80, 64, 8, 6144, head_dim=128, attn_type_list=([0] * 7 + [1]) * 10, vocab_size=200064,
              intermediate_size=9216, num_local_experts=32, num_experts_per_tok=2), 456, 45.9,
    ),
    "recurrent-gemma-2b": (sized("recurrent_gemma", 26, 10, 1, 2560, intermediate_size=15360), 2.7, 2.7),
    "chatglm3-6b": (CHATGLM | {"padded_vocab_size": 65024, "ffn_hidden_size": 13696}, 6.24, 6.24),
    "qwen1.5-moe-a2.7b": (sized("qwen2_moe", 24, 16, 16, 2048), 14.3, 2.7),
}  # fmt: skip
COUNTED_EXACTLY = ("llama-4-maverick", "llama-4-maverick, listed", "llama-4-scout", "qwen1.5-moe-a2.7b")
"""Those of a family with a counter."""

BUILT = {
    # What transformers 5.24 builds of them.
    "bamba": (
        sized("bamba", 32, 32, 8, 4096, attn_layer_indices=[9, 18, 27], intermediate_size=14336, vocab_size=128000),
        9_808_584_064,
    ),
    "granitemoehybrid": (sized("granitemoehybrid", 40, 32, 32, 4096, layer_types=GRANITE * 4), 48_040_881_664),
    "granitemoehybrid, dense": (
        sized("granitemoehybrid", 40, 32, 32, 4096, layer_types=GRANITE * 4, num_local_experts=0,
              shared_intermediate_size=8192), 8_277_569_024,
    ),
    "lfm2": (sized("lfm2", 16, 32, 8, 2048, layer_types=LFM), 1_170_340_608),
    "lfm2_moe": (
        sized("lfm2_moe", 32, 32, 8, 2048, layer_types=["conv", "full_attention"] * 16), 11_230_351_360
    ),
    "jamba": (sized("jamba", 32, 32, 8, 4096, expert_layer_period=3, expert_layer_offset=2), 35_715_460_992),
    "ernie4_5_moe": (
        sized("ernie4_5_moe", 28, 20, 4, 2560, intermediate_size=12288, vocab_size=103424, moe_num_experts=64, moe_k=6,
              moe_num_shared_experts=2, moe_intermediate_size=1536, moe_layer_interval=2, moe_layer_start_index=3,
              moe_layer_end_index=20, **UNTIED), 9_771_727_936,
    ),
}  # fmt: skip

QWEN3_MOE = CONFIGS["qwen3-30b-a3b"]
DENSE_LAYERS = {
    # Layers without experts, of 48; in each an MLP of 6144 stands where 128 experts of 768 and a router were.
    "every second": (QWEN3_MOE | {"decoder_sparse_step": 2}, 24),
    "by name": (QWEN3_MOE | {"mlp_only_layers": [0, 5]}, 2),
    "both": (QWEN3_MOE | {"decoder_sparse_step": 2, "mlp_only_layers": [1, 2]}, 25),
}

WRITTEN = [
    # More of what published files say, none of which is about the cache.
    sized("qwen2_vl", 28, 28, 4, 3584, use_sliding_window=False, sliding_window=32768, max_window_layers=28,
          vision_config={"depth": 32}),
    sized("cohere2", 32, 32, 8, 4096, sliding_window=4096, sliding_window_pattern=4, layer_switch=4,
          order_of_interleaved_layers="local_attn_first", use_parallel_block=True, logit_scale=0.25),
    sized("minimax_m2", 62, 48, 8, 3072, attn_type_list=[1] * 62, num_mtp_modules=3, mtp_transformer_layers=1,
          layernorm_full_attention_beta=1.0, qk_norm_type="per_layer", num_local_experts=8, num_experts_per_tok=2),
    sized("falcon_h1", 66, 32, 4, 5120, mamba_d_ssm=None, mamba_use_mlp=True, key_multiplier=0.1,
          attn_layer_indices=None),
    sized("zamba2", 4, 32, 32, 2560, hybrid_layer_ids=[1, 3], kv_channels=80, num_query_groups=32, mamba_headdim=64,
          use_shared_mlp_adapter=True, attention_head_dim=160, state_size=64),
    sized("glm4_moe", 46, 96, 8, 4096, num_nextn_predict_layers=1, n_group=1, topk_group=1, use_qk_norm=False,
          num_experts_per_tok=8, n_routed_experts=16, moe_intermediate_size=8),
    sized("exaone4", 4, 8, 2, 512, sliding_window=None, sliding_window_pattern=None,
          layer_types=["full_attention"] * 4),
    sized("gemma2", 4, 8, 2, 512, sliding_window=4096, sliding_window_size=4096),
    sized("cohere2", 32, 32, 8, 4096, sliding_window=4096, sliding_window_pattern=4, _sliding_window_pattern=4,
          use_embedding_sharing=True),
    sized("phi3", 32, 24, 8, 3072, sliding_window=262144, full_attn_mod=1, interpolate_factor=1),
    sized("qwen2_vl_text", 4, 28, 4, 3584, use_sliding_window=False, sliding_window=None),
    sized("llama", 4, 8, 2, 512, is_llama_config=True, rope_interleaved=False, head_dim=64, mlp_bias=False),
]  # fmt: skip

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
FP8_GROUPS = {"group_0": {"weights": {"num_bits": 8, "type": "float"}, "targets": ["Linear"]}}
STORED = {
    "mxfp4": ({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, "mxfp4"),
    "awq": (AWQ, "int4"),
    "gptq of 3 bits": ({"quant_method": "gptq", "bits": 3}, "int3"),
    "gptq of 8 bits": ({"quant_method": "gptq", "bits": 8}, "int8"),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "float8_e4m3fn"),
    "bitsandbytes, 4": ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}, "int4"),
    "bitsandbytes, 8": ({"load_in_8bit": True, "load_in_4bit": False}, "int8"),
    "compressed-tensors": ({"quant_method": "compressed-tensors", "config_groups": FP8_GROUPS}, "float8_e4m3fn"),
    "another": ({"quant_method": "quip"}, None),
    "another number of bits": ({"quant_method": "gptq", "bits": 5}, None),
}
"""quantization_config, and the type of the weights."""
