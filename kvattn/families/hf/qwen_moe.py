"""Qwen 1.5, 2 and 3 with experts; the older ones have one more that serves every token, behind a gate."""

from collections.abc import Iterator

from kvattn.families import experts, moe, params, rules
from kvattn.families.config import DecoderConfig
from kvattn.families.defaults import usual
from kvattn.families.family import Experts, Family, Sizes
from kvattn.families.fields import Fields
from kvattn.families.hf import llama
from kvattn.families.kinds import FULL, WINDOW, Kind
from kvattn.families.registry import register
from kvattn.families.settings import Settings, Value


def _qwen2_layers(f: Settings, num_layers: int) -> list[Kind]:
    first = f.size("max_window_layers", least=0) if f.flag("use_sliding_window") else 0
    return [WINDOW if i < first and i % 2 == 0 else FULL for i in range(num_layers)]


def _qwen3_layers(f: Settings, num_layers: int) -> list[Kind]:
    used = f.flag("use_sliding_window") and f.get("sliding_window")
    return [WINDOW if used else FULL] * num_layers


def _qwen2(fields: Fields) -> rules.Blueprint:
    num_layers = fields.layers("num_hidden_layers")
    fields.size("max_window_layers", least=0)  # checked, even where there is no window
    shared = fields.size("shared_expert_intermediate_size")
    return _blueprint(
        fields,
        windows=fields.windows(_qwen2_layers(fields, num_layers), used=fields.flag("use_sliding_window")),
        qkv_bias=fields.flag("qkv_bias"),
        shared_expert_dim=shared,
        shared_expert_gate=True,
    )


def _qwen3(fields: Fields) -> rules.Blueprint:
    num_layers, bias = fields.layers("num_hidden_layers"), fields.flag("attention_bias")
    fields.passed("max_window_layers")  # a note: nothing goes by it
    windows = fields.windows(_qwen3_layers(fields, num_layers), used=fields.flag("use_sliding_window"))
    return _blueprint(fields, windows=windows, qk_norm=True, qkv_bias=bias, out_bias=bias)


def _blueprint(fields: Fields, **rest: Value) -> rules.Blueprint:
    sizes = llama.sizes(fields)
    step = fields.size("decoder_sparse_step")
    plain = experts.layer_numbers("mlp_only_layers", fields.get("mlp_only_layers") or [])
    sparse = tuple((i + 1) % step == 0 and i not in plain for i in range(sizes["num_layers"]))
    if not any(sparse):
        raise fields.unsupported("decoder_sparse_step", step, "one that leaves, with mlp_only_layers, some experts")
    config = DecoderConfig(
        **sizes,
        **fields.rope(),
        activation=fields.activation("hidden_act"),
        num_experts=fields.size("num_experts"),
        experts_per_token=fields.size("num_experts_per_tok"),
        expert_kind="gated",
        expert_shares="chosen" if fields.flag("norm_topk_prob") else "all",
        expert_dim=fields.size("moe_intermediate_size"),
        expert_layers=None if all(sparse) else sparse,
        tie_embeddings=fields.flag("tie_word_embeddings"),
        **rest,
    )

    def routed(theirs: str, ours: str) -> Iterator[rules.Rule]:
        yield from moe.routed(theirs, ours, config, ("gate_proj", "up_proj", "down_proj"))
        if config.shared_expert_dim is not None:
            yield from moe.dense(f"{theirs}.shared_expert", f"{ours}.shared", config, config.shared_expert_dim)
            gate = f"{theirs}.shared_expert_gate", f"{ours}.shared_gate"
            yield from rules.linear(*gate, (config.model_dim,), (1,), False)

    block = {
        "attention_norm": "input_layernorm",
        **llama.ATTENTION,
        **(llama.QK_NORMS if config.qk_norm else {}),
        "mlp_norm": "post_attention_layernorm",
        "mlp": moe.where_there_are(config, "mlp", routed),
    }
    return rules.blueprint(config, llama.PARTS, block, buffers=llama.BUFFERS)


def _shared(f: Sizes) -> int:
    """The expert that serves every token, and its gate."""
    return f.size("model_dim") * (3 * f.size("shared_expert_intermediate_size") + 1)


_EXPERTS = {
    "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": False, "use_sliding_window": False,
    "sliding_window": 4096,
}  # fmt: skip
_MAY_BE_NULL = frozenset({"mlp_only_layers", "num_key_value_heads"})
QWEN2_MOE = Family(
    model_type="qwen2_moe",
    defaults=llama.DEFAULTS
    | usual(vocab=151936, dim=2048, mlp=5632, layers=24, heads=16, kv_heads=16, length=32768) | _EXPERTS | {
        "max_window_layers": 28, "layer_types": None, "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632, "num_experts_per_tok": 4, "num_experts": 60, "qkv_bias": True,
    },
    nullable=_MAY_BE_NULL,
    blueprint=_qwen2,
    layers=_qwen2_layers,
    params=lambda f: params.gated(f, qkv_bias=f.flag("qkv_bias")),
    experts=Experts(shared=_shared),
)  # fmt: skip
QWEN3_MOE = Family(
    model_type="qwen3_moe",
    defaults=llama.DEFAULTS
    | usual(vocab=151936, dim=2048, mlp=6144, layers=24, heads=32, kv_heads=4, length=32768) | _EXPERTS | {
        "max_window_layers": None, "layer_types": None, "attention_bias": False, "moe_intermediate_size": 768,
        "num_experts_per_tok": 8, "num_experts": 128,
    },
    aliases={"num_experts": ("num_local_experts",)},
    nullable=_MAY_BE_NULL,
    blueprint=_qwen3,
    layers=_qwen3_layers,
    params=lambda f: params.gated(f, qk_norms=True),
)  # fmt: skip
register(QWEN2_MOE, QWEN3_MOE)
