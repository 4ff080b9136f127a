"""Llama 4: layers with rotary positions see their chunk, the others everything, at a temperature; experts."""

from collections.abc import Iterator

from kvattn.families import layers, moe, params, rules
from kvattn.families.config import DecoderConfig
from kvattn.families.defaults import ROPE, usual
from kvattn.families.experts import expert_weights, layer_numbers
from kvattn.families.family import Estimate, Experts, Family, Sizes
from kvattn.families.fields import Fields
from kvattn.families.hf import llama
from kvattn.families.kinds import CHUNK, FULL, Kind
from kvattn.families.registry import register
from kvattn.families.settings import Settings, Value


def _layers(f: Settings, num_layers: int) -> list[Kind]:
    local = CHUNK if f.get("attention_chunk_size") is not None else FULL
    return [local if turned else FULL for turned in layers.turned(f, num_layers)]


def _is_sparse(f: Settings, layer: int) -> bool:
    every = f.size("interleave_moe_layer_step")
    if (chosen := f.get("moe_layers")) is not None:
        return layer in layer_numbers("moe_layers", chosen)
    return (layer + 1) % every == 0


def _blueprint(fields: Fields) -> rules.Blueprint:
    sizes, bias = llama.sizes(fields), fields.flag("attention_bias")
    num_layers, hidden = sizes["num_layers"], fields.size("intermediate_size")
    fields.passed("for_llm_compressor")  # a note of another tool's
    turned, sparse = layers.turned(fields, num_layers), [_is_sparse(fields, i) for i in range(num_layers)]
    config = DecoderConfig(
        **sizes | {"mlp_dim": fields.size("intermediate_size_mlp")},
        **fields.rope(),
        **(_experts(fields, hidden, sparse) if any(sparse) else {}),
        rope_interleaved=True,
        rope_layers=tuple(turned),
        chunks=fields.limits(_layers(fields, num_layers), CHUNK, "attention_chunk_size"),
        # Over a head, before it turns: turning changes no length, so it is as well as after.
        qk_norm=fields.flag("use_qk_norm") and any(turned),
        qk_norm_heads="unscaled",
        qk_norm_layers=tuple(turned) if fields.flag("use_qk_norm") and any(turned) else None,
        temperature=_temperature(fields),
        qkv_bias=bias,
        out_bias=bias,
        activation=fields.activation("hidden_act"),
        tie_embeddings=fields.flag("tie_word_embeddings"),
    )

    def routed(theirs: str, ours: str) -> Iterator[rules.Rule]:
        router = f"{theirs}.router", f"{ours}.router"
        yield from rules.linear(*router, (config.model_dim,), (config.num_experts,), False)
        yield from moe.fused(f"{theirs}.experts", ours, config)
        yield from moe.dense(f"{theirs}.shared_expert", f"{ours}.shared", config, hidden)

    block = {
        "attention_norm": "input_layernorm",
        **llama.ATTENTION,
        "mlp_norm": "post_attention_layernorm",
        "mlp": moe.where_there_are(config, "feed_forward", routed),
    }
    return rules.blueprint(config, llama.PARTS, block, buffers=llama.BUFFERS)


def _experts(fields: Fields, hidden: int, sparse: list[bool]) -> dict[str, Value]:
    """What `DecoderConfig` has on experts: their input is multiplied by the sigmoid of their score."""
    return {
        "num_experts": fields.size("num_local_experts"),
        "experts_per_token": fields.size("num_experts_per_tok"),
        "expert_kind": "gated",
        "expert_scores": "sigmoid",
        "expert_shares": "all",
        "expert_weighs": "input",
        "expert_dim": hidden,
        "expert_layers": None if all(sparse) else tuple(sparse),
        "shared_expert_dim": hidden,
    }


def _temperature(fields: Fields) -> tuple[float, float] | None:
    """Floor and scale; early files have a number where there is a flag now."""
    on, floor, scale = fields.get("attn_temperature_tuning"), fields.size("floor_scale"), fields.number("attn_scale")
    if not isinstance(on, bool | int):
        raise fields.unsupported("attn_temperature_tuning", on, "true or false")
    return (floor, scale) if on else None


def _params(f: Sizes) -> int:
    d, bias = f.size("model_dim"), f.flag("attention_bias")
    sparse = [_is_sparse(f, i) for i in range(f.num_layers)].count(True)
    layer = params.attention(f, qkv_bias=bias, out_bias=bias) + 2 * d
    experts = f.num_experts * (expert_weights(f) + d) + expert_weights(f)
    dense = 3 * d * f.size("intermediate_size_mlp")
    return params.embeddings(f) + d + f.num_layers * layer + sparse * experts + (f.num_layers - sparse) * dense


LLAMA4 = Family(
    model_type="llama4_text",
    defaults=ROPE | usual(vocab=202048, dim=5120, mlp=8192, layers=48, heads=40, kv_heads=8, length=131072) | {
        "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu", "intermediate_size_mlp": 16384,
        "head_dim": 128, "num_experts_per_tok": 1, "num_local_experts": 16, "interleave_moe_layer_step": 1,
        "attention_chunk_size": 8192, "layer_types": None, "attention_bias": False, "no_rope_layers": None,
        "no_rope_layer_interval": 4, "moe_layers": None, "use_qk_norm": True, "attn_temperature_tuning": True,
        "floor_scale": 8192, "attn_scale": 0.1, "for_llm_compressor": None,
    },
    nullable=frozenset({"num_key_value_heads", "head_dim", "attention_chunk_size"}),
    text_part_of=("llama4",),
    blueprint=_blueprint,
    layers=_layers,
    params=_params,
    estimate=Estimate(mlp=lambda f: params.mlp(f, hidden=f.size("intermediate_size_mlp"))),
    experts=Experts(is_sparse=_is_sparse, shared=expert_weights),
)  # fmt: skip
register(LLAMA4)
