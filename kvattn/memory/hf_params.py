"""Parameters of the decoders that HuggingFace's ``transformers`` builds from a config, counted family by family.

Each counter takes the settings (`Fields`) and returns all parameters; tied embeddings count once. `estimate` takes any
family: projections, MLPs, experts and embeddings, without norms and biases.
"""

from collections.abc import Callable, Mapping

from kvattn.errors import ConfigError
from kvattn.memory.hf_experts import expert_params, shared_params, sparse_layers
from kvattn.memory.hf_fields import Fields
from kvattn.memory.hf_layers import NONE, kinds_of, nemotron_blocks
from kvattn.memory.hf_mixers import mixer_params


def _attention(f: Fields, *, qkv_bias: bool = False, out_bias: bool = False) -> int:
    """Projections of one layer."""
    d, wide, narrow = f.size("model_dim"), f.size("heads") * f.head_dim, f.kv_heads * f.head_dim
    biases = (wide + 2 * narrow) * qkv_bias + d * out_bias
    return d * (wide + 2 * narrow) + wide * d + biases


def embeddings(f: Fields, tied: bool = False) -> int:
    """The table of tokens, and the output projection where that is another."""
    copies = 1 if f.get("tie_word_embeddings", tied) else 2
    return copies * f.size("vocab") * f.size("model_dim")


def _gated(
    f: Fields,
    *,
    norms: int = 2,
    qk_norms: bool = False,
    tied: bool = False,
    qkv_bias: bool = False,
) -> int:
    """Llama and its relatives: RMS norms, three matrices in the MLP or in every expert."""
    d, layers = f.size("model_dim"), f.num_layers
    bias = bool(f.get("attention_bias", False))
    mlp = 3 * d * f.size("mlp_dim")
    if f.get("mlp_bias", False):
        mlp += 2 * f.size("mlp_dim") + d
    sparse = sparse_layers(f)
    mlps = (layers - sparse) * mlp + sparse * f.num_experts * (expert_params(f) + d)
    layer = _attention(f, qkv_bias=bias or qkv_bias, out_bias=bias) + norms * d + 2 * f.head_dim * qk_norms
    return embeddings(f, tied) + layers * layer + mlps + d


def _gpt_oss(f: Fields) -> int:
    d, hidden, experts = f.size("model_dim"), f.size("mlp_dim"), f.size("experts")
    mlp = experts * (d * 2 * hidden + 2 * hidden + hidden * d + d) + d * experts + experts
    attention = _attention(f, qkv_bias=True, out_bias=True) + f.size("heads")  # a sink per head
    return embeddings(f, False) + f.num_layers * (attention + mlp + 2 * d) + d


def _falcon(f: Fields) -> int:
    d, bias, new = f.size("model_dim"), bool(f.get("bias", False)), bool(f.get("new_decoder_architecture", False))
    hidden = f.size("mlp_dim", 4 * d)
    if new:
        norms = 2 if f.get("num_ln_in_parallel_attn", 2) == 2 else 1
    else:
        norms = 1 if f.get("parallel_attn", True) else 2
    layer = _attention(f, qkv_bias=bias, out_bias=bias) + 2 * d * hidden + (hidden + d) * bias + norms * 2 * d
    return embeddings(f, True) + f.num_layers * layer + 2 * d


def _opt(f: Fields) -> int:
    d, hidden = f.size("model_dim"), f.size("mlp_dim")
    narrow = f.size("word_embed_proj_dim", d)
    biased, affine = bool(f.get("enable_bias", True)), bool(f.get("layer_norm_elementwise_affine", True))
    layer = _attention(f, qkv_bias=biased, out_bias=biased) + 2 * d * hidden + (hidden + d) * biased + 4 * d * affine
    last = f.get("do_layer_norm_before", True) and not f.get("_remove_final_layer_norm", False)
    copies = 1 if f.get("tie_word_embeddings", True) else 2
    embeddings = copies * f.size("vocab") * narrow + (f.size("positions") + 2) * d
    projections = 2 * narrow * d if narrow != d else 0
    return embeddings + projections + f.num_layers * layer + (2 * d * affine if last else 0)


def _mpt(f: Fields) -> int:
    d = f.size("model_dim")
    if not f.get("no_bias", True):
        raise ConfigError("mpt with biases: give num_params yourself.")
    return embeddings(f, True) + f.num_layers * (_attention(f) + 8 * d * d + 2 * d) + d


def _bloom(f: Fields) -> int:
    d = f.size("model_dim")
    layer = _attention(f, qkv_bias=True, out_bias=True) + 8 * d * d + 5 * d + 4 * d
    return embeddings(f, True) + 2 * d + f.num_layers * layer + 2 * d


def _gpt2(f: Fields) -> int:
    d, hidden = f.size("model_dim"), f.size("mlp_dim", 4 * f.size("model_dim"))
    layer = _attention(f, qkv_bias=True, out_bias=True) + 2 * d * hidden + hidden + d + 4 * d
    return embeddings(f, True) + f.size("positions") * d + f.num_layers * layer + 2 * d


