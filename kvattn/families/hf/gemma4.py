"""Gemma 4: layers with a window and layers without have heads of their own sizes, and the last layers keep no cache.

What it is made of beside that: an embedding for every layer, a norm of values, keys that are values too in layers
without a window, experts beside the MLP, and a learned number that each layer's output is multiplied by.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

from kvattn.errors import ConfigError
from kvattn.families import layers, moe, params, rules
from kvattn.families.config import DecoderConfig
from kvattn.families.defaults import usual
from kvattn.families.experts import expert_params
from kvattn.families.family import Experts, Family, Sizes
from kvattn.families.fields import Fields
from kvattn.families.hf import llama
from kvattn.families.kinds import FULL, WINDOW, Kind, every, shared_from
from kvattn.families.registry import register
from kvattn.families.settings import Settings, Value
from kvattn.positions.scaling import ROPE_TYPES

_PERIOD = 6
"""After so many layers one has no window, where the file does not list them."""


def _kinds(f: Settings, num_layers: int) -> list[Kind]:
    """The last layer never has a window, whatever a list says."""
    del f
    return [*every(_PERIOD, num_layers, WINDOW)[:-1], FULL]


def _sizes(f: Settings, kinds: Sequence[Kind], usual: tuple[int, int]) -> list[tuple[int, int]]:
    """K and H of each layer; `usual` are those of layers with a window.

    Raises:
        ConfigError: a ``per_layer_config`` that is none.
    """
    heads, size = usual
    own = f.get("num_global_key_value_heads") if f.flag("attention_k_eq_v") else None
    whole = heads if own is None else f.size("num_global_key_value_heads"), f.size("global_head_dim")
    found = [whole if kind == FULL else usual for kind in kinds]
    given = f.get("per_layer_config")
    if given is None:
        return found
    if not isinstance(given, Mapping) or not all(isinstance(entry, Mapping) for entry in given.values()):
        raise ConfigError(f"per_layer_config must hold an object for layers by their number, got {given!r}.")
    if unknown := sorted(set(map(str, given)) - set(map(str, range(len(kinds))))):
        raise ConfigError(f"per_layer_config names {', '.join(unknown)}, which are no layers of {len(kinds)}.")
    listed = [given.get(str(i), given.get(i)) for i in range(len(kinds))]
    known = {"head_dim", "num_key_value_heads"}
    if unknown := sorted({str(name) for entry in listed if entry for name in entry} - known):
        raise ConfigError(f"per_layer_config holds {', '.join(unknown)}; known are {', '.join(sorted(known))}.")
    return [
        usual if entry is None else (entry.get("num_key_value_heads", heads), entry.get("head_dim", size))
        for entry in listed
    ]


def _ropes(fields: Fields) -> dict[str, Value]:
    """Frequencies of both kinds of layers."""
    kinds = fields.mapping("rope_parameters") or {}
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown:
        raise fields.unsupported(
            "rope_parameters", dict(kinds), "one dict for full_attention and one for sliding_attention"
        )
    both = {}
    for name, usual_one in (("full_attention", _WHOLE), ("sliding_attention", {"rope_theta": 10000.0})):
        given = kinds.get(name) if kinds else usual_one
        if not isinstance(given, Mapping):
            raise ConfigError(f"{fields.source}: rope_parameters of {name} must be an object, got {given!r}.")
        both[name] = dict(given)
    whole, local = both["full_attention"], both["sliding_attention"]
    share = whole.pop("partial_rotary_factor", None) if whole.get("rope_type") == "proportional" else None
    inner = fields.scaled(whole, 10000.0, None, known=ROPE_TYPES)
    if share is not None:
        inner["rope_scaling"] = {"rope_type": "proportional", **(inner["rope_scaling"] or {})}
        inner["rope_scaling"]["partial_rotary_factor"] = share
    outer = fields.scaled(local, 10000.0, None)
    if outer["rope_scaling"] is not None:
        raise fields.unsupported("rope_parameters of sliding_attention", outer["rope_scaling"], "no scaling")
    return inner | {"local_rope_theta": outer["rope_theta"]}


_WHOLE: dict[str, Value] = {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6}


def _experts(fields: Fields) -> dict[str, Value]:
    if not fields.flag("enable_moe_block"):
        fields.passed("num_experts", "top_k_experts", "moe_intermediate_size")
        return {}
    return {
        "num_experts": fields.size("num_experts"),
        "experts_per_token": fields.size("top_k_experts"),
        "expert_dim": fields.size("moe_intermediate_size"),
        "expert_kind": "gated",
        "experts_beside": True,
        "router_scales": True,
    }


def _blueprint(fields: Fields) -> rules.Blueprint:
    sizes = llama.sizes(fields)
    num_layers, bias = sizes["num_layers"], fields.flag("attention_bias")
    windows = fields.windows(_kinds(fields, num_layers)) or (None,) * num_layers
    windows = (*windows[:-1], None)
    kinds: list[Kind] = [FULL if window is None else WINDOW for window in windows]
    fields.passed("sliding_window")
    # Tokens of images alone see those after them.
    fields.only("use_bidirectional_attention", "vision", why="a decoder is causal")
    kv_heads, head_dims = zip(*_sizes(fields, kinds, (sizes["num_kv_heads"], llama.head_dim(sizes))), strict=True)
    sharing, wide = fields.size("num_kv_shared_layers", least=0), fields.flag("use_double_wide_mlp")
    sources = shared_from(kinds, sharing)
    is_shared = [source != layer for layer, source in enumerate(sources)]
    own = fields.get("hidden_size_per_layer_input")
    own = fields.size("hidden_size_per_layer_input") if own else None
    if own is None:
        fields.passed("vocab_size_per_layer_input")
    else:
        fields.only("vocab_size_per_layer_input", sizes["vocab_size"], why="layers embed the tokens that there are")
    config = DecoderConfig(
        **sizes
        | {
            "num_kv_heads": kv_heads,
            "head_dim": head_dims,
            "mlp_dim": tuple(sizes["mlp_dim"] * (2 if wide and shared else 1) for shared in is_shared),
        },
        **_ropes(fields),
        **_experts(fields),
        windows=windows,
        kv_source=tuple(sources) if sharing else None,
        activation=fields.activation("hidden_activation"),
        attention_scale=1.0,
        logit_softcap=fields.number_or_none("final_logit_softcapping"),
        tie_embeddings=fields.flag("tie_word_embeddings"),
        embedding_scale=math.sqrt(sizes["model_dim"]),
        norm_position="sandwich",
        qk_norm=True,
        value_norm=True,
        values_from_keys=tuple(fields.flag("attention_k_eq_v") and kind == FULL for kind in kinds),
        qkv_bias=bias,
        out_bias=bias,
        per_layer_dim=own,
        layer_scale=True,
    )
    parts = dict(llama.PARTS) | _own_parts(config)
    # Published files have projections of layers that share, which nothing goes through.
    shared = "|".join(str(i) for i in range(num_layers) if is_shared[i])
    unused = [rf"(^|\.)layers\.({shared})\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\."] * bool(shared)
    return rules.blueprint(config, parts, _block(config), buffers=(*llama.BUFFERS, *unused))


def _own_parts(config: DecoderConfig) -> dict[str, rules.Part]:
    """The embeddings that layers have of their own."""
    size = config.per_layer_dim
    if size is None:
        return {}
    width = config.num_layers * size
    return {
        "own_embeddings.table": lambda _, ours: iter(
            [rules.tensor("model.embed_tokens_per_layer.weight", (config.vocab_size, width), f"{ours}.embedding")]
        ),
        "own_embeddings.projection": lambda _, ours: rules.linear(
            "model.per_layer_model_projection", ours, (config.model_dim,), (width,), False
        ),
        "own_embeddings.norm": lambda _, ours: rules.norm("model.per_layer_projection_norm", ours, size),
    }


def _block(config: DecoderConfig) -> dict[str, rules.Part]:
    """What the parts of a layer are called."""
    block: dict[str, rules.Part] = {
        "attention_norm": "input_layernorm",
        **llama.ATTENTION,
        **llama.QK_NORMS,
        "attention_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
        "scale": lambda theirs, ours: iter([rules.tensor(f"{theirs}.layer_scalar", (1,), ours)]),
    }
    if not config.num_experts:
        block |= llama.MLP
    else:
        block |= {ours.replace("mlp.", "mlp.beside."): theirs for ours, theirs in llama.MLP.items()}
        block |= {
            "mlp.beside_norm": "post_feedforward_layernorm_1",
            "mlp.experts_norm": "pre_feedforward_layernorm_2",
            "mlp.experts_post_norm": "post_feedforward_layernorm_2",
            "mlp": lambda theirs, ours: _routed(theirs, ours, config),
        }
    size = config.per_layer_dim
    if size is not None:
        features = (config.model_dim,)
        block |= {
            "own_embedding.gate": lambda theirs, ours: rules.linear(
                f"{theirs}.per_layer_input_gate", ours, features, (size,), False
            ),
            "own_embedding.out": lambda theirs, ours: rules.linear(
                f"{theirs}.per_layer_projection", ours, (size,), features, False
            ),
            "own_embedding.norm": "post_per_layer_input_norm",
        }
    return block


def _routed(theirs: str, ours: str, config: DecoderConfig) -> Iterator[rules.Rule]:
    """The router, and the experts, whose gates and up projections lie in one tensor."""
    features, experts = config.model_dim, config.num_experts
    yield from rules.linear(f"{theirs}.router.proj", f"{ours}.router", (features,), (experts,), False)
    yield rules.tensor(f"{theirs}.router.scale", (features,), f"{ours}.router_scale")
    yield rules.tensor(f"{theirs}.router.per_expert_scale", (experts,), f"{ours}.expert_scale")
    yield from moe.fused(f"{theirs}.experts", ours, config, transposed=True)


def _params(f: Sizes) -> int:
    """All that a text part has; numbers that multiply a layer's output are none."""
    d, kinds, own = f.size("model_dim"), layers.kinds_of(f), f.count("hidden_size_per_layer_input")
    shared, bias = f.count("num_kv_shared_layers"), f.flag("attention_bias")
    heads, hidden = f.size("heads"), f.size("mlp_dim")
    total = params.embeddings(f, tied=True) + d
    if own:
        total += len(kinds) * own * (f.size("vocab_size_per_layer_input") + d) + own
    for i, (kind, (kv_heads, size)) in enumerate(zip(kinds, _sizes(f, kinds, (f.kv_heads, f.head_dim)), strict=True)):
        keeps = i < len(kinds) - shared
        narrow = kv_heads * size * (1 if f.flag("attention_k_eq_v") and kind == FULL else 2) * keeps
        wide = heads * size
        total += d * (2 * wide + narrow) + (wide + narrow + d) * bias + size * (1 + keeps)
        total += 4 * d + 3 * d * hidden * (2 if f.flag("use_double_wide_mlp") and not keeps else 1)
        if own:
            total += 2 * d * own + d
        if f.flag("enable_moe_block"):
            experts = f.size("num_experts")
            total += experts * (expert_params(f) + d + 1) + 4 * d
    return total


