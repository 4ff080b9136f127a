"""Models by name: those of the tables that KV-cache articles are written about, and today's.

Sizes are those of the published configurations; parameters are exact where weights are published (tied embeddings
once, the text part of models that also see), and as in the paper for PaLM.
"""

from collections.abc import Sequence
from typing import Any

from kvattn.families.kinds import WINDOW, every, shared_from
from kvattn.memory.specs import ModelSpec, Table, Window

type _Row = tuple[str, int, int, int, int, int, int, int, str, *tuple[Window, ...]]
"""Name, layers, N, K, H, D, parameters, trained length, source (a repository of huggingface.co), window if any."""


def _every(period: int, layers: int, window: int) -> tuple[int | None, ...]:
    """A window in all layers but each `period`-th."""
    return tuple(window if kind == WINDOW else None for kind in every(period, layers, WINDOW))


_PALM = "Chowdhery et al., arXiv:2204.02311, table 1"
_ROWS: tuple[_Row, ...] = (
    # Multi-head attention.
    ("llama-2-7b", 32, 32, 32, 128, 4096, 6_738_415_616, 4096, "meta-llama/Llama-2-7b-hf"),
    ("llama-2-13b", 40, 40, 40, 128, 5120, 13_015_864_320, 4096, "meta-llama/Llama-2-13b-hf"),
    ("opt-125m", 12, 12, 12, 64, 768, 125_239_296, 2048, "facebook/opt-125m"),
    ("opt-1.3b", 24, 32, 32, 64, 2048, 1_315_758_080, 2048, "facebook/opt-1.3b"),
    ("opt-2.7b", 32, 32, 32, 80, 2560, 2_651_596_800, 2048, "facebook/opt-2.7b"),
    ("opt-6.7b", 32, 32, 32, 128, 4096, 6_658_473_984, 2048, "facebook/opt-6.7b"),
    ("opt-13b", 40, 40, 40, 128, 5120, 12_853_473_280, 2048, "facebook/opt-13b"),
    ("opt-30b", 48, 56, 56, 128, 7168, 29_974_540_288, 2048, "facebook/opt-30b"),
    ("opt-66b", 64, 72, 72, 128, 9216, 65_719_701_504, 2048, "facebook/opt-66b"),
    ("opt-175b", 96, 96, 96, 128, 12288, 174_604_468_224, 2048, "Zhang et al., arXiv:2205.01068, table 1"),
    ("mpt-7b", 32, 32, 32, 128, 4096, 6_649_286_656, 2048, "mosaicml/mpt-7b"),
    ("mpt-30b", 48, 64, 64, 112, 7168, 29_957_200_896, 8192, "mosaicml/mpt-30b"),
    ("bloom-176b", 70, 112, 112, 128, 14336, 176_247_271_424, 2048, "bigscience/bloom"),
    ("gpt2", 12, 12, 12, 64, 768, 124_439_808, 1024, "openai-community/gpt2"),
    ("gpt2-xl", 48, 25, 25, 64, 1600, 1_557_611_200, 1024, "openai-community/gpt2-xl"),
    ("pythia-6.9b", 32, 32, 32, 128, 4096, 6_857_302_016, 2048, "EleutherAI/pythia-6.9b"),
    ("pythia-1.4b", 24, 16, 16, 128, 2048, 1_414_647_808, 2048, "EleutherAI/pythia-1.4b"),
    ("gpt-neox-20b", 44, 64, 64, 96, 6144, 20_554_567_680, 2048, "EleutherAI/gpt-neox-20b"),
    ("gemma-7b", 28, 16, 16, 256, 3072, 8_537_680_896, 8192, "google/gemma-7b"),
    ("stablelm-3b", 32, 32, 32, 80, 2560, 2_795_443_200, 4096, "stabilityai/stablelm-3b-4e1t"),
    ("stablelm-2-1.6b", 24, 32, 32, 64, 2048, 1_644_515_328, 4096, "stabilityai/stablelm-2-1_6b"),
    ("olmo-2-7b", 32, 32, 32, 128, 4096, 7_298_617_344, 4096, "allenai/OLMo-2-1124-7B"),
    ("olmo-2-13b", 40, 40, 40, 128, 5120, 13_716_198_400, 4096, "allenai/OLMo-2-1124-13B"),
    # Multi-query and grouped-query attention.
    ("palm-8b", 32, 16, 1, 256, 4096, 8_630_000_000, 2048, _PALM),
    ("palm-62b", 64, 32, 1, 256, 8192, 62_500_000_000, 2048, _PALM),
    ("palm-540b", 118, 48, 1, 256, 18432, 540_350_000_000, 2048, _PALM),
    ("falcon-7b", 32, 71, 1, 64, 4544, 6_921_720_704, 2048, "tiiuae/falcon-7b"),
    ("falcon-40b", 60, 128, 8, 64, 8192, 41_303_293_952, 2048, "tiiuae/falcon-40b"),
    ("falcon-180b", 80, 232, 8, 64, 14848, 178_557_088_768, 2048, "tiiuae/falcon-180B"),
    ("starcoder", 40, 48, 1, 128, 6144, 15_517_456_384, 8192, "bigcode/starcoder"),
    ("llama-2-70b", 80, 64, 8, 128, 8192, 68_976_648_192, 4096, "meta-llama/Llama-2-70b-hf"),
    ("llama-3-8b", 32, 32, 8, 128, 4096, 8_030_261_248, 8192, "meta-llama/Meta-Llama-3-8B"),
    ("llama-3-70b", 80, 64, 8, 128, 8192, 70_553_706_496, 8192, "meta-llama/Meta-Llama-3-70B"),
    ("llama-3.1-8b", 32, 32, 8, 128, 4096, 8_030_261_248, 131072, "meta-llama/Llama-3.1-8B"),
    ("llama-3.1-70b", 80, 64, 8, 128, 8192, 70_553_706_496, 131072, "meta-llama/Llama-3.1-70B"),
    ("llama-3.1-405b", 126, 128, 8, 128, 16384, 405_853_388_800, 131072, "meta-llama/Llama-3.1-405B"),
    ("llama-3.2-1b", 16, 32, 8, 64, 2048, 1_235_814_400, 131072, "meta-llama/Llama-3.2-1B"),
    ("llama-3.2-3b", 28, 24, 8, 128, 3072, 3_212_749_824, 131072, "meta-llama/Llama-3.2-3B"),
    ("qwen2.5-0.5b", 24, 14, 2, 64, 896, 494_032_768, 32768, "Qwen/Qwen2.5-0.5B"),
    ("qwen2.5-1.5b", 28, 12, 2, 128, 1536, 1_543_714_304, 131072, "Qwen/Qwen2.5-1.5B"),
    ("qwen2.5-3b", 36, 16, 2, 128, 2048, 3_085_938_688, 32768, "Qwen/Qwen2.5-3B"),
    ("qwen2.5-7b", 28, 28, 4, 128, 3584, 7_615_616_512, 131072, "Qwen/Qwen2.5-7B"),
    ("qwen2.5-14b", 48, 40, 8, 128, 5120, 14_770_033_664, 131072, "Qwen/Qwen2.5-14B"),
    ("qwen2.5-32b", 64, 40, 8, 128, 5120, 32_763_876_352, 131072, "Qwen/Qwen2.5-32B"),
    ("qwen2.5-72b", 80, 64, 8, 128, 8192, 72_706_203_648, 131072, "Qwen/Qwen2.5-72B"),
    ("qwen3-0.6b", 28, 16, 8, 128, 1024, 596_049_920, 40960, "Qwen/Qwen3-0.6B"),
    ("qwen3-1.7b", 28, 16, 8, 128, 2048, 1_720_574_976, 40960, "Qwen/Qwen3-1.7B"),
    ("qwen3-4b", 36, 32, 8, 128, 2560, 4_022_468_096, 40960, "Qwen/Qwen3-4B"),
    ("qwen3-8b", 36, 32, 8, 128, 4096, 8_190_735_360, 40960, "Qwen/Qwen3-8B"),
    ("qwen3-14b", 40, 40, 8, 128, 5120, 14_768_307_200, 40960, "Qwen/Qwen3-14B"),
    ("qwen3-32b", 64, 64, 8, 128, 5120, 32_762_123_264, 40960, "Qwen/Qwen3-32B"),
    ("gemma-2b", 18, 8, 1, 256, 2048, 2_506_172_416, 8192, "google/gemma-2b"),
    (
        "phi-3-medium-128k", 40, 40, 10, 128, 5120, 13_960_238_080, 131072,
        "microsoft/Phi-3-medium-128k-instruct", 131072,
    ),
    ("phi-4", 40, 40, 10, 128, 5120, 14_659_507_200, 16384, "microsoft/phi-4"),
    ("phi-4-mini", 32, 24, 8, 128, 3072, 3_836_021_760, 131072, "microsoft/Phi-4-mini-instruct", 262144),
    ("granite-3.0-8b", 40, 32, 8, 128, 4096, 8_170_848_256, 4096, "ibm-granite/granite-3.0-8b-base"),
    ("smollm3-3b", 36, 16, 4, 128, 2048, 3_075_098_624, 65536, "HuggingFaceTB/SmolLM3-3B"),
    ("stablelm-2-12b", 40, 32, 8, 160, 5120, 12_143_185_920, 4096, "stabilityai/stablelm-2-12b"),
    ("glm-4-9b", 40, 32, 2, 128, 4096, 9_400_279_040, 32768, "zai-org/GLM-4-9B-0414"),
    ("glm-4-32b", 61, 48, 2, 128, 6144, 32_566_081_536, 32768, "zai-org/GLM-4-32B-0414"),
    ("mistral-small-3.1", 40, 32, 8, 128, 5120, 23_572_403_200, 131072, "mistralai/Mistral-Small-3.1-24B-Base-2503"),
    # Windows.
    ("mistral-7b-v0.1", 32, 32, 8, 128, 4096, 7_241_732_096, 32768, "mistralai/Mistral-7B-v0.1", 4096),
    ("mistral-7b-v0.3", 32, 32, 8, 128, 4096, 7_248_023_552, 32768, "mistralai/Mistral-7B-v0.3"),
    ("mistral-nemo-12b", 40, 32, 8, 128, 5120, 12_247_782_400, 131072, "mistralai/Mistral-Nemo-Base-2407"),
    ("gemma-2-2b", 26, 8, 4, 256, 2304, 2_614_341_888, 8192, "google/gemma-2-2b", _every(2, 26, 4096)),
    ("gemma-2-9b", 42, 16, 8, 256, 3584, 9_241_705_984, 8192, "google/gemma-2-9b", _every(2, 42, 4096)),
    ("gemma-2-27b", 46, 32, 16, 128, 4608, 27_227_128_320, 8192, "google/gemma-2-27b", _every(2, 46, 4096)),
    ("gemma-3-1b", 26, 4, 1, 256, 1152, 999_885_952, 32768, "google/gemma-3-1b-pt", _every(6, 26, 512)),
    ("gemma-3-4b", 34, 8, 4, 256, 2560, 3_880_263_168, 131072, "google/gemma-3-4b-pt", _every(6, 34, 1024)),
    ("gemma-3-12b", 48, 16, 8, 256, 3840, 11_766_034_176, 131072, "google/gemma-3-12b-pt", _every(6, 48, 1024)),
    ("gemma-3-27b", 62, 32, 16, 128, 5376, 27_009_346_304, 131072, "google/gemma-3-27b-pt", _every(6, 62, 1024)),
    ("phi-3-mini-4k", 32, 32, 32, 96, 3072, 3_821_079_552, 4096, "microsoft/Phi-3-mini-4k-instruct", 2047),
    ("phi-3-mini-128k", 32, 32, 32, 96, 3072, 3_821_079_552, 131072, "microsoft/Phi-3-mini-128k-instruct", 262144),
    ("starcoder2-3b", 30, 24, 2, 128, 3072, 3_030_371_328, 16384, "bigcode/starcoder2-3b", 4096),
    ("starcoder2-7b", 32, 36, 4, 128, 4608, 7_173_923_840, 16384, "bigcode/starcoder2-7b", 4096),
    ("starcoder2-15b", 40, 48, 4, 128, 6144, 15_957_889_024, 16384, "bigcode/starcoder2-15b", 4096),
    (
        "command-r7b", 32, 32, 8, 128, 4096, 8_028_033_024, 8192,
        "CohereLabs/c4ai-command-r7b-12-2024", _every(4, 32, 4096),
    ),
    (
        "command-a", 64, 96, 8, 128, 12288, 111_057_580_032, 131072,
        "CohereLabs/c4ai-command-a-03-2025", _every(4, 64, 4096),
    ),
    # Experts.
    ("mixtral-8x7b", 32, 32, 8, 128, 4096, 46_702_792_704, 32768, "mistralai/Mixtral-8x7B-v0.1"),
    ("mixtral-8x22b", 56, 48, 8, 128, 6144, 140_630_071_296, 65536, "mistralai/Mixtral-8x22B-v0.1"),
    ("qwen3-30b-a3b", 48, 32, 4, 128, 2048, 30_532_122_624, 40960, "Qwen/Qwen3-30B-A3B"),
    ("qwen3-235b-a22b", 94, 64, 4, 128, 4096, 235_093_634_560, 40960, "Qwen/Qwen3-235B-A22B"),
    ("qwen1.5-moe-a2.7b", 24, 16, 16, 128, 2048, 14_315_784_192, 8192, "Qwen/Qwen1.5-MoE-A2.7B"),
    ("qwen2-57b-a14b", 28, 28, 4, 128, 3584, 57_408_658_944, 131072, "Qwen/Qwen2-57B-A14B"),
    ("gpt-oss-20b", 24, 64, 8, 64, 2880, 20_914_757_184, 131072, "openai/gpt-oss-20b", _every(2, 24, 128)),
    ("gpt-oss-120b", 36, 64, 8, 64, 2880, 116_829_156_672, 131072, "openai/gpt-oss-120b", _every(2, 36, 128)),
    # Latent attention: one key for all heads, whose first numbers are its value.
    ("gemma-4-e2b", 35, 8, 1, 256, 1536, 4_628_569_344, 131072, "google/gemma-4-E2B", _every(5, 35, 512)),
    ("gemma-4-31b", 60, 32, 16, 256, 5376, 30_697_345_280, 262144, "google/gemma-4-31B", _every(6, 60, 1024)),
    (
        "llama-4-scout", 48, 40, 8, 128, 5120, 107_769_861_120, 10485760, "meta-llama/Llama-4-Scout-17B-16E",
        _every(4, 48, 8192),
    ),
    (
        "llama-4-maverick", 48, 40, 8, 128, 5120, 400_711_848_960, 1048576, "meta-llama/Llama-4-Maverick-17B-128E",
        _every(4, 48, 8192),
    ),
    ("minicpm3-4b", 62, 40, 1, 288, 2560, 4_073_875_968, 32768, "openbmb/MiniCPM3-4B"),
    ("deepseek-v2-lite", 27, 16, 1, 576, 2048, 15_706_484_224, 163840, "deepseek-ai/DeepSeek-V2-Lite"),
    ("deepseek-v2", 60, 128, 1, 576, 5120, 235_741_434_880, 163840, "deepseek-ai/DeepSeek-V2"),
    ("deepseek-v3", 61, 128, 1, 576, 7168, 671_026_419_200, 163840, "deepseek-ai/DeepSeek-V3"),
    ("moonlight-16b-a3b", 27, 16, 1, 576, 2048, 15_960_110_208, 8192, "moonshotai/Moonlight-16B-A3B"),
    ("kimi-k2", 61, 64, 1, 576, 7168, 1_026_408_232_448, 131072, "moonshotai/Kimi-K2-Instruct"),
)  # fmt: skip