def _gpt_neox(f: Fields) -> int:
    d, hidden, bias = f.size("model_dim"), f.size("mlp_dim"), bool(f.get("attention_bias", True))
    layer = _attention(f, qkv_bias=bias, out_bias=bias) + 2 * d * hidden + hidden + d + 4 * d
    return embeddings(f, False) + f.num_layers * layer + 2 * d


COUNTERS: Mapping[str, Callable[[Fields], int]] = {
    "llama": _gated,
    "mistral": _gated,
    "mixtral": _gated,
    "qwen2": lambda f: _gated(f, qkv_bias=True),
    "qwen3": lambda f: _gated(f, qk_norms=True),
    "qwen3_moe": lambda f: _gated(f, qk_norms=True),
    "gemma": lambda f: _gated(f, tied=True),
    "gemma2": lambda f: _gated(f, tied=True, norms=4),
    "gemma3_text": lambda f: _gated(f, tied=True, norms=4, qk_norms=True),
    "phi3": _gated,
    "gpt_oss": _gpt_oss,
    "falcon": _falcon,
    "opt": _opt,
    "mpt": _mpt,
    "bloom": _bloom,
    "gpt2": _gpt2,
    "gpt_bigcode": _gpt2,
    "gpt_neox": _gpt_neox,
}
"""By ``model_type``."""


_TWO_MATRICES = (
    "apertus", "arcee", "bert", "bert-generation", "biogpt", "camembert", "codegen", "ernie", "gpt_neo",
    "gpt_neox_japanese", "gptj", "jais2", "nanochat", "nemotron", "openai-gpt", "persimmon", "phi", "roberta",
    "nemotron_h", "starcoder2", "xglm", "xlm-roberta",
)  # fmt: skip
"""Families whose MLP is two matrices, where Llama's are three."""


def estimate(f: Fields) -> int:
    """Parameters of a family that has no counter.

    Within 1 % of what transformers builds from the defaults of 40 families of dense decoders, within 3 % of 20 with
    experts; further off for JetMoE, whose attention has experts too. Embeddings count twice unless the family or the
    config ties them.

    Raises:
        ConfigError: sizes that are missing; layers that this does not fit.
    """
    if f.get("hidden_size_per_layer_input"):
        raise ConfigError("embeddings in every layer cannot be counted: give num_params.")
    if f.kind == "zamba2":
        raise ConfigError("layers that share their weights cannot be counted: give num_params.")
    d, kinds = f.size("model_dim"), kinds_of(f)
    attending = sum(kind != NONE for kind in kinds)
    attention = _attention(f) + (d * f.size("heads") * f.head_dim if f.kind in _GATED else 0)
    total = embeddings(f, tied=_is_first_chatglm(f)) + attending * attention + len(kinds) * 2 * d + d
    mlps, sparse = _mlp_layers(f, len(kinds)), sparse_layers(f)
    mixers = {"falcon_h1": len(kinds), "nemotron_h": len(kinds) - mlps - attending}.get(f.kind, len(kinds) - attending)
    if mixers:
        total += mixers * mixer_params(f)
    if dense := mlps - sparse:
        total += dense * _mlp(f)
    return total + sparse * (f.num_experts * (expert_params(f) + d) + shared_params(f)) if sparse else total


_GATED = ("qwen3_5_moe_text", "qwen3_5_text", "qwen3_next")
"""Families whose attention has a gate as wide as its queries."""


def _is_first_chatglm(f: Fields) -> bool:
    """Whether it is ChatGLM-6B, which has no gate and one table for both ends, where the later ones have two."""
    return f.kind == "chatglm" and f.get("inner_hidden_size") is not None


def _mlp_layers(f: Fields, num_layers: int) -> int:
    """Layers with an MLP, of one expert or many: all, but where MLPs are layers of their own."""
    if f.kind != "nemotron_h":
        return num_layers
    return sum(block in ("mlp", "moe") for block in nemotron_blocks(f))


def _mlp(f: Fields) -> int:
    """A dense MLP, without biases."""
    two = f.kind in _TWO_MATRICES or _is_first_chatglm(f)
    d, matrices = f.size("model_dim"), 2 if two else 3
    hidden = f.size("mlp_dim", 4 * d if not f.num_experts else None)
    if f.kind == "llama4_text":
        hidden = f.size("intermediate_size_mlp")
    if f.kind in ("qwen", "recurrent_gemma"):  # the size of gate and up together
        hidden //= 2
    if f.kind == "lfm2" and f.get("block_auto_adjust_ff_dim"):
        hidden = int(2 * hidden / 3 * f.get("block_ffn_dim_multiplier", 1.0))
        unit = f.size("block_multiple_of")
        hidden = -(-hidden // unit) * unit
    if f.kind == "granitemoehybrid":
        hidden = f.size("shared_intermediate_size")
    return matrices * d * hidden