_DEFAULTS: dict[str, Value] = usual(
    vocab=262144, dim=2304, mlp=9216, layers=30, heads=8, kv_heads=4, length=131072, tied=True
) | {
    "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "attention_bias": False,
    "rope_parameters": None, "partial_rotary_factor": None, "sliding_window": 512, "layer_types": None,
    "final_logit_softcapping": None, "use_bidirectional_attention": None, "vocab_size_per_layer_input": 262144,
    "hidden_size_per_layer_input": 256, "attention_k_eq_v": False, "num_kv_shared_layers": 0,
    "enable_moe_block": False, "use_double_wide_mlp": False, "num_experts": None, "top_k_experts": None,
    "moe_intermediate_size": None, "global_head_dim": 512, "num_global_key_value_heads": None,
    "per_layer_config": None,
}  # fmt: skip
GEMMA4 = Family(
    model_type="gemma4_text",
    defaults=_DEFAULTS,
    nullable=frozenset({"hidden_size_per_layer_input"}),
    text_part_of=("gemma4",),
    blueprint=_blueprint,
    layers=_kinds,
    heads=lambda f, kinds: _sizes(f, kinds, (f.kv_heads, f.head_dim)),
    params=_params,
    experts=Experts(is_sparse=lambda f, layer: f.flag("enable_moe_block")),
)
register(GEMMA4)