_EXPERTS = {
    "mixtral-8x7b": (8, 2, 12_879_925_248, 45_097_156_608),
    "mixtral-8x22b": (8, 2, 39_161_468_928, 135_291_469_824),
    "qwen3-30b-a3b": (128, 8, 3_353_032_704, 28_991_029_248),
    "qwen3-235b-a22b": (128, 8, 22_190_763_520, 227_096_395_776),
    "llama-4-scout": (16, 1, 17_172_894_720, 96_636_764_160),
    "llama-4-maverick": (128, 1, 17_184_691_200, 386_547_056_640),
    "gpt-oss-20b": (32, 4, 4_187_440_704, 19_110_297_600),
    "gpt-oss-120b": (128, 4, 5_711_982_912, 114_661_785_600),
    "qwen1.5-moe-a2.7b": (60, 4, 2_689_173_504, 12_457_082_880),
    "qwen2-57b-a14b": (64, 8, 14_249_270_784, 49_325_015_040),
    "deepseek-v2-lite": (64, 6, 2_661_150_208, 14_394_851_328),
    "deepseek-v2": (160, 6, 21_375_800_320, 222_717_542_400),
    "deepseek-v3": (256, 8, 37_552_297_472, 653_908_770_816),
    "moonlight-16b-a3b": (64, 6, 2_914_776_192, 14_394_851_328),
    "kimi-k2": (384, 8, 32_861_500_928, 1_014_686_023_680),
}
"""Experts of a layer, how many of them a token goes to, parameters one token is multiplied with, numbers in the
matrices of all experts."""

