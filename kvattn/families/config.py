"""`DecoderConfig`: what a decoder is made of. Frozen, hashable, without arrays, and readable as JSON."""

import dataclasses
from collections.abc import Mapping

from kvattn import _checks
from kvattn.errors import ConfigError, DTypeError, KVAttnError, RangeError
from kvattn.families import values
from kvattn.families.per_layer import LATENT, PerLayer
from kvattn.families.settings import Value
from kvattn.families.values import MAX_LAYERS


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(PerLayer):
    """The sizes and rules of a `kvattn.models.Decoder`. As they stand, the defaults are those of Llama.

    Args:
        vocab_size: V, token ids lie in [0, V).
        model_dim: D.
        num_layers: how many blocks of attention and MLP.
        num_heads: N.
        num_kv_heads: K, of all layers or one entry per layer; N if None. (With latent attention 1.)
        head_dim: H, of all layers or one entry per layer; D // N if None. (With latent attention C + R.)
        mlp_dim: the hidden size of the MLP, of all layers or one entry per layer; or of each expert (see `expert_dim`).
        rope_theta: base of the rotary frequencies.
        rope_scaling: the HuggingFace rope dict, see `kvattn.RoPE`.
        rotary_dim: how many leading entries of a head turn; all if None.
        rope_interleaved: neighbours of a head turn together, as `kvattn.RoPE` says.
        rope_layers: which layers turn queries and keys, an entry per layer; all if None. The others are told of order
            by the mask alone.
        windows: how many tokens a query sees, its own included: None for all of them, one int for all layers,
            or one entry per layer. A layer with a window keeps a cache of that size.
        chunks: a query sees the tokens of its own chunk of so many positions only: None, one int, or one entry per
            layer, as `windows`.
        kv_source: for each layer the number of the layer whose keys and values it attends to: its own, or that of an
            earlier layer that has some. Layers that have none of their own have no projections to them and keep no
            cache. None: each has its own.
        norm_epsilon: of the norms.
        tie_embeddings: the output projection is the transposed embedding.
        softcap: caps the attention scores.
        logit_softcap: caps the logits.
        positions: how order is told: "rope", "alibi", or "learned", a vector per position added to the embedding.
        max_positions: how many learned positions there are.
        alibi_slopes: one per head, where they are not the usual ones.
        local_rope_theta: base of the frequencies in layers that have a window; `rope_theta` if None. These layers
            have no `rope_scaling`.
        norm: "rms", or "layer" which also subtracts the mean.
        norm_bias: layer norms add a bias.
        norm_position: "pre" (before attention and MLP), "post" (after the sum with the residual), "sandwich" (before
            them, and again on what they return), or "output" (only on what they return).
        final_norm: a norm before the output projection.
        parallel: attention and MLP both read what came into the block, and both are added to it.
        shared_norm: in parallel blocks one norm serves both.
        residual_scale: multiplies what attention and MLP return before it is added.
        residual_after_norm: what is added is the normalised input, not the input itself (a variant of BLOOM).
        activation: "silu", "gelu", "gelu_tanh", "quick_gelu" or "relu".
        gated: the MLP is ``down(activation(gate(x)) * up(x))``, otherwise ``down(activation(up(x)))``.
        mlp_bias: the MLP's projections have biases.
        qkv_bias: so have those to queries, keys and values; in latent attention, those to latents, with `out_bias`.
        out_bias: so has the one from the heads back to D.
        qkv_clip: queries, keys and values are clipped to [-qkv_clip, qkv_clip].
        qk_norm: queries and keys pass a norm, of the kind that `norm` says.
        qk_norm_heads: over each head, with one scale for all of them ("shared"), one for each ("own") or none
            ("unscaled"), or over all heads together ("joint"), as in `kvattn.layers.MultiHeadAttention`.
        qk_norm_layers: in which layers, an entry per layer; all if None.
        temperature: floor and scale of a `kvattn.Temperature`, which layers without RoPE have. None: none.
        output_gate: what attention puts out is multiplied by a gate, as in `kvattn.layers.MultiHeadAttention`.
        value_norm: values are divided by the root of the mean of their squares, head by head.
        values_from_keys: there is no projection to values, they are the keys before their norm: in all layers, or one
            entry per layer.
        sinks: a learned logit per head joins the softmax sum.
        attention_scale: multiplies the scores, one for all layers or one per layer; 1/√H if None, in latent attention
            1/√(P + R).
        embedding_dim: the size of an embedding, where it is not D: then it is projected to D, and back.
        embedding_scale: multiplies the embedding.
        embedding_norm: the embedding passes a norm.
        per_layer_dim: the size of a second embedding, of which every layer has one of its own (Gemma 3n, 4): behind its
            MLP a layer adds ``norm(out(activation(gate(x)) * embedded))``, where what is embedded is the token and, by
            a projection, its first embedding.
        layer_scale: what a layer returns is multiplied by a learned number.
        logit_scale: multiplies the logits, before `logit_softcap`.
        num_experts: how many MLPs there are to choose from; 0 for one that serves all tokens.
        experts_per_token: how many of them serve a token.
        expert_kind: "gpt_oss", ``down((up + 1) * gate * sigmoid(alpha * gate))`` with biases, those of the router too;
            or "gated", the MLP that `activation` says, without biases.
        expert_scores: what the router's products with a token become: their "softmax", or the "sigmoid" of each.
        expert_shares: what a token's experts are weighted by: their scores over the sum of those that were "chosen", or
            as they are among "all", of which the chosen then have less than 1.
        expert_weighs: what a weight multiplies: what the expert makes of the token ("output"), or is given ("input").
        expert_scale: multiplies these weights; 1 if it is 1.
        expert_bias: a learned number per expert is added to its score where experts are chosen, not where they are
            weighted.
        expert_groups: into how many groups of neighbours experts are divided.
        groups_per_token: from how many groups, the best ones, a token's experts are chosen.
        group_best: a group is as good as the sum of so many of its best scores.
        router_float32: the router computes in float32, whatever the model computes in.
        expert_dim: the hidden size of each expert, where it is not mlp_dim.
        expert_alpha: see "gpt_oss".
        expert_limit: there gate is clipped to (-inf, limit], up to [-limit, limit].
        expert_layers: which layers have experts, an entry per layer; all if None. The others have an MLP.
        shared_expert_dim: the hidden size of one more, gated MLP that serves every token beside its experts.
        experts_beside: a layer with experts has its MLP too: both serve every token, with norms of their own before
            the experts and behind either, and are added.
        router_scales: the router sees the token divided by the root of the mean of its squares and √D, times a learned
            vector, and what an expert is weighted by is multiplied by a learned number of its own.
        shared_expert_gate: it is multiplied by the sigmoid of a learned product with the token.
        kv_lora_rank: C. Attention is latent (`kvattn.layers.MultiHeadLatentAttention`): of each token C + R numbers are
            cached for all heads. The next sizes belong to it.
        q_lora_rank: Q, the latent that queries are made from; None: they come from the features.
        qk_nope_head_dim: P, numbers of a query or key head without positions.
        qk_rope_head_dim: R, those that turn.
        v_head_dim: Hv, the size of a value head.
        latent_norm_epsilon: of the norms of latents.

    Raises:
        ConfigError: sizes that cannot work together, an unknown name.
        DTypeError: a size that is no int, a flag that is no bool.
        RangeError: more than 10,000 layers; a window, epsilon, scale or cap outside its range.

    Example:
        >>> from kvattn.models import DecoderConfig
        >>> config = DecoderConfig(vocab_size=256, model_dim=64, num_layers=2, num_heads=8, num_kv_heads=2, mlp_dim=96)
        >>> config.head_dim, config.layer_windows
        (8, (None, None))
    """

    vocab_size: int
    model_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | tuple[int, ...] | None = None
    head_dim: int | tuple[int, ...] | None = None
    mlp_dim: int | tuple[int, ...]
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Value] | tuple[tuple[str, Value], ...] | None = None
    rotary_dim: int | None = None
    rope_interleaved: bool = False
    rope_layers: tuple[bool, ...] | None = None
    windows: int | tuple[int | None, ...] | None = None
    chunks: int | tuple[int | None, ...] | None = None
    kv_source: tuple[int, ...] | None = None
    norm_epsilon: float = 1e-6
    tie_embeddings: bool = True
    softcap: float | None = None
    logit_softcap: float | None = None
    positions: str = "rope"
    max_positions: int | None = None
    alibi_slopes: tuple[float, ...] | None = None
    local_rope_theta: float | None = None
    norm: str = "rms"
    norm_bias: bool = False
    norm_position: str = "pre"
    final_norm: bool = True
    parallel: bool = False
    shared_norm: bool = False
    residual_scale: float | None = None
    residual_after_norm: bool = False
    activation: str = "silu"
    gated: bool = True
    mlp_bias: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    qkv_clip: float | None = None
    qk_norm: bool = False
    qk_norm_heads: str = "shared"
    qk_norm_layers: tuple[bool, ...] | None = None
    temperature: tuple[float, float] | None = None
    output_gate: str | None = None
    value_norm: bool = False
    values_from_keys: bool | tuple[bool, ...] = False
    sinks: bool = False
    attention_scale: float | tuple[float, ...] | None = None
    embedding_dim: int | None = None
    embedding_scale: float | None = None
    embedding_norm: bool = False
    per_layer_dim: int | None = None
    layer_scale: bool = False
    logit_scale: float | None = None
    num_experts: int = 0
    experts_per_token: int = 0
    expert_kind: str = "gpt_oss"
    expert_scores: str = "softmax"
    expert_shares: str = "chosen"
    expert_weighs: str = "output"
    expert_scale: float = 1.0
    expert_bias: bool = False
    expert_groups: int = 1
    groups_per_token: int = 1
    group_best: int = 1
    router_float32: bool = False
    expert_dim: int | None = None
    expert_alpha: float = 1.702
    expert_limit: float = 7.0
    expert_layers: tuple[bool, ...] | None = None
    shared_expert_dim: int | None = None
    shared_expert_gate: bool = False
    kv_lora_rank: int | None = None
    q_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    latent_norm_epsilon: float = 1e-6
    experts_beside: bool = False
    router_scales: bool = False

    def __post_init__(self) -> None:
        settled: dict[str, object] = {}
        for name in ("vocab_size", "model_dim", "num_layers"):
            settled[name] = _checks.integer(name, getattr(self, name), 1)
        if self.num_layers > MAX_LAYERS:
            raise RangeError(f"num_layers must be at most {MAX_LAYERS}, got {self.num_layers}.")
        settled |= self._heads()
        for name in values.FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise DTypeError(f"{name} must be a bool, got {getattr(self, name)!r}.")
        for name, known in values.CHOICES.items():
            if getattr(self, name) is not None or name not in values.MAY_BE_NONE:
                _checks.one_of(name, getattr(self, name), known)
        settled |= self._numbers()
        for name, value in settled.items():
            object.__setattr__(self, name, value)
        self._check_combinations()
        # RoPE checks the scaling and makes it hashable.
        if self.positions == "rope":
            try:
                rope = self.rope_by(self.rope_theta, self.rope_scaling, 0)
            except KVAttnError as error:
                raise type(error)(f"rope_scaling: {error}") from error
            object.__setattr__(self, "rope_scaling", rope.scaling)
            self.rope_of(0)
        self._check_sources()

    def _heads(self) -> dict[str, object]:
        """N, and K and H of all layers or one entry per layer."""
        _checks.integer("num_heads", self.num_heads, 1)
        if self.is_latent:
            kv_heads, head_dim = self._latent_head()
        else:
            kv_heads = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
            head_dim = self.model_dim // self.num_heads if self.head_dim is None else self.head_dim
            if self.head_dim is None and self.model_dim % self.num_heads:
                raise ConfigError(
                    f"model_dim ({self.model_dim}) is no multiple of num_heads ({self.num_heads}): give head_dim."
                )
        for count in kv_heads if isinstance(kv_heads, tuple | list) else (kv_heads,):
            _checks.head_counts(self.num_heads, count)
        each = {"head_dim": head_dim, "num_kv_heads": kv_heads, "mlp_dim": self.mlp_dim}
        found = {
            name: values.alike(values.each(name, value, self.num_layers, "layers", values.least_one))
            for name, value in each.items()
        }
        return {"num_heads": int(self.num_heads), **found}

    def _latent_head(self) -> tuple[int, int]:
        """K and H of latent attention: one head, of what is cached of a token."""
        sizes = {name: getattr(self, name) for name in LATENT}
        for name, size in {**sizes, "q_lora_rank": self.q_lora_rank}.items():
            if size is not None:
                _checks.integer(name, size, 1)
        missing = [name for name, size in sizes.items() if size is None]
        if missing:
            raise ConfigError(
                f"latent attention needs {', '.join(LATENT)}; {' and '.join(missing)} is missing: give all of them, "
                "or none and no q_lora_rank."
            )
        if self.qk_rope_head_dim % 2:  # pyright: ignore
            raise ConfigError(f"qk_rope_head_dim must be even, as pairs turn, got {self.qk_rope_head_dim}.")
        cached = sizes["kv_lora_rank"] + sizes["qk_rope_head_dim"]
        for name, only in (("num_kv_heads", 1), ("head_dim", cached)):
            value = getattr(self, name)
            if value not in (None, only):
                raise ConfigError(
                    f"{name} is {value}, but latent attention caches one key of kv_lora_rank + qk_rope_head_dim = "
                    f"{cached} numbers for all heads: leave {name} out (None in dataclasses.replace)."
                )
        return 1, cached

    def _numbers(self) -> dict[str, object]:
        """Numbers as Python's, which JSON and hashes take, and lists as tuples; all checked."""
        settled: dict[str, object] = {
            name: _checks.non_negative(name, getattr(self, name)) for name in ("norm_epsilon", "latent_norm_epsilon")
        }
        for name in values.POSITIVE:
            value = getattr(self, name)
            if value is not None or name not in values.MAY_BE_NONE:
                settled[name] = values.number(name, value, lambda n, x: _checks.positive(n, x, RangeError))
            if name.endswith("rope_theta") and value is not None and value < 1:
                raise ConfigError(f"{name} must be >= 1, got {value}.")
        for name in ("softcap", "logit_softcap"):
            settled[name] = _checks.positive_softcap(getattr(self, name), name)
        for name, least in values.SIZES.items():
            value = getattr(self, name)
            settled[name] = (
                None if value is None and name in values.MAY_BE_NONE else _checks.integer(name, value, least)
            )
        for name in ("windows", "chunks"):
            settled[name] = values.each(name, getattr(self, name), self.num_layers, "layers", values.window)
        settled["temperature"] = values.floor_and_scale(self.temperature)
        for name in ("rope_layers", "expert_layers", "qk_norm_layers"):
            settled[name] = values.flags_of_layers(name, getattr(self, name), self.num_layers)
        settled["values_from_keys"] = values.alike(
            values.each("values_from_keys", self.values_from_keys, self.num_layers, "layers", _checks.flag)
        )
        if self.kv_source is not None:
            if not isinstance(self.kv_source, tuple | list):
                raise DTypeError(f"kv_source must be a tuple of layer numbers, one per layer, got {self.kv_source!r}.")
            settled["kv_source"] = values.each("kv_source", self.kv_source, self.num_layers, "layers", values.number_of)
        settled["attention_scale"] = values.each(
            "attention_scale", self.attention_scale, self.num_layers, "layers", values.scale
        )
        if self.alibi_slopes is not None:
            if not isinstance(self.alibi_slopes, tuple | list):
                raise DTypeError(f"alibi_slopes must be a tuple of numbers, one per head, got {self.alibi_slopes!r}.")
            settled["alibi_slopes"] = values.each(
                "alibi_slopes", self.alibi_slopes, self.num_heads, "heads", values.slope
            )
        return settled

    def _check_combinations(self) -> None:
        for name, needs in (("max_positions", "learned"), ("alibi_slopes", "alibi")):
            if getattr(self, name) is not None and self.positions != needs:
                raise ConfigError(f"{name} belongs to positions={needs!r}, but positions is {self.positions!r}.")
        if self.positions == "learned":
            _checks.integer("max_positions", self.max_positions, 1)
        turning = ("rope_scaling", "local_rope_theta", "rotary_dim", "rope_interleaved", "rope_layers")
        if self.positions != "rope" and any(getattr(self, name) for name in turning):
            raise ConfigError(f"{', '.join(turning)} need positions='rope', got {self.positions!r}.")
        if self.qk_norm_layers is not None and not self.qk_norm:
            raise ConfigError("qk_norm_layers says which layers have the norm of qk_norm: set it too.")
        if self.norm_bias and self.norm != "layer":
            raise ConfigError("norm_bias needs norm='layer': an RMS norm has none.")
        if self.shared_norm and not self.parallel:
            raise ConfigError("shared_norm belongs to parallel blocks: set parallel, or leave it out.")
        if self.parallel and (self.norm_position != "pre" or self.residual_after_norm):
            raise ConfigError("parallel blocks have norm_position='pre' and add to the input itself.")
        if self.residual_after_norm and self.norm_position != "pre":
            raise ConfigError("residual_after_norm needs norm_position='pre'.")
        if bool(self.num_experts) != bool(self.experts_per_token) or self.experts_per_token > self.num_experts:
            raise ConfigError(
                f"experts_per_token ({self.experts_per_token}) must lie in [1, num_experts], and both be 0 where there "
                f"are none; num_experts is {self.num_experts}."
            )
        self._check_groups()
        beside = ("expert_dim", "expert_layers", "shared_expert_dim")
        if not self.num_experts and any(getattr(self, name) is not None for name in beside):
            raise ConfigError(f"{', '.join(beside)} belong to a model with experts: num_experts is 0.")
        for name in ("experts_beside", "router_scales"):
            if getattr(self, name) and (not self.num_experts or self.expert_kind != "gated"):
                raise ConfigError(f"{name} belongs to a model with experts whose expert_kind is 'gated'.")
        if self.experts_beside and (self.parallel or self.norm_position != "sandwich" or self.norm != "rms"):
            raise ConfigError("experts_beside needs norm_position='sandwich' and norm='rms', and no parallel blocks.")
        if self.per_layer_dim is not None and self.norm != "rms":
            raise ConfigError("per_layer_dim needs norm='rms'.")
        if isinstance(self.head_dim, tuple) and self.rotary_dim is not None:
            raise ConfigError("rotary_dim is one for all layers, and head_dim differs from layer to layer.")
        if self.shared_expert_gate and self.shared_expert_dim is None:
            raise ConfigError("shared_expert_gate is a part of the shared expert: give shared_expert_dim too.")

        if self.is_latent:
            self._check_latent()

    def _check_groups(self) -> None:
        """That groups divide the experts, and hold as many as a token is given to."""
        groups, taken, best = self.expert_groups, self.groups_per_token, self.group_best
        if groups == 1 and (taken, best) == (1, 1):
            return
        size, rest = divmod(self.num_experts, groups)
        if rest or not self.num_experts:
            raise ConfigError(f"expert_groups ({groups}) must divide num_experts, got {self.num_experts}.")
        if taken > groups:
            raise ConfigError(f"groups_per_token ({taken}) must be at most expert_groups ({groups}).")
        if best > size:
            raise ConfigError(f"group_best ({best}) must be at most the {size} experts of a group.")
        if self.experts_per_token > taken * size:
            raise ConfigError(
                f"experts_per_token ({self.experts_per_token}) must be at most the {taken * size} experts of the "
                f"{taken} groups that a token chooses from."
            )

    def _check_latent(self) -> None:
        """That nothing is asked of latent attention that it does not have."""
        if self.positions != "rope":
            raise ConfigError(f"latent attention needs positions='rope', got {self.positions!r}.")
        if self.qkv_bias != self.out_bias:
            raise ConfigError("in latent attention the projections to latents and the output's have biases, or none.")
        without = (
            "qkv_clip", "qk_norm", "sinks", "rotary_dim", "chunks", "temperature", "output_gate", "kv_source",
            "value_norm", "values_from_keys",
        )  # fmt: skip
        asked = [name for name in without if getattr(self, name)]
        if asked:
            raise ConfigError(f"latent attention (kv_lora_rank) has no {', '.join(asked)}: leave it out.")

    def _check_sources(self) -> None:
        """That `kv_source` names layers that have what is asked of them."""
        windows, sources = self.layer_windows, self.layer_sources
        sizes = list(zip(self.layer_kv_heads, self.layer_head_dims, strict=True))
        for layer, source in enumerate(sources):
            if source > layer or sources[source] != source:
                raise ConfigError(
                    f"kv_source of layer {layer} is {source}: it must be {layer} itself, or an earlier layer that has "
                    "keys and values of its own."
                )
            if sizes[layer] != sizes[source]:
                raise ConfigError(
                    f"layer {layer} has {sizes[layer][0]} key/value heads of {sizes[layer][1]}, layer {source}, whose "
                    f"keys and values it attends to, {sizes[source][0]} of {sizes[source][1]}."
                )
            if self.layer_chunks[layer] != self.layer_chunks[source]:
                raise ConfigError(f"layers {source} and {layer} share a cache, so they must have the same chunk.")
            kept, seen = windows[source], windows[layer]
            if kept is not None and (seen is None or seen > kept):
                raise ConfigError(
                    f"layer {layer} sees {seen or 'all'} tokens of layer {source}, which keeps {kept} of them."
                )
            if self.positions == "rope" and self.rope_of(layer) != self.rope_of(source):
                raise ConfigError(f"layers {source} and {layer} share keys, so they must turn them alike.")

    def to_json(self) -> dict[str, Value]:
        """The settings as JSON has them."""
        fields = dataclasses.asdict(self)
        scaling = fields["rope_scaling"]
        return fields | {"rope_scaling": None if scaling is None else dict(scaling)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Value]) -> "DecoderConfig":
        """The inverse of `to_json`.

        Raises:
            ConfigError: fields that are unknown or missing, all named.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - set(known))
        required = {name for name, field in known.items() if field.default is dataclasses.MISSING}
        missing = sorted(required - set(fields))
        if unknown or missing:
            raise ConfigError(f"the decoder's settings have unknown fields {unknown} and lack {missing}.")
        settings: dict[str, Value] = {name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()}
        return cls(**settings)

    @classmethod
    def palm(cls, **sizes: Value) -> "DecoderConfig":
        """A decoder of PaLM's kind, with the sizes of PaLM 8B unless others are given.

        One key/value head, parallel blocks behind one norm, SwiGLU, RoPE, no biases, one matrix for input and
        output embeddings. (Chowdhery et al., https://arxiv.org/abs/2204.02311, section 2 and table 1. Its weights are
        not public.)

        Args:
            sizes: any argument of `DecoderConfig`, such as ``num_layers=4``.

        Example:
            >>> from kvattn.models import DecoderConfig
            >>> config = DecoderConfig.palm(num_layers=2, model_dim=64, num_heads=4, head_dim=16, mlp_dim=256)
            >>> config.num_kv_heads, config.parallel
            (1, True)
        """
        palm = {
            "vocab_size": 256000, "model_dim": 4096, "num_layers": 32, "num_heads": 16, "num_kv_heads": 1,
            "head_dim": 256, "mlp_dim": 16384, "norm": "layer", "parallel": True, "shared_norm": True,
        }  # fmt: skip
        return cls(**palm | sizes)
