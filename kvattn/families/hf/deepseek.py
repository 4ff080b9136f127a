"""DeepSeek-V2 and V3 (R1, Moonlight, Kimi K2): latent attention, and experts of which some serve every token."""

import dataclasses
from collections.abc import Iterator

from kvattn.families import experts, latent, moe, params, rules
from kvattn.families.config import DecoderConfig
from kvattn.families.defaults import ROPE, usual
from kvattn.families.family import Family, Sizes
from kvattn.families.fields import Fields
from kvattn.families.hf import llama
from kvattn.families.registry import register
from kvattn.families.settings import Value


def _v2(fields: Fields) -> rules.Blueprint:
    fields.only("scoring_func", "softmax")
    fields.passed("norm_topk_prob")  # transformers has the flag and does not go by it
    method = fields.get("topk_method")
    if method not in ("greedy", "group_limited_greedy"):
        raise fields.unsupported("topk_method", method, "'greedy' or 'group_limited_greedy'")
    groups: dict[str, Value] = {"expert_shares": "all"}
    if method == "greedy":
        fields.passed("n_group", "topk_group")
    else:
        groups |= {"expert_groups": fields.size("n_group"), "groups_per_token": fields.size("topk_group")}
    return _blueprint(fields, groups, rope_interleaved=True, mlp_bias=fields.flag("mlp_bias"))


def _v3(fields: Fields) -> rules.Blueprint:
    fields.only("scoring_func", "sigmoid")
    fields.only("topk_method", "noaux_tc")
    router = {
        "expert_scores": "sigmoid",
        "expert_shares": "chosen" if fields.flag("norm_topk_prob") else "all",
        "expert_bias": True,
        "expert_groups": fields.size("n_group"),
        "groups_per_token": fields.size("topk_group"),
        "group_best": 2,
    }
    return _blueprint(fields, router, rope_interleaved=fields.flag("rope_interleave"))


def _blueprint(fields: Fields, router: dict[str, Value], **rest: Value) -> rules.Blueprint:
    sizes, rope = latent.sizes(fields), fields.rope()
    config = DecoderConfig(
        **sizes,
        **rope,
        **_experts(fields, router, sizes["num_layers"]),
        **rest,
        attention_scale=latent.scale(sizes, rope),
        activation=fields.activation("hidden_act"),
        tie_embeddings=fields.flag("tie_word_embeddings"),
    )

    def routed(theirs: str, ours: str) -> Iterator[rules.Rule]:
        yield from moe.routed(theirs, ours, config, ("gate_proj", "up_proj", "down_proj"))
        if config.expert_bias:
            name = f"{theirs}.gate.e_score_correction_bias"
            yield rules.tensor(name, (config.num_experts,), f"{ours}.score_bias", exact=True)
        if config.shared_expert_dim is not None:
            yield from moe.dense(f"{theirs}.shared_experts", f"{ours}.shared", config, config.shared_expert_dim)

    block = {
        "attention_norm": "input_layernorm",
        "attention": latent.attention(config),
        "mlp_norm": "post_attention_layernorm",
        "mlp": moe.where_there_are(config, "mlp", routed),
    }
    return rules.blueprint(config, llama.PARTS, block, buffers=(*llama.BUFFERS, *_predicting(fields, config)))


def _experts(fields: Fields, router: dict[str, Value], num_layers: int) -> dict[str, Value]:
    """What `DecoderConfig` has on experts."""
    first, every = fields.size("first_k_dense_replace", least=0), fields.size("moe_layer_freq")
    shared = fields.size("n_shared_experts", null=0, least=0)
    sparse = tuple(i >= first and i % every == 0 for i in range(num_layers))
    size = fields.size("moe_intermediate_size")
    if fields.get("n_routed_experts") is None or not any(sparse):
        fields.passed("n_routed_experts", "num_experts_per_tok", "routed_scaling_factor")
        return {}
    return router | {
        "num_experts": fields.size("n_routed_experts"),
        "experts_per_token": fields.size("num_experts_per_tok"),
        "expert_kind": "gated",
        "expert_scale": fields.positive("routed_scaling_factor"),
        "expert_dim": size,
        "expert_layers": None if all(sparse) else sparse,
        "shared_expert_dim": shared * size or None,
        "router_float32": True,
    }


def _predicting(fields: Fields, config: DecoderConfig) -> tuple[str, ...]:
    """The tensors of the layers behind the last one, which guess tokens further ahead and which nothing here runs."""
    more = fields.size("num_nextn_predict_layers", null=0, least=0)
    layers = "|".join(str(config.num_layers + i) for i in range(more))
    return (rf"(^|\.)layers\.({layers})\.",) if more else ()


def _params(f: Sizes) -> int:
    """Parameters without the layers that guess."""
    d, layers = f.size("model_dim"), f.num_layers
    sparse = experts.sparse_layers(f)
    dense = params.gated_mlp(f, f.size("mlp_dim"))
    total = params.embeddings(f) + d + layers * (latent.params(f) + 2 * d) + (layers - sparse) * dense
    if sparse:
        size, shared = f.size("moe_intermediate_size"), f.count("shared_experts")
        router = f.num_experts * (d + (f.family.blueprint is _v3))
        total += sparse * (f.num_experts * 3 * d * size + router + bool(shared) * params.gated_mlp(f, shared * size))
    return total


_USUAL = ROPE | latent.DEFAULTS | {
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "attention_bias": False, "kv_lora_rank": 512, "q_lora_rank": 1536,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "moe_layer_freq": 1,
}  # fmt: skip
_MAY_BE_NULL = frozenset({"q_lora_rank", "n_routed_experts", "n_shared_experts", "num_nextn_predict_layers"})
V2 = Family(
    model_type="deepseek_v2",
    defaults=_USUAL | usual(vocab=102400, dim=4096, mlp=11008, layers=32, heads=32, length=2048) | {
        "mlp_bias": False, "first_k_dense_replace": 0, "n_routed_experts": 64, "n_shared_experts": 2,
        "num_experts_per_tok": None, "moe_intermediate_size": 1407, "routed_scaling_factor": 1.0,
        "topk_method": "greedy", "n_group": None, "topk_group": None, "norm_topk_prob": False,
        "scoring_func": "softmax", "num_nextn_predict_layers": None,
    },
    aliases={"n_routed_experts": ("num_experts",)},
    nullable=_MAY_BE_NULL,
    blueprint=_v2,
    **latent.ONE_KEY,
    params=_params,
)  # fmt: skip
V3 = Family(
    model_type="deepseek_v3",
    defaults=_USUAL | usual(vocab=129280, dim=7168, mlp=18432, layers=61, heads=128, length=4096) | {
        "first_k_dense_replace": 3, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048, "routed_scaling_factor": 2.5, "topk_method": "noaux_tc", "n_group": 8,
        "topk_group": 4, "norm_topk_prob": True, "scoring_func": "sigmoid", "rope_interleave": True,
        "num_nextn_predict_layers": 1,
    },
    aliases={"n_routed_experts": ("num_local_experts",), "num_nextn_predict_layers": ("num_mtp_layers",)},
    nullable=_MAY_BE_NULL,
    blueprint=_v3,
    **latent.ONE_KEY,
    params=_params,
)  # fmt: skip
KIMI_K2 = dataclasses.replace(V3, model_type="kimi_k2")
"""Its published files have a name of their own for it."""
register(V2, V3, KIMI_K2)