_LATENT = {
    "deepseek-v2-lite": 512,
    "deepseek-v2": 512,
    "deepseek-v3": 512,
    "moonlight-16b-a3b": 512,
    "kimi-k2": 512,
    "minicpm3-4b": 256,
}
"""Of a key, how many numbers are its value."""

_GLOBAL_HEADS = {"gemma-4-e2b": (1, 512), "gemma-4-31b": (4, 512)}
"""K and H of layers without a window, where they differ."""

_SHARING = {"gemma-4-e2b": 20}
"""How many of the last layers attend to keys and values of the last earlier layer of their kind."""


def _model(row: _Row) -> ModelSpec:
    name, layers, heads, kv_heads, head_dim, model_dim, num_params, max_length, source, *window = row
    num_experts, experts_per_token, num_active_params, num_expert_weights = _EXPERTS.get(name, (None,) * 4)
    return ModelSpec(
        name=name,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        model_dim=model_dim,
        num_params=num_params,
        max_length=max_length,
        window=window[0] if window else None,
        source=source if "arXiv" in source else f"config.json of huggingface.co/{source}",
        num_experts=num_experts,
        experts_per_token=experts_per_token,
        num_active_params=num_active_params,
        num_expert_weights=num_expert_weights,
        value_head_dim=_LATENT.get(name),
        values_in_keys=name in _LATENT,
        **_by_layer(name, (kv_heads, head_dim), window),
    )


