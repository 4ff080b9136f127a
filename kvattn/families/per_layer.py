"""What holds of one layer of a decoder, by its `DecoderConfig`."""

from collections.abc import Mapping

from kvattn.families.settings import Value
from kvattn.positions import RoPE, Temperature

LATENT = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
"""Sizes of latent attention: all of them, or none."""


class PerLayer:
    """The settings of `DecoderConfig` layer by layer. Those that it reads are described there."""

    model_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | tuple[int, ...] | None
    head_dim: int | tuple[int, ...] | None
    mlp_dim: int | tuple[int, ...]
    positions: str
    rope_theta: float
    rope_scaling: Mapping[str, Value] | tuple[tuple[str, Value], ...] | None
    rotary_dim: int | None
    rope_interleaved: bool
    rope_layers: tuple[bool, ...] | None
    local_rope_theta: float | None
    qk_rope_head_dim: int | None
    windows: int | tuple[int | None, ...] | None
    chunks: int | tuple[int | None, ...] | None
    kv_source: tuple[int, ...] | None
    values_from_keys: bool | tuple[bool, ...]
    qk_norm: bool
    qk_norm_layers: tuple[bool, ...] | None
    temperature: tuple[float, float] | None
    attention_scale: float | tuple[float, ...] | None
    num_experts: int
    expert_layers: tuple[bool, ...] | None

    @property
    def is_latent(self) -> bool:
        """Whether attention is latent (MLA)."""
        return any(getattr(self, name) is not None for name in (*LATENT, "q_lora_rank"))

    @property
    def layer_sources(self) -> tuple[int, ...]:
        """`kv_source`, one entry per layer."""
        return tuple(range(self.num_layers)) if self.kv_source is None else self.kv_source

    @property
    def cache_layers(self) -> tuple[int, ...]:
        """The numbers of the layers that keep keys and values: caches of a model have one entry for each."""
        return tuple(layer for layer, source in enumerate(self.layer_sources) if layer == source)

    @property
    def layer_kv_heads(self) -> tuple[int, ...]:
        """K of each layer."""
        return self._per_layer(self.num_heads if self.num_kv_heads is None else self.num_kv_heads)

    @property
    def layer_head_dims(self) -> tuple[int, ...]:
        """H of each layer."""
        return self._per_layer(self.model_dim // self.num_heads if self.head_dim is None else self.head_dim)

    @property
    def layer_mlp_dims(self) -> tuple[int, ...]:
        """The hidden size of each layer's MLP."""
        return self._per_layer(self.mlp_dim)

    @property
    def layer_values_from_keys(self) -> tuple[bool, ...]:
        """Which layers have no projection to values."""
        return self._per_layer(self.values_from_keys)

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """The window of each layer."""
        return self._per_layer(self.windows)

    @property
    def layer_scales(self) -> tuple[float | None, ...]:
        """What multiplies the scores of each layer; None: 1/√H, in latent attention 1/√(P + R)."""
        return self._per_layer(self.attention_scale)

    @property
    def layer_chunks(self) -> tuple[int | None, ...]:
        """The chunk of positions of each layer."""
        return self._per_layer(self.chunks)

    def has_qk_norm(self, layer: int) -> bool:
        """Whether queries and keys of a layer pass a norm."""
        return self.qk_norm and (self.qk_norm_layers is None or self.qk_norm_layers[layer])

    def temperature_of(self, layer: int) -> Temperature | None:
        """The temperature of one layer's queries; None: it has none."""
        if self.temperature is None or self.rope_of(layer) is not None:
            return None
        return Temperature(*self.temperature)

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has experts, where others have one MLP."""
        return self.num_experts > 0 and (self.expert_layers is None or self.expert_layers[layer])

    @property
    def rope(self) -> RoPE | None:
        """The rotary embedding of layers without a window; None where order is told otherwise."""
        if self.positions != "rope":
            return None
        layer = next((i for i, window in enumerate(self.layer_windows) if window is None), 0)
        return self.rope_by(self.rope_theta, self.rope_scaling, layer)

    def rope_of(self, layer: int) -> RoPE | None:
        """The rotary embedding of one layer; None: it has none."""
        if self.rope_layers is not None and not self.rope_layers[layer]:
            return None
        if self.positions != "rope":
            return None
        if self.local_rope_theta is None or self.layer_windows[layer] is None:
            return self.rope_by(self.rope_theta, self.rope_scaling, layer)
        return self.rope_by(self.local_rope_theta, None, layer)

    def rope_by(
        self, theta: float, scaling: Mapping[str, Value] | tuple[tuple[str, Value], ...] | None, layer: int
    ) -> RoPE:
        """The rotary embedding of one layer by these frequencies."""
        return RoPE(
            int(self.qk_rope_head_dim or self.layer_head_dims[layer]),
            theta=theta,
            scaling=scaling,
            rotary_dim=self.rotary_dim,
            interleaved=self.rope_interleaved,
        )

    def _per_layer[T](self, value: T | tuple[T, ...]) -> tuple[T, ...]:
        return value if isinstance(value, tuple) else (value,) * self.num_layers