def _by_layer(name: str, heads: tuple[int, int], window: Sequence[Window]) -> dict[str, Any]:
    """What differs from layer to layer."""
    found: dict[str, Any] = {}
    for each in window:
        if isinstance(each, tuple) and name in _GLOBAL_HEADS:
            found["layer_heads"] = tuple(_GLOBAL_HEADS[name] if size is None else heads for size in each)
        if isinstance(each, tuple) and name in _SHARING:
            found["kv_source"] = tuple(shared_from(each, _SHARING[name]))
    return found


MODELS = Table(
    "model",
    [_model(row) for row in _ROWS],
    {
        "llama2-7b": "llama-2-7b",
        "llama2-13b": "llama-2-13b",
        "llama2-70b": "llama-2-70b",
        "llama3-8b": "llama-3-8b",
        "llama3-70b": "llama-3-70b",
        "meta-llama-3-8b": "llama-3-8b",
        "meta-llama-3-70b": "llama-3-70b",
        "bloom": "bloom-176b",
        "mistral-7b": "mistral-7b-v0.1",
        "mixtral-8x7b-v0.1": "mixtral-8x7b",
        "mixtral-8x22b-v0.1": "mixtral-8x22b",
        "falcon-180": "falcon-180b",
        "deepseek-r1": "deepseek-v3",
        "llama-3.3-70b": "llama-3.1-70b",
        "phi-3-mini": "phi-3-mini-4k",
        "minicpm3": "minicpm3-4b",
    },
)
"""Models by name."""
